"""The plugin inside napari, without a screen.

Qt's offscreen platform has no OpenGL, so that layers are added to napari's model of a viewer, and the
window is opened without layers.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile

from hpc_neuro import cli
from hpc_neuro.napari_plugin import layers
from tests.helpers.stacks import make_neuron, take_picture

os.environ.setdefault("QT_QPA_PLATFORM", "offscreen")
REASON = "napari is not installed; `pip install '.[napari]'` installs it"
napari = pytest.importorskip("napari", reason=REASON)
npe2 = pytest.importorskip("npe2", reason=REASON)
magicgui = pytest.importorskip("magicgui", reason=REASON)
pytest.importorskip("qtpy", reason=REASON)
pytestmark = pytest.mark.filterwarnings("default")  # those of napari's own dependencies
MANIFEST = Path(layers.__file__).parent / "napari.yaml"
SIZE = (1.0, 0.5, 0.5)


@pytest.fixture
def viewer() -> Any:
    """A viewer that knows the plugin, as after an installation."""
    manager = npe2.PluginManager.instance()
    if "hpc_neuro" not in manager:
        manager.register(npe2.PluginManifest.from_file(MANIFEST))
    return napari.components.ViewerModel()


@pytest.fixture(scope="module")
def app() -> Any:
    from qtpy.QtWidgets import QApplication

    return QApplication.instance() or QApplication([])


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("stack") / "n.tif"
    tifffile.imwrite(path, take_picture(make_neuron(3)))
    return path


def get_command(name: str) -> Callable[..., Any]:
    function: Callable[..., Any] = npe2.PluginManager.instance().commands.get(f"hpc_neuro.{name}")
    return function


def to_points(shapes: Any) -> np.ndarray:
    return np.concatenate([np.asarray(path) for path in shapes.data])


def test_the_manifest_is_valid() -> None:
    manifest = npe2.PluginManifest.from_file(MANIFEST)
    manifest.validate_imports()
    assert {widget.display_name for widget in manifest.contributions.widgets} == {"Trace", "Places to proofread"}


def test_a_result_is_opened_through_the_plugin(viewer: Any, stack: Path, tmp_path: Path) -> None:
    assert cli.main(["trace", str(stack), "voxel_size=1,0.5,0.5", f"out={tmp_path / 'out'}"]) == 0
    viewer.open(str(tmp_path / "out" / "trace.json"), plugin="hpc_neuro")
    image, trees = viewer.layers["n"], viewer.layers["n trees"]
    assert np.allclose(image.scale, SIZE)
    assert np.allclose(trees.scale, SIZE)
    assert np.array_equal(np.asarray(image.data), tifffile.imread(stack))

    # The tree lies on bright voxels of the image.
    z, y, x = np.rint(to_points(trees)).astype(int).T
    assert np.median(tifffile.imread(stack)[z, y, x]) > np.quantile(tifffile.imread(stack), 0.95)


def test_the_layer_in_view_is_traced(viewer: Any, app: Any, stack: Path) -> None:
    gold = make_neuron(3)
    viewer.add_image(tifffile.imread(stack), name="mine", scale=SIZE, translate=(0, 7, 0))
    form = magicgui.magicgui(get_command("trace_layer"))
    assert {"image", "roots", "search_somas"} <= {widget.name for widget in form}
    (layer,) = get_command("trace_layer")(viewer.layers["mine"])
    (trees,) = viewer._add_layer_from_data(*layer)
    assert trees.name == "mine trees"
    assert np.allclose(trees.translate, (0, 7, 0))

    # Every node of the gold tree has cable nearby.
    points = to_points(trees)
    distance = np.array([np.linalg.norm(points - node, axis=1).min() for node in gold.points])
    assert np.mean(distance < 4) > 0.9


def test_points_are_the_roots(viewer: Any, stack: Path) -> None:
    gold = make_neuron(3)
    image = viewer.add_image(tifffile.imread(stack), name="mine", scale=SIZE)
    # Points in micrometers, as a layer without a scale has them.
    roots = viewer.add_points(gold.points[:1] * SIZE, name="root", ndim=3)
    ((paths, arguments, kind),) = get_command("trace_layer")(image, roots)
    assert kind == "shapes"
    assert set(arguments["features"]["tree"]) == {1}
    assert np.linalg.norm(paths[0][0] - gold.points[0]) < 6


def test_a_layer_that_is_no_stack_is_refused(viewer: Any) -> None:
    flat = viewer.add_image(np.zeros((8, 8)), name="flat")
    with pytest.raises(ValueError, match="the layer flat has the shape"):
        get_command("trace_layer")(flat)


def test_a_click_in_the_table_jumps_to_the_place(viewer: Any, app: Any) -> None:
    viewer.add_image(np.zeros((20, 40, 40)), name="image", scale=SIZE)
    rows = [
        {"kind": "gap", "z": 3, "y": 4, "x": 5, "doubt": 0.9},
        {"kind": "end", "z": 15, "y": 30, "x": 20, "doubt": 0.5},
    ]
    ((points, arguments, _),) = layers._build_places("n", rows, SIZE)
    table = get_command("places_table")(viewer)
    assert table.rowCount() == 0
    layer = viewer.add_points(points, **arguments)
    assert table.rowCount() == 2
    texts = [[table.item(row, column).text() for column in range(6)] for row in range(2)]
    assert texts == [["1", "gap", "0.90", "3", "4", "5"], ["2", "end", "0.50", "15", "30", "20"]]

    table.setCurrentCell(1, 0)
    assert np.allclose(viewer.dims.point, (15, 15, 10))
    assert np.allclose(viewer.scene.camera.center, (15, 15, 10))
    assert set(layer.selected_data) == {1}

    viewer.layers.remove(layer)
    assert table.rowCount() == 0


def test_both_widgets_open_in_the_window(viewer: Any, app: Any) -> None:
    window = napari.Viewer(show=False)
    try:
        _, form = window.window.add_plugin_dock_widget("hpc_neuro", "Trace")
        assert form.image.choices == ()
        _, table = window.window.add_plugin_dock_widget("hpc_neuro", "Places to proofread")
        assert table.columnCount() == 6
    finally:
        window.close()
