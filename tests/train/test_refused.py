"""Trainings that cannot work are refused, with the key that is to be changed."""

from __future__ import annotations

import pytest

from hpc_neuro import train
from hpc_neuro.core.schema import ConfigError, InputError


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["crop.size=[16,32,40]"], r"crop\.size .* multiple of student\.patch"),
        (["distill={}"], "give `cache`"),
        (["losses=[]"], "nothing to learn"),
        (["losses=[{kind: dice, weight: 0}]"], "no loss has a weight above 0"),
        (["plan.nodes=4"], "`gpus` is not set"),
        (["teacher.arch=vit_small_patch16_224"], "`arch` and `seed` are those of `model: random`"),
        (["augment.distilled=[flip_y,rot90]", "crop.size=[16,32,64]"], "has rot90, but y and x"),
        (["student.tokenizer={kind: tubular, taps: 1}"], "a tube of one tap cannot bend"),
        (["optim.stepps=3"], "stepps"),
        (["losses=[{kind: dicee}]"], "dicee"),
    ],
)
def test_a_config_that_cannot_work_is_refused_with_its_key(tiny, tmp_path, overrides, message):
    with pytest.raises(ConfigError, match=message):
        tiny(tmp_path / "run", *overrides)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["engine.dtype=fp16", "engine.stage=0"], "stage 0 DeepSpeed divides"),
        (["engine.offload_optimizer=true"], "there is no GPU"),
        (["engine.offload_parameters=cpu"], "offload_parameters=cpu: parameters are whole on each rank at stage 2"),
        (["engine.offload_parameters=nvme"], "engine.nvme: the folder and offload_parameters=nvme go together"),
        (["engine.offload_parameters=nvme", "engine.nvme=/nowhere"], "/nowhere is no folder"),
        (["store=/nowhere"], "prepare"),
        (
            [
                *("teacher.model=random", "transfer.rule=tubular", "transfer.block=center"),
                "student.tokenizer={kind: tubular, deformable: false, keep_block: false}",
            ],
            "keep_block=false omits",
        ),
    ],
)
def test_a_run_that_cannot_work_here_is_refused_before_anything_is_written(tiny, tmp_path, overrides, message):
    for verb in (train.forecast, train.run):
        with pytest.raises((ConfigError, InputError), match=message):
            verb(tiny(tmp_path / "run", *overrides))
    assert not (tmp_path / "run").exists()
