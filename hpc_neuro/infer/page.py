"""OUT/infer.html: what became of each block, the volumes with their trees, and the neurons one is least sure of."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from hpc_neuro import files
from hpc_neuro.data import ome_zarr, swc
from hpc_neuro.geometry import Box
from hpc_neuro.infer import proofread
from hpc_neuro.infer.engine import Work
from hpc_neuro.report import figures, html
from hpc_neuro.types import Array

PAGE = "infer.html"
_COLOURS = {"written": "#5bc0ff", "empty": "#2a3138", "proof": "#f2c14e", "failed": "#ff6b4a", "missing": "#ffffff"}
_CELL = 9  # pixels of one block on the map
_MOST = 20  # rows of a table


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
            parts += _tables(out, name)
        sections.append((name, "".join(parts)))
    files.write_text(out / PAGE, html.page("Inference", str(out), sections))


def _picture(out: Path, work: Work) -> str:
    """The probability from three sides, with the trees; from the finest level of the pyramid that is small enough."""
    source, folder = work.source, work.folder
    levels = ome_zarr.levels(source.shape, source.voxel_size)
    number = next((i for i, v in enumerate(levels) if int(np.prod(v.shape)) <= 1 << 26), len(levels) - 1)
    array = ome_zarr.open_level(folder, number)

    def read(box: Box) -> Array:
        return np.asarray(ome_zarr.read(array, box), dtype=np.float32) / np.float32(255)

    views = figures.project(read, levels[number].shape)
    size = [v * f for v, f in zip(source.voxel_size, levels[number].factor, strict=True)]
    path, lines = out / "swc" / f"{source.id}.swc", list[figures.Lines]()
    if path.exists():
        tree = swc.read(path)
        edges = tree.points[tree.edges]
        lines = [figures.Lines(edges, figures.RIGHT, "traced")]
    panels = [figures.Panel("probability", views), figures.Panel("traced", views, lines=lines, light=0.5)]
    image = figures.draw(panels, levels[number].shape, (size[0], size[1], size[2]))
    return html.picture(image, f"{source.id}: largest probability along z, x (right) and y (below)")


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
