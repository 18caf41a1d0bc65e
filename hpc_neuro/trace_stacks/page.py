"""OUT/trace.html and the pictures of the stacks: what a person looks at first."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hpc_neuro.core import files, geometry
from hpc_neuro.core.constants import TREE_COLORS
from hpc_neuro.core.geometry import Shape, VoxelSize
from hpc_neuro.core.morphology import Tree
from hpc_neuro.data.foreground import Foreground
from hpc_neuro.data.intensity import ReadBox
from hpc_neuro.report import figures, html
from hpc_neuro.trace_stacks.config import INDEX

PAGE = "trace.html"
"""File of OUT."""
_RIGHT_HINT = (
    "share of the cable that is expected within 4 voxels of a neurite of the true tree, from the brightness along it; "
    "right on average over the kinds of images it was calibrated on, and no judgement of a single stack"
)
_AGREEMENT_HINT = (
    "Agreement of the trees with a second tracing: of the image alone where a student traced, else at a higher level "
    "of brightness. 1 is the best."
)
_DOUBT_HINT = "How doubtful the trees are; 0 is the best. It ranks stacks and is no probability."
_CONTRAST_HINT = "Median brightness of the foreground over the noise of the background."
_TABLE_ROWS = 20
"""Places of a stack that the page shows."""
_BRIGHTEST = 0.997
"""Quantile of a projection that is drawn white: a soma must not hide its dendrites."""
_DIM = 0.55
"""Brightness of the image under a tree."""


def draw_overlay(
    foreground: Foreground,
    probability: ReadBox | None,
    trees: Sequence[Tree],
    voxel_size: VoxelSize | None,
) -> bytes:
    """A PNG: the maximum projections of a stack, what the student found if there is one, and the trees.

    All on the grid of `foreground`, whose voxels are of `voxel_size` (um, z y x; None where it is unknown).
    """
    size, shape = voxel_size or (1.0, 1.0, 1.0), foreground.shape
    projections = _normalize(figures.project_maxima(foreground.read_image, shape))

    lines = [
        figures.TreeLines(
            geometry.to_um(tree.points, size)[tree.edges],
            TREE_COLORS[number % len(TREE_COLORS)],
            "tree" if len(trees) == 1 else "trees" if number == 0 else "",
        )
        for number, tree in enumerate(trees)
    ]
    # A ring shows where the first tree begins; more of them would hide the trees.
    root = tuple(geometry.to_um(trees[0].points[:1], size)[0].tolist()) if trees else None
    panels = [figures.Panel("image", projections)]
    if probability is not None:
        levels = figures.project_maxima(probability, shape)
        full = np.float32(255)
        shares = figures.Projections(levels.z / full, levels.y / full, levels.x / full)
        panels.append(figures.Panel("probability", shares))
    panels.append(figures.Panel("traced", projections, lines=lines, brightness=_DIM, root=root))
    unit = "voxels" if voxel_size is None else "\N{MICRO SIGN}m"
    return figures.draw_panels(panels, shape, size, kind="png", unit=unit)


def _normalize(projections: figures.Projections) -> figures.Projections:
    """The projections scaled to 0 to 1 from the median of the view along z to its brightest neurites."""
    low, high = np.quantile(projections.z, [0.05, _BRIGHTEST])
    scale = max(float(high - low), 1e-6)
    z, y, x = ((plane - low) / scale for plane in (projections.z, projections.y, projections.x))
    return figures.Projections(z, y, x)


def write_page(out: Path, results: dict[str, dict[str, Any]], failures: Sequence[str]) -> None:
    """Write the page from what trace.json says of each stack."""
    sections = [("Stacks", _show_table(results, failures))]
    sections += [(name, _show_stack(out, name, result)) for name, result in results.items()]
    sections.append(("Open the results", _show_advice(results, out)))
    files.write_text(out / PAGE, html.render_page("Traced stacks", str(out.absolute()), sections))


def _show_table(results: dict[str, dict[str, Any]], failures: Sequence[str]) -> str:
    columns = [
        html.Column("Stack", numeric=False),
        html.Column("Trees"),
        html.Column("Somas"),
        html.Column("Cable", "length of all trees, in the unit of the next column"),
        html.Column("Unit", numeric=False),
        html.Column("Tips", "ends of branches"),
        html.Column("Expected right", _RIGHT_HINT),
        html.Column("Agreement", _AGREEMENT_HINT),
        html.Column("Doubt", _DOUBT_HINT),
        html.Column("Contrast", _CONTRAST_HINT),
        html.Column("Time [s]"),
        html.Column("Warnings"),
    ]
    rows = []
    for name, result in results.items():
        measured = result["figures"]
        # Results of an earlier version lack it.
        right = result.get("expected_right")
        numbers = (right, measured["agreement"], result["doubt"], measured["contrast_to_noise"], result["seconds"])
        rows.append(
            [
                html.Cell(name),
                *(html.Cell(str(measured[key]), measured[key]) for key in ("trees", "somas")),
                html.Cell(html.format_number(result["cable"], 0), result["cable"]),
                html.Cell(_name_unit(result)),
                html.Cell(str(measured["tips"]), measured["tips"]),
                *(html.Cell(html.format_number(number, 2), number) for number in numbers),
                html.Cell(str(len(result["warnings"])), len(result["warnings"])),
            ]
        )
    faults = "".join(html.paragraph(f"Failed: {failure}", "notice") for failure in failures)
    terms = [
        ("Expected right", _RIGHT_HINT),
        ("Agreement", _AGREEMENT_HINT),
        ("Doubt", _DOUBT_HINT),
        ("Contrast", _CONTRAST_HINT),
    ]
    shown, cells = html.drop_empty_columns(columns, rows)
    titles = {column.title for column in shown}
    meanings = html.definitions([(term, text) for term, text in terms if term in titles])
    return faults + html.table(shown, cells) + html.details("What the columns mean", meanings)


def _show_stack(out: Path, name: str, result: dict[str, Any]) -> str:
    parts = [html.paragraph(warning[:1].upper() + warning[1:], "notice") for warning in result["warnings"]]
    parts.append(html.paragraph(_describe(result)))
    parts.append(html.picture((out / result["overlay"]).read_bytes(), _caption(result), kind="png"))

    places = result["places"]
    if places:
        count = files.format_count(len(places), "place")
        rest = f"; the first {_TABLE_ROWS} are shown" if len(places) > _TABLE_ROWS else ""
        parts.append(html.paragraph(f"{count} to look at, ranked by doubt and by the cable behind it{rest}"))
        columns = [html.Column("Kind", numeric=False), *(html.Column(f"{axis} [voxel]") for axis in "zyx")]
        columns += [html.Column("Doubt"), html.Column(f"Cable behind [{_name_unit(result)}]")]
        digits = {"z": 0, "y": 0, "x": 0, "doubt": 2, "cable": 0}
        rows = [
            [html.Cell(place["kind"])]
            + [html.Cell(html.format_number(place[key], digits[key]), place[key]) for key in digits]
            for place in places[:_TABLE_ROWS]
        ]
        parts.append(html.table(columns, rows))
    return "".join(parts)


def _describe(result: dict[str, Any]) -> str:
    measured = result["figures"]
    shape = " x ".join(map(str, result["shape"]))
    size = result["voxel_size"]
    edges = "" if size is None else " x ".join(f"{edge:.4g}" for edge in size)
    scale = f"{edges} \N{MICRO SIGN}m each" if edges else "unknown voxel size"
    trees = files.format_count(measured["trees"], "tree")
    if resampled := result.get("resampled_voxel_size"):
        scale += f", traced in voxels of {' x '.join(f'{s:.4g}' for s in resampled)} \N{MICRO SIGN}m"
    elif resampled := result.get("resampled_shape"):
        scale += f", traced in {' x '.join(map(str, resampled))} voxels"
    left_out = files.format_count(measured["left_out_trees"], "shorter piece")
    rest = f", {left_out} left out" if measured["left_out_trees"] else ""
    return (
        f"{result['image']}: {shape} voxels (z, y, x), {scale}. {trees} traced {result['start']}, "
        f"{html.format_number(result['cable'], 0)} {_name_unit(result)} of cable{rest}."
    )


def _name_unit(result: dict[str, Any]) -> str:
    """The unit of a stack's cable, as people write it."""
    return "\N{MICRO SIGN}m" if result["unit"] == "um" else str(result["unit"])


def _caption(result: dict[str, Any]) -> str:
    return (
        "Maximum projections along z (large), x (right) and y (below). On the right the trees lie over the image, "
        f"each in its own color; the ring marks where the first tree begins. File: {result['overlay']}"
    )


def _show_advice(results: dict[str, dict[str, Any]], out: Path) -> str:
    first = next((result for result in results.values() if result["swc_voxel"]), None)
    return html.code("\n".join(list_advice(first, out)))


def list_advice(result: dict[str, Any] | None, out: Path) -> list[str]:
    """How to open the trees of a stack in `out` in common viewers, in lines."""
    if result is None or not result["swc_voxel"]:
        return []
    image, voxel = result["image"], out / result["swc_voxel"]
    um = out / result["swc"] if result["swc"] else None
    index, state = files.quote_path(out / INDEX), out / result["neuroglancer"]
    # SNT scales by the voxel size of the image, and takes plain voxels where there is none.
    return [
        f"Fiji/SNT      open {image}, then Plugins > Neuroanatomy > SNT, File > Load Tracings > SWC: {um or voxel}",
        f"napari        napari --plugin hpc_neuro {index}    (once before: pip install '.[napari]')",
        f"Neuroglancer  paste the text of {state} into the JSON editor ({{}}) of a viewer, and add the image",
    ]


def build_neuroglancer_state(trees: Sequence[Tree], shape: Shape, voxel_size: VoxelSize | None) -> dict[str, Any]:
    """A state of Neuroglancer that shows the trees as lines; it needs no server."""
    layers = []
    for number, tree in enumerate(trees, start=1):
        # Neuroglancer counts from the corner of the first voxel, trees from its center.
        ends = np.round(tree.points + 0.5, 2)
        lines = [
            {"type": "line", "id": str(i), "pointA": ends[parent].tolist(), "pointB": ends[child].tolist()}
            for i, (child, parent) in enumerate(tree.edges.tolist())
        ]
        color = TREE_COLORS[(number - 1) % len(TREE_COLORS)]
        layers.append(
            {
                "type": "annotation",
                "name": f"tree {number}",
                "source": "local://annotations",
                "annotationColor": color,
                "annotations": lines,
            }
        )
    # Neuroglancer takes meters; a space without a unit is in voxels.
    scale: list[Any] = [[1, ""]] * 3 if voxel_size is None else [[size * 1e-6, "m"] for size in voxel_size]
    return {
        "dimensions": dict(zip("zyx", scale, strict=True)),
        "displayDimensions": ["x", "y", "z"],
        "position": [size / 2 for size in shape],
        "layers": layers,
    }
