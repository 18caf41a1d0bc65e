"""Images of a web server in every verb that reads images."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from hpc_neuro import cli
from hpc_neuro.core.constants import EXIT_BAD_INPUT, EXIT_DONE, EXIT_FAILURES
from hpc_neuro.core.types import Array
from hpc_neuro.data import remote_path, swc
from hpc_neuro.data.store import Store
from tests.data.formats.test_remote_stores import write_ome
from tests.helpers.bright_student import save_bright_student
from tests.helpers.image_pairs import make_pair
from tests.helpers.web_store import WebStore, serve_folder


@pytest.fixture
def web(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[WebStore]:
    monkeypatch.setattr(remote_path, "RETRIES", {"max_retries": 2, "initial_delay": "10ms", "max_delay": "20ms"})
    remote_path._shared_context.cache_clear()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "web").mkdir()
    with serve_folder(tmp_path / "web") as store:
        yield store


def write_neuron(folder: Path) -> Array:
    tree, image = make_pair(1)
    write_ome(folder / "n1.zarr", image, chunk=(10, 36, 40))
    swc.write(folder / "n1.swc", tree, unit="voxel")
    return image


def test_info(web: WebStore, capsys: pytest.CaptureFixture[str]) -> None:
    image = write_neuron(web.folder)
    assert cli.main(["info", f"{web.address}/n1.zarr"]) == EXIT_DONE
    lines = capsys.readouterr().out
    assert f"{web.address}/n1.zarr: OME-Zarr, 20 x 72 x 80 voxels" in lines
    assert f"intensity: {image.min()} to {image.max()}" in lines


def test_trace_gives_the_trees_of_a_local_copy(web: WebStore) -> None:
    write_neuron(web.folder)
    web.failures = {r"c/0/0/0": [503]}
    address = f"{web.address}/n1.zarr"
    assert cli.main(["trace", address, "out=remote"]) == EXIT_DONE
    assert cli.main(["trace", str(web.folder / "n1.zarr"), "out=local"]) == EXIT_DONE
    remote, local = (swc.read(Path(out) / "swc" / "n1.swc") for out in ("remote", "local"))
    np.testing.assert_array_equal(remote.points, local.points)
    assert address in Path("remote/config.yaml").read_text()

    # A second start finds the same image, and reads no more than the chunk that shows that there are some.
    web.requests.clear()
    assert cli.main(["trace", address, "out=remote"]) == EXIT_DONE
    assert len([key for key in web.requests if "/c/" in key]) <= 1


def test_infer_predicts_and_lists_a_block_that_cannot_be_read(web: WebStore) -> None:
    write_neuron(web.folder)
    save_bright_student(Path("model/weights/best"))
    command = ["infer", f"{web.address}/n1.zarr", "model=model", "out=out", "range=0,255", "trees=false"]
    web.failures = {r"c/0/1/0": [403]}
    assert cli.main(command) == EXIT_FAILURES
    assert "refuses access (HTTP 403)" in json.dumps(json.loads(Path("out/run.json").read_text())["failures"])
    web.failures = {}
    assert cli.main(command) == EXIT_DONE


def test_prepare_takes_addresses_from_a_manifest(web: WebStore) -> None:
    image = write_neuron(web.folder)
    Path("manifest.csv").write_text(f"id,image,swc\nn1,{web.address}/n1.zarr,web/n1.swc\n")
    assert cli.main(["prepare", "manifest=manifest.csv", "out=store", "swc_unit=voxel"]) == EXIT_DONE
    volume = Store(Path("store"))["n1"]
    assert volume.shape == image.shape
    assert volume.voxel_size == pytest.approx((1.0, 0.33, 0.25))


@pytest.mark.parametrize("argument", ["out=s3://bucket/out", "model=https://host/model"])
def test_other_paths_are_local(argument: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["trace", "n1.tif", argument]) == EXIT_BAD_INPUT
    assert "lies in a remote store, from which only image volumes are read" in capsys.readouterr().err
