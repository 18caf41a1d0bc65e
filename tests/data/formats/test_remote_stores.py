"""Images in remote stores: a web server with faults, and an S3 server."""

from __future__ import annotations

import json
import pickle
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from moto.server import ThreadedMotoServer

from hpc_neuro.core.geometry import Box
from hpc_neuro.core.schema import InputError
from hpc_neuro.data import remote_path
from hpc_neuro.data.formats import describe_content, open_volume
from hpc_neuro.data.remote_path import parse_path
from tests.data.formats.test_chunk_decoder import ZARR2, write_zarr
from tests.data.formats.test_stores import write_precomputed, write_store
from tests.helpers.volume_checks import SHAPE, UM, assert_reads, make_image
from tests.helpers.web_store import WebStore, serve_folder

WHOLE = Box.whole(SHAPE)


@pytest.fixture(autouse=True)
def _repeat_quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_path, "RETRIES", {"max_retries": 2, "initial_delay": "10ms", "max_delay": "20ms"})
    monkeypatch.setattr(remote_path, "TIMEOUT", 20.0)
    remote_path._shared_context.cache_clear()


@pytest.fixture
def web(tmp_path: Path) -> Iterator[WebStore]:
    with serve_folder(tmp_path) as store:
        yield store


def write_ome(path: Path, data: np.ndarray, driver: str = "zarr3", chunk: tuple[int, ...] = (2, 4, 4)) -> None:
    grid = {"name": "regular", "configuration": {"chunk_shape": chunk}}
    more = {"chunk_grid": grid} if driver == "zarr3" else {"chunks": chunk}
    write_store(path / "0", driver, data, metadata=more)
    axes = [{"name": a, "type": "space", "unit": "micrometer"} for a in "zyx"]
    level = {"path": "0", "coordinateTransformations": [{"type": "scale", "scale": UM}]}
    images = {"multiscales": [{"axes": axes, "datasets": [level]}]}
    if driver == "zarr3":
        group = {"zarr_format": 3, "node_type": "group", "attributes": {"ome": images}}
        (path / "zarr.json").write_text(json.dumps(group))
    else:
        (path / ".zgroup").write_text('{"zarr_format": 2}')
        (path / ".zattrs").write_text(json.dumps(images))


@pytest.mark.parametrize("has_ranges", [True, False])
@pytest.mark.parametrize("driver", ["zarr", "zarr3"])
def test_ome_zarr_is_read_as_from_a_folder(web: WebStore, driver: str, has_ranges: bool) -> None:
    web.has_ranges = has_ranges
    write_ome(web.folder / "a.zarr", make_image(), driver)
    assert_reads(f"{web.address}/a.zarr", make_image(), UM)  # type: ignore[arg-type]
    volume = open_volume(f"{web.address}/a.zarr/0/")
    assert np.allclose(volume.voxel_size, UM)
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(volume))[WHOLE], make_image())


def test_n5_precomputed_shards_and_codecs_of_our_own(web: WebStore) -> None:
    write_store(web.folder / "a.n5" / "s0", "n5", make_image().T, metadata={"blockSize": [4, 4, 2]})
    write_precomputed(web.folder / "b")
    write_zarr(web.folder / "c.zarr", make_image(), 2, **ZARR2["lz4"])
    shard = {"name": "sharding_indexed", "configuration": {"chunk_shape": [1, 2, 2], "codecs": [{"name": "bytes"}]}}
    grid = {"name": "regular", "configuration": {"chunk_shape": [2, 4, 4]}}
    write_store(web.folder / "d.zarr", "zarr3", make_image(), metadata={"chunk_grid": grid, "codecs": [shard]})
    for name in ("a.n5", "b", "c.zarr", "d.zarr"):
        local = open_volume(web.folder / name)
        remote = open_volume(f"{web.address}/{name}")
        assert (remote.shape, remote.voxel_size, remote.axes) == (local.shape, local.voxel_size, local.axes)
        box = Box.whole(local.shape)
        np.testing.assert_array_equal(remote[box], local[box])


def test_a_request_that_the_server_cannot_serve_is_repeated(web: WebStore) -> None:
    write_ome(web.folder / "a.zarr", make_image())
    web.failures = {r"a.zarr/zarr.json": [503], r"c/0/0/0": [503, 502], r"c/1/1/1": [429]}
    np.testing.assert_array_equal(open_volume(f"{web.address}/a.zarr")[WHOLE], make_image())
    assert web.requests.count("a.zarr/0/c/0/0/0") >= 3
    web.failures = {r"c/0/0/0": [500]}
    volume = open_volume(f"{web.address}/a.zarr")
    with pytest.raises(InputError, match=r"a.zarr/0 cannot be read: .*; check the address and the network"):
        volume[WHOLE]


def test_a_missing_chunk_is_the_fill_value(web: WebStore) -> None:
    write_ome(web.folder / "a.zarr", make_image())
    (web.folder / "a.zarr" / "0" / "c" / "0" / "1" / "0").unlink()
    expected = make_image()
    expected[:2, 4:, :4] = 0
    volume = open_volume(f"{web.address}/a.zarr")
    np.testing.assert_array_equal(volume[WHOLE], expected)
    assert "a remote store is not listed" in volume.describe()


def test_an_array_without_chunks_is_refused(web: WebStore) -> None:
    write_ome(web.folder / "a.zarr", make_image())
    (web.folder / "a.zarr" / "0" / "c").rename(web.folder / "a.zarr" / "0" / "d")
    with pytest.raises(InputError, match=r"none of \d+ chunks that were looked for, such as c/1/1/1"):
        open_volume(f"{web.address}/a.zarr")


def test_refused_access_is_named(web: WebStore) -> None:
    write_ome(web.folder / "a.zarr", make_image())
    web.failures = {r"c/0/0/0": [403]}
    volume = open_volume(f"{web.address}/a.zarr")
    with pytest.raises(InputError, match=r"a.zarr/0: the server refuses access \(HTTP 403\); check the address"):
        volume[WHOLE]
    web.failures = {"a.zarr": [403]}
    with pytest.raises(InputError, match=r"refuses access \(HTTP 403\)"):
        open_volume(f"{web.address}/a.zarr")
    # Buckets that may not be listed refuse what they do not have.
    web.failures = {r"/\.z|attributes.json|info": [403]}
    np.testing.assert_array_equal(open_volume(f"{web.address}/a.zarr")[WHOLE], make_image())


def test_what_is_no_image_is_refused(web: WebStore) -> None:
    (web.folder / "brain.tif").write_bytes(b"II*\0")
    with pytest.raises(InputError, match="holds no OME-Zarr, zarr, N5 or precomputed image"):
        open_volume(f"{web.address}/brain.tif")
    (web.folder / "zarr.json").write_text("<html>")
    with pytest.raises(InputError, match="not readable JSON"):
        open_volume(web.address)
    (web.folder / "zarr.json").write_text('{"zarr_format": 3, "node_type": "group"}')
    with pytest.raises(InputError, match="name its array with dataset=NAME"):
        open_volume(web.address)
    (web.folder / "zarr.json").unlink()
    (web.folder / "attributes.json").write_text('{"n5": "2.0.0"}')
    with pytest.raises(InputError, match="has no array s0"):
        open_volume(web.address)


def test_a_server_that_is_not_there() -> None:
    with pytest.raises(InputError, match=r"http://127.0.0.1:9/a.zarr/zarr.json cannot be read"):
        open_volume("http://127.0.0.1:9/a.zarr")


def test_a_truncated_chunk_is_damage_and_no_fault_of_the_network(web: WebStore) -> None:
    write_ome(web.folder / "a.zarr", make_image())
    chunk = web.folder / "a.zarr" / "0" / "c" / "0" / "0" / "0"
    chunk.write_bytes(chunk.read_bytes()[:-5])
    with pytest.raises(InputError, match="damaged or incomplete"):
        open_volume(f"{web.address}/a.zarr")[WHOLE]


def test_an_image_that_is_written_anew_has_another_description(web: WebStore) -> None:
    write_ome(web.folder / "a.zarr", make_image())
    image = parse_path(f"{web.address}/a.zarr")
    before = describe_content(image)
    assert describe_content(image) == before
    text = (web.folder / "a.zarr" / "zarr.json").read_text()
    (web.folder / "a.zarr" / "zarr.json").write_text(text.replace("0.33", "0.34"))
    assert describe_content(image) != before


# --- S3 ---


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    for name in ("AWS_ENDPOINT_URL_S3", "AWS_REGION", "AWS_DEFAULT_REGION", remote_path.LOGIN):
        monkeypatch.delenv(name, raising=False)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    yield f"http://{host}:{port}"
    server.stop()


def put(address: str, data: bytes = b"", acl: str = "public-read") -> None:
    headers = {"x-amz-acl": acl, "Content-Type": "application/octet-stream"}
    request = urllib.request.Request(address, data=data, method="PUT", headers=headers)
    urllib.request.urlopen(request, timeout=30).close()


def upload(server: str, bucket: str, folder: Path, acl: str = "public-read") -> None:
    put(f"{server}/{bucket}", acl=acl)
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        put(f"{server}/{bucket}/{file.relative_to(folder).as_posix()}", file.read_bytes(), acl)


def test_s3_is_read_without_credentials(s3: str, tmp_path: Path) -> None:
    write_ome(tmp_path / "data" / "brains" / "a.zarr", make_image())
    upload(s3, "public-images", tmp_path / "data")
    assert_reads("s3://public-images/brains/a.zarr", make_image(), UM)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="s3://public-images/brains holds no OME-Zarr, zarr, N5 or precomputed image"):
        open_volume("s3://public-images/brains")


def test_private_s3_asks_for_credentials(s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_ome(tmp_path / "data" / "a.zarr", make_image())
    upload(s3, "private-images", tmp_path / "data", "private")
    with pytest.raises(InputError, match=r"refuses access \(HTTP 403\); .*or set HPC_NEURO_REMOTE_LOGIN=yes"):
        open_volume("s3://private-images/a.zarr")
    monkeypatch.setenv("HPC_NEURO_REMOTE_LOGIN", "yes")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "reader")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "word")
    assert_reads("s3://private-images/a.zarr", make_image(), UM)  # type: ignore[arg-type]


def test_gs_reads_the_public_address_of_a_bucket(web: WebStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_path, "GOOGLE", web.address)
    monkeypatch.delenv(remote_path.LOGIN, raising=False)
    write_ome(web.folder / "bucket" / "a.zarr", make_image())
    assert_reads("gs://bucket/a.zarr", make_image(), UM)  # type: ignore[arg-type]
