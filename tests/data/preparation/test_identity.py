"""A complete set is kept only while its sources are what it was made of, and only its own files are ever removed."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import data.preparation.building
import data.preparation.prepare
from data.preparation.options import PrepareOptions
from data.preparation.prepare import Prepared, prepare
from data.prepared.manifest import MANIFEST, load_manifest
from tests.prepared import write_set

OPTIONS = PrepareOptions(valid_fraction=0.0)
TEXT = "the colour of the box is red."
OTHER = "the colour of the box is BLU."


def prepared(
    *sources: object, out: Path, options: PrepareOptions = OPTIONS, **more: bool
) -> tuple[Prepared, list[str]]:
    said: list[str] = []
    return prepare([str(source) for source in sources], out, options, say=said.append, **more), said


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "t"
    folder.mkdir()
    for name in "abc":
        (folder / f"{name}.txt").write_text(TEXT)
    (folder / "d.jsonl").write_text(json.dumps({"text": TEXT}) + "\n")
    pq.write_table(pa.table({"text": [TEXT]}), folder / "e.parquet", use_dictionary=False, compression="none")
    return folder


@pytest.mark.parametrize("name", ["b.txt", "d.jsonl", "e.parquet"])
@pytest.mark.parametrize("times", ["new", "put back"])
@pytest.mark.parametrize("table", ["whole", "lost", "damaged", "forged"])
def test_a_change_of_equal_size_is_noticed(folder: Path, tmp_path: Path, name: str, times: str, table: str) -> None:
    out, file = tmp_path / "s", folder / name
    assert prepared(folder, out=out)[0].built
    assert not prepared(folder, out=out)[0].built
    before = file.stat()
    contents = file.read_bytes()
    file.write_bytes(contents.replace(TEXT.encode(), OTHER.encode()))
    if times == "put back":
        os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    inputs = out / "inputs.parquet"
    if table == "lost":
        inputs.unlink()
    elif table == "damaged":
        inputs.write_bytes(inputs.read_bytes()[:-20])
    elif table == "forged":
        rows = pq.read_table(inputs)
        at = rows.schema.get_field_index("ctime_ns")
        rows = rows.set_column(at, rows.schema.field(at), pa.array([file.stat().st_ctime_ns] * 5))
        at = rows.schema.get_field_index("sha256")
        pq.write_table(rows.set_column(at, rows.schema.field(at), pa.array(["0" * 64] * 5)), inputs)
    named = f": t/{name}" if table == "whole" else ""
    with pytest.raises(ValueError, match=rf"files of {folder} have changed{named}"):
        prepared(folder, out=out)
    file.write_bytes(contents)
    again, said = prepared(folder, out=out)
    assert not again.built
    touched = 1 if table == "whole" else 5
    assert said == [f"{folder}: {touched} files have other times and the same contents (read and compared)"]


def test_a_set_below_its_source_is_no_input(folder: Path, tmp_path: Path) -> None:
    first, said = prepared(folder, out=folder / "sets" / "one")
    assert first.built and said == []
    again, said = prepared(folder, out=folder / "sets" / "one")
    assert not again.built and said == [f"{folder}: passed over 1 prepared sets (sets/one) (see --text-pattern)"]


def test_files_that_come_and_go_are_named(folder: Path, tmp_path: Path) -> None:
    prepared(folder, out=tmp_path / "s")
    (folder / "a.txt").rename(folder / "z.txt")
    (folder / "b.txt").write_text("longer than it was, so there")
    with pytest.raises(ValueError, match=r"have changed: t/z\.txt is new, t/a\.txt is gone, t/b\.txt\)"):
        prepared(folder, out=tmp_path / "s")


def test_packages_and_fillers_are_compared_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "site" / "imagined_here"
    package.mkdir(parents=True)
    (package / "__init__.py").write_bytes(b"\xef\xbb\xbfNAME = 1\n")
    (package / "old.py").write_bytes(b"# \xe9\n")
    monkeypatch.syspath_prepend(str(package.parent))
    filler = write_set(tmp_path / "filler", [3000])
    sources = "python:imagined_here", f"passkey:2,length=512,filler={filler}"
    manifest = prepared(*sources, out=tmp_path / "s")[0].manifest
    assert manifest.sources[0].skipped_files == 1
    assert not prepared(*sources, out=tmp_path / "s")[0].built
    (package / "old.py").write_bytes(b"# \xe8\n")
    with pytest.raises(ValueError, match=r"files of python:imagined_here have changed: imagined_here/old\.py"):
        prepared(*sources, out=tmp_path / "s")
    (package / "old.py").write_bytes(b"# \xe9\n")
    write_set(tmp_path / "other", [3000], seed=1)
    for file in filler.iterdir():
        if file.is_file():
            file.write_bytes((tmp_path / "other" / file.name).read_bytes())
    with pytest.raises(ValueError, match=r"files of passkey:2.* have changed: filler="):
        prepared(*sources, out=tmp_path / "s")


def test_a_set_that_did_not_record_contents_says_so(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "s"
    prepared(folder, out=out)
    old = json.loads((out / MANIFEST).read_text())
    old["format_version"] = 2
    del old["sha256"], old["options"]["skip_bad"], old["options"]["max_document_bytes"]
    for name in ("contents", "empty", "bad_records", "bad_files", "bad", "passed_over"):
        del old["sources"][0][name]
    (out / MANIFEST).write_text(json.dumps(old))
    (out / "inputs.parquet").unlink()
    again, (note,) = prepared(folder, out=out)
    assert not again.built
    assert "contents were not compared" in note
    with pytest.raises(ValueError, match="skip_bad is False there and True here"):
        prepared(folder, out=out, options=replace(OPTIONS, skip_bad=True))


@pytest.mark.parametrize("processes", [1, 2])
def test_bad_input_is_refused_or_counted(tmp_path: Path, processes: int) -> None:
    folder = tmp_path / "t"
    folder.mkdir()
    (folder / "a.jsonl").write_text('{"text": "one two"}\n' + "{\n" * 12 + '{"text": ""}\n{"text": "three"}\n')
    (folder / "b.txt").write_bytes(b"\xff\xfeb\0")
    (folder / "c.txt").write_text("good")
    (folder / "d.txt").touch()
    (folder / "e.jsonl.gz").write_bytes(b"no")
    (folder / "f.csv").touch()
    out = tmp_path / "s"
    for tokenizer in ("byte", "train:300"):
        with pytest.raises(ValueError, match=r"a\.jsonl, line 2 is damaged: .*\(--skip-bad leaves"):
            prepare([str(folder)], out, replace(OPTIONS, tokenizer=tokenizer), processes=processes)
    options = replace(OPTIONS, skip_bad=True, tokenizer="train:300")
    (entry,) = prepare([str(folder)], out, options, processes=processes).manifest.sources
    assert (entry.documents, entry.empty, entry.bad_records, entry.bad_files) == (3, 2, 12, 2)
    assert entry.passed_over == {".csv": 1}
    assert len(entry.bad) == 10
    assert entry.bad[0].startswith(f"{folder}/a.jsonl, line 2 is damaged")
    assert load_manifest(out).sources == [entry]
    assert not prepare([str(folder)], out, options, processes=processes).built
    (folder / "c.txt").unlink()
    (folder / "a.jsonl").unlink()
    with pytest.raises(ValueError, match="none of its 0 documents .*; 1 are empty; 0 bad records and 2 bad files"):
        prepare([str(folder)], tmp_path / "s2", options, processes=processes)


# What is removed


def kept(folder: Path) -> dict[str, str]:
    return {str(file.relative_to(folder)): file.read_text() for file in folder.rglob("*") if file.is_file()}


@pytest.mark.parametrize(
    "file",
    [
        "tokenizer/tokenizer.json",
        "tokenizer/info.json",
        "train-000000.tar",
        "train.index.parquet",
        "inputs.parquet",
        "manifest.json",
        ".building/thesis.txt",
        ".building-0123456789abcdef/thesis.txt",
        ".building-0123456789abcdef/tokenizer/thesis.txt",
        ".building/train-000000.tar",
    ],
)
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_file_that_no_manifest_lists_is_left_alone(folder: Path, tmp_path: Path, file: str, overwrite: bool) -> None:
    out = tmp_path / "s"
    (out / file).parent.mkdir(parents=True)
    (out / file).write_text("years of work")
    with pytest.raises(ValueError, match=r"holds (other files|a damaged set)"):
        prepared(folder, out=out, overwrite=overwrite)
    assert kept(out) == {file: "years of work"}


@pytest.mark.parametrize("file", ["tokenizer/vocab.json", "train-000001.tar", "valid.index.parquet", "notes.md"])
def test_overwriting_a_set_removes_its_own_files_alone(folder: Path, tmp_path: Path, file: str) -> None:
    out = tmp_path / "s"
    prepared(folder, out=out)
    (out / file).write_text("years of work")
    with pytest.raises(ValueError, match="holds? other files"):
        prepared(folder, out=out, options=replace(OPTIONS, min_tokens=3), overwrite=True)
    assert (out / file).read_text() == "years of work"
    load_manifest(out)
    (out / file).unlink()
    assert prepared(folder, out=out, options=replace(OPTIONS, min_tokens=3), overwrite=True)[0].built


def test_a_link_in_place_of_the_tokenizers_folder_is_not_followed(folder: Path, tmp_path: Path) -> None:
    out, elsewhere = tmp_path / "s", tmp_path / "elsewhere"
    prepared(folder, out=out)
    (out / "tokenizer").rename(elsewhere)
    (out / "tokenizer").symlink_to(elsewhere)
    with pytest.raises(ValueError, match="tokenizer is a link or holds other files"):
        prepared(folder, out=out, overwrite=True)
    assert (elsewhere / "info.json").is_file()


class _Killed(BaseException):
    """Nothing is cleaned up after it."""


@pytest.mark.parametrize("moves", range(7))
def test_a_kill_while_the_new_set_is_moved_in_is_recovered_from(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moves: int
) -> None:
    out, left = tmp_path / "s", moves
    prepared(folder, out=out)
    rename = Path.rename

    def killed_later(self: Path, target: Path) -> Path:
        nonlocal left
        if left == 0:
            raise _Killed
        left -= 1
        return rename(self, target)

    with monkeypatch.context() as killed:
        killed.setattr(Path, "rename", killed_later)
        killed.setattr(data.preparation.building.shutil, "rmtree", lambda *_, **__: None)
        if moves < 6:
            with pytest.raises(_Killed):
                prepared(folder, out=out, options=replace(OPTIONS, min_tokens=3), overwrite=True)
        else:
            prepared(folder, out=out, options=replace(OPTIONS, min_tokens=3), overwrite=True)
    assert len(list(out.glob(".building-*"))) == 1
    again = prepared(folder, out=out, options=replace(OPTIONS, min_tokens=4), overwrite=True)[0]
    assert again.built
    assert sorted(entry.name for entry in out.iterdir()) == [
        "inputs.parquet",
        "manifest.json",
        "tokenizer",
        "train-000000.tar",
        "train.index.parquet",
    ]
