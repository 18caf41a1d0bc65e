"""Neuroglancer's own page, served from its Python package: results are seen without internet.

The page of the package takes no state from its address. It asks the server that it came from:

    GET  /v/NAME/       the page and its scripts
    GET  /events/NAME   a stream of server-sent events: {"k": "c" (config) or "s" (state), "s": value, "g": generation}
    POST /state/NAME    the page tells what the user changed; the answer is the generation of that state

Without an event the page stays empty. What the user changes is not kept: a page that is loaded anew begins as the first
did.
"""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path

from hpc_neuro.core.schema import ConfigError

LOCAL = "local"
"""`viewer` of a page that this server serves itself."""
MAX_STATE_BYTES = 1 << 24
"""[bytes] Size of a state that a page sends."""
_TYPES = {".css": "text/css", ".js": "text/javascript", ".html": "text/html", ".wasm": "application/wasm"}
_FILE_NAME = re.compile(r"[a-z0-9][\w.-]*\.(?:js|css|wasm|html)")


def find_client() -> Path:
    """The folder of the page. Raises ConfigError when the Python package is not installed."""
    spec = importlib.util.find_spec("neuroglancer")
    for place in (spec.submodule_search_locations or []) if spec else []:
        folder = Path(place) / "static" / "client"
        if (folder / "index.html").is_file():
            return folder
    raise ConfigError(
        "viewer=local needs the Python package neuroglancer, which is not installed; install it with  "
        "pip install 'hpc_neuro[viewer]'  (from a checkout: pip install '.[viewer]')"
    )


def read_client_file(client: Path, name: str) -> tuple[bytes, str] | None:
    """A file of the page and its media type; None for a name that it does not have. "": the page itself."""
    name = name or "index.html"
    file = client / name
    if not _FILE_NAME.fullmatch(name) or not file.is_file():
        return None
    return file.read_bytes(), _TYPES[file.suffix]


def make_events(state: bytes) -> bytes:
    """The events that tell a new page its configuration, which is empty, and its state (JSON)."""
    values = {"c": {}, "s": json.loads(state)}
    events = [json.dumps({"k": key, "s": value, "g": "server/1"}) for key, value in values.items()]
    return "".join(f"data: {event}\n\n" for event in events).encode()


def answer_state(body: bytes) -> bytes | None:
    """The answer to a page that tells its state; None for what is no state."""
    try:
        message = json.loads(body)
        return json.dumps({"g": f"{message['c']}/{message['g']}"}).encode()
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
