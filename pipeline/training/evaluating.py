"""A run evaluates itself between two of its steps, in its own processes and layout, with the weights that it has.

Nothing of the run changes by it: documents and tasks are read apart from the lanes, their memory is made anew, no
random number is drawn, and the time does not count as training's. When the run is asked to stop, it ends between two
windows; what was not evaluated is made up for when the run goes on. Context ranks evaluate documents of their own.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch.distributed as dist

from data.prepared.shards import PreparedSet
from data.synthetic import is_text_file, source_option
from data.tokenizer.tokenizer import load_tokenizer
from pipeline.config.load import ConfigError
from pipeline.config.schema import Config
from pipeline.evaluation import scalars
from pipeline.evaluation.work import Shown, Work, own_sets
from pipeline.inference.streaming import Interrupted, Streamer
from pipeline.parallel.optimizer import ZeroOptimizer
from pipeline.parallel.topology import Topology, on_main
from pipeline.reporting.evaluation_metrics import loss_metric, told
from pipeline.reporting.metrics import METRICS_FILE, metric_lines
from pipeline.reporting.set_names import set_name
from pipeline.training.monitor import Monitor
from pipeline.training.resilience import Watchdog

WINDOWS_BETWEEN_QUESTIONS = 8
"""After so many windows the processes of a model copy agree on whether to go on: on a GPU seconds, and seldom enough
that stages need not wait for one another."""
STOP = "infini/evaluation/stop"
"""Beginning of a key of the job's store: somebody is asked to stop. Only rank 0 sees a stop file."""
SECONDS = "evaluation/seconds"
"""Of every evaluation: tells which steps have had theirs."""


class Evaluation:
    """What is measured, and when.

    Args:
        config: with `evaluate.interval`.

    Raises:
        ConfigError: there is nothing to measure, or a task does not fit: told before anything runs.
    """

    def __init__(self, config: Config, topology: Topology) -> None:
        evaluate = config.evaluate
        self.config, self.topology, self.interval = config, topology.for_documents(), evaluate.interval
        self.notes: list[str] = []
        sets = own_sets(config, self.notes) if evaluate.documents else []
        specs = evaluate.tasks if evaluate.interval_tasks is None else evaluate.interval_tasks
        if evaluate.documents and not sets:
            raise ConfigError(
                [
                    f"evaluate.interval = {self.interval}: {'; '.join(self.notes)}. Prepare it again with "
                    "--valid-fraction, set evaluate.documents=0 to measure tasks alone, or evaluate.interval=null"
                ]
            )
        tokenizer = load_tokenizer(config.data.sets[0].path) if specs else None
        try:
            self.work = Work(config, sets, specs, [], tokenizer, self.notes)
        except ValueError as error:
            raise ConfigError([f"evaluate.interval = {self.interval}: {error}"]) from None
        if self.work.is_empty:
            raise ConfigError(
                [
                    f"evaluate.interval = {self.interval}: evaluate.documents = 0 and no evaluate.interval_tasks (or "
                    "evaluate.tasks): there is nothing to measure; name a task, or set evaluate.interval=null"
                ]
            )
        _check_fillers(self.work, self.interval)
        self.done: dict[int, float | None] = {}
        """Per step that was evaluated, the loss of the first set with the memory on."""

    def begin(self, run_dir: Path, step: int) -> None:
        """Find out which steps up to `step` had their evaluation before this process."""
        self.done = on_main(lambda: _evaluated(run_dir / METRICS_FILE, step, self._loss_name))

    def forget_after(self, step: int) -> None:
        """The run has gone back to `step`."""
        self.done = {done: loss for done, loss in self.done.items() if done <= step}

    def is_due(self, step: int) -> bool:
        """Whether the run is to be evaluated as it is after `step` steps."""
        train = self.config.train
        wanted = step % self.interval == 0 or step == train.steps
        return wanted and step not in self.done and (step > 0 or train.init_from is not None)

    def run(
        self,
        step: int,
        optimizer: ZeroOptimizer,
        monitor: Monitor,
        watchdog: Watchdog,
        reason: Callable[[], str | None],
    ) -> bool:
        """Evaluate; collective. False when somebody was asked to stop before the end.

        Args:
            step: that was done last.
            optimizer: of the model that is measured.
            reason: why this process is to stop; None for going on.
        """
        streamer = Streamer(optimizer.stage, self.topology)
        question = streamer.interrupted = _Question(self.topology, watchdog, reason, f"{STOP}/{step}")
        streamer.waiting = lambda: _waiting(watchdog, step)
        watchdog.progress(step, "evaluation")
        start = time.perf_counter()
        try:
            with monitor.meter.paused(), optimizer.whole_parameters():
                results = self.work.measure(streamer, monitor.evaluating)
        except Interrupted:
            question.forget()
            monitor.message(f"the evaluation of step {step} was interrupted: a run that goes on there makes up for it")
            return False
        seconds = time.perf_counter() - start
        values = scalars.scalars(results | {"step": step})
        self.done[step] = values.get(self._loss_name)
        monitor.evaluated(step, values | {SECONDS: seconds}, self._told(step, values, seconds))
        return True

    def rehearse(self, optimizer: ZeroOptimizer, shown: Shown) -> None:
        """Evaluate, and keep nothing of it; collective."""
        with optimizer.whole_parameters():
            self.work.measure(Streamer(optimizer.stage, self.topology), shown)

    @property
    def _loss_name(self) -> str | None:
        """The metric that tells which evaluation was the best."""
        if not self.work.held_out:
            return None
        return loss_metric(set_name(str(self.work.held_out[0][0].path)), "on")

    def _told(self, step: int, values: dict[str, float], seconds: float) -> str:
        parts = told(values)
        losses = {done: loss for done, loss in self.done.items() if loss is not None and math.isfinite(loss)}
        if losses:
            best = min(losses, key=losses.get)
            parts.append("the best so far" if best == step else f"best {losses[best]:.4f} at step {best}")
        return f"evaluation of step {step}: " + "; ".join([*parts, f"{seconds:.3g} s"])


class _Question:
    """Asked before every window whether that is one too many."""

    def __init__(self, topology: Topology, watchdog: Watchdog, reason: Callable[[], str | None], key: str) -> None:
        self.topology, self.watchdog, self.reason, self.key = topology, watchdog, reason, key
        self.store = dist.distributed_c10d._get_default_store()
        self.windows = 0

    def __call__(self) -> bool:
        self.watchdog.operation(f"window {self.windows}")
        self.windows += 1
        if self.windows % WINDOWS_BETWEEN_QUESTIONS:
            return False
        own = self.reason() is not None or self.store.check([self.key])
        if not self.topology.all_reduce([float(own)], op=dist.ReduceOp.MAX, group=self.topology.model_group)[0]:
            return False
        self.store.set(self.key, "")  # for the other copies, which nobody else may have told
        return True

    def forget(self) -> None:
        """All have heard of it: who evaluates this step the next time is not to be stopped by it."""
        if self.topology.is_main:
            self.store.delete_key(self.key)


@contextmanager
def _waiting(watchdog: Watchdog, step: int) -> Iterator[None]:
    """A copy of the model that has less to run waits for the others, which are watched where they are."""
    watchdog.progress(step, "results of the evaluation", patient=True)
    yield
    watchdog.progress(step, "evaluation")


def _check_fillers(work: Work, interval: int | None) -> None:
    """Refuse documents that are longer than the text they are to be hidden in, which would come more than once."""
    problems = []
    for task in work.tasks:
        # Of a text file it is not known before its tokens are; its sentences come again.
        if source_option(task.task) == "filler" and task.source is not None and not is_text_file(task.source):
            there = int(PreparedSet(task.source, "valid").lengths.sum())
            if (longest := max(task.axes["length"])) > there:
                problems.append(
                    f"evaluate.interval = {interval}: {task.spec!r} needs documents of {longest:,} tokens, but the "
                    f"text that {task.source} holds out has {there:,}: ask for shorter ones"
                )
    if problems:
        raise ConfigError(problems)


def _evaluated(path: Path, step: int, name: str | None) -> dict[int, float | None]:
    """Steps up to `step` whose evaluation a run's metrics hold, and what they hold under `name`."""
    if not path.is_file():
        return {}
    records = (record for _, record in metric_lines(path) if not isinstance(record, str))
    return {x["step"]: x.get(name) for x in records if SECONDS in x and x["step"] <= step}
