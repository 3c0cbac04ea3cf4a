"""Sources that are installed Python packages."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from data.files import FileError, file_name
from data.preparation.sources.base import BadInputError, Job, Loaded, Source, SourceOptions
from data.preparation.streams import FileInput, NotUTF8Error, read_text, too_long


@dataclass(frozen=True)
class PythonJob(Job):
    package: str
    files: tuple[FileInput, ...]
    max_document_bytes: int

    def load(self) -> Loaded:
        parts: list[str] = []
        skipped = 0
        digests: dict[str, str] = {}
        for file in self.files:
            try:
                text, digests[file.name] = read_text(file, self.max_document_bytes)
            except NotUTF8Error as error:
                digests[file.name] = error.sha256
                skipped += 1
            except (FileError, OSError) as error:
                raise BadInputError(str(error), digests) from None
            else:
                parts.append(f"# file: {file.name}\n{text}" + ("" if text.endswith("\n") else "\n"))
        if self.input_bytes > self.max_document_bytes:
            raise BadInputError(too_long(self.package, self.max_document_bytes), digests)
        return Loaded("".join(parts), skipped, digests)


class PythonSource(Source):
    """`python:torch,numpy`: source trees of installed packages, found without importing them.

    A document is a package `a.b` with everything below it, or the modules directly in `a`; files come in the order of
    their paths, each after a line `# file: a/b/c.py`. A dotted name (`python:megatron.core`) starts further down.
    """

    def __init__(self, spec: str, options: SourceOptions) -> None:
        super().__init__(spec)
        self._options = options
        names = [name.strip() for name in spec.removeprefix("python:").split(",") if name.strip()]
        if not names:
            raise ValueError(f"source {spec!r} names no package; valid is for instance python:torch,numpy")
        self._documents: list[tuple[str, tuple[FileInput, ...]]] = []
        for name in dict.fromkeys(names):
            self._documents += _python_documents(name)
        self._sizes = [sum(file.size for file in files) for _, files in self._documents]

    @property
    def inputs(self) -> list[tuple[str, int]]:
        return [(name, size) for (name, _), size in zip(self._documents, self._sizes, strict=True)]

    def files_of(self, first: int, last: int) -> list[FileInput]:
        return [file for _, files in self._documents[first:last] for file in files]

    def jobs(self, first: int = 0, last: int | None = None) -> Iterator[Job]:
        for (name, files), size in list(zip(self._documents, self._sizes, strict=True))[first:last]:
            yield PythonJob(f"python:{name}", size, name, files, self._options.max_document_bytes)


def _python_documents(name: str) -> list[tuple[str, tuple[FileInput, ...]]]:
    """(package, files) for the modules of `name` and each of its sub-packages."""
    top, *below = name.split(".")
    if not all(part.isidentifier() for part in (top, *below)):
        raise ValueError(f"source python:{name}: {name!r} is not the name of a package")
    try:
        spec = importlib.util.find_spec(top)
    except ValueError:
        spec = None
    if spec is None:
        raise ValueError(f"source python:{name}: no package {top!r} is installed")
    # find_spec of a dotted name would import the parent; its folders are looked up by hand in its place.
    folders = [Path(location).joinpath(*below) for location in spec.submodule_search_locations or []]
    folders = [folder for folder in folders if folder.is_dir()]
    if folders:
        files = {path.relative_to(folder): path for folder in reversed(folders) for path in folder.rglob("*.py")}
        files = {relative: path for relative, path in files.items() if not path.is_dir()}
    elif not below and spec.origin and spec.origin.endswith(".py"):
        files = {Path(Path(spec.origin).name): Path(spec.origin)}
    else:
        files = {}
    groups: dict[str, list[FileInput]] = {}
    prefix = name.replace(".", "/") + "/" if folders else ""
    for relative in sorted(files, key=Path.as_posix):
        group = name if len(relative.parts) == 1 else f"{name}.{relative.parts[0]}"
        groups.setdefault(group, []).append(FileInput.of(file_name(prefix + relative.as_posix()), files[relative]))
    if not groups:
        raise ValueError(f"source python:{name}: it has no Python source files")
    return [(group, tuple(groups[group])) for group in sorted(groups)]
