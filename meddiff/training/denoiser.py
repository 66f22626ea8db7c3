"""Training of BiFlowNet on the latents of `meddiff train latents` (Wang et al., TMI 2025, section III-C).

A batch holds latents of one size, batches of all sizes alternate: one network learns several resolutions.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from meddiff.checkpoint import load_component, save_model
from meddiff.models import BiFlowNet, PatchVolumeAutoencoder
from meddiff.report import save_comparison
from meddiff.sampling import RESOLUTION_UNIT, NoiseSchedule, sample_latent
from meddiff.training.ema import MovingAverage
from meddiff.training.engine import TrainingRun
from meddiff.training.latents import LatentDataset
from meddiff.training.losses import noise_loss
from meddiff.training.options import DenoiserTraining


def train_denoiser(options: DenoiserTraining) -> Path:
    """Run to the last step, going on from the last checkpoint, if there is one: L1 distance to the noise.

    Returns the model folder `out`/model: the autoencoder, and the moving average of the denoiser; or `out` where it
    stopped before. Raises ValueError and CheckpointError for options, latents and autoencoders that cannot be used,
    FloatingPointError when it diverges.
    """
    run = TrainingRun(options)
    accelerator = run.accelerator
    device = accelerator.device

    torch.manual_seed(options.seed)
    autoencoder = load_component(options.autoencoder, "autoencoder", device)
    denoiser = BiFlowNet(options.model)
    data = LatentDataset(options.data, options.model.channels)
    classes = {latent.class_index for latent in data.latents}
    if max(classes) >= options.model.num_classes:
        raise ValueError(
            f"train_denoiser: class {max(classes)} in {options.data}; num_classes must be larger than that"
        )
    schedule = NoiseSchedule(options.schedule).to(device)
    average = MovingAverage(denoiser, options.ema_decay, options.ema_every, options.ema_start).to(device)
    adam = torch.optim.Adam(denoiser.parameters(), options.learning_rate)
    model, optimizer = run.prepare(denoiser, adam)
    accelerator.register_for_checkpointing(average)
    start = run.resume()
    batches = run.batches(data, data.sizes, start)
    model.train()

    for step in run.steps(start, optimizer):
        x0, y = (part.to(device) for part in next(batches))
        noise = torch.randn_like(x0)
        t = schedule.draw_timesteps(len(x0), options.timestep_bias)
        resolution = x0.new_tensor(x0.shape[2:]) / RESOLUTION_UNIT
        with accelerator.autocast():
            estimate = model(schedule.add_noise(x0, t, noise), t, y, resolution)
        loss = noise_loss(estimate, noise, options.loss_scales, schedule.snr_weights(t, options.snr_gamma))
        run.descend(loss, model, optimizer)
        average.update(accelerator.unwrap_model(model), step)
        run.log(step, loss=loss)
        if preview := run.preview(step):
            size = data.sizes[0]
            volumes = [_sample(average.network, autoencoder, schedule, size, c, options) for c in sorted(classes)]
            save_comparison(volumes, preview)

    if not run.complete:
        return run.folder
    trained = run.folder / "model"
    if accelerator.is_main_process:
        anatomies = data.anatomies(autoencoder.config.downsample)
        networks = [network.to(getattr(torch, options.weights)) for network in (autoencoder, average.network)]
        save_model(trained, *networks, schedule.config, anatomies)
    accelerator.wait_for_everyone()
    return trained


@torch.no_grad()
def _sample(
    denoiser: BiFlowNet,
    autoencoder: PatchVolumeAutoencoder,
    schedule: NoiseSchedule,
    size: tuple[int, ...],
    class_index: int,
    options: DenoiserTraining,
) -> Tensor:
    """A sample [D, H, W] in [-1, 1]."""
    y = torch.tensor([class_index])
    steps = min(options.preview_steps, schedule.timesteps - schedule.config.t_end)
    latent = sample_latent(denoiser, schedule, size, y, solver="ddim", steps=steps, seed=options.seed)
    return autoencoder.decode_latent(latent)[0, 0].clamp(-1, 1)
