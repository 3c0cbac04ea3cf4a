"""The tokenizer that belongs to a checkpoint: the same tokens, whatever its size."""

from __future__ import annotations

from pathlib import Path

from data.files import Place, place
from data.tokenizer.tokenizer import Tokenizer, load_tokenizer
from pipeline.checkpoint.folder import SUMMARY
from pipeline.checkpoint.reader import CheckpointReader
from pipeline.config.load import ConfigError
from pipeline.config.schema import Config


def find_tokenizer(
    reader: CheckpointReader, config: Config, given: str | Path | None, notes: list[str]
) -> tuple[Place, Tokenizer]:
    """The tokenizer of a checkpoint's model, and the folder that holds its files.

    It is `given`, a folder of a tokenizer or of a prepared set; else the one in the run's folder, else its data's.

    Args:
        notes: gets what a reader should know.

    Raises:
        ValueError: there is none, or it is another than the one that the model was trained with.
    """
    run_dir = reader.folder.parent.parent
    # Sets may lie in a store: it is not asked where the run's own tokenizer, which is known by its hash, is there.
    known = (run_dir / "tokenizer").is_dir() and reader.summary.tokenizer_sha256 is not None
    places = [run_dir, *(place(entry.path) for entry in config.data.sets if not known)]
    places = [found for found in places if (found / "tokenizer").is_dir()] if given is None else [place(given)]
    if not places:
        raise ConfigError(
            [
                f"{reader.folder}: there is no {run_dir / 'tokenizer'}, and none of data.sets is there any more: give "
                "the folder of a tokenizer or of a prepared set with --tokenizer"
            ]
        )
    chosen = places[0]
    tokenizer = load_tokenizer(chosen)
    if tokenizer.vocab_size > reader.summary.vocab_size:
        raise ConfigError(
            [
                f"the tokenizer of {chosen} has {tokenizer.vocab_size} tokens; the model of {reader.folder} knows "
                f"{reader.summary.vocab_size}"
            ]
        )
    notes += check_tokenizer(reader, tokenizer.hash, chosen)
    if reader.summary.tokenizer_sha256 is None:
        for other in places[1:]:
            if load_tokenizer(other).hash != tokenizer.hash:
                raise ConfigError(
                    [
                        f"{chosen} and {other} hold different tokenizers, and {reader.folder / SUMMARY} does not say "
                        "which one the model was trained with: choose with --tokenizer"
                    ]
                )
    return chosen / "tokenizer" if (chosen / "tokenizer").is_dir() else chosen, tokenizer


def check_tokenizer(reader: CheckpointReader, found: str, place: Place | str) -> list[str]:
    """Refuse to read a checkpoint's model with other tokens than those it was trained with.

    Args:
        found: hash of the tokenizer.
        place: where it is.

    Returns:
        A note when the checkpoint does not say which tokenizer it was trained with.

    Raises:
        ConfigError: it is another one.
    """
    trained = reader.summary.tokenizer_sha256
    if trained is None:
        return [
            f"{reader.folder / SUMMARY} does not say which tokenizer the model was trained with (older versions did "
            f"not record it): that of {place} is taken without comparison"
        ]
    if trained != found:
        raise ConfigError(
            [
                f"the tokenizer of {place} ({found[:12]}) is not the one that {reader.folder} was trained with "
                f"({trained[:12]}): its tokens mean other things to the model"
            ]
        )
    return []


def check_run_folder(run_dir: Path, found: str, place: Place | str) -> None:
    """Refuse a run whose folder holds another tokenizer than its data was prepared with.

    Raises:
        ConfigError: it does.
    """
    if (run_dir / "tokenizer").is_dir() and (own := load_tokenizer(run_dir).hash) != found:
        raise ConfigError(
            [
                f"the tokenizer in {run_dir / 'tokenizer'} ({own[:12]}) is not the one that {place} was prepared with "
                f"({found[:12]})"
            ]
        )
