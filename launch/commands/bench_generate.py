"""`infini bench generate`: memory and time per token of generation after short and very long prompts."""

from __future__ import annotations

import argparse
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

from launch.arguments import positive_int
from launch.processes.world import be_alone

if TYPE_CHECKING:
    from launch.commands.bench_note import Note
    from pipeline.benchmarks.generate import GenerationCosts

HELP = "peak memory and time per token of generation after prompts of 1K to 1M tokens"
LENGTHS = [1 << 10, 1 << 15, 1 << 20]


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--lengths", type=positive_int, nargs="+", metavar="N", default=LENGTHS, help="of the prompts, tokens"
    )
    parser.add_argument("--new-tokens", type=positive_int, metavar="N", default=256, help="per prompt (%(default)s)")


def measure(args: argparse.Namespace, note: Note) -> None:
    from pipeline.benchmarks.generate import measure
    from pipeline.benchmarks.measuring import in_fresh_process

    sizes = (2, 64, 128) if args.quick else (4, 128, 256)
    be_alone()
    costs = [in_fresh_process(measure, length, args.new_tokens, *sizes) for length in args.lengths]
    report(costs, note)
    _draw(note.picture("cost"), costs)


def report(costs: list[GenerationCosts], note: Note) -> None:
    """Write the table."""
    from pipeline.inference.streaming import WINDOW_TOKENS

    first = costs[0]
    note.text("## Prompts of different lengths")
    note.text(
        f"One process and one thread, {first.parameters:,} parameters with random weights, float32, rule delta, "
        f"segments of {first.segment_length} tokens, byte tokenizer. Every prompt is a file, read by a fresh process; "
        f"then {len(first.token_s)} tokens follow, of which the median is given. Processor time is what "
        "an idle machine would take. The peaks are resident sets: with "
        "the model loaded, before the prompt is read, and at the end. A prompt shorter than a window "
        f"({WINDOW_TOKENS['cpu']:,} tokens) is read in a smaller one, which takes less."
    )
    for cost in costs:
        of = {"prompt_tokens": cost.prompt_tokens}
        note.number("read_time", "s", cost.read_s, **of)
        note.number("read_cpu_time", "s", cost.read_cpu_s, **of)
        note.number("new_token_time", "s", cost.token_s, **of)
        note.number("new_token_cpu_time", "s", cost.token_cpu_s, **of)
        note.number("peak_before", "bytes", cost.rss_before_bytes, **of)
        note.number("peak", "bytes", cost.rss_peak_bytes, **of)
        note.number("memory_file", "bytes", cost.memory_file_bytes, **of)
        note.number("state", "bytes", cost.state_bytes, **of)
    rows = [
        [
            f"{cost.prompt_tokens:,}",
            f"{cost.read_s:,.1f}",
            f"{cost.read_cpu_s:,.1f}",
            f"{cost.prompt_tokens / cost.read_cpu_s:,.0f}",
            f"{1000 * median(cost.token_s):.1f}",
            f"{1000 * median(cost.token_cpu_s):.1f}",
            f"{1 / median(cost.token_cpu_s):,.0f}",
            f"{cost.rss_before_bytes / 2**20:,.0f}",
            f"{cost.rss_peak_bytes / 2**20:,.0f}",
            f"{cost.memory_file_bytes / 1024:,.0f}",
        ]
        for cost in costs
    ]
    header = ["prompt tokens", "reading, s", "processor, s", "tokens per processor s"]
    header += ["new token, ms", "processor, ms", "new tokens per processor s"]
    header += ["peak before, MiB", "peak, MiB", "memory file, KiB"]
    note.table(header, rows)


def _draw(path: Path, costs: list[GenerationCosts]) -> None:
    from pipeline.figures import quiet, save_figure, show_some_ticks, titled_figure

    figure = titled_figure(9.0, 3.0, "generation after prompts of different lengths")
    lengths = [cost.prompt_tokens for cost in costs]
    panels = (
        ("processor ms per new token", [1e3 * median(cost.token_cpu_s) for cost in costs]),
        ("peak of the process, MiB", [cost.rss_peak_bytes / 2**20 for cost in costs]),
    )
    for axes, (label, values) in zip(figure.subplots(1, 2), panels, strict=True):
        axes.plot(lengths, values, marker="o")
        axes.set_xscale("log", base=2)
        axes.set_ylim(0, 1.2 * max(values))
        show_some_ticks(axes, lengths, [f"{length:,}" for length in lengths])
        axes.set_xlabel("tokens of the prompt")
        axes.set_ylabel(label)
        quiet(axes)
    save_figure(figure, path)
