"""A student in `trace`: whole and blocked alike, scaled to its threshold, and its tree beside that of the image."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from numpy.typing import NDArray

from hpc_neuro import cli
from hpc_neuro.core.constants import EXIT_BAD_INPUT, EXIT_DONE
from hpc_neuro.core.geometry import Box
from hpc_neuro.core.morphology import Tree, concatenate_trees
from hpc_neuro.data import swc
from hpc_neuro.data.foreground import Foreground, measure_foreground
from hpc_neuro.data.intensity import compute_intensity_range, normalize
from hpc_neuro.data.resample import Resampling
from hpc_neuro.metrics.cable import match_cable
from hpc_neuro.models import sliding_window
from hpc_neuro.models.config import StudentConfig
from hpc_neuro.models.student import build_student, save_student
from hpc_neuro.trace_stacks import predictor as module
from hpc_neuro.trace_stacks.predictor import StackPredictor
from hpc_neuro.trace_stacks.sanity import list_warnings
from hpc_neuro.trace_stacks.tracer import LEAST_SEEN, trace_image
from tests.helpers.shapes import paint_tree
from tests.helpers.stacks import SHAPE, make_neuron, take_picture

WINDOW = (16, 32, 32)


def save_brightness_student(folder: Path, threshold: float = 0.3, contrast: str = "range", **more: object) -> Path:
    """A student whose probability rises with the brightness of a voxel: the head sees what the first layer saw."""
    cfg = StudentConfig(transformer=False, patch=(4, 8, 8), channels=(8, 4, 4))
    student = build_student(cfg)
    state = {name: torch.zeros_like(value) for name, value in student.state_dict().items()}

    # Each of the four voxels of a folded cell passes through a channel of its own.
    weight = state["encoder.first.conv.weight"]
    for voxel in range(4):
        weight[voxel, voxel, 1, 1, 1] = 1.0
        state["decoder.head.weight"][voxel, voxel] = 20.0
    state["decoder.head.bias"] -= 6.0
    extra = {"window": list(WINDOW), "mirrored": True, "threshold": threshold, "contrast": contrast, **more}
    save_student(folder, cfg, state, extra)
    return folder


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    return save_brightness_student(tmp_path / "weights")


def test_blocks_predict_what_the_whole_stack_does_and_the_threshold_is_128(
    weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = take_picture(make_neuron(3))
    z, y, x = image.shape
    student = StackPredictor(weights)
    foreground = measure_foreground(lambda box: image[box.slices], (z, y, x))
    whole = student.predict(foreground, "n")

    # The same numbers as those of `infer`, scaled.
    low, high = compute_intensity_range(lambda box: image[box.slices], (z, y, x))
    exact = sliding_window.predict(student.student, normalize(image, low, high), WINDOW, 0.25)
    np.testing.assert_array_equal(whole >= 128, np.rint(exact * 255) / 255 >= 0.3)
    assert whole.max() > 200

    monkeypatch.setattr(module, "_WHOLE_VOXELS", 0)
    monkeypatch.setattr(module, "_BLOCK", (16, 64, 64))
    monkeypatch.setattr(module, "KEPT_VOXELS", 0)
    blocked = student.predict(foreground, "n")
    assert np.abs(blocked.astype(int) - whole).max() <= 1


def test_a_student_of_local_contrast_sees_the_foreground(tmp_path: Path) -> None:
    image = take_picture(make_neuron(3)).astype(np.float32)
    z, y, x = image.shape
    # A bright side, on which the range of the whole volume would be spent.
    image += 4 * image.max() * (np.arange(x) > 0.9 * x)
    foreground = measure_foreground(lambda box: image[box.slices], (z, y, x))
    student = StackPredictor(save_brightness_student(tmp_path / "weights", contrast="local"))
    seen = foreground.probability(Box.whole((z, y, x))).astype(np.float32) / np.float32(255)
    exact = sliding_window.predict(student.student, seen, WINDOW, 0.25)
    np.testing.assert_array_equal(student.predict(foreground, "n") >= 128, np.rint(exact * 255) / 255 >= 0.3)


def test_an_image_of_other_voxels_than_those_of_the_training_is_resampled_or_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    sizes = [[1.0, 0.3, 0.3], [2.0, 0.4, 0.4]]
    weights = save_brightness_student(tmp_path / "weights", voxel_sizes=sizes)
    stack = tmp_path / "n.tif"
    tifffile.imwrite(stack, take_picture(make_neuron(3)))
    for verb, *keys in (["trace"], ["infer", "page=false", "trees=false", "block=[16,64,64]"]):
        command = [verb, str(stack), f"model={weights}", *keys]
        for number, size in enumerate(("1,0.3,0.3", "3,0.6,0.6")):
            assert cli.main([*command, f"voxel_size={size}", f"out={tmp_path / verb / str(number)}"]) == EXIT_DONE
        # An earlier test decides whether the log goes to the terminal or to pytest.
        assert "are resampled" not in caplog.text + capsys.readouterr().err
        near = [*command, "voxel_size=1,0.3,0.1", f"out={tmp_path / verb / 'near'}"]
        assert cli.main(near) == EXIT_DONE
        log = caplog.text + capsys.readouterr().err
        assert "voxels of 1 x 0.3 x 0.1 um are resampled to 1 x 0.3 x 0.3 um" in log
        caplog.clear()

        for number, size in enumerate(("1,4.5,4.5", "1,0.3,0.03")):
            far = [*command, f"voxel_size={size}", f"out={tmp_path / verb / 'far' / str(number)}"]
            assert cli.main(far) == EXIT_BAD_INPUT
            message = capsys.readouterr().err
            assert "1 x 0.3 x 0.3 to 2 x 0.4 x 0.4 um" in message
            assert not (tmp_path / verb / "far" / str(number) / "swc").exists()

            # The advice is followed.
            assert "any_voxel_size=true" in message
            assert cli.main([*far, "any_voxel_size=true"]) == EXIT_DONE


def test_a_resampled_stack_gives_the_tree_of_the_image(tmp_path: Path) -> None:
    """Voxels half as wide as the student knows: the tree, its root and its radii are those of the image."""
    picture = take_picture(make_neuron(3))
    fine = Resampling(picture.shape, (1.0, 1.0, 1.0), (1.0, 0.25, 0.25))
    image = fine.read_new(lambda box: picture[box.slices])(Box.whole(fine.new_shape))
    tifffile.imwrite(tmp_path / "n.tif", image)
    weights = save_brightness_student(tmp_path / "weights", voxel_sizes=[[1.0, 1.0, 1.0], [1.0, 1.0, 1.0]])
    gold = make_neuron(3)
    root = fine.move_to_new(gold.points[:1])[0].clip(0)
    words = ["trace", str(tmp_path / "n.tif"), f"model={weights}", f"root={','.join(map(str, root.round(1)))}"]
    out = tmp_path / "out"
    assert cli.main([*words, "voxel_size=1,0.25,0.25", f"out={out}"]) == EXIT_DONE

    # Both files hold the same tree, one in voxels of the image and one in micrometers.
    voxels, um = swc.read(out / "swc" / "n.voxel.swc"), swc.read(out / "swc" / "n.swc")
    np.testing.assert_allclose(voxels.points * [1, 0.25, 0.25], um.points, atol=1e-3)
    assert match_cable(fine.move_tree_back(voxels), gold, 3.0).f1 > 0.9
    assert np.linalg.norm(voxels.points[0] - root) < 12

    tifffile.imwrite(tmp_path / "plain.tif", picture)
    words = ["trace", str(tmp_path / "plain.tif"), f"model={weights}", "voxel_size=1,1,1", f"out={tmp_path / 'plain'}"]
    assert cli.main(words) == EXIT_DONE
    plain = swc.read(tmp_path / "plain" / "swc" / "plain.swc")
    assert np.median(um.radii) == pytest.approx(np.median(plain.radii), rel=0.15)

    result = json.loads((out / "trace.json").read_text())["stacks"]["n"]
    assert result["resampled_voxel_size"] == [1.0, 1.0, 1.0]
    assert result["voxel_size"] == [1.0, 0.25, 0.25]
    assert "traced in voxels of 1 x 1 x 1" in (out / "trace.html").read_text()


def test_without_a_voxel_size_nothing_is_resampled_and_it_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = save_brightness_student(tmp_path / "weights", voxel_sizes=[[1.0, 0.3, 0.3], [2.0, 0.4, 0.4]])
    tifffile.imwrite(tmp_path / "n.tif", take_picture(make_neuron(3)))
    words = ["trace", str(tmp_path / "n.tif"), f"model={weights}", f"out={tmp_path / 'out'}"]
    assert cli.main(words) == EXIT_DONE
    log = caplog.text + capsys.readouterr().err
    assert "cannot be resampled" in log
    assert "1 x 0.3 x 0.3 to 2 x 0.4 x 0.4 um" in log

    # The advice is followed.
    assert cli.main([*words, "voxel_size=1,0.3,0.1"]) == EXIT_DONE
    assert "are resampled to 1 x 0.3 x 0.3 um" in caplog.text + capsys.readouterr().err


def test_the_student_finds_the_neurites_and_the_page_shows_them(weights: Path, tmp_path: Path) -> None:
    stack, out = tmp_path / "n.tif", tmp_path / "out"
    tifffile.imwrite(stack, take_picture(make_neuron(3)))
    command = ["trace", str(stack), f"model={weights}", "voxel_size=1,1,1", f"out={out}"]
    assert cli.main(command) == EXIT_DONE
    assert match_cable(swc.read(out / "swc" / "n.voxel.swc"), make_neuron(3), 3.0).f1 > 0.9

    result = json.loads((out / "trace.json").read_text())["stacks"]["n"]
    assert result["model"] == str(weights)
    assert result["figures"]["agreement"] > 0.9
    assert result["doubt"] < 0.5
    assert "with the student" in (out / "swc" / "n.swc").read_text()

    # Other weights are another result, and the same ones are none.
    tree = out / "swc" / "n.swc"
    before = tree.stat().st_mtime_ns
    assert cli.main(command) == EXIT_DONE
    assert tree.stat().st_mtime_ns == before
    save_brightness_student(weights, threshold=0.6)
    assert cli.main(command) == EXIT_DONE
    after = tree.stat().st_mtime_ns
    assert after > before
    assert cli.main([*command[:2], "model=none", *command[3:]]) == EXIT_DONE
    assert tree.stat().st_mtime_ns > after


def test_a_student_that_finds_another_tree_than_the_image_is_doubted(tmp_path: Path) -> None:
    weights = save_brightness_student(tmp_path / "weights", threshold=0.9999)
    stack, out = tmp_path / "n.tif", tmp_path / "out"
    image = take_picture(make_neuron(3))
    # Only one half of the neuron is bright enough for the student.
    image[:, :, image.shape[2] // 2 :] //= 3
    tifffile.imwrite(stack, image)
    assert cli.main(["trace", str(stack), f"model={weights}", f"out={out}"]) == EXIT_DONE
    warnings = json.loads((out / "trace.json").read_text())["stacks"]["n"]["warnings"]
    assert any("compare with model=none" in warning for warning in warnings)


def test_weights_that_are_not_there_are_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stack, out = tmp_path / "n.tif", tmp_path / "out"
    tifffile.imwrite(stack, take_picture(make_neuron(3)))
    assert cli.main(["trace", str(stack), f"model={tmp_path}", f"out={out}"]) == EXIT_BAD_INPUT
    assert "holds no weights" in capsys.readouterr().err
    assert not out.exists()


def test_a_stack_that_is_dark_on_bright_is_inverted_for_the_student(weights: Path) -> None:
    image = take_picture(make_neuron(3))
    z, y, x = image.shape
    dark = 255 - image
    student = StackPredictor(weights)
    trace = trace_image(lambda box: dark[box.slices], (z, y, x), (1, 1, 1), predictor=student)
    assert trace.foreground.is_inverted
    assert trace.probability is not None
    mask = np.asarray(trace.probability(Box.whole((z, y, x))), dtype=np.uint8) >= 128
    assert mask.mean() < 0.05


class Oracle(StackPredictor):
    """A fake that predicts what it is told: no real student errs on request."""

    def __init__(self, prediction: NDArray[np.uint8]) -> None:
        self.prediction = prediction

    def predict(self, foreground: Foreground, label: str) -> NDArray[np.uint8]:
        return self.prediction


def paint_prediction(tree: Tree) -> NDArray[np.uint8]:
    return np.asarray(255 * (paint_tree(tree, SHAPE, 1.8) > 0.5), dtype=np.uint8)


def test_a_student_joins_what_the_image_breaks_and_ends_nowhere_that_it_is_dark() -> None:
    gold = make_neuron(3)
    image = take_picture(gold)
    prediction = paint_prediction(gold)

    # The student misses a stretch that the image shows, and sees a cable in the dark that leaves the neuron.
    middle = int(gold.points[len(gold) // 4, 2])
    prediction[:, :, middle : middle + 8] = 0
    tip = gold.points[int(np.argmax(gold.points[:, 2]))].astype(int)
    prediction[tip[0] - 1 : tip[0] + 2, 2 : tip[1], tip[2] - 1 : tip[2] + 2] = 255

    z, y, x = gold.points[0].tolist()
    trace = trace_image(lambda box: image[box.slices], SHAPE, None, roots=[(z, y, x)], predictor=Oracle(prediction))
    score = match_cable(concatenate_trees(trace.trees), gold, 4.0)
    assert score.precision > 0.9
    assert score.recall > 0.95
    assert trace.figures.seen_share is not None
    assert trace.figures.seen_share > 0.5


def test_a_student_is_followed_alone_where_the_image_is_bright_elsewhere() -> None:
    gold = make_neuron(3)
    image = take_picture(gold)
    # Bright stripes of tissue are more foreground than the neuron.
    stripes = (np.arange(SHAPE[1]) % 12 < 4)[:, None] & np.ones(SHAPE[2], dtype=bool)
    image[:4, stripes] = 200
    image[-4:, stripes] = 200

    trace = trace_image(lambda box: image[box.slices], SHAPE, None, predictor=Oracle(paint_prediction(gold)))
    assert trace.figures.seen_share is not None
    assert trace.figures.seen_share < LEAST_SEEN
    assert match_cable(concatenate_trees(trace.trees), gold, 4.0).f1 > 0.9
    (warning,) = [text for text in list_warnings(trace.figures, False, True) if "followed alone" in text]
    assert "model=none" in warning


def test_a_student_that_finds_nothing_leaves_the_image_to_itself() -> None:
    gold = make_neuron(3)
    image = take_picture(gold)
    blind = Oracle(np.zeros(SHAPE, dtype=np.uint8))
    trace = trace_image(lambda box: image[box.slices], SHAPE, None, predictor=blind)
    plain = trace_image(lambda box: image[box.slices], SHAPE, None)
    assert trace.figures.followed == "image"
    assert match_cable(concatenate_trees(trace.trees), concatenate_trees(plain.trees), 1.0).f1 == 1.0
    assert any("the student finds no neurite" in text for text in list_warnings(trace.figures, False, True))

    # In noise the student is believed.
    noise = np.clip(np.random.default_rng(0).normal(-10, 20, SHAPE), 0, 255).astype(np.uint8)
    assert not trace_image(lambda box: noise[box.slices], SHAPE, None, predictor=blind).trees
