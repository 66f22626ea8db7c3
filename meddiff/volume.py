"""Medical volumes in and out: NIfTI files, their orientation and intensities, and the one axis rule.

A `Volume` holds float32 voxels [X, Y, Z] in original units and RAS+ orientation with their affine in mm; the networks
see a tensor [1, 1, D, H, W] in [-1, 1]. `save` gives a volume back in the orientation, shape and dtype of its file.
Values are float32 inside: wide integers and float64 lose their last bits, and loading warns when integers do.
"""

from __future__ import annotations

import gzip
import itertools
import math
import os
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import nibabel as nib
import numpy as np
import torch
from nibabel import orientations
from nibabel.casting import shared_range
from nibabel.spatialimages import HeaderDataError

from meddiff.files import atomic_write, write_json

_AIR_HU, _AIR_SHARE = -500, 0.01  # an interpolated MR image undershoots too, but in far fewer voxels
_RAS = ("R", "A", "S")
_CHUNK_BYTES = 16 * 2**20
_DEFLATE_LIMIT = 1032  # deflate spends at least 2 bits on at most 258 bytes


class VolumeError(ValueError):
    """A volume or a file that cannot be used; the message names it, the reason and the remedy."""


def file_to_tensor_axes(array: np.ndarray) -> np.ndarray:
    """[X, Y, Z] → [D, H, W], a view. The axis rule: file axes (X, Y, Z) are the tensor's (H, W, D)."""
    return array.transpose(2, 0, 1)


def tensor_to_file_axes(array: np.ndarray) -> np.ndarray:
    """[D, H, W] → [X, Y, Z], a view; the inverse of `file_to_tensor_axes`."""
    return array.transpose(1, 2, 0)


@dataclass(frozen=True)
class IntensityScale:
    """A linear map of original units to [-1, 1]: `low` to -1, `high` to 1.

    `modality` is "CT" (original units are Hounsfield units) or "MR" (no unit). VolumeError unless low < high.
    """

    low: float
    high: float
    modality: str = "MR"

    def __post_init__(self) -> None:
        if self.modality not in ("CT", "MR"):
            raise VolumeError(f'IntensityScale: modality must be "CT" or "MR", got {self.modality!r}')
        if not (math.isfinite(self.low) and math.isfinite(self.high) and self.low < self.high):
            raise VolumeError(
                f"IntensityScale: needs finite low < high, got {self.low:g} and {self.high:g}; a constant volume has "
                "no range of its own, so give one: window=(low, high) in original units"
            )

    @classmethod
    def ct(cls, low: float = -1000, high: float = 1000) -> IntensityScale:
        """A window in Hounsfield units."""
        return cls(low, high, "CT")

    @classmethod
    def percentiles(cls, data: np.ndarray, low: float = 0.5, high: float = 99.5) -> IntensityScale:
        """The scale for MR: from the `low`-th to the `high`-th percentile of all voxels of `data`."""
        return cls(*np.percentile(data, (low, high)).tolist(), "MR")

    def normalize(self, values: torch.Tensor) -> torch.Tensor:
        """Original units → float32 in [-1, 1], clipped; any shape, always a new tensor."""
        return values.float().sub(self.low).mul_(2 / (self.high - self.low)).sub_(1).clamp_(-1, 1)

    def denormalize(self, values: torch.Tensor) -> torch.Tensor:
        """[-1, 1] → float32 in original units, not clipped; any shape, always a new tensor."""
        return values.float().add(1).mul_((self.high - self.low) / 2).add_(self.low)


@dataclass(frozen=True, eq=False)
class Source:
    """How a volume was stored, so that `Volume.save` stores it the same way.

    `header` is the file's, without extensions, with sform and qform both set, in mm.
    """

    header: nib.Nifti1Header | nib.Nifti2Header = field(repr=False)
    orientation: tuple[str, str, str] = _RAS  # where the file's axes point, such as ("L", "P", "S")
    path: Path | None = None

    @property
    def nifti_version(self) -> int:
        """1 or 2."""
        return 2 if isinstance(self.header, nib.Nifti2Header) else 1

    @classmethod
    def generated(cls, modality: str) -> Source:
        """The default of a volume without a file: NIfTI-1, RAS+, int16 for CT and float32 for MR."""
        header = nib.Nifti1Header()
        header.set_data_dtype(np.int16 if modality == "CT" else np.float32)
        header.set_xyzt_units("mm")
        header["sform_code"] = header["qform_code"] = 1
        header["descrip"] = b"meddiff"
        return cls(header)


@dataclass(frozen=True, eq=False)
class Volume:
    """A 3D image in original units.

    data:      float32 [X, Y, Z], RAS+ (X to the right, Y to the front, Z to the head); may be a strided view
    affine:    float64 [4, 4], voxel index → mm
    intensity: map between original units and the [-1, 1] of the networks
    source:    how the volume was stored; None for a generated one
    record:    how the volume was generated, as JSON types; `save` writes it beside the volume

    VolumeError for other shapes, an empty axis, NaN or infinite voxels, a singular affine.
    """

    data: np.ndarray = field(repr=False)
    affine: np.ndarray
    intensity: IntensityScale
    source: Source | None = None
    record: dict[str, Any] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "data", np.asarray(self.data, dtype=np.float32))
        object.__setattr__(self, "affine", np.array(self.affine, dtype=np.float64))
        if self.data.ndim != 3 or self.data.size == 0:
            raise VolumeError(f"Volume: data must be [X, Y, Z] with no empty axis, got shape {self.data.shape}")
        _require_finite(self.data)
        if not _is_sound(self.affine):
            wanted = "an invertible [4, 4] matrix in mm with last row 0 0 0 1"
            raise VolumeError(f"Volume: affine must be {wanted}, got {self.affine.tolist()}")

    @property
    def shape(self) -> tuple[int, int, int]:
        """Extents along X, Y, Z."""
        return self.data.shape

    @property
    def spacing(self) -> tuple[float, float, float]:
        """Distance between voxel centres along X, Y, Z in mm."""
        return tuple(float(mm) for mm in nib.affines.voxel_sizes(self.affine))

    @classmethod
    def load(
        cls, path: str | Path, modality: str | None = None, window: tuple | None = None, max_bytes: int = 8 * 2**30
    ) -> Volume:
        """Read a NIfTI-1 or NIfTI-2 file, plain or gzipped, of any orientation and real dtype.

        modality:  "CT", "MR" or None, which means CT if 1 % of the voxels are at or below -500 (air in Hounsfield
                   units), else MR; name it for CT without air and for phase images
        window:    original values that map to -1 and 1; by default -1000…1000 for CT, 0.5th…99.5th percentile for MR
        max_bytes: refuse, before reading voxels, a header that announces more bytes of float32 voxels

        The affine is the sform's, else the qform's, else (neither has a code) the spacing's alone with the centre as
        origin. Lengths in metres or micrometres become mm. Trailing axes of one frame are dropped until `save`.

        VolumeError for a file that is missing or no sound 3D volume: damaged, truncated, with bytes after the voxels,
        complex, RGB, of several frames, not finite, constant and without a window, without geometry.
        """
        try:
            header, stored = _read(Path(path), max_bytes)
            _require_finite(stored)
            codes = orientations.aff2axcodes(header.get_sform())
            data, affine = _reorient(stored, header.get_sform(), codes, _RAS)
            if modality is None:
                modality = "CT" if np.mean(data <= _AIR_HU) >= _AIR_SHARE else "MR"
            if window is None and modality == "MR":
                intensity = IntensityScale.percentiles(data)
            else:
                intensity = IntensityScale(*(window or (-1000, 1000)), modality)
            return cls(data, affine, intensity, Source(header, codes, Path(path)))
        except VolumeError as error:
            raise VolumeError(f"Volume.load: {path}: {error}") from error.__cause__

    @classmethod
    def load_labels(cls, path: str | Path, max_bytes: int = 8 * 2**30) -> Volume:
        """Read a segmentation mask as `load` does; its voxels are whole numbers from 0 to 255.

        Raises VolumeError where they are not, and as `load`.
        """
        volume = cls.load(path, "MR", (0, 255), max_bytes)
        low, high = volume.data.min(), volume.data.max()
        if low < 0 or high > 255 or not np.array_equal(volume.data, np.rint(volume.data)):
            raise VolumeError(
                f"Volume.load_labels: {path}: a mask holds whole numbers from 0 to 255, got {low:g} to {high:g}, not "
                "all of them whole; give labels, not an image or probabilities"
            )
        return volume

    @classmethod
    def of_labels(cls, labels: np.ndarray, affine: np.ndarray) -> Volume:
        """A segmentation mask, integers [X, Y, Z] from 0 to 255, which `save` stores as uint8."""
        source = Source.generated("MR")
        source.header.set_data_dtype(np.uint8)
        return cls(labels.astype(np.float32), affine, IntensityScale(0, 255), source)

    def save(self, path: str | Path) -> None:
        """Write NIfTI atomically; the suffix `.nii` or `.nii.gz` decides on compression.

        Orientation, dtype, slope and intercept, trailing axes, form codes and NIfTI version are the source's; without
        a source: RAS+, int16 for CT and float32 for MR. Integers are rounded and clipped to their range. The same
        volume always gives the same bytes. A `record` goes to `.json` beside the volume.

        Raises VolumeError for another suffix, and OSError (see `atomic_write`) when the file cannot be written.
        """
        path = Path(path)
        if not path.name.endswith((".nii", ".nii.gz")):
            raise VolumeError(f"Volume.save: {path}: the name must end in .nii or .nii.gz")
        header, data = _stored(self.data, self.affine, self.source or Source.generated(self.intensity.modality))
        with atomic_write(path) as temporary, open(temporary, "wb") as raw:
            zipped = path.name.endswith(".gz")
            with gzip.GzipFile("", "wb", 1, raw, mtime=0) if zipped else nullcontext(raw) as stream:
                header.write_to(stream)
                _write_voxels(stream, data, header)
        if self.record is not None:
            write_json(path.with_name(path.name.removesuffix(".gz").removesuffix(".nii") + ".json"), self.record)

    def to_tensor(self, scaled: bool = True) -> torch.Tensor:
        """A new float32 tensor [1, 1, D, H, W], contiguous, on the CPU: in [-1, 1], or if not `scaled` as it is."""
        values = torch.from_numpy(np.array(file_to_tensor_axes(self.data), order="C"))[None, None]
        return self.intensity.normalize(values) if scaled else values

    @classmethod
    def from_tensor(
        cls,
        tensor: torch.Tensor,
        *,
        intensity: IntensityScale,
        affine: np.ndarray | None = None,
        spacing: tuple[float, float, float] | None = None,
        source: Source | None = None,
        record: dict[str, Any] | None = None,
    ) -> Volume:
        """The volume of a tensor [1, 1, D, H, W] in [-1, 1], of any floating dtype and device.

        Give either `affine` ([4, 4], mm, RAS+ if there is no source) or `spacing` (mm along X, Y, Z; the first voxel
        is the origin). VolumeError for other shapes, values that are not finite, and an affine that is not RAS+.
        """
        if tensor.ndim != 5 or tensor.shape[:2] != (1, 1):
            raise VolumeError(f"Volume.from_tensor: tensor must be [1, 1, D, H, W], got {tuple(tensor.shape)}")
        if (affine is None) == (spacing is None):
            raise VolumeError("Volume.from_tensor: give either affine or spacing, and not both")
        values = intensity.denormalize(tensor.detach().cpu())[0, 0].numpy()
        affine = np.diag([*spacing, 1.0]) if affine is None else affine
        volume = cls(tensor_to_file_axes(values), affine, intensity, source, record)
        codes = "".join(orientations.aff2axcodes(volume.affine))
        if source is None and codes != "RAS":
            raise VolumeError(f"Volume.from_tensor: affine must be RAS+, got {codes}; turn tensor and affine first")
        return volume

    def with_tensor(self, tensor: torch.Tensor) -> Volume:
        """This volume with the voxels of `tensor` ([1, 1, D, H, W] in [-1, 1], of the same size): a reconstruction."""
        wanted = (1, 1, *file_to_tensor_axes(self.data).shape)
        if tuple(tensor.shape) != wanted:
            raise VolumeError(f"Volume.with_tensor: tensor must be {wanted} like the volume, got {tuple(tensor.shape)}")
        return Volume.from_tensor(tensor, intensity=self.intensity, affine=self.affine, source=self.source)


def require_same_grid(
    name: str, grid: tuple[Sequence[int], np.ndarray], other: str, other_grid: tuple[Sequence[int], np.ndarray]
) -> None:
    """Raises VolumeError, saying what differs, unless two grids (shape along X, Y, Z; RAS+ affine) are one.

    Corners that lie apart by less than a twentieth of a voxel are taken for the same.
    """
    (shape, affine), (other_shape, other_affine) = grid, other_grid
    affine, other_affine = np.asarray(affine, np.float64), np.asarray(other_affine, np.float64)
    corners = np.array(list(itertools.product(*((0, n - 1) for n in shape))))
    apart = nib.affines.apply_affine(affine, corners) - nib.affines.apply_affine(other_affine, corners)
    mm, other_mm = (tuple(nib.affines.voxel_sizes(a).round(4).tolist()) for a in (affine, other_affine))
    if tuple(shape) != tuple(other_shape):
        what = f"its shape is {tuple(shape)}, and that of {other} {tuple(other_shape)}"
    elif np.abs(apart).max() <= 0.05 * min(mm):
        return
    elif not np.allclose(mm, other_mm, rtol=1e-3):
        what = f"its spacing is {mm}, and that of {other} {other_mm} mm"
    else:
        what = f"its affine puts voxels up to {np.abs(apart).max():.3g} mm from those of {other}"
    raise VolumeError(f"{name}: is not aligned with {other}: {what}; resample it onto that grid")


@contextmanager
def stream_volume(
    path: str | Path,
    shape: tuple[int, int, int],
    affine: np.ndarray,
    intensity: IntensityScale,
    source: Source | None = None,
) -> Iterator[Callable[[torch.Tensor, int, int], None]]:
    """Write an uncompressed NIfTI file slab by slab: `with stream_volume(…) as on_slab: model.decode(…, on_slab=…)`.

    Args:
        path: ends in `.nii`. The file appears when the block ends, and not at all if it raises.
        shape: voxels along X, Y, Z, RAS+.
        affine: [4, 4] in mm, RAS+.
        intensity: [-1, 1] of the slabs to original units.
        source: how a volume was stored, see `Volume.save`; None is as for a generated volume.

    Yields `on_slab(slab, sample, start)` for float slabs [1, 1, n, H, W] of any device, planes `start` … of the only
    sample. Values are clipped to [-1, 1]; what lies beyond `shape` is left out. The bytes are those of `Volume.save`.

    Raises VolumeError for another suffix, values that are not finite, or if planes are missing at the end; OSError as
    `atomic_write`, also if the disk has no room.
    """
    path = Path(path)
    if path.suffix != ".nii":
        raise VolumeError(f"stream_volume: {path}: the name must end in .nii; compressed files cannot be streamed")
    like = np.broadcast_to(np.float32(0), shape)
    source = source or Source.generated(intensity.modality)
    header, stored = _stored(like, np.asarray(affine, dtype=np.float64), source)
    written = 0
    with atomic_write(path) as temporary:
        with open(temporary, "r+b") as raw:
            header.write_to(raw)
            offset = raw.tell()
            size = stored.size * header.get_data_dtype().itemsize
            if hasattr(os, "posix_fallocate"):  # else a full disk would end the process, and not the write
                os.posix_fallocate(raw.fileno(), offset, size)
            else:
                raw.truncate(offset + size)
        mapped = np.memmap(temporary, header.get_data_dtype(), "r+", offset, stored.shape, order="F")
        turned = _reorient(mapped, header.get_sform(), source.orientation, _RAS)[0]
        planes = file_to_tensor_axes(turned)

        def on_slab(slab: torch.Tensor, sample: int, start: int) -> None:
            nonlocal written
            _, height, width = planes.shape
            target = planes[start : start + slab.shape[2]]
            values = slab[0, 0, : len(target), :height, :width].float().clamp(-1, 1)
            values = intensity.denormalize(values).cpu().numpy()
            _require_finite(values)
            for plane, value in zip(target, values):
                plane[:] = _encode(value, header)
            written += len(target)

        yield on_slab
        if written != len(planes):
            raise VolumeError(f"stream_volume: {path}: {written} of {len(planes)} planes were written")
        mapped.flush()


def _stored(data: np.ndarray, affine: np.ndarray, source: Source) -> tuple[nib.Nifti1Header, np.ndarray]:
    """The header to write, and a view of the voxels [X, Y, Z], RAS+, in the order of the file."""
    turned, turned_affine = _reorient(data, affine, _RAS, source.orientation)
    header = source.header.copy()
    shape = turned.shape + header.get_data_shape()[3:]
    loaded = _reorient(turned, header.get_sform(), source.orientation, _RAS)[1]
    if shape != header.get_data_shape() or not np.array_equal(affine, loaded):
        header.set_data_shape(shape)
        header.set_sform(turned_affine)
        header.set_qform(turned_affine)
    return header, turned


def _reorient(data: np.ndarray, affine: np.ndarray, start: tuple, end: tuple) -> tuple[np.ndarray, np.ndarray]:
    """A view of `data` and its affine, with the axes turned from the codes `start` to the codes `end`."""
    turn = orientations.ornt_transform(orientations.axcodes2ornt(start), orientations.axcodes2ornt(end))
    return orientations.apply_orientation(data, turn), affine @ orientations.inv_ornt_aff(turn, data.shape)


def _require_finite(data: np.ndarray) -> None:
    bad = data.size - np.count_nonzero(np.isfinite(data))
    if bad:
        raise VolumeError(f"{bad} of {data.size} voxels are NaN, infinite or beyond float32; replace them first")


def _is_sound(affine: np.ndarray) -> bool:
    """Whether a matrix maps voxels to space one to one, without axes that (nearly) lie in a plane."""
    if affine.shape != (4, 4) or not np.isfinite(affine).all() or not np.array_equal(affine[3], (0, 0, 0, 1)):
        return False
    spacing = nib.affines.voxel_sizes(affine)
    return bool((spacing > 0).all()) and abs(np.linalg.det(affine[:3, :3] / spacing)) > 1e-4


def _read(path: Path, max_bytes: int) -> tuple[nib.Nifti1Header, np.ndarray]:
    """The checked and settled header, and the float32 voxels [X, Y, Z] in file order."""
    if not path.is_file():
        raise VolumeError("is a directory or a device, not a file" if path.exists() else "no such file")
    size = path.stat().st_size
    if size == 0:
        raise VolumeError("the file is empty")
    try:
        with open(path, "rb") as raw:
            zipped = raw.read(2) == b"\x1f\x8b"
            raw.seek(0)
            with gzip.GzipFile(fileobj=raw) if zipped else nullcontext(raw) as stream:
                header = _read_header(stream)
                end = _check_header(header, max_bytes)
                if size * (_DEFLATE_LIMIT if zipped else 1) < end:
                    raise VolumeError(f"truncated: {size} bytes cannot hold the {end} that the header announces")
                _settle_forms(header)
                stream.seek(int(header["vox_offset"]))
                voxels = _read_voxels(stream, header)
                if stream.read(1):
                    raise VolumeError(f"holds more than the {end} bytes that its header announces; it is damaged")
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        reason = "truncated" if isinstance(error, EOFError) else "corrupt, or bytes follow it"
        raise VolumeError(f"the gzip stream is {reason} ({error}); copy or download the file again") from error
    except HeaderDataError as error:
        raise VolumeError(f"damaged header: {error}") from error
    header["vox_offset"] = 0
    return header, voxels


def _read_header(stream: BinaryIO) -> nib.Nifti1Header:
    block = stream.read(nib.Nifti1Header.sizeof_hdr)
    for kind, order in itertools.product((nib.Nifti1Header, nib.Nifti2Header), ("little", "big")):
        if int.from_bytes(block[:4], order) == kind.sizeof_hdr:
            block += stream.read(kind.sizeof_hdr - len(block))
            if len(block) < kind.sizeof_hdr:
                raise VolumeError(f"truncated: {len(block)} bytes, the header alone has {kind.sizeof_hdr}")
            header = kind(block, order, check=False)
            if header["magic"].item() == kind.single_magic:
                return header
    raise VolumeError("not a NIfTI-1 or NIfTI-2 file; convert it, or its .hdr/.img pair, to a single .nii")


def _check_header(header: nib.Nifti1Header, max_bytes: int) -> int:
    """Refuse what cannot be a sound 3D volume of real numbers within the budget; returns where the voxels end."""
    axes = int(header["dim"][0])
    shape = tuple(header["dim"][1 : axes + 1].tolist())
    if not 1 <= axes <= 7 or min(shape) < 1:
        raise VolumeError(f"damaged header: it announces {axes} axes of {shape} voxels")
    if axes < 3:
        raise VolumeError(f"holds a {axes}-D image {shape}; a 3-D volume is needed")
    frames = math.prod(shape[3:])
    if frames > 1:
        remedy = "nibabel.save(nibabel.load(path).slicer[..., 0], new_path)"
        raise VolumeError(f"holds {frames} frames {shape}; extract one: {remedy}")
    code, label = int(header["datatype"]), nib.nifti1.data_type_codes.label
    if code not in label or header.get_data_dtype().kind not in "iuf":
        raise VolumeError(f"holds data of type {label.get(code, code)}; wanted integers or floats of at most 64 bits")
    voxels, offset = math.prod(shape), header["vox_offset"].item()
    if 4 * voxels > max_bytes:
        need = f"{4 * voxels} bytes as float32, over the budget of {max_bytes}"
        raise VolumeError(f"announces {shape} voxels, {need}; if that size is right, pass a larger max_bytes")
    if not header.single_vox_offset <= offset <= max_bytes:
        raise VolumeError(f"damaged header: the voxels cannot begin at byte {offset:g}")
    if header.get_slope_inter() == (None, None):  # zero or NaN: not scaled
        header["scl_slope"], header["scl_inter"] = 1, 0
    return int(offset) + voxels * header.get_data_dtype().itemsize


def _settle_forms(header: nib.Nifti1Header) -> None:
    """Give the header sform and qform in mm. A sound form of the file stays as it is and fills in for the other."""
    forms = {}
    for name in ("sform", "qform"):
        if header[f"{name}_code"] > 0:
            with suppress(HeaderDataError, ValueError):  # a negative spacing, no rotation
                forms[name] = getattr(header, f"get_{name}")()
    if header["sform_code"] <= 0 and header["qform_code"] <= 0:
        forms["spacing"] = header.get_base_affine()
    forms = {name: form for name, form in forms.items() if _is_sound(form)}
    if not forms:
        what = f"codes {header['sform_code']} and {header['qform_code']}, spacing {header['pixdim'][1:4].tolist()}"
        raise VolumeError(f"sform and qform are unset, singular or not finite ({what}); set an affine with nibabel")
    chosen, affine = next(iter(forms.items()))
    if header["sform_code"] > 0 and chosen != "sform":
        warnings.warn("Volume.load: the file's sform is invalid, its qform is used instead", stacklevel=4)
    code = 2 if chosen == "spacing" else int(header[f"{chosen}_code"])
    unit = {1: 1000.0, 3: 0.001}.get(int(header["xyzt_units"]) & 7, 1.0)  # metres, micrometres
    for name in ("sform", "qform"):
        if name not in forms:
            header[f"{name}_code"] = code
        if name not in forms or unit != 1:
            getattr(header, f"set_{name}")(np.diag([unit, unit, unit, 1]) @ forms.get(name, affine))
    header["xyzt_units"] = header["xyzt_units"] & 0x38 | 2


def _read_voxels(stream: BinaryIO, header: nib.Nifti1Header) -> np.ndarray:
    """Float32 [X, Y, Z] in Fortran order, chunk by chunk; a chunk is the only temporary."""
    dtype, (slope, inter), shape = header.get_data_dtype(), header.get_slope_inter(), header["dim"][1:4].tolist()
    data = np.empty(math.prod(shape), np.float32)
    step = _CHUNK_BYTES // dtype.itemsize
    for start in range(0, data.size, step):
        part = data[start : start + step]
        block = stream.read(part.size * dtype.itemsize)
        if len(block) < part.size * dtype.itemsize:
            raise VolumeError(f"truncated: the voxels end after {start * dtype.itemsize + len(block)} bytes")
        values = np.frombuffer(block, dtype)
        with np.errstate(over="ignore", invalid="ignore"):
            part[:] = values if (slope, inter) == (1, 0) else values * np.float64(slope) + inter
    if dtype.kind in "iu" and np.spacing(max(data.max(), -data.min())) > abs(slope):
        message = f"Volume.load: float32 cannot tell all stored {dtype} values apart; saving may change last bits"
        warnings.warn(message, stacklevel=4)
    return data.reshape(shape, order="F")


def _write_voxels(stream: BinaryIO, data: np.ndarray, header: nib.Nifti1Header) -> None:
    """Write [X, Y, Z] in Fortran order, plane by plane; a plane is the only temporary."""
    for z in range(data.shape[2]):
        stream.write(_encode(data[:, :, z], header).tobytes(order="F"))


def _encode(values: np.ndarray, header: nib.Nifti1Header) -> np.ndarray:
    """Original units → the file's dtype, through its slope and intercept; integers are rounded and clipped."""
    dtype, (slope, inter) = header.get_data_dtype(), header.get_slope_inter()
    if (slope, inter) != (1, 0):
        values = (np.float64(values) - inter) / slope
    if dtype.kind in "iu":
        values = np.clip(np.rint(np.float64(values)), *shared_range(np.float64, dtype))
    return values.astype(dtype)
