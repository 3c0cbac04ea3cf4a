"""Files are read within bounds and against a type, and written whole."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Annotated

import msgspec
import pytest

from data.files import (
    FileError,
    decode_json,
    inside,
    making_folder,
    open_regular,
    read_bytes,
    read_json,
    shown,
    some,
    write_whole,
    writing,
)


class Row(msgspec.Struct, forbid_unknown_fields=True):
    name: str
    count: Annotated[int, msgspec.Meta(ge=0, le=2**62)] = 0
    share: float = 0.0


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[1]", "f.json: Expected object, got array"),
        ("null", "f.json: Expected object, got null"),
        ('{"name": 3}', "f.json: name: Expected str, got int"),
        ('{"name": "a", "count": -1}', "f.json: count: Expected int >= 0"),
        ('{"name": "a", "count": true}', "f.json: count: Expected int, got bool"),
        ('{"name": "a", "count": 1' + "0" * 30 + "}", "f.json: count: Expected int <="),
        ('{"name": "a", "count": 1' + "0" * 5000 + "}", "f.json is damaged: Exceeds the limit"),
        ('{"name": "a", "share": true}', "f.json: share: Expected float, got bool"),
        ('{"name": "a", "share": NaN}', "f.json is damaged: NaN is no number"),
        ('{"name": "a", "share": 1e999}', "f.json is damaged: the number '1e999' is too large"),
        ('{"name": "a", "name": "b"}', "f.json is damaged: the key 'name' stands twice"),
        ('{"name": "a", "other": 1}', "f.json: Object contains unknown field other"),
        ('{"name": "\\ud800"}', "f.json is damaged: a text in it holds half of a surrogate pair"),
        ("[" * 100_000, "f.json is damaged: its brackets are nested too deeply"),
        ('{"name": ', "f.json is damaged: Expecting value"),
        (b'{"name": "\xff"}', "f.json is not text in UTF-8"),
    ],
)
def test_json_that_is_not_of_its_type(text, reason):
    with pytest.raises(FileError) as error:
        decode_json(text, Row, "f.json")
    assert str(error.value).startswith(reason)


def test_json_of_its_type():
    assert decode_json(b'{"name": "\\ud83d\\ude00", "share": 1}', Row, "f.json") == Row("\N{GRINNING FACE}", 0, 1.0)


def test_only_regular_files_of_bounded_size_are_read(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "big").write_bytes(b"x" * 11)
    (tmp_path / "link").symlink_to(tmp_path / "big")
    for path, reason in (
        (tmp_path / "fifo", "is a fifo, not a file"),
        (tmp_path, "is a folder, not a file"),
        (Path("/dev/zero"), "is a device, not a file"),
        (tmp_path / "big", "has more than 10 bytes"),
    ):
        with pytest.raises(FileError, match=reason):
            read_bytes(path, limit=10)
    assert read_bytes(tmp_path / "link", limit=11) == b"x" * 11
    with pytest.raises(FileNotFoundError):
        open_regular(tmp_path / "none")
    with pytest.raises(FileError, match="Expecting value"):
        read_json(tmp_path / "big", Row)


@pytest.mark.parametrize("name", ["", "/etc/passwd", "../x", "a/../../x", ".", "a//b", "a\0b", "link/x", "out"])
def test_a_name_stays_inside_its_folder(tmp_path, name):
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "link").symlink_to(tmp_path)
    (folder / "out").symlink_to("/etc/hostname")
    with pytest.raises(FileError, match="index.json names"):
        inside(folder, name, "index.json")
    assert inside(folder, "sub/file", "index.json") == folder / "sub" / "file"


def test_a_file_is_written_whole_with_the_mode_of_the_umask(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    before = os.umask(0o027)
    try:
        with pytest.raises(RuntimeError), writing(path) as file:
            file.write(b"half")
            raise RuntimeError
        assert path.read_text() == "old" and os.listdir(tmp_path) == ["file"]
        write_whole(path, "new")
    finally:
        os.umask(before)
    assert path.read_text() == "new" and os.listdir(tmp_path) == ["file"]
    assert stat.S_IMODE(path.stat().st_mode) == 0o640


def test_a_planted_link_is_replaced_and_not_followed(tmp_path):
    (tmp_path / "victim").write_text("theirs")
    (tmp_path / "latest").symlink_to(tmp_path / "victim")
    write_whole(tmp_path / "latest", "ours")
    assert (tmp_path / "victim").read_text() == "theirs" and not (tmp_path / "latest").is_symlink()


def test_a_folder_is_made_whole_and_removes_nothing_of_others(tmp_path):
    theirs = tmp_path / ".out.partial"
    theirs.mkdir()
    (theirs / "notes").write_text("theirs")
    with pytest.raises(RuntimeError), making_folder(tmp_path / "out") as folder:
        (folder / "file").write_text("half")
        raise RuntimeError
    assert sorted(os.listdir(tmp_path)) == [".out.partial"]
    (tmp_path / "out").mkdir()
    with making_folder(tmp_path / "out") as folder:
        (folder / "file").write_text("whole")
    assert (tmp_path / "out" / "file").read_text() == "whole" and (theirs / "notes").read_text() == "theirs"
    with pytest.raises(OSError), making_folder(tmp_path / "out"):
        pass
    assert (tmp_path / "out" / "file").exists() and sorted(os.listdir(tmp_path)) == [".out.partial", "out"]


def test_what_is_shown_of_a_value_is_bounded_and_printable():
    assert shown("a\x1b[31m") == "'a\\x1b[31m'"
    assert len(shown("x" * 10**6)) < 100 and len(shown([1] * 10**4)) < 100
    assert shown(10**5000) == "a int too large to show"


def test_names_that_are_left_out_are_counted():
    assert some(iter("abc"), 3) == "a, b, c"
    assert some("abcdefg", 3) == "a, b, c and 4 more"
    assert some([]) == ""
