"""Formats that are one file: v3draw, v3dpbd, NRRD, NIfTI, Amira, each written by its own library or a plain encoder."""

from __future__ import annotations

import gzip
import struct
import zlib
from pathlib import Path

import nibabel
import nrrd
import numpy as np
import pytest

from hpc_neuro.core.geometry import Box
from hpc_neuro.core.schema import InputError
from hpc_neuro.data.formats import open_volume
from tests.helpers.volume_checks import SHAPE, UM, assert_reads, make_image


def write_v3draw(path: Path, data: np.ndarray, order: str = "L", short: bool = False) -> None:
    """`data` is c z y x."""
    sign = {"L": "<", "B": ">"}[order]
    head = b"raw_image_stack_by_hpeng" + order.encode() + struct.pack(sign + "h", data.dtype.itemsize)
    head += struct.pack(sign + ("4h" if short else "4i"), *data.shape[::-1])
    path.write_bytes(head + data.astype(data.dtype.newbyteorder(sign)).tobytes())


@pytest.mark.parametrize("order", ["L", "B"])
@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
@pytest.mark.parametrize("short", [False, True])
def test_v3draw(tmp_path: Path, order: str, dtype: str, short: bool) -> None:
    data = make_image(dtype, (2, *SHAPE))
    write_v3draw(tmp_path / "a.v3draw", data, order, short)
    assert_reads(tmp_path / "a.v3draw", data[1], channel=1)


def test_v3draw_with_a_wrong_byte_order_is_noted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    smooth = np.add.outer(np.arange(20), np.arange(30))[None, None].astype("<u2") * 16
    path = tmp_path / "a.v3draw"
    write_v3draw(path, smooth, "L")
    raw = path.read_bytes()
    head = b"raw_image_stack_by_hpengB" + struct.pack(">h4i", 2, 30, 20, 1, 1)
    path.write_bytes(head + raw[43:])
    assert "smoother as little-endian" in open_volume(path).describe()
    assert "smoother as little-endian" in caplog.text


def encode_pbd(data: np.ndarray, order: str = "L") -> bytes:
    """A plain encoder of the PBD code, to test the decoder: repeats, differences where they fit, literals elsewhere."""
    flat, out, i = data.ravel(), bytearray(), 0
    wide = data.dtype.itemsize == 2
    low, high, most_diff = (-3, 4, 48) if wide else (-1, 2, 95)
    repeat, most_repeat, literal = (222, 33, 32) if wide else (127, 128, 33)
    signed = flat.astype(np.int64)

    def word(value: np.integer) -> bytes:
        return int(value).to_bytes(data.dtype.itemsize, "little" if order == "L" else "big")

    while i < len(flat):
        run = 1
        while i + run < len(flat) and run < most_repeat and flat[i + run] == flat[i]:
            run += 1
        steps = 0
        while i > 0 and i + steps < len(flat) and steps < most_diff:
            if not low <= signed[i + steps] - signed[i + steps - 1] <= high:
                break
            steps += 1
        if run > 3:
            out += bytes([repeat + run]) + word(flat[i])
            i += run
        elif steps > 3:
            change = [int(signed[j] - signed[j - 1]) for j in range(i, i + steps)]
            bits = [d if d >= 0 else (4 - d if wide else 3) for d in change]
            out += bytes([(31 if wide else 32) + steps])
            if wide:
                text = "".join(f"{b:03b}" for b in bits)
                text += "0" * (-len(text) % 8)
                out += bytes(int(text[k : k + 8], 2) for k in range(0, len(text), 8))
            else:
                bits += [0] * (-len(bits) % 4)
                out += bytes(sum(b << 2 * n for n, b in enumerate(bits[k : k + 4])) for k in range(0, len(bits), 4))
            i += steps
        else:
            count = min(literal, max(1, steps), len(flat) - i)
            out += bytes([count - 1]) + b"".join(word(v) for v in flat[i : i + count])
            i += count
    head = b"v3d_volume_pkbitdf_encod" + order.encode()
    head += struct.pack(("<" if order == "L" else ">") + "h4i", data.dtype.itemsize, *data.shape[::-1])
    return head + bytes(out)


@pytest.mark.parametrize("order", ["L", "B"])
@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
def test_v3dpbd(tmp_path: Path, dtype: str, order: str) -> None:
    rng = np.random.default_rng(1)
    walk = np.cumsum(rng.integers(-4, 5, 2 * 6 * 40 * 50)) % 250
    walk[rng.random(len(walk)) < 0.02] = 7
    data = (walk * (200 if dtype == "uint16" else 1)).reshape(2, 6, 40, 50)
    data[:, 2] = np.sort(walk[:2000]).reshape(40, 50)  # slow slopes and long runs
    data = data.astype(dtype)
    (tmp_path / "a.v3dpbd").write_bytes(encode_pbd(data, order))
    assert_reads(tmp_path / "a.v3dpbd", data[1], channel=1)


NRRDS: dict[str, dict[str, object]] = {
    "raw": {"encoding": "raw"},
    "gzip": {"encoding": "gzip"},
    "bzip2": {"encoding": "bzip2"},
    "ascii": {"encoding": "ASCII"},
    "big_endian": {"encoding": "raw", "endian": "big"},
}


@pytest.mark.parametrize("kind", NRRDS)
@pytest.mark.parametrize("detached", [False, True])
def test_nrrd(tmp_path: Path, kind: str, detached: bool) -> None:
    header = {
        **NRRDS[kind],
        "space dimension": 3,
        "space directions": np.diag(UM[::-1]),
        "space units": ["microns"] * 3,
    }
    data = make_image()
    path = tmp_path / ("a.nhdr" if detached else "a.nrrd")
    written = data.astype(">u2") if "endian" in NRRDS[kind] else data
    nrrd.write(str(path), written.T, header, detached_header=detached, index_order="F")
    assert_reads(path, data, UM)


def test_nrrd_affine_and_time(tmp_path: Path) -> None:
    header = {
        "space dimension": 3,
        "space directions": [[0.25, 0.1, 0], [0, 0.33, 0], [0, 0, 1]],
        "space origin": [10, 20, 30],
        "space units": ["um"] * 3,
    }
    nrrd.write(str(tmp_path / "a.nrrd"), make_image().T, header, index_order="F")
    volume = open_volume(tmp_path / "a.nrrd")
    np.testing.assert_allclose(volume.affine @ [2, 3, 4, 1], [32, 20 + 3 * 0.33 + 4 * 0.1, 10 + 4 * 0.25, 1])
    nrrd.write(str(tmp_path / "t.nrrd"), make_image("uint8", (4, *SHAPE)).T, {"kinds": ["domain"] * 3 + ["time"]})
    with pytest.raises(InputError, match="4 time points"):
        open_volume(tmp_path / "t.nrrd")


def test_nrrd_in_several_data_files(tmp_path: Path) -> None:
    data = make_image("uint8")
    text = "NRRD0004\ntype: uint8\ndimension: 3\nsizes: 9 7 5\nencoding: raw\n"
    for i, plane in enumerate(data):
        (tmp_path / f"s{i:02d}.raw").write_bytes(b"12" + plane.tobytes())
    listed = "byte skip: 2\ndata file: LIST\n" + "".join(f"s{i:02d}.raw\n" for i in range(5))
    (tmp_path / "list.nhdr").write_text(text + listed)
    assert_reads(tmp_path / "list.nhdr", data)
    for skip in (2, -1):
        (tmp_path / "series.nhdr").write_text(text + f"byte skip: {skip}\ndata file: s%02d.raw 0 4 1\n")
        assert_reads(tmp_path / "series.nhdr", data)
    (tmp_path / "s01.raw").write_bytes(b"12" + data[1].tobytes()[:-9])
    (tmp_path / "s02.raw").write_bytes(b"12" + data[2].tobytes() + bytes(9))  # the sum is right again
    with pytest.raises(InputError, match=r"s01.raw holds 54 bytes of voxels, where .* wants 63 from each of its 5"):
        open_volume(tmp_path / "list.nhdr")[Box.whole(SHAPE)]


def test_nrrd_without_byte_order_is_refused(tmp_path: Path) -> None:
    head = b"NRRD0004\ntype: ushort\ndimension: 3\nsizes: 9 7 5\nencoding: raw\n"
    (tmp_path / "a.nrrd").write_bytes(head + b"\n" + make_image().tobytes())
    with pytest.raises(InputError, match="does not say its byte order; add `endian: little`"):
        open_volume(tmp_path / "a.nrrd")


def test_permuted_world_axes_are_noted(tmp_path: Path) -> None:
    header = {"space dimension": 3, "space units": ["um"] * 3, "space directions": np.diag(UM[::-1])[[2, 0, 1]]}
    nrrd.write(str(tmp_path / "a.nrrd"), make_image().T, header, index_order="F")
    volume = open_volume(tmp_path / "a.nrrd")
    assert "z y x as read run along y x z; axes=YXZ turns them so" in volume.describe()
    turned = open_volume(tmp_path / "a.nrrd", axes="YXZ")
    np.testing.assert_allclose(turned.affine[:3, :3], np.diag(UM))
    assert "turns them" not in turned.describe()


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz", "a.img", "a2.nii"])
def test_nifti(tmp_path: Path, name: str) -> None:
    kind = {"a.img": nibabel.Nifti1Pair, "a2.nii": nibabel.Nifti2Image}.get(name, nibabel.Nifti1Image)
    affine = np.diag([*UM[::-1], 1.0])
    affine[:3, 3] = 1, 2, 3
    nifti = kind(make_image().T, affine)
    nifti.header.set_xyzt_units("micron")
    nibabel.save(nifti, tmp_path / name)
    assert_reads(tmp_path / name, make_image(), UM)
    np.testing.assert_allclose(open_volume(tmp_path / name).affine[:3, 3], [3, 2, 1], rtol=1e-6)
    if name == "a.img":
        assert_reads(tmp_path / "a.hdr", make_image(), UM)


def test_nifti_in_millimetres_scaled_or_without_unit(tmp_path: Path) -> None:
    nifti = nibabel.Nifti1Image(make_image("int16").T, np.diag([0.25e-3, 0.33e-3, 1e-3, 1]))
    nifti.header.set_xyzt_units("mm")
    nifti.header.set_slope_inter(2.0, 5.0)
    nibabel.save(nifti, tmp_path / "a.nii")
    assert_reads(tmp_path / "a.nii", (make_image("int16") * 2.0 + 5.0).astype("float32"), UM)
    nifti.header.set_xyzt_units(0)
    nibabel.save(nifti, tmp_path / "b.nii")
    assert open_volume(tmp_path / "b.nii").voxel_size is None
    assert "without a unit" in open_volume(tmp_path / "b.nii").describe()


def test_nifti_with_two_voxel_sizes_has_none(tmp_path: Path) -> None:
    nifti = nibabel.Nifti1Image(make_image().T, np.diag([*UM[::-1], 1.0]))
    nifti.header.set_xyzt_units("micron")
    nibabel.save(nifti, tmp_path / "a.nii")
    raw = bytearray((tmp_path / "a.nii").read_bytes())
    raw[80:92] = struct.pack("<3f", 1, 1, 1)  # pixdim of x y z
    (tmp_path / "a.nii").write_bytes(raw)
    volume = open_volume(tmp_path / "a.nii")
    assert volume.voxel_size is None
    assert "disagree about the voxel size (1 x 1 x 1 and 1 x 0.33 x 0.25 um z y x)" in volume.describe()
    nibabel.save(nibabel.AnalyzeImage(make_image("int16").T, np.eye(4)), tmp_path / "b.img")
    with pytest.raises(InputError, match="ANALYZE 7.5"):
        open_volume(tmp_path / "b.img")


def write_amira(path: Path, data: np.ndarray, body: bytes, field: str, unit: str = '"um"') -> None:
    z, y, x = data.shape
    box = f"0 {0.25 * (x - 1)} 0 {0.33 * (y - 1)} 0 {1.0 * (z - 1)}"
    head = f"# AmiraMesh BINARY-LITTLE-ENDIAN 2.1\n\ndefine Lattice {x} {y} {z}\n\nParameters {{\n"
    head += f'  Units {{ Coordinates {unit} }}\n  BoundingBox {box},\n  CoordType "uniform"\n}}\n\n'
    path.write_bytes(f"{head}Lattice {{ {field}\n\n# Data section follows\n@1\n".encode() + body + b"\n")


def test_amira(tmp_path: Path) -> None:
    data = make_image("uint8")
    write_amira(tmp_path / "raw.am", data, data.tobytes(), "byte Data } @1")
    assert_reads(tmp_path / "raw.am", data, UM)
    packed = zlib.compress(data.tobytes())
    write_amira(tmp_path / "zip.am", data, packed, f"byte Data }} @1(HxZip,{len(packed)})")
    assert_reads(tmp_path / "zip.am", data, UM)
    flat = data.tobytes()
    runs = b"".join(bytes([128 + len(p)]) + p for p in (flat[i : i + 100] for i in range(0, len(flat), 100)))
    write_amira(tmp_path / "rle.am", data, runs, f"byte Labels }} @1(HxByteRLE,{len(runs)})")
    assert_reads(tmp_path / "rle.am", data, UM)
    wide = make_image("uint16")
    write_amira(tmp_path / "wide.am", wide, wide.tobytes(), "ushort Data } @1")
    assert_reads(tmp_path / "wide.am", wide, UM)


def test_gzip_of_another_format_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.nii.gz").write_bytes(gzip.compress(b"hello"))
    with pytest.raises(InputError, match="cannot be read as NIfTI"):
        open_volume(tmp_path / "a.nii.gz")
