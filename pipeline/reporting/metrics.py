"""The numbers of a run: `metrics.jsonl` and TensorBoard, and the clock behind tokens per second.

Names are paths, one spelling from the trainer to the plots:

    loss/train  loss/answer  loss/probe         mean cross entropy in nats per token
    loss_by_segment/<0, 1, 2-3, 4-7, ...>       the loss at these segments of the documents
    optimizer/learning_rate  optimizer/learning_rate_<group>  optimizer/gradient_norm
    optimizer/zero_gradient_steps               steps so far whose gradient was exactly 0
    optimizer/unmoved_parameters                parameters (tensors) that learn, but have not moved since the start
    gradient_norm/<kind>                        of the kinds of parameters: `pipeline.parallel.parameter_groups`
    speed/tokens_per_s  speed/mfu               of the whole run; utilisation is a share, 0..1, of the matrix products
                                                that the processes were measured to reach before the first step
    speed/mfu_data_sheet                        the same of what the devices' data sheets say (docs/devices.md); only
                                                where all devices are in the table
    speed/step_s                                mean seconds per step, everything included
    speed/data_s  speed/forward_backward_s  speed/optimizer_s    of these, by phase
    progress/tokens  progress/skipped_steps     since the run began
    data/padded_share                           positions that are padding, a share
    data/skipped_documents                      unreadable ones left out so far, with data.skip_bad_documents
    evaluation/<set>/loss_<way>                 of held-out documents, with the memory `on`, `off` and `shuffled` (that
                                                of another document)
    evaluation/<set>/loss_by_segment_<way>/<0, 1, 2-3, 4-7, ...>
    evaluation/task_<way>/<task and settings>   share of a task's questions that are answered right
    evaluation/seconds                          that all of it took, which the speed does not count
    system/process_bytes                        resident in the largest process
    system/device_allocated_bytes               most that tensors took on a device since the line before; largest rank
    system/device_reserved_bytes                most that its allocator had taken for them; neither exists on a CPU
    memory/write_gate                           mean over layers, heads and tokens
    <quantity>/layer_<ii>                       of one layer's memory, means over heads, lanes and tokens: mix_gate,
                                                share_of_output, write_gate, norm_M, norm_z, effective_rank,
                                                read_variation; with histograms mix_gate_histogram, write_gate_histogram

The quantity stands first, so that TensorBoard shows a quantity's layers side by side. Runs of the first version have
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
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import msgspec
import numpy as np

from data.files import FileError, convert, decode_json, open_regular, shown, writing

logger = logging.getLogger(__name__)

METRICS_FILE = "metrics.jsonl"
TENSORBOARD_FOLDER = "tensorboard"
RESERVED_NAMES = ("step", "time", "nonfinite")
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


class Reserved(msgspec.Struct, frozen=True):
    """Fields of every line."""

    step: Annotated[int, msgspec.Meta(ge=0, le=1 << 60)]
    time: float = 0.0
    nonfinite: list[str] = []


Line = dict[str, int | float | None | list[int | float | None | str] | Histogram]
"""What a line holds: the reserved fields, and numbers, lists of them and histograms."""


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


class MetricsWriter:
    """Writes each number twice: a line of JSON in `run_dir/metrics.jsonl`, an event under `run_dir/tensorboard`.

    Only rank 0 makes one. A line is `{"step": int, "time": seconds since 1970, name: value, ...}` and reaches the
    operating system before the call returns, so what a killed process leaves is complete to the last call. JSON knows
    no NaN: a value that is not finite is written as null and its name is listed under `nonfinite`.

    Args:
        run_dir: folder of the run; made if missing.
        tensorboard: write event files as well. Without them `image` and `text` have nowhere to go and do nothing.
        resume_step: None for a new run. When a run goes on from the checkpoint of step k, k: what was written for
            later steps is dropped from `metrics.jsonl` and hidden in TensorBoard, since these steps are taken again.

    Raises:
        ValueError: `resume_step` is None, but the folder has metrics of an earlier run already.
    """

    def __init__(self, run_dir: str | Path, *, tensorboard: bool, resume_step: int | None) -> None:
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
        self._tensorboard = None
        if tensorboard:
            # Imported here: it costs a second that a run without TensorBoard need not pay.
            from torch.utils.tensorboard import SummaryWriter

            self._tensorboard = SummaryWriter(
                str(folder / TENSORBOARD_FOLDER),
                purge_step=None if resume_step is None else resume_step + 1,
                flush_secs=10,
            )

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Write one line with `values`, numbers or tensors of one element, and one TensorBoard scalar for each."""
        numbers = {name: _number(value) for name, value in values.items()}
        self._write_line(step, numbers)
        if self._tensorboard is not None:
            for name, number in numbers.items():
                self._tensorboard.add_scalar(name, number, step)

    def vector(self, step: int, name: str, values: Sequence[float | None]) -> None:
        """Write numbers that belong together, such as the loss by segment index: a list in the line, and in TensorBoard
        the scalars `name/0`, `name/1`, ... None stands for an entry without data: null in the list, no scalar."""
        numbers = [None if value is None else _number(value) for value in values]
        self._write_line(step, {name: numbers})
        if self._tensorboard is not None:
            for index, number in enumerate(numbers):
                if number is not None:
                    self._tensorboard.add_scalar(f"{name}/{index}", number, step)

    def histogram(self, step: int, name: str, values: Any) -> None:
        """Write the distribution of `values` (tensor or array, any shape, not empty). The line holds
        `{"mean", "min", "max", "edges", "counts"}` of the finite ones; the others are told by `nonfinite`."""
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
            if self._tensorboard is not None:
                self._tensorboard.add_histogram(name, finite, step)
        self._write_line(step, {name: summary}, nonfinite=[name] if finite.size < array.size else [])

    def binned_histogram(self, step: int, name: str, counts: Sequence[float], low: float, high: float) -> None:
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
            if self._tensorboard is not None:
                self._tensorboard.add_histogram_raw(
                    name,
                    min=summary["min"],
                    max=summary["max"],
                    num=total,
                    sum=float((number * centers).sum()),
                    sum_squares=float((number * centers**2).sum()),
                    bucket_limits=edges[1:].tolist(),
                    bucket_counts=number.tolist(),
                    global_step=step,
                )
        self._write_line(step, {name: summary})

    def image(self, step: int, name: str, image: str | Path | np.ndarray) -> None:
        """Show a PNG file or an array `[height, width, 3]` (uint8, or floats in 0..1) in TensorBoard."""
        if self._tensorboard is None:
            return
        if not isinstance(image, np.ndarray):
            from PIL import Image

            with Image.open(image) as opened:
                image = np.asarray(opened.convert("RGB"))
        self._tensorboard.add_image(name, image, step, dataformats="HWC")

    def text(self, step: int, name: str, text: str) -> None:
        """Show Markdown in TensorBoard."""
        if self._tensorboard is not None:
            self._tensorboard.add_text(name, text, step)

    def settings(self, step: int, settings: Mapping[str, Any], text: str) -> None:
        """Show a run's configuration in TensorBoard: nested `settings` as hyperparameters, and their `text` (YAML)."""
        if self._tensorboard is not None:
            from pipeline.reporting.dashboard import show_settings

            show_settings(self._tensorboard, settings)
            self.text(step, "configuration", "".join(f"    {line}\n" for line in text.splitlines()))  # a code block

    def flush(self) -> None:
        """Put everything on the disk itself. Call it with each checkpoint: a resumed run does not take the steps before
        it again, so what a failing machine loses of them leaves a gap for good."""
        self._file.flush()
        os.fsync(self._file.fileno())
        if self._tensorboard is not None:
            self._tensorboard.flush()

    def close(self) -> None:
        """Flush and close the files; more than once does no harm."""
        if self._file.closed:
            return
        self.flush()
        self._file.close()
        if self._tensorboard is not None:
            self._tensorboard.close()

    def _write_line(self, step: int, values: Mapping[str, Any], nonfinite: Sequence[str] = ()) -> None:
        reserved = sorted(set(values).intersection(RESERVED_NAMES))
        assert not reserved, f"{reserved} are fields of every line, not names of metrics"
        record: dict[str, Any] = {"step": int(step), "time": round(time.time(), 3)}
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


def metric_lines(path: str | Path) -> Iterator[tuple[bytes, dict[str, Any] | str]]:
    """The lines of a `metrics.jsonl`, each with its record, or with what is wrong with it.

    A last line without a newline is not complete.

    Raises:
        FileNotFoundError, OSError, FileError: the file cannot be read, or a line never ends.
    """
    with open_regular(path) as file:
        number = 0
        while line := file.readline(LINE_LIMIT + 1):
            number += 1
            where = f"{path}, line {number}"
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
    record = decode_json(line, Line, where)
    fields = {name: record.pop(name) for name in RESERVED_NAMES if name in record}
    reserved = msgspec.to_builtins(convert(fields, Reserved, where))
    for name, value in record.items():
        if isinstance(value, list) and any(isinstance(entry, str) for entry in value):
            raise FileError(f"{where}: {shown(name)} holds a text among its numbers")
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


class ThroughputMeter:
    """Tokens per second and the seconds of each phase, over the interval since the last `report`.

    Everything that happens in the interval counts, saving too, but for what is done in `paused`: the rate is what a
    user gets. Phases are host time; on a GPU work that is only queued falls into the phase that waits for it.

    Args:
        clock: a monotonic clock in seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self.restart()

    @property
    def elapsed_s(self) -> float:
        """Since the interval began."""
        return self._clock() - self._start

    def restart(self) -> None:
        """Begin an interval now."""
        self._start = self._clock()
        self._tokens = 0
        self._steps = 0
        self._phases: dict[str, float] = {}

    def count_step(self, tokens: int) -> None:
        """Call once per step with the tokens that all ranks together took in it."""
        self._tokens += tokens
        self._steps += 1

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the time of the block to phase `name` (`data`, `forward_backward`, `optimizer`), also when it raises."""
        start = self._clock()
        try:
            yield
        finally:
            self._phases[name] = self._phases.get(name, 0.0) + self._clock() - start

    @contextmanager
    def paused(self) -> Iterator[None]:
        """The time of the block does not count."""
        start = self._clock()
        try:
            yield
        finally:
            self._start += self._clock() - start

    def report(self) -> dict[str, float]:
        """`speed/tokens_per_s`, and as mean seconds per step `speed/step_s` and `speed/<phase>_s`, of the interval that
        ends here; the next one begins. Call it after at least one step."""
        elapsed_s = self.elapsed_s
        assert self._steps > 0 and elapsed_s > 0, "report() needs a step since the last one"
        values = {"speed/tokens_per_s": self._tokens / elapsed_s, "speed/step_s": elapsed_s / self._steps}
        values |= {f"speed/{name}_s": seconds / self._steps for name, seconds in self._phases.items()}
        self.restart()
        return values
