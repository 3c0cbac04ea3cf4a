"""A checkpoint as a model of lm-evaluation-harness, named `infini`: on any layout, and without an export.

    join_world()                                            # or torchrun's environment
    model = get_model("infini").create_from_arg_string("checkpoint=runs/demo")    # lm_eval.api.registry
    lm_eval.simple_evaluate(model, tasks=["lambada_openai"])

Every process calls the harness with the same tasks and gets the same answers. To the harness each is a world of its
own: the processes of a model copy run every request together, and copies (more processes than the layout needs) take
different requests. Contexts are never cut, whatever their length.

Texts become tokens as in the harness's own `hf` model on an export of the checkpoint, but for special tokens that are
written out in a text: here they are text, as everywhere in this package.
"""

from __future__ import annotations

import datetime
import hashlib
import json
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs

from pipeline.evaluation.likelihood import Text, likelihoods
from pipeline.inference.generate import Generator
from pipeline.inference.sampling import Sampling
from pipeline.reporting.console import progress

NEW_TOKENS = 256
"""Of a request that does not say how many, as in the harness's `hf` model."""
NEUTRAL = {"num_beams": 1, "repetition_penalty": 1.0, "num_return_sequences": 1}
"""Settings of a generation that change nothing at these values; with others they are refused."""
LONGEST_WAIT = datetime.timedelta(days=7)
"""For other copies' answers: each runs its requests at its own pace."""


@register_model("infini")
class InfiniLM(TemplateLM):
    """A checkpoint's model.

    Args:
        checkpoint: folder of a run (its newest checkpoint) or of a checkpoint.
        overrides: settings of the layout and the precision, such as `parallel.tensor=2`; in a text separated by spaces.
        tokenizer: see `Generator.open`.
        batch_size: texts at a time at most; None or `auto` is as many as fit.
        device, max_batch_size: given by the harness; the device is the process's, and a maximum goes without saying.

    Raises:
        ValueError: checkpoint, tokenizer and settings do not fit together, or a device is asked for.
        OSError: something cannot be read.
    """

    def __init__(
        self,
        checkpoint: str | Path,
        *,
        overrides: str | Sequence[str] = (),
        tokenizer: str | Path | None = None,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        device: str | None = None,
    ) -> None:
        super().__init__()
        settings = overrides.split() if isinstance(overrides, str) else overrides
        self.generator = Generator.open(checkpoint, overrides=settings, tokenizer=tokenizer, copies=True)
        self.streamer = self.generator.model.streamer
        self.topology = self.streamer.topology
        if device is not None and device.partition(":")[0] != self.topology.device.type:
            raise ValueError(f"device {device}: this process computes on {self.topology.device}; leave it out")
        lanes = self.streamer.max_lanes
        most = lanes if batch_size in (None, "auto") else int(batch_size)
        if most < 1:
            raise ValueError(f"batch_size {batch_size}: must be at least 1, or auto")
        self.lanes = min(lanes, most)
        self.streamer.group = dist.new_group(backend="gloo", timeout=LONGEST_WAIT)

    @property
    def eot_token_id(self) -> int:
        return self.generator.tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        """What a text without a context comes after."""
        begin_id = self.generator.begin_id
        return self.eot_token_id if begin_id is None else begin_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Tokens of a text, after what begins a document unless `add_special_tokens` is False."""
        tokenizer = self.generator.tokenizer
        return [*(() if add_special_tokens is False else tokenizer.begin_ids), *tokenizer.encode(string)]

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """See `TemplateLM`."""
        return super().loglikelihood(requests, disable_tqdm=True)

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        for (context, _), _, continuation in requests:
            if not continuation:
                raise ValueError(f"nothing to score after the context {context[-80:]!r}: its continuation is empty")
        # White space alone is no context: it goes to the continuation.
        found = self._score([(context or [self.prefix_token_id], end) for _, context, end in requests])
        answers = [(float(total), bool(greedy)) for total, greedy in found]
        for (pair, _, _), answer in zip(requests, answers, strict=True):
            self.cache_hook.add_partial("loglikelihood", pair, answer)
        return answers

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = True) -> list[float]:
        """Of whole texts, each after `prefix_token_id`, in one piece however long it is."""
        texts = [self.tok_encode(request.args[0]) for request in requests]
        found = self._score([([self.prefix_token_id], tokens) for tokens in texts])
        totals = [float(total) for total, _ in found]
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def _score(self, pairs: list[tuple[list[int], list[int]]]) -> np.ndarray:
        self._check_same(pairs)
        texts = [Text(np.array(before + after, dtype=np.int64), len(before)) for before, after in pairs]
        with self._progress(len(texts), "log-likelihoods, texts") as advance:
            return likelihoods(self.streamer, texts, self.eot_token_id, advance, lanes=self.lanes)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        """Continue contexts up to a stop string, the end of the text or `max_gen_toks`.

        Raises:
            ValueError: a setting of the generation is not known here.
        """
        contexts = [self.tok_encode(request.args[0]) or [self.prefix_token_id] for request in requests]
        settings = [json.dumps(request.args[1], sort_keys=True) for request in requests]
        self._check_same([contexts, settings])
        mine: dict[int, str] = {}
        turn = 0
        with self._progress(len(requests), "generation, texts") as advance:
            for kind in dict.fromkeys(settings):
                rows = [row for row, other in enumerate(settings) if other == kind]
                rows.sort(key=lambda row: -len(contexts[row]))
                options = _options(requests[rows[0]].args[1])
                for start in range(0, len(rows), self.lanes):
                    turn += 1
                    if turn % self.topology.data_size != self.topology.data_rank:
                        continue
                    batch = rows[start : start + self.lanes]
                    made = self.generator.generate([contexts[row] for row in batch], seeds=batch, **options)
                    mine |= {row: completion.text for row, completion in zip(batch, made, strict=True)}
                    advance(len(batch) * self.topology.data_size)
        texts: dict[int, str] = {}
        for own in self._gather(mine):
            texts |= own
        for row, request in enumerate(requests):
            self.cache_hook.add_partial("generate_until", request.args, texts[row])
        return [texts[row] for row in range(len(requests))]

    def _check_same(self, requests: Any) -> None:
        """Refuse requests that differ between processes: these would wait for one another, or answer other questions.

        Raises:
            ValueError: they do.
        """
        digest = hashlib.sha256(json.dumps(requests).encode()).hexdigest()
        if len(set(self._gather(digest))) > 1:
            raise ValueError(
                "the processes have different requests: a task draws examples without a seed, or its files differ "
                "between machines"
            )

    def _gather(self, own: Any) -> list[Any]:
        """What every process has; collective."""
        found = [own] * dist.get_world_size()
        dist.all_gather_object(found, own, group=self.streamer.group)
        return found

    def _progress(self, total: int, description: str) -> AbstractContextManager:
        return progress(total, description) if self.topology.is_main else nullcontext(lambda done: None)


def _options(given: dict[str, Any]) -> dict[str, Any]:
    """Arguments of `Generator.complete` from those of a request.

    Raises:
        ValueError: some are not known here.
    """
    known = dict(normalize_gen_kwargs(given, NEW_TOKENS))
    until, most = known.pop("until"), known.pop("max_gen_toks")
    draws, temperature = known.pop("do_sample"), known.pop("temperature", 0.0)
    top_k, top_p = known.pop("top_k", None), known.pop("top_p", 1.0)
    unknown = {name: value for name, value in known.items() if NEUTRAL.get(name) != value}
    if unknown:
        told = ", ".join(f"{name} = {value!r}" for name, value in unknown.items())
        raise ValueError(
            f"generation_kwargs: {told}: the model infini knows until, max_gen_toks, do_sample, temperature, top_k and "
            "top_p"
        )
    sampling = Sampling(temperature, top_k or None, top_p) if draws and temperature else Sampling()
    return {"max_new_tokens": most, "sampling": sampling, "stop": until}
