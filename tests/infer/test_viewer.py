"""`infer serve`: what a viewer gets, read over HTTP by another library and byte by byte."""

from __future__ import annotations

import http.client
import importlib.util
import json
import shutil
import socket
import struct
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tensorstore as ts
import tifffile

from hpc_neuro import cli
from hpc_neuro.core import files, morphology
from hpc_neuro.core.geometry import Box
from hpc_neuro.core.schema import ConfigError, InputError
from hpc_neuro.data import ome_zarr, swc
from hpc_neuro.data.store import Store
from hpc_neuro.infer import proofread, viewer
from hpc_neuro.infer.viewer import ServeConfig, ViewerServer
from tests.helpers.small_volumes import probability

SHAPE, SIZE, LANDMARK = (40, 80, 96), (2.0, 0.5, 0.5), (11, 21, 31)


@contextmanager
def serving(out: Path, **keys: Any) -> Iterator[int]:
    """The port at which `out` is served meanwhile."""
    with ViewerServer(ServeConfig(out=out, port=0, **keys)) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server.server_port
        finally:
            server.shutdown()
            thread.join()


def ask(port: int, path: str, method: str = "GET", **headers: str) -> tuple[int, bytes, dict[str, str]]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    connection.request(method, path, headers={k.replace("_", "-"): v for k, v in headers.items()})
    answer = connection.getresponse()
    body = answer.read()
    connection.close()
    return answer.status, body, dict(answer.getheaders())


def open_array(port: int, path: str) -> Any:
    """An array as tensorstore sees it: shards by ranges of bytes."""
    return np.asarray(
        ts.open({"driver": "zarr3", "kvstore": f"http://127.0.0.1:{port}/{path}/"}).result().read().result()
    )


@pytest.fixture
def landmark(tmp_path: Path) -> Path:
    """A run folder of one TIFF, with one voxel lit in the image and in the probability, two trees and one place."""
    out, image = tmp_path / "out", np.zeros(SHAPE, np.uint16)
    image[LANDMARK] = 1000
    tifffile.imwrite(tmp_path / "brain.tif", image)
    folder = out / "brain.ome.zarr"
    ome_zarr.create(folder, "probability", SHAPE, SIZE, (32, 64, 64), (16, 32, 32), "mask", {})
    box = Box((0, 0, 0), (32, 64, 64))
    ome_zarr.open_level(folder)[box.slices].write((image[box.slices] > 0).astype(np.uint8) * 255).result()
    points = np.array([[11, 21, 31], [30, 3, 3], [11, 21, 39], [11, 30, 39]], float)
    tree = morphology.build_tree(points * SIZE, np.array([-1, -1, 0, 2]))
    (out / "swc").mkdir()
    swc.write(out / "swc" / "brain.swc", tree, unit="um", voxel_size=SIZE)
    place = proofread.DoubtfulPlace(1, "gap", 11.0, 21.0, 31.0, 0.5, None, 4.0, 1, 1)
    state = proofread.build_neuroglancer_state("brain", [place], SHAPE, SIZE)
    files.write_json(out / "proofread" / "brain.neuroglancer.json", state)
    entry = {"voxel_size": SIZE, "swc": "swc/brain.swc", "trees": 2}
    files.write_json(out / "predictions.json", {"brain": entry})
    item = f"{{image: {tmp_path / 'brain.tif'}, voxel_size: [2.0, 0.5, 0.5]}}"
    files.write_text(out / "config.yaml", f"model: x\nout: {out}\ninputs: [{item}]\n")
    return out


def test_another_library_reads_image_and_sharded_probability_through_it(finished_run: Path, store: Path) -> None:
    with serving(finished_run) as port:
        for name in ("a", "b"):
            np.testing.assert_array_equal(open_array(port, f"{name}.ome.zarr/0"), probability(finished_run, name))
            volume = Store(store)[name]
            whole = tuple(slice(0, n) for n in volume.shape)
            np.testing.assert_array_equal(
                open_array(port, f"{name}.image/0"), volume.store.open_handle(name)["image"][whole]
            )


def test_image_probability_trees_and_places_lie_on_one_another(landmark: Path) -> None:
    with serving(landmark) as port:
        state = json.loads(ask(port, "/brain.json")[1])
        base = f"http://127.0.0.1:{port}"
        names = ["image", "probability", "mask", "trees", "doubtful places"]
        assert [layer["name"] for layer in state["layers"]] == names
        assert [layer["source"] for layer in state["layers"]] == [
            f"zarr3://{base}/brain.image/", f"zarr3://{base}/brain.ome.zarr/", f"zarr3://{base}/brain.ome.zarr/labels/mask/",
            f"precomputed://{base}/brain.trees", "local://annotations",
        ]  # fmt: skip
        assert state["layers"][3]["segments"] == ["1", "2"]
        for folder in ("brain.image", "brain.ome.zarr"):
            lit = np.argwhere(open_array(port, f"{folder}/0"))
            assert lit.tolist() == [list(LANDMARK)]
        first = [json.loads(ask(port, f"/{f}/zarr.json")[1])["attributes"]["ome"]["multiscales"][0] for f in
                 ("brain.image", "brain.ome.zarr")]  # fmt: skip
        assert first[0]["axes"] == first[1]["axes"]
        assert first[0]["datasets"][0] == first[1]["datasets"][0]
        assert json.loads(ask(port, "/brain.trees/info")[1])["@type"] == "neuroglancer_skeletons"
        tree = ask(port, "/brain.trees/1")[1]
        vertices, edges = np.frombuffer(tree[:8], "<u4")
        assert (vertices, edges) == (3, 2)
        nodes = np.frombuffer(tree[8 : 8 + 12 * vertices], "<f4").reshape(-1, 3)  # x y z in nanometers
        voxels = nodes[:, ::-1] / 1000 / SIZE
        np.testing.assert_allclose(voxels, [[11, 21, 31], [11, 21, 39], [11, 30, 39]], atol=1e-3)
        assert np.frombuffer(tree[8 + 12 * vertices :], "<u4").tolist() == [1, 0, 2, 1]
        place = state["layers"][4]["annotations"][0]["point"]
    assert place == state["position"] == list(LANDMARK)


def test_the_contrast_is_that_of_the_voxels_in_view(finished_run: Path, store: Path) -> None:
    with serving(finished_run) as port:
        state = json.loads(ask(port, "/a.json")[1])
    low, high = state["layers"][0]["shaderControls"]["normalized"]["range"]
    image = Store(store).open_handle("a")["image"][()]
    assert image.min() <= low < high <= image.max()
    assert "trees" not in [layer["name"] for layer in state["layers"]]  # this run traced none


def test_ranges_of_bytes(finished_run: Path) -> None:
    shard = next(p for p in (finished_run / "a.ome.zarr" / "0" / "c").rglob("*") if p.is_file())
    whole, path = shard.read_bytes(), f"/{shard.relative_to(finished_run).as_posix()}"
    with serving(finished_run) as port:
        assert ask(port, path)[:2] == (200, whole)
        for asked, part in (("5-9", whole[5:10]), ("7-", whole[7:]), ("-20", whole[-20:]), (f"3-{10**9}", whole[3:])):
            status, body, headers = ask(port, path, Range=f"bytes={asked}")
            assert (status, body) == (206, part)
            assert headers["Content-Range"].endswith(f"/{len(whole)}")
        assert ask(port, path, Range=f"bytes={len(whole)}-")[0] == 416
        status, body, headers = ask(port, path, "HEAD")
        assert (status, body, headers["Content-Length"]) == (200, b"", str(len(whole)))


def test_only_the_viewer_may_read_and_only_below_the_folder(finished_run: Path) -> None:
    (finished_run.parent / "secret").write_text("not for you")
    with serving(finished_run, viewer="https://viewer.example/path") as port:
        beyond = ("/../secret", "/%2e%2e/secret", "/a%00b", "/a.ome.zarr/0/c/9/9/9", "/a.trees/0", "/a.ome.zarr")
        made_up = ("/a.image/0/c/99/0/0", "/a.image/0/c/x/0/0", "/a.image/else", "/nobody.json")
        for path in beyond + made_up:
            status, body, headers = ask(port, path)
            assert (status, body) == (404, b""), path
            assert headers["Access-Control-Allow-Origin"] == "https://viewer.example"
        status, _, headers = ask(port, "/a.json", "OPTIONS")
        assert (status, headers["Access-Control-Allow-Headers"]) == (204, "*")


def test_a_browser_that_hangs_up_is_not_told_of(finished_run: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with serving(finished_run) as port:
        for _ in range(3):
            with socket.create_connection(("127.0.0.1", port)) as link:
                link.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # reset, not closed
                link.sendall(b"GET /a.image/0/c/0/0/0 HTTP/1.1\r\nHost: x\r\n\r\n")
        assert ask(port, "/a.json")[0] == 200
    assert "Traceback" not in capfd.readouterr().err


def test_links_lead_to_the_state_of_each_volume(finished_run: Path) -> None:
    with ViewerServer(ServeConfig(out=finished_run, port=0)) as server:
        at = f"https://neuroglancer-demo.appspot.com/#!http://127.0.0.1:{server.server_port}"
        assert server.list_links() == [f"a: {at}/a.json", f"b: {at}/b.json"]
        with pytest.raises(ConfigError, match=rf"port {server.server_port} cannot be had .* give another, or port=0"):
            ViewerServer(ServeConfig(out=finished_run, port=server.server_port))


def test_what_it_cannot_serve(tmp_path: Path, landmark: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["infer", "serve", str(tmp_path)]) == 2
    assert "give a folder that `infer` wrote" in capsys.readouterr().err
    assert cli.main(["infer", "serve", str(tmp_path / "brain.tif")]) == 2
    assert "brain.tif/predictions.json does not exist" in capsys.readouterr().err
    assert cli.main(["infer", "serve"]) == 2
    assert "expected: hpc-neuro infer serve OUT" in capsys.readouterr().err
    assert cli.main(["infer", "serve", str(landmark), "prot=1"]) == 2
    assert "prot" in capsys.readouterr().err
    assert cli.main(["infer", "serve", "--help"]) == 0
    (tmp_path / "brain.tif").unlink()
    with serving(landmark) as port:
        assert ask(port, "/brain.image/zarr.json")[0] == 500
        assert ask(port, "/brain.ome.zarr/zarr.json")[0] == 200
    with pytest.raises(InputError, match="names no image for brain"):
        files.write_text(landmark / "config.yaml", f"model: x\nout: {landmark}\ninputs: [{{image: other.tif}}]\n")
        with ViewerServer(ServeConfig(out=landmark, port=0)) as server:
            server.layers.get("brain.image/zarr.json", "")


# --- The page of the Python package ---


@pytest.fixture
def client(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A page of two files in the place of Neuroglancer's."""
    folder = tmp_path / "package" / "static" / "client"
    folder.mkdir(parents=True)
    (folder / "index.html").write_text("<html>")
    (folder / "main.a1.js").write_text("start()")
    (folder.parent / "secret.js").write_text("")
    spec = SimpleNamespace(submodule_search_locations=[str(tmp_path / "package")])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)


@pytest.mark.usefixtures("client")
def test_the_page_of_the_package_is_served_with_the_state_of_each_volume(landmark: Path) -> None:
    with serving(landmark, viewer="local") as port:
        assert ask(port, "/v/brain/")[:2] == (200, b"<html>")
        status, body, headers = ask(port, "/v/brain/main.a1.js")
        assert (status, body, headers["Content-Type"]) == (200, b"start()", "text/javascript")
        for path in ("/v/other/", "/v/brain/../secret.js", "/v/brain/no.js", "/v/brain", "/events/other"):
            assert ask(port, path)[0] == 404

        # The stream stays open, so its lines are read one by one.
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
        connection.request("GET", "/events/brain?c=1&gc=&gs=")
        answer = connection.getresponse()
        lines = [answer.readline() for _ in range(4)]
        connection.close()
        config, state = (json.loads(line.removeprefix(b"data: ")) for line in lines[::2])
        assert config == {"k": "c", "s": {}, "g": "server/1"}
        assert (state["k"], state["s"]) == ("s", json.loads(ask(port, "/brain.json")[1]))


@pytest.mark.usefixtures("client")
def test_what_the_page_tells_is_answered_and_not_kept(landmark: Path) -> None:
    with serving(landmark, viewer="local") as port:
        for body, code in ((b'{"c": "a", "g": "7", "s": {}}', 200), (b"[]", 404), (b"{", 404), (b"", 404)):
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
            connection.request("POST", "/state/brain", body=body)
            answer = connection.getresponse()
            assert answer.status == code
            assert answer.read() == (b'{"g": "a/7"}' if code == 200 else b"")
            connection.close()


def test_a_package_that_is_missing_is_named(landmark: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'hpc_neuro\[viewer\]'"):
        ViewerServer(ServeConfig(out=landmark, port=0, viewer="local"))


@pytest.mark.slow
def test_the_page_in_a_browser_shows_the_volume(landmark: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None or importlib.util.find_spec("neuroglancer") is None:
        pytest.skip("needs Chromium and the package neuroglancer (pip install '.[viewer]')")

    # The page tells the layers that it shows, and asks for the chunks in view.
    states: list[Any] = []
    paths: list[str] = []
    answer_state, answer = viewer.answer_state, viewer._Handler._answer
    monkeypatch.setattr(viewer, "answer_state", lambda body: states.append(json.loads(body)) or answer_state(body))
    monkeypatch.setattr(viewer._Handler, "_answer", lambda self, **k: paths.append(self.path) or answer(self, **k))
    flags = ["--headless", "--no-sandbox", "--use-gl=angle", "--use-angle=swiftshader", "--enable-unsafe-swiftshader"]
    flags += ["--disable-background-networking", "--remote-debugging-port=0"]
    parts = ("/brain.image/0/c/", "/brain.ome.zarr/0/c/", "/brain.trees/1")
    with serving(landmark, viewer="local") as port, tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        command = [browser, *flags, f"--user-data-dir={profile}", f"http://127.0.0.1:{port}/v/brain/"]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            for _ in range(600):
                if states and all(any(path.startswith(part) for path in paths) for part in parts):
                    break
                time.sleep(0.2)
        finally:
            process.terminate()
            process.wait()

    names = [layer["name"] for layer in states[-1]["s"]["layers"]]
    assert names == ["image", "probability", "mask", "trees", "doubtful places"]
    for part in parts:
        assert any(path.startswith(part) for path in paths), part


@pytest.mark.parametrize("address", ["http://[bad/x", "viewer.example", "ftp://viewer.example"])
def test_a_viewer_that_is_no_address(address: str, landmark: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["infer", "serve", str(landmark), f"viewer={address}"]) == 2
    assert "is no address" in capsys.readouterr().err


@pytest.mark.parametrize(
    "path", ["/" + "a" * 5000, "/brain.trees/" + "9" * 5000, "//[bad/x", "/%00", "/brain.image/0/c/x/0/0"]
)
def test_nonsense_is_not_found(path: str, landmark: Path) -> None:
    with serving(landmark) as port:
        assert ask(port, path)[0] == 404
        # A number of 5,000 digits is beyond the end of every file.
        assert ask(port, "/brain.ome.zarr/zarr.json", Range=f"bytes={'9' * 5000}-")[0] == 416
