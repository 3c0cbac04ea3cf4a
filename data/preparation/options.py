"""What decides the contents of a prepared set: the options of `infini prepare`, and which values make none."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from data.preparation.sources import SourceOptions


@dataclass(frozen=True)
class PrepareOptions(SourceOptions):
    """What decides the contents of a prepared set, besides its sources."""

    tokenizer: str = "byte"
    """`byte`, `train:VOCAB`, or a folder: a prepared set or one with a Hugging Face `tokenizer.json`."""
    begin_token: str = "auto"
    """`auto`: documents begin with the tokens that the tokenizer's own post-processor puts there; `none`: without."""
    tokenizer_sample_bytes: int = 8 << 20
    """Text that `train:VOCAB` looks at; 8 MB train 4,096 tokens in some seconds."""
    min_tokens: int = 2
    """Shorter documents are left out; the end token counts, what begins a document does not."""
    max_tokens: int | None = None
    """Longer documents are cut into equal parts, each a document whose first and end tokens count; None: not at all."""
    valid_fraction: float = 0.05
    """Share of the documents that is held out."""
    shard_bytes: int = 64 << 20
    """A shard is closed before it grows past this; one document is never divided."""

    def check(self) -> None:
        """Raises: ValueError for values that make no set."""
        if self.begin_token not in ("auto", "none"):
            raise ValueError(f"--begin-token {self.begin_token}: valid are auto and none")
        if self.min_tokens < 2:
            raise ValueError(f"--min-tokens {self.min_tokens}: valid are 2 and more (a token and the end token)")
        if self.max_tokens is not None and self.max_tokens < 2 * self.min_tokens:
            raise ValueError(
                f"--max-tokens {self.max_tokens}: valid are {2 * self.min_tokens} and more, twice --min-tokens "
                f"(the parts of a document just above it have half as many)"
            )
        if not 0.0 <= self.valid_fraction < 1.0:
            raise ValueError(f"--valid-fraction {self.valid_fraction}: valid are values from 0 up to, not including, 1")
        if self.shard_bytes < 4096:
            raise ValueError(f"--shard-size {self.shard_bytes}: valid are 4K and more")
        if self.tokenizer_sample_bytes < 1024:
            raise ValueError(f"--tokenizer-sample {self.tokenizer_sample_bytes}: valid are 1K and more")
        if self.max_document_bytes < 1024:
            raise ValueError(f"--max-document-bytes {self.max_document_bytes}: valid are 1K and more")
        if self.seed < 0:
            raise ValueError(f"--seed {self.seed}: it must not be negative")


def other_options(there: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    """In words, which options have another value where something was made before than they are to have here."""
    return [
        f"{name} is {there.get(name)!r} there and {value!r} here"
        for name, value in here.items()
        if there.get(name) != value
    ]
