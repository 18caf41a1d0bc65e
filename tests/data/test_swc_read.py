"""SWC files: what is read, what is refused and why."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hpc_neuro.core import morphology
from hpc_neuro.core.schema import InputError
from hpc_neuro.data import swc
from tests.helpers.swc_cases import GOOD, REFUSED, TOLERATED, Put
from tests.helpers.swc_oracles import measure_tree, random_tree, trees_equal


def test_x_y_z_become_z_y_x(file: Put) -> None:
    tree = swc.read(file("1 2 10 20 30 4 -1\n2 3 11 21 31 5 1\n"))
    np.testing.assert_array_equal(tree.points, [[30, 20, 10], [31, 21, 11]])
    assert tree.radii.tolist() == [4, 5]
    assert tree.types.tolist() == [2, 3]
    assert tree.parents.tolist() == [-1, 0]


@pytest.mark.parametrize("kind", TOLERATED)
def test_tolerated_files_are_read(file: Put, kind: str) -> None:
    expected = swc.read(file(GOOD, "good.swc"))
    tree = swc.read(file(TOLERATED[kind]))
    order = np.lexsort(tree.points.T)
    np.testing.assert_array_equal(tree.points[order], expected.points[np.lexsort(expected.points.T)])
    assert measure_tree(tree) == pytest.approx(measure_tree(expected))
    assert np.array_equal(np.sort(tree.radii), np.sort(expected.radii))


@pytest.mark.parametrize("kind", REFUSED)
def test_ambiguous_files_are_refused_by_line(file: Put, kind: str) -> None:
    content, message = REFUSED[kind]
    with pytest.raises(InputError, match=message) as caught:
        swc.read(file(content))
    # The advice holds: `fix` is named where it makes a tree, and nowhere else.
    if "hpc-neuro swc fix" in str(caught.value):
        assert len(swc.fix(file(content)).tree)
    else:
        with pytest.raises(InputError, match="no node|no rule"):
            swc.fix(file(content))
    assert any(f.fatal for f in swc.check(file(content)))


def test_other_formats_are_refused(file: Put, tmp_path: Path) -> None:
    for content, message in (
        (b"\x1f\x8b\x08\0abc", "gzip-compressed"),
        (b"<?xml version='1.0'?><tracings/>", "is XML"),
        (b"II*\0\0\0\0\0", "binary file"),
    ):
        with pytest.raises(InputError, match=message):
            swc.read(file(content))
    with pytest.raises(InputError, match="does not exist"):
        swc.read(tmp_path / "none.swc")
    with pytest.raises(InputError, match="is a folder"):
        swc.read(tmp_path)


def test_what_never_ends_is_refused(tmp_path: Path) -> None:
    fifo, device, sparse = (tmp_path / name for name in ("fifo.swc", "device.swc", "sparse.swc"))
    os.mkfifo(fifo)
    device.symlink_to("/dev/zero")
    with sparse.open("wb") as handle:
        handle.write(GOOD.encode())
        handle.truncate(1 << 40)
    for path, message in ((fifo, "no regular file"), (device, "no regular file"), (sparse, "has more than 1024 MiB")):
        for act in (swc.read, swc.check, swc.fix, swc.read_header):
            with pytest.raises(InputError, match=message):
                act(path)


def test_long_error_is_shortened(file: Put) -> None:
    with pytest.raises(InputError, match=r"and \d+ more") as caught:
        swc.read(file("".join(f"{i} 3 nan 0 0 1 {i + 1000}\n" for i in range(1, 200))))
    assert len(str(caught.value)) < 2000


def test_bad_radii_are_replaced(file: Put) -> None:
    rows = "1 3 0 0 0 0 -1\n2 3 1 0 0 4 1\n3 3 2 0 0 nan 2\n4 3 3 0 0 -1 3\n5 3 1 1 0 2 1\n"
    assert swc.read(file(rows)).radii.tolist() == [3, 4, 4, 4, 2]
    assert [f.line for f in swc.check(file(rows)) if f.kind == "radius"] == [1, 3, 4]
    assert swc.read(file("1 3 0 0 0 0 -1\n2 3 1 0 0 0 1\n")).radii.tolist() == [1, 1]


def test_hundred_thousand_nodes(tmp_path: Path) -> None:
    tree = random_tree(0, 100_000)
    swc.write(tmp_path / "a.swc", tree)
    assert trees_equal(swc.read(tmp_path / "a.swc"), tree)
    # and a chain written tip first, the worst case for sorting
    n = 100_000
    rows = "".join(f"{i} 3 {i} 0 0 1 {i - 1 if i > 1 else -1}\n" for i in range(n, 0, -1))
    (tmp_path / "b.swc").write_text(rows)
    assert morphology.length(swc.read(tmp_path / "b.swc")) == n - 1


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(st.data())
def test_damaged_text_is_read_or_refused(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """Lines of a good file, damaged at random: no other error than InputError, from read, check and fix."""
    rows = GOOD.strip().split("\n") * 2
    token = st.sampled_from(
        ["nan", "inf", "-1", "0", "2", "1e400", "9" * 25, "1.5", "x", "", "1,5", "#", "-0", "\t", "\0"]
    )
    for _ in range(data.draw(st.integers(1, 8))):
        line = data.draw(st.integers(0, len(rows) - 1))
        parts = rows[line].split(" ")
        place = data.draw(st.integers(0, len(parts) - 1))
        parts[place] = data.draw(st.one_of(token, st.text(max_size=4)))
        rows[line] = " ".join(parts)
    path = tmp_path_factory.mktemp("fuzz") / "a.swc"
    path.write_bytes("\n".join(rows).encode("utf-8", "surrogatepass"))
    for act in (swc.read, swc.check, swc.fix):
        try:
            act(path)
        except InputError as error:
            assert str(path) in str(error)  # noqa: PT017
