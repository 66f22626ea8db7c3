"""Training of the Patch-Volume autoencoder (Wang et al., TMI 2025, section III-B).

Stage 1 learns everything on random patches. Stage 2 freezes encoder, `pre_vq_conv` and codebook, and learns the decoder
and `post_vq_conv` on the stitched latents of whole volumes, so that patches join without seams.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from meddiff.checkpoint import load_component, save_component
from meddiff.conversion import read_discriminator
from meddiff.files import atomic_write
from meddiff.models import PatchVolumeAutoencoder
from meddiff.models.autoencoder import AttentionBlock, ResBlock
from meddiff.report import save_comparison
from meddiff.training.data import VolumeDataset, list_volumes, patch_draw, volume_draw
from meddiff.training.discriminator import PatchDiscriminator
from meddiff.training.engine import TrainingRun
from meddiff.training.losses import (
    adversarial_loss,
    commitment_loss,
    feature_matching_loss,
    hinge_loss,
    load_perceptual,
)
from meddiff.training.options import AutoencoderTraining

_BETAS = (0.5, 0.9)
_PROBES = 8  # random directions that measure the decoder's derivative


class _Reconstruction(nn.Module):
    """One forward pass of a stage, as one module, so that DDP can wrap it."""

    def __init__(self, autoencoder: PatchVolumeAutoencoder, options: AutoencoderTraining) -> None:
        super().__init__()
        self.autoencoder = autoencoder
        self.options = options
        if options.stage == 2:
            for frozen in (autoencoder.encoder, autoencoder.pre_vq_conv):
                frozen.requires_grad_(False)

    def forward(self, x: Tensor, quantize: bool = True) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """x [B, 1, D, H, W] → reconstruction, latent, code rows, in stage 1 the codes' statistics."""
        a, statistics = self.autoencoder, None
        if not quantize:
            z = rows = a.pre_vq_conv(a.encoder(x))
        elif self.options.stage == 1:
            features = a.encoder(x)  # a patch is a volume of its own
            if not a.codebook.initialised:
                if self.options.quantize_start:
                    equalize_latents(a, features)
                a.codebook.initialise(a.pre_vq_conv(features.detach()), self.options.least_use)
            z, _, rows, statistics = a.quantize_patches(features, features.shape[2:], statistics=True)
        else:
            with torch.no_grad():
                z, _, rows = a.encode_to_codes(x)
        return a.decoder(a.post_vq_conv(rows)).float(), z, rows, statistics


@torch.no_grad()
def initialise(autoencoder: PatchVolumeAutoencoder) -> None:
    """Random weights to begin with: convolutions that keep the variance, and residual branches that are zero (Goyal et
    al. 2017). An autoencoder that is almost linear soon finds all directions of the latent that matter."""
    for module in autoencoder.modules():
        if isinstance(module, nn.Conv3d | nn.ConvTranspose3d):
            inputs = module.in_channels * math.prod(module.kernel_size)
            if isinstance(module, nn.ConvTranspose3d):
                inputs //= math.prod(module.stride)
            nn.init.normal_(module.weight, std=inputs**-0.5)
            nn.init.zeros_(module.bias)
    for module in autoencoder.modules():
        if isinstance(module, ResBlock | AttentionBlock):
            nn.init.zeros_(module.conv2.weight if isinstance(module, ResBlock) else module.to_out.weight)


@torch.enable_grad()
def equalize_latents(autoencoder: PatchVolumeAutoencoder, features: Tensor) -> None:
    """Give the latent the basis in which equal distances change the reconstruction equally, on average.

    The nearest code is then the one that changes it least. Without it an encoder that has never met a codebook may
    keep what matters in directions that are short beside others, where a code is blind to it. With J the decoder's
    derivative the basis is the root of E[JᵀJ], and latents get mean 0 and variance 1; `pre_vq_conv` takes it in and
    `post_vq_conv` its inverse, so that the reconstruction without quantisation stays what it is.

    Args:
        autoencoder: changed in place, on every process of torch.distributed alike.
        features: [n, 8, q, q, q], the encoder's outputs of patches.
    """
    pre, post = autoencoder.pre_vq_conv, autoencoder.post_vq_conv
    z = pre(features.detach()).float().detach().requires_grad_()
    y = autoencoder.decoder(post(z))
    tokens = z.detach().movedim(1, -1).flatten(0, -2).double()
    mean = _mean_over_processes(tokens.mean(0))
    covariance = _mean_over_processes((tokens - mean).T @ (tokens - mean) / len(tokens))
    metric = torch.zeros_like(covariance)
    for _ in range(_PROBES):  # Jᵀu of random u has the covariance E[JᵀJ]
        (slope,) = torch.autograd.grad(y, z, torch.randn_like(y), retain_graph=True)
        tokens = slope.movedim(1, -1).flatten(0, -2).double()
        metric += tokens.T @ tokens
    values, vectors = torch.linalg.eigh(_mean_over_processes(metric))
    values = values.clamp_min(values[-1] * 1e-6)  # of a direction that the decoder ignores
    basis = (vectors * values.sqrt()) @ vectors.T
    basis /= ((basis @ covariance @ basis.T).trace() / len(basis)).sqrt()
    _change_basis(autoencoder, basis, basis @ mean)


@torch.no_grad()
def spread_codes(autoencoder: PatchVolumeAutoencoder) -> None:
    """Turn and shift the latent so that its codes fill the denoiser's range; reconstructions stay what they are.

    The range is set by the two extremes of all codes in all channels, so that a channel of large numbers, or one that
    lies off centre, leaves latents that are small beside the noise. Turned by their principal axes and then by a
    Hadamard matrix all channels have the variance of the mean, and each is shifted to lie around 0. Distances, and with
    them the nearest codes, do not change. Raises ValueError where the channels are no power of two.
    """
    book = autoencoder.codebook
    codes, use = book.embeddings.double(), book.N.double() / book.N.double().sum()
    away = codes - use @ codes
    _, axes = torch.linalg.eigh(away.T @ (use[:, None] * away))
    turn = _hadamard(len(axes)).to(axes) @ axes.T
    turned = codes @ turn.T
    offset = (turned.amax(0) + turned.amin(0)) / 2
    book.z_avg.copy_(book.z_avg.double() @ turn.T - book.N.double()[:, None] * offset)
    book.embeddings.copy_(turned - offset)
    _change_basis(autoencoder, turn, offset)


def _hadamard(size: int) -> Tensor:
    """Orthogonal, float64, all of its numbers of one magnitude. ValueError for a size that is no power of two."""
    if size & (size - 1):
        raise ValueError(f"spread_codes wants 2, 4, 8, 16, … latent channels, not {size}")
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)]) / 2**0.5
    return matrix


@torch.no_grad()
def _change_basis(autoencoder: PatchVolumeAutoencoder, basis: Tensor, offset: Tensor) -> None:
    """From latents z to `basis` z - `offset`, float64 [8, 8] and [8]: `pre_vq_conv` takes it in, `post_vq_conv` the
    inverse."""
    pre, post = autoencoder.pre_vq_conv, autoencoder.post_vq_conv
    post_weight = post.weight.double().flatten(1) @ basis.inverse()
    post.bias.add_(post_weight @ offset)
    post.weight.copy_(post_weight.view_as(post.weight))
    pre.bias.copy_(basis @ pre.bias.double() - offset)
    pre.weight.copy_((basis @ pre.weight.double().flatten(1)).view_as(pre.weight))


def _mean_over_processes(tensor: Tensor) -> Tensor:
    if dist.is_initialized():
        dist.all_reduce(tensor)
        tensor /= dist.get_world_size()
    return tensor


def train_autoencoder(options: AutoencoderTraining) -> Path:
    """Run a stage to its last step, going on from the last checkpoint, if there is one.

    Returns the folder with the trained autoencoder, `out`/autoencoder, or `out` where it stopped before. Raises
    ValueError, VolumeError and CheckpointError for options, data and initial weights that cannot be used,
    FloatingPointError when it diverges.
    """
    run = TrainingRun(options, shardable=False)
    accelerator = run.accelerator
    device = accelerator.device

    torch.manual_seed(options.seed)
    if options.initial is None:
        autoencoder = PatchVolumeAutoencoder(options.model)
        initialise(autoencoder)
    else:
        autoencoder = load_component(options.initial, "autoencoder").requires_grad_(True)
    config = autoencoder.config
    if options.stage == 2 and not autoencoder.codebook.initialised:
        raise ValueError(f"train_autoencoder: {options.initial}: its codebook was never trained; run stage 1 first")
    if options.spread_codes:
        _hadamard(config.embedding_dim)  # what it refuses, it refuses before the training
    model = _Reconstruction(autoencoder, options)
    discriminator = PatchDiscriminator(config.image_channels)
    if options.discriminator is not None:
        discriminator.load_state_dict(read_discriminator(options.discriminator, discriminator.state_dict()))
    adam = [
        torch.optim.Adam([p for p in part.parameters() if p.requires_grad], options.learning_rate, _BETAS)
        for part in (model, discriminator)
    ]
    perceptual = load_perceptual(options.perceptual, options.perceptual_weights)
    perceptual = perceptual and perceptual.to(device)

    if options.stage == 2:
        draw = volume_draw(options.volume_size, config.patch_size)
    else:
        draw = patch_draw(config.patch_size, options.patches_per_volume, options.turns)
    volumes = list_volumes(options.data)
    with accelerator.main_process_first():
        data = VolumeDataset(volumes, options.cache or run.folder / "cache", draw, options.spacing, options.on_bad)
    model, optimizer = run.prepare(model, adam[0])
    discriminator, discriminator_optimizer = run.prepare(discriminator, adam[1])
    start = run.resume()
    buckets = data.shapes if options.stage == 2 and options.volume_size is None else [0] * len(data)
    batches = run.batches(data, buckets, start)
    codebook = autoencoder.codebook
    model.train(), discriminator.train()

    for step in run.steps(start, optimizer, discriminator_optimizer):
        x = next(batches).flatten(0, 1).to(device)
        adversarial = options.discriminator_start is not None and step >= options.discriminator_start
        generating = not adversarial or (step - options.discriminator_start) % 2 == 0

        quantized = step >= options.quantize_start or options.stage == 2

        if generating:
            y, z, rows, statistics = model(x, quantized)
            losses = {"l1": F.l1_loss(y, x)}
            loss = options.l1_weight * losses["l1"]
            if statistics is not None:
                losses["commitment"] = commitment_loss(z, rows)
                loss = loss + losses["commitment"]
            if perceptual is not None:
                losses["perceptual"] = perceptual(y, x)
                loss = loss + options.perceptual_weight * losses["perceptual"]
            if adversarial:
                discriminator.requires_grad_(False)
                logits, features = discriminator(y)
                with torch.no_grad():
                    _, real_features = discriminator(x)
                discriminator.requires_grad_(True)
                losses["adversarial"] = adversarial_loss(logits)
                losses["feature_matching"] = feature_matching_loss(real_features, features)
                loss = loss + options.adversarial_weight * losses["adversarial"]
                loss = loss + options.feature_weight * losses["feature_matching"]
            run.descend(loss, model, optimizer)
            if statistics is not None:
                losses["perplexity"] = codebook.update(z.detach(), statistics, options.least_use)
            losses["psnr"] = -10 * torch.log10((y - x).detach().square().mean() / 4)
            run.log(step, loss=loss, **losses)
            if preview := run.preview(step):
                save_comparison([x[0, 0], y[0, 0]], preview)
        else:
            with torch.no_grad():
                y = model(x, quantized)[0]
            (real, _), (fake, _) = discriminator(x), discriminator(y)
            loss = hinge_loss(real, fake)
            run.descend(loss, discriminator, discriminator_optimizer)
            run.log(step, discriminator=loss)

    if not run.complete:
        return run.folder
    trained = run.folder / "autoencoder"
    if accelerator.is_main_process:
        if options.stage == 1 and options.spread_codes:
            spread_codes(accelerator.unwrap_model(model).autoencoder)
        save_component(trained, "autoencoder", accelerator.unwrap_model(model).autoencoder)
        if options.discriminator_start is not None:
            weights = {k: v.cpu() for k, v in accelerator.unwrap_model(discriminator).state_dict().items()}
            with atomic_write(run.folder / "discriminator.safetensors") as temporary:
                save_file(weights, temporary)
    accelerator.wait_for_everyone()
    return trained
