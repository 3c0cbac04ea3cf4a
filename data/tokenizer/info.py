"""What `info.json` of a tokenizer's folder says, and what a prepared set says of its tokenizer: declared here once."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

INFO = "info.json"

MOST_TOKEN_IDS = 1 << 24
"""Of a vocabulary: 16 times the largest that is in use, and its embedding still fits a machine."""
_MOST_BEGIN_IDS = 16

TokenId = Annotated[int, msgspec.Meta(ge=0, lt=MOST_TOKEN_IDS)]
Sha256 = Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")]


class TokenizerInfo(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """`info.json` of a tokenizer's folder."""

    kind: Literal["byte", "bpe", "hf"]
    vocab_size: Annotated[int, msgspec.Meta(ge=1, le=MOST_TOKEN_IDS)]
    eos_id: TokenId
    """Ends a document."""
    begin_ids: Annotated[tuple[TokenId, ...], msgspec.Meta(max_length=_MOST_BEGIN_IDS)] = ()
    """Begin a document; none in sets and runs of versions that did not write them."""

    def __post_init__(self) -> None:
        for name, token in (("eos_id", self.eos_id), *(("begin_ids", token) for token in self.begin_ids)):
            if token >= self.vocab_size:
                raise ValueError(f"{name} {token} is outside of the vocabulary of {self.vocab_size}")


class TokenizerEntry(TokenizerInfo, frozen=True, kw_only=True, omit_defaults=True):
    hash: Sha256
    """`data.tokenizer.tokenizer.Tokenizer.hash`."""
