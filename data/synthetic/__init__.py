"""Synthetic long-range documents: facts hidden in filler, and questions about them (see docs/synthetic_data.md).

A task is named and set up by a *spec*, the same for `infini prepare` and for an evaluation:

    TASK:N[,length=...][,depth=...][,seed=...][,filler=SET or FILE][,OPTION=...]

N documents, their lengths in tokens. `filler=SET` hides the facts in the text of a prepared set in place of the paper's
sentences, `filler=FILE` between the sentences of a text file. `questions=FILE` is what `qa_1` and `qa_2` ask.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from data.files import read_text
from data.prepared.shards import PreparedSet
from data.synthetic.babilong import BABILONG
from data.synthetic.base import FILLER, Generator, SyntheticDocument
from data.synthetic.essay_filler import EssayFiller
from data.synthetic.facts import FactsGenerator
from data.synthetic.needles import NeedlesGenerator
from data.synthetic.passkey import PasskeyGenerator
from data.synthetic.recall import RecallGenerator
from data.synthetic.ruler_niah import NIAH
from data.synthetic.ruler_qa import QA
from data.synthetic.ruler_vt import VtGenerator
from data.synthetic.ruler_words import CweGenerator, FweGenerator
from data.synthetic.text_filler import TextFiller
from data.synthetic.tracking import TrackingGenerator
from data.synthetic.words import WordsGenerator
from data.tokenizer.tokenizer import Tokenizer

__all__ = ["FILLER", "TASKS", "Generator", "PasskeyGenerator", "Spec", "SyntheticDocument", "build_generator"]

TASKS = {
    "passkey": PasskeyGenerator,
    "needles": NeedlesGenerator,
    "tracking": TrackingGenerator,
    "words": WordsGenerator,
    "facts": FactsGenerator,
    "recall": RecallGenerator,
    **NIAH,
    "vt": VtGenerator,
    "cwe": CweGenerator,
    "fwe": FweGenerator,
    **QA,
    **BABILONG,
}

TEXT_LIMIT = 1 << 28
"""Bytes of a text file that is a filler: far above what essays have."""
_MOST_OF_AN_OPTION = 10_000
"""Far above what a document of a million tokens holds of anything; generators make a list of it."""


def is_synthetic(spec: str) -> bool:
    """Whether a source's name is a synthetic task's spec."""
    return spec.partition(":")[0] in TASKS and ":" in spec


def task_options(task: str) -> dict[str, int]:
    """The options of a task's own, with their defaults."""
    parameters = inspect.signature(TASKS[task]).parameters
    return {name: p.default for name, p in parameters.items() if name not in ("tokenizer", source_option(task))}


def source_option(task: str) -> str | None:
    """The option that names the text that a task's documents are made with: `filler`, or `questions`; None where there
    is no such option."""
    if task in QA:
        return "questions"
    return "filler" if "filler" in inspect.signature(TASKS[task]).parameters else None


@dataclass(frozen=True)
class Spec:
    """A spec taken apart; what the values mean is the reader's business."""

    text: str
    task: str
    count: str
    values: dict[str, str]
    """`length`, `depth`, `seed`, `filler` (or `questions`, a file) and the task's own options, as far as they are
    given."""

    @property
    def source(self) -> str | None:
        """The value of `source_option`."""
        option = source_option(self.task)
        return None if option is None else self.values.get(option)

    @classmethod
    def parse(cls, text: str) -> Spec:
        """Raises: ValueError for an unknown task or option, or without a length."""
        task, _, rest = text.partition(":")
        if task not in TASKS:
            raise ValueError(f"{text!r}: no synthetic task {task!r}; valid are {', '.join(TASKS)}")
        count, *parts = rest.split(",")
        pairs = [(name, value) for name, _, value in (part.partition("=") for part in parts)]
        values = dict(pairs)
        if len(values) < len(pairs):
            raise ValueError(f"an option stands twice in {text!r}")
        known = ["length", "seed", *task_options(task)]
        known += ["depth"] if TASKS[task].has_depth else []
        known += [option] if (option := source_option(task)) else []
        unknown = [name for name in values if name not in known]
        if unknown:
            raise ValueError(f"unknown option {unknown[0]!r}")
        if "length" not in values:
            raise ValueError("length is missing")
        if (needed := getattr(TASKS[task], "needs_filler", None)) and "filler" not in values:
            raise ValueError(f"filler is missing: {task} needs {needed}; give a text file or a prepared set")
        if task in QA and "questions" not in values:
            raise ValueError(f"questions is missing: {task} needs {QA[task].needs}")
        return cls(text, task, count, values)

    @staticmethod
    def usage(task: str) -> str:
        """How a task's spec looks."""
        depth = "[,depth=A..B]" if TASKS[task].has_depth else ""
        must = getattr(TASKS[task], "needs_filler", None) is not None
        filler = ",filler=SET or FILE" if must else "[,filler=SET or FILE]"
        source = {None: "", "filler": filler, "questions": ",questions=FILE"}[source_option(task)]
        own = "".join(f"[,{name}=K]" for name in task_options(task))
        return f"{task}:N,length=LO..HI{depth}[,seed=K]{source}{own}, for instance {task}:500,length=512..16K"


def is_text_file(filler: str) -> bool:
    """Whether a filler is a text file, not a prepared set."""
    return Path(filler).is_file()


@lru_cache(maxsize=64)
def _cached(task: str, tokenizer: Tokenizer, source: str | None, split: str, options: tuple) -> Generator:
    arguments = dict(options)
    if source is None:
        pass
    elif task in QA:
        if not is_text_file(source):
            raise ValueError(f"questions: there is no file {source}")
        arguments["questions"] = QA[task].read(source)
    elif is_text_file(source):
        arguments["filler"] = EssayFiller(tokenizer.encode, read_text(source, TEXT_LIMIT), source)
    else:
        prepared = PreparedSet(source, split)
        if prepared.tokenizer_hash != tokenizer.hash:
            raise ValueError(f"filler {source} was prepared with another tokenizer")
        arguments["filler"] = TextFiller(prepared)
    return TASKS[task](tokenizer, **arguments)


def build_generator(
    task: str,
    tokenizer: Tokenizer,
    options: Mapping[str, int],
    *,
    source: str | Path | None = None,
    split: str = "train",
) -> Generator:
    """The generator of a task.

    Args:
        options: of the task, see `task_options`.
        source: a prepared set or a text file, whose text the facts are hidden in; None is the paper's sentences. Of
            `qa_1` and `qa_2` the file of questions.
        split: of that set.

    Raises:
        ValueError: an option does not fit, or the set is not there, has no such split or another tokenizer.
    """
    for name, value in options.items():
        if value > _MOST_OF_AN_OPTION:
            raise ValueError(f"{name} = {value}: must not be more than {_MOST_OF_AN_OPTION:,}")
    path = None if source is None else str(source)
    return _cached(task, tokenizer, path, split, tuple(sorted(options.items())))
