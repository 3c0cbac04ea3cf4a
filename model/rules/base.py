"""What a memory rule is: the interface, and the pieces that the rules share.

A rule works on a whole window at once. The segments of a window are projected together; only the small state is
scanned over time. Every rule has the form

    M_t = T_t (0 where a document starts, else M_{t-1}) + C_t

where T_t and C_t come from segment t alone (and, for `delta`, from the normaliser z, which is a prefix sum): from its
last document alone where documents share it (`model.rules.borders`).
Pairs (C, T) of neighbouring segments compose (`model.rules.scan`).

A rule is a pure function of its arguments, in float32 (or float64 when the caller's tensors are). A tensor-parallel
rank passes the heads it owns. A context-parallel rank passes the segments it owns, and the scans exchange what crosses
(`model.rules.context`). `model.rules.reference` holds the same rules written token by token; the tests compare the
two.

Shapes: b lanes, t segments of a window, n key/value heads of this rank, r query heads per key/value head, s tokens of a
segment, d head dimension.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from model.config import LayerShape
from model.rules.borders import Borders
from model.rules.context import ContextPart
from model.rules.state import MatrixState, State, map_state


class RuleParameter(NamedTuple):
    """A parameter that a rule adds to every layer. Its first dim goes by key/value head: a tensor-parallel rank holds
    the rows of its heads."""

    shape: tuple[int, ...]
    """Of the whole layer."""
    initial: Callable[[torch.Generator], Tensor]
    """The whole parameter's initial value."""
    is_gate: bool
    """Learns like the write gate: without weight decay, at `optimizer.write_gate_lr_scale`."""
    tied: Callable[[torch.Generator], Tensor] | None = None
    """In place of `initial` where queries and keys start equal (`model.qk_init=tied`)."""


class Tokens(NamedTuple):
    """What the tokens of a window bring to the memory. Queries and keys are without position encoding; all three may be
    of a lower precision than the memory's."""

    q: Tensor
    """`[b, t + p, n, r, s, d]`: behind the t segments that are written, p that only read."""
    k: Tensor
    """`[b, t, n, s, d]`."""
    v: Tensor
    """`[b, t, n, s, d]`."""
    gate: Tensor | None
    """Write gate `[b, t, n, s]`, or None to write every token."""
    inputs: Mapping[str, Tensor]
    """The rule's `token_inputs`, each `[b, t, n, s, its number of numbers]`."""
    bfloat16: bool = False
    """The run computes matrix products in bfloat16: a kernel may, too."""
    part: ContextPart | None = None
    """Where these tokens are this rank's part of a chunk; None where they are all of it."""


class Reads(NamedTuple):
    """What the queries of a window read."""

    probes: Tensor | None
    """int64 `[b, p]` or None: the last p segments of queries read what segment `probes[b, j]` reads."""
    detach: bool
    """Without gradient (truncates backpropagation at every segment)."""

    def chosen(self, before: Tensor) -> Tensor:
        """A tensor of what segments read `[b, t, ...]` with that of the probes behind, `[b, t + p, ...]`."""
        if self.probes is None:
            return before
        lane = torch.arange(self.probes.shape[0], device=before.device).unsqueeze(1)
        return torch.cat([before, before[lane, self.probes]], dim=1)

    def states(self, before: State) -> State:
        """The states that are read, of those before every segment."""
        return map_state(before, lambda x: self.chosen(x.detach() if self.detach else x))


class MemoryRule:
    """Base of the rules. A rule has no tensors of its own: its parameters are made by the layer and handed in."""

    composes: ClassVar[bool] = True
    """A part of a chunk can be summed up in one pair (`model.rules.scan`), so that ranks may share a chunk."""

    has_feature_map: ClassVar[bool] = False
    """Queries and keys pass a nonlinear map of the rule's own."""

    @property
    def keeps_value(self) -> bool:
        """The backward pass needs the values as they came, in the memory's precision."""
        return False

    def token_inputs(self, layer: LayerShape) -> dict[str, int]:
        """What the rule wants to know of every token, by name: how many numbers per key/value head, all linear
        functions of the layer's normalised input. `parameters` has the `<name>.weight [groups * numbers, hidden]` and,
        where there is a bias, the `<name>.bias [groups * numbers]`."""
        return {}

    def parameters(self, layer: LayerShape) -> dict[str, RuleParameter]:
        """What the rule adds to a layer, by name."""
        return {}

    def empty(self, lanes: int, layer: LayerShape, *, dtype: torch.dtype, device: torch.device) -> State:
        """An empty memory for the heads of `layer`."""
        return MatrixState(torch.zeros(lanes, layer.groups, layer.dim, layer.dim, dtype=dtype, device=device))

    def features(
        self,
        q: Tensor,
        k: Tensor | None,
        dtype: torch.dtype,
        blind: Tensor | None = None,
        unwritten: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Queries and keys as the rule reads and writes with them, in the memory's `dtype`: 0 for tokens that read
        nothing or are not written. A zero query has to read 0, and a zero key to write nothing and take nothing off.

        Args:
            q, k: as in `Tokens`; k may be None.
            blind, unwritten: as in `Borders`.
        """
        raise NotImplementedError

    def write(
        self, tokens: Tokens, weights: Mapping[str, Tensor], state: State, borders: Borders
    ) -> tuple[State, State]:
        """`scan` for a key that is a feature already."""
        raise NotImplementedError

    def look(self, query: Tensor, state: State) -> Tensor:
        """`read` for queries that are features already."""
        raise NotImplementedError

    def scan(
        self, tokens: Tokens, weights: Mapping[str, Tensor], state: State, borders: Borders
    ) -> tuple[State, State]:
        """Write a window.

        Args:
            tokens: of the window.
            weights: the rule's parameters except those of `token_inputs`, this rank's part.
            state: the memory carried in.
            borders: where documents start.

        Returns:
            What every segment reads, each tensor with a time dim of t behind the lane dim, and the memory carried out.
        """
        k, _ = self.features(tokens.k.unsqueeze(3), None, state.M.dtype, borders.unwritten)
        return self.write(tokens._replace(k=k.squeeze(3)), weights, state, borders)

    def read(self, q: Tensor, weights: Mapping[str, Tensor], state: State) -> Tensor:
        """Read `[b, t, n, r, s, d]` for queries of the same shape from states `[b, t, n, ...]`."""
        query, _ = self.features(q, None, state.M.dtype)
        return self.look(query, state)

    def scan_and_read(
        self, tokens: Tokens, weights: Mapping[str, Tensor], state: State, borders: Borders, reads: Reads
    ) -> tuple[Tensor, Tensor, State]:
        """`scan` and `read` of a window, with queries and keys mapped together.

        Returns:
            The read `[b, t + p, n, r, s, d]`, `present` of what it was read from `[b, t + p, n, s]`, or 1 for s, and
            the memory carried out.
        """
        query, key = self.features(tokens.q, tokens.k, state.M.dtype, borders.blind, borders.unwritten)
        before, after = self.write(tokens._replace(k=key), weights, state, borders)
        before = reads.states(before)
        present = self.present(before).unsqueeze(-1)
        if borders.blind is not None:
            present = present * ~borders.blind.unsqueeze(2)
        return self.look(query, before), present, after

    def inside(self, state: State, q: Tensor, start: Tensor) -> State:
        """The state as tokens in the middle of a segment read it: M is that of the segment's start, but what is carried
        from token to token is not.

        Args:
            state: at the segment's start, tensors `[b, n, ...]`.
            q: the segment's queries so far, `[b, n, r, S, d]`, in the run's precision.
            start: int64 `[b]`, the position of the token that reads.
        """
        return state

    def present(self, state: State) -> Tensor:
        """`[b, t, n]`: 1 where anything has been written, else 0."""
        return state.M.detach().flatten(-2).any(dim=-1).to(state.M.dtype)

    def flops_per_token(self, layer: LayerShape) -> int:
        """FLOPs of a forward pass in one layer, by the conventions of `pipeline.accounting.flops`."""
        raise NotImplementedError

    def exchanges(self, layer: LayerShape) -> list[int]:
        """Numbers per lane that a context-parallel rank tells the others for one layer, by exchange, each way: the pair
        of its segments (`model.rules.context`)."""
        return [2 * layer.groups * layer.dim**2]

    def halo(self, layer: LayerShape) -> int:
        """Numbers per lane that a context-parallel rank sends to the next one and no exchange has, each way."""
        return 0

    def saved_bytes(self, layer: LayerShape, length: int, m: int, c: int, *, gated: bool) -> tuple[int, int]:
        """What autograd keeps in one layer of a rank, see `pipeline.accounting.footprint`.

        Args:
            layer: the rank's part of the layer.
            length: tokens of a segment.
            m: bytes of a number of the memory.
            c: m where q, k and v are of another precision than the memory, else 0.
            gated: there is a write gate.

        Returns:
            Bytes per token, and bytes per segment.
        """
        raise NotImplementedError
