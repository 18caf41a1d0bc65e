"""Names of volumes from their files, and names that files of others give."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from hpc_neuro.core import files
from hpc_neuro.core.image_names import ENDINGS, find_clash, is_system_file, strip_ending
from hpc_neuro.core.schema import InputError
from hpc_neuro.data.formats import READERS
from hpc_neuro.infer.config import InferConfig, VolumeConfig


@pytest.mark.parametrize(
    ("name", "stem"),
    [
        ("neuron.tif", "neuron"),
        ("neuron.ome.tif", "neuron"),
        ("neuron.OME.TIFF", "neuron"),
        ("neuron.ome.zarr", "neuron"),
        ("neuron.nii.gz", "neuron"),
        ("brain.1.tif", "brain.1"),
        ("brain.2.ome.tif", "brain.2"),
        ("brain.1", "brain.1"),
        ("slices", "slices"),
        ("a.b.c.h5", "a.b.c"),
    ],
)
def test_strip_ending(name: str, stem: str) -> None:
    assert strip_ending(Path("folder") / name) == stem
    assert VolumeConfig(image=Path("folder") / name).name == stem


def test_every_reader_has_its_endings_here() -> None:
    assert {suffix for reader in READERS for suffix in reader.suffixes} <= set(ENDINGS)


def test_two_volumes_with_dots_do_not_collide() -> None:
    inputs = tuple(VolumeConfig(image=Path(f"brain.{number}.tif")) for number in (1, 2))
    cfg = InferConfig(model=Path("m"), out=Path("o"), inputs=inputs)
    assert [item.name for item in cfg.inputs] == ["brain.1", "brain.2"]


def test_files_of_macos_are_hidden() -> None:
    assert is_system_file(Path("data/._neuron.tif"))
    assert is_system_file(Path("data/.DS_Store"))
    assert not is_system_file(Path(".data/neuron.tif"))


COMPOSED, DECOMPOSED = "caf\u00e9", "cafe\u0301"


@pytest.mark.parametrize(
    ("names", "reason"),
    [
        (("neuron", "neuron_2", "other"), None),
        (("a", "a.voxels", "a.vox"), None),
        (("Neuron", "neuron"), "differ in capitals only, and would share files on a file system that ignores case"),
        (("x", "STRASSE", "straße"), "differ in capitals only"),
        ((COMPOSED, DECOMPOSED), "look the same"),
        ((COMPOSED, DECOMPOSED.upper()), "differ in capitals only"),
        (("a", "a.voxel"), "would share files"),
        (("a.DELETED", "A"), "would share files"),
    ],
)
def test_names_whose_results_are_the_same_files(names: tuple[str, ...], reason: str | None) -> None:
    for order in itertools.permutations(names):
        clash = find_clash(order)
        assert (clash is None) == (reason is None)
        if clash is not None and reason is not None:
            assert {*clash[:2]} == {*names[-2:]}
            assert clash[2].startswith(reason)


BAD_NAMES = ["../../victim", "/tmp/victim", "a/b", "", ".hidden", "a\nb", "a\0b", "x" * 240, "\udcff", ".."]


@pytest.mark.parametrize("name", BAD_NAMES)
def test_names_that_lead_elsewhere_are_refused(name: str, tmp_path: Path) -> None:
    assert not files.is_plain_name(name)
    with pytest.raises(InputError, match="cannot be the name of a file; make it again"):
        files.require_plain_names({name: 1}, tmp_path / "index.json", "make it again")


@pytest.mark.parametrize("name", ["../../victim", "/tmp/victim", "swc/../../victim", "", None, 3, ["a"], "a\0b"])
def test_files_outside_a_folder_are_refused(name: object, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is not inside"):
        files.resolve_inside(tmp_path, name, tmp_path / "index.json", "make it again")
    assert files.resolve_inside(tmp_path, "swc/a.swc", tmp_path / "i", "") == tmp_path / "swc" / "a.swc"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 200_000 + "]" * 200_000, "nested too deeply"),
        ('{"a": NaN}', "NaN is no JSON value"),
        ('{"a": ' + "9" * 5000 + "}", "not readable JSON"),
        ("{", "not readable JSON"),
    ],
)
def test_json_that_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "a.json"
    path.write_text(text)
    with pytest.raises(InputError, match=f"(?s){message}.*make it again"):
        files.read_json(path, "make it again")
