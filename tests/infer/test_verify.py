"""`infer verify` names what is broken and repairs just that."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from hpc_neuro import cli, evaluate, infer
from hpc_neuro.core.schema import InputError
from hpc_neuro.infer import verify
from tests.helpers.journal import drop_block, edit_block, list_logs, list_times, spoil_block
from tests.helpers.small_volumes import configure, probability, write_crossing

SHARD = "0/c/1/0/1"


@pytest.fixture
def copy(finished_run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished_run, tmp_path / "out"))


def contents(out: Path) -> dict[str, bytes]:
    kinds = ("*.ome.zarr/**/*", "swc/*", "predictions.json")
    return {p.relative_to(out).as_posix(): p.read_bytes() for k in kinds for p in out.glob(k) if p.is_file()}


def delete_file(path: Path) -> None:
    path.unlink()


def flip_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def cut_file(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:20])


def replace_content(path: Path) -> None:
    path.write_bytes(b"what is this")


@pytest.mark.parametrize(
    ("file", "harm", "message"),
    [
        (f"a.ome.zarr/{SHARD}", delete_file, "a block (1, 0, 1): the shard 0/c/1/0/1 is missing"),
        (f"a.ome.zarr/{SHARD}", flip_bit, "a block (1, 0, 1): the shard 0/c/1/0/1 has other bytes than were written"),
        (f"a.ome.zarr/{SHARD}", cut_file, "a block (1, 0, 1): the shard 0/c/1/0/1 has other bytes than were written"),
        ("*.ome.zarr/labels/mask/0/c/*/*/*", flip_bit, "the shard labels/mask/0/c/"),
        (
            "journal",
            lambda p: edit_block(p.parent, "a", "1_0_1", index="x"),
            "its done marker in journal cannot be read",
        ),
        (
            "journal",
            lambda p: spoil_block(p.parent, "a", "1_0_1"),
            "does not have the checksum that it was written with",
        ),
        ("journal", lambda p: spoil_block(p.parent, "a", "1_0_1"), "a block (1, 0, 1): its done marker in journal is"),
        ("journal", lambda p: drop_block(p.parent, "a", "1_0_1"), "a block (1, 0, 1): its done marker in journal is"),
        ("journal/*.log", cut_file, "a block (0, 0, 0): its done marker in journal is missing"),
        ("journal", shutil.rmtree, "b block (0, 0, 0): its done marker in journal is missing"),
        ("a.ome.zarr/0/zarr.json", cut_file, "a: the metadata 0/zarr.json is other than written"),
        ("a.ome.zarr/zarr.json", delete_file, "a: "),
        ("a.ome.zarr/0/c/9", replace_content, "a: `infer` did not write 0/c/9"),
        ("predictions.json", cut_file, "predictions.json is not readable JSON"),
    ],
)
def test_each_harm_is_named_and_repaired(copy: Path, file: str, harm: Callable[[Path], None], message: str) -> None:
    before = contents(copy)
    assert verify.check(copy) == []
    harm(next(iter(copy.glob(file)), copy / file))
    marks = list_times(copy)
    assert [p.text for p in verify.check(copy) if message in p.text]
    assert cli.main(["infer", "verify", str(copy), "--check"]) == 3
    assert contents(copy) != before or "journal" in file
    assert cli.main(["infer", "verify", str(copy)]) == 0
    assert contents(copy) == before
    again = [block for block, at in marks.items() if list_times(copy)[block] != at]
    whole_volume = file == "a.ome.zarr/zarr.json"
    assert whole_volume or len(again) <= 1  # only what was broken is made again
    assert cli.main(["infer", "verify", str(copy)]) == 0


@pytest.fixture(scope="session")
def with_trees(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two crossing neurites of two roots, traced."""
    folder = tmp_path_factory.mktemp("cells")
    item = write_crossing(folder / "cells.tif")
    keys = ["trees=true", "trace.threshold=0.01", "trace.root_snap=100", "trace.min_voxels=1", "trace.signal_gap=0"]
    cfg = configure(model, folder / "out", f"inputs=[{item}]", *keys)
    assert infer.run(cfg) == 0
    assert (cfg.out / "swc" / "cells" / "0002.swc").exists()
    return cfg.out


@pytest.mark.parametrize(
    ("file", "harm", "message"),
    [
        ("swc/cells.swc", delete_file, "cells: swc/cells.swc is missing"),
        ("swc/cells/0002.swc", delete_file, "cells: swc/cells/0002.swc is missing"),
        ("swc/cells/0001.voxel.swc", flip_bit, "cells: swc/cells/0001.voxel.swc has other bytes than were written"),
        ("proofread/cells.confidence.csv", cut_file, "cells: proofread/cells.confidence.csv has other bytes"),
        ("swc/mine.swc", replace_content, "`infer` did not write swc/mine.swc"),
        ("swc/cells/0003.swc", replace_content, "`infer` did not write swc/cells/0003.swc"),
        ("entries/cells.json", cut_file, "cells: its entry cells.json is missing or torn"),
        ("entries/cells.json", delete_file, "cells: its entry cells.json is missing or torn"),
    ],
)
def test_trees_are_named_and_made_again_and_nobodys_work_is_lost(
    with_trees: Path, tmp_path: Path, file: str, harm: Callable[[Path], None], message: str
) -> None:
    out = Path(shutil.copytree(with_trees, tmp_path / "out"))

    def trees() -> dict[str, bytes]:
        outputs = [p for kind in ("swc", "proofread", "entries") for p in out.glob(f"{kind}/**/*") if p.is_file()]
        return {p.relative_to(out).as_posix(): p.read_bytes() for p in outputs}

    before = trees()
    assert verify.check(out) == []
    harm(out / file)
    left = (out / file).read_bytes() if (out / file).exists() and "entries" not in file else None
    assert [p.text for p in verify.check(out)] == [next(p.text for p in verify.check(out) if message in p.text)]
    assert cli.main(["infer", "verify", str(out)]) == 0
    assert trees() == before
    aside = out / "set_aside" / file
    assert aside.exists() == (left is not None)
    assert left is None or aside.read_bytes() == left
    assert verify.check(out) == []
    if left is not None:  # and once more: the one set aside before stays
        (out / file).write_bytes(b"other")
        assert cli.main(["infer", "verify", str(out)]) == 0
        assert aside.read_bytes() == left
        assert len(list(aside.parent.iterdir())) == 2


def test_an_index_that_says_other_than_its_entries(with_trees: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(with_trees, tmp_path / "out"))
    index = (out / "predictions.json").read_text()
    (out / "predictions.json").write_text(index.replace('"trees": 2', '"trees": 3'))
    assert [p.text for p in verify.check(out)] == ["cells: predictions.json differs from its entry"]
    assert cli.main(["infer", "verify", str(out)]) == 0
    assert (out / "predictions.json").read_text() == index


def test_several_harms_at_once(copy: Path) -> None:
    before = contents(copy)
    delete_file(copy / "a.ome.zarr/0/c/0/0/0")
    flip_bit(copy / f"a.ome.zarr/{SHARD}")
    drop_block(copy, "b")
    assert len(verify.check(copy)) == 3
    assert verify.main([str(copy)]) == 0
    assert contents(copy) == before
    assert probability(copy, "a").any()


def test_what_cannot_be_repaired_is_told(copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = (copy / "config.yaml").read_text()
    model = next(line.partition(": ")[2] for line in config.splitlines() if line.startswith("model"))
    (copy / "config.yaml").write_text(config.replace(model, str(tmp_path / "gone")))
    delete_file(copy / f"a.ome.zarr/{SHARD}")
    assert cli.main(["infer", "verify", str(copy)]) == 2
    assert "holds no weights" in capsys.readouterr().err
    assert cli.main(["infer", "verify", str(tmp_path)]) == 2
    assert "run.json does not exist" in capsys.readouterr().err
    assert cli.main(["infer", "verify"]) == 2


def test_a_volume_beyond_32_bit_coordinates_is_no_volume(copy: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = copy / "a.ome.zarr" / "zarr.json"
    group = json.loads(path.read_text())
    group["attributes"]["hpc_neuro"]["shape"][1] = 10**30
    path.write_text(json.dumps(group))
    assert cli.main(["infer", "verify", str(copy), "--check"]) == 3
    assert "shape.1: input should be less than 2147483648" in caplog.text


def test_a_pyramids_shard_is_repaired_from_below(tmp_path: Path) -> None:
    """Level by level: the journal holds a checksum of each shard above level 0."""
    from hpc_neuro.core.geometry import Box
    from hpc_neuro.data import ome_zarr
    from hpc_neuro.infer.done_markers import DoneMarkers

    marks = DoneMarkers(tmp_path, "a", "k")
    for path, checksum in (("1/c/0/0/0", "x"), ("labels/mask/1/c/0/0/0", "")):
        marks.write_shard(path, checksum)
    assert DoneMarkers(tmp_path, "a", "k").read_levels() == {"1/c/0/0/0": "x", "labels/mask/1/c/0/0/0": ""}
    flip_bit(list_logs(tmp_path)[0])
    assert len(DoneMarkers(tmp_path, "a", "k").read_levels()) == 1
    shape, shard = (8, 600, 64), (8, 64, 64)
    ome_zarr.create(tmp_path / "v", "p", shape, (1.0, 1.0, 1.0), shard, (8, 32, 32), "mask", {})
    spot = Box((0, 64, 0), (8, 128, 64))
    ome_zarr.open_level(tmp_path / "v")[spot.slices].write(np.full((8, 64, 64), 7, np.uint8)).result()
    for level in ome_zarr.plan_shards(shape, (1.0, 1.0, 1.0), shard, "mask"):
        for piece in level:
            ome_zarr.build_shard(tmp_path / "v", shape, (1.0, 1.0, 1.0), piece)
    written = sorted(p.relative_to(tmp_path / "v").as_posix() for p in tmp_path.glob("v/[1-9]/c/**/0"))
    assert [w for w in written if Path(tmp_path / "v" / w).is_file()] == ["1/c/0/0/0", "2/c/0/0/0"]


def test_evaluate_refuses_a_lost_shard_until_verify_has_computed_it_again(
    copy: Path, store: Path, tmp_path: Path
) -> None:
    cfg = evaluate.EvaluateConfig(store=store, predictions=copy, out=tmp_path / "scores", draws=100, pictures=0)
    (copy / "a.ome.zarr" / SHARD).unlink()
    with pytest.raises(InputError, match="`hpc-neuro infer verify .*out` computes it again"):
        evaluate.run(cfg)
    assert not cfg.out.exists()

    assert cli.main(["infer", "verify", str(copy)]) == 0
    assert evaluate.run(cfg) == 0


@pytest.mark.parametrize("files", [3, [1], "x", None])
def test_evaluate_refuses_a_done_marker_of_another_form(files: object, copy: Path, store: Path, tmp_path: Path) -> None:
    edit_block(copy, "a", "0_0_0", files=files)
    cfg = evaluate.EvaluateConfig(store=store, predictions=copy, out=tmp_path / "scores", draws=100, pictures=0)
    with pytest.raises(InputError, match=r"block 0_0_0 of a is not of the form .*run `hpc-neuro infer verify"):
        evaluate.run(cfg)
    assert not cfg.out.exists()

    # The advice, obeyed.
    assert cli.main(["infer", "verify", str(copy)]) == 0
    assert evaluate.run(cfg) == 0
