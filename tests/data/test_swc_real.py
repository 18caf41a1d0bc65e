"""Every real SWC reads or is refused with a reason; after repair MorphIO, NeuroM and swcgeom take it and agree."""

from __future__ import annotations

from pathlib import Path

import pytest

from hpc_neuro.core.schema import InputError
from hpc_neuro.data import swc
from tests.helpers.swc_oracles import LIBRARIES, assert_all_agree, trees_equal

COUNTS = {  # folder -> files that read, files refused until fixed, files that are no SWC
    "swc_auto_bigneuron": (90, 0, 0),
    "swc_diverse": (52, 7, 0),
    "swc_gold_bigneuron": (72, 0, 0),
    "swc_wild": (94, 2, 2),
}
NO_SWC = {"fitted.traces", "SequentiallyBranchingTrace.traces"}


def files(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.suffix in (".swc", ".traces"))


@pytest.mark.parametrize("name", COUNTS)
def test_reads_or_is_refused_with_a_reason(real_data: Path, name: str) -> None:
    read, refused, foreign = [], [], []
    for path in files(real_data / name):
        try:
            swc.read(path)
            read.append(path.name)
        except InputError as error:
            if "swc fix" in str(error):
                assert "line " in str(error)  # noqa: PT017
                refused.append(path.name)
            else:
                assert "gzip-compressed" in str(error)  # noqa: PT017
                foreign.append(path.name)
    assert (len(read), len(refused), len(foreign)) == COUNTS[name], refused


@pytest.mark.slow
@pytest.mark.parametrize("name", COUNTS)
def test_after_repair_all_readers_agree(real_data: Path, tmp_path: Path, name: str) -> None:
    count = 0
    for path in files(real_data / name):
        if path.name in NO_SWC:
            continue
        fixed = swc.fix(path)
        swc.write(tmp_path / "fixed.swc", fixed.tree, unit="voxel")
        assert not [f for f in swc.check(tmp_path / "fixed.swc") if f.kind != "single point"], path
        assert trees_equal(swc.read(tmp_path / "fixed.swc"), fixed.tree), path
        # MorphIO opens them all; the others, which are slow, the small files and some of the large
        has_all = len(fixed.tree) < 100 or count % 12 == 0
        assert_all_agree(tmp_path / "fixed.swc", fixed.tree, LIBRARIES if has_all else LIBRARIES[:1])
        count += 1
    assert count == COUNTS[name][0] + COUNTS[name][1]
