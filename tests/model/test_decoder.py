"""The decoder stage: equal to a dense model, causal, no leak between documents, gradients cut where they should be."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from data.lanes.loader import LaneLoader
from data.lanes.schedule import WeightedSet
from model.config import QK_INITS
from model.decoder import split_layers
from model.rules import RULES
from model.sharding import padded_vocab_size
from tests.model import naive
from tests.model.build import VOCAB, random_memory, random_tokens, small_config, small_stage

pytestmark = pytest.mark.usefixtures("one_process")

COMBINED = ("delta+sliding", "gated_deltanet+sliding", "deltanet+convolution", "linear+convolution+sliding")
COMBINED += ("gated_deltanet+wide",)
SOME_LAYERS = ("delta+last", "gated_deltanet+sliding+last")
MEMORY_RULES = (*(name for name in RULES if name != "none"), *COMBINED)
B, T = 2, 4


def starts(*segments, t=T, b=1):
    reset = torch.zeros(b, t, dtype=torch.bool)
    for segment in segments:
        reset[:, segment] = True
    return reset


@pytest.mark.parametrize("qwen", [False, True], ids=["llama", "bias-norms"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("rule", [*RULES, "none+sliding", *COMBINED, *SOME_LAYERS])
def test_model_is_the_dense_model(rule, tied, qwen):
    family = {"qkv_bias": qwen, "qk_norm": qwen}
    config = small_config(rule, "none" if rule.startswith("none") else "sigmoid", tie_embeddings=tied, **family)
    stage = small_stage(config)
    tokens, labels = (random_tokens(B, T, config.segment_length, seed=seed) for seed in (0, 1))
    reset = torch.tensor([[False, False, True, False], [True, False, False, False]])
    memory = random_memory(stage, B)
    output = stage(tokens, memory, reset, labels, correct=True)
    weights = dict(stage.named_parameters())
    expected = []
    for lane in range(B):
        carried = [None if state is None else [m[lane] for m in state] for state in memory]
        losses, after = naive.token_losses(config, weights, tokens[lane], carried, reset[lane], labels[lane])
        expected.append(losses)
        for state, other in zip(output.memory, after, strict=True):
            torch.testing.assert_close([m[lane] for m in state or ()], other, rtol=1e-10, atol=1e-10)
    expected = torch.stack(expected)
    torch.testing.assert_close(output.token_loss, expected, rtol=1e-10, atol=1e-10)
    found = torch.autograd.grad(output.token_loss.sum(), list(weights.values()))
    wanted = torch.autograd.grad(expected.sum(), list(weights.values()))
    for name, gradient, other in zip(weights, found, wanted, strict=True):
        torch.testing.assert_close(gradient, other, rtol=1e-10, atol=1e-10, msg=lambda m, name=name: f"{name}: {m}")


def test_correct_says_what_greedy_decoding_gives():
    config = small_config()
    stage = small_stage(config)
    tokens = random_tokens(B, T, config.segment_length)
    reset, memory = starts(0, b=B), stage.empty_memory(B, tokens.device)
    losses = [
        stage(tokens, memory, reset, torch.full_like(tokens, label)).token_loss for label in range(stage.vocab_size)
    ]
    best = torch.stack(losses).argmin(dim=0)
    labels = torch.where(torch.rand(best.shape, generator=torch.Generator().manual_seed(0)) < 0.5, best, tokens)
    hits = stage(tokens, memory, reset, labels, correct=True).token_correct
    assert torch.equal(hits, labels == best)
    assert hits.any() and not hits.all()


@pytest.mark.parametrize("rule", RULES)
def test_changing_a_token_changes_nothing_before_it(rule):
    """Bit for bit, and everything from the token on does change, through the memory in later segments."""
    config = small_config(rule, num_layers=3)
    stage = small_stage(config)
    length = config.segment_length
    tokens, labels = random_tokens(1, T, length), random_tokens(1, T, length, seed=1)
    memory = random_memory(stage, 1)
    before = stage(tokens, memory, starts(), labels).token_loss.flatten()
    for position in (0, 1, length - 1, length, 2 * length + 3, T * length - 1):
        changed = tokens.flatten().clone()
        changed[position] = (changed[position] + 7) % VOCAB
        after = stage(changed.view_as(tokens), memory, starts(), labels).token_loss.flatten()
        assert torch.equal(after[:position], before[:position]), position
        different = after != before
        end = (position // length + 1) * length
        assert different[position:end].all()
        assert different[end:].all() if rule != "none" else not different[end:].any()


@pytest.mark.parametrize("precision", ["fp32", "fp64"])
@pytest.mark.parametrize("rule", [*RULES, "none+sliding", *COMBINED])
def test_document_before_does_not_leak(rule, precision):
    """A document's losses and memory, bit for bit, whatever stood in the lane before: in this window and earlier."""
    config = small_config(rule)
    stage = small_stage(config, precision=precision)
    tokens, labels = random_tokens(1, T, config.segment_length), random_tokens(1, T, config.segment_length, seed=1)
    other = random_tokens(1, T, config.segment_length, seed=2)
    packed = torch.cat([other[:, :2], tokens[:, 2:]], dim=1)
    results = [
        stage(window, random_memory(stage, 1, seed), starts(2), labels)
        for seed, window in ((3, tokens), (4, packed), (5, packed))
    ]
    for result in results[1:]:
        assert torch.equal(result.token_loss[:, 2:], results[0].token_loss[:, 2:])
        assert all(
            torch.equal(x, y)
            for a, b in zip(result.memory, results[0].memory, strict=True)
            if a is not None
            for x, y in zip(a, b, strict=True)
        )
    assert not torch.equal(results[1].token_loss[:, :2], results[0].token_loss[:, :2])


@pytest.mark.parametrize("rule", SOME_LAYERS)
def test_a_layer_without_a_memory_has_and_carries_nothing_of_one(rule):
    config = small_config(rule, "hard", mix="token", num_layers=3)
    stage, plain = small_stage(config), small_stage(small_config("none"))
    own = [name for name, _ in stage.layers["1"].named_parameters()]
    assert own == [name for name, _ in plain.layers["1"].named_parameters()]
    kept = [state is not None and hasattr(state, "M") for state in stage.empty_memory(B, torch.device("cpu"))]
    assert kept == [False, False, True]
    tokens = random_tokens(B, T, config.segment_length)
    output = stage(tokens, random_memory(stage, B), starts(b=B), tokens, statistics=True)
    assert list(output.statistics) == [2]


class Documents:
    """A prepared set in memory."""

    path, split, eos_id, tokenizer_hash = "memory", "train", 0, "none"

    def __init__(self, documents):
        self.documents = [document.numpy() for document in documents]
        self.lengths = np.array([len(document) for document in documents])

    def __len__(self):
        return len(self.documents)

    def read(self, i, start, stop):
        return self.documents[i][start:stop]

    def answers(self, i):
        return []

    def questions(self, i):
        return []

    def document_name(self, i):
        return f"document {i}"


def losses_in_a_lane(stage, documents, *, segments_per_window, windows):
    """Carry the memory through a lane of the documents, window by window: losses by the document's own tokens."""
    loader = LaneLoader(
        [WeightedSet(Documents(documents), 1.0, 1.0)],
        lanes=1,
        first_lane=0,
        last_lane=1,
        segments_per_window=segments_per_window,
        segment_length=stage.config.segment_length,
        seed=0,
        stagger=False,
        prefetch=0,
    )
    memory = stage.empty_memory(1, torch.device("cpu"))
    found = []
    for _ in range(windows):
        batch = loader.next_batch()
        with torch.no_grad():
            output = stage(batch.tokens, memory, batch.reset, batch.labels)
        memory = output.memory
        for segment in range(segments_per_window):
            if batch.reset[0, segment]:
                found.append(([], []))
            text = batch.loss_weight[0, segment] > 0
            found[-1][0].extend(batch.tokens[0, segment, text].tolist())
            found[-1][1].extend(output.token_loss[0, segment, text].tolist())
    return {tuple(tokens): losses for tokens, losses in found}


@pytest.mark.parametrize("rule", MEMORY_RULES)
def test_document_has_the_same_losses_alone_and_among_others(rule):
    """Through the lane loader, with documents that start in the middle of windows and go on in the next."""
    stage = small_stage(small_config(rule))
    length = stage.config.segment_length
    documents = [random_tokens(n, seed=n) for n in (5 * length + 3, 2 * length, 9 * length - 1)]
    together = losses_in_a_lane(stage, documents, segments_per_window=4, windows=8)
    for document in documents:
        alone = losses_in_a_lane(stage, [document], segments_per_window=3, windows=4)
        text = tuple(document[:-1].tolist())
        assert together[text] == pytest.approx(alone[text], rel=1e-12)


@pytest.mark.parametrize("chunks", [1, 2, 4])
@pytest.mark.parametrize("rule", MEMORY_RULES)
def test_window_in_parts_is_the_window(rule, chunks):
    """Memory is all that a chunk needs of the chunks before it."""
    stage = small_stage(small_config(rule))
    tokens, labels = random_tokens(B, T, 6), random_tokens(B, T, 6, seed=1)
    reset = torch.tensor([[False, True, False, False], [True, False, False, True]])
    memory = random_memory(stage, B)
    whole = stage(tokens, memory, reset, labels)
    losses = []
    for part in torch.arange(T).chunk(chunks):
        output = stage(tokens[:, part], memory, reset[:, part], labels[:, part])
        memory = output.memory
        losses.append(output.token_loss)
    torch.testing.assert_close(torch.cat(losses, dim=1), whole.token_loss, rtol=1e-12, atol=1e-12)
    for state, other in zip(memory, whole.memory, strict=True):
        torch.testing.assert_close(list(state), list(other), rtol=1e-12, atol=1e-12)


def test_without_labels_the_memory_is_the_same_and_the_last_mlp_is_left_out():
    stage = small_stage(small_config("delta", "hard"))
    tokens = torch.randint(0, VOCAB, (2, 3, stage.config.segment_length), generator=torch.Generator().manual_seed(1))
    reset = torch.zeros(2, 3, dtype=torch.bool)
    ran = []
    for name, layer in stage.layers.items():
        layer.mlp.register_forward_hook(lambda *_, name=name: ran.append(name))
    memory = random_memory(stage, 2)
    with torch.no_grad():
        full, short = stage(tokens, memory, reset, tokens), stage(tokens, memory, reset)
    assert ran == ["0", "1", "0"]
    assert short.token_loss is None
    for state, expected in zip(short.memory, full.memory, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(state, expected, strict=True))


@pytest.mark.parametrize("recompute", ["none", "selective", "layer"])
@pytest.mark.parametrize("detached", [False, True], ids=["full", "detached"])
@pytest.mark.parametrize("rule", MEMORY_RULES)
def test_truncation_is_real(rule, detached, recompute):
    """Gradient of a later segment's loss with respect to what enters the layers for an earlier one."""
    config = small_config(rule, "hard", num_layers=3)
    stage = small_stage(config, first=1, detach_reads=detached, recompute=recompute)  # takes hidden states
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(6, T, 24, generator=generator, dtype=torch.float64).requires_grad_()
    labels = random_tokens(1, T, 6)
    memory = random_memory(stage, 1)
    output = stage(hidden, memory, starts(1), labels)
    output.token_loss[0, 3].sum().backward()
    reached = hidden.grad.abs().amax(dim=(0, 2)) > 0
    assert reached.tolist() == ([False, False, False, True] if detached else [False, True, True, True])
    # What writes the memory learns from later reads alone.
    written = stage.layers["1"].attention.write_gate.weight.grad
    assert (written is None or not written.any()) if detached else written.any()
    assert all(m.grad is None or not m.grad.any() for state in memory for m in state)  # before the reset


def test_gradient_reaches_the_memory_carried_in():
    """What lets chunks hand d(memory) to one another."""
    stage = small_stage(small_config("delta"), first=1, last=2)
    memory = random_memory(stage, 1)
    hidden = torch.randn(6, T, 24, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    stage(hidden, memory, starts(), random_tokens(1, T, 6)).token_loss[0, 3].sum().backward()
    assert all(m.grad.any() for state in memory for m in state)


@pytest.mark.parametrize("recompute", ["none", "selective", "layer"])
def test_a_recomputation_does_not_measure_again(recompute, monkeypatch):
    measured = []
    monkeypatch.setattr(
        "model.layers.statistics.effective_rank", lambda M: measured.append(1) or M.new_ones(M.shape[:2])
    )
    stage, tokens = small_stage(small_config(), recompute=recompute), random_tokens(B, T, 6)
    for _ in range(2):  # what a recomputation switches off is on again
        output = stage(tokens, random_memory(stage, B), starts(b=B), tokens, statistics=True)
        output.token_loss.sum().backward()
    assert len(measured) == 2 * stage.config.num_layers and set(output.statistics) == {0, 1}


@pytest.mark.parametrize("recompute", ["selective", "layer"])
@pytest.mark.parametrize("rule", MEMORY_RULES)
def test_recomputation_changes_no_number(rule, recompute):
    """Memory hidden in a module would be written twice, with the loss right and the gradient wrong."""
    results = []
    for mode in ("none", recompute):
        stage = small_stage(small_config(rule, "hard"), recompute=mode)
        memory = random_memory(stage, B)
        output = stage(random_tokens(B, T, 6), memory, starts(2, b=B), random_tokens(B, T, 6, seed=1))
        (output.token_loss.sum() + output.gate_sum + sum(m.sum() for state in output.memory for m in state)).backward()
        gradients = [parameter.grad for parameter in stage.parameters()]
        carried = [m.grad for state in memory for m in state if m.grad is not None]
        results.append([output.token_loss, *gradients, *carried])
    assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))


def test_initial_values_depend_on_seed_and_name_alone():
    config = small_config("delta", "hard")
    whole = dict(small_stage(config, scramble=False).global_parameters())
    last = small_stage(config, scramble=False, first=1)
    copies = dict(last.global_parameters())
    assert last.holds_embedding_copy and set(copies) == {n for n in whole if not n.startswith("layers.0.")}
    assert all(torch.equal(parameter, whole[name]) for name, parameter in copies.items())
    other = small_stage(config, scramble=False)
    other.initialize(1)
    drawn = {n for n, p in other.global_parameters() if not torch.equal(p, whole[n])}
    # The rest starts at a constant: norms, beta, and a write gate that is open for every token.
    assert {n.split(".")[-2] for n in drawn} == {"embedding", "qkv", "projection", "linear_fc1", "linear_fc2"}
    scale = {name: float(p.detach().std()) for name, p in whole.items()}
    assert scale["layers.1.attention.qkv.weight"] == pytest.approx(0.02, rel=0.1)
    assert scale["layers.1.mlp.linear_fc2.weight"] == pytest.approx(0.02 / 4**0.5, rel=0.15)


def convolved(x, taps):
    """SiLU of torch's own causal depthwise convolution of `[..., s, d]`, taps `[..., d, 4]`."""
    channels = x.transpose(-1, -2).flatten(0, -2)
    summed = F.conv1d(F.pad(channels, (3, 0)), taps.reshape(-1, 1, 4), groups=len(channels))
    return F.silu(summed).view(*x.shape[:-2], x.shape[-1], -1).transpose(-1, -2)


@pytest.mark.parametrize("rule", ["deltanet", "deltanet+convolution", "gated_deltanet"])
def test_tied_keys_and_queries_recall_before_training(rule):
    """Places that follow the same tokens match best; drawn independently, they do no better than any others."""
    config = small_config(rule, hidden_size=128, segment_length=64)
    default = dict(small_stage(config, scramble=False).named_parameters())
    matched = {}
    for qk_init in QK_INITS:
        stage = small_stage(replace(config, qk_init=qk_init), scramble=False, last=1)
        changed = {name for name, value in stage.global_parameters() if not torch.equal(value, default[name])}
        assert changed <= {"layers.0.attention.qkv.weight", "layers.0.attention.memory_convolution"}
        assert bool(changed) == (qk_init == "tied")
        attention = stage.layers["0"].attention
        # Four tokens, twice, with others between them: the second time asks for the first.
        generator = torch.Generator().manual_seed(0)
        hidden = torch.randn(64, 1, 128, generator=generator, dtype=torch.float64)
        hidden[40:44] = hidden[9:13]
        groups, ratio, dim = attention.groups, attention.heads // attention.groups, attention.dim
        qkv = attention.qkv(hidden)[0].view(64, groups, ratio + 2, dim).permute(1, 2, 0, 3)
        query, key = qkv[:, :ratio], qkv[:, ratio]
        if rule != "deltanet":
            taps = attention.memory_convolution.view(groups, ratio + 2, dim, 4)
            query, key = convolved(query, taps[:, :ratio]), convolved(key, taps[:, ratio])
        scores = torch.einsum("grd,gsd->grs", F.normalize(query[:, :, 43], dim=-1), F.normalize(key[:, :40], dim=-1))
        matched[qk_init] = float((scores.argmax(dim=-1) == 12).double().mean())
    assert matched == {"independent": pytest.approx(0, abs=0.3), "tied": 1.0}


@pytest.mark.parametrize(
    ("layers", "stages", "explicit", "expected"),
    [
        (4, 1, None, [4]),
        (8, 4, None, [2, 2, 2, 2]),
        (9, 4, None, [2, 3, 2, 2]),
        (10, 4, None, [2, 3, 3, 2]),
        (11, 4, None, [3, 3, 3, 2]),
        (3, 2, None, [2, 1]),
        (4, 2, [1, 3], [1, 3]),
    ],
)
def test_layers_are_split_in_order(layers, stages, explicit, expected):
    bounds = split_layers(layers, stages, explicit)
    assert [stop - start for start, stop in bounds] == expected
    assert [start for start, _ in bounds[1:]] + [layers] == [stop for _, stop in bounds]
    assert bounds[0][0] == 0


def test_vocabulary_is_padded_up():
    assert [padded_vocab_size(n, 64) for n in (1, 64, 65, 257)] == [64, 64, 128, 320]


@pytest.mark.parametrize("rule", [*RULES, "none+sliding", *COMBINED])
def test_probe_reads_what_its_segment_reads_and_writes_nothing(rule):
    """Against a stage without probes: run up to the segment, then the probe's text in its place."""
    config = small_config(rule, "none" if rule.startswith("none") else "sigmoid")
    stage = small_stage(config)
    tokens, labels = (random_tokens(B, 5, config.segment_length, seed=seed) for seed in (0, 1))
    asked, answers = (random_tokens(B, 2, config.segment_length, seed=seed) for seed in (2, 3))
    reset = torch.zeros(B, 5, dtype=torch.bool)
    reset[0, 2] = True
    at = torch.tensor([[1, 3], [2, 4]])
    memory = random_memory(stage, B)
    both, every_label = torch.cat([tokens, asked], dim=1), torch.cat([labels, answers], dim=1)
    with torch.no_grad():
        found = stage(both, memory, reset, every_label, probes=at)
        plain = stage(tokens, memory, reset, labels)
        for lane in range(B):
            for probe, segment in enumerate(at[lane].tolist()):
                before = stage(tokens[:, :segment], memory, reset[:, :segment]).memory
                text, label = asked[:, probe : probe + 1], answers[:, probe : probe + 1]
                expected = stage(text, before, reset[:, segment : segment + 1], label).token_loss[lane, 0]
                torch.testing.assert_close(found.token_loss[lane, 5 + probe], expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(found.token_loss[:, :5], plain.token_loss, rtol=1e-10, atol=1e-10)
    for state, other in zip(found.memory, plain.memory, strict=True):
        torch.testing.assert_close(state, other, rtol=1e-10, atol=1e-10)
