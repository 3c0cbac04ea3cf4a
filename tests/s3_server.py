"""A small S3 server over a folder, as a process of its own: what s3fs asks to read and write, and faults to order.

    python -m tests.s3_server FOLDER PORT

A file `FAULTS` in the folder orders what goes wrong from now on, a word a line: `throttle` answers every request with
503 SlowDown, `read-only` every one that writes, `short` breaks off every answer with data in its middle.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

FAULTS = "FAULTS"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    root: Path

    def log_message(self, *_: object) -> None:
        pass

    def _answer(self, code: int, body: bytes = b"", *, length: int | None = None, **headers: str) -> None:
        self.send_response(code)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _error(self, code: int, kind: str) -> None:
        self._answer(code, f"<Error><Code>{kind}</Code><Message>{kind}</Message></Error>".encode())

    def _target(self) -> tuple[Path, dict[str, list[str]]] | None:
        """The file, and the query; None where the request was answered by a fault."""
        self.faults = set()
        with contextlib.suppress(FileNotFoundError):
            self.faults = set((self.root / FAULTS).read_text().split())
        if "throttle" in self.faults or ("read-only" in self.faults and self.command in ("PUT", "POST", "DELETE")):
            self._error(503, "SlowDown")
            return None
        parts = urlsplit(self.path)
        return self.root / unquote(parts.path).strip("/"), parse_qs(parts.query, keep_blank_values=True)

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        if (target := self._target()) is None:
            return
        file, query = target
        if "list-type" in query:
            self._list(file, query)
        elif not file.is_file():
            self._error(404, "NoSuchBucket" if not file.is_dir() and file.parent == self.root else "NoSuchKey")
        else:
            self._send(file)

    def _send(self, file: Path) -> None:
        data, code, headers = file.read_bytes(), 200, {"ETag": f'"{file.stat().st_mtime_ns}"'}
        if found := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            start, stop = int(found[1]), int(found[2] or len(data) - 1) + 1
            headers["Content_Range"] = f"bytes {start}-{min(stop, len(data)) - 1}/{len(data)}"
            data, code = data[start:stop], 206
        headers["Last_Modified"] = time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(file.stat().st_mtime))
        if "short" in self.faults and self.command == "GET" and len(data) > 1:
            self._answer(code, data[: len(data) // 2], length=len(data), **headers)
            self.close_connection = True
        else:
            self._answer(code, data if self.command == "GET" else b"", length=len(data), **headers)

    def _list(self, bucket: Path, query: dict[str, list[str]]) -> None:
        prefix, delimiter = query.get("prefix", [""])[0], query.get("delimiter", [""])[0]
        keys, folders = [], set()
        for file in sorted(path for path in bucket.rglob("*") if path.is_file()):
            key = file.relative_to(bucket).as_posix()
            if not key.startswith(prefix):
                continue
            rest = key[len(prefix) :]
            if delimiter and delimiter in rest:
                folders.add(prefix + rest.split(delimiter)[0] + delimiter)
            else:
                keys.append(
                    f"<Contents><Key>{escape(key)}</Key><Size>{file.stat().st_size}</Size><ETag>x</ETag>"
                    "<LastModified>2026-01-01T00:00:00.000Z</LastModified><StorageClass>STANDARD</StorageClass></Contents>"
                )
        found = "".join(keys) + "".join(
            f"<CommonPrefixes><Prefix>{escape(folder)}</Prefix></CommonPrefixes>" for folder in sorted(folders)
        )
        count = len(keys) + len(folders)
        body = (
            '<?xml version="1.0"?><ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/">'
            f"<Name>{bucket.name}</Name><Prefix>{escape(prefix)}</Prefix><KeyCount>{count}</KeyCount>"
            f"<MaxKeys>1000</MaxKeys><IsTruncated>false</IsTruncated>{found}</ListBucketResult>"
        )
        self._answer(200, body.encode(), Content_Type="application/xml")

    def do_PUT(self) -> None:
        if (target := self._target()) is None:
            return
        data = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.headers.get("x-amz-decoded-content-length") is not None:  # chunks, each after a line with its size
            rest, data = data, b""
            while rest:
                line, _, rest = rest.partition(b"\r\n")
                size = int(line.split(b";")[0], 16)
                data, rest = data + rest[:size], rest[size + 2 :] if size else b""
        file = target[0]
        file.parent.mkdir(parents=True, exist_ok=True)
        if file.parent == self.root:
            file.mkdir(exist_ok=True)
        else:
            file.write_bytes(data)
        self._answer(200, ETag='"x"')

    def do_DELETE(self) -> None:
        if (target := self._target()) is not None:
            target[0].unlink(missing_ok=True)
            self._answer(204)


class Server:
    """The server's process, which can be killed, stopped for a while, and started again at the same port."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        command = [sys.executable, "-m", "tests.s3_server", str(self.folder), str(self.port)]
        self._process = subprocess.Popen(command, cwd=Path(__file__).parents[1])
        for _ in range(200):
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 1):
                return
            time.sleep(0.05)
        raise RuntimeError(f"no server at port {self.port}")

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()

    def order(self, *faults: str) -> None:
        """What goes wrong from now on; nothing without words."""
        (self.folder / FAULTS).write_text("\n".join(faults))


@contextlib.contextmanager
def serving(folder: Path) -> Iterator[Server]:
    folder.mkdir(exist_ok=True)
    server = Server(folder)
    try:
        yield server
    finally:
        server.kill()


if __name__ == "__main__":
    Handler.root = Path(sys.argv[1])
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # A test process that is killed takes its server along.
    parent = os.getppid()
    server = ThreadingHTTPServer(("127.0.0.1", int(sys.argv[2])), Handler)
    server.daemon_threads = True
    server.timeout = 0.5
    while os.getppid() == parent:
        server.handle_request()
