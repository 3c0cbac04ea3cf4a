"""A Llama-style decoder whose attention is local inside a segment and mixed with reads of a compressive memory.

Infini-attention (arXiv 2404.07143) for `transformers`. The text is read segment by segment; what a segment leaves
behind is a memory of fixed size per layer and key/value head, so neither memory nor time per token grows with the
length. `InfiniCache` holds the memory and the keys and values of the segment that is not full yet.

Segments are counted from each row's first real token, so rows of a padded batch give what they give alone.
"""

from dataclasses import fields
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils import can_return_tuple

from .cache_infini import InfiniCache, InfiniCacheLayer
from .configuration_infini import InfiniConfig
from .memory_infini import LOCAL_CONTEXTS, MIX_GATES, RULES, WRITE_GATES, build_rule
from .rotary_infini import rotary_frequencies, rotate

CACHE_NAME = next(x.name for x in fields(BaseModelOutputWithPast) if x.name in ("cache", "past_key_values"))
"""What the cache is called in outputs and by `generate`: `past_key_values` before transformers 5.24, `cache` since."""


class Piece(NamedTuple):
    """Some tokens of every row, none of them beyond the end of the row's open segment."""

    position: Tensor
    """Place of each token in its segment, `[b, m]`; past a row's last token the numbers run on."""
    width: int
    """Places that the piece covers: the longest row's tokens of the segment so far, m included."""
    kept: int
    """Places that some row still needs after the piece."""
    count: Tensor
    """Real tokens of each row, `[b]`."""
    full: Tensor | None
    """Bool `[b]`: the piece fills this row's segment, so it is written to memory; None when no row's."""
    from_start: bool
    """Every row's segment begins with this piece."""
    rotary: tuple[Tensor, Tensor]
    """Cosines and sines `[b, 1, m, d / 2]`."""
    rotary_before: tuple[Tensor, Tensor] | None
    """The same for the places of the segment before, `[1, 1, S, d / 2]`, when a segment becomes one."""


class InfiniRMSNorm(nn.Module):
    def __init__(self, dim: int, epsilon: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.epsilon = epsilon

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(memory_dtype(x))
        wide = wide * torch.rsqrt(wide.pow(2).mean(dim=-1, keepdim=True) + self.epsilon)
        return (wide * self.weight.to(wide.dtype)).to(x.dtype)


def memory_dtype(x: Tensor) -> torch.dtype:
    """float32, and float64 when the model is: never lower."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def place(before: Tensor, new: Tensor, piece: Piece) -> Tensor:
    """Put a piece's `[b, n, m, e]` at its places of the open segment, `[b, n, width, e]`."""
    wide = F.pad(before, (0, 0, 0, piece.width - before.shape[2]))
    return wide.scatter(2, piece.position[:, None, :, None].expand_as(new), new)


class InfiniMemory(nn.Module):
    """One layer's memory: its parameters, what is read from it, what is written to it. Its state is in the cache."""

    def __init__(self, config: InfiniConfig):
        super().__init__()
        if config.memory_rule not in RULES:
            raise ValueError(f"config.json: memory_rule {config.memory_rule!r} is not none, {', '.join(RULES)}")
        if config.memory_write_gate not in WRITE_GATES:
            raise ValueError(
                f"config.json: memory_write_gate {config.memory_write_gate!r}: not {', '.join(WRITE_GATES)}"
            )
        self.config, self.groups = config, config.num_key_value_heads
        self.ratio = config.num_attention_heads // self.groups
        self.rule, self.gate = build_rule(config), WRITE_GATES[config.memory_write_gate]
        if config.memory_mix_gate not in MIX_GATES:
            raise ValueError(f"config.json: memory_mix_gate {config.memory_mix_gate!r}: not {', '.join(MIX_GATES)}")
        if config.memory_mix_gate == "token":
            self.mix_gate = nn.Linear(config.hidden_size, config.num_attention_heads)
        else:
            self.beta = nn.Parameter(torch.full((config.num_attention_heads,), config.memory_beta_init))
        for name, value in self.rule.parameters(config.num_attention_heads, self.groups, config.head_dim).items():
            self.register_parameter(name, nn.Parameter(value))
        # Numbers per token and key/value head, in the cache until the segment is written.
        self.numbers = ({} if self.gate is None else {"write_gate": 1}) | self.rule.inputs(config.head_dim)
        for name, width in self.numbers.items():
            bias = name not in self.rule.unbiased
            self.add_module(name, nn.Linear(config.hidden_size, self.groups * width, bias=bias))

    def forward(self, hidden: Tensor, query: Tensor, local: Tensor, piece: Piece, cache: InfiniCacheLayer) -> Tensor:
        """Mix what the memory holds into the local attention, and write the segments that are full.

        Args:
            hidden: what the layer's projections saw, `[b, m, h]`.
            query: without positions, `[b, heads, m, d]`.
            local: the local attention's output, of the same shape.
        """
        dtype = memory_dtype(hidden)
        weights = {name: parameter.to(dtype) for name, parameter in self.named_parameters()}
        if cache.memory is None:
            cache.memory = self.rule.init(cache.keys.to(dtype), self.ratio)
        grouped = query.to(dtype).unflatten(1, (self.groups, self.ratio))
        read = self.rule.read(grouped, weights, cache.memory).flatten(1, 2)
        if self.config.memory_mix_gate == "token":
            logit = F.linear(hidden.to(dtype), weights["mix_gate.weight"], weights["mix_gate.bias"])
            logit = logit.transpose(1, 2).unsqueeze(-1)  # [b, heads, m, 1]
        else:
            logit = weights["beta"].view(1, -1, 1, 1)
        floor = self.config.memory_gate_floor
        share = floor + (1 - floor) * torch.sigmoid(logit)
        if self.config.memory_skip_empty:
            share = share * self.rule.present(cache.memory).repeat_interleave(self.ratio, dim=1)[..., None, None]
        cache.memory = self.rule.advance(grouped, piece.count, cache.memory)
        if self.numbers:
            wide = hidden.to(dtype)
            found = [F.linear(wide, weights[f"{x}.weight"], weights.get(f"{x}.bias")) for x in self.numbers]
            by_head = [x.unflatten(-1, (self.groups, -1)) for x in found]
            new = torch.cat(by_head, dim=-1).transpose(1, 2)  # [b, n, m, numbers]
            cache.numbers = place(new[:, :, :0] if cache.numbers is None else cache.numbers, new, piece)
        if piece.full is not None:
            self._write(piece.full, weights, cache)
        cache.numbers = None if cache.numbers is None else cache.numbers[:, :, : piece.kept]
        return (share * read + (1 - share) * local.to(dtype)).to(query.dtype)

    def _write(self, full: Tensor, weights: dict[str, Tensor], cache: InfiniCacheLayer) -> None:
        """Write the open segment of the rows where it is full."""
        length = self.config.segment_length
        key, value = (x[:, :, :length].to(cache.memory[0].dtype) for x in (cache.keys, cache.values))
        widths = list(self.numbers.values())
        parts = cache.numbers[:, :, :length].split(widths, dim=-1) if widths else ()
        inputs = dict(zip(self.numbers, parts, strict=True))
        gate = None if self.gate is None else self.gate(inputs.pop("write_gate").squeeze(-1))
        written = self.rule.write(key, value, gate, inputs, weights, cache.memory)
        cache.memory = tuple(
            torch.where(full.view(-1, *[1] * (new.dim() - 1)), new, old)
            for new, old in zip(written, cache.memory, strict=True)
        )


class InfiniAttention(nn.Module):
    def __init__(self, config: InfiniConfig, layer_idx: int):
        super().__init__()
        self.config, self.layer_idx = config, layer_idx
        self.heads, self.groups, self.dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, self.heads * self.dim, bias=config.qkv_bias)
        self.k_proj = nn.Linear(config.hidden_size, self.groups * self.dim, bias=config.qkv_bias)
        self.v_proj = nn.Linear(config.hidden_size, self.groups * self.dim, bias=config.qkv_bias)
        self.o_proj = nn.Linear(self.heads * self.dim, config.hidden_size, bias=False)
        if config.qk_norm:
            self.q_norm = InfiniRMSNorm(self.dim, config.rms_norm_eps)
            self.k_norm = InfiniRMSNorm(self.dim, config.rms_norm_eps)
        if config.local_context not in LOCAL_CONTEXTS:
            raise ValueError(f"config.json: local_context {config.local_context!r}: not {', '.join(LOCAL_CONTEXTS)}")
        self.slides = config.local_context == "sliding"
        remembers = config.memory_layers is None or layer_idx in config.memory_layers
        self.memory = InfiniMemory(config) if config.memory_rule != "none" and remembers else None

    def forward(self, hidden: Tensor, piece: Piece, cache: InfiniCacheLayer) -> Tensor:
        """Attend for one piece, `[b, m, h]`, and take it into the cache."""
        query, key, value = (
            projection(hidden).unflatten(-1, (-1, self.dim)) for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        if self.config.qk_norm:
            query, key = self.q_norm(query), self.k_norm(key)
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))  # [b, heads, m, d]
        if not cache.is_initialized:
            cache.lazy_initialization(key, value)
        cache.rotated = place(cache.rotated, rotate(key, piece.rotary), piece)
        cache.values = place(cache.values, value, piece)
        if self.memory is not None or self.slides:
            cache.keys = place(cache.keys, key, piece)
        local = self._local(rotate(query, piece.rotary), cache, piece)
        if self.memory is not None:
            with torch.autocast(hidden.device.type, enabled=False):
                local = self.memory(hidden, query, local, piece, cache)
        if piece.rotary_before is not None:
            self._slide(piece, cache)
        cache.keys, cache.rotated, cache.values = (
            x[:, :, : piece.kept] for x in (cache.keys, cache.rotated, cache.values)
        )
        return self.o_proj(local.transpose(1, 2).flatten(2))

    def _local(self, query: Tensor, cache: InfiniCacheLayer, piece: Piece) -> Tensor:
        """Causal attention inside the open segment and, where the context slides, to all of the segment before."""
        key, value, mask = cache.rotated, cache.values, None
        if not piece.from_start or cache.previous is not None:
            mask = (torch.arange(piece.width, device=query.device) <= piece.position[:, :, None])[:, None]
        if cache.previous is not None:
            key_before, value_before, seen = cache.previous
            key, value = torch.cat([key_before, key], dim=2), torch.cat([value_before, value], dim=2)
            mask = torch.cat([seen.view(-1, 1, 1, 1).expand(-1, 1, mask.shape[2], key_before.shape[2]), mask], dim=-1)
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=mask is None, enable_gqa=self.heads > self.groups
        )

    def _slide(self, piece: Piece, cache: InfiniCacheLayer) -> None:
        """Keep the segment that is full as the one before, in the rows where it is."""
        key, value = (x[:, :, : self.config.segment_length] for x in (cache.keys, cache.values))
        new = (rotate(key, piece.rotary_before), value, piece.full)
        if cache.previous is not None:
            full = piece.full.view(-1, 1, 1, 1)
            old_key, old_value, seen = cache.previous
            new = (torch.where(full, new[0], old_key), torch.where(full, value, old_value), piece.full | seen)
        cache.previous = new


class InfiniMLP(nn.Module):
    def __init__(self, config: InfiniConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class InfiniDecoderLayer(nn.Module):
    def __init__(self, config: InfiniConfig, layer_idx: int):
        super().__init__()
        self.self_attn = InfiniAttention(config, layer_idx)
        self.mlp = InfiniMLP(config)
        self.input_layernorm = InfiniRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = InfiniRMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, hidden: Tensor, piece: Piece, cache: InfiniCacheLayer) -> Tensor:
        hidden = hidden + self.self_attn(self.input_layernorm(hidden), piece, cache)
        return hidden + self.mlp(self.post_attention_layernorm(hidden))


class InfiniPreTrainedModel(PreTrainedModel):
    config_class = InfiniConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = False
    _no_split_modules = ["InfiniDecoderLayer"]
    _skip_keys_device_placement = ["past_key_values", "cache"]
    _supports_sdpa = True
    _is_stateful = True  # no going back to an earlier token: assisted generation is refused
    _keep_in_fp32_modules_strict = ["memory"]

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, InfiniMemory):
            if self.config.memory_mix_gate == "token":
                init.zeros_(module.mix_gate.weight)
                init.constant_(module.mix_gate.bias, self.config.memory_beta_init)
            else:
                init.constant_(module.beta, self.config.memory_beta_init)
            for name in module.numbers:
                linear = module.get_submodule(name)
                if linear.bias is None:  # features, keys, values
                    init.normal_(linear.weight, std=linear.in_features**-0.5)
                    continue
                init.zeros_(linear.weight)
                # decays of about 1e-4 per token, and steps of `delta_product` that are small
                biases = {"write_gate": self.config.memory_write_gate_bias, "step_gate": -2.0}
                init.constant_(linear.bias, biases.get(name, -9.0))

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # `generate` leaves the cache to the model


class InfiniModel(InfiniPreTrainedModel):
    def __init__(self, config: InfiniConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([InfiniDecoderLayer(config, i) for i in range(config.num_hidden_layers)])
        self.norm = InfiniRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: InfiniCache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        last_columns: int | None = None,
        cache: InfiniCache | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPast:
        """Read tokens `[b, columns]`, any number of them.

        Args:
            attention_mask: `[b, columns]` or `[b, seen + columns]`, 0 for padding: at any place, it is left out.
            past_key_values: what an earlier call returned; it is changed. Also called `cache`.
            last_columns: return the hidden states of so many last columns only (those of a long prompt are large).

        Raises:
            ValueError: an argument that this model has no use for or cannot follow.
        """
        refuse_unknown(kwargs)
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        source = input_ids if inputs_embeds is None else inputs_embeds
        b, columns = source.shape[:2]
        if past_key_values is not None and cache is not None:
            raise ValueError("give either past_key_values or cache")
        cache = past_key_values if cache is None else cache
        cache = InfiniCache(self.config) if cache is None else cache
        if not isinstance(cache, InfiniCache):
            raise ValueError(f"{CACHE_NAME} must be an InfiniCache (or None), not {type(cache).__name__}")
        if cache.fill is None:
            cache.fill = torch.zeros(b, dtype=torch.long)
        if len(cache.fill) != b:
            raise ValueError(f"input of {b} rows with a cache of {len(cache.fill)}")
        mask = self._own_mask(attention_mask, b, columns, cache)

        # Real tokens first in every row: then row b's token i is at place fill + i, whatever padding was around it.
        order = rank = torch.arange(columns, device=source.device).expand(b, -1)
        count = torch.full((b,), columns)
        if mask is not None:
            order = (~mask).to(torch.uint8).argsort(dim=1, stable=True)
            rank = (mask.cumsum(dim=1) - 1).clamp(min=0)
            count = mask.sum(dim=1).cpu()
        if not bool(count.any()):
            raise ValueError("there are no tokens in the input")
        rows = torch.arange(b, device=source.device)[:, None]

        # The first piece ends each row's open segment, every later one is a segment: where the results will stand.
        first = torch.minimum(self.config.segment_length - cache.fill, count)
        shift = (first.max() - first).to(source.device)[:, None]
        result = rank + torch.where(rank < first.to(source.device)[:, None], 0, shift)
        result = result if last_columns is None else result[:, -last_columns:]
        needed = int(result.min())

        pieces, dropped, taken = [], 0, torch.zeros_like(count)
        while bool((taken < count).any()):
            now = torch.minimum(self.config.segment_length - cache.fill, count - taken)
            columns_now = (taken[:, None] + torch.arange(int(now.max()))).clamp(max=columns - 1).to(source.device)
            chosen = source[rows, order.gather(1, columns_now)]
            hidden = self.embed_tokens(chosen) if inputs_embeds is None else chosen
            hidden = self._read_piece(hidden, now, cache)
            taken = taken + now
            if not pieces and dropped + hidden.shape[1] <= needed:
                dropped += hidden.shape[1]
            else:
                pieces.append(hidden)
        for layer in cache.layers:
            layer.columns += columns
        return BaseModelOutputWithPast(
            last_hidden_state=self.norm(torch.cat(pieces, dim=1)[rows, result - dropped]),
            **{CACHE_NAME: cache if (self.config.use_cache if use_cache is None else use_cache) else None},
        )

    def _read_piece(self, hidden: Tensor, now: Tensor, cache: InfiniCache) -> Tensor:
        """One piece through all layers: `now [b]` of its tokens are real in each row, `[b, m, h]`."""
        m, length, device = hidden.shape[1], self.config.segment_length, hidden.device
        fill = cache.fill
        after = fill + now
        full = after == length
        position = (fill[:, None] + torch.arange(m)).to(device)
        frequency, size = rotary_frequencies(self.config, device)

        def table(place: Tensor) -> tuple[Tensor, Tensor]:
            angle = place[:, None, :, None] * frequency
            return tuple((x * size).to(memory_dtype(hidden)) for x in (angle.cos(), angle.sin()))

        cache.fill = after.where(~full, 0)
        slides = self.config.local_context == "sliding" and bool(full.any())
        piece = Piece(
            position,
            width=int(fill.max()) + m,
            kept=int(cache.fill.max()),
            count=now.to(device),
            full=full.to(device) if bool(full.any()) else None,
            from_start=not bool(fill.any()),
            rotary=table(position),
            rotary_before=table(torch.arange(-length, 0, device=device)[None]) if slides else None,
        )
        for layer, layer_cache in zip(self.layers, cache.layers, strict=True):
            hidden = layer(hidden, piece, layer_cache)
        return hidden

    def _own_mask(self, mask: Tensor | None, b: int, columns: int, cache: InfiniCache) -> Tensor | None:
        """The part of the mask that belongs to this input, bool `[b, columns]`; None when there is no padding."""
        if mask is None:
            return None
        seen = cache.get_seq_length()
        if mask.dim() != 2 or mask.shape[0] != b or mask.shape[1] not in (columns, seen + columns):
            raise ValueError(
                f"attention_mask of shape {list(mask.shape)} for input [{b}, {columns}] after {seen} columns: "
                "only padding can be masked, [rows, columns] or [rows, seen + columns]"
            )
        mask = mask[:, mask.shape[1] - columns :].bool()
        return None if bool(mask.all()) else mask


def refuse_unknown(arguments: dict) -> None:
    """Refuse arguments that would change the result and cannot be followed; ignore the library's own.

    Raises:
        ValueError: names the argument.
    """
    reasons = {
        "position_ids": "positions restart in every segment and are counted by the model",
        "output_attentions": "attention is computed segment by segment",
        "output_hidden_states": "layers run segment by segment",
    }
    for name, reason in reasons.items():
        if arguments.get(name) is not None and arguments[name] is not False:
            raise ValueError(f"{name} is not supported: {reason}")


class InfiniForCausalLM(InfiniPreTrainedModel, GenerationMixin):
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: InfiniConfig):
        super().__init__(config)
        self.model = InfiniModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: InfiniCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        cache: InfiniCache | None = None,
        **kwargs,
    ) -> CausalLMOutputWithPast:
        """Logits `[b, columns, vocabulary]`, of the last `logits_to_keep` columns when that is not 0.

        Arguments as in `InfiniModel.forward`; with `labels` (not shifted, -100 where none) also the mean loss.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            last_columns=logits_to_keep or None,
            cache=cache,
            **kwargs,
        )
        logits = self.lm_head(outputs.last_hidden_state)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size)
        return CausalLMOutputWithPast(loss=loss, logits=logits, **{CACHE_NAME: outputs.get(CACHE_NAME)})


__all__ = ["InfiniCache", "InfiniForCausalLM", "InfiniModel"]
