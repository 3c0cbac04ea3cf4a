"""What the ranks run in `test_init_from`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from model.config import MemoryConfig
from pipeline.huggingface.import_model import import_model
from tests.distributed import cases
from tests.distributed.grid import join


def import_folder(source: str, out: str, segment_length: int) -> None:
    """Import with the delta rule and beta = -4."""
    join(tensor=1, pipeline=1, timeout_s=60)
    import_model(Path(source), Path(out), memory=MemoryConfig(beta_init=-4.0), segment_length=segment_length)


def first_loss(folder: str, data: str, overrides: list[str], hf_folder: str | None = None) -> dict[str, Any]:
    """Loss of a run's first window; with `hf_folder` also that of the Hugging Face model, segment by segment."""
    trainer = cases.make_trainer(folder, data, overrides)
    trainer.start(None)
    batch = trainer.loader.next_batch()
    sums, _, _ = trainer.update(batch, trainer.forward_backward(batch))
    result = {"loss": sums["loss"] / sums["weight"], "all_start": bool(batch.reset.all())}
    if hf_folder is not None:
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(hf_folder)
        with torch.no_grad():
            logits = model(batch.tokens.flatten(0, 1)).logits
        losses = torch.nn.functional.cross_entropy(logits.mT, batch.labels.flatten(0, 1), reduction="none")
        weight = batch.loss_weight.flatten(0, 1)
        result["hf_loss"] = float((losses * weight).sum() / weight.sum())
    cases.finish(trainer)
    return result


def try_to_start(folder: str, data: str, overrides: list[str]) -> str | None:
    """The message of the ValueError that starting a run raises, on whichever rank; None without one."""
    try:
        trainer = cases.make_trainer(folder, data, overrides)
    except ValueError as error:
        return str(error)
    try:
        trainer.start(None)
    except ValueError as error:
        return str(error)
    finally:
        cases.finish(trainer)
    return None
