"""Seed files of Vaa3D."""

from __future__ import annotations

import os
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
        ("n.marker", "1_0,2,3\n", "is no point"),
        ("n.marker", "1,2,inf\n", "is no point"),
        ("n.marker", "10;20;30\n", "is no point"),
        ("n.marker", "10 20 30\n", "is no point"),
        ("n.marker", "10,5, 20,5, 30,5\n", "write numbers with points"),
        ("n.marker", "10, 20,5, 30, 0, 1, , , 255,0,0\n", "write numbers with points"),
        ("n.marker", "10,5,20,5,30,5,0,1,,,255,0,0\n", "write numbers with points"),
        ("n.apo", "1, , a, , 30,5,10,5,20,5,255,0,1,0,1,0,5,0,0,0,,,,0,0,255\n", "write numbers with points"),
        ("n.marker", "##z,y,x\n1,2,3\n", "put them in the order `x, y, z`"),
        ("n.apo", "##n,orderinfo,name,comment,x,y,z\n1,,,,1,2,3\n", "put them in the order `number, order"),
    ],
)
def test_what_is_no_seed_file_is_refused(tmp_path: Path, name: str, text: str, message: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=message):
        read_seeds(tmp_path / name)


def test_the_columns_are_put_in_order(tmp_path: Path) -> None:
    """The advice."""
    path = tmp_path / "n.marker"
    path.write_text("## z, y, x\n3,2,1\n")
    with pytest.raises(InputError, match="the columns are z, y, x; put them in the order `x, y, z`"):
        read_seeds(path)
    path.write_text("## x, y, z\n1,2,3\n")
    assert read_seeds(path) == ((2.0, 1.0, 0.0),)


@pytest.mark.parametrize("line", ["10.5, 20,30", "10,20, 30.5", "1.5,2,3,0,1,a, b ,255,0,0", "# x is left\n1, 2, 3"])
def test_blanks_are_free_where_points_are_decimal_points(tmp_path: Path, line: str) -> None:
    (tmp_path / "n.marker").write_text(f"{line}\n")
    assert len(read_seeds(tmp_path / "n.marker")) == 1


def test_a_seed_file_that_never_ends_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "f.marker")
    (tmp_path / "z.apo").symlink_to("/dev/zero")
    with (tmp_path / "s.marker").open("wb") as file:
        file.truncate(1 << 40)
    for name in ("f.marker", "z.apo", "s.marker"):
        with pytest.raises(InputError, match="give the path of a seed file"):
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
