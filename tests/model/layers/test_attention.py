"""Infini-attention on the parallel layers against a dense version, and the ways in which public code got it wrong."""

import numpy as np
import pytest
import torch

from model.layers.rotary import rotary_table, rotate
from model.layers.statistics import effective_rank, read_variation
from model.rules import RULES
from tests.model import naive
from tests.model.build import random_memory, small_config, small_stage

pytestmark = pytest.mark.usefixtures("one_process")

MEMORY_RULES = tuple(name for name in RULES if name != "none")
RULES_AND_GATES = [("none", "none")] + [(r, g) for r in MEMORY_RULES for g in ("none", "hard")]
RULES_AND_GATES += [("delta", "sigmoid")]
B, T = 2, 4


def hidden_states(config, seed=1, b=B, t=T):
    """`[s, b*t, h]` in float64, and the same as `[b, t, s, h]`."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(b, t, config.segment_length, config.hidden_size, generator=generator, dtype=torch.float64)
    return x.flatten(0, 1).transpose(0, 1).contiguous(), x


def unfold(output, b=B):
    return output.transpose(0, 1).unflatten(0, (b, -1))


@pytest.fixture
def reset():
    starts = torch.zeros(B, T, dtype=torch.bool)
    starts[0, 2] = starts[1, 0] = True
    return starts


@pytest.mark.parametrize("carried_in", [True, False], ids=["carried", "fresh"])
@pytest.mark.parametrize("skip_empty", [True, False], ids=["skip_empty", "literal"])
@pytest.mark.parametrize(("rule", "gate"), RULES_AND_GATES)
def test_layer_is_the_dense_layer(rule, gate, skip_empty, carried_in, reset):
    assert_is_the_dense_layer(small_config(rule, gate, skip_empty=skip_empty, num_layers=1), carried_in, reset)


@pytest.mark.parametrize("carried_in", [True, False], ids=["carried", "fresh"])
@pytest.mark.parametrize("rule", ["none+sliding", "delta+sliding", "gated_deltanet+sliding"])
def test_sliding_context_is_the_dense_one(rule, carried_in, reset):
    assert_is_the_dense_layer(small_config(rule, num_layers=1), carried_in, reset)


@pytest.mark.parametrize("floor", [0.0, 0.3])
@pytest.mark.parametrize("rule", ["delta", "gated_deltanet"])
@pytest.mark.parametrize("mix", ["head", "token"])
def test_gates_are_the_dense_gates(rule, mix, floor, reset):
    assert_is_the_dense_layer(small_config(rule, "hard", mix=mix, floor=floor, num_layers=1), True, reset)


def assert_is_the_dense_layer(config, carried_in, reset):
    """Output, memory and every gradient."""
    stage = small_stage(config)
    layer = stage.layers["0"]
    hidden, x = hidden_states(config)
    hidden, x = hidden.requires_grad_(), x.requires_grad_()
    memory = random_memory(stage, B) if carried_in else stage.empty_memory(B, torch.device("cpu"))
    output, after, _, _ = layer(hidden, memory[0], reset, False, False)
    weights = dict(layer.named_parameters())
    expected, expected_after = [], []
    for lane in range(B):
        state = None if memory[0] is None else [m[lane] for m in memory[0]]
        y, state = naive.layer(config, weights, x[lane], state, reset[lane])
        expected.append(y)
        expected_after.append(state)
    expected = torch.stack(expected)
    expected_after = [torch.stack(m) for m in zip(*expected_after, strict=True)]

    close = {"rtol": 1e-10, "atol": 1e-10}
    torch.testing.assert_close(unfold(output), expected, **close)
    torch.testing.assert_close(list(after or ()), expected_after, **close)
    carried = {name: x for name, x in memory[0]._asdict().items() if name != "local_seen"} if memory[0] else {}
    leaves = [*weights.values(), *carried.values()] if carried_in else list(weights.values())
    tangent = torch.randn(expected.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    total = (unfold(output) * tangent).sum() + sum(m.square().sum() for m in after or ())
    expected_total = (expected * tangent).sum() + sum(m.square().sum() for m in expected_after)
    names = [*weights, *carried]
    actual = torch.autograd.grad(total, [hidden, *leaves])
    wanted = torch.autograd.grad(expected_total, [x, *leaves])
    torch.testing.assert_close(unfold(actual[0]), wanted[0], **close)
    for name, gradient, other in zip(names, actual[1:], wanted[1:], strict=False):
        torch.testing.assert_close(gradient, other, **close, msg=lambda m, name=name: f"gradient of {name}: {m}")
        assert gradient.any(), name


def test_positions_restart_in_every_segment():
    config = small_config("delta", num_layers=1)
    layer = small_stage(config).layers["0"]
    hidden, _ = hidden_states(config, b=1, t=1)
    starts = torch.ones(1, T, dtype=torch.bool)
    output, *_ = layer(hidden.repeat(1, T, 1), layer.attention.empty_state(1, hidden.device), starts, False, False)
    for segment in range(1, T):
        torch.testing.assert_close(output[:, segment], output[:, 0], rtol=0, atol=1e-13)


def test_rotation_keeps_relative_positions_only():
    """The product of a query and a key depends on their distance; position 0 is not turned."""
    q, k = torch.randn(2, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    table = rotary_table(torch.arange(10), 8, 100.0, dtype=torch.float64)
    queries, keys = rotate(q.expand(10, 8), table), rotate(k.expand(10, 8), table)
    torch.testing.assert_close(queries[0], q)
    scores = queries @ keys.T
    for distance in range(9):
        diagonal = scores.diagonal(-distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal))
    assert not torch.allclose(scores[0, 0], scores[1, 0])


@pytest.mark.parametrize("rule", MEMORY_RULES)
def test_memory_never_sees_positions(rule, reset):
    """Bit for bit: another rotary base changes the local attention and nothing that is written."""
    results = []
    for base in (10000.0, 50.0):
        config = small_config(rule, num_layers=1, rope_base=base)
        stage = small_stage(config)
        hidden, _ = hidden_states(config)
        results.append(stage.layers["0"](hidden, random_memory(stage, B)[0], reset, False, False))
    assert not torch.equal(results[0][0], results[1][0])
    assert all(torch.equal(x, y) for x, y in zip(results[0][1], results[1][1], strict=True))


@pytest.mark.parametrize("rule", ["linear", "delta"])
def test_order_inside_a_segment_does_not_reach_the_memory(rule, reset):
    config = small_config(rule, num_layers=1)
    stage = small_stage(config)
    hidden, _ = hidden_states(config)
    memory = random_memory(stage, B)[0]
    _, after, _, _ = stage.layers["0"](hidden, memory, reset, False, False)
    _, shuffled, _, _ = stage.layers["0"](hidden.flip(0), memory, reset, False, False)
    for x, y in zip(after, shuffled, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("rule", MEMORY_RULES)
def test_query_heads_read_the_memory_of_their_group(rule):
    """Heads 0 and 1 belong to key/value head 0, heads 2 and 3 to head 1 (a tiled repeat would give 0 and 2)."""
    config = small_config(rule, num_layers=1)
    attention = small_stage(config).layers["0"].attention
    heads, d = config.num_attention_heads, config.hidden_size // config.num_attention_heads
    with torch.no_grad():
        attention.projection.weight.copy_(torch.eye(heads * d))
    hidden, _ = hidden_states(config, b=1, t=1)
    memory = attention.empty_state(1, hidden.device)
    ones = [torch.ones_like(m) for m in memory]
    starts = torch.zeros(1, 1, dtype=torch.bool)

    def per_head(state):
        return attention(hidden, state, starts).hidden.unflatten(-1, (heads, d)).flatten(0, 1).transpose(0, 1)

    both = per_head(type(memory)(*ones))
    changed = [m.clone() for m in ones]
    changed[0][:, 1] *= 2  # the second key/value head's matrix
    other = per_head(type(memory)(*changed))
    assert torch.equal(both[:2], other[:2])
    assert (both[2:] != other[2:]).any(dim=-1).all()


@pytest.mark.parametrize("rule", MEMORY_RULES)
def test_empty_heads_of_the_memory_are_not_mixed_in(rule):
    """A closed write gate can leave one key/value head empty: its own query heads, 0 and 1, stay local."""
    config, plain = small_config(rule, num_layers=1), small_config("none", num_layers=1)
    attention, local = (small_stage(c).layers["0"].attention for c in (config, plain))
    heads, d = config.num_attention_heads, config.hidden_size // config.num_attention_heads
    hidden, _ = hidden_states(config, b=1, t=1)
    memory = attention.empty_state(1, hidden.device)
    for m in memory:
        m[:, 1] = 1
    outputs = []
    for module, state in ((attention, memory), (local, None)):
        with torch.no_grad():
            module.projection.weight.copy_(torch.eye(heads * d))
        output = module(hidden, state, torch.zeros(1, 1, dtype=torch.bool)).hidden
        outputs.append(output.unflatten(-1, (heads, d)).flatten(0, 1).transpose(0, 1))
    assert torch.equal(outputs[0][:2], outputs[1][:2])
    assert (outputs[0][2:] != outputs[1][2:]).any(dim=-1).all()


@pytest.mark.parametrize("rule", MEMORY_RULES)
def test_first_segment_is_exactly_local_attention(rule):
    """With an empty memory a pretrained model is not damaged at step 0; the literal paper scales it down."""
    outputs = {}
    for name, settings in {
        "plain": {"rule": "none"},
        "skip": {"rule": rule, "beta": 1.0},
        "literal": {"rule": rule, "skip_empty": False},
    }.items():
        config = small_config(**settings, num_layers=1)
        attention = small_stage(config, scramble=False).layers["0"].attention
        hidden, _ = hidden_states(config)
        reset = torch.zeros(B, T, dtype=torch.bool)
        reset[:, 0] = reset[1, 2] = True
        outputs[name] = unfold(attention(hidden, attention.empty_state(B, hidden.device), reset).hidden)
    starts = reset
    assert torch.equal(outputs["skip"][starts], outputs["plain"][starts])
    assert not torch.isclose(outputs["skip"][~starts], outputs["plain"][~starts]).all(dim=-1).any()
    torch.testing.assert_close(outputs["literal"][starts], 0.5 * outputs["plain"][starts])


@pytest.mark.parametrize("mix", ["head", "token"])
@pytest.mark.parametrize("rule", MEMORY_RULES)
def test_memory_off_is_plain_attention_that_still_writes(rule, mix, reset):
    config, plain = small_config(rule, mix=mix, floor=0.2, num_layers=1), small_config("none", num_layers=1)
    stage = small_stage(config)
    attention, plain = stage.layers["0"].attention, small_stage(plain).layers["0"].attention
    hidden, _ = hidden_states(config)
    memory = random_memory(stage, B)[0]
    off, on = attention(hidden, memory, reset, memory_off=True), attention(hidden, memory, reset)
    assert torch.equal(off.hidden, plain(hidden, None, reset).hidden)
    assert not torch.equal(off.hidden, on.hidden)
    assert all(torch.equal(x, y) for x, y in zip(off.memory, on.memory, strict=True))


@pytest.mark.parametrize("mix", ["head", "token"])
def test_memory_has_its_floor(mix, reset):
    """However low the gate's logit: a floor of the output comes from the memory."""
    config = small_config("delta", beta=-50.0, mix=mix, floor=0.25, num_layers=1)
    stage = small_stage(config, scramble=False)
    attention = stage.layers["0"].attention
    hidden, _ = hidden_states(config)
    found = attention(hidden, random_memory(stage, B)[0], reset, statistics=True).statistics
    torch.testing.assert_close(found.mix_gate, torch.full((4,), 0.25))
    assert (found.memory_share > 0).all()


def test_mix_gate_per_token_is_averaged_in_statistics(reset):
    config = small_config("delta", mix="token", num_layers=1)
    stage = small_stage(config)
    attention = stage.layers["0"].attention
    hidden, x = hidden_states(config)
    found = attention(hidden, random_memory(stage, B)[0], reset, statistics=True).statistics
    expected = torch.sigmoid(x @ attention.mix_gate.weight.T + attention.mix_gate.bias).flatten(0, 2)
    assert expected.std(dim=0).min() > 0.01
    torch.testing.assert_close(found.mix_gate.double(), expected.mean(dim=0), rtol=1e-6, atol=0)


@pytest.mark.parametrize("gate", ["none", "hard"])
def test_statistics(gate, reset):
    config = small_config("delta", gate, num_layers=1, num_attention_heads=4)
    stage = small_stage(config)
    attention = stage.layers["0"].attention
    hidden, x = hidden_states(config)
    result = attention(hidden, random_memory(stage, B)[0], reset, statistics=True)
    found = result.statistics
    torch.testing.assert_close(found.mix_gate, torch.sigmoid(attention.beta.detach()).float())
    assert ((found.memory_share > 0) & (found.memory_share < 1)).all()
    tokens = B * T * config.segment_length
    if gate == "none":
        assert found.write_gate.tolist() == [1, 1] and result.gate_sum is None
        assert not found.write_gate_histogram[:, :-1].any()
    else:
        gates = ((x @ attention.write_gate.weight.T + attention.write_gate.bias + 2) / 4).clip(0, 1).flatten(0, 2)
        torch.testing.assert_close(found.write_gate.double(), gates.mean(dim=0), rtol=1e-6, atol=0)
        torch.testing.assert_close(result.gate_sum.double(), gates.sum())
        assert (found.write_gate_histogram.sum(dim=1) == tokens).all()
    M, z = (m.detach() for m in result.memory)
    torch.testing.assert_close(
        found.memory_norm.double(), M.square().sum(dim=(2, 3)).sqrt().mean(dim=0), rtol=1e-6, atol=0
    )
    torch.testing.assert_close(
        found.normaliser_norm.double(), z.square().sum(dim=2).sqrt().mean(dim=0), rtol=1e-6, atol=0
    )
    ranks = [[np.exp(entropy(np.linalg.svd(m, compute_uv=False))) for m in lane] for lane in M.double().numpy()]
    torch.testing.assert_close(found.effective_rank.double(), torch.tensor(ranks).mean(dim=0), rtol=1e-6, atol=0)
    assert ((found.read_variation > 0) & (found.read_variation < 1)).all()
    assert not any(statistic.requires_grad for statistic in found)


def entropy(values: np.ndarray) -> float:
    shares = values / values.sum()
    return float(-(shares * np.log(shares)).sum())


def test_effective_rank_counts_directions():
    matrices = torch.stack(
        [torch.eye(8), torch.zeros(8, 8), torch.ones(8, 8), torch.diag(torch.tensor([1.0] * 4 + [0.0] * 4))]
    )
    torch.testing.assert_close(effective_rank(matrices), torch.tensor([8.0, 0, 1, 4], dtype=torch.float64))


def test_reads_that_are_the_same_for_all_tokens_do_not_vary():
    read = torch.randn(2, 3, 2, 1, 4).expand(2, 3, 2, 5, 4).clone()
    read[:, :, 1] = torch.randn(2, 3, 5, 4)
    found = read_variation(read)
    assert found[0] < 1e-6 and found[1] > 0.7
    assert read_variation(torch.zeros_like(read)).tolist() == [0, 0]


def test_memory_is_float32_under_bfloat16(reset):
    config = small_config("delta", "hard", num_layers=1)
    stage = small_stage(config, precision="bf16")
    hidden, _ = hidden_states(config)
    result = stage.layers["0"].attention(hidden.bfloat16(), random_memory(stage, B)[0], reset)
    assert result.hidden.dtype == torch.bfloat16
    assert all(m.dtype == torch.float32 for m in result.memory)
