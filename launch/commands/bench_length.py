"""`infini bench length`: time and memory per token of documents from 2K to 1M tokens, trained on and generated from."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from launch.arguments import number, positive_int
from launch.commands.bench_options import (
    RULES,
    add_machine,
    add_segment_length,
    add_sizes,
    check_multiple,
    check_sizes,
    choose_device,
    hide_devices,
    machine_in_words,
    model_sizes,
)
from launch.processes.world import be_alone

if TYPE_CHECKING:
    from launch.commands.bench_note import Note
    from pipeline.benchmarks.contestants import Sizes
    from pipeline.benchmarks.length import NewTokenCost, TrainingCost

HELP = "time and memory per token for documents of 2K to 1M tokens: memory, sliding window, full attention"
LENGTHS = [1 << 11, 1 << 13, 1 << 15, 1 << 17, 1 << 20]
PARTS = ("train", "generate")
QUICK = {"hidden": 32, "layers": 1, "heads": 2, "ffn": 86, "vocab": 64, "window": 64, "segment_length": 16}
QUICK |= {"lengths": [256, 1024], "reference": 256, "rounds": 2, "new_tokens": 4}


def add_options(parser: argparse.ArgumentParser) -> None:
    sizes = add_sizes(parser, hidden=128, layers=4, heads=4, ffn=344, vocab=256)
    add_segment_length(sizes)
    sizes.add_argument(
        "--window", type=positive_int, default=2048, metavar="N", help="tokens of a training window (%(default)s)"
    )
    parser.add_argument(
        "--lengths", type=positive_int, nargs="+", default=LENGTHS, metavar="N", help="of the documents, tokens"
    )
    parser.add_argument(
        "--reference", type=positive_int, default=8192, metavar="N", help="length to compare with (%(default)s)"
    )
    parser.add_argument("--rules", nargs="+", choices=RULES, default=["delta"], help="memory rules (delta)")
    parser.add_argument("--only", choices=PARTS, help="measure this part alone")
    parser.add_argument(
        "--rounds", type=positive_int, default=8, metavar="N", help="in which long and short take turns (%(default)s)"
    )
    parser.add_argument(
        "--full-rounds", type=positive_int, default=2, metavar="N", help="documents with full attention (%(default)s)"
    )
    parser.add_argument(
        "--limit-s",
        type=number(0, 1e6, above=True),
        default=120.0,
        metavar="SECONDS",
        help="full attention stops before a length that takes longer a time (%(default)s)",
    )
    parser.add_argument(
        "--limit-gib",
        type=number(0, 1e6, above=True),
        default=4.0,
        metavar="GIB",
        help="full attention stops before a length that takes more memory (%(default)s)",
    )
    parser.add_argument("--new-tokens", type=positive_int, default=64, metavar="N", help="generated (%(default)s)")
    add_machine(parser)


def measure(args: argparse.Namespace, note: Note) -> None:
    """Raises: ValueError: lengths that are not whole windows, or a device that is not there."""
    from pipeline.benchmarks.contestants import PEERS
    from pipeline.benchmarks.length import SLIDING
    from pipeline.benchmarks.measuring import in_fresh_process

    if args.quick:
        vars(args).update(QUICK)
    check_sizes(args)
    check_multiple(args, "window", "segment_length")
    args.lengths = sorted({*args.lengths})
    for option, length in [("--reference", args.reference), *(("--lengths", length) for length in args.lengths)]:
        if length % args.window:
            raise ValueError(f"{option} {length} must be a multiple of --window {args.window}")
    hide_devices(args)
    be_alone()
    device, note.device = in_fresh_process(_device, args)
    sizes = model_sizes(args, tokens=args.window, lanes=1)
    models = [*args.rules, SLIDING]
    note.text(
        f"{args.layers} layers, hidden size {args.hidden}, {args.heads} heads, MLP {args.ffn}, {args.vocab} tokens in "
        f"the vocabulary, segments of {args.segment_length} tokens, float32, one lane, "
        f"{machine_in_words(device, args.threads)}. `{SLIDING}` is this model without a memory, whose local attention "
        "sees the segment before as well; `full attention` is transformers' Llama of the same sizes. Every line was "
        "measured in a process of its own. "
        + (
            "Times are processor time of the one thread, which other work on the machine disturbs less than the clock."
            if device.type == "cpu" and args.threads == 1
            else "Times are wall time."
        )
    )
    full = PEERS["transformers"].installed
    if full:
        from transformers import LlamaForCausalLM, StaticCache  # noqa: F401, once, for all the processes forked below
    else:
        note.text("transformers is not installed: full attention is not measured.")
    trained, generated = [], []
    if args.only != "generate":
        trained = _train(args, note, sizes, models, full)
    if args.only != "train":
        generated = _generate(args, note, sizes, models, full)
    _draw(note.picture("length"), trained, generated)


def _device(args: argparse.Namespace):
    """The device, and its name if it is an accelerator."""
    from model.device import device_name

    device = choose_device(args)
    return device, device_name(device)


def _train(args: argparse.Namespace, note: Note, sizes: Sizes, models: Sequence[str], full: bool) -> list[TrainingCost]:
    from pipeline.benchmarks.length import (
        FULL,
        TrainingCost,
        lengths_within,
        memory_carried,
        memory_full,
        train_carried,
        train_full,
    )
    from pipeline.benchmarks.measuring import in_fresh_process

    def full_cost(length: int) -> TrainingCost:
        times = in_fresh_process(train_full, sizes, length, args.full_rounds, args.threads)
        return TrainingCost(FULL, length, times, None, in_fresh_process(memory_full, sizes, length, args.threads))

    costs, stopped = [], None
    # The models take turns at each length: a machine's other work meets all of them.
    for length in args.lengths:
        for model in models:
            shape = (model, sizes, length)
            times, ratios = in_fresh_process(train_carried, *shape, args.reference, args.rounds, args.threads)
            memory = in_fresh_process(memory_carried, *shape, args.threads)
            costs.append(TrainingCost(model, length, times, ratios, memory))
    if full:
        costs_full, stopped = lengths_within(
            args.lengths,
            full_cost,
            limit_s=args.limit_s,
            limit_bytes=args.limit_gib * 2**30,
        )
        costs += costs_full
    note.text("## Training")
    note.text(
        f"Forward and backward, no optimizer. With a memory or a sliding window in windows of {args.window:,} tokens, "
        f"through which the state is carried. A document is read in {args.rounds} blocks, and beside each of them a "
        f"document of {args.reference:,} tokens is read anew in the same process: `x {args.reference:,}` is the ratio "
        "of the two medians of a window, and at that length itself it says how far such a ratio can be believed. "
        "Medians of the rounds, in brackets the quartiles. Full attention has its whole document in one graph. Memory "
        "is measured in another process, which reads the document once and gives freed blocks back to the system (the "
        "heap would keep them in pieces, and its peak would tell of luck). Live: tensors at most during the last "
        "window. Peak: of the process or device, libraries and weights included; grown: what of that came after the "
        "first windows."
    )
    rows = [_training_row(note, cost) for cost in costs]
    header = ["model", "tokens", "us per token", f"x {args.reference:,}", "live MiB", "peak MiB", "grown MiB"]
    note.table(header, rows)
    by = {(cost.model, cost.tokens): cost for cost in costs}
    longest = args.lengths[-1]
    for model in models:
        if (model, args.reference) in by and longest > args.reference:
            peak = by[model, longest].memory.peak_bytes / by[model, args.reference].memory.peak_bytes
            ratio = by[model, longest].against_reference
            note.number("peak_ratio", "1", peak, part="train", model=model, tokens=longest, reference=args.reference)
            note.text(
                f"`{model}`, {longest:,} tokens against {args.reference:,}: {ratio.in_words('.3f')} times the time per "
                f"token, {peak:.3f} times the peak memory."
            )
    if stopped:
        note.text(f"Full attention was not trained on longer documents: {stopped}.")
    return costs


def _training_row(note: Note, cost: TrainingCost) -> list[str]:
    of = {"part": "train", "model": cost.model, "tokens": cost.tokens}
    note.number("token_time", "s", cost.token_s, **of)
    note.number("peak", "bytes", cost.memory.peak_bytes, **of)
    note.number("start", "bytes", cost.memory.start_bytes, **of)
    ratio, live = cost.against_reference, "-"
    if ratio:
        note.number("times_reference", "1", ratio, **of)
    if cost.memory.live_bytes is not None:
        note.number("live", "bytes", cost.memory.live_bytes, **of)
        live = f"{cost.memory.live_bytes / 2**20:,.1f}"
    return [
        cost.model,
        f"{cost.tokens:,}",
        cost.token_s.in_words(",.1f", 1e6),
        ratio.in_words(".3f") if ratio else "-",
        live,
        f"{cost.memory.peak_bytes / 2**20:,.0f}",
        f"{(cost.memory.peak_bytes - cost.memory.start_bytes) / 2**20:,.0f}",
    ]


def _generate(
    args: argparse.Namespace, note: Note, sizes: Sizes, models: Sequence[str], full: bool
) -> list[NewTokenCost]:
    from pipeline.benchmarks.length import full_new_tokens, full_state_bytes, own_new_tokens
    from pipeline.benchmarks.measuring import in_fresh_process

    costs, left_out = [], []
    for length in args.lengths:
        for model in models:
            costs.append(in_fresh_process(own_new_tokens, model, sizes, length, args.new_tokens, args.threads))
        if not full:
            continue
        if 2 * full_state_bytes(sizes, length) > args.limit_gib * 2**30:
            left_out.append(length)
        else:
            costs.append(in_fresh_process(full_new_tokens, sizes, length, args.new_tokens, args.threads))
    note.text("## Generation")
    note.text(
        f"{args.new_tokens} tokens, one at a time, behind a document; the median, in brackets the quartiles. Ours has "
        "read the document. For full attention the cache of keys and values has its full size from the beginning "
        "and is filled with random numbers, which a token's time does not depend on. State: what is kept of the "
        "document (memory and current segment; the cache)."
    )
    rows = []
    for cost in costs:
        of = {"part": "generate", "model": cost.model, "tokens": cost.tokens}
        note.number("new_token_time", "s", cost.token_s, **of)
        note.number("state", "bytes", cost.state_bytes, **of)
        times = cost.token_s.in_words(",.2f", 1e3)
        rows.append([cost.model, f"{cost.tokens:,}", times, f"{cost.state_bytes / 1024:,.0f}"])
    note.table(["model", "tokens", "ms per new token", "state KiB"], rows)
    if left_out:
        note.text(
            f"Full attention was not measured at {', '.join(f'{length:,}' for length in left_out)} tokens: filling a "
            f"cache of {full_state_bytes(sizes, left_out[0]) / 2**30:.1f} GiB takes twice that at least (limit "
            f"{args.limit_gib:g} GiB)."
        )
    return costs


def _draw(path: Path, trained: Sequence[TrainingCost], generated: Sequence[NewTokenCost]) -> None:
    from pipeline.figures import Legend, quiet, save_figure, show_some_ticks, titled_figure

    panels = []
    if trained:
        panels += [
            ("training", "us per token", trained, lambda cost: [1e6 * x for x in cost.token_s[:3]]),
            ("training", "peak memory, MiB", trained, lambda cost: [cost.memory.peak_bytes / 2**20] * 3),
        ]
    if generated:
        panels += [
            ("generation", "ms per new token", generated, lambda cost: [1e3 * x for x in cost.token_s[:3]]),
            ("generation", "kept of the document, KiB", generated, lambda cost: [cost.state_bytes / 1024] * 3),
        ]
    models = list(dict.fromkeys(cost.model for cost in [*trained, *generated]))
    width, rows = 10.0, len(panels) // 2
    legend = Legend(models, width)
    figure = titled_figure(width, 3.2 * rows, "cost against the length of the document", legend)
    handles = {}
    for axes, (title, label, costs, value) in zip(figure.subplots(rows, 2).flat, panels, strict=True):
        for number_, model in enumerate(models):
            own = [cost for cost in costs if cost.model == model]
            points = [value(cost) for cost in own]
            middle = [point[0] for point in points]
            off = [[m - p[1] for m, p in zip(middle, points, strict=True)]]
            off.append([p[2] - m for m, p in zip(middle, points, strict=True)])
            handles[model] = axes.errorbar(
                [cost.tokens for cost in own], middle, yerr=off, marker="o", capsize=2, color=f"C{number_}"
            )
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        low, high = axes.get_ylim()
        axes.set_ylim(low / 2, 2 * high)  # a flat line must not look like noise blown up
        places = sorted({cost.tokens for cost in costs})
        show_some_ticks(axes, places, [f"{place >> 10}K" if place < 1 << 20 else f"{place >> 20}M" for place in places])
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("tokens of the document")
        axes.set_ylabel(label)
        quiet(axes)
    legend.draw(figure, [handles[model] for model in models])
    save_figure(figure, path)
