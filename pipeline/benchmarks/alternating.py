"""Contestants that take turns: what disturbs the machine meets all of them, and their ratios are of neighbours in time.

Every round runs every contestant once, in an order that turns by one from round to round and reverses every other time,
so that none always follows the same one. A ratio is taken inside a round; reported are medians over rounds, and the
quartiles beside them.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, TypeVar

import torch

Name = TypeVar("Name")


class Spread(NamedTuple):
    """A median with the quartiles around it."""

    median: float
    low: float
    high: float
    samples: int

    def in_words(self, form: str, factor: float = 1.0) -> str:
        """`median (low - high)`, each of them `factor` times as large and in the format `form`."""
        median, low, high = (format(factor * x, form) for x in self[:3])
        return f"{median} ({low} - {high})"


def spread(values: Sequence[float]) -> Spread:
    """Median and quartiles, the ends of the sample included: of two values they are a quarter and three quarters of the
    way between them."""
    if len(values) == 1:
        return Spread(values[0], values[0], values[0], 1)
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return Spread(middle, low, high, len(values))


@dataclass
class Clocked:
    """One contestant's rounds, in their order."""

    wall_s: list[float] = field(default_factory=list)
    cpu_s: list[float] = field(default_factory=list)
    """Processor time of the process."""

    def rates(self, amount: float) -> Spread:
        """Of something that a round gets through: `amount` per second of wall time."""
        return spread([amount / seconds for seconds in self.wall_s])

    def times_as_fast_as(self, other: Clocked) -> Spread:
        """How many times as fast as `other`, round by round."""
        return spread([theirs / own for own, theirs in zip(self.wall_s, other.wall_s, strict=True)])

    @property
    def processors(self) -> float:
        """Processors in use on average: below the number of threads, something else held them."""
        return sum(self.cpu_s) / sum(self.wall_s)


def order_of_round(names: Sequence[Name], number: int) -> list[Name]:
    """The names as round `number` (from 0) calls them."""
    turned = [*names[number % len(names) :], *names[: number % len(names)]]
    return turned[::-1] if number % 2 else turned


def run_rounds(
    contestants: Mapping[Name, Callable[[], object]],
    rounds: int,
    *,
    warm_up: int = 1,
    device: torch.device | None = None,
    report: Callable[[Name, float], None] = lambda name, seconds: None,
) -> dict[Name, Clocked]:
    """Run all contestants `warm_up` times without a clock and then `rounds` times with one.

    Args:
        device: waited for before a clock is read; None for work that the processor does.
        report: called after every run, of the warm-up too, with who ran and for how many seconds.
    """
    names, clocked = list(contestants), {name: Clocked() for name in contestants}
    for number in range(-warm_up, rounds):
        for name in order_of_round(names, number):
            wait_for(device)
            wall, cpu = time.perf_counter(), time.process_time()
            contestants[name]()
            wait_for(device)
            wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
            report(name, wall)
            if number >= 0:
                clocked[name].wall_s.append(wall)
                clocked[name].cpu_s.append(cpu)
    return clocked


def wait_for(device: torch.device | None) -> None:
    """Wait until a device that works in the background has done what it was given."""
    if device is not None and device.type != "cpu":
        torch.accelerator.synchronize(device)
