"""The verb `demo`: the whole pipeline on synthetic neurons, or on a folder of your own image + SWC pairs."""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from hpc_neuro.core import files, run_folder
from hpc_neuro.core.constants import EXIT_DONE, EXIT_FAILURES
from hpc_neuro.core.image_names import is_system_file
from hpc_neuro.core.image_settings import GivenChannel, GivenRange, GivenVoxelSize
from hpc_neuro.core.schema import ConfigError, InputError, config, load
from hpc_neuro.core.stop_signals import until_stopped
from hpc_neuro.data.synthetic import SyntheticConfig
from hpc_neuro.metrics.metric import tolerance_key
from hpc_neuro.metrics.score_file import read_scores
from hpc_neuro.models.config import SavedStudent, TeacherConfig
from hpc_neuro.models.student_folder import find_student, read_contrast
from hpc_neuro.pipeline import STAGES

# The stages are imported when they run: a config error answers within a second.
if TYPE_CHECKING:
    from hpc_neuro.evaluate import EvaluateConfig

log = logging.getLogger(__name__)
CROP = (16, 96, 96)
"""[voxel] Size of the training crops, z y x."""
SYNTHETIC_STEPS, SYNTHETIC_BATCH = 400, 2
"""Training steps and crops per step on synthetic neurons."""
REAL_STEPS, REAL_BATCH = 1500, 4
"""Training steps and crops per step on the user's own neurons."""
FINE_TUNING_STEPS = 400
"""Training steps of a student that was trained before."""


@config
class DemoConfig:
    """What the demo runs on and for how long."""

    out: Path = Path("runs/demo")
    """Folder for everything; each stage has a folder of its own inside."""
    data: Path | None = None
    """Folder of image + SWC pairs of the same stem, and an optional meta.json; none: synthetic neurons are made."""
    voxel_size: GivenVoxelSize | None = None
    """[um] z,y,x of all images in `data`; none: as meta.json or the files say."""
    channel: GivenChannel | None = None
    """Channel of the images in `data` that have several, from 0."""
    range: GivenRange | None = None
    """Brightness that becomes 0 and 1 in all images in `data`; none: measured in each."""
    test: list[str] = Field(default_factory=list)
    """Neurons held out of training; empty: every fifth in order, the fourth first (of three or fewer, the last)."""
    init: Path | None = None
    """Student to go on from: `bundled`, or the folder of a run; none: a new one. The network then has its form, and no
    teacher takes part."""
    steps: int | None = Field(default=None, ge=1)
    """Training steps; none: 400 on synthetic neurons and from `init`, 1500 on your own neurons."""
    teacher: TeacherConfig = Field(default_factory=TeacherConfig)
    """As in precompute and train."""
    synthetic: SyntheticConfig = Field(default_factory=SyntheticConfig)
    """The neurons that are made when there is no `data`."""
    prepare: list[str] = Field(default_factory=list)
    """More `key=value` for the stage prepare."""
    precompute: list[str] = Field(default_factory=list)
    """More `key=value` for the stage precompute."""
    train: list[str] = Field(default_factory=list)
    """More `key=value` for the stage train."""
    infer: list[str] = Field(default_factory=list)
    """More `key=value` for the stage infer."""
    evaluate: list[str] = Field(default_factory=list)
    """More `key=value` for the stage evaluate."""

    def __post_init__(self) -> None:
        if self.data is None and self.test:
            raise ValueError("test: synthetic neurons are held out by themselves; give `data` to choose")
        given = [key for key in ("voxel_size", "channel", "range") if getattr(self, key) is not None]
        if self.data is None and given:
            raise ValueError(f"{', '.join(given)}: only your own images need it; give their folder with data=FOLDER")


def forecast(cfg: DemoConfig) -> list[str]:
    """Check the keys of every stage and the data of the first one; a later stage checks its input when it starts."""
    # A typing error in a key of the last stage must not appear after an hour of training.
    _check_keys(cfg)
    if (cfg.out / "swc").exists() and not (cfg.out / "run.json").exists():
        raise InputError(
            f"{cfg.out / 'swc'} exists, but no demo wrote it, and it would be replaced; choose another `out`"
        )

    if cfg.data is None:
        return [f"synthetic neurons, then {', '.join(list_stages(cfg))}, all under {cfg.out}"]

    held_out = choose_held_out(cfg, cfg.data)
    lines = STAGES["prepare"].load_module().forecast(stage_config(cfg, "prepare", cfg.data, held_out))
    return [f"held out: {', '.join(held_out)}; every other neuron is trained on", *lines, _describe_later_stages(cfg)]


def run(cfg: DemoConfig) -> int:
    """Run all stages in turn. A complete stage is skipped, so the same command resumes a demo that was killed."""
    forecast(cfg)
    start = time.monotonic()
    inputs = {"data": digest_pairs(cfg.data) if cfg.data else "synthetic"}
    # A report that was deleted is made again.
    is_whole = (cfg.out / "report.html").exists() and not _list_damaged_stages(cfg)

    with run_folder.start("demo", cfg, cfg.out, inputs, whole=is_whole) as record:
        if record.complete:
            _log_result(cfg)
            return 0

        # Only the stages that run are numbered: the user's own data needs no synthetic neurons.
        names = list_stages(cfg) if cfg.data else ["synthetic", *list_stages(cfg)]
        # Synthetic neurons are written where the user's own would be read from.
        data = cfg.data or cfg.out / "raw"
        left_out: list[str] = []
        for number, name in enumerate(until_stopped(names), start=1):
            label = f"[{number}/{len(names)}] {name}"
            code = _run_stage(cfg, name, label, data)
            # Images that cannot be used are left out of a store, and the others go on.
            if code == EXIT_FAILURES and name == "prepare":
                left_out = list(run_folder.read_record(cfg.out / "store", "the stage runs again")["failures"])
            elif code:
                record.record["exit"] = code
                log.error("demo: %s ended with exit code %d; the same command resumes there", name, code)
                return code

        summary = _publish(cfg, choose_held_out(cfg, data))
        outputs = [cfg.out / name for name in STAGES["evaluate"].artifacts]
        outputs += sorted(path for path in (cfg.out / "swc").rglob("*") if path.is_file())
        record.finish({**summary, "seconds": round(time.monotonic() - start)}, left_out, outputs)

    _log_result(cfg)
    for line in left_out:
        log.error("left out: %s", line)
    return EXIT_FAILURES if left_out else EXIT_DONE


def _describe_later_stages(cfg: DemoConfig) -> str:
    """What follows the first stage, and how long the longest one is, in a line."""
    assert cfg.data is not None
    train = stage_config(cfg, "train", cfg.data)
    steps, batch = files.format_count(train.optim.steps, "step"), files.format_count(train.optim.batch, "crop")
    size = " x ".join(map(str, train.crop.size))
    return (
        f"then {', '.join(list_stages(cfg)[1:])}; train does {steps} of {batch} of {size} voxels, and prints the time "
        "that is left"
    )


def list_stages(cfg: DemoConfig) -> list[str]:
    """The stages that run. Features of a teacher are of use to a new student alone."""
    return [name for name in STAGES if cfg.init is None or name != "precompute"]


def stage_config(cfg: DemoConfig, name: str, data: Path, held_out: Sequence[str] = ()) -> Any:
    """The config of one stage: the folders under `out` and the demo's values, then the user's overrides.

    data: folder of the image + SWC pairs.
    """
    stage = STAGES[name]
    values: dict[str, Any] = {**stage.folders_under(cfg.out, present=STAGES)}

    if name == "prepare":
        values |= {"images": data, "split.test": held_out}
        stated = {"voxel_size": cfg.voxel_size, "channel": cfg.channel, "range": cfg.range}
        values |= {key: value for key, value in stated.items() if value is not None}
        # A student that was trained before must see what it saw then.
        if cfg.init is not None:
            values["contrast"] = read_contrast(_read_student(cfg.init).extra)
    elif name == "precompute":
        # The demo shows the pipeline, also where a teacher is of no use to the user's neurons.
        values |= {"teacher": cfg.teacher, "gate": "report"}
    elif name == "train":
        steps, batch = (SYNTHETIC_STEPS, SYNTHETIC_BATCH) if cfg.data is None else (REAL_STEPS, REAL_BATCH)
        values |= {"teacher": cfg.teacher, "crop.size": CROP}
        values |= {"optim.steps": cfg.steps or steps, "optim.batch": batch}
        if cfg.init is not None:
            values |= _continue_training(cfg.init, cfg.steps)

    return load(stage.load_config_class(), None, getattr(cfg, name), values)


def _continue_training(init: Path, steps: int | None) -> dict[str, Any]:
    """What `train` needs to go on from a student: its form and its crops. Raises InputError where there is none."""
    saved = _read_student(init)
    return {
        "init": init,
        "student": saved.student,
        "cache": None,
        "distill": None,
        "transfer.rule": "scratch",
        "crop.size": saved.extra["window"],
        "optim.steps": steps or FINE_TUNING_STEPS,
    }


def _read_student(init: Path) -> SavedStudent:
    return load(SavedStudent, find_student(init) / "student.yaml")


def choose_held_out(cfg: DemoConfig, data: Path) -> list[str]:
    """The neurons to test on, by the rule of the key `test`. Raises InputError when none is left to train on."""
    # Natural order, as people number their neurons: OP_2 before OP_10.
    # As `prepare` lists them: hidden files are no trees, and .SWC is as good as .swc.
    if not data.is_dir():
        raise InputError(f"{data} is no folder; give data=FOLDER with pairs of an image and an SWC of the same stem")
    trees = [path for path in data.iterdir() if path.suffix.lower() == ".swc"]
    names = sorted((path.stem for path in trees if not is_system_file(path)), key=run_folder.natural_key)
    if unknown := [name for name in cfg.test if name not in names]:
        raise ConfigError(
            f"test: {data} has no {', '.join(unknown)}.swc; it has {', '.join(names) or 'no trees at all'}"
        )

    if not names:
        raise InputError(
            f"{data} holds no SWC tree; put each tree beside its image under the same stem (a.tif, a.swc), "
            f"or trace the images without labels: hpc-neuro trace {files.quote_path(data)}"
        )

    held_out = cfg.test or (names[3::5] if len(names) > 3 else names[-1:])
    if len(names) - len(held_out) < 1:
        raise InputError(
            f"{data} has {files.format_count(len(names), 'SWC tree')}, and {len(held_out)} would be held out; add at "
            "least one more image + SWC pair of the same stem to train on"
        )
    return held_out


def digest_pairs(data: Path) -> str:
    """Digest of a folder of pairs: names and sizes of all files, and the bytes of those that are no images."""
    paths = [path for path in sorted(data.iterdir()) if not is_system_file(path)]
    facts = []
    for path in paths:
        size = path.is_file() and path.stat().st_size
        content = files.sha256(path) if path.suffix in (".swc", ".json") else ""
        facts.append([path.name, size, content])
    return files.sha256_json(facts)


def _check_keys(cfg: DemoConfig) -> None:
    """Raise ConfigError with the faults of all stages, so that none appears only when its stage starts."""
    faults = []
    for name in list_stages(cfg):
        try:
            stage_config(cfg, name, cfg.data or cfg.out / "raw")
        except ConfigError as error:
            faults.append(str(error))

    if faults:
        raise ConfigError("\n".join(faults))


def _run_stage(cfg: DemoConfig, name: str, label: str, data: Path) -> int:
    """Run one stage and log how long it took; returns its exit code."""
    log.info("%s ...", label)
    start = time.monotonic()

    if name == "synthetic":
        _make_neurons(data, cfg.synthetic)
        code = 0
    else:
        stage_cfg = stage_config(cfg, name, data, choose_held_out(cfg, data))
        code = int(STAGES[name].load_module().run(stage_cfg))

    log.info("%s done in %.0f s", label, time.monotonic() - start)
    return code


def _list_damaged_stages(cfg: DemoConfig) -> list[str]:
    """The stages that left no readable record, or whose outputs are not as they were written."""
    damaged = []
    for name in list_stages(cfg):
        folder = cfg.out / str(STAGES[name].folder)
        try:
            record = run_folder.read_record(folder, "the stage runs again")
        except InputError:
            damaged.append(name)
            continue
        if run_folder.list_damaged(folder, record):
            damaged.append(name)
    return damaged


def _make_neurons(folder: Path, cfg: SyntheticConfig) -> None:
    from hpc_neuro.data.synthetic import write_dataset

    if folder.exists():
        return
    with files.atomic(folder) as part:
        part.mkdir()
        write_dataset(part, cfg)


def _publish(cfg: DemoConfig, held_out: Sequence[str]) -> dict[str, Any]:
    """Put the results at the top of `out`: metrics, report and trees as copies, probabilities as links.

    Returns the means that are printed, by method.
    """
    for name in STAGES["evaluate"].artifacts:
        with files.atomic(cfg.out / name) as part:
            shutil.copyfile(cfg.out / "evaluate" / name, part)
    with files.atomic(cfg.out / "swc") as part:
        shutil.copytree(cfg.out / "infer" / "swc", part)

    # Probabilities are large: a link is enough.
    for volume in held_out:
        link = cfg.out / f"{volume}.ome.zarr"
        # A volume that was left out has none.
        if not link.exists() and (cfg.out / "infer" / link.name).exists():
            link.symlink_to(Path("infer") / link.name)

    means = _read_means(cfg)
    return {method: {name: mean[name] for name in _headline_metrics(cfg)} for method, mean in means.items()}


def _headline_metrics(cfg: DemoConfig) -> dict[str, str]:
    """Metrics of the closing table: key in metrics.json -> what is printed."""
    # The tolerance is part of the key, so it is read from the config that evaluate ran with.
    evaluate: EvaluateConfig = stage_config(cfg, "evaluate", cfg.data or cfg.out / "raw")
    tolerance = evaluate.tolerance_vox
    return {
        "dice": "Dice of the foreground",
        tolerance_key("f1", tolerance): f"F1 of the tree at {tolerance:g} voxel{'s' * (tolerance != 1)}",
        "esa": "ESA, voxels (lower is better)",
        "hd95_um": "HD95, micrometers (lower is better)",
    }


def _read_means(cfg: DemoConfig) -> dict[str, dict[str, float]]:
    """Means over the held-out neurons, by method: the model, and Otsu's threshold where it was scored."""
    # Seeds and other methods that `compare` adds are in the report, not in this table.
    means = read_scores(cfg.out, "give the same command again")["mean"]
    return {method: means[method] for method in ("model", "otsu") if method in means}


def _log_result(cfg: DemoConfig) -> None:
    means = _read_means(cfg)
    titles = {"model": "model", "otsu": "Otsu"}

    log.info("\n%-38s" + " %8s" * len(means), "held-out neurons, mean", *(titles[method] for method in means))
    for name, text in _headline_metrics(cfg).items():
        log.info("%-38s" + " %8.3f" * len(means), text, *(mean[name] for mean in means.values()))
    log.info("report: %s", (cfg.out / "report.html").resolve())
