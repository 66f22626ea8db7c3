"""Options of the training commands. Light to import: the command line shows them without loading PyTorch."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Literal

from meddiff.config import (
    AutoencoderConfig,
    DenoiserConfig,
    FastMRIConfig,
    MasksConfig,
    ScheduleConfig,
    SparseViewCTConfig,
    TaskConfig,
)


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """What every training run needs.

    Args:
        out: Folder of the run; a run that stopped goes on from its last checkpoint.
        steps: Optimiser steps in all.
        stop: Step after which the run stops, to go on another time; by default it goes to its end.
        batch_size: Samples per step and process.
        learning_rate: Of Adam.
        final_learning_rate: Where a cosine decay over all steps ends; by default the rate is constant.
        seed: The same seed gives the same run on the same machine.
        mixed_precision: no, bf16 or fp16.
        gradient_clip: Largest norm of the gradient; by default no limit.
        save_every: Steps between checkpoints.
        keep: Checkpoints that are kept.
        log_every: Steps between lines of stats.jsonl.
        preview_every: Steps between previews; by default none.
        workers: Processes that load data, for each training process.
    """

    out: str
    steps: int
    stop: int | None = None
    batch_size: int = 2
    learning_rate: float = 3e-4
    final_learning_rate: float | None = None
    seed: int = 0
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    gradient_clip: float | None = None
    save_every: int = 500
    keep: int = 2
    log_every: int = 10
    preview_every: int | None = None
    workers: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "stop", "batch_size", "save_every", "keep", "log_every"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{type(self).__name__}: {name} must be at least 1, got {getattr(self, name)}")
        if not self.learning_rate > 0:
            raise ValueError(f"{type(self).__name__}: learning_rate must be positive, got {self.learning_rate}")
        if self.final_learning_rate is not None and not 0 <= self.final_learning_rate <= self.learning_rate:
            raise ValueError(
                f"{type(self).__name__}: final_learning_rate must lie in [0, {self.learning_rate}], "
                f"got {self.final_learning_rate}"
            )

    def learning_rate_at(self, step: int) -> float:
        """The learning rate of a step, counted from 0."""
        if self.final_learning_rate is None:
            return self.learning_rate
        share = (1 + math.cos(math.pi * step / self.steps)) / 2
        return self.final_learning_rate + share * (self.learning_rate - self.final_learning_rate)


@dataclass(frozen=True, kw_only=True)
class AutoencoderTraining(RunOptions):
    """Train the autoencoder: stage 1 on patches, stage 2 on whole volumes.

    Args:
        data: Folder of NIfTI files, or a .csv or .json list with `file` and perhaps modality, low and high.
        stage: 1 (patches, all weights) or 2 (whole volumes, decoder only).
        initial: Autoencoder folder to begin with; stage 2 needs the one that stage 1 wrote.
        model: Of a new autoencoder; not used with initial.
        spacing: mm along X, Y, Z to which volumes are resampled; by default they stay as they are.
        patches_per_volume: Random patches of each volume drawn (stage 1).
        turns: Whether patches are flipped and turned by 90° at random (stage 1).
        volume_size: Voxels along X, Y, Z, multiples of the patch, to which whole volumes are cropped or padded (stage
            2); by default they keep their size, padded to multiples of the patch, and a batch holds those of one size.
        on_bad: Whether a file that cannot be used is fatal, or named and skipped.
        cache: Folder for prepared volumes; by default in out.
        quantize_start: Step at which quantisation starts (stage 1). Until then the decoder sees the latents themselves,
            and learns to use all of their channels; then they are given the basis that suits the codes best.
        least_use: Uses per step below which a code is replaced (moving average); where a step has few latents for each
            code, one that is low enough for codes to last.
        spread_codes: Whether in the end of stage 1 the latent is turned, which changes no reconstruction, so that the
            codes fill the range in which the denoiser meets them; otherwise a few large codes can leave it small.
        l1_weight: Weight of the voxels' L1 distance.
        perceptual: Perceptual loss: none, lpips or medicalnet.
        perceptual_weights: File with the weights of its network; by default they are downloaded.
        perceptual_weight: Weight of the perceptual loss.
        discriminator_start: Step at which the discriminator starts; by default there is none.
        discriminator: File with its weights to begin with: a released autoencoder's, or the discriminator.safetensors
            that a run with one leaves in out.
        adversarial_weight: Weight of the adversarial loss.
        feature_weight: Weight of the discriminator's feature matching.
    """

    data: str
    stage: Literal[1, 2] = 1
    initial: str | None = None
    model: AutoencoderConfig = field(default_factory=AutoencoderConfig)
    spacing: tuple[float, float, float] | None = None
    patches_per_volume: int = 1
    turns: bool = True
    volume_size: tuple[int, int, int] | None = None
    on_bad: Literal["fail", "skip"] = "fail"
    cache: str | None = None
    quantize_start: int = 0
    least_use: float = 1.0
    spread_codes: bool = False
    l1_weight: float = 4.0
    perceptual: Literal["none", "lpips", "medicalnet"] = "none"
    perceptual_weights: str | None = None
    perceptual_weight: float = 2.0
    discriminator_start: int | None = None
    discriminator: str | None = None
    adversarial_weight: float = 2.0
    feature_weight: float = 4.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.stage == 2 and self.initial is None:
            raise ValueError("AutoencoderTraining: stage 2 needs initial, what stage 1 wrote")
        if self.stage == 2 and self.spread_codes:
            raise ValueError("AutoencoderTraining: spread_codes is for stage 1; stage 2 keeps the codes as they are")
        if self.discriminator is not None and self.discriminator_start is None:
            raise ValueError("AutoencoderTraining: discriminator needs discriminator_start, the step when it starts")


POPULATION_ANATOMIES = ("mr_t1_brain", "mr_t2_brain")


@dataclass(frozen=True, kw_only=True)
class PopulationOptions:
    """Make a population of brains out of the MNI152 template: random deformations, bias fields and contrasts.

    Args:
        out: Folder for the volumes and their list, volumes.csv.
        subjects: Number of brains; each gives one volume per anatomy.
        sizes: Voxels along X, Y, Z of the resolutions; subjects take them in turn.
        spacings: mm along X, Y, Z, one for each of the sizes.
        seed: A subject depends on this and on its number alone.
        displacement: Typical displacement of the deformation in mm.
        affine: Size of the random affine maps; 1 is up to 6°, 8 % in size and 4 % of shear.
        template: Whether the list begins with the template itself, not deformed, at each of the sizes.
        labels: Whether each subject also gets a mask of its tissues: 0 background, 1 CSF and the rest of the brain, 2
            grey and 3 white matter.
        anatomies: Which of the volumes are written, mr_t1_brain, mr_t2_brain or both.
    """

    out: str
    subjects: int
    sizes: list[tuple[int, int, int]]
    spacings: list[tuple[float, float, float]]
    seed: int = 0
    displacement: float = 2.5
    affine: float = 1.0
    template: bool = False
    labels: bool = False
    anatomies: list[str] = field(default_factory=lambda: list(POPULATION_ANATOMIES))

    def __post_init__(self) -> None:
        if self.subjects < 1 or not self.sizes or len(self.sizes) != len(self.spacings):
            raise ValueError(
                "PopulationOptions: needs subjects, and one spacing for each size, got "
                f"{self.subjects} subjects, {len(self.spacings)} spacings and {len(self.sizes)} sizes"
            )
        if not self.anatomies or not set(self.anatomies) <= set(POPULATION_ANATOMIES):
            raise ValueError(
                f"PopulationOptions: anatomies must be among {', '.join(POPULATION_ANATOMIES)}, got {self.anatomies}"
            )


@dataclass(frozen=True, kw_only=True)
class EvaluationOptions:
    """Measure a model: PSNR, SSIM, MS-SSIM and seams of reconstructions, FID and MMD of generated volumes.

    Args:
        out: JSON file to write.
        data: Folder of NIfTI files, or a .csv or .json list with `file` and perhaps modality, low and high.
        model: Model folder, folder of an autoencoder, or hub repository; by default the small demo that ships.
        spacing: mm along X, Y, Z to which volumes are resampled; by default they stay as they are.
        disjoint: Whether every patch is decoded by itself, too, to compare.
        generated: Folder or list of generated volumes, for FID and MMD against data.
        features: What FID and MMD compare: means and deviations of the autoencoder's latents, or MedicalNet's features.
        features_weights: File with the weights of MedicalNet's ResNet-10.
        on_bad: Whether a file that cannot be used is fatal, or named and skipped.
        task: Task of a ControlNet to measure instead: its images against the truth and against the condition alone.
        control: ControlNet folder.
        solver: Of the sampler, ddim, dpmsolver++ or ddpm; by default the model's.
        steps: Denoising steps; by default those of the model or the solver.
        eta: Fresh noise in DDIM, 0 to 1; by default the model's.
        timestep_spacing: linspace, leading or trailing; by default the model's.
        t_end: Timestep from which the last step goes to the clean latent; by default the model's.
        seed: Of the samples and of simulated measurements.
        strength: Of the ControlNet.
        consistency: Whether what was measured is imposed on the images.
    """

    out: str
    data: str
    model: str = "demo"
    spacing: tuple[float, float, float] | None = None
    disjoint: bool = False
    generated: str | None = None
    features: Literal["autoencoder", "medicalnet"] = "autoencoder"
    features_weights: str | None = None
    on_bad: Literal["fail", "skip"] = "fail"
    task: Literal["masks", "sparse_view_ct", "fast_mri"] | None = None
    control: str | None = None
    solver: Literal["ddim", "dpmsolver++", "ddpm"] | None = None
    steps: int | None = None
    eta: float | None = None
    timestep_spacing: Literal["linspace", "leading", "trailing"] | None = None
    t_end: int | None = None
    seed: int = 0
    strength: float = 1.0
    consistency: bool = True

    def __post_init__(self) -> None:
        if (self.task is None) != (self.control is None):
            raise ValueError("EvaluationOptions: task needs control, the folder of its ControlNet, and control a task")
        if self.task is not None and (self.disjoint or self.generated is not None):
            raise ValueError("EvaluationOptions: disjoint and generated are of a model, not of a task; leave them out")
        of_tasks = ("solver", "steps", "eta", "timestep_spacing", "t_end", "seed", "strength", "consistency")
        given = [f.name for f in fields(self) if f.name in of_tasks and getattr(self, f.name) != f.default]
        if self.task is None and given:
            raise ValueError(f"EvaluationOptions: {', '.join(given)}: of a task's samples; give --task and --control")
        if not Path(self.out).absolute().parent.is_dir():
            raise ValueError(
                f"EvaluationOptions: {self.out}: there is no folder {Path(self.out).parent}; make it first"
            )


@dataclass(frozen=True, kw_only=True)
class LatentOptions:
    """Encode volumes into the latents on which the denoiser is trained.

    Args:
        out: Folder for the latents; those that are there already stay.
        data: Folder of NIfTI files, or a .csv or .json list with `file`, `anatomy` and perhaps modality, low and high.
        autoencoder: Folder of a trained autoencoder.
        anatomy: Of volumes whose list names none.
        spacing: mm along X, Y, Z to which volumes are resampled; by default they stay as they are.
        on_bad: Whether a file that cannot be used is fatal, or named and skipped.
    """

    out: str
    data: str
    autoencoder: str
    anatomy: str | None = None
    spacing: tuple[float, float, float] | None = None
    on_bad: Literal["fail", "skip"] = "fail"


@dataclass(frozen=True, kw_only=True)
class DiffusionTraining(RunOptions):
    """What the training of a denoiser and that of a ControlNet need.

    Args:
        timestep_bias: Timesteps are drawn with a density that grows as their power of this. 0, uniform, is published;
            more helps a small network to learn what is the same in all volumes, which shows in much noise alone.
        loss_scales: Scales at which noise and estimate are compared, each half as fine as the one before. 1 is
            published; with more, brightness and coarse shape are learned earlier.
        snr_gamma: Signal-to-noise ratio above which samples weigh less, so that the loss is about the clean latent
            (min-SNR weighting); by default all weigh alike, as published.
        ema_decay: Share of the old moving average in the new one.
        ema_every: Steps between updates of the moving average.
        ema_start: Steps during which it is a plain copy.
        preview_steps: Denoising steps of previews.
        weights: Of what is written in the end; 16 bits halve the file.
    """

    timestep_bias: float = 0.0
    loss_scales: int = 1
    snr_gamma: float | None = None
    ema_decay: float = 0.995
    ema_every: int = 10
    ema_start: int = 2000
    preview_steps: int = 20
    weights: Literal["float32", "float16", "bfloat16"] = "float32"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.timestep_bias >= 0:
            raise ValueError(f"{type(self).__name__}: timestep_bias must not be negative, got {self.timestep_bias}")
        if self.loss_scales < 1:
            raise ValueError(f"{type(self).__name__}: loss_scales must be at least 1, got {self.loss_scales}")
        if self.snr_gamma is not None and not self.snr_gamma > 0:
            raise ValueError(f"{type(self).__name__}: snr_gamma must be positive, got {self.snr_gamma}")


@dataclass(frozen=True, kw_only=True)
class DenoiserTraining(DiffusionTraining):
    """Train the denoiser on latents, of one size or several.

    Args:
        data: Folder that `meddiff train latents` wrote.
        autoencoder: Folder of the autoencoder that encoded them; it becomes part of the model.
        model: Of the denoiser.
        schedule: Of the noise, and how the model is sampled where nothing else is asked for.
    """

    data: str
    autoencoder: str
    model: DenoiserConfig = field(default_factory=DenoiserConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)


@dataclass(frozen=True, kw_only=True)
class ControlNetTraining(DiffusionTraining):
    """Train a ControlNet: a condition steers a model that stays as it is.

    Args:
        base: Model to steer, a folder or a hub repository; the ControlNet keeps its name and the hash of its weights.
        data: Folder of NIfTI files, or a .csv or .json list with `file`, `anatomy`, for masks `label`, and perhaps
            modality, low and high.
        task: What the condition is.
        masks: Of task masks.
        sparse_view_ct: Of task sparse_view_ct.
        fast_mri: Of task fast_mri.
        measurements: Simulated measurements of each volume.
        anatomy: Of volumes whose list names none.
        spacing: mm along X, Y, Z to which volumes are resampled; by default they stay as they are.
        on_bad: Whether a file that cannot be used is fatal, or named and skipped.
        encoder: Of the condition, latent (the autoencoder's; of a mask it is given an image with an intensity for each
            tissue, in their order) or convolutional (voxels); by default convolutional for masks and latent for images.
        width: Channels of the convolutional encoder's first layer; each of the others has twice as many.
        zero_conv_rate: Learning rate of the zero convolutions, as a multiple of the others'. Those where the condition
            enters learn through those where it leaves, and the other way round, and both begin with nothing.
        copied: Parts of the denoiser that are copied, of intra_patch, down_path and middle.
        enters: Where the condition enters, of latent, init_conv and tokens.
    """

    base: str
    data: str
    task: Literal["masks", "sparse_view_ct", "fast_mri"]
    masks: MasksConfig = field(default_factory=MasksConfig)
    sparse_view_ct: SparseViewCTConfig = field(default_factory=SparseViewCTConfig)
    fast_mri: FastMRIConfig = field(default_factory=FastMRIConfig)
    measurements: int = 1
    anatomy: str | None = None
    spacing: tuple[float, float, float] | None = None
    on_bad: Literal["fail", "skip"] = "fail"
    encoder: Literal["latent", "convolutional"] | None = None
    width: int = 16
    zero_conv_rate: float = 1.0
    copied: tuple[str, ...] = ("intra_patch", "down_path", "middle")
    enters: tuple[str, ...] = ("init_conv", "tokens")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("measurements", "width"):
            if getattr(self, name) < 1:
                raise ValueError(f"ControlNetTraining: {name} must be at least 1, got {getattr(self, name)}")
        if not self.zero_conv_rate > 0:
            raise ValueError(f"ControlNetTraining: zero_conv_rate must be positive, got {self.zero_conv_rate}")
        if self.task == "masks" and self.measurements != 1:
            raise ValueError("ControlNetTraining: masks have no measurements")

    @property
    def task_config(self) -> TaskConfig:
        """That of the chosen task."""
        return getattr(self, self.task)

    @property
    def condition_encoder(self) -> str:
        """The encoder, chosen or by default."""
        return self.encoder or ("convolutional" if self.task == "masks" else "latent")
