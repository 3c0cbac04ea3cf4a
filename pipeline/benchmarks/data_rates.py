"""How fast text becomes a prepared set, and how fast a set is read: against the libraries that lie below."""

from __future__ import annotations

import importlib.util
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from data.config import DataConfig, SetConfig
from data.lanes.loader import build_loader
from data.preparation.options import PrepareOptions
from data.preparation.prepare import prepare
from data.prepared.shards import PreparedSet
from pipeline.benchmarks.alternating import Spread, order_of_round, spread

PACKAGES = ("torch", "transformers", "numpy", "megatron", "deepspeed")
"""Whose Python source is the text: real text, and no download."""


@dataclass(frozen=True)
class Text:
    """What is prepared."""

    path: Path
    """JSON, a document per line."""
    documents: int
    bytes: int
    """Of the documents' text, in UTF-8."""


def write_text(path: Path, wanted_bytes: int) -> Text:
    """Write source files of installed packages until there are so many bytes, each a document.

    Raises:
        ValueError: there are not so many.
    """
    documents = size = 0
    with open(path, "w", encoding="utf-8") as file:
        for text in _sources():
            file.write(json.dumps({"text": text}) + "\n")
            documents += 1
            size += len(text.encode("utf-8"))
            if size >= wanted_bytes:
                return Text(path, documents, size)
    raise ValueError(f"the installed packages have {size / 1e6:.1f} MB of source, not {wanted_bytes / 1e6:.1f} MB")


def _sources() -> Iterator[str]:
    for package in PACKAGES:
        found = importlib.util.find_spec(package)
        for folder in found.submodule_search_locations or () if found else ():
            for file in sorted(Path(folder).rglob("*.py")):
                try:
                    text = file.read_text(encoding="utf-8")
                except (OSError, UnicodeDecodeError):
                    continue
                if text.strip():
                    yield text


@dataclass(frozen=True)
class Timed:
    """One run of something that reads or makes tokens."""

    seconds: float
    tokens: int


def take_turns(
    contestants: Mapping[str, Callable[[], Timed]], rounds: int, report: Callable[[str, float], None]
) -> dict[str, list[Timed]]:
    """Run all contestants in every round; each has its own clock, which leaves starting up out."""
    runs: dict[str, list[Timed]] = {name: [] for name in contestants}
    for number in range(rounds):
        for name in order_of_round(list(contestants), number):
            runs[name].append(contestants[name]())
            report(name, runs[name][-1].seconds)
    return runs


def rates(runs: list[Timed]) -> Spread:
    """Tokens per second."""
    return spread([run.tokens / run.seconds for run in runs])


def ratios(runs: list[Timed], others: list[Timed]) -> Spread:
    """How many times as many tokens per second as the others, round by round."""
    pairs = zip(runs, others, strict=True)
    return spread([one.tokens / one.seconds / (two.tokens / two.seconds) for one, two in pairs])


def options(tokenizer: str) -> PrepareOptions:
    return PrepareOptions(tokenizer=tokenizer, valid_fraction=0.0)


def run_prepare(text: Text, out: Path, tokenizer: str, processes: int) -> Timed:
    """`infini prepare`: read, encode, check, write shards and index with their hashes, sync them."""
    start = time.perf_counter()
    prepared = prepare([str(text.path)], out, options(tokenizer), processes=processes, overwrite=True)
    return Timed(time.perf_counter() - start, sum(split.tokens for split in prepared.manifest.splits.values()))


def run_tokenizers(text: Text, tokenizer: str, threads: int) -> Timed:
    """Plain `tokenizers`: read the lines and encode all of them as one batch, on so many threads; nothing is written.

    To be called in a fresh process: the library's threads are started once.
    """
    os.environ.update(RAYON_NUM_THREADS=str(threads), TOKENIZERS_PARALLELISM="true" if threads > 1 else "false")
    from tokenizers import Tokenizer

    backend = Tokenizer.from_file(str(Path(tokenizer) / "tokenizer" / "tokenizer.json"))
    start = time.perf_counter()
    with open(text.path, encoding="utf-8") as file:
        texts = [json.loads(line)["text"] for line in file]
    encoded = backend.encode_batch_fast(texts, add_special_tokens=False)
    tokens = sum(len(one.ids) for one in encoded)
    return Timed(time.perf_counter() - start, tokens)


@dataclass(frozen=True)
class Window:
    """What the loader lays out at a time."""

    lanes: int
    segments: int
    segment_length: int

    @property
    def tokens(self) -> int:
        return self.lanes * self.segments * self.segment_length


def run_loader(folder: Path, window: Window, windows: int, prefetch: int) -> Timed:
    """The lane loader, window after window."""
    loader = build_loader(
        DataConfig(sets=[SetConfig(path=str(folder))], prefetch=prefetch),
        lanes=window.lanes,
        first_lane=0,
        last_lane=window.lanes,
        segments_per_window=window.segments,
        segment_length=window.segment_length,
        seed=0,
    )
    loader.next_batch()
    padded = 0
    start = time.perf_counter()
    for _ in range(windows):
        padded += loader.next_batch().padded_tokens
    seconds = time.perf_counter() - start
    loader.close()
    return Timed(seconds, windows * window.tokens - padded)


def run_webdataset(folder: Path) -> Timed:
    """webdataset over the same shards: each document whole, decoded, in the order of the shards."""
    import webdataset

    shards = [str(folder / shard.name) for shard in PreparedSet(folder).manifest.splits["train"].shards]
    start = time.perf_counter()
    reader = webdataset.WebDataset(shards, shardshuffle=False).decode()
    tokens = sum(len(sample["npy"]) for sample in reader)
    return Timed(time.perf_counter() - start, tokens)
