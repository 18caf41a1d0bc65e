"""A local web server of a folder, with ranges and with faults that a test orders."""

from __future__ import annotations

import contextlib
import http.server
import re
import threading
from collections.abc import Iterator
from pathlib import Path


class WebStore:
    """What the server was asked for, and which requests fail."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.address = ""
        self.requests: list[str] = []
        """Keys in the order of the requests."""
        self.failures: dict[str, list[int]] = {}
        """Pattern of keys -> HTTP codes of the next answers; a single 403 or 500 holds for all later ones."""
        self.has_ranges = True

    def choose_failure(self, key: str) -> int | None:
        """The code of the fault that was ordered for the key; None for an answer without fault."""
        for pattern, codes in self.failures.items():
            if re.search(pattern, key) and codes:
                return codes[0] if codes in ([403], [500]) else codes.pop(0)
        return None


@contextlib.contextmanager
def serve_folder(folder: Path) -> Iterator[WebStore]:
    """Serve `folder` at a free port of this machine."""
    store = WebStore(folder)

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            key = self.path.lstrip("/")
            store.requests.append(key)
            file = folder / key
            code = store.choose_failure(key) or (200 if file.is_file() else 404)
            body = file.read_bytes() if code == 200 else b"<html>fault</html>"

            # The last bytes of a shard are asked for without their begin: `bytes=-132`.
            span = re.fullmatch(r"bytes=(\d*)-(\d+)", self.headers.get("Range", ""))
            size, begin = len(body), 0
            if code == 200 and span and store.has_ranges:
                begin = int(span[1]) if span[1] else max(size - int(span[2]), 0)
                end = int(span[2]) + 1 if span[1] else size
                code, body = (206, body[begin:end]) if begin < size else (416, b"")
            self.send_response(code)
            if code == 206:
                self.send_header("Content-Range", f"bytes {begin}-{begin + len(body) - 1}/{size}")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    store.address = f"http://127.0.0.1:{server.server_port}"
    try:
        yield store
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
