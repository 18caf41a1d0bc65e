"""OUT/infer.html: what became of each block, the volumes with their trees, and the neurons one is least sure of."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from hpc_neuro.core import files
from hpc_neuro.core.geometry import Box
from hpc_neuro.core.morphology import Tree
from hpc_neuro.core.types import Array
from hpc_neuro.data import ome_zarr, swc
from hpc_neuro.infer import proofread
from hpc_neuro.infer.block_pipeline import Work
from hpc_neuro.report import figures, html

PAGE = "infer.html"
_COLOURS = {"written": "#5bc0ff", "empty": "#2a3138", "proof": "#f2c14e", "failed": "#ff6b4a", "missing": "#ffffff"}
_CELL = 9  # pixels of one block on the map
_MOST = 20  # rows of a table
_SHEETS = 6  # neurons with a sheet of their own, the least sure first
_WHOLE, _SHEET = 1 << 26, 1 << 24  # voxels that a picture is made of at most; larger ones are shown coarser
_MARGIN = 12  # voxels round a neuron on its sheet


def state(work: Work) -> dict[tuple[int, int, int], str]:
    """What became of each block: written, empty, proof (predicted though empty), failed or missing."""
    parked = {tuple(p["index"]) for p in work.marks.parked()}
    found = {}
    for block in work.plan.blocks(work.source.shape):
        mark = work.marks.read(block.index)
        if mark is None:
            found[block.index] = "failed" if block.index in parked else "missing"
        else:
            found[block.index] = "empty" if mark.skipped else "proof" if mark.proof else "written"
    return found


def block_map(work: Work) -> str:
    """An SVG with a square per block, a panel per layer of blocks along z."""
    states = state(work)
    layers, rows, columns = (max(i[a] for i in states) + 1 for a in range(3))
    width, height = (columns + 1) * _CELL, (rows + 1) * _CELL
    squares = [
        f'<rect x="{z * width + x * _CELL}" y="{y * _CELL}" width="{_CELL - 1}" height="{_CELL - 1}" '
        f'fill="{_COLOURS[kind]}" stroke="#888" stroke-width="0.3"><title>{z} {y} {x}: {kind}</title></rect>'
        for (z, y, x), kind in states.items()
    ]
    counts = ", ".join(f"{list(states.values()).count(k)} {k}" for k in _COLOURS if k in states.values())
    picture = f'<svg viewBox="0 0 {layers * width} {height}" width="{layers * width}" height="{height}" role="img">'
    caption = html.paragraph(f"{len(states)} blocks ({counts}); one panel per layer of blocks along z", "small")
    return f'<div class="scroll">{picture}{"".join(squares)}</svg></div>{caption}'


def write(out: Path, works: Sequence[Work]) -> None:
    """The page of a run."""
    sections = []
    for work in works:
        name = work.source.id
        parts = [block_map(work), _picture(out, work)]
        if all(path.exists() for path in proofread.tables(out, name)):
            parts += [*_tables(out, name), *_sheets(out, work)]
        sections.append((name, "".join(parts)))
    files.write_text(out / PAGE, html.render_page("Inference", str(out), sections))


def _picture(out: Path, work: Work) -> str:
    """The probability from three sides, with the trees; from the finest level of the pyramid that is small enough."""
    source, path = work.source, out / "swc" / f"{work.source.id}.swc"
    lines = [_lines(swc.read(path), np.zeros(3))] if path.exists() else []
    image = _drawn(work, Box.whole(source.shape), lines, _WHOLE)
    return html.picture(image, f"{source.id}: largest probability along z, x (right) and y (below)")


def _drawn(work: Work, box: Box, lines: Sequence[figures.TreeLines], most: int) -> bytes:
    """A JPEG of the probability in a box of level 0, without and with lines (um from the box's first voxel).

    From the finest level of the pyramid on which the box has `most` voxels at most.
    """
    source = work.source
    levels = ome_zarr.plan_levels(source.shape, source.voxel_size)
    number = next((i for i, v in enumerate(levels) if box.size <= most * int(np.prod(v.factor))), len(levels) - 1)
    level, array = levels[number], ome_zarr.open_level(work.folder, number)
    start = [a // f for a, f in zip(box.start, level.factor, strict=True)]
    stop = [-(-b // f) for b, f in zip(box.stop, level.factor, strict=True)]
    part = Box((start[0], start[1], start[2]), (stop[0], stop[1], stop[2])).clip(Box.whole(level.shape))

    def read(piece: Box) -> Array:
        return np.asarray(ome_zarr.read_box(array, piece.shift(part.start)), dtype=np.float32) / np.float32(255)

    views = figures.project_maxima(read, part.shape)
    size = [v * f for v, f in zip(source.voxel_size, level.factor, strict=True)]
    panels = [figures.Panel("probability", views), figures.Panel("traced", views, lines=lines, brightness=0.5)]
    return figures.draw_panels(panels, part.shape, (size[0], size[1], size[2]))


def _lines(tree: Tree, origin: NDArray[np.float64]) -> figures.TreeLines:
    """The edges of a tree in um, seen from `origin` (um)."""
    return figures.TreeLines(tree.points[tree.edges] - origin, figures.RIGHT, "traced")


def _sheets(out: Path, work: Work) -> list[str]:
    """A picture of each of the least sure neurons with its doubtful places, where a volume holds several."""
    source, (places, neurons) = work.source, proofread.tables(out, work.source.id)
    with neurons.open(encoding="utf-8") as file:
        scores = list(csv.DictReader(file))
    with places.open(encoding="utf-8") as file:
        doubts = list(csv.DictReader(file))
    found = []
    for row in scores[:_SHEETS] if len(scores) > 1 else []:
        tree = swc.read(out / "swc" / source.id / f"{int(row['neuron']):04d}.swc")
        size = np.array(source.voxel_size)
        low, high = np.floor(tree.points.min(axis=0) / size), np.ceil(tree.points.max(axis=0) / size)
        start, stop = (low - _MARGIN).astype(int), (high + _MARGIN + 1).astype(int)
        box = Box((start[0], start[1], start[2]), (stop[0], stop[1], stop[2])).clip(Box.whole(source.shape))
        mine = [d for d in doubts if d["neuron"] == row["neuron"]]
        crosses = np.array([[float(d[a]) for a in "zyx"] for d in mine]).reshape(-1, 3) * size
        origin = np.array(box.start) * size
        lines = [
            _lines(tree, origin),
            figures.TreeLines(_crosses(crosses - origin, 4 * size.min()), figures.WRONG, "doubt"),
        ]
        caption = (
            f"Neuron {row['neuron']}: {row['cable_um']} um of cable, {float(row['score']):.1%} of it sure, "
            f"{row['gaps']} gaps, {len(mine)} places to look at (crosses); voxels {box.start} to {box.stop}"
        )
        found.append(html.picture(_drawn(work, box, lines, _SHEET), caption))
    more = len(scores) - _SHEETS
    head = f"The least sure neurons, each by itself{f' ({more} more are in swc/)' if more > 0 else ''}"
    return [html.paragraph(head), *found] if found else []


def _crosses(points: NDArray[np.float64], reach: float) -> NDArray[np.float64]:
    """[3 N, 2, 3] a short line along each axis through each of [N, 3] points."""
    arms = reach * np.eye(3)
    return np.stack([points[:, None] - arms, points[:, None] + arms], axis=2).reshape(-1, 2, 3)


def _tables(out: Path, name: str) -> list[str]:
    """The heads of the two tables that proofreading begins with."""
    places, neurons = (list(csv.reader(p.open(encoding="utf-8"))) for p in proofread.tables(out, name))
    return [
        html.paragraph(f"{len(neurons) - 1} trees, the least sure first"),
        _table(neurons),
        html.paragraph(f"{len(places) - 1} places to look at, the worst first (all in proofread/)"),
        _table(places),
    ]


def _table(rows: list[list[str]]) -> str:
    cells = [[html.Cell(v, float(v) if v[:1].isdigit() else None) for v in row] for row in rows[1 : _MOST + 1]]
    return html.table([html.Column(title) for title in rows[0]], cells)
