"""Text without a place to break, kept from costing the training of a tokenizer minutes.

A byte-level BPE counts pairs inside of words: runs of letters, of other characters, or of white space. Ordinary words
repeat, and each counts once; a run of megabytes is one word, and every merge goes through all of it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

LONGEST_RUN = 256
"""Characters; half a million letters in one run took more than two minutes, in runs of 256 six seconds."""
MOST_CHARACTERS = 1 << 20
"""Of longer runs all together: 8 MB of them took 100 seconds, and teach a BPE no more than 1 MB."""

_LONG = f"{{{LONGEST_RUN + 1},}}"
_RUN = re.compile(rf"[^\W\d_]{_LONG}|(?:[^\w\s]|_){_LONG}|\s{_LONG}")


class RunCutter:
    """Cuts the runs of texts, and counts."""

    def __init__(self) -> None:
        self.runs = 0
        """Longer than `LONGEST_RUN`."""
        self.characters = 0
        """In them."""
        self.left_out = 0
        """Of these, past `MOST_CHARACTERS`."""

    def cut(self, text: str) -> Iterator[str]:
        """Pieces of `text` without long runs; they join to it, but for what is left out."""
        begin = 0
        for run in _RUN.finditer(text):
            start, end = run.span()
            stop = start + min(end - start, max(MOST_CHARACTERS - self.characters, LONGEST_RUN))
            self.runs += 1
            self.characters += end - start
            self.left_out += end - stop
            # The first part stays with what stands before it, a word's space for instance.
            yield text[begin : start + LONGEST_RUN]
            for at in range(start + LONGEST_RUN, stop, LONGEST_RUN):
                yield text[at : min(at + LONGEST_RUN, stop)]
            begin = end
        if begin < len(text):
            yield text[begin:]

    @property
    def note(self) -> str | None:
        """What was done, for people; None where there was nothing to do."""
        if not self.runs:
            return None
        left_out = f", and {self.left_out:,} of them left out" if self.left_out else ""
        return (
            f"the tokenizer's sample has {self.runs:,} runs of more than {LONGEST_RUN} characters without a break, "
            f"{self.characters:,} characters together: cut every {LONGEST_RUN}{left_out}"
        )
