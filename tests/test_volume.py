from __future__ import annotations

import errno
import gzip
import itertools
import json
import os
import tempfile
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nibabel import orientations
from nibabel.testing import data_path

from meddiff.volume import IntensityScale, Source, Volume, VolumeError, require_same_grid, stream_volume

SHAPE = (2, 3, 4)
AFFINE = nib.affines.from_matvec(np.diag([1.5, 2.0, 2.5]), [-30.25, 12.5, 7.0])
TILT = nib.affines.from_matvec(nib.eulerangles.euler2mat(0.3, -0.2, 0.1), [0, 0, 0])
TURNS = [
    list(zip(axes, flips, strict=True))
    for axes in itertools.permutations(range(3))
    for flips in itertools.product((1, -1), repeat=3)
]
INTEGERS = ["u1", "i1", "<i2", ">i2", "<u2", ">u2", "<i4", "<u4", "<i8", "<u8"]
FLOATS = ["<f4", ">f4", "<f8"]


def write(path, data, affine=AFFINE, version=1, scaling=(1, 0), tail=b"", **fields):
    """A NIfTI file of exactly these stored values and header fields, past nibabel's own checks."""
    data = np.asarray(data)
    kind = nib.Nifti2Header if version == 2 else nib.Nifti1Header
    header = kind(endianness=">" if data.dtype.byteorder == ">" else "<")
    header.set_data_dtype(data.dtype)
    header.set_data_shape(data.shape)
    header["scl_slope"], header["scl_inter"] = scaling
    if affine is not None:
        header.set_sform(affine, 1)
        header.set_qform(affine, 1)
    header["vox_offset"] = header.single_vox_offset
    for name, value in fields.items():
        header[name] = value
    content = header.binaryblock + bytes(4) + data.tobytes(order="F") + tail
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def ramp(shape=SHAPE, dtype="<i2"):
    return np.arange(np.prod(shape)).reshape(shape).astype(dtype)


def stored(path):
    return nib.load(path).dataobj.get_unscaled()


def assert_same_file(before, after):
    a, b = nib.load(before), nib.load(after)
    assert type(a) is type(b) and a.shape == b.shape and a.get_data_dtype() == b.get_data_dtype()
    np.testing.assert_array_equal(a.affine, b.affine)
    exact = a.get_data_dtype().kind in "iu" or (a.dataobj.slope, a.dataobj.inter) == (1, 0)
    np.testing.assert_allclose(stored(after), stored(before), rtol=0, atol=0 if exact else 0.01)
    assert (a.dataobj.slope, a.dataobj.inter) == (b.dataobj.slope, b.dataobj.inter)
    assert b.header["sform_code"] > 0 and b.header["qform_code"] > 0


def roundtrip(path, **options):
    volume = Volume.load(path, window=(0, 100), **options)
    target = path.with_name("again" + "".join(path.suffixes[-2:]))
    volume.save(target)
    assert_same_file(path, target)
    return volume


@pytest.mark.parametrize("turn", TURNS, ids=lambda t: "".join(orientations.ornt2axcodes(t)))
def test_every_orientation_is_brought_to_ras_and_restored(turn, tmp_path):
    data = ramp()
    affine = (TILT @ AFFINE @ orientations.inv_ornt_aff(turn, data.shape)).astype(np.float32).astype(float)
    path = write(tmp_path / "a.nii", data, affine)
    volume = roundtrip(path)
    assert nib.aff2axcodes(volume.affine) == ("R", "A", "S")
    assert volume.source.orientation == nib.aff2axcodes(affine)
    to_ras = np.linalg.inv(volume.affine) @ affine
    for index in np.ndindex(*SHAPE):
        there = nib.affines.apply_affine(to_ras, index)
        np.testing.assert_allclose(there, there.round(), atol=1e-5)
        assert volume.data[tuple(there.round().astype(int))] == data[index]

    turned = volume.with_tensor(-volume.to_tensor())
    turned.save(tmp_path / "b.nii")
    np.testing.assert_array_equal(stored(tmp_path / "b.nii"), 100 - data)
    np.testing.assert_array_equal(nib.load(tmp_path / "b.nii").affine, affine)


@pytest.mark.parametrize("dtype", INTEGERS + FLOATS)
@pytest.mark.parametrize("scaling", [(1, 0), (0, 0), (np.nan, 0), (0.013, -7.3), (-2.5, 1000)])
@pytest.mark.parametrize(("version", "suffix"), [(1, ".nii"), (2, ".nii.gz")])
def test_stored_values_survive(dtype, scaling, version, suffix, tmp_path):
    dtype = np.dtype(dtype)
    limits = np.finfo(dtype) if dtype.kind == "f" else np.iinfo(dtype)
    low, high = max(limits.min, -(2**15)), min(limits.max, 2**16 - 1)
    data = np.linspace(low, high, 24).reshape(SHAPE).astype(np.float32).astype(dtype)
    path = write(tmp_path / f"a{suffix}", data, version=version, scaling=scaling)
    volume = roundtrip(path)
    slope, inter = scaling if np.isfinite(scaling[0]) and scaling[0] else (1, 0)
    np.testing.assert_allclose(volume.data, data * np.float64(slope) + inter, rtol=2e-7, atol=1e-4)
    assert volume.source.nifti_version == version


def test_all_int16_survive_and_wider_ones_warn(tmp_path):
    data = np.arange(-(2**15), 2**15).astype(np.int16).reshape(64, 32, 32)
    roundtrip(write(tmp_path / "a.nii", data, scaling=(0.1, 3276.7)))
    path = write(tmp_path / "a.nii", np.full(SHAPE, 2**24 + 1, "<i4"))
    with pytest.warns(UserWarning, match="float32 cannot tell all stored int32"):
        Volume.load(path, window=(0, 1))


def test_integers_are_rounded_and_clipped(tmp_path):
    values = np.float32([[[-1e9, -32768.4, -1.6, -0.4, 0.6, 32767.4, 1e9]]])
    Volume(values, AFFINE, IntensityScale.ct()).save(tmp_path / "a.nii")
    np.testing.assert_array_equal(stored(tmp_path / "a.nii")[0, 0], [-32768, -32768, -2, 0, 1, 32767, 32767])
    loaded = Volume.load(write(tmp_path / "b.nii", np.zeros((1, 1, 7), "<u8"), scaling=(2, 10)), window=(0, 1))
    Volume(values * 1e12, AFFINE, loaded.intensity, loaded.source).save(tmp_path / "c.nii")
    kept = stored(tmp_path / "c.nii")[0, 0]
    assert kept.dtype == np.uint64 and kept[0] == 0 and kept[-1] > 2**64 - 2**12


def test_trailing_axis_of_one_frame_is_restored(tmp_path):
    for shape in ((*SHAPE, 1), (*SHAPE, 1, 1)):
        path = write(tmp_path / "a.nii.gz", ramp(shape), TILT @ AFFINE, pixdim=[1, 1, 1, 1, 2.5, 1, 1, 1])
        assert roundtrip(path, modality="MR").shape == SHAPE


def test_forms_and_codes_are_kept(tmp_path):
    rows = dict(zip(("srow_x", "srow_y", "srow_z"), TILT @ AFFINE, strict=False))
    path = write(tmp_path / "a.nii", ramp(), sform_code=4, **rows)
    roundtrip(path)
    before, after = nib.load(path).header, nib.load(tmp_path / "again.nii").header
    assert (after["sform_code"], after["qform_code"]) == (4, 1)
    for name in ("quatern_b", "quatern_c", "quatern_d", "qoffset_x", "pixdim", "srow_x", "srow_y", "srow_z"):
        np.testing.assert_array_equal(before[name], after[name])


def test_a_missing_form_is_filled_in(tmp_path):
    shear = np.array(TILT @ AFFINE)
    shear[0, 1] += 0.5
    volume = Volume.load(write(tmp_path / "s.nii", ramp(), shear, qform_code=0, sform_code=3), window=(0, 1))
    volume.save(tmp_path / "s2.nii")
    header = nib.load(tmp_path / "s2.nii").header
    assert (header["sform_code"], header["qform_code"]) == (3, 3)
    np.testing.assert_array_equal(header.get_sform(), shear.astype(np.float32))

    affine = TILT @ AFFINE
    volume = Volume.load(write(tmp_path / "q.nii", ramp(), affine, sform_code=0, srow_x=0), window=(0, 1))
    np.testing.assert_allclose(volume.affine, affine, rtol=1e-5, atol=1e-6)
    volume.save(tmp_path / "q2.nii")
    np.testing.assert_allclose(nib.load(tmp_path / "q2.nii").get_sform(coded=True)[0], affine, rtol=1e-5, atol=1e-6)


def test_an_invalid_sform_falls_back_to_the_qform_with_a_warning(tmp_path):
    path = write(tmp_path / "a.nii", ramp(), srow_x=[0, 0, 0, 0])
    with pytest.warns(UserWarning, match="sform is invalid"):
        volume = Volume.load(path, window=(0, 1))
    np.testing.assert_allclose(volume.affine, AFFINE, atol=1e-5)


def test_geometry_without_codes_comes_from_the_spacing(tmp_path):
    path = write(tmp_path / "a.nii", ramp(), sform_code=0, qform_code=0)
    volume = roundtrip(path)
    assert volume.spacing == pytest.approx((1.5, 2.0, 2.5)) and volume.source.orientation == ("L", "A", "S")


@pytest.mark.parametrize(("code", "factor"), [(1, 1000), (3, 0.001), (2, 1), (0, 1)])
def test_lengths_become_millimetres(code, factor, tmp_path):
    volume = Volume.load(write(tmp_path / "a.nii", ramp(), xyzt_units=code | 8), window=(0, 1))
    expected = np.diag([factor, factor, factor, 1]) @ AFFINE
    np.testing.assert_allclose(volume.affine, expected, rtol=1e-6)
    volume.save(tmp_path / "b.nii")
    after = nib.load(tmp_path / "b.nii")
    np.testing.assert_allclose(after.affine, expected, rtol=1e-6)
    np.testing.assert_allclose(after.get_qform(), expected, rtol=1e-5)
    assert after.header.get_xyzt_units() == ("mm", "sec")


@pytest.mark.parametrize(("scale", "dtype"), [(IntensityScale.ct(), "int16"), (IntensityScale(0, 1), "float32")])
def test_generated_volume(scale, dtype, tmp_path):
    tensor = torch.rand(1, 1, 4, 2, 3) * 2 - 1
    volume = Volume.from_tensor(tensor, intensity=scale, affine=TILT @ AFFINE, record={"seed": 7})
    volume.save(tmp_path / "a.b.nii.gz")
    image = nib.load(tmp_path / "a.b.nii.gz")
    assert image.get_data_dtype() == dtype and image.shape == SHAPE and image.header.get_xyzt_units()[0] == "mm"
    assert image.header["sform_code"] == image.header["qform_code"] == 1
    np.testing.assert_allclose(image.affine, TILT @ AFFINE, rtol=1e-6)
    np.testing.assert_allclose(image.get_qform(), TILT @ AFFINE, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(image.get_fdata(), volume.data, atol=0.5 if dtype == "int16" else 1e-7)
    assert json.loads((tmp_path / "a.b.json").read_text()) == {"seed": 7}
    assert (tmp_path / "a.b.nii.gz").read_bytes()[3:8] == bytes(5)  # neither name nor time: the same bytes every time


def test_oblique_tie_between_orientations(tmp_path):
    turn = nib.eulerangles.euler2mat(*np.arctan([0.5**0.5, -1, np.inf]) + [0, np.pi, 0])
    tie = -(turn @ [[1, 0.5, 0], [0, 1, 0], [0, 0, 1]])[:, [1, 2, 0]]
    volume = roundtrip(write(tmp_path / "a.nii", ramp(), nib.affines.from_matvec(tie)))
    assert nib.aff2axcodes(volume.affine) != ("R", "A", "S")  # the other choice, once turned: what this test is about
    volume.with_tensor(volume.to_tensor()).save(tmp_path / "b.nii")
    assert_same_file(tmp_path / "a.nii", tmp_path / "b.nii")


def test_a_new_affine_or_shape_under_an_old_source(tmp_path):
    source = Volume.load(write(tmp_path / "a.nii", ramp(), np.diag([-1, -2, 3, 1])), window=(0, 1)).source
    data = ramp((5, 6, 7)).astype(np.float32)
    Volume(data, AFFINE, IntensityScale(0, 1), source).save(tmp_path / "b.nii")
    image = nib.load(tmp_path / "b.nii")
    assert nib.aff2axcodes(image.affine) == ("L", "P", "S") and image.get_data_dtype() == "int16"
    canonical = nib.as_closest_canonical(image)
    np.testing.assert_array_equal(canonical.get_fdata(), data)
    np.testing.assert_allclose(canonical.affine, AFFINE)


def test_modality_and_window(tmp_path):
    ct = np.linspace(-1024, 3000, 24).reshape(SHAPE).astype("<i2")
    path = write(tmp_path / "ct.nii", ct)
    assert Volume.load(path).intensity == IntensityScale(-1000, 1000, "CT")
    assert Volume.load(path, window=(-100, 300)).intensity == IntensityScale(-100, 300, "CT")
    assert Volume.load(path, modality="MR").intensity.modality == "MR"
    mr = np.arange(1001, dtype="<i2").reshape(1001, 1, 1)
    mr[0] = -600  # an undershoot: under 1 % of the voxels
    assert Volume.load(write(tmp_path / "mr.nii", mr)).intensity == IntensityScale(5, 995, "MR")
    with pytest.raises(VolumeError, match=r"mr.nii.*modality.*PET"):
        Volume.load(tmp_path / "mr.nii", modality="PET")
    constant = write(tmp_path / "constant.nii", np.full(SHAPE, 7, "<i2"))
    with pytest.raises(VolumeError, match=r"constant.nii.*constant volume.*window="):
        Volume.load(constant)
    assert Volume.load(constant, window=(0, 10)).to_tensor().unique().item() == pytest.approx(0.4)


HOLED = np.float32(ramp())
HOLED[0, 0, :3] = [np.nan, np.inf, -np.inf]
BAD_FILES = {
    "image.nii": ({"data": ramp((4, 6))}, "2-D image"),
    "line.nii": ({"data": ramp((24,))}, "1-D image"),
    "frames.nii": ({"data": ramp((2, 3, 4, 5))}, r"5 frames.*extract one.*slicer"),
    "vectors.nii": ({"data": ramp((2, 3, 4, 1, 3))}, "3 frames"),
    "rgb.nii": ({"data": np.zeros(SHAPE, [("R", "u1"), ("G", "u1"), ("B", "u1")])}, "RGB"),
    "complex.nii": ({"data": np.zeros(SHAPE, "<c8")}, "complex64"),
    "code.nii": ({"data": ramp(), "datatype": 9}, "type 9;"),
    "binary.nii": ({"data": ramp(), "datatype": 1}, "binary"),
    "holes.nii": ({"data": HOLED}, "3 of 24 voxels are NaN"),
    "huge_values.nii": ({"data": np.full(SHAPE, 1e300)}, "24 of 24 voxels"),
    "scaled_to_inf.nii": ({"data": ramp() + 1, "scaling": (1e38, 3e38)}, "voxels are NaN, infinite"),
    "inter.nii": ({"data": ramp(), "scaling": (1, np.nan)}, "damaged header.*intercept"),
    "zero_axis.nii": ({"data": ramp(), "dim": [3, 2, 0, 4, 1, 1, 1, 1]}, "3 axes of .2, 0, 4. voxels"),
    "negative.nii": ({"data": ramp(), "dim": [3, 2, -3, 4, 1, 1, 1, 1]}, "3 axes of .2, -3, 4. voxels"),
    "surface.nii": ({"data": ramp(), "dim": [3, -1, 1, 1, 1, 1, 1, 1]}, "-1, 1, 1"),
    "no_axes.nii": ({"data": ramp(), "dim": [0] * 8}, "0 axes"),
    "many_axes.nii": ({"data": ramp(), "dim": [9] + [1] * 7}, "9 axes"),
    "overflow.nii": ({"data": ramp(), "version": 2, "dim": [3, 2**40, 2**40, 2**40, 1, 1, 1, 1]}, "over the budget"),
    "budget.nii.gz": ({"data": ramp(), "dim": [3, 4000, 4000, 4000, 1, 1, 1, 1]}, "over the budget.*max_bytes"),
    "announced.nii": ({"data": ramp(), "dim": [3, 1000, 1000, 1000, 1, 1, 1, 1]}, "truncated: 400 bytes"),
    "announced.nii.gz": ({"data": ramp(), "dim": [3, 1000, 1000, 1000, 1, 1, 1, 1]}, "truncated: .* bytes cannot hold"),
    "short.nii.gz": ({"data": ramp(), "dim": [3, 2, 3, 5, 1, 1, 1, 1]}, "truncated: the voxels end after 48 bytes"),
    "early.nii": ({"data": ramp(), "vox_offset": 0}, "cannot begin at byte 0"),
    "late.nii": ({"data": ramp(), "vox_offset": 1e30}, r"cannot begin at byte 1e\+30"),
    "nowhere.nii": ({"data": ramp(), "vox_offset": np.nan}, "cannot begin at byte nan"),
    "flat.nii": ({"data": ramp(), "affine": None, "pixdim": 0}, "unset, singular or not finite"),
    "nan_spacing.nii": ({"data": ramp(), "affine": None, "pixdim": [1, 1, np.nan] + [1] * 5}, "nan"),
    "negative_spacing.nii": ({"data": ramp(), "sform_code": 0, "pixdim": [1, -1, 1, 1] + [1] * 4}, "singular or not"),
    "rotation.nii": ({"data": ramp(), "sform_code": 0, "quatern_b": 9}, "singular or not finite"),
    "singular.nii": ({"data": ramp(), "qform_code": 0, "srow_x": 0}, "set an affine with nibabel"),
    "infinite.nii": ({"data": ramp(), "qform_code": 0, "srow_x": [np.inf, 0, 0, 0]}, "singular or not finite"),
    "half.nii": ({"data": ramp(), "magic": b"ni1"}, "not a NIfTI.*hdr/.img pair"),
    "analyze.nii": ({"data": ramp(), "magic": b""}, "not a NIfTI"),
    "tail.nii": ({"data": ramp(), "tail": b"x"}, "more than the 400 bytes"),
    "tail.nii.gz": ({"data": ramp(), "tail": b"x"}, "more than the 400 bytes"),
}


@pytest.mark.parametrize("name", BAD_FILES)
@pytest.mark.filterwarnings("ignore:invalid value")
def test_refuses_bad_headers(name, tmp_path):
    options, words = BAD_FILES[name]
    path = write(tmp_path / name, **options)
    with pytest.raises(VolumeError, match=words) as caught:
        Volume.load(path)
    assert str(caught.value).startswith(f"Volume.load: {path}: ")


@pytest.mark.parametrize("damage", ["truncated", "endless", "checksum", "garbage", "deflate"])
def test_refuses_damaged_gzip(damage, tmp_path):
    path = write(tmp_path / "a.nii.gz", np.frombuffer(np.random.default_rng(0).bytes(4096), "u1").reshape(16, 16, 16))
    whole = path.read_bytes()
    damaged = {
        "truncated": whole[: len(whole) // 2],
        "endless": whole[:-8],
        "checksum": whole[:-8] + bytes(8),
        "garbage": whole + b"garbage",
        "deflate": whole[:12] + bytes([whole[12] ^ 0xFF]) + whole[13:],
    }
    path.write_bytes(damaged[damage])
    with pytest.raises(VolumeError, match=rf"{path}: the gzip stream is (truncated|corrupt)"):
        Volume.load(path)


def test_stops_reading_a_gzip_bomb_where_the_header_says(tmp_path):
    path = write(tmp_path / "bomb.nii.gz", ramp(), tail=np.random.default_rng(0).bytes(2**20))
    path.write_bytes(path.read_bytes()[: 2**19])  # reading on to the end would find the stream truncated
    with pytest.raises(VolumeError, match="more than the 400 bytes"):
        Volume.load(path)


def test_budget_counts_float32_voxels(tmp_path):
    path = write(tmp_path / "a.nii", ramp(dtype="u1"))
    assert Volume.load(path, max_bytes=400).shape == SHAPE
    with pytest.raises(VolumeError, match="96 bytes as float32, over the budget of 95"):
        Volume.load(path, max_bytes=95)


def test_refuses_what_is_no_file_of_nifti(tmp_path):
    (tmp_path / "empty.nii").touch()
    (tmp_path / "folder.nii").mkdir()
    (tmp_path / "text.nii").write_text("not an image" * 100)
    (tmp_path / "header.nii").write_bytes(write(tmp_path / "a.nii", ramp()).read_bytes()[:200])
    (tmp_path / "zipped.nii.gz").write_bytes(gzip.compress(b""))
    reasons = {
        "missing.nii": "no such file",
        "empty.nii": "is empty",
        "folder.nii": "is a directory",
        "text.nii": "not a NIfTI",
        "header.nii": "truncated: 200 bytes",
        "zipped.nii.gz": "not a NIfTI",
    }
    for name, reason in reasons.items():
        with pytest.raises(VolumeError, match=f"Volume.load: {tmp_path / name}: .*{reason}"):
            Volume.load(tmp_path / name)


@pytest.mark.parametrize("name", ["a.img", "a.gz", "a", "a.nii.bz2"])
def test_save_refuses_other_suffixes(name, tmp_path):
    with pytest.raises(VolumeError, match=r"must end in \.nii or \.nii\.gz"):
        Volume(ramp(), AFFINE, IntensityScale.ct()).save(tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_a_full_disk_costs_nothing(tmp_path, monkeypatch):
    path = tmp_path / "a.nii.gz"
    volume = Volume(ramp(), AFFINE, IntensityScale.ct(), Source.generated("CT"))
    volume.save(path)
    before = path.read_bytes()

    def full(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    for owner, name in ((os, "fsync"), (os, "replace"), (gzip.GzipFile, "write")):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, full)
            with pytest.raises(OSError, match=rf"{path} was not written .No space left.*nothing was lost") as caught:
                volume.save(path)
        assert caught.value.errno == errno.ENOSPC
        assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("name", ["anatomical.nii", "standard.nii.gz", "reoriented_anat_moved.nii"])
def test_real_files(name, tmp_path):
    path = tmp_path / name
    path.write_bytes((Path(data_path) / name).read_bytes())
    assert roundtrip(path, modality="MR").to_tensor().isfinite().all()
    assert Volume.load(path).intensity.modality == "MR"


def test_mni152(tmp_path):
    datasets = pytest.importorskip("nilearn.datasets")
    path = tmp_path / "mni.nii.gz"
    datasets.load_mni152_template(resolution=4).to_filename(path)
    assert roundtrip(path).spacing == pytest.approx((4, 4, 4))


@settings(max_examples=40, deadline=None)
@given(
    turn=st.sampled_from(TURNS),
    dtype=st.sampled_from([*INTEGERS, *FLOATS]),
    shape=st.tuples(*[st.integers(1, 4)] * 3),
    angles=st.tuples(*[st.floats(-0.4, 0.4)] * 3),
    suffix=st.sampled_from([".nii", ".nii.gz"]),
    version=st.sampled_from([1, 2]),
)
def test_round_trip_property(turn, dtype, shape, angles, suffix, version):
    tilt = nib.affines.from_matvec(nib.eulerangles.euler2mat(*angles), [0, 0, 0])
    affine = tilt @ AFFINE @ orientations.inv_ornt_aff(turn, shape)
    with tempfile.TemporaryDirectory() as folder:
        path = write(Path(folder) / f"a{suffix}", ramp(shape, dtype), affine, version)
        volume = roundtrip(path)
        volume.with_tensor(volume.to_tensor()).save(path)
        np.testing.assert_allclose(stored(path), ramp(shape, dtype), atol=0 if np.dtype(dtype).kind in "iu" else 1e-4)


def test_grids_that_are_not_one_are_told_apart_by_what_differs():
    affine = np.diag([1.0, 2.0, 3.0, 1.0])
    grid = ((10, 20, 30), affine)

    def against(shape=(10, 20, 30), **changes):
        other = affine.copy()
        for place, value in changes.items():
            other[int(place[1]), int(place[2])] = value
        require_same_grid("mask.nii", grid, "its image", (shape, other))

    against()
    against(_03=0.04)
    against(_00=1.004)
    for change, message in [
        ({"shape": (10, 20, 31)}, r"its shape is \(10, 20, 30\), and that of its image \(10, 20, 31\)"),
        ({"_11": 2.1}, r"its spacing is \(1.0, 2.0, 3.0\), and that of its image \(1.0, 2.1, 3.0\) mm"),
        ({"_23": 1.5}, "its affine puts voxels up to 1.5 mm from those of its image"),
        ({"_01": 0.01}, "its affine puts voxels up to 0.19 mm from those of its image"),
    ]:
        with pytest.raises(VolumeError, match=f"mask.nii: is not aligned with its image: {message}; resample it"):
            against(**change)


def test_masks_are_whole_numbers(tmp_path):
    labels = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)
    Volume.of_labels(labels, np.diag([1.0, 1, 2, 1])).save(tmp_path / "mask.nii.gz")
    again = Volume.load_labels(tmp_path / "mask.nii.gz")
    assert np.array_equal(again.data, labels) and again.source.header.get_data_dtype() == np.uint8
    nib.save(nib.Nifti1Image(np.zeros((2, 3, 4), np.int16), np.eye(4)), tmp_path / "empty.nii")
    assert Volume.load_labels(tmp_path / "empty.nii").data.max() == 0
    for bad in (labels + np.float32(0.5), -labels.astype(np.float32), 100 * labels.astype(np.float32)):
        nib.save(nib.Nifti1Image(bad, np.eye(4)), tmp_path / "bad.nii")
        with pytest.raises(VolumeError, match="bad.nii: a mask holds whole numbers"):
            Volume.load_labels(tmp_path / "bad.nii")


def _slabs(tensor, planes):
    return [(tensor[:, :, i : i + planes], 0, i) for i in range(0, tensor.shape[2], planes)]


@pytest.mark.parametrize("codes", ["RAS", "LPS", "SAL", "PIR"])
def test_streamed_bytes_are_those_of_save(codes, tmp_path):
    """With slabs of padded size, values beyond [-1, 1], and an int16 file with a slope."""
    data = np.random.default_rng(0).integers(-500, 900, (9, 7, 11)).astype(np.int16)
    turn = orientations.ornt_transform(orientations.axcodes2ornt("RAS"), orientations.axcodes2ornt(codes))
    image = nib.Nifti1Image(data, np.diag([2, 1, 3, 1.0])).as_reoriented(turn)
    image.header.set_slope_inter(2.0, 10.0)
    image.to_filename(tmp_path / "scan.nii")
    volume = Volume.load(tmp_path / "scan.nii", "CT", (-900, 1700))
    d, h, w = volume.to_tensor().shape[2:]
    tensor = torch.randn(1, 1, d + 3, h + 2, w + 1, generator=torch.Generator().manual_seed(0))
    volume.with_tensor(tensor[..., :d, :h, :w].clamp(-1, 1)).save(tmp_path / "saved.nii")
    out = tmp_path / "streamed.nii"
    with stream_volume(out, volume.shape, volume.affine, volume.intensity, volume.source) as on_slab:
        for slab in _slabs(tensor, 4):
            on_slab(*slab)
        assert not out.exists()
    assert out.read_bytes() == (tmp_path / "saved.nii").read_bytes()


@pytest.mark.parametrize("scale", [IntensityScale.ct(), IntensityScale(0, 1000, "MR")])
def test_a_streamed_volume_without_a_source(scale, tmp_path):
    tensor = torch.rand(1, 1, 5, 6, 7, generator=torch.Generator().manual_seed(0)) * 2 - 1
    volume = Volume.from_tensor(tensor, intensity=scale, spacing=(1, 2, 3))
    volume.save(tmp_path / "saved.nii")
    with stream_volume(tmp_path / "streamed.nii", volume.shape, volume.affine, scale) as on_slab:
        for slab in _slabs(tensor.bfloat16().float(), 2):
            on_slab(*slab)
    loaded = Volume.load(tmp_path / "streamed.nii", scale.modality, (scale.low, scale.high))
    np.testing.assert_allclose(loaded.data, volume.data, atol=8)
    with stream_volume(tmp_path / "streamed.nii", volume.shape, volume.affine, scale) as on_slab:
        for slab in _slabs(tensor, 5):
            on_slab(*slab)
    assert (tmp_path / "streamed.nii").read_bytes() == (tmp_path / "saved.nii").read_bytes()


def test_an_interrupted_stream_leaves_no_file(tmp_path):
    affine, scale = np.eye(4), IntensityScale.ct()
    tensor = torch.zeros(1, 1, 4, 4, 4)

    def begin(name="out.nii"):
        return stream_volume(tmp_path / name, (4, 4, 4), affine, scale)

    for error in (KeyboardInterrupt, RuntimeError):
        with pytest.raises(error), begin() as on_slab:
            on_slab(tensor[:, :, :2], 0, 0)
            raise error
    with pytest.raises(VolumeError, match="2 of 4 planes were written"), begin() as on_slab:
        on_slab(tensor[:, :, :2], 0, 0)
    with pytest.raises(VolumeError, match="NaN"), begin() as on_slab:
        on_slab(tensor * torch.nan, 0, 0)
    with pytest.raises(VolumeError, match="must end in .nii"), begin("out.nii.gz"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_an_error_of_the_stream(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match="was not written"):
        with stream_volume(tmp_path / "out.nii", (4, 4, 4), np.eye(4), IntensityScale.ct()):
            pass
    assert list(tmp_path.iterdir()) == []
