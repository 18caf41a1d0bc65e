"""Ranges of parameters: any cut is read back through any other cut, and safetensors reads what is written."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file

from hpc_neuro.core import distributed
from hpc_neuro.core.schema import InputError
from hpc_neuro.train import batches
from hpc_neuro.train.checkpoint.tensor_files import (
    TensorRange,
    rank_file,
    read_ranges,
    stream_tensors,
    write_ranges,
    write_tensors,
)


def split_values(values: torch.Tensor, at: list[int]) -> list[tuple[int, torch.Tensor]]:
    edges = [0, *sorted(at), values.numel()]
    return [(a, values[a:b]) for a, b in itertools.pairwise(edges) if b > a]


@given(st.integers(1, 60), st.data())
def test_any_cut_is_read_through_any_other(tmp_path_factory, numel, data):
    folder = tmp_path_factory.mktemp("ranges")
    whole = {"a": torch.randn(numel), "b.weight": torch.randn(7)}
    places = st.lists(st.integers(0, numel), max_size=3)
    parts = [TensorRange("weight", "a", start, v) for start, v in split_values(whole["a"], data.draw(places))]
    for rank, part in enumerate(parts):
        write_ranges(
            rank_file(folder, rank), [part] + [TensorRange("weight", "b.weight", 0, whole["b.weight"])] * (rank == 0)
        )
    wanted = [
        TensorRange("weight", "a", start, torch.full_like(v, 9))
        for start, v in split_values(whole["a"], data.draw(places))
    ]
    read_ranges(folder, wanted, first=data.draw(st.integers(0, 5)))
    assert torch.equal(torch.cat([r.values for r in wanted]), whole["a"])
    tensors = list(stream_tensors(folder, "weight", {"b.weight": (7, 1), "a": (numel,)}))
    assert torch.equal(tensors[0], whole["b.weight"][:, None])
    assert torch.equal(tensors[1], whole["a"])


def test_what_is_missing_or_broken_is_said(tmp_path):
    write_ranges(rank_file(tmp_path, 0), [TensorRange("weight", "a", 0, torch.zeros(3))])
    for wanted in (TensorRange("weight", "a", 2, torch.zeros(4)), TensorRange("exp_avg", "a", 0, torch.zeros(3))):
        with pytest.raises(InputError, match="lacks 3 numbers"):
            read_ranges(tmp_path, [wanted])
    with pytest.raises(InputError, match=r"lacks 1 numbers of weight a"):
        list(stream_tensors(tmp_path, "weight", {"a": (4,)}))
    whole = rank_file(tmp_path, 0).read_bytes()
    rank_file(tmp_path, 0).write_bytes(whole[:-4])
    with pytest.raises(InputError, match=r"rank_00000\.safetensors cannot be read"):
        read_ranges(tmp_path, [TensorRange("weight", "a", 0, torch.zeros(3))])


def test_other_programs_read_what_is_written(tmp_path):
    tensors = {"x": torch.randn(2, 3).bfloat16(), "y": torch.randn(4, 3).T, "scalar": torch.tensor(2.5)}
    shapes = {k: v.shape for k, v in tensors.items()}
    write_tensors(tmp_path / "file", shapes, tensors.values(), {"code": "1"})
    loaded = load_file(tmp_path / "file")
    assert all(torch.equal(loaded[k], v.float()) for k, v in tensors.items())
    with safe_open(tmp_path / "file", "pt") as file:
        assert file.metadata() == {"code": "1"}
    with pytest.raises(ValueError, match="has 2 elements"):
        write_tensors(tmp_path / "file", {"x": (3,)}, [torch.zeros(2)])


@given(st.integers(1, 40), st.integers(1, 9), st.integers(1, 12))
def test_ranks_and_passes_share_a_step_and_meet_in_every_pass(batch, ranks, micro):
    numbers: list[int] = []
    passes = set()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distributed, "world_size", lambda: ranks)
        for rank in range(ranks):
            patch.setattr(distributed, "rank", lambda rank=rank: rank)
            passes_of_rank = batches.share_step(batch, micro)
            passes.add(len(passes_of_rank))
            assert all(0 <= stop - first <= micro for first, stop in passes_of_rank)
            numbers += [i for first, stop in passes_of_rank for i in range(first, stop)]
            chunks = list(batches.iterate_indices(1, 3, batch, micro))
            assert [len(c) for c in chunks] == [max(1, b - a) for a, b in passes_of_rank * 2]
            assert all(batch <= i < 3 * batch for c in chunks for i in c)
    assert sorted(numbers) == list(range(batch))
    assert passes == {-(-batch // (micro * ranks))}
