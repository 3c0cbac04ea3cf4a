"""Generation's way through the model, some tokens at a time, against the window-parallel forward."""

import pytest
import torch

from model.layers.segment_cache import Span
from tests.model.build import VOCAB, small_config, small_stage

pytestmark = pytest.mark.usefixtures("one_process")

CPU = torch.device("cpu")
RULES_AND_GATES = [
    ("none", "none"),
    ("linear", "none"),
    ("delta", "hard"),
    ("deltanet", "none"),
    ("deltanet", "sigmoid"),
    ("gated_deltanet", "none"),
    ("gated_deltanet", "hard"),
    ("delta_product", "hard"),
    ("gdn2", "hard"),
    ("none+sliding", "none"),
    ("gated_deltanet+sliding", "hard"),
    ("linear+convolution", "sigmoid"),
    ("deltanet+convolution+sliding", "none"),
    ("gated_deltanet+wide", "hard"),
]
LENGTHS = [6, 19, 24]
"""Tokens per lane, segments of 6: a whole one, some and a bit, and some whole ones."""


def all_logits(stage, tokens):
    """Logits `[n, vocabulary]` of one lane by the window-parallel forward over padded segments, and the memory."""
    length = stage.config.segment_length
    segments = -(-len(tokens) // length)
    padded = torch.zeros(segments * length, dtype=torch.int64)
    padded[: len(tokens)] = tokens
    reset = torch.zeros(1, segments, dtype=torch.bool)
    reset[0, 0] = True
    captured = []
    hook = stage.final_norm.register_forward_pre_hook(lambda _, inputs: captured.append(inputs[0]))
    labels = torch.zeros(1, segments, length, dtype=torch.int64)
    with torch.no_grad():
        memory = stage(padded.view(1, segments, length), stage.empty_memory(1, CPU), reset, labels).memory
    hook.remove()
    hidden = captured[0].transpose(0, 1).flatten(0, 1)  # [s, t, h] -> [t*s, h]
    return stage.next_token_logits(hidden)[: len(tokens)], memory


def extended_logits(stage, lanes, steps):
    """Logits of every position of every lane, fed `steps[i]` tokens at a time (fewer where a segment or lane ends)."""
    length = stage.config.segment_length
    memory, cache = stage.empty_memory(len(lanes), CPU), stage.empty_cache(len(lanes), CPU)
    done, rows, turn = [0] * len(lanes), [[] for _ in lanes], 0
    while any(d < len(tokens) for d, tokens in zip(done, lanes, strict=True)):
        step = steps[turn % len(steps)]
        turn += 1
        start = [d % length for d in done]
        count = [min(step, length - a, len(t) - d) for a, t, d in zip(start, lanes, done, strict=True)]
        block = torch.zeros(len(lanes), max(count), dtype=torch.int64)
        for i, n in enumerate(count):
            block[i, :n] = lanes[i][done[i] : done[i] + n]
        hidden = stage.extend(block, memory, cache, Span.build(start, count, CPU))
        full = []
        for i, n in enumerate(count):
            rows[i].append(stage.next_token_logits(hidden[:n, i]))
            done[i] += n
            if n and done[i] % length == 0:
                full.append(i)
        if full:
            memory = stage.commit(memory, cache, torch.tensor(full))
    return [torch.cat(r) for r in rows], memory


@pytest.mark.parametrize("precision", ["fp64", "fp32"])
@pytest.mark.parametrize("steps", [(1,), (4, 1, 6)], ids=["single", "pieces"])
@pytest.mark.parametrize(("rule", "gate"), RULES_AND_GATES)
def test_tokens_in_pieces_give_the_numbers_of_the_whole(rule, gate, steps, precision):
    family = {"qkv_bias": True, "qk_norm": True} if gate == "hard" else {}
    stage = small_stage(small_config(rule, gate, beta=0.7, **family), precision=precision)
    generator = torch.Generator().manual_seed(5)
    lanes = [torch.randint(0, VOCAB, (n,), generator=generator) for n in LENGTHS]
    logits, memory = extended_logits(stage, lanes, steps)
    tolerance = {"fp64": 1e-10, "fp32": 2e-4}[precision]
    for i, tokens in enumerate(lanes):
        expected, after = all_logits(stage, tokens)
        torch.testing.assert_close(logits[i], expected, rtol=tolerance, atol=tolerance)
        if len(tokens) % 6:
            continue
        for state, wanted in zip(memory, after, strict=True):
            for x, y in zip(state or (), wanted or (), strict=True):
                torch.testing.assert_close(x[i : i + 1], y, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("mix", ["head", "token"])
def test_mix_gates_in_pieces(mix):
    stage = small_stage(small_config("gated_deltanet", "hard", mix=mix, floor=0.2))
    tokens = torch.randint(0, VOCAB, (19,), generator=torch.Generator().manual_seed(5))
    (logits,), _ = extended_logits(stage, [tokens], (4, 1, 6))
    torch.testing.assert_close(logits, all_logits(stage, tokens)[0], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("rule", ["delta", "delta+sliding"])
@pytest.mark.parametrize("qkv_bias", [False, True])
def test_bfloat16_is_the_forward_in_bfloat16(rule, qkv_bias):
    stage = small_stage(small_config(rule, "hard", beta=0.7, qkv_bias=qkv_bias), precision="bf16")
    tokens = torch.randint(0, VOCAB, (20,), generator=torch.Generator().manual_seed(5))
    (logits,), _ = extended_logits(stage, [tokens], (4, 1, 6))
    expected, _ = all_logits(stage, tokens)
    logits, expected = logits[:, :VOCAB], expected[:, :VOCAB]  # the rest is padding, at minus infinity
    assert (logits - expected).norm() < 0.02 * expected.norm()


def test_a_lane_does_not_see_another():
    stage = small_stage(small_config("delta", "hard", beta=0.7))
    generator = torch.Generator().manual_seed(5)
    lanes = [torch.randint(0, VOCAB, (n,), generator=generator) for n in LENGTHS]
    together, _ = extended_logits(stage, lanes, (4, 1, 6))
    lanes[0], lanes[2] = lanes[0].flip(0), lanes[2].flip(0)
    others, _ = extended_logits(stage, lanes, (4, 1, 6))
    torch.testing.assert_close(together[1], others[1], rtol=0, atol=1e-13)
    assert (together[0] - others[0])[:, :VOCAB].abs().max() > 0.1
