"""How fast text becomes a prepared set, at which peak of memory, and how fast a set is read: against the libraries that
lie below, and against Megatron-LM's way of preparing."""

from __future__ import annotations

import importlib.util
import json
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from data.config import DataConfig, SetConfig
from data.lanes.loader import build_loader
from data.preparation.options import PrepareOptions
from data.preparation.prepare import join_parts, prepare, prepare_parts
from data.prepared.shards import PreparedSet
from data.tokenizer.tokenizer import load_tokenizer
from pipeline.benchmarks.alternating import Spread, order_of_round, spread
from pipeline.benchmarks.measuring import peak_growth

worker_pool = multiprocessing.get_context("fork").Pool
"""Megatron-LM's kind: as Linux starts processes by default."""
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


def repeat_text(text: Text, path: Path, times: int) -> Text:
    """The same documents, so many times one after the other."""
    contents = text.path.read_bytes()
    with open(path, "wb") as file:
        for _ in range(times):
            file.write(contents)
    return Text(path, times * text.documents, times * text.bytes)


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
    growth_bytes: int = 0
    """By how much the process's resident set grew at most; its children's is not in it."""


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


def prepare_set(text: Text, out: Path, vocab: int) -> None:
    """The set that is read, and whose tokenizer all encode with.

    To be called in a fresh process: training a tokenizer starts the library's threads, and a process that is forked
    afterwards has none but waits for them.
    """
    prepare([str(text.path)], out, options(f"train:{vocab}"))


def run_prepare(text: Text, out: Path, tokenizer: str, processes: int) -> Timed:
    """`infini prepare`: read, encode, check, write shards and index with their hashes, sync them."""
    grown, start = peak_growth(), time.perf_counter()
    prepared = prepare([str(text.path)], out, options(tokenizer), processes=processes, overwrite=True)
    tokens = sum(split.tokens for split in prepared.manifest.splits.values())
    return Timed(time.perf_counter() - start, tokens, grown())


def prepare_in_parts(text: Text, out: Path, tokenizer: str, parts: int) -> None:
    """What `run_join` joins: the text's parts, of one document at least each."""
    files = _split(text, out.with_suffix(".texts"), parts)
    prepare_parts(list(map(str, files)), out, options(tokenizer), range(1, parts + 1), parts)


def _split(text: Text, folder: Path, parts: int) -> list[Path]:
    folder.mkdir()
    lines = text.path.read_bytes().splitlines(keepends=True)
    files = [folder / f"{number}.jsonl" for number in range(parts)]
    for number, file in enumerate(files):
        file.write_bytes(b"".join(lines[number * len(lines) // parts : (number + 1) * len(lines) // parts]))
    return files


def run_join(out: Path, processes: int) -> Timed:
    """`infini prepare --join`: read the parts, compare every document with its hash, write one set."""
    grown, start = peak_growth(), time.perf_counter()
    joined = join_parts(out, processes=processes, overwrite=True)
    tokens = sum(split.tokens for split in joined.manifest.splits.values())
    return Timed(time.perf_counter() - start, tokens, grown())


def run_tokenizers(text: Text, tokenizer: str, threads: int) -> Timed:
    """Plain `tokenizers`: read the lines and encode all of them as one batch, on so many threads; nothing is written.

    To be called in a fresh process: the library's threads are started once.
    """
    os.environ.update(RAYON_NUM_THREADS=str(threads), TOKENIZERS_PARALLELISM="true" if threads > 1 else "false")
    from tokenizers import Tokenizer

    backend = Tokenizer.from_file(str(Path(tokenizer) / "tokenizer" / "tokenizer.json"))
    grown, start = peak_growth(), time.perf_counter()
    with open(text.path, encoding="utf-8") as file:
        texts = [json.loads(line)["text"] for line in file]
    encoded = backend.encode_batch_fast(texts, add_special_tokens=False)
    tokens = sum(len(one.ids) for one in encoded)
    return Timed(time.perf_counter() - start, tokens, grown())


class MegatronEncoder:
    """The `Encoder` of Megatron-LM's `tools/preprocess_data.py`: one document at a time, in a pool's process."""

    def __init__(self, definition: Path, eod: int) -> None:
        self.definition, self.eod = definition, eod

    def initializer(self) -> None:
        from tokenizers import Tokenizer

        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        MegatronEncoder.backend = Tokenizer.from_file(str(self.definition))

    def encode(self, line: str) -> tuple[list[int], list[int], int]:
        ids = MegatronEncoder.backend.encode(json.loads(line)["text"], add_special_tokens=False).ids
        if ids:
            ids.append(self.eod)  # --append-eod
        return ids, [len(ids)], len(line)


def run_megatron(text: Text, out: Path, tokenizer: str, workers: int) -> Timed:
    """Megatron-LM's `tools/preprocess_data.py --append-eod --workers N`, with megatron-core's own builder: a pool of
    encoders, whose documents go into one `.bin` and `.idx`, without hashes.

    Source: github.com/NVIDIA/Megatron-LM, `Partition.process_json_file`; the order of its calls, not its text.
    """
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    known, tokens = load_tokenizer(tokenizer), 0
    encoder = MegatronEncoder(Path(tokenizer) / "tokenizer" / "tokenizer.json", known.eos_id)
    builder = IndexedDatasetBuilder(f"{out}.bin", dtype=DType.optimal_dtype(known.vocab_size))
    grown, start = peak_growth(), time.perf_counter()
    with open(text.path, encoding="utf-8") as file, worker_pool(workers, encoder.initializer) as pool:
        for ids, lengths, _ in pool.imap(encoder.encode, file, 32):
            builder.add_document(ids, lengths)
            tokens += len(ids)
    builder.finalize(f"{out}.idx")
    return Timed(time.perf_counter() - start, tokens, grown())


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
