"""Small prepared sets for tests, written with the project's own writer."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from data.prepared.manifest import SourceEntry, write_manifest
from data.prepared.questions import Question
from data.prepared.shard_writer import ShardSetWriter
from data.tokenizer.tokenizer import Tokenizer, byte_tokenizer


def write_set(
    folder: Path,
    lengths: list[int],
    *,
    seed: int = 0,
    answers: bool = True,
    questions: bool = False,
    source: str = "noise",
    tokenizer: Tokenizer | None = None,
) -> Path:
    """A set, byte-level unless there is a tokenizer. Its documents have `lengths` tokens: noise with repeats, to learn.

    With `questions` a document can be asked for its first three tokens.
    """
    folder.mkdir(parents=True)
    tokenizer = tokenizer or byte_tokenizer()
    tokenizer.save(folder / "tokenizer")
    generator = np.random.default_rng(seed)
    splits = {}
    for split in ("train", "valid"):
        writer = ShardSetWriter(folder, split, tokenizer.vocab_size, 1 << 20)
        for i, length in enumerate(lengths):
            words = generator.integers(97, 123, size=(6, 5))
            tokens = words[generator.integers(0, 6, size=length // 5 + 1)].flatten()[: length - 1]
            spans = [(length // 2, length // 2 + 3)] if answers and length > 20 else None
            asked = (*b"first?", *(int(token) for token in tokens[:3]))
            writer.add(
                np.append(tokens, tokenizer.eos_id),
                id=f"{split}-{i}",
                source=source,
                answers=spans,
                questions=[Question(asked, (6, 9), after=3)] if questions else (),
            )
        splits[split] = writer.close()
    write_manifest(folder, tokenizer=tokenizer.entry, sources=[SourceEntry(spec=source)], splits=splits)
    return folder
