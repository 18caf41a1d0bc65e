"""Results as layers, without napari."""

from __future__ import annotations

import ast
import json
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tifffile
import yaml

from hpc_neuro import cli, infer
from hpc_neuro.core import morphology
from hpc_neuro.core.geometry import Box
from hpc_neuro.core.morphology import build_tree
from hpc_neuro.core.schema import InputError, load
from hpc_neuro.data import swc
from hpc_neuro.napari_plugin import layers
from hpc_neuro.napari_plugin.trace_layer import trace_layer
from tests.helpers.bright_student import save_bright_student
from tests.helpers.small_volumes import write_crossing
from tests.helpers.stacks import make_neuron, take_picture

SIZE = (1.0, 0.5, 0.5)


@pytest.fixture(scope="module")
def trace_index(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The index of a result of `trace`."""
    folder = tmp_path_factory.mktemp("traced")
    tifffile.imwrite(folder / "n.tif", take_picture(make_neuron(3)))
    out = folder / "out"
    assert cli.main(["trace", str(folder / "n.tif"), "voxel_size=1,0.5,0.5", f"out={out}"]) == 0
    return out / "trace.json"


@pytest.fixture(scope="module")
def infer_index(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The index of a result of `infer` with two trees."""
    folder = tmp_path_factory.mktemp("predicted")
    save_bright_student(folder / "model")
    item = write_crossing(folder / "cross.tif")
    keys = [f"model={folder / 'model'}", f"out={folder / 'out'}", "block=[8,32,32]", "chunk=[4,16,16]", "page=false"]
    assert infer.run(load(infer.InferConfig, None, [*keys, f"inputs=[{item}]"])) == 0
    return folder / "out" / "predictions.json"


def by_name(result: list[layers.LayerData]) -> dict[str, layers.LayerData]:
    return {arguments["name"]: (data, arguments, kind) for data, arguments, kind in result}


def test_a_result_of_trace_is_its_image_and_its_trees(trace_index: Path) -> None:
    reader = layers.get_reader(str(trace_index))
    assert reader is not None
    result = by_name(reader(str(trace_index)))
    image, arguments, kind = result["n"]
    assert kind == "image"
    assert arguments["scale"] == SIZE
    assert np.array_equal(np.asarray(image), tifffile.imread(trace_index.parent.parent / "n.tif"))

    paths, arguments, kind = result["n trees"]
    tree = swc.read(trace_index.parent / "swc" / "n.voxel.swc")
    assert kind == "shapes"
    assert arguments["shape_type"] == "path"
    assert arguments["scale"] == SIZE
    assert len(paths) == len(arguments["edge_color"]) == len(arguments["features"]["tree"])
    cable = sum(float(np.linalg.norm(np.diff(path, axis=0), axis=1).sum()) for path in paths)
    assert cable == pytest.approx(morphology.length(tree))


def test_a_result_whose_image_is_gone_shows_its_trees(
    trace_index: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    record = json.loads(trace_index.read_text())
    record["stacks"]["n"]["image"] = str(tmp_path / "gone.tif")
    out = tmp_path / "out"
    (out / "swc").mkdir(parents=True)
    (out / "trace.json").write_text(json.dumps(record))
    (out / "config.yaml").write_text((trace_index.parent / "config.yaml").read_text())
    (out / "swc" / "n.voxel.swc").write_text((trace_index.parent / "swc" / "n.voxel.swc").read_text())
    with caplog.at_level(logging.WARNING):
        assert "n" not in by_name(layers.read_paths(str(out / "trace.json")))
    assert "gone.tif is not there" in caplog.text


def test_a_result_of_infer_is_image_probability_trees_and_places(infer_index: Path) -> None:
    whole = by_name(layers.read_paths(str(infer_index)))
    one = by_name(layers.read_paths(str(infer_index.parent / "cross.ome.zarr")))
    assert list(whole) == list(one)
    assert list(whole)[:3] == ["cross", "cross probability", "cross trees"]

    image = np.asarray(whole["cross"][0])
    probability = np.asarray(whole["cross probability"][0])
    assert probability.shape == image.shape
    assert probability[image > 0].mean() > 200 > 60 > probability[image == 0].mean()
    assert set(whole["cross trees"][1]["features"]["tree"]) == {1, 2}

    rows = (infer_index.parent / "proofread" / "cross.csv").read_text().splitlines()[1:]
    assert ("cross places" in whole) == bool(rows)


def test_places_keep_their_order_and_their_doubt() -> None:
    rows: list[dict[str, Any]] = [
        {"kind": "gap", "z": 3, "y": 4.5, "x": 5, "doubt": 0.9},
        {"kind": "end", "z": 1, "y": 2, "x": 3, "doubt": 0.5},
    ]
    ((points, arguments, kind),) = layers._build_places("n", rows, None)
    assert kind == "points"
    assert points.tolist() == [[3, 4.5, 5], [1, 2, 3]]
    assert arguments["features"] == {"rank": [1, 2], "kind": ["gap", "end"], "doubt": [0.9, 0.5]}
    assert arguments["metadata"][layers.PLACES]
    assert arguments["scale"] == (1.0, 1.0, 1.0)
    assert layers._build_places("n", [], None) == []


@pytest.mark.parametrize("unit", ["um", "voxel"])
def test_a_tree_lies_on_the_voxels_of_its_image(tmp_path: Path, unit: Any) -> None:
    tree = build_tree(np.array([[2.0, 4.0, 6.0], [2.0, 4.0, 20.0]]), np.array([-1, 0]))
    stored = morphology.scale_tree(tree, SIZE) if unit == "um" else tree
    swc.write(tmp_path / "n.swc", stored, unit=unit, voxel_size=SIZE)
    ((paths, arguments, _),) = layers.read_paths([str(tmp_path / "n.swc")])
    assert np.allclose(paths[0], [[2, 4, 6], [2, 4, 20]], atol=1e-5)
    assert arguments["scale"] == SIZE


def test_a_tree_in_nanometers_lies_on_its_image(tmp_path: Path) -> None:
    for unit, size, expected in (("nm", "", [[0.002, 0.004, 0.006]]), ("um", "", [[2, 4, 6]])):
        (tmp_path / "n.swc").write_text(f"# unit: {unit}\n{size}1 1 6 4 2 1 -1\n2 1 6 4 9 1 1\n")
        ((paths, arguments, _),) = layers.read_paths([str(tmp_path / "n.swc")])
        assert np.allclose(paths[0][:1], expected)
        assert arguments["scale"] == (1.0, 1.0, 1.0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"voxel_size": [1, 0, 1]}, "stacks.n.voxel_size"),
        ({"voxel_size": [1, 1]}, "stacks.n.voxel_size"),
        ({"swc_voxel": "../../other.swc"}, "is not inside"),
        ({"places": [{"z": 1}]}, "stacks.n.places.0"),
        ({"places": None}, "stacks.n.places"),
        ({"image": 3}, "stacks.n.image"),
        (None, "stacks.n"),
    ],
)
def test_an_index_of_another_form_is_refused(
    trace_index: Path, tmp_path: Path, change: dict[str, Any] | None, message: str
) -> None:
    record = json.loads(trace_index.read_text())
    record["stacks"]["n"] = None if change is None else {**record["stacks"]["n"], **change}
    (tmp_path / "trace.json").write_text(json.dumps(record))
    (tmp_path / "config.yaml").write_text((trace_index.parent / "config.yaml").read_text())
    with pytest.raises(InputError, match=f"{message}.*give the same `hpc-neuro trace` again"):
        layers.read_paths(str(tmp_path / "trace.json"))


@pytest.mark.parametrize("line", ["1,gap,x,2,3,0.5", "1,gap,1,2", "1,gap,nan,2,3,0.5", "1,gap,1_0,2,3,0.5"])
def test_a_damaged_table_of_places_is_refused(tmp_path: Path, line: str) -> None:
    (tmp_path / "n.csv").write_text(f"rank,kind,z,y,x,doubt\n1,gap,1,2,3,0.5\n{line}\n")
    with pytest.raises(InputError, match="line 3 is no place; move it away"):
        layers._read_places(tmp_path / "n.csv")
    (tmp_path / "n.csv").write_bytes(b"rank,kind\n\xff\n")
    with pytest.raises(InputError, match="no table of places"):
        layers._read_places(tmp_path / "n.csv")


LAYERS: dict[str, tuple[dict[str, Any], list[list[float]] | None, str]] = {
    "NaN": ({"value": np.nan}, None, "the layer n: voxel z=5 y=5 x=5 is NaN or infinite"),
    "infinite": ({"value": np.inf}, None, "voxel z=5 y=5 x=5 is NaN or infinite"),
    "complex": ({"dtype": "complex64"}, None, "holds complex64 values"),
    "objects": ({"dtype": object}, None, "holds object values"),
    "no slice": ({"shape": (0, 8, 8)}, None, r"has the shape \(0, 8, 8\)"),
    "flat voxels": ({"scale": (0.0, 1.0, 1.0)}, None, "the scale of the layer n: .* must be three numbers above 0"),
    "turned": ({"scale": (-1.0, 1.0, 1.0)}, None, "the scale of the layer n: .* must be three numbers above 0"),
    "unknown scale": ({"scale": (np.nan, 1.0, 1.0)}, None, "the scale of the layer n: .* must be three numbers"),
    "root outside": ({}, [[500, 5, 5]], "the root 500 5 5 .* lies outside"),
    "roots in time": ({}, [[0, 5, 5, 5]], "has points of 4 axes; three"),
}


@pytest.mark.parametrize("case", LAYERS)
def test_a_layer_that_cannot_be_traced_is_refused(case: str) -> None:
    facts, roots, message = LAYERS[case]
    data = take_picture(make_neuron(3)).astype(facts.get("dtype", "float32"))
    data = data[: facts["shape"][0], :8, :8] if "shape" in facts else data
    if "value" in facts:
        data[5, 5, 5] = facts["value"]
    image = SimpleNamespace(name="n", data=data, multiscale=False, scale=facts.get("scale", SIZE), translate=(0, 0, 0))
    image.world_to_data = lambda point: point
    points = SimpleNamespace(name="p", data=roots, data_to_world=lambda point: point)
    with pytest.raises(InputError, match=message):
        trace_layer(image, points if roots else None)


def test_sections_end_at_branch_points_and_tips() -> None:
    #  0 - 1 - 2 - 3      one branch at node 1
    #       \- 4
    points = np.array([[0, 0, 0], [0, 0, 1], [0, 0, 2], [0, 0, 3], [0, 1, 1]], dtype=float)
    tree = build_tree(points, np.array([-1, 0, 1, 2, 1]))
    sections = [section[:, 1:].tolist() for section in layers.list_sections(tree)]
    assert sections == [[[0, 0], [0, 1]], [[0, 1], [0, 2], [0, 3]], [[0, 1], [1, 1]]]


def test_what_is_no_result_is_left_to_other_plugins(tmp_path: Path) -> None:
    assert layers.get_reader(str(tmp_path / "image.tif")) is None
    assert layers.get_reader(str(tmp_path / "other.ome.zarr")) is None
    assert layers.get_reader([str(tmp_path / "a.swc"), str(tmp_path / "b.tif")]) is None


def test_a_folder_that_the_index_does_not_name_is_refused(infer_index: Path) -> None:
    with pytest.raises(InputError, match=r"does not name other\.ome\.zarr; open one of cross"):
        layers.read_paths(str(infer_index.parent / "other.ome.zarr"))


def test_a_lazy_image_is_indexed_as_an_array() -> None:
    array = np.arange(4 * 5 * 6).reshape(4, 5, 6)
    boxes: list[Box] = []

    def read(box: Box) -> np.ndarray:
        boxes.append(box)
        return array[box.slices]

    image = layers.LazyImage(array.dtype, (4, 5, 6), read)
    for index in (2, (2,), (slice(None), 3), (1, slice(0, 4, 2), slice(2, None)), (slice(None), -1, slice(1, 5)), -1):
        assert np.array_equal(image[index], array[index])
    assert boxes[0] == Box((2, 0, 0), (3, 5, 6))
    assert image[:, 4:4].shape == (4, 0, 6)
    assert np.array_equal(np.asarray(image), array)
    assert (image.ndim, image.size, len(image)) == (3, 120, 4)


def test_the_manifest_names_what_exists() -> None:
    manifest = yaml.safe_load((Path(layers.__file__).parent / "napari.yaml").read_text())
    for command in manifest["contributions"]["commands"]:
        module, _, name = command["python_name"].partition(":")
        # The module may import Qt, which need not be installed.
        source = Path(layers.__file__).parent / f"{module.rpartition('.')[2]}.py"
        definitions = [node.name for node in ast.parse(source.read_text()).body if hasattr(node, "name")]
        assert name in definitions
    commands = {command["id"] for command in manifest["contributions"]["commands"]}
    used = [item["command"] for kind in ("readers", "widgets") for item in manifest["contributions"][kind]]
    assert set(used) == commands
