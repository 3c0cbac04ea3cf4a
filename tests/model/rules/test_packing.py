"""Documents that share segments: what the rules make of them against every document alone, token by token, on the same
grid of segments, in float64."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.rules.borders import own_borders
from model.rules.window import remember, write_gate
from tests.distributed.context_cases import FORMS
from tests.model.rules.test_memory import (
    DECAYING,
    GATES,
    RULES,
    TOKENS,
    assert_close,
    build_rule,
    gradients,
    naive,
    random_window,
    state_of,
    state_type,
    tokens_of,
    weights_of,
)


def packed(rule_name, gate_kind, window, starts, asked, *, detach=False):
    """Reads `[b, t + p, n*r, s, d]`, `present` of them and memory carried out, by `model.rules`."""
    gate = None if gate_kind == "none" else write_gate(gate_kind, window["a"])
    _, borders = own_borders(None, starts[..., 0], starts, probes=asked.shape[1])
    read, present, after = remember(
        build_rule(rule_name),
        tokens_of(rule_name, window | {"q": torch.cat([window["q"], window["asking"]], dim=1)}, gate),
        weights_of(window),
        state_of(rule_name, window),
        borders,
        probes=asked if asked.shape[1] else None,
        detach_reads=detach,
    )
    return read, present.expand(*read.shape[:2], -1, read.shape[3]), after


def alone(rule_name, gate_kind, window, starts, asked, *, detach=False):
    """The same, lane by lane and document by document."""
    fields, n = state_type(rule_name)._fields, window["k"].shape[2]
    b, t, heads, s, d = window["q"].shape
    reads = [[[None] * s for _ in range(t)] for _ in range(b)]
    holds = torch.zeros(b, t + asked.shape[1], n, s, dtype=torch.float64)
    asking, ends = [], []

    def read_of(piece, state):
        state = {name: x.detach() if detach else x for name, x in state.items()}
        return naive(rule_name, gate_kind, piece | state, torch.zeros(1, 1, dtype=torch.bool))

    def held(state):
        return state["z" if "z" in fields else "M"][0].detach().flatten(1).any(dim=1, keepdim=True).double()

    for lane in range(b):
        stream = starts[lane].flatten()
        firsts = sorted({0, *stream.nonzero().flatten().tolist()})
        found = {}  # by segment, what its first token's document has stored before it
        for first, end in itertools.pairwise([*firsts, t * s]):
            state = {name: window[name][lane : lane + 1] for name in fields}
            if stream[first]:
                state = {name: torch.zeros_like(x) for name, x in state.items()}
            for segment in range(first // s, (end - 1) // s + 1):
                own = slice(max(first - segment * s, 0), min(end - segment * s, s))
                if own.start == 0:
                    found[segment] = state
                piece = window | {name: window[name][lane, segment, :, own][None, None] for name in TOKENS}
                read, _ = read_of(piece, state)
                holds[lane, segment, :, own] = held(state)
                reads[lane][segment][own] = read[0, 0].unbind(dim=-2)
                _, after = naive(rule_name, gate_kind, piece | state, torch.zeros(1, 1, dtype=torch.bool))
                state = dict(zip(fields, after, strict=True))
        ends.append([state[name][0] for name in fields])
        for i, segment in enumerate(asked[lane].tolist()):
            piece = window | {name: torch.ones_like(window[name][:1, :1]) for name in TOKENS - {"q"}}
            read, _ = read_of(piece | {"q": window["asking"][lane : lane + 1, i : i + 1]}, found[segment])
            holds[lane, t + i] = held(found[segment])
            asking.append(read[0, 0])
    read = torch.stack([torch.stack([torch.stack(x, dim=-2) for x in lane]) for lane in reads])
    asking = torch.stack(asking).unflatten(0, asked.shape) if asking else read[:, :0]
    return torch.cat([read, asking], dim=1), holds, [torch.stack(x) for x in zip(*ends, strict=True)]


def assert_same(rule_name, gate_kind, window, starts, asked, *, detach=False):
    read, present, after = packed(rule_name, gate_kind, window, starts, asked, detach=detach)
    expected, holds, expected_after = alone(rule_name, gate_kind, window, starts, asked, detach=detach)
    assert_close(read, expected, "read")
    assert torch.equal(present, holds)
    assert not read[~holds.bool().repeat_interleave(read.shape[2] // holds.shape[2], dim=2)].any()
    for name, x, y in zip(after._fields, after, expected_after, strict=True):
        assert_close(x, y, name)
    leaves = {name: x for name, x in window.items() if x.numel()}
    found = gradients([read, *after], leaves)
    for name, x in gradients([expected, *expected_after], leaves).items():
        assert_close(found[name], x, f"gradient of {name}")


def random_case(seed, *, b=2, t=4, s=5, probes=0, share=0.2, **sizes):
    window, _ = random_window(seed, b=b, t=t, s=s, **sizes)
    generator = torch.Generator().manual_seed(seed)
    starts = torch.rand(b, t, s, generator=generator) < share
    asked = torch.randint(t, (b, probes), generator=generator)
    shape = (b, probes, *window["q"].shape[2:])
    window["asking"] = torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()
    return window, starts, asked


def chosen_case(*, probes=0):
    """Lane 0: a start at a last token, the next segment whole, many starts in one segment, one among the window's last
    three tokens. Lane 1: a document that ends before segment 2, where one starts at its first token and one at its
    last, and a whole segment without one."""
    window, starts, asked = random_case(3, probes=probes)
    starts[:] = False
    starts[0, 0, 4] = starts[0, 2, 1] = starts[0, 2, 2] = starts[0, 2, 4] = starts[0, 3, 3] = True
    starts[1, 2, 0] = starts[1, 2, 4] = True
    return window, starts, asked


@pytest.mark.parametrize("rule_name", RULES)
def test_every_document_is_as_if_alone(rule_name):
    for gate_kind, probes, detach in itertools.product(GATES, (0, 3), (False, True)):
        assert_same(rule_name, gate_kind, *chosen_case(probes=probes), detach=detach)


@pytest.mark.parametrize("rule_name", RULES)
@settings(max_examples=10, deadline=None)
@given(
    seed=st.integers(0, 1000),
    gate_kind=st.sampled_from(GATES),
    t=st.integers(1, 4),
    n=st.integers(1, 2),
    s=st.integers(1, 6),
    probes=st.integers(0, 2),
    share=st.sampled_from([0.1, 0.3, 0.7]),
    width=st.sampled_from([2, 4, 7, 8]),
    detach=st.booleans(),
)
def test_documents_anywhere(rule_name, seed, gate_kind, t, n, s, probes, share, width, detach):
    """Segments shorter than the convolutions' tail too."""
    case = random_case(seed, t=t, n=n, s=s, d=4, width=width, probes=probes, share=share)
    assert_same(rule_name, gate_kind, *case, detach=detach)


@pytest.mark.parametrize("form", [name for name in FORMS if name != "in turn"])
@pytest.mark.parametrize("rule_name", RULES)
def test_forms_for_a_gpu(rule_name, form):
    """Where a rule has no kernel, that form is the one for a CPU."""
    with FORMS[form]():
        assert_same(rule_name, "sigmoid", *chosen_case(probes=3))
        assert_same(rule_name, "none", *random_case(5, t=1, s=6))


@pytest.mark.parametrize("width", [4, 7])
@pytest.mark.parametrize("rule_name", ["linear+convolution", "deltanet+convolution"])
def test_convolutions_in_blocks(rule_name, width, monkeypatch):
    """Blocks of as many tokens as a convolution sees, some of which see no start."""
    monkeypatch.setattr("model.device.CACHE_BLOCK_BYTES", 1)
    assert_same(rule_name, "sigmoid", *random_case(15, s=11, width=width, share=0.06, probes=2))


@pytest.mark.parametrize("rule_name", ("deltanet", *DECAYING))
def test_blocks_of_packed_segments(rule_name, monkeypatch):
    monkeypatch.setattr("model.rules.delta_blocks.WRITE_BLOCK", 4)
    assert_same(rule_name, "hard", *random_case(7, s=16, share=0.05))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("rule_name", RULES)
def test_what_overflowed_before_a_cut_is_gone_behind_it(rule_name, form):
    """The document that reads it is lost; those behind it are not."""
    window, starts, asked = random_case(9, b=1, t=3)
    starts[:] = False
    starts[0, 0, 3] = starts[0, 2, 1] = True
    broken = window | {name: torch.full_like(window[name], torch.inf).requires_grad_() for name in ("M", "z")}
    with FORMS[form]():
        read, _, after = packed(rule_name, "sigmoid", broken, starts, asked)
        healthy, _, healthy_after = packed(rule_name, "sigmoid", window, starts, asked)
    assert torch.equal(read[:, 1:], healthy[:, 1:])
    assert all(torch.equal(x, y) for x, y in zip(after, healthy_after, strict=True))
    found = gradients([read[:, 1:], *after], broken)
    assert all(found[name].isfinite().all() for name in TOKENS - {"q"}) and found["q"][:, 1:].isfinite().all()


@pytest.mark.parametrize("rule_name", RULES)
def test_nothing_crosses_a_start(rule_name):
    """Bit for bit: what stands before a document's first token, in its segment too, does not exist for it."""
    window, starts, asked = random_case(13, b=1)
    starts[:] = False
    starts[0, 1, 2] = True
    other, _, _ = random_case(14, b=1)
    behind = (torch.arange(20) >= 7).view(1, 4, 1, 5)

    def changed(name):
        mine, others = window[name].detach(), other[name].detach()
        if name not in TOKENS:
            return others if name in state_type(rule_name)._fields else mine
        return mine.where(behind.view(*behind.shape, *(1,) * (mine.dim() - 4)), others)

    read, _, after = packed(rule_name, "sigmoid", window, starts, asked)
    of_changed, _, after_changed = packed(rule_name, "sigmoid", {name: changed(name) for name in window}, starts, asked)
    assert torch.equal(read[:, 2:], of_changed[:, 2:]) and not torch.equal(read[:, :2], of_changed[:, :2])
    assert all(torch.equal(x, y) for x, y in zip(after, after_changed, strict=True))
    found = gradients([read[:, 2:], *after], window | {"asking": window["q"]})
    assert not any(found[name].any() for name in ("M", "z", "tail"))
    assert not any(found[name][:, 0].any() or found[name][:, 1, :, :2].any() for name in TOKENS)


@pytest.mark.parametrize("rule_name", RULES)
def test_documents_that_start_with_their_segments_are_as_without_packing(rule_name):
    window, _, asked = random_case(11, probes=2)
    starts = torch.zeros(2, 4, 5, dtype=torch.bool)
    starts[0, 2, 0] = True
    packed_read, packed_present, packed_after = packed(rule_name, "sigmoid", window, starts, asked)
    queries = torch.cat([window["q"], window["asking"]], dim=1)
    tokens = tokens_of(rule_name, window | {"q": queries}, torch.sigmoid(window["a"]))
    _, borders = own_borders(None, starts[..., 0])
    state = state_of(rule_name, window)
    read, present, after = remember(
        build_rule(rule_name), tokens, weights_of(window), state, borders, probes=asked, detach_reads=False
    )
    assert torch.equal(packed_read, read) and torch.equal(packed_present, present.expand_as(packed_present))
    assert all(torch.equal(x, y) for x, y in zip(packed_after, after, strict=True))
    leaves = {name: x for name, x in window.items() if name in TOKENS}
    for x, y in zip(*(gradients(o, leaves).values() for o in ([packed_read], [read])), strict=True):
        assert torch.equal(x, y)
