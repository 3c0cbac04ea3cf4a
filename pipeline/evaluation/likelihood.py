"""How likely a model finds the ends of texts of any length: log-likelihoods, and whether greedy decoding gives them.

Texts that begin alike, such as the choices of one question, are read once up to the segment in which the first of them
is asked; the memory is then given to all of their lanes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from model.rules.state import take_lanes
from pipeline.evaluation.answers import read_segments
from pipeline.inference.streaming import Streamer, array_document


@dataclass(frozen=True)
class Text:
    """Tokens `[n]`, of which those from `first` (at least 1) on are scored."""

    tokens: np.ndarray
    first: int

    def asked(self, segment_length: int) -> int:
        """The segment that predicts the first token that is scored."""
        return (self.first - 1) // segment_length


def likelihoods(
    streamer: Streamer, texts: Sequence[Text], eos_id: int, advance: Callable[[int], None], lanes: int
) -> np.ndarray:
    """Score the ends of texts; collective, and the same on all processes. Copies of the model take different texts.

    Args:
        eos_id: pads lanes whose text has ended.
        advance: called with numbers of texts that are done, of all copies by this one's measure.
        lanes: texts at a time at most.

    Returns:
        `[texts, 2]`: the sum of log p(token | all before it) over the scored tokens, in nats, and 1 where every one of
        them is the likeliest (0 elsewhere).
    """
    length, topology = streamer.segment_length, streamer.topology
    order = sorted(range(len(texts)), key=lambda i: (texts[i].asked(length), texts[i].tokens.tolist()))
    size = max(1, min(lanes, -(-len(order) // topology.data_size)))
    found = np.zeros((len(texts), 2))
    for number, start in enumerate(range(0, len(order), size)):
        if number % topology.data_size != topology.data_rank:
            continue
        rows = order[start : start + size]
        found[rows] = _score(streamer, [texts[row] for row in rows], eos_id)
        advance(len(rows) * topology.data_size)
    return streamer.add_up(found)


def _score(streamer: Streamer, texts: Sequence[Text], eos_id: int) -> np.ndarray:
    """`[texts, 2]`, see `likelihoods`; zeros on ranks without the last stage."""
    length = streamer.segment_length
    documents = [
        array_document(str(row), text.tokens, [(text.first, len(text.tokens))]) for row, text in enumerate(texts)
    ]
    asked = min(text.asked(length) for text in texts)
    beginnings: dict[bytes, int] = {}
    own = [beginnings.setdefault(text.tokens[: asked * length].tobytes(), len(beginnings)) for text in texts]
    readers = [documents[own.index(lane)] for lane in range(len(beginnings))]
    memory = read_segments(
        streamer, readers, 0, asked, streamer.empty_memory(len(readers)), eos_id, lambda tokens: None
    )
    memory = take_lanes(memory, torch.tensor(own, device=streamer.topology.device))
    segments = max(document.segments(length) for document in documents)
    step = streamer.segments_per_window(len(documents))
    scores: list[torch.Tensor] = []
    for start in range(asked, segments, step):
        batch = streamer.window(documents, start, min(step, segments - start), eos_id)
        output = streamer.run(batch, memory, correct=True)
        memory = output.memory
        if output.loss is not None:
            loss = (output.loss.double() * batch.answer_mask).sum(dim=(1, 2))
            wrong = (batch.answer_mask & ~output.correct).sum(dim=(1, 2))
            scores.append(torch.stack([-loss, wrong.double()], dim=1))
    if not scores:
        return np.zeros((len(texts), 2))
    log_likelihood, wrong = np.array(torch.stack(scores).sum(dim=0).tolist()).T
    return np.stack([log_likelihood, wrong == 0], axis=1)
