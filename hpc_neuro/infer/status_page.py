"""OUT/infer.html: the state of each block, the volumes with their trees, and the least sure neurons."""

from __future__ import annotations

import csv
import itertools
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hpc_neuro.core import files
from hpc_neuro.core.geometry import Box, Shape
from hpc_neuro.core.morphology import Tree
from hpc_neuro.core.types import Array
from hpc_neuro.data import ome_zarr, swc
from hpc_neuro.infer import proofread
from hpc_neuro.infer.block_pipeline import VolumeRun
from hpc_neuro.infer.trees import PredictionEntry, read_entry_record
from hpc_neuro.report import figures, html

PAGE = "infer.html"
"""File of OUT."""
_COLORS = {"written": "#5bc0ff", "empty": "#2a3138", "proof": "#f2c14e", "failed": "#ff6b4a", "missing": "#ffffff"}
"""Color of each state of a block on the map."""
_SQUARE = 9
"""[pixel] One block on the map."""
_TABLE_ROWS = 20
"""Rows of a table, the worst ones."""
_SHEETS = 6
"""Neurons with a picture of their own, the least sure first."""
_VOLUME_VOXELS, _SHEET_VOXELS = 1 << 26, 1 << 24
"""Voxels that a picture of a volume, and of a neuron, is made of at most; larger ones are shown coarser."""
_READ_ROWS = 100_000
"""Rows of a table that are read at most: those of a brain would fill the memory of one process."""
_MOST_TREE_BYTES = 1 << 28
"""[bytes] Size of the file of all trees up to which the picture of a volume shows them."""
_TITLES = {
    "rank": "Rank",
    "kind": "Kind",
    "z": "z [voxel]",
    "y": "y [voxel]",
    "x": "x [voxel]",
    "doubt": "Doubt",
    "disagreement": "Disagreement",
    "cable_um": "Cable behind [µm]",
    "neuron": "Neuron",
    "node": "SWC id",
    "score": "Sure share of the cable",
    "mean": "Mean confidence",
    "gaps": "Gaps",
    "gap_um": "Length of gaps [µm]",
}
"""Headings of the columns of proofread/*.csv."""
_DIGITS = {"score": 2, "mean": 2, "doubt": 2, "disagreement": 2}
"""Decimals of numbers in the tables; others have none. The files have all digits."""
_ADVICE = (
    "Trees: swc/ID.swc in micrometers, swc/ID.voxel.swc in voxels. Images: ID.ome.zarr. `hpc-neuro infer serve {out}` "
    "opens images, trees and the places to look at in Neuroglancer."
)
_MARGIN = 12
"""[voxel] Around a neuron in its picture."""


def write_page(out: Path, volumes: Sequence[VolumeRun]) -> None:
    """Write the page of a run."""
    sections = [(volume.source.id, _volume_section(out, volume)) for volume in volumes]
    sections.append(("Open the results", html.paragraph(_ADVICE.format(out=files.quote_path(out)))))
    files.write_text(out / PAGE, html.render_page("Inference", str(out.absolute()), sections))


def read_block_states(volume: VolumeRun) -> dict[Shape, str]:
    """The state of each block: written, empty, proof (predicted though empty), failed or missing."""
    failed = {tuple(failure["index"]) for failure in volume.markers.read_failed_blocks()}
    states = dict[Shape, str]()

    # A marker outranks a recorded failure: the block may have been done since.
    volume.markers.refresh()
    for block in volume.tiling.list_blocks(volume.source.shape):
        marker = volume.markers.read(block.index)
        if marker is None:
            states[block.index] = "failed" if block.index in failed else "missing"
        elif marker.skipped:
            states[block.index] = "empty"
        else:
            states[block.index] = "proof" if marker.proof else "written"
    return states


def draw_block_map(states: dict[Shape, str]) -> str:
    """An SVG with a square per block, a panel per layer of blocks along z; the state in words of a single block."""
    # One square would tell nothing that the text does not.
    if len(states) == 1:
        return html.paragraph(f"1 block: {next(iter(states.values()))}", "small")

    layers, rows, columns = (max(index[axis] for index in states) + 1 for axis in range(3))

    # One column stays free between two panels.
    width, height = (columns + 1) * _SQUARE, (rows + 1) * _SQUARE

    # Squares are a pixel smaller than their cells, so that neighbors of one state stay apart.
    squares = [
        f'<rect x="{z * width + x * _SQUARE}" y="{y * _SQUARE}" width="{_SQUARE - 1}" height="{_SQUARE - 1}" '
        f'fill="{_COLORS[state]}" stroke="#888" stroke-width="0.3"><title>{z} {y} {x}: {state}</title></rect>'
        for (z, y, x), state in states.items()
    ]

    counts = Counter(states.values())

    # Always in the order of the colors, so that pages can be compared.
    counts_text = ", ".join(f"{counts[state]} {state}" for state in _COLORS if counts[state])
    blocks_text = files.format_count(len(states), "block")

    picture = f'<svg viewBox="0 0 {layers * width} {height}" width="{layers * width}" height="{height}" role="img">'
    caption = html.paragraph(f"{blocks_text} ({counts_text}); one panel per layer of blocks along z", "small")
    return f'<div class="scroll">{picture}{"".join(squares)}</svg></div>{caption}'


def _volume_section(out: Path, volume: VolumeRun) -> str:
    parts = [draw_block_map(read_block_states(volume)), _draw_volume(out, volume)]

    # A volume that was not traced has no tables.
    record = read_entry_record(out, volume.source.id)
    if record is not None and all(path.exists() for path in proofread.table_paths(out, volume.source.id)):
        places_path, neurons_path = proofread.table_paths(out, volume.source.id)
        places, neurons = _read_table(places_path), _read_table(neurons_path)
        parts += _show_tables(record.entry, places, neurons)
        parts += _draw_sheets(out, volume, places, neurons)
    return "".join(parts)


def _draw_volume(out: Path, volume: VolumeRun) -> str:
    """The probability from three sides, with the trees; from the finest level of the pyramid that is small enough."""
    source, path = volume.source, out / "swc" / f"{volume.source.id}.swc"

    # A volume without trees is shown all the same, and one with those of a brain without them.
    has_lines = path.exists() and path.stat().st_size <= _MOST_TREE_BYTES
    lines = [_tree_lines(swc.read(path), np.zeros(3))] if has_lines else []
    image = _draw_probability(volume, Box.whole(source.shape), lines, _VOLUME_VOXELS)
    return html.picture(image, f"{source.id}: largest probability along z, x (right) and y (below)")


def _draw_probability(volume: VolumeRun, box: Box, lines: Sequence[figures.TreeLines], most_voxels: int) -> bytes:
    """A JPEG of the probability in a box of level 0, without and with lines (um from the box's first voxel).

    From the finest level of the pyramid on which the box has at most `most_voxels` voxels.
    """
    source = volume.source
    levels = ome_zarr.plan_levels(source.shape, source.voxel_size)

    # A picture has far fewer pixels than a volume has voxels.
    small_enough = [i for i, level in enumerate(levels) if box.size <= most_voxels * int(np.prod(level.factor))]
    # Where no level is small enough the coarsest must do.
    number = small_enough[0] if small_enough else len(levels) - 1
    level, array = levels[number], ome_zarr.open_level(volume.folder, number)

    # Rounded outwards, so that no voxel of the box is lost.
    z, y, x = (a // factor for a, factor in zip(box.start, level.factor, strict=True))
    z_stop, y_stop, x_stop = (-(-b // factor) for b, factor in zip(box.stop, level.factor, strict=True))
    level_box = Box((z, y, x), (z_stop, y_stop, x_stop)).clip(Box.whole(level.shape))

    def read(piece: Box) -> Array:
        return np.asarray(ome_zarr.read_box(array, piece.shift(level_box.start)), dtype=np.float32) / np.float32(255)

    projections = figures.project_maxima(read, level_box.shape)

    # A coarse voxel spans several fine ones, and the picture is to scale.
    dz, dy, dx = (size * factor for size, factor in zip(source.voxel_size, level.factor, strict=True))

    # Dimmed behind the lines, which would not stand out otherwise.
    panels = [
        figures.Panel("probability", projections),
        figures.Panel("traced", projections, lines=lines, brightness=0.5),
    ]
    return figures.draw_panels(panels, level_box.shape, (dz, dy, dx))


def _tree_lines(tree: Tree, origin: NDArray[np.float64]) -> figures.TreeLines:
    """The edges of a tree in um, relative to `origin` (um)."""
    return figures.TreeLines(tree.points[tree.edges] - origin, figures.RIGHT, "traced")


def _draw_sheets(
    out: Path, volume: VolumeRun, places: list[dict[str, str]], neurons: list[dict[str, str]]
) -> list[str]:
    """A picture of each of the least sure neurons with its doubtful places, where a volume holds several."""
    # The picture of the volume shows an only neuron already. Too many trees have no files of their own.
    if len(neurons) < 2 or not (out / "swc" / volume.source.id).is_dir():
        return []

    sheets = []
    for neuron in neurons[:_SHEETS]:
        own_places = [place for place in places if place["neuron"] == neuron["neuron"]]
        sheets.append(_draw_sheet(out, volume, neuron, own_places))

    more = len(neurons) - _SHEETS
    more_text = f" ({more} more are in swc/)" if more > 0 else ""
    return [html.paragraph(f"The least sure neurons, each by itself{more_text}"), *sheets]


def _draw_sheet(out: Path, volume: VolumeRun, neuron: dict[str, str], places: list[dict[str, str]]) -> str:
    source, voxel_size = volume.source, np.array(volume.source.voxel_size)
    tree = swc.read(out / "swc" / source.id / f"{int(neuron['neuron']):04d}.swc")

    # The box of the tree in voxels, with a margin.
    low, high = np.floor(tree.points.min(axis=0) / voxel_size), np.ceil(tree.points.max(axis=0) / voxel_size)
    start, stop = (low - _MARGIN).astype(int), (high + _MARGIN + 1).astype(int)
    box = Box((start[0], start[1], start[2]), (stop[0], stop[1], stop[2])).clip(Box.whole(source.shape))
    origin = np.array(box.start) * voxel_size

    # A neuron without doubtful places still needs an array of three columns.
    points = np.array([[float(place[axis]) for axis in "zyx"] for place in places]).reshape(-1, 3) * voxel_size
    crosses = _draw_crosses(points - origin, 4 * voxel_size.min())
    lines = [_tree_lines(tree, origin), figures.TreeLines(crosses, figures.WRONG, "doubt")]

    caption = (
        f"Neuron {neuron['neuron']}: {neuron['cable_um']} µm of cable, {float(neuron['score']):.1%} of it sure, "
        f"{files.format_count(int(neuron['gaps']), 'gap')}, {files.format_count(len(places), 'place')} to look at "
        f"(crosses); voxels {box.start} to {box.stop}"
    )
    return html.picture(_draw_probability(volume, box, lines, _SHEET_VOXELS), caption)


def _draw_crosses(points: NDArray[np.float64], arm_length: float) -> NDArray[np.float64]:
    """[3 N, 2, 3] a short line along each axis through each of [N, 3] points."""
    arms = arm_length * np.eye(3)
    return np.stack([points[:, None] - arms, points[:, None] + arms], axis=2).reshape(-1, 2, 3)


def _show_tables(entry: PredictionEntry, places: list[dict[str, str]], neurons: list[dict[str, str]]) -> list[str]:
    """The heads of the two tables that proofreading begins with."""
    place_count = entry["proofread"]["places"]
    return [
        html.paragraph(
            f"{files.format_count(entry['trees'], 'tree')}, the least sure first{_describe_rest(entry['trees'])}"
        ),
        _show_table(neurons, proofread.NeuronScore, {"cable_um": "Cable [µm]"}),
        html.paragraph(f"{files.format_count(place_count, 'place')} to look at, ranked{_describe_rest(place_count)}"),
        _show_table(places, proofread.DoubtfulPlace, {}),
    ]


def _describe_rest(count: int) -> str:
    """Where the rows of so many are that the table leaves out."""
    return f"; {_TABLE_ROWS} are shown, all are in proofread/" if count > _TABLE_ROWS else ""


def _show_table(rows: list[dict[str, str]], kind: Any, titles: dict[str, str]) -> str:
    """A table of the first rows of a CSV file. titles: headings other than `_TITLES`."""
    names = list(kind.__dataclass_fields__)
    columns = [html.Column((_TITLES | titles)[name], numeric=name != "kind") for name in names]
    cells = [[_make_cell(name, row[name]) for name in names] for row in rows[:_TABLE_ROWS]]
    return html.table(*html.drop_empty_columns(columns, cells))


def _make_cell(name: str, text: str) -> html.Cell:
    if name == "kind" or not text:
        return html.Cell(text)
    return html.Cell(html.format_number(float(text), _DIGITS.get(name, 0)), float(text))


def _read_table(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8") as file:
        return list(itertools.islice(csv.DictReader(file), _READ_ROWS))
