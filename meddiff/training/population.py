"""A population of brains from one: the MNI152 template (Fonov et al. 2011), deformed at random.

Each subject has a random affine map and a smooth random displacement, the same for its T1 and its T2-like volume, and
for each a contrast and a bias field of its own. It stands in for a data set where none is at hand; no patient is in it.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
from monai.transforms import Compose, Rand3DElasticd, RandAdjustContrastd, RandBiasFieldd
from nibabel.processing import resample_from_to

from meddiff.files import atomic_write
from meddiff.progress import progress
from meddiff.training.data import draw_seed
from meddiff.training.options import POPULATION_ANATOMIES, PopulationOptions
from meddiff.volume import IntensityScale, Volume

_T2 = {"wm": 0.35, "gm": 0.6, "csf": 1.0}  # brightness of the tissues in the T2-like contrast
_SMOOTHNESS_MM = (11.0, 16.0)  # standard deviation of the Gaussian that smooths the displacements
_ROTATION, _SCALE, _SHEAR = 0.1, 0.08, 0.04  # largest angle in radians, relative change, shear
_GAMMA = (0.8, 1.25)
_BIAS = 0.15  # largest coefficient of the bias field's polynomial
_INTENSITY = IntensityScale(0, 1000, "MR")


def make_population(options: PopulationOptions) -> Path:
    """Write the volumes that are not there yet, and the list of all; returns the list, a .csv for `list_volumes`.

    Raises ImportError without nilearn, which carries the template; OSError when a file cannot be written.
    """
    folder = Path(options.out)
    folder.mkdir(parents=True, exist_ok=True)
    templates = [template_maps(size, mm) for size, mm in zip(options.sizes, options.spacings)]
    rows = []
    if options.template:
        for i, (size, spacing) in enumerate(zip(options.sizes, options.spacings)):
            files = {anatomy: f"template_{i}_{anatomy}.nii.gz" for anatomy in options.anatomies}
            for anatomy, volume in zip(POPULATION_ANATOMIES, undeformed(size, spacing)):
                if anatomy in files:
                    volume.save(folder / files[anatomy])
            label = f"template_{i}_labels.nii.gz" if options.labels else None
            if label:
                Volume.of_labels(tissue_labels(templates[i][0]), templates[i][1]).save(folder / label)
            rows += _rows(files, label)
    for subject in progress("population")(range(options.subjects)):
        which = subject % len(templates)
        files = {anatomy: f"{subject:04d}_{anatomy}.nii.gz" for anatomy in options.anatomies}
        label = f"{subject:04d}_labels.nii.gz" if options.labels else None
        missing = [name for name in (*files.values(), label) if name and not (folder / name).exists()]
        if missing:
            maps, affine = templates[which]
            images, labels = _subject(maps, options.spacings[which], options, draw_seed(options.seed, subject))
            for anatomy, image in zip(POPULATION_ANATOMIES, images):
                if (name := files.get(anatomy)) in missing:
                    Volume(_INTENSITY.high * image, affine, _INTENSITY).save(folder / name)
            if label in missing:
                Volume.of_labels(labels, affine).save(folder / label)
        rows += _rows(files, label)
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    with atomic_write(folder / "volumes.csv") as temporary:
        temporary.write_text(text.getvalue(), encoding="utf-8", newline="")
    return folder / "volumes.csv"


@contextmanager
def _two_threads() -> Iterator[None]:
    """At least two: with one, PyTorch unfolds the convolutions that smooth the displacements, 14 GB at 192³."""
    threads = torch.get_num_threads()
    torch.set_num_threads(max(2, threads))
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _rows(files: dict[str, str], label: str | None) -> list[dict[str, object]]:
    scale = {"modality": _INTENSITY.modality, "low": _INTENSITY.low, "high": _INTENSITY.high}
    scale |= {"label": label} if label else {}
    return [{"file": name, "anatomy": anatomy} | scale for anatomy, name in files.items()]


def undeformed(size: tuple[int, int, int], spacing: tuple[float, float, float]) -> list[Volume]:
    """The template itself, T1 and T2-like, on a grid of `size` voxels and `spacing` mm along X, Y, Z."""
    maps, affine = template_maps(size, spacing)
    return [Volume(_INTENSITY.high * image, affine, _INTENSITY) for image in _contrasts(maps)]


def template_maps(size: tuple[int, int, int], spacing: tuple[float, float, float]) -> tuple[np.ndarray, np.ndarray]:
    """T1 and the shares of white matter, grey matter and brain, float32 [4, X, Y, Z] in [0, 1]; affine in mm, RAS+."""
    try:
        from nilearn import datasets
    except ImportError as error:
        raise ImportError("the MNI152 template comes with nilearn: pip install 'meddiff[train]'") from error
    loaders = (
        datasets.load_mni152_template,
        datasets.load_mni152_wm_template,
        datasets.load_mni152_gm_template,
        datasets.load_mni152_brain_mask,
    )
    originals = [load(resolution=1) for load in loaders]
    brain = np.argwhere(originals[3].get_fdata() > 0)
    centre = nib.affines.apply_affine(originals[3].affine, (brain.min(0) + brain.max(0)) / 2)
    affine = np.diag([*spacing, 1.0])
    affine[:3, 3] = centre - affine[:3, :3] @ ((np.array(size) - 1) / 2)
    maps = [resample_from_to(original, (size, affine), order=1).get_fdata(dtype=np.float32) for original in originals]
    return np.stack(maps).clip(0, 1), affine


def _contrasts(maps: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    t1, wm, gm, brain = maps
    csf = np.clip(brain - wm - gm, 0, 1)
    return t1 * brain, brain * (_T2["wm"] * wm + _T2["gm"] * gm + _T2["csf"] * csf).clip(0, 1)


def tissue_labels(maps: np.ndarray) -> np.ndarray:
    """The tissue with the largest share of each voxel, uint8 [X, Y, Z]: 0 background, 1 CSF and the rest of the brain,
    2 grey matter, 3 white matter."""
    _, wm, gm, brain = maps
    return np.stack([1 - brain, np.clip(brain - wm - gm, 0, 1), gm, wm]).argmax(0).astype(np.uint8)


def _subject(
    maps: np.ndarray, spacing: tuple[float, float, float], options: PopulationOptions, seed: int
) -> tuple[list[np.ndarray], np.ndarray]:
    """The images, float32 [X, Y, Z] in [0, 1], and the labels of their tissues."""
    smoothness = [mm / np.mean(spacing) for mm in _SMOOTHNESS_MM]  # in voxels
    # Smoothing white noise from [-1, 1] with a Gaussian of σ voxels leaves this standard deviation.
    left = 3**-0.5 * (2 * np.pi**0.5 * np.mean(smoothness)) ** -1.5
    magnitude = options.displacement / np.mean(spacing) / left
    deform = Rand3DElasticd(
        "maps",
        sigma_range=tuple(smoothness),
        magnitude_range=(0.5 * magnitude, 1.5 * magnitude),
        prob=1,
        rotate_range=(options.affine * _ROTATION,) * 3,
        shear_range=(options.affine * _SHEAR,) * 6,
        scale_range=(options.affine * _SCALE,) * 3,
        mode="bilinear",
        padding_mode="zeros",
    ).set_random_state(seed=seed)
    with _two_threads():
        deformed = deform({"maps": torch.from_numpy(maps)})["maps"].numpy().clip(0, 1)
    paint = Compose(
        [
            RandBiasFieldd("image", prob=1, coeff_range=(-_BIAS, _BIAS)),
            RandAdjustContrastd("image", prob=1, gamma=_GAMMA),
        ]
    ).set_random_state(seed=seed)
    painted = []
    for image in _contrasts(deformed):
        values = paint({"image": torch.from_numpy(image[None])})["image"].numpy()[0]
        painted.append(np.clip(values / max(float(np.quantile(values, 0.999)), 1e-6), 0, 1).astype(np.float32))
    return painted, tissue_labels(deformed)
