"""Prepared sets made to deceive: every seal and hash in them is right, and still nothing wrong is believed."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data.files import sealed
from data.prepared.manifest import load_manifest
from data.prepared.shards import BadDocumentError, PreparedSet
from data.prepared.verify import verify_set
from launch import cli
from tests.prepared import write_set

FIRST_VERSION = Path(__file__).parents[2] / "fixtures" / "first_version" / "set"


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_set(tmp_path_factory.mktemp("hostile") / "set", [40, 300, 60, 900], questions=True)


@pytest.fixture
def folder(pristine: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pristine, tmp_path / "set"))


def reseal(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    change(manifest)
    (folder / "manifest.json").write_text(json.dumps(sealed(manifest)))


def reindex(folder: Path, **columns: Callable[[list[Any]], list[Any]]) -> None:
    """Change columns of the training split's index, and make the manifest agree."""
    file = folder / "train.index.parquet"
    table = pq.read_table(file)
    for name, change in columns.items():
        values = pa.array(change(table[name].to_pylist()), type=table.schema.field(name).type)
        table = table.set_column(table.column_names.index(name), table.schema.field(name), values)
    pq.write_table(table, file)
    record_index(folder)


def record_index(folder: Path) -> None:
    contents = (folder / "train.index.parquet").read_bytes()
    facts = {"bytes": len(contents), "sha256": hashlib.sha256(contents).hexdigest()}
    reseal(folder, lambda manifest: manifest["splits"]["train"]["index"].update(facts))


def put(*path: str | int, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(manifest: Any) -> None:
        for key in path[:-1]:
            manifest = manifest[key]
        manifest[path[-1]] = value

    return change


MANIFESTS = [
    (put("tokenizer", "eos_id", value=-1), r"manifest\.json: tokenizer\.eos_id: .*>= 0"),
    (
        put("tokenizer", "eos_id", value=257),
        r"manifest\.json: tokenizer: eos_id 257 is outside of the vocabulary of 257",
    ),
    (put("tokenizer", "vocab_size", value=1e308), r"manifest\.json: tokenizer\.vocab_size: Expected int"),
    (put("tokenizer", "vocab_size", value=10**9), r"manifest\.json: tokenizer\.vocab_size"),
    (put("tokenizer", value=[]), r"manifest\.json: tokenizer: Expected object, got array"),
    (put("splits", value=None), r"manifest\.json: splits: Expected object, got null"),
    (put("splits", value={}), r"manifest\.json: splits: there is none"),
    (put("splits", "train", "documents", value=2**63), r"manifest\.json: splits.*documents"),
    (put("splits", "train", "documents", value=5), r"documents is 5, but the shards have 4 together"),
    (
        put("splits", "train", "shards", 0, "name", value="../../etc/passwd"),
        r"shards\[0\]\.name must be train-000000\.tar",
    ),
    (put("splits", "train", "shards", 0, "name", value="/etc/passwd"), r"shards\[0\]\.name must be train-000000\.tar"),
    (put("splits", "train", "index", "name", value="/etc/passwd"), r"index\.name must be train\.index\.parquet"),
    (put("splits", "train", "length_histogram", value=[[0, 4]]), r"length_histogram.*>= 1"),
    (put("splits", "train", "length_histogram", value=[[1, 1], [3, 3]]), r"bounds must be powers of two"),
    (put("splits", "train", "shards", 0, "sha256", value="x"), r"shards.*sha256"),
    (put("format_version", value=True), r"has format_version True; this version reads 2 and 3"),
    (put("format_version", value=99), r"has format_version 99"),
    (put("sources", value=["noise"]), r"manifest\.json: sources.*Expected object, got str"),
    (put("options", value={"a": {"b": 1}}), r"manifest\.json: options"),
]


@pytest.mark.parametrize(("change", "message"), MANIFESTS, ids=[message[:40] for _, message in MANIFESTS])
def test_a_manifest_that_cannot_be_is_refused_by_key(
    folder: Path, change: Callable[[dict[str, Any]], None], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    reseal(folder, change)
    with pytest.raises(ValueError, match=message) as caught:
        PreparedSet(folder)
    assert "manifest.json" in str(caught.value)
    assert cli.main(["inspect", str(folder)]) == 1
    assert "DAMAGED" in capsys.readouterr().out


def test_an_edited_manifest_is_not_believed(folder: Path) -> None:
    contents = (folder / "manifest.json").read_text()
    for old, new in (('"eos_id": 256', '"eos_id": 32'), ('"noise"', '"Noise"'), ('"documents": 4', '"documents": 4.0')):
        assert old in contents
        (folder / "manifest.json").write_text(contents.replace(old, new, 1))
        with pytest.raises(ValueError, match=r"manifest\.json was changed after it was written"):
            load_manifest(folder)
    for damage in ("[" * 100_000, '{"splits": 1, "splits": 2}', "{}", "[]", '{"a": NaN}', "\xff"):
        (folder / "manifest.json").write_text(damage, encoding="latin-1")
        with pytest.raises(ValueError, match=r"manifest\.json"):
            load_manifest(folder)


def test_a_set_of_the_first_version_is_read_and_said_not_to_be_sealed(capsys: pytest.CaptureFixture[str]) -> None:
    assert load_manifest(FIRST_VERSION).sha256 is None
    assert len(PreparedSet(FIRST_VERSION)) > 0
    assert cli.main(["inspect", str(FIRST_VERSION)]) == 0
    shown = capsys.readouterr().out
    assert "not sealed (written by an older version)" in shown
    assert "intact" not in shown


INDEXES: list[tuple[dict[str, Callable[[list[Any]], list[Any]]], str]] = [
    ({"offset": lambda x: [2**63 - 64, *x[1:]]}, "00000000 lies outside of its shard"),
    ({"offset": lambda x: [*x[:-1], -64]}, "00000003 lies outside of its shard"),
    ({"offset": lambda x: [*x[:-1], x[-1] + 2]}, "00000003 does not follow"),
    ({"offset": lambda x: [x[0], x[0], *x[2:]]}, "00000001 does not follow the one before it"),
    ({"tokens": lambda x: [2**62, *x[1:]]}, "00000000 lies outside of its shard"),
    ({"tokens": lambda x: [2**63 - 1, *x[1:-1], 2]}, "00000000 lies outside of its shard"),
    ({"tokens": lambda x: [-40, *x[1:]]}, "00000000 lies outside of its shard"),
    ({"tokens": lambda x: [x[0] - 1, x[1] - 1, *x[2:]]}, r"train-000000\.tar has 1,298 tokens, where it says 1,300"),
    ({"shard": lambda x: [-1, *x[1:]]}, "00000000 lies outside of its shard"),
    ({"shard": lambda x: [*x[:-1], 1]}, "00000003 lies outside of its shard"),
    ({"key": lambda x: ["../../x", *x[1:]]}, "keys are not 00000000"),
    ({"key": lambda x: [None, *x[1:]]}, "key is null in 1 rows"),
    ({"answers": lambda x: [x[0], [2, 301], *x[2:]]}, "00000001 has answers outside of it"),
    ({"answers": lambda x: [x[0], [-5, 3], *x[2:]]}, "00000001 has answers outside of it"),
    ({"answers": lambda x: [x[0], [9, 12, 3, 5], *x[2:]]}, "00000001 has answers .* not in order"),
    ({"answers": lambda x: [x[0], [3], *x[2:]]}, "00000001 has half an answer"),
    ({"questions": lambda x: [[x[0][0] | {"answer": [6, 99]}], *x[1:]]}, "00000000 has a question whose answer"),
    ({"questions": lambda x: [[x[0][0] | {"answer": [6]}], *x[1:]]}, "00000000 has a question whose answer"),
    ({"questions": lambda x: [[x[0][0] | {"after": 41}], *x[1:]]}, "00000000 has a question .* never due"),
    ({"questions": lambda x: [*x[:-1], [x[-1][0] | {"tokens": [1, -7, *range(9)]}]]}, "00000003 .* tokens outside"),
    ({"questions": lambda x: [[x[0][0] | {"after": None}], *x[1:]]}, "nulls in its questions"),
]


@pytest.mark.parametrize(("columns", "message"), INDEXES, ids=[f"{next(iter(c))}-{m[:30]}" for c, m in INDEXES])
def test_an_index_that_cannot_be_is_refused_by_document(
    folder: Path, columns: dict[str, Callable[[list[Any]], list[Any]]], message: str
) -> None:
    reindex(folder, **columns)
    with pytest.raises(ValueError, match=rf"train\.index\.parquet .*{message}"):
        PreparedSet(folder)
    [problem] = verify_set(folder)
    assert problem.kind == "manifest"


def test_an_index_does_not_unpack_to_more_than_the_shards_hold(folder: Path) -> None:
    def bomb(rows: list[Any]) -> list[Any]:
        return [[rows[0][0] | {"tokens": [97] * 5_000_000}], *rows[1:]]

    reindex(folder, questions=bomb)
    assert (folder / "train.index.parquet").stat().st_size < 100_000
    with pytest.raises(ValueError, match=r"train\.index\.parquet unpacks to 40,000,\d+ bytes"):
        PreparedSet(folder)


def change_record(folder: Path, change: Callable[[bytes], bytes]) -> None:
    """Change the first document's `.json` member in place, to one of the same length, and make the manifest agree."""
    shard = folder / "train-000000.tar"
    with tarfile.open(shard) as tar:
        member = tar.getmembers()[0]
    contents = bytearray(shard.read_bytes())
    place = slice(member.offset_data, member.offset_data + member.size)
    record = change(bytes(contents[place]))
    assert len(record) == member.size
    contents[place] = record
    shard.write_bytes(contents)
    digest = hashlib.sha256(contents).hexdigest()
    reseal(folder, lambda manifest: manifest["splits"]["train"]["shards"][0].update(sha256=digest))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (b'"tokens": 40', b'"tokens": 41', "say tokens 41, where the index says 40"),
        (b'"tokens": 40', b'"tokens": -9', "tokens: .*>= 0"),
        (b'"tokens": 40', b'"tokens": []', "tokens: Expected int"),
        (b'"id": "train-0"', b'"id": 123456789', "id: Expected str"),
        (b'"answers": [[20, 23]]', b'"answers": [[20, 22]]', "say answers"),
        (b'"after": 3', b'"after": 4', "say questions"),
        (b'{"id"', b'["id"', "is damaged"),
    ],
)
def test_a_document_record_agrees_with_the_index(folder: Path, old: bytes, new: bytes, message: str) -> None:
    change_record(folder, lambda record: record.replace(old, new, 1))
    with pytest.raises(BadDocumentError, match=rf"metadata of .*train-000000\.tar:00000000.*{message}"):
        PreparedSet(folder).metadata(0)
    [problem] = verify_set(folder)
    assert problem.kind == "manifest"


@pytest.mark.parametrize("name", ["manifest.json", "train-000000.tar", "train.index.parquet", "tokenizer/info.json"])
@pytest.mark.parametrize("kind", ["link", "fifo", "folder", "zero"])
def test_a_sets_files_are_its_own(folder: Path, name: str, kind: str) -> None:
    file = folder / name
    outside = folder.parent / "outside"
    file.rename(outside)
    if kind == "link":
        file.symlink_to(outside)
    elif kind == "zero":
        file.symlink_to("/dev/zero")
    elif kind == "fifo":
        os.mkfifo(file)
    else:
        file.mkdir()
    [problem] = verify_set(folder)
    assert name in problem.message
    assert "link that leads out of" in problem.message or "not a file" in problem.message
