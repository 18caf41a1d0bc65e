"""Find the pairs of an image and a tree, in a folder or a manifest, and decide the split of each neuron."""

from __future__ import annotations

import csv
import difflib
import logging
import unicodedata
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from hpc_neuro.core import files, yaml_text
from hpc_neuro.core.image_names import find_clash, is_system_file
from hpc_neuro.core.schema import InputError
from hpc_neuro.core.yaml_text import YamlError
from hpc_neuro.data.formats import image_stem
from hpc_neuro.data.remote_path import RemotePath, parse_path
from hpc_neuro.data.store import SPLITS
from hpc_neuro.prepare.config import PrepareConfig, SplitConfig

log = logging.getLogger(__name__)

_MAX_MANIFEST_BYTES = 64 << 20
"""[bytes] Size of a manifest that is read."""

LABELS_ENDING = "_labels"
"""End of the stem of a label volume in a folder of pairs."""

Triple = tuple[float, float, float]
"""Three numbers in z y x order."""

_COLUMNS = ("id", "image", "swc", "labels", "voxel_size", "root", "split", "neuron", "swc_unit", "channel", "axes")

_META_COLUMNS = {"root_xyz": "root", "voxel_size_um_xyz": "voxel_size", "swc_unit": "swc_unit"}
"""Key in meta.json -> column of a manifest."""


@dataclass(frozen=True)
class ImagePair:
    """One volume to prepare; None where the files or the defaults decide."""

    id: str
    image: Path
    swc: Path | None  # the tree, or ...
    labels: Path | None  # ... the label volume
    swc_unit: str | None
    voxel_size: Triple | None  # um, z y x
    root: Triple | None  # voxel, z y x
    split: str  # "" until decided
    neuron: str  # volumes of one neuron share a split
    channel: int | None
    axes: str | None

    @property
    def truth(self) -> tuple[str, Path]:
        """What the neurites are known from: "swc" or "labels", and its file."""
        # One of the two is given, or the pair could not have been made.
        return ("swc", self.swc) if self.swc is not None else ("labels", self.labels or Path())


def find_pairs(cfg: PrepareConfig) -> list[ImagePair]:
    """All pairs with their splits; no file is opened yet. Raises InputError with one sentence for what is missing."""
    # The config makes sure that exactly one of the two is set.
    pairs = _read_folder(cfg.images, cfg) if cfg.images else _read_manifest(cfg.manifest or Path(), cfg)
    if cfg.voxel_size:
        pairs = [replace(pair, voxel_size=cfg.voxel_size) for pair in pairs]
    return _assign_splits(pairs, cfg.split)


def _read_folder(folder: Path, cfg: PrepareConfig) -> list[ImagePair]:
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder; give images=FOLDER with pairs ID.tif and ID.swc")

    # A forgotten file is an error: half of a data set would go unnoticed.
    images, swcs = _list_by_stem(folder)
    if not images and not swcs:
        raise InputError(
            f"{folder} holds no image and no SWC; pairs of an image and a tree, ID.tif and ID.swc, or of an image and "
            f"its labels, ID.tif and ID{LABELS_ENDING}.tif, are wanted"
        )
    images, labels = _take_labels_out(images)
    _require_one_truth(swcs, labels)
    _require_partner(images, {**swcs, **labels}, "SWC", f", or labels as ID{LABELS_ENDING}.tif")
    _require_partner(swcs, images, "image")

    meta_path = folder / "meta.json"
    meta = _read_meta(meta_path, images)
    pairs = []
    for stem, image in images.items():
        # Relative paths of a row start at the folder, so these are absolute.
        truth = {"swc": str(swcs[stem].absolute())} if stem in swcs else {"labels": str(labels[stem].absolute())}
        row = {"id": stem, "image": str(image.absolute()), **truth, **meta.get(stem, {})}
        # A fault of a file is not one of a description that is not there.
        pairs.append(_make_pair(row, meta_path if stem in meta else image, folder, cfg))
    return pairs


def _list_by_stem(folder: Path) -> tuple[dict[str, Path], dict[str, Path]]:
    """The images and the SWC files of a folder by their stems. Raises InputError for two images of one stem."""
    images: dict[str, Path] = {}
    swcs: dict[str, Path] = {}

    for path in sorted(folder.iterdir()):
        if is_system_file(path):
            continue
        if path.suffix.lower() == ".swc":
            if path.stem in swcs:
                raise InputError(f"{folder} holds two trees of {path.stem}: {swcs[path.stem].name} and {path.name}")
            swcs[path.stem] = path
        stem = image_stem(path)
        if stem is None:
            continue
        if stem in images:
            raise InputError(f"{folder} holds two images of {stem}: {images[stem].name} and {path.name}; keep one")
        images[stem] = path

    # macOS writes é as two characters, and people see no difference.
    _require_distinct(images)
    by_look = {unicodedata.normalize("NFC", stem): stem for stem in images}
    return images, {by_look.get(unicodedata.normalize("NFC", stem), stem): path for stem, path in swcs.items()}


def _take_labels_out(images: Mapping[str, Path]) -> tuple[dict[str, Path], dict[str, Path]]:
    """The images, and by the stem of its image each label volume: ID_labels is that of ID, where there is an ID."""
    labels = {}
    for stem, path in images.items():
        base = stem.removesuffix(LABELS_ENDING)
        if base != stem and base in images:
            labels[base] = path
    taken = set(labels.values())
    return {stem: path for stem, path in images.items() if path not in taken}, labels


def _require_one_truth(swcs: Mapping[str, Path], labels: Mapping[str, Path]) -> None:
    """Raise InputError for an image with both a tree and a label volume."""
    if both := sorted(swcs.keys() & labels.keys()):
        raise InputError(
            f"{both[0]} has a tree, {swcs[both[0]].name}, and a label volume, {labels[both[0]].name}; move one of them "
            "away, or name the pairs in a manifest"
        )


def _require_distinct(names: Iterable[str]) -> None:
    """Raise InputError for two names whose results would be the same files, or that look the same."""
    if clash := find_clash(names):
        raise InputError(f"the volumes {clash[0]!a} and {clash[1]!a} {clash[2]}; give one another name")


def _require_partner(paths: Mapping[str, Path], partners: Mapping[str, Path], kind: str, other: str = "") -> None:
    """Raise InputError when a file has no partner of the same stem. kind: of the partners; other: what may do, too."""
    alone = sorted(set(paths) - set(partners))
    if alone:
        raise InputError(
            f"{paths[alone[0]]} has no {kind} of the same stem beside it ({len(alone)} such); "
            f"put the {kind} there{other}, move the file away, or name the pairs in a manifest"
        )


def _read_meta(path: Path, ids: Collection[str]) -> dict[str, dict[str, Any]]:
    """The entries of meta.json for `ids`, under the manifest's column names and in z y x order."""
    if not path.exists():
        return {}
    body = files.read_json(path, "write {ID: {root_xyz: [...], voxel_size_um_xyz: [...]}}, or remove it")

    if isinstance(body, dict):
        by_look = {unicodedata.normalize("NFC", id_): id_ for id_ in ids}
        body = {by_look.get(unicodedata.normalize("NFC", name), name): entry for name, entry in body.items()}
    rows: dict[str, dict[str, Any]] = {}
    for id_ in ids:
        # Volumes without an entry use the defaults.
        entry = body.get(id_, {}) if isinstance(body, dict) else None
        if not isinstance(entry, dict):
            raise InputError(f"{path} holds no mapping for {id_}; write {{ID: {{root_xyz: [x, y, z]}}}}, or remove it")
        rows[id_] = _read_meta_entry(path, id_, entry)

    # A misspelled id would silently lose its root.
    if isinstance(body, dict) and (unknown := sorted(body.keys() - rows.keys())):
        log.warning("%s names %s, of which there is no image beside it", path, ", ".join(unknown[:8]))
    described = sum(1 for row in rows.values() if row)
    log.info("%s: voxel sizes and roots of %d of %d volumes", path, described, len(rows))
    return rows


def _read_meta_entry(path: Path, id_: str, entry: Mapping[str, Any]) -> dict[str, Any]:
    """One entry of meta.json as a manifest row. Unknown keys are free, unless they resemble a known one."""
    for key in sorted(entry.keys() - _META_COLUMNS.keys()):
        # A key that resembles a known one is a typing error, not a note.
        if similar := difflib.get_close_matches(key, _META_COLUMNS, n=1):
            raise InputError(f"{path} says {key} of {id_}; write {similar[0]}, if that is meant, or drop it")

    row = {}
    for key, column in _META_COLUMNS.items():
        if key in entry:
            # The file is in x y z order, everything else in z y x.
            value = entry[key]
            if key.endswith("_xyz") and value is not None:
                value = _parse_triple(value, f"{path}: {key} of {id_}", order="x y z")
            row[column] = value[::-1] if isinstance(value, tuple) else value
    return row


def _read_manifest(path: Path, cfg: PrepareConfig) -> list[ImagePair]:
    rows = _read_rows(path)

    # A misspelled column would silently have no effect.
    unknown = sorted({str(column) for row in rows for column in row} - set(_COLUMNS))
    if unknown:
        raise InputError(f"{path} has unknown columns {', '.join(unknown)}; known are {', '.join(_COLUMNS)}")

    pairs = []
    for row in rows:
        # An empty cell of a CSV is an empty text.
        given = {column: value for column, value in row.items() if value is not None and value != ""}
        pairs.append(_make_pair(given, path, path.parent, cfg))

    repeated = sorted({pair.id for pair in pairs if sum(other.id == pair.id for other in pairs) > 1})
    if repeated:
        raise InputError(f"{path} lists {', '.join(repeated)} more than once; ids must differ")
    _require_distinct(pair.id for pair in pairs)
    return pairs


def _read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a CSV or YAML manifest. Raises InputError for a file that lists no volumes."""
    try:
        # Spreadsheets begin their CSV with a byte-order mark.
        text = files.read_limited(path, _MAX_MANIFEST_BYTES, "a manifest").decode("utf-8-sig")
    except FileNotFoundError:
        raise InputError(f"{path} does not exist; give manifest=FILE, a CSV or YAML list of volumes") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read as text ({error}); a CSV or YAML list of volumes is wanted") from None

    rows: Any
    if path.suffix.lower() in (".yaml", ".yml", ".json"):
        try:
            rows = yaml_text.parse(text, keep_text=True)
        except YamlError as error:
            raise InputError(f"{path} is not YAML: {error}") from None
    else:
        rows = _parse_csv(path, text)

    if not isinstance(rows, list) or not rows or not all(isinstance(row, dict) for row in rows):
        raise InputError(f"{path} lists no volumes; one row each with id, image, swc is wanted")
    return rows


def _parse_csv(path: Path, text: str) -> list[dict[str, Any]]:
    """The rows of a table with a header, separated by commas, semicolons or tabs, as spreadsheets of any country do."""
    lines = text.splitlines()
    delimiter = max(",;\t", key=lines[0].count) if lines else ","
    reader = csv.DictReader(lines, skipinitialspace=True, delimiter=delimiter)
    try:
        rows = list(reader)
    except csv.Error as error:
        raise InputError(f"{path} is no table of comma-separated values: {error}") from None

    names = list(reader.fieldnames or [])
    if repeated := [name for name in names if names.count(name) > 1]:
        raise InputError(f"{path} has the column {repeated[0]} {names.count(repeated[0])} times; keep one of them")
    # DictReader keeps cells without a name under None.
    for number, row in enumerate(rows, start=1):
        if None in row:
            raise InputError(f"{path}: row {number} below the header has more cells than the header has names")
    return rows


def _make_pair(row: Mapping[str, Any], source: Path, folder: Path, cfg: PrepareConfig) -> ImagePair:
    """Check one row and fill in the defaults. source: the file that the row is from, for messages."""
    name = row.get("id", "a row")
    if "image" not in row:
        raise InputError(f"{source}: {name} has no image")
    if ("swc" in row) == ("labels" in row):
        content = "both swc and labels" if "swc" in row else "no swc and no labels"
        raise InputError(f"{source}: {name} has {content}; name the tree as swc, or the label volume as labels")

    # An absolute path stays as it is, and so does the address of an image.
    named = parse_path(_read_text(row, "image", source))
    image = named if isinstance(named, RemotePath) else folder / named
    swc, labels = (folder / _read_text(row, kind, source) if kind in row else None for kind in ("swc", "labels"))

    # A name that looks like a number stays as it is written: 010 is not 8.
    id_ = _read_text(row, "id", source) if "id" in row else image_stem(image) or image.stem

    # The id becomes a file name in the store.
    if not files.is_plain_name(id_):
        raise InputError(f"{source}: id {id_!r} cannot be a file name; use letters, digits, - and _")
    for path in (image, swc, labels):
        if path is not None and not path.exists():
            fault = "is a link that leads nowhere" if path.is_symlink() else "does not exist"
            advice = "put the file there" if source == image else f"correct {source} or add the file"
            raise InputError(f"{path} of volume {id_} {fault}; {advice}")

    # A table may have hundreds of rows, so each fault names the volume.
    unit = row.get("swc_unit", cfg.swc_unit)
    if unit not in ("voxel", "um", None):
        raise InputError(f"{source}: swc_unit of {id_} is {unit!r}; voxel or um is wanted")
    split = str(row.get("split") or "")
    if split and split not in SPLITS:
        raise InputError(f"{source}: split of {id_} is {split!r}; train, val or test is wanted")
    size = _parse_triple(row.get("voxel_size"), f"{source}: voxel_size of {id_}")
    if size and min(size) <= 0:
        raise InputError(f"{source}: voxel_size of {id_} is {size}; sizes above 0 um are wanted")
    channel = row.get("channel", cfg.channel)
    if channel is not None and not str(channel).isdecimal():
        raise InputError(f"{source}: channel of {id_} is {channel!r}; a number from 0 is wanted")

    return ImagePair(
        id=id_,
        image=image,
        swc=swc,
        labels=labels,
        swc_unit=unit,
        voxel_size=size,
        root=_parse_triple(row.get("root"), f"{source}: root of {id_}"),
        split=split,
        neuron=_read_text(row, "neuron", source) if "neuron" in row else id_,
        channel=None if channel is None else int(channel),
        axes=_read_text(row, "axes", source) if "axes" in row else cfg.axes,
    )


def _read_text(row: Mapping[str, Any], column: str, source: Path) -> str:
    """A cell that is a name, as it is written. Raises InputError for what YAML reads as no text or number."""
    value = row[column]
    if isinstance(value, bool) or not isinstance(value, (str, int, float)) or not str(value):
        shown = repr(value)[:60]
        raise InputError(f'{source}: {column} is {shown}; a text is wanted, in quotation marks where needed: "{shown}"')
    return yaml_text.as_written(value)


def _parse_triple(value: Any, name: str, order: str = "z y x") -> Triple | None:
    """Three numbers from a list or from text such as `1.0 0.33 0.33` (also with ; or , between), in their order."""
    if value is None:
        return None

    parts = value.replace(";", " ").replace(",", " ").strip("[] ").split() if isinstance(value, str) else value
    try:
        first, second, third = (yaml_text.parse_decimal(str(part)) for part in parts)
    except (TypeError, ValueError):
        raise InputError(f"{name} is {value!r}; three finite numbers {order} are wanted") from None
    return first, second, third


def _assign_splits(pairs: list[ImagePair], cfg: SplitConfig) -> list[ImagePair]:
    """Set the split of each neuron: the config's lists, else the manifest's, else drawn, else train."""
    splits = _named_splits(pairs, cfg)

    # Keep the order of the volumes: the draw depends on it, and that of a set differs between runs.
    neurons = list(dict.fromkeys(pair.neuron for pair in pairs))
    ids = [pair.id for pair in pairs]
    if unknown := [name for name in (*cfg.val, *cfg.test) if name not in {*neurons, *ids}]:
        raise InputError(f"split names {', '.join(unknown)}, but the volumes are {', '.join(ids)}")

    free: Sequence[str] = [neuron for neuron in neurons if neuron not in splits]
    order = [free[i] for i in np.random.default_rng(cfg.seed).permutation(len(free))]
    for split, fraction in (("test", cfg.test_fraction), ("val", cfg.val_fraction)):
        # At least one neuron, so that a fraction is never without effect.
        count = min(len(order), max(1, round(fraction * len(free)))) if fraction else 0
        splits.update(dict.fromkeys(order[:count], split))
        order = order[count:]

    return [replace(pair, split=splits.get(pair.neuron, "train")) for pair in pairs]


def _named_splits(pairs: list[ImagePair], cfg: SplitConfig) -> dict[str, str]:
    """Neuron -> split, for those that the config or the manifest names. InputError for a neuron in two splits."""
    splits: dict[str, str] = {}
    for pair in pairs:
        # Two volumes of one neuron in different splits would leak it from training to test.
        named = [split for split in ("val", "test") if {pair.id, pair.neuron} & set(getattr(cfg, split))]
        if pair.split:
            named.append(pair.split)
        for split in named:
            if splits.setdefault(pair.neuron, split) != split:
                raise InputError(f"neuron {pair.neuron} is put into both {splits[pair.neuron]} and {split}; choose one")
    return splits
