"""Sets in object stores: read as from the disk, whatever the store does; a store that stays away is named."""

from __future__ import annotations

import importlib.util
import threading
import time
from pathlib import Path

import fsspec
import numpy as np
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from data.config import DataConfig, SetConfig
from data.files import FileError, StoreError, StorePath, inside, is_store, open_regular, place, read_bytes, store
from data.files.ranges import BLOCK_BYTES, Fetcher, StoreRanges
from data.lanes.loader import build_loader
from data.prepared.shards import BadDocumentError, PreparedSet
from data.prepared.verify import verify_set
from data.tokenizer.tokenizer import load_tokenizer
from launch import cli
from tests.prepared import write_set

needs_s3fs = pytest.mark.skipif(importlib.util.find_spec("s3fs") is None, reason="s3fs is not installed (extra s3)")
LENGTHS = [20, 30, 700, 5000, 81, 40_000, 300, 9, 1200, 64]


class FailingMemory(MemoryFileSystem):
    """fsspec's memory file system under another name, with faults to order."""

    protocol = "failing"
    store: dict = {}
    pseudo_dirs = [""]
    faults: list[object] = []
    """Raised, or called with the data, one for each request, from the first on."""
    requests: list[tuple[str, int | None, int | None]] = []

    def cat_file(self, path, start=None, end=None, **kwargs):
        self.requests.append((path, start, end))
        data = super().cat_file(path, start, end, **kwargs)
        if self.faults:
            fault = self.faults.pop(0)
            if isinstance(fault, Exception):
                raise fault
            return fault(data)
        return data


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    fsspec.register_implementation("failing", FailingMemory, clobber=True)
    for kind in (MemoryFileSystem, FailingMemory):
        kind.store.clear()
        kind.pseudo_dirs[:] = [""]
    FailingMemory.faults, FailingMemory.requests = [], []
    monkeypatch.setattr("data.files.ranges._shared", [])
    monkeypatch.setattr(store, "_FIRST_PAUSE_S", 0.001)
    monkeypatch.setenv(store.PATIENCE, "5")


def upload(folder: Path, url: str) -> str:
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        put(file, f"{url}/{file.relative_to(folder).as_posix()}")
    return url


def put(file: Path, url: str) -> None:
    path = StorePath(url)
    path.filesystem.put_file(str(file), path.key)


def windows(path: str, count: int = 12, **options) -> list[list[int]]:
    loader = build_loader(
        DataConfig(sets=[SetConfig(path=path)], prefetch=options.pop("prefetch", 0)),
        **{"lanes": 3, "first_lane": 0, "last_lane": 3, "seed": 1} | options,
        segments_per_window=4,
        segment_length=64,
    )
    try:
        return [loader.next_batch().digests for _ in range(count)]
    finally:
        loader.close()


def test_names():
    assert place("s3://b//a/x/") == StorePath("s3://b/a/x") and str(place("s3://b/a/x")) == "s3://b/a/x"
    assert place("a:b/c") == Path("a:b/c") and not is_store("runs/s3:/x") and is_store("hf://datasets/a/b")
    path = StorePath("gs://bucket/sets/books")
    assert (path.name, str(path.parent), str(path / "x/y")) == (
        "books",
        "gs://bucket/sets",
        "gs://bucket/sets/books/x/y",
    )
    with pytest.raises(ValueError, match="climbs"):
        place("s3://bucket/../other")
    with pytest.raises(FileError, match="not the name of a file"):
        inside(path, "../other", "manifest.json")
    with pytest.raises(TypeError):
        Path(path)  # so nothing takes it for a folder of the disk
    with pytest.raises(ValueError, match="nosuch:// is no store that fsspec knows"):
        place("nosuch://a/b").exists()


@pytest.mark.parametrize("scheme", ["memory", "failing"])
def test_a_set_in_a_store_is_the_set_on_the_disk(tmp_path, scheme):
    folder = write_set(tmp_path / "set", LENGTHS, questions=True)
    url = upload(folder, f"{scheme}://bucket/sets/one")
    here, there = PreparedSet(folder), PreparedSet(url)
    assert there.lengths.tolist() == here.lengths.tolist() and there.document_name(0).startswith(url)
    for i in range(len(here)):
        for start, stop in ((0, None), (1, int(here.lengths[i])), (int(here.lengths[i]) // 2, int(here.lengths[i]))):
            assert np.array_equal(here.read(i, start, stop), there.read(i, start, stop))
        assert here.metadata(i) == there.metadata(i)
    assert load_tokenizer(url).hash == load_tokenizer(folder).hash
    assert not verify_set(url)


def test_batches_and_states_are_the_same(tmp_path, monkeypatch):
    """By hash but for the names of the documents, which hold the set's path: so the same path is read twice."""
    folder = write_set(tmp_path / "set", LENGTHS)
    url = upload(folder, "memory://set")

    class Alias(PreparedSet):
        def document_name(self, i):
            return str(i)

    monkeypatch.setattr("data.lanes.loader.PreparedSet", Alias)
    expected = windows(str(folder))
    assert windows(url) == expected
    assert windows(url, prefetch=2) == expected
    monkeypatch.setattr("data.files.ranges._shared", [])
    monkeypatch.setenv("INFINI_STORE_CACHE_MIB", "1")
    assert windows(url, prefetch=2) == expected


def test_a_window_comes_in_few_requests(tmp_path):
    folder = write_set(tmp_path / "set", [40_000] * 4)
    url = upload(folder, "failing://set")
    before = len(FailingMemory.requests)
    windows(url, count=100)  # 3 lanes x 100 windows x 256 tokens
    asked = [end - start for path, start, end in FailingMemory.requests[before:] if path.endswith(".tar")]
    # uint16 tokens: three lanes' documents of 80 KB, each in one request, whole
    assert len(asked) <= 6 and max(asked) <= 80_000 + 2 * BLOCK_BYTES


def test_failures_are_asked_again_and_short_answers_too(tmp_path, caplog):
    folder = write_set(tmp_path / "set", LENGTHS)
    url = upload(folder, "failing://set")
    source, expected = PreparedSet(url), PreparedSet(folder).read(5)
    FailingMemory.faults = [OSError("SlowDown"), lambda data: data[:-1], TimeoutError(), lambda data: b""]
    assert np.array_equal(source.read(5), expected)
    told = [record.getMessage() for record in caplog.records]
    assert len([line for line in told if "try" in line and "failing://set/train-000000.tar (bytes" in line]) == 4
    assert any("a short answer" in line for line in told) and "answers again" in told[-1]


def test_a_store_that_stays_away_is_named_and_no_document_is_skipped(tmp_path, monkeypatch):
    folder = write_set(tmp_path / "set", LENGTHS)
    url = upload(folder, "failing://set")
    monkeypatch.setenv(store.PATIENCE, "0.05")
    loader = build_loader(
        DataConfig(sets=[SetConfig(path=url)], prefetch=0, skip_bad_documents=True),
        **{"lanes": 1, "first_lane": 0, "last_lane": 1, "seed": 1, "segments_per_window": 4, "segment_length": 64},
    )
    loader.next_batch()
    saved = loader.state_dict()
    monkeypatch.setattr("data.files.ranges._shared", [])
    FailingMemory.faults = [OSError("no route to host")] * 1000
    with pytest.raises(StoreError, match=r"failing://set/train-000000\.tar \(bytes .*failed \d+ times.*no route"):
        for _ in range(100):
            loader.next_batch()
    assert loader.skipped_documents == 0
    FailingMemory.faults = []
    loader.load_state_dict(saved)
    loader.next_batch()


def test_what_waiting_cannot_mend_is_said_at_once(tmp_path, monkeypatch):
    url = upload(write_set(tmp_path / "set", LENGTHS), "failing://set")
    source = PreparedSet(url)
    started = time.monotonic()
    monkeypatch.setenv(store.PATIENCE, "60")
    FailingMemory.faults = [PermissionError("Access Denied")]
    with pytest.raises(BadDocumentError, match="Access Denied"):
        source.read(3)
    shard = StorePath(url) / "train-000000.tar"
    shard.filesystem.rm_file(shard.key)
    with pytest.raises(ValueError, match=r"shard failing://set/train-000000\.tar is missing"):
        PreparedSet(url)
    with pytest.raises(ValueError, match="is not a prepared set"):
        PreparedSet("failing://nothing")
    assert time.monotonic() - started < 10
    monkeypatch.setenv(store.PATIENCE, "soon")
    with pytest.raises(ValueError, match="INFINI_STORE_PATIENCE_S='soon'"):
        PreparedSet(url)


def test_damage_in_a_store_is_found(tmp_path):
    folder = write_set(tmp_path / "set", LENGTHS)
    shard = folder / "train-000000.tar"
    contents = bytearray(shard.read_bytes())
    contents[int(PreparedSet(folder)._index.offset[5]) + 20] ^= 1
    shard.write_bytes(contents)
    (problem,) = verify_set(upload(folder, "memory://set"))
    assert problem.kind == "shard-changed" and "memory://set/train-000000.tar" in problem.message
    assert "tokens of 1 document(s)" in problem.message


def test_streams_and_ranges_are_the_file(tmp_path):
    contents = np.random.default_rng(0).bytes(3 * BLOCK_BYTES + 77)
    (tmp_path / "file").write_bytes(contents)
    put(tmp_path / "file", "memory://b/file")
    path = place("memory://b/file")
    assert path.size() == len(contents) and read_bytes(path, len(contents)) == contents
    with open_regular(path) as stream:
        stream.seek(-100, 2)
        assert stream.read() == contents[-100:]
        stream.seek(5)
        assert stream.read(9) == contents[5:14]
    with pytest.raises(FileError, match="more than"):
        read_bytes(path, 100)
    ranges = StoreRanges(path, len(contents), "1")
    generator = np.random.default_rng(1)
    for _ in range(200):
        offset, size = (int(generator.integers(0, limit)) for limit in (len(contents) + 9, 2 * BLOCK_BYTES))
        if generator.random() < 0.3:
            ranges.announce(size, offset, size)
        assert ranges.pread(size, offset, int(generator.integers(0, 1 << 21))) == contents[offset : offset + size]


def test_a_set_that_takes_anothers_place_is_read_anew(tmp_path):
    """The cache outlives a set that was closed; its shards' names say nothing of what is in them."""
    lengths, seen = [40, 70], []
    for seed in (1, 2):
        folder = write_set(tmp_path / str(seed), lengths, seed=seed)
        there = PreparedSet(upload(folder, "memory://bucket/set"))
        seen.append([there.read(i).tolist() for i in range(len(lengths))])
        assert seen[-1] == [PreparedSet(folder).read(i).tolist() for i in range(len(lengths))]
        there.close()
    assert seen[0] != seen[1]


def test_the_cache_is_bounded_and_threads_share_requests():
    asked, gate = [], threading.Event()

    def fetch(first: int, last: int) -> list[bytes]:
        gate.wait(5)
        asked.extend(range(first, last + 1))
        return [bytes([number]) * 100 for number in range(first, last + 1)]

    fetcher = Fetcher(limit=1000)
    found = []
    readers = [threading.Thread(target=lambda: found.append(fetcher.blocks("f", 0, 3, 7, fetch))) for _ in range(6)]
    for reader in readers:
        reader.start()
    fetcher.announce("f", 2, 9, 9, fetch)
    gate.set()
    for reader in readers:
        reader.join()
    assert found == [[bytes([number]) * 100 for number in range(4)]] * 6
    deadline = time.monotonic() + 5
    while len(asked) < 10 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert sorted(asked) == list(range(10))  # each block once
    fetcher.blocks("g", 0, 30, 30, fetch)
    assert fetcher.held <= 1000


def test_a_failure_of_an_announced_block_is_told_to_whoever_needs_it():
    def fail(first: int, last: int) -> list[bytes]:
        raise OSError("gone")

    fetcher = Fetcher(limit=1000)
    fetcher.announce("f", 0, 1, 1, fail)
    with pytest.raises(OSError, match="gone"):
        fetcher.blocks("f", 0, 1, 1, fail)
    assert fetcher.blocks("f", 0, 0, 0, lambda first, last: [b"x"]) == [b"x"]


def test_inspect_reads_a_store_and_a_run_cannot_write_to_one(tmp_path, capsys):
    url = upload(write_set(tmp_path / "set", LENGTHS), "memory://sets/a")
    assert cli.main(["inspect", url]) == 0
    assert "intact: all hashes match" in capsys.readouterr().out
    assert cli.main(["inspect", "memory://sets"]) == 2
    assert "nothing that can be inspected" in capsys.readouterr().err
    assert cli.main(["config", "configs/demo.yaml", "run_dir=s3://bucket/run"]) == 2
    assert "run_dir = s3://bucket/run: a run writes to a disk" in capsys.readouterr().err


def forget_s3():
    """The next file system is made for the server that the environment names then."""
    import s3fs

    store._filesystem.cache_clear()
    s3fs.S3FileSystem.clear_instance_cache()


@pytest.fixture
def s3(tmp_path, monkeypatch):
    from tests.s3_server import serving

    for name, value in (
        ("AWS_ACCESS_KEY_ID", "k"),
        ("AWS_SECRET_ACCESS_KEY", "s"),
        ("AWS_EC2_METADATA_DISABLED", "true"),
    ):
        monkeypatch.setenv(name, value)
    with serving(tmp_path / "s3") as server:
        (tmp_path / "s3" / "bucket").mkdir()
        monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
        forget_s3()
        yield server
    forget_s3()


@needs_s3fs
def test_a_store_that_is_killed_throttles_and_breaks_off(tmp_path, monkeypatch, s3):
    """Through s3fs, whose own retries lie below: the batches are those of the quiet store, and none is lost."""
    monkeypatch.setenv(store.PATIENCE, "60")
    monkeypatch.setattr(store, "_FIRST_PAUSE_S", 0.1)
    url = upload(write_set(tmp_path / "set", LENGTHS), "s3://bucket/sets/a")
    assert not verify_set(url)
    expected = windows(url, count=9)
    for fault in ("kill", "throttle", "short"):
        monkeypatch.setattr("data.files.ranges._shared", [])
        loader = build_loader(
            DataConfig(sets=[SetConfig(path=url)], prefetch=1, skip_bad_documents=True),
            **{"lanes": 3, "first_lane": 0, "last_lane": 3, "seed": 1, "segments_per_window": 4, "segment_length": 64},
        )
        found = [loader.next_batch().digests]
        monkeypatch.setattr("data.files.ranges._shared", [])  # all that comes is asked of the store
        s3.kill() if fault == "kill" else s3.order(fault)
        mend = threading.Timer(1.0, s3.start if fault == "kill" else s3.order)
        mend.start()
        found += [loader.next_batch().digests for _ in range(8)]
        mend.join()
        assert found == expected and loader.skipped_documents == 0
        loader.close()
    s3.kill()
    monkeypatch.setattr("data.files.ranges._shared", [])
    monkeypatch.setenv(store.PATIENCE, "1")
    with pytest.raises(StoreError, match=r"s3://bucket/sets/a/.*the store failed \d+ times in"):
        windows(url)


@needs_s3fs
def test_against_somebody_elses_s3(tmp_path, monkeypatch):
    """moto's server, which nobody here has written."""
    server = pytest.importorskip("moto.server", reason="moto is not installed").ThreadedMotoServer(
        "127.0.0.1", port=0, verbose=False
    )
    server.start()
    try:
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            monkeypatch.setenv(name, "x")
        host, port = server.get_host_and_port()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        forget_s3()
        place("s3://bucket").filesystem.mkdir("bucket")
        folder = write_set(tmp_path / "set", LENGTHS)
        url = upload(folder, "s3://bucket/sets/a")
        assert not verify_set(url)
        assert np.array_equal(PreparedSet(url).read(5, 3), PreparedSet(folder).read(5, 3))
        assert sorted(place(url).sizes()) == sorted(file.name for file in folder.iterdir())
        with pytest.raises(ValueError, match="is not a prepared set"):
            PreparedSet("s3://bucket/sets/b")
    finally:
        server.stop()
        forget_s3()
