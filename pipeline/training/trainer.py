"""The training run: one small loop of named steps, and what must be saved to go on exactly."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.distributed as dist

from data.lanes.loader import WindowBatch, build_loader
from data.lanes.window import WindowPart
from model.rules.state import Memory, clear_lanes
from pipeline.checkpoint.loading import open_newest
from pipeline.checkpoint.reader import CheckpointReader
from pipeline.checkpoint.run_state import CarriedMemory, Parts, Progress, RandomState, SavedOptimizer, load_parts
from pipeline.checkpoint.uploading import checkpoints_in, folders_of
from pipeline.checkpoint.writer import CheckpointSaver, take_snapshot
from pipeline.config import derived
from pipeline.config.schema import Config
from pipeline.parallel.links import link_notes
from pipeline.parallel.optimizer import StepOutcome, ZeroOptimizer
from pipeline.parallel.setup import build_stage, check_same_run, vocabulary, written_for
from pipeline.parallel.topology import Topology, on_main
from pipeline.schedule.executor import Executor, StepResult
from pipeline.schedule.operations import Operation, configured_schedule
from pipeline.training import stopping
from pipeline.training.agreement import agreed_weight
from pipeline.training.batch_sums import named, own_sums
from pipeline.training.batches import pinned_for, to_device
from pipeline.training.elastic import tell_progress, this_attempt
from pipeline.training.evaluating import Evaluation
from pipeline.training.learning_rate import learning_rate
from pipeline.training.monitor import Monitor
from pipeline.training.regroup import Regroup, recovery
from pipeline.training.resilience import SpikeDetector, StopRequest, Watchdog, tell_job
from pipeline.training.saves import Saves
from pipeline.training.skipped_steps import SkippedSteps
from pipeline.training.starting import begin
from pipeline.training.step_record import StepRecord
from pipeline.training.stillness import StillnessWatch, horizon


class SpikeError(RuntimeError):
    """The loss jumps again after every roll-back."""


class Trainer:
    """One process's part of a run.

    Args:
        confirm_store: see `CheckpointSaver`.
    """

    def __init__(self, config: Config, topology: Topology, confirm_store: Callable[[], None] = lambda: None) -> None:
        self.config = config
        self.topology = topology
        torch.manual_seed(config.train.seed)  # else every process would start from a state of its own
        self.vocab_size = vocabulary(config)
        self.lane_range = topology.lanes(config.train.lanes)
        self.loader = build_loader(
            config.data,
            lanes=config.train.lanes,
            first_lane=self.lane_range[0],
            last_lane=self.lane_range[1],
            segments_per_window=config.train.segments_per_window,
            segment_length=config.model.segment_length,
            seed=config.train.seed,
            probes_per_window=config.train.probes_per_window,
            part=WindowPart(config.bptt.chunks_per_window, topology.context_rank, topology.context_size),
            finish=pinned_for(topology.device),
        )
        self.evaluation = Evaluation(config, topology) if config.evaluate.interval is not None else None
        self.stage = build_stage(config, topology, self.vocab_size, drawn=False)  # see `start`
        self.optimizer = ZeroOptimizer(self.stage, topology, config)
        self.executor = Executor(
            self.stage,
            topology,
            chunks=config.bptt.chunks_per_window,
            carry_gradient=config.bptt.gradient == "full",
        )
        lanes = self.lane_range[1] - self.lane_range[0]
        self.lanes_per_microbatch = derived.lanes_per_microbatch(config, dist.get_world_size())
        self.schedule = configured_schedule(
            config, stage=topology.pipeline_rank, microbatches=lanes // self.lanes_per_microbatch
        )
        self.run_dir = Path(config.run_dir)
        self.skipped = SkippedSteps(config.train.max_nonfinite_steps)
        self.monitor: Monitor | None = None
        self.saver = CheckpointSaver(
            self.run_dir / "checkpoints",
            keep=config.checkpoint.keep,
            keep_every=config.checkpoint.keep_every,
            asynchronous=config.checkpoint.asynchronous,
            store=config.checkpoint.store and checkpoints_in(config.checkpoint.store),
            confirm_store=confirm_store,
        )
        self.rollbacks = 0
        self.regroup, self.regrouping = Regroup(config, dist.get_world_size()), False
        self.watchdog = Watchdog(config.resilience.hang_timeout_s, derived.longest_hang_s(config), self.run_dir)
        self.spikes = SpikeDetector(config.resilience.spike_window, config.resilience.spike_threshold)
        self.progress = Progress()
        self.saves = Saves(config, self.saver, self.progress, self.watchdog)
        empty = self.stage.empty_memory(lanes, topology.device)
        self.memory = CarriedMemory(empty, list(self.stage.layers), topology, self.lane_range)
        self.parts: Parts = {
            "optimizer": SavedOptimizer(self.optimizer, topology),
            "memory": self.memory,
            "random": RandomState(),
            "lanes": self.loader,
            "spikes": self.spikes,
            "progress": self.progress,
        }
        """Whatever must be saved to go on exactly."""

    # Starting and ending

    def start(self, resume: str | None) -> None:
        """Prepare the run folder, load the checkpoint if one is asked for, and say what is about to run.

        Args:
            resume: None for a new run; `latest` for the newest whole checkpoint of the run folder, or the beginning
                while there is none; else the path of a checkpoint. A process that torchrun has restarted takes
                `latest` by itself, so that it does not fall back to where an earlier attempt began.

        Raises:
            ConfigError: a new run would overwrite an old one, or the checkpoint does not fit the configuration.
            CheckpointError: the checkpoint asked for is missing or damaged.
        """
        measured = link_notes(self.topology)
        notes, resumed = begin(
            self.config,
            self.topology,
            self.optimizer,
            tokenizer=self.loader.tokenizer,
            vocab_size=self.vocab_size,
            resume=resume,
            load=self.load,
        )
        self.monitor = Monitor(
            self.config,
            self.topology,
            vocab_size=self.vocab_size,
            stillness=StillnessWatch(self.optimizer, horizon=horizon(self.config)),
            step=self.progress.step,
            resumed=resumed,
        )
        self.monitor.introduce()
        if self.evaluation is not None:
            self.evaluation.begin(self.run_dir, self.progress.step)
            notes += self.evaluation.notes
        for note in [*measured, *notes]:
            self.monitor.message(note)
        if resume not in (None, "latest"):
            self.saves.upload(self.monitor)  # what it goes on from, which its store may lack

    @property
    def is_done(self) -> bool:
        """Whether nothing is left to do: no step, nor the evaluation behind the last one."""
        step = self.progress.step
        return step >= self.config.train.steps and not (self.evaluation is not None and self.evaluation.is_due(step))

    def close(self) -> None:
        """End the background work of a run that ended well."""
        self.saver.close()
        self.loader.close()
        if self.monitor:
            self.monitor.close()

    # The loop

    def train(self) -> None:
        """Train to the last step or until asked to stop, saving on the way and at the end.

        Raises:
            NonFiniteError: too many steps in a row were skipped.
            OSError: checkpoints cannot be written, or (`StoreError`) those of a run that is done not be copied.
        """
        stop = StopRequest(self.config.resilience, self.run_dir)
        stop.install()
        try:
            # Asked while the run was starting; a time limit leaves it one step at least, or it would never come on.
            leaving = self._at_boundary(stop, lambda: stop.asked)
            start = dataclasses.replace(self.progress)
            while not leaving and self.progress.step < self.config.train.steps:
                self.train_step()
                self._tell_progress(start)
                self.watchdog.warm = True
                leaving = self._at_boundary(stop, lambda: stop.reason)
            self._settle_save()
            while not self.saves.is_saved:
                self.save()
                self._settle_save()
            self.saves.finish_uploading(self.monitor, is_done=self.is_done)
        finally:
            stop.uninstall()

    def _at_boundary(self, stop: StopRequest, asked: Callable[[], str | None]) -> bool:
        """Between two steps: agree on failed saves and on stopping; save and evaluate when it is time. True to leave.

        Args:
            asked: why this process wants to stop now.
        """
        reason = asked()
        regroup, told = self.regroup.wanted() if self.topology.is_main else (False, None)
        flags = [float(reason is not None), float(self.saver.has_failed), float(regroup)]
        leaving, failed, regroup = self.topology.all_reduce(flags, op=dist.ReduceOp.MAX)
        if told:
            self.monitor.message(told)
        if failed or self.saver.has_succeeded:
            self._settle_save()
        if self.saves.is_due:
            self.save()
        if leaving:
            reasons: list[str | None] = [None] * dist.get_world_size()
            dist.all_gather_object(reasons, reason)
            first = next(r for r in reasons if r)
            if not self.is_done:
                self.monitor.stopping(first)
                tell_job(stopping.JOB_STOPPED, first)
            on_main(stop.clear_file)
        elif not regroup and self.evaluation is not None and self.evaluation.is_due(self.progress.step):
            done = self.evaluation.run(self.progress.step, self.optimizer, self.monitor, self.watchdog, asked)
            return not done and self._at_boundary(stop, asked)
        self.regrouping = bool(regroup and not leaving)
        return bool(leaving or regroup)

    def _tell_progress(self, start: Progress) -> None:
        """A step is done: the launcher may want to know, and after the first one what a restart has cost is known."""
        tell_progress(self.progress.step, self.progress.tokens)
        attempt = this_attempt() if not self.watchdog.warm else None
        if attempt and attempt.number:
            self.monitor.recovered(
                *recovery(attempt, start_step=start.step, start_tokens=start.tokens, data_size=self.topology.data_size)
            )

    def train_step(self) -> None:
        """One window of every lane: forward, backward, update; or none of it when a number is wrong."""
        step = self.progress.step + 1
        with self.monitor.watch_step(step):
            with self._phase("data"):
                batch = to_device(self.loader.next_batch(), self.topology.device)
            with self._phase("forward_backward"):
                result = self.forward_backward(batch, statistics=self.monitor.wants_statistics(step))
            with self._phase("optimizer"):
                sums, outcome, rate = self.update(batch, result)
            self.record(batch, result, sums, outcome, rate)
        if self.monitor.trace_is_due(step):
            self.watchdog.progress(step, "trace", patient=True)
            self.monitor.write_trace()

    def update(self, batch: WindowBatch, result: StepResult) -> tuple[dict[str, float], StepOutcome, float]:
        """Move the parameters, unless a number is wrong.

        Returns:
            Sums over the whole global batch, the same on all ranks: those of `batch_sums.NAMES`; and `spike`, the
            loss's robust z-score where that counts as a spike, else 0. What came of the step. The learning rate.
        """
        sums: dict[str, float] = {}

        def is_sound(numbers: list[float]) -> bool:
            sums.update(named(numbers))
            action = self.config.resilience.spike_action
            finite = math.isfinite(sums["loss"] + sums["gate"])
            loss = sums["loss"] / max(sums["weight"], 1e-30)
            score = self.spikes.score(loss) if finite and action != "none" else 0.0
            sums["spike"] = score if score > self.spikes.threshold else 0.0
            return finite and not (sums["spike"] and action != "warn")

        rate = learning_rate(self.config.optimizer, self.progress.step, self.config.train.steps)
        sliding = self.config.model.local_context == "sliding"
        outcome = self.optimizer.step(rate, own_sums(batch, result, self.topology, sliding=sliding), is_sound)
        return sums, outcome, rate

    def record(
        self, batch: WindowBatch, result: StepResult, sums: dict[str, float], outcome: StepOutcome, rate: float
    ) -> None:
        """The step is over: carry the memory on, count, tell the monitor, and see whether the run may go on so."""
        self.progress.step += 1
        self.progress.windows += 1
        self.progress.tokens += int(sums["tokens"])
        told = self.progress.tokens, self.loader.skipped_documents, self.loader.mixture
        record = StepRecord(self.progress.step, batch, result, sums, outcome, rate, *told)
        if outcome.applied:
            self.memory.value = result.memory
            self.spikes.add(record.loss)
            self.skipped.clear()
        else:
            self.memory.value = self._memory_after_skip(batch)
            self.skipped.add(record)
        self.monitor.after_step(record)
        if sums["spike"]:
            self._after_spike(record.loss, sums["spike"])
        elif self.skipped.too_many:
            self.skipped.stop()

    @contextlib.contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        self.watchdog.progress(self.progress.step + 1, name)
        with self.monitor.phase(name):
            yield

    def _begin(self, operation: Operation | None) -> None:
        """The schedule comes to an operation, or (None) to its end."""
        self.watchdog.operation(
            f"{operation.kind.value}, microbatch {operation.microbatch}, chunk {operation.chunk}"
            if operation
            else "sums"
        )
        if self.monitor:
            self.monitor.operation(operation)

    def forward_backward(self, batch: WindowBatch, *, statistics: bool = False) -> StepResult:
        """Forward and backward passes of a step: this rank's result. Gradients are synchronised afterwards.

        A device may still be at work then: nothing of it has been read.

        Raises:
            DifferentWindowsError: the processes of one model copy have not read the same window.
        """
        config, topology = self.config, self.topology
        self.optimizer.backbone_frozen = self.progress.step < config.train.freeze_backbone_steps
        weight = agreed_weight(batch, topology, step=self.progress.step + 1)
        # DeepSpeed averages over data x context; the factor makes the average a sum over all lanes and their parts.
        scale = topology.replicas / max(weight, 1e-30)
        penalised = self.progress.step >= config.train.write_gate_penalty_from
        penalty = config.train.write_gate_penalty if penalised else 0.0
        gate_scale = penalty * topology.replicas / derived.gate_count(config) if penalty else 0.0
        with self.optimizer.accumulate():
            return self.executor.run(
                self.schedule,
                batch,
                self.memory.value,
                lanes_per_microbatch=self.lanes_per_microbatch,
                loss_scale=scale,
                gate_scale=gate_scale,
                statistics=statistics,
                observer=self._begin,
            )

    def _memory_after_skip(self, batch: WindowBatch) -> Memory:
        """The memory from before a skipped window; empty where a document started in the window.

        The lanes have moved on: such a lane is now inside a document whose beginning it has not read, and must not
        read the document before it.
        """
        started = batch.reset if batch.starts is None else batch.starts.any(dim=2)
        return clear_lanes(self.memory.value, ~started.any(dim=1))

    # Saving and loading

    def save(self) -> None:
        """Begin a checkpoint (write all of it when saving is synchronous); collective."""
        self._settle_save()
        summary = written_for(self.config, self.topology, self.vocab_size, self.loader.tokenizer[0])
        self.saves.begin(lambda: take_snapshot(self.parts, summary, owns_lanes=self.topology.owns_lanes))
        if not self.config.checkpoint.asynchronous:
            self._settle_save()

    def _settle_save(self) -> None:
        """Wait for the save in flight and report it. Raises as `Saves.settle`."""
        if self.saves.settle(self.monitor):
            self.rollbacks = 0

    def load(self, reader: CheckpointReader) -> None:
        """Go on from a checkpoint; collective."""
        self.watchdog.progress(self.progress.step, "load", patient=True)
        check_same_run(reader.config, self.config)
        load_parts(reader, self.parts)
        self.saves.saved_step = self.progress.step
        self.skipped.clear()

    def _after_spike(self, loss: float, score: float) -> None:
        """Say it; roll back where the configuration asks for it.

        Raises:
            SpikeError: roll-backs, or skipped steps, lead nowhere.
        """
        action, at = self.config.resilience.spike_action, self.progress.step
        self.monitor.message(
            f"loss spike at step {at}: {loss:.4g} is {score:.1f} robust deviations above the recent steps; "
            f"action: {action}"
        )
        if not (action == "rollback" and self._roll_back(at)) and self.skipped.too_many:
            raise SpikeError(
                f"{len(self.skipped)} steps in a row were skipped, the last for its loss of {loss:.4g}: the loss has "
                "risen for good, or resilience.spike_threshold is too low"
            )

    def _roll_back(self, at: int) -> bool:
        """Go back to the last checkpoint, with the lanes moved past the window of step `at`; False without one."""
        self._settle_save()
        if self.rollbacks == self.config.resilience.max_rollbacks:
            raise SpikeError(f"loss spike at step {at}, after {self.rollbacks} roll-backs to the same checkpoint")
        reader = open_newest(folders_of(self.config), self.monitor.message)
        if reader is None:
            self.monitor.message("there is no checkpoint to roll back to: the step was skipped")
            return False
        self.rollbacks += 1
        # Not the steps since then: an earlier roll-back to this checkpoint has left windows out already.
        windows = self.progress.windows - reader.summary.windows
        self.load(reader)
        self.skip_windows(windows)
        self.monitor.rolled_back(self.progress.step)
        if self.evaluation is not None:
            self.evaluation.forget_after(self.progress.step)
        self.monitor.message(f"rolled back to step {self.progress.step}; the lanes go on {windows} windows later")
        return True

    def skip_windows(self, windows: int) -> None:
        """Move the lanes on without training. Memory stays where a lane is still in the same document."""
        before = self.loader.state_dict()["lanes"]
        self.loader.skip_windows(windows)
        self.progress.windows += windows
        after = self.loader.state_dict()["lanes"]
        keep = [before[str(lane)]["taken"] == after[str(lane)]["taken"] for lane in range(*self.lane_range)]
        self.memory.value = clear_lanes(self.memory.value, torch.tensor(keep))
