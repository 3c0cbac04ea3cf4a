"""A run on one screen: where it is, how fast, whether anything is wrong. For `infini monitor`.

In a pipe the same text comes out plain; where not even UTF-8 can be shown, drawings are ASCII.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.measure import Measurement
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from data.files import printable
from pipeline.reporting.console import format_bytes, format_count, format_duration
from pipeline.reporting.diagnosis import COLLAPSED, CONSTANT, MANY, MIN_STEPS, STILL, UNUSED
from pipeline.reporting.evaluation_metrics import SHORT_WAYS, parse
from pipeline.reporting.run_view import CURVES, RunView

CURVE_WIDTH = 32
EVALUATION_ROWS = 12
HOSTS_SHOWN = 4
MARKS, ASCII_MARKS = "▁▂▃▄▅▆▇█", "_.-~=+*#"

QUANTITIES = {
    "share_of_output": ("share of the output", f"{100 * UNUSED:g} % or more in some layer"),
    "mix_gate": ("mixing gate", f"moves by {STILL:g} or more from where it began"),
    "write_gate": ("write gate", "not closed in all layers"),
    "read_variation": ("variation of reads", f"{100 * CONSTANT:g} % or more where memory is used"),
    "effective_rank": ("effective rank of M", f"{COLLAPSED:g} or more where {100 * MANY:g} % of tokens are written"),
    "norm_M": ("norm of M", ""),
    "norm_z": ("norm of z", "does not double while the share halves"),
}
"""Of the memory: name, and what docs/diagnosis.md calls healthy."""


class Drawing:
    """Numbers as a row of little bars, least to most.

    Args:
        width: characters at the most; more numbers are joined by their means.
    """

    def __init__(self, values: Sequence[float], width: int = CURVE_WIDTH) -> None:
        known = [value for value in values if math.isfinite(value)]
        parts = min(width, len(known))
        ends = [len(known) * part // parts for part in range(parts + 1)] if parts else []
        self.values = [sum(known[a:b]) / (b - a) for a, b in zip(ends, ends[1:], strict=False)]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield Text(self.text(ASCII_MARKS if options.ascii_only else MARKS), style="cyan")

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        return Measurement(len(self.values), len(self.values))

    def text(self, marks: str = MARKS) -> str:
        """The bars; all alike where the numbers are."""
        if not self.values:
            return ""
        low, high = min(self.values), max(self.values)
        if high <= low:
            return marks[len(marks) // 2 - 1] * len(self.values)
        return "".join(marks[min(int((v - low) / (high - low) * len(marks)), len(marks) - 1)] for v in self.values)


def screen(view: RunView, now: float) -> RenderableType:
    """All of it.

    Args:
        now: Unix time.
    """
    rows = Table.grid(padding=(0, 2))
    rows.add_column(style="bold", no_wrap=True)
    rows.add_column()
    for name, *parts in _rows(view, now):
        cell = Table.grid(padding=(0, 2))
        cell.add_row(*parts)
        rows.add_row(name, cell)
    return Group(_title(view, now), _progress(view), rows, *_memory(view), *_wrong(view, now))


def _title(view: RunView, now: float) -> Text:
    name = view.start.name if view.start else str(view.path.parent)
    text = Text(printable(name), style="bold")
    silent = view.silent_s(now)
    if view.end is not None:
        style = "green" if view.end == "finished" else "yellow"
        return text.append(f"  {printable(view.end)} {format_duration(now - view.time)} ago", style)
    if silent is not None:
        return text.append(f"  SILENT for {format_duration(silent)}: dead, hanging or waiting to be requeued?", "red")
    return text.append(f"  running, last line {format_duration(now - view.time)} ago", "green")


def _progress(view: RunView) -> RenderableType:
    cells: list[RenderableType] = [Text(f"step {view.step:,}" + (f" of {view.steps:,}" if view.steps else ""))]
    if view.steps:
        cells += [ProgressBar(total=view.steps, completed=view.step, width=CURVE_WIDTH)]
        cells += [Text(f"{100 * view.step / view.steps:.0f} %")]
    if math.isfinite(view.left_s) and view.end is None:
        cells += [Text(f"eta {format_duration(view.left_s)}", style="bold")]
    if tokens := view.values.get("progress/tokens"):
        cells += [Text(f"{format_count(tokens)} tokens")]
    row = Table.grid(padding=(0, 2))
    row.add_row(*cells)
    return row


def _rows(view: RunView, now: float) -> Iterator[tuple[RenderableType, ...]]:
    values = view.values
    for name, title in zip(CURVES[:3], ("loss", "loss of answers", "loss of probes' answers"), strict=True):
        if name in values:
            curve = view.curves[name].values
            began = f"from {curve[0]:.4f}" if curve else ""
            yield title, Text(f"{values[name]:.4f}"), Drawing(curve), Text(began, style="dim")
    if (per_s := values.get("speed/tokens_per_s")) is not None:
        mfu = [f"MFU {100 * values[name]:.3g} %" for name in ("speed/mfu",) if name in values]
        yield "tokens per second", Text(f"{per_s:,.0f}"), Drawing(view.curves[CURVES[3]].values), Text(", ".join(mfu))
    if "speed/step_s" in values:
        phases = ("data", "forward_backward", "optimizer")
        parts = [f"{name.replace('_', ' and ')} {_seconds(values[f'speed/{name}_s'])}" for name in phases]
        yield "seconds per step", Text(f"{values['speed/step_s']:.3g}"), Text(", ".join(parts), style="dim")
    if "optimizer/gradient_norm" in values:
        told = f"gradient norm {values['optimizer/gradient_norm']:.3g}"
        yield "optimizer", Text(f"learning rate {values.get('optimizer/learning_rate', math.nan):.2e}, {told}")
    sizes = {"process": "system/process_bytes", "device": "system/device_allocated_bytes"}
    if told := [f"{title} {format_bytes(values[name])}" for title, name in sizes.items() if name in values]:
        yield "largest", Text(", ".join(told))
    if view.start:
        yield "ranks", _ranks(view)
    yield "checkpoint", Text(_checkpoint(view, now))
    rows = _evaluation(values)
    for place, (what, ways) in enumerate([*rows.items()][:EVALUATION_ROWS]):
        title = f"evaluation, step {view.evaluated:,}" if place == 0 else ""
        told = [f"{way} {value:.4g}".strip() for way, value in ways.items()]
        yield title, Text(f"{printable(what)}: {', '.join(told)}")
    if len(rows) > EVALUATION_ROWS:
        yield "", Text(f"and {len(rows) - EVALUATION_ROWS} more in {view.path.name}", style="dim")


def _seconds(value: float) -> str:
    return f"{value:.3g}" if value >= 1e-3 else "under 0.001"


def _evaluation(values: Mapping[str, float]) -> dict[str, dict[str, float]]:
    """What was evaluated -> way (memory on, off, exchanged, emptied) -> value; losses by segment are in TensorBoard."""
    rows: dict[str, dict[str, float]] = {}
    for name, value in values.items():
        group, _, rest = name.partition("/")
        if group != "evaluation" or rest == "seconds" or "/loss_by_segment_" in rest:
            continue
        if found := parse(name):
            what = f"loss of {found.what}" if found.is_loss else f"{found.what}, right"
            rows.setdefault(what, {})[SHORT_WAYS[found.way]] = value
        else:
            rows.setdefault(rest, {})[""] = value
    return rows


def _checkpoint(view: RunView, now: float) -> str:
    if view.saved is None:
        return "none yet"
    step, when = view.saved
    stall, write = (view.values.get(f"checkpoint/{name}_s", math.nan) for name in ("stall", "write"))
    ago = format_duration(now - when)
    return f"step {step:,}, {ago} ago (training waited {stall:.2g} s, writing took {write:.2g} s)"


def _ranks(view: RunView) -> Text:
    hosts = list(dict.fromkeys(map(printable, view.start.hosts)))
    more = f" and {len(hosts) - HOSTS_SHOWN} more" if len(hosts) > HOSTS_SHOWN else ""
    text = Text(f"{len(view.start.hosts)} on {', '.join(hosts[:HOSTS_SHOWN])}{more}")
    slowdown, rank = view.values.get("ranks/slowdown"), view.values.get("ranks/slowest")
    if slowdown is None or rank is None or not 0 <= rank < len(view.start.hosts):
        return text
    slow = slowdown > view.start.straggler_bound
    return text.append(
        f"; {'SLOW' if slow else 'slowest'}: rank {rank:.0f} on {printable(view.start.hosts[int(rank)])}, "
        f"{view.values['ranks/slowest_s']:.3g} s of its own per step, {slowdown:.2f} times the others",
        "bold red" if slow else "",
    )


def _memory(view: RunView) -> Iterator[RenderableType]:
    if not view.history:
        if view.start and view.start.memory.rule != "none":
            yield Text("\nmemory: not measured yet (every metrics.memory_interval steps)", style="dim")
        return
    step, layers = view.history[-1]
    yield Text(f"\nmemory at step {step:,}, mean over {len(layers)} layers", style="bold")
    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0), header_style="dim")
    for name in ("", "mean", "least", "most", "by layer", "healthy"):
        table.add_column(name, justify="right" if name in ("mean", "least", "most") else "left", no_wrap=True)
    for quantity, (title, healthy) in QUANTITIES.items():
        found = [view.values.get(f"{quantity}/layer_{layer:02d}", math.nan) for layer in sorted(layers)]
        known = [value for value in found if math.isfinite(value)]
        if any(known):  # a rule without a normaliser has z of 0
            three = (sum(known) / len(known), min(known), max(known))
            table.add_row(title, *(f"{value:.3g}" for value in three), Drawing(found), Text(healthy, style="dim"))
    yield table


def _wrong(view: RunView, now: float) -> Iterator[RenderableType]:
    findings = view.findings
    if findings:
        yield Text()
        yield from (Text(f"memory: {printable(str(finding))}", style="yellow") for finding in findings)
    elif findings is not None and view.history[-1][0] >= MIN_STEPS:
        yield Text("nothing wrong is seen (docs/diagnosis.md)", style="green")
    elif findings is not None and view.start.memory.rule != "none":
        yield Text(f"whether that is healthy can be said from step {MIN_STEPS} on", style="dim")
    values = view.values
    for name, told in (
        ("progress/skipped_steps", "steps were skipped: their loss or gradient was no number, or a spike"),
        ("optimizer/zero_gradient_steps", "steps had a gradient of exactly 0"),
        ("optimizer/unmoved_parameters", "parameters that should learn have never moved"),
        ("data/skipped_documents", "documents could not be read and were left out"),
    ):
        if values.get(name):
            yield Text(f"{values[name]:,.0f} {told}", style="yellow")
    if view.starts > 1:
        yield Text(f"started {view.starts} times, the last {format_duration(now - view.started)} ago", style="dim")
    if view.broken:
        yield Text(f"{view.broken} lines of {view.path} are no records and were left out", style="yellow")
    yield from (Text(printable(failure), style="red") for failure in view.failures())
