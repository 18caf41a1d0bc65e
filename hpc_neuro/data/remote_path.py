"""Paths of images in remote stores, read only: `s3://BUCKET/KEY`, `gs://BUCKET/KEY` and `https://HOST/KEY`.

A remote store is never listed, because it may hold millions of objects. Of its paths, the descriptions of arrays are
files where the store has them, and all others are folders.

Requests are anonymous. With HPC_NEURO_REMOTE_LOGIN=yes in the environment, s3:// and gs:// use the credentials that the
tools of Amazon and Google use. AWS_ENDPOINT_URL and AWS_REGION name an S3 store of another provider.
"""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Generator
from pathlib import Path, PosixPath
from typing import Annotated, Any

from pydantic import BeforeValidator

from hpc_neuro.core.schema import InputError

METADATA_FILES = ("zarr.json", ".zarray", ".zattrs", ".zgroup", "attributes.json", "info")
"""Files that describe arrays."""
LOGIN = "HPC_NEURO_REMOTE_LOGIN"
"""Variable of the environment that permits the use of credentials."""
RETRIES = {"max_retries": 5, "initial_delay": "500ms", "max_delay": "10s"}
"""How often a request that the server could not serve is repeated."""
GOOGLE = "https://storage.googleapis.com"
"""Address of all public buckets of gs://."""
TIMEOUT = 120.0
"""[s] Time for one object, or for the chunks of one box."""

_URL = re.compile(r"(s3|gs|https?):/{1,2}(?=[^/])")
"""How a path in a remote store begins; `Path` makes one slash of two."""
_HTTP_CODE = re.compile(r"(?:HTTP code |http_response_code=')(\d+)")
_NETWORK_ERRORS = ("UNKNOWN", "UNAVAILABLE", "ABORTED", "DEADLINE_EXCEEDED", "PERMISSION_DENIED", "UNAUTHENTICATED")
"""Beginnings of tensorstore's messages when a request failed; any other message is about the content."""
_MESSAGE_END = re.compile(r" \[|; |\n")


class AccessDeniedError(InputError):
    """The server refuses to show an object."""


class _RangeError(InputError):
    """The server sent another part of an object than was asked for."""


class RemotePath(PosixPath):
    """A path in a remote store. Whatever would open it as a local file raises InputError."""

    __slots__ = ()

    def __str__(self) -> str:
        scheme, *rest = self.parts or ("",)
        # Differences of two paths are no addresses.
        return f"{scheme}//{'/'.join(rest)}" if _URL.match(f"{scheme}/-") else "/".join(self.parts) or "."

    def __fspath__(self) -> str:
        raise InputError(f"{self} lies in a remote store, from which image volumes are read and nothing else; copy it")

    def is_file(self) -> bool:
        """Whether the store shows a description of an array here."""
        try:
            return self.name in METADATA_FILES and self._fetch() is not None
        except AccessDeniedError:
            # Many buckets refuse what they do not have.
            return False

    def is_dir(self) -> bool:
        """Whether this is no description of an array."""
        return self.name not in METADATA_FILES

    def exists(self) -> bool:
        """Whether this is a folder or a file; a folder is not looked for."""
        return self.is_dir() or self.is_file()

    def read_bytes(self) -> bytes:
        """The content of an object. Raises FileNotFoundError, and InputError where the server does not serve it."""
        data = self._fetch()
        if data is None:
            raise FileNotFoundError(str(self))
        return data

    def read_head(self, count: int) -> bytes:
        """The first bytes of an object. Raises as `read_bytes`."""
        try:
            data = self._fetch(slice(0, count))
        except _RangeError:
            # A server without ranges sends the whole object.
            data = self._fetch()
        if data is None:
            raise FileNotFoundError(str(self))
        return data[:count]

    def read_text(self, encoding: str | None = None, errors: str | None = None) -> str:
        """The content of an object as text."""
        return self.read_bytes().decode(encoding or "utf-8", errors or "strict")

    def resolve(self, strict: bool = False) -> RemotePath:
        """The path itself."""
        return self

    def absolute(self) -> RemotePath:
        """The path itself."""
        return self

    def glob(self, pattern: str) -> Generator[RemotePath, None, None]:
        """No path: a store is not listed."""
        yield from ()

    def rglob(self, pattern: str) -> Generator[RemotePath, None, None]:
        """No path: a store is not listed."""
        yield from ()

    def has_object(self) -> bool:
        """Whether the store has an object here. Raises InputError where the server does not say."""
        try:
            return self._fetch(slice(0, 1)) is not None
        except _RangeError:
            # A server without ranges sends the whole object.
            return True

    def require_access(self) -> None:
        """Raise AccessDeniedError when the server refuses to show the descriptions of an array in this folder."""
        for name in METADATA_FILES:
            (self / name)._fetch()

    def store_spec(self) -> dict[str, Any]:
        """tensorstore's description of the store of this folder. Raises InputError without a bucket or host."""
        if len(self.parts) < 2:
            raise InputError(f"{self} names no bucket or host; give an address such as s3://BUCKET/KEY")
        (scheme, host), key = self.parts[:2], "".join(f"{part}/" for part in self.parts[2:])

        if scheme == "s3:":
            credentials = {"type": "default" if has_login() else "anonymous"}
            endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
            region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
            options = {"endpoint": endpoint, "aws_region": region}
            return {
                **{"driver": "s3", "bucket": host, "path": key, "aws_credentials": credentials},
                **{name: value for name, value in options.items() if value},
            }
        if scheme == "gs:" and has_login():
            return {"driver": "gcs", "bucket": host, "path": key}
        if scheme == "gs:":
            return {"driver": "http", "base_url": GOOGLE, "path": f"/{host}/{key}"}
        return {"driver": "http", "base_url": f"{scheme}//{host}", "path": f"/{key}"}

    def explain(self, error: Exception) -> InputError | None:
        """The sentence for a request that failed; None for a message of tensorstore about the content."""
        text = " ".join(str(error).split())
        if not isinstance(error, TimeoutError) and not text.startswith(_NETWORK_ERRORS):
            return None

        code = _HTTP_CODE.search(text)
        if code and code[1] in ("401", "403"):
            is_bucket = self.parts[0] in ("s3:", "gs:")
            login = "" if has_login() else f", or set {LOGIN}=yes in the environment to use your own credentials"
            advice = f"check the address{login}" if is_bucket else "check the address, or copy the image first"
            return AccessDeniedError(f"{self}: the server refuses access (HTTP {code[1]}); {advice}")

        reason = f"no answer within {TIMEOUT:g} s" if isinstance(error, TimeoutError) else _shorten(text)
        return InputError(
            f"{self} cannot be read: {reason}; check the address and the network, then run the same command again"
        )

    def _fetch(self, part: slice | None = None) -> bytes | None:
        """The content of an object, or a part; None where the store has none. Raises InputError."""
        if len(self.parts) < 3:
            return None

        try:
            store = _open_store(self.parent)
            result = store.read(self.name, byte_range=part).result(timeout=TIMEOUT)
        except (ValueError, OSError) as error:
            if "byte range" in str(error):
                raise _RangeError(f"{self}: the server sent another part than was asked for") from None
            raise self.explain(error) or InputError(f"{self} cannot be read: {_shorten(str(error))}") from None
        return None if result.state == "missing" else bytes(result.value)


def parse_path(path: Path | str) -> Path:
    """A path as the user gave it: one in a remote store if it is an address, else a local one.

    Raises InputError for no path at all, and for an address with a query or a fragment.
    """
    text = str(path)
    if isinstance(path, RemotePath):
        return path
    # A variable of the shell that is not set would stand for the current folder.
    if path == "":
        raise InputError("the path is empty; give that of an image")
    if not _URL.match(text):
        return Path(path)
    if "?" in text or "#" in text:
        raise InputError(f"{text} has a query or a fragment; give the plain address of the image's folder")
    return RemotePath(text)


ImagePath = Annotated[
    Path, BeforeValidator(lambda value: parse_path(value) if isinstance(value, (str, Path)) else value)
]
"""A path of an image, local or in a remote store."""


def has_login() -> bool:
    """Whether the environment permits the use of credentials."""
    return os.environ.get(LOGIN, "").lower() in ("yes", "true", "1")


def make_context(cache_bytes: int = 0) -> Any:
    """tensorstore's context: how many bytes of chunks are kept, and how failed requests are repeated."""
    import tensorstore as ts

    retries = {f"{kind}_request_retries": RETRIES for kind in ("http", "s3", "gcs")}
    return ts.Context({"cache_pool": {"total_bytes_limit": cache_bytes}, **retries})


def _open_store(folder: RemotePath) -> Any:
    # Imported late: programs that read local images only do not wait for tensorstore.
    import tensorstore as ts

    return ts.KvStore.open(folder.store_spec(), context=_shared_context()).result(timeout=TIMEOUT)


@functools.cache
def _shared_context() -> Any:
    return make_context()


def _shorten(text: str) -> str:
    """tensorstore's message without the specification and the page that the server sent."""
    return _MESSAGE_END.split(text, maxsplit=1)[0][:300].replace('"', "")
