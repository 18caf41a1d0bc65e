"""What an error of `swc`, `score`, `launch` or `search` tells the user to do is done to the letter, and then works."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from hpc_neuro.cli import main
from hpc_neuro.core import files
from hpc_neuro.core.schema import ConfigError, InputError
from hpc_neuro.data import swc
from launch import job_files
from launch.__main__ import main as launch
from launch.chain import plan_chain
from launch.site import load_site
from launch.sweep import cli as sweep
from tests.conftest import REPO
from tests.helpers.image_pairs import SHAPE, make_pair, write_pair
from tests.helpers.small_search import write_search
from tests.helpers.tiny_store import write_store
from tests.launch.test_slurm_answers import write_command
from tests.train.conftest import TINY

ROWS = "1 1 3 6 3 0.66 -1\n2 3 6 6 3 0.33 1\n3 3 9 9 4 0.33 2\n"
CYCLE = "1 3 0 0 0 1 2\n2 3 1 0 0 1 1\n"


def find_command(text: str, pattern: str) -> list[str]:
    """The words of the one command in a message that `pattern` matches, as a shell reads them."""
    (command,) = re.findall(pattern, text)
    return shlex.split(command)


# --- swc and score ---


def repair(path: Path, text: str) -> list[str]:
    return find_command(text, r"Repair it with:  hpc-neuro (.*)")


def state_unit(path: Path, text: str) -> list[str]:
    return find_command(text, r"state which holds with:  hpc-neuro (.*?)  \(or unit=voxel\)")


def fix(path: Path, text: str) -> list[str]:
    assert "[not readable before `swc fix`]" in text
    return ["swc", "fix", str(path)]


def give_voxel_size(path: Path, text: str) -> list[str]:
    assert "give it in um as voxel_size=Z,Y,X" in text
    return ["swc", "convert", str(path), "voxel_size=1,0.3,0.3"]


def convert_units(path: Path, text: str) -> list[str]:
    assert "`hpc-neuro swc convert` converts units" in text
    return ["swc", "convert", str(path), "to=voxel", "voxel_size=1,0.3,0.3"]


def shift(path: Path, text: str) -> list[str]:
    return find_command(text.replace("FILE", shlex.quote(str(path))), r"`hpc-neuro (swc transform [^`]*)`")


def leave_out_away(path: Path, text: str) -> list[str]:
    assert "or leave `out` away" in text
    return ["swc", "fix", str(path), str(path.parent / "other" / path.name)]


def list_findings(path: Path, text: str) -> list[str]:
    return ["info", *find_command(text, r"list them with:  hpc-neuro swc check (.*)")]


SWC_CASES: dict[str, tuple[str, str, list[str], Callable[[Path, str], list[str]], list[str]]] = {
    # File, content, command that complains, what is advised, and a command that then works.
    "cycle": ("my neuron.swc", CYCLE, ["info", "FILE"], repair, ["info", "STEM.fixed.swc"]),
    "decimal commas": ("a.swc", "1 1 1,5 2 3 1 -1\n", ["info", "FILE"], repair, ["info", "STEM.fixed.swc"]),
    "cycle in check": ("a.swc", CYCLE, ["swc", "check", "FILE"], fix, ["info", "STEM.fixed.swc"]),
    "columns": (
        *("a.swc", f"# id type z y x radius parent\n{ROWS}", ["info", "FILE"]),
        *(repair, ["swc", "check", "STEM.fixed.swc"]),
    ),
    "two units": (
        *("a b.swc", f"# unit: um\n# in pixels\n{ROWS}", ["swc", "convert", "FILE", "voxel_size=1,1,1"]),
        *(state_unit, ["swc", "check", "STEM.fixed.swc"]),
    ),
    "open scale": (
        *("a.swc", f"# SCALE 2 2 1\n{ROWS}", ["swc", "fix", "FILE"]),
        *(state_unit, ["swc", "check", "STEM.fixed.swc"]),
    ),
    "no voxel size": ("a.swc", ROWS, ["swc", "convert", "FILE"], give_voxel_size, ["swc", "check", "STEM.um.swc"]),
    "another unit": (
        *("a.swc", f"# unit: um\n{ROWS}", ["swc", "fix", "FILE", "unit=voxel"]),
        *(convert_units, ["swc", "check", "STEM.voxel.swc"]),
    ),
    "offset": (
        *("my tree.swc", f"# OFFSET 10 20 30\n{ROWS}", ["swc", "check", "FILE"]),
        *(shift, ["swc", "check", "STEM.moved.swc"]),
    ),
    "one name twice": (
        *("a.swc", ROWS, ["swc", "fix", "FILE", "FOLDER/other/a.swc", "out=FOLDER/out"]),
        *(leave_out_away, ["swc", "check", "STEM.fixed.swc"]),
    ),
    "findings": ("my tree.swc", ROWS * 2, ["info", "FILE"], list_findings, ["info", "FILE"]),
}


@pytest.mark.parametrize("case", SWC_CASES)
def test_advice_on_trees(case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name, content, command, advise, then = SWC_CASES[case]
    (tmp_path / "other").mkdir()
    for folder in (tmp_path, tmp_path / "other"):
        (folder / name).write_text(content)

    path = tmp_path / name
    values = {"FILE": str(path), "STEM": str(path.with_suffix("")), "FOLDER": str(tmp_path)}

    def fill(words: list[str]) -> list[str]:
        return [re.sub("FILE|STEM|FOLDER", lambda match: values[match[0]], word) for word in words]

    # `info` only notes findings.
    assert main(fill(command)) in ((0,) if case == "findings" else (2, 3))
    captured = capsys.readouterr()
    assert main(advise(path, captured.out + captured.err)) == 0
    assert main(fill(then)) == 0


def test_a_tree_of_unknown_unit_is_written_in_the_stated_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "a.swc"
    path.write_text(ROWS)
    assert main(["swc", "fix", str(path)]) == 0
    assert "unit=um states another" in capsys.readouterr().out
    assert main(["swc", "fix", str(path), "unit=um"]) == 0
    assert swc.read_header(tmp_path / "a.fixed.swc").unit == "um"


def test_trees_of_two_units_are_scored_after_a_conversion(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.swc").write_text(f"# unit: voxel\n{ROWS}")
    (tmp_path / "b.swc").write_text(f"# unit: um\n{ROWS}")
    assert main(["score", str(tmp_path / "a.swc"), str(tmp_path / "b.swc")]) == 2
    assert "bring one into the unit of the other with `hpc-neuro swc convert`" in capsys.readouterr().err
    assert main(["swc", "convert", str(tmp_path / "a.swc"), "voxel_size=1,1,1"]) == 0
    capsys.readouterr()
    assert main(["score", str(tmp_path / "a.um.swc"), str(tmp_path / "b.swc")]) == 0
    assert json.loads(capsys.readouterr().out)["f1"] == 1.0


def test_a_flipped_tree_fits_after_the_advised_change(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tree, _ = make_pair(1)
    flipped = replace(tree, points=tree.points * [1, -1, 1] + np.array([0, SHAPE[1] - 1, 0]))
    write_pair(tmp_path / "in", "a", 1, tree=flipped)
    command = ["prepare", f"images={tmp_path / 'in'}", f"out={tmp_path / 'out'}", "voxel_size=[1.0,0.4,0.4]"]
    assert main(command) == 2
    (axis,) = re.findall(r"fits a.tif better with (\w) flipped.*`hpc-neuro swc transform`", capsys.readouterr().err)

    path = tmp_path / "in" / "a.swc"
    assert main(["swc", "transform", str(path), f"flip={axis}", f"shape={','.join(map(str, SHAPE))}"]) == 0
    path.with_name("a.moved.swc").replace(path)
    assert main(command) == 0


# --- launch ---


def test_a_machine_without_slurm_runs_it_here(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    store = write_store(tmp_path / "store", {"a": "train", "b": "val"})
    # Slurm may be installed where all other programs are.
    monkeypatch.setenv("PATH", str(tmp_path))
    command = ["train", f"store={store}", f"out={tmp_path / 'out'}", *TINY]
    assert launch(command) == 2
    assert "use --on local" in capsys.readouterr().err
    assert launch([*command, "--on", "local", "--dry-run"]) == 0

    # A dry run submits nothing, so it needs no scheduler.
    assert launch([*command, "--dry-run"]) == 0


def test_a_site_of_another_name_is_one_of_those_listed() -> None:
    with pytest.raises(ConfigError) as caught:
        load_site("nowhere", [])
    names = re.findall(r"or one of (.*)", str(caught.value))[0].split(", ")
    assert all(load_site(name.strip(), []) for name in names)


def test_secrets_move_from_setup_to_the_environment() -> None:
    with pytest.raises(ConfigError, match="set it under `environment`"):
        load_site("dev", ["setup=[export WANDB_API_KEY=hush]"])
    assert load_site("dev", ["environment={WANDB_API_KEY: hush}"]).environment == {"WANDB_API_KEY": "hush"}


def test_a_line_break_in_a_key_is_taken_out() -> None:
    with pytest.raises(ConfigError, match="write it on one line without it"):
        load_site("dev", ['account="a\\nb"'])
    assert load_site("dev", ["account=ab"]).account == "ab"


def test_a_chain_in_the_order_that_is_named(tmp_path: Path) -> None:
    keys = [f"out={tmp_path}", f"prepare.images={tmp_path}"]
    with pytest.raises(ConfigError) as caught:
        plan_chain(["train", "prepare"], None, keys)
    (order,) = re.findall(r"the order of the pipeline, (\S+)", str(caught.value))
    verbs = [verb for verb in order.split(",") if verb in ("train", "prepare")]
    assert [verb for verb, _ in plan_chain(verbs, None, keys)] == ["prepare", "train"]


def test_a_folder_that_others_can_write_into_is_closed(tmp_path: Path) -> None:
    folder = tmp_path / "my runs" / "launch"
    folder.mkdir(parents=True)
    folder.chmod(0o777)
    with pytest.raises(InputError) as caught:
        job_files.make_protected_folder(folder / "code")
    (command,) = re.findall(r"`(chmod [^`]+)`", str(caught.value))
    subprocess.run(shlex.split(command), check=True)
    job_files.make_protected_folder(folder / "code")


JOB = {"id": "7", "on": "slurm", "verb": "infer", "share": ""}


@pytest.mark.parametrize(
    "text",
    [
        "{",
        json.dumps([{**JOB, "id": "--user=root"}]),
        json.dumps([{**JOB, "id": "7 8"}]),
        json.dumps([{**JOB, "id": ""}]),
        json.dumps([{**JOB, "on": "pbs", "files": "../../victim"}]),
        json.dumps([{**JOB, "id": 7}]),
    ],
)
def test_a_damaged_list_of_jobs_is_removed(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files.write_text(tmp_path / "out" / "launch" / "jobs.json", text)
    assert launch(["cancel", str(tmp_path / "out")]) == 2
    capsys.readouterr()
    assert launch(["status", str(tmp_path / "out")]) == 2
    (path,) = re.findall(r"remove (\S+) to launch again", capsys.readouterr().err)
    Path(path).unlink()
    assert launch(["status", str(tmp_path / "out")]) == 2
    assert "nothing was launched into" in capsys.readouterr().err


def test_a_queued_job_is_canceled(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    from launch import status

    out = tmp_path / "my runs"
    write_command(tmp_path / "bin", "squeue", f"cat {tmp_path}/queue")
    write_command(tmp_path / "bin", "scancel", f"echo '7|CANCELLED' > {tmp_path}/queue")
    (tmp_path / "queue").write_text("7|PENDING\n")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    files.write_json(out / "launch" / "jobs.json", [{"id": "7", "on": "slurm", "verb": "infer", "share": ""}])

    with pytest.raises(InputError) as caught:
        status.require_idle(out)
    words = find_command(str(caught.value), r"`python -m launch ([^`]+)`")
    assert launch(words) == 0
    status.require_idle(out)


# --- search ---


@pytest.mark.parametrize(
    ("keys", "advice", "better"),
    [
        (["sampler.kind=grid", "trials=null"], "or take the sampler `random` or `tpe`", ["sampler.kind=random"]),
        (
            ["sampler.kind=grid", "trials=null"],
            "write `choice: [...]`",
            ["space={optim.lr: {choice: [0.001, 0.01]}}", "sampler.kind=grid", "trials=null"],
        ),
        (["trials=null"], "say how many", ["trials=2"]),
        (["asha={first: 100}"], "lower it, or set asha=null", ["asha=null"]),
        (["asha={first: 100}"], "lower it, or set asha=null", ["asha={first: 2}"]),
    ],
)
def test_a_search_that_cannot_be(
    keys: list[str], advice: str, better: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_search(tmp_path)
    assert sweep.main([str(path), *keys, "--dry-run"]) == 2
    assert advice in capsys.readouterr().err
    assert sweep.main([str(path), *better, "--dry-run"]) == 0


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_study_is_started_and_a_torn_trial_is_made_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(REPO))
    path = write_search(tmp_path)
    assert main(["search", str(path)]) == 2
    (words,) = re.findall(r"`python -m launch (sweep CONFIG --on local)`", capsys.readouterr().err)
    command = [word.replace("CONFIG", str(path)) for word in words.split()]
    assert launch(command) == 0
    assert main(["search", str(path)]) == 0

    (record,) = (tmp_path / "study" / "trials").glob("*/trial.json")
    record.write_text("{")
    capsys.readouterr()
    assert main(["search", str(path)]) == 2
    (folder,) = re.findall(r"remove (\S+); the study then makes this trial again", capsys.readouterr().err)
    shutil.rmtree(folder)
    assert launch(command) == 0
    assert main(["search", str(path)]) == 0

    # The record of the study is lost: the sweep is started again, and makes no trial anew.
    study, (trial,) = tmp_path / "study", (tmp_path / "study" / "trials").glob("*/trial.json")
    written_at = trial.stat().st_mtime_ns
    (study / "run.json").unlink()
    capsys.readouterr()
    assert main(["search", str(path)]) == 2
    assert "start the sweep again with `python -m launch sweep`" in capsys.readouterr().err
    assert launch(command) == 2
    (config,) = re.findall(r"(\S+) is of no run and would be overwritten; .* or move it away", capsys.readouterr().err)
    Path(config).rename(tmp_path / "config.yaml")
    assert launch(command) == 0
    assert main(["search", str(path)]) == 0
    assert trial.stat().st_mtime_ns == written_at

    # The page and the config of the best trial name the same command.
    (words,) = re.findall(r"# hpc-neuro (train best.yaml)", (study / "best.yaml").read_text())
    assert f"hpc-neuro {words}" in (study / "report.html").read_text()
    monkeypatch.chdir(study)
    assert main(words.split()) == 0
    assert (study / "best" / "weights" / "best").is_dir()
