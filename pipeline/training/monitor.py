"""Watching a run: gathers numbers from all processes and hands them to the console, metrics.jsonl and TensorBoard."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import psutil
import torch
import torch.distributed as dist

from model.device import device_memory_peaks, device_name, rounds_to_tf32
from model.layers.statistics import MemoryStatistics
from model.rules.kernel import memory_kernel
from pipeline.accounting.devices import known_as, sheet_flops_per_s
from pipeline.accounting.flops import measured_matmul_peak, parameter_count, train_flops_per_token
from pipeline.accounting.footprint import per_rank_bytes
from pipeline.checkpoint.writer import SaveReport
from pipeline.config import derived
from pipeline.config import yaml as config_yaml
from pipeline.config.schema import Config
from pipeline.parallel.memory_statistics import gather_statistics
from pipeline.parallel.topology import Topology, on_main
from pipeline.reporting.console import RunConsole, print_table
from pipeline.reporting.diagnosis import diagnose_run
from pipeline.reporting.logits import told_logits
from pipeline.reporting.metrics import MetricsWriter, ThroughputMeter, layer_name
from pipeline.training.step_record import StepRecord
from pipeline.training.stillness import StillnessWatch

SEGMENT_BUCKETS = 20
"""Loss by segment index: 0, 1, 2-3, 4-7, ... (powers of two); the last bucket takes the rest."""


def segment_bucket(index: torch.Tensor) -> torch.Tensor:
    """Bucket of a segment's index in its document."""
    return (
        torch.where(index > 0, torch.log2(index.clamp(min=1).double()).floor() + 1, 0)
        .long()
        .clamp(max=SEGMENT_BUCKETS - 1)
    )


def bucket_name(bucket: int) -> str:
    """`0`, `1`, `2-3`, `4-7`, ..."""
    if bucket < 2:
        return str(bucket)
    first = 2 ** (bucket - 1)
    return f"{first}-{2 * first - 1}" if bucket < SEGMENT_BUCKETS - 1 else f"{first}+"


def told_sheet(name: str | None, flops_per_s: float, precision: str) -> str:
    """What utilisation is also measured against, in words.

    Args:
        name: of the main process's device; None for the CPU.
        flops_per_s: of all devices, NaN where one of them is not known.
    """
    if name is None:
        return "none for a CPU, nor device memory beside that of the process"
    if math.isfinite(flops_per_s):
        tf32 = " in TF32" if precision == "fp32" and rounds_to_tf32() else ""
        return f"{flops_per_s / 1e12:,.0f} TFLOP/s, all devices, dense {precision}{tf32} ({known_as(name)}: {name})"
    return f"unknown: not every device (here: {name}) is in docs/devices.md"


class Monitor:
    """The run's numbers. Every process has one and calls the same methods; only the main one writes.

    Args:
        vocab_size: tokens, without padding.
        stillness: watches what should learn.
        step: where training begins.
        resumed: the run folder's numbers up to `step` stay.
    """

    def __init__(
        self,
        config: Config,
        topology: Topology,
        *,
        vocab_size: int,
        stillness: StillnessWatch,
        step: int,
        resumed: bool,
    ) -> None:
        self.config, self.topology = config, topology
        self.vocab_size = vocab_size
        self.run_dir = Path(config.run_dir)
        self.step = step
        self.is_main = topology.is_main
        self.meter = ThroughputMeter()
        self.writer = self.console = None
        on_main(lambda: self._open_writer(step if resumed else None))
        if self.is_main:
            self.console = RunConsole(total_steps=config.train.steps, start_step=step)
        self.stillness = stillness
        self.peak_flops, self.sheet_flops = 0.0, math.nan
        self.took_a_step = False
        self.skipped_steps = 0
        self._clear_interval()

    def _clear_interval(self) -> None:
        self.interval: dict[str, float] = {}
        self.by_segment = torch.zeros(2, SEGMENT_BUCKETS, dtype=torch.float64, device=self.topology.device)

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time a part of the step (`data`, `forward_backward`, `optimizer`)."""
        with self.meter.phase(name):
            yield

    def wants_statistics(self, step: int) -> bool:
        """Whether step number `step` measures the memory."""
        return step % self.config.metrics.memory_interval == 0 and self.config.model.memory.rule != "none"

    def introduce(self) -> None:
        """Print every derived number before training starts; collective."""
        config, world = self.config, dist.get_world_size()
        dtype = torch.bfloat16 if config.train.precision == "bf16" else torch.float32
        self.topology.barrier()  # all processes measure at once: they share the machine when they train, too
        own_peak = measured_matmul_peak(dtype, self.topology.device)
        name = device_name(self.topology.device)
        own_sheet = sheet_flops_per_s(name, config.train.precision, tf32=rounds_to_tf32()) if name else None
        self.peak_flops, self.sheet_flops = self.topology.all_reduce([own_peak, own_sheet or math.nan])
        if not self.is_main:
            return
        train, parallel, model = config.train, config.parallel, config.model
        tokens = train.lanes * train.segments_per_window * model.segment_length
        count = parameter_count(model, self.vocab_size)
        flops = train_flops_per_token(model, self.vocab_size, recompute=config.bptt.recompute)
        largest = max(per_rank_bytes(config, world, self.vocab_size), key=lambda rank: rank.total)
        lanes_per_rank, per_microbatch = (
            derived.lanes_per_rank(config, world),
            derived.lanes_per_microbatch(config, world),
        )
        kernel = memory_kernel(model, train.precision, self.topology.device.type)
        kernels = {} if kernel is None else {"memory is written by": f"{kernel.name} ({kernel.reason})"}
        rows = {
            "layout": f"tensor {parallel.tensor} x pipeline {parallel.pipeline} x data {self.topology.data_size}, "
            f"ZeRO {parallel.zero_stage}, {world} processes on {self.topology.device.type}",
            "precision": train.precision,
            "memory": f"{model.memory.rule}, write gate {model.memory.write_gate}, mix gate {model.memory.mix_gate}, "
            f"local context {model.local_context}, "
            f"gradient {config.bptt.gradient}, recompute {config.bptt.recompute}",
            **kernels,
            "logits": told_logits(config, world, self.vocab_size),
            "parameters": f"{count['total']:,}",
            "tokens per step": f"{tokens:,} = {train.lanes} lanes x {train.segments_per_window} segments x "
            f"{model.segment_length} tokens"
            + (f", and {train.probes_per_window} probes per lane" if train.probes_per_window else ""),
            "microbatches per step and rank": f"{lanes_per_rank // per_microbatch} of "
            f"{per_microbatch} lanes, {config.bptt.chunks_per_window} chunks each",
            "tokens in the run": f"{tokens * train.steps:,} in {train.steps:,} steps",
            "training FLOPs per token": f"{flops:.3e}",
            "matrix-product peak": f"{self.peak_flops / 1e9:,.1f} GFLOP/s measured, all processes",
            "data-sheet peak": told_sheet(name, self.sheet_flops, config.train.precision),
            "memory per rank, estimated": f"{largest.total / 2**20:,.1f} MiB (stage {largest.stage})",
            "run folder": str(self.run_dir),
        }
        if self.step:
            rows["resumed at step"] = f"{self.step:,}"
        print_table(self.config.name, list(rows.items()))
        settings = asdict(config)
        self.writer.settings(self.step, settings, config_yaml.dump(settings))
        self.writer.text(self.step, "run", "\n".join(f"- {name}: {value}" for name, value in rows.items()))
        self.console.begin()
        self.meter.restart()

    def after_step(self, record: StepRecord) -> None:
        """Take in a step's numbers; at the end of an interval write them. Collective."""
        self.step = step = record.step
        sums, outcome, rate = record.sums, record.outcome, record.rate
        self.meter.count_step(int(sums["tokens"]))
        if outcome.applied:
            for name, value in sums.items():
                self.interval[name] = self.interval.get(name, 0.0) + value
            self._add_by_segment(record)
        else:
            self.skipped_steps += 1
            if self.is_main:
                self.console.message(
                    f"step {step} skipped: loss {record.loss:.4g}, gradient norm "
                    f"{outcome.gradient_norm:.4g}; memory rolled back. Documents of rank 0: "
                    f"{'; '.join(record.documents())}"
                )
        if still := self.stillness.after_step(step, outcome, rate, sums["weight"]):
            self.message(still)
        if record.result.statistics:
            self._write_statistics(step, record.result.statistics)
        if step % self.config.metrics.interval == 0 or step == self.config.train.steps:
            self._write_interval(record)
        elif not self.took_a_step and self.is_main:
            values = {
                "loss/train": record.loss,
                "optimizer/learning_rate": rate,
                "optimizer/gradient_norm": outcome.gradient_norm,
            }
            self.console.first_step(step, values, self.meter.elapsed_s)
        self.took_a_step = True

    def _add_by_segment(self, record: StepRecord) -> None:
        if not (self.topology.is_last_stage and self.topology.tensor_rank == 0):
            return
        batch, result = record.batch, record.result
        bucket = segment_bucket(batch.position_in_document // self.config.model.segment_length).flatten()
        losses = (result.token_loss.double() * batch.loss_weight).sum(dim=-1).flatten()
        weights = batch.loss_weight.double().sum(dim=-1).flatten()
        self.by_segment[0].index_add_(0, bucket, losses)
        self.by_segment[1].index_add_(0, bucket, weights)

    def _write_interval(self, record: StepRecord) -> None:
        topology, step, outcome, rate = self.topology, record.step, record.outcome, record.rate
        by_segment = self.by_segment
        dist.all_reduce(by_segment)
        memory = {"system/process_bytes": psutil.Process().memory_info().rss}
        peaks = device_memory_peaks(topology.device)
        memory |= {f"system/device_{kind}_bytes": size for kind, size in peaks.items()}
        largest = topology.all_reduce(list(map(float, memory.values())), op=dist.ReduceOp.MAX)
        skipped = None
        if self.config.data.skip_bad_documents:
            # The processes of a model's parts read the same lanes.
            copies = topology.tensor_size * topology.pipeline_size
            skipped = topology.all_reduce([float(record.skipped_documents)])[0] / copies
        still, stillness = self.stillness.at_interval(rate)
        totals, by_segment = self.interval, by_segment.cpu()
        self._clear_interval()
        speed = self.meter.report()
        if not self.is_main:
            return
        train = self.config.train
        flops = train_flops_per_token(self.config.model, self.vocab_size)  # what the model needs: MFU
        flops *= 1 + train.probes_per_window / train.segments_per_window
        values = {
            "loss/train": totals["loss"] / totals["weight"] if totals else math.nan,
            "progress/tokens": record.tokens,
            "progress/skipped_steps": self.skipped_steps,
            "optimizer/gradient_norm": outcome.gradient_norm,
            "optimizer/learning_rate": rate,
            "optimizer/learning_rate_beta": rate * self.config.optimizer.beta_lr_scale,
            "optimizer/learning_rate_write_gate": rate * self.config.optimizer.write_gate_lr_scale,
            **dict(zip(memory, largest, strict=True)),
            "speed/mfu": speed["speed/tokens_per_s"] * flops / self.peak_flops,
            **stillness,
            **speed,
        }
        if math.isfinite(self.sheet_flops):
            values["speed/mfu_data_sheet"] = speed["speed/tokens_per_s"] * flops / self.sheet_flops
        if skipped is not None:
            values["data/skipped_documents"] = skipped
        if totals:
            seen = totals["tokens"] + totals["padded"]
            values["data/padded_share"] = totals["padded"] / seen
            if totals["answers"]:
                values["loss/answer"] = totals["answer_loss"] / totals["answers"]
            if totals["probe_answers"]:
                values["loss/probe"] = totals["probe_loss"] / totals["probe_answers"]
            if self.config.model.memory.write_gate != "none":
                steps = seen / (train.lanes * train.segments_per_window * self.config.model.segment_length)
                values["memory/write_gate"] = totals["gate"] / (steps * derived.gate_count(self.config))
        for bucket in range(SEGMENT_BUCKETS):
            loss, weight = by_segment[:, bucket].tolist()
            if weight:
                values[f"loss_by_segment/{bucket_name(bucket)}"] = loss / weight
        self.writer.scalars(step, values)
        self.console.log(step, values)
        for text in still:
            self.message(text)

    def _write_statistics(self, step: int, statistics: dict[int, MemoryStatistics]) -> None:
        """Per layer: gates, the memory's share of the output, norms of M and z. Lanes of data-parallel rank 0."""
        layers = gather_statistics(statistics, self.topology, layers=self.config.model.num_layers)
        if not self.is_main:
            return
        scalars = {}
        for layer, whole in layers.items():
            means = {
                "mix_gate": whole.mix_gate,
                "share_of_output": whole.memory_share,
                "norm_M": whole.memory_norm,
                "norm_z": whole.normaliser_norm,
                "effective_rank": whole.effective_rank,
                "read_variation": whole.read_variation,
            }
            self.writer.histogram(step, layer_name("mix_gate_histogram", layer), whole.mix_gate)
            if self.config.model.memory.write_gate != "none":
                means["write_gate"] = whole.write_gate
                counts = whole.write_gate_histogram.sum(dim=0)
                self.writer.binned_histogram(step, layer_name("write_gate_histogram", layer), counts, 0.0, 1.0)
            scalars |= {layer_name(quantity, layer): float(values.mean()) for quantity, values in means.items()}
        self.writer.scalars(step, scalars)

    def _diagnose(self) -> None:
        """Say in words what is wrong with the memory, if anything is."""
        findings = diagnose_run(self.run_dir, self.config.model.memory)
        if findings is None:
            return
        for finding in findings:
            self.console.message(f"memory: {finding}")
        text = "\n".join(f"- {finding}" for finding in findings) or "nothing wrong is seen"
        self.writer.text(self.step, "memory", text)

    def message(self, text: str) -> None:
        """Print a line, on the main process."""
        if self.is_main:
            self.console.message(text)

    @contextlib.contextmanager
    def evaluating(self, total: int) -> Iterator[Callable[[int], None]]:
        """Show how many of `total` tokens an evaluation has run."""
        if not self.is_main:
            yield lambda tokens: None
            return
        with self.console.beside(total, f"evaluating step {self.step}, tokens") as advance:
            yield advance

    def evaluated(self, step: int, values: dict[str, float], told: str) -> None:
        """An evaluation of the run as it is after `step` steps has found these values: in words, `told`."""
        if self.is_main:
            self.writer.scalars(step, values)
            self.console.message(told)

    def saved(self, report: SaveReport) -> None:
        """A checkpoint was written, or could not be."""
        if not self.is_main:
            return
        if report.error is not None:
            self.console.message(f"CHECKPOINT OF STEP {report.step} FAILED, it will be tried again: {report.error}")
            return
        self.writer.flush()
        self.writer.scalars(report.step, {"checkpoint/stall_s": report.stall_s, "checkpoint/write_s": report.write_s})
        self.console.message(
            f"saved {report.path} (training waited {report.stall_s:.2f} s, writing took {report.write_s:.2f} s)"
        )

    def rolled_back(self, step: int) -> None:
        """The run went back to `step`: what was written for later ones is taken back."""
        self.step = step
        self.meter, self.skipped_steps = ThroughputMeter(), 0
        self._clear_interval()
        on_main(lambda: self._open_writer(step))

    def _open_writer(self, resume_step: int | None) -> None:
        if self.writer is not None:
            self.writer.close()
        tensorboard = self.config.metrics.tensorboard
        self.writer = MetricsWriter(self.run_dir, tensorboard=tensorboard, resume_step=resume_step)

    def close(self) -> None:
        if self.is_main:
            self._diagnose()
            self.console.close()
            self.writer.close()
