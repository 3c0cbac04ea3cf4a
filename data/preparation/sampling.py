"""The text that a tokenizer is trained on: a bounded, deterministic sample over all sources."""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Callable, Iterator, Sequence

from data.preparation.sources import BadInputError, Source
from data.tokenizer.tokenizer import split_text

_PIECE_CHARACTERS = 1 << 13

# Part of the sample that synthetic sources get, all together: their few words repeat, so this makes each a token,
# while a share by length would leave the real text none.
_SYNTHETIC_SHARE = 1 / 16


def sample_texts(
    sources: Sequence[Source],
    sample_bytes: int,
    seed: int,
    advance: Callable[[int], None],
    *,
    skip_bad: bool = False,
) -> Iterator[str]:
    """Pieces of some 8K characters, about `sample_bytes` of them, from documents of all sources.

    A piece is taken when the hash of its place is among the smallest, so every piece has the same chance and the
    choice depends on nothing but the sources and the seed. Reads the real sources once, whole; `advance` is told the
    input bytes that are done.

    Raises:
        BadInputError: a document cannot be read, and `skip_bad` does not say that such are left out.
    """
    synthetic = [source for source in sources if source.synthetic]
    real = [source for source in sources if not source.synthetic]
    budget = sample_bytes if not real else int(sample_bytes * _SYNTHETIC_SHARE)
    for source in synthetic:
        left = budget // len(synthetic)
        for job in source.sample_jobs():
            if left <= 0:
                break
            text = job.load().text
            left -= len(text)
            yield text

    chosen: list[tuple[int, str]] = []  # a heap with the largest hash on top
    chosen_characters = 0
    for number, source in enumerate(real):
        for job in source.sample_jobs():
            try:
                text = job.load().text
            except BadInputError:
                if not skip_bad:
                    raise
                text = ""
            for position, piece in enumerate(split_text(text, _PIECE_CHARACTERS)):
                place = f"{seed}:{number}:{job.id}:{position}".encode()
                rank = int.from_bytes(hashlib.blake2b(place, digest_size=8).digest(), "big")
                if chosen_characters >= sample_bytes and rank > -chosen[0][0]:
                    continue
                heapq.heappush(chosen, (-rank, piece))
                chosen_characters += len(piece)
                while chosen_characters - len(chosen[0][1]) >= sample_bytes:
                    chosen_characters -= len(heapq.heappop(chosen)[1])
            advance(job.input_bytes)
    for _, piece in sorted(chosen, reverse=True):
        yield piece
