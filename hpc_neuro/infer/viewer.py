"""`hpc-neuro infer serve OUT [port=8000]`: the result of `infer` in Neuroglancer, without a copy of it.

Prints a link per volume, to image, probability, mask, trees and the places to proofread, and serves them until Ctrl-C.
Nothing is copied or written. Only this machine can connect, and in a browser only the viewer's page. With OUT on a
cluster: `ssh -L 8000:127.0.0.1:8000 HOST` on your own computer, and open the link there.

port    where the browser finds it; 0: any that is free
viewer  the Neuroglancer to link to; local: the one of the Python package neuroglancer, which needs no internet
"""

from __future__ import annotations

import errno
import logging
import os
import sys
import threading
import urllib.parse
from collections.abc import Sequence
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, BinaryIO

from pydantic import Field

from hpc_neuro.core import schema
from hpc_neuro.core.schema import ConfigError, InputError, config
from hpc_neuro.infer.neuroglancer_page import (
    LOCAL,
    MAX_STATE_BYTES,
    answer_state,
    find_client,
    make_events,
    read_client_file,
)
from hpc_neuro.infer.viewer_layers import ViewerLayers

log = logging.getLogger(__name__)
_ADDRESS = "127.0.0.1"
"""Tunnels end here, too. A page that was loaded by https may read plain http from this address only."""
_LOOPBACK_NAMES = ("127.0.0.1", "localhost", "::1")
"""Host names under which a browser reaches this machine, or the end of a tunnel to it."""
_USAGE = "hpc-neuro infer serve OUT [port=8000]"
_MAX_CONNECTIONS = 64
"""Connections at once, each with a thread; a browser opens six."""
_IDLE_SECONDS = 60.0
"""[s] A connection on which nothing moves for so long is closed."""
_EVENT_SECONDS = 15.0
"""[s] Time between signs of life in a stream of events."""
_PIECE_BYTES = 1 << 20
"""[byte] Files are sent in pieces of this size."""


@config
class ServeConfig:
    """Where a run folder is served."""

    out: Path
    """A folder that `infer` wrote."""
    port: int = Field(default=8000, ge=0, le=65535)
    """TCP port; 0: any that is free."""
    viewer: str = "https://neuroglancer-demo.appspot.com"
    """The Neuroglancer that links lead to; `local`: the page of the Python package, served from here."""

    def __post_init__(self) -> None:
        if self.is_local:
            return
        try:
            scheme, host = urllib.parse.urlsplit(self.viewer)[:2]
        except ValueError as error:
            raise ValueError(f"viewer: {self.viewer} is no address ({error}); give one such as https://HOST") from None
        if scheme not in ("http", "https") or not host:
            raise ValueError(f"viewer: {self.viewer} is no address; give one such as https://HOST")

    @property
    def is_local(self) -> bool:
        """Whether the viewer's page is served from here."""
        return self.viewer == LOCAL


def main(args: Sequence[str]) -> int:
    """Serve until Ctrl-C. Raises ConfigError or InputError for a folder or a port that cannot be used."""
    if any(arg in ("-h", "--help") for arg in args):
        sys.stdout.write(f"{_USAGE}\n{__doc__}")
        return 0

    if not args or "=" in args[0] or args[0].startswith("-"):
        raise ConfigError(f"expected: {_USAGE}")

    cfg = schema.load(ServeConfig, None, [f"out={args[0]}", *args[1:]])
    with ViewerServer(cfg) as server:
        for line in server.list_links():
            log.info("%s", line)

        # A result often lies on a cluster, and the browser runs on a desk.
        port = server.server_port
        tunnel = f"ssh -L {port}:{_ADDRESS}:{port} {os.uname().nodename}"
        log.info("from another computer: %s, then the same link; Ctrl-C ends", tunnel)

        try:
            server.serve_forever()
        except KeyboardInterrupt:
            log.info("no longer served")
    return 0


class ViewerServer(ThreadingHTTPServer):
    """Files below OUT, and its ViewerLayers."""

    daemon_threads = True

    def __init__(self, cfg: ServeConfig) -> None:
        """Raises ConfigError when the port is taken, InputError for a folder that `infer` did not finish."""
        self.cfg, self.layers, self.root = cfg, ViewerLayers(cfg.out), cfg.out.resolve()

        self.client = find_client() if cfg.is_local else None
        self.is_closed = threading.Event()
        self._free_connections = threading.BoundedSemaphore(_MAX_CONNECTIONS)

        try:
            super().__init__((_ADDRESS, cfg.port), _Handler)
        except OSError as error:
            # Only a port that is taken or reserved can be mended by another choice.
            if error.errno not in (errno.EADDRINUSE, errno.EACCES):
                raise
            raise ConfigError(f"port {cfg.port} cannot be had ({error.strerror}); give another, or port=0") from None

        # Browsers compare origins, which have no path.
        viewer = f"http://{_ADDRESS}:{self.server_port}" if cfg.is_local else cfg.viewer
        self.viewer_origin = "://".join(urllib.parse.urlsplit(viewer)[:2])

    def server_close(self) -> None:
        """Close the port and end the streams of events."""
        self.is_closed.set()
        super().server_close()

    def process_request(self, request: Any, client_address: Any) -> None:
        """Serve a connection in a thread of its own, or refuse it when there are too many."""
        if self._free_connections.acquire(blocking=False):
            super().process_request(request, client_address)
            return

        # Waiting for a free thread here would block all other connections.
        refusal = (
            f"HTTP/1.1 {HTTPStatus.SERVICE_UNAVAILABLE.value} busy\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
        )

        try:
            request.sendall(refusal.encode())
        except OSError:
            log.debug("a refused connection is gone", exc_info=True)
        self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """One connection, from its thread."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._free_connections.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignore a browser that hangs up, as it does with pending requests when the view moves on."""
        if not isinstance(sys.exception(), ConnectionError | TimeoutError):
            super().handle_error(request, client_address)

    def list_links(self) -> list[str]:
        """One line per volume: its name and the link that shows it."""
        if self.client is not None:
            page = f"http://{_ADDRESS}:{self.server_port}/v"
            return [f"{name}: {page}/{urllib.parse.quote(name)}/" for name in self.layers.names]

        base = f"{self.cfg.viewer.rstrip('/')}/#!http://{_ADDRESS}:{self.server_port}"
        return [f"{name}: {base}/{urllib.parse.quote(name)}.json" for name in self.layers.names]


class _Handler(BaseHTTPRequestHandler):
    """GET and HEAD, whole or by one range of bytes: shards are read in parts."""

    server: ViewerServer
    # Connections stay open, because a view needs hundreds of chunks.
    protocol_version = "HTTP/1.1"
    timeout = _IDLE_SECONDS

    def do_GET(self) -> None:
        self._answer(has_body=True)

    def do_HEAD(self) -> None:
        self._answer(has_body=False)

    def do_POST(self) -> None:
        """A page of the local viewer tells its state, which is not kept."""
        length = self.headers.get("Content-Length", "")
        is_known = self.server.client is not None and self.path.startswith("/state/") and length.isdecimal()
        size = _parse_size(length) if is_known else 0
        answer = answer_state(self.rfile.read(size)) if 0 < size <= MAX_STATE_BYTES else None
        if answer is None or not _is_loopback(self.headers.get("Host", "")):
            # A body that is not read would be taken for the next request.
            self.close_connection = True
            return self._send_head(HTTPStatus.NOT_FOUND, 0, {"Connection": "close"})

        self._send_head(HTTPStatus.OK, len(answer), {"Content-Type": "application/json"})
        self.wfile.write(answer)
        return None

    def do_OPTIONS(self) -> None:
        """Answer a browser that asks whether a page of another origin may send a Range header."""
        self._send_head(
            HTTPStatus.NO_CONTENT,
            0,
            {"Access-Control-Allow-Headers": "*", "Access-Control-Allow-Private-Network": "true"},
        )

    def log_message(self, format: str, *args: object) -> None:
        """Log nothing: a view makes thousands of requests."""

    def _answer(self, has_body: bool) -> None:
        # Another name that resolves to this machine would let any page read what is served (DNS rebinding).
        host = self.headers.get("Host", "")
        if not _is_loopback(host):
            return self._send_head(HTTPStatus.FORBIDDEN, 0, {})

        path = _parse_path(self.path)
        if path is None:
            return self._send_head(HTTPStatus.NOT_FOUND, 0, {})

        if self.server.client is not None and path.startswith("v/"):
            return self._send_client_file(self.server.client, path, has_body)
        if self.server.client is not None and path.startswith("events/"):
            return self._send_events(path.removeprefix("events/"), f"http://{host}")

        try:
            layer = self.server.layers.get(path, f"http://{host}")
        except (InputError, OSError, ValueError) as error:
            # One image that cannot be read must not end the server.
            log.warning("%s: %s", path, error)
            return self._send_head(HTTPStatus.INTERNAL_SERVER_ERROR, 0, {})

        if layer is None:
            return self._send_file(path, has_body)

        self._send_head(HTTPStatus.OK, len(layer), {})
        if has_body:
            self.wfile.write(layer)
        return None

    def _send_client_file(self, client: Path, path: str, has_body: bool) -> None:
        """A file of the viewer's page: v/NAME/FILE."""
        _, name, *rest = path.split("/", 2)
        content = read_client_file(client, rest[0]) if rest and name in self.server.layers.names else None
        if content is None:
            return self._send_head(HTTPStatus.NOT_FOUND, 0, {})

        data, media_type = content
        self._send_head(HTTPStatus.OK, len(data), {"Content-Type": media_type})
        if has_body:
            self.wfile.write(data)
        return None

    def _send_events(self, name: str, base: str) -> None:
        """The state of a volume, for a page that has none; the stream stays open, or the page would ask again."""
        state = self.server.layers.get(f"{name}.json", base)
        if state is None:
            return self._send_head(HTTPStatus.NOT_FOUND, 0, {})

        self.close_connection = True
        self.send_response(HTTPStatus.OK)
        for key, value in (
            ("Content-Type", "text/event-stream"),
            ("Cache-Control", "no-cache"),
            ("Connection", "close"),
        ):
            self.send_header(key, value)
        self.end_headers()

        # A page that was cut off keeps its own state, whose generation it tells.
        query = urllib.parse.parse_qs(urllib.parse.urlsplit(self.path).query)
        if not query.get("gs"):
            self.wfile.write(make_events(state))
        while not self.server.is_closed.wait(_EVENT_SECONDS):
            # A comment, by which a connection that is gone is noticed.
            self.wfile.write(b":\n\n")
        return None

    def _send_file(self, path: str, has_body: bool) -> None:
        """A file below OUT, or the range of it that is wanted."""
        try:
            # Resolved before the comparison, so that neither `..` nor a link leads out of OUT.
            file = (self.server.root / path).resolve()

            # A shard without signal has no file; viewers take it for zeros.
            handle = file.open("rb") if file.is_relative_to(self.server.root) and file.is_file() else None
        except (OSError, ValueError, RuntimeError):
            # A name that is too long, has a null byte, or leads round in circles.
            handle = None

        if handle is None:
            return self._send_head(HTTPStatus.NOT_FOUND, 0, {})

        with handle:
            # The size is that of the open file: its name may lead to another one by now.
            size = os.fstat(handle.fileno()).st_size

            byte_range = _parse_range(self.headers.get("Range"), size)
            if byte_range is None:
                return self._send_head(
                    HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE, 0, {"Content-Range": f"bytes */{size}"}
                )

            start, stop = byte_range
            if (start, stop) == (0, size):
                self._send_head(HTTPStatus.OK, size, {})
            else:
                content_range = {"Content-Range": f"bytes {start}-{stop - 1}/{size}"}
                self._send_head(HTTPStatus.PARTIAL_CONTENT, stop - start, content_range)

            if has_body:
                self._send_pieces(handle, start, stop)
        return None

    def _send_pieces(self, handle: BinaryIO, start: int, stop: int) -> None:
        handle.seek(start)
        remaining = stop - start

        # In pieces, because many shards may be sent at once.
        while remaining > 0 and (piece := handle.read(min(_PIECE_BYTES, remaining))):
            self.wfile.write(piece)
            remaining -= len(piece)

        # A file that has shrunk meanwhile: the length in the head is wrong, so the connection cannot go on.
        self.close_connection = self.close_connection or remaining > 0

    def _send_head(self, status: HTTPStatus, length: int, headers: dict[str, str]) -> None:
        self.send_response(status)

        # No page but the viewer's may read what is served.
        common = {
            "Access-Control-Allow-Origin": self.server.viewer_origin,
            "Access-Control-Expose-Headers": "*",
            "Accept-Ranges": "bytes",
        }

        for key, value in {**common, "Content-Length": str(length), **headers}.items():
            self.send_header(key, value)
        self.end_headers()


def _is_loopback(host: str) -> bool:
    """Whether a Host header names this machine. The port may be that of a tunnel."""
    try:
        return urllib.parse.urlsplit(f"//{host}").hostname in _LOOPBACK_NAMES
    except ValueError:
        return False


def _parse_path(target: str) -> str | None:
    """The path of a request's target, relative to OUT; None for what is no path."""
    try:
        return urllib.parse.unquote(urllib.parse.urlsplit(target).path).lstrip("/")
    except ValueError:
        return None


def _parse_range(header: str | None, size: int) -> tuple[int, int] | None:
    """(first, end) of the bytes wanted: `bytes=A-B`, `bytes=A-`, `bytes=-N`; all without. None: not to be had."""
    # HTTP lets a server ignore ranges that it does not know; it then sends the whole file.
    if header is None or not header.startswith("bytes=") or "," in header:
        return 0, size

    first, _, last = header.removeprefix("bytes=").partition("-")
    if not (first + last).isdecimal():
        return 0, size

    if not first:
        return max(size - _parse_size(last), 0), size
    start = _parse_size(first)

    # HTTP cuts a range that reaches over the end of the file.
    stop = min(_parse_size(last) + 1, size) if last else size
    return (start, stop) if start < stop else None


def _parse_size(digits: str) -> int:
    """A number of bytes; one that no file has for thousands of digits, which `int` refuses."""
    return int(digits) if len(digits) < 20 else sys.maxsize
