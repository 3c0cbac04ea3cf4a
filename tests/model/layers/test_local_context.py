"""The sliding local context: how far it sees, where it begins, and what of it the controls leave alone."""

import pytest
import torch

from model.rules.state import LocalContext, join_state, split_state
from tests.model.build import random_memory, random_tokens, small_config, small_stage

pytestmark = pytest.mark.usefixtures("one_process")

T = 4
CPU = torch.device("cpu")


def hidden_states(config, seed=1):
    """`[s, t, h]` of one lane."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(config.segment_length, T, config.hidden_size, generator=generator, dtype=torch.float64)


def no_reset():
    return torch.zeros(1, T, dtype=torch.bool)


def test_sees_the_segment_before_and_no_further():
    config = small_config("none+sliding", num_layers=1)
    attention = small_stage(config).layers["0"].attention
    hidden = hidden_states(config).requires_grad_()
    output = attention(hidden, attention.empty_state(1, CPU), no_reset()).hidden
    for segment in range(T):
        for position in (0, config.segment_length - 1):
            (reached,) = torch.autograd.grad(output[position, segment].sum(), hidden, retain_graph=True)
            found = reached.abs().amax(dim=2) > 0  # [s, t]
            expected = torch.zeros_like(found)
            expected[: position + 1, segment] = True
            if segment:
                expected[:, segment - 1] = True
            assert torch.equal(found, expected)


@pytest.mark.parametrize("rule", ["none", "delta"])
def test_document_begins_as_without_it(rule):
    """Bit for bit: the first segment has nothing before it, whatever was carried in."""
    config = small_config(rule + "+sliding", num_layers=1)
    sliding = small_stage(config)
    plain = small_stage(small_config(rule, num_layers=1)).layers["0"].attention
    attention, hidden = sliding.layers["0"].attention, hidden_states(config)
    reset = torch.tensor([[True, False, True, False]])
    memory = random_memory(sliding, 1)[0]
    own = split_state(memory)[0]
    found, expected = attention(hidden, memory, reset).hidden, plain(hidden, own, reset).hidden
    assert torch.equal(found[:, reset[0]], expected[:, reset[0]])
    assert not torch.isclose(found[:, ~reset[0]], expected[:, ~reset[0]]).all(dim=-1).any()


def test_document_starts_afresh_after_a_segment_that_overflowed():
    config = small_config("none+sliding", num_layers=1)
    attention = small_stage(config).layers["0"].attention
    hidden = hidden_states(config).requires_grad_()
    reset = no_reset()
    reset[0, 0] = True
    outputs = []
    for value in (0.0, torch.inf, torch.nan):
        state = attention.empty_state(1, CPU)
        state = LocalContext(*(torch.full_like(x, value) for x in state[:2]), torch.ones_like(state[2]))
        result = attention(hidden, state, reset)
        (gradient,) = torch.autograd.grad(result.hidden.sum(), hidden)
        outputs.append([result.hidden, gradient, *result.memory])
    for other in outputs[1:]:
        assert all(torch.equal(x, y) for x, y in zip(outputs[0], other, strict=True))


@pytest.mark.parametrize("chunks", [1, 2, 4])
def test_window_in_parts_is_the_window(chunks):
    """Without a memory the context alone is carried: Transformer-XL."""
    stage = small_stage(small_config("none+sliding"))
    tokens, labels = random_tokens(1, T, 6), random_tokens(1, T, 6, seed=1)
    reset = torch.tensor([[False, False, True, False]])
    memory = random_memory(stage, 1)
    whole = stage(tokens, memory, reset, labels)
    losses = []
    for part in torch.arange(T).chunk(chunks):
        output = stage(tokens[:, part], memory, reset[:, part], labels[:, part])
        memory = output.memory
        losses.append(output.token_loss)
    torch.testing.assert_close(torch.cat(losses, dim=1), whole.token_loss, rtol=1e-12, atol=1e-12)
    for state, other in zip(memory, whole.memory, strict=True):
        torch.testing.assert_close(list(state), list(other), rtol=1e-12, atol=1e-12)


def test_a_device_computes_both_and_takes_one(monkeypatch):
    """Where the host does not know which segments begin a document; on a CPU these alone are computed again."""
    stage = small_stage(small_config("delta+sliding"))
    reset = torch.tensor([[False, True, False], [True, False, True], [False, False, False]])
    tokens = random_tokens(3, 4, 6)
    found = []
    for known in (True, False):
        monkeypatch.setattr("model.layers.local_context.host_knows", lambda _, known=known: known)
        memory = random_memory(stage, 3)
        out = stage(tokens, memory, reset, tokens, probes=torch.tensor([[1], [0], [2]]))
        gradients = torch.autograd.grad(out.token_loss.sum(), [*stage.parameters(), memory[0].local_key])
        found.append([out.token_loss, *gradients])
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("detached", [False, True], ids=["full", "detached"])
def test_truncation_is_real(detached):
    stage = small_stage(small_config("none+sliding", num_layers=2), first=1, detach_reads=detached)
    hidden = hidden_states(stage.config).requires_grad_()
    output = stage(hidden, random_memory(stage, 1), no_reset(), random_tokens(1, T, 6))
    output.token_loss[0, 3].sum().backward()
    reached = hidden.grad.abs().amax(dim=(0, 2)) > 0
    assert reached.tolist() == [False, False, not detached, True]


def test_memory_off_leaves_the_context():
    stage, plain = (small_stage(small_config(r, num_layers=1)) for r in ("delta+sliding", "none+sliding"))
    hidden = hidden_states(stage.config)
    state = random_memory(stage, 1)[0]
    off = stage.layers["0"].attention(hidden, state, no_reset(), memory_off=True)
    expected = plain.layers["0"].attention(hidden, split_state(state)[1], no_reset())
    assert torch.equal(off.hidden, expected.hidden)
    assert all(torch.equal(x, y) for x, y in zip(split_state(off.memory)[1], expected.memory, strict=True))


@pytest.mark.parametrize("rule", ["none", "delta", "none+sliding", "delta+sliding", "gated_deltanet+sliding"])
def test_state_is_the_memorys_and_the_contexts(rule):
    state = small_stage(small_config(rule)).layers["0"].attention.empty_state(3, CPU)
    memory, context = split_state(state)
    assert (memory is None) == rule.startswith("none") and (context is None) == ("+" not in rule)
    joined = join_state(memory, context)
    assert type(joined) is type(state) and joined is not None or rule == "none"
    for x in state or ():
        assert x.shape[:2] == (3, 2) and not x.any()


def test_bfloat16_context_is_carried_without_loss():
    """In bfloat16, as keys and values are: two windows are one, bit for bit, at half the bytes. The memory beside it
    stays float32."""
    stage = small_stage(small_config("delta+sliding"), precision="bf16")
    tokens, labels = random_tokens(1, T, 6), random_tokens(1, T, 6, seed=1)
    memory = stage.empty_memory(1, CPU)
    whole = stage(tokens, memory, no_reset(), labels).token_loss
    first = stage(tokens[:, :2], memory, no_reset()[:, :2], labels[:, :2])
    second = stage(tokens[:, 2:], first.memory, no_reset()[:, 2:], labels[:, 2:])
    assert torch.equal(torch.cat([first.token_loss, second.token_loss], dim=1), whole)
    for state in (*memory, *first.memory):
        own, context = split_state(state)
        assert {x.dtype for x in own} == {torch.float32} and {x.dtype for x in context[:2]} == {torch.bfloat16}
        assert context.local_seen.dtype == torch.float32  # a share of a segment
