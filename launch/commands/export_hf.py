"""`infini export-hf`: a checkpoint as a Hugging Face folder."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from data.files import place
from launch.commands.terminal import visible

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser(
        "export-hf",
        help="export a checkpoint to Hugging Face",
        description="Write a checkpoint as a folder that transformers loads: weights, configuration, tokenizer, and "
        "the code of the model with its memory (from_pretrained(DIR, trust_remote_code=True)). Reads and writes one "
        "tensor at a time.",
    )
    parser.add_argument(
        "source", metavar="CHECKPOINT", type=place, help="checkpoint folder, or a run's (its newest); also in a store"
    )
    parser.add_argument("--out", metavar="DIR", type=Path, required=True, help="folder to make")
    parser.add_argument(
        "--plain", action="store_true", help="leave the memory out: an ordinary Llama or Qwen without code of its own"
    )
    parser.add_argument(
        "--max-shard-size",
        type=_bytes,
        default="5GB",
        metavar="SIZE",
        help="of a safetensors file, such as 500MB (5GB)",
    )
    parser.add_argument(
        "--tokenizer", metavar="DIR", type=Path, help="the tokenizer's folder, where it is not found by itself"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from launch.processes.quiet import quiet_libraries

    quiet_libraries()
    from pipeline.huggingface.export_model import export_model, exported_elements
    from pipeline.reporting.console import progress

    with progress(exported_elements(args.source), f"exporting {args.source}, parameters") as advance:
        export = export_model(
            args.source,
            args.out,
            plain=args.plain,
            shard_bytes=args.max_shard_size,
            tokenizer=args.tokenizer,
            progress=advance,
        )
    for note in export.notes:
        print(f"note: {visible(note)}")
    trust = "" if args.plain else ", trust_remote_code=True"
    print(
        f"{args.out}: {export.parameters:,} parameters of {export.checkpoint}, {export.bytes:,} bytes in "
        f"{export.shards} file(s)\nload it with AutoModelForCausalLM.from_pretrained({str(args.out)!r}{trust})"
    )
    return 0


def _bytes(text: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]?B)?", text.strip(), re.IGNORECASE)
    size = (
        int(float(match[1]) * _UNITS[(match[2] or "").upper()]) if match and (match[2] or "").upper() in _UNITS else 0
    )
    if size < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 5GB or 500MB")
    return size
