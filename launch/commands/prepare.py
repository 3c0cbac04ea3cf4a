"""`infini prepare`: turn text into a prepared set."""

from __future__ import annotations

import argparse
import os
import re
import sys
import time
from typing import TYPE_CHECKING, Any

from launch.arguments import count, number, seed
from launch.commands.progress import progress
from launch.commands.terminal import visible

if TYPE_CHECKING:
    from data.preparation.prepare import Prepared, PreparedParts
    from data.prepared.manifest import Manifest, SourceEntry

_SOURCES = """\
sources:
  notes.md, book.txt           a text file in UTF-8 is one document
  folder/                      every text (see --text-pattern) and record file in it and in linked folders; hidden ones,
                               and all that is neither, are passed over, with a count
  corpus.jsonl, corpus.ndjson  one document per line, its text in --text-column
  corpus.json                  the same where the first line is a whole object; else an array of records, or one record
  corpus.parquet               one document per row
                               all but parquet also as .gz or .zst; suffixes in small or capital letters
  python:torch,numpy           installed packages' own source code, one document per sub-package
  TASK:N,length=LO..HI[,seed=K][,OPTION=V ...]
                               N synthetic documents with questions; lengths in tokens (16K is 16,384) and options
                               drawn log-uniformly from LO..HI, or one value; tasks and their options:
    passkey                    keys, questions, depth=A..B (0..1), filler=SET (a prepared set, or a text file, to hide
                               the keys in, in place of the paper's sentences)
    needles                    keys, values, queries, questions, depth, filler
    tracking                   chains, hops, questions, filler
    words                      none
    facts                      task (1 to 3), facts, questions, filler
    recall                     pairs, questions, digits, filler
                               RULER's, with its templates; filler=FILE are the essays:
    niah_single_1              depth
    niah_single_2              depth, filler
    niah_single_3              depth, filler
    niah_multikey_1            depth, filler
    niah_multikey_2            depth
    niah_multikey_3            depth
    niah_multivalue            depth, filler
    niah_multiquery            depth, filler
    vt                         chains, hops
    cwe                        none
    fwe                        none
    qa_1                       questions (a JSON file of SQuAD's)
    qa_2                       questions (a JSON file of HotpotQA's)
                               BABILong's, with its prompts; filler=FILE is the background text:
    babilong_qa1               facts, filler
    babilong_qa2               facts, filler
    babilong_qa3               facts, filler
    babilong_qa4               filler
    babilong_qa5               facts, filler
                               texts, defaults and prompts: docs/synthetic_data.md

example:
  infini prepare python:torch,numpy passkey:500,length=512..16K --tokenizer train:4096 --out sets/demo

A set is complete when its manifest.json is there. After an interruption run the same command again."""


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "prepare",
        help="turn text into tokenised webdataset shards",
        description="Turn sources into a prepared set: webdataset shards of tokens, an index and a manifest.",
        epilog=_SOURCES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("sources", nargs="*", metavar="SOURCE", help="what to read (below)")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder of the set, made when needed")
    parser.add_argument(
        "--tokenizer",
        default="byte",
        metavar="T",
        help="byte; train:VOCAB, a byte-level BPE trained on the sources; or a folder: a prepared set, whose tokenizer "
        "is used again, or one with a Hugging Face tokenizer.json (default: byte)",
    )
    parser.add_argument(
        "--begin-token",
        choices=("auto", "none"),
        default="auto",
        help="auto: documents begin with the token that the tokenizer's own post-processor puts before a text, if it "
        "puts one; none: without it (default: auto)",
    )
    parser.add_argument(
        "--tokenizer-sample",
        default="8M",
        metavar="BYTES",
        help="text that train:VOCAB looks at, sampled over all sources (default: 8M)",
    )
    parser.add_argument(
        "--min-tokens",
        type=count,
        default=2,
        metavar="N",
        help="leave out shorter documents; the end token counts, a begin token does not (default: 2)",
    )
    parser.add_argument(
        "--max-tokens",
        type=count,
        metavar="N",
        help="cut longer documents into equal parts of at most N tokens, each a document of its own, all in the same "
        "split (default: documents stay whole)",
    )
    parser.add_argument(
        "--valid-fraction",
        type=number(0, 1),
        default=0.05,
        metavar="F",
        help="share of the documents held out for evaluation, by a hash of their names (default: 0.05)",
    )
    parser.add_argument("--shard-size", default="64M", metavar="BYTES", help="bytes of a shard at most (default: 64M)")
    parser.add_argument("--processes", type=int, metavar="N", help="encoding processes (default: one per core)")
    parser.add_argument(
        "--seed", type=seed, default=0, metavar="K", help="for passkey sources and the tokenizer's sample (default: 0)"
    )
    parser.add_argument(
        "--text-column", default="text", metavar="NAME", help="field of JSON and parquet records (default: text)"
    )
    parser.add_argument(
        "--text-pattern",
        action="append",
        metavar="GLOB",
        help="file names that are texts, in folders, in small or capital letters; may be given several times (default: "
        "*.txt, *.text, *.md, *.markdown, *.rst, *.tex)",
    )
    parser.add_argument(
        "--max-document-bytes",
        default="1G",
        metavar="BYTES",
        help="longest text file, line, row or sub-package that is read; a longer one is bad (default: 1G)",
    )
    parser.add_argument(
        "--skip-bad",
        action="store_true",
        help="leave out records and files that cannot be read (damaged, not UTF-8, null, too long), count them and "
        "name the first ones (default: the first one ends the command)",
    )
    several = parser.add_mutually_exclusive_group()
    several.add_argument(
        "--part",
        type=_part,
        metavar="I/N",
        help="make only the I-th of N parts of the set, in DIR/parts, for instance on one of N machines; I-J/N makes "
        "several, one after the other; finished ones are passed over",
    )
    several.add_argument(
        "--join",
        action="store_true",
        help="make the set of all parts in DIR: no SOURCE, no options; the same bytes as without parts",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace another set in DIR")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from data.preparation.options import PrepareOptions
    from data.preparation.prepare import prepare, prepare_parts
    from data.preparation.sources import TEXT_PATTERNS

    if args.join:
        return _join(args)
    options = PrepareOptions(
        tokenizer=args.tokenizer,
        begin_token=args.begin_token,
        tokenizer_sample_bytes=_size("--tokenizer-sample", args.tokenizer_sample),
        min_tokens=args.min_tokens,
        max_tokens=args.max_tokens,
        valid_fraction=args.valid_fraction,
        shard_bytes=_size("--shard-size", args.shard_size),
        seed=args.seed,
        text_column=args.text_column,
        text_patterns=tuple(args.text_pattern) if args.text_pattern else TEXT_PATTERNS,
        max_document_bytes=_size("--max-document-bytes", args.max_document_bytes),
        skip_bad=args.skip_bad,
    )
    started = time.perf_counter()
    if args.part is not None:
        numbers, parts = args.part
        if args.overwrite:
            raise ValueError("--overwrite with --part: remove the part's folder to make it again")
        with progress() as report:
            made = prepare_parts(
                args.sources, args.out, options, numbers, parts, processes=_processes(args), report=report, say=_note
            )
        _print_parts(args.out, made, parts, time.perf_counter() - started)
        return 0
    with progress() as report:
        prepared = prepare(
            args.sources,
            args.out,
            options,
            processes=_processes(args),
            overwrite=args.overwrite,
            report=report,
            say=_note,
        )
    _print_summary(args.out, prepared, time.perf_counter() - started)
    return 0


def _processes(args: argparse.Namespace) -> int:
    return len(os.sched_getaffinity(0)) if args.processes is None else args.processes


def _part(text: str) -> tuple[range, int]:
    """`3/16` or `1-4/16`."""
    from data.preparation.parts import MOST_PARTS

    found = re.fullmatch(r"([0-9]{1,6})(?:-([0-9]{1,6}))?/([0-9]{1,6})", text)
    if found:
        first, last, parts = int(found[1]), int(found[2] or found[1]), int(found[3])
        if 1 <= first <= last <= parts <= MOST_PARTS:
            return range(first, last + 1), parts
    raise argparse.ArgumentTypeError(
        f"{text[:40]!r} is no part; valid are I/N and I-J/N with 1 <= I <= J <= N <= {MOST_PARTS:,}"
    )


def _join(args: argparse.Namespace) -> int:
    from data.preparation.joining import SIZES
    from data.preparation.prepare import join_parts

    if args.sources:
        raise ValueError("--join takes no SOURCE: the parts in --out say what they were made of")
    started = time.perf_counter()
    with progress({SIZES: (1, "documents")}) as report:
        prepared = join_parts(args.out, processes=_processes(args), overwrite=args.overwrite, report=report)
    _print_summary(args.out, prepared, time.perf_counter() - started)
    print(f"  its parts, in {args.out}/parts, are no longer needed")
    return 0


def _print_parts(out: str, made: PreparedParts, parts: int, elapsed_s: float) -> None:
    from data.files import file_name

    for record in made.records:
        documents, tokens = (
            sum(getattr(entry, name) for entry in record.splits.values()) for name in ("documents", "tokens")
        )
        print(f"part {record.part} of {parts}: {documents:,} documents, {tokens:,} tokens")
    print(
        f"{made.built} of {len(made.records)} parts made in {elapsed_s:.1f} s; when all {parts} are in "
        f"{file_name(out)}/parts: infini prepare --join --out {file_name(out)}"
    )


def _note(text: str) -> None:
    print(f"note: {visible(text)}", file=sys.stderr, flush=True)


def _size(option: str, text: str) -> int:
    from data.preparation.sources import parse_size

    try:
        return parse_size(text)
    except ValueError as error:
        raise ValueError(f"{option}: {error}") from None


def _print_summary(out: str, prepared: Prepared, elapsed_s: float) -> None:
    from rich.console import Console

    from data.files import file_name, printable

    # What comes from files is not rich's markup.
    console = Console(highlight=False, soft_wrap=True, markup=False, emoji=False)
    manifest = prepared.manifest
    if prepared.built:
        console.print(f"prepared {file_name(out)} in {elapsed_s:.1f} s")
    else:
        console.print(f"{file_name(out)} is complete already: same sources, same options; nothing to do")
    for source in manifest.sources:
        console.print(
            f"  {printable(source.spec)}: {source.documents:,} documents, {source.tokens:,} tokens{left_out(source)}"
        )
        for message in source.bad:
            console.print(f"    left out: {printable(message)}")
        if source.bad_records + source.bad_files > len(source.bad):
            console.print(f"    ... and {source.bad_records + source.bad_files - len(source.bad):,} more")
    tokenizer = manifest.tokenizer
    begin = f", documents begin with {', '.join(map(str, tokenizer.begin_ids))}" if tokenizer.begin_ids else ""
    console.print(f"  tokenizer: {tokenizer.kind}, {tokenizer.vocab_size:,} tokens{begin} (hash {tokenizer.hash[:12]})")
    for split, summary in manifest.splits.items():
        console.print(
            f"  {split}: {summary.documents:,} documents, {summary.tokens:,} tokens, {len(summary.shards):,} shards"
        )
    console.print(f"  held out: {_held_out(manifest)}")


def left_out(source: SourceEntry) -> str:
    """What of a source is not in the set, with counts; empty where nothing is missing."""
    counts = (
        (source.too_short, "documents too short"),
        (source.empty, "documents empty"),
        (source.skipped_files, "files that are not UTF-8"),
        (source.bad_records, "bad records"),
        (source.bad_files, "bad files"),
        (sum(source.passed_over.values()), "files passed over"),
    )
    texts = [f"{count:,} {what}" for count, what in counts if count]
    return f" (left out: {', '.join(texts)})" if texts else ""


def _held_out(manifest: Manifest) -> str:
    """What was asked for, and what came of it: documents are held out whole."""
    asked = manifest.options.get("valid_fraction")
    wanted = f"--valid-fraction {asked} asked for {asked:.1%}" if isinstance(asked, float) else "none asked for"
    if "valid" not in manifest.splits:
        return f"nothing ({wanted})"
    train, valid = manifest.splits["train"], manifest.splits["valid"]
    documents = valid.documents / (train.documents + valid.documents)
    tokens = valid.tokens / (train.tokens + valid.tokens)
    return f"{documents:.1%} of the documents, {tokens:.1%} of the tokens ({wanted}; documents are held out whole)"
