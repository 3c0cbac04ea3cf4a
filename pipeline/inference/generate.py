"""Generation with bounded memory: prompts of any length in, text out, token by token.

    generator = Generator.open("runs/demo")
    book = generator.read([Path("book.txt")])
    answers = generator.generate(["Who came first?", "Who came last?"], after=book, max_new_tokens=20)

Every process of the layout makes the same calls and gets the same results.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path

import numpy as np
import torch

from data.files import place
from data.tokenizer.tokenizer import Tokenizer
from pipeline.checkpoint.find_tokenizer import find_tokenizer
from pipeline.checkpoint.folder import find_checkpoint
from pipeline.checkpoint.loading import open_verified
from pipeline.checkpoint.reader import CheckpointReader
from pipeline.config.evaluation import generation_config
from pipeline.huggingface.tokens import source_tokens
from pipeline.inference.incremental import IncrementalModel, LaneState
from pipeline.inference.memory_file import Identity, load_memory, save_memory
from pipeline.inference.sampling import NO_TOKEN, Sampling, choose
from pipeline.inference.streaming import Streamer
from pipeline.inference.text_stream import TextStream
from pipeline.parallel.setup import build_stage
from pipeline.parallel.topology import initialize, on_main

logger = logging.getLogger(__name__)

BLOCK_CHARACTERS = 1 << 18
"""What is read of a file at a time."""

Prompt = str | Path | Sequence[int]
"""A text, a file with text (UTF-8, read piece by piece), or tokens."""


@dataclass(frozen=True)
class Completion:
    """What a prompt was continued with."""

    text: str
    """Without the stop string and the end token."""
    tokens: list[int]
    """All new tokens, the end token included."""
    ended_by: str
    """`eos`, `stop` or `length`."""


class Generator:
    """A trained model that continues texts.

    Args:
        streamer: the model, with its weights.
        tokenizer: the one the model was trained with.
        identity: of the model, for memory files.
        vocab_size: of the model (not padded).
        end_ids: tokens that end a text, besides the tokenizer's end token.
        begin_id: the begin token that the model's files name, if any.
        reader: of the checkpoint that the weights are from.
    """

    def __init__(
        self,
        streamer: Streamer,
        tokenizer: Tokenizer,
        identity: Identity,
        vocab_size: int,
        end_ids: Collection[int] = (),
        begin_id: int | None = None,
        reader: CheckpointReader | None = None,
    ) -> None:
        self.tokenizer, self.begin_id, self.reader = tokenizer, begin_id, reader
        self.end_ids = frozenset(end_ids)
        self.identity = identity
        self.model = IncrementalModel(streamer, vocab_size)

    @classmethod
    def open(
        cls,
        checkpoint: str | Path,
        *,
        overrides: Sequence[str] = (),
        tokenizer: str | Path | None = None,
        copies: bool = False,
    ) -> Generator:
        """The model of a run's newest checkpoint, or of a checkpoint's folder; collective.

        `launch.processes.world.join_world` (or torchrun) must have set the ranks' environment.

        Args:
            overrides: `key=value` settings: the layout, `train.precision`.
            tokenizer: folder of a tokenizer or of a prepared set; None takes the one beside the run's configuration,
                else the training data's.
            copies: there may be more processes than the layout needs: they hold further copies of the model, each of
                which reads and continues texts of its own (only processes of one copy make the same calls).

        Raises:
            ValueError: checkpoint, tokenizer and settings do not fit together (`ConfigError`, `CheckpointError`).
            OSError: something cannot be read.
        """
        path = find_checkpoint(place(checkpoint))
        reader = CheckpointReader(path)
        world_size = int(os.environ.get("WORLD_SIZE", "1"))
        config = generation_config(reader.summary.config, overrides, world_size, str(path), copies=copies)
        notes: list[str] = []
        folder, found = find_tokenizer(reader, config, tokenizer, notes)
        end_ids, begin_id = [], None
        try:
            source = source_tokens(folder, found, config.train.init_from)
            end_ids, begin_id = source.end_ids, source.begin_id
        except ValueError as error:
            notes.append(f"the tokenizer's end token alone ends a text, what else the model ends one with: {error}")
        parallel = config.parallel
        topology = initialize(tensor=parallel.tensor, pipeline=parallel.pipeline, timeout_s=parallel.timeout_s)
        reader = open_verified(on_main(lambda: path))  # a run that is going on moves what is its newest
        for note in notes if topology.is_main else ():
            logger.warning("%s", note)
        streamer = Streamer(build_stage(config, topology, reader.summary.vocab_size, drawn=False), topology)
        streamer.load(reader)
        identity = Identity(asdict(config.model), reader.summary.sha256, found.hash)
        return cls(streamer, found, identity, reader.summary.vocab_size, end_ids, begin_id, reader)

    def read(
        self,
        prompts: Sequence[Prompt],
        after: LaneState | None = None,
        *,
        on_read: Callable[[int], None] | None = None,
    ) -> LaneState:
        """Read prompts of any lengths, each in a lane of its own; collective.

        A text with nothing before it begins a document: with what the tokenizer begins one with.

        Args:
            after: go on from here, one prompt per lane; a single lane serves any number of prompts. It is not changed.
            on_read: called now and then with the tokens read so far, those of `after` included.

        Raises:
            ValueError: a prompt is empty and there is nothing before it, a file is not UTF-8, or the numbers differ.
        """
        if not prompts:
            raise ValueError("no prompts given")
        if after is None:
            state = self.model.start(len(prompts))
        elif after.lanes in (1, len(prompts)):
            state = after.select(range(after.lanes) if after.lanes == len(prompts) else [0] * len(prompts))
        else:
            raise ValueError(
                f"the memory holds {after.lanes} documents and there are {len(prompts)} prompts: give one for each"
            )
        self.model.read(state, [self._tokens(prompt, begins=after is None) for prompt in prompts], on_read)
        for number, tokens in enumerate(state.segment):
            if not tokens:
                raise ValueError(f"prompt {number + 1} is empty: there is nothing to continue")
        return state

    def complete(
        self,
        state: LaneState,
        *,
        max_new_tokens: int = 256,
        sampling: Sampling | None = None,
        stop: Sequence[str] = (),
        seeds: Sequence[int] | int = 0,
        on_text: Callable[[int, str], None] | None = None,
    ) -> list[Completion]:
        """Continue what was read; collective. `state` is not changed.

        Args:
            max_new_tokens: per prompt.
            sampling: None takes the likeliest token every time.
            stop: strings that end a text.
            seeds: one per lane, or the first lane's: lane i then draws with `seeds + i`.
            on_text: called as `on_text(lane, piece)` with new text as soon as it is settled.

        Raises:
            ValueError: there is not one seed per lane, or the model's scores are not finite.
        """
        sampling = sampling or Sampling()
        seeds = range(seeds, seeds + state.lanes) if isinstance(seeds, int) else seeds
        if len(seeds) != state.lanes:
            raise ValueError(f"{len(seeds)} seeds for {state.lanes} prompts: give one for each, or the first one's")
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        texts = [TextStream(self.tokenizer, stop) for _ in range(state.lanes)]
        tokens: list[list[int]] = [[] for _ in range(state.lanes)]
        ended = ["length"] * state.lanes
        active = list(range(state.lanes))
        state = state.select(active)

        def give(lane: int, piece: str) -> None:
            if piece and on_text is not None:
                on_text(lane, piece)

        for _ in range(max_new_tokens):
            logits = self.model.next_logits(state)
            chosen = None if logits is None else choose(logits, sampling, [generators[lane] for lane in active])
            for lane, token in zip(active, self.model.append(state, chosen), strict=True):
                if token == NO_TOKEN:  # on every rank, so that none waits for another
                    raise ValueError(
                        f"prompt {lane + 1}: the model's scores of the next token are NaN or infinite after "
                        f"{len(tokens[lane])} new tokens: its memory or its layers have grown past all numbers"
                    )
                tokens[lane].append(token)
                if token == self.tokenizer.eos_id or token in self.end_ids:
                    ended[lane] = "eos"
                    continue
                give(lane, texts[lane].push(token))
                if texts[lane].stopped:
                    ended[lane] = "stop"
            going_on = [row for row, lane in enumerate(active) if ended[lane] == "length"]
            if len(going_on) < len(active):
                active = [active[row] for row in going_on]
                if not active:
                    break
                state = state.select(going_on)
        for lane, text in enumerate(texts):
            give(lane, text.finish())
            if text.stopped:
                ended[lane] = "stop"
        return [Completion(text.text, *rest) for text, *rest in zip(texts, tokens, ended, strict=True)]

    def generate(self, prompts: Sequence[Prompt], after: LaneState | None = None, **options) -> list[Completion]:
        """`complete` of `read`."""
        return self.complete(self.read(prompts, after), **options)

    def save(self, state: LaneState, path: str | Path) -> None:
        """Write what was read to a file, see `pipeline.inference.memory_file`; collective."""
        save_memory(Path(path), state, self.model, self.identity)

    def load(self, path: str | Path) -> LaneState:
        """What `save` has written, under any layout; collective.

        Raises:
            ValueError: the file is damaged or another model's.
            OSError: it cannot be read.
        """
        return load_memory(Path(path), self.model, self.identity)

    def _tokens(self, prompt: Prompt, *, begins: bool) -> Iterable[np.ndarray]:
        if not isinstance(prompt, Path | str):
            return [np.asarray(prompt, dtype=np.int64)]
        text = self.tokenizer.encode_stream(_blocks(prompt) if isinstance(prompt, Path) else [prompt])
        begin_ids = np.array(self.tokenizer.begin_ids if begins else (), dtype=np.int64)
        return chain([begin_ids], text) if len(begin_ids) else text


def _blocks(path: Path) -> Iterator[str]:
    with open(path, encoding="utf-8", newline="") as file:
        try:
            while block := file.read(BLOCK_CHARACTERS):
                yield block
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is not UTF-8 text: {error}") from error
