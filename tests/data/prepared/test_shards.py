"""Shards and their index: what is written is read back, by us and by webdataset, and damage is named."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import webdataset as wds
from hypothesis import given, settings
from hypothesis import strategies as st

from data.prepared.manifest import write_manifest
from data.prepared.shard_writer import ShardSetWriter
from data.prepared.shards import BadDocumentError, PreparedSet
from data.tokenizer.info import TokenizerEntry


def write_set(
    folder: Path, documents: list[np.ndarray], vocab_size: int = 257, shard_bytes: int = 8192, answers: bool = False
) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    writer = ShardSetWriter(folder, "train", vocab_size, shard_bytes)
    for i, tokens in enumerate(documents):
        spans = [(k, k + 1) for k in range(min(i % 3, len(tokens)))] if answers else None
        writer.add(tokens, id=f"document {i} ü", source="test", answers=spans)
    entry = TokenizerEntry(kind="byte", hash="0" * 64, vocab_size=vocab_size, eos_id=vocab_size - 1)
    write_manifest(folder, tokenizer=entry, splits={"train": writer.close()})
    return folder


def random_documents(count: int, vocab_size: int = 257, longest: int = 3000) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, vocab_size, rng.integers(2, longest)) for _ in range(count)]


@settings(deadline=None, max_examples=25)
@given(
    lengths=st.lists(st.integers(1, 700), min_size=1, max_size=12),
    vocab_size=st.sampled_from([257, 65_536, 65_537, 128_256]),
    shard_bytes=st.sampled_from([4096, 20_000, 1 << 20]),
)
def test_documents_are_read_back(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], vocab_size: int, shard_bytes: int
) -> None:
    rng = np.random.default_rng(1)
    documents = [rng.integers(0, vocab_size, length) for length in lengths]
    documents[0][0] = vocab_size - 1
    folder = write_set(tmp_path_factory.mktemp("set"), documents, vocab_size, shard_bytes, answers=True)
    prepared = PreparedSet(folder)
    assert prepared.lengths.tolist() == lengths
    assert prepared.lengths.dtype == np.int64
    for i, tokens in enumerate(documents):
        assert np.array_equal(prepared.read(i), tokens)
        start = len(tokens) // 3
        part = prepared.read(i, start, start + (len(tokens) - start) // 2)
        assert part.dtype == np.int64
        assert np.array_equal(part, tokens[start : start + (len(tokens) - start) // 2])
        assert prepared.answers(i) == [(k, k + 1) for k in range(min(i % 3, len(tokens)))]
        assert prepared.metadata(i).id == f"document {i} ü"
        assert prepared.metadata(i).tokens == len(tokens)


def test_webdataset_reads_the_shards(tmp_path: Path) -> None:
    documents = random_documents(20)
    folder = write_set(tmp_path, documents)
    shards = sorted(map(str, folder.glob("train-*.tar")))
    assert len(shards) > 3
    samples = list(wds.WebDataset(shards, shardshuffle=False).decode())
    assert len(samples) == 20
    for i, (sample, tokens) in enumerate(zip(samples, documents, strict=True)):
        assert sample["npy"].dtype == np.uint16
        assert np.array_equal(sample["npy"], tokens)
        assert sample["json"]["id"] == f"document {i} ü"
        assert sample["__key__"] == f"{i:08d}"


def test_shards_stay_below_their_size_and_bytes_repeat(tmp_path: Path) -> None:
    documents = random_documents(40)
    first, second = (write_set(tmp_path / name, documents, shard_bytes=30_000) for name in "ab")
    for file in sorted(first.iterdir()):
        assert file.read_bytes() == (second / file.name).read_bytes()
    summary = json.loads((first / "manifest.json").read_text())["splits"]["train"]
    assert all(shard["bytes"] < 30_000 + 20_480 for shard in summary["shards"])  # a tar's end fills 10 KB records
    assert sum(shard["documents"] for shard in summary["shards"]) == 40
    histogram = dict(map(tuple, summary["length_histogram"]))
    for bound, count in histogram.items():
        assert count == sum(bound <= len(tokens) < 2 * bound for tokens in documents)
    assert sum(histogram.values()) == 40


def test_more_shards_than_open_files_and_several_threads(tmp_path: Path) -> None:
    documents = random_documents(100, longest=400)
    prepared = PreparedSet(write_set(tmp_path, documents, shard_bytes=4096))
    assert len(prepared.manifest.splits["train"].shards) > 34
    order = np.random.default_rng(2).integers(0, 100, 600).tolist()
    with ThreadPoolExecutor(4) as pool:
        for i, tokens in zip(order, pool.map(prepared.read, order), strict=True):
            assert np.array_equal(tokens, documents[i])
    assert len(prepared._files) <= 32
    prepared.close()
    assert np.array_equal(prepared.read(3), documents[3])


def test_spans_outside_of_a_document_are_refused(tmp_path: Path) -> None:
    prepared = PreparedSet(write_set(tmp_path, random_documents(2)))
    for start, stop in ((-1, 2), (3, 2), (0, int(prepared.lengths[0]) + 1)):
        with pytest.raises(IndexError, match="00000000"):
            prepared.read(0, start, stop)


def test_opening_names_what_is_missing_or_does_not_match(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="infini prepare"):
        PreparedSet(tmp_path / "nothing")
    folder = write_set(tmp_path / "set", random_documents(20))
    with pytest.raises(ValueError, match="no split 'valid'; it has train"):
        PreparedSet(folder, "valid")

    shard = folder / "train-000001.tar"
    contents = shard.read_bytes()
    shard.write_bytes(contents[:-1])
    with pytest.raises(ValueError, match=r"train-000001\.tar has .* bytes where the manifest says"):
        PreparedSet(folder)
    shard.unlink()
    with pytest.raises(ValueError, match=r"train-000001\.tar is missing"):
        PreparedSet(folder)
    shard.write_bytes(contents)

    index = folder / "train.index.parquet"
    contents = index.read_bytes()
    index.write_bytes(contents[:-1] + bytes([contents[-1] ^ 1]))
    with pytest.raises(ValueError, match=r"index\.parquet is not the index .* SHA-256 differs"):
        PreparedSet(folder)
    index.write_bytes(b"PAR1")
    with pytest.raises(ValueError, match=r"index\.parquet is not the index .* 4 of [\d,]+ bytes"):
        PreparedSet(folder)
    index.unlink()
    with pytest.raises(ValueError, match=r"index\.parquet is missing"):
        PreparedSet(folder)

    (folder / "manifest.json").write_text('{"format_version": 99, "splits": {}, "tokenizer": {}}')
    with pytest.raises(ValueError, match="format_version 99"):
        PreparedSet(folder)


def test_a_document_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    folder = write_set(tmp_path, random_documents(20))
    prepared = PreparedSet(folder)
    last = len(prepared) - 1
    shard, key = prepared.document_name(last).split(":")
    with open(shard, "r+b") as file:
        file.seek(int(prepared._index.offset[last]))
        file.write(b"\xff\xff")
    with pytest.raises(BadDocumentError, match=rf"{Path(shard).name}:{key} holds token 65535"):
        prepared.read(last)
    assert len(prepared.read(last, 1)) == prepared.lengths[last] - 1
    with open(shard, "r+b") as file:
        file.truncate(int(prepared._index.offset[last]) + 2)
    with pytest.raises(BadDocumentError, match=f"{key} ends early"):
        prepared.read(last)
    prepared.close()
    Path(shard).unlink()
    with pytest.raises(BadDocumentError, match=f"{key} cannot be read"):
        prepared.read(last)
