"""`voxel_size`, `channel`, `range` and `root` are given alike to every verb that reads images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile

from hpc_neuro import cli, demo, infer, prepare, trace_stacks
from hpc_neuro.core.constants import EXIT_BAD_INPUT, EXIT_DONE, EXIT_FAILURES
from hpc_neuro.core.geometry import Box
from hpc_neuro.core.schema import ConfigError, load
from hpc_neuro.data import swc
from hpc_neuro.data.foreground import measure_foreground
from hpc_neuro.data.store import Store
from hpc_neuro.infer.volumes import InputVolume, open_inputs
from launch.__main__ import _plan_stages
from tests.helpers.stacks import make_neuron, take_picture
from tests.trace_stacks.test_predictor import save_brightness_student

CONFIGS: dict[str, tuple[Any, list[str]]] = {
    "trace": (trace_stacks.TraceStacksConfig, ["stacks=[n.tif]"]),
    "infer": (infer.InferConfig, ["inputs=[{image: n.tif}]", "model=bundled", "out=out"]),
    "demo": (demo.DemoConfig, ["data=pairs"]),
    "prepare": (prepare.PrepareConfig, ["images=pairs", "out=out"]),
}
WRONG = {
    "voxel_size=1,0.5": "voxel_size: 3 numbers are expected",
    "voxel_size=1,0.5,0": "must be three numbers above 0 in um",
    "voxel_size=1,1,inf": "must be three numbers above 0 in um",
    "voxel_size=1,1,1e-300": "must be three numbers above 0 in um",
    "channel=-1": "channel: .* greater than or equal to 0",
    "range=5,5": r"range \[5.0, 5.0\] must rise",
    "range=nan,5": "must rise; give darkest,brightest as two finite numbers",
    "range=5": "range: 2 numbers are expected",
}


@pytest.mark.parametrize("verb", CONFIGS)
def test_every_verb_takes_the_same_settings(verb: str) -> None:
    cls, keys = CONFIGS[verb]
    cfg = load(cls, None, [*keys, "voxel_size=1,0.5,0.25", "channel=1", "range=10,400"])
    assert (cfg.voxel_size, cfg.channel, cfg.range) == ((1, 0.5, 0.25), 1, (10, 400))


@pytest.mark.parametrize("verb", CONFIGS)
@pytest.mark.parametrize("key", WRONG)
def test_every_verb_refuses_the_same_values(verb: str, key: str) -> None:
    cls, keys = CONFIGS[verb]
    with pytest.raises(ConfigError, match=WRONG[key]):
        load(cls, None, [*keys, key])


@pytest.mark.parametrize("key", ["voxel_size=1,1,1", "channel=1", "range=1,2", "root=1,2,3"])
def test_settings_that_a_store_has_of_its_own_are_refused(key: str) -> None:
    with pytest.raises(ConfigError, match="has its own for each volume; leave it out"):
        load(infer.InferConfig, None, ["store=store", "model=bundled", "out=out", key])


# --- The root ---


@pytest.fixture
def stack(tmp_path: Path) -> Path:
    path = tmp_path / "n.tif"
    tifffile.imwrite(path, take_picture(make_neuron(3)))
    return path


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    return save_brightness_student(tmp_path / "weights")


def infer_command(weights: Path, *words: str) -> list[str]:
    return ["infer", *words, f"model={weights}", "voxel_size=1,0.5,0.5", "page=false"]


def test_infer_and_trace_begin_at_the_same_root(stack: Path, weights: Path, tmp_path: Path) -> None:
    root = tuple(make_neuron(3).points[-1].round(1).tolist())
    key = f"root={','.join(map(str, root))}"
    assert cli.main(infer_command(weights, str(stack), f"out={tmp_path / 'infer'}", key)) == EXIT_DONE
    assert cli.main(["trace", str(stack), "voxel_size=1,0.5,0.5", f"out={tmp_path / 'trace'}", key]) == EXIT_DONE

    for verb in ("infer", "trace"):
        tree = swc.read(tmp_path / verb / "swc" / "n.voxel.swc")
        assert len(tree.roots) == 1
        np.testing.assert_allclose(tree.points[tree.roots[0]], root, atol=1e-3)


@pytest.mark.parametrize("verb", ["infer", "trace"])
def test_a_root_outside_the_image_is_one_sentence(
    verb: str, stack: Path, weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = infer_command(weights) if verb == "infer" else ["trace"]
    assert cli.main([*command, str(stack), f"out={tmp_path / 'out'}", "root=3,4,500"]) == EXIT_BAD_INPUT
    sentence = f"the root 3, 4, 500 lies outside {stack}, whose shape is (40, 96, 128) (z, y, x)\n"
    assert capsys.readouterr().err.endswith(sentence)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("verb", ["infer", "trace"])
def test_one_root_for_two_images_is_refused(verb: str, stack: Path, weights: Path, tmp_path: Path) -> None:
    other = stack.with_name("m.tif")
    other.write_bytes(stack.read_bytes())
    command = infer_command(weights) if verb == "infer" else ["trace"]
    assert cli.main([*command, str(stack), str(other), f"out={tmp_path}/o", "root=3,4,5"]) == EXIT_BAD_INPUT

    # The advice of the refusal, obeyed: each image with its own.
    item = f"inputs=[{{image: {stack}, root: [3, 4, 5]}}, {{image: {other}}}]"
    cfg = load(infer.InferConfig, None, [item, f"model={weights}", "out=o", "voxel_size=1,1,1"])
    assert [volume.roots for volume in open_inputs(cfg) if isinstance(volume, InputVolume)] == [((3, 4, 5),), ()]


def test_the_root_of_an_entry_comes_before_the_common_one(stack: Path) -> None:
    item = f"inputs=[{{image: {stack}, roots: [[1, 2, 3], [4, 5, 6]]}}]"
    cfg = load(infer.InferConfig, None, [item, "model=bundled", "out=o", "root=7,8,9"])
    assert cfg.inputs[0].root is None
    assert len(cfg.inputs[0].roots) == 2


# --- The range ---


def test_prepare_keeps_the_given_range(stack: Path, tmp_path: Path) -> None:
    pairs = tmp_path / "pairs"
    pairs.mkdir()
    stack.rename(pairs / "n.tif")
    swc.write(pairs / "n.swc", make_neuron(3), unit="voxel")
    image = tifffile.imread(pairs / "n.tif")
    whole = Box.whole(image.shape)

    command = ["prepare", f"images={pairs}", "voxel_size=1,1,1", "range=30,90"]
    assert cli.main([*command, f"out={tmp_path / 'plain'}"]) == EXIT_DONE
    volume = Store(tmp_path / "plain")["n"]
    assert (volume.low, volume.high) == (30, 90)
    np.testing.assert_allclose(volume.normalized_image(whole), (np.clip(image, 30, 90) - 30) / 60, atol=1e-6)

    # Local contrast is measured between the two, and the image stays as it is.
    assert cli.main([*command, f"out={tmp_path / 'local'}", "contrast=local"]) == EXIT_DONE
    local = Store(tmp_path / "local")["n"]
    foreground = measure_foreground(lambda box: np.clip(image, 30, 90)[box.slices].astype(np.float32), image.shape)
    np.testing.assert_array_equal(np.rint(local.normalized_image(whole) * 255), foreground.probability(whole))
    np.testing.assert_array_equal(local.image(whole), image)


@pytest.mark.parametrize("contrast", ["range", "local"])
def test_a_hot_voxel_beyond_the_range_changes_nothing(contrast: str, tmp_path: Path) -> None:
    """The same image with voxels far above the range gives the same trees, with and without a student."""
    weights = save_brightness_student(tmp_path / "weights", contrast=contrast)
    image = take_picture(make_neuron(3)).astype(np.uint16)
    tifffile.imwrite(tmp_path / "plain.tif", np.minimum(image, 120))
    image[image > 120] = 60000
    tifffile.imwrite(tmp_path / "hot.tif", image)

    for name in ("plain", "hot"):
        path, keys = str(tmp_path / f"{name}.tif"), ["range=0,120", "voxel_size=1,1,1"]
        for model in ("none", weights):
            out = f"out={tmp_path / 'trace' / name / Path(model).name}"
            assert cli.main(["trace", path, out, f"model={model}", *keys]) == EXIT_DONE
        command = ["infer", path, f"out={tmp_path / 'infer' / name}", f"model={weights}", "page=false", *keys]
        assert cli.main(command) in (EXIT_DONE, EXIT_FAILURES)

    for folder in ("trace/{}/none", "trace/{}/weights", "infer/{}"):
        trees = [swc.read(tmp_path / folder.format(n) / "swc" / f"{n}.voxel.swc") for n in ("plain", "hot")]
        np.testing.assert_array_equal(trees[0].points, trees[1].points)
        assert len(trees[0]) > 20


# --- Words ---


def test_launch_takes_paths_as_the_verb_does(stack: Path, tmp_path: Path) -> None:
    verb = ["infer", str(stack), "model=bundled", f"out={tmp_path / 'out'}"]
    ((name, cfg),) = _plan_stages(None, verb)
    assert name == "infer"
    assert [item.image for item in cfg.inputs] == [stack]

    # A config and paths together, in any order.
    (tmp_path / "site.yaml").write_text("model: bundled\nrange: [0, 9]\n")
    ((_, cfg),) = _plan_stages(None, ["infer", str(stack), str(tmp_path / "site.yaml"), f"out={tmp_path / 'out'}"])
    assert ([item.image for item in cfg.inputs], cfg.range) == ([stack], (0, 9))
