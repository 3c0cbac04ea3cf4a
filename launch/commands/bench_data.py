"""`infini bench data`: preparing text and reading it back, against plain `tokenizers`, Megatron-LM and webdataset."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from launch.arguments import positive_int, processes
from launch.commands.bench_options import add_segment_length
from launch.processes.world import be_alone

if TYPE_CHECKING:
    from launch.commands.bench_note import Note
    from pipeline.benchmarks.alternating import Spread
    from pipeline.benchmarks.data_rates import Text, Timed, Window

HELP = "infini prepare against plain tokenizers and Megatron-LM, the lane loader against webdataset"
QUICK = {"megabytes": 1, "vocab": 512, "processes": [1], "rounds": 1, "windows": 8, "times": 2}
PARTS = 4


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--megabytes",
        type=positive_int,
        default=16,
        metavar="N",
        help="of text, Python source of installed packages (%(default)s)",
    )
    parser.add_argument(
        "--vocab", type=positive_int, default=8192, metavar="N", help="of the byte-level BPE (%(default)s)"
    )
    parser.add_argument(
        "--processes",
        type=processes,
        nargs="+",
        default=[1, 2],
        metavar="N",
        help="encoding processes of prepare and Megatron-LM, threads of tokenizers (1 2)",
    )
    parser.add_argument(
        "--times",
        type=positive_int,
        default=10,
        metavar="N",
        help="of the text, repeated so often, for the memory at two sizes (%(default)s)",
    )
    parser.add_argument("--lanes", type=positive_int, default=8, metavar="G", help="of the loader (%(default)s)")
    parser.add_argument(
        "--segments", type=positive_int, default=8, metavar="T", help="of a window in each lane (%(default)s)"
    )
    add_segment_length(parser)
    parser.add_argument("--windows", type=positive_int, default=256, metavar="N", help="read in a round (%(default)s)")
    parser.add_argument("--rounds", type=positive_int, default=5, metavar="N", help="in which all run (%(default)s)")
    parser.add_argument("--folder", metavar="DIR", help="on the disk to measure (default: a temporary one)")


def measure(args: argparse.Namespace, note: Note) -> None:
    from pipeline.benchmarks.data_rates import Window, prepare_set, write_text
    from pipeline.benchmarks.measuring import in_fresh_process

    if args.quick:
        vars(args).update(QUICK)
    be_alone()
    with tempfile.TemporaryDirectory(prefix="infini-bench-", dir=args.folder) as name:
        folder = Path(name)
        text = write_text(folder / "text.jsonl", args.megabytes * 10**6)
        in_fresh_process(prepare_set, text, folder / "set", args.vocab)
        note.text(
            f"{text.bytes / 1e6:.1f} MB of text in {text.documents:,} documents (Python source of installed packages, "
            f"JSON lines), byte-level BPE of {args.vocab:,} tokens. Files are in the page cache. {args.rounds} rounds, "
            "in each of which all run, in an order that turns and reverses; medians, in brackets the quartiles."
        )
        prepared = _prepare(args, note, text, folder)
        _grow(args, note, text, folder)
        _join(args, note, text, folder)
        window = Window(args.lanes, args.segments, args.segment_length)
        read = _read(args, note, window, folder / "set")
    _draw(note.picture("rates"), prepared, read)


def _turns(args: argparse.Namespace, contestants: Mapping[str, Callable[[], Timed]]) -> dict[str, list[Timed]]:
    from pipeline.benchmarks.data_rates import take_turns
    from pipeline.benchmarks.measuring import Progress

    return take_turns(contestants, args.rounds, Progress(args.rounds * len(contestants)))


def _prepare(args: argparse.Namespace, note: Note, text: Text, folder: Path) -> dict[str, Spread]:
    from pipeline.benchmarks.data_rates import rates, ratios

    contestants = {}
    for count in args.processes:
        contestants |= _contestants(text, folder, count)
    runs = _turns(args, contestants)
    note.text("## Preparing")
    note.text(
        "`infini prepare` reads, encodes, and writes shards and index, hashed and synced, with so many processes. "
        "`tokenizers` reads the same lines and encodes them as one batch on so many threads; it writes nothing. "
        "Megatron-LM is its `tools/preprocess_data.py` with so many workers: a pool that encodes line by line, and "
        "megatron-core's `IndexedDatasetBuilder`, without hashes. The tokenizer is the same and there already."
    )
    rows = []
    for name in contestants:
        kind, count = name.split(", ")
        of = {"kind": kind, "processes": int(count)}
        rate = rates(runs[name])
        share = ratios(runs[name], runs[f"tokenizers, {count}"])
        megabytes = rate.median * text.bytes / 1e6 / runs[name][0].tokens
        note.number("tokens_per_second", "tokens/s", rate, part="prepare", **of)
        note.number("bytes_per_second", "bytes/s", megabytes * 1e6, part="prepare", **of)
        note.number("times_tokenizers", "1", share, part="prepare", **of)
        rows.append([name, rate.in_words(",.0f"), f"{megabytes:,.2f}", share.in_words(".2f")])
    note.table(["what, processes or threads", "tokens/s", "MB/s of text", "x tokenizers"], rows)
    return {name: rates(runs[name]) for name in contestants}


def _contestants(text: Text, folder: Path, count: int) -> dict[str, Callable[[], Timed]]:
    from pipeline.benchmarks.data_rates import run_megatron, run_prepare, run_tokenizers
    from pipeline.benchmarks.measuring import in_fresh_process

    tokenizer, out = str(folder / "set"), folder / "out"
    return {
        f"infini prepare, {count}": partial(in_fresh_process, run_prepare, text, out, tokenizer, count),
        f"tokenizers, {count}": partial(in_fresh_process, run_tokenizers, text, tokenizer, count),
        f"Megatron-LM, {count}": partial(in_fresh_process, run_megatron, text, folder / "megatron", tokenizer, count),
    }


def _grow(args: argparse.Namespace, note: Note, text: Text, folder: Path) -> None:
    from pipeline.benchmarks.alternating import spread
    from pipeline.benchmarks.data_rates import repeat_text

    more = repeat_text(text, folder / "more.jsonl", args.times)
    note.text("## Memory")
    note.text(
        "By how much the resident set of the process that was started grows at most, encoding children (of Megatron-LM "
        f"one, of the others none) aside: for the text, and for {args.times} times the text, {more.bytes / 1e6:.1f} MB."
    )
    rows = []
    for name, small in _contestants(text, folder, 1).items():
        kind = name.split(", ")[0]
        grown = [found().growth_bytes for found in (small, _contestants(more, folder, 1)[name])]
        for amount, size in zip(grown, (text.bytes, more.bytes), strict=True):
            note.number("grown", "bytes", spread([amount]), part="prepare", kind=kind, text_bytes=size)
        rows.append([kind, *(f"{amount / 1e6:.1f}" for amount in (*grown, grown[1] - grown[0]))])
    note.table(["what", "MB", f"MB, {args.times} x the text", "difference"], rows)


def _join(args: argparse.Namespace, note: Note, text: Text, folder: Path) -> None:
    from pipeline.benchmarks.data_rates import prepare_in_parts, rates, run_join

    prepare_in_parts(text, folder / "joined", str(folder / "set"), PARTS)
    runs = _turns(args, {"join": partial(run_join, folder / "joined", 1)})["join"]
    rate = rates(runs)
    note.number("joined_per_second", "tokens/s", rate, part="join")
    note.text("## Joining")
    note.text(
        f"`infini prepare --join` of {PARTS} parts, one process: {rate.in_words(',.0f')} tokens/s. It reads them, "
        "compares every document with its hash, and writes shards, index and manifest, hashed and synced."
    )


def _read(args: argparse.Namespace, note: Note, window: Window, folder: Path) -> dict[str, Spread]:
    from pipeline.benchmarks.data_rates import rates, ratios, run_loader, run_webdataset

    contestants = {
        "webdataset": lambda: run_webdataset(folder),
        "lane loader": lambda: run_loader(folder, window, args.windows, 0),
        "lane loader, prefetching": lambda: run_loader(folder, window, args.windows, 2),
    }
    runs = _turns(args, contestants)
    note.text("## Reading")
    note.text(
        "webdataset reads the shards from beginning to end and decodes whole documents. The lane loader lays out "
        f"windows of {window.lanes} lanes x {window.segments} segments x {window.segment_length} tokens (tokens, "
        "labels, weights, resets), from documents in its own order; only tokens of documents count, not padding. One "
        "process."
    )
    rows = []
    for name in contestants:
        rate, share = rates(runs[name]), ratios(runs[name], runs["webdataset"])
        note.number("tokens_per_second", "tokens/s", rate, part="read", kind=name)
        note.number("times_webdataset", "1", share, part="read", kind=name)
        rows.append([name, rate.in_words(",.0f"), share.in_words(".2f")])
    note.table(["what", "tokens/s", "x webdataset"], rows)
    note.text("What a training step waits for its data: `infini bench overhead`.")
    return {name: rates(runs[name]) for name in contestants}


def _draw(path: Path, *panels: Mapping[str, Spread]) -> None:
    from launch.commands.bench_bars import draw_bars

    draw_bars(path, "tokens/s", dict(zip(("preparing", "reading"), panels, strict=True)))
