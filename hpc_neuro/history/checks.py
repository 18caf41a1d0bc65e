"""What links each verb's run to the runs before it, and to the pieces it wrote."""

from __future__ import annotations

import functools
import hashlib
import importlib.resources
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from hpc_neuro.core import files, run_folder
from hpc_neuro.core.geometry import tile_volume
from hpc_neuro.core.schema import InputError
from hpc_neuro.data import feature_cache, ome_zarr
from hpc_neuro.data.store import Store
from hpc_neuro.history.run_check import Stage, common, short
from hpc_neuro.models.teacher_folder import NOTE
from hpc_neuro.pipeline import STAGES, VERBS
from hpc_neuro.report.provenance import RunRecord

_STORE, _CACHE = STAGES["prepare"].index, STAGES["precompute"].index
_PREDICTIONS = STAGES["infer"].index
_MEAN = ("dice", "cldice", "hd95_um", "f1_4vox", "esa")


def examine(link: RunRecord, quick: bool) -> Stage:
    """The stage of one run, all its links followed. `quick`: large files are not read."""
    stage = common(link)
    check = VERBS[link.name].history_check if link.name in VERBS else None
    if link.record is not None and check is not None:
        try:
            globals()[check](stage, link, link.record, quick)
        except InputError as error:
            stage.bad(str(error).partition(";")[0])
        except (LookupError, TypeError, AttributeError, ValueError) as error:  # JSON, but not as it was written
            stage.bad(f"{stage.last} is not of the form it was written in ({type(error).__name__}: {error})")
    return stage


def recorded(link: RunRecord) -> dict[str, str]:
    """The files of a run (names in its folder) whose SHA-256 is known, with it."""
    record = link.record or {}
    found = dict(record.get("outputs", {}))
    if link.name == "infer" and (link.path / _PREDICTIONS).is_file():
        for entry in files.read_json(link.path / _PREDICTIONS, "run `infer` again").values():
            found |= {entry[k]: v for k, v in entry.get("sha256", {}).items()}
    if link.name == "demo":
        for inner in ("evaluate", "infer"):
            if (link.path / inner / "run.json").is_file():
                inside = files.read_json(link.path / inner / "run.json", "run the demo again")
                found |= recorded(RunRecord(inner, link.path / inner, inside))
    return found


def check_prepare(stage: Stage, link: RunRecord, record: Mapping[str, Any], quick: bool) -> None:
    index = stage.read(link.path / _STORE)
    if index is None:
        return
    inputs = record.get("inputs", {})
    for name, entry in index["volumes"].items():
        for kind, digest in entry["sha256"].items():
            stage.equal(f"the {kind} that {_STORE} names for {name}", digest, inputs.get(f"{name}.{kind}"))
        stage.say(f"{name} ({entry['split']})  {short(entry['digest'])}  {entry['file']}", "volumes")
    store = _attempt(stage, lambda: Store(link.path))
    for name in store.ids if store else ():
        _attempt(stage, functools.partial(store.handle, name))
    if store:
        store.close()


def check_precompute(stage: Stage, link: RunRecord, record: Mapping[str, Any], quick: bool) -> None:
    _volumes(stage, link, record, "volume ")
    manifest = stage.read(link.path / _CACHE)
    if manifest is None:
        return
    _teacher(stage, record, manifest["teacher"])
    cache = _attempt(stage, lambda: feature_cache.FeatureCache(link.path))
    shards = manifest["shards"]
    stage.say(f"{len(shards)} shards, views {' '.join(manifest['views'])}, layers {manifest['layers']}")
    for shard in run_folder.track_progress(shards if cache and not quick else [], "cache shards", unit="shard"):
        if feature_cache.is_shard_sound(link.path / shard["file"]):
            stage.held += 1
        else:
            stage.bad(f"the shard {shard['file']} does not have the checksum it was written with")


def check_train(stage: Stage, link: RunRecord, record: Mapping[str, Any], quick: bool) -> None:
    inputs, config = record.get("inputs", {}), record.get("config", {})
    _volumes(stage, link, record, "", skip=("teacher", "cache", "split"))
    if "cache" in inputs and config.get("cache"):
        manifest = link.locate(config["cache"]) / _CACHE
        if (held := stage.read(manifest)) is not None:
            stage.equal("the cache's manifest", feature_cache.hash_manifest(held), inputs["cache"])
            if "teacher" in inputs:
                stage.equal("the teacher of the cache", held["teacher"]["sha256"], inputs["teacher"])
    if "teacher" in inputs:
        _teacher(stage, record, {"name": config["teacher"]["model"], "sha256": inputs["teacher"]})
    newest = max((link.path / "checkpoints").glob("step_*/checkpoint.json"), default=None)
    if newest is None:
        stage.say("no checkpoint is kept")
    else:
        mark = stage.read(newest) or {}
        stage.say(f"checkpoint of step {mark.get('step')} ({mark.get('world_size')} ranks, ZeRO {mark.get('stage')})")
    for path in (link.path / name for name in STAGES["train"].artifacts):
        if not path.is_file():
            stage.bad(f"the {path.parent.name} weights are missing: {path} does not exist")


def check_infer(stage: Stage, link: RunRecord, record: Mapping[str, Any], quick: bool) -> None:
    inputs, config = record.get("inputs", {}), record.get("config", {})
    model = link.locate(config.get("model", ""))
    inside = [model / "model.safetensors", model / "weights" / config.get("weights", "best") / "model.safetensors"]
    stage.compare(inside[0] if inside[0].is_file() else inside[1], inputs.get("weights", ""), "weights")
    if config.get("store"):
        _volumes(stage, link, record, "volume ")
    for name, entry in (stage.read(link.path / _PREDICTIONS) or {}).items():
        done = _blocks(stage, link.path, name, entry["probability"], quick)
        stage.say(f"{name}: {done} blocks, {entry.get('foreground_voxels')} voxels of foreground")
        for kind in ("swc", "swc_voxel"):
            path, digest = entry.get(kind), entry.get("sha256", {}).get(kind)
            if path and digest:
                stage.compare(link.path / path, digest, path, "SWC files")
            elif path and not (link.path / path).is_file():
                stage.bad(f"{path} is missing: {link.path / path} does not exist")
            elif path:
                stage.unsure(f"{path}  (no hash was recorded, so it is not compared)", "SWC files")


def _blocks(stage: Stage, out: Path, name: str, folder: str, quick: bool) -> int:
    """Every block of a probability must have its mark, and the checksum in it; returns how many have."""
    marks = {}
    for path in sorted((out / "blocks" / name).glob("[0-9]*.json")):
        if (mark := stage.read(path)) is not None:
            marks[tuple(mark["start"])] = mark
    array = _attempt(stage, lambda: ome_zarr.open_level(out / folder), f"{out / folder} cannot be read")
    if array is None:
        return 0
    z, y, x = array.shape
    deep, high, wide = (int(n) for n in array.chunk_layout.write_chunk.shape)
    wanted, good = list(tile_volume((z, y, x), (deep, high, wide))), 0
    for block in run_folder.track_progress(wanted, f"{name}: blocks", unit="block"):
        box = block.write
        if box.start not in marks:
            stage.bad(f"the block of {folder} at {box.start} was never finished: it has no mark in {out / 'blocks'}")
            continue
        values = None if quick else _attempt(stage, functools.partial(ome_zarr.read_box, array, box))
        if values is not None and hashlib.sha256(values.tobytes()).hexdigest() != marks[box.start]["sha256"]:
            stage.bad(f"the block of {folder} at {box.start} does not have the checksum it was written with")
            continue
        good += 1
    stage.held += good
    return good


def check_evaluate(stage: Stage, link: RunRecord, record: Mapping[str, Any], quick: bool) -> None:
    inputs, config = record.get("inputs", {}), record.get("config", {})
    folders = {"predictions": config.get("predictions", "")}
    for name, several in config.get("compare", {}).items():
        folders |= {f"{name}.{i}": folder for i, folder in enumerate(several)}
    stage.compare(link.locate(config.get("store", "")) / _STORE, inputs.get("store", ""), "store")
    for name, folder in folders.items():
        stage.compare(link.locate(folder) / _PREDICTIONS, inputs.get(name, ""), name)
    found = stage.read(link.path / STAGES["evaluate"].index)
    for method, mean in ((found or {}).get("mean") or {}).items():
        if stage.equal(f"the mean of {method} in metrics.json", mean, record["summary"]["mean"].get(method)):
            stage.say(f"{method}: " + ", ".join(f"{k} {mean[k]:.3f}" for k in _MEAN if k in mean))
    for name in STAGES["evaluate"].artifacts[1:]:
        if not (link.path / name).is_file():
            stage.bad(f"{name} is missing: {link.path / name} does not exist")


def check_demo(stage: Stage, link: RunRecord, record: Mapping[str, Any], quick: bool) -> None:
    """What the demo copied to the top of its folder must be what its stages wrote."""
    copied = [link.path / "evaluate" / n for n in STAGES["evaluate"].artifacts]
    copied += sorted((link.path / "infer" / "swc").rglob("*.swc"))
    for source in copied:
        name = source.relative_to(link.path).as_posix().split("/", 1)[1]
        if source.is_file():
            stage.compare(link.path / name, files.sha256(source), name)


def _volumes(stage: Stage, link: RunRecord, record: Mapping[str, Any], prefix: str, skip: Sequence[str] = ()) -> None:
    """The volumes that a run took from its store must still be in it, unchanged."""
    path = link.locate(record["config"]["store"]) / _STORE
    if not path.is_file():
        stage.bad(f"the store is missing: {path} does not exist")
        return
    held = (stage.read(path) or {"volumes": {}})["volumes"]
    for name, digest in record.get("inputs", {}).items():
        if name.startswith(prefix) and name not in skip and not name.startswith("image ") and name != "weights":
            volume = name.removeprefix(prefix)
            stage.equal(f"volume {volume} of {path.parent}", held.get(volume, {}).get("digest", "absent"), digest)


def _teacher(stage: Stage, record: Mapping[str, Any], identity: Mapping[str, str]) -> None:
    """The teacher's weights, where their file is known: given by path, or part of the package."""
    stage.say(f"teacher {identity['name']}  {short(identity['sha256'])}")
    config = record.get("config", {}).get("teacher") or {}
    if config.get("weights"):
        weights = RunRecord("", Path(), record).locate(config["weights"])
        if weights.is_dir():  # as fetch-teacher and tools.teacher.pretrain leave it
            weights = weights / str((stage.read(weights / NOTE) or {}).get("file", "weights"))
        stage.compare(weights, identity["sha256"], "teacher weights")
    elif str(config.get("model")).startswith("bundled"):
        assets = Path(str(importlib.resources.files("hpc_neuro"))) / "assets"
        held = {files.sha256(p) for p in assets.glob("*.safetensors")}
        if identity["sha256"] in held:
            stage.held += 1
        else:
            stage.bad(
                f"no bundled teacher has the recorded SHA-256 {short(identity['sha256'])}: the package was changed"
            )


def _attempt(stage: Stage, work: Callable[[], Any], says: str = "") -> Any:
    """What `work` gives; None, and broken, when the data on the disk is damaged or gone."""
    try:
        found = work()
    except (InputError, OSError, ValueError) as error:
        first = str(error).partition(";")[0].splitlines()[0]
        stage.bad(f"{says} ({first})" if says else first)
        return None
    stage.held += 1
    return found
