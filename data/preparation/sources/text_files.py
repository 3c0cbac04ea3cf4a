"""Sources that are files and folders."""

from __future__ import annotations

import fnmatch
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from data.files import FileError, file_name, is_utf8, open_regular, some
from data.preparation.parquet import open_parquet
from data.preparation.records import RECORD_SUFFIXES, is_record_file, read_records, without_compression
from data.preparation.sources.base import BadInputError, Job, Loaded, Source, SourceOptions
from data.preparation.sources.folders import Found, Walk, walk
from data.preparation.streams import FileInput, read_text

_NAMES_SHOWN = 3


@dataclass(frozen=True)
class FileJob(Job):
    file: FileInput
    max_document_bytes: int

    def load(self) -> Loaded:
        try:
            text, sha256 = read_text(self.file, self.max_document_bytes)
        except (FileError, OSError) as error:
            raise BadInputError(str(error), {self.file.name: getattr(error, "sha256", "")}) from None
        return Loaded(text, digests={self.file.name: sha256})


@dataclass(frozen=True)
class RecordJob(Job):
    text: str

    @property
    def weight(self) -> int:
        return len(self.text)

    @property
    def is_record(self) -> bool:
        return True

    def load(self) -> Loaded:
        return Loaded(self.text)


@dataclass(frozen=True)
class BadJob(Job):
    """Stands in its place among the others, so that what is left out does not depend on the number of processes."""

    error: str
    record: bool

    @property
    def is_record(self) -> bool:
        return self.record

    def load(self) -> Loaded:
        raise BadInputError(self.error)


class FileSource(Source):
    """A file, or all matching files of a folder, hidden ones left out, in the order of their paths.

    Args:
        seen: names of the files that other sources read already, by their identity. This one's are added.

    Raises:
        ValueError: there is no such file, or nothing to read in the folder.
    """

    def __init__(self, spec: str, options: SourceOptions, seen: dict[tuple[object, ...], str]) -> None:
        super().__init__(file_name(spec))
        self._options = options
        root = Path(spec)
        if not root.exists():
            raise ValueError(
                f"source {self.spec} does not exist (other kinds of sources start with python:, passkey: or another "
                "task)"
            )
        if root.is_dir():
            found = self._find(root)
        else:
            found = [Found(root.name, root, root.stat(), False)]
            if not is_record_file(root.name) and not self._is_text(root.name):
                self.notes.append(f"{self.spec} is read as one plain text, whatever its name says")
        # resolve(): the name of `.` or `..` is the folder's
        prefix = f"{root.resolve().name}/" if root.is_dir() else ""
        kept = self._once(found, prefix, seen)
        if found and not kept:
            raise ValueError(
                f"source {self.spec} has only files that another source has ({seen[found[0].identity]}); leave it out"
            )
        self._files = [FileInput.of(file_name(prefix + file.relative), file.path, file.status) for file in kept]
        if not options.skip_bad:
            for file, status in zip(self._files, (file.status for file in kept), strict=True):
                self._check(file, status)

    def _check(self, file: FileInput, status: os.stat_result) -> None:
        """Raises: BadInputError for what can be seen before anything is read."""
        try:
            if not stat.S_ISREG(status.st_mode):
                open_regular(file.path).close()
            if file.path.name.lower().endswith(".parquet"):
                open_parquet(file, self._options.text_column).close(force=True)
        except (FileError, OSError) as error:
            raise BadInputError(str(error)) from None

    def _is_text(self, relative: str) -> bool:
        names = relative.lower(), without_compression(relative)
        return any(
            fnmatch.fnmatchcase(name, pattern.lower()) for pattern in self._options.text_patterns for name in names
        )

    def _find(self, root: Path) -> list[Found]:
        met = Walk()
        found = walk(root, lambda relative: is_record_file(relative) or self._is_text(relative), met)
        self.passed_over = dict(met.passed_over.counts)
        what = f"no file that matches {', '.join(self._options.text_patterns)} or ends in {', '.join(RECORD_SUFFIXES)}"
        if not found:
            left = f"; passed over: {met.passed_over}" if self.passed_over else ""
            raise ValueError(f"source {self.spec} holds {what} (see --text-pattern){left}")
        if self.passed_over:
            self.notes.append(f"{self.spec}: passed over {met.passed_over} (see --text-pattern)")
        if met.twice:
            examples = some((f"{name} leads to {where}" for name, where in met.twice), _NAMES_SHOWN)
            self.notes.append(f"{self.spec}: {len(met.twice):,} linked folders are not read again: {examples}")
        escaped = [file.relative for file in found if not is_utf8(file.relative)]
        if escaped:
            examples = some(map(file_name, escaped), _NAMES_SHOWN)
            self.notes.append(f"{self.spec}: {len(escaped):,} names are not UTF-8, read with escapes: {examples}")
        return found

    def _once(self, found: list[Found], prefix: str, seen: dict[tuple[object, ...], str]) -> list[Found]:
        """Each file under one name: the one that no link leads to, where there is one."""
        kept, again = [], []
        for file in sorted(found, key=lambda file: (file.linked, file.relative)):
            name = file_name(prefix + file.relative)
            first = seen.setdefault(file.identity, f"{name} of {self.spec}")
            if first == f"{name} of {self.spec}":
                kept.append(file)
            else:
                again.append(f"{name} is {first}")
        if again:
            self.notes.append(
                f"{self.spec}: {len(again):,} files are reached twice and read once: {some(again, _NAMES_SHOWN)}"
            )
        return sorted(kept, key=lambda file: file.relative)

    @property
    def inputs(self) -> list[tuple[str, int]]:
        return [(file.name, file.size) for file in self._files]

    def files_of(self, first: int, last: int) -> list[FileInput]:
        return self._files[first:last]

    def jobs(self, first: int = 0, last: int | None = None) -> Iterator[Job]:
        for file in self._files[first:last]:
            if is_record_file(file.path.name):
                yield from self._record_jobs(file)
            else:
                yield FileJob(file.name, file.size, file, self._options.max_document_bytes)

    def _record_jobs(self, file: FileInput) -> Iterator[Job]:
        left = file.size
        try:
            for record in read_records(file, self._options.text_column, self._options.max_document_bytes, self.digests):
                left -= record.input_bytes
                name = f"{file.name}#{record.number}"
                if record.error is None:
                    yield RecordJob(name, record.input_bytes, record.text)
                else:
                    yield BadJob(name, record.input_bytes, record.error, record=True)
        except (FileError, OSError) as error:
            self.digests.setdefault(file.name, "")
            yield BadJob(file.name, left, str(error), record=False)
