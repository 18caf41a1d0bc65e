"""fetch-teacher: a folder of weights that nodes without internet read.

The tests have no internet: the hub is a small server on this machine that answers as the hub does, with random weights.
"""

from __future__ import annotations

import hashlib
import http.server
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from safetensors.torch import save_file

from hpc_neuro.cli import main
from hpc_neuro.core.schema import InputError
from hpc_neuro.models import teacher as module
from hpc_neuro.models.config import TeacherConfig
from hpc_neuro.models.teacher import fetch, load_teacher

NAME = "vit_tiny_patch16_224.augreg_in21k"


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "model.safetensors"
    save_file(load_teacher(TeacherConfig(model="random")).backbone.state_dict(), path)
    return path


@pytest.fixture
def hub_cache(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub's client finds the weights in its cache."""
    monkeypatch.setattr(module.huggingface, "try_to_load_from_cache", lambda *a, **k: str(weights))


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        module.huggingface, "try_to_load_from_cache", lambda *a, **k: pytest.fail("the hub's cache was asked")
    )
    monkeypatch.setattr(module.huggingface, "hf_hub_download", lambda *a, **k: pytest.fail("the network was tried"))


def test_a_fetched_folder_is_loaded_without_the_hub(
    weights: Path, hub_cache: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = fetch(NAME, tmp_path / "t")
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()
    assert digest in lines[0]
    assert f"teacher.model={NAME} teacher.weights={tmp_path / 't'}" in lines[1]
    note = json.loads((tmp_path / "t" / "teacher.json").read_text())
    assert (note["name"], note["sha256"], note["origin"]) == (NAME, digest, f"timm/{NAME}")
    assert "apache-2.0" in (tmp_path / "t" / "LICENCE.txt").read_text()
    monkeypatch.setattr(module.huggingface, "weights", lambda *a: pytest.fail("the hub was asked"))
    teacher = load_teacher(TeacherConfig(model=NAME, weights=tmp_path / "t"))
    assert teacher.identity == {"name": NAME, "sha256": digest}


def test_where_there_is_no_internet_the_advice_is_obeyed(
    hub_cache: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(InputError) as caught:
        load_teacher(TeacherConfig(model=NAME, weights=empty))
    (words,) = re.findall(r"`hpc-neuro (fetch-teacher [^`]+)` and give teacher.weights=FOLDER", str(caught.value))
    assert main(words.replace("FOLDER", str(tmp_path / "t")).split()) == 0
    assert load_teacher(TeacherConfig(model=NAME, weights=tmp_path / "t")).identity["name"] == NAME

    # A fetched teacher has a name of its own.
    with pytest.raises(InputError, match=r"for a teacher that was fetched set teacher.model to its name"):
        load_teacher(TeacherConfig(model="trained", weights=tmp_path / "t"))

    assert "or use teacher.model=bundled" in str(caught.value)
    assert load_teacher(TeacherConfig(model="bundled")).identity["name"] == "bundled"


def test_fetching_again_changes_nothing_and_mends_a_changed_file(
    hub_cache: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetch(NAME, tmp_path / "t")
    file = tmp_path / "t" / "model.safetensors"
    stamp = file.stat().st_mtime_ns
    with monkeypatch.context() as network:
        network.setattr(module.huggingface, "weights", lambda *a: pytest.fail("the hub was asked"))
        assert "already holds" in fetch(NAME, tmp_path / "t")[0]
    assert file.stat().st_mtime_ns == stamp
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(InputError, match="has sha256"):
        load_teacher(TeacherConfig(model=NAME, weights=tmp_path / "t"))
    fetch(NAME, tmp_path / "t")
    load_teacher(TeacherConfig(model=NAME, weights=tmp_path / "t"))


def test_wrong_folders_are_named(hub_cache: None, tmp_path: Path) -> None:
    command = f"hpc-neuro fetch-teacher {NAME} out=FOLDER"
    with pytest.raises(InputError, match=rf"t does not exist; .*{command}"):
        load_teacher(TeacherConfig(model=NAME, weights=tmp_path / "t"))
    (tmp_path / "t").mkdir()
    with pytest.raises(InputError, match=rf"teacher.json does not exist; .*{command}"):
        load_teacher(TeacherConfig(model=NAME, weights=tmp_path / "t"))
    with pytest.raises(InputError, match="holds no fetched teacher"):
        fetch(NAME, tmp_path / "t")
    fetch(NAME, tmp_path / "u")
    with pytest.raises(InputError, match=f"holds the teacher {NAME}, but teacher.model is vit_small_patch16_224.dino"):
        load_teacher(TeacherConfig(model="vit_small_patch16_224.dino", weights=tmp_path / "u"))


class Hub(http.server.BaseHTTPRequestHandler):
    """Answers for one file as the hub does."""

    content = b""
    gets: ClassVar[list[str]] = []

    def do_HEAD(self) -> None:
        self._head()

    def do_GET(self) -> None:
        self.gets.append(self.path)
        self._head()
        self.wfile.write(self.content)

    def _head(self) -> None:
        self.send_response(200 if self.path.endswith("/model.safetensors") else 404)
        self.send_header("ETag", f'"{hashlib.sha256(self.content).hexdigest()}"')
        self.send_header("X-Repo-Commit", 40 * "0")
        self.send_header("Content-Length", str(len(self.content)))
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Nothing on the console."""


@pytest.fixture
def hub(weights: Path) -> Iterator[str]:
    Hub.content = weights.read_bytes()
    Hub.gets.clear()
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


@pytest.mark.slow
def test_many_processes_download_once_and_offline_is_honored(hub: str, tmp_path: Path) -> None:
    inherited = {k: v for k, v in os.environ.items() if "proxy" not in k.lower()}
    environment = {**inherited, "HF_ENDPOINT": hub, "HF_HOME": str(tmp_path / "hf"), "OMP_NUM_THREADS": "1"}
    script = (
        "import os; from hpc_neuro.models.teacher import TeacherConfig as C, load_teacher as l\n"
        "for _ in range(3):\n"  # print would write line and newline apart where PYTHONUNBUFFERED is set
        f"    if os.fork() == 0: os.write(1, (l(C(model='{NAME}')).identity['sha256'] + '\\n').encode()); os._exit(0)\n"
        "for _ in range(3): os.wait()"
    )
    answers = subprocess.check_output([sys.executable, "-c", script], env=environment, text=True, timeout=200).split()
    assert answers == 3 * [hashlib.sha256(Hub.content).hexdigest()]
    assert len([path for path in Hub.gets if path.endswith(".safetensors")]) == 1
    script = (
        "from hpc_neuro.cli import main\n"
        f"assert main(['fetch-teacher', '{NAME}', 'out={tmp_path / 't'}']) == 0\n"
        f"assert main(['fetch-teacher', 'vit_small_patch16_224.dino', 'out={tmp_path / 'u'}']) == 2"
    )
    offline = {**environment, "HF_HUB_OFFLINE": "1"}
    ended = subprocess.run(
        [sys.executable, "-c", script], env=offline, check=True, capture_output=True, text=True, timeout=100
    )
    assert "HF_HUB_OFFLINE is set" in ended.stderr
    assert (tmp_path / "t" / "teacher.json").exists()
    assert not (tmp_path / "u").exists()


def test_the_model_is_the_weights(weights: Path, hub_cache: None, tmp_path: Path) -> None:
    fetch(NAME, tmp_path / "t")
    ours = load_teacher(TeacherConfig(model=NAME, weights=tmp_path / "t")).backbone.state_dict()
    timm_state = load_teacher(TeacherConfig(model=NAME, weights=weights)).backbone.state_dict()
    assert all(torch.equal(ours[k], timm_state[k]) for k in timm_state)
