"""Memory rules: how a segment reads the compressive memory and how it is written to it.

A rule works on a whole window at once. The segments of a window are projected together; only the small state is
scanned over time. Every rule has the form

    M_t = (I + A_t) keep_t M_{t-1} + C_t

where A_t and C_t come from segment t alone (and, for `delta`, from the normaliser z, which is a prefix sum), and keep_t
is 0 where a document starts. Contributions of neighbouring segments compose, so a later context-parallel scan can use
the same pieces.

Everything here is a pure function of its arguments, in float32 (or float64 when the caller's tensors are), without any
`torch.distributed`: a tensor-parallel rank passes the heads it owns. `model.memory_reference` holds the same rules
written token by token; the tests compare the two.

Shapes: b lanes, t segments of a window, n key/value heads of this rank, s tokens of a segment, d head dimension,
r query heads per key/value head.

Sources: Infini-attention (arXiv 2404.07143, equations 3 to 9) for `linear` and `delta`; DeltaNet in WY form
(arXiv 2406.06484, section 3) for `deltanet`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

WRITE_BLOCK = 64
"""Tokens that `deltanet` solves for at once: the triangular systems stay [64, 64] however long a segment is."""


class NormalizedState(NamedTuple):
    """State of the rules with a normaliser: M `[b, n, d, d]` and z `[b, n, d]`."""

    M: Tensor
    z: Tensor


class MatrixState(NamedTuple):
    """State of the rules without one: M `[b, n, d, d]`."""

    M: Tensor


State = NormalizedState | MatrixState
"""What a rule carries. The first dim of every tensor is the lane, the second the key/value head: the trainer and the
checkpoint rely on this and on nothing else."""


def phi(x: Tensor) -> Tensor:
    """ELU + 1, written so that it stays positive: `elu(x) + 1` rounds to 0 in low precision for x < -6."""
    return torch.where(x > 0, x + 1, torch.exp(x.clamp(max=0)))


def affine_scan(initial: Tensor, transition: Tensor | None, write: Tensor, keep: Tensor) -> Tensor:
    """Run `X_t = (I + transition_t) keep_t X_{t-1} + write_t` over the second dim.

    Args:
        initial: `[b, n, d, ...]`, the state carried in.
        transition: `[b, t, n, d, d]`, or None for a plain sum.
        write: `[b, t, n, d, ...]`.
        keep: bool `[b, t]`, False where the state is cleared before segment t.

    Returns:
        `[b, t + 1, n, d, ...]`: entry t is the state that segment t reads (after its reset), the last one the state
        carried out.
    """
    states = []
    current = initial
    trailing = (1,) * (initial.dim() - 1)
    for t in range(write.shape[1]):
        # Not a product with 0: what is cleared may have overflowed.
        current = current.where(keep[:, t].view(-1, *trailing), 0)
        states.append(current)
        update = write[:, t]
        if transition is not None:
            update = update + transition[:, t] @ current
        current = current + update
    states.append(current)
    return torch.stack(states, dim=1)


def _divide(numerator: Tensor, denominator: Tensor, epsilon: float) -> Tensor:
    """`numerator / denominator`, and 0 where the denominator says that nothing is stored."""
    stored = denominator > epsilon
    return numerator * (stored.to(denominator.dtype) / denominator.clamp_min(epsilon))


class NormalizedRule:
    """`linear` and `delta`: associative memory with a normaliser (Infini-attention, equations 3 to 9)."""

    def __init__(self, delta: bool, epsilon: float) -> None:
        self.delta = delta
        self.epsilon = epsilon

    def init(self, lanes: int, heads: int, dim: int, *, dtype: torch.dtype, device: torch.device) -> NormalizedState:
        """An empty memory."""
        return NormalizedState(
            torch.zeros(lanes, heads, dim, dim, dtype=dtype, device=device),
            torch.zeros(lanes, heads, dim, dtype=dtype, device=device),
        )

    def scan(self, k: Tensor, v: Tensor, gate: Tensor | None, state: NormalizedState, keep: Tensor) -> NormalizedState:
        """Write a window.

        Args:
            k, v: keys (without position encoding) and values, `[b, t, n, s, d]`.
            gate: write gate `[b, t, n, s]`, or None to write every token.
            state: the memory carried in.
            keep: bool `[b, t]`, False where a document starts.

        Returns:
            The states at all segment borders, each tensor with a time dim of t + 1 behind the lane dim; entry t is
            what segment t reads, the last one the memory carried out.
        """
        key = phi(k)
        written = key if gate is None else key * gate.unsqueeze(-1)
        z = affine_scan(state.z, None, written.sum(dim=-2), keep)
        write = written.transpose(-1, -2) @ v
        transition = None
        if self.delta:
            # The value that the memory already returns for each key is taken off before writing.
            stored = key @ z[:, :-1].unsqueeze(-1)
            transition = -(written.transpose(-1, -2) @ _divide(key, stored, self.epsilon))
        return NormalizedState(affine_scan(state.M, transition, write, keep), z)

    def read(self, q: Tensor, state: NormalizedState) -> Tensor:
        """Read `[b, t, n, r*s, d]` for queries of the same shape from states `[b, t, n, ...]` (equation 3)."""
        query = phi(q)
        return _divide(query @ state.M, query @ state.z.unsqueeze(-1), self.epsilon)

    def present(self, state: NormalizedState) -> Tensor:
        """`[b, t, n]`: 1 where anything has been written, else 0 (z is a sum of positive numbers)."""
        return (state.z.detach().sum(dim=-1) > 0).to(state.z.dtype)


class DeltaNetRule:
    """`deltanet`: the delta rule token by token, keys and queries L2-normalised, no normaliser.

    Inside a block of `WRITE_BLOCK` tokens the sequence of rank-one updates M <- M + g k (v - k^T M)^T is one
    triangular solve (the WY form); blocks are scanned. The read sees the state before the segment.
    """

    def init(self, lanes: int, heads: int, dim: int, *, dtype: torch.dtype, device: torch.device) -> MatrixState:
        """An empty memory."""
        return MatrixState(torch.zeros(lanes, heads, dim, dim, dtype=dtype, device=device))

    def scan(self, k: Tensor, v: Tensor, gate: Tensor | None, state: MatrixState, keep: Tensor) -> MatrixState:
        """Write a window; arguments and result as in `NormalizedRule.scan`."""
        b, t, n, s, d = k.shape
        block = WRITE_BLOCK if s % WRITE_BLOCK == 0 else s
        blocks = s // block

        def split(x: Tensor) -> Tensor:  # [b, t, n, s, e] -> [b, t * blocks, n, block, e]
            return x.unflatten(3, (blocks, block)).transpose(2, 3).flatten(1, 2)

        key = torch.nn.functional.normalize(k, dim=-1)
        gated_key, gated_value = (key, v) if gate is None else (key * gate.unsqueeze(-1), v * gate.unsqueeze(-1))
        key, gated_key, gated_value = split(key), split(gated_key), split(gated_value)
        eye = torch.eye(block, dtype=k.dtype, device=k.device)
        lower = torch.tril(gated_key @ key.transpose(-1, -2), diagonal=-1) + eye
        solved = torch.linalg.solve_triangular(
            lower, torch.cat([gated_key, gated_value], dim=-1), upper=False, unitriangular=True
        )
        w, u = solved.split(d, dim=-1)
        transition = -(key.transpose(-1, -2) @ w)
        write = key.transpose(-1, -2) @ u
        if blocks > 1:  # only a segment's first block can start a document
            first = torch.arange(t * blocks, device=keep.device) % blocks == 0
            keep = torch.where(first, keep.repeat_interleave(blocks, dim=1), torch.ones_like(keep[:, :1]))
        states = affine_scan(state.M, transition, write, keep)
        return MatrixState(states[:, ::blocks])

    def read(self, q: Tensor, state: MatrixState) -> Tensor:
        """Read `[b, t, n, r*s, d]` for queries of the same shape from states `[b, t, n, ...]`."""
        return torch.nn.functional.normalize(q, dim=-1) @ state.M

    def present(self, state: MatrixState) -> Tensor:
        """`[b, t, n]`: 1 where anything has been written, else 0."""
        return (state.M.detach().abs().amax(dim=(-1, -2)) > 0).to(state.M.dtype)


Rule = NormalizedRule | DeltaNetRule


def build_rule(name: str, epsilon: float) -> Rule | None:
    """The rule called `name`; None for `none`, the plain transformer.

    Raises:
        ValueError: no such rule.
    """
    rules = {
        "none": lambda: None,
        "linear": lambda: NormalizedRule(delta=False, epsilon=epsilon),
        "delta": lambda: NormalizedRule(delta=True, epsilon=epsilon),
        "deltanet": DeltaNetRule,
    }
    if name not in rules:
        raise ValueError(f"memory.rule: no rule {name!r}; valid: {', '.join(rules)}")
    return rules[name]()


def remember(
    rule: Rule,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor | None,
    state: State,
    reset: Tensor,
    *,
    probes: Tensor | None = None,
    detach_reads: bool,
) -> tuple[Tensor, Tensor, State]:
    """Read and write the memory for a window.

    Args:
        rule: the memory rule.
        q: queries without position encoding, `[b, t + p, n*r, s, d]`; the r heads of a group are neighbours.
        k, v: keys without position encoding and values, `[b, t, n, s, d]`.
        gate: write gate `[b, t, n, s]` or None.
        state: memory carried in.
        reset: bool `[b, t]`, True where a document starts.
        probes: int64 `[b, p]` or None: the last p segments of q only read, each what segment `probes[b, j]` reads.
        detach_reads: read the memory without gradient (truncates backpropagation at every segment).

    Returns:
        The read `[b, t + p, n*r, s, d]`, whether the memory it came from held anything (1 or 0) `[b, t + p, n]`, and
        the memory carried out.
    """
    b = q.shape[0]
    states = rule.scan(k, v, gate, state, ~reset)
    before = type(states)(*(x[:, :-1].detach() if detach_reads else x[:, :-1] for x in states))
    if probes is not None:
        lane = torch.arange(b, device=probes.device).unsqueeze(1)
        before = type(states)(*(torch.cat([x, x[lane, probes]], dim=1) for x in before))
    after = type(states)(*(x[:, -1] for x in states))
    return read_states(rule, q, before), rule.present(before), after


def read_states(rule: Rule, q: Tensor, states: State) -> Tensor:
    """Read `[b, t, n*r, s, d]` for queries of the same shape; query head i reads its own group's memory.

    Args:
        states: `[b, t, n, ...]`, what each segment reads.
    """
    b, t, heads, s, d = q.shape
    n = states.M.shape[2]
    return rule.read(q.reshape(b, t, n, (heads // n) * s, d), states).reshape(b, t, heads, s, d)


class _HardGate(torch.autograd.Function):
    """clip((a + 2) / 4, 0, 1) with the logistic's slope in the backward pass, so that a closed gate can reopen."""

    @staticmethod
    def forward(ctx, a: Tensor) -> Tensor:
        ctx.save_for_backward(a)
        return ((a + 2) / 4).clamp(0, 1)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        (a,) = ctx.saved_tensors
        slope = torch.sigmoid(a)
        return grad * slope * (1 - slope)


def write_gate(kind: str, a: Tensor) -> Tensor:
    """The write gate in [0, 1] from its pre-activation; `hard` reaches both ends exactly."""
    return _HardGate.apply(a) if kind == "hard" else torch.sigmoid(a)
