"""A whole model with its verbs: sample, generate, reconstruct, encode, decode."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from meddiff.checkpoint import fingerprint, load_model, save_model
from meddiff.config import ANATOMIES, PRESETS, Anatomy, ModelConfig, Size, Spacing
from meddiff.files import write_json
from meddiff.models import BiFlowNet, PatchVolumeAutoencoder
from meddiff.pipelines.latents import EncodedVolume
from meddiff.resources import StageMeter, default_device, default_dtype, on_device
from meddiff.sampling import NoiseSchedule, Sampler, resolve_sampling, solver_timesteps
from meddiff.volume import IntensityScale, Volume, VolumeError, stream_volume

_GENERATED_MR = IntensityScale(0, 1000, "MR")  # MR has no unit: a range that every viewer shows well


class Target(NamedTuple):
    """What a volume is to show, and its grid: voxels and mm along the file's axes X, Y, Z."""

    anatomy: str
    class_index: int
    modality: str
    size: Size
    spacing: Spacing

    @property
    def intensity(self) -> IntensityScale:
        """Of the volume: Hounsfield units for CT, 0 to 1000 for MR, which has no unit."""
        return IntensityScale.ct() if self.modality == "CT" else _GENERATED_MR


class MedDiffusion:
    """Autoencoder, denoiser and noise schedule of one model, on one device.

    Attributes:
        autoencoder: `PatchVolumeAutoencoder`, in eval mode.
        denoiser: `BiFlowNet`, in eval mode.
        schedule: `NoiseSchedule`.
        config: `ModelConfig`.
        trained: False for random weights, which generate noise.
        source: where the weights came from, in words.
        memory_budget: bytes that decoding may take beside the weights, on the autoencoder's device; None, as at first,
            is what is free. Less memory takes more time and gives the same volume within rounding.
    """

    def __init__(
        self,
        autoencoder: PatchVolumeAutoencoder,
        denoiser: BiFlowNet,
        schedule: NoiseSchedule,
        source: str,
        trained: bool,
        anatomies: Mapping[str, Anatomy] = ANATOMIES,
    ) -> None:
        self.config = ModelConfig(autoencoder.config, denoiser.config, schedule.config, anatomies)
        self.autoencoder = autoencoder.eval()
        self.denoiser = denoiser.eval()
        self.schedule = schedule
        self.source = source
        self.trained = trained
        self.memory_budget: int | None = None

    @classmethod
    def from_pretrained(
        cls, source: str | Path, device: str | torch.device | None = None, dtype: torch.dtype | None = None
    ) -> MedDiffusion:
        """Load a model folder, or a repository of the Hugging Face hub ("organisation/name[@revision]").

        Args:
            source: the folder or the repository; see `save_pretrained` and `meddiff convert`.
            device: None is the current CUDA device where there is one, else the CPU.
            dtype: of the networks; None is bfloat16 where the device multiplies it natively, else float32.
                Codebook, latents and schedule are float32 always.

        Raises:
            CheckpointError: for a missing, damaged or foreign model; the message names file and key.
        """
        device, dtype = _placement(device, dtype)
        loaded = load_model(source, device, dtype)
        schedule = NoiseSchedule(loaded.schedule).to(device)
        return cls(loaded.autoencoder, loaded.denoiser, schedule, str(loaded.path), True, loaded.anatomies)

    @classmethod
    def untrained(
        cls,
        preset: str = "8x",
        seed: int = 0,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> MedDiffusion:
        """A model with random weights, for benchmarks and tests: it runs like a trained one and generates noise.

        Raises ValueError for an unknown preset.
        """
        if preset not in PRESETS:
            raise ValueError(f"untrained: unknown preset {preset!r}; known are {sorted(PRESETS)}")
        device, dtype = _placement(device, dtype)
        config = PRESETS[preset]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            autoencoder, denoiser = PatchVolumeAutoencoder(config.autoencoder), BiFlowNet(config.denoiser)
        networks = [network.requires_grad_(False).to(device, dtype) for network in (autoencoder, denoiser)]
        schedule = NoiseSchedule(config.schedule).to(device)
        return cls(*networks, schedule, f"untrained {preset}, seed {seed}", trained=False)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the model folder that `from_pretrained` reads; weights keep their present dtype."""
        save_model(folder, self.autoencoder, self.denoiser, self.config.schedule, self.config.anatomies)

    @property
    def device(self) -> torch.device:
        return self.denoiser.device

    @property
    def dtype(self) -> torch.dtype:
        return self.denoiser.dtype

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over the weights of autoencoder and denoiser, as they are loaded."""
        return fingerprint(self.autoencoder, self.denoiser)

    def decode_on(self, device: str | torch.device) -> None:
        """Move the autoencoder to a device of its own. ValueError for one that is not there, or lacks the dtype."""
        self.autoencoder.to(_placement(device, self.dtype)[0])

    @cached_property
    def sampler(self) -> Sampler:
        """Denoises; keeps its buffers from one volume to the next until `sampler.drop()`."""
        return Sampler(self.denoiser, self.schedule)

    @property
    def size_unit(self) -> int:
        """Generated volumes are multiples of this many voxels along each axis."""
        return self.config.autoencoder.downsample * self.config.denoiser.sub_volume

    def sample(self, noise: Tensor | Sequence[int], y: Tensor | int, **options: Any) -> Tensor:
        """Sample latents in the denoiser's range: float32 [B, 8, d, h, w]. See `meddiff.sampling.Sampler.sample`.

        Args:
            noise: the start [B, 8, d, h, w], or the latent's size (d, h, w) to draw it from the seed.
            y: class, or classes [B].
            options: solver, steps, eta, order, timestep_spacing, t_end and seed.
        """
        return self.sampler.sample(noise, torch.as_tensor(y).reshape(-1), progress=True, **options)

    @torch.inference_mode()
    def decode_latent(self, latent: Tensor) -> Tensor:
        """Sampled latent, float [B, 8, d, h, w] in the denoiser's range → volume float32 [B, 1, D, H, W] in [-1, 1]."""
        with on_device(self.autoencoder.device):
            return self.autoencoder.decode_latent(latent, self.memory_budget, progress=True).float().clamp_(-1, 1)

    def generate(
        self,
        anatomy: str | None = None,
        size: int | Sequence[int] | None = None,
        *,
        spacing: Sequence[float] | None = None,
        seed: int = 0,
        **options: Any,
    ) -> Volume:
        """Generate one volume.

        Args:
            anatomy, size, spacing: as for `target`.
            seed: the same seed gives the same volume.
            options: solver, steps, eta, order, timestep_spacing and t_end, as for `meddiff.sampling.Sampler.sample`.

        Returns:
            The volume in Hounsfield units (CT) or in 0…1000 (MR). `volume.record` says how it came about: seed, solver,
            class, size, model, versions, seconds and peak memory of each stage.

        Raises:
            ValueError: for an unknown anatomy, or a size, spacing or option that does not fit.
            MemoryError: if decoding needs more memory than `memory_budget`, or than is free.
        """
        return self.decode_sample(*self._sample_target(anatomy, size, spacing, seed, options))

    @torch.inference_mode()
    def generate_to(
        self,
        out: str | Path,
        anatomy: str | None = None,
        size: int | Sequence[int] | None = None,
        *,
        spacing: Sequence[float] | None = None,
        seed: int = 0,
        **options: Any,
    ) -> dict[str, Any]:
        """`generate` straight into an uncompressed `.nii` and the `.json` beside it: the volume is never in memory.

        Finished slabs are written while others are decoded; whatever interrupts it leaves no file. The arguments and
        errors are `generate`'s, and VolumeError for another suffix. Returns the record.
        """
        out = Path(out)
        if out.suffix != ".nii":
            raise VolumeError(f"generate_to: {out}: the name must end in .nii; `generate` makes what can be compressed")
        latent, target, record = self._sample_target(anatomy, size, spacing, seed, options)
        meter, affine = StageMeter(self.autoencoder.device), np.diag([*target.spacing, 1.0])
        with meter.stage("decode"), stream_volume(out, target.size, affine, target.intensity) as on_slab:
            with on_device(self.autoencoder.device):
                self.autoencoder.decode_latent(latent, self.memory_budget, on_slab, progress=True)
        record = self._complete(record, target, meter)
        write_json(out.with_suffix(".json"), record)
        return record

    def _sample_target(
        self,
        anatomy: str | None,
        size: int | Sequence[int] | None,
        spacing: Sequence[float] | None,
        seed: int,
        options: dict[str, Any],
    ) -> tuple[Tensor, Target, dict[str, Any]]:
        """What `decode_sample` takes: latent, target and record."""
        target = self.target(anatomy, size, spacing)
        meter = StageMeter(self.device)
        with meter.stage("sample"):
            latent = self.sample(self.latent_size(target.size), target.class_index, seed=seed, **options)
        return latent, target, {"seed": seed, **self.settings(**options), "stages": meter.to_dicts()}

    def target(
        self,
        anatomy: str | None = None,
        size: int | Sequence[int] | None = None,
        spacing: Sequence[float] | None = None,
    ) -> Target:
        """Check what is to be generated, and fill in what is not given.

        Args:
            anatomy: a name of `config.anatomies`; None is the first.
            size: voxels along the file's axes X, Y, Z, or one number for all, multiples of `size_unit`; None is the
                anatomy's first size. A size for which the model was not trained works, with a warning.
            spacing: mm along X, Y, Z; None is the one of that size.

        Raises:
            ValueError: for an unknown anatomy, or a size or spacing that does not fit.
        """
        anatomies = self.config.anatomies
        anatomy = next(iter(anatomies)) if anatomy is None else anatomy
        if anatomy not in anatomies:
            raise ValueError(f"generate: unknown anatomy {anatomy!r}; this model knows {', '.join(anatomies)}")
        kind = anatomies[anatomy]
        if kind.class_index >= self.config.denoiser.num_classes:
            raise ValueError(f"generate: this model has no class {kind.class_index} ({anatomy})")
        size = kind.sizes()[0] if size is None else size
        size = (size,) * 3 if isinstance(size, int) else tuple(size)
        spacing = tuple(spacing) if spacing is not None else kind.spacing(size)
        self._check_size(size)
        if len(spacing) != 3 or not all(math.isfinite(mm) and mm > 0 for mm in spacing):
            raise ValueError(f"generate: spacing must be three positive mm (X, Y, Z), got {spacing}")
        if size not in kind.sizes():
            warnings.warn(
                f"generate: {anatomy} was trained at sizes {', '.join(map(str, kind.sizes()))}, not {size}; "
                "quality at other sizes is not known",
                stacklevel=3,
            )
        return Target(anatomy, kind.class_index, kind.modality, size, spacing)

    def latent_size(self, size: Sequence[int]) -> tuple[int, int, int]:
        """Voxels along X, Y, Z → extents D, H, W of the latent."""
        x, y, z = (n // self.config.autoencoder.downsample for n in size)
        return z, x, y

    def settings(self, **options: Any) -> dict[str, Any]:
        """How volumes are made, as JSON types, with all that was left open filled in. ValueError for a wrong option."""
        asked = resolve_sampling(self.schedule.config, **options)
        which = (asked[name] for name in ("solver", "steps", "timestep_spacing", "t_end"))
        timesteps = solver_timesteps(self.schedule, *which)
        return {
            **asked,
            "steps": len(timesteps),
            "model": {"source": self.source, "trained": self.trained, "sha256": self.fingerprint},
            "dtype": str(self.dtype).removeprefix("torch."),
        }

    def decode_sample(
        self,
        latent: Tensor,
        target: Target,
        record: dict[str, Any],
        *,
        correct: Callable[[Tensor], Tensor] | None = None,
        affine: np.ndarray | None = None,
        intensity: IntensityScale | None = None,
    ) -> Volume:
        """The volume of a sampled latent [1, 8, d, h, w], on the autoencoder's device; completes its record.

        `correct` replaces the decoded [1, 1, D, H, W] by another one; `affine` (float64 [4, 4] in mm, RAS+) and
        `intensity` put the volume into a place and a unit, if not those of the target.
        """
        meter = StageMeter(self.autoencoder.device)
        with meter.stage("decode"):
            tensor = self.decode_latent(latent)
            tensor = tensor if correct is None else correct(tensor)
        record = self._complete(record, target, meter)
        affine = np.diag([*target.spacing, 1.0]) if affine is None else affine
        return Volume.from_tensor(tensor, intensity=intensity or target.intensity, affine=affine, record=record)

    def _complete(self, record: dict[str, Any], target: Target, decoding: StageMeter) -> dict[str, Any]:
        return {
            "anatomy": target.anatomy,
            "class": target.class_index,
            "modality": target.modality,
            "size": list(target.size),
            "spacing_mm": list(target.spacing),
            **record,
            "device": _device_name(self.device),
            "versions": {name: version(name) for name in ("meddiff", "torch")},
            "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "stages": [*record["stages"], *decoding.to_dicts()],
        }

    @torch.inference_mode()
    def encode(self, volume: Volume) -> EncodedVolume:
        """Encode a volume patch by patch, keeping all that `decode` needs to give it back in place."""
        window = (volume.intensity.low, volume.intensity.high)
        with on_device(self.autoencoder.device):
            latent, indices, _ = self.autoencoder.encode_to_codes(
                volume.to_tensor(scaled=False), progress=True, window=window
            )
        return EncodedVolume(
            indices=indices[0].cpu(),
            latent=latent[0].cpu(),
            shape=volume.shape,
            affine=volume.affine,
            intensity=volume.intensity,
            source=volume.source,
            codebook_sha256=self._codebook_fingerprint,
        )

    @torch.inference_mode()
    def decode(self, encoded: EncodedVolume) -> Volume:
        """The volume of `encode`'s result, with the geometry and intensities of the one that was encoded.

        Raises ValueError if another autoencoder encoded it.
        """
        self._check_codebook(encoded)
        x, y, z = encoded.shape
        tensor = self._decode(encoded.indices[None])[..., :z, :x, :y]
        return Volume.from_tensor(tensor, intensity=encoded.intensity, affine=encoded.affine, source=encoded.source)

    @torch.inference_mode()
    def decode_to(self, out: str | Path, encoded: EncodedVolume) -> None:
        """`decode` straight into an uncompressed `.nii`: the volume is never in memory, and no half file is left.

        Raises VolumeError for another suffix, ValueError if another autoencoder encoded it.
        """
        self._check_codebook(encoded)
        with stream_volume(out, encoded.shape, encoded.affine, encoded.intensity, encoded.source) as on_slab:
            self.autoencoder.decode(
                encoded.indices[None], memory_budget=self.memory_budget, on_slab=on_slab, progress=True
            )

    def reconstruct(self, volume: Volume) -> Volume:
        """Encode, quantise and decode jointly: same size, affine, orientation, dtype and units as `volume`."""
        return self.decode(self.encode(volume))

    def reconstruct_to(self, out: str | Path, volume: Volume) -> None:
        """`reconstruct` straight into an uncompressed `.nii`, see `decode_to`."""
        self.decode_to(out, self.encode(volume))

    def _check_codebook(self, encoded: EncodedVolume) -> None:
        if encoded.codebook_sha256 != self._codebook_fingerprint:
            raise ValueError(
                "decode: this latent belongs to another codebook "
                f"(SHA-256 {encoded.codebook_sha256[:12]}…, this model's is {self._codebook_fingerprint[:12]}…); "
                "load the model that encoded it"
            )

    @cached_property
    def _codebook_fingerprint(self) -> str:
        return fingerprint(self.autoencoder.codebook)

    def _decode(self, indices: Tensor) -> Tensor:
        with on_device(self.autoencoder.device):
            tensor = self.autoencoder.decode(indices, memory_budget=self.memory_budget, progress=True)
            return tensor.float().clamp_(-1, 1)

    def _check_size(self, size: tuple[int, ...]) -> None:
        unit = self.size_unit
        if len(size) != 3 or any(not isinstance(n, int) or n < unit or n % unit for n in size):
            near = tuple(max(unit, round(n / unit) * unit) for n in size)
            raise ValueError(
                f"generate: size must be three multiples of {unit} voxels (X, Y, Z), got {size}; nearest is {near}"
            )


def _placement(device: str | torch.device | None, dtype: torch.dtype | None) -> tuple[torch.device, torch.dtype]:
    device = default_device() if device is None else torch.device(device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device {device} was asked for, and PyTorch sees no CUDA device; see `meddiff doctor`")
    if dtype == torch.float16 and device.type != "cuda":
        raise ValueError(f"dtype float16 is for GPUs, and the device is {device}; use bfloat16 or float32")
    return device, dtype or default_dtype(device)


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
