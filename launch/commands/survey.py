"""What `infini inspect` says of the use of a prepared set: padding, repeated documents, shares of the sources."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

    from data.prepared.survey import DocumentHashes

USUAL_SEGMENTS = (512, 1024, 2048, 4096, 8192)
"""Shown where nobody says which one counts."""
_SOURCES_SHOWN = 100
_SOURCE_CHARACTERS = 60


@dataclass(frozen=True)
class Segments:
    """Which segment lengths are looked at, and who named them."""

    lengths: tuple[int, ...]
    where: str
    """`--segment-length`, or the configuration's file; empty for the usual ones."""


def chosen_segments(length: int | None, config: str | None) -> Segments:
    """Raises: ValueError where the configuration cannot be read."""
    if length is not None:
        return Segments((length,), "--segment-length")
    if config is not None:
        from pipeline.config.load import load_config

        return Segments((load_config(config, []).model.segment_length,), f"model.segment_length of {config}")
    return Segments(USUAL_SEGMENTS, "")


def print_padding(console: Any, lengths: Mapping[str, np.ndarray], segments: Segments) -> None:
    """A table for each split, from its documents' lengths."""
    from rich.table import Table

    from data.prepared.survey import padding

    for split, of_split in lengths.items():
        console.print(f"\n{split}: padding by segment length{f' ({segments.where})' if segments.where else ''}")
        table = Table("segment", "segments", "padded", "packed", "times", box=None, padding=(0, 2, 0, 2))
        for column in table.columns:
            column.justify = "right"
        for length in segments.lengths:
            found = padding(of_split, length)
            times = found.segments / found.packed_segments if found.packed_segments else 1.0
            table.add_row(
                *(f"{length:,}", f"{found.segments:,}", f"{found.share:.1%}"),
                *(f"{found.packed_segments:,.1f}", f"{times:.2f}"),
            )
        console.print(table)
        short = of_split - 1 <= segments.lengths[0]  # the last token is a label alone
        console.print(
            f"  {short.mean():.1%} of the documents, with {of_split[short].sum() / max(of_split.sum(), 1):.1%} of the "
            f"tokens, fit into one segment of {segments.lengths[0]:,}"
        )
    console.print(
        "  padded: every document begins on a segment's border. packed: segments with data.packing, where the next "
        "document begins right behind the last one and nothing is padded; times: how many times as many segments the "
        "borders cost"
    )


def print_sources(console: Any, lengths: Mapping[str, np.ndarray], hashes: DocumentHashes, segments: Segments) -> None:
    """Each source's share of each split, its padding and its repeats."""
    from rich.table import Table

    from data.files import printable
    from data.prepared.survey import padding

    length = segments.lengths[0] if segments.where else 2048
    for split, of_split in lengths.items():
        console.print(f"\n{split}: sources")
        header = ("documents", "tokens", "share", f"padded at {length:,}", "repeated")
        table = Table("source", *header, box=None, padding=(0, 2, 0, 2))
        table.columns[0].overflow = "fold"
        for column in table.columns[1:]:
            column.justify = "right"
        again = hashes.repeated(split)
        sources = hashes.sources(split)
        for source, documents in list(sources.items())[:_SOURCES_SHOWN]:
            tokens = int(of_split[documents].sum())
            table.add_row(
                printable(source[:_SOURCE_CHARACTERS]),
                *(f"{len(documents):,}", f"{tokens:,}", f"{tokens / max(int(of_split.sum()), 1):.1%}"),
                *(f"{padding(of_split[documents], length).share:.1%}", f"{int(again[documents].sum()):,}"),
            )
        console.print(table)
        if len(sources) > _SOURCES_SHOWN:
            console.print(f"  ... and {len(sources) - _SOURCES_SHOWN:,} more sources")


def print_repeats(console: Any, lengths: Mapping[str, np.ndarray], hashes: DocumentHashes) -> None:
    """What stands more than once in a split, and what is held out and trained on all the same."""
    console.print("\ndocuments with the same tokens (by SHA-256)")
    for split, of_split in lengths.items():
        found = hashes.repeats(split, of_split)
        often = f"; number {found.example:,} is there {found.most:,} times" if found.example is not None else ""
        console.print(
            f"  {split}: {found.documents:,} of {len(of_split):,} are there again, with {found.tokens:,} tokens "
            f"({found.tokens / max(int(of_split.sum()), 1):.2%}){often}"
        )
    if {"train", "valid"} <= set(lengths):
        both = hashes.shared("valid", "train")
        seen = "" if not both.any() else ": an evaluation on them measures what was learnt by heart"
        console.print(f"  held out, and in train too: {int(both.sum()):,} of {len(both):,}{seen}")


def draw_survey(
    path: Path,
    folder: str,
    lengths: Mapping[str, np.ndarray],
    hashes: DocumentHashes | None,
    segments: Segments,
) -> None:
    """Save a picture: documents and tokens by length, padding by segment length, and the sources' shares.

    Raises:
        OSError: the disk would not have it.
    """
    import numpy as np
    from matplotlib.ticker import PercentFormatter

    from data.prepared.survey import padding
    from pipeline.figures import break_lines, quiet, save_figure, titled_figure

    of_split = lengths["train"] if "train" in lengths else next(iter(lengths.values()))
    split = "train" if "train" in lengths else next(iter(lengths))
    shares = source_shares(of_split, hashes, split) if hashes else []
    figure = titled_figure(5.0 * (3 if shares else 2), 3.6, f"{folder}, {split}: {len(of_split):,} documents")
    panels = figure.subplots(1, 3 if shares else 2)

    bounds = np.floor(np.log2(np.maximum(of_split, 1))).astype(int)
    places = np.arange(bounds.min(), bounds.max() + 1)
    counts = np.bincount(bounds - bounds.min(), minlength=len(places))
    tokens = np.bincount(bounds - bounds.min(), of_split, minlength=len(places))
    for offset, values, label, color in (
        (-0.2, counts / counts.sum(), "of the documents", "#9db7de"),
        (0.2, tokens / tokens.sum(), "of the tokens", "#3b6ea8"),
    ):
        panels[0].bar(places + offset, values, 0.4, label=label, color=color)
    panels[0].set_xticks(places, [_short(1 << int(place)) for place in places], fontsize=8)
    panels[0].set_xlabel("tokens of a document, from")
    panels[0].legend(frameon=False, fontsize=8)
    panels[0].set_title("lengths", fontsize=10)

    grid = sorted({1 << power for power in range(7, 16)} | set(segments.lengths))
    found = [padding(of_split, length) for length in grid]
    panels[1].plot(grid, [one.share for one in found], marker=".", color="#b5523b")
    if segments.where:
        panels[1].axvline(segments.lengths[0], color="#333333", linewidth=0.8, linestyle=":")
    panels[1].set_xscale("log", base=2)
    shown = grid if len(grid) < 10 else [length for length in grid if length & (length - 1) == 0]
    panels[1].set_xticks(shown[::2], [_short(length) for length in shown[::2]], fontsize=8)
    panels[1].set_ylim(0, 1)
    panels[1].set_xlabel("segment length")
    panels[1].set_title("padded positions, without packing", fontsize=10)

    if shares:
        names = [break_lines(name, 1.6, 8, 2) for name, _ in shares]
        panels[2].barh(range(len(shares)), [share for _, share in shares], color="#9db7de")
        panels[2].set_yticks(range(len(shares)), names, fontsize=8)
        for label in panels[2].get_yticklabels():
            label.set_parse_math(False)
        panels[2].invert_yaxis()
        panels[2].xaxis.set_major_formatter(PercentFormatter(1.0))
        panels[2].set_title("sources, of the tokens", fontsize=10)
    for axes in panels[:2]:
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    for axes in panels:
        quiet(axes)
    save_figure(figure, path)


def source_shares(
    lengths: np.ndarray, hashes: DocumentHashes, split: str, most: int = 12
) -> Sequence[tuple[str, float]]:
    """The largest sources and their shares of a split's tokens; what is not among them as one, at the end."""
    total = max(int(lengths.sum()), 1)
    found = [(name, int(lengths[documents].sum()) / total) for name, documents in hashes.sources(split).items()]
    found.sort(key=lambda pair: -pair[1])
    rest = found[most:]
    return found[:most] + ([(f"{len(rest):,} more", sum(share for _, share in rest))] if rest else [])


def _short(number: int) -> str:
    return f"{number >> 10}K" if number >= 1024 and number % 1024 == 0 else str(number)
