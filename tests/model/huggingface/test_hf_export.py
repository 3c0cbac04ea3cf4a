"""The exported modelling code: the same model as the decoder stage, with and without cache, padded or alone."""

import copy

import pytest
import torch

from model.config import RopeScalingConfig
from model.huggingface import describe as hf_describe
from model.huggingface.describe import describe_infini, describe_plain
from model.huggingface.weights import backbone_weights, memory_weight
from tests.model.build import VOCAB, random_tokens, small_config, small_stage

transformers = pytest.importorskip("transformers", reason="the extra `hf` is not installed")

from model.huggingface.exported.cache_infini import InfiniCache  # noqa: E402
from model.huggingface.exported.configuration_infini import InfiniConfig  # noqa: E402
from model.huggingface.exported.modeling_infini import CACHE_NAME, InfiniForCausalLM  # noqa: E402

pytestmark = [pytest.mark.usefixtures("one_process"), pytest.mark.filterwarnings("ignore")]

PAD = VOCAB - 1
SEGMENT = 6
MODELS = {
    "none": small_config("none"),
    "linear": small_config("linear", skip_empty=False, tie_embeddings=False),
    "linear-gated": small_config("linear", "sigmoid"),
    "delta": small_config("delta", num_query_groups=None, kv_channels=8),
    "delta-gated": small_config("delta", "hard", skip_empty=False, num_query_groups=1),
    "deltanet": small_config("deltanet", qkv_bias=True),
    "delta-half-empty": small_config("delta", "hard"),
    "deltanet-blocks": small_config("deltanet", "hard", segment_length=130, num_layers=1),
    "gated_deltanet": small_config("gated_deltanet", "sigmoid"),
    "gated_deltanet-short": small_config("gated_deltanet", segment_length=2, num_query_groups=None),
    "delta_product": small_config("delta_product", "sigmoid", segment_length=20, householders=3),
    "delta_product-one": small_config("delta_product", householders=1, num_layers=1),
    "kda": small_config("kda", "sigmoid", num_query_groups=None),
    "gdn2": small_config("gdn2", segment_length=20),
    "linear-convolution": small_config("linear+convolution", "hard"),
    "deltanet-convolution-short": small_config("deltanet+convolution", segment_length=2),
    "linear-convolution-wide": small_config("linear+wide", "sigmoid", segment_length=4),
    "gated_deltanet-wide": small_config("gated_deltanet+wide"),
    "delta-token-mix": small_config("delta", mix="token"),
    "linear-floor": small_config("linear", floor=0.3),
    "none-sliding": small_config("none", local_context="sliding"),
    "delta-sliding-yarn": small_config(
        "delta",
        "hard",
        local_context="sliding",
        rope_base=100.0,
        rope_scaling=RopeScalingConfig("yarn", 4.0, original_max_position_embeddings=16),
    ),
    "delta-norms-llama3": small_config(
        "delta",
        "sigmoid",
        qk_norm=True,
        rope_scaling=RopeScalingConfig("llama3", 4.0, original_max_position_embeddings=16),
    ),
    "linear-yarn": small_config(
        "linear", rope_base=100.0, rope_scaling=RopeScalingConfig("yarn", 4.0, original_max_position_embeddings=16)
    ),
    "delta-last-layer": small_config("delta+last", "hard", mix="token"),
    "gated_deltanet-last-layer-sliding": small_config("gated_deltanet+sliding+last"),
    "linear-stretched": small_config("linear", rope_scaling=RopeScalingConfig("linear", 3.0)),
}
"""Every rule, gate and part; grouped heads, one group, no groups."""
MODELS["linear-gated"].memory.epsilon = 30.0  # many a read finds less than that


def exported(config, stage) -> InfiniForCausalLM:
    weights = backbone_weights(config, VOCAB)
    tensors = {}
    for name, parameter in stage.named_parameters():
        weight = weights.get(name) or memory_weight(name, parameter.shape)
        tensors |= dict(zip(weight.hf_names, weight.to_hf(parameter.detach()), strict=True))
    model = InfiniForCausalLM(InfiniConfig(**describe_infini(config, VOCAB))).double().eval()
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    assert not unexpected and missing == (["lm_head.weight"] if config.tie_embeddings else [])
    return model


def stage_logits(stage, tokens):
    """Logits `[b, t s, VOCAB]` of the decoder stage for whole segments `[b, t, s]` of one document each."""
    found = []
    hook = stage.final_norm.register_forward_hook(lambda module, inputs, output: found.append(output))
    reset = torch.zeros(tokens.shape[:2], dtype=torch.bool)
    reset[:, 0] = True
    stage(tokens, stage.empty_memory(len(tokens), tokens.device), reset, tokens)
    hook.remove()
    b, t, s = tokens.shape
    logits, _ = stage.output(found[0].detach(), stage.embedding.weight if stage.ties_own_embedding else None)
    return logits.detach()[..., :VOCAB].view(s, b, t, VOCAB).permute(1, 2, 0, 3).flatten(1, 2)


def build(name):
    config = MODELS[name]
    stage = small_stage(config)
    if name == "delta-half-empty":  # the first key/value head never writes: its query heads have no memory to mix in
        for layer in stage.layers.values():
            torch.nn.init.constant_(layer.attention.write_gate.bias[0], -100.0)
    return config, stage, exported(config, stage)


@pytest.fixture
def delta():
    return build("delta-gated")[2]


def padded(rows, side="left"):
    """Rows of unequal lengths in one batch, with the mask."""
    width = max(len(row) for row in rows)
    tokens, mask = torch.full((len(rows), width), PAD), torch.zeros(len(rows), width, dtype=torch.long)
    for i, row in enumerate(rows):
        own = slice(width - len(row), width) if side == "left" else slice(len(row))
        tokens[i, own], mask[i, own] = row, 1
    return tokens, mask


@torch.no_grad()
def greedy(model, tokens, count):
    """Greedy decoding that computes everything anew for every token."""
    for _ in range(count):
        tokens = torch.cat([tokens, model(tokens, use_cache=False).logits[:, -1:].argmax(dim=-1)], dim=1)
    return tokens


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_logits_are_the_decoders(name):
    """Over many segments, in one call and in calls that end anywhere."""
    config, stage, model = build(name)
    segments = 5
    tokens = random_tokens(2, segments, config.segment_length)
    expected = stage_logits(stage, tokens)
    tokens = tokens.flatten(1)
    torch.testing.assert_close(model(tokens).logits, expected, rtol=1e-9, atol=1e-9)
    cache, parts, start = InfiniCache(model.config), [], 0
    for stop in (1, 2, tokens.shape[1] // 3 + 1, tokens.shape[1] // 2, tokens.shape[1] - 1, tokens.shape[1]):
        parts.append(model(tokens[:, start:stop], past_key_values=cache).logits)
        start = stop
    assert cache.get_seq_length() == tokens.shape[1]
    torch.testing.assert_close(torch.cat(parts, dim=1), expected, rtol=1e-9, atol=1e-9)


def test_gradients_are_the_decoders():
    """Through the memory of several segments."""
    config, stage, model = build("delta-norms-llama3")
    tokens, labels = random_tokens(1, 4, SEGMENT), random_tokens(1, 4, SEGMENT, seed=1)
    reset = torch.tensor([[True, False, False, False]])
    stage(tokens, stage.empty_memory(1, tokens.device), reset, labels).token_loss.mean().backward()
    logits = model(tokens.flatten(1)).logits
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()).backward()
    found = dict(model.named_parameters())
    weights = backbone_weights(config, VOCAB)
    for name, parameter in stage.named_parameters():
        weight = weights.get(name) or memory_weight(name, parameter.shape)
        for hf_name, gradient in zip(weight.hf_names, weight.to_hf(parameter.grad), strict=True):
            torch.testing.assert_close(found[hf_name].grad, gradient, rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_loss_is_that_of_the_next_token(delta):
    tokens = random_tokens(2, 20)
    labels = tokens.clone()
    labels[0, :5] = -100
    losses = torch.nn.functional.cross_entropy(
        delta(tokens).logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="mean"
    )
    torch.testing.assert_close(delta(tokens, labels=labels).loss.double(), losses, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_padded_rows_are_as_they_are_alone(delta, side):
    rows = [random_tokens(n, seed=n) for n in (30, 17, 12, 3)]
    logits = delta(*padded(rows, side)).logits
    for row, found in zip(rows, logits, strict=True):
        own = found[-len(row) :] if side == "left" else found[: len(row)]
        torch.testing.assert_close(own, delta(row[None]).logits[0], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["none", "linear-gated", "delta-gated", "deltanet", "gated_deltanet", "none-sliding"])
@torch.no_grad()
def test_greedy_generation_is_a_full_recomputation(name):
    model = build(name)[2]
    rows = [random_tokens(n, seed=n) % PAD for n in (31, 18, 6, 4)]
    expected = [greedy(model, row[None], 20)[0] for row in rows]
    settings = {"max_new_tokens": 20, "do_sample": False, "pad_token_id": PAD}
    for row, wanted in zip(rows, expected, strict=True):
        assert torch.equal(model.generate(row[None], **settings)[0], wanted)
    tokens, mask = padded(rows)
    for row, wanted in zip(model.generate(tokens, attention_mask=mask, **settings), expected, strict=True):
        assert torch.equal(row[-20:], wanted[-20:])


@torch.no_grad()
def test_beams_carry_their_own_memory(delta):
    """A beam search with cache finds what one without finds."""
    tokens, mask = padded([random_tokens(n, seed=n) % PAD for n in (14, 9)])
    settings = {"attention_mask": mask, "max_new_tokens": 14, "num_beams": 3, "do_sample": False, "pad_token_id": PAD}
    with_cache = delta.generate(tokens, **settings)
    assert torch.equal(with_cache, delta.generate(tokens, use_cache=False, **settings))


@torch.no_grad()
def test_a_cache_answers_several_questions(delta):
    document = random_tokens(1, 40, seed=1) % PAD
    cache = InfiniCache(delta.config)
    delta(document, past_key_values=cache, logits_to_keep=1)
    for seed in (2, 3):
        question = random_tokens(1, 5, seed=seed) % PAD
        found = delta.generate(
            question,
            past_key_values=copy.deepcopy(cache),
            attention_mask=torch.ones(1, 45, dtype=torch.long),
            max_new_tokens=10,
            do_sample=False,
            pad_token_id=PAD,
        )
        assert torch.equal(found[0, 5:], greedy(delta, torch.cat([document, question], dim=1), 10)[0, 45:])


@torch.no_grad()
def test_the_cache_does_not_grow(delta):
    cache, sizes = InfiniCache(delta.config), []
    for seed in range(6):
        delta(random_tokens(2, 4 * SEGMENT + 2, seed=seed), past_key_values=cache)
        layer = cache.layers[0]
        sizes.append([x.numel() for x in (*layer.memory, layer.keys, layer.values, layer.numbers)])
    assert sizes[0] == sizes[3] and sizes[2] == sizes[5]
    assert all(x <= 2 * 24 * SEGMENT or x <= 2 * 36 for x in sizes[-1])


@torch.no_grad()
def test_last_logits_alone(delta):
    tokens, mask = padded([random_tokens(n, seed=n) for n in (30, 17, 1)])
    assert torch.equal(delta(tokens, mask, logits_to_keep=2).logits, delta(tokens, mask).logits[:, -2:])


@torch.no_grad()
def test_embeddings_in_place_of_tokens(delta):
    tokens = random_tokens(2, 20)
    embedded = delta.get_input_embeddings()(tokens)
    assert torch.equal(delta(inputs_embeds=embedded).logits, delta(tokens).logits)


@torch.no_grad()
def test_the_cache_has_two_names(delta):
    tokens = random_tokens(2, 20)
    old, new = InfiniCache(delta.config), InfiniCache(delta.config)
    for columns in (tokens[:, :9], tokens[:, 9:]):
        left, right = delta(columns, past_key_values=old), delta(columns, cache=new)
        assert torch.equal(left.logits, right.logits)
        assert right[CACHE_NAME] is new


def test_what_cannot_be_followed_is_refused(delta):
    tokens = random_tokens(2, 8)
    with pytest.raises(ValueError, match="position_ids"):
        delta(tokens, position_ids=torch.arange(8)[None])
    with pytest.raises(ValueError, match="DynamicCache"):
        delta(tokens, past_key_values=transformers.DynamicCache())
    with pytest.raises(ValueError, match="only padding"):
        delta(tokens, attention_mask=torch.ones(2, 1, 8, 8))
    with pytest.raises(ValueError, match="output_attentions"):
        delta(tokens, output_attentions=True)
    with pytest.raises(ValueError, match="cannot go back"):
        InfiniCache(delta.config).crop(1)
    with pytest.raises(ValueError, match="stateful"):
        delta.generate(tokens[:1], assistant_model=delta, max_new_tokens=4)
    with pytest.raises(ValueError, match="no tokens"):
        delta(tokens, attention_mask=torch.zeros_like(tokens))
    cache = InfiniCache(delta.config)
    delta(tokens, past_key_values=cache)
    with pytest.raises(ValueError, match="give either past_key_values or cache"):
        delta(tokens, past_key_values=cache, cache=cache)
    with pytest.raises(ValueError, match="cache of 2"):
        delta(tokens[:1], past_key_values=cache)


def test_unknown_parts_are_refused(monkeypatch):
    config = small_config("delta")
    config.memory.rule = "hopfield"
    with pytest.raises(ValueError, match="hopfield"):
        describe_infini(config, VOCAB)
    with monkeypatch.context() as patch:  # as a setting is that the exported code has never heard of
        patch.setattr(hf_describe, "MEMORY_SETTINGS", ("rule", "write_gate", "mix_gate"))
        describe_infini(small_config("linear"), VOCAB)
        with pytest.raises(ValueError, match="model.memory.gate_floor = 0.3"):
            describe_infini(small_config("linear", floor=0.3), VOCAB)
    with pytest.raises(ValueError, match="model.local_context = both"):
        describe_infini(small_config("delta", local_context="both"), VOCAB)
    described = describe_infini(small_config("delta"), VOCAB) | {"memory_rule": "hopfield"}
    with pytest.raises(ValueError, match="hopfield"):
        InfiniForCausalLM(InfiniConfig(**described))
    with pytest.raises(ValueError, match="qk_norm"):
        describe_plain(small_config("none", qkv_bias=True, qk_norm=True), VOCAB)


@torch.no_grad()
def test_the_memory_is_float32_in_a_bfloat16_model(delta):
    """Loaded the way users load it: what a cast would lose (small writes to a large z) is kept."""
    model = copy.deepcopy(delta).to(torch.bfloat16)
    cache = InfiniCache(model.config)
    logits = model(random_tokens(1, 15), past_key_values=cache).logits
    assert logits.dtype == torch.bfloat16 and logits.isfinite().all()
    layer = cache.layers[0]
    assert layer.keys.dtype == torch.bfloat16 and {x.dtype for x in layer.memory} == {torch.float32}
