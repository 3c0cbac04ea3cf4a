"""Layouts that ranks go back to: one set of process groups per layout instead of one per case.

`pipeline.parallel.topology.initialize` makes new groups at every call, for a process that calls it once. Gloo gives
each of them threads: a hundred cases would leave thousands per rank.
"""

from __future__ import annotations

from model.megatron import parallel_state
from pipeline.parallel.topology import Topology, initialize

_known: dict[tuple[int, int, int], tuple[Topology, dict[str, object]]] = {}


def join(*, tensor: int, pipeline: int, context: int = 1, timeout_s: float) -> Topology:
    """As `initialize`, with the groups of an earlier call for the same layout."""
    layout = (tensor, pipeline, context)
    if layout not in _known:
        topology = initialize(tensor=tensor, pipeline=pipeline, context=context, timeout_s=timeout_s)
        _known[layout] = topology, dict(_megatron_state())
    topology, state = _known[layout]
    vars(parallel_state).update(state)
    return topology


def _megatron_state() -> list[tuple[str, object]]:
    """Megatron keeps its groups in the module's variables, which are written in capitals."""
    return [(name, value) for name, value in vars(parallel_state).items() if name.startswith("_") and name.isupper()]
