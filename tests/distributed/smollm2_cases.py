"""What the ranks run in `test_smollm2`."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch

from model.config import MemoryConfig
from pipeline.checkpoint.folder import find_checkpoint
from pipeline.config.load import load_config
from pipeline.huggingface.import_model import import_model
from pipeline.inference.streaming import Streamer, open_checkpoint
from tests.distributed.grid import join
from tests.smollm2 import SEGMENT


def import_smollm2(source: str, out: str) -> None:
    join(tensor=1, pipeline=1, timeout_s=120)
    import_model(Path(source), Path(out), memory=MemoryConfig(rule="delta", beta_init=-4.0), segment_length=SEGMENT)


def first_segment(out: str, tokens: list[int], tensor: int, pipeline: int) -> dict[str, np.ndarray] | None:
    """Logits `[s, vocabulary / tp]` of this rank (on the last stage) and losses `[s]` of one segment of real text."""
    topology = join(tensor=tensor, pipeline=pipeline, timeout_s=120)
    config = load_config(Path(out) / "config.yaml", [f"parallel.tensor={tensor}", f"parallel.pipeline={pipeline}"])
    streamer, _ = open_checkpoint(config, topology, find_checkpoint(Path(out)))
    hidden = []
    if topology.is_last_stage:
        streamer.stage.final_norm.register_forward_pre_hook(lambda _, inputs: hidden.append(inputs[0]))
    with torch.no_grad():
        result = streamer.run(_batch(streamer, tokens), streamer.empty_memory(1))
        if not topology.is_last_stage:
            return None
        logits = streamer.stage.next_token_logits(hidden[0].squeeze(1))
    assert int(os.environ["WORLD_SIZE"]) == tensor * pipeline
    return {"logits": logits.numpy(), "loss": result.loss.flatten().numpy()}


def _batch(streamer: Streamer, tokens: list[int]):
    from pipeline.inference.streaming import array_document

    return streamer.window([array_document("text", np.array(tokens))], 0, 1, 0)
