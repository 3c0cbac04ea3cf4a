"""Text to token ids and back: bytes, a byte-level BPE trained on the sources, or any Hugging Face `tokenizer.json`.

On disk a tokenizer is a folder: `info.json` (`data.prepared.manifest.TokenizerInfo`) and, except for bytes,
`tokenizer.json`. Its hash covers both, so two sets with equal hashes mean the same thing by a token id.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from data.files import FileError, Place, inside, is_there, place, read_bytes, read_json, write_whole
from data.tokenizer.info import INFO, TokenizerEntry, TokenizerInfo
from data.tokenizer.library import TOKENIZER_LIMIT, library, open_backend
from data.tokenizer.special_tokens import TOKENIZER_FILES, TOKENIZER_JSON, begin_tokens, end_token
from data.tokenizer.unbroken import RunCutter

EOS_TOKEN = "<|endoftext|>"
KINDS = ("byte", "bpe", "hf")
_BEAT_S = 2.0

# A long text is encoded in pieces, because the library keeps some hundred bytes per token while it works. Byte-level
# pre-tokenizers always begin a new part at these places: a word's leading space, and a line after a full one. After
# white space only a letter will do, because digits may be cut off before white space is grouped.
_PIECE_CHARACTERS = 1 << 16
_SAFE_CUT = re.compile(r"(?= [A-Za-z])|(?<=\S)(?= \S)|(?<=\S\n)(?=\S)")
_PROBE = ("alpha beta.\n", "gamma(1, 'two')\n   ", " delta = [\n", "Epsilon,", " 3", " +", " zeta")


class Tokenizer:
    """A tokenizer with an end token. Equal `hash` means equal meaning of every token id.

    Args:
        kind: `byte` (256 bytes and eos), `bpe` (trained by `train_bpe`) or `hf` (read from somebody's folder).
        eos_id: id of the token that ends a document.
        definition: contents of `tokenizer.json`; empty for `byte`.
        begin_ids: the tokens that begin a document.
        where: the folder that it is from, for messages.

    Raises:
        ValueError: the definition is damaged, or a token outside of its vocabulary.
    """

    def __init__(
        self,
        kind: str,
        eos_id: int,
        definition: bytes = b"",
        begin_ids: tuple[int, ...] = (),
        *,
        where: str = "memory",
        backend: Any = None,
    ) -> None:
        if kind not in KINDS:
            raise ValueError(f"unknown kind of tokenizer {kind!r}; valid are {', '.join(KINDS)}")
        self.kind = kind
        self.eos_id = eos_id
        self.begin_ids = tuple(begin_ids)
        self._definition = definition
        self._where = where
        self._backend: Any = None
        if kind == "byte":
            self.vocab_size = 257
        else:
            self._backend = backend or open_backend(definition, where)
            # A text that quotes the end token must not end the document.
            self._backend.encode_special_tokens = True
            self.vocab_size = 1 + max(self._backend.get_vocab(with_added_tokens=True).values())
        for token in (eos_id, *self.begin_ids):
            if not 0 <= token < self.vocab_size:
                raise FileError(
                    f"the tokenizer in {where}: token {token} is outside of the vocabulary of {self.vocab_size:,}"
                )

    def __reduce__(self) -> tuple:
        return partial(Tokenizer, where=self._where), (self.kind, self.eos_id, self._definition, self.begin_ids)

    @property
    def info(self) -> TokenizerInfo:
        """What `info.json` says."""
        return TokenizerInfo(kind=self.kind, vocab_size=self.vocab_size, eos_id=self.eos_id, begin_ids=self.begin_ids)

    @property
    def entry(self) -> TokenizerEntry:
        """What the manifest of a set says."""
        return TokenizerEntry(**msgspec.structs.asdict(self.info), hash=self.hash)

    @cached_property
    def hash(self) -> str:
        """sha256 of the definition, the vocabulary size, the tokens that begin a document (where there are any) and the
        end token (how it was made does not matter)."""
        facts = [self.vocab_size, self.eos_id, *([list(self.begin_ids)] if self.begin_ids else [])]
        return hashlib.sha256(json.dumps(facts).encode() + self._definition).hexdigest()

    def without_begin(self) -> Tokenizer:
        """The same tokenizer, with documents that begin with their text."""
        return Tokenizer(self.kind, self.eos_id, self._definition, where=self._where)

    @cached_property
    def _encodes_in_pieces(self) -> bool:
        """Whether parts encoded apart and joined are the text encoded whole (not so where a prefix space is added)."""
        whole = self._encode_piece("".join(_PROBE))
        return whole == [token for piece in _PROBE for token in self._encode_piece(piece)]

    def _encode_piece(self, text: str) -> list[int]:
        # `encode` gives the same ids, and spends a quarter of its time on where in the text each token stands.
        with library(self._where):
            return self._backend.encode_batch_fast([text], add_special_tokens=False)[0].ids

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, without an end token."""
        return self.encode_array(text).tolist()

    def encode_array(self, text: str) -> np.ndarray:
        """Like `encode`, as a numpy array (bytes: uint8, others uint32), for long documents."""
        if self.kind == "byte":
            return np.frombuffer(text.encode("utf-8"), dtype=np.uint8)
        pieces = split_text(text) if self._encodes_in_pieces else [text]
        arrays = [np.array(self._encode_piece(piece), dtype=np.uint32) for piece in pieces]
        return np.concatenate(arrays) if arrays else np.zeros(0, dtype=np.uint32)

    def encode_stream(self, blocks: Iterable[str]) -> Iterator[np.ndarray]:
        """Arrays that join to `encode_array` of the joined blocks; a text of any length costs the memory of a piece.

        A tokenizer whose pieces do not encode apart (one that adds a space before a text) needs the text whole.
        """
        if self.kind == "byte":
            yield from map(self.encode_array, blocks)
            return
        rest = ""
        for block in blocks:
            rest += block
            if self._encodes_in_pieces:
                # The last piece may go on in the next block. The others are cut where they would be in the whole text.
                *whole, rest = split_text(rest) if rest else [""]
                for piece in whole:
                    yield self.encode_array(piece)
        if rest:
            yield self.encode_array(rest)

    def decode(self, ids: Any) -> str:
        """Text of `ids`; what begins a document and end tokens give nothing, bytes that are not UTF-8 give U+FFFD."""
        ids = [int(token) for token in ids]
        if self.begin_ids and tuple(ids[: len(self.begin_ids)]) == self.begin_ids:
            ids = ids[len(self.begin_ids) :]
        if self.kind == "byte":
            return bytes(token for token in ids if token < 256).decode("utf-8", errors="replace")
        with library(self._where):
            return self._backend.decode([token for token in ids if token != self.eos_id], skip_special_tokens=False)

    def save(self, folder: Path | str) -> None:
        """Write the tokenizer into `folder`, which is made when needed."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        if self.kind != "byte":
            write_whole(folder / TOKENIZER_JSON, self._definition)
        write_whole(folder / INFO, json.dumps(msgspec.to_builtins(self.info), indent=2) + "\n")


def split_text(text: str, characters: int = _PIECE_CHARACTERS) -> Iterator[str]:
    """Pieces of `characters` or a little more that join to `text`, cut only where the parts encode apart."""
    start = 0
    while len(text) - start > characters:
        cut = _SAFE_CUT.search(text, start + characters)
        if cut is None:
            break
        yield text[start : cut.start()]
        start = cut.start()
    if start < len(text):
        yield text[start:]


def byte_tokenizer() -> Tokenizer:
    """The 256 bytes, and 256 as the end token."""
    return Tokenizer("byte", eos_id=256)


def train_bpe(
    texts: Iterable[str],
    vocab_size: int,
    *,
    beat: Callable[[], None] = lambda: None,
    say: Callable[[str], None] = lambda _: None,
) -> Tokenizer:
    """Train a byte-level BPE with `vocab_size` tokens, the end token included; digits stay single tokens.

    The same texts give the same tokenizer. Runs without a break are cut, see `data.tokenizer.unbroken`.

    Args:
        beat: called when the training begins, and every other second of it.
        say: is told what was cut.

    Raises:
        ValueError: `vocab_size` is too small for the bytes and the end token.
    """
    if vocab_size < 257:
        raise ValueError(f"train:{vocab_size} is too small: a byte-level vocabulary has at least 257 tokens")
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers, trainers

    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOS_TOKEN],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    cutter = RunCutter()
    sample = [part for text in texts for piece in split_text(text) for part in cutter.cut(piece)]
    if cutter.note:
        say(cutter.note)
    _beside(lambda: backend.train_from_iterator(sample, trainer), beat)
    return Tokenizer("bpe", eos_id=backend.token_to_id(EOS_TOKEN), definition=backend.to_str().encode("utf-8"))


def _beside(work: Callable[[], None], beat: Callable[[], None]) -> None:
    """Run `work` in a thread of its own, so that there is something to be seen of it and it can be interrupted."""
    failed: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=run, daemon=True)
    beat()
    thread.start()
    thread.join(_BEAT_S)
    while thread.is_alive():
        beat()
        thread.join(_BEAT_S)
    if failed:
        raise failed[0]


def load_tokenizer(path: Place | str) -> Tokenizer:
    """The tokenizer of a prepared set, a run or an import, or of a folder with a Hugging Face `tokenizer.json`.

    Raises:
        ValueError: there is none, it is damaged, or its end token is not known.
        OSError: it cannot be read.
    """
    path = place(path)
    name = f"tokenizer/{INFO}" if is_there(path / "tokenizer" / INFO) else INFO
    if is_there(path / name):
        return _load_own(path, path / name)
    found = {name: path / name for name in TOKENIZER_FILES if (path / name).exists()}
    if TOKENIZER_JSON not in found:
        there = "holds no tokenizer" if is_there(path) else "does not exist"
        raise FileError(f"{path} {there}: a tokenizer's folder is a prepared set or one with {TOKENIZER_JSON}")
    return tokenizer_of_files({name: read_bytes(file, TOKENIZER_LIMIT) for name, file in found.items()}, str(path))


def tokenizer_of_files(files: Mapping[str, bytes], where: str) -> Tokenizer:
    """The tokenizer of a Hugging Face folder.

    Args:
        files: contents by name, of those in `data.tokenizer.special_tokens.TOKENIZER_FILES` that there are.
        where: the folder, for messages.

    Raises:
        ValueError: it is damaged, its end token is not known, or it puts something else behind a text.
    """
    definition = files[TOKENIZER_JSON]
    backend = open_backend(definition, where)
    eos_id = end_token(backend, files, where)
    return Tokenizer("hf", eos_id, definition, begin_tokens(backend, eos_id, where), where=where, backend=backend)


def _load_own(root: Place, file: Place) -> Tokenizer:
    """A tokenizer that `Tokenizer.save` wrote into `file`'s folder; its files lie inside of `root`."""

    def own(name: str) -> Place:
        return inside(root, str(file.parent / name)[len(str(root)) + 1 :], str(root))

    info = read_json(own(file.name), TokenizerInfo)
    definition = b"" if info.kind == "byte" else read_bytes(own(TOKENIZER_JSON), TOKENIZER_LIMIT)
    tokenizer = Tokenizer(info.kind, info.eos_id, definition, info.begin_ids, where=str(file.parent))
    if tokenizer.vocab_size != info.vocab_size:
        raise FileError(
            f"{file} says vocab_size {info.vocab_size:,}, but {TOKENIZER_JSON} beside it has {tokenizer.vocab_size:,}"
        )
    return tokenizer
