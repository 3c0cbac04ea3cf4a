"""What `infini inspect` counts of a set, padding and repeated documents, against counts that one believes at sight."""

from __future__ import annotations

import hashlib
import json
import math
import struct

import numpy as np
import pytest

from data.lanes.loader import LaneLoader
from data.lanes.schedule import WeightedSet
from data.lanes.window import WindowBatch
from data.preparation.options import PrepareOptions
from data.preparation.prepare import prepare
from data.prepared.manifest import load_manifest
from data.prepared.shards import PreparedSet
from data.prepared.survey import DocumentHashes, padding
from data.prepared.verify import verify_set
from launch import cli
from tests.prepared import write_set


@pytest.mark.parametrize("segment", [1, 7, 64])
def test_padding_is_what_the_lanes_lay_out(tmp_path, segment):
    """One epoch of the loader, counted."""
    lengths = [2, 8, 9, 63, 64, 65, 66, 129, 200]
    source = PreparedSet(write_set(tmp_path / "set", lengths, answers=False))
    found = padding(source.lengths, segment)

    def epoch(packing: bool) -> WindowBatch:
        """A lane alone reads every document once, then goes on: as many segments as an epoch has."""
        loader = LaneLoader(
            [WeightedSet(source, 1.0, 1.0)],
            **{"lanes": 1, "first_lane": 0, "last_lane": 1, "seed": 3, "stagger": False, "prefetch": 0},
            segments_per_window=math.ceil(found.packed_segments) if packing else found.segments,
            segment_length=segment,
            packing=packing,
        )
        return loader.next_batch()

    batch, packed = epoch(False), epoch(True)
    assert sum(len(lane) for lane in batch.documents) == len(lengths)
    assert batch.padded_tokens == found.segments * segment - found.labels
    assert found.share == pytest.approx(batch.padded_tokens / (found.segments * segment))
    assert packed.padded_tokens == 0
    second_epoch = packed.tokens.numel() - round(found.packed_segments * segment)
    begun = packed.starts.flatten()
    assert int(begun[: begun.numel() - second_epoch].sum()) == len(lengths)
    assert second_epoch == 0 or begun[-second_epoch]


def test_padding_of_nothing_and_of_no_segment():
    assert padding(np.array([1, 1]), 8).share == padding(np.array([1]), 8).packed_segments == 0.0
    with pytest.raises(ValueError, match="at least 1 token"):
        padding(np.array([3]), 0)


def make_set(folder, texts, **options):
    folder.mkdir()
    source = folder / "texts.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    prepare([str(source)], folder / "set", PrepareOptions(**options))
    return folder / "set"


def test_repeats_against_the_tokens_themselves(tmp_path):
    generator = np.random.default_rng(1)
    texts = [f"document {number} " * int(number % 5 + 1) for number in generator.integers(0, 40, 120)]
    folder = make_set(tmp_path / "a", texts, valid_fraction=0.3)
    hashes = DocumentHashes(load_manifest(folder))
    assert not verify_set(folder, seen=hashes.add)
    contents = {}
    for split in ("train", "valid"):
        source = PreparedSet(folder, split)
        contents[split] = [source.read(i).tobytes() for i in range(len(source))]
        seen, again = set(), []
        for tokens in contents[split]:
            again.append(tokens in seen)
            seen.add(tokens)
        assert hashes.repeated(split).tolist() == again and any(again)
        found = hashes.repeats(split, source.lengths)
        assert found.documents == sum(again)
        assert found.tokens == sum(
            len(tokens) // 8 for tokens, there in zip(contents[split], again, strict=True) if there
        )
        counts = [contents[split].count(tokens) for tokens in contents[split]]
        assert found.most == max(counts) and counts[found.example] == found.most
    both = [tokens in contents["train"] for tokens in contents["valid"]]
    assert hashes.shared("valid", "train").tolist() == both and any(both) and not all(both)


def test_hashes_that_differ_in_their_last_compared_byte_are_others():
    class Entry:
        documents = 3

    class Manifest:
        splits = {"train": Entry}

    class Record:
        def __init__(self, value):
            self.hash, self.source = (struct.pack("<QQ", 7, value) + hashlib.sha256().digest()[:16]).hex(), "s"

    hashes = DocumentHashes(Manifest)
    for number, value in enumerate((1, 2, 1)):
        hashes.add("train", number, Record(value))
    assert hashes.repeated("train").tolist() == [False, False, True]


def test_the_command_says_and_draws_it(tmp_path, capsys):
    folder = make_set(tmp_path / "a", [f"text {number % 30}" * 9 for number in range(60)], valid_fraction=0.2)
    picture = tmp_path / "survey.png"
    assert cli.main(["inspect", str(folder), "--segment-length", "64", "--plot", str(picture)]) == 0
    shown = capsys.readouterr().out
    train, valid = (PreparedSet(folder, split).lengths for split in ("train", "valid"))
    for lengths in (train, valid):
        assert f"{padding(lengths, 64).share:.1%}" in shown
    assert "(--segment-length)" in shown and "documents with the same tokens" in shown
    assert "texts.jsonl" in shown and "(100.0%)" in shown
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert cli.main(["inspect", str(folder), "--no-verify", "--plot", str(picture)]) == 0
    shown = capsys.readouterr().out
    assert "documents not compared with each other" in shown and "8,192" in shown


def test_a_configuration_names_the_segment_and_other_folders_are_refused(tmp_path, capsys):
    folder = write_set(tmp_path / "set", [30, 50])
    assert cli.main(["inspect", str(folder), "--config", "configs/paper_lm.yaml", "--no-verify"]) == 0
    assert "model.segment_length of configs/paper_lm.yaml" in capsys.readouterr().out
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    assert cli.main(["inspect", str(tmp_path / "run"), "--segment-length", "64"]) == 2
    assert "--segment-length is about prepared sets" in capsys.readouterr().err
