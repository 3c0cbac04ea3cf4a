"""`infini import-hf`: a Hugging Face model as a checkpoint that runs start from."""

from __future__ import annotations

import argparse
from pathlib import Path

from launch.arguments import number, positive_int, whole
from launch.commands.terminal import visible


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser(
        "import-hf",
        help="import a Hugging Face model",
        description="Turn a Hugging Face model (Llama, Mistral, Qwen 2, Qwen 2.5 or Qwen 3, dense, safetensors) or a "
        "GGUF file of the Llama family into a checkpoint that runs start from on any layout, with a configuration and "
        "the tokenizer beside it. Reads and writes one tensor at a time.",
    )
    parser.add_argument("source", metavar="MODEL", type=Path, help="folder with config.json, or a .gguf file")
    parser.add_argument("--out", metavar="DIR", type=Path, required=True, help="folder to make")
    parser.add_argument(
        "--segment-length", type=positive_int, metavar="S", help="tokens that the local attention sees (2048)"
    )
    parser.add_argument("--memory-rule", metavar="RULE", help="rule of the memory (delta)")
    parser.add_argument(
        "--memory-layers", type=whole(0, 2047), nargs="+", metavar="LAYER", help="layers with a memory, from 0 (all)"
    )
    parser.add_argument("--write-gate", metavar="GATE", help="what is written (none: all)")
    parser.add_argument(
        "--beta-init",
        type=number(-10_000, 10_000),
        metavar="BETA",
        help="the memory starts with sigmoid(BETA) of the attention's output (-4: 0.018)",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from launch.processes.quiet import quiet_libraries

    quiet_libraries()
    from launch.processes.world import join_world
    from model.config import MemoryConfig
    from model.huggingface.config import is_exported
    from pipeline.huggingface.folder_source import open_source
    from pipeline.huggingface.import_model import import_model, parameter_elements
    from pipeline.parallel.topology import initialize, shutdown
    from pipeline.reporting.console import progress

    source = open_source(args.source)
    total = parameter_elements(source)
    join_world()
    initialize(tensor=1, pipeline=1, timeout_s=120)
    chosen = {"rule": args.memory_rule, "write_gate": args.write_gate, "beta_init": args.beta_init}
    chosen |= {"layers": args.memory_layers}
    chosen = {name: value for name, value in chosen.items() if value is not None}
    memory = MemoryConfig(**{"rule": "delta", "beta_init": -4.0} | chosen)
    if is_exported(source.config) and not chosen:
        memory = None
    options = {"memory": memory, "segment_length": args.segment_length}
    try:
        with progress(total, f"importing {args.source}, parameters") as advance:
            notes = import_model(args.source, args.out, **options, progress=advance)
    finally:
        shutdown()
    for note in notes:
        print(f"note: {visible(note)}")
    print(
        f"{args.out}: {total:,} parameters; next: `infini prepare SOURCE... --tokenizer {args.out / 'tokenizer'} "
        f"--out SET`, `infini train {args.out / 'config.yaml'} data.sets.0.path=SET`"
    )
    return 0
