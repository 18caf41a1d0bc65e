"""Inference by block: the blocks do not show, nothing is lost when killed, and what is written opens elsewhere."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import ome_zarr_models
import pytest
import tifffile
import zarr

from hpc_neuro import cli, infer
from hpc_neuro.core import morphology
from hpc_neuro.core.geometry import Box, Shape
from hpc_neuro.core.schema import ConfigError, InputError, load
from hpc_neuro.data import ome_zarr, swc
from hpc_neuro.data.formats import open_volume
from hpc_neuro.data.predictions import read_predictions
from hpc_neuro.data.store import Store
from hpc_neuro.infer import verify
from hpc_neuro.infer.predictor import Predictor
from hpc_neuro.infer.status_page import draw_block_map
from hpc_neuro.infer.tiling import Tiling
from hpc_neuro.models import sliding_window
from hpc_neuro.models.student import load_student
from tests.helpers.journal import drop_block, list_logs, list_times
from tests.helpers.small_volumes import KEYS, WINDOW, configure, probability, write_crossing


@pytest.mark.parametrize(
    ("block", "overlap"),
    [((8, 32, 32), 0.5), ((8, 64, 32), 0.5), ((64, 64, 64), 0.5), ((8, 32, 32), 0.0), ((8, 48, 32), 0.25)],
)
def test_blocks_do_not_show(model: Path, store: Path, block: Shape, overlap: float) -> None:
    """The blocked float probability is the whole volume's."""
    student, _ = load_student(model / "weights" / "best")
    volume = Store(store)["a"]
    plan = Tiling(WINDOW, overlap, student.patch, block, (4, 16, 16))
    image = volume.normalized_image(Box.whole(volume.shape))
    whole = sliding_window.predict(student, image, WINDOW, overlap)
    parts = np.zeros_like(whole)
    for b in plan.list_blocks(volume.shape):
        inner = b.write.relative_to(b.read.start).slices
        parts[b.write.slices] = sliding_window.predict(student, image[b.read.slices], WINDOW, overlap)[inner]
    np.testing.assert_allclose(parts, whole, atol=1e-4)
    assert whole.std() > 1e-4  # not a constant


def test_the_mask_is_the_probability_above_the_threshold(finished_run: Path) -> None:
    mask = np.asarray(ome_zarr.open_level(finished_run / "a.ome.zarr", label="mask").read().result())
    assert np.array_equal(mask, probability(finished_run, "a") >= np.ceil(0.45 * 255))
    index = json.loads((finished_run / "predictions.json").read_text())
    assert index["a"]["foreground_voxels"] == int(mask.sum())
    assert index["a"]["threshold"] == 0.45


def test_other_libraries_open_it(finished_run: Path, store: Path) -> None:
    folder = finished_run / "a.ome.zarr"
    image = ome_zarr_models.open_ome_zarr(zarr.open_group(folder, mode="r"))
    assert type(image).__name__ == "Image"
    group = zarr.open_group(folder, mode="r")
    assert np.array_equal(group["0"][:], probability(finished_run, "a"))
    assert group["0"].shards == (8, 32, 32)
    volume = open_volume(folder)
    assert volume.shape == Store(store)["a"].shape
    assert volume.voxel_size == pytest.approx(Store(store)["a"].voxel_size)


def test_a_pyramid_keeps_places(tmp_path: Path) -> None:
    """The center of mass of a blob, in micrometers, is the same on every level."""
    shape, size = (24, 80, 520), (1.0, 0.3, 0.3)
    ome_zarr.create(tmp_path / "v", "p", shape, size, (32, 64, 256), (32, 64, 64), "mask", {})
    blob = np.zeros(shape, np.uint8)
    blob[10:18, 20:36, 320:344] = 200
    ome_zarr.open_level(tmp_path / "v")[...].write(blob).result()
    for level in ome_zarr.plan_shards(shape, size, (32, 64, 256), "mask"):
        for piece in level:
            ome_zarr.build_shard(tmp_path / "v", shape, size, piece)
    levels = ome_zarr.plan_levels(shape, size)
    assert len(levels) > 1
    for number in range(len(levels)):
        volume = open_volume(tmp_path / "v", dataset=str(number))
        values = volume[Box.whole(volume.shape)].astype(float)
        center = [np.average(i, weights=values.ravel()) for i in np.unravel_index(np.arange(values.size), values.shape)]
        assert volume.affine is not None
        um = (volume.affine @ [*center, 1.0])[:3]
        off = np.abs(um - np.array([13.5 * 1.0, 27.5 * 0.3, 331.5 * 0.3]))
        assert np.all(off < 0.5 * np.array(size))  # half a voxel of the finest level


def test_damage_is_mended_by_the_same_command(model: Path, store: Path, finished_run: Path, tmp_path: Path) -> None:
    """A lost mark means that its block is made again, whatever the shard holds; the rest is left alone. Nothing stays
    of files that were being written when a run was killed."""
    cfg = configure(model, tmp_path / "o", f"store={store}")
    infer.run(cfg)
    image = ome_zarr.open_level(cfg.out / "a.ome.zarr")
    image[:8, :32, :32].write(np.full((8, 32, 32), 9, np.uint8)).result()
    drop_block(cfg.out)
    (cfg.out / "predictions.json").unlink()
    torn = [
        cfg.out / p
        for p in (
            "journal/.000009_all_00000000.log.00000001.part",
            "entries/.a.json.00000001.part",
            "swc/a/.0001.swc.00000001.part",
        )
    ]
    torn += [
        cfg.out / p
        for p in ("entries/.b.json.00000001.part", "proofread/.a.csv.00000001.part", "swc/.a.swc.00000001.part")
    ]
    for part in torn:
        part.parent.mkdir(parents=True, exist_ok=True)
        part.write_text("what a killed writer leaves")
    assert infer.run(cfg) == 0
    assert np.array_equal(probability(cfg.out, "a"), probability(finished_run, "a"))
    assert not list(cfg.out.rglob(".*.part"))


def test_a_plain_file_with_a_given_root(model: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    image = rng.integers(0, 20, (16, 48, 48), dtype=np.uint8)
    image[8, 24, 4:44] = 250
    tifffile.imwrite(tmp_path / "cell.tif", image, photometric="minisblack", metadata={"axes": "ZYX"})
    inputs = f"inputs=[{{image: {tmp_path / 'cell.tif'}, voxel_size: [1, 0.5, 0.5], root: [8, 24, 4]}}]"
    keys = ["trees=true", "page=true", "trace.threshold=0.01", "trace.root_snap=100"]
    cfg = configure(model, tmp_path / "o", inputs, *keys)
    assert infer.run(cfg) == 0
    entry = json.loads((cfg.out / "predictions.json").read_text())["cell"]
    assert entry["trees"] == 1
    assert (cfg.out / entry["swc"]).exists()
    assert (cfg.out / entry["swc_voxel"]).exists()
    page = (cfg.out / "infer.html").read_text()
    assert page.count("<rect ") == entry["blocks"]["all"]
    assert "data:image/jpeg" in page
    assert "1 tree, the least sure first" in page
    assert "Cable [µm]" in page
    assert "cable_um" not in page
    assert (cfg.out / "proofread" / "cell.csv").exists()


def test_the_map_of_a_single_block_is_a_word() -> None:
    assert draw_block_map({(0, 0, 0): "empty"}) == '<p class="small">1 block: empty</p>'
    two = draw_block_map({(0, 0, 0): "written", (0, 0, 1): "failed"})
    assert two.count("<rect ") == 2
    assert "2 blocks (1 written, 1 failed)" in two


def test_a_root_far_from_everything_is_listed_and_its_volume_has_no_trees(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = np.zeros((8, 32, 64), dtype=np.uint8)
    image[3:6, 14:18, 4:30] = 255
    tifffile.imwrite(tmp_path / "cell.tif", image, photometric="minisblack", metadata={"axes": "ZYX"})
    monkeypatch.setattr(Predictor, "predict", lambda self, image, seen=None: image)
    inputs = f"inputs=[{{image: {tmp_path / 'cell.tif'}, voxel_size: [1, 1, 1], root: [4, 16, 60]}}]"
    cfg = configure(model, tmp_path / "o", inputs, "trees=true", "page=true")
    assert infer.run(cfg) == 3
    (line,) = json.loads((cfg.out / "run.json").read_text())["failures"]
    assert line.startswith("cell, its trees: the root")
    entry = json.loads((cfg.out / "predictions.json").read_text())["cell"]
    assert (entry["trees"], entry["swc"], entry["probability"]) == (0, None, "cell.ome.zarr")
    assert "data:image/jpeg" in (cfg.out / "infer.html").read_text()


def test_a_neurite_too_faint_for_the_student_is_followed_in_the_image(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = np.zeros((16, 32, 96), dtype=np.uint8)
    image[6:10, 14:18, 4:90] = 50
    image[6:10, 14:18, 4:30] = image[6:10, 14:18, 58:90] = 200
    tifffile.imwrite(tmp_path / "cell.tif", image, photometric="minisblack", metadata={"axes": "ZYX"})
    monkeypatch.setattr(Predictor, "predict", lambda self, image, seen=None: (image > 0.5).astype(np.float32))
    inputs = f"inputs=[{{image: {tmp_path / 'cell.tif'}, voxel_size: [1, 1, 1], root: [8, 16, 5]}}]"
    ends = {}
    for gap in (35, 0):
        cfg = configure(model, tmp_path / f"o{gap}", inputs, "trees=true", f"trace.signal_gap={gap}")
        assert infer.run(cfg) == 0
        entry = json.loads((cfg.out / "predictions.json").read_text())["cell"]
        ends[gap] = swc.read(cfg.out / entry["swc_voxel"]).points[:, 2].max()
    assert ends[0] < 32
    assert ends[35] > 85
    kinds = [row.split(",")[1] for row in (tmp_path / "o35/proofread/cell.csv").read_text().splitlines()[1:]]
    assert "gap" in kinds, "a person is shown where the student saw nothing"


def test_two_neurons_that_touch_become_a_tree_each(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two crossing neurites with a root each; traced in blocks, which are not kept."""
    monkeypatch.setattr(Predictor, "predict", lambda self, image, seen=None: image)  # a student that is right
    inputs = f"inputs=[{write_crossing(tmp_path / 'cells.tif')}]"
    cfg = configure(model, tmp_path / "o", inputs, "trees=true", "page=true", "trace.block=[16,32,32]")
    assert infer.run(cfg) == 0
    entry = json.loads((cfg.out / "predictions.json").read_text())["cells"]
    assert entry["trees"] == 2
    for number, (start, end) in enumerate([((8, 4, 4), (8, 59, 59)), ((8, 60, 4), (8, 4, 60))], start=1):
        tree = swc.read(cfg.out / f"swc/cells/{number:04d}.voxel.swc")
        np.testing.assert_allclose(tree.points[0], start, atol=0.01)
        assert np.linalg.norm(tree.points - end, axis=1).min() < 5
        (tip,) = morphology.tips(tree)
        assert np.linalg.norm(tree.points[tip] - end) < 6
    assert not list((cfg.out / "strands").glob("**/*.npz"))
    page = (cfg.out / "infer.html").read_text()
    assert page.count("data:image/jpeg") == 3  # the volume and a sheet for each
    assert "Neuron 1: " in page
    assert "Neuron 2: " in page


def test_a_finished_run_is_traced_anew_by_other_settings(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two neurites, one of them short, then only the long one, then none: blocks stay, no older tree is left."""
    image = np.zeros((8, 32, 64), dtype=np.uint8)
    image[3:6, 6:10, 4:60] = 255
    image[3:6, 22:26, 4:30] = 255
    tifffile.imwrite(tmp_path / "cells.tif", image, photometric="minisblack", metadata={"axes": "ZYX"})
    monkeypatch.setattr(Predictor, "predict", lambda self, image, seen=None: image)
    inputs = f"inputs=[{{image: {tmp_path / 'cells.tif'}, voxel_size: [1, 1, 1]}}]"
    out, fresh = tmp_path / "o", tmp_path / "fresh"

    def trace_again(folder: Path, *keys: str) -> dict[str, bytes]:
        assert infer.run(configure(model, folder, inputs, "trees=true", *keys)) == 0
        return {
            path.relative_to(folder).as_posix(): path.read_bytes()
            for kind in ("swc", "proofread")
            for path in (folder / kind).rglob("*")
            if path.is_file()
        }

    both = trace_again(out, "trace.min_cable=10")
    assert {"swc/cells/0001.swc", "swc/cells/0002.swc"} < set(both)
    marks = list_times(out)
    assert marks
    one = trace_again(out, "trace.min_cable=40")
    assert one == trace_again(fresh, "trace.min_cable=40")
    assert "swc/cells.swc" in one
    assert "swc/cells/0001.swc" not in one
    assert trace_again(out, "trace.min_cable=400") == {}
    assert json.loads((out / "predictions.json").read_text())["cells"]["trees"] == 0
    assert trace_again(out, "trees=false") == {}
    assert marks == list_times(out)


@pytest.mark.parametrize(
    ("keys", "sentence"),
    [
        (["inputs=[{image: /nowhere.tif}]"], "nowhere"),
        (["store=/nowhere"], "does not exist"),
        (["split=val"], "no volume in the split val"),
        (["window=[8,30,32]"], "multiple of the student's patch"),
        (["model=/nowhere"], "holds no weights"),
    ],
)
def test_bad_input_is_one_sentence_and_nothing_is_written(
    model: Path, store: Path, tmp_path: Path, keys: list[str], sentence: str
) -> None:
    source = [] if any(k.startswith(("inputs", "store")) for k in keys) else [f"store={store}"]
    with pytest.raises((ConfigError, InputError), match=sentence):
        infer.run(configure(model, tmp_path / "o", *source, *keys))
    assert not (tmp_path / "o").exists()


def test_config_faults_are_said(model: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="give either images, .*or store=FOLDER"):
        configure(model, tmp_path)
    with pytest.raises(ConfigError, match="give either root="):
        configure(model, tmp_path, "inputs=[{image: x.tif, root: [1, 2, 3], roots: [[1, 2, 3]]}]")
    with pytest.raises(ConfigError, match="would be written twice"):
        configure(model, tmp_path, "inputs=[{image: a/x.tif}, {image: b/x.tif}]")
    with pytest.raises(ConfigError, match="'x' and 'x.voxel' would share files"):
        configure(model, tmp_path, "inputs=[{image: x.tif}, {image: x.voxel.tif}]")
    with pytest.raises(ConfigError, match="'x' and 'X' differ in capitals only.*give each its own `id`"):
        configure(model, tmp_path, "inputs=[{image: a/x.tif}, {image: b/X.tif}]")
    configure(model, tmp_path, "inputs=[{image: a/x.tif}, {image: b/X.tif, id: x2}]")


def test_the_forecast_counts_blocks_and_windows(model: Path, store: Path, tmp_path: Path) -> None:
    text = "\n".join(infer.forecast(configure(model, tmp_path / "o", f"store={store}", "trees=true")))
    assert "2 volumes" in text
    plan = Tiling(WINDOW, 0.5, (4, 16, 16), (8, 32, 32), (4, 16, 16))
    blocks = 2 * len(plan.list_blocks(Store(store)["a"].shape))
    assert f"{blocks} blocks" in text
    assert f"in {2 * blocks + 1} files: {2 * blocks} shards, 0 shards of the pyramids and 1 log of the journal" in text
    assert "at most 2 files more while trees are traced" in text


def test_a_run_writes_no_file_per_block(finished_run: Path) -> None:
    """The files of a finished run are its shards, their metadata, and some that do not grow with the blocks."""
    others = [
        path for path in finished_run.rglob("*") if path.is_file() and "c" not in path.relative_to(finished_run).parts
    ]
    assert len(list_logs(finished_run)) == 1
    assert len(others) < 20 < len(list_times(finished_run))


def test_a_folder_of_an_older_form_is_refused_and_the_advice_works(model: Path, store: Path, tmp_path: Path) -> None:
    cfg = configure(model, tmp_path / "o", f"store={store}")
    assert infer.run(cfg) == 0
    shutil.rmtree(cfg.out / "journal")
    marker = cfg.out / "blocks" / "a" / "0_0_0.json"
    marker.parent.mkdir(parents=True)
    marker.write_text("{}")
    before = {path: path.read_bytes() for path in cfg.out.rglob("*") if path.is_file()}
    for refuse in (lambda: infer.run(cfg), lambda: verify.check(cfg.out)):
        with pytest.raises(InputError, match="done marker of an older version") as caught:
            refuse()
    assert {path: path.read_bytes() for path in cfg.out.rglob("*") if path.is_file()} == before
    (folder,) = re.findall(r"remove (\S+) and run", str(caught.value))
    shutil.rmtree(folder)
    assert infer.run(cfg) == 0


def test_plain_paths_and_folders_are_predicted(model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "stacks"
    folder.mkdir()
    image = np.zeros((8, 32, 32), np.uint8)
    image[3:5, 10:14, 4:28] = 200
    for name in ("n10", "n2"):
        tifffile.imwrite(folder / f"{name}.tif", image, photometric="minisblack", metadata={"axes": "ZYX"})

    out = tmp_path / "out"
    words = ["infer", str(folder), f"model={model}", f"out={out}", "voxel_size=1,0.5,0.5", "range=0,200", *KEYS]
    assert cli.main(words) == 0
    assert list(read_predictions(out, "")) == ["n2", "n10"]
    assert open_volume(out / "n2.ome.zarr").voxel_size == pytest.approx((1, 0.5, 0.5))

    # The record holds one list of volumes, and resumes as it was given.
    cfg = load(infer.InferConfig, out / "config.yaml")
    assert cfg.images == ()
    assert [item.range for item in cfg.inputs] == [(0, 200), (0, 200)]
    assert cli.main(words) == 0
    assert load(infer.InferConfig, out / "config.yaml") == cfg


def test_a_volume_keeps_its_own_settings(model: Path, tmp_path: Path) -> None:
    items = "inputs=[{image: a.tif, voxel_size: [2, 1, 1], channel: 0}, {image: b.tif}]"
    cfg = configure(model, tmp_path, items, "images=[c.tif]", "voxel_size=1,0.5,0.5", "channel=1")
    assert [item.image.name for item in cfg.inputs] == ["a.tif", "b.tif", "c.tif"]
    assert [item.voxel_size for item in cfg.inputs] == [(2, 1, 1), (1, 0.5, 0.5), (1, 0.5, 0.5)]
    assert [item.channel for item in cfg.inputs] == [0, 1, 1]
    with pytest.raises(ConfigError, match=r"no file matches .*nothing\*\.tif"):
        configure(model, tmp_path, f"images=[{tmp_path}/nothing*.tif]")
