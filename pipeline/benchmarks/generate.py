"""What generation costs after prompts of different lengths: memory and time per token should not depend on them."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from data.tokenizer.tokenizer import byte_tokenizer
from model.rules.state import memory_tensors
from pipeline.benchmarks.measuring import peak_rss_bytes
from pipeline.config.load import load_config
from pipeline.inference.generate import BLOCK_CHARACTERS, Generator
from pipeline.inference.incremental import LaneState
from pipeline.inference.memory_file import Identity
from pipeline.inference.streaming import Streamer
from pipeline.parallel.setup import build_stage
from pipeline.parallel.topology import initialize

MODEL = ["model.num_attention_heads=4", "model.num_query_groups=2", "model.memory.rule=delta"]
SEED = 0


@dataclass
class GenerationCosts:
    """One prompt's measurements. Processor time is what an idle machine would take: one thread computes."""

    prompt_tokens: int
    parameters: int
    segment_length: int
    read_s: float
    read_cpu_s: float
    token_s: list[float]
    token_cpu_s: list[float]
    """Of every new token."""
    rss_before_bytes: int
    """Peak of the process with the model loaded, before the prompt."""
    rss_peak_bytes: int
    """Peak at the end."""
    memory_file_bytes: int
    state_bytes: int
    """Tensors of the memory and of the current segment."""


def write_prompt(path: Path, characters: int) -> None:
    """A file of ASCII letters: as many tokens for the byte tokenizer."""
    generator = np.random.default_rng(SEED)
    with open(path, "wb") as file:
        for size in _blocks(characters):
            file.write(generator.integers(97, 123, size, dtype=np.uint8).tobytes())


def _blocks(total: int) -> Iterator[int]:
    for start in range(0, total, BLOCK_CHARACTERS):
        yield min(BLOCK_CHARACTERS, total - start)


def measure(
    prompt_tokens: int,
    new_tokens: int,
    layers: int,
    hidden_size: int,
    segment_length: int,
    settings: Sequence[str] = (),
) -> GenerationCosts:
    """Read a prompt from a file and go on, with a model of random weights; for a process of its own.

    Args:
        settings: `key=value`, which win over `MODEL`.
    """
    sizes = [f"model.num_layers={layers}", f"model.hidden_size={hidden_size}", f"model.segment_length={segment_length}"]
    config = load_config(None, [*MODEL, *sizes, f"model.ffn_hidden_size={3 * hidden_size}", *settings])
    topology = initialize(tensor=1, pipeline=1, timeout_s=600)
    tokenizer = byte_tokenizer()
    streamer = Streamer(build_stage(config, topology, tokenizer.vocab_size), topology)
    identity = Identity(asdict(config.model), "", tokenizer.hash)
    generator = Generator(streamer, tokenizer, identity, tokenizer.vocab_size)
    with tempfile.TemporaryDirectory(prefix="infini-bench-") as folder:
        path = Path(folder) / "prompt.txt"
        write_prompt(path, prompt_tokens)
        before = peak_rss_bytes()
        wall, cpu = time.perf_counter(), time.process_time()
        state = generator.read([path])
        read_s, read_cpu_s = time.perf_counter() - wall, time.process_time() - cpu
        walls, cpus = _step_times(generator, state, new_tokens)
        peak = peak_rss_bytes()
        generator.save(state, Path(folder) / "memory")
        memory_file_bytes = (Path(folder) / "memory").stat().st_size
    dist.destroy_process_group()
    return GenerationCosts(
        prompt_tokens=state.tokens_read[0],
        parameters=sum(parameter.numel() for parameter in streamer.stage.parameters()),
        segment_length=segment_length,
        read_s=read_s,
        read_cpu_s=read_cpu_s,
        token_s=walls,
        token_cpu_s=cpus,
        rss_before_bytes=before,
        rss_peak_bytes=peak,
        memory_file_bytes=memory_file_bytes,
        state_bytes=sum(x.numel() * x.element_size() for x in [*memory_tensors(state.memory), *chain(*state.cache)]),
    )


def _step_times(generator: Generator, state: LaneState, count: int) -> tuple[list[float], list[float]]:
    """Seconds and processor seconds of every new token. The end token would end a text; here only the time counts."""
    model, state, walls, cpus = generator.model, state.select([0]), [], []
    for _ in range(count):
        wall, cpu = time.perf_counter(), time.process_time()
        logits = model.next_logits(state)
        model.append(state, torch.argmax(logits, dim=-1))
        walls.append(time.perf_counter() - wall)
        cpus.append(time.process_time() - cpu)
    return walls, cpus
