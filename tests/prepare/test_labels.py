"""Label volumes in the place of trees: prepared, trained on, predicted, and scored by their voxels."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import tifffile

from hpc_neuro import cli
from hpc_neuro.core.constants import EXIT_BAD_INPUT, EXIT_DONE, UNLABELED
from hpc_neuro.core.geometry import Box
from hpc_neuro.data.store import Store

SHAPE = (16, 64, 64)
KEY = "labels={0: unlabelled, 1: background, 2: neurite, 3: background}"


def write_pairs(folder: Path, count: int = 2) -> Path:
    """Images of a bright bar, with sparse labels in three slices; a manifest of them."""
    rows = ["id,image,labels,voxel_size,split"]
    splits = ("train", "test", "train", "val")
    for number in range(count):
        image = np.random.default_rng(number).normal(20, 3, SHAPE)
        image[6:10, 20 + number : 25 + number, 4:60] += 150
        labels = np.zeros(SHAPE, dtype=np.uint8)
        for z in (3, 7, 8):
            labels[z] = np.where(image[z] > 90, 2, 1)
            labels[z, :8] = 3
        tifffile.imwrite(folder / f"image_{number}.tif", image.clip(0).astype(np.uint8), photometric="minisblack")
        tifffile.imwrite(folder / f"labels_{number}.tif", labels, photometric="minisblack")
        rows.append(f"n{number},image_{number}.tif,labels_{number}.tif,1 1 1,{splits[number]}")
    manifest = folder / "manifest.csv"
    manifest.write_text("\n".join(rows) + "\n")
    return manifest


def test_labels_become_a_mask_with_unlabelled_voxels(tmp_path: Path) -> None:
    manifest = write_pairs(tmp_path)
    words = ["prepare", f"manifest={manifest}", KEY]
    assert cli.main([*words, f"out={tmp_path / 'store'}"]) == EXIT_DONE

    volume = Store(tmp_path / "store")["n0"]
    mask = volume.mask(Box.whole(SHAPE))
    labels = tifffile.imread(tmp_path / "labels_0.tif")
    np.testing.assert_array_equal(mask, np.array([UNLABELED, 0, 1, 0])[labels])
    assert not volume.has_tree
    assert len(volume.tree()) == len(volume.fitted_tree()) == 0

    # Crops are centered on the centerlines of what is labelled.
    points = volume.points("skeleton")
    assert len(points) > 20
    assert (mask[tuple(points.T)] == 1).all()
    skeleton = volume.skeleton(Box.whole(SHAPE))
    np.testing.assert_array_equal(np.argwhere(skeleton), points[np.lexsort(points.T[::-1])])
    assert len(volume.points("branch")) == len(volume.points("tip")) == 0
    assert (tmp_path / "store" / "pictures" / "n0.png").exists()

    # The same command finds everything written, and another key writes it again.
    assert cli.main([*words, f"out={tmp_path / 'store'}"]) == EXIT_DONE
    other = KEY.replace("3: background", "3: unlabelled")
    assert cli.main([*words[:-1], other, f"out={tmp_path / 'store'}"]) == EXIT_BAD_INPUT
    assert cli.main([*words[:-1], other, f"out={tmp_path / 'other'}"]) == EXIT_DONE
    assert (Store(tmp_path / "other")["n0"].mask(Box.whole(SHAPE)) == UNLABELED).sum() > (mask == UNLABELED).sum()


def test_a_plain_mask_needs_no_key(tmp_path: Path) -> None:
    manifest = write_pairs(tmp_path, 1)
    labels = tifffile.imread(tmp_path / "labels_0.tif")
    tifffile.imwrite(tmp_path / "labels_0.tif", (labels == 2).astype(np.uint8), photometric="minisblack")
    assert cli.main(["prepare", f"manifest={manifest}", f"out={tmp_path / 'store'}"]) == EXIT_DONE
    mask = Store(tmp_path / "store")["n0"].mask(Box.whole(SHAPE))
    np.testing.assert_array_equal(mask, labels == 2)


def test_labels_are_paired_in_a_folder_as_trees_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_pairs(tmp_path)
    folder, keys = tmp_path / "pairs", ["voxel_size=1,1,1", KEY]
    folder.mkdir()
    for number, name in enumerate(("a", "b")):
        (tmp_path / f"image_{number}.tif").rename(folder / f"{name}.tif")
        (tmp_path / f"labels_{number}.tif").rename(folder / f"{name}_labels.tif")
    assert cli.main(["prepare", f"images={folder}", f"out={tmp_path / 'store'}", *keys]) == EXIT_DONE
    store = Store(tmp_path / "store")
    assert store.ids == ("a", "b")
    volume = store["a"]
    assert not volume.has_tree
    labels = tifffile.imread(folder / "a_labels.tif")
    np.testing.assert_array_equal(volume.mask(Box.whole(volume.shape)), np.array([UNLABELED, 0, 1, 0])[labels])

    # A volume needs one truth, and no more.
    tree = folder / "a.swc"
    tree.write_text("1 0 1 1 1 1 -1\n2 0 9 9 9 1 1\n")
    command = ["prepare", f"images={folder}", f"out={tmp_path / 'other'}", *keys]
    assert cli.main(command) == EXIT_BAD_INPUT
    assert "a has a tree, a.swc, and a label volume, a_labels.tif; move one of them away" in capsys.readouterr().err
    tree.unlink()
    (folder / "b_labels.tif").rename(folder / "b2_labels.tif")
    assert cli.main(command) == EXIT_BAD_INPUT
    assert "or labels as ID_labels.tif" in capsys.readouterr().err

    # The advice is followed.
    (folder / "b2_labels.tif").rename(folder / "b_labels.tif")
    assert cli.main(command) == EXIT_DONE


def test_what_is_wrong_with_labels_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manifest = write_pairs(tmp_path, 1)
    words = ["prepare", f"manifest={manifest}", f"out={tmp_path / 'store'}"]

    # Values without a meaning: the advice names all of them, and is followed.
    assert cli.main(words) == EXIT_BAD_INPUT
    message = capsys.readouterr().err
    assert "holds the values 2, 3" in message
    advice = message.split("labels='")[1].split("'")[0]
    assert advice == "{0: background, 1: neurite, 2: unlabelled, 3: unlabelled}"
    assert not (tmp_path / "store").exists()

    # Neurites that are darker than the background are the wrong key, or a flipped file.
    dark = "labels={0: unlabelled, 1: neurite, 2: background, 3: unlabelled}"
    assert cli.main([*words, dark]) == EXIT_BAD_INPUT
    assert "no brighter" in capsys.readouterr().err
    assert cli.main([*words, dark, "misaligned=warn"]) == EXIT_DONE

    # A key that knows no neurite, and a volume of another shape.
    assert (
        cli.main(
            [
                *words[:-1],
                f"out={tmp_path / 'b'}",
                "labels={0: unlabelled, 1: background, 2: background, 3: background}",
            ]
        )
        == EXIT_BAD_INPUT
    )
    assert "labels no voxel as neurite" in capsys.readouterr().err
    tifffile.imwrite(tmp_path / "labels_0.tif", np.ones((16, 64, 32), np.uint8), photometric="minisblack")
    assert cli.main([*words[:-1], f"out={tmp_path / 'b'}", KEY]) == EXIT_BAD_INPUT
    assert "labels of the same shape" in capsys.readouterr().err

    # A row with both kinds, or with none.
    for columns, cells in (("id,image,swc,labels", "n,image_0.tif,a.swc,labels_0.tif"), ("id,image", "n,image_0.tif")):
        manifest.write_text(f"{columns}\n{cells}\n")
        assert cli.main(words) == EXIT_BAD_INPUT
        assert "labels" in capsys.readouterr().err


def test_labels_are_whole_numbers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manifest = write_pairs(tmp_path, 1)
    words = ["prepare", f"manifest={manifest}", f"out={tmp_path / 'store'}"]
    labels = tifffile.imread(tmp_path / "labels_0.tif")
    for value in (0.5, np.inf):
        probability = np.where(labels == 2, value, 0).astype(np.float32)
        tifffile.imwrite(tmp_path / "labels_0.tif", probability, photometric="minisblack")
        assert cli.main(words) == EXIT_BAD_INPUT
        assert "labels_0.tif" in (message := capsys.readouterr().err)
    assert "NaN or infinite" in message or "labels are whole numbers" in message

    # The advice: a mask.
    tifffile.imwrite(tmp_path / "labels_0.tif", (labels == 2).astype(np.uint8), photometric="minisblack")
    assert cli.main(words) == EXIT_DONE


def test_train_and_evaluate_run_on_labels(tmp_path: Path) -> None:
    manifest = write_pairs(tmp_path, 4)
    store, out = tmp_path / "store", tmp_path / "train"
    assert cli.main(["prepare", f"manifest={manifest}", KEY, f"out={store}"]) == EXIT_DONE
    words = [f"store={store}", f"out={out}", "student.depth=1", "student.channels=[4,4,8]", "crop.size=[8,32,32]"]
    words += ["optim.batch=2", "optim.steps=12", "validate.every=6", "validate.crops=2", "tracker.wandb=disabled"]
    words += ["transfer.rule=scratch", "distill=null", "student.patch=[4,16,16]"]
    assert cli.main(["train", *words]) == EXIT_DONE
    predictions = ["infer", f"model={out}", f"store={store}", f"out={tmp_path / 'infer'}", "page=false"]
    assert cli.main(predictions) == EXIT_DONE
    report = tmp_path / "report"
    assert cli.main(["evaluate", f"store={store}", f"predictions={tmp_path / 'infer'}", f"out={report}"]) == EXIT_DONE

    metrics = json.loads((report / "metrics.json").read_text())
    scores = metrics["volumes"]["n1"]["otsu"]
    assert set(scores) == {"dice", "voxel_precision", "voxel_recall", "mask_missed"}
    # Otsu's threshold finds the labelled bar; what is unlabelled does not count.
    assert scores["dice"] > 0.95
    assert 0 <= metrics["mean"]["model"]["dice"] <= 1
    assert metrics["gold"]["n1"] == {}
    page = (report / "report.html").read_text()
    assert "without a tree" in page
    assert "only labelled voxels are scored" in page
