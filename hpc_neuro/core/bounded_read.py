"""Reading whole files that come from others: regular ones only, up to a limit."""

from __future__ import annotations

from pathlib import Path


class UnboundedFileError(ValueError):
    """A file that may block, never end, or fill the memory. The message is the second half of a sentence."""


def require_regular(path: Path) -> None:
    """Raise UnboundedFileError for a FIFO, a device or a socket."""
    if path.exists() and not path.is_file() and not path.is_dir():
        raise UnboundedFileError("is no regular file (a FIFO, device or socket)")


def read_bounded(path: Path, limit: int) -> bytes:
    """The bytes of a regular file of at most `limit` bytes. Raises UnboundedFileError for any other, and OSError."""
    require_regular(path)
    # A sparse file has a size without bytes; one below /proc has bytes without a size.
    is_long = path.stat().st_size > limit
    with path.open("rb") as handle:
        data = b"" if is_long else handle.read(limit + 1)
    if is_long or len(data) > limit:
        raise UnboundedFileError(f"has more than {limit >> 20} MiB")
    return data
