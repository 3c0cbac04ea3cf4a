"""Preparing: the same bytes whatever the processes or interruptions, and nothing that looks complete and is not."""

from __future__ import annotations

import errno
import io
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

import data.prepared.shard_writer
from data.preparation.options import PrepareOptions
from data.preparation.pool import EncodedDocument, encode_jobs
from data.preparation.prepare import prepare
from data.preparation.sources import Encoded, Job, Loaded
from data.preparation.splits import SplitAssigner
from data.prepared.manifest import load_manifest
from data.prepared.shards import PreparedSet
from data.tokenizer.tokenizer import byte_tokenizer, load_tokenizer

WORDS = ("the memory of a lane carries what earlier segments wrote so that later ones may read it again " * 3).split()


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """40 texts of 100 to 8,000 words and some records."""
    rng = np.random.default_rng(0)
    folder = tmp_path / "corpus"
    folder.mkdir()
    for i in range(40):
        words = rng.choice(WORDS, int(np.exp(rng.uniform(np.log(100), np.log(8000)))))
        (folder / f"{i:02d}.txt").write_text(" ".join(words) + ".\n")
    records = [{"text": " ".join(rng.choice(WORDS, rng.integers(40, 80)))} for _ in range(300)]
    (folder / "records.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


OPTIONS = PrepareOptions(tokenizer="train:400", shard_bytes=64 << 10, valid_fraction=0.1)
PASSKEYS = "passkey:60,length=512..4K"


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_every_document_arrives_whole_and_in_one_split(corpus: Path, tmp_path: Path) -> None:
    out = tmp_path / "set"
    manifest = prepare([str(corpus), PASSKEYS], out, replace(OPTIONS, min_tokens=60)).manifest
    tokenizer = load_tokenizer(out)
    assert tokenizer.kind == "bpe"
    found: dict[str, tuple[str, str]] = {}
    for split in ("train", "valid"):
        prepared = PreparedSet(out, split)
        assert prepared.tokenizer_hash == tokenizer.hash
        for i in range(len(prepared)):
            tokens = prepared.read(i)
            assert tokens[-1] == tokenizer.eos_id
            assert tokenizer.eos_id not in tokens[:-1]
            assert len(tokens) >= 60
            metadata = prepared.metadata(i)
            assert metadata.id not in found
            found[metadata.id] = (split, tokenizer.decode(tokens))
            for start, stop in prepared.answers(i):
                digits = tokenizer.decode(tokens[start:stop])
                assert len(digits) == 5
                assert digits.isdigit()
                assert tokenizer.decode(tokens[:start]).endswith("The pass key is ")
            assert len(prepared.answers(i)) == (1 if metadata.id.startswith("passkey") else 0)
    texts = {f"corpus/{file.name}": file.read_text() for file in corpus.glob("*.txt")}
    assert {name: found[name][1] for name in texts} == texts
    files, passkeys = manifest.sources
    assert files.documents + files.too_short == 340
    assert 0 < files.too_short < 300
    assert passkeys.documents == 60
    assert sum(split == "valid" for split, _ in found.values()) == manifest.splits["valid"].documents
    assert 0.04 * len(found) < manifest.splits["valid"].documents < 0.2 * len(found)
    # The training sample held the passkeys' words, so each is one token.
    assert len(tokenizer.encode(" grass")) == len(tokenizer.encode(" yellow")) == 1


def test_the_number_of_processes_changes_no_byte(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data.preparation.pool._BATCH_BYTES", 20_000)  # several batches for each process
    one, three = tmp_path / "one", tmp_path / "three"
    prepare([str(corpus), PASSKEYS], one, OPTIONS, processes=1)
    prepare([str(corpus), PASSKEYS], three, OPTIONS, processes=3)
    assert contents(one) == contents(three)
    assert len(list(one.glob("train-*.tar"))) > 3
    prepare([str(corpus), PASSKEYS], tmp_path / "other", replace(OPTIONS, seed=1))
    assert contents(one) != contents(tmp_path / "other")


_STALLING = """
import signal, sys, time
from pathlib import Path
from data.preparation.options import PrepareOptions
from data.preparation.prepare import prepare

def stall(phase, done, total, tokens):
    if list(Path(sys.argv[2]).glob(".building-*/train-000001.tar")):
        print("stalled", flush=True)
        time.sleep(60)

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it, tests among them
    options = PrepareOptions(tokenizer="train:400", shard_bytes=64 << 10, valid_fraction=0.1)
    try:
        prepare(sys.argv[1].split("|"), sys.argv[2], options, processes=2, report=stall)
    except KeyboardInterrupt:
        sys.exit(130)
"""


@pytest.mark.parametrize("blow", [signal.SIGKILL, signal.SIGINT])
def test_an_interrupted_run_leaves_nothing_and_a_second_one_finishes(
    corpus: Path, tmp_path: Path, blow: signal.Signals
) -> None:
    out, script = tmp_path / "set", tmp_path / "stall.py"
    script.write_text(_STALLING)
    specs = [str(corpus), PASSKEYS]
    root = Path(__file__).parents[3]
    process = subprocess.Popen(
        [sys.executable, str(script), "|".join(specs), str(out)],
        stdout=subprocess.PIPE,
        env={"PYTHONPATH": str(root), "PATH": "/usr/bin:/bin"},
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"stalled\n"
    workers = psutil.Process(process.pid).children(recursive=True)
    assert len(workers) >= 2
    with pytest.raises(ValueError, match="another `infini prepare` is writing"):
        prepare(specs, out, OPTIONS)
    process.send_signal(blow)
    process.wait(30)
    assert process.returncode == (130 if blow == signal.SIGINT else -blow)
    _, alive = psutil.wait_procs(workers, timeout=20)
    for worker in alive:
        worker.kill()
    assert not alive
    assert bool(list(out.glob(".building-*"))) == (blow == signal.SIGKILL)
    assert not (out / "manifest.json").exists()
    with pytest.raises(ValueError, match="not a prepared set"):
        PreparedSet(out)

    assert prepare(specs, out, OPTIONS).built
    prepare(specs, tmp_path / "fresh", OPTIONS)
    assert contents(out) == contents(tmp_path / "fresh")


def test_a_complete_set_is_kept_and_a_different_one_refused(corpus: Path, tmp_path: Path) -> None:
    out = tmp_path / "set"
    options = PrepareOptions()
    assert prepare([str(corpus)], out, options).built
    before = contents(out)
    written = {file: file.stat().st_mtime_ns for file in out.rglob("*")}
    again = prepare([str(corpus)], out, options)
    assert not again.built
    assert again.manifest == load_manifest(out)
    assert {file: file.stat().st_mtime_ns for file in out.rglob("*")} == written

    with pytest.raises(ValueError, match=r"min_tokens is 2 there and 90 here.*--overwrite"):
        prepare([str(corpus)], out, replace(options, min_tokens=90))
    with pytest.raises(ValueError, match="the sources are others"):
        prepare([str(corpus), PASSKEYS], out, options)
    with (corpus / "00.txt").open("a") as file:
        file.write("more")
    with pytest.raises(ValueError, match=r"files of .* have changed: corpus/00\.txt"):
        prepare([str(corpus)], out, options)
    assert contents(out) == before
    assert prepare([str(corpus), PASSKEYS], out, replace(options, valid_fraction=0.0), overwrite=True).built
    assert sorted(entry.name for entry in out.iterdir()) == [
        "inputs.parquet",
        "manifest.json",
        "tokenizer",
        "train-000000.tar",
        "train.index.parquet",
    ]
    (out / "train-000000.tar").unlink()
    with pytest.raises(ValueError, match="damaged set"):
        prepare([str(corpus), PASSKEYS], out, replace(options, valid_fraction=0.0))


def test_a_sets_tokenizer_is_used_again(corpus: Path, tmp_path: Path) -> None:
    prepare([str(corpus)], tmp_path / "first", OPTIONS)
    options = replace(OPTIONS, tokenizer=str(tmp_path / "first"))
    prepare([PASSKEYS], tmp_path / "second", options)
    assert PreparedSet(tmp_path / "second").tokenizer_hash == PreparedSet(tmp_path / "first").tokenizer_hash
    prepare([str(corpus)], tmp_path / "first", replace(OPTIONS, tokenizer="train:300"), overwrite=True)
    with pytest.raises(ValueError, match="the tokenizer is another one"):
        prepare([PASSKEYS], tmp_path / "second", options)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("room_bytes", [10_000, 150_000])
def test_a_full_disk_leaves_nothing(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, room_bytes: int
) -> None:
    written = 0

    class FullDisk(io.FileIO):
        def write(self, contents: Any) -> int:
            nonlocal written
            written += len(contents)
            if written > room_bytes:
                raise OSError(errno.ENOSPC, "No space left on device")
            return super().write(contents)

    def open_on_full_disk(self: Any, path: Path) -> None:
        create(self, path)
        self._file.close()
        self._file = FullDisk(path, "wb")

    out = tmp_path / "set"
    create = data.prepared.shard_writer._HashingFile.__init__
    monkeypatch.setattr(data.prepared.shard_writer._HashingFile, "__init__", open_on_full_disk)
    with pytest.raises(OSError, match=f"disk is full: the set in {out}"):
        prepare([str(corpus)], out, OPTIONS)
    assert list(out.iterdir()) == []
    monkeypatch.undo()
    assert prepare([str(corpus)], out, OPTIONS).built


def test_long_documents_are_cut_into_equal_parts_within_a_split(corpus: Path, tmp_path: Path) -> None:
    options = replace(OPTIONS, min_tokens=50)
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    prepare([str(corpus)], whole, options)
    manifest = prepare([str(corpus)], cut, replace(options, max_tokens=300)).manifest
    texts: dict[str, tuple[str, list[int]]] = {}
    for split in ("train", "valid"):
        prepared = PreparedSet(whole, split)
        for i in range(len(prepared)):
            texts[prepared.metadata(i).id] = (split, prepared.read(i).tolist())
    assert max(len(tokens) for _, tokens in texts.values()) > 3000
    parts: dict[str, list[list[int]]] = {}
    for split in ("train", "valid"):
        prepared = PreparedSet(cut, split)
        for i in range(len(prepared)):
            id = prepared.metadata(i).id
            name, part = (id, 0) if id in texts else (id.rpartition("#")[0], int(id.rpartition("#")[2]))
            assert texts[name][0] == split
            parts.setdefault(name, []).append(prepared.read(i).tolist())
            assert len(parts[name]) == part + 1
    assert parts.keys() == texts.keys()
    for name, pieces in parts.items():
        tokens = texts[name][1]
        assert sum((piece[:-1] for piece in pieces), []) == tokens[:-1]
        assert {piece[-1] for piece in pieces} == {tokens[-1]}
        lengths = [len(piece) for piece in pieces]
        assert max(lengths) <= 300 and max(lengths) - min(lengths) <= 1
        assert len(pieces) == 1 or min(lengths) >= 150
    assert manifest.sources[0].documents == sum(map(len, parts.values()))
    assert manifest.sources[0].tokens == sum(split.tokens for split in manifest.splits.values())


def test_documents_with_questions_are_not_cut(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="questions about them; --max-tokens 1,000 cuts plain text only"):
        prepare([PASSKEYS], tmp_path / "set", replace(OPTIONS, max_tokens=1000))


def test_nothing_to_write_is_an_error(tmp_path: Path) -> None:
    empty, short = tmp_path / "empty.jsonl", tmp_path / "short.txt"
    empty.write_text("\n")
    short.write_text("only these few words")
    out = tmp_path / "set"
    for tokenizer in ("byte", "train:300"):
        with pytest.raises(ValueError, match=r"empty\.jsonl is empty"):
            prepare([str(empty)], out, PrepareOptions(tokenizer=tokenizer))
    with pytest.raises(ValueError, match=r"none of its 1 documents has --min-tokens 64 .*longest .* has 21"):
        prepare([str(short)], out, PrepareOptions(min_tokens=64))
    with pytest.raises(ValueError, match="length=64: a passkey document has at least 2.. tokens"):
        prepare(["passkey:3,length=64..1K"], out, PrepareOptions())
    (tmp_path / "bad.txt").write_bytes(b"ok \xff")
    for processes in (1, 2):
        with pytest.raises(ValueError, match=r"bad\.txt is not UTF-8"):
            prepare([str(tmp_path / "bad.txt")], out, PrepareOptions(), processes=processes)
    assert list(out.iterdir()) == []


def test_a_folder_with_other_files_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match=r"holds other files \(thesis\.txt"):
        prepare([str(tmp_path / "thesis.txt")], tmp_path, PrepareOptions(), overwrite=True)
    with pytest.raises(ValueError, match="is a file"):
        prepare([str(tmp_path / "thesis.txt")], tmp_path / "thesis.txt", PrepareOptions())
    with pytest.raises(ValueError, match=r"s\\xe9: the name is not UTF-8"):
        prepare([str(tmp_path / "thesis.txt")], tmp_path / os.fsdecode(b"s\xe9"), PrepareOptions())
    assert [entry.name for entry in tmp_path.iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"min_tokens": 1}, "--min-tokens 1"),
        ({"min_tokens": 64, "max_tokens": 127}, "--max-tokens 127: valid are 128 and more"),
        ({"valid_fraction": 1.0}, "--valid-fraction 1.0"),
        ({"shard_bytes": 10}, "--shard-size 10"),
        ({"tokenizer_sample_bytes": 10}, "--tokenizer-sample 10"),
        ({"seed": -1}, "--seed -1"),
        ({"tokenizer": "train:many"}, "train:many: 'many' is not a size"),
        ({"tokenizer": "train:100"}, "at least 257"),
        ({"tokenizer": "nowhere"}, "--tokenizer nowhere: there is no such folder, and nothing is downloaded"),
    ],
)
def test_options_that_make_no_set_are_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        prepare([PASSKEYS], tmp_path / "set", PrepareOptions(**change))
    assert not (tmp_path / "set").exists()


def splits(ids: list[str], fraction: float) -> dict[str, str]:
    assigner = SplitAssigner(fraction)
    documents = [EncodedDocument(id, 0, 0, np.zeros(2), [], [], 0) for id in ids]
    written = [pair for document in documents for pair in assigner.add(document)] + assigner.finish()
    assert sorted(document.id for _, document in written) == sorted(ids)
    return {document.id: split for split, document in written}


def test_both_splits_get_a_document() -> None:
    for count in range(2, 40):
        ids = [f"document {count}.{i}" for i in range(count)]
        for fraction in (0.001, 0.3, 0.999):
            assert set(splits(ids, fraction).values()) == {"train", "valid"}
        assert set(splits(ids, 0.0).values()) == {"train"}
    assert splits(["alone"], 0.999) == {"alone": "train"}


def test_a_documents_split_does_not_depend_on_the_others() -> None:
    ids = [f"document {i}" for i in range(2000)]
    everything, half = splits(ids, 0.1), splits(ids[::2], 0.1)
    assert all(everything[id] == half[id] for id in ids[::2])
    assert 140 < sum(split == "valid" for split in everything.values()) < 260


class _DyingJob(Job):
    def load(self) -> tuple[str, int]:
        raise NotImplementedError

    def encode(self, tokenizer: object) -> Encoded:
        signal.raise_signal(signal.SIGKILL)
        raise AssertionError


def test_a_killed_encoding_process_ends_the_run() -> None:
    started = time.perf_counter()
    with pytest.raises(ChildProcessError, match="killed"):
        list(encode_jobs([(0, _DyingJob("x", 1))], byte_tokenizer(), processes=2))
    assert time.perf_counter() - started < 20


class _Panic(BaseException):
    """As a Rust library's: no Exception, and of a class that cannot be sent to another process."""

    def __reduce__(self) -> str:
        raise TypeError("cannot be pickled")


@dataclass(frozen=True)
class _FailingJob(Job):
    error: type[BaseException]

    def load(self) -> Loaded:
        raise self.error("the reason")


@pytest.mark.parametrize(
    ("error", "seen", "message"),
    [
        (_Panic, ValueError, "document x cannot be encoded: 'the reason'"),
        (MemoryError, OSError, r"document x \(7 bytes\) does not fit into the memory"),
        (ValueError, ValueError, "the reason"),
    ],
)
def test_an_encoding_process_that_fails_says_why(
    error: type[BaseException], seen: type[Exception], message: str
) -> None:
    for processes in (1, 2) if error is _Panic else (1,):
        with pytest.raises(seen, match=message):
            list(encode_jobs([(0, _FailingJob("x", 7, error))], byte_tokenizer(), processes))
