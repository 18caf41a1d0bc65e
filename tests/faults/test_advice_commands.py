"""What an error says to give, give again or build elsewhere, done to the letter."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch

from hpc_neuro import precompute
from hpc_neuro.cli import main
from hpc_neuro.core import morphology
from hpc_neuro.core.geometry import Box
from hpc_neuro.core.schema import InputError, load
from hpc_neuro.data import feature_cache, swc
from hpc_neuro.data.feature_cache.encoding import load_codings
from hpc_neuro.data.orientation import parse_orientations
from hpc_neuro.data.run_journal import require_current_form
from hpc_neuro.infer.viewer_layers import ViewerLayers
from hpc_neuro.napari_plugin import layers
from hpc_neuro.precompute import cache_tool
from hpc_neuro.precompute.config import PrecomputeConfig
from tests.evaluate.conftest import write_predictions
from tests.helpers.bright_student import save_bright_student
from tests.helpers.small_volumes import write_crossing
from tests.helpers.stacks import make_neuron, take_picture
from tests.helpers.tiny_store import write_store
from tests.precompute.conftest import KEYS as CACHE_KEYS
from tests.train.conftest import TINY

ROWS = "1 1 3 6 3 0.66 -1\n2 3 6 6 3 0.33 1\n3 3 9 9 4 0.33 2\n"
SIZE = "voxel_size=1,0.5,0.5"
CROP, PATCH = Box((0, 0, 0), (8, 16, 16)), (8, 16, 16)


def read_fault(command: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """What a command that is refused says."""
    capsys.readouterr()
    assert main(command) == 2
    return " ".join(capsys.readouterr().err.split())


# --- What is to be given ---


@pytest.fixture
def image(tmp_path: Path) -> Path:
    tifffile.imwrite(tmp_path / "n.tif", take_picture(make_neuron(3)))
    return tmp_path / "n.tif"


def test_a_stack_is_given(image: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "hpc-neuro trace STACK... [key=value ...]" in read_fault(["trace"], capsys)
    assert main(["trace", str(image), SIZE, f"out={tmp_path / 'out'}"]) == 0


def test_an_image_is_given(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_bright_student(tmp_path / "model")
    write_crossing(tmp_path / "a.tif")
    command = ["infer", f"model={tmp_path / 'model'}", f"out={tmp_path / 'out'}", "block=[8,32,32]", "chunk=[4,16,16]"]
    assert "as in hpc-neuro infer model=M IMAGE..., or store=FOLDER" in read_fault(command, capsys)
    assert main([*command, str(tmp_path / "a.tif"), SIZE]) == 0


def test_a_tree_is_given(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.swc").write_text(ROWS)
    assert "hpc-neuro swc check FILE..." in read_fault(["swc", "check"], capsys)
    assert main(["swc", "check", str(tmp_path / "a.swc")]) == 0


def test_two_trees_are_scored(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.swc").write_text(ROWS)
    assert "expected two: hpc-neuro score PRED.swc GOLD.swc" in read_fault(["score", str(tmp_path / "a.swc")], capsys)
    assert main(["score", str(tmp_path / "a.swc"), str(tmp_path / "a.swc")]) == 0


def test_the_folder_of_the_runs_is_given(image: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "hpc-neuro runs FOLDER" in read_fault(["runs", str(tmp_path / "none")], capsys)
    assert main(["trace", str(image), SIZE, f"out={tmp_path / 'runs' / 'a'}"]) == 0
    assert main(["runs", str(tmp_path / "runs")]) == 0


def test_images_without_trees_are_traced(image: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "my data").mkdir()
    image.rename(tmp_path / "my data" / "n.tif")
    text = read_fault(["demo", f"data={tmp_path / 'my data'}", f"out={tmp_path / 'out'}"], capsys)
    (words,) = re.findall(r"trace the images without labels: hpc-neuro (.*)", text)
    assert main([*shlex.split(words), SIZE, f"out={tmp_path / 'out'}"]) == 0


def test_a_student_is_in_its_weights_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_bright_student(tmp_path / "runs" / "train" / "weights" / "best")
    write_crossing(tmp_path / "a.tif")
    command = ["infer", str(tmp_path / "a.tif"), SIZE, f"out={tmp_path / 'out'}", "block=[8,32,32]", "chunk=[4,16,16]"]
    assert "or its weights/best" in read_fault([*command, f"model={tmp_path / 'runs'}"], capsys)
    assert main([*command, f"model={tmp_path / 'runs' / 'train' / 'weights' / 'best'}"]) == 0


def test_a_training_without_a_cache(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = write_store(tmp_path / "store", {"a": "train", "b": "val"})
    command = ["train", f"store={store}", f"out={tmp_path / 'out'}", *TINY, "--dry-run"]
    text = read_fault([*command, "distill={}"], capsys)
    assert "give `cache` (see hpc-neuro precompute), or set distill=null" in text
    assert main([*command, "distill=null"]) == 0


# --- Caches ---


@pytest.fixture(scope="module")
def store_and_cache(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A store of a training and a validation volume, and the cache of the first, along z."""
    folder = tmp_path_factory.mktemp("cached")
    store = write_store(folder / "store", {"a": "train", "b": "val"})
    assert precompute.run(configure_cache(store, folder / "cache")) == 0
    return store, folder / "cache"


def configure_cache(store: Path, out: Path, *keys: str) -> PrecomputeConfig:
    return load(PrecomputeConfig, None, [f"store={store}", f"out={out}", *CACHE_KEYS, "views=[z]", *keys])


def test_a_cache_that_lacks_something_is_built_elsewhere(store_and_cache: tuple[Path, Path], tmp_path: Path) -> None:
    store, folder = store_and_cache
    cache = feature_cache.FeatureCache(folder)
    teacher, volumes = cache.manifest["teacher"], cache.manifest["volumes"]
    faults = {
        "view": lambda old: old.require_match(volumes, teacher, ["z", "x"]),
        "volume": lambda old: old.require_match({**volumes, "b": "?"}, teacher, ["z"]),
        "orientation": lambda old: old.select_orientations(["flip_x"]),
    }
    for name, require in faults.items():
        with pytest.raises(feature_cache.CacheMismatch) as caught:
            require(cache)
        (words,) = re.findall(r"`hpc-neuro precompute ([^`]+)`", str(caught.value))
        keys = [word for word in shlex.split(words) if not word.startswith(("store=", "out="))]
        assert precompute.run(configure_cache(store, tmp_path / name, *keys)) == 0
        new = feature_cache.FeatureCache(tmp_path / name)
        if name == "volume":
            assert "b" in new.manifest["volumes"]
        else:
            require(new)


def test_a_cache_of_another_form_is_built_elsewhere(store_and_cache: tuple[Path, Path], tmp_path: Path) -> None:
    store, folder = store_and_cache
    damaged = Path(shutil.copytree(folder, tmp_path / "cache"))
    (damaged / "manifest.json").write_text("{}")
    with pytest.raises(InputError, match="build the cache again in another folder with `hpc-neuro precompute`"):
        cache_tool.main(["info", str(damaged)])
    assert precompute.run(configure_cache(store, tmp_path / "new")) == 0
    assert cache_tool.main(["info", str(tmp_path / "new")]) == 0


def test_a_lost_coding_is_made_again_by_the_same_build(tmp_path: Path) -> None:
    store = write_store(tmp_path / "store", {"a": "train", "b": "val"})
    build = configure_cache(store, tmp_path / "cache", "pca=4")
    assert precompute.run(build) == 0
    features = feature_cache.FeatureCache(build.out).read_crop("a", CROP, PATCH)

    coding = build.out / feature_cache.CODING
    for content in (b"", b"not a coding"):
        coding.write_bytes(content)
        with pytest.raises(InputError, match="`hpc-neuro precompute` with the same config builds the cache again"):
            feature_cache.FeatureCache(build.out).read_crop("a", CROP, PATCH)
        assert precompute.run(build) == 0
        again = feature_cache.FeatureCache(build.out).read_crop("a", CROP, PATCH)
        assert torch.equal(again["z"], features["z"])


def test_an_unreadable_coding_is_removed_with_its_cache(tmp_path: Path) -> None:
    store = write_store(tmp_path / "store", {"a": "train", "b": "val"})
    build = configure_cache(store, tmp_path / "cache", "pca=4")
    assert precompute.run(build) == 0
    coding = build.out / feature_cache.CODING
    coding.write_bytes(b"PK")
    with pytest.raises(InputError, match="remove the cache and build it again with `hpc-neuro precompute`"):
        load_codings(coding)
    shutil.rmtree(build.out)
    assert precompute.run(build) == 0
    assert set(load_codings(coding)) == {"z"}


def test_slices_of_an_orientation_are_built(store_and_cache: tuple[Path, Path], tmp_path: Path) -> None:
    store, folder = store_and_cache
    flip = parse_orientations(["flip_x"])[-1]
    with pytest.raises(InputError, match="build them with `hpc-neuro precompute` and augment_views"):
        feature_cache.FeatureCache(folder).read_crop("a", CROP, PATCH, flip)
    assert precompute.run(configure_cache(store, tmp_path / "new", "augment_views=[flip_x]")) == 0
    assert set(feature_cache.FeatureCache(tmp_path / "new").read_crop("a", CROP, PATCH, flip)) == {"z"}


# --- Predictions ---


def list_evaluate_words(store: Path, predictions: Path, out: Path) -> list[str]:
    """The command that scores predictions, with little to draw."""
    return ["evaluate", f"store={store}", f"predictions={predictions}", f"out={out}", "draws=100", "pictures=0"]


def test_predictions_of_another_split(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = write_store(tmp_path / "store", {"a": "test", "b": "val"})
    predictions = write_predictions(tmp_path / "predictions", store)
    command = list_evaluate_words(store, predictions, tmp_path / "out")
    text = read_fault([*command, "split=val"], capsys)
    assert "holds no prediction of b" in text
    assert "or choose another `split`" in text
    assert main([*command, "split=test"]) == 0


def test_a_predicted_tree_in_micrometers_is_converted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = write_store(tmp_path / "store", {"a": "test"})
    predictions = write_predictions(tmp_path / "my predictions", store)
    tree = swc.read(predictions / "swc" / "a.voxel.swc")
    size = (1.0, 0.5, 0.5)
    swc.write(predictions / "swc" / "a.swc", morphology.scale_tree(tree, size), unit="um", voxel_size=size)
    index = json.loads((predictions / "predictions.json").read_text())
    index["a"]["swc_voxel"] = "swc/a.swc"
    (predictions / "predictions.json").write_text(json.dumps(index))
    (predictions / "swc" / "a.voxel.swc").unlink()

    command = list_evaluate_words(store, predictions, tmp_path / "out")
    text = read_fault(command, capsys)
    (words,) = re.findall(r"the file that this writes: hpc-neuro (.*)", text)
    assert main(shlex.split(words)) == 0
    index["a"]["swc_voxel"] = "swc/a.voxel.swc"
    (predictions / "predictions.json").write_text(json.dumps(index))
    assert main(command) == 0
    scores = json.loads((tmp_path / "out" / "metrics.json").read_text())["volumes"]["a"]["model"]
    assert scores["f1_4vox"] == pytest.approx(1.0)


def test_results_of_an_older_version_are_removed(tmp_path: Path) -> None:
    out = tmp_path / "my run"
    (out / "blocks" / "a").mkdir(parents=True)
    (out / "blocks" / "a" / "0_0_0.json").write_text("{}")
    with pytest.raises(InputError) as caught:
        require_current_form(out)
    (path,) = re.findall(r"remove ('.*?'|\S+) and run `hpc-neuro infer` again", str(caught.value))
    shutil.rmtree(shlex.split(path)[0])
    require_current_form(out)


@pytest.fixture
def infer_run(tmp_path: Path) -> tuple[list[str], Path]:
    """A command of `infer` that has run, and its folder."""
    save_bright_student(tmp_path / "model")
    item = write_crossing(tmp_path / "cross.tif")
    out = tmp_path / "my out"
    keys = ["block=[8,32,32]", "chunk=[4,16,16]", "page=false", "trees=true"]
    keys += ["trace.threshold=0.01", "trace.root_snap=100", "trace.min_voxels=1", "trace.signal_gap=0"]
    command = ["infer", f"model={tmp_path / 'model'}", f"out={out}", f"inputs=[{item}]", *keys]
    assert main(command) == 0
    return command, out


def test_a_damaged_state_of_the_viewer_is_written_again(infer_run: tuple[list[str], Path]) -> None:
    _, out = infer_run
    (out / "proofread" / "cross.neuroglancer.json").write_text("{")
    viewer = ViewerLayers(out)
    with pytest.raises(InputError) as caught:
        viewer.build_state("cross", "http://here")
    (words,) = re.findall(r"`hpc-neuro (infer verify [^`]+)`", str(caught.value))
    assert main(shlex.split(words)) == 0
    assert viewer.build_state("cross", "http://here")["layers"]


def test_predictions_without_a_voxel_size_are_written_again(infer_run: tuple[list[str], Path]) -> None:
    command, out = infer_run
    index = json.loads((out / "predictions.json").read_text())
    del index["cross"]["voxel_size"]
    (out / "predictions.json").write_text(json.dumps(index))
    record = json.loads((out / "run.json").read_text())
    # Otherwise its digest tells first that it was edited.
    del record["outputs"]["predictions.json"]
    (out / "run.json").write_text(json.dumps(record))

    with pytest.raises(InputError, match="states no voxel size; remove it, and run the same `hpc-neuro infer` again"):
        ViewerLayers(out).get("cross.image/zarr.json", "http://here")
    (out / "predictions.json").unlink()
    assert main(command) == 0
    assert ViewerLayers(out).get("cross.image/zarr.json", "http://here") is not None


@pytest.mark.parametrize("position", [[10**30] * 3, [-1e308] * 3, [1e6, 0, 0]])
def test_a_view_far_from_the_image_is_shown(infer_run: tuple[list[str], Path], position: list[float]) -> None:
    _, out = infer_run
    path = out / "proofread" / "cross.neuroglancer.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "position": position}))
    assert ViewerLayers(out).build_state("cross", "http://here")["layers"]


def test_a_damaged_table_of_places_is_written_again(infer_run: tuple[list[str], Path], tmp_path: Path) -> None:
    command, out = infer_run
    table = out / "proofread" / "cross.csv"
    table.write_text("rank,kind,z,y,x,doubt\n1,gap,1\n")
    with pytest.raises(InputError, match="move it away, and give the same `hpc-neuro infer` again"):
        layers.read_paths(str(out / "predictions.json"))
    table.rename(tmp_path / "away.csv")
    assert main(command) == 0
    layers.read_paths(str(out / "predictions.json"))


def test_a_damaged_index_of_traces_is_written_again(image: Path, tmp_path: Path) -> None:
    command = ["trace", str(image), SIZE, f"out={tmp_path / 'out'}"]
    assert main(command) == 0
    (tmp_path / "out" / "trace.json").write_text('{"stacks": {"n": {}}}')
    with pytest.raises(InputError, match="give the same `hpc-neuro trace` again"):
        layers.read_paths(str(tmp_path / "out" / "trace.json"))
    assert main(command) == 0
    assert np.array_equal(
        np.asarray(layers.read_paths(str(tmp_path / "out" / "trace.json"))[0][0]), tifffile.imread(image)
    )
