"""Which stacks a command names: files, folders of images and patterns, each with an id and its roots."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from hpc_neuro.core import files
from hpc_neuro.core.geometry import Point, Shape, VoxelSize
from hpc_neuro.core.image_names import find_clash
from hpc_neuro.core.image_settings import require_inside
from hpc_neuro.core.schema import ConfigError
from hpc_neuro.data import seeds
from hpc_neuro.data.formats import Volume, image_stem, open_volume
from hpc_neuro.data.image_list import expand_images
from hpc_neuro.data.remote_path import RemotePath
from hpc_neuro.trace_stacks.config import TraceStacksConfig


@dataclass(frozen=True)
class Stack:
    """One stack to trace."""

    id: str
    """Name of its results."""
    path: Path

    def open(self, cfg: TraceStacksConfig) -> Volume:
        """The image, without its voxels. Raises InputError."""
        return open_volume(self.path, channel=cfg.channel, axes=cfg.axes, dataset=cfg.dataset)

    def find_seed_file(self, cfg: TraceStacksConfig) -> Path | None:
        """The seed file that holds for the stack; None without one."""
        if cfg.root is not None:
            return None
        # Nothing is looked for beside an image in a remote store.
        if isinstance(self.path, RemotePath):
            return cfg.seeds
        return cfg.seeds or seeds.find_seed_file(self.path, image_stem(self.path) or self.path.name)

    def read_roots(self, cfg: TraceStacksConfig, shape: Shape) -> tuple[Point, ...]:
        """[voxel] z y x of the given roots; () without any. Raises InputError for one outside the image."""
        seed_file = self.find_seed_file(cfg)
        roots = seeds.read_seeds(seed_file) if seed_file else () if cfg.root is None else (cfg.root,)
        for root in roots:
            require_inside(root, shape, self.path, f" of {seed_file}" if seed_file else "")
        return roots


def choose_voxel_size(cfg: TraceStacksConfig, volume: Volume) -> VoxelSize | None:
    """[um] z y x as given, else as the file says; None where neither does."""
    return cfg.voxel_size or volume.voxel_size


def list_stacks(cfg: TraceStacksConfig) -> list[Stack]:
    """All stacks in the order of the command, in natural order within a folder. Raises ConfigError or InputError."""
    paths = list(dict.fromkeys(path for named in cfg.stacks for path in expand_images(named)))
    if len(paths) > 1 and (cfg.root is not None or cfg.seeds is not None):
        key = "root" if cfg.root is not None else "seeds"
        raise ConfigError(
            f"{key}= holds for one stack, and there are {len(paths)}; put a seed file NAME.marker beside each "
            "NAME.tif, or trace them one by one"
        )
    return [Stack(name, path) for name, path in zip(_name_stacks(paths), paths, strict=True)]


def _name_stacks(paths: list[Path]) -> list[str]:
    """An id for each path: its stem, and more of its path where two stems are equal. Raises ConfigError."""
    for make_name in (_stem, _full_name, _long_name):
        names = [make_name(path) for path in paths]
        repeated = [name for name, count in Counter(names).items() if count > 1]
        clash = find_clash(names)
        if not repeated and not clash:
            break

    if repeated:
        raise ConfigError(f"several stacks would be written as {repeated[0]}; trace them into different `out`")
    if clash:
        raise ConfigError(
            f"the stacks {clash[0]!a} and {clash[1]!a} {clash[2]}; rename one, or trace them into different `out`"
        )

    if unusable := [name for name in names if not files.is_plain_name(name)]:
        raise ConfigError(f"{unusable[0]!r} cannot be the name of a result; rename the stack")
    return names


def _stem(path: Path) -> str:
    return image_stem(path) or _resolve(path).name


def _full_name(path: Path) -> str:
    return _resolve(path).name.replace(".", "_")


def _long_name(path: Path) -> str:
    return f"{_resolve(path).parent.name}_{_full_name(path)}"


def _resolve(path: Path) -> Path:
    """The path without links; a link that leads round in circles keeps its name, and fails where it is opened."""
    try:
        return path.resolve()
    except RuntimeError:
        return path.absolute()
