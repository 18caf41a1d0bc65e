"""What is compared for each run: its record, the files it was made from, and the files it wrote."""

from __future__ import annotations

import functools
import hashlib
import importlib.resources
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from hpc_neuro.core import files, run_folder, yaml_text
from hpc_neuro.core.geometry import Shape, tile_volume
from hpc_neuro.core.run_folder import CONFIG, RECORD
from hpc_neuro.core.schema import InputError
from hpc_neuro.core.types import Array
from hpc_neuro.data import feature_cache, ome_zarr, swc
from hpc_neuro.data.predictions import read_predictions
from hpc_neuro.data.run_journal import JOURNAL, BlockMarker, RunJournal, read_journal, read_markers
from hpc_neuro.data.store import Store
from hpc_neuro.metrics.metric import tolerance_key
from hpc_neuro.models.teacher_folder import NOTE
from hpc_neuro.pipeline import STAGES, VERBS
from hpc_neuro.report.provenance import RunRecord

_STORE, _CACHE = STAGES["prepare"].index, STAGES["precompute"].index
_PREDICTIONS = STAGES["infer"].index
_SHORT_DIGEST = 12
"""Characters of a digest that are printed."""
_MAX_LINES = 12
"""Lines of one kind that are printed; more are counted only."""


class RunCheck:
    """The checks of one run: lines for people, and how many links hold, are broken or were not compared."""

    def __init__(self, title: str, run: RunRecord, quick: bool = False) -> None:
        """quick: do not read large files."""
        self.title = title
        self.run = run
        self.quick = quick

        self.lines: list[str] = []
        self.broken: list[str] = []
        self.passed = 0
        self.skipped = 0
        self.last_file: Path | str = title
        """The JSON file that was read last."""
        self._line_counts: dict[str, int] = {}

    @property
    def record(self) -> Mapping[str, Any]:
        """Content of the run's run.json; {} when there is none."""
        return self.run.record or {}

    @property
    def inputs(self) -> Mapping[str, Any]:
        """Name -> digest of the run's inputs."""
        inputs: Mapping[str, Any] = self.record.get("inputs", {})
        return inputs

    @property
    def config(self) -> Mapping[str, Any]:
        """The run's resolved config."""
        config: Mapping[str, Any] = self.record.get("config", {})
        return config

    def note(self, text: str, kind: str = "") -> None:
        """Add a line; of the lines of one `kind`, only the first few."""
        count = self._line_counts[kind] = self._line_counts.get(kind, 0) + 1
        if not kind or count <= _MAX_LINES:
            self.lines.append(text)
        elif count == _MAX_LINES + 1:
            self.lines.append(f"... and more {kind}")

    def skip(self, text: str, kind: str) -> None:
        """Count a link that is not compared; `text` says why."""
        self.skipped += 1
        self.note(text, kind)

    def fail(self, text: str) -> None:
        """Count a broken link."""
        self.broken.append(text)
        self.lines.append(f"BROKEN: {text}")

    def compare(self, name: str, now: object, recorded: object) -> bool:
        """Check that a digest or another value is still what was recorded."""
        if now == recorded:
            self.passed += 1
            return True
        self.fail(f"{name} is {shorten(now)} now, but was {shorten(recorded)}")
        return False

    def compare_file(self, path: Path, recorded: str, name: str, kind: str = "files") -> None:
        """Check that a file or folder still has the SHA-256 that was recorded."""
        if not path.exists():
            self.fail(f"{name} is missing: {path} does not exist")
            return

        now = files.checksum_like(path, recorded)
        if now != recorded:
            self.fail(f"{name} was changed: {path} has SHA-256 {shorten(now)}, but {shorten(recorded)} was recorded")
            return
        self.passed += 1
        self.note(f"{name}  {shorten(recorded)}  {path}", kind)

    def read_json(self, path: Path) -> Any:
        """A JSON file of the chain; None, and a broken link, when it is missing or damaged."""
        self.last_file = path
        try:
            return files.read_json(path, "make it again")
        except InputError as error:
            self.fail(first_clause(error))
            return None

    def attempt(self, action: Callable[[], Any], failure: str = "") -> Any:
        """The result of `action`; None, and a broken link, when the data on the disk is damaged or missing."""
        try:
            result = action()
        except (InputError, OSError, ValueError) as error:
            reason = first_clause(error).splitlines()[0]
            self.fail(f"{failure} ({reason})" if failure else reason)
            return None
        self.passed += 1
        return result


def shorten(value: object) -> str:
    """The first characters of a digest; other values whole."""
    text = str(value)
    return text[:_SHORT_DIGEST] if len(text) == 64 else text


def first_clause(error: Exception) -> str:
    """What is wrong, without the advice that follows the semicolon."""
    return str(error).partition(";")[0]


# --- Checks of every run ---


def check_raw_files(run: RunRecord, quick: bool) -> RunCheck | None:
    """Compare the files that `prepare` or `infer` read from outside; None when the run read none."""
    if run.verb not in ("prepare", "infer"):
        return None
    record = run.record or {}
    # The two verbs name their inputs `image ID`, `ID.image` and `ID.swc`.
    raw = {
        name: digest
        for name, digest in record.get("inputs", {}).items()
        if name.startswith("image ") or name.endswith((".image", ".swc"))
    }
    if not raw:
        return None

    check = RunCheck(f"raw data of {run.folder}: {files.format_count(len(raw), 'file')}", run, quick)
    sources = record.get("sources", {})
    names = sorted(raw, key=run_folder.natural_key)

    for name in run_folder.track_progress(names, "raw files", unit="file"):
        digest = shorten(raw[name])
        if name not in sources:
            check.skip(f"{name}  {digest}  (its path was not recorded, so it is not compared)", "raw files")
            continue
        path = run.locate(sources[name])
        if quick and path.exists():
            check.skip(f"{name}  {digest}  {path} (not read)", "raw files")
        else:
            check.compare_file(path, raw[name], name, "raw files")

    return check


def check_record(check: RunCheck) -> None:
    """Check code, config, jobs and end of a run, and the hashes of its outputs."""
    record = check.record
    jobs = record.get("jobs") or [record.get("host", "an unknown host")]
    # An old record may lack what later versions write, so everything is read with get.
    check.note(f"code {record.get('code')}, config {shorten(files.sha256_json(record.get('config')))}")
    check.note(
        f"started {', '.join(record.get('starts', []))}, ended {record.get('end')}, "
        f"job{'s' * (len(jobs) > 1)}: {', '.join(map(str, jobs))}"
    )

    if record.get("exit") == 0:
        check.passed += 1
    else:
        failures = "; ".join(map(str, record.get("failures", []))) or "it was stopped, or is running"
        check.fail(f"the run is not complete (exit {record.get('exit')}): {failures}")

    _check_config(check)
    for name, digest in record.get("outputs", {}).items():
        hint = "the record was changed"
        path = check.attempt(
            functools.partial(files.resolve_inside, check.run.folder, name, check.run.folder / RECORD, hint)
        )
        if path is not None:
            check.compare_file(path, digest, name)


def _check_config(check: RunCheck) -> None:
    """config.yaml must agree with the record, except for `out`: the folder may have moved."""
    path = check.run.folder / CONFIG
    try:
        tree = yaml_text.parse(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        check.fail(f"{CONFIG} is missing: {path} does not exist")
        return
    except (OSError, ValueError) as error:
        check.fail(f"{path} cannot be read as YAML ({' '.join(str(error).split())})")
        return

    # `out` is not part of the record: it changes when the folder is moved.
    recorded = check.config
    config = {key: value for key, value in tree.items() if key != "out"} if isinstance(tree, dict) else tree
    if config == recorded:
        check.passed += 1
        return

    keys = ["all of it"]
    if isinstance(config, dict):
        keys = [key for key in {**recorded, **config} if config.get(key) != recorded.get(key)]
    check.fail(f"{CONFIG} was changed after the run: {', '.join(keys)}")


def recorded_hashes(run: RunRecord) -> dict[str, str]:
    """Name in the run's folder -> SHA-256, for all files whose hash is recorded."""
    hashes = dict((run.record or {}).get("outputs", {}))

    if run.verb == "infer" and (run.folder / _PREDICTIONS).is_file():
        for entry in read_predictions(run.folder, "run `infer` again", compare=False).values():
            hashes |= {entry[kind]: digest for kind, digest in entry.get("sha256", {}).items() if entry.get(kind)}

    # A demo copies the files of these stages to the top of its folder, under the same names.
    if run.verb == "demo":
        for stage in ("evaluate", "infer"):
            folder = run.folder / str(STAGES[stage].folder)
            if (folder / RECORD).is_file():
                record = run_folder.read_record(folder, "run the demo again")
                hashes |= recorded_hashes(RunRecord(stage, folder, record))
    return hashes


# --- Checks of each verb; the table of verbs names them ---


def check_prepare(check: RunCheck) -> None:
    """Check the store's index, its volumes, and the hashes of the raw files."""
    index = check.read_json(check.run.folder / _STORE)
    if index is None:
        return

    for name, entry in index["volumes"].items():
        for kind, digest in entry["sha256"].items():
            check.compare(f"the {kind} that {_STORE} names for {name}", digest, check.inputs.get(f"{name}.{kind}"))
        check.note(f"{name} ({entry['split']})  {shorten(entry['digest'])}  {entry['file']}", "volumes")

    # Opening finds files that are missing or truncated, reading finds flipped bits.
    store: Store | None = check.attempt(lambda: Store(check.run.folder))
    if store is None:
        return
    for name in run_folder.track_progress(store.ids, "volumes of the store", unit="volume"):
        check.attempt(functools.partial(store.open_handle, name) if check.quick else store[name].verify)
    store.close()


def check_precompute(check: RunCheck) -> None:
    """Check the volumes, the teacher and the checksum of every shard."""
    _check_volumes(check, "volume ")
    manifest = check.read_json(check.run.folder / _CACHE)
    if manifest is None:
        return

    _check_teacher(check, manifest["teacher"])
    cache: feature_cache.FeatureCache | None = check.attempt(lambda: feature_cache.FeatureCache(check.run.folder))
    shards = manifest["shards"]
    check.note(
        f"{files.format_count(len(shards), 'shard')}, views {' '.join(manifest['views'])}, layers {manifest['layers']}"
    )
    if not cache or check.quick:
        return

    for shard in run_folder.track_progress(shards, "cache shards", unit="shard"):
        if feature_cache.is_shard_sound(check.run.folder / shard["file"]):
            check.passed += 1
        else:
            check.fail(f"the shard {shard['file']} does not have the checksum it was written with")


def check_train(check: RunCheck) -> None:
    """Check the volumes, the cache, the teacher, the newest checkpoint and the weights."""
    _check_volumes(check, "", skip=("teacher", "cache", "split"))

    if "cache" in check.inputs and check.config.get("cache"):
        manifest = check.read_json(check.run.locate(check.config["cache"]) / _CACHE)
        if manifest is not None:
            digest = feature_cache.hash_manifest(manifest)
            check.compare("the cache's manifest", digest, check.inputs["cache"])
            if "teacher" in check.inputs:
                check.compare("the teacher of the cache", manifest["teacher"]["sha256"], check.inputs["teacher"])
    if "teacher" in check.inputs:
        _check_teacher(check, {"name": check.config["teacher"]["model"], "sha256": check.inputs["teacher"]})

    # Step numbers have leading zeros, so the largest name is the newest.
    newest = max((check.run.folder / "checkpoints").glob("step_*/checkpoint.json"), default=None)
    if newest is None:
        check.note("no checkpoint is kept")
    else:
        facts = check.read_json(newest) or {}
        ranks = f"{facts.get('world_size')} ranks, ZeRO {facts.get('stage')}"
        check.note(f"checkpoint of step {facts.get('step')} ({ranks})")
        for name, digest in {} if check.quick else facts.get("files", {}).items():
            check.compare_file(
                newest.parent / name, digest, f"checkpoint {newest.parent.name}, {name}", "checkpoint files"
            )

    for path in (check.run.folder / name for name in STAGES["train"].artifacts):
        if not path.is_file():
            check.fail(f"the {path.parent.name} weights are missing: {path} does not exist")


def check_infer(check: RunCheck) -> None:
    """Check the weights, the volumes, every block of every probability, and the trees."""
    _check_weights(check)
    if check.config.get("store"):
        _check_volumes(check, "volume ")

    check.last_file = check.run.folder / _PREDICTIONS
    predictions = check.attempt(functools.partial(_read_predictions, check.run.folder)) or {}
    hint = "make it again with `hpc-neuro infer verify`"
    journal = check.attempt(functools.partial(read_journal, check.run.folder, hint)) if predictions else None
    for name, entry in predictions.items():
        count = _check_blocks(check, name, entry["probability"], journal)
        check.note(f"{name}: {count} blocks, {entry.get('foreground_voxels')} voxels of foreground")
        for kind in ("swc", "swc_voxel"):
            _check_tree(check, entry.get(kind), entry.get("sha256", {}).get(kind))


def _read_predictions(folder: Path) -> dict[str, Any]:
    """The entries of predictions.json; InputError for one of whose files the name leads out of the folder."""
    hint = "make it again with `hpc-neuro infer`"
    predictions = read_predictions(folder, hint, compare=False)
    for entry in predictions.values():
        for kind in ("probability", "swc", "swc_voxel"):
            if entry.get(kind) is not None:
                files.resolve_inside(folder, entry[kind], folder / _PREDICTIONS, hint)
    return predictions


def _check_weights(check: RunCheck) -> None:
    """Check the student's weights: `model` names their folder, or the folder of the training."""
    model = check.run.locate(check.config.get("model", ""))
    # A weights folder holds the file itself, the folder of a training holds it under best or last.
    weights = model / "model.safetensors"
    if not weights.is_file():
        weights = model / "weights" / check.config.get("weights", "best") / "model.safetensors"
    check.compare_file(weights, check.inputs.get("weights", ""), "weights")


def _check_tree(check: RunCheck, name: str | None, digest: str | None) -> None:
    """One tree of a prediction; None: nothing was traced."""
    if not name:
        return
    path = check.run.folder / name
    if digest:
        check.compare_file(path, digest, name, "SWC files")
    elif not path.is_file():
        check.fail(f"{name} is missing: {path} does not exist")
    else:
        check.skip(f"{name}  (no hash was recorded, so it is not compared)", "SWC files")


def _check_blocks(check: RunCheck, name: str, folder: str, journal: RunJournal | None) -> int:
    """Check that every block of a probability has its marker and the checksum in it; returns how many do."""
    out = check.run.folder
    # Each block has a marker with the checksum of what was read back after writing; "": it was skipped.
    markers: list[BlockMarker] = []
    if journal is not None:
        markers = check.attempt(functools.partial(read_markers, journal, name, "make it again")) or []
    digests: dict[Shape, str] = {marker.start: "" if marker.skipped else marker.sha256 for marker in markers}

    array = check.attempt(lambda: ome_zarr.open_level(out / folder), f"{out / folder} cannot be read")
    if array is None:
        return 0

    z, y, x = (int(n) for n in array.shape)
    block_z, block_y, block_x = (int(n) for n in array.chunk_layout.write_chunk.shape)
    blocks = list(tile_volume((z, y, x), (block_z, block_y, block_x)))
    sound = 0

    for block in run_folder.track_progress(blocks, f"{name}: blocks", unit="block"):
        box = block.write
        if box.start not in digests:
            check.fail(f"the block of {folder} at {box.start} was never finished: it has no record in {out / JOURNAL}")
            continue

        values = None if check.quick else check.attempt(functools.partial(ome_zarr.read_box, array, box))
        if values is not None and (fault := _find_block_fault(values, digests[box.start])):
            check.fail(f"the block of {folder} at {box.start} {fault}")
            continue
        sound += 1

    check.passed += sound
    return sound


def _find_block_fault(values: Array, digest: str) -> str:
    """What is wrong with the values of a block of this SHA-256 ("": skipped, so that it has no file); "" if nothing."""
    if not digest:
        return "was skipped as empty, but holds values" if values.any() else ""
    is_sound = hashlib.sha256(values.tobytes()).hexdigest() == digest
    return "" if is_sound else "does not have the checksum it was written with"


def check_trace(check: RunCheck) -> None:
    """The files of every stack: trees may have been corrected by a person, everything else is as it was written."""
    folder = check.run.folder
    index = check.read_json(folder / VERBS["trace"].artifacts[0]) or {}
    for name in index.get("stacks") or {}:
        source = folder / "entries" / f"{name}.json"
        entry = check.read_json(source) or {}
        for file, digest in (entry.get("files") or {}).items():
            path = files.resolve_inside(folder, file, source, "trace the stack again")
            if not path.is_file() or not file.startswith("swc/") or files.sha256(path) == digest:
                check.compare_file(path, digest, file, "files of stacks")
            elif check.attempt(functools.partial(swc.read, path), f"{path} is damaged") is not None:
                check.skip(f"{file} was changed since it was traced, and is not compared", "corrected trees")


def check_evaluate(check: RunCheck) -> None:
    """The store, the predictions, the means in metrics.json, and the report."""
    folders = {"predictions": check.config.get("predictions", "")}
    for name, seeds in check.config.get("compare", {}).items():
        folders |= {f"{name}.{number}": folder for number, folder in enumerate(seeds)}

    store = check.run.locate(check.config.get("store", ""))
    check.compare_file(store / _STORE, check.inputs.get("store", ""), "store")
    for name, folder in folders.items():
        check.compare_file(check.run.locate(folder) / _PREDICTIONS, check.inputs.get(name, ""), name)

    f1 = tolerance_key("f1", check.config.get("tolerance_vox", 4.0))
    metrics = check.read_json(check.run.folder / STAGES["evaluate"].index) or {}
    for method, mean in (metrics.get("mean") or {}).items():
        # The record keeps the means too, so an edited metrics.json is found.
        recorded = check.record["summary"]["mean"].get(method)
        if check.compare(f"the mean of {method} in metrics.json", mean, recorded):
            keys = [key for key in ("dice", "cldice", "hd95_um", f1, "esa") if key in mean]
            check.note(f"{method}: " + ", ".join(f"{key} {mean[key]:.3f}" for key in keys))

    for name in STAGES["evaluate"].artifacts[1:]:
        if not (check.run.folder / name).is_file():
            check.fail(f"{name} is missing: {check.run.folder / name} does not exist")


def check_demo(check: RunCheck) -> None:
    """The files that the demo copied to the top of its folder must be those that its stages wrote."""
    evaluate, infer = (check.run.folder / str(STAGES[stage].folder) for stage in ("evaluate", "infer"))
    # A copy that differs from its source was edited, or belongs to another run.
    copies = {evaluate / name: name for name in STAGES["evaluate"].artifacts}
    copies |= {path: path.relative_to(infer).as_posix() for path in sorted((infer / "swc").rglob("*.swc"))}

    for source, name in copies.items():
        if source.is_file():
            check.compare_file(check.run.folder / name, files.sha256(source), name)


# --- Parts that several verbs share ---


def _check_volumes(check: RunCheck, prefix: str, skip: Collection[str] = ()) -> None:
    """The volumes that a run read from its store must still be in it, unchanged.

    prefix: of the names of volumes among the inputs. skip: inputs that are no volumes.
    """
    path = check.run.locate(check.config["store"]) / _STORE
    if not path.is_file():
        check.fail(f"the store is missing: {path} does not exist")
        return

    volumes = (check.read_json(path) or {"volumes": {}})["volumes"]
    for name, digest in check.inputs.items():
        is_volume = name.startswith(prefix) and not name.startswith("image ") and name not in (*skip, "weights")
        if is_volume:
            volume = name.removeprefix(prefix)
            check.compare(f"volume {volume} of {path.parent}", volumes.get(volume, {}).get("digest", "absent"), digest)


def _check_teacher(check: RunCheck, identity: Mapping[str, str]) -> None:
    """The teacher's weights, when their file is known: named by path, or part of the package."""
    check.note(f"teacher {identity['name']}  {shorten(identity['sha256'])}")
    teacher = check.config.get("teacher") or {}

    if teacher.get("weights"):
        # The config belongs to the run's start folder, not to a folder of the chain.
        weights = RunRecord("", Path(), check.record).locate(teacher["weights"])
        # fetch-teacher and `hpc-neuro teacher` leave a folder, whose note names the file.
        if weights.is_dir():
            weights = weights / str((check.read_json(weights / NOTE) or {}).get("file", "weights"))
        check.compare_file(weights, identity["sha256"], "teacher weights")

    elif str(teacher.get("model")).startswith("bundled"):
        assets = Path(str(importlib.resources.files("hpc_neuro"))) / "assets"
        bundled = {files.sha256(path) for path in assets.glob("*.safetensors")}
        if identity["sha256"] in bundled:
            check.passed += 1
        else:
            check.fail(
                f"no bundled teacher has the recorded SHA-256 {shorten(identity['sha256'])}: the package was changed"
            )
