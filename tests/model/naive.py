"""A decoder with Infini-attention written out densely, lane by lane and head by head: `model.decoder` must equal it."""

from dataclasses import replace

import torch
from torch import Tensor

from model.config import MemoryConfig, ModelConfig
from model.rules import has_convolution
from model.rules.reference import (
    window_convolution,
    window_delta_product,
    window_deltanet,
    window_gdn2,
    window_normalized,
)


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    return x / (x.square().mean(dim=-1, keepdim=True) + epsilon).sqrt() * weight


def rotary(x: Tensor, base: float) -> Tensor:
    """Turn pair (i, i + d/2) of the vector at position p of `[s, d]` by p * base^(-2i/d), as complex numbers."""
    s, d = x.shape
    pairs = torch.complex(x[:, : d // 2], x[:, d // 2 :])
    rate = base ** (-2 * torch.arange(d // 2, dtype=torch.float64) / d)
    turned = pairs * torch.exp(1j * torch.arange(s, dtype=torch.float64)[:, None] * rate)
    return torch.cat([turned.real, turned.imag], dim=-1)


def local_attention(q: Tensor, k: Tensor, v: Tensor, base: float) -> Tensor:
    """Causal softmax attention of one head, `[s, d]`, to `[s, d]` or, with the segment before, `[2s, d]`."""
    before = len(k) - len(q)  # positions begin with the first key
    turned = rotary(torch.cat([q.new_zeros(before, q.shape[1]), q]), base)[before:]
    scores = turned @ rotary(k, base).T / q.shape[-1] ** 0.5
    future = torch.ones_like(scores).triu(1 + before).bool()
    return scores.masked_fill(future, -torch.inf).softmax(dim=-1) @ v


def write_gate(kind: str, a: Tensor) -> Tensor:
    smooth = torch.sigmoid(a)
    if kind == "sigmoid":
        return smooth
    return ((a.detach() + 2) / 4).clip(0, 1) + smooth - smooth.detach()


def memory_share(config: ModelConfig, p: dict[str, Tensor], x: Tensor, head: int) -> Tensor:
    """The memory's part of the output of one query head, for tokens `[s, h]`: `[s, 1]`."""
    beta = (
        x @ p["mix_gate.weight"][head] + p["mix_gate.bias"][head]
        if config.memory.mix_gate == "token"
        else p["beta"][head]
    )
    floor = config.memory.gate_floor
    return (floor + (1 - floor) / (1 + (-beta).exp())).expand(len(x)).unsqueeze(-1)


CHANNEL_GATES = {"kda": ("decay",), "gdn2": ("decay", "erase", "write")}
"""Rules with gates per channel."""


def channel_numbers(p: dict[str, Tensor], x: Tensor, gate: str, group: int, groups: int) -> Tensor:
    """What a gate per channel of one key/value head is made of, for tokens `[s, h]`: `[s, d]`."""
    down, up, bias = (
        p[f"memory_{gate}{part}"].unflatten(0, (groups, -1))[group] for part in (".weight", "_up", "_bias")
    )
    return x @ down.T @ up.T + bias


def other_steps(memory: MemoryConfig, p: dict[str, Tensor], x: Tensor, group: int, groups: int) -> list[Tensor]:
    """Of tokens `[t, s, h]` keys and values of one key/value head's steps before their own, `[t, s, n - 1, d]`, and
    their gates `[t, s, n - 1]`."""
    before = memory.num_householder - 1
    key, value, gate = (
        x @ p[f"memory_step_{name}.weight"].unflatten(0, (groups, -1))[group].T for name in ("key", "value", "gate")
    )
    gate = gate + p["memory_step_gate.bias"].unflatten(0, (groups, -1))[group]
    return [key.unflatten(-1, (before, -1)), value.unflatten(-1, (before, -1)), 1 / (1 + (-gate).exp())]


def attention(config: ModelConfig, p: dict[str, Tensor], x: Tensor, memory, reset: Tensor):
    """One lane: `x [t, s, h]`, memory `(M, z)` or `(M,)`, `[n, d, d]` and `[n, d]`, reset `[t]`.

    Returns the output and the new memory.
    """
    t, s, _ = x.shape
    heads, groups = config.num_attention_heads, config.num_query_groups or config.num_attention_heads
    ratio, d = heads // groups, config.kv_channels or config.hidden_size // heads
    rule = config.memory.rule
    rows = p["qkv.weight"].view(groups, ratio + 2, d, -1)  # per key/value head: its query heads, its key, its value
    bias = p["qkv.bias"].view(groups, ratio + 2, d) if config.qkv_bias else x.new_zeros(groups, ratio + 2, d)
    outputs: list[list[Tensor]] = [[None] * heads for _ in range(t)]
    after = []
    for group in range(groups):
        q = torch.stack([x @ rows[group, i].T + bias[group, i] for i in range(ratio)], dim=1)  # [t, r, s, d]
        k, v = x @ rows[group, ratio].T + bias[group, ratio], x @ rows[group, ratio + 1].T + bias[group, ratio + 1]
        if config.qk_norm:
            q = rms_norm(q, p["query_norm.weight"], config.norm_epsilon)
            k = rms_norm(k, p["key_norm.weight"], config.norm_epsilon)
        gate = torch.ones(t, s, dtype=x.dtype)
        if config.memory.write_gate != "none":
            activation = x @ p["write_gate.weight"][group] + p["write_gate.bias"][group]
            gate = write_gate(config.memory.write_gate, activation)
        state = [m[group] for m in memory] if memory else []
        context = None
        if config.local_context == "sliding":
            *state, k_before, v_before, seen = state
            context = (k_before, v_before) if seen[0] > 0 else None
        reads, shown = [], []
        for i in range(t):  # segment by segment, to see which memory each of them finds
            if rule == "none":
                break
            empty = bool(reset[i]) or not bool(state[0].any())
            shown.append(not empty)
            starts = [bool(reset[i])]
            qkv, convolution = (q[i : i + 1], k[i : i + 1], v[i : i + 1]), ()
            if has_convolution(config.memory):
                taps = p["memory_convolution"].view(groups, ratio + 2, d, -1)[group]
                found = window_convolution(*qkv, taps, state.pop(), starts, silu=rule not in ("linear", "delta"))
                qkv, convolution = found[:3], found[3:]
            arguments = (*qkv, gate[i : i + 1])
            if rule == "deltanet":
                read, *state = window_deltanet(*arguments, *state, starts)
            elif rule in ("gated_deltanet", "delta_product"):
                x_decay = x[i : i + 1] @ p["memory_decay.weight"][group] + p["memory_decay.bias"][group]
                log_decay = -p["memory_decay_rate"][group].exp() * (1 + x_decay.exp()).log()
                if rule == "gated_deltanet":
                    read, *state = window_deltanet(*arguments, *state, starts, log_decay)
                else:
                    steps = other_steps(config.memory, p, x[i : i + 1], group, groups)
                    read, *state = window_delta_product(*arguments, *state, starts, log_decay, *steps)
            elif rule in CHANNEL_GATES:
                made = [channel_numbers(p, x[i], gate, group, groups) for gate in CHANNEL_GATES[rule]]
                log_decay = -p["memory_decay_rate"][group].exp() * (1 + made[0].exp()).log()
                opened = [1 / (1 + (-a).exp()) for a in made[1:]]
                of_channels = [a.unsqueeze(0) for a in (log_decay, *opened)]
                read, *state = window_gdn2(*arguments, *state, starts, *of_channels)
            else:
                normalized = {"delta": rule == "delta", "epsilon": config.memory.epsilon}
                read, *state = window_normalized(*arguments, *state, starts, **normalized)
            state += convolution
            reads.append(read[0])
        before = [None] * t  # what the local attention sees before its segment
        if config.local_context == "sliding":
            state += [k[-1], v[-1], torch.ones(1, dtype=x.dtype)]
            before = [None if reset[i] else context if i == 0 else (k[i - 1], v[i - 1]) for i in range(t)]
        after.append(state)
        for i in range(t):
            for r in range(ratio):
                head = group * ratio + r
                visible = (
                    (k[i], v[i]) if before[i] is None else map(torch.cat, zip(before[i], (k[i], v[i]), strict=True))
                )
                outputs[i][head] = local_attention(q[i, r], *visible, config.rope_base)
                if rule != "none" and (shown[i] or not config.memory.skip_empty):
                    share = memory_share(config, p, x[i], head)
                    outputs[i][head] = share * reads[i][r] + (1 - share) * outputs[i][head]
    mixed = torch.stack([torch.cat(row, dim=-1) for row in outputs])
    memory = [torch.stack(m) for m in zip(*after, strict=True)]
    return mixed @ p["projection.weight"].T, memory


def layer(config: ModelConfig, p: dict[str, Tensor], x: Tensor, memory, reset: Tensor):
    """One lane through one layer, `x [t, s, h]`."""
    of_attention = {name.removeprefix("attention."): w for name, w in p.items() if name.startswith("attention.")}
    normed = rms_norm(x, p["attention_norm.weight"], config.norm_epsilon)
    attended, memory = attention(config, of_attention, normed, memory, reset)
    x = x + attended
    gate, up = (rms_norm(x, p["mlp_norm.weight"], config.norm_epsilon) @ p["mlp.linear_fc1.weight"].T).chunk(2, dim=-1)
    return x + (gate / (1 + (-gate).exp()) * up) @ p["mlp.linear_fc2.weight"].T, memory


def token_losses(config: ModelConfig, p: dict[str, Tensor], tokens: Tensor, memory, reset: Tensor, labels: Tensor):
    """One lane through the whole model: cross entropy `[t, s]` and the memory of every layer."""
    x = p["embedding.weight"][tokens]
    after = []
    chosen, plain = config.memory.layers, replace(config, memory=MemoryConfig(rule="none"))
    for i in range(config.num_layers):
        own = {n.removeprefix(f"layers.{i}."): w for n, w in p.items() if n.startswith(f"layers.{i}.")}
        x, state = layer(config if chosen is None or i in chosen else plain, own, x, memory[i], reset)
        after.append(state)
    output = p["embedding.weight" if config.tie_embeddings else "output.weight"][: config.vocab_size]
    logits = rms_norm(x, p["final_norm.weight"], config.norm_epsilon) @ output.T
    chosen = logits.gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    return logits.logsumexp(dim=-1) - chosen, after
