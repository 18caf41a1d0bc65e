"""Files that appear whole or not at all, checksums, free space, and numbers as people read them."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import functools
import hashlib
import json
import math
import os
import re
import shlex
import shutil
import stat
import uuid
from collections.abc import Hashable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast, overload

from pydantic import TypeAdapter, ValidationError

from hpc_neuro.core.bounded_read import UnboundedFileError, read_bounded, require_regular
from hpc_neuro.core.schema import InputError

if TYPE_CHECKING:
    # Commands without arrays start without numpy.
    from numpy.typing import NDArray

T = TypeVar("T")

_READ_BYTES = 1 << 22
"""[bytes] Size of the pieces in which a file is read for its checksum."""
CHUNK_BYTES = 1 << 26
"""[bytes] Size of the pieces of a large file that are hashed by themselves."""
_OF_CHUNKS = "chunks-"
"""Begin of the checksum of a file of several chunks."""
_MAX_JSON_BYTES = 1 << 28
"""[bytes] Size of a JSON file that is read."""
_MAX_NAME_BYTES = 200
"""[bytes] Length of a name; a file system takes 255 with the endings."""
_SPACE_MARGIN = 0.01
"""Share of the free space that stays unused."""
_PART_NAME = re.compile(r"\..+\.[0-9a-f]{8}\.part", re.DOTALL)
"""Names of files and folders that are being written."""


# --- Atomic writing ---


@contextlib.contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Yield a path beside `path` to write to; on success it is fsynced and renamed onto `path`, on failure removed.

    Works for one file or one folder. A folder replaces a folder; a file never does. A killed process leaves only the
    hidden `.NAME.*.part` behind, which the next run removes. Raises InputError if `path` cannot be written.
    """
    # A file takes five operations on the metadata server: a stat, a creation, two opens and a rename.
    try:
        if not path.parent.is_dir():
            path.parent.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError, PermissionError) as error:
        raise InputError(f"{path} cannot be written: {path.parent} is not a folder and cannot become one") from error
    # Beside the target, because a rename is atomic only within one file system.
    part = _part_path(path.parent, path.name)
    is_in_place = False

    try:
        yield part

        # Everything must be on the disk before the name: after a power cut the name would stand for less.
        is_folder = _flush(part)
        # A rename cannot replace a folder that is not empty.
        if is_folder and path.is_dir():
            shutil.rmtree(path)
        # The rename is what makes the file appear whole or not at all.
        try:
            part.replace(path)
        except IsADirectoryError:
            raise InputError(f"{path} is a folder; give the name of a file") from None
        is_in_place = True
        _fsync(path.parent)
    except OSError as error:
        # The error of a write names no file.
        if error.errno is not None and error.filename is None:
            error.filename = str(path)
        raise
    finally:
        if not is_in_place:
            _remove(part)


def write_all(handle: int, content: bytes, at: int | None = None) -> None:
    """Write bytes to an open file, at its position, or `at` a byte of it."""
    left = memoryview(content)
    # One call of the kernel may write less than it is given.
    while len(left):
        written = os.write(handle, left) if at is None else os.pwrite(handle, left, at)
        left = left[written:]
        at = None if at is None else at + written


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text atomically."""
    with atomic(path) as part:
        part.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically, indented, with keys in their order."""
    write_text(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def write_npy(path: Path, array: NDArray[Any]) -> None:
    """Write one array atomically, as a file of which a part can be read."""
    import numpy as np

    with atomic(path) as part, part.open("wb") as handle:
        np.save(handle, array)


def read_npy_rows(path: Path, first: int, stop: int | None) -> NDArray[Any]:
    """Rows `first` to `stop`, None for the end, of an array that `write_npy` wrote.

    The file is opened once, where a memory map looks at it seven times.
    """
    import numpy as np

    with path.open("rb") as handle:
        version = np.lib.format.read_magic(handle)
        read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, is_fortran, dtype = read_header(handle)
        assert not is_fortran, f"{path} is not in the order that write_npy writes"
        stop = shape[0] if stop is None else stop
        row_bytes = dtype.itemsize * math.prod(shape[1:])
        handle.seek(first * row_bytes, os.SEEK_CUR)
        content = handle.read((stop - first) * row_bytes)
    return np.frombuffer(content, dtype=dtype).reshape(stop - first, *shape[1:])


def write_npz(path: Path, arrays: Mapping[str, NDArray[Any]]) -> None:
    """Write arrays atomically, by name, as one file."""
    import numpy as np

    # A path would get the ending .npz, and a part file has another.
    with atomic(path) as part, part.open("wb") as handle:
        np.savez(handle, allow_pickle=False, **arrays)


def create_once(path: Path, text: str) -> bool:
    """Write a small file of UTF-8 text that is not there yet; False when there is one. One of several writers wins."""
    # Linked to its name when it is whole, so that no other process reads half a file.
    part = _part_path(path.parent, path.name)
    write_text(part, text)
    try:
        os.link(part, path)
    except FileExistsError:
        return False
    except OSError:
        # File systems without hard links create a file for one process only, too.
        return _create_exclusively(path, part.read_bytes())
    finally:
        part.unlink(missing_ok=True)
    return True


def _create_exclusively(path: Path, content: bytes) -> bool:
    try:
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    except FileExistsError:
        return False
    with os.fdopen(handle, "wb") as file:
        file.write(content)
    return True


@overload
def read_json(path: Path, hint: str) -> Any: ...
@overload
def read_json(path: Path, hint: str, form: type[T]) -> T: ...
def read_json(path: Path, hint: str, form: Any = None) -> Any:
    """Read a JSON file of a certain form: a dataclass, which is built, or any other type, such as a TypedDict.

    The value of any other type is returned as it was read, keys that the form does not name included.
    Raises InputError, which ends with `hint`: what to do when the file is missing, damaged or of another form.
    """
    try:
        # Editors of Windows begin a text with a byte-order mark.
        value = parse_json(read_bounded(path, _MAX_JSON_BYTES).decode("utf-8-sig"))
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(f"{path} does not exist; {hint}") from None
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror or error}); {hint}") from None
    # Text that is not UTF-8, not JSON, has numbers of thousands of digits, or is nested thousands of levels deep.
    except ValueError as error:
        raise InputError(f"{path} is not readable JSON ({error}); {hint}") from None

    return value if form is None else check_form(value, form, str(path), hint)


def check_form(value: Any, form: type[T], place: str, hint: str) -> T:
    """What JSON holds, as `form` (see `read_json`). Raises InputError, which names `place` and ends with `hint`."""
    # JSON has no tuples, so only what is built from it may turn lists into them.
    is_built = dataclasses.is_dataclass(form)
    adapter: TypeAdapter[T] = _adapter_of(cast(Hashable, form))
    try:
        checked = adapter.validate_python(value, strict=not is_built)
    except ValidationError as error:
        fault = error.errors()[0]
        where = ".".join(map(str, fault["loc"])) or "it"
        raise InputError(
            f"{place} is not of the form it was written in ({where}: {fault['msg'].lower()}); {hint}"
        ) from None
    return checked if is_built else value


@functools.cache
def _adapter_of(form: Hashable) -> TypeAdapter[Any]:
    # Building an adapter takes far longer than validating with it.
    return TypeAdapter(form)


def parse_json(text: str) -> Any:
    """The value of a JSON text. Raises ValueError for damaged text, for NaN, and for a key that stands twice."""
    try:
        return json.loads(text, parse_constant=_refuse_constant, object_pairs_hook=_build_mapping)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _build_mapping(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    # JSON leaves open which of two values holds, and Python keeps the last one in silence.
    mapping = dict(pairs)
    if len(mapping) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(key for key in keys if keys.count(key) > 1)!r} stands twice")
    return mapping


def _refuse_constant(name: str) -> None:
    # Python alone reads and writes NaN and Infinity, which JSON does not have.
    raise ValueError(f"{name} is no JSON value")


def require_regular_file(path: Path, expected: str) -> None:
    """Raise InputError for a FIFO, a device or a socket, which would block or never end."""
    try:
        require_regular(path)
    except UnboundedFileError as error:
        raise InputError(f"{path} {error}; give the path of {expected}") from None


def read_limited(path: Path, limit: int, expected: str) -> bytes:
    """The bytes of a regular file of at most `limit` bytes; InputError names what is `expected` otherwise."""
    try:
        return read_bounded(path, limit)
    except UnboundedFileError as error:
        raise InputError(f"{path} {error}; give the path of {expected}") from None


def remove_parts(folder: Path) -> None:
    """Remove what killed writers left in `folder`. Call it only while no other writer works there."""
    # Hidden files of people may end in .part, too; only the names that `atomic` makes are ours.
    for part in folder.glob(".*.part"):
        if _PART_NAME.fullmatch(part.name):
            _remove(part)


def is_plain_name(text: str) -> bool:
    """Whether a text can name a file in a folder: it leads nowhere else, is not hidden, and is short."""
    is_short = 0 < len(text.encode("utf-8", errors="replace")) <= _MAX_NAME_BYTES
    return is_short and text.isprintable() and text == Path(text).name and not text.startswith(".")


def require_plain_names(names: Any, source: Path, hint: str) -> None:
    """Raise InputError unless `names` are keys of a mapping read from `source` that can name files in a folder."""
    if not isinstance(names, dict):
        raise InputError(f"{source} holds no mapping of volumes; {hint}")
    for name in names:
        if not is_plain_name(str(name)):
            raise InputError(f"{source} names {str(name)[:60]!r}, which cannot be the name of a file; {hint}")


def resolve_inside(folder: Path, name: Any, source: Path, hint: str) -> Path:
    """The file `name` of a folder, as `source` names it. Raises InputError for a name that leads out of the folder."""
    path = Path(str(name))
    is_text = isinstance(name, str) and bool(name) and name.isprintable()
    if not is_text or ".." in path.parts or path.is_absolute():
        raise InputError(f"{source} names the file {str(name)[:60]!r}, which is not inside {folder}; {hint}")
    return folder / path


def set_aside(out: Path, file: Path) -> Path:
    """Move a file below `out` to OUT/set_aside, where nothing is written or removed; its new path."""
    # What was set aside earlier is not replaced.
    target, number = out / "set_aside" / file.relative_to(out), 1
    while target.exists():
        number += 1
        target = target.with_name(f"{file.stem}.{number}{file.suffix}")

    target.parent.mkdir(parents=True, exist_ok=True)
    file.rename(target)
    return target


def part_path_of_all(path: Path) -> Path:
    """The part of `path` whose name all processes know, for what several of them write together."""
    return path.parent / f".{path.name}.{0:08x}.part"


def _part_path(folder: Path, name: str) -> Path:
    return folder / f".{name}.{uuid.uuid4().hex[:8]}.part"


def _remove(part: Path) -> None:
    if part.is_dir():
        shutil.rmtree(part, ignore_errors=True)
    else:
        part.unlink(missing_ok=True)


def _apply_umask(written: Sequence[Path]) -> None:
    """Make files that a library wrote for their owner alone (safetensors does) as readable as the umask allows.

    People of one laboratory share their weights.
    """
    private = [file for file in written if file.is_file() and not file.stat().st_mode & 0o077]
    if not private:
        return

    # os.umask cannot be read without changing it for all threads; a new file shows it.
    probe = _part_path(written[0].parent, "mode")
    probe.touch()
    mode = probe.stat().st_mode & 0o666
    probe.unlink()

    for file in private:
        file.chmod(file.stat().st_mode | mode)


def _flush(part: Path) -> bool:
    """Bring a file, or a folder with all in it, to the disk; whether it is a folder."""
    handle = os.open(part, os.O_RDONLY)
    try:
        mode = os.fstat(handle).st_mode
        is_folder = stat.S_ISDIR(mode)
        if is_folder or not mode & 0o077:
            _apply_umask([part, *part.rglob("*")] if is_folder else [part])
        os.fsync(handle)
    finally:
        os.close(handle)

    for file in part.rglob("*") if is_folder else ():
        _fsync(file)
    return is_folder


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# --- Checksums ---


def sha256(path: Path) -> str:
    """Hex SHA-256 of a file's bytes; for a folder, of its sorted relative paths and the digests of its files."""
    digest = hashlib.sha256()

    if path.is_dir():
        # Sorted: the order in which a file system lists files differs between machines.
        for file in sorted(p for p in path.rglob("*") if p.is_file()):
            digest.update(f"{file.relative_to(path)}\0{sha256(file)}\n".encode())
        return digest.hexdigest()

    # In pieces: volumes can be larger than the memory.
    with path.open("rb") as handle:
        while block := handle.read(_READ_BYTES):
            digest.update(block)
    return digest.hexdigest()


def checksum(path: Path) -> str:
    """The checksum of a file of any size, which several processes may compute: SHA-256 of its bytes up to 64 MiB.

    Of a larger file, `chunks-` and the SHA-256 of the hex digests of its chunks of 64 MiB, one after the other.
    """
    return combine_chunks(sha256_of_chunks(path, 0, -(-path.stat().st_size // CHUNK_BYTES)))


def checksum_like(path: Path, recorded: str) -> str:
    """What to compare with a recorded checksum of a file or folder: its SHA-256, or that of its chunks."""
    return checksum(path) if recorded.startswith(_OF_CHUNKS) else sha256(path)


def has_checksum(path: Path, recorded: str) -> bool:
    """Whether a file or folder has the checksum that was recorded."""
    return checksum_like(path, recorded) == recorded


def sha256_of_chunks(path: Path, first: int, count: int) -> list[str]:
    """The hex SHA-256 of up to `count` chunks of a file from number `first` on; fewer where the file ends."""
    digests = list[str]()
    with path.open("rb") as handle:
        handle.seek(first * CHUNK_BYTES)
        while len(digests) < count and (chunk := handle.read(CHUNK_BYTES)):
            digests.append(hashlib.sha256(chunk).hexdigest())
    return digests


def combine_chunks(digests: Sequence[str]) -> str:
    """The checksum of a file whose chunks have these digests."""
    if len(digests) == 1:
        return digests[0]
    combined = hashlib.sha256("".join(digests).encode()).hexdigest()
    return f"{_OF_CHUNKS}{combined}" if digests else combined


def sha256_json(value: Any) -> str:
    """Hex SHA-256 of plain data, independent of the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


# --- Free space ---


def require_space(folder: Path, needed: int, what: str) -> None:
    """Raise InputError if the file system of `folder` has fewer than `needed` bytes free, after a margin of 1 %."""
    # The folder itself may not exist yet.
    existing = folder
    while not existing.exists():
        existing = existing.parent

    free = shutil.disk_usage(existing).free
    if needed > (1 - _SPACE_MARGIN) * free:
        raise InputError(
            f"{what} needs {format_bytes(needed)} in {folder}, but only {format_bytes(free)} are free there; "
            "make room or choose another `out`"
        )


def reserve_space(folder: Path, needed: int) -> None:
    """Raise OSError (disk or quota full) now if `needed` bytes are not available in `folder`.

    For writers that must not fail in the middle of a write: HDF5 then ends the process with a segmentation fault.
    """
    if needed <= 0:
        return
    probe = _part_path(folder, "reserve")
    # The space is allocated, not only looked up: a quota may be smaller than the free space.
    handle = os.open(probe, os.O_CREAT | os.O_WRONLY, 0o600)
    try:
        os.posix_fallocate(handle, 0, needed)
    finally:
        os.close(handle)
        probe.unlink()


_UNUSABLE_PLACE = {
    errno.ENOSPC: "the disk is full; make room",
    errno.EDQUOT: "the quota is used up; make room",
    errno.EFBIG: "the file would be larger than the file system or `ulimit -f` allows; raise the limit",
    errno.EROFS: "the file system is read-only; choose another `out`",
    errno.EACCES: "no permission; choose another `out`, or ask its owner for access",
    errno.EPERM: "no permission; choose another `out`, or ask its owner for access",
    errno.ENAMETOOLONG: "the name is too long; shorten the id or the path",
    errno.ENOTDIR: "a part of the path is a file; choose another path, or move that file away",
    errno.EEXIST: "a file has the place of a folder; choose another path, or move that file away",
    errno.EISDIR: "a folder has the place of a file; choose another path, or move that folder away",
    errno.ELOOP: "the links of the path lead round in circles; mend them",
    errno.EILSEQ: "the file system does not take the characters of the name; rename it",
    errno.EMFILE: "too many files are open; raise `ulimit -n`",
    errno.ENFILE: "too many files are open on this machine; try again later",
}
"""Errors that a user can mend: what is wrong, and what to do."""


def explain_os_error(error: OSError) -> str | None:
    """What is wrong with a file or its place, and what to do, in one sentence; None for an error that is a bug."""
    # HDF5 and tensorstore report a full disk in the text only.
    number = errno.ENOSPC if "No space left" in str(error) else error.errno
    if number not in _UNUSABLE_PLACE:
        return None
    names = [str(name) for name in (error.filename, error.filename2) if name is not None]
    return f"{' -> '.join(names) or error}: {_UNUSABLE_PLACE[number]}, then give the same command again"


def explain_error(error: Exception) -> str | None:
    """What is wrong with the place or the name of a file, and what to do; None for an error that is a bug."""
    if isinstance(error, OSError):
        return explain_os_error(error)
    if isinstance(error, UnicodeEncodeError):
        return f"{ascii(error.object)[:200]} is not UTF-8; rename the file, or give another id"
    # Before version 3.13, `Path.resolve` raises no OSError for links that lead round in circles.
    if isinstance(error, RuntimeError) and str(error).startswith("Symlink loop"):
        return f"{error}; mend the links of the path, then give the same command again"
    return None


@contextlib.contextmanager
def explain_full_disk(folder: Path, what: str) -> Iterator[None]:
    """Turn the error of a full disk or quota into an InputError of one sentence; other errors pass."""
    try:
        yield
    except OSError as error:
        # HDF5 and tensorstore report a full disk in the text only.
        if error.errno not in (errno.ENOSPC, errno.EDQUOT) and "No space left" not in str(error):
            raise
        raise InputError(
            f"the disk or quota of {folder} is full, {what} was not written; make room or choose another `out`, then "
            "give the same command again (finished parts are kept)"
        ) from error


# --- Numbers for people ---


def quote_path(path: Path | str) -> str:
    """A path as a shell takes it, for the commands that messages advise."""
    return shlex.quote(str(path))


def format_count(count: int, noun: str, plural: str = "") -> str:
    """`1 root`, `2 roots`; `plural` for a noun that takes more than an s."""
    return f"{count} {noun if count == 1 else plural or noun + 's'}"


def format_bytes(count: float) -> str:
    """Bytes for people: 1.5 GB (powers of 1000)."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if abs(count) < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} PB"
