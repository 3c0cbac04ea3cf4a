"""The memory rules against the same rules written token by token, in float64: outputs, states and every gradient."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.config import LayerShape, MemoryConfig
from model.rules import RULES as TABLE
from model.rules import NormalizedState, Tokens, delta_blocks
from model.rules import build_rule as rule_of
from model.rules.borders import Borders
from model.rules.feature_maps import phi
from model.rules.reference import (
    window_convolution,
    window_delta_product,
    window_deltanet,
    window_gdn2,
    window_normalized,
)
from model.rules.state import MatrixState, extended_state
from model.rules.window import remember, write_gate

PLAIN_RULES = tuple(name for name in TABLE if name != "none")
RULES = PLAIN_RULES + tuple(f"{name}+convolution" for name in PLAIN_RULES)
GATES = ("none", "hard", "sigmoid")
EPSILON = 1e-6
CHANNEL_GATES = {"kda": ("decay",), "gdn2": ("decay", "erase", "write")}
"""Of the rules with gates per channel."""
STEPS = ("step_key", "step_value", "step_gate")
"""What `delta_product` asks of a token for its other steps."""
HOUSEHOLDERS = 3
"""Steps per token of `delta_product`: more than one beside the token's own."""
TOKENS = {"q", "k", "v", "a", "x", *STEPS, *(f"x_{gate}" for gate in CHANNEL_GATES["gdn2"])}
"""Names of the leaves that have a segment dim."""
PARAMETERS = {"taps", "rate", *(f"{part}_{gate}" for gate in CHANNEL_GATES["gdn2"] for part in ("up", "bias"))}
"""Names of the leaves that belong to the rule."""
STATES = {name: NormalizedState if name in ("linear", "delta") else MatrixState for name in PLAIN_RULES}
DECAYING = ("gated_deltanet", "delta_product", *CHANNEL_GATES)
ONE_DECAY = ("gated_deltanet", "delta_product")
RANK = 2
"""Features per head and gate of the rules with gates per channel: fewer than the model has, nothing else knows."""


def is_convolved(rule_name):
    return rule_name.endswith("+convolution")


def plain(rule_name):
    return rule_name.removesuffix("+convolution")


def state_type(rule_name):
    """Its fields are the names of the leaves that a rule's state is made of."""
    kind = STATES[plain(rule_name)]
    return extended_state(kind, ("tail",)) if is_convolved(rule_name) else kind


def memory_config(name, **changes):
    settings = {"rule": plain(name), "short_convolution": is_convolved(name), "num_householder": HOUSEHOLDERS}
    return MemoryConfig(**settings | {"epsilon": EPSILON} | changes)


def build_rule(name, **changes):
    return rule_of(memory_config(name, **changes))


def reference_gate(kind: str, a: torch.Tensor) -> torch.Tensor:
    """The write gate; the hard one as a clipped line that borrows the logistic's gradient."""
    smooth = torch.sigmoid(a)
    if kind == "none":
        return torch.ones_like(a)
    return smooth if kind == "sigmoid" else ((a.detach() + 2) / 4).clip(0, 1) + smooth - smooth.detach()


def random_window(seed, *, b=2, t=3, n=2, r=2, s=4, d=6, width=4, empty=False):
    """Leaves in float64: q, k, v, the gate's pre-activation, and a memory that has been written to before; convolutions
    see `width` tokens."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    window = {
        "q": draw(b, t, n * r, s, d),
        "k": draw(b, t, n, s, d),
        "v": draw(b, t, n, s, d),
        "a": 2.5 * draw(b, t, n, s),  # about half of the hard gates are at one of their ends
        "M": draw(b, n, d, d),
        "z": 5 * draw(b, n, d).abs(),
        "x": draw(b, t, n, s),
        "rate": draw(n),
        "taps": draw(n * (r + 2) * d, width),
        "tail": draw(b, n, r + 2, width - 1, d),
    }
    for gate in CHANNEL_GATES["gdn2"]:
        window |= {f"x_{gate}": draw(b, t, n, s, RANK), f"up_{gate}": draw(n * d, RANK), f"bias_{gate}": draw(n * d)}
    before = HOUSEHOLDERS - 1
    window |= {"step_key": draw(b, t, n, s, before * d), "step_value": draw(b, t, n, s, before * d)}
    window["step_gate"] = draw(b, t, n, s, before)
    if empty:
        window |= {name: torch.zeros_like(window[name]) for name in ("M", "z", "tail")}
    reset = torch.rand(b, t, generator=generator) < 0.3
    return {name: x.requires_grad_() for name, x in window.items()}, reset


def state_of(rule_name, window):
    kind = state_type(rule_name)
    return kind(*(window[name] for name in kind._fields))


def tokens_of(rule_name, window, gate):
    n = window["k"].shape[2]
    inputs = {gate: window[f"x_{gate}"] for gate in CHANNEL_GATES["gdn2"]}
    if plain(rule_name) not in CHANNEL_GATES:
        inputs = {"decay": window["x"].unsqueeze(-1)} | {name: window[name] for name in STEPS}
    return Tokens(window["q"].unflatten(2, (n, -1)), window["k"], window["v"], gate, inputs)


def weights_of(window):
    channels = {f"{gate}_{part}": window[f"{part}_{gate}"] for gate in CHANNEL_GATES["gdn2"] for part in ("up", "bias")}
    return channels | {"decay_rate": window["rate"], "convolution": window["taps"]}


def channel_logits(window, gate, lane, head):
    """What a gate per channel is made of, `[t, s, d]`."""
    features, n = window[f"x_{gate}"][lane, :, head], window["k"].shape[2]
    up, bias = (window[f"{part}_{gate}"].unflatten(0, (n, -1))[head] for part in ("up", "bias"))
    return features @ up.T + bias


def fast(rule_name, gate_kind, window, reset, **options):
    """Read `[b, t, n*r, s, d]` and memory carried out, by `model.rules`."""
    gate = None if gate_kind == "none" else write_gate(gate_kind, window["a"])
    options = {"detach_reads": False} | options
    tokens, state = tokens_of(rule_name, window, gate), state_of(rule_name, window)
    read, _, after = remember(build_rule(rule_name), tokens, weights_of(window), state, Borders(reset), **options)
    return read, after


def naive(rule_name, gate_kind, window, reset):
    """The same, lane by lane and head by head."""
    b, t, n = window["k"].shape[:3]
    ratio = window["q"].shape[2] // n
    gate = reference_gate(gate_kind, window["a"])
    reads, states = [], []
    for lane in range(b):
        for head in range(n):
            q = window["q"][lane, :, head * ratio : (head + 1) * ratio]  # a group's query heads are neighbours
            k, v, g = window["k"][lane, :, head], window["v"][lane, :, head], gate[lane, :, head]
            M, z, starts = window["M"][lane, head], window["z"][lane, head], reset[lane].tolist()
            convolution = ()
            if is_convolved(rule_name):
                taps, tail = window["taps"].view(n, ratio + 2, k.shape[-1], -1)[head], window["tail"][lane, head]
                silu = STATES[plain(rule_name)] is MatrixState  # the others have phi
                q, k, v, *convolution = window_convolution(q, k, v, taps, tail, starts, silu=silu)
            if plain(rule_name) == "deltanet":
                read, *after = window_deltanet(q, k, v, g, M, starts)
            elif plain(rule_name) in ONE_DECAY:
                x, rate = window["x"][lane, :, head], window["rate"][head]
                log_decay = -rate.exp() * (1 + x.exp()).log()
                if plain(rule_name) == "gated_deltanet":
                    read, *after = window_deltanet(q, k, v, g, M, starts, log_decay)
                else:
                    keys, values, gates = (window[name][lane, :, head] for name in STEPS)
                    keys, values = (y.unflatten(-1, (HOUSEHOLDERS - 1, -1)) for y in (keys, values))
                    steps = (keys, values, 1 / (1 + (-gates).exp()))
                    read, *after = window_delta_product(q, k, v, g, M, starts, log_decay, *steps)
            elif plain(rule_name) in CHANNEL_GATES:
                log_decay, *gates = (
                    channel_logits(window, gate, lane, head) for gate in CHANNEL_GATES[plain(rule_name)]
                )
                log_decay = -window["rate"][head].exp() * (1 + log_decay.exp()).log()
                gates = [1 / (1 + (-x).exp()) for x in gates]
                read, *after = window_gdn2(q, k, v, g, M, starts, log_decay, *gates)
            else:
                delta = plain(rule_name) == "delta"
                read, *after = window_normalized(q, k, v, g, M, z, starts, delta=delta, epsilon=EPSILON)
            after += convolution
            reads.append(read)
            states.append(after)
    read = torch.stack(reads).unflatten(0, (b, n)).transpose(1, 2).flatten(2, 3)
    return read, [torch.stack(xs).unflatten(0, (b, n)) for xs in zip(*states, strict=True)]


def gradients(outputs, leaves, seed=1):
    """Gradients of a random projection of the outputs; zeros where an output does not depend on a leaf."""
    generator = torch.Generator().manual_seed(seed)
    total = sum((x * torch.randn(x.shape, generator=generator, dtype=x.dtype)).sum() for x in outputs)
    found = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
    return {n: torch.zeros_like(x) if g is None else g for (n, x), g in zip(leaves.items(), found, strict=True)}


def assert_close(actual, expected, what):
    difference = (actual - expected).abs().max().item()
    assert difference <= 1e-10 * max(1.0, expected.abs().max().item()), f"{what} differs by {difference:.2e}"


def assert_same_as_reference(rule_name, gate_kind, window, reset):
    read, after = fast(rule_name, gate_kind, window, reset)
    expected_read, expected_after = naive(rule_name, gate_kind, window, reset)
    assert_close(read, expected_read, "read")
    for name, x, y in zip(after._fields, after, expected_after, strict=True):
        assert_close(x, y, name)
    actual = gradients([read, *after], window)
    for name, expected in gradients([expected_read, *expected_after], window).items():
        assert_close(actual[name], expected, f"gradient of {name}")
    return actual


@pytest.mark.parametrize("gate_kind", GATES)
@pytest.mark.parametrize("rule_name", RULES)
@settings(max_examples=12, deadline=None)
@given(
    seed=st.integers(0, 1000),
    b=st.integers(1, 2),
    t=st.integers(1, 4),
    n=st.integers(1, 3),
    r=st.integers(1, 3),
    s=st.integers(1, 5),
    d=st.sampled_from([2, 4, 6]),
    width=st.sampled_from([2, 4, 7, 8]),
    empty=st.booleans(),
)
def test_same_as_token_by_token(rule_name, gate_kind, seed, b, t, n, r, s, d, width, empty):
    window, reset = random_window(seed, b=b, t=t, n=n, r=r, s=s, d=d, width=width, empty=empty)
    assert_same_as_reference(rule_name, gate_kind, window, reset)


@pytest.mark.parametrize("gate_kind", GATES)
@pytest.mark.parametrize("rule_name", RULES)
def test_everything_at_once(rule_name, gate_kind):
    """Carried in and out, a reset in the middle of one lane only, grouped queries; the gradient reaches all of it."""
    window, reset = random_window(5, b=2, t=4, n=2, r=3)
    reset[:] = False
    reset[1, 2] = True
    found = assert_same_as_reference(rule_name, gate_kind, window, reset)
    unused = {"a"} if gate_kind == "none" else set()
    unused |= {"M", "z", "tail"} - set(state_type(rule_name)._fields)
    unused |= set() if is_convolved(rule_name) else {"taps"}
    unused |= set() if plain(rule_name) in ONE_DECAY else {"x"}
    unused |= set() if plain(rule_name) == "delta_product" else set(STEPS)
    unused |= set() if plain(rule_name) in DECAYING else {"rate"}
    asked = CHANNEL_GATES.get(plain(rule_name), ())
    unused |= {f"{p}_{gate}" for p in ("x", "up", "bias") for gate in CHANNEL_GATES["gdn2"] if gate not in asked}
    assert {name for name, x in found.items() if not x.any()} == unused


@pytest.mark.parametrize("length", [3, 4, 6, 8, 16])
@pytest.mark.parametrize("gate_kind", GATES)
@pytest.mark.parametrize(
    "rule_name", ["deltanet", "gated_deltanet", "gated_deltanet+convolution", "delta_product", "kda", "gdn2"]
)
def test_delta_rule_is_solved_in_blocks(rule_name, gate_kind, length, monkeypatch):
    """Segments shorter than a block, one block, several, and a length that blocks do not divide."""
    monkeypatch.setattr(delta_blocks, "WRITE_BLOCK", 4)
    window, reset = random_window(7, s=length)
    reset[0] = torch.tensor([False, True, False])
    assert_same_as_reference(rule_name, gate_kind, window, reset)


@pytest.mark.parametrize("gate_kind", GATES)
@pytest.mark.parametrize("rule_name", RULES)
def test_two_windows_are_one_longer_window(rule_name, gate_kind):
    window, reset = random_window(11, t=5)
    reset[0, 3] = True
    read, after = fast(rule_name, gate_kind, window, reset)
    first = {name: x[:, :2] if name in TOKENS else x for name, x in window.items()}
    read_first, between = fast(rule_name, gate_kind, first, reset[:, :2])
    second = {name: x[:, 2:] if name in TOKENS else x for name, x in window.items()}
    second |= between._asdict()
    read_second, after_second = fast(rule_name, gate_kind, second, reset[:, 2:])
    assert_close(torch.cat([read_first, read_second], dim=1), read, "read")
    for x, y in zip(after_second, after, strict=True):
        assert_close(x, y, "memory")
    split = gradients([torch.cat([read_first, read_second], dim=1), *after_second], window)
    for name, expected in gradients([read, *after], window).items():
        assert_close(split[name], expected, f"gradient of {name}")


@pytest.mark.parametrize("rule_name", RULES)
def test_nothing_crosses_a_reset(rule_name):
    """Bit for bit: what stands before a document's first segment does not exist for it."""
    window, reset = random_window(13, b=1, t=4)
    reset[:] = torch.tensor([[False, False, True, False]])
    read, after = fast(rule_name, "sigmoid", window, reset)
    other, _ = random_window(14, b=1, t=4)
    changed = {
        name: torch.cat([other[name][:, :2], x[:, 2:]], dim=1) if name in TOKENS else other[name]
        for name, x in window.items()
    } | {name: window[name] for name in PARAMETERS}
    read_changed, after_changed = fast(rule_name, "sigmoid", changed, reset)
    assert torch.equal(read[:, 2:], read_changed[:, 2:])
    assert all(torch.equal(x, y) for x, y in zip(after, after_changed, strict=True))
    assert not torch.equal(read[:, :2], read_changed[:, :2])
    found = gradients([read[:, 2:], *after], window)
    assert all(not found[name].any() for name in ("M", "z", "tail"))
    assert all(not found[name][:, :2].any() for name in TOKENS)


@pytest.mark.parametrize("rule_name", RULES)
def test_detached_reads_teach_the_writes_nothing(rule_name):
    window, reset = random_window(17)
    read, _ = fast(rule_name, "hard", window, reset, detach_reads=True)
    attached, _ = fast(rule_name, "hard", window, reset)
    assert torch.equal(read, attached)
    found = gradients([read], window)
    assert found["q"].any()
    assert not any(found[name].any() for name in (TOKENS | {"M", "z", "tail"}) - {"q"})
    found = gradients([attached], window)
    assert all(found[name].any() for name in "kva")


@pytest.mark.parametrize("rule_name", RULES)
def test_empty_memory_reads_zero_and_says_so(rule_name):
    window, reset = random_window(19, t=3, empty=True)
    reset[:] = torch.tensor([[False, False, False], [False, False, True]])
    tokens, state = tokens_of(rule_name, window, None), state_of(rule_name, window)
    rule, borders = build_rule(rule_name), Borders(reset)
    read, present, _ = remember(rule, tokens, weights_of(window), state, borders, detach_reads=False)
    expected = torch.tensor([[0, 1, 1], [0, 1, 0]])
    assert torch.equal(present, expected[..., None, None].expand(2, 3, 2, 1).double())
    assert not read[expected == 0].any()
    assert (read[expected == 1] != 0).all()
    assert all(x.isfinite().all() for x in gradients([read], window).values())


@pytest.mark.parametrize("rule_name", [name for name in PLAIN_RULES if name not in DECAYING])
def test_closed_gates_leave_the_memory_as_it_is(rule_name):
    window, reset = random_window(23)
    reset[:] = False
    window["a"] = torch.full_like(window["a"], -2.0).requires_grad_()
    _, after = fast(rule_name, "hard", window, reset)
    assert all(torch.equal(x, y) for x, y in zip(after, state_of(rule_name, window), strict=True))
    # ... and an empty one empty, but the gradient reaches the gate: it can reopen.
    window["M"], window["z"] = (torch.zeros_like(window[name]).requires_grad_() for name in "Mz")
    _, after = fast(rule_name, "hard", window, reset)
    assert not build_rule(rule_name).present(after).any()
    assert gradients(after, window)["a"].any()


def test_read_below_epsilon_gives_zero():
    rule = build_rule("linear", epsilon=1e-3)
    q = torch.zeros(1, 1, 2, 1, 1, 2, dtype=torch.float64)  # phi(0) = 1: the normaliser is the sum of z
    M = torch.ones(1, 1, 2, 2, 2, dtype=torch.float64)
    z = torch.tensor([[5e-4, 5e-4], [5e-4, 6e-4]], dtype=torch.float64).view(1, 1, 2, 2)
    read = rule.read(q, {}, NormalizedState(M, z))
    assert read[0, 0, 0, 0, 0].tolist() == [0, 0]
    torch.testing.assert_close(read[0, 0, 1, 0, 0], torch.full((2,), 2 / 1.1e-3, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_phi_stays_positive_in_low_precision(dtype):
    x = torch.tensor([-7.0, -5.0, -1.0, 0.0, 2.0], dtype=dtype)
    assert (phi(x) > 0).all()
    torch.testing.assert_close(
        phi(x).double(), torch.nn.functional.elu(x.double()) + 1, rtol=2 * torch.finfo(dtype).eps, atol=0
    )
    assert torch.nn.functional.elu(torch.tensor(-7.0, dtype=torch.bfloat16)) + 1 == 0  # why it is not written so


def test_phi_of_large_values_has_finite_gradients():
    x = torch.tensor([-1e4, -1.0, 1.0, 1e4], dtype=torch.float32, requires_grad=True)
    phi(x).sum().backward()
    torch.testing.assert_close(x.grad, torch.tensor([0.0, torch.e**-1, 1.0, 1.0]))


def test_deltanet_survives_a_zero_key():
    window, reset = random_window(29)
    window["k"] = torch.zeros_like(window["k"]).requires_grad_()
    reset[:] = False
    read, after = fast("deltanet", "none", window, reset)
    assert torch.equal(after.M, window["M"])
    assert all(x.isfinite().all() for x in gradients([read, *after], window).values())


def test_hard_gate_reaches_both_ends_and_keeps_a_slope():
    a = torch.tensor([-30.0, -2.0, -1.0, 0.0, 1.0, 2.0, 5.0], dtype=torch.float64, requires_grad=True)
    gate = write_gate("hard", a)
    assert gate.tolist() == [0, 0, 0.25, 0.5, 0.75, 1, 1]
    (slope,) = torch.autograd.grad(gate.sum(), a)
    logistic = 1 / (1 + (-a.detach()).exp())
    torch.testing.assert_close(slope, logistic * (1 - logistic), rtol=1e-12, atol=0)
    assert (slope > 0).all()


def test_unknown_rule_is_named():
    with pytest.raises(
        ValueError, match="no rule 'dleta'; valid: none, linear, delta, deltanet, gated_deltanet, delta_product, kda"
    ):
        build_rule("dleta")


@pytest.mark.parametrize("rule_name", RULES)
def test_document_starts_afresh_after_a_memory_that_overflowed(rule_name):
    """Zero times infinity is not a number: clearing must not multiply."""
    window, reset = random_window(31, b=2)
    reset[:] = torch.tensor([[True, False, False], [True, False, False]])
    healthy, _ = fast(rule_name, "none", window, reset)
    broken = window | {name: window[name].detach().clone() for name in ("M", "z", "tail")}
    broken["M"][0], broken["z"][1] = torch.inf, torch.nan
    broken["tail"][0] = torch.nan
    if "z" not in state_type(rule_name)._fields:
        broken["M"][1] = torch.nan
    leaves = {name: x.requires_grad_() for name, x in broken.items()}
    read, after = fast(rule_name, "none", leaves, reset)
    assert torch.equal(read, healthy)
    assert all(x.isfinite().all() for x in [*after, *gradients([read, *after], leaves).values()])


def test_closed_gate_decays_and_nothing_else():
    """`gated_deltanet` forgets with every token, also with those that it does not write."""
    window, reset = random_window(37, t=2)
    reset[:] = False
    window["a"] = torch.full_like(window["a"], -2.0)
    _, after = fast("gated_deltanet", "hard", window, reset)
    decay = (-window["rate"].exp()[:, None] * (1 + window["x"].exp()).log()).sum(dim=(1, 3)).exp()
    torch.testing.assert_close(after.M, decay[..., None, None] * window["M"], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("rule_name", DECAYING)
def test_decay_keeps_ratios_that_would_overflow(rule_name):
    """e^(c_i - c_j) for j > i is no exponent that is taken: with 40 per token it is infinite in float32."""
    window, reset = random_window(41, s=8)
    window = {name: x.detach().float().requires_grad_() for name, x in window.items()}
    window |= {name: torch.full_like(window[name], 40.0).requires_grad_() for name in ("x", "bias_decay")}
    read, after = fast(rule_name, "none", window, reset)
    assert all(x.isfinite().all() for x in [read, *after, *gradients([read, *after], window).values()])


@pytest.mark.parametrize("gate_kind", GATES)
@pytest.mark.parametrize("convolution", ["", "+convolution"])
def test_one_step_per_token_is_gated_deltanet(convolution, gate_kind):
    """Bit for bit, with one step or with other steps that are closed: all numbers, all gradients."""
    window, reset = random_window(45, s=6)
    expected_read, expected_after = fast("gated_deltanet" + convolution, gate_kind, window, reset)
    expected = gradients([expected_read, *expected_after], window)
    gate = None if gate_kind == "none" else write_gate(gate_kind, window["a"])
    rule = rule_of(memory_config("delta_product" + convolution, num_householder=1))
    assert rule.token_inputs(LayerShape(8, 2, 2, 6)) == {"decay": 1}
    tokens, state = tokens_of("gated_deltanet", window, gate), state_of("gated_deltanet" + convolution, window)
    read, _, after = remember(rule, tokens, weights_of(window), state, Borders(reset), detach_reads=False)
    assert torch.equal(read, expected_read)
    assert all(torch.equal(x, y) for x, y in zip(after, expected_after, strict=True))
    found = gradients([read, *after], window)
    assert all(torch.equal(found[name], x) for name, x in expected.items())
    closed = window | {"step_gate": torch.full_like(window["step_gate"], -80.0)}
    read, after = fast("delta_product" + convolution, gate_kind, closed, reset)
    assert_close(read, expected_read, "read")
    found = gradients([read, *after], window)
    for name in window.keys() - set(STEPS):
        assert_close(found[name], expected[name], f"gradient of {name}")


def tied_channels(window):
    """Gates that are the same in every channel: the decay of `gated_deltanet`, and erase and write gates of 1."""
    ones = torch.ones_like(window["up_decay"])
    tied = {"x_decay": window["x"].unsqueeze(-1).expand(*window["x"].shape, RANK) / RANK, "up_decay": ones}
    tied["bias_decay"] = torch.zeros_like(window["bias_decay"])
    for gate in ("erase", "write"):
        tied |= {f"up_{gate}": 0 * ones, f"bias_{gate}": torch.full_like(tied["bias_decay"], 60.0)}
    return window | tied


@pytest.mark.parametrize("gate_kind", GATES)
@pytest.mark.parametrize("convolution", ["", "+convolution"])
def test_tied_channels_are_gated_deltanet(convolution, gate_kind):
    """`gdn2` with open gates is `kda`, `kda` with one decay per head `gated_deltanet`: all numbers, all gradients."""
    window, reset = random_window(43, s=6)
    expected_read, expected_after = fast("gated_deltanet" + convolution, gate_kind, window, reset)
    expected = gradients([expected_read, *expected_after], window)
    for rule_name in ("kda", "gdn2"):
        read, after = fast(rule_name + convolution, gate_kind, tied_channels(window), reset)
        assert_close(read, expected_read, "read")
        for x, y in zip(after, expected_after, strict=True):
            assert_close(x, y, "memory")
        found = gradients([read, *after], window)
        for name in {"q", "k", "v", "a", "x", "M", "tail", "taps", "rate"}:
            assert_close(found[name], expected[name], f"gradient of {name}")


@pytest.mark.parametrize("width", [4, 7])
@pytest.mark.parametrize("rule_name", RULES)
def test_parameters_and_state_have_the_declared_shapes(rule_name, width):
    """Initial decays are near one, in order; every parameter's first dim divides by key/value heads."""
    layer = LayerShape(hidden=12, heads=8, groups=4, dim=6)
    rule = build_rule(rule_name, convolution_width=width)
    for name, parameter in rule.parameters(layer).items():
        value = parameter.initial(torch.Generator().manual_seed(0))
        assert value.shape == parameter.shape and parameter.shape[0] % layer.groups == 0, name
    state = rule.empty(3, layer, dtype=torch.float64, device=torch.device("cpu"))
    assert all(x.shape[:2] == (3, 4) and not x.any() for x in state)
    if is_convolved(rule_name):
        assert state.tail.shape == (3, 4, 4, width - 1, 6)
        tied = rule.parameters(layer)["convolution"].tied(torch.Generator()).view(4, 4, 6, width)
        assert (tied[:, :3] == width**-0.5).all() and not (tied[:, 3] == width**-0.5).any()
    if plain(rule_name) in DECAYING:
        found = {n: p.initial(torch.Generator()) for n, p in rule.parameters(layer).items() if p.is_gate}
        by_channel = plain(rule_name) in CHANNEL_GATES
        bias = found["decay_bias"].view(4, 6) if by_channel else found["decay.bias"].unsqueeze(-1)
        decay = found["decay_rate"].exp().unsqueeze(-1) * torch.nn.functional.softplus(bias)
        torch.testing.assert_close(decay, torch.logspace(-5, -3, 4).unsqueeze(-1).expand_as(bias), rtol=1e-4, atol=0)
        assert not found["decay_up" if by_channel else "decay.weight"].any()
