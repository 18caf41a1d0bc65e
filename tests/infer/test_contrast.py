"""`prepare contrast=local`: the store, the training and the prediction all see the foreground of `trace`."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import tifffile

import hpc_neuro
from hpc_neuro import cli
from hpc_neuro.core.constants import EXIT_BAD_INPUT, EXIT_DONE
from hpc_neuro.core.geometry import Box
from hpc_neuro.core.schema import InputError, load
from hpc_neuro.data import ome_zarr, swc
from hpc_neuro.data.foreground import measure_foreground
from hpc_neuro.data.store import Store
from hpc_neuro.train import TrainConfig
from hpc_neuro.train.setup import build_parts
from tests.helpers.stacks import make_neuron, take_picture
from tests.helpers.tiny_store import write_store
from tests.trace_stacks.test_predictor import save_brightness_student


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    folder = tmp_path / "pairs"
    folder.mkdir()
    for seed, name in ((3, "n1"), (4, "n2")):
        neuron = make_neuron(seed)
        tifffile.imwrite(folder / f"{name}.tif", take_picture(neuron))
        swc.write(folder / f"{name}.swc", neuron, unit="voxel")
    return folder


def prepare(pairs: Path, out: Path, *keys: str) -> Store:
    command = ["prepare", f"images={pairs}", f"out={out}", "voxel_size=[1,1,1]", "split.test=[n2]", *keys]
    assert cli.main(command) == EXIT_DONE
    return Store(out)


def test_the_store_keeps_the_image_and_gives_networks_its_foreground(pairs: Path, tmp_path: Path) -> None:
    local, plain = prepare(pairs, tmp_path / "local", "contrast=local"), prepare(pairs, tmp_path / "plain")
    volume = local["n1"]
    whole = Box.whole(volume.shape)
    image = tifffile.imread(pairs / "n1.tif")
    np.testing.assert_array_equal(volume.image(whole), image)

    foreground = measure_foreground(lambda box: image[box.slices], volume.shape)
    np.testing.assert_array_equal(np.rint(volume.normalized_image(whole) * 255), foreground.probability(whole))
    assert volume.contrast == "local"
    assert plain["n1"].contrast == "range"

    # Targets are those of the image, and another contrast is another volume.
    np.testing.assert_array_equal(volume.mask(whole), plain["n1"].mask(whole))
    assert volume.digest != plain["n1"].digest
    volume.verify()


def test_a_training_says_what_its_student_saw_and_refuses_a_mixture(pairs: Path, tmp_path: Path) -> None:
    prepare(pairs, tmp_path / "local", "contrast=local")
    keys = ["transfer.rule=scratch", "distill=null", "crop.size=[16,32,32]"]
    cfg = load(TrainConfig, None, [f"store={tmp_path / 'local'}", f"out={tmp_path / 'run'}", *keys])
    assert build_parts(cfg).contrast == "local"

    mixed = write_store(tmp_path / "mixed", {"a": "train", "b": "train"})
    index = json.loads((mixed / "dataset.json").read_text())
    index["volumes"]["a"]["contrast"] = "local"
    (mixed / "dataset.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match=r"contrasts local \(a\) and range \(b\)"):
        build_parts(load(TrainConfig, None, [f"store={mixed}", f"out={tmp_path / 'run'}", *keys]))


def test_files_are_predicted_with_the_contrast_of_the_student(pairs: Path, tmp_path: Path) -> None:
    weights = save_brightness_student(tmp_path / "weights", contrast="local")
    out = tmp_path / "out"
    inputs = f"inputs=[{{image: {pairs / 'n2.tif'}, voxel_size: [1, 1, 1]}}]"
    command = ["infer", f"model={weights}", f"out={out}", inputs, "block=[16,64,64]", "trees=false", "page=false"]
    assert cli.main(command) == EXIT_DONE
    written = ome_zarr.open_level(out / "n2.ome.zarr", 0)
    probability = hpc_neuro.predict(pairs / "n2.tif", weights)
    shape = probability.shape
    blocks = ome_zarr.read_box(written, Box.whole((shape[0], shape[1], shape[2])))
    assert np.abs(blocks.astype(int) - np.rint(probability * 255)).max() <= 1

    # The same student with the range of the volume is another one.
    other = hpc_neuro.predict(pairs / "n2.tif", save_brightness_student(tmp_path / "range"))
    assert np.abs(other - probability).max() > 0.2


def test_a_store_of_another_contrast_is_refused_with_the_command_that_helps(
    pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = save_brightness_student(tmp_path / "weights", contrast="local")
    prepare(pairs, tmp_path / "plain")
    capsys.readouterr()
    command = ["infer", f"model={weights}", f"out={tmp_path / 'out'}", "trees=false", "page=false"]
    assert cli.main([*command, f"store={tmp_path / 'plain'}"]) == EXIT_BAD_INPUT
    message = capsys.readouterr().err
    assert "contrast=local" in message

    # The advice is followed.
    prepare(pairs, tmp_path / "again", "contrast=local")
    assert cli.main([*command, f"store={tmp_path / 'again'}"]) == EXIT_DONE

    train = ["train", f"init={weights}", f"out={tmp_path / 'run'}", "distill=null", "student.transformer=false"]
    train += ["student.patch=[4,8,8]", "student.channels=[8,4,4]", "crop.size=[16,32,32]"]
    assert cli.main([*train, f"store={tmp_path / 'plain'}", "--dry-run"]) == EXIT_BAD_INPUT
    assert "with contrast=local" in capsys.readouterr().err
    assert cli.main([*train, f"store={tmp_path / 'again'}", "--dry-run"]) == EXIT_DONE
