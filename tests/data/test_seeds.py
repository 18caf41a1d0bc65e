"""Seed files of Vaa3D."""

from __future__ import annotations

from pathlib import Path

import pytest

from hpc_neuro.core.schema import InputError
from hpc_neuro.data.seeds import find_seed_file, read_seeds


def test_a_marker_file_counts_from_one_and_an_apo_file_from_zero(tmp_path: Path) -> None:
    marker = tmp_path / "n.marker"
    marker.write_text(
        "##x,y,z,radius,shape,name,comment,r,g,b\n11, 21, 31, 0, 1, soma, , 255,0,0\n\n4,5,6,0,1,,,0,0,0\n"
    )
    assert read_seeds(marker) == ((30.0, 20.0, 10.0), (5.0, 4.0, 3.0))
    apo = tmp_path / "n.apo"
    apo.write_text("##n,orderinfo,name,comment,z,x,y,pixmax\n1, , soma, , 30,10,20,255,0,0,5,0\n")
    assert read_seeds(apo) == ((30.0, 20.0, 10.0),)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("n.marker", "1,2\n", "line 1"),
        ("n.marker", "1,2,nan\n", "line 1"),
        ("n.apo", "1,,,,a,b,c\n", "number, order"),
        ("n.marker", "# nothing\n", "holds no point"),
        ("n.csv", "1,2,3\n", "no seed file"),
    ],
)
def test_what_is_no_seed_file_is_refused(tmp_path: Path, name: str, text: str, message: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=message):
        read_seeds(tmp_path / name)


def test_a_seed_file_is_found_by_the_stem_or_the_whole_name(tmp_path: Path) -> None:
    image = tmp_path / "n.tif"
    assert find_seed_file(image, "n") is None
    (tmp_path / "n.tif.marker").write_text("1,1,1\n")
    assert find_seed_file(image, "n") == tmp_path / "n.tif.marker"
    (tmp_path / "n.apo").write_text("")
    assert find_seed_file(image, "n") == tmp_path / "n.apo"
    assert isinstance(read_seeds(tmp_path / "n.tif.marker"), tuple)
    with pytest.raises(InputError, match="cannot be read"):
        read_seeds(tmp_path / "absent.marker")
