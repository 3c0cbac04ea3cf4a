"""Random damage to a prepared set, from a fixed seed: an error that names a file, or the documents as they were."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.files import sealed
from data.prepared.shards import PreparedSet
from launch import cli
from tests.prepared import write_set

FILES = ("manifest.json", "train.index.parquet", "valid.index.parquet", "train-000000.tar", "tokenizer/info.json")
VALUES = (None, [], {}, "", "../../x", -1, 0, 1e308, 2**63, True, [[0, 1]], "\x1b[2J")
Documents = list[list[int]]


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_set(tmp_path_factory.mktemp("damaged") / "set", [40, 300, 60], questions=True)


@pytest.fixture(scope="module")
def documents(pristine: Path) -> Documents:
    return read(pristine)


def read(folder: Path) -> Documents:
    prepared = PreparedSet(folder)
    found = [prepared.read(i).tolist() for i in range(len(prepared))]
    for i in range(len(prepared)):
        prepared.answers(i), prepared.questions(i), prepared.metadata(i)
    prepared.close()
    return found


def check(folder: Path, documents: Documents, *, found: bool) -> None:
    """What is left of a damaged set is an error about it, or the documents as they were.

    Args:
        found: `inspect` must find the difference.
    """
    try:
        assert read(folder) == documents
    except (ValueError, OSError) as error:
        assert str(folder) in str(error), error
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = cli.main(["inspect", str(folder)])
    assert code in (0, 1), err.getvalue()
    assert "\x1b" not in out.getvalue()
    if found:
        assert code == 1 and str(folder) in out.getvalue()


@settings(derandomize=True, max_examples=80, deadline=None)
@given(data=st.data())
def test_damaged_bytes_are_found(
    pristine: Path,
    documents: Documents,
    tmp_path_factory: pytest.TempPathFactory,
    data: st.DataObject,
) -> None:
    folder = Path(shutil.copytree(pristine, tmp_path_factory.mktemp("d") / "set"))
    name = data.draw(st.sampled_from(FILES))
    file = folder / name
    contents = bytearray(file.read_bytes())
    at = data.draw(st.integers(0, len(contents) - 1))
    kind = data.draw(st.sampled_from(["flip", "cut", "zero", "insert", "gone", "swap"]))
    if kind == "flip":
        contents[at] ^= 1 << data.draw(st.integers(0, 7))
    elif kind == "cut":
        del contents[at:]
    elif kind == "zero":
        contents[at : at + 64] = bytes(len(contents[at : at + 64]))
    elif kind == "insert":
        contents[at:at] = b"\xff\x00["
    elif kind == "swap":
        contents = bytearray((folder / data.draw(st.sampled_from(FILES))).read_bytes())
    changed = bytes(contents) != file.read_bytes() or kind == "gone"
    file.unlink() if kind == "gone" else file.write_bytes(contents)
    # Of the tokenizer's file only the meaning is compared: white space in it is nobody's matter.
    check(folder, documents, found=changed and name != "tokenizer/info.json")
    shutil.rmtree(folder.parent)


@settings(derandomize=True, max_examples=80, deadline=None)
@given(data=st.data())
def test_values_that_cannot_be_end_in_no_traceback_though_sealed(
    pristine: Path, documents: Documents, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = Path(shutil.copytree(pristine, tmp_path_factory.mktemp("d") / "set"))
    name = data.draw(st.sampled_from(["manifest.json", "tokenizer/info.json"]))
    content: Any = json.loads((folder / name).read_text())
    place = content
    while True:
        keys = sorted(place) if isinstance(place, dict) else list(range(len(place)))
        key = data.draw(st.sampled_from(keys))
        if not isinstance(place[key], dict | list) or not place[key] or data.draw(st.booleans()):
            break
        place = place[key]
    if data.draw(st.booleans()):
        place[key] = data.draw(st.sampled_from(VALUES))
    else:
        del place[key]
    (folder / name).write_text(json.dumps(sealed(content) if name == "manifest.json" else content))
    check(folder, documents, found=False)
    shutil.rmtree(folder.parent)
