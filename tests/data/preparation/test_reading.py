"""What is read of files as people have them, what is left aside, and that nothing endless is read at all."""

from __future__ import annotations

import gzip
import io
import json
import os
import socket
import stat
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import data.preparation.parquet
from data.files import FileError
from data.preparation.sources import BadInputError, Source, SourceOptions, open_sources
from data.preparation.sources.folders import Found

BOM = b"\xef\xbb\xbf"
LINES = b'{"text": "one"}\n{"text": "two"}\n'


def opened(*specs: Path | str, **options: object) -> list[Source]:
    return open_sources([str(spec) for spec in specs], SourceOptions(**options))  # type: ignore[arg-type]


def texts(source: Source) -> dict[str, str]:
    return {job.id: job.load().text for job in source.jobs()}


def refused(spec: Path, message: str, **options: object) -> None:
    with pytest.raises(FileError, match=message) as error:
        for job in opened(spec, **options)[0].jobs():
            job.load()
    assert spec.name in str(error.value)


@pytest.mark.parametrize("compress", [None, gzip.compress, zstandard.compress], ids=["plain", "gz", "zst"])
@pytest.mark.parametrize(
    ("name", "contents", "expected"),
    [
        ("a.JSONL", LINES, ["one", "two"]),
        ("a.ndjson", LINES, ["one", "two"]),
        ("a.json", b"\n" + LINES, ["one", "two"]),
        ("a.json", b'[{"text": "one"}, {"text": "tw\\u00f6"}]', ["one", "twö"]),
        ("a.json", b'[\n {"text": "one"},\n {"text": "two"}\n]\n', ["one", "two"]),
        ("a.json", b'{\n "text": "one",\n "more": {"text": "no"}\n}\n', ["one"]),
        ("a.Json", BOM + b'{"text": "one"}', ["one"]),
        ("a.jsonl", BOM + b'{"text": "one"}\r\n' + BOM + b'{"text": "two"}', ["one", "two"]),
        ("a.TXT", BOM + "\ufeffHällo\r\n".encode(), ["\ufeffHällo\r\n"]),
        ("a.Md", b"text", ["text"]),
    ],
)
def test_names_and_contents_are_read_as_they_are_meant(
    tmp_path: Path, compress: Callable[[bytes], bytes] | None, name: str, contents: bytes, expected: list[str]
) -> None:
    suffix = "" if compress is None else ".GZ" if compress is gzip.compress else ".zst"
    (tmp_path / (name + suffix)).write_bytes(compress(contents) if compress else contents)
    for spec in (tmp_path, tmp_path / (name + suffix)):
        (source,) = opened(spec)
        assert list(texts(source).values()) == expected
        assert sum(job.input_bytes for job in source.jobs()) == source.total_bytes
        assert source.notes == []


@pytest.mark.parametrize(
    ("name", "contents", "message"),
    [
        ("a.txt", "Grüße".encode("utf-16"), "a.txt is UTF-16"),
        ("a.txt", "Grüße".encode("utf-16-be"), "a.txt is not UTF-8 text: byte 0 is 0x00, as in .* UTF-16"),
        ("a.txt", "Grüße".encode("utf-32"), "a.txt is UTF-32"),
        ("a.jsonl", LINES.decode().encode("utf-16"), "a.jsonl is UTF-16"),
        ("a.jsonl", LINES.decode().encode("utf-16-le"), "a.jsonl is not UTF-8 text: byte 1 is 0x00"),
        ("a.txt", gzip.compress(b"text", mtime=0), "a.txt is gzip .*end in .gz"),
        ("a.jsonl", zstandard.compress(LINES), "a.jsonl is zstd .*end in .zst"),
        ("a.md", b"%PDF-1.7", "a.md is a PDF"),
        ("a.txt", BOM + b"ab\xff", "a.txt is not UTF-8 text: byte 5 is 0xff"),
        ("a.json", b'[{"text": "one"}, {"text"', "a.json is damaged"),
        ("a.json", b'[{"text": "one"}, 3]', "a.json, record 2: Expected object, got int"),
        ("a.json", b'{\n"text": [\n', "a.json, record 1 is damaged"),
        ("a.json", b"[" * 4000, "a.json is damaged"),
        ("a.json", b'[\n"' + b"a" * 5000 + b'"]', "array or object of more than 4,096 bytes"),
        ("a.jsonl.gz", b"not compressed", "a.jsonl.gz is damaged"),
        ("a.txt.zst", zstandard.compress(b"text" * 99)[:-3], "a.txt.zst is damaged: it ends inside a frame"),
        ("a.txt", b"a" * 5000, "a.txt has more than 4,096 bytes.*--max-document-bytes"),
    ],
)
def test_what_is_no_text_is_named(tmp_path: Path, name: str, contents: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(contents)
    refused(tmp_path / name, message, max_document_bytes=4096)


@pytest.mark.parametrize("name", ["x.txt", "x.jsonl", "x.json", "x.parquet", "x.txt.gz"])
def test_only_regular_files_are_opened(tmp_path: Path, name: str) -> None:
    fifo, device, inside = tmp_path / name, tmp_path / "d" / name, tmp_path / "e" / name
    os.mkfifo(fifo)
    device.parent.mkdir()
    device.symlink_to("/dev/zero")
    inside.parent.mkdir()
    (inside.parent / "a.txt").write_text("first")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(os.path.relpath(inside))
        for spec, kind in ((fifo, "a fifo"), (device, "a device"), (device.parent, "a device"), (inside, "a socket")):
            with pytest.raises(FileError, match=f"{name} is {kind}, not a file"):
                opened(spec)
        (source,) = opened(inside.parent, skip_bad=True)
        good, bad = source.jobs()
        assert good.load().text == "first"
        with pytest.raises(BadInputError, match="a socket"):
            bad.load()


@pytest.mark.parametrize("compress", [gzip.compress, zstandard.compress], ids=["gz", "zst"])
@pytest.mark.parametrize("name", ["b.jsonl", "b.json", "b.txt"])
def test_a_bomb_takes_no_more_memory_than_the_longest_document(
    tmp_path: Path, compress: Callable[[bytes], bytes], name: str
) -> None:
    before, after = (b'{"text": "', b'"}\n{"text": "fine"}\n') if "json" in name else (b"", b"")
    file = tmp_path / f"{name}.{'gz' if compress is gzip.compress else 'zst'}"
    file.write_bytes(compress(before + b"a" * (64 << 20) + after))
    assert file.stat().st_size < 100_000
    tracemalloc.start()
    try:
        found = list(opened(file, max_document_bytes=1 << 20)[0].jobs())
        with pytest.raises(BadInputError, match=r"more than 1,048,576 bytes"):
            found[0].load()
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 40 << 20
    assert [job.load().text for job in found[1:]] == (["fine"] if "json" in name else [])


def test_a_long_window_of_zstd_is_read(tmp_path: Path) -> None:
    long = zstandard.ZstdCompressionParameters.from_level(3, window_log=31, write_content_size=False)
    stream = zstandard.ZstdCompressor(compression_params=long).compressobj()
    skippable = b"\x50\x2a\x4d\x18\x04\0\0\0abcd"
    contents = skippable + stream.compress(LINES) + stream.flush() + skippable + zstandard.compress(LINES)
    (tmp_path / "l.jsonl.zst").write_bytes(contents)
    assert list(texts(opened(tmp_path / "l.jsonl.zst")[0]).values()) == ["one", "two", "one", "two"]


def test_links_are_followed_and_nothing_is_read_twice(tmp_path: Path) -> None:
    root, beside = tmp_path / "root", tmp_path / "beside"
    (root / "sub").mkdir(parents=True)
    (beside / "deep").mkdir(parents=True)
    for file in (root / "b.txt", root / "sub" / "c.txt", beside / "d.txt", beside / "deep" / "e.txt"):
        file.write_text(file.name)
    (root / "a.txt").symlink_to("b.txt")
    os.link(root / "b.txt", root / "hard.txt")
    for link, target in (("more", "../beside"), ("again", "../beside/deep"), ("up", ".."), ("self", "."), ("s", "sub")):
        (root / link).symlink_to(target)
    (beside / "back").symlink_to(root)
    (root / "gone.txt").symlink_to("nowhere")
    (root / ".git").mkdir()
    for name in ("x.pdf", "Y.PDF", "Makefile", ".hidden.txt"):
        (root / name).touch()
    (first,) = opened(root)
    assert texts(first) == {
        "root/again/e.txt": "e.txt",
        "root/b.txt": "b.txt",
        "root/more/d.txt": "d.txt",
        "root/sub/c.txt": "c.txt",
    }
    assert first.passed_over == {"hidden": 2, ".pdf": 2, "without a suffix": 1, "links that lead nowhere": 1}
    passed, folders, files = first.notes
    assert "2 .pdf (Y.PDF, x.pdf), 2 hidden (.git, .hidden.txt), 1 links that lead nowhere (gone.txt)" in passed
    assert folders.startswith(f"{root}: 5 linked folders are not read again: ")
    assert "2 files are reached twice and read once: root/hard.txt is root/b.txt" in files
    with pytest.raises(ValueError, match=r"e\.txt has only files that another source has \(root/again/e\.txt of"):
        opened(root, beside / "deep" / "e.txt")
    (beside / "back").unlink()
    (root / "new.txt").write_text("new")
    first, second = opened(beside, root)
    assert list(texts(first)) == ["beside/d.txt", "beside/deep/e.txt"]
    assert list(texts(second)) == ["root/b.txt", "root/new.txt", "root/sub/c.txt"]
    assert f"root/again/e.txt is beside/deep/e.txt of {beside}" in second.notes[-1]


def test_files_without_a_number_are_told_apart_by_their_paths(tmp_path: Path) -> None:
    (tmp_path / "a.txt").touch()
    (tmp_path / "link.txt").symlink_to("a.txt")
    status = list((tmp_path / "a.txt").stat())
    status[stat.ST_INO] = 0
    a, b, link = (
        Found(name, tmp_path / name, os.stat_result(status), False).identity for name in ("a.txt", "b.txt", "link.txt")
    )
    assert a == link != b


def test_a_folder_that_cannot_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: object) -> object:
        raise PermissionError(13, "Permission denied", str(path))

    (tmp_path / "a.txt").touch()
    monkeypatch.setattr("data.preparation.sources.folders.os.scandir", refuse)
    with pytest.raises(FileError, match=rf"the folder {tmp_path} cannot be read: Permission denied"):
        opened(tmp_path)


def test_names_that_are_not_utf8_are_read_with_escapes(tmp_path: Path) -> None:
    (tmp_path / os.fsdecode(b"caf\xe9\n.txt")).write_text("text")
    (tmp_path / os.fsdecode(b"r\xe9c.jsonl")).write_bytes(b'{"text": 3}\n')
    pq.write_table(pa.table({"text": ["row"]}), tmp_path / "x.parquet")
    (tmp_path / "x.parquet").rename(tmp_path / os.fsdecode(b"\xe9.parquet"))
    (source,) = opened(tmp_path)
    assert "3 names are not UTF-8, read with escapes: caf\\xe9\\n.txt" in source.notes[0]
    first, bad, last = source.jobs()
    assert (first.id, first.load().text) == (f"{tmp_path.name}/caf\\xe9\\n.txt", "text")
    assert (last.id, last.load().text) == (f"{tmp_path.name}/\\xe9.parquet#1", "row")
    with pytest.raises(BadInputError, match=r"r\\xe9c\.jsonl, line 1: column 'text' holds int") as error:
        bad.load()
    str(error.value).encode("utf-8")


def test_a_file_of_another_kind_is_said_to_be_read_as_text(tmp_path: Path) -> None:
    (tmp_path / "table.csv").write_text("a,b\n")
    assert opened(tmp_path / "table.csv")[0].notes == [
        f"{tmp_path}/table.csv is read as one plain text, whatever its name says"
    ]


TEXTS = [f"document number {i} ü" for i in range(600)]


@pytest.mark.parametrize("rows_alone", [False, True])
@pytest.mark.parametrize(
    "column",
    [
        pa.array(TEXTS, type=pa.large_string()),
        pa.array(TEXTS, type=pa.string_view()),
        pa.array(TEXTS).dictionary_encode(),
        pa.array(TEXTS, type=pa.large_string()).dictionary_encode(),
        pa.chunked_array([TEXTS[:300], TEXTS[300:]]),
    ],
    ids=["large_string", "string_view", "dictionary", "large_dictionary", "chunks"],
)
def test_every_kind_of_text_in_parquet_is_read(
    tmp_path: Path, column: pa.Array, rows_alone: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data.preparation.parquet, "_BATCH_BYTES", 0 if rows_alone else 1 << 30)
    for use_dictionary in (True, False):
        table = pa.table({"other": range(600), "text": column})
        pq.write_table(table, tmp_path / "x.PARQUET", row_group_size=400, use_dictionary=use_dictionary)
        (source,) = opened(tmp_path)
        assert list(texts(source).values()) == TEXTS
        assert sum(job.input_bytes for job in source.jobs()) == source.total_bytes


def test_bad_rows_of_parquet_are_named_and_the_others_read(tmp_path: Path) -> None:
    file = tmp_path / "x.parquet"
    values = pa.Array.from_buffers(
        pa.string(), 3, [None, pa.py_buffer(b"\0\0\0\0\1\0\0\0\3\0\0\0\4\0\0\0"), pa.py_buffer(b"a\xff\xffb")]
    )
    column = pa.chunked_array([values, ["c" * 2000, None, "d"]])
    pq.write_table(pa.table({"text": column}), file)
    jobs = list(opened(file, max_document_bytes=1000)[0].jobs())
    assert [job.load().text for job in (jobs[0], jobs[2], jobs[5])] == ["a", "b", "d"]
    for row, message in ((2, "is not UTF-8"), (4, "has more than 1,000 bytes"), (5, "is null")):
        with pytest.raises(BadInputError, match=rf"x\.parquet, row {row}.* {message}"):
            jobs[row - 1].load()


@pytest.mark.parametrize(
    ("table", "column", "message"),
    [
        (pa.table({"meta": [{"text": "a"}]}), "meta.text", "column 'meta' holds struct<text: string>; .* not read"),
        (pa.table({"text": [b"a"]}), "text", "column 'text' holds binary, not text"),
        (pa.table([["a"], ["b"]], names=["text", "text"]), "text", "column 'text' stands there 2 times"),
        (pa.table({f"c{i}": [1] for i in range(99)}), "text", "no column 'text'; it has 'c0', .*'c9' and 89 more"),
    ],
)
def test_a_column_that_is_not_text_is_named(tmp_path: Path, table: pa.Table, column: str, message: str) -> None:
    pq.write_table(table, tmp_path / "x.parquet")
    refused(tmp_path / "x.parquet", message, text_column=column)


def test_a_column_with_a_dot_in_its_name_is_not_the_nested_one(tmp_path: Path) -> None:
    pq.write_table(pa.table({"a": [{"b": "nested"}], "a.b": ["text"]}), tmp_path / "x.parquet")
    assert list(texts(opened(tmp_path / "x.parquet", text_column="a.b")[0]).values()) == ["text"]


def test_a_text_that_a_small_parquet_repeats_is_not_in_memory_a_thousand_times(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data.preparation.parquet, "_BATCH_BYTES", 32 << 20)
    repeated = pa.DictionaryArray.from_arrays(pa.array([0] * 1000, pa.int32()), pa.array(["a" * (8 << 20)]))
    pq.write_table(pa.table({"text": repeated}), tmp_path / "x.parquet", store_schema=False)
    before = pa.total_allocated_bytes()
    jobs = opened(tmp_path / "x.parquet")[0].jobs()
    assert len(next(jobs).load().text) == 8 << 20
    assert pa.total_allocated_bytes() - before < 100 << 20


def test_a_large_row_group_is_read_page_by_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    pq.write_table(pa.table({"text": [rng.bytes(1 << 10).hex() for _ in range(8_000)]}), tmp_path / "x.parquet")
    assert pq.ParquetFile(tmp_path / "x.parquet").num_row_groups == 1
    asked: list[int] = []

    class Watched(io.FileIO):
        def read(self, size: int = -1) -> bytes:
            asked.append(size)
            return super().read(size)

    monkeypatch.setattr(data.preparation.parquet, "open_regular", Watched)
    before, most = pa.total_allocated_bytes(), 0
    for _ in opened(tmp_path / "x.parquet")[0].jobs():
        most = max(most, pa.total_allocated_bytes() - before)
    assert most < 12 << 20  # of 16 MiB
    assert 0 < max(asked) < 4 << 20 and min(asked) >= 0


def test_checksums_of_parquet_pages_are_checked(tmp_path: Path) -> None:
    file = tmp_path / "x.parquet"
    pq.write_table(pa.table({"text": TEXTS}), file, compression="none", use_dictionary=False, write_page_checksum=True)
    contents = bytearray(file.read_bytes())
    contents[contents.index(b"document number 7")] ^= 1
    file.write_bytes(contents)
    refused(file, "x.parquet is damaged after row 0: .*CRC")


def test_a_parquet_footer_that_is_not_utf8_is_named(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": TEXTS}), tmp_path / "x.parquet", store_schema=False)
    contents = (tmp_path / "x.parquet").read_bytes()
    (tmp_path / "x.parquet").write_bytes(contents.replace(b"\x04text", b"\x04te\xfft"))
    refused(tmp_path / "x.parquet", "x.parquet is damaged: ")


def test_a_file_that_is_written_to_meanwhile_is_named(tmp_path: Path) -> None:
    file = tmp_path / "x.jsonl"
    file.write_bytes(LINES)
    (source,) = opened(file)
    with file.open("ab") as more:
        more.write(json.dumps({"text": "three"}).encode())
    (job,) = source.jobs()
    with pytest.raises(BadInputError, match=r"x\.jsonl was written to while the set was prepared"):
        job.load()


@pytest.mark.parametrize("kind", ["txt", "txt.gz", "jsonl", "json", "jsonl.gz", "jsonl.zst", "parquet"])
@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(damage=st.data())
def test_damage_ends_in_texts_or_in_an_error_that_names_the_file(
    tmp_path_factory: pytest.TempPathFactory, kind: str, damage: st.DataObject
) -> None:
    file = tmp_path_factory.mktemp("damaged") / f"x.{kind}"
    records = [{"text": f"record {i} \u00fc", "more": [{"a": 1.5}, None]} for i in range(40)]
    lines = "".join(json.dumps(record) + "\n" for record in records).encode()
    if kind == "parquet":
        pq.write_table(pa.table({"text": TEXTS[:40]}), file)
    else:
        contents = json.dumps(records).encode() if kind == "json" else lines
        compress = {"gz": gzip.compress, "zst": zstandard.ZstdCompressor(write_checksum=True).compress}
        file.write_bytes(compress.get(kind.rpartition(".")[2], bytes)(contents))
    contents = bytearray(file.read_bytes())
    for _ in range(damage.draw(st.integers(1, 3))):
        start = damage.draw(st.integers(0, len(contents) - 1))
        stop = damage.draw(st.integers(start, min(start + 40, len(contents))))
        contents[start:stop] = damage.draw(
            st.one_of(st.binary(max_size=8), st.just(b""), st.just(b"\0" * (stop - start)))
        )
        contents = contents or bytearray(b"[")
    file.write_bytes(contents)
    try:
        for job in opened(file, max_document_bytes=1 << 20)[0].jobs():
            try:
                job.load().text.encode("utf-8")
            except BadInputError as error:
                assert file.name in str(error) and len(str(error)) < 1000
    except FileError as error:
        assert file.name in str(error) and len(str(error)) < 1000
