"""How a text that a model writes after a question is scored, where a benchmark says so.

RULER and BABILong let a model write so many tokens and look for words in them; an exact match of our own answer is
another measure.
"""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Written:
    """What a model writes after a document's prompt. Kinds of scores are subclasses."""

    kept: int
    """First tokens of the document that belong to the prompt."""
    question: tuple[int, ...]
    """Tokens of the prompt after these."""
    new_tokens: int
    """That the model may write."""

    def score(self, text: str) -> float:
        """Of what was written, 0 to 1."""
        raise NotImplementedError


@dataclass(frozen=True)
class MatchAll(Written):
    """RULER's `string_match_all`: the share of references that stand in the text, in small or capital letters."""

    references: tuple[str, ...]

    def score(self, text: str) -> float:
        return sum(self._found(text)) / len(self.references)

    def _found(self, text: str) -> list[bool]:
        """Whether each reference stands in the text."""
        text = re.sub(r"[\x00-\x1f]", "\n", text.strip()).strip().lower()
        return [reference.lower() in text for reference in self.references]


@dataclass(frozen=True)
class MatchPart(MatchAll):
    """RULER's `string_match_part`: any of the references stands in the text."""

    def score(self, text: str) -> float:
        return float(any(self._found(text)))


@dataclass(frozen=True)
class OnlyLabel(Written):
    """BABILong's: the first sentence names, of all possible answers that the question does not, the right one alone."""

    target: str
    labels: tuple[str, ...]
    """All possible answers of the task."""
    asked: str
    """The question in words."""

    def score(self, text: str) -> float:
        # 'Question' with its capital is never found after lower(), as in BABILong's code: its scores are kept so.
        first = text.lower().split(".")[0].split("<context>")[0].split("<example>")[0]
        named = {label.lower() for label in self.labels if label.lower() in first}
        named -= {label.lower() for label in self.labels if label.lower() in self.asked.lower()}
        return float(named == {self.target.lower()})
