"""What the documentation points at is there: links with their anchors, paths, names of modules. And its tables are for
looking at: no cell of more than forty words."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = ("configs", "data", "docs", "launch", "model", "pipeline", "tests")
PAGES = sorted(
    path.relative_to(ROOT).as_posix()
    for path in (*ROOT.glob("*.md"), *(ROOT / "configs").glob("*.md"), *(ROOT / "docs").rglob("*.md"))
)
SOURCES = sorted(
    path.relative_to(ROOT).as_posix()
    for path in (ROOT / "Makefile", *(p for room in ROOMS if room != "tests" for p in (ROOT / room).rglob("*")))
    if path.suffix in (".py", ".yaml", ".sh", ".sbatch") or path.name == "Makefile"
)
YOURS = {"configs/mine.yaml"}
"""Files that a reader is told to make."""


def anchors(page: Path) -> set[str]:
    """What `#...` may follow a page's name: its headings, as GitHub spells them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def missing_links(page: str) -> list[str]:
    found = []
    for target in re.findall(r"\]\(([^)\s]+)\)", (ROOT / page).read_text(encoding="utf-8")):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        path = (ROOT / page).parent / name if name else ROOT / page
        if not path.exists() or (anchor and anchor not in anchors(path)):
            found.append(target)
    return found


def missing_paths(page: str) -> list[str]:
    text = (ROOT / page).read_text(encoding="utf-8")
    files = re.findall(rf"(?<![\w./-])(?:{'|'.join(ROOMS)})/[\w./*-]+\.(?:py|md|yaml|sh|sbatch|png)\b", text)
    folders = re.findall(rf"`((?:{'|'.join(ROOMS)})/[\w./-]*)`", text)
    return [path for path in {*files, *folders} - YOURS if not any(ROOT.glob(path))]


@pytest.mark.parametrize("page", PAGES)
def test_links_and_paths_exist(page):
    missing = missing_links(page)
    if not page.startswith("docs/benchmarks/"):  # dated: paths are those of their commit
        missing += missing_paths(page)
        names = {path.name for room in ROOMS for path in (ROOT / room).rglob("*.py")}
        text = (ROOT / page).read_text(encoding="utf-8")
        missing += [name for name in re.findall(r"`(\w+\.py)`", text) if name not in names]
    assert not missing, f"{page} points at what is not there: {', '.join(missing)}"


def test_pages_that_the_code_names_exist():
    missing = [
        f"{source}: {page}"
        for source in SOURCES
        for page in re.findall(r"\bdocs/\w+\.md\b", (ROOT / source).read_text(encoding="utf-8"))
        if not (ROOT / page).exists()
    ]
    assert not missing, missing


@pytest.mark.parametrize("page", PAGES)
def test_no_cell_of_more_than_forty_words(page):
    rows = re.findall(r"^\|(.*)\|$", (ROOT / page).read_text(encoding="utf-8"), re.MULTILINE)
    long = [cell.strip() for row in rows for cell in row.split(" | ") if len(cell.split()) > 40]
    assert not long, f"{page}: {long}"
