"""Training of a ControlNet on pairs of a volume and a condition made of it (Zhang et al. 2023, section 3.3).

The pairs are made once: the volume's latent, and as the condition the labels, the voxels of a first reconstruction, or
the latent of either. A batch holds pairs of one size. The base never changes, and its loss is the base's own.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from meddiff.checkpoint import LoadedModel, load_model, locate, save_controlnet, weights_sha256
from meddiff.config import ControlNetConfig, MasksConfig, TaskConfig, condition_channels
from meddiff.files import atomic_write
from meddiff.models import Control, ControlNet, PatchVolumeAutoencoder, SteeredDenoiser
from meddiff.progress import progress
from meddiff.report import save_comparison
from meddiff.resources import default_dtype
from meddiff.sampling import RESOLUTION_UNIT, NoiseSchedule, sample_latent
from meddiff.tasks import measure, network_input, one_hot, paint, reconstruct
from meddiff.training.data import ListedVolume, draw_seed, leave_out, list_volumes, preparation
from meddiff.training.ema import MovingAverage
from meddiff.training.engine import TrainingRun
from meddiff.training.latents import LatentDataset, latent_description
from meddiff.training.losses import noise_loss
from meddiff.training.options import ControlNetTraining


def train_controlnet(options: ControlNetTraining) -> Path:
    """Run to the last step, going on from the last checkpoint, if there is one: L1 distance to the noise.

    Returns the ControlNet's folder `out`/controlnet, which holds the moving average; or `out` where it stopped before.
    Raises ValueError and CheckpointError for options, data and bases that cannot be used, FloatingPointError when it
    diverges.
    """
    run = TrainingRun(options)
    accelerator = run.accelerator
    device = accelerator.device

    torch.manual_seed(options.seed)
    folder = locate(options.base)
    base, sha256 = load_model(folder, device), weights_sha256(folder)
    denoiser, autoencoder = base.denoiser, base.autoencoder.to(default_dtype(device))
    data = PairDataset(make_pairs(options, run, autoencoder, sha256), denoiser.config.channels)
    classes = {latent.class_index for latent in data.latents}
    if max(classes) >= denoiser.config.num_classes:
        raise ValueError(
            f"train_controlnet: class {max(classes)} in {options.data}, and the base has no such class; leave its "
            "volumes out, or steer a base that was trained on them"
        )
    task = data.with_means(options.task_config)
    network = ControlNet.from_denoiser(denoiser, _network_config(options, base))
    schedule = NoiseSchedule(base.schedule).to(device)
    average = MovingAverage(network, options.ema_decay, options.ema_every, options.ema_start).to(device)
    groups: dict[float, list[Tensor]] = {1.0: [], options.zero_conv_rate: []}
    for name, parameter in network.named_parameters():
        groups[options.zero_conv_rate if name.startswith(("entries.", "exits.")) else 1.0].append(parameter)
    groups = [{"params": parameters, "rate": rate} for rate, parameters in groups.items()]
    adam = torch.optim.Adam(groups, options.learning_rate)
    model, optimizer = run.prepare(network, adam)
    accelerator.register_for_checkpointing(average)
    start = run.resume()
    batches = run.batches(data, data.sizes, start)
    model.train()

    for step in run.steps(start, optimizer):
        x0, y, condition = (part.to(device) for part in next(batches))
        condition = _network_batch(condition, task, options.condition_encoder)
        noise = torch.randn_like(x0)
        t = schedule.draw_timesteps(len(x0), options.timestep_bias)
        resolution = x0.new_tensor(x0.shape[2:]) / RESOLUTION_UNIT
        with accelerator.autocast():
            steer = partial(model, condition=condition)
            estimate = denoiser(schedule.add_noise(x0, t, noise), t, y, resolution, steer)
        loss = noise_loss(estimate, noise, options.loss_scales, schedule.snr_weights(t, options.snr_gamma))
        run.descend(loss, model, optimizer)
        average.update(accelerator.unwrap_model(model), step)
        run.log(step, loss=loss)
        if preview := run.preview(step):
            save_comparison(_preview(data, task, average.network, base, schedule, options), preview)

    if not run.complete:
        return run.folder
    trained = run.folder / "controlnet"
    if accelerator.is_main_process:
        network = average.network.to(getattr(torch, options.weights))
        save_controlnet(
            trained, network, task, options.base, sha256, data.anatomies(base.autoencoder.config.downsample)
        )
    accelerator.wait_for_everyone()
    return trained


def _network_config(options: ControlNetTraining, base: LoadedModel) -> ControlNetConfig:
    encoder, denoiser = options.condition_encoder, base.denoiser.config
    return ControlNetConfig(
        denoiser=denoiser,
        encoder=encoder,
        channels=condition_channels(options.task_config, encoder, denoiser),
        widths=tuple(options.width * 2**level for level in range(base.autoencoder.config.levels)),
        copied=tuple(options.copied),
        enters=tuple(options.enters),
    )


def _network_batch(condition: Tensor, task: TaskConfig, encoder: str) -> Tensor:
    """Conditions as they are stored → what the network takes, float32 [B, C, …]."""
    if isinstance(task, MasksConfig) and encoder == "convolutional":
        return torch.stack([one_hot(labels, task) for labels in condition])
    return condition


def make_pairs(
    options: ControlNetTraining, run: TrainingRun, autoencoder: PatchVolumeAutoencoder, base_sha256: str
) -> Path:
    """Encode volumes and conditions that are not there yet, shared among the processes; returns their folder.

    Pairs are made anew when files, spacing, task or base change. Volumes are padded around with air to multiples of
    the patch and of 8 latent elements, before their condition is made.

    Raises ValueError where a volume has no anatomy, or no mask where the task is masks; VolumeError for a bad file
    where that is fatal.
    """
    accelerator, task = run.accelerator, options.task_config
    folder = run.folder / "cache" / "pairs"
    folder.mkdir(parents=True, exist_ok=True)
    masks = isinstance(task, MasksConfig)
    volumes = list_volumes(options.data, options.anatomy)
    for name, wanted in (("anatomy", True), ("label", masks)):
        without = [volume.file for volume in volumes if wanted and getattr(volume, name) is None]
        if without:
            raise ValueError(f"train_controlnet: {without[0]} has no {name}; list it in {options.data}")
    prepare, unit = preparation(options.spacing, masks), size_unit(autoencoder)
    pairs = [(volume, number) for volume in volumes for number in range(options.measurements)]
    names = []
    for i, (volume, number) in enumerate(progress("pairs")(pairs) if accelerator.is_main_process else pairs):
        origin = f"{volume} {volume.label} {_stamp(volume.file)} {_stamp(volume.label)} {number} {options.seed} "
        origin += f"{options.spacing} {task} {options.condition_encoder} {base_sha256}"
        names.append(f"{hashlib.sha256(origin.encode()).hexdigest()[:32]}.safetensors")
        if i % accelerator.num_processes != accelerator.process_index or (folder / names[-1]).exists():
            continue
        try:
            x = prepare(preparation_input(volume, masks))
        except Exception as error:
            leave_out(error, options.on_bad)
            continue
        image, _ = pad_around(x["image"][0], unit, -1)
        with torch.inference_mode():
            latent = autoencoder.codebook.latent_scale().scale(autoencoder.encode(image[None, None]))[0]
        if masks:
            labels = pad_around(x["label"][0], unit, 0)[0].to(torch.uint8)
            try:
                hot = one_hot(labels, task)
            except ValueError as error:
                raise ValueError(f"train_controlnet: {volume.label}: {error}") from None
            sums, voxels = (part.sum((1, 2, 3)) for part in (hot * image, hot))
            condition, tensors = labels, {"tissue_sums": sums, "tissue_voxels": voxels}
        else:
            condition, tensors = reconstruct(measure(image, task, draw_seed(options.seed, i)), task), {}
        # labels are stored as they are: one-hot they are many times as large
        if not masks or options.condition_encoder == "latent":
            condition = network_input(condition, task, options.condition_encoder, autoencoder)[0].cpu()
        tensors["condition"] = condition
        tensors = {name: tensor.contiguous() for name, tensor in (tensors | {"latent": latent.cpu()}).items()}
        description = latent_description(volume.anatomy, options.spacing or x["mm"])
        with atomic_write(folder / names[-1]) as temporary:
            save_file(tensors, temporary, description)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        for path in folder.glob("*.safetensors"):
            if path.name not in names:
                path.unlink()
    accelerator.wait_for_everyone()
    return folder


def size_unit(autoencoder: PatchVolumeAutoencoder) -> int:
    """Voxels of which volumes are multiples along each axis: whole patches, and 8 latent elements."""
    return math.lcm(autoencoder.config.patch_size, 8 * autoencoder.config.downsample)


def pad_around(x: Tensor, unit: int, value: float) -> tuple[Tensor, tuple[slice, ...]]:
    """x [D, H, W] in the middle of multiples of `unit`, and the place where it is."""
    missing = [-n % unit for n in x.shape]
    margins = [side for n in reversed(missing) for side in (n // 2, n - n // 2)]
    return F.pad(x, margins, value=value), tuple(slice(m // 2, m // 2 + n) for m, n in zip(missing, x.shape))


def preparation_input(volume: ListedVolume, label: bool) -> dict[str, Any]:
    """What `preparation` takes."""
    item = {"image": volume.file, "modality": volume.modality, "low": volume.low, "high": volume.high}
    return item | ({"label": volume.label} if label else {})


def _stamp(file: str | None) -> str:
    try:
        status = Path(file).stat() if file else None
        return f"{status.st_size} {status.st_mtime_ns}" if status else ""
    except OSError:
        return "missing"  # Volume.load says why


class PairDataset(LatentDataset):
    """The pairs of a folder, in memory. `dataset[index, seed]` → latent, class, condition; the seed is not used."""

    def __init__(self, folder: str | Path, channels: int) -> None:
        super().__init__(folder, channels)
        self.conditions, self.tissues = [], []
        for file in sorted(Path(folder).glob("*.safetensors")):
            with safe_open(file, framework="pt") as stored:
                self.conditions.append(stored.get_tensor("condition"))
                if "tissue_sums" in stored.keys():  # noqa: SIM118 (not a dict)
                    self.tissues.append(torch.stack([stored.get_tensor(f"tissue_{n}") for n in ("sums", "voxels")]))

    def with_means(self, task: TaskConfig) -> TaskConfig:
        """The task with the mean intensity of each tissue, where it has tissues.

        Raises ValueError for a tissue that no mask has.
        """
        if not isinstance(task, MasksConfig):
            return task
        sums, voxels = torch.stack(self.tissues).double().sum(0)
        absent = [tissue for tissue, count in zip(task.tissues, voxels) if count == 0]
        if absent:
            raise ValueError(f"train_controlnet: no mask holds {', '.join(absent)}; name the tissues that there are")
        return dataclasses.replace(task, means=tuple((sums / voxels).tolist()))

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, int, Tensor]:
        return (*super().__getitem__(key), self.conditions[key[0]])


@torch.no_grad()
def _preview(
    data: PairDataset,
    task: TaskConfig,
    network: ControlNet,
    base: LoadedModel,
    schedule: NoiseSchedule,
    options: ControlNetTraining,
) -> list[Tensor]:
    """Condition, sample and truth of the first pair, [D, H, W] in [-1, 1] each."""
    x0, y, condition = data[0, 0]
    entering = _network_batch(condition[None], task, options.condition_encoder)
    steered = SteeredDenoiser(base.denoiser, [Control(network, entering)])
    sampling = {
        "solver": "ddim",
        "steps": min(options.preview_steps, schedule.timesteps - schedule.config.t_end),
        "seed": options.seed,
    }
    sample = sample_latent(steered, schedule, x0.shape[1:], torch.tensor([y]), **sampling)

    def decode(latent: Tensor) -> Tensor:
        return base.autoencoder.decode_latent(latent)[0, 0].float().clamp(-1, 1)

    if options.condition_encoder == "latent":
        shown = decode(condition[None])
    else:
        shown = paint(condition, task) if isinstance(task, MasksConfig) else condition[0]
    return [shown.to(sample.device), decode(sample), decode(x0[None])]
