"""Latents of a training set: encoded once, scaled to the denoiser's range, one safetensors file for each volume."""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from accelerate import PartialState
from monai.transforms import Compose, DivisiblePadd
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import Dataset

from meddiff.checkpoint import fingerprint, load_component
from meddiff.config import ANATOMIES, Anatomy, Spacing
from meddiff.files import atomic_write
from meddiff.progress import progress
from meddiff.resources import default_dtype
from meddiff.training.data import leave_out, list_volumes, preparation
from meddiff.training.options import LatentOptions

_FORMAT = "meddiff-training-latent-2"
_SUB_VOLUME = 8  # latent elements along each axis, of which the denoiser takes multiples


def encode_latents(options: LatentOptions) -> Path:
    """Encode the volumes whose latents are not there yet, shared among the processes of `accelerate launch`.

    A latent is made anew when its volume, the spacing or the autoencoder change. Volumes are padded around with air to
    multiples of the patch and of 8 latent elements. Returns the folder.

    Raises ValueError where a volume has no anatomy, VolumeError for a bad file where that is fatal.
    """
    state = PartialState()
    folder = Path(options.out)
    folder.mkdir(parents=True, exist_ok=True)
    autoencoder = load_component(options.autoencoder, "autoencoder", state.device, default_dtype(state.device))
    scale, owner = autoencoder.codebook.latent_scale(), fingerprint(autoencoder)
    unit = math.lcm(autoencoder.config.patch_size, _SUB_VOLUME * autoencoder.config.downsample)
    prepare = Compose([preparation(options.spacing), DivisiblePadd("image", k=unit, value=-1)])

    volumes = list_volumes(options.data, options.anatomy)
    nameless = [volume.file for volume in volumes if volume.anatomy is None]
    if nameless:
        raise ValueError(f"encode_latents: {nameless[0]} has no anatomy; list it in {options.data}, or give --anatomy")
    mine = volumes[state.process_index :: state.num_processes]
    for volume in progress("encoding")(mine) if state.is_main_process else mine:
        try:
            status = Path(volume.file).stat()
            stamp = f"{status.st_size} {status.st_mtime_ns}"
        except OSError:
            stamp = "missing"  # Volume.load says why
        origin = hashlib.sha256(f"{volume} {stamp} {options.spacing} {owner}".encode()).hexdigest()
        name = Path(volume.file).name.removesuffix(".gz").removesuffix(".nii")
        target = folder / f"{name}-{hashlib.sha256(volume.file.encode()).hexdigest()[:8]}.safetensors"
        if target.exists() and _describe(target).get("origin") == origin:
            continue
        try:
            x = prepare({"image": volume.file, "modality": volume.modality, "low": volume.low, "high": volume.high})
        except Exception as error:
            leave_out(error, options.on_bad)
            continue
        with torch.inference_mode():
            latent = scale.scale(autoencoder.encode(x["image"][None]))[0]
        description = latent_description(volume.anatomy, options.spacing or x["mm"])
        description |= {"source": volume.file, "origin": origin}
        with atomic_write(target) as temporary:
            save_file({"latent": latent.cpu().contiguous()}, temporary, description)
    state.wait_for_everyone()
    return folder


def latent_description(anatomy: str, spacing: Sequence[float]) -> dict[str, str]:
    """What `LatentDataset` reads in a file beside the latent; spacing in mm along X, Y, Z."""
    return {"format": _FORMAT, "anatomy": anatomy, "spacing": json.dumps([round(mm, 4) for mm in spacing])}


@dataclass(frozen=True)
class Latent:
    values: Tensor  # float32 [C, d, h, w], in the denoiser's range
    anatomy: str  # a name of ANATOMIES
    spacing: Spacing  # of the volume

    @property
    def class_index(self) -> int:
        return ANATOMIES[self.anatomy].class_index


class LatentDataset(Dataset):
    """The latents of a folder, in memory. `dataset[index, seed]` → (float32 [C, d, h, w], class); the seed is not used.

    Raises ValueError for an empty folder and for damaged or foreign files.
    """

    def __init__(self, folder: str | Path, channels: int) -> None:
        self.latents = []
        files = sorted(Path(folder).glob("*.safetensors"))
        if not files:
            raise ValueError(f"LatentDataset: {folder}: holds no latents; make them with `meddiff train latents`")
        for file in files:
            description = _describe(file)
            try:
                with safe_open(file, framework="pt") as stored:
                    values = stored.get_tensor("latent")
            except SafetensorError as error:
                raise ValueError(f"LatentDataset: {file}: damaged ({error}); delete it and encode again") from None
            if description.get("format") != _FORMAT or description.get("anatomy") not in ANATOMIES:
                raise ValueError(f"LatentDataset: {file}: is no latent of `meddiff train latents`; take it away")
            if values.ndim != 4 or values.shape[0] != channels or not torch.isfinite(values).all():
                raise ValueError(
                    f"LatentDataset: {file}: must be finite [{channels}, d, h, w], got {tuple(values.shape)}; encode "
                    "it again with the denoiser's autoencoder"
                )
            self.latents.append(Latent(values, description["anatomy"], tuple(json.loads(description["spacing"]))))

    @property
    def sizes(self) -> list[tuple[int, ...]]:
        """(d, h, w) of each latent: the buckets of multi-resolution training."""
        return [tuple(latent.values.shape[1:]) for latent in self.latents]

    def anatomies(self, downsample: int) -> dict[str, Anatomy]:
        """What a denoiser learns from them: each class with its volumes, the most frequent first.

        downsample: voxels per latent element along each axis.
        """
        counts: dict[str, Counter] = {}
        for (d, h, w), latent in zip(self.sizes, self.latents):
            size = (downsample * h, downsample * w, downsample * d)
            counts.setdefault(latent.anatomy, Counter())[size, latent.spacing] += 1
        return {
            name: replace(ANATOMIES[name], volumes=tuple(volume for volume, _ in counts[name].most_common()))
            for name in sorted(counts, key=lambda name: ANATOMIES[name].class_index)
        }

    def __len__(self) -> int:
        return len(self.latents)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, int]:
        latent = self.latents[key[0]]
        return latent.values, latent.class_index


def _describe(file: Path) -> dict[str, str]:
    try:
        with safe_open(file, framework="pt") as stored:
            return stored.metadata() or {}
    except SafetensorError:
        return {}
