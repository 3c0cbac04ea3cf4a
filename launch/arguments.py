"""Types of command-line arguments that several commands share."""

from __future__ import annotations

import argparse


def positive_int(text: str) -> int:
    """Raises: ArgumentTypeError (ValueError for what is no number) below 1."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {number}")
    return number
