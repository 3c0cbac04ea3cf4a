"""What TensorBoard shows of a run beside its curves: the settings, and curves that belong together.

TensorBoard orders its groups by name. The tab *Custom scalars* has its own order: what one looks at first stands first
there, and a quantity's layers share one plot.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

LAYERS = ("share_of_output", "mix_gate", "write_gate", "effective_rank", "read_variation", "norm_M", "norm_z")
LAYOUT = {
    "the run": {
        "loss": ["Multiline", ["^loss/"]],
        "tokens per second": ["Multiline", ["^speed/tokens_per_s$"]],
        "gradient norm": ["Multiline", ["^optimizer/gradient_norm$", "^gradient_norm/"]],
        "seconds per step": ["Multiline", ["^speed/(step|data|forward_backward|optimizer)_s$"]],
        "loss by segment of the document": ["Multiline", ["^loss_by_segment/"]],
    },
    "the memory, by layer": {quantity: ["Multiline", [f"^{quantity}/layer_"]] for quantity in LAYERS},
}
"""Category -> plot -> regular expressions of its tags."""

SHOWN_BESIDE_SETTINGS = ("loss/train", "speed/tokens_per_s")


def flatten(settings: Mapping[str, Any], prefix: str = "") -> dict[str, int | float | str]:
    """Settings by their whole names, as TensorBoard shows them: lists, null, and true and false (else 1.0) as text."""
    flat: dict[str, int | float | str] = {}
    for name, value in settings.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            plain = isinstance(value, int | float | str) and not isinstance(value, bool)
            flat[prefix + name] = value if plain else str(value)
    return flat


def show_settings(writer: SummaryWriter, settings: Mapping[str, Any]) -> None:
    """Fill the tabs *HParams* and *Custom scalars*."""
    from torch.utils.tensorboard.summary import hparams

    # Not `add_hparams`, which puts them into a folder of their own, away from the run's curves.
    experiment, start, _ = hparams(flatten(settings), dict.fromkeys(SHOWN_BESIDE_SETTINGS, 0.0))
    for summary in (experiment, start):
        writer.file_writer.add_summary(summary)
    writer.add_custom_scalars(LAYOUT)
