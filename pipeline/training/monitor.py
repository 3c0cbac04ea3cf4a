"""Watching a run: gathers numbers from all processes and hands them to the console, metrics.jsonl and TensorBoard."""

from __future__ import annotations

import contextlib
import math
import socket
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import psutil
import torch
import torch.distributed as dist

from model.device import device_memory_peaks, device_name, rounds_to_tf32
from model.layers.statistics import MemoryStatistics
from pipeline.accounting.devices import sheet_flops_per_s
from pipeline.accounting.flops import keys_per_query, measured_matmul_peak, train_flops_per_token
from pipeline.checkpoint.uploading import UploadReport
from pipeline.checkpoint.writer import SaveReport
from pipeline.config import derived
from pipeline.config import yaml as config_yaml
from pipeline.config.schema import Config
from pipeline.parallel.memory_statistics import gather_statistics
from pipeline.parallel.topology import Topology, on_main
from pipeline.reporting.console import RunConsole
from pipeline.reporting.console_file import ConsoleFile
from pipeline.reporting.diagnosis import diagnose_run
from pipeline.reporting.metrics import MetricsWriter, Start, layer_name
from pipeline.reporting.set_names import set_names
from pipeline.reporting.throughput import ThroughputMeter
from pipeline.reporting.wandb_run import WandbRun
from pipeline.schedule.operations import Operation
from pipeline.training.grouped_losses import LossBySegment, LossBySet, bucket_name
from pipeline.training.introduction import derived_rows, told_sheet
from pipeline.training.mixture import mixture_metrics
from pipeline.training.profiling import ProfileWindow
from pipeline.training.rank_times import NUMBERS, OwnTime, StragglerWatch, find_slowest, slots
from pipeline.training.step_record import StepRecord
from pipeline.training.stillness import StillnessWatch


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
            self.console = RunConsole(config.train.steps, start_step=step, file=ConsoleFile(self.run_dir))
        self.stillness = stillness
        self.profile = ProfileWindow(config.metrics.profile, self.run_dir, dist.get_rank(), step)
        self.own_time = OwnTime(topology)
        self.stragglers: StragglerWatch | None = None
        self.ending: str | None = None
        self.peak_flops, self.sheet_flops = 0.0, math.nan
        self._clear_losses()
        self.took_a_step = False
        self.skipped_steps = 0
        self._clear_interval()

    def _clear_losses(self) -> None:
        self.by_segment = LossBySegment(self.topology.device)
        self.by_set = LossBySet(len(self.config.data.sets), self.topology.device)

    def _clear_interval(self) -> None:
        self.interval: dict[str, float] = {}
        self.own_s, self.own_steps = 0.0, 0

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time a part of the step (`data`, `forward_backward`, `optimizer`)."""
        with self.meter.phase(name), self.profile.span(name):
            yield

    @contextlib.contextmanager
    def watch_step(self, step: int) -> Iterator[None]:
        """Around each step."""
        if step in self.profile:
            self.meter.pause()
        with self.profile.step(step):
            yield

    def operation(self, operation: Operation | None) -> None:
        """The schedule comes to an operation, or (None) to its end."""
        self.own_time.at(operation)
        self.profile.operation(operation)

    def trace_is_due(self, step: int) -> bool:
        """Whether step number `step` was the last one that is profiled; then all processes call `write_trace`."""
        return not self.profile.written and step == self.profile.steps.stop - 1

    def write_trace(self) -> None:
        """End the window of the profiler; collective."""
        self.profile.close()
        self.topology.all_reduce([0.0])  # nobody's clock runs on while another one writes
        self.meter.go_on()
        self.message(self.profile.told)

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
        hosts = [""] * world
        dist.all_gather_object(hosts, socket.gethostname())
        if not self.is_main:
            return
        sharing = self.topology.tensor_size * self.topology.context_size
        self.stragglers = StragglerWatch(config.metrics.straggler_bound, hosts, sharing)
        sheet = told_sheet(name, self.sheet_flops, config.train.precision)
        rows = derived_rows(config, self.topology, self.vocab_size, peak_flops=self.peak_flops, sheet=sheet)
        if self.step:
            rows["resumed at step"] = f"{self.step:,}"
        self.console.table(self.config.name, list(rows.items()))
        if self.profile.note:
            self.console.message(self.profile.note)
        start = Start(
            name=config.name,
            steps=config.train.steps,
            tokens_per_step=derived.tokens_per_step(config),
            hosts=hosts,
            layout=rows["layout"],
            memory=config.model.memory,
            straggler_bound=config.metrics.straggler_bound,
        )
        self.writer.start(self.step, start)
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
        own_s = self.own_time.step_s()
        if step not in self.profile:
            self.own_s += own_s
            self.own_steps += 1
        if outcome.applied:
            for name, value in sums.items():
                self.interval[name] = self.interval.get(name, 0.0) + value
            self._add_losses(record)
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
        if self.wants_statistics(step):  # on all ranks, also those of a stage without a memory
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

    def _add_losses(self, record: StepRecord) -> None:
        if not (self.topology.is_last_stage and self.topology.tensor_rank == 0):
            return
        self.by_segment.add(record.batch, record.result.token_loss, self.config.model.segment_length)
        if record.batch.set_index is not None:
            self.by_set.add(record.batch, record.result.token_loss)

    def _write_interval(self, record: StepRecord) -> None:
        topology, step, outcome, rate = self.topology, record.step, record.outcome, record.rate
        by_segment = {bucket_name(bucket): loss for bucket, loss in self.by_segment.collect().items()}
        memory = {"system/process_bytes": psutil.Process().memory_info().rss}
        peaks = device_memory_peaks(topology.device)
        memory |= {f"system/device_{kind}_bytes": size for kind, size in peaks.items()}
        speed = self.meter.report()
        data_s = speed.get("speed/data_s", 0.0)
        own_s = data_s + self.own_s / max(self.own_steps, 1)
        own = slots(dist.get_rank(), dist.get_world_size(), own_s, data_s)
        gathered = topology.all_reduce([*map(float, memory.values()), *own], op=dist.ReduceOp.MAX)
        largest, of_ranks = gathered[: len(memory)], gathered[len(memory) :]
        copies = topology.tensor_size * topology.context_size * topology.pipeline_size
        mixture = {}
        if len(record.mixture) > 1:
            names = set_names([share.path for share in record.mixture])
            mixture |= {f"loss_by_set/{names[number]}": loss for number, loss in self.by_set.collect().items()}
            tokens = topology.all_reduce([float(share.tokens) for share in record.mixture])
            mixture |= mixture_metrics(record.mixture, [of_set / copies for of_set in tokens])
        skipped = None
        if self.config.data.skip_bad_documents:
            # The processes that work on a lane together leave out the same.
            skipped = topology.all_reduce([float(record.skipped_documents)])[0] / copies
        still, stillness = self.stillness.at_interval(rate)
        totals, measured = self.interval, self.own_steps > 0
        self._clear_interval()
        if not self.is_main:
            return
        train = self.config.train
        model, attended = self.config.model, 1.0
        if self.config.data.packing and totals:
            attended = totals["keys"] / (totals["tokens"] * keys_per_query(model))
        flops = train_flops_per_token(model, self.vocab_size, attended=attended)  # what the model needs: MFU
        flops += train_flops_per_token(model, self.vocab_size) * train.probes_per_window / train.segments_per_window
        values = {
            "loss/train": totals["loss"] / totals["weight"] if totals else math.nan,
            "progress/tokens": record.tokens,
            "progress/skipped_steps": self.skipped_steps,
            "optimizer/gradient_norm": outcome.gradient_norm,
            "optimizer/learning_rate": rate,
            "optimizer/learning_rate_beta": rate * self.config.optimizer.beta_lr_scale,
            "optimizer/learning_rate_write_gate": rate * self.config.optimizer.write_gate_lr_scale,
            **dict(zip(memory, largest, strict=True)),
            **stillness,
            **speed,
        }
        if speed:
            values["speed/mfu"] = speed["speed/tokens_per_s"] * flops / self.peak_flops
            if math.isfinite(self.sheet_flops):
                values["speed/mfu_data_sheet"] = speed["speed/tokens_per_s"] * flops / self.sheet_flops
        if measured:
            still += self._compare_ranks(of_ranks, values)
        if skipped is not None:
            values["data/skipped_documents"] = skipped
        values |= mixture
        if totals:
            seen = totals["tokens"] + totals["padded"]
            values["data/padded_share"] = totals["padded"] / seen
            if totals["answers"]:
                values["loss/answer"] = totals["answer_loss"] / totals["answers"]
            if totals["probe_answers"]:
                values["loss/probe"] = totals["probe_loss"] / totals["probe_answers"]
            if self.config.model.memory.write_gate != "none":
                steps = seen / derived.tokens_per_step(self.config)
                values["memory/write_gate"] = totals["gate"] / (steps * derived.gate_count(self.config))
        values |= {f"loss_by_segment/{bucket}": loss for bucket, loss in by_segment.items()}
        self.writer.scalars(step, values)
        self.console.log(step, values)
        for text in still:
            self.message(text)

    def _compare_ranks(self, of_ranks: list[float], values: dict[str, float]) -> list[str]:
        """Add the ranks' times to `values`; what there is to say about them."""
        if len(of_ranks) == NUMBERS:
            return []
        own_s, data_s = of_ranks[::NUMBERS], of_ranks[1::NUMBERS]
        self.writer.vector(self.step, "ranks/own_s", [float(f"{seconds:.4g}") for seconds in own_s])
        slowest = find_slowest(own_s, data_s, self.topology.pipeline_size)
        if slowest is None:
            return []
        values |= {"ranks/slowest": slowest.rank, "ranks/slowest_s": slowest.own_s}
        values |= {"ranks/median_s": slowest.others_s, "ranks/slowdown": slowest.slowdown}
        news = self.stragglers.after_interval(slowest)
        return [news] if news else []

    def _write_statistics(self, step: int, statistics: dict[int, MemoryStatistics]) -> None:
        """Per layer: gates, the memory's share of the output, norms of M and z. Lanes of data-parallel rank 0."""
        layers = gather_statistics(statistics, self.topology, self.config.model)
        if not self.is_main:
            return
        written = self.config.model.memory.write_gate != "none"
        scalars, of_layers = {}, defaultdict(list)
        for layer, whole in layers.items():
            means = {
                "mix_gate": whole.mix_gate,
                "share_of_output": whole.memory_share,
                "norm_M": whole.memory_norm,
                "norm_z": whole.normaliser_norm,
                "effective_rank": whole.effective_rank,
                "read_variation": whole.read_variation,
            }
            self.writer.histogram(step, layer_name("mix_gate_histogram", layer), whole.mix_gate, shown=False)
            if written:
                means["write_gate"] = whole.write_gate
                counts = whole.write_gate_histogram.sum(dim=0)
                name = layer_name("write_gate_histogram", layer)
                self.writer.binned_histogram(step, name, counts, 0.0, 1.0, shown=False)
            for quantity, values in means.items():
                scalars[layer_name(quantity, layer)] = mean = float(values.mean())
                of_layers[quantity].append(mean)
        of_layers.pop("write_gate", None)  # its mean over a whole interval is there
        scalars |= {f"memory/{quantity}": sum(means) / len(means) for quantity, means in of_layers.items()}
        self.writer.scalars(step, scalars)
        gates = torch.cat([whole.mix_gate.flatten() for whole in layers.values()])
        self.writer.histogram(step, "memory/mix_gate_histogram", gates)
        if written:
            counts = sum(whole.write_gate_histogram.sum(dim=0) for whole in layers.values())
            self.writer.binned_histogram(step, "memory/write_gate_histogram", counts, 0.0, 1.0)

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
        if report.upload is not None:
            self.uploaded(report.upload)

    def uploaded(self, upload: UploadReport) -> None:
        """Checkpoints were copied to the run's store, or could not all be."""
        if not self.is_main:
            return
        store = self.config.checkpoint.store
        if upload.names:
            self.console.message(f"uploaded {', '.join(upload.names)} to {store} in {upload.seconds:.2f} s")
        if upload.error is not None:
            self.console.message(
                f"UPLOAD TO {store} FAILED, the checkpoint is in {self.config.run_dir} alone and will go with the next "
                f"one: {upload.error}"
            )
        for note in upload.notes:
            self.console.message(note)

    def recovered(self, text: str, values: dict[str, float]) -> None:
        """What a change of the nodes has cost, after the first step that followed it."""
        if self.is_main:
            self.console.message(text)
            self.writer.scalars(self.step, values)

    def rolled_back(self, step: int) -> None:
        """The run went back to `step`: what was written for later ones is taken back."""
        self.step = step
        self.meter, self.skipped_steps = ThroughputMeter(), 0
        self._clear_losses()
        self._clear_interval()
        on_main(lambda: self._open_writer(step))

    def _open_writer(self, resume_step: int | None) -> None:
        if self.writer is not None:
            self.writer.close()
        metrics = self.config.metrics
        sinks = [] if metrics.wandb.project is None else [self._open_wandb]
        self.writer = MetricsWriter(self.run_dir, tensorboard=metrics.tensorboard, resume_step=resume_step, sinks=sinks)

    def _open_wandb(self) -> WandbRun:
        return WandbRun(self.config.metrics.wandb, self.run_dir, self.config.name)

    def stopping(self, reason: str) -> None:
        """The run ends before its last step."""
        self.ending = f"stopped: {reason}"
        self.message(f"stopping after step {self.step}: {reason} (--resume goes on from there)")

    def close(self) -> None:
        self.profile.close()
        if self.is_main:
            self._diagnose()
            self.console.close()
            self.writer.end(self.step, self.ending or "finished")
            self.writer.close()
