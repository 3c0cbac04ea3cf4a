"""`infini inspect`: show what a folder holds, and whether it is intact."""

from __future__ import annotations

import argparse
import contextlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch.arguments import positive_int
from launch.commands.prepare import left_out
from launch.commands.progress import progress

if TYPE_CHECKING:
    from data.files import Place
    from data.prepared.manifest import Manifest
    from data.prepared.shards import DocumentRecord

_BAR_CHARACTERS = 40
_SHARDS_SHOWN = 20
_SOURCES_SHOWN = 100
_SPEC_CHARACTERS = 500
_BAD_SHOWN = 10
_LANES_SHOWN = 32
_EXCERPTS = 3
_EXCERPT_TOKENS = 200
_EXCERPT_CHARACTERS = 160
_METADATA = "reading metadata"

DAMAGED = 1
"""Exit code when the folder is not what was written."""


@dataclass(frozen=True)
class FolderKind:
    """A kind of folder that can be inspected."""

    name: str
    recognises: Callable[[Path], bool]
    inspect: Callable[[Path, argparse.Namespace], int]
    """(folder, options) -> exit code."""


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "inspect",
        help="show what a folder holds, and verify it",
        description="Show what a folder holds and verify it against its recorded hashes. "
        f"Exit code {DAMAGED} when it is damaged.",
    )
    parser.add_argument("folder", metavar="DIR", help=f"one of: {', '.join(kind.name for kind in KINDS)}")
    parser.add_argument("--no-verify", dest="verify", action="store_false", help="only show, do not read every byte")
    a_set = parser.add_argument_group("of a prepared set")
    segment = a_set.add_mutually_exclusive_group()
    segment.add_argument(
        "--segment-length", type=positive_int, metavar="S", help="show the padding of segments of S tokens"
    )
    segment.add_argument("--config", metavar="CONFIG", help="the same for the segments of a run's configuration")
    a_set.add_argument("--plot", metavar="FILE.png", help="draw lengths, padding and the sources' shares")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from data.files import is_there, place

    folder = place(args.folder)
    if not folder.is_dir():
        raise ValueError(f"{folder} {'is not a folder' if is_there(folder) else 'does not exist'}")
    for kind in KINDS:
        if kind.recognises(folder):
            given = [name for name in ("segment_length", "config", "plot") if getattr(args, name) is not None]
            if given and kind.recognises is not _is_prepared_set:
                raise ValueError(f"--{given[0].replace('_', '-')} is about prepared sets, and {folder} is {kind.name}")
            return kind.inspect(folder, args)
    inside = sorted(path for path in folder.iterdir() if path.is_dir() and any(k.recognises(path) for k in KINDS))
    raise ValueError(
        f"{folder} is nothing that can be inspected; valid is: {', '.join(kind.name for kind in KINDS)}"
        + (f"; in it there is {', '.join(map(str, inside[:4]))}{', ...' if len(inside) > 4 else ''}" if inside else "")
    )


def _is_prepared_set(folder: Place) -> bool:
    # Any one of its files will do: a set whose manifest was lost is recognised and reported, not passed over.
    return any(
        any(folder.glob(pattern)) for pattern in ("manifest.json", "*.index.parquet", "train-*.tar", ".building")
    )


def _inspect_prepared_set(folder: Place, args: argparse.Namespace) -> int:
    from rich.console import Console

    from data.prepared.manifest import load_manifest
    from data.prepared.shards import PreparedSet
    from data.prepared.survey import DocumentHashes
    from data.prepared.verify import KINDS as PROBLEMS
    from data.prepared.verify import verify_set
    from launch.commands.survey import chosen_segments, draw_survey, print_padding, print_repeats, print_sources

    segments = chosen_segments(args.segment_length, args.config)
    console = Console(highlight=False, soft_wrap=True, markup=False)
    try:
        manifest = load_manifest(folder)
    except ValueError as error:
        console.print(f"DAMAGED  {PROBLEMS['manifest']}: {error}")
        return DAMAGED
    _print_manifest(console, folder, manifest)
    lengths = {}
    for split in manifest.splits:
        _print_excerpts(console, folder, split)
        with contextlib.suppress(ValueError, OSError):  # said by what verifies, or by the excerpts
            prepared = PreparedSet(folder, split)
            lengths[split] = prepared.lengths
            prepared.close()
    if lengths:
        print_padding(console, lengths, segments)
    if not args.verify:
        console.print("\nnot verified, and documents not compared with each other (--no-verify)")
        if args.plot and lengths:
            draw_survey(Path(args.plot), str(folder), lengths, None, segments)
        return 0
    hashes = DocumentHashes(manifest)
    total = sum(shard.bytes for summary in manifest.splits.values() for shard in summary.shards)
    documents = sum(summary.documents for summary in manifest.splits.values())
    done: Counter[str] = Counter()

    def advance(amount: int) -> None:
        done["bytes"] += amount
        shown_progress("verifying", done["bytes"], total, 0)

    def seen(split: str, number: int, record: DocumentRecord) -> None:
        done["documents"] += 1
        shown_progress(_METADATA, done["documents"], documents, 0)
        hashes.add(split, number, record)

    with progress({_METADATA: (1, "documents")}) as shown_progress:
        problems = verify_set(folder, advance, seen)
    if not problems:
        print_sources(console, lengths, hashes, segments)
        print_repeats(console, lengths, hashes)
    if args.plot and lengths:
        draw_survey(Path(args.plot), str(folder), lengths, None if problems else hashes, segments)
    console.print()
    for problem in problems:
        console.print(f"DAMAGED  {PROBLEMS[problem.kind]} [{problem.kind}]: {problem.message}")
    if problems:
        return DAMAGED
    if manifest.sha256 is None:
        console.print("manifest.json is not sealed (written by an older version): that it is as written cannot be said")
        console.print(f"all hashes in it match ({total:,} bytes of shards)")
    else:
        console.print(f"intact: all hashes match ({total:,} bytes of shards)")
    return 0


def _print_manifest(console: Any, folder: Place, manifest: Manifest) -> None:
    from rich.table import Table

    from data.files import printable, shown

    tokenizer = manifest.tokenizer
    console.print(f"prepared set {folder}")
    begin = f"begin tokens {', '.join(map(str, tokenizer.begin_ids))}, " if tokenizer.begin_ids else ""
    console.print(
        f"  tokenizer: {tokenizer.kind}, {tokenizer.vocab_size:,} tokens, "
        f"{begin}end token {tokenizer.eos_id}, "
        f"hash {tokenizer.hash[:12]}"
    )
    tokens = max(sum(source.tokens for source in manifest.sources), 1)
    for source in manifest.sources[:_SOURCES_SHOWN]:
        console.print(
            f"  source: {printable(source.spec[:_SPEC_CHARACTERS])}: "
            f"{source.documents:,} documents, {source.tokens:,} tokens ({source.tokens / tokens:.1%}){left_out(source)}"
        )
        for message in source.bad[:_BAD_SHOWN]:
            console.print(f"    left out: {printable(message[:_SPEC_CHARACTERS])}")
    if len(manifest.sources) > _SOURCES_SHOWN:
        console.print(f"  ... and {len(manifest.sources) - _SOURCES_SHOWN:,} more sources")
    options = ", ".join(
        f"{printable(name[:_SPEC_CHARACTERS])} {shown(value)}"
        for name, value in manifest.options.items()
        if name != "text_patterns"
    )
    console.print(f"  options: {options}")
    for split, summary in manifest.splits.items():
        console.print(f"\n{split}: {summary.documents:,} documents, {summary.tokens:,} tokens")
        table = Table("shard", "documents", "tokens", "bytes", "sha256", box=None, padding=(0, 2, 0, 2))
        for column in table.columns[1:4]:
            column.justify = "right"
        for shard in summary.shards[:_SHARDS_SHOWN]:
            numbers = (f"{getattr(shard, name):,}" for name in ("documents", "tokens", "bytes"))
            table.add_row(shard.name, *numbers, shard.sha256[:12])
        console.print(table)
        if len(summary.shards) > _SHARDS_SHOWN:
            console.print(f"  ... and {len(summary.shards) - _SHARDS_SHOWN:,} more shards")
        console.print("  documents by length in tokens")
        for line in histogram_lines(summary.length_histogram):
            console.print(f"  {line}")


def histogram_lines(histogram: list[tuple[int, int]]) -> list[str]:
    """Text bars for [[lower bound, documents], ...], bounds doubling; empty buckets in between are shown too."""
    if not histogram:
        return []
    counts = dict(histogram)
    largest = max(counts.values())
    lines, bound = [], min(counts)
    while bound <= max(counts):
        count = counts.get(bound, 0)
        # A bucket with anything in it shows at least one mark.
        bar = "#" * -(-count * _BAR_CHARACTERS // largest)
        lines.append(f"{bound:>11,} .. {2 * bound - 1:<11,} {count:>9,} {bar}".rstrip())
        bound *= 2
    return lines


def _print_excerpts(console: Any, folder: Place, split: str) -> None:
    from data.files import printable, shown
    from data.prepared.shards import PreparedSet
    from data.tokenizer.tokenizer import load_tokenizer

    try:
        prepared, tokenizer = PreparedSet(folder, split), load_tokenizer(folder)
        console.print(f"\n{split}: how documents begin")
        for i in sorted({round(k * (len(prepared) - 1) / max(_EXCERPTS - 1, 1)) for k in range(_EXCERPTS)}):
            tokens = prepared.read(i, 0, min(_EXCERPT_TOKENS, int(prepared.lengths[i])))
            text = printable(" ".join(tokenizer.decode(tokens).split())[:_EXCERPT_CHARACTERS])
            metadata = prepared.metadata(i)
            console.print(f"  {printable(metadata.id[:_SPEC_CHARACTERS])} ({prepared.lengths[i]:,} tokens): {text}")
            for start, stop in prepared.answers(i)[:1]:
                stop_shown = min(stop, start + _EXCERPT_TOKENS)
                answer = shown(tokenizer.decode(prepared.read(i, start, stop_shown)), _EXCERPT_CHARACTERS)
                console.print(f"    answer [{start}, {stop}): {answer}")
        prepared.close()
    except ValueError as error:
        console.print(f"\n{split}: documents cannot be shown: {error}")


def _is_checkpoint(folder: Path) -> bool:
    # One that has lost its checkpoint.json is recognised by what else it has.
    return any(any(folder.glob(pattern)) for pattern in ("checkpoint.json", "rank_*.safetensors", "rank_*.json"))


def _inspect_checkpoint(folder: Path, args: argparse.Namespace) -> int:
    verify = args.verify
    from launch.processes.quiet import quiet_libraries

    quiet_libraries()
    from model.config import rule_and_layers
    from pipeline.reporting.console import make_console, print_table
    from pipeline.reporting.inspect import read_contents

    console = make_console()
    found = read_contents(folder, verify=verify)
    if found.damage:
        return _tell_damage(console, folder, found.damage)
    summary, layout, config = found.summary, found.summary.layout, found.config
    model, memory = config.model, config.model.memory
    rows = {
        "step": f"{summary.step:,} ({summary.optimizer_steps:,} of them applied)",
        "tokens": f"{summary.tokens:,}",
        "run": config.name,
        "written for": f"tensor {layout.tensor} x context {layout.context} x pipeline {layout.pipeline} x data "
        f"{layout.data}, "
        f"ZeRO {layout.zero_stage}, {layout.world_size} processes; any other layout can read it",
        "model": f"{model.num_layers} layers of {model.hidden_size}, {model.num_attention_heads} heads, "
        f"{found.parameters:,} parameters, vocabulary {summary.vocab_size:,}",
        "memory": f"{rule_and_layers(model)}, write gate {memory.write_gate}, "
        f"segments of {model.segment_length} tokens",
        "size": f"{found.bytes:,} bytes in {len(summary.files) + 1} files",
        "versions": ", ".join(f"{name} {version}" for name, version in summary.versions.items()),
    }
    if summary.weights_only:
        rows["written for"] = "weights alone, for train.init_from; any layout can read it"
        rows["source"] = f"{summary.source.path} ({summary.source.model_type})"
    print_table(f"checkpoint {folder}", list(rows.items()), console=console)
    lanes = [
        [str(lane.number), lane.document, f"{lane.segment:,}", f"{lane.begun:,}"] for lane in found.lanes[:_LANES_SHOWN]
    ]
    print_table(
        f"{len(found.lanes)} lanes" + (f", the first {_LANES_SHOWN}" if len(found.lanes) > _LANES_SHOWN else ""),
        lanes,
        header=["lane", "document", f"next {'token' if found.config.data.packing else 'segment'}", "documents begun"],
        console=console,
    )
    fields = sorted({name for layer in found.layers for name in layer.norms})
    layers = [
        [
            layer.name,
            " / ".join(f"{share:.3f}" for share in layer.gate) if layer.gate else "-",
            f"{layer.write_gate_bias:.3f}" if layer.write_gate_bias is not None else "-",
            *(f"{layer.norms[name]:.4g}" if name in layer.norms else "-" for name in fields),
            f"{layer.effective_rank:.1f}" if layer.effective_rank is not None else "-",
        ]
        for layer in found.layers
    ]
    norms = [f"norm of {name}" for name in fields]
    print_table(
        "layers: memory's share sigmoid(beta), least / mean / most; means over lanes and heads",
        layers,
        header=["layer", "share", "write gate bias", *norms, "rank of M"],
        console=console,
    )
    for finding in found.findings:
        print(f"memory: {finding}")
    for note in found.notes:
        print(f"note: {note}")
    print("whole: all hashes match" if verify else "all files are there; contents not verified (--no-verify)")
    return 0


def _is_run(folder: Path) -> bool:
    return (folder / "config.yaml").is_file() or (folder / "checkpoints").is_dir()


def _inspect_run(folder: Path, args: argparse.Namespace) -> int:
    verify = args.verify
    from launch.processes.quiet import quiet_libraries

    quiet_libraries()
    from pipeline.reporting.console import make_console, print_table
    from pipeline.reporting.inspect import read_run
    from pipeline.reporting.metrics import METRICS_FILE
    from pipeline.reporting.run_summary import summary_rows

    console = make_console()
    found = read_run(folder, verify=verify)
    whole = "whole" if verify else "all files there (not verified)"
    rows = [
        [path.name, "latest" if path.name == found.latest else "", f"DAMAGED ({len(damage)})" if damage else whole]
        for path, damage in found.checkpoints
    ]
    print_table(f"run {folder}: {len(rows)} checkpoints", rows, console=console)
    newest = found.newest_whole
    print(f"newest whole checkpoint: {newest if newest else 'none'}")
    if found.metrics:
        title = f"{found.config.name}, by its last metrics" if found.config else "by its last metrics"
        print_table(title, summary_rows(found.config, found.metrics, found.began), console=console)
        all_numbers = f"all {len(found.metrics)} numbers are in {folder / METRICS_FILE}"
        console.print(all_numbers, soft_wrap=True, markup=False)
    else:
        print("no metrics yet")
    for finding in found.findings:
        print(f"memory: {finding}")
    for note in found.notes:
        print(f"note: {note}")
    return _tell_damage(console, folder, found.damage) if found.damage else 0


def _tell_damage(console: Any, folder: Path, damage: list[str]) -> int:
    console.print(f"\n{folder} is damaged", soft_wrap=True, markup=False)
    for message in damage:
        console.print(f"DAMAGED  {message}", soft_wrap=True, markup=False)
    return DAMAGED


KINDS = (
    FolderKind("a prepared set", _is_prepared_set, _inspect_prepared_set),
    FolderKind("a checkpoint", _is_checkpoint, _inspect_checkpoint),
    FolderKind("a run's folder", _is_run, _inspect_run),
)
