"""Two real ranks: the losses of one process, exact resume, other numbers of ranks, a signal that only one got."""

from __future__ import annotations

import itertools
import json
import os
import signal

import pytest
import torch
from safetensors.torch import load_file

from hpc_neuro import train
from hpc_neuro.core.schema import load
from hpc_neuro.train import loop
from tests.helpers.torchrun import launch, quote_end
from tests.train.conftest import TINY, rows

KEYS = ["optim.batch=4"]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def ranks(store, tmp_path_factory):
    """The folder of all runs that ranks.py does."""
    folder = tmp_path_factory.mktemp("ranks")
    train_step = loop.train_step

    def signal_in_third_step(state, ready):
        if state.step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        train_step(state, ready)

    keys = [f"store={store}", f"out={folder / 'up'}", *TINY, *KEYS, "engine.stage=3", "optim.batch=3"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "train_step", signal_in_third_step)
        assert train.run(load(train.TrainConfig, None, keys)) == 75
    done = launch("train_ranks.py", 2, store, folder)
    assert done.returncode == 0, quote_end(done)
    return folder


def weights(run):
    return load_file(run / "weights/last/model.safetensors")


def check_alike(run, other, loss=1e-5):
    for row, reference in zip(rows(run), rows(other), strict=True):
        assert row["step"] == reference["step"]
        assert row["loss"] == pytest.approx(reference["loss"], abs=loss), run
        assert row["grad_norm"] == pytest.approx(reference["grad_norm"], rel=100 * loss), run


@pytest.fixture(scope="module")
def alone(store, tmp_path_factory):
    out = tmp_path_factory.mktemp("alone") / "run"
    assert train.run(load(train.TrainConfig, None, [f"store={store}", f"out={out}", *TINY, *KEYS])) == 0
    return out


def test_interrupted_runs_end_with_the_same_bits(ranks):
    first, second = weights(ranks / "whole"), weights(ranks / "broken")
    assert all(torch.equal(first[k], second[k]) for k in first)
    assert [r["loss"] for r in rows(ranks / "whole")] == [r["loss"] for r in rows(ranks / "broken")]
    assert [r["step"] for r in rows(ranks / "broken")] == [1, 2, 3, 4, 5, 6]


def test_all_ranks_stop_when_one_is_asked_to(ranks):
    codes = [json.loads((ranks / f"codes{rank}.json").read_text()) for rank in (0, 1)]
    assert codes[0] == codes[1]
    assert codes[0]["broken"] == ["cut", 75, 0]


def test_two_ranks_and_every_stage_have_the_losses_of_one_process(ranks, alone):
    for name in ("whole", "stage0", "stage3"):
        check_alike(ranks / name, alone)
        for row, other in zip(rows(ranks / name, "val"), rows(alone, "val"), strict=True):
            assert row["dice_best"] == pytest.approx(other["dice_best"], abs=1e-3)


def test_two_ranks_at_stage_1_then_one_at_stage_3_end_as_one_did(ranks, alone, tiny, caplog):
    with caplog.at_level("INFO"):
        assert train.run(tiny(ranks / "down", *KEYS, "engine.stage=3")) == 0
    assert "resumed after step 5" in caplog.text
    assert "2 ranks -> 1 rank, ZeRO stage 1 -> ZeRO stage 3" in caplog.text
    check_alike(ranks / "down", alone)
    for name, values in weights(ranks / "down").items():
        assert torch.allclose(values, weights(alone)[name], atol=1e-4), name  # Adam's steps are 2e-3 each


def test_one_rank_at_stage_3_then_two_at_stage_2_share_three_crops_and_end_as_one_did(ranks, tiny, tmp_path):
    alone = tmp_path / "run"
    assert train.run(tiny(alone, *KEYS, "optim.batch=3")) == 0
    check_alike(ranks / "up", alone)
    for name, values in weights(ranks / "up").items():
        assert torch.allclose(values, weights(alone)[name], atol=1e-4), name


def test_every_sample_is_learnt_from_once(ranks):
    for name, batch, first in (("whole", 4, 0), ("stage3", 4, 0), ("up", 3, 3)):
        counted = [json.loads((ranks / f"counted{rank}.json").read_text())[name] for rank in (0, 1)]
        indices = sorted(map(tuple, itertools.chain(*counted)))
        assert indices == [(step, step * batch + i) for step in range(first, 6) for i in range(batch)], name


def test_stages_precisions_and_passes_agree_with_one_process(ranks, tiny, tmp_path):
    """One test, not sixteen: parallel workers would each run all the ranks again for their share."""
    alone = tmp_path / "run"
    keys = ["optim.steps=2", "validate.crops=1", "crop.size=[8,16,32]"]
    assert train.run(tiny(alone, *KEYS, *keys, "engine.stage=0")) == 0
    for stage, micro in itertools.product(range(4), (2, 1)):
        check_alike(ranks / f"matrix/{stage}_fp32_{micro}", alone)
        check_alike(ranks / f"matrix/{stage}_bf16_{micro}", alone, loss=2e-2)
        if stage:  # refused at stage 0
            check_alike(ranks / f"matrix/{stage}_fp16_{micro}", alone, loss=2e-2)


def test_stage_3_is_built_shared_out_to_the_bit_and_never_whole(ranks):
    """Half of it in float32 and in bf16, and a layer at a time besides."""
    for rank in (0, 1):
        facts = json.loads((ranks / f"sharded{rank}.json").read_text())
        assert facts["alike"]
        assert facts["counted"] > 100
        assert facts["most"] < 0.95 * facts["whole"]
