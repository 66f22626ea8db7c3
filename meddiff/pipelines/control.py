"""Generation that ControlNets steer: conditions from files, their checks, data consistency."""

from __future__ import annotations

import json
import math
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from meddiff.checkpoint import load_controlnet, weights_sha256
from meddiff.config import Anatomy, MasksConfig, SparseViewCTConfig, TaskConfig, task_from_dict, task_to_dict
from meddiff.files import atomic_write
from meddiff.models import Control, ControlNet, SteeredDenoiser
from meddiff.pipelines.model import MedDiffusion, Target
from meddiff.resources import StageMeter, on_device
from meddiff.sampling import sample_latent
from meddiff.tasks import Measurement, impose, is_measured, measure, network_input, reconstruct
from meddiff.volume import IntensityScale, Volume, file_to_tensor_axes, require_same_grid

_FORMAT = "meddiff-measurement-1"
_SPACING_TOLERANCE = 0.02  # relative


@dataclass(frozen=True)
class TrainedControl:
    """A ControlNet that was trained for a model, loaded for it.

    network:   `ControlNet`, of the model's device and dtype
    task:      what its condition is
    anatomies: what it was trained on
    source:    the folder it came from
    """

    network: ControlNet
    task: TaskConfig
    anatomies: Mapping[str, Anatomy]
    source: str

    @classmethod
    def from_pretrained(cls, source: str | Path, model: MedDiffusion) -> TrainedControl:
        """Load a ControlNet's folder, or a repository of the Hugging Face hub, for the model that it steers.

        Raises CheckpointError for a missing, damaged or foreign ControlNet, ValueError for one of another base.
        """
        loaded = load_controlnet(source, model.device, model.dtype)
        found = weights_sha256(model.source) if model.trained else None
        if found != loaded.base_sha256:
            this = f"{found[:12]}…" if found else "random weights"
            raise ValueError(
                f"control: {source} steers {loaded.base!r} (SHA-256 {loaded.base_sha256[:12]}…), and this model is "
                f"{model.source!r} ({this}); load the base that it was trained for"
            )
        return cls(loaded.network, loaded.task, loaded.anatomies, str(source))


@dataclass(frozen=True, eq=False)
class Condition:
    """What a ControlNet is given, on the grid of the volume to generate.

    values:      [D, H, W]: integer labels, or an image in [-1, 1]
    shape:       voxels along X, Y, Z
    affine:      float64 [4, 4] in mm, RAS+
    intensity:   units of the image, and of the volume to generate; None for labels
    name:        for messages and the record
    measurement: what data consistency imposes, or None
    """

    values: Tensor
    shape: tuple[int, int, int]
    affine: np.ndarray
    intensity: IntensityScale | None
    name: str
    measurement: Measurement | None = None

    @classmethod
    def load(cls, path: str | os.PathLike[str], task: TaskConfig, window: tuple | None = None) -> Condition:
        """Read the condition of a task: a mask or a first reconstruction (NIfTI), or a measurement (.safetensors).

        window: original intensities of a reconstruction that become -1 and 1; None as for `Volume.load`.

        Raises VolumeError or ValueError, naming the file, for one that is missing, damaged or of another task.
        """
        path = Path(path)
        if path.suffix == ".safetensors":
            return cls._load_measurement(path, task)
        if isinstance(task, MasksConfig):
            volume = Volume.load_labels(path)
            labels = torch.from_numpy(file_to_tensor_axes(volume.data).astype(np.int64))
            return cls(labels, volume.shape, volume.affine, None, str(path))
        volume = Volume.load(path, "CT" if isinstance(task, SparseViewCTConfig) else "MR", window)
        return cls(volume.to_tensor()[0, 0], volume.shape, volume.affine, volume.intensity, str(path))

    @classmethod
    def simulate(cls, volume: Volume, task: TaskConfig, seed: int = 0) -> Condition:
        """What a scanner would have measured of a volume. Raises ValueError for a task without a measurement."""
        if not is_measured(task):
            raise ValueError(f"Condition.simulate: {type(task).__name__} has no measurement; give a mask")
        measured = measure(volume.to_tensor()[0, 0], task, seed)
        name = f"{volume.source.path if volume.source else 'a volume'}, measured"
        return cls._of_measurement(measured, task, volume.shape, volume.affine, volume.intensity, name)

    @classmethod
    def _of_measurement(cls, measured, task, shape, affine, intensity, name) -> Condition:
        return cls(reconstruct(measured, task), shape, affine, intensity, name, measured)

    def save(self, path: str | os.PathLike[str], task: TaskConfig) -> None:
        """Write the measurement to a `.safetensors` file, atomically.

        Raises ValueError without a measurement or for another suffix, OSError if writing fails.
        """
        path = Path(path)
        if self.measurement is None or path.suffix != ".safetensors":
            raise ValueError(f"Condition.save: {path}: needs a measurement, and a name that ends in .safetensors")
        data, sampling, size = self.measurement
        description = {
            "task": task_to_dict(task),
            "size": list(size),
            "affine": np.asarray(self.affine).tolist(),
            "intensity": [self.intensity.low, self.intensity.high, self.intensity.modality],
        }
        tensors = {"data": torch.view_as_real(data) if data.is_complex() else data, "sampling": sampling}
        tensors = {name: tensor.contiguous().cpu() for name, tensor in tensors.items()}
        with atomic_write(path) as temporary:
            save_file(tensors, temporary, {"format": _FORMAT, "description": json.dumps(description)})

    @classmethod
    def _load_measurement(cls, path: Path, task: TaskConfig) -> Condition:
        if not path.is_file():
            raise FileNotFoundError(f"Condition.load: {path}: no such file")
        try:
            with safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("format") != _FORMAT:
                    raise ValueError("not a measurement (meddiff measure writes them)")
                described = json.loads(metadata["description"])
                data, sampling = file.get_tensor("data"), file.get_tensor("sampling")
            if type(task_from_dict(described["task"])) is not type(task):
                names = described["task"]["name"], task_to_dict(task)["name"]
                raise ValueError(f"a measurement of task {names[0]}, and the ControlNet's is {names[1]}")
            d, h, w = size = tuple(int(n) for n in described["size"])
            if min(size) < 1 or not torch.isfinite(data).all():
                raise ValueError("its size or its data are not sound")
            if isinstance(task, SparseViewCTConfig):
                sound = data.ndim == 3 and data.shape[::2] == (d, len(sampling)) and data.shape[1] >= math.hypot(h, w)
            else:
                sound = data.shape == (*size, 2) and sampling.shape == (w,) and sampling.dtype == torch.bool
                data = torch.view_as_complex(data) if sound else data
            if not sound:
                raise ValueError(f"its data {tuple(data.shape)} and its size {size} disagree")
            affine, intensity = np.array(described["affine"], np.float64), IntensityScale(*described["intensity"])
            measured = Measurement(data, sampling, size)
            return cls._of_measurement(measured, task, (h, w, d), affine, intensity, str(path))
        except (SafetensorError, ValueError, KeyError, TypeError, RuntimeError) as error:
            raise ValueError(f"Condition.load: {path}: {error!s:.300}; measure again") from error


Steering = tuple[TrainedControl, Condition, float]  # and the strength


def generate_controlled(
    model: MedDiffusion,
    steering: Sequence[Steering],
    anatomy: str | None = None,
    size: Sequence[int] | None = None,
    *,
    spacing: Sequence[float] | None = None,
    seed: int = 0,
    consistency: bool = True,
    **options: Any,
) -> Volume:
    """Generate the volume that the conditions ask for, in their place.

    Args:
        steering: ControlNets with their conditions and strengths; several add up.
        anatomy: a name that all of them were trained on; None is the first one's first.
        size, spacing: along X, Y, Z, as a check: the conditions have them.
        seed: the same seed gives the same volume.
        consistency: impose what was measured on each step's clean volume and on the result, where there are
            measurements.
        options: solver, steps, eta, order, timestep_spacing and t_end, as for `MedDiffusion.generate`.

    Returns:
        The volume, with the affine of the conditions and the units of the first one that has any, else as
        `MedDiffusion.generate`. `volume.record` says how it came about.

    Raises:
        ValueError: for no condition, conditions that are not aligned with one another, and sizes, spacings and
            anatomies that a ControlNet was not made for.
        MemoryError: if decoding needs more memory than is free.
    """
    if not steering:
        raise ValueError("generate: a ControlNet needs a condition, and there is none")
    (first, condition, _), *others = steering
    for _, other, _ in others:
        grid = (condition.shape, condition.affine)
        require_same_grid(f"generate: {other.name}", (other.shape, other.affine), condition.name, grid)
    anatomy = next(iter(first.anatomies)) if anatomy is None else anatomy
    for control, _, _ in steering:
        _check_grid(model, control, condition, anatomy)
    mm = tuple(np.linalg.norm(condition.affine[:3, :3], axis=0).round(4).tolist())
    for name, wanted, found in (("size", size, condition.shape), ("spacing", spacing, mm)):
        if wanted is not None and not np.allclose(wanted, found, rtol=1e-3):
            raise ValueError(f"generate: {name} {tuple(wanted)} was asked for, and {condition.name} has {found}")
    kind = first.anatomies[anatomy]

    target = Target(anatomy, kind.class_index, kind.modality, condition.shape, mm)
    agree = _agreement(steering, consistency)
    meter = StageMeter(model.device)
    with meter.stage("sample"):
        latent = _sample(model, steering, kind.class_index, agree, seed, options)
    controls = [
        {
            "source": control.source,
            "task": task_to_dict(control.task),
            "condition": other.name,
            "strength": strength,
            "consistency": consistency and other.measurement is not None,
        }
        for control, other, strength in steering
    ]
    record = {"seed": seed, **model.settings(**options), "controls": controls, "stages": meter.to_dicts()}
    intensity = next((other.intensity for _, other, _ in steering if other.intensity is not None), None)
    return model.decode_sample(latent, target, record, correct=agree, affine=condition.affine, intensity=intensity)


def _check_grid(model: MedDiffusion, control: TrainedControl, condition: Condition, anatomy: str) -> None:
    known = control.anatomies
    if anatomy not in known:
        raise ValueError(f"generate: {control.source} was trained on {', '.join(known)}, not on {anatomy!r}")
    unit, shape = model.size_unit, condition.shape
    if any(n % unit for n in shape):
        near = tuple(max(unit, round(n / unit) * unit) for n in shape)
        raise ValueError(
            f"generate: {condition.name}: its axes must be multiples of {unit} voxels, got {shape}; crop or pad it to "
            f"{near}, for example"
        )
    mm = np.linalg.norm(condition.affine[:3, :3], axis=0)
    trained = sorted({spacing for _, spacing in known[anatomy].volumes})
    if not any(np.allclose(mm, spacing, rtol=_SPACING_TOLERANCE) for spacing in trained):
        raise ValueError(
            f"generate: {condition.name}: its spacing is {tuple(mm.round(4).tolist())} mm, and {control.source} was "
            f"trained at {', '.join(map(str, trained))}; resample it"
        )
    if shape not in known[anatomy].sizes():
        warnings.warn(
            f"generate: {control.source} was trained at sizes {', '.join(map(str, known[anatomy].sizes()))}, "
            f"not {shape}; quality at other sizes is not known",
            stacklevel=4,
        )


def sample_controlled(
    model: MedDiffusion,
    steering: Sequence[Steering],
    class_index: int,
    *,
    seed: int = 0,
    consistency: bool = True,
    **options: Any,
) -> Tensor:
    """The volume that the conditions ask for, float32 [1, 1, D, H, W] in [-1, 1], or where a measurement was imposed,
    about so. Arguments as for `generate_controlled`."""
    agree = _agreement(steering, consistency)
    tensor = model.decode_latent(_sample(model, steering, class_index, agree, seed, options))
    return tensor if agree is None else agree(tensor)


def _agreement(steering: Sequence[Steering], consistency: bool) -> Callable[[Tensor], Tensor] | None:
    """What makes a volume [1, 1, D, H, W] agree with all that was measured; None if there is nothing to impose."""
    measured = [(c.measurement, control.task) for control, c, _ in steering if c.measurement and consistency]

    @torch.inference_mode()
    def agree(x: Tensor) -> Tensor:
        for measurement, task in measured:
            x = impose(x[0, 0], measurement, task)[None, None]
        return x

    return agree if measured else None


def _sample(
    model: MedDiffusion,
    steering: Sequence[Steering],
    class_index: int,
    agree: Callable[[Tensor], Tensor] | None,
    seed: int,
    options: dict[str, Any],
) -> Tensor:
    """The latent float32 [1, 8, d, h, w], in the denoiser's range."""
    autoencoder, shape = model.autoencoder, steering[0][1].shape
    with torch.inference_mode():
        controls = []
        for control, condition, strength in steering:
            with on_device(autoencoder.device):
                given = network_input(
                    condition.values, control.task, control.network.control_config.encoder, autoencoder
                )
            with on_device(model.device):
                controls.append(Control(control.network, given, strength))
    return sample_latent(
        SteeredDenoiser(model.denoiser, controls),
        model.schedule,
        model.latent_size(shape),
        torch.tensor([class_index]),
        seed=seed,
        correct_x0=None if agree is None else latent_correction(model, agree),
        progress=True,
        **options,
    )


def latent_correction(model: MedDiffusion, agree: Callable[[Tensor], Tensor]) -> Callable[[Tensor, int], Tensor]:
    """What `sample_latent` takes as correct_x0: the latent moves by what `agree` changes in the decoded volume.

    It is the difference of two encodings, so that what the autoencoder loses on the way there and back cancels, and a
    volume that agrees already stays as it is. agree: [1, 1, D, H, W] about [-1, 1] → the same.
    """
    autoencoder = model.autoencoder
    scale = autoencoder.codebook.latent_scale()

    def correct(x0: Tensor, step: int) -> Tensor:
        d, h, w = x0.shape[2:]
        with on_device(autoencoder.device):
            volume = autoencoder.decode_latent(x0, model.memory_budget).float().clamp(-1, 1)
            after, before = (autoencoder.encode(v) for v in (agree(volume).clamp(-1, 1), volume))
            moved = (scale.scale(after) - scale.scale(before))[..., :d, :h, :w]
        return x0 + moved.to(x0.device)

    return correct
