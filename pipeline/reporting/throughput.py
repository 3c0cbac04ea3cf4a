"""The clock behind tokens per second."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class ThroughputMeter:
    """Tokens per second and the seconds of each phase, over the interval since the last `report`.

    Everything that happens in the interval counts, saving too, but for what is done in `paused` or after `pause`: the
    rate is what a user gets. Phases are host time; on a GPU work that is only queued falls into the phase that waits
    for it.

    Args:
        clock: a monotonic clock in seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._paused_at: float | None = None
        self.restart()

    @property
    def elapsed_s(self) -> float:
        """Since the interval began."""
        return self._now() - self._start

    def _now(self) -> float:
        return self._clock() if self._paused_at is None else self._paused_at

    def restart(self) -> None:
        """Begin an interval now."""
        self._start = self._now()
        self._tokens = 0
        self._steps = 0
        self._phases: dict[str, float] = {}

    def pause(self) -> None:
        """Leave out what follows, up to `go_on`: time, steps and tokens."""
        self._paused_at = self._now()

    def go_on(self) -> None:
        """Count again."""
        if self._paused_at is not None:
            self._start += self._clock() - self._paused_at
            self._paused_at = None

    @contextmanager
    def paused(self) -> Iterator[None]:
        """The time of the block does not count."""
        if self._paused_at is not None:
            yield
            return
        self.pause()
        try:
            yield
        finally:
            self.go_on()

    def count_step(self, tokens: int) -> None:
        """Call once per step with the tokens that all ranks together took in it."""
        if self._paused_at is None:
            self._tokens += tokens
            self._steps += 1

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the time of the block to phase `name` (`data`, `forward_backward`, `optimizer`), also when it raises."""
        start = self._now()
        try:
            yield
        finally:
            self._phases[name] = self._phases.get(name, 0.0) + self._now() - start

    def report(self) -> dict[str, float]:
        """`speed/tokens_per_s`, and as mean seconds per step `speed/step_s` and `speed/<phase>_s`, of the interval that
        ends here; the next one begins. Nothing where no step counted."""
        elapsed_s, values = self.elapsed_s, {}
        if self._steps:
            values = {"speed/tokens_per_s": self._tokens / elapsed_s, "speed/step_s": elapsed_s / self._steps}
            values |= {f"speed/{name}_s": seconds / self._steps for name, seconds in self._phases.items()}
        self.restart()
        return values
