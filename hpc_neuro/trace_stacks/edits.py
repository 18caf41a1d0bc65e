"""What a person changed in a tree that `trace` wrote, kept while the tracer goes on from it.

The person's tree is the result as far as it goes. Cable that the tracer finds beside it is added, and what the person
deleted is not found again. OUT/edits holds both, in voxels: ID.swc and ID.deleted.swc. Each states the SHA-256 of its
other lines, and ID.swc whether the other file exists, as nobody could make them anew.
"""

from __future__ import annotations

import hashlib
import logging
import re
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy.spatial import cKDTree

from hpc_neuro.core import files, morphology
from hpc_neuro.core.files import format_count
from hpc_neuro.core.geometry import Shape, VoxelSize
from hpc_neuro.core.morphology import Tree
from hpc_neuro.core.schema import InputError
from hpc_neuro.data import swc
from hpc_neuro.metrics.segments import SegmentIndex

log = logging.getLogger(__name__)
FOLDER = "edits"
"""Folder of OUT with the edited trees."""

_TOLERANCE = 4.0
"""[voxel] Cable so near to other cable is the same cable, as in the scores."""
_LEAST_INSIDE = 0.5
"""Share of the nodes of an edited tree that lie in the image."""
_LEAST_CABLE = 10.0
"""[voxel] Shorter cable is not added."""
_DIGEST = "sha256 of the other lines:"
"""What stands before the digest, in a comment."""
_WITH_DELETED = "with deleted cable in another file"
"""The comment of an edited tree beside which the deleted cable is."""


@dataclass(frozen=True)
class Edits:
    """What a person made of a traced image. Both are in voxels."""

    tree: Tree
    """The tree as the person left it; several trees are one forest."""
    deleted: Tree
    """What the tracer had found and the person removed."""


def read_edits(out: Path, name: str) -> Edits | None:
    """The edits of a stack that an earlier run collected; None without. Raises InputError for a damaged file."""
    tree, deleted = list_edit_files(out, name)
    if not tree.exists():
        return None
    if not deleted.exists() and f"# {_WITH_DELETED}\n".encode() in tree.read_bytes():
        raise InputError(
            f"{deleted} is missing, so that what was deleted would be traced again; put it back, or remove {tree} to "
            "trace without these edits"
        )
    return Edits(_read_part(tree), _read_part(deleted) if deleted.exists() else morphology.empty_tree())


def _read_part(path: Path) -> Tree:
    """A file of OUT/edits. One without a digest is taken as it is."""
    text = path.read_bytes()
    stated = re.search(rf"^# {_DIGEST} (.*)\n".encode(), text, re.MULTILINE)
    if stated is not None and stated[1].decode(errors="replace") != _hash_others(text):
        raise InputError(
            f"{path} is not as `trace` wrote it: it is damaged, or was edited (the tree to edit is in swc); remove its "
            f"line `# {_DIGEST}` to go on from it as it is, or remove the file to trace without these edits"
        )
    return swc.read(path)


def _write_edits(out: Path, name: str, edits: Edits, size: VoxelSize | None) -> None:
    """Write both files; a kill between them leaves no tree that asks for a file which does not exist."""
    tree, deleted = list_edit_files(out, name)
    has_deleted = len(edits.deleted) > 0
    if has_deleted:
        _write_part(deleted, edits.deleted, size, [f"cable deleted from {name}"])
    _write_part(tree, edits.tree, size, [f"edits of {name}", *([_WITH_DELETED] if has_deleted else [])])
    if not has_deleted:
        deleted.unlink(missing_ok=True)


def _write_part(path: Path, tree: Tree, size: VoxelSize | None, comments: list[str]) -> None:
    """Write a file of OUT/edits."""
    swc.write(path, tree, unit="voxel", voxel_size=size, comments=comments)
    text = path.read_bytes()
    files.write_text(path, f"# {_DIGEST} {_hash_others(text)}\n{text.decode()}")


def _hash_others(text: bytes) -> str:
    """SHA-256 of all lines but that of the digest."""
    lines = [line for line in text.splitlines(keepends=True) if not line.startswith(f"# {_DIGEST}".encode())]
    return hashlib.sha256(b"".join(lines)).hexdigest()


def list_edit_files(out: Path, name: str) -> tuple[Path, Path]:
    """The edited tree and the deleted cable of a stack, which need not exist."""
    return out / FOLDER / f"{name}.swc", out / FOLDER / f"{name}.deleted.swc"


def collect_edits(
    out: Path, name: str, shape: Shape, size: VoxelSize | None, checksums: dict[str, str], traced: Path
) -> Edits | None:
    """The edits of a stack, with what changed since the last run; None where nothing was ever changed.

    shape: of the image. checksums: of the files that the last run wrote, relative to `out`. traced: the tree that it
    wrote, in voxels. Raises InputError where both files of the tree were changed, or one cannot be read, or lies
    outside the image.
    """
    earlier = read_edits(out, name)
    changed = list_changed_trees(out, name, checksums)
    if not changed or not traced.exists():
        return earlier
    if len(changed) > 1:
        raise InputError(
            f"{changed[0]} and {changed[1]} were both changed, one edited tree is expected; delete the one that is "
            "not yours"
        )

    tree = _read_in_voxels(changed[0], traced, size)
    _require_inside(tree, changed[0], shape)

    # What was deleted earlier may have been drawn again.
    removed = swc.read(traced) if earlier is None else morphology.concatenate_trees([earlier.deleted, swc.read(traced)])
    edits = Edits(tree, _select_far(removed, tree))
    _write_edits(out, name, edits, size)
    log.info(
        "%s: %s was edited: %.0f voxels of cable are kept, %.0f deleted ones are not traced again",
        name,
        changed[0],
        morphology.length(edits.tree),
        morphology.length(edits.deleted),
    )
    return edits


def _read_in_voxels(path: Path, traced: Path, size: VoxelSize | None) -> Tree:
    """A tree that a person changed, by the unit that its header states, else by that which its name stands for."""
    tree, header = swc.read(path), swc.require_header(path)
    unit = header.unit or ("voxel" if path.name.endswith(".voxel.swc") else "um")
    um = swc.unit_in_um(unit)
    if um is None:
        return tree

    # The voxel size of the command may have changed since the file was written.
    written = header.voxel_size or swc.read_header(traced).voxel_size or size
    if written is None:
        raise InputError(f"{path} is in {unit}, and no voxel size is known; give voxel_size=z,y,x in um")
    return morphology.scale_tree(tree, (um / written[0], um / written[1], um / written[2]))


def _require_inside(tree: Tree, path: Path, shape: Shape) -> None:
    """Raise InputError when most nodes lie outside the image, as those of a tree in another unit do."""
    is_inside = ((tree.points > -_TOLERANCE) & (tree.points < np.array(shape) + _TOLERANCE)).all(axis=1)
    if is_inside.mean() < _LEAST_INSIDE:
        raise InputError(
            f"{path}: {int((~is_inside).sum())} of {format_count(len(tree), 'node')} lie outside the image; state its "
            "unit in its first line, as `# unit: voxel` or `# unit: um`, or move the file away"
        )


def list_changed_trees(out: Path, name: str, checksums: dict[str, str]) -> list[Path]:
    """The files with all trees of a stack whose content is not what the last run wrote."""
    paths = [out / "swc" / f"{name}.{kind}" for kind in ("swc", "voxel.swc")]
    written = [(path, checksums.get(path.relative_to(out).as_posix())) for path in paths if path.exists()]
    return [path for path, checksum in written if checksum is not None and checksum != files.sha256(path)]


def continue_from(edits: Edits, traced: list[Tree], left_out: list[Tree]) -> list[Tree]:
    """The edited trees, with what the tracer found beside them; then the traced trees that touch no edited one.

    A traced branch joins the edited node that is nearest to where it left the edited cable. What hangs on deleted cable
    is left out. Pieces that the tracer had left out are added where a person has led the tree to them.
    """
    forest = morphology.concatenate_trees([*traced, *left_out])
    is_traced = np.arange(len(forest)) < sum(map(len, traced))
    is_kept = _is_near(forest, edits.tree)
    is_deleted = _is_near(forest, edits.deleted) & ~is_kept
    is_new = ~is_kept & ~is_deleted

    # Without the edges to cable that is known, what is new falls into branches.
    fresh = morphology.select_nodes(_drop_edges_outside(forest, is_new), is_new)
    touches_kept, touches_deleted = (_find_touching(forest, is_new, other)[is_new] for other in (is_kept, is_deleted))
    nearest = np.asarray(cKDTree(edits.tree.points).query(fresh.points)[1])

    joined, hooks, alone = [edits.tree], [-1], list[Tree]()
    for branch, nodes in zip(morphology.split_components(fresh), morphology.group_components(fresh), strict=True):
        contacts = np.flatnonzero(touches_kept[nodes])
        if morphology.length(branch) < _LEAST_CABLE or (not len(contacts) and touches_deleted[nodes].any()):
            continue
        if not len(contacts):
            alone += [branch] if is_traced[is_new][nodes[0]] else []
            continue
        joined.append(morphology.reroot(branch, int(contacts[0])))
        hooks.append(int(nearest[nodes[contacts[0]]]))
    return [*_join(joined, hooks), *alone]


def _drop_edges_outside(tree: Tree, is_inside: NDArray[np.bool_]) -> Tree:
    """The tree without the edges that do not lie inside a set of nodes."""
    is_edge = (tree.parents >= 0) & is_inside & is_inside[tree.parents]
    return replace(tree, parents=np.where(is_edge, tree.parents, -1))


def _find_touching(tree: Tree, is_inside: NDArray[np.bool_], is_other: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """[N] whether a node inside has an edge to one of the others."""
    touches = np.zeros(len(tree), dtype=bool)
    for one, other in ((0, 1), (1, 0)):
        ends = tree.edges[is_inside[tree.edges[:, one]] & is_other[tree.edges[:, other]]]
        touches[ends[:, one]] = True
    return touches


def _join(trees: list[Tree], hooks: list[int]) -> list[Tree]:
    """The trees of the first forest, with the root of each other tree hung on a node of it, its hook."""
    forest = morphology.concatenate_trees(trees)
    parents = forest.parents.copy()
    firsts = np.cumsum([len(tree) for tree in trees])[:-1]
    parents[firsts] = hooks[1:]
    return morphology.split_components(replace(forest, parents=parents))


def _is_near(tree: Tree, other: Tree) -> NDArray[np.bool_]:
    """[N] whether a node lies within the tolerance of the cable of another tree."""
    if not len(tree) or not len(other):
        return np.zeros(len(tree), dtype=bool)
    return np.asarray(SegmentIndex(other).query(tree.points) <= _TOLERANCE)


def _select_far(tree: Tree, other: Tree) -> Tree:
    """The cable of a tree that is not near another one; nodes are not joined across what is left out."""
    is_far = ~_is_near(tree, other)
    cut = _drop_edges_outside(tree, is_far)
    has_cable = (cut.parents >= 0) | (morphology.child_counts(cut) > 0)
    return morphology.select_nodes(cut, is_far & has_cable)
