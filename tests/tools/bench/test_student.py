"""tools/bench/student.py: the networks are comparable and the figures come out right."""

from __future__ import annotations

import argparse
import re

import pytest

from hpc_neuro.models.config import SIZES

pytest.importorskip("monai", reason="the comparison is with MONAI (pip install hpc_neuro[test])")
from tools.bench import student as bench

ARGS = argparse.Namespace(device="cpu", size="tiny", crop=[16, 16, 32], batch=1, threads=1, repeats=1)


@pytest.mark.slow
def test_the_networks_have_the_same_transformer() -> None:
    dim, depth, _ = SIZES["tiny"]
    block = 12 * dim * dim  # weights of attention and MLP
    for network in bench.NETWORKS:
        net = bench.build_network(network, ARGS)
        names = {n: p.numel() for n, p in net.named_parameters() if "vit" in n and re.search(r"blocks\.\d+\.", n)}
        assert sum(n for name, n in names.items() if "weight" in name and "norm" not in name) == depth * block


@pytest.mark.slow
def test_steps_change_weights_and_take_time() -> None:
    seconds, cpu = bench.time_step(bench.make_step("student", ARGS))
    assert seconds > 0
    assert cpu > 0


def test_the_table_gives_ratios() -> None:
    values = {"student": 1.0, "monai_unetr": 4.0}
    figures = {"device": "cpu", "threads": 1, "size": "tiny", "crop": [16, 16, 16], "batch": 1, "seconds": values}
    figures |= {"cpu_seconds": values, "parameters": dict.fromkeys(values, 1_500_000)}
    figures |= {"peak_bytes": {network: int(v * 2**20) for network, v in values.items()}}
    for key in ("time_ratio", "cpu_time_ratio", "memory_ratio"):
        figures[key] = {"student": 0.25}
    lines = bench.format_table(figures).splitlines()
    assert lines[2].split() == ["student", "1.50", "M", "1.000", "0.250", "1.000", "0.250", "1", "MiB", "0.250"]
    assert lines[3].split()[3:5] == ["4.000", "1.000"]
