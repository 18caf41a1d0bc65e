"""`hpc-neuro infer serve OUT [port=8000]`: the result of `infer` in Neuroglancer, from where it lies.

Prints a link per volume, to image, probability, mask, trees and the places to proofread, and serves them until Ctrl-C.
Nothing is copied or written. Only this machine can ask, and in a browser only the viewer's page. With OUT on a cluster:
`ssh -L 8000:127.0.0.1:8000 HOST` on your own computer, and open the link there.

port    where the browser finds it; 0: any that is free
viewer  the Neuroglancer to link to
"""

from __future__ import annotations

import errno
import logging
import os
import shutil
import sys
import urllib.parse
from collections.abc import Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from pydantic import Field

from hpc_neuro.core import schema
from hpc_neuro.core.schema import ConfigError, InputError, config
from hpc_neuro.infer.viewer_layers import Layers

log = logging.getLogger(__name__)
_HOST = "127.0.0.1"  # tunnels end here too; a page that came by https may read from no other plain http
_USAGE = "hpc-neuro infer serve OUT [port=8000]"


@config
class ServeConfig:
    """Where a run folder is served."""

    out: Path
    """A folder that `infer` wrote."""
    port: int = Field(default=8000, ge=0, le=65535)
    """TCP port; 0: any that is free."""
    viewer: str = "https://neuroglancer-demo.appspot.com"
    """The Neuroglancer that links lead to."""


def main(args: Sequence[str]) -> int:
    """Serve until Ctrl-C. Raises ConfigError or InputError for a folder or a port that will not do."""
    if any(a in ("-h", "--help") for a in args):
        sys.stdout.write(f"{_USAGE}\n{__doc__}")
        return 0
    if not args or "=" in args[0] or args[0].startswith("-"):
        raise ConfigError(f"wanted: {_USAGE}")
    cfg = schema.load(ServeConfig, None, [f"out={args[0]}", *args[1:]])
    with Server(cfg) as server:
        for line in server.links():
            log.info("%s", line)
        port = server.server_port
        tunnel = f"ssh -L {port}:{_HOST}:{port} {os.uname().nodename}"
        log.info("from another computer: %s, then the same link; Ctrl-C ends", tunnel)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            log.info("no longer served")
    return 0


class Server(ThreadingHTTPServer):
    """Files below OUT and its Layers."""

    daemon_threads = True

    def __init__(self, cfg: ServeConfig) -> None:
        """Raises ConfigError when the port is taken, InputError for a folder that `infer` did not finish."""
        self.cfg, self.layers, self.root = cfg, Layers(cfg.out), cfg.out.resolve()
        self.page = "://".join(urllib.parse.urlsplit(cfg.viewer)[:2])  # its origin
        try:
            super().__init__((_HOST, cfg.port), _Handler)
        except OSError as error:
            if error.errno not in (errno.EADDRINUSE, errno.EACCES):
                raise
            raise ConfigError(f"port {cfg.port} cannot be had ({error.strerror}); give another, or port=0") from None

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Silence where a browser hung up, as it does with all that it asked for when the view moves on."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)

    def links(self) -> list[str]:
        """One line per volume: its name and the link that shows it."""
        base = f"{self.cfg.viewer.rstrip('/')}/#!http://{_HOST}:{self.server_port}"
        return [f"{name}: {base}/{urllib.parse.quote(name)}.json" for name in self.layers.names]


class _Handler(BaseHTTPRequestHandler):
    """GET and HEAD, whole or by one range of bytes: shards are read in parts."""

    server: Server
    protocol_version = "HTTP/1.1"  # connections stay open: a view asks for hundreds of chunks

    def do_GET(self) -> None:
        self._answer(body=True)

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_OPTIONS(self) -> None:
        """A browser's question whether a page from elsewhere may ask with a Range header."""
        self._head(204, 0, {"Access-Control-Allow-Headers": "*", "Access-Control-Allow-Private-Network": "true"})

    def log_message(self, format: str, *args: object) -> None:
        """Nothing: a view makes thousands of requests."""

    def _answer(self, body: bool) -> None:
        path = urllib.parse.unquote(urllib.parse.urlsplit(self.path).path).lstrip("/")
        try:
            made = self.server.layers.get(path, f"http://{self.headers.get('Host', '')}")
        except InputError as error:
            log.warning("%s: %s", path, error)
            return self._fail(500)
        if made is not None:
            self._head(200, len(made), {})
            if body:
                self.wfile.write(made)
            return None
        if "\0" in path:  # which no file's name has
            return self._fail(404)
        file = (self.server.root / path).resolve()
        if not file.is_relative_to(self.server.root) or not file.is_file():
            return self._fail(404)  # a shard without signal has no file; viewers take it for zeros
        with file.open("rb") as handle:
            size = os.fstat(handle.fileno()).st_size
            found = _range(self.headers.get("Range"), size)
            if found is None:
                return self._fail(416)
            first, stop = found
            part = (first, stop) != (0, size)
            self._head(
                206 if part else 200,
                stop - first,
                {"Content-Range": f"bytes {first}-{stop - 1}/{size}"} if part else {},
            )
            if body and stop > first:
                handle.seek(first)
                if part:
                    self.wfile.write(handle.read(stop - first))
                else:
                    shutil.copyfileobj(handle, self.wfile)
        return None

    def _fail(self, code: int) -> None:
        self._head(code, 0, {})

    def _head(self, code: int, length: int, more: dict[str, str]) -> None:
        self.send_response(code)
        always = {
            "Access-Control-Allow-Origin": self.server.page,
            "Access-Control-Expose-Headers": "*",
            "Accept-Ranges": "bytes",
        }
        for key, value in {**always, "Content-Length": str(length), **more}.items():
            self.send_header(key, value)
        self.end_headers()


def _range(asked: str | None, size: int) -> tuple[int, int] | None:
    """(first, end) of the bytes asked for: `bytes=A-B`, `bytes=A-`, `bytes=-N`; all without. None: not to be had."""
    if asked is None or not asked.startswith("bytes=") or "," in asked:
        return 0, size
    first, _, last = asked.removeprefix("bytes=").partition("-")
    if not (first + last).isdecimal():
        return 0, size
    if not first:
        return max(size - int(last), 0), size
    stop = min(int(last) + 1, size) if last else size
    return (int(first), stop) if int(first) < stop else None
