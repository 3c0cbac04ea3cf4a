"""Sources: which documents they give, in which order, and what they say when something is wrong."""

from __future__ import annotations

import gzip
import json
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from data.preparation.sources import (
    TEXT_PATTERNS,
    BadInputError,
    Source,
    SourceOptions,
    SyntheticSource,
    open_sources,
    parse_size,
)
from data.tokenizer.tokenizer import byte_tokenizer, train_bpe
from tests.prepared import write_set


def source(
    spec: object, column: str = "text", patterns: tuple[str, ...] = TEXT_PATTERNS, limit: int = 1 << 20
) -> Source:
    options = SourceOptions(text_column=column, text_patterns=patterns, max_document_bytes=limit)
    return open_sources([str(spec)], options)[0]


def texts(found: Source) -> list[tuple[str, str]]:
    return [(job.id, job.load()[0]) for job in found.jobs()]


def load_all(found: Source) -> None:
    for job in found.jobs():
        job.load()


RECORDS = [{"text": f"record {i} ü", "other": i} for i in range(700)]
LINES = "".join(json.dumps(record) + "\n" for record in RECORDS).encode()


def test_sizes() -> None:
    assert [parse_size(text) for text in ("7", "4k", "64M", "2G")] == [7, 4096, 64 << 20, 2 << 30]
    for wrong in ("", "M", "-1", "1.5M", "64MB"):
        with pytest.raises(ValueError, match="not a size"):
            parse_size(wrong)


def test_a_folder_gives_its_texts_and_records_in_order(tmp_path: Path) -> None:
    root = tmp_path / "docs"
    (root / "b" / ".hidden").mkdir(parents=True)
    for name in ("z.txt", "a.md", "b/c.txt", "b/code.c", ".secret.txt", "b/.hidden/d.txt"):
        (root / name).write_text(f"this is {name}")
    (root / "b" / "r.jsonl").write_text('{"text": "one"}\n\n{"text": "two"}\n')
    assert texts(source(root)) == [
        ("docs/a.md", "this is a.md"),
        ("docs/b/c.txt", "this is b/c.txt"),
        ("docs/b/r.jsonl#1", "one"),
        ("docs/b/r.jsonl#3", "two"),
        ("docs/z.txt", "this is z.txt"),
    ]
    assert [name for name, _ in texts(source(root, patterns=("*.c",)))][0] == "docs/b/code.c"
    assert texts(source(root / "b" / "code.c")) == [("code.c", "this is b/code.c")]


@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.gz", "jsonl.zst", "parquet"])
def test_record_files_give_every_record_and_add_up_to_their_size(tmp_path: Path, suffix: str) -> None:
    file = tmp_path / f"x.{suffix}"
    if suffix == "parquet":
        pq.write_table(pa.Table.from_pylist(RECORDS), file)
    elif suffix.endswith("gz"):  # two members, as `cat a.gz b.gz` makes them
        file.write_bytes(gzip.compress(LINES[: len(LINES) // 2]) + gzip.compress(LINES[len(LINES) // 2 :]))
    elif suffix.endswith("zst"):
        compress = zstandard.ZstdCompressor().compress
        file.write_bytes(compress(LINES[: len(LINES) // 2]) + compress(LINES[len(LINES) // 2 :]))
    else:
        file.write_bytes(LINES)
    found = source(file)
    assert texts(found) == [(f"x.{suffix}#{i + 1}", record["text"]) for i, record in enumerate(RECORDS)]
    assert sum(job.input_bytes for job in found.jobs()) == found.total_bytes == file.stat().st_size
    with pytest.raises(ValueError, match=rf"x\.{suffix}.*no column 'body'; it has 'text', 'other'.*--text-column"):
        load_all(source(file, column="body"))
    with pytest.raises(ValueError, match=r"column 'other' holds int\d*, not text"):
        load_all(source(file, column="other"))


@pytest.mark.parametrize("suffix", ["jsonl.gz", "jsonl.zst", "parquet"])
@pytest.mark.parametrize("damage", ["truncated", "overwritten"])
def test_a_broken_file_is_named(tmp_path: Path, suffix: str, damage: str) -> None:
    file = tmp_path / f"x.{suffix}"
    rng = np.random.default_rng(0)
    records = [{"text": rng.bytes(100).hex()} for _ in range(3000)]
    lines = "".join(json.dumps(record) + "\n" for record in records).encode()
    if suffix == "parquet":
        pq.write_table(pa.Table.from_pylist(records), file, compression="zstd", use_dictionary=False)
    else:
        compress = zstandard.ZstdCompressor(write_checksum=True).compress
        file.write_bytes(gzip.compress(lines) if suffix.endswith("gz") else compress(lines))
    contents = file.read_bytes()
    half = len(contents) // 2
    damaged = contents[:half] if damage == "truncated" else contents[:half] + bytes(64) + contents[half + 64 :]
    file.write_bytes(damaged)
    with pytest.raises(ValueError, match=rf"x\.{suffix}"):
        load_all(source(file))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "a"', "line 2 is damaged"),
        (b'{"text": "\xff"}', "line 2 is not text in UTF-8: .* at byte 10"),
        (b'["text"]', "line 2: Expected object, got array"),
        (b'{"text": null}', "line 2: column 'text' holds null, not text"),
        (b'{"text": "\\ud800"}', "line 2 is damaged: .* half of a surrogate pair"),
        (b'{"text": "a", "text": "b"}', "line 2 is damaged: the key 'text' stands twice"),
        (b'{"text": NaN}', "line 2 is damaged: NaN is no number"),
        (b'{"text": "a", "x": 1e999}', "line 2 is damaged: the number '1e999' is too large"),
        (b'{"text": "a", "x": ' + b"[" * 100_000, "line 2 is damaged: its brackets are nested too deeply"),
        (b'{"text": "' + b"a" * 2000 + b'"}', "line 2 has more than 1,000 bytes.*--max-document-bytes"),
        (b'{"title": "a", "body": "b"}', "line 2: no column 'text'; it has 'title', 'body' .*--text-column"),
    ],
)
def test_a_bad_record_is_named_and_the_others_are_read(tmp_path: Path, line: bytes, message: str) -> None:
    (tmp_path / "x.jsonl").write_bytes(b'{"text": "fine"}\n' + line + b'\n{"text": "too"}\n')
    limit = 1000 if b"aaa" in line else 1 << 20
    first, bad, last = source(tmp_path / "x.jsonl", limit=limit).jobs()
    assert (first.load()[0], last.load()[0], last.id) == ("fine", "too", "x.jsonl#3")
    with pytest.raises(BadInputError, match=rf"x\.jsonl, {message}") as error:
        bad.load()
    assert len(str(error.value)) < 400 and bad.is_record


def test_null_in_parquet_and_text_that_is_not_utf8(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": ["a", None]}), tmp_path / "x.parquet")
    with pytest.raises(ValueError, match="row 2: column 'text' is null"):
        load_all(source(tmp_path / "x.parquet"))
    (tmp_path / "latin.txt").write_bytes("für".encode("latin-1"))
    with pytest.raises(ValueError, match=r"latin\.txt is not UTF-8 text: byte 1 is 0xfc"):
        texts(source(tmp_path / "latin.txt"))


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    root = tmp_path / "site" / "imagined_package"
    for name in ("__init__", "zeta", "core/__init__", "core/deep/er", "ops/kernel"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / f"{name}.py").write_text(f"NAME = {name!r}")
    (root / "__init__.py").write_text("raise ImportError('must not be imported')\n")
    (root / "core" / "old.py").write_bytes(b"# \xe9\n")
    (root / "core" / "__init__.py").write_bytes(b"\xef\xbb\xbfNAME = 'core/__init__'")
    (root / "a_folder.py").mkdir()
    (root / "data").mkdir()
    (root / "data" / "not_code.txt").write_text("no")
    monkeypatch.syspath_prepend(str(root.parent))
    return "imagined_package"


def test_python_packages_give_a_document_per_sub_package(package: str) -> None:
    found = source(f"python:{package}")
    jobs = list(found.jobs())
    assert [job.id for job in jobs] == [f"python:{package}{sub}" for sub in ("", ".core", ".ops")]
    text, skipped, digests = jobs[1].load()
    assert text == (
        f"# file: {package}/core/__init__.py\nNAME = 'core/__init__'\n"
        f"# file: {package}/core/deep/er.py\nNAME = 'core/deep/er'\n"
    )
    assert skipped == 1
    assert list(digests) == [file.name for file in found.files if "/core/" in file.name]
    assert package not in sys.modules
    below = source(f"python:{package}.core")
    assert [job.id for job in below.jobs()] == [f"python:{package}.core", f"python:{package}.core.deep"]
    assert [job.id for job in source("python:argparse,json").jobs()] == ["python:argparse", "python:json"]


def test_passkey_lengths_and_depths_are_drawn_between_bounds() -> None:
    tokenizer = byte_tokenizer()
    found = SyntheticSource("passkey:400,length=512..8K,depth=0.2..0.6", seed=3)
    lengths = [job.length + 1 for job in found.jobs()]
    depths = [job.depth for job in found.jobs()]
    assert 512 <= min(lengths) < 600
    assert 7000 < max(lengths) <= 8192
    # log-uniform: half of the documents below the geometric mean, 2,048
    assert 150 < sum(length < 2048 for length in lengths) < 250
    assert 0.2 <= min(depths) < 0.22
    assert 0.58 < max(depths) <= 0.6
    encoded = next(iter(found.jobs())).encode(tokenizer)
    [(start, stop)] = encoded.answers
    assert tokenizer.decode(encoded.tokens[start:stop]).isdigit()
    assert len(encoded.tokens) + 1 <= lengths[0]
    again = SyntheticSource("passkey:400,length=512..8K,depth=0.2..0.6", seed=3)
    assert list(again.jobs()) == list(found.jobs())
    assert again.fingerprint == found.fingerprint
    other = SyntheticSource("passkey:400,length=512..8K,depth=0.2..0.6", seed=4)
    assert [job.length for job in other.jobs()] != [job.length for job in found.jobs()]
    assert other.fingerprint != found.fingerprint
    fixed = list(source("passkey:3,length=1K,depth=0.5,seed=9").jobs())
    assert [(job.length, job.depth) for job in fixed] == [(1023, 0.5)] * 3


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("missing.txt", "missing.txt does not exist"),
        ("python:", "names no package"),
        ("python:no_such_package_here", "no package 'no_such_package_here' is installed"),
        ("passkey:5", "length is missing"),
        ("passkey:x,length=1K", "'x' is not a size"),
        ("passkey:5,length=9K..1K", "not a range"),
        ("passkey:5,length=1K,depth=2", "depths must lie in 0..1"),
        ("passkey:5,length=1K,deep=1", "unknown option 'deep'"),
        ("passkey:0,length=1K", "must be 1 to 1,000,000,000 documents"),
        ("passkey:9999G,length=1K", "must be 1 to 1,000,000,000 documents"),
        ("passkey:1,length=1K..1G", "a document has at most 268,435,456 tokens"),
        ("tracking:1,length=1K,chains=1G", "chains = 1073741824: must not be more than 10,000"),
        ("tracking:1,length=1M,chains=1759,hops=4", "chains = 1759, hops = 4: there are names for 8,788 variables"),
        ("needles:1,length=1K,values=1..1G", "values = 1073741824: must not be more than 10,000"),
        ("python:json./etc", "'json./etc' is not the name of a package"),
    ],
)
def test_a_source_that_cannot_be_is_refused(spec: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        source(spec)


def test_a_folder_without_texts_names_the_patterns(tmp_path: Path) -> None:
    (tmp_path / "x.bin").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"holds no file that matches \*\.txt.*--text-pattern"):
        source(tmp_path)


def test_tasks_have_options_of_their_own(tmp_path: Path) -> None:
    found = SyntheticSource("recall:40,length=1K..2K,pairs=2..16,questions=2", seed=1)
    pairs = [dict(job.options)["pairs"] for job in found.jobs()]
    assert min(pairs) == 2 and max(pairs) > 10 and set(pairs) <= set(range(2, 17))
    encoded = next(iter(found.jobs())).encode(byte_tokenizer())
    assert len(encoded.answers) == 2 and len(encoded.questions) == pairs[0]
    set_folder = write_set(tmp_path / "set", [3000])
    hidden = SyntheticSource(f"passkey:1,length=1K,keys=3,filler={set_folder}", seed=1)
    (job,) = hidden.jobs()
    assert "grass" not in byte_tokenizer().decode(job.encode(byte_tokenizer()).tokens)
    assert "grass" in job.load()[0]  # what a tokenizer is trained on has the paper's words
    hidden.check(byte_tokenizer())
    with pytest.raises(ValueError, match="another tokenizer"):
        hidden.check(train_bpe(["some text"], 300))


def test_a_filler_without_text_is_refused(tmp_path: Path) -> None:
    empty = write_set(tmp_path / "set", [1, 1])
    with pytest.raises(ValueError, match=r"filler .*set has no text in its split train"):
        SyntheticSource(f"passkey:1,length=1K,filler={empty}", seed=1).check(byte_tokenizer())


@pytest.mark.parametrize(
    "spec, message",
    [
        ("recall:5,length=1K,keys=3", "unknown option 'keys'.*pairs=K"),
        ("recall:5,length=1K,depth=0.5", "unknown option 'depth'"),
        ("words:5,length=1K,filler=x", "unknown option 'filler'"),
        ("passkey:5,length=1K,keys=0", "keys must be at least 1"),
        ("passkey:5,length=1K,keys=2..1000", "keys = 1000: must be between 1 and"),
        ("facts:5,length=1K,task=2..4", "task = 4"),
        ("passkey:5,length=1K,filler=/nowhere", "/nowhere is not a prepared set"),
    ],
)
def test_options_that_do_not_fit_name_the_source(spec: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        SyntheticSource(spec, seed=1)
    assert spec in str(error.value)
