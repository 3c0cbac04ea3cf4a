"""What TensorBoard shows of a run: its curves under names that sort as one reads, plots of what belongs together, the
settings.

TensorBoard sorts groups and cards by name and knows no other order, so a group's tag begins with its place: loss and
speed first, the layers' cards in one group at the end. Lines of one plot are the tab *Custom scalars*: a quantity's
layers, the loss by segment, each kind of evaluation. A plot is laid out once there is something to draw in it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

LAYERS = ("share_of_output", "mix_gate", "write_gate", "effective_rank", "read_variation", "norm_M", "norm_z")
EVALUATION, BY_SEGMENT = "3_evaluation", "6_loss_by_segment"
_GROUPS = (
    ("loss/", "1_loss"),
    ("loss_by_set/", "1_loss"),
    ("speed/tokens_per_s", "2_speed"),
    ("speed/mfu", "2_speed"),
    ("evaluation/seconds", "7_time"),
    ("evaluation/", EVALUATION),
    ("memory/", "4_memory"),
    ("optimizer/", "5_optimizer"),
    ("gradient_norm/", "5_optimizer"),
    ("loss_by_segment/", BY_SEGMENT),
    ("speed/", "7_time"),
    ("ranks/", "7_time"),
    ("checkpoint/", "7_time"),
    ("progress/", "8_progress"),
    ("data/", "8_progress"),
    ("system/", "9_system"),
)
"""How a metric's name begins, and its group; the first that fits."""
_KEPT = ("loss_by_set", "gradient_norm", "ranks", "checkpoint")
"""Beginnings that say what the rest is of: they stay in the card's name."""
_CARDS = {"loss/answer": "train_answer", "loss/probe": "train_probe"}
"""Cards that come behind `train`."""
_OF_A_LAYER = re.compile(r"([^/]+)/layer_(\d+)")
_EVALUATED_BY_SEGMENT = re.compile(r"evaluation/([^/]+)/loss_by_segment_([^/]+)/([^/]+)")

PLOTS = {
    "the run": {
        "loss": "1_loss/",
        "tokens per second": "2_speed/tokens_per_s$",
        "loss by segment of the document": f"{BY_SEGMENT}/[^/]+$",
        "gradient norm": "5_optimizer/gradient_norm",
        "seconds per step": "7_time/(step|data|forward_backward|optimizer)_s$",
        "seconds per step that a rank itself works": "7_time/ranks_(slowest|median)_s$",
    },
    "the memory, by layer": {quantity: f"layers/{quantity}/" for quantity in LAYERS},
}
"""Category -> plot -> regular expression for the beginning of its tags."""

SHOWN_BESIDE_SETTINGS = ("loss/train", "speed/tokens_per_s")


def tag(name: str) -> str:
    """TensorBoard's name of a metric: `loss/train` is `1_loss/train`, `mix_gate/layer_03` is `layers/mix_gate/03`."""
    if layer := _OF_A_LAYER.fullmatch(name):
        return f"layers/{layer[1]}/{layer[2]}"
    if found := _EVALUATED_BY_SEGMENT.fullmatch(name):
        return f"{BY_SEGMENT}/{found[1]}_{found[2]}/{found[3]}"
    for beginning, group in _GROUPS:
        if name.startswith(beginning):
            first, _, rest = name.partition("/")
            kept = first in _KEPT or (first == "evaluation" and group != EVALUATION)
            return f"{group}/{_CARDS.get(name) or (f'{first}_{rest}' if kept else rest)}"
    return name


def layout(tags: Sequence[str]) -> dict[str, dict[str, list[Any]]]:
    """The tab *Custom scalars* for these tags, as `SummaryWriter.add_custom_scalars` takes it: no plot is empty."""
    evaluation = {}
    for group, title in ((EVALUATION, "{}"), (BY_SEGMENT, "{}, by segment")):
        parts = [name.split("/") for name in tags if name.startswith(f"{group}/")]
        # Two parts there are the training's own.
        for kind in sorted({part[1] for part in parts if group == EVALUATION or len(part) > 2}):
            evaluation[title.format(kind)] = f"{group}/{re.escape(kind)}(/|$)"
    laid_out = {}
    for category, plots in {**PLOTS, "evaluation": evaluation}.items():
        drawn = {title: begin for title, begin in plots.items() if any(re.match(begin, name) for name in tags)}
        if drawn:
            laid_out[category] = {title: ["Multiline", [f"^{begin}"]] for title, begin in drawn.items()}
    return laid_out


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


def read_image(path: str | Path) -> np.ndarray:
    """A PNG file as `[height, width, 3]`, uint8."""
    from PIL import Image

    with Image.open(path) as opened:
        return np.asarray(opened.convert("RGB"))


class Dashboard:
    """A run's event files.

    Args:
        folder: for them.
        hide_after: events of later steps, of an earlier attempt, are hidden; None for a new run.
    """

    def __init__(self, folder: Path, hide_after: int | None) -> None:
        # Imported here: it costs a second that a run without TensorBoard need not pay.
        from torch.utils.tensorboard import SummaryWriter

        purge = None if hide_after is None else hide_after + 1
        self._writer = SummaryWriter(str(folder), purge_step=purge, flush_secs=10)
        self._tags: set[str] = set()
        self._layout: dict[str, dict[str, list[Any]]] = {}

    def scalars(self, step: int, numbers: Mapping[str, float]) -> None:
        """One point of each curve."""
        for name, number in numbers.items():
            self._writer.add_scalar(tag(name), number, step)
        new = {tag(name) for name in numbers} - self._tags
        if new:
            self._tags |= new
            if (laid_out := layout(sorted(self._tags))) != self._layout:
                self._layout = laid_out
                self._writer.add_custom_scalars(laid_out)

    def histogram(self, step: int, name: str, values: np.ndarray) -> None:
        """The distribution of finite values, not empty."""
        self._writer.add_histogram(tag(name), values, step)

    def binned_histogram(self, step: int, name: str, counts: np.ndarray, edges: np.ndarray) -> None:
        """The same of counts per bin, not all 0; mean and variance as good as the bins."""
        centers, filled = (edges[:-1] + edges[1:]) / 2, np.flatnonzero(counts)
        self._writer.add_histogram_raw(
            tag(name),
            min=float(edges[filled[0]]),
            max=float(edges[filled[-1] + 1]),
            num=float(counts.sum()),
            sum=float((counts * centers).sum()),
            sum_squares=float((counts * centers**2).sum()),
            bucket_limits=edges[1:].tolist(),
            bucket_counts=counts.tolist(),
            global_step=step,
        )

    def image(self, step: int, name: str, image: str | Path | np.ndarray) -> None:
        """A PNG file or an array `[height, width, 3]` (uint8, or floats in 0..1)."""
        if not isinstance(image, np.ndarray):
            image = read_image(image)
        self._writer.add_image(tag(name), image, step, dataformats="HWC")

    def text(self, step: int, name: str, text: str) -> None:
        """Markdown."""
        self._writer.add_text(name, text, step)

    def settings(self, step: int, settings: Mapping[str, Any], text: str) -> None:
        """Fill the tab *HParams* with nested settings, and the text `configuration` with YAML."""
        from torch.utils.tensorboard.summary import hparams

        # Not `add_hparams`, which puts them into a folder of their own, away from the run's curves.
        shown = dict.fromkeys(map(tag, SHOWN_BESIDE_SETTINGS), 0.0)
        for summary in hparams(flatten(settings), shown)[:2]:
            self._writer.file_writer.add_summary(summary)
        self.text(step, "configuration", "".join(f"    {line}\n" for line in text.splitlines()))  # a code block

    def flush(self) -> None:
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()
