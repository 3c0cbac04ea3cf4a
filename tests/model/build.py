"""Small models and inputs for the tests, with weights large enough that every part matters."""

import torch

from model.config import MemoryConfig, ModelConfig
from model.decoder import DecoderStage
from model.layers.decoder_layer import StageOptions

VOCAB = 40


def small_config(
    rule="delta", gate="none", *, skip_empty=True, beta=0.0, mix="head", floor=0.0, householders=2, **changes
) -> ModelConfig:
    """`rule` may be `delta+sliding`, with a sliding local context, `delta+convolution`, `delta+wide`, with convolutions
    over 8 tokens, `delta+last`, with a memory in the last layer alone, or several of these."""
    rule, *more = rule.split("+")
    assert set(more) <= {"sliding", "convolution", "wide", "last"}, more
    changes = changes | ({"local_context": "sliding"} if "sliding" in more else {})
    memory = MemoryConfig(rule, gate, skip_empty=skip_empty, beta_init=beta, mix_gate=mix, gate_floor=floor)
    memory.num_householder = householders
    if "convolution" in more or "wide" in more:
        memory.short_convolution = True
    if "wide" in more:
        memory.convolution_width = 8
    if "last" in more:
        memory.layers = [changes.get("num_layers", 2) - 1]
    settings = {"num_layers": 2, "hidden_size": 24, "num_attention_heads": 4, "num_query_groups": 2}
    settings |= {"ffn_hidden_size": 20, "segment_length": 6, "vocab_size": VOCAB, "vocab_size_multiple": 16}
    return ModelConfig(**settings | changes, memory=memory)


def small_stage(config: ModelConfig, *, first=0, last=None, scramble=True, context=None, **options) -> DecoderStage:
    """A stage of one process. Scrambled weights are far from their initial values: nothing is near zero or one."""
    stage = DecoderStage(
        config,
        StageOptions(**{"precision": "fp64"} | options),
        vocab_size=VOCAB,
        first_layer=first,
        last_layer=config.num_layers if last is None else last,
        tensor_rank=0,
        tensor_size=1,
        context=context,
    )
    stage.initialize(0)
    if scramble:
        for name, parameter in stage.global_parameters():
            generator = torch.Generator().manual_seed(sum(map(ord, name)))
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            with torch.no_grad():
                parameter.add_(noise * (0.2 if parameter.dim() == 2 else 0.3))
    return stage


def random_memory(stage: DecoderStage, lanes: int, seed: int = 3):
    """A memory that has been written to: positive z, any M. Leaves of the graph."""
    generator = torch.Generator().manual_seed(seed)
    memory = []
    for state in stage.empty_memory(lanes, torch.device("cpu")):
        if state is None:
            memory.append(None)
            continue
        drawn = {name: torch.randn(x.shape, generator=generator, dtype=x.dtype) for name, x in state._asdict().items()}
        if "local_seen" in drawn:
            drawn["local_seen"] = torch.ones_like(drawn["local_seen"])
        if "z" in drawn:
            drawn["z"] = 4 + drawn["z"].abs()
        memory.append(type(state)(**{name: x.requires_grad_() for name, x in drawn.items()}))
    return memory


def random_tokens(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, VOCAB, shape, generator=torch.Generator().manual_seed(seed))
