"""The verb `demo`: the whole pipeline on synthetic neurons, or on a folder of your own image + SWC pairs."""

from __future__ import annotations

import json
import logging
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pydantic import Field

from hpc_neuro import evaluate, infer, precompute, prepare, train
from hpc_neuro.core import files, morphology, run_folder
from hpc_neuro.core.schema import ConfigError, InputError, config, load
from hpc_neuro.data.store import Store
from hpc_neuro.data.synthetic import SyntheticConfig, write_dataset
from hpc_neuro.models.teacher import TeacherConfig

log = logging.getLogger(__name__)
SHOWN = {
    "dice": "Dice of the foreground",
    "f1_4vox": "F1 of the tree at 4 voxels",
    "esa": "ESA, voxels (lower is better)",
    "hd95_um": "HD95, micrometres (lower is better)",
}
CROP = [16, 96, 96]
SYNTHETIC_STEPS, SYNTHETIC_BATCH = 250, 2
REAL_STEPS, REAL_BATCH = 1500, 4
STAGES = ("synthetic", "prepare", "precompute", "train", "infer", "evaluate")


@config
class DemoConfig:
    """What the demo runs on and for how long."""

    out: Path = Path("runs/demo")
    """Folder for everything; each stage has a folder of its own inside."""
    data: Path | None = None
    """Folder of image + SWC pairs of the same stem (and meta.json, if any); none: synthetic neurons are made."""
    test: list[str] = Field(default_factory=list)
    """Neurons held out of training; empty: every fifth in order, the fourth first (of three or fewer, the last)."""
    steps: int | None = Field(default=None, ge=1)
    """Training steps; none: as many as two cores do in the time that the README promises."""
    teacher: TeacherConfig = Field(default_factory=TeacherConfig)
    """As in precompute and train."""
    synthetic: SyntheticConfig = Field(default_factory=SyntheticConfig)
    """The neurons that are made when there is no `data`."""
    prepare: list[str] = Field(default_factory=list)
    """More `key=value` for the stage of this name; so for the next four."""
    precompute: list[str] = Field(default_factory=list)
    train: list[str] = Field(default_factory=list)
    infer: list[str] = Field(default_factory=list)
    evaluate: list[str] = Field(default_factory=list)

    def __post_init__(self) -> None:
        if self.data is None and self.test:
            raise ValueError("test: synthetic neurons are held out by themselves; give `data` to choose")


def forecast(cfg: DemoConfig) -> list[str]:
    """Check every stage's keys and the data of the first; later stages check what they read when it is there."""
    _check_keys(cfg)
    if (cfg.out / "swc").exists() and not (cfg.out / "run.json").exists():
        raise InputError(f"{cfg.out / 'swc'} is there, and of no demo: it would be replaced; choose another `out`")
    if cfg.data is None:
        return [f"synthetic neurons, then {', '.join(STAGES[1:])}, all under {cfg.out}"]
    held = _held_out(cfg, cfg.data)
    lines = prepare.forecast(_prepare_config(cfg, cfg.data, held))
    return [f"held out: {', '.join(held)}; every other neuron is trained on", *lines]


def _check_keys(cfg: DemoConfig) -> None:
    """Raises ConfigError with the faults of all stages, so that none shows only when its turn comes."""
    faults = []
    raw = cfg.data or cfg.out / "raw"
    stages: tuple[Callable[[], Any], ...] = (
        lambda: _prepare_config(cfg, raw, []),
        lambda: _precompute_config(cfg),
        lambda: _train_config(cfg),
        lambda: _infer_config(cfg),
        lambda: _evaluate_config(cfg),
    )
    for stage in stages:
        try:
            stage()
        except ConfigError as error:
            faults.append(str(error))
    if faults:
        raise ConfigError("\n".join(faults))


def run(cfg: DemoConfig) -> int:
    """Walk through all stages; a stage that is complete is passed over, so a killed demo goes on where it was."""
    forecast(cfg)
    begun = time.monotonic()
    inputs = {"data": _listed(cfg.data) if cfg.data else "synthetic"}
    with run_folder.start("demo", cfg, cfg.out, inputs, whole=(cfg.out / "report.html").exists()) as this:
        if this.complete:
            _say_result(cfg.out)
            return 0
        data = cfg.data or _stage("synthetic", lambda: _synthetic(cfg))
        held = _held_out(cfg, data)
        steps: dict[str, Callable[[], int]] = {
            "prepare": lambda: prepare.run(_prepare_config(cfg, data, held)),
            "precompute": lambda: precompute.run(_precompute_config(cfg)),
            "train": lambda: train.run(_train_config(cfg)),
            "infer": lambda: infer.run(_infer_config(cfg, Store(cfg.out / "store"))),
            "evaluate": lambda: evaluate.run(_evaluate_config(cfg)),
        }
        for name, step in steps.items():
            code: int = _stage(name, step)
            if code:
                log.error("demo: %s ended with exit code %d; the same command goes on from there", name, code)
                return code
        summary = _publish(cfg, held)
        this.finish({**summary, "seconds": round(time.monotonic() - begun)})
    _say_result(cfg.out)
    return 0


def _listed(data: Path) -> str:
    """Digest of what the folder of pairs holds: names, sizes, and the bytes of what is no image."""
    told = [p for p in sorted(data.iterdir()) if not p.name.startswith(".")]
    small = {".swc", ".json"}
    facts = [[p.name, p.is_file() and p.stat().st_size, files.sha256(p) if p.suffix in small else ""] for p in told]
    return files.sha256_json(facts)


def _stage(name: str, step: Callable[[], Any]) -> Any:
    place = f"[{STAGES.index(name) + 1}/{len(STAGES)}] {name}"
    log.info("%s ...", place)
    begun = time.monotonic()
    result = step()
    log.info("%s done in %.0f s", place, time.monotonic() - begun)
    return result


def _synthetic(cfg: DemoConfig) -> Path:
    folder = cfg.out / "raw"
    if not folder.exists():
        with files.atomic(folder) as part:
            part.mkdir()
            write_dataset(part, cfg.synthetic)
    return folder


def _held_out(cfg: DemoConfig, data: Path) -> list[str]:
    """The neurons to test on, by the rule `test` states. Raises InputError when there is nothing to train on."""
    trees = sorted((p.stem for p in data.glob("*.swc")), key=run_folder.natural) if data.is_dir() else []
    if unknown := [t for t in cfg.test if t not in trees]:
        raise ConfigError(
            f"test: {data} has no {', '.join(unknown)}.swc; it has {', '.join(trees) or 'no trees at all'}"
        )
    held = cfg.test or (trees[3::5] if len(trees) > 3 else trees[-1:])
    if len(trees) - len(held) < 1:
        raise InputError(
            f"{data} has {len(trees)} SWC trees, and {len(held)} of them are held out; "
            "at least one more image + SWC pair of the same stem is wanted to train on"
        )
    return held


def _prepare_config(cfg: DemoConfig, data: Path, held: list[str]) -> prepare.PrepareConfig:
    keys = [f"images={data}", f"out={cfg.out / 'store'}", f"split.test={json.dumps(held)}"]
    return load(prepare.PrepareConfig, None, [*keys, *cfg.prepare])


def _precompute_config(cfg: DemoConfig) -> precompute.PrecomputeConfig:
    keys = [f"store={cfg.out / 'store'}", f"out={cfg.out / 'cache'}", *_teacher_keys(cfg)]
    return load(precompute.PrecomputeConfig, None, [*keys, *cfg.precompute])


def _teacher_keys(cfg: DemoConfig) -> list[str]:
    return [f"teacher.{key}={value}" for key, value in asdict(cfg.teacher).items() if value is not None]


def _train_config(cfg: DemoConfig) -> train.TrainConfig:
    steps, batch = (SYNTHETIC_STEPS, SYNTHETIC_BATCH) if cfg.data is None else (REAL_STEPS, REAL_BATCH)
    keys = [f"store={cfg.out / 'store'}", f"cache={cfg.out / 'cache'}", f"out={cfg.out / 'train'}"]
    keys += [*_teacher_keys(cfg), f"optim.steps={cfg.steps or steps}"]
    keys += [f"optim.batch={batch}", f"crop.size={CROP}"]
    return load(train.TrainConfig, None, [*keys, *cfg.train])


def _infer_config(cfg: DemoConfig, store: Store | None = None) -> infer.InferConfig:
    """store: decides where the tracer may go from the root; without it only the keys are checked."""
    keys = [f"model={cfg.out / 'train'}", f"store={cfg.out / 'store'}", f"out={cfg.out / 'infer'}"]
    keys.append(f"trace.root_is_end={json.dumps(store is not None and _roots_are_ends(store))}")
    return load(infer.InferConfig, None, [*keys, *cfg.infer])


def _roots_are_ends(store: Store) -> bool:
    """Whether all trees of the training split start at an end of the cable (an axon enters there), not at a soma."""
    trees = [store[v].tree() for v in store.split("train")]
    return all(morphology.child_counts(t)[t.roots].max() < 2 for t in trees)


def _evaluate_config(cfg: DemoConfig) -> evaluate.EvaluateConfig:
    keys = [f"store={cfg.out / 'store'}", f"predictions={cfg.out / 'infer'}", f"out={cfg.out / 'evaluate'}"]
    return load(evaluate.EvaluateConfig, None, [*keys, f"train={cfg.out / 'train'}", *cfg.evaluate])


def _publish(cfg: DemoConfig, held: list[str]) -> dict[str, Any]:
    """Put what people look for at the top of `out`: metrics, report, trees (copies) and probabilities (links)."""
    for name in ("metrics.json", "metrics.csv", "report.html"):
        with files.atomic(cfg.out / name) as part:
            shutil.copyfile(cfg.out / "evaluate" / name, part)
    with files.atomic(cfg.out / "swc") as part:
        shutil.copytree(cfg.out / "infer" / "swc", part)
    for volume in held:
        link = cfg.out / f"{volume}.ome.zarr"
        if not link.exists():
            link.symlink_to(Path("infer") / link.name)
    mean: dict[str, Any] = files.read_json(cfg.out / "metrics.json", "run the demo again")["mean"]
    return {who: {k: mean[who][k] for k in SHOWN} for who in ("model", "otsu")}


def _say_result(out: Path) -> None:
    mean = files.read_json(out / "metrics.json", "run the demo again")["mean"]
    log.info("\n%-38s %8s %8s", "held-out neurons, mean", "model", "Otsu")
    for key, text in SHOWN.items():
        log.info("%-38s %8.3f %8.3f", text, mean["model"][key], mean["otsu"][key])
    log.info("report: %s", (out / "report.html").resolve())
