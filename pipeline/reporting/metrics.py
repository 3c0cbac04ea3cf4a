"""The numbers of a run: `metrics.jsonl`, and whatever else shows them.

Names are paths, one spelling from the trainer to the plots (`pipeline.reporting.dashboard.tag` has TensorBoard's):

    loss/train  loss/answer  loss/probe         mean cross entropy in nats per token
    loss_by_segment/<0, 1, 2-3, 4-7, ...>       the loss at these segments of the documents
    loss_by_set/<set>                           the loss of this set's text; where there are several
    optimizer/learning_rate  optimizer/learning_rate_<group>  optimizer/gradient_norm
    optimizer/zero_gradient_steps               steps so far whose gradient was exactly 0
    optimizer/unmoved_parameters                parameters (tensors) that learn, but have not moved since the start
    gradient_norm/<kind>                        of the kinds of parameters: `pipeline.parallel.parameter_groups`
    speed/tokens_per_s  speed/mfu               of the whole run, of text alone: padding does not count; utilisation is
                                                a share, 0..1, of the matrix products that the processes were measured
                                                to reach before the first step; where documents share segments, a
                                                token needs of the local attention what it sees
    speed/mfu_data_sheet                        the same of what the devices' data sheets say (docs/devices.md); only
                                                where all devices are in the table
    speed/step_s                                mean seconds per step, everything included
    speed/data_s  speed/forward_backward_s  speed/optimizer_s    of these, by phase
    progress/tokens  progress/skipped_steps     since the run began
    recovery/seconds                            after nodes have gone or come (docs/cluster.md): from the last step
                                                before to the first one after
    recovery/steps_recomputed  recovery/tokens_recomputed  recovery/data_parallel_size  recovery/attempt
    data/padded_share                           positions that are padding, a share
    data/share/<set>  data/asked_share/<set>    of the tokens so far, and by the sets' weights; where there are several
    data/epochs/<set>                           how often the set has been read so far, by its tokens
    data/skipped_documents                      unreadable ones left out so far, with data.skip_bad_documents
    evaluation/<set>/loss_<way>                 of held-out documents, with the memory `on`, `off`, `shuffled` (that of
                                                another document) and `reset` (emptied every evaluate.reset_every
                                                segments)
    evaluation/<set>/loss_by_segment_<way>/<0, 1, 2-3, 4-7, ...>
    evaluation/task_<way>/<task and settings>   share of a task's questions that are answered right
    evaluation/seconds                          that all of it took, which the speed does not count
    system/process_bytes                        resident in the largest process
    system/device_allocated_bytes               most that tensors took on a device since the line before; largest rank
    system/device_reserved_bytes                most that its allocator had taken for them; neither exists on a CPU
    ranks/own_s                                 a list: seconds per step that each rank works itself, not waiting
    ranks/slowest  ranks/slowest_s              the rank that is slowest beside the others of its pipeline stage, its
                                                seconds; where a stage has several ranks
    ranks/median_s  ranks/slowdown              median of the others; how many times that the slowest takes
    memory/write_gate                           mean over layers, heads and tokens
    memory/<quantity>                           mean over layers of one below
    <quantity>/layer_<ii>                       of one layer's memory, means over heads, lanes and tokens: mix_gate,
                                                share_of_output, write_gate, norm_M, norm_z, effective_rank,
                                                read_variation; with histograms mix_gate_histogram, write_gate_histogram

A line that is no metrics says how a run begins (`start`) or why it ended (`end`). Runs of the first version have
`memory_layer_<ii>/<quantity>`, which is read all the same (`layer_metric`).
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Protocol

import msgspec
import numpy as np

from data.files import FileError, convert, decode_json, open_regular, shown, writing
from model.config import MemoryConfig
from pipeline.reporting.dashboard import Dashboard

logger = logging.getLogger(__name__)

METRICS_FILE = "metrics.jsonl"
TENSORBOARD_FOLDER = "tensorboard"
RESERVED_NAMES = ("step", "time", "nonfinite", "start", "end")
HISTOGRAM_BINS = 32
LINE_LIMIT = 16 << 20
"""Bytes of a line: the longest hold a number for each segment index of a document."""


class Histogram(msgspec.Struct, frozen=True):
    """See `MetricsWriter.histogram`."""

    mean: float | None
    min: float | None
    max: float | None
    edges: list[float]
    counts: list[float]


class Start(msgspec.Struct, frozen=True):
    """What the line says that a run begins with, a resumed one too."""

    name: str
    steps: int
    """Of the whole run."""
    tokens_per_step: int
    hosts: list[str]
    """Of each rank."""
    layout: str
    """In words."""
    memory: MemoryConfig
    """What its numbers are judged by."""
    straggler_bound: float
    """`metrics.straggler_bound`."""


class Reserved(msgspec.Struct, frozen=True):
    """Fields that are no metrics."""

    step: Annotated[int, msgspec.Meta(ge=0, le=1 << 60)]
    time: float = 0.0
    nonfinite: list[str] = []
    start: Start | None = None
    end: str | None = None
    """Why training ended, in the last line."""


Metrics = dict[str, int | float | None | list[int | float | None] | Histogram]
"""What a line holds besides: numbers, lists of them and histograms."""


_OF_A_LAYER = re.compile(
    r"(?P<quantity>[^/]+)/layer_(?P<layer>[0-9]{1,9})|memory_layer_(?P<old>[0-9]{1,9})/(?P<old_quantity>[^/]+)"
)


def layer_name(quantity: str, layer: int) -> str:
    """The name of a layer's metric."""
    return f"{quantity}/layer_{layer:02d}"


def layer_metric(name: str) -> tuple[str, int] | None:
    """Quantity and layer that a name stands for, in the spelling of today or of the first version; else None."""
    match = _OF_A_LAYER.fullmatch(name)
    return None if match is None else (match["quantity"] or match["old_quantity"], int(match["layer"] or match["old"]))


class Sink(Protocol):
    """Where numbers go beside `metrics.jsonl`: TensorBoard, W&B."""

    def scalars(self, step: int, numbers: Mapping[str, float]) -> None: ...
    def histogram(self, step: int, name: str, values: np.ndarray) -> None: ...
    def binned_histogram(self, step: int, name: str, counts: np.ndarray, edges: np.ndarray) -> None: ...
    def image(self, step: int, name: str, image: str | Path | np.ndarray) -> None: ...
    def text(self, step: int, name: str, text: str) -> None: ...
    def settings(self, step: int, settings: Mapping[str, Any], text: str) -> None: ...
    def flush(self) -> None: ...
    def close(self) -> None: ...


class MetricsWriter:
    """Writes each number to `run_dir/metrics.jsonl`, as a line of JSON, and to the sinks.

    Only rank 0 makes one. A line is `{"step": int, "time": seconds since 1970, name: value, ...}` and reaches the
    operating system before the call returns, so what a killed process leaves is complete to the last call. JSON knows
    no NaN: a value that is not finite is written as null and its name is listed under `nonfinite`.

    Args:
        run_dir: folder of the run; made if missing.
        tensorboard: write event files to `run_dir/tensorboard` as well.
        resume_step: None for a new run. When a run goes on from the checkpoint of step k, k: what was written for
            later steps is dropped from `metrics.jsonl` and hidden in TensorBoard, since these steps are taken again.
        sinks: further ones, opened when `metrics.jsonl` is, and closed with it.

    Raises:
        ValueError: `resume_step` is None, but the folder has metrics of an earlier run already.
    """

    def __init__(
        self,
        run_dir: str | Path,
        *,
        tensorboard: bool,
        resume_step: int | None,
        sinks: Sequence[Callable[[], Sink]] = (),
    ) -> None:
        folder = Path(run_dir)
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / METRICS_FILE
        if resume_step is not None:
            _drop_lines_after(self.path, resume_step)
        elif self.path.exists() and self.path.stat().st_size > 0:
            raise ValueError(
                f"{self.path} holds the metrics of an earlier run: resume it, choose another run_dir, or remove them"
            )
        self._file = open(self.path, "a", encoding="utf-8")
        own = [lambda: Dashboard(folder / TENSORBOARD_FOLDER, resume_step)] if tensorboard else []
        self._sinks = [open_sink() for open_sink in (*own, *sinks)]

    def start(self, step: int, start: Start) -> None:
        """Write what a process that begins at `step` has to say about the run."""
        self._write_line(step, {}, start=msgspec.to_builtins(start))

    def end(self, step: int, why: str) -> None:
        """Write that training has ended, and why."""
        self._write_line(step, {}, end=why)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Write one line with `values`, numbers or tensors of one element; a point of a curve each to the sinks."""
        numbers = {name: _number(value) for name, value in values.items()}
        self._write_line(step, numbers)
        for sink in self._sinks:
            sink.scalars(step, numbers)

    def vector(self, step: int, name: str, values: Sequence[float | None]) -> None:
        """Write numbers that belong together, such as those of the ranks, as a list; None stands for an entry without
        data. The sinks get nothing: a curve for each of a thousand ranks helps nobody."""
        self._write_line(step, {name: [None if value is None else _number(value) for value in values]})

    def histogram(self, step: int, name: str, values: Any, *, shown: bool = True) -> None:
        """Write the distribution of `values` (tensor or array, any shape, not empty). The line holds
        `{"mean", "min", "max", "edges", "counts"}` of the finite ones; the others are told by `nonfinite`.

        Args:
            shown: false keeps it from the sinks.
        """
        array = _array(values).astype(np.float64).ravel()
        finite = array[np.isfinite(array)]
        summary: dict[str, Any] = {"mean": None, "min": None, "max": None, "edges": [], "counts": []}
        if finite.size:
            counts, edges = np.histogram(finite, bins=HISTOGRAM_BINS)
            summary = {
                "mean": float(finite.mean()),
                "min": float(finite.min()),
                "max": float(finite.max()),
                "edges": edges.tolist(),
                "counts": counts.tolist(),
            }
            for sink in self._sinks if shown else ():
                sink.histogram(step, name, finite)
        self._write_line(step, {name: summary}, nonfinite=[name] if finite.size < array.size else [])

    def binned_histogram(
        self, step: int, name: str, counts: Sequence[float], low: float, high: float, *, shown: bool = True
    ) -> None:
        """The same from counts in equal bins over `low` to `high`, for values that were too many to keep. Mean,
        minimum and maximum are as good as the bins."""
        number = np.asarray(_array(counts), dtype=np.float64)
        edges = np.linspace(low, high, len(number) + 1)
        centers, total = (edges[:-1] + edges[1:]) / 2, float(number.sum())
        summary: dict[str, Any] = {"mean": None, "min": None, "max": None, "edges": [], "counts": []}
        if total > 0:
            filled = np.flatnonzero(number)
            summary = {
                "mean": float((number * centers).sum() / total),
                "min": float(edges[filled[0]]),
                "max": float(edges[filled[-1] + 1]),
                "edges": edges.tolist(),
                "counts": number.tolist(),
            }
            for sink in self._sinks if shown else ():
                sink.binned_histogram(step, name, number, edges)
        self._write_line(step, {name: summary})

    def image(self, step: int, name: str, image: str | Path | np.ndarray) -> None:
        """Show a PNG file or an array `[height, width, 3]` (uint8, or floats in 0..1) in the sinks."""
        for sink in self._sinks:
            sink.image(step, name, image)

    def text(self, step: int, name: str, text: str) -> None:
        """Show Markdown in the sinks."""
        for sink in self._sinks:
            sink.text(step, name, text)

    def settings(self, step: int, settings: Mapping[str, Any], text: str) -> None:
        """Show a run's configuration in the sinks: nested `settings` as hyperparameters, and their `text` (YAML)."""
        for sink in self._sinks:
            sink.settings(step, settings, text)

    def flush(self) -> None:
        """Put everything on the disk itself. Call it with each checkpoint: a resumed run does not take the steps before
        it again, so what a failing machine loses of them leaves a gap for good."""
        self._file.flush()
        os.fsync(self._file.fileno())
        for sink in self._sinks:
            sink.flush()

    def close(self) -> None:
        """Flush and close the files; more than once does no harm."""
        if self._file.closed:
            return
        self.flush()
        self._file.close()
        for sink in self._sinks:
            sink.close()

    def _write_line(self, step: int, values: Mapping[str, Any], nonfinite: Sequence[str] = (), **words: Any) -> None:
        reserved = sorted(set(values).intersection(RESERVED_NAMES))
        assert not reserved, f"{reserved} are fields of every line, not names of metrics"
        record: dict[str, Any] = {"step": int(step), "time": round(time.time(), 3), **words}
        names = list(nonfinite)
        for name, value in values.items():
            record[name] = _finite(name, value, names)
        if names:
            record["nonfinite"] = names
        self._file.write(json.dumps(record, allow_nan=False) + "\n")
        self._file.flush()


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The records of a `metrics.jsonl`, in the order written. A last line that is still being written (it has no
    newline yet) is left out, so the file of a running training can be read.

    Raises:
        OSError: the file cannot be read.
        ValueError: a complete line is not a record; names the file and the line.
    """
    records = []
    for line, record in metric_lines(path):
        if not isinstance(record, str):
            records.append(record)
        elif line.endswith(b"\n"):
            raise ValueError(record)
    return records


def metric_lines(path: str | Path, offset: int = 0) -> Iterator[tuple[bytes, dict[str, Any] | str]]:
    """The lines of a `metrics.jsonl`, each with its record, or with what is wrong with it.

    A last line without a newline is not complete.

    Args:
        offset: bytes that are passed over, whole lines.

    Raises:
        FileNotFoundError, OSError, FileError: the file cannot be read, or a line never ends.
    """
    with open_regular(path) as file:
        file.seek(offset)
        number = 0
        while line := file.readline(LINE_LIMIT + 1):
            number += 1
            where = f"{path}, line {number}" + (f" after byte {offset:,}" if offset else "")
            if len(line) > LINE_LIMIT:
                raise FileError(f"{where}: more than {LINE_LIMIT:,} bytes")
            if not line.endswith(b"\n"):
                yield line, f"{where}: not complete"
                continue
            try:
                yield line, _record(line, where)
            except FileError as error:
                yield line, f"{error}: {shown(line)}"


def _record(line: bytes, where: str) -> dict[str, Any]:
    record = decode_json(line, dict[str, Any], where)
    fields = {name: record.pop(name) for name in RESERVED_NAMES if name in record}
    reserved = msgspec.to_builtins(convert(fields, Reserved, where))
    for name, value in convert(record, Metrics, where).items():
        if isinstance(value, Histogram):
            if len(value.edges) != len(value.counts) + bool(value.counts):
                raise FileError(f"{where}: {shown(name)} has {len(value.edges)} edges of {len(value.counts)} bins")
            record[name] = msgspec.to_builtins(value)
    return {name: reserved[name] for name in fields} | record


def _drop_lines_after(path: Path, step: int) -> None:
    """Rewrite `path` without the lines of later steps. Lines that a crash left broken go as well, with a warning: a
    run should not fail to resume over a line of its log."""
    if not path.exists():
        return
    broken = 0
    with writing(path) as kept:
        for line, record in metric_lines(path):
            if isinstance(record, str):
                broken += 1
            elif record["step"] <= step:
                kept.write(line)
    if broken:
        logger.warning("%s: dropped %d broken line(s)", path, broken)


def _number(value: Any) -> int | float:
    value = value.item() if hasattr(value, "item") else value
    return value if isinstance(value, int) else float(value)


def _array(values: Any) -> np.ndarray:
    # numpy has no bfloat16: a tensor has to become float32 first.
    return values.detach().float().cpu().numpy() if hasattr(values, "detach") else np.asarray(values)


def _finite(name: str, value: Any, nonfinite: list[str]) -> Any:
    """`value` with null for each number that is not finite, whose names are added to `nonfinite`."""
    if isinstance(value, list):
        return [_finite(f"{name}/{index}", entry, nonfinite) for index, entry in enumerate(value)]
    if isinstance(value, float) and not math.isfinite(value):
        nonfinite.append(name)
        return None
    return value
