"""Parts made apart and joined are the set that one run makes: the same bytes, whatever is cut, held out or left out."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from data.files import FileError
from data.preparation.joining import order
from data.preparation.options import PrepareOptions
from data.preparation.parts import PART, Leading, found_parts, part_name, read_part, shared_out
from data.preparation.pool import EncodedDocument
from data.preparation.prepare import join_parts, prepare, prepare_parts
from data.preparation.sources import open_sources
from data.preparation.splits import SplitAssigner
from data.prepared.shards import PreparedSet
from data.prepared.verify import verify_set
from launch import cli


def write_sources(folder: Path, files: int = 7, seed: int = 0) -> list[str]:
    generator = np.random.default_rng(seed)
    texts = folder / "texts"
    texts.mkdir(parents=True)
    for number in range(files):
        lines = [
            json.dumps({"text": "word " * int(generator.integers(0, 300))})
            for _ in range(int(generator.integers(1, 9)))
        ]
        (texts / f"records{number}.jsonl").write_text("\n".join(lines) + "\n")
        (texts / f"text{number}.md").write_text("line\n" * int(generator.integers(1, 2000)))
    (texts / "empty.txt").write_text("")
    return [str(texts), "passkey:9,length=256..1K", "python:json"]


def contents(folder: Path) -> dict[str, bytes]:
    return {
        file.relative_to(folder).as_posix(): file.read_bytes()
        for file in sorted(folder.rglob("*"))
        if file.is_file() and "parts" not in file.relative_to(folder).parts
    }


@pytest.mark.parametrize(
    ("parts", "options", "processes"),
    [
        (3, {"shard_bytes": 16 << 10}, 1),
        (5, {"shard_bytes": 16 << 10, "valid_fraction": 0.4}, 2),
        (40, {"shard_bytes": 64 << 10, "valid_fraction": 0.0}, 1),  # parts without a document
        (4, {"shard_bytes": 32 << 10, "valid_fraction": 1e-9}, 1),  # one document is held back for `valid`
        (4, {"shard_bytes": 32 << 10, "valid_fraction": 1 - 1e-9}, 1),  # and one for `train`
        (2, {"min_tokens": 300, "skip_bad": True}, 1),
    ],
)
def test_joined_parts_are_the_bytes_of_one_run(tmp_path, parts, options, processes):
    sources, options = write_sources(tmp_path), PrepareOptions(**options)
    prepare(sources, tmp_path / "whole", options)
    for number in np.random.default_rng(parts).permutation(parts) + 1:  # in any order
        prepare_parts(sources, tmp_path / "set", options, range(number, number + 1), parts)
    join_parts(tmp_path / "set", processes=processes)
    whole, joined = contents(tmp_path / "whole"), contents(tmp_path / "set")
    assert list(joined) == list(whole)
    for name in whole:
        assert joined[name] == whole[name], name
    assert not verify_set(tmp_path / "set")
    # What asks for the whole set finds it.
    assert not prepare(sources, tmp_path / "set", options).built


def test_documents_that_are_cut_stay_together(tmp_path):
    sources, options = write_sources(tmp_path)[:1], PrepareOptions(max_tokens=200, valid_fraction=1e-9)
    prepare(sources, tmp_path / "whole", options)
    prepare_parts(sources, tmp_path / "set", options, range(1, 6), 5)
    join_parts(tmp_path / "set")
    assert contents(tmp_path / "set") == contents(tmp_path / "whole")
    assert len(PreparedSet(tmp_path / "set", "valid")) > 1  # the parts of the one that was held back


def test_a_trained_tokenizer_and_bad_records(tmp_path):
    sources = write_sources(tmp_path)[:1]
    for number in (1, 4):
        with open(tmp_path / "texts" / f"records{number}.jsonl", "a") as file:
            file.write("no json\n" * 8)
    options = PrepareOptions(tokenizer="train:300", skip_bad=True)
    prepare(sources, tmp_path / "tokenizer", options)
    with pytest.raises(ValueError, match="train it once"):
        prepare_parts(sources, tmp_path / "set", options, range(1, 2), 2)
    options = PrepareOptions(tokenizer=str(tmp_path / "tokenizer"), skip_bad=True)
    prepare(sources, tmp_path / "whole", options)
    prepare_parts(sources, tmp_path / "set", options, range(1, 4), 3)
    manifest = join_parts(tmp_path / "set").manifest
    assert manifest.sources[0].bad_records == 16 and len(manifest.sources[0].bad) == 10
    assert contents(tmp_path / "set") == contents(tmp_path / "whole")


def naive_order(parts: list[list[str]], fraction: float) -> dict[str, list[str]]:
    """One process meets all documents."""
    assigner, found = SplitAssigner(fraction), {"train": [], "valid": []}
    for name in (name for part in parts for name in part):
        for split, document in assigner.add(document_called(name)):
            found[split].append(document.id)
    for split, document in assigner.finish():
        found[split].append(document.id)
    return found


def document_called(name: str) -> EncodedDocument:
    return EncodedDocument(name, 0, 1, np.zeros(2), [], [])


def test_the_order_is_that_of_one_process():
    generator = np.random.default_rng(5)
    for case in range(2000):
        fraction = float(generator.choice([0.0, 0.02, 0.1, 0.5, 0.9, 0.98]))
        parts = [
            [f"{case}-{part}-{number}" for number in range(int(generator.integers(0, 6)))]
            for part in range(int(generator.integers(1, 6)))
        ]
        leading, written = [], []
        for part in parts:
            leading.append(Leading())
            written.append({"train": [], "valid": []})
            for name in part:
                document = document_called(name)
                split = SplitAssigner(fraction).split(document)
                written[-1][split].append(name)
                leading[-1].add(split, document, len(written[-1][split]) - 1, len(written[-1][split]))
        counts = [{split: len(names) for split, names in one.items()} for one in written]
        pieces = order(leading, counts, fraction)
        found = {
            split: [name for piece in of for name in written[piece.part][piece.split][piece.first : piece.stop]]
            for split, of in pieces.items()
        }
        assert found == naive_order(parts, fraction), (case, fraction, parts)


@pytest.mark.parametrize("parts", [1, 2, 3, 7, 50])
def test_every_unit_is_in_one_part(tmp_path, parts):
    sources = open_sources(write_sources(tmp_path), PrepareOptions())
    shares = [shared_out(sources, part, parts) for part in range(1, parts + 1)]
    for number, source in enumerate(sources):
        edges = [units[number] for units, _ in shares]
        assert edges[0][0] == 0 and edges[-1][1] == source.units
        assert all(before[1] == after[0] for before, after in zip(edges, edges[1:], strict=False))
        ids = [job.id for first, last in edges for job in source.jobs(first, last)]
        assert ids == [job.id for job in source.jobs()]
        files = [file.name for first, last in edges for file in source.files_of(first, last)]
        assert files == [file.name for file in source.files]


def test_what_does_not_belong_together_is_named(tmp_path):
    sources, out = write_sources(tmp_path)[:1], tmp_path / "set"
    with pytest.raises(ValueError, match="no folder with parts"):
        join_parts(out)
    made = prepare_parts(sources, out, PrepareOptions(), range(1, 4), 4)
    assert made.built == 3
    with pytest.raises(ValueError, match="of 4 parts these are missing: 4"):
        join_parts(out)
    with pytest.raises(ValueError, match="min_tokens is 2 there and 3 here"):
        prepare_parts(sources, out, PrepareOptions(min_tokens=3), range(1, 2), 4)
    prepare_parts(sources, out, PrepareOptions(min_tokens=3), range(4, 5), 4)
    with pytest.raises(ValueError, match="00004-of-00004 and .*00001-of-00004 were made with different options"):
        join_parts(out)
    (out / "parts" / part_name(4, 4) / PART).unlink()
    with pytest.raises(ValueError, match="is no finished part"):
        join_parts(out)
    prepare_parts(sources, tmp_path / "other", PrepareOptions(), range(2, 3), 5)
    (tmp_path / "other" / "parts" / part_name(2, 5)).rename(out / "parts" / part_name(2, 5))
    with pytest.raises(ValueError, match="parts of 4 and of 5"):
        join_parts(out)


def test_a_finished_part_stays_and_a_changed_source_is_seen(tmp_path):
    sources, out, said = write_sources(tmp_path)[:1], tmp_path / "set", []
    prepare_parts(sources, out, PrepareOptions(), range(1, 3), 2)
    before = contents(out / "parts" / part_name(1, 2))
    assert prepare_parts(sources, out, PrepareOptions(), range(1, 3), 2, say=said.append).built == 0
    assert said == ["part 1 of 2 is there already", "part 2 of 2 is there already"]
    first = tmp_path / "texts" / "records0.jsonl"
    os.utime(first, (1, 1))
    with pytest.raises(ValueError, match=r"records0\.jsonl was written to since"):
        prepare_parts(sources, out, PrepareOptions(), range(1, 2), 2)
    assert contents(out / "parts" / part_name(1, 2)) == before


def test_a_damaged_part_is_not_joined(tmp_path):
    sources, out = write_sources(tmp_path)[:1], tmp_path / "set"
    prepare_parts(sources, out, PrepareOptions(), range(1, 3), 2)
    folder = out / "parts" / part_name(2, 2)
    shard = folder / "train-000000.tar"
    part = PreparedSet(folder, manifest=read_part(folder).manifest)
    damaged = bytearray(shard.read_bytes())
    damaged[int(part._index.offset[1]) + 2] ^= 1
    shard.write_bytes(damaged)
    with pytest.raises(FileError, match=r"train-000000\.tar:00000001: its tokens are not those of its hash"):
        join_parts(out)
    assert sorted(path.name for path in out.iterdir()) == ["parts"]  # nothing of a set
    record = json.loads((folder / PART).read_text())
    (folder / PART).write_text(json.dumps(record | {"longest": 5}))
    with pytest.raises(FileError, match="was changed after it was written"):
        found_parts(out)


def test_a_killed_part_is_made_again_and_one_part_has_one_maker(tmp_path):
    sources, out = write_sources(tmp_path, files=60), tmp_path / "set"
    command = [sys.executable, "-m", "launch.cli", "prepare", *sources, "passkey:4000,length=4K..8K"]
    command += ["--part", "1/1", "--out", str(out), "--processes", "1"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    building = out / "parts" / f".{part_name(1, 1)}"
    deadline = time.monotonic() + 120
    while not list(building.glob("train-*.tar")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    with pytest.raises(ValueError, match="another `infini prepare` is writing to"):
        prepare_parts(sources, out, PrepareOptions(), range(1, 2), 1)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert building.is_dir() and not (building / PART).exists()
    (building / "mine.txt").write_text("x")
    with pytest.raises(ValueError, match=r"holds other files \(mine\.txt"):
        prepare_parts(sources, out, PrepareOptions(), range(1, 2), 1)
    (building / "mine.txt").unlink()
    prepare_parts(sources, out, PrepareOptions(), range(1, 2), 1)
    assert not building.exists()
    join_parts(out)
    prepare(sources, tmp_path / "whole", PrepareOptions())
    assert contents(out) == contents(tmp_path / "whole")


def test_the_command(tmp_path, capsys):
    sources, out = write_sources(tmp_path), str(tmp_path / "set")
    options = ["--out", out, "--processes", "1"]
    for part in ("1/3", "2-3/3"):
        assert cli.main(["prepare", *sources, "--part", part, *options]) == 0
    assert "2 of 2 parts made" in capsys.readouterr().out
    assert cli.main(["prepare", "--join", *options]) == 0
    assert "prepared" in capsys.readouterr().out
    assert cli.main(["prepare", "--join", *options]) == 2
    assert "holds a set already" in capsys.readouterr().err
    assert cli.main(["prepare", "--join", "--overwrite", *options]) == 0
    # A folder with a set and its parts is passed over as a source.
    assert cli.main(["prepare", str(tmp_path), "--out", str(tmp_path / "all"), "--processes", "1"]) == 0
    assert "1 prepared sets" in capsys.readouterr().err
    for part in ("0/3", "4/3", "2-1/3", "x", "1/0"):
        with pytest.raises(SystemExit, match="2"):
            cli.main(["prepare", *sources, "--part", part, *options])
    assert cli.main(["prepare", "x", "--join", *options]) == 2
    assert cli.main(["prepare", *options]) == 2
