"""Volumes for training: lists of files, their preparation with MONAI's dictionary transforms, and who sees which when.

Every draw is a function of seed, step and process alone, so that a run that stops and goes on at any step sees the
same data as one that never stopped, and no process has a state to save.
"""

from __future__ import annotations

import csv
import json
import logging
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from monai.data import MetaTensor, PersistentDataset
from monai.transforms import (
    Compose,
    DivisiblePadd,
    EnsureTyped,
    Lambdad,
    MapTransform,
    RandCropByPosNegLabeld,
    RandFlipd,
    RandRotate90d,
    ResizeWithPadOrCropd,
    SelectItemsd,
    Spacingd,
    SpatialPadd,
    Transposed,
)
from monai.utils import convert_to_tensor
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from meddiff.config import ANATOMIES
from meddiff.volume import Volume, VolumeError, require_same_grid

_log = logging.getLogger(__name__)
_SUFFIXES = (".nii", ".nii.gz")
_FOREGROUND = -0.9  # normalised intensity above which a voxel is no air
_COLUMNS = {"file", "anatomy", "modality", "low", "high", "label"}
_FOREGROUND_SHARE = (4, 1)  # crops with a foreground voxel in their centre, and without


@dataclass(frozen=True)
class ListedVolume:
    """One file of a training set.

    file:      NIfTI
    anatomy:   a name of `meddiff.config.ANATOMIES`, or None where no class is needed
    modality:  "CT" (Hounsfield units), "MR" or None to judge from the voxels
    low, high: intensities that map to -1 and 1; both None for the rules of `Volume.load`
    label:     NIfTI with the segmentation mask, or None
    """

    file: str
    anatomy: str | None = None
    modality: str | None = None
    low: float | None = None
    high: float | None = None
    label: str | None = field(default=None, repr=False)  # what is made of the image alone is known by the repr


def list_volumes(source: str | Path, anatomy: str | None = None) -> list[ListedVolume]:
    """The files of a folder (recursively), or of a `.csv` or `.json` list.

    A list has a column or key `file`, relative to the list, and may have `anatomy`, `modality`, `low`, `high` and
    `label`, the file of a segmentation mask; JSON holds an array of such objects. `anatomy` is the class of files whose
    row names none.

    Raises ValueError, naming file and row, for a missing or empty source, unknown columns, anatomies and modalities.
    """
    source = Path(source)
    if source.is_dir():
        rows: Sequence[Mapping[str, Any]] = [
            {"file": path.name if path.parent == source else str(path.relative_to(source))}
            for path in sorted(source.rglob("*"))
            if path.name.endswith(_SUFFIXES) and not path.name.startswith(".")
        ]
        folder = source
    else:
        rows, folder = _read_rows(source), source.parent
    volumes = [_listed(row, folder, anatomy, f"{source}, entry {i}") for i, row in enumerate(rows, 1)]
    if not volumes:
        raise ValueError(f"list_volumes: {source}: holds no volumes (.nii or .nii.gz)")
    return volumes


def _read_rows(source: Path) -> list[dict[str, Any]]:
    try:
        if source.suffix == ".csv":
            with source.open(newline="", encoding="utf-8") as file:
                return list(csv.DictReader(file))
        if source.suffix == ".json":
            rows = json.loads(source.read_bytes())
            if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
                raise ValueError("must hold an array of objects")
            return rows
    except FileNotFoundError:
        raise ValueError(f"list_volumes: {source}: no such file or folder") from None
    except (ValueError, csv.Error) as error:
        raise ValueError(f"list_volumes: {source}: not readable: {error}") from None
    raise ValueError(f"list_volumes: {source}: must be a folder, or a list ending in .csv or .json")


def _listed(row: Mapping[str, Any], folder: Path, anatomy: str | None, place: str) -> ListedVolume:
    given = {name: value for name, value in row.items() if value not in (None, "")}
    unknown = sorted(map(str, set(given) - _COLUMNS))
    if unknown or "file" not in given:
        raise ValueError(
            f"list_volumes: {place}: needs `file` and knows {sorted(_COLUMNS)}, got {sorted(map(str, given))}"
        )
    try:
        low, high = (float(given[name]) if name in given else None for name in ("low", "high"))
    except ValueError as error:
        raise ValueError(f"list_volumes: {place}: {error}") from None
    if (low is None) != (high is None):
        raise ValueError(f"list_volumes: {place}: give both low and high, or neither")
    volume = ListedVolume(
        str((folder / given["file"]).resolve()),
        given.get("anatomy", anatomy),
        given.get("modality"),
        low,
        high,
        str((folder / given["label"]).resolve()) if "label" in given else None,
    )
    if volume.anatomy is not None and volume.anatomy not in ANATOMIES:
        raise ValueError(f"list_volumes: {place}: unknown anatomy {volume.anatomy!r}; known are {', '.join(ANATOMIES)}")
    if volume.modality not in (None, "CT", "MR"):
        raise ValueError(f"list_volumes: {place}: modality must be CT or MR, got {volume.modality!r}")
    return volume


class LoadVolumed(MapTransform):
    """The file named under a key → its voxels, RAS+, scaled to [-1, 1]: `Volume.load` with its rules and checks."""

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        loaded = dict(data)
        for key in self.key_iterator(loaded):
            window = None if data["low"] is None else (data["low"], data["high"])
            volume = Volume.load(data[key], data["modality"], window)
            values = volume.intensity.normalize(torch.from_numpy(volume.data.copy()))
            loaded[key] = MetaTensor(values[None], affine=torch.from_numpy(volume.affine))
            loaded["mm"] = volume.spacing
        return loaded


class LoadLabelsd(MapTransform):
    """The file named under a key → its labels, RAS+, float32, checked to be on the grid of the volume under "image"."""

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        loaded = dict(data)
        for key in self.key_iterator(loaded):
            labels, image = Volume.load_labels(data[key]), loaded["image"]
            grid = (image.shape[1:], image.affine.numpy())
            require_same_grid(str(data[key]), (labels.shape, labels.affine), "its image", grid)
            loaded[key] = MetaTensor(torch.from_numpy(labels.data.copy())[None], affine=image.affine)
        return loaded


def preparation(spacing: Sequence[float] | None, label: bool = False) -> Compose:
    """What is done once per file and kept: load, orient, scale to [-1, 1], resample, turn the axes to [1, D, H, W].

    spacing: mm along X, Y, Z; None keeps each file's.
    label:   also the segmentation mask under "label", whole numbers in float32.

    Gives the volume under "image", and the spacing of the file under "mm".
    """
    keys, modes = (("image", "label"), ("bilinear", "nearest")) if label else (("image",), ("bilinear",))
    resample = [Spacingd(keys, pixdim=tuple(spacing), mode=modes, padding_mode="border")] if spacing else []
    return Compose(
        [
            LoadVolumed("image"),
            *([LoadLabelsd("label")] if label else ()),
            *resample,
            Transposed(keys, (0, 3, 1, 2)),  # the axis rule: file axes (X, Y, Z) are the tensor's (H, W, D)
            EnsureTyped(keys, dtype=torch.float32, track_meta=False),
            SelectItemsd((*keys, "mm")),
        ]
    )


def patch_draw(patch_size: int, patches: int, turns: bool = True) -> Compose:
    """Random patches, mostly with foreground in their centre (paper, stage 1).

    turns: flip and turn them by 90° at random.
    """
    planes = ((0, 1), (0, 2), (1, 2))
    turned = [RandFlipd("image", prob=0.5, spatial_axis=axis) for axis in range(3)]
    turned += [RandRotate90d("image", prob=0.5, max_k=3, spatial_axes=plane) for plane in planes]
    positive, negative = _FOREGROUND_SHARE
    return Compose(
        [
            SpatialPadd("image", spatial_size=(patch_size,) * 3, value=-1),
            Lambdad("image", func=_foreground, overwrite="foreground", track_meta=False),
            RandCropByPosNegLabeld(
                "image", "foreground", (patch_size,) * 3, pos=positive, neg=negative, num_samples=patches
            ),
            *(turned if turns else ()),
        ]
    )


def volume_draw(size: Sequence[int] | None, patch_size: int) -> Compose:
    """Whole volumes, cropped or padded with air around their centre (stage 2).

    size: voxels along X, Y, Z; None keeps each volume's, padded to multiples of the patch.
    """
    if size is None:
        return Compose([DivisiblePadd("image", k=patch_size, value=-1)])
    if len(size) != 3 or any(n < patch_size or n % patch_size for n in size):
        raise ValueError(f"volume_draw: size must be three multiples of the patch size {patch_size}, got {tuple(size)}")
    x, y, z = size
    return Compose([ResizeWithPadOrCropd("image", spatial_size=(z, x, y), value=-1)])


def _foreground(image: Tensor) -> Tensor:
    return image > _FOREGROUND


class VolumeDataset(Dataset):
    """Prepared volumes, kept in a folder, and random views of them.

    `dataset[index, seed]` → float32 [n, 1, D, H, W] in [-1, 1], the same for the same index and seed.

    Args:
        volumes: the files. Each is prepared here, once; what is kept is made anew when file or preparation change.
        cache: folder of the prepared volumes.
        on_bad: a file that cannot be used is fatal, or named in the log and left out.

    Raises VolumeError for a bad file where it is fatal, ValueError where no file is left.
    """

    def __init__(
        self,
        volumes: Sequence[ListedVolume],
        cache: str | Path,
        draw: Compose,
        spacing: Sequence[float] | None = None,
        on_bad: Literal["fail", "skip"] = "fail",
    ) -> None:
        items = []
        for volume in volumes:
            try:
                status = Path(volume.file).stat()
                state = (status.st_mtime_ns, status.st_size)
            except OSError:
                state = None  # Volume.load says why
            items.append({"image": volume.file, **asdict(volume), "state": state, "spacing": spacing})
        self.draw = draw
        self.prepared = PersistentDataset(items, preparation(spacing), cache_dir=cache)
        good, shapes = [], []
        for i, item in enumerate(items):
            try:
                shapes.append(tuple(self.prepared[i]["image"].shape[1:]))
                good.append(item)
            except Exception as error:
                leave_out(error, on_bad)
        if not good:
            raise ValueError(f"VolumeDataset: none of the {len(items)} files can be used; the log says why")
        self.prepared.data = good
        self.shapes = shapes  # (D, H, W) of each prepared volume
        self.volumes = [ListedVolume(**{name: item[name] for name in asdict(volumes[0])}) for item in good]

    def __len__(self) -> int:
        return len(self.volumes)

    def __getitem__(self, key: tuple[int, int]) -> Tensor:
        index, seed = key
        self.draw.set_random_state(seed=seed)
        drawn = self.draw(self.prepared[index])
        views = torch.stack([view["image"] for view in (drawn if isinstance(drawn, list) else [drawn])])
        # MONAI's tensors would carry their bookkeeping through every operation of the networks
        return convert_to_tensor(views, track_meta=False)


def leave_out(error: Exception, on_bad: Literal["fail", "skip"]) -> None:
    """Log the bad file behind `error`, or raise what is not to be skipped; MONAI wraps what a transform raises."""
    reason: BaseException = error
    while reason.__cause__ is not None and not isinstance(reason, VolumeError):
        reason = reason.__cause__
    if on_bad == "fail" or not isinstance(reason, VolumeError):
        raise reason from None
    _log.warning("left out: %s", reason)


class Draws(Sampler):
    """Batches for one of several processes: lists of (index, seed), without end.

    An epoch is a shuffled sequence of batches, each from one bucket (samples of one shape). Over all processes no
    sample comes twice in an epoch; those that fill no batch wait for another epoch's shuffle.

    Args:
        buckets: bucket of each sample, anything hashable.
        batch_size: samples per batch and process.
        seed: of everything random.
        start: first step.
        rank, world_size: this process and their number.

    Raises ValueError where a bucket holds less than one batch for every process.
    """

    def __init__(
        self,
        buckets: Sequence[Hashable],
        batch_size: int,
        seed: int,
        start: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.together = batch_size * world_size
        self.members: dict[Hashable, list[int]] = {}
        for index, bucket in enumerate(buckets):
            self.members.setdefault(bucket, []).append(index)
        small = {bucket: len(m) for bucket, m in self.members.items() if len(m) < self.together}
        if small or not self.members:
            raise ValueError(
                f"Draws: one step takes {self.together} samples of one shape ({batch_size} per process), and there are "
                f"{small or 'none'}; add volumes or lower the batch size"
            )
        self.batch_size, self.seed, self.start, self.rank = batch_size, seed, start, rank
        self.steps_per_epoch = sum(len(m) // self.together for m in self.members.values())

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        epoch, skip = divmod(self.start, self.steps_per_epoch)
        while True:
            for step, batch in enumerate(self._epoch(epoch)):
                if step >= skip:
                    first = self.rank * self.batch_size
                    yield [
                        (index, draw_seed(self.seed, epoch, step, first + i))
                        for i, index in enumerate(batch[first : first + self.batch_size])
                    ]
            epoch, skip = epoch + 1, 0

    def _epoch(self, epoch: int) -> list[list[int]]:
        generator = torch.Generator().manual_seed(draw_seed(self.seed, epoch))
        batches = []
        for members in self.members.values():
            order = [members[i] for i in torch.randperm(len(members), generator=generator).tolist()]
            last = len(order) - len(order) % self.together
            batches += [order[i : i + self.together] for i in range(0, last, self.together)]
        return [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]


def draw_seed(*numbers: int) -> int:
    """A seed below 2³² that mixes some integers, the same on every machine."""
    mixed = 0
    for number in numbers:
        mixed = (mixed ^ number) * 0x9E3779B97F4A7C15 & (2**64 - 1)
        mixed ^= mixed >> 29
    return mixed % 2**32
