"""Which image goes with which tree: a folder of pairs, or a manifest; and which split each neuron belongs to."""

from __future__ import annotations

import csv
import difflib
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from hpc_neuro.core import files
from hpc_neuro.core.schema import InputError
from hpc_neuro.data.formats import READERS, is_image_folder
from hpc_neuro.data.store import SPLITS
from hpc_neuro.prepare.config import PrepareConfig, Splits

log = logging.getLogger(__name__)

Triple = tuple[float, float, float]
_COLUMNS = ("id", "image", "swc", "voxel_size", "root", "split", "neuron", "swc_unit", "channel", "axes")


@dataclass(frozen=True)
class Pair:
    """One volume as it is asked for; None where the files or the defaults decide."""

    id: str
    image: Path
    swc: Path
    swc_unit: str | None
    voxel_size: Triple | None  # um, z y x
    root: Triple | None  # voxel, z y x
    split: str  # "" until decided
    neuron: str  # volumes of one neuron share a split
    channel: int | None
    axes: str | None


def find_pairs(cfg: PrepareConfig) -> list[Pair]:
    """All pairs with their splits, nothing opened yet. Raises InputError with one sentence for what is missing."""
    pairs = _from_folder(cfg.images, cfg) if cfg.images else _from_manifest(cfg.manifest or Path(), cfg)
    if cfg.voxel_size:
        pairs = [replace(p, voxel_size=cfg.voxel_size) for p in pairs]
    return _with_splits(pairs, cfg.split)


def _from_folder(folder: Path, cfg: PrepareConfig) -> list[Pair]:
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder; give images=FOLDER with pairs ID.tif and ID.swc")
    swcs = {p.stem: p for p in sorted(folder.iterdir()) if p.suffix.lower() == ".swc"}
    images: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        stem = _image_stem(path)
        if stem is None:
            continue
        if stem in images:
            raise InputError(f"{folder} holds two images of {stem}: {images[stem].name} and {path.name}; keep one")
        images[stem] = path
    if not images and not swcs:
        raise InputError(f"{folder} holds no image and no SWC; pairs with the same stem, ID.tif and ID.swc, are wanted")
    for have, lack, kind in ((images, swcs, "SWC"), (swcs, images, "image")):
        alone = sorted(set(have) - set(lack))
        if alone:
            raise InputError(
                f"{have[alone[0]]} has no {kind} of the same stem beside it ({len(alone)} such); "
                f"put the {kind} there, move the file away, or name the pairs in a manifest"
            )
    meta = _meta(folder / "meta.json", images)
    pairs = []
    for stem in images:
        entry = {
            "id": stem,
            "image": str(images[stem].absolute()),
            "swc": str(swcs[stem].absolute()),
            **meta.get(stem, {}),
        }
        pairs.append(_pair(entry, folder / "meta.json", folder, cfg))
    return pairs


def _image_stem(path: Path) -> str | None:
    """The stem of a file of a known image format or of a folder that is one image; None for anything else."""
    name = path.name.lower()
    if path.is_dir():
        return path.name if not name.startswith(".") and is_image_folder(path) else None
    suffixes = [s for reader in READERS for s in reader.suffixes if name.endswith(s)]
    return path.name[: -len(max(suffixes, key=len))] if suffixes else None


def _meta(path: Path, ids: Iterable[str]) -> dict[str, dict[str, Any]]:
    """What meta.json says of each id, under the manifest's names and in z y x."""
    if not path.exists():
        return {}
    body = files.read_json(path, "write {ID: {root_xyz: [...], voxel_size_um_xyz: [...]}}, or remove it")
    known = {"root_xyz": "root", "voxel_size_um_xyz": "voxel_size", "swc_unit": "swc_unit"}
    found: dict[str, dict[str, Any]] = {}
    for id_ in ids:
        entry = body.get(id_, {}) if isinstance(body, dict) else None
        if not isinstance(entry, dict):
            raise InputError(f"{path} holds no mapping for {id_}; write {{ID: {{root_xyz: [x, y, z]}}}}, or remove it")
        for key in sorted(entry.keys() - known.keys()):
            if meant := difflib.get_close_matches(key, known, n=1):
                raise InputError(f"{path} says {key} of {id_}; write {meant[0]}, if that is meant, or drop it")
        found[id_] = {
            known[k]: list(reversed(v)) if k.endswith("_xyz") and isinstance(v, list) else v
            for k, v in entry.items()
            if k in known
        }
    if isinstance(body, dict) and (strange := sorted(body.keys() - found.keys())):
        log.warning("%s names %s, of which there is no image beside it", path, ", ".join(strange[:8]))
    log.info("%s: voxel sizes and roots of %d of %d volumes", path, sum(map(bool, found.values())), len(found))
    return found


def _from_manifest(path: Path, cfg: PrepareConfig) -> list[Pair]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise InputError(f"{path} does not exist; give manifest=FILE, a CSV or YAML list of volumes") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read as text ({error}); a CSV or YAML list of volumes is wanted") from None
    entries: Any
    if path.suffix.lower() in (".yaml", ".yml", ".json"):
        try:
            entries = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise InputError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    else:
        entries = list(csv.DictReader(text.splitlines(), skipinitialspace=True))
    if not isinstance(entries, list) or not entries or not all(isinstance(e, dict) for e in entries):
        raise InputError(f"{path} lists no volumes; one row each with id, image, swc is wanted")
    unknown = sorted({str(k) for e in entries for k in e} - set(_COLUMNS))
    if unknown:
        raise InputError(f"{path} has unknown columns {', '.join(unknown)}; known are {', '.join(_COLUMNS)}")
    pairs = [_pair({k: v for k, v in e.items() if v not in (None, "")}, path, path.parent, cfg) for e in entries]
    twice = sorted({p.id for p in pairs if sum(q.id == p.id for q in pairs) > 1})
    if twice:
        raise InputError(f"{path} lists {', '.join(twice)} more than once; ids must differ")
    return pairs


def _pair(entry: dict[str, Any], source: Path, folder: Path, cfg: PrepareConfig) -> Pair:
    lacking = [k for k in ("image", "swc") if k not in entry]
    if lacking:
        raise InputError(f"{source}: {entry.get('id', 'a row')} has no {' and no '.join(lacking)}")
    image, swc = folder / str(entry["image"]), folder / str(entry["swc"])
    id_ = str(entry.get("id") or _image_stem(image) or image.stem)
    if not files.is_plain_name(id_):
        raise InputError(f"{source}: id {id_!r} cannot be a file name; use letters, digits, - and _")
    for path in (image, swc):
        if not path.exists():
            raise InputError(f"{path} of volume {id_} does not exist; correct {source} or add the file")
    unit = entry.get("swc_unit", cfg.swc_unit)
    if unit not in ("voxel", "um", None):
        raise InputError(f"{source}: swc_unit of {id_} is {unit!r}; voxel or um is wanted")
    split = str(entry.get("split", ""))
    if split and split not in SPLITS:
        raise InputError(f"{source}: split of {id_} is {split!r}; train, val or test is wanted")
    size = _triple(entry.get("voxel_size"), f"{source}: voxel_size of {id_}")
    if size and min(size) <= 0:
        raise InputError(f"{source}: voxel_size of {id_} is {size}; sizes above 0 um are wanted")
    channel = entry.get("channel", cfg.channel)
    if channel is not None and not str(channel).isdigit():
        raise InputError(f"{source}: channel of {id_} is {channel!r}; a number from 0 is wanted")
    return Pair(
        id=id_,
        image=image,
        swc=swc,
        swc_unit=unit,
        voxel_size=size,
        root=_triple(entry.get("root"), f"{source}: root of {id_}"),
        split=split,
        neuron=str(entry.get("neuron", id_)),
        channel=None if channel is None else int(channel),
        axes=entry.get("axes", cfg.axes),
    )


def _triple(value: Any, what: str) -> Triple | None:
    """Three numbers from a list or from text such as `1.0 0.33 0.33` (also with ; or , between)."""
    if value is None:
        return None
    parts = value.replace(";", " ").replace(",", " ").strip("[] ").split() if isinstance(value, str) else value
    try:
        z, y, x = (float(v) for v in parts)
    except (TypeError, ValueError):
        raise InputError(f"{what} is {value!r}; three numbers z y x are wanted") from None
    if not np.isfinite([z, y, x]).all():
        raise InputError(f"{what} is {value!r}; three finite numbers z y x are wanted")
    return z, y, x


def _with_splits(pairs: list[Pair], splits: Splits) -> list[Pair]:
    """Each neuron's split: the manifest's, else the config's lists, else drawn, else train."""
    neurons = list(dict.fromkeys(p.neuron for p in pairs))
    decided: dict[str, str] = {}
    for pair in pairs:
        named = [s for s in ("val", "test") if {pair.id, pair.neuron} & set(getattr(splits, s))]
        for split in [*named, *([pair.split] if pair.split else [])]:
            if decided.setdefault(pair.neuron, split) != split:
                raise InputError(
                    f"neuron {pair.neuron} is put into both {decided[pair.neuron]} and {split}; choose one"
                )
    unknown = [n for n in (*splits.val, *splits.test) if n not in {*neurons, *(p.id for p in pairs)}]
    if unknown:
        raise InputError(f"split names {', '.join(unknown)}, but the volumes are {', '.join(p.id for p in pairs)}")
    free: Sequence[str] = [n for n in neurons if n not in decided]
    order = [free[i] for i in np.random.default_rng(splits.seed).permutation(len(free))]
    for name, fraction in (("test", splits.test_fraction), ("val", splits.val_fraction)):
        count = min(len(order), max(1, round(fraction * len(free)))) if fraction else 0
        decided.update(dict.fromkeys(order[:count], name))
        order = order[count:]
    return [replace(p, split=decided.get(p.neuron, "train")) for p in pairs]
