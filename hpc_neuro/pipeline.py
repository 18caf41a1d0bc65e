"""The table of verbs: one row for each command of `hpc-neuro`, in the order of the pipeline.

Whatever depends on the set of verbs, on their order or on the folders that link them reads this table: the command
line, `demo`, `history`, the provenance in reports, and `python -m launch`. Modules are named by strings and imported
when a verb is used, so that importing the table imports no verb.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

from hpc_neuro.core.schema import ConfigError


@dataclass(frozen=True)
class Input:
    """A config key that names the folder of another verb's run."""

    key: str
    verb: str
    """The verb that writes the folder."""
    in_chain: Literal["always", "if present", "never"] = "always"
    """When a chain of verbs under one root sets the key to the folder of `verb` under that root."""


@dataclass(frozen=True)
class Verb:
    """One command of `hpc-neuro`."""

    name: str
    """One word, or two: several verbs may begin with the same word."""
    module: str
    """Has `run(cfg)` and `forecast(cfg)`; `main(arguments)` where `config` is None."""
    summary: str
    config: str | None = None
    """Name of the config class in `module`; None: the verb reads its arguments itself."""
    positional: str | None = None
    """Key that plain words after the verb are put into, as a list; None: the verb takes no plain words but a config."""
    main_keys: str = ""
    """The dotted keys that people set most, separated by spaces: `--help` lists them, `--help all` lists every key."""
    commands: tuple[tuple[str, str], ...] = ()
    """(subcommand, module with `main(arguments)`) pairs."""
    folder: str | None = None
    """Folder under the root of a whole pipeline; None: the verb is no stage of the pipeline."""
    inputs: tuple[Input, ...] = ()
    """Keys that name folders of other verbs, in the order in which provenance follows them."""
    artifacts: tuple[str, ...] = ()
    """Files that every finished run has in its folder; the first one is the index that later verbs open."""
    history_check: str | None = None
    """Function in `hpc_neuro.history.checks` that verifies a run."""
    launchable: bool = False
    """Whether `python -m launch` submits it; the site's config then has a section of this name."""
    divisible: bool = False
    """Whether a job array may divide its volumes among tasks (the config has the key `share`)."""
    ranks: Literal["torch", "mpi"] | None = None
    """How several processes find each other; None: the verb runs in one process."""

    @property
    def function(self) -> str:
        """Name of its function in the Python API."""
        return f"run_{self.name.replace(' ', '_')}"

    @property
    def index(self) -> str:
        """Name of the index file in the folder of a run."""
        return self.artifacts[0]

    def load_module(self) -> ModuleType:
        """Import the verb's module."""
        return importlib.import_module(self.module)

    def load_config_class(self) -> Any:
        """Import the verb's config class."""
        assert self.config is not None, f"{self.name} has no config class"
        return getattr(self.load_module(), self.config)

    def sort_words(self, words: Sequence[str]) -> tuple[Path | None, list[str], dict[str, Any]]:
        """The config file, the `key=value` words, and the values that plain words stand for. Raises ConfigError."""
        if self.positional is None:
            # A config file comes first; it is told from a key by the missing `=`.
            has_config = bool(words) and "=" not in words[0]
            return Path(words[0]) if has_config else None, list(words[1:] if has_config else words), {}

        # A file may have `=` in its name.
        plain = [word for word in words if "=" not in word or Path(word).exists()]
        keys = [word for word in words if word not in plain]
        configs = [word for word in plain if word.lower().endswith((".yaml", ".yml"))]
        if len(configs) > 1:
            raise ConfigError(f"{' and '.join(configs)} are two configs; give one")
        plain = [word for word in plain if word not in configs]
        return Path(configs[0]) if configs else None, keys, {self.positional: plain} if plain else {}

    def folders_under(self, root: Path, present: Iterable[str] = ()) -> dict[str, Path]:
        """Folders of a stage under the root of a whole pipeline, by config key: `out` and the inputs.

        present: stages that run before this one; an input marked "if present" is included if its verb is among them or
        its folder exists.
        """
        assert self.folder is not None, f"{self.name} is no stage of the pipeline"
        # `out` comes first, as in the configs that people write.
        folders = {"out": root / self.folder}

        for item in self.inputs:
            folder = root / str(VERBS[item.verb].folder)
            # What is optional must exist, or be made by an earlier verb, before a config may name it.
            is_present = item.verb in present or folder.exists()
            if item.in_chain == "always" or (item.in_chain == "if present" and is_present):
                folders[item.key] = folder

        return folders


# Rows are in the order of `hpc-neuro --help`; the stages among them, in the order in which they run.
_ROWS = (
    # --- Stages ---
    Verb(
        name="prepare",
        module="hpc_neuro.prepare",
        config="PrepareConfig",
        summary="images + SWC trees -> training store",
        main_keys=(
            "images manifest out voxel_size swc_unit channel range axes radius tube beyond_root "
            "split.test split.val split.test_fraction split.val_fraction misaligned"
        ),
        folder="store",
        artifacts=("dataset.json",),
        history_check="check_prepare",
        launchable=True,
        divisible=True,
    ),
    Verb(
        name="precompute",
        module="hpc_neuro.precompute",
        config="PrecomputeConfig",
        summary="training store -> teacher feature cache",
        main_keys=(
            "store out teacher.model teacher.weights splits views layers augment_views stride_v scale "
            "pca dtype tile batch"
        ),
        folder="cache",
        inputs=(Input("store", "prepare"),),
        artifacts=("manifest.json",),
        history_check="check_precompute",
        launchable=True,
        # Ranks draw slabs of slices from one counter, so a job array would add nothing.
        ranks="mpi",
    ),
    Verb(
        name="train",
        module="hpc_neuro.train",
        config="TrainConfig",
        summary="store + cache -> 3D student",
        main_keys=(
            "store cache out init teacher.model teacher.weights student.size crop.size "
            "optim.steps optim.batch optim.lr losses distill engine.stage tracker.wandb seed"
        ),
        folder="train",
        inputs=(Input("store", "prepare"), Input("cache", "precompute")),
        artifacts=("weights/best/model.safetensors", "weights/last/model.safetensors"),
        history_check="check_train",
        launchable=True,
        ranks="torch",
    ),
    Verb(
        name="infer",
        module="hpc_neuro.infer",
        config="InferConfig",
        positional="images",
        summary="student + volumes -> probabilities and SWC trees; verify OUT, serve OUT",
        main_keys=(
            "model images store split out voxel_size channel range root inputs block "
            "threshold trees trace.root_snap trace.min_cable flips"
        ),
        commands=(("verify", "hpc_neuro.infer.verify"), ("serve", "hpc_neuro.infer.viewer")),
        folder="infer",
        inputs=(Input("model", "train"), Input("store", "prepare")),
        artifacts=("predictions.json",),
        history_check="check_infer",
        launchable=True,
        divisible=True,
        ranks="mpi",
    ),
    Verb(
        name="evaluate",
        module="hpc_neuro.evaluate",
        config="EvaluateConfig",
        summary="predictions + truth -> metrics and report",
        main_keys=(
            "store predictions out compare split train otsu threshold tolerance_vox tolerance_um draws pictures"
        ),
        folder="evaluate",
        inputs=(
            Input("predictions", "infer"),
            Input("compare", "infer", in_chain="never"),
            Input("train", "train", in_chain="if present"),
            Input("store", "prepare"),
        ),
        artifacts=("metrics.json", "metrics.csv", "report.html"),
        history_check="check_evaluate",
        launchable=True,
        divisible=True,
    ),
    # --- One stack in, trees out ---
    Verb(
        name="trace",
        module="hpc_neuro.trace_stacks",
        config="TraceStacksConfig",
        positional="stacks",
        summary="image stacks -> trees (SWC), without labels",
        main_keys=(
            "out model voxel_size channel range root seeds axes dataset somas trace.metric trace.min_branch trace.gap "
            "trace.root_is_end"
        ),
        artifacts=("trace.json", "trace.html"),
        history_check="check_trace",
    ),
    # --- Verbs that run other verbs ---
    Verb(
        name="search",
        module="hpc_neuro.search",
        config="SearchConfig",
        summary="a study's trials -> table, figures, best config",
        main_keys=(
            "out space recipe train.config train.keys infer.keys evaluate.keys sampler trials "
            "objective.key objective.goal asha concurrent requeue"
        ),
    ),
    Verb(
        name="demo",
        module="hpc_neuro.demo",
        config="DemoConfig",
        summary="all of the above on a small data set",
        main_keys=(
            "out data voxel_size channel range test init steps teacher.model teacher.weights synthetic.volumes "
            "prepare precompute train infer evaluate"
        ),
        artifacts=("metrics.json", "metrics.csv", "report.html"),
        history_check="check_demo",
        launchable=True,
    ),
    # --- Teachers of one's own ---
    Verb(
        name="teacher train",
        module="hpc_neuro.teacher.train",
        config="TeacherTrainConfig",
        summary="photographs -> a 2D teacher, where no hub can be reached",
        main_keys=(
            "photos out objective patch depth side held about license task.crop task.mask optim.minutes optim.steps "
            "optim.batch judge.store judge.volumes"
        ),
        artifacts=("teacher.json", "teacher.safetensors"),
    ),
    Verb(
        name="teacher continue",
        module="hpc_neuro.teacher.adapt",
        config="TeacherContinueConfig",
        positional="volumes",
        summary="a 2D teacher goes on learning on volumes without labels",
        main_keys=(
            "volumes teacher.model teacher.weights out splits channel contrast windows photos photo_share about "
            "optim.minutes optim.steps optim.lr judge.store judge.volumes"
        ),
        artifacts=("teacher.json", "teacher.safetensors"),
    ),
    # --- Tools, which read their arguments themselves ---
    Verb(
        name="teacher probe",
        module="hpc_neuro.teacher.probe",
        summary="is a teacher worth anything on the volumes of a store",
    ),
    Verb(
        name="fetch-teacher",
        module="hpc_neuro.fetch_teacher",
        summary="a teacher's weights into a folder, for offline nodes",
    ),
    Verb(
        name="cache",
        module="hpc_neuro.precompute.cache_tool",
        summary="verify and repair a feature cache, or say what it holds",
    ),
    Verb(
        name="doctor",
        module="hpc_neuro.doctor",
        summary="what this machine has and lacks; with teacher= and store=: as `teacher probe`",
    ),
    Verb(name="info", module="hpc_neuro.info", summary="what a volume file holds"),
    Verb(name="swc", module="hpc_neuro.swc_tool", summary="check, fix, convert or transform SWC files"),
    Verb(
        name="score",
        module="hpc_neuro.score_tool",
        summary="agreement of two trees: F1, precision and recall of cable, ESA, DSA, PDS",
    ),
    Verb(name="runs", module="hpc_neuro.runs", summary="list run folders: state, best scores, hours, code version"),
    Verb(name="history", module="hpc_neuro.history", summary="the chain behind a result, and whether it is whole"),
)

VERBS = {verb.name: verb for verb in _ROWS}
"""Every verb by its name, in the order of `hpc-neuro --help`."""
STAGES = {verb.name: verb for verb in _ROWS if verb.folder is not None}
"""The verbs that a whole pipeline consists of, by name, in the order in which they run."""
LAUNCHABLE = {verb.name: verb for verb in _ROWS if verb.launchable}
"""The verbs that `python -m launch` submits."""


def find_verb(words: Sequence[str]) -> tuple[Verb | None, list[str]]:
    """The verb that a command begins with, and the words after it; None where there is no such verb."""
    for length in (2, 1):
        verb = VERBS.get(" ".join(words[:length]))
        if verb is not None:
            return verb, list(words[length:])
    return None, list(words)


def stages_from(first: str) -> tuple[str, ...]:
    """Names of the stage `first` and of all stages after it."""
    names = list(STAGES)
    return tuple(names[names.index(first) :])
