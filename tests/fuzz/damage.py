"""Random damage to the files of a folder: what disks, interrupted copies and strangers do to them.

Every kind of damage is a function `(draw, path) -> description`, or None where it does not apply. `draw` is
hypothesis's, so that a failure names its example and comes again.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

Draw = Callable[[st.SearchStrategy], Any]

OUTSIDE = "../outside"
"""A folder beside the damaged one, with copies of its files: nothing there may be read, written or removed."""

HOSTILE: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 2, 2**31, 2**62, 2**63, -(2**63), 10**25, 0.5, -0.0, 1e308, 1e-310),
    *(
        "",
        "x",
        "../..",
        f"{OUTSIDE}/config.yaml",
        "/etc/passwd",
        "/dev/zero",
        "nul\0",
        "\x1b[31m",
        "y" * 5000,
        "é" * 200,
    ),
    *([], {}, [[]], [None], {"": {}}, [0, -1], [[3, 1]], {"a": 1}),
)
"""What stands where a program expects something else."""


def flip(draw: Draw, path: Path) -> str | None:
    content = bytearray(path.read_bytes())
    if not content:
        return None
    # Headers matter more than bodies: half of the flips fall into the first bytes.
    last = min(len(content), 400) - 1 if draw(st.booleans()) else len(content) - 1
    at, bit = draw(st.integers(0, last)), draw(st.integers(0, 7))
    content[at] ^= 1 << bit
    path.write_bytes(content)
    return f"bit {bit} of byte {at} flipped"


def cut(draw: Draw, path: Path) -> str | None:
    size = path.stat().st_size
    if not size:
        return None
    keep = draw(st.integers(0, size - 1))
    os.truncate(path, keep)
    return f"cut to {keep} of {size} bytes"


def overwrite(draw: Draw, path: Path) -> str | None:
    """A block of noise or of zeros, as after a crash."""
    content = bytearray(path.read_bytes())
    if not content:
        return None
    at, length = draw(st.integers(0, len(content) - 1)), draw(st.integers(1, 64))
    seed = draw(st.integers(0, 3))
    noise = bytes(length) if seed == 0 else random.Random(seed).randbytes(length)
    content[at : at + length] = noise[: len(content) - at]
    if bytes(content) == path.read_bytes():
        return None
    path.write_bytes(content)
    return f"{length} bytes overwritten at {at} (noise {seed})"


def append(draw: Draw, path: Path) -> str | None:
    more = draw(st.sampled_from((b"\0", b"x", b"\n{}", b'{"a": 1}', b"\xff" * 600)))
    path.write_bytes(path.read_bytes() + more)
    return f"{more[:9]!r} appended"


def remove(draw: Draw, path: Path) -> str | None:
    path.unlink()
    return "removed"


def swap(draw: Draw, path: Path) -> str | None:
    others = sorted(p for p in path.parent.iterdir() if p.is_file() and not p.is_symlink() and p != path)
    others = [other for other in others if other.read_bytes() != path.read_bytes()]
    if not others:
        return None
    other = draw(st.sampled_from(others))
    a, b = path.read_bytes(), other.read_bytes()
    path.write_bytes(b)
    other.write_bytes(a)
    return f"exchanged with {other.name}"


def special(draw: Draw, path: Path) -> str | None:
    """Not a file any more."""
    kind = draw(st.sampled_from(("fifo", "/dev/zero", "folder", "dangling", "loop")))
    path.unlink()
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to({"dangling": "nowhere", "loop": path.name}.get(kind, kind))
    return f"now {kind}"


def link_out(draw: Draw, path: Path) -> str | None:
    """The same contents, behind a link that leads out of the folder."""
    moved = _outside_of(path) / f"moved-{path.name}"
    shutil.copyfile(path, moved)
    path.unlink()
    path.symlink_to(moved)
    return "behind a link that leads out"


def endless(draw: Draw, path: Path) -> str | None:
    """A file that says it has a terabyte (of zeros)."""
    os.truncate(path, 1 << 40)
    return "as long as a terabyte"


BYTES = (flip, flip, flip, cut, cut, overwrite, append, remove, swap, special, endless)


def json_value(draw: Draw, path: Path, reseal: bool = False) -> str | None:
    """One value of a JSON file replaced, removed, repeated or added.

    Args:
        reseal: give the file a right SHA-256 of its own afterwards, as somebody would who means harm.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return None
    places = list(_places(content))
    if not places:
        return None
    container, key = draw(st.sampled_from(places))
    kind = draw(st.sampled_from(("value", "value", "value", "name", "remove", "twice", "deep", "nan", "type")))
    was = container[key]
    name = f"{key!r} (was {str(was)[:40]})"
    special_text: str | None = None
    if kind == "remove":
        del container[key]
        said = f"{name} removed"
    elif kind == "name" and isinstance(was, str):
        container[key] = value = draw(
            st.sampled_from((f"../{was}", f"{OUTSIDE}/{was}", f"/{was}", was + "/", was.upper()))
        )
        said = f"{name} became {value!r}"
    elif kind == "type":
        container[key] = value = [was] if draw(st.booleans()) else {"value": was}
        said = f"{name} became {str(value)[:40]}"
    elif kind == "twice" and isinstance(container, dict):
        special_text, said = f"0, {json.dumps(key)}: {json.dumps(was)}", f"{name} stands twice"
    elif kind == "deep":
        special_text, said = "[" * 100_000, f"{name} became 100,000 brackets"
    elif kind == "nan":
        special_text = draw(st.sampled_from(("NaN", "-Infinity", "1e999", "9" * 5000)))
        said = f"{name} became {special_text[:9]}"
    else:
        container[key] = value = draw(st.sampled_from(HOSTILE))
        said = f"{name} became {str(value)[:40]!r}"
    if special_text is not None:
        container[key] = "@@here@@"
    if reseal and "sha256" in content:
        content["sha256"] = seal(content)
    text = json.dumps(content)
    if special_text is not None:
        text = text.replace('"@@here@@"', special_text)
    path.write_text(text, encoding="utf-8")
    return said + (" (sealed again)" if reseal else "")


def resealed_json(draw: Draw, path: Path) -> str | None:
    return json_value(draw, path, reseal=True)


def seal(content: dict[str, Any]) -> str:
    """The SHA-256 that a file which holds its own hash should hold."""
    rest = {name: value for name, value in content.items() if name != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def safetensors_header(draw: Draw, path: Path) -> str | None:
    """One value of the header replaced; the tensors stay."""
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = path.with_name(f"{path.name}.header.json")
    header.write_bytes(content[8 : 8 + length])
    said = json_value(draw, header)
    text = header.read_bytes()
    header.unlink()
    if said is None:
        return None
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])
    return f"header: {said}"


def text_line(draw: Draw, path: Path) -> str | None:
    """One line of a text file removed, repeated, or its value replaced."""
    lines = path.read_text(encoding="utf-8").splitlines()
    if not lines:
        return None
    at = draw(st.integers(0, len(lines) - 1))
    kind = draw(st.sampled_from(("value", "value", "value", "remove", "repeat", "indent")))
    was = lines[at]
    if kind == "value" and ":" in was:
        value = draw(st.sampled_from(HOSTILE))
        text = f"{value!r}" if isinstance(value, str) and "\0" not in value else json.dumps(value)
        lines[at] = f"{was.split(':')[0]}: {text}"
    elif kind == "remove":
        del lines[at]
    elif kind == "repeat":
        lines.insert(at, was)
    else:
        lines[at] = "   " + was
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return f"line {at + 1} ({was.strip()[:40]}): {kind}, now {lines[at][:40] if at < len(lines) else ''!r}"


def _places(content: Any, depth: int = 0):
    """(container, key) of every value inside."""
    pairs = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, value in list(pairs):
        yield content, key
        if depth < 6:
            yield from _places(value, depth + 1)


def _outside_of(path: Path) -> Path:
    folder = path.parent
    while folder != folder.parent:
        if (folder.parent / "outside").is_dir():
            return folder.parent / "outside"
        folder = folder.parent
    raise AssertionError("no folder `outside`")
