"""Files that appear whole or not at all, checksums, and free space."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hpc_neuro.core.schema import InputError


@contextlib.contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Yield a path beside `path` to write to; on success it is fsynced and renamed onto `path`, on failure removed.

    Works for one file or one folder; a folder replaces a folder, a file never does. A kill leaves only the hidden
    `.NAME.*.part` beside, which the next run removes. Raises InputError where `path` cannot be.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError, PermissionError) as error:
        raise InputError(f"{path} cannot be written: {path.parent} is no folder and cannot become one") from error
    part = path.parent / f".{path.name}.{uuid.uuid4().hex[:8]}.part"
    try:
        yield part
        written = [part, *part.rglob("*")] if part.is_dir() else [part]
        _open_to_others(written)
        for file in written:
            _fsync(file)
        if path.is_dir() and not part.is_dir():
            raise InputError(f"{path} is a folder; give the name of a file")
        if path.is_dir():
            shutil.rmtree(path)  # a rename cannot replace a folder that is not empty
        part.replace(path)
        _fsync(path.parent)
    finally:
        if part.is_dir():
            shutil.rmtree(part, ignore_errors=True)
        else:
            part.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text atomically."""
    with atomic(path) as part:
        part.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically, indented, keys in the order given."""
    write_text(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def read_json(path: Path, hint: str) -> Any:
    """Read a JSON file; `hint` ends the error sentence with what to do when it is missing or broken."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(f"{path} does not exist; {hint}") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InputError(f"{path} is not readable JSON ({error}); {hint}") from None


def sha256(path: Path) -> str:
    """Hex SHA-256 of a file's bytes; of a folder, of its sorted relative paths and their files' digests."""
    digest = hashlib.sha256()
    if path.is_dir():
        for file in sorted(p for p in path.rglob("*") if p.is_file()):
            digest.update(f"{file.relative_to(path)}\0{sha256(file)}\n".encode())
        return digest.hexdigest()
    with path.open("rb") as handle:
        while block := handle.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def remove_parts(folder: Path) -> None:
    """Remove what killed writers left beside their targets in `folder` (call only when no other writer is at work)."""
    for part in folder.glob(".*.part"):
        if part.is_dir():
            shutil.rmtree(part, ignore_errors=True)
        else:
            part.unlink(missing_ok=True)


def require_space(folder: Path, needed: int, what: str) -> None:
    """Raise InputError when `folder`'s file system has fewer than `needed` bytes free (1 % is kept as margin)."""
    probe = folder
    while not probe.exists():
        probe = probe.parent
    free = shutil.disk_usage(probe).free
    if needed > 0.99 * free:
        raise InputError(
            f"{what} needs {format_bytes(needed)} in {folder}, but only {format_bytes(free)} are free there; "
            "make room or choose another `out`"
        )


def reserve_space(folder: Path, needed: int) -> None:
    """Raise OSError (disk or quota full) now when `needed` bytes cannot be had in `folder`.

    For writers that must not fail in the middle of a write: HDF5 ends the process with a segmentation fault then.
    """
    if needed <= 0:
        return
    probe = folder / f".reserve.{uuid.uuid4().hex[:8]}.part"
    handle = os.open(probe, os.O_CREAT | os.O_WRONLY, 0o600)
    try:
        os.posix_fallocate(handle, 0, needed)
    finally:
        os.close(handle)
        probe.unlink()


def sha256_json(value: Any) -> str:
    """Hex SHA-256 of plain data, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def is_plain_name(text: str) -> bool:
    """Whether a text can name a file in a folder: it leads nowhere else and is not hidden."""
    return text == Path(text).name and not text.startswith(".")


@contextlib.contextmanager
def explain_full_disk(folder: Path, what: str) -> Iterator[None]:
    """Turn an error of a full disk or quota into one InputError sentence; other errors pass."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT) and "No space left" not in str(error):
            raise
        raise InputError(
            f"the disk or quota of {folder} is full, {what} was not written; make room or choose another `out`, then "
            "give the same command again (what is finished is kept)"
        ) from error


def format_bytes(count: float) -> str:
    """Bytes for people: 1.5 GB (powers of 1000)."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if abs(count) < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} PB"


def _open_to_others(written: list[Path]) -> None:
    """What a library wrote for its owner alone, as safetensors does, becomes as readable as the umask allows.

    A laboratory shares its weights. The umask is seen on a new file, for it cannot be asked without changing it.
    """
    private = [file for file in written if file.is_file() and not file.stat().st_mode & 0o077]
    if private:
        probe = written[0].with_name(f".mode.{uuid.uuid4().hex[:8]}.part")
        probe.touch()
        mode = probe.stat().st_mode & 0o666
        probe.unlink()
        for file in private:
            file.chmod(file.stat().st_mode | mode)


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
