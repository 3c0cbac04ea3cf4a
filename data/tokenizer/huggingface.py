"""A tokenizer as the files that `transformers` loads with `AutoTokenizer`."""

from __future__ import annotations

import json
from pathlib import Path

from data.files import read_bytes
from data.tokenizer.tokenizer import EOS_TOKEN, TOKENIZER_JSON, Tokenizer

CONFIG = "tokenizer_config.json"


def tokenizer_files(folder: Path, tokenizer: Tokenizer) -> dict[str, bytes]:
    """The files by name: `tokenizer.json`, and a `tokenizer_config.json` that knows the end token and nothing else.

    `transformers` reads end tokens in a text as such; ours reads them as text.

    Args:
        folder: where the tokenizer was loaded from.
        tokenizer: what was loaded.
    """
    definition = _byte_level() if tokenizer.kind == "byte" else read_bytes(folder / TOKENIZER_JSON)
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": _token(definition, tokenizer.eos_id),
        "clean_up_tokenization_spaces": False,
    }
    config = (json.dumps(settings, indent=2, ensure_ascii=False) + "\n").encode()
    return {TOKENIZER_JSON: definition, CONFIG: config}


def _token(definition: bytes, token_id: int) -> str:
    from tokenizers import Tokenizer as Backend

    return Backend.from_str(definition.decode("utf-8")).id_to_token(token_id)


def _byte_level() -> bytes:
    """The tokenizer `byte` as a byte-level BPE without merges: token i is byte i, and 256 ends a document."""
    from tokenizers import AddedToken, decoders, models, pre_tokenizers
    from tokenizers import Tokenizer as Backend

    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    # The library writes byte b as a character: itself where it prints, else the next free one from 256 on.
    printing = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = iter(range(256, 512))
    vocabulary = {chr(b if b in printing else next(others)): b for b in range(256)}
    assert set(vocabulary) == set(level.alphabet())
    backend = Backend(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer, backend.decoder = level, decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(EOS_TOKEN, special=True, normalized=False)])
    return backend.to_str().encode("utf-8")
