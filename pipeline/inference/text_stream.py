"""Text of tokens that come one by one: whole characters only, and an end at a stop string.

A token may end inside a character, and a stop string inside a token or across several. Text is given out as soon as no
later token can change it; the pieces joined are the text.
"""

from __future__ import annotations

from collections.abc import Sequence

from data.tokenizer.tokenizer import Tokenizer

UNKNOWN = "\ufffd"
"""What a tokenizer makes of bytes that are no character, or no whole one yet."""
OPEN_BYTES = 3
"""A character of four bytes lacks one at the most."""


class TextStream:
    """Turns one prompt's new tokens into text.

    Args:
        stop: strings that end the text; they are not part of it.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()) -> None:
        self.tokenizer = tokenizer
        self.stop = [s for s in stop if s]
        self.text = ""
        """Given out so far."""
        self.stopped = False
        self._tokens: list[int] = []
        self._shown = 0
        """Characters of the text of `_tokens` that have been taken already."""
        self._held = ""
        """Whole characters that may begin a stop string."""

    def push(self, token: int) -> str:
        """Take a token; returns the text that it settles, often none. After a stop string `stopped` is True."""
        self._tokens.append(token)
        decoded = self.tokenizer.decode(self._tokens)
        # Never back: more bytes can turn what was a character into an unknown one, with tokenizers that decode runs.
        settled = max(self._shown, len(decoded) - _open_characters(decoded))
        piece, self._shown = decoded[self._shown : settled], settled
        alone = self.tokenizer.decode([token])
        if settled == len(decoded) and alone and UNKNOWN not in alone:
            # Decoding goes on from this token: some tokenizers drop the space before a text's first word.
            self._tokens, self._shown = [token], len(alone)
        return self._give(piece)

    def finish(self) -> str:
        """The rest, when no token follows."""
        if self.stopped:
            return ""
        piece = self._give(self.tokenizer.decode(self._tokens)[self._shown :])
        if not self.stopped:
            self.text += self._held
            piece += self._held
        return piece

    def _give(self, piece: str) -> str:
        self._held += piece
        found = [at for s in self.stop if (at := self._held.find(s)) >= 0]
        if found:
            self.stopped = True
            given, self._held = self._held[: min(found)], ""
        else:
            cut = len(self._held) - self._possible_stop()
            given, self._held = self._held[:cut], self._held[cut:]
        self.text += given
        return given

    def _possible_stop(self) -> int:
        """Length of the longest end of the held text that begins a stop string."""
        longest = max((len(s) for s in self.stop), default=1) - 1
        for length in range(min(longest, len(self._held)), 0, -1):
            if any(s.startswith(self._held[-length:]) for s in self.stop):
                return length
        return 0


def _open_characters(text: str) -> int:
    """Replacement characters at the end that more bytes could still turn into one character."""
    open_characters = len(text) - len(text.rstrip(UNKNOWN))
    return min(open_characters, OPEN_BYTES)
