"""Memory rules of Infini-attention and their kin: what a segment leaves behind, and what queries find in it.

b rows, n key/value heads, r query heads per key/value head, m tokens of a piece, s tokens of a segment, d head
dimension. A memory is a tuple of tensors that begin with `[b, n]`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Memory = tuple[Tensor, ...]

WRITE_BLOCK = 64
"""Tokens that the token-by-token delta rule solves for at once."""
CHANNEL_BLOCK = 16
"""The same with decays per channel, whose ratios are `[tokens, tokens, d]`."""
RANK = 16
"""Features per head that gates per channel are made of, at most."""


def phi(x: Tensor) -> Tensor:
    """ELU + 1 in a form that stays positive."""
    return torch.where(x > 0, x + 1, torch.exp(x.clamp(max=0)))


def divide(numerator: Tensor, denominator: Tensor, epsilon: float) -> Tensor:
    """`numerator / denominator`, and 0 where the denominator says that nothing is stored."""
    stored = denominator > epsilon
    return numerator * (stored.to(denominator.dtype) / denominator.clamp_min(epsilon))


class Rule:
    """What every rule has. `weights` are the rule's own parameters by name."""

    unbiased: tuple[str, ...] = ()
    """The linear layers of `inputs` that have no biases."""

    def inputs(self, dim: int) -> dict[str, int]:
        """How many numbers per token and head come from the layer's input by a linear layer of this name."""
        return {}

    def parameters(self, heads: int, groups: int, dim: int) -> dict[str, Tensor]:
        """The rule's own parameters with their initial values, but for the linear layers in `inputs`."""
        return {}

    def init(self, like: Tensor, ratio: int) -> Memory:
        """An empty memory for keys `like [b, n, s, d]` and `ratio` query heads per key/value head."""
        b, n, _, d = like.shape
        return (like.new_zeros(b, n, d, d),)

    def read(self, query: Tensor, weights: dict[str, Tensor], memory: Memory) -> Tensor:
        """Read `[b, n, r, m, d]` for queries of that shape, from the memory before their segment."""
        raise NotImplementedError

    def advance(self, query: Tensor, count: Tensor, memory: Memory) -> Memory:
        """The memory after `count [b]` of a piece's queries `[b, n, r, m, d]`, for reads later in the segment."""
        return memory

    def write(
        self,
        key: Tensor,
        value: Tensor,
        gate: Tensor | None,
        inputs: dict[str, Tensor],
        weights: dict[str, Tensor],
        memory: Memory,
    ) -> Memory:
        """The memory after a whole segment: key, value `[b, n, s, d]`, gate `[b, n, s]`, every input
        `[b, n, s, its numbers]`."""
        raise NotImplementedError

    def present(self, memory: Memory) -> Tensor:
        """`[b, n]`: 1 where anything has been written, else 0."""
        return (memory[0].detach().abs().amax(dim=(-1, -2)) > 0).to(memory[0].dtype)


class NormalizedRule(Rule):
    """`linear` and `delta`: M `[b, n, d, d]` with a normaliser z `[b, n, d]`."""

    def __init__(self, delta: bool, epsilon: float):
        self.delta, self.epsilon = delta, epsilon

    def init(self, like: Tensor, ratio: int) -> Memory:
        return *super().init(like, ratio), torch.zeros_like(like[:, :, 0])

    def read(self, query: Tensor, weights: dict[str, Tensor], memory: Memory) -> Tensor:
        matrix, z = (x.unsqueeze(2) for x in memory)
        query = phi(query)
        return divide(query @ matrix, query @ z.unsqueeze(-1), self.epsilon)

    def write(self, key, value, gate, inputs, weights, memory) -> Memory:
        matrix, z = memory
        key = phi(key)
        if self.delta:
            value = value - divide(key @ matrix, key @ z.unsqueeze(-1), self.epsilon)
        written = key if gate is None else key * gate.unsqueeze(-1)
        return matrix + written.transpose(-1, -2) @ value, z + written.sum(dim=-2)

    def present(self, memory: Memory) -> Tensor:
        return (memory[1].detach().sum(dim=-1) > 0).to(memory[1].dtype)


def write_token_by_token(
    key: Tensor, value: Tensor, gate: Tensor | None, log_decay: Tensor | None, matrix: Tensor
) -> Tensor:
    """`M <- a (M - g k (k^T M)) + g k v^T` over the tokens of a segment, a = exp(log_decay) (None: 1).

    With c_i the sum of log a up to token i of a block, the block's updates u solve
    `(I + L) u = g v - g e^{c} k M` with `L_ij = g_i e^{c_i - c_j} k_i k_j` for j < i.
    """
    one = torch.ones_like(key[..., 0])
    gate = one if gate is None else gate
    log_decay = torch.zeros_like(one) if log_decay is None else log_decay
    blocks = (x.split(WRITE_BLOCK, dim=2) for x in (key, value, gate.unsqueeze(-1), log_decay))
    for k, v, g, log_a in zip(*blocks, strict=True):
        total = log_a.cumsum(dim=-1)
        earlier = torch.ones(k.shape[2], k.shape[2], dtype=torch.bool, device=k.device).tril(-1)
        ratio = (total.unsqueeze(-1) - total.unsqueeze(-2)).masked_fill(~earlier, -torch.inf).exp()
        lower = g * (k @ k.transpose(-1, -2)) * ratio + torch.eye(k.shape[2], dtype=k.dtype, device=k.device)
        change = g * (v - total.exp().unsqueeze(-1) * (k @ matrix))
        update = torch.linalg.solve_triangular(lower, change, upper=False, unitriangular=True)
        left = (total[..., -1:] - total).exp().unsqueeze(-1)
        matrix = total[..., -1, None, None].exp() * matrix + (k * left).transpose(-1, -2) @ update
    return matrix


class DeltaNetRule(Rule):
    """`deltanet`: the delta rule token by token, keys and queries L2-normalised; M alone."""

    def read(self, query: Tensor, weights: dict[str, Tensor], memory: Memory) -> Tensor:
        return F.normalize(query, dim=-1) @ memory[0].unsqueeze(2)

    def write(self, key, value, gate, inputs, weights, memory) -> Memory:
        return (write_token_by_token(F.normalize(key, dim=-1), value, gate, None, memory[0]),)


class GatedDeltaNetRule(DeltaNetRule):
    """`gated_deltanet`: the same with a decay."""

    def inputs(self, dim: int) -> dict[str, int]:
        return {"decay": 1}

    def parameters(self, heads: int, groups: int, dim: int) -> dict[str, Tensor]:
        return {"decay_rate": torch.zeros(groups)}

    def write(self, key, value, gate, inputs, weights, memory) -> Memory:
        log_decay = -weights["decay_rate"].exp().unsqueeze(-1) * F.softplus(inputs["decay"].squeeze(-1))
        return (write_token_by_token(F.normalize(key, dim=-1), value, gate, log_decay, memory[0]),)


class DeltaProductRule(GatedDeltaNetRule):
    """`delta_product`: several steps of the delta rule per token, the token's own key and value being the last one's;
    the first one decays."""

    unbiased = ("step_key", "step_value")

    def __init__(self, steps: int):
        self.before = steps - 1

    def inputs(self, dim: int) -> dict[str, int]:
        widths = {"step_key": self.before * dim, "step_value": self.before * dim, "step_gate": self.before}
        return super().inputs(dim) | (widths if self.before else {})

    def write(self, key, value, gate, inputs, weights, memory) -> Memory:
        if not self.before:
            return super().write(key, value, gate, inputs, weights, memory)
        own = torch.ones_like(key[..., :1]) if gate is None else gate.unsqueeze(-1)
        keys, values = (inputs[name].unflatten(-1, (self.before, -1)) for name in self.unbiased)
        key, value = (torch.cat([x, y.unsqueeze(3)], dim=3).flatten(2, 3) for x, y in ((keys, key), (values, value)))
        gate = torch.cat([own * torch.sigmoid(inputs["step_gate"]), own], dim=-1).flatten(2)
        log_decay = -weights["decay_rate"].exp().view(-1, 1, 1) * F.softplus(inputs["decay"])
        log_decay = F.pad(log_decay, (0, self.before)).flatten(2)
        return (write_token_by_token(F.normalize(key, dim=-1), value, gate, log_decay, memory[0]),)


def write_channels(
    key: Tensor, erase_key: Tensor, value: Tensor, gate: Tensor | None, log_decay: Tensor, matrix: Tensor
) -> Tensor:
    """`M <- (I - g k h^T) Diag(a) M + g k v^T` over the tokens of a segment, h the erase key, log a `[b, n, s, d]`.

    As `write_token_by_token`, with `L_ij = g_i` times the sum over channels of `h_i e^{c_i - c_j} k_j`.
    """
    gate = torch.ones_like(key[..., 0]) if gate is None else gate
    blocks = (x.split(CHANNEL_BLOCK, dim=2) for x in (key, erase_key, value, gate.unsqueeze(-1), log_decay))
    for k, h, v, g, log_a in zip(*blocks, strict=True):
        total = log_a.cumsum(dim=-2)
        earlier = torch.ones(k.shape[2], k.shape[2], dtype=torch.bool, device=k.device).tril(-1)
        ratio = (total.unsqueeze(-2) - total.unsqueeze(-3)).masked_fill(~earlier.unsqueeze(-1), -torch.inf).exp()
        products = (h.unsqueeze(-2) * k.unsqueeze(-3) * ratio).sum(dim=-1)
        lower = g * products + torch.eye(k.shape[2], dtype=k.dtype, device=k.device)
        change = g * (v - (h * total.exp()) @ matrix)
        update = torch.linalg.solve_triangular(lower, change, upper=False, unitriangular=True)
        last = total[..., -1:, :]
        matrix = last.exp().transpose(-1, -2) * matrix + (k * (last - total).exp()).transpose(-1, -2) @ update
    return matrix


class GatedDeltaNet2Rule(DeltaNetRule):
    """`kda`: a decay per channel; `gdn2`: erase and write gates per channel as well. Each channel's number comes from a
    few features of its head."""

    def __init__(self, gates: tuple[str, ...]):
        self.gates = self.unbiased = gates

    def inputs(self, dim: int) -> dict[str, int]:
        return dict.fromkeys(self.gates, min(RANK, dim))

    def parameters(self, heads: int, groups: int, dim: int) -> dict[str, Tensor]:
        found = {"decay_rate": torch.zeros(groups)}
        for name, rank in self.inputs(dim).items():
            # Decays of about 1e-4 per token, and gates that are open.
            bias = -9.0 if name == "decay" else 2.0
            found |= {f"{name}_up": torch.zeros(groups * dim, rank), f"{name}_bias": torch.full((groups * dim,), bias)}
        return found

    def write(self, key, value, gate, inputs, weights, memory) -> Memory:
        groups, key = key.shape[1], F.normalize(key, dim=-1)
        logits = {}
        for name in self.gates:
            up, bias = (weights[f"{name}_{part}"].unflatten(0, (groups, -1)) for part in ("up", "bias"))
            logits[name] = inputs[name] @ up.transpose(-1, -2) + bias.unsqueeze(-2)
        log_decay = -weights["decay_rate"].exp().view(-1, 1, 1) * F.softplus(logits.pop("decay"))
        opened = {name: torch.sigmoid(x) for name, x in logits.items()}
        erase_key, value = key * opened.get("erase", 1.0), value * opened.get("write", 1.0)
        return (write_channels(key, erase_key, value, gate, log_decay, memory[0]),)


class ConvolvedRule(Rule):
    """Any rule behind short convolutions over `width` tokens that run through segment borders, with SiLU where the rule
    has no phi.

    Behind the rule's own memory the last tokens before the convolution, `[b, n, r + 2, width - 1, d]`: queries up to
    the last piece, key and value up to the last segment.
    """

    def __init__(self, rule: Rule, width: int):
        self.rule, self.width, self.unbiased = rule, width, rule.unbiased
        self.activation = nn.Identity() if isinstance(rule, NormalizedRule) else F.silu

    def inputs(self, dim: int) -> dict[str, int]:
        return self.rule.inputs(dim)

    def parameters(self, heads: int, groups: int, dim: int) -> dict[str, Tensor]:
        taps = torch.randn((heads + 2 * groups) * dim, self.width) * (3 * self.width) ** -0.5
        return {**self.rule.parameters(heads, groups, dim), "convolution": taps}

    def init(self, like: Tensor, ratio: int) -> Memory:
        b, n, _, d = like.shape
        return *self.rule.init(like, ratio), like.new_zeros(b, n, ratio + 2, self.width - 1, d)

    def read(self, query: Tensor, weights: dict[str, Tensor], memory: Memory) -> Tensor:
        *inner, tail = memory
        query = self._convolve(tail[:, :, :-2], query, self._taps(weights, tail)[:, :-2])
        return self.rule.read(query, weights, tuple(inner))

    def advance(self, query: Tensor, count: Tensor, memory: Memory) -> Memory:
        *inner, tail = memory
        behind = torch.cat([tail[:, :, :-2], query], dim=3)
        last = count[:, None] + torch.arange(self.width - 1, device=count.device)
        tail = torch.cat([behind.take_along_dim(last[:, None, None, :, None], dim=3), tail[:, :, -2:]], dim=2)
        return *self.rule.advance(query, count, tuple(inner)), tail

    def write(self, key, value, gate, inputs, weights, memory) -> Memory:
        *inner, tail = memory
        taps, raw = self._taps(weights, tail), torch.stack([key, value], dim=2)
        key, value = self._convolve(tail[:, :, -2:], raw, taps[:, -2:]).unbind(dim=2)
        raw = torch.cat([tail[:, :, -2:], raw], dim=3)[:, :, :, -(self.width - 1) :]
        written = self.rule.write(key, value, gate, inputs, weights, tuple(inner))
        return *written, torch.cat([tail[:, :, :-2], raw], dim=2)

    def present(self, memory: Memory) -> Tensor:
        return self.rule.present(memory[:-1])

    def _taps(self, weights: dict[str, Tensor], tail: Tensor) -> Tensor:
        """`[n, r + 2, d, width]`: per key/value head its query heads, its key, its value."""
        return weights["convolution"].view(-1, tail.shape[2], tail.shape[-1], self.width)

    def _convolve(self, tail: Tensor, x: Tensor, taps: Tensor) -> Tensor:
        """The causal convolution of `[..., m, d]` behind its tail, activated."""
        behind, length = torch.cat([tail, x], dim=-2), x.shape[-2]
        return self.activation(sum(behind[..., i : i + length, :] * taps[..., None, :, i] for i in range(self.width)))


RULES = {
    "linear": lambda config: NormalizedRule(False, config.memory_epsilon),
    "delta": lambda config: NormalizedRule(True, config.memory_epsilon),
    "deltanet": lambda config: DeltaNetRule(),
    "gated_deltanet": lambda config: GatedDeltaNetRule(),
    "delta_product": lambda config: DeltaProductRule(config.memory_num_householder),
    "kda": lambda config: GatedDeltaNet2Rule(("decay",)),
    "gdn2": lambda config: GatedDeltaNet2Rule(("decay", "erase", "write")),
}
CONVOLVED_BY_DEFAULT = ("gated_deltanet", "delta_product", "kda", "gdn2")


def build_rule(config) -> Rule:
    """The rule that `config.json` describes; without a word about convolutions those have them that have them in their
    papers."""
    rule, convolved = RULES[config.memory_rule](config), config.memory_short_convolution
    convolved = config.memory_rule in CONVOLVED_BY_DEFAULT if convolved is None else convolved
    return ConvolvedRule(rule, config.memory_convolution_width) if convolved else rule


MIX_GATES = ("head", "token")

LOCAL_CONTEXTS = ("segment", "sliding")

WRITE_GATES = {
    "none": None,
    "hard": lambda a: ((a + 2) / 4).clamp(0, 1),
    "sigmoid": torch.sigmoid,
}
