"""Encodes documents in several processes and hands them back in order.

Nothing depends on the number of processes but the time: jobs come from one iterator, results leave in its order, and
no more than a few batches are under way, so memory is bounded by the largest documents and not by the corpus.
"""

from __future__ import annotations

import errno
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field, replace

import numpy as np

from data.files import shown
from data.preparation.sources import BadInputError, Job
from data.prepared.questions import Question
from data.prepared.shards import token_dtype
from data.tokenizer.tokenizer import Tokenizer

# Small documents travel together: about a second of work at 2 MB/s keeps the pipes' cost below a percent.
_BATCH_BYTES = 1 << 20
_BATCH_JOBS = 1024
_BATCHES_PER_PROCESS = 3
_BYTES_UNDER_WAY = 2 << 30
"""Very long documents are encoded by fewer processes than there are."""

_tokenizer: Tokenizer | None = None


@dataclass
class EncodedDocument:
    id: str
    source: int
    """Number of the source it came from."""
    input_bytes: int
    tokens: np.ndarray
    """In the shards' type, with the tokens that begin and end a document."""
    answers: list[tuple[int, int]]
    questions: list[Question]
    skipped_files: int = 0
    digests: dict[str, str] = field(default_factory=dict)
    """sha256 of the files that were read for it."""
    error: str | None = None
    """Why there are no tokens: the input is bad."""
    is_record: bool = False
    """It is one of many of its file."""
    is_empty: bool = False
    """There is no text."""


def encode_jobs(jobs: Iterable[tuple[int, Job]], tokenizer: Tokenizer, processes: int) -> Iterator[EncodedDocument]:
    """Encode (source number, job) pairs with `processes` processes; results come in the order of the jobs.

    Raises:
        ValueError: a document cannot be made or encoded. (One whose input is bad comes with its error.)
        OSError: a document does not fit into the memory.
        ChildProcessError: an encoding process was killed.
    """
    batches = _batches(jobs)
    if processes == 1:
        for batch in batches:
            for source, job in batch:
                yield _encode(source, job, tokenizer)
        return
    # spawn: a fork would copy the threads' locks of whatever has been imported so far.
    context = multiprocessing.get_context("spawn")
    executor = ProcessPoolExecutor(processes, mp_context=context, initializer=_start_process, initargs=(tokenizer,))
    pending: deque[tuple[str, int, Future[list[EncodedDocument]]]] = deque()
    oldest, weight_under_way = "", 0

    def oldest_result() -> list[EncodedDocument]:
        nonlocal oldest, weight_under_way
        oldest, weight, future = pending.popleft()
        weight_under_way -= weight
        return future.result()

    try:
        for batch in batches:
            weight = sum(job.weight for _, job in batch)
            while pending and (
                len(pending) >= processes * _BATCHES_PER_PROCESS or weight_under_way + weight > _BYTES_UNDER_WAY
            ):
                yield from oldest_result()
            pending.append((batch[0][1].id, weight, executor.submit(_encode_batch, batch)))
            weight_under_way += weight
        while pending:
            yield from oldest_result()
    except BrokenProcessPool as error:
        raise ChildProcessError(
            "an encoding process was killed, most likely for lack of memory; use fewer --processes "
            f"(it had document {oldest} or one soon after it)"
        ) from error
    finally:
        executor.shutdown(wait=True, cancel_futures=True)


def _batches(jobs: Iterable[tuple[int, Job]]) -> Iterator[list[tuple[int, Job]]]:
    batch: list[tuple[int, Job]] = []
    weight = 0
    for source, job in jobs:
        batch.append((source, job))
        weight += job.weight
        if weight >= _BATCH_BYTES or len(batch) >= _BATCH_JOBS:
            yield batch
            batch, weight = [], 0
    if batch:
        yield batch


def _encode(source: int, job: Job, tokenizer: Tokenizer) -> EncodedDocument:
    dtype = token_dtype(tokenizer.vocab_size)
    common = {"id": job.id, "source": source, "input_bytes": job.input_bytes, "is_record": job.is_record}
    try:
        encoded = job.encode(tokenizer)
        tokens = np.concatenate([tokenizer.begin_ids, encoded.tokens, [tokenizer.eos_id]]).astype(dtype)
    except BadInputError as error:
        return EncodedDocument(
            **common, tokens=np.zeros(0, dtype), answers=[], questions=[], digests=error.digests, error=str(error)
        )
    except MemoryError:
        raise OSError(errno.ENOMEM, f"document {job.id} ({job.weight:,} bytes) does not fit into the memory") from None
    except Exception:
        raise
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt | SystemExit | GeneratorExit):
            raise
        # A panic of the tokenizer's library: of a class that another process cannot be told of.
        raise ValueError(f"document {job.id} cannot be encoded: {shown(str(error))}") from None
    begin = len(tokenizer.begin_ids)
    return EncodedDocument(
        **common,
        tokens=tokens,
        answers=[(start + begin, stop + begin) for start, stop in encoded.answers],
        questions=[replace(question, after=question.after + begin) for question in encoded.questions],
        skipped_files=encoded.skipped_files,
        digests=encoded.digests,
        is_empty=len(encoded.tokens) == 0,
    )


def _encode_batch(batch: list[tuple[int, Job]]) -> list[EncodedDocument]:
    assert _tokenizer is not None
    return [_encode(source, job, _tokenizer) for source, job in batch]


def _start_process(tokenizer: Tokenizer) -> None:
    global _tokenizer
    _tokenizer = tokenizer
    follow_parent()


def follow_parent() -> None:
    """Leave signals to the parent process, and end with it."""
    # Ctrl-C reaches the whole group: the parent decides, and only it reports.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # A parent that was killed closes no queue that this process waits on: watch it, or be left behind for ever.
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()
