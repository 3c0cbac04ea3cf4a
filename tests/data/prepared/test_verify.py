"""`infini inspect`: each kind of damage is told apart, and an intact set is shown and passes."""

from __future__ import annotations

import io
import json
import os
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from data.preparation.options import PrepareOptions
from data.preparation.prepare import prepare
from data.prepared.shards import PreparedSet
from data.prepared.verify import KINDS, verify_set
from launch import cli
from launch.commands.inspect import histogram_lines


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("verify") / "set"
    prepare(["passkey:40,length=512..2K", "python:json"], out, PrepareOptions(shard_bytes=16 << 10))
    return out


@pytest.fixture
def folder(pristine: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pristine, tmp_path / "set"))


def cut_inside_a_document(folder: Path) -> None:
    with open(folder / "train-000001.tar", "r+b") as file:
        file.truncate(5000)


def cut_between_two_documents(folder: Path) -> None:
    with tarfile.open(folder / "train-000001.tar") as tar:
        border = tar.getmembers()[2].offset
    with open(folder / "train-000001.tar", "r+b") as file:
        file.truncate(border)


def cut_to_nothing(folder: Path) -> None:
    (folder / "train-000001.tar").write_bytes(b"")


def change_a_token(folder: Path) -> None:
    prepared = PreparedSet(folder)
    with open(folder / "train-000001.tar", "r+b") as file:
        file.seek(int(prepared._index.offset[prepared._index.shard.tolist().index(1)]) + 20)
        file.write(b"\x01")


def write_another_tar(folder: Path) -> None:
    shutil.copy(folder / "train-000000.tar", folder / "train-000001.tar")


def write_a_shorter_whole_tar(folder: Path) -> None:
    shard = folder / "train-000001.tar"
    with tarfile.open(shard) as tar:
        members = [(member, tar.extractfile(member).read()) for member in tar.getmembers()[:2]]
    with open(shard, "wb") as file, tarfile.open(fileobj=file, mode="w") as tar:
        for member, contents in members:
            tar.addfile(member, io.BytesIO(contents))


def damage_a_header(folder: Path) -> None:
    with open(folder / "train-000001.tar", "r+b") as file:
        file.write(b"\xff" * 512)


def grow_to_a_terabyte(folder: Path) -> None:
    os.truncate(folder / "train-000001.tar", 1 << 40)


def lose_a_shard(folder: Path) -> None:
    (folder / "train-000001.tar").unlink()


def add_a_shard(folder: Path) -> None:
    shutil.copy(folder / "train-000000.tar", folder / "train-009999.tar")


def replace_the_tokenizer(folder: Path) -> None:
    prepare(["passkey:9,length=512"], folder.parent / "other", PrepareOptions(tokenizer="train:300"))
    shutil.rmtree(folder / "tokenizer")
    shutil.copytree(folder.parent / "other" / "tokenizer", folder / "tokenizer")


def lose_the_tokenizer(folder: Path) -> None:
    shutil.rmtree(folder / "tokenizer")


def drop_an_index_row(folder: Path) -> None:
    table = pq.read_table(folder / "train.index.parquet")
    pq.write_table(table.slice(1), folder / "train.index.parquet")


def cut_the_index(folder: Path) -> None:
    (folder / "train.index.parquet").write_bytes((folder / "train.index.parquet").read_bytes()[:-9])


def lose_the_index(folder: Path) -> None:
    (folder / "valid.index.parquet").unlink()


def lose_the_manifest(folder: Path) -> None:
    (folder / "manifest.json").unlink()


def cut_the_manifest(folder: Path) -> None:
    (folder / "manifest.json").write_bytes((folder / "manifest.json").read_bytes()[:-9])


def miscount_in_the_manifest(folder: Path) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["splits"]["train"]["documents"] += 1
    (folder / "manifest.json").write_text(json.dumps(manifest))


DAMAGES: list[tuple[Callable[[Path], None], str, str]] = [
    (cut_inside_a_document, "shard-truncated", r"train-000001\.tar is truncated: 5,000 of "),
    (cut_between_two_documents, "shard-truncated", r"train-000001\.tar is truncated"),
    (cut_to_nothing, "shard-truncated", r"train-000001\.tar is truncated: 0 of"),
    (change_a_token, "shard-changed", r"train-000001\.tar .* tokens of 1 document\(s\) .* the first is '0000"),
    (write_another_tar, "shard-changed", r"train-000001\.tar .* whole tar of \d+ documents"),
    (write_a_shorter_whole_tar, "shard-changed", r"train-000001\.tar .* whole tar of 1 documents"),
    (damage_a_header, "shard-changed", r"train-000001\.tar .* no longer be read as a tar past document 0"),
    (grow_to_a_terabyte, "shard-changed", r"train-000001\.tar .* it has [\d,]+ bytes, where [\d,]+ were written"),
    (lose_a_shard, "shard-missing", r"train-000001\.tar is missing"),
    (add_a_shard, "shard-unknown", r"train-009999\.tar is not in the manifest"),
    (replace_the_tokenizer, "tokenizer-foreign", r"tokenizer has the hash .* but the shards were made with"),
    (lose_the_tokenizer, "tokenizer-missing", "holds no tokenizer"),
    (drop_an_index_row, "index-changed", r"train\.index\.parquet is not the index"),
    (cut_the_index, "index-changed", r"train\.index\.parquet is not the index .* [\d,]+ of [\d,]+ bytes are there"),
    (lose_the_index, "index-missing", r"valid\.index\.parquet is missing"),
    (lose_the_manifest, "manifest", r"there is no manifest\.json"),
    (cut_the_manifest, "manifest", r"manifest\.json is damaged"),
    (miscount_in_the_manifest, "manifest", r"manifest\.json was changed after it was written"),
]


def test_an_intact_set_has_no_problem(pristine: Path) -> None:
    done: list[int] = []
    assert verify_set(pristine, done.append) == []
    assert sum(done) == sum(file.stat().st_size for file in pristine.glob("*.tar"))


@pytest.mark.parametrize(("damage", "kind", "message"), DAMAGES, ids=[damage.__name__ for damage, _, _ in DAMAGES])
def test_each_damage_is_told_apart(
    folder: Path, damage: Callable[[Path], None], kind: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    damage(folder)
    [problem] = verify_set(folder)
    assert problem.kind == kind
    with pytest.raises(ValueError, match=message):
        raise ValueError(problem.message)
    assert cli.main(["inspect", str(folder)]) == 1
    assert f"DAMAGED  {KINDS[kind]}" in capsys.readouterr().out


def test_every_kind_of_problem_is_tried() -> None:
    assert {kind for _, kind, _ in DAMAGES} == set(KINDS)


def test_inspect_shows_the_set(pristine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["inspect", str(pristine)]) == 0
    shown = capsys.readouterr().out
    manifest = json.loads((pristine / "manifest.json").read_text())
    train = manifest["splits"]["train"]
    assert f"train: {train['documents']:,} documents, {train['tokens']:,} tokens" in shown
    for shard in train["shards"]:
        assert f"{shard['name']}" in shown
        assert shard["sha256"][:12] in shown
    assert "There is an important info hidden" in shown
    assert "byte, 257 tokens" in shown
    assert "intact" in shown


def test_inspect_without_verifying_reads_no_hashes(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change_a_token(folder)
    assert cli.main(["inspect", str(folder), "--no-verify"]) == 0
    assert "not verified" in capsys.readouterr().out


def test_inspect_says_what_it_can_show(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["inspect", str(tmp_path)]) == 2
    assert "nothing that can be inspected; valid is: a prepared set" in capsys.readouterr().err
    (tmp_path / "book").mkdir()
    (tmp_path / "book" / "manifest.json").write_text("{}")
    assert cli.main(["inspect", str(tmp_path)]) == 2
    assert f"a run's folder; in it there is {tmp_path / 'book'}\n" in capsys.readouterr().err
    assert cli.main(["inspect", str(tmp_path / "gone")]) == 2
    assert "gone does not exist" in capsys.readouterr().err


def test_histogram_bars_are_proportional() -> None:
    lines = histogram_lines([[2, 1], [8, 80], [16, 40]])
    assert [line.count("#") for line in lines] == [1, 0, 40, 20]
    assert lines[2].split()[:4] == ["8", "..", "15", "80"]
    assert histogram_lines([]) == []
