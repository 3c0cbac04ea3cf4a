"""The tokenizer that belongs to a checkpoint."""

from __future__ import annotations

from pathlib import Path

from data.tokenizer import Tokenizer, load_tokenizer
from pipeline.config import Config
from pipeline.config_io import ConfigError


def find_tokenizer(
    checkpoint: Path, config: Config, vocab_size: int, given: str | Path | None
) -> tuple[Path, Tokenizer]:
    """The tokenizer of a model with `vocab_size` tokens, and the folder that holds its files.

    It is `given`, a folder of a tokenizer or of a prepared set; else the one in the run's folder, else its data's.

    Raises:
        ValueError: there is none, or it has tokens that the model does not know.
    """
    if given is not None:
        place = Path(given)
    else:
        run_dir = checkpoint.parent.parent
        places = [run_dir, *(Path(entry.path) for entry in config.data.sets)]
        place = next((place for place in places if (place / "tokenizer").is_dir()), None)
        if place is None:
            raise ConfigError(
                [
                    f"{checkpoint}: there is no {run_dir / 'tokenizer'}, and none of data.sets is there any more: give "
                    "the folder of a tokenizer or of a prepared set with --tokenizer"
                ]
            )
    tokenizer = load_tokenizer(place)
    if tokenizer.vocab_size > vocab_size:
        raise ConfigError([f"the tokenizer of {place} has {tokenizer.vocab_size} tokens; the model knows {vocab_size}"])
    return place / "tokenizer" if (place / "tokenizer").is_dir() else place, tokenizer
