"""Configuration of a Llama-style decoder with Infini-attention (arXiv 2404.07143)."""

from transformers import PreTrainedConfig


class InfiniConfig(PreTrainedConfig):
    """Field by field what `config.json` holds; the memory's settings begin with `memory_`.

    `max_position_embeddings` limits nothing: positions restart in every segment. It is what tools that cut long
    texts go by.
    """

    model_type = "infini"
    keys_to_ignore_at_inference = ["past_key_values", "cache"]

    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    max_position_embeddings: int = 1 << 20
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-5
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    tie_word_embeddings: bool = False
    rope_parameters: dict | None = None
    qkv_bias: bool = False
    qk_norm: bool = False
    segment_length: int = 2048
    local_context: str = "segment"
    memory_rule: str = "delta"
    memory_layers: list[int] | None = None
    memory_write_gate: str = "none"
    memory_write_gate_bias: float = 2.0
    memory_short_convolution: bool | None = None
    memory_convolution_width: int = 4
    memory_num_householder: int = 2
    memory_mix_gate: str = "head"
    memory_gate_floor: float = 0.0
    memory_beta_init: float = 0.0
    memory_skip_empty: bool = True
    memory_epsilon: float = 1e-6

    def __post_init__(self, **kwargs):
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.head_dim is None:
            self.head_dim = self.hidden_size // self.num_attention_heads
        super().__post_init__(**kwargs)
