"""Neuron segmentation and tracing in light-microscopy volumes: the Python API.

    import hpc_neuro

    volume = hpc_neuro.open_volume("brain.tif")
    crop = volume[hpc_neuro.Box((0, 0, 0), (64, 128, 128))]

    trees = hpc_neuro.trace("brain.tif", voxel_size=(1.0, 0.33, 0.33))
    hpc_neuro.write_swc("neuron.swc", trees[0], unit="voxel")

    probability = hpc_neuro.predict("brain.tif", "runs/mine/train")
    trees = hpc_neuro.trace_probability(probability, (1.0, 0.33, 0.33))

    tree = hpc_neuro.read_swc("neuron.swc")
    print(hpc_neuro.score(tree, "gold.swc")["f1"])

    cfg = hpc_neuro.PrepareConfig(images="my_neurons", out="runs/store")
    exit_code = hpc_neuro.run_prepare(cfg)

Every verb of the command line has its config class and a function `run_VERB(cfg)` that returns an exit code. A name is
imported when it is first used, so that importing `hpc_neuro` takes milliseconds and no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from hpc_neuro.pipeline import VERBS

# Type checkers and editors read these imports; at run time `__getattr__` does the same on demand.
if TYPE_CHECKING:
    from hpc_neuro.api import predict, trace
    from hpc_neuro.core.geometry import Box
    from hpc_neuro.core.morphology import Tree
    from hpc_neuro.core.schema import ConfigError, InputError
    from hpc_neuro.data.formats import Volume, open_volume
    from hpc_neuro.data.swc import read as read_swc
    from hpc_neuro.data.swc import write as write_swc
    from hpc_neuro.demo import DemoConfig
    from hpc_neuro.demo import run as run_demo
    from hpc_neuro.evaluate import EvaluateConfig
    from hpc_neuro.evaluate import run as run_evaluate
    from hpc_neuro.infer import InferConfig
    from hpc_neuro.infer import run as run_infer
    from hpc_neuro.precompute import PrecomputeConfig
    from hpc_neuro.precompute import run as run_precompute
    from hpc_neuro.prepare import PrepareConfig
    from hpc_neuro.prepare import run as run_prepare
    from hpc_neuro.score_tool import score
    from hpc_neuro.search import SearchConfig
    from hpc_neuro.search import run as run_search
    from hpc_neuro.teacher.adapt import TeacherContinueConfig
    from hpc_neuro.teacher.adapt import run as run_teacher_continue
    from hpc_neuro.teacher.train import TeacherTrainConfig
    from hpc_neuro.teacher.train import run as run_teacher_train
    from hpc_neuro.trace_stacks import TraceStacksConfig
    from hpc_neuro.trace_stacks import run as run_trace
    from hpc_neuro.tracing import TraceConfig
    from hpc_neuro.tracing import trace as trace_probability
    from hpc_neuro.train import TrainConfig
    from hpc_neuro.train import run as run_train

_HOMES = {
    "Box": ("hpc_neuro.core.geometry", "Box"),
    "ConfigError": ("hpc_neuro.core.schema", "ConfigError"),
    "InputError": ("hpc_neuro.core.schema", "InputError"),
    "TraceConfig": ("hpc_neuro.tracing", "TraceConfig"),
    "Tree": ("hpc_neuro.core.morphology", "Tree"),
    "Volume": ("hpc_neuro.data.formats", "Volume"),
    "open_volume": ("hpc_neuro.data.formats", "open_volume"),
    "predict": ("hpc_neuro.api", "predict"),
    "read_swc": ("hpc_neuro.data.swc", "read"),
    "score": ("hpc_neuro.score_tool", "score"),
    "trace": ("hpc_neuro.api", "trace"),
    "trace_probability": ("hpc_neuro.tracing", "trace"),
    "write_swc": ("hpc_neuro.data.swc", "write"),
}
"""Public name -> module and name in it."""
# Each verb with a config adds its config class and its function.
_HOMES |= {verb.config: (verb.module, verb.config) for verb in VERBS.values() if verb.config}
_HOMES |= {verb.function: (verb.module, "run") for verb in VERBS.values() if verb.config}

__all__ = [
    "Box",
    "ConfigError",
    "DemoConfig",
    "EvaluateConfig",
    "InferConfig",
    "InputError",
    "PrecomputeConfig",
    "PrepareConfig",
    "SearchConfig",
    "TeacherContinueConfig",
    "TeacherTrainConfig",
    "TraceConfig",
    "TraceStacksConfig",
    "TrainConfig",
    "Tree",
    "Volume",
    "open_volume",
    "predict",
    "read_swc",
    "run_demo",
    "run_evaluate",
    "run_infer",
    "run_precompute",
    "run_prepare",
    "run_search",
    "run_teacher_continue",
    "run_teacher_train",
    "run_trace",
    "run_train",
    "score",
    "trace",
    "trace_probability",
    "write_swc",
]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used (PEP 562)."""
    if name not in _HOMES:
        raise AttributeError(f"module 'hpc_neuro' has no attribute {name!r}")
    # The value is stored in the module, so that Python calls this function once per name.
    module, attribute = _HOMES[name]
    value = getattr(importlib.import_module(module), attribute)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
