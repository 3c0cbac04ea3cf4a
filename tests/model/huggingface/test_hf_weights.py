"""Hugging Face's tensors and ours: one is the other, and the model they make is the same."""

from __future__ import annotations

import contextlib

import pytest
import torch

from model.config import MemoryConfig, ModelConfig, RopeScalingConfig
from model.decoder import DecoderStage
from model.huggingface.weights import backbone_weights, join_qkv, memory_weight, split_qkv
from model.layers.decoder_layer import StageOptions

transformers = pytest.importorskip("transformers", reason="the extra `hf` is not installed")

pytestmark = pytest.mark.usefixtures("one_process")

VOCAB, LENGTH = 50, 40
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4 * LENGTH,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
LINEAR = {"rope_type": "linear", "rope_theta": 1000.0, "factor": 2.5}
YARN = {"rope_type": "yarn", "rope_theta": 1000.0, "factor": 4.0, "original_max_position_embeddings": 40}
FAMILIES = {
    "llama": ("Llama", {}, {}),
    "llama-tied-one-group": ("Llama", {"tie_word_embeddings": True, "num_key_value_heads": 1}, {}),
    "llama-llama3": ("Llama", {"rope_parameters": LLAMA3}, {}),
    "llama-linear": ("Llama", {"rope_parameters": LINEAR}, {}),
    "llama-yarn": ("Llama", {"rope_parameters": YARN}, {}),
    "mistral-wide-heads": ("Mistral", {"head_dim": 12, "sliding_window": None}, {}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}, {"qkv_bias": True}),
    "qwen3": ("Qwen3", {"head_dim": 16}, {"qk_norm": True}),
}


def hf_model(family: str):
    """A random model with weights far from zero, everything in float64 (see `in_double`)."""
    kind, changes, _ = FAMILIES[family]
    config = getattr(transformers, f"{kind}Config")(**SIZES | changes)
    config._attn_implementation = "sdpa"  # the eager form takes its softmax in float32
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}ForCausalLM")(config).double().eval()
    for name, parameter in model.named_parameters():
        with torch.no_grad():
            parameter.add_(torch.randn_like(parameter) * (0.3 if parameter.dim() == 1 else 0.1))
        assert parameter.dtype == torch.float64, name
    return model


@contextlib.contextmanager
def in_double(model):
    """transformers computes norms and rotary tables in float32 whatever the weights are: let it take float64 there."""
    rotary, config = model.model.rotary_emb, model.config
    kind = config.rope_parameters["rope_type"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "float", torch.float64)
        patch.setattr(torch, "float32", torch.float64)
        make = rotary.compute_default_rope_parameters
        if kind != "default":
            make = transformers.modeling_rope_utils.ROPE_INIT_FUNCTIONS[kind]
        frequency, size = make(config)
        assert frequency.dtype == torch.float64

        def table(x, position_ids):
            angle = position_ids[..., None].double() * frequency
            angle = torch.cat([angle, angle], dim=-1)
            return angle.cos() * size, angle.sin() * size

        patch.setattr(rotary, "forward", table)
        yield


def our_config(model, family: str, **changes) -> ModelConfig:
    hf = model.config
    rope = {name: value for name, value in hf.rope_parameters.items() if name not in ("rope_type", "rope_theta")}
    kind = hf.rope_parameters["rope_type"]
    settings = {
        "num_layers": hf.num_hidden_layers,
        "hidden_size": hf.hidden_size,
        "num_attention_heads": hf.num_attention_heads,
        "num_query_groups": hf.num_key_value_heads,
        "kv_channels": getattr(hf, "head_dim", None),
        "ffn_hidden_size": hf.intermediate_size,
        "vocab_size": VOCAB,
        "vocab_size_multiple": 16,
        "tie_embeddings": hf.tie_word_embeddings,
        "segment_length": LENGTH,
        "rope_base": hf.rope_parameters["rope_theta"],
        "rope_scaling": RopeScalingConfig(type="none" if kind == "default" else kind, **rope),
        "norm_epsilon": hf.rms_norm_eps,
        "memory": MemoryConfig(rule="delta"),
        **FAMILIES[family][2],
    }
    return ModelConfig(**settings | changes)


def our_stage(config: ModelConfig, hf_tensors) -> DecoderStage:
    stage = DecoderStage(
        config,
        StageOptions(precision="fp64"),
        vocab_size=VOCAB,
        first_layer=0,
        last_layer=config.num_layers,
        tensor_rank=0,
        tensor_size=1,
    )
    stage.initialize(0)
    weights = backbone_weights(config, VOCAB)
    for name, parameter in stage.global_parameters():
        if name in weights:
            parts = [hf_tensors[hf_name] for hf_name in weights[name].hf_names]
            assert tuple(tuple(part.shape) for part in parts) == weights[name].hf_shapes
            whole = weights[name].from_hf(parts)
            assert tuple(whole.shape) == tuple(parameter.shape) == weights[name].shape, name
            with torch.no_grad():
                parameter.copy_(whole)
        else:
            assert name.endswith(".beta"), name
    return stage


def our_logits(stage: DecoderStage, tokens: torch.Tensor) -> torch.Tensor:
    """Log-probabilities `[t, s, vocabulary]` of one lane."""
    memory = stage.empty_memory(1, tokens.device)
    reset = torch.tensor([[True] + [False] * (len(tokens) - 1)])
    losses = [
        stage(tokens[None], memory, reset, torch.full_like(tokens[None], label)).token_loss[0] for label in range(VOCAB)
    ]
    return -torch.stack(losses, dim=-1)


@pytest.mark.parametrize("family", FAMILIES)
def test_first_segment_is_the_hugging_face_model(family):
    """Grouped queries, padded vocabulary (50 tokens in 64 rows), every rope: to 1e-9 in float64."""
    model = hf_model(family)
    tokens = torch.randint(0, VOCAB, (1, LENGTH), generator=torch.Generator().manual_seed(1))
    with in_double(model), torch.no_grad():
        expected = model(tokens).logits[0].log_softmax(dim=-1)
    stage = our_stage(our_config(model, family), model.state_dict())
    with torch.no_grad():
        found = our_logits(stage, tokens)[0]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)


def test_rope_scaling_matters():
    """The comparison above would notice a scaling that is ignored."""
    model = hf_model("llama-llama3")
    tokens = torch.randint(0, VOCAB, (1, LENGTH), generator=torch.Generator().manual_seed(1))
    config = our_config(model, "llama-llama3")
    with torch.no_grad():
        scaled = our_logits(our_stage(config, model.state_dict()), tokens)
        config.rope_scaling = RopeScalingConfig()
        plain = our_logits(our_stage(config, model.state_dict()), tokens)
    assert (scaled - plain).abs().max() > 1e-3


@pytest.mark.parametrize("family", FAMILIES)
def test_every_tensor_comes_back(family):
    tensors = hf_model(family).state_dict()
    if FAMILIES[family][1].get("tie_word_embeddings"):
        tensors.pop("lm_head.weight")
    weights = backbone_weights(our_config(hf_model(family), family), VOCAB)
    back = {}
    for weight in weights.values():
        ours = weight.from_hf([tensors[name] for name in weight.hf_names])
        back |= dict(zip(weight.hf_names, weight.to_hf(ours), strict=True))
    assert back.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(back[name], tensor), name


def test_qkv_rows_go_by_key_value_head():
    """Two key/value heads of dim 1 with two query heads each: q0 q1 k0 v0, then q2 q3 k1 v1."""
    query, key, value = torch.tensor([[0], [1], [2], [3]]), torch.tensor([[10], [11]]), torch.tensor([[20], [21]])
    whole = join_qkv(query, key, value, groups=2, dim=1)
    assert whole.flatten().tolist() == [0, 1, 10, 20, 2, 3, 11, 21]
    for part, other in zip(split_qkv(whole, heads=4, groups=2, dim=1), (query, key, value), strict=True):
        assert torch.equal(part, other)


def test_the_memory_has_names_of_its_own():
    weight = memory_weight("layers.3.attention.write_gate.bias", (8,))
    assert weight.hf_names == ("model.layers.3.self_attn.memory.write_gate.bias",)
    assert weight.shape == (8,)
    with pytest.raises(ValueError, match="mlp_norm"):
        memory_weight("layers.3.mlp_norm.weight", (8,))
