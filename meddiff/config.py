"""Configurations, presets and the table of anatomies. Pure data: this module imports nothing but the standard library.

Every configuration is a frozen dataclass that checks itself, and round-trips through JSON with `to_dict` / `from_dict`.
Section numbers refer to Wang et al., "3D MedDiffusion", IEEE TMI 2025 (arXiv 2412.13059).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

_Config = TypeVar("_Config", bound="_JsonConfig")

SOLVER_NAMES = ("ddim", "dpmsolver++", "ddpm")
TIMESTEP_SPACINGS = ("linspace", "leading", "trailing")

Size = tuple[int, int, int]  # voxels
Spacing = tuple[float, float, float]  # mm


class _JsonConfig:
    def to_dict(self) -> dict[str, Any]:
        """The configuration as plain JSON types."""
        return dataclasses.asdict(self)  # type: ignore[call-overload]

    @classmethod
    def from_dict(cls: type[_Config], values: dict[str, Any]) -> _Config:
        """The inverse of `to_dict`; unknown names and wrong types are a ValueError that names them."""
        if not isinstance(values, dict):
            raise ValueError(f"{cls.__name__}: expected a JSON object, got {type(values).__name__}")
        known = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
        unknown = sorted(set(values) - set(known))
        if unknown:
            raise ValueError(f"{cls.__name__}: unknown fields {unknown}; known are {sorted(known)}")
        return cls(**{name: tuple(v) if isinstance(v, list) else v for name, v in values.items()})


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _require_positive_integers(config: Any, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        _require(
            isinstance(value, int) and not isinstance(value, bool) and value > 0,
            f"{type(config).__name__}: {name} must be a positive integer, got {value!r}",
        )


@dataclass(frozen=True)
class AutoencoderConfig(_JsonConfig):
    """Patch-Volume autoencoder (section III-B)."""

    n_hiddens: int = 48  # channels of the first encoder level
    num_groups: int = 24  # GroupNorm groups, everywhere
    embedding_dim: int = 8  # channels of the latent and of a code
    n_codes: int = 8192  # rows of the codebook
    downsample: int = 8  # voxels per latent element along each axis, a power of two
    patch_size: int = 64  # voxels per encoded patch along each axis
    image_channels: int = 1

    def __post_init__(self) -> None:
        _require_positive_integers(self, *(f.name for f in dataclasses.fields(self)))
        _require(
            self.downsample >= 2 and self.downsample & (self.downsample - 1) == 0,
            f"AutoencoderConfig: downsample must be a power of two of at least 2, got {self.downsample}",
        )
        _require(
            self.patch_size % self.downsample == 0,
            f"AutoencoderConfig: patch_size {self.patch_size} must be a multiple of downsample {self.downsample}",
        )
        _require(
            self.n_hiddens % self.num_groups == 0,
            f"AutoencoderConfig: n_hiddens {self.n_hiddens} must be a multiple of num_groups {self.num_groups}",
        )

    @property
    def levels(self) -> int:
        """Number of halvings, log2(downsample)."""
        return int(math.log2(self.downsample))

    @property
    def widths(self) -> tuple[int, ...]:
        """Encoder widths per block, finest first; the last one is repeated. The decoder uses them reversed."""
        widths = [self.n_hiddens * 2**i for i in range(self.levels)]
        return (*widths, widths[-1])


@dataclass(frozen=True)
class DenoiserConfig(_JsonConfig):
    """BiFlowNet, the noise estimator (section III-C)."""

    dim: int = 72  # base width of both flows
    dim_mults: tuple[int, ...] = (1, 1, 2, 4, 8)  # U-Net width per level, in units of dim
    channels: int = 8  # latent channels, in and out
    num_classes: int = 7
    sub_volume: int = 8  # latent elements per sub-volume along each axis
    token_patch: int = 1  # latent elements per token along each axis
    num_heads: int = 8  # heads of the intra-patch attention; of dim / num_heads channels
    mlp_ratio: int = 4  # hidden width of the DiT's MLP, in units of dim
    mid_blocks: int = 1  # DiT blocks in the middle of the intra-patch flow
    attention_levels: int = 2  # how many of the coarsest U-Net levels have attention
    num_groups: int = 24  # GroupNorm groups in the U-Net

    def __post_init__(self) -> None:
        _require_positive_integers(self, *(f.name for f in dataclasses.fields(self) if f.name != "dim_mults"))
        _require(
            len(self.dim_mults) >= 3 and all(isinstance(m, int) and m > 0 for m in self.dim_mults),
            f"DenoiserConfig: dim_mults must be three or more positive integers, got {self.dim_mults!r}",
        )
        _require(
            self.dim_mults[:2] == (1, 1),
            f"DenoiserConfig: dim_mults must begin with 1, 1 (the intra-patch features enter those levels), "
            f"got {self.dim_mults!r}",
        )
        _require(
            self.dim % 6 == 0 and self.dim % self.num_heads == 0 and self.dim % self.num_groups == 0,
            f"DenoiserConfig: dim {self.dim} must be a multiple of 6, of num_heads {self.num_heads} "
            f"and of num_groups {self.num_groups}",
        )
        _require(
            self.sub_volume % self.token_patch == 0,
            f"DenoiserConfig: sub_volume {self.sub_volume} must be a multiple of token_patch {self.token_patch}",
        )
        _require(
            self.attention_levels <= len(self.dim_mults),
            f"DenoiserConfig: attention_levels {self.attention_levels} exceeds the {len(self.dim_mults)} levels",
        )
        _require(
            self.sub_volume % 2 ** (len(self.dim_mults) - 2) == 0,
            f"DenoiserConfig: sub_volume {self.sub_volume} must be a multiple of 2 ** (levels - 2) = "
            f"{2 ** (len(self.dim_mults) - 2)}, the U-Net's total stride",
        )


@dataclass(frozen=True)
class ControlNetConfig(_JsonConfig):
    """A trainable copy of a BiFlowNet's encoder half (Zhang et al. 2023, "Adding Conditional Control").

    Descriptions of it differ in which blocks are copied, and in where the condition enters; both are chosen here.
    """

    denoiser: DenoiserConfig = field(default_factory=DenoiserConfig)  # of the base
    encoder: str = "latent"  # of the condition: "latent" (a latent of the autoencoder's), or "convolutional" (voxels)
    channels: int = 8  # of the condition: of the latent, or at voxel size
    widths: tuple[int, ...] = (16, 32, 64)  # of the convolutional encoder, each with half the size of the one before
    copied: tuple[str, ...] = ("intra_patch", "down_path", "middle")
    enters: tuple[str, ...] = ("init_conv", "tokens")  # added to the outputs of these, or to the noisy "latent"

    def __post_init__(self) -> None:
        _require_positive_integers(self, "channels")
        _require(
            self.encoder in ("latent", "convolutional"),
            f"ControlNetConfig: encoder must be 'latent' or 'convolutional', got {self.encoder!r}",
        )
        _require(
            len(self.widths) > 0 and all(type(w) is int and w > 0 for w in self.widths),
            f"ControlNetConfig: widths must be positive integers, got {self.widths!r}",
        )
        for name, known in (
            ("copied", ("intra_patch", "down_path", "middle")),
            ("enters", ("latent", "init_conv", "tokens")),
        ):
            chosen = getattr(self, name)
            _require(
                isinstance(chosen, tuple) and len(chosen) == len(set(chosen)) > 0 and set(chosen) <= set(known),
                f"ControlNetConfig: {name} must be one or more of {known}, got {chosen!r}",
            )
        for place, part in (("init_conv", "down_path"), ("tokens", "intra_patch")):
            _require(
                place not in self.enters or part in self.copied,
                f"ControlNetConfig: the condition enters at {place!r}, so {part!r} must be copied, got {self.copied!r}",
            )
        _require(
            self.copied != ("middle",), "ControlNetConfig: the middle needs 'intra_patch' or 'down_path' before it"
        )

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ControlNetConfig:
        if isinstance(values, dict) and "denoiser" in values:
            values = values | {"denoiser": DenoiserConfig.from_dict(values["denoiser"])}
        return super().from_dict(values)

    @property
    def downsample(self) -> int:
        """Voxels per latent element along each axis that a convolutional encoder makes."""
        return 2 ** len(self.widths)


@dataclass(frozen=True)
class MasksConfig(_JsonConfig):
    """Segmentation mask → image.

    Args:
        tissues: Names of the labels 0, 1, 2, … of a mask.
        means: Their mean intensities in the training images, in [-1, 1]; training finds them.
    """

    tissues: tuple[str, ...] = ("background", "csf", "grey_matter", "white_matter")
    means: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        _require(
            2 <= len(self.tissues) == len(set(self.tissues)) <= 256 and all(type(t) is str for t in self.tissues),
            f"MasksConfig: tissues must be 2 to 256 different names, got {self.tissues!r}",
        )
        _require(
            not self.means
            or (
                len(self.means) == len(self.tissues)
                and all(type(m) in (int, float) and math.isfinite(m) for m in self.means)
            ),
            f"MasksConfig: means must be none, or one number for each of {self.tissues!r}, got {self.means!r}",
        )


@dataclass(frozen=True)
class SparseViewCTConfig(_JsonConfig):
    """Few projections of each axial slice → image.

    Args:
        views: Parallel projections of a slice, evenly over 180°.
    """

    views: int = 32

    def __post_init__(self) -> None:
        _require_positive_integers(self, "views")


@dataclass(frozen=True)
class FastMRIConfig(_JsonConfig):
    """Few k-space lines of each axial slice → image.

    Args:
        acceleration: Lines of a full measurement for each one measured.
        centre_fraction: Share of all lines that is measured around the centre of k-space.
    """

    acceleration: int = 4
    centre_fraction: float = 0.08

    def __post_init__(self) -> None:
        _require_positive_integers(self, "acceleration")
        _require(
            type(self.centre_fraction) in (int, float) and 0 < self.centre_fraction <= 1 / self.acceleration,
            f"FastMRIConfig: centre_fraction must lie in (0, 1 / acceleration = {1 / self.acceleration:g}], "
            f"got {self.centre_fraction!r}",
        )


TaskConfig = MasksConfig | SparseViewCTConfig | FastMRIConfig
TASKS: dict[str, type[TaskConfig]] = {
    "masks": MasksConfig,
    "sparse_view_ct": SparseViewCTConfig,
    "fast_mri": FastMRIConfig,
}


def task_to_dict(task: TaskConfig) -> dict[str, Any]:
    """A task as plain JSON types, with its name."""
    return {"name": next(name for name, kind in TASKS.items() if kind is type(task)), **task.to_dict()}


def task_from_dict(values: Any) -> TaskConfig:
    """The inverse of `task_to_dict`; whatever is wrong is a ValueError that names it."""
    name = values.get("name") if isinstance(values, dict) else None
    _require(isinstance(name, str) and name in TASKS, f"task: name must be one of {list(TASKS)}, got {name!r}")
    return TASKS[name].from_dict({key: value for key, value in values.items() if key != "name"})


def condition_channels(task: TaskConfig, encoder: str, denoiser: DenoiserConfig) -> int:
    """Channels of a task's condition: of the latent of an image, or of the voxels of masks and images."""
    if encoder == "latent":
        return denoiser.channels
    return len(task.tissues) if isinstance(task, MasksConfig) else 1


@dataclass(frozen=True)
class ScheduleConfig(_JsonConfig):
    """Cosine noise schedule (Nichol & Dhariwal 2021, equation 17), and how it is sampled where nothing else is asked
    for."""

    timesteps: int = 1000
    s: float = 0.008  # offset that keeps the first betas from vanishing
    solver: str = "ddim"
    steps: int | None = None  # None is the solver's own default
    eta: float = 0.0  # share of fresh noise in ddim
    timestep_spacing: str = "linspace"
    t_end: int = 0  # timestep from which the sampler goes to its estimate of the clean latent

    def __post_init__(self) -> None:
        _require_positive_integers(self, "timesteps", *(() if self.steps is None else ("steps",)))
        for name, known in (("solver", SOLVER_NAMES), ("timestep_spacing", TIMESTEP_SPACINGS)):
            value = getattr(self, name)
            _require(value in known, f"ScheduleConfig: {name} must be one of {', '.join(known)}, got {value!r}")
        _require(
            type(self.eta) in (int, float) and 0 <= self.eta <= 1 and (self.eta == 0 or self.solver == "ddim"),
            f"ScheduleConfig: eta must lie in [0, 1] and belongs to ddim, got {self.eta!r} with {self.solver}",
        )
        _require(self.timesteps >= 2, f"ScheduleConfig: timesteps must be at least 2, got {self.timesteps}")
        _require(
            type(self.t_end) is int and 0 <= self.t_end <= self.timesteps - 2,
            f"ScheduleConfig: t_end must be an integer in [0, {self.timesteps - 2}], got {self.t_end!r}",
        )
        visited = self.timesteps - self.t_end
        least = visited if self.solver == "ddpm" else 1
        most = visited - (self.solver == "dpmsolver++")
        _require(
            self.steps is None or least <= self.steps <= most,
            f"ScheduleConfig: steps of {self.solver} must lie in [{least}, {most}], got {self.steps}",
        )
        _require(
            isinstance(self.s, (int, float)) and 0 < self.s < 1, f"ScheduleConfig: s must lie in (0, 1), got {self.s!r}"
        )


@dataclass(frozen=True)
class Anatomy:
    """One class, and the volumes that a model was trained on. File axes (X, Y, Z) are the tensor's (H, W, D)."""

    class_index: int
    title: str
    modality: str  # "CT" (Hounsfield units) or "MR" (no unit)
    volumes: tuple[tuple[Size, Spacing], ...]  # along X, Y, Z; the first is the default

    def __post_init__(self) -> None:
        for size, spacing in self.volumes:
            _require(
                len(size) == len(spacing) == 3
                and all(type(n) is int and n > 0 for n in size)
                and all(type(mm) in (int, float) and 0 < mm < math.inf for mm in spacing),
                f"Anatomy: {self.title}: volumes must be three positive voxel counts and three positive mm, "
                f"got {size!r}, {spacing!r}",
            )
        _require(len(self.volumes) > 0, f"Anatomy: {self.title}: needs at least one volume")

    def sizes(self) -> tuple[Size, ...]:
        """Volume sizes in voxels along the file's axes X, Y, Z."""
        return tuple(size for size, _ in self.volumes)

    def spacing(self, size: Size) -> Spacing:
        """Voxel spacing in mm along X, Y, Z for a volume size along X, Y, Z: the trained one, else the default's."""
        return dict(reversed(self.volumes)).get(tuple(size), self.volumes[0][1])


def _released(*volumes: tuple[tuple[int, int, int], Spacing]) -> tuple[tuple[Size, Spacing], ...]:
    """(latent size at 8x in D, H, W; mm along X, Y, Z) → (voxels along X, Y, Z; mm)."""
    return tuple(((8 * h, 8 * w, 8 * d), spacing) for (d, h, w), spacing in volumes)


# The classes, with the volumes of the released models
ANATOMIES: dict[str, Anatomy] = {
    "ct_head_neck": Anatomy(
        0, "CT head and neck", "CT", _released(((32, 32, 32), (1, 1, 1)), ((16, 32, 32), (1, 1, 1)))
    ),
    "ct_chest_abdomen": Anatomy(
        1, "CT chest and abdomen", "CT", _released(((32, 32, 32), (1.25, 1.25, 1.25)), ((64, 64, 64), (0.7, 0.7, 1)))
    ),
    "ct_legs": Anatomy(
        2, "CT legs", "CT", _released(((32, 32, 32), (1.25, 1.25, 1.25)), ((64, 32, 32), (1.25, 1.25, 1.25)))
    ),
    "mr_t1_brain": Anatomy(3, "MR T1 brain", "MR", _released(((24, 24, 24), (1, 1, 1)))),
    "mr_t2_brain": Anatomy(4, "MR T2 brain", "MR", _released(((24, 24, 24), (1, 1, 1)))),
    "mr_abdomen": Anatomy(5, "MR abdomen", "MR", _released(((16, 32, 32), (1.2, 1.2, 2)))),
    "mr_knee": Anatomy(6, "MR knee", "MR", _released(((8, 40, 40), (1, 1, 1)))),
}


def anatomies_from_dict(values: Any) -> dict[str, Anatomy]:
    """What `anatomies_to_dict` gave, for a model's own anatomies; whatever is wrong is a ValueError that names it."""
    _require(isinstance(values, dict) and len(values) > 0, f"anatomies: expected a JSON object, got {values!r:.100}")
    unknown = sorted(set(values) - set(ANATOMIES))
    _require(not unknown, f"anatomies: unknown names {unknown}; known are {', '.join(ANATOMIES)}")
    found = {}
    for name, volumes in values.items():
        try:
            pairs = tuple((tuple(volume["size"]), tuple(volume["spacing"])) for volume in volumes)
        except (TypeError, KeyError) as error:
            raise ValueError(f"anatomies: {name}: expected a list of {{size, spacing}}: {error!r}") from None
        found[name] = dataclasses.replace(ANATOMIES[name], volumes=pairs)
    return found


def anatomies_to_dict(anatomies: Mapping[str, Anatomy]) -> dict[str, Any]:
    """Names and volumes as plain JSON types."""
    return {
        name: [{"size": list(size), "spacing": list(spacing)} for size, spacing in anatomy.volumes]
        for name, anatomy in anatomies.items()
    }


@dataclass(frozen=True)
class ModelConfig:
    """A whole model: autoencoder, denoiser, noise schedule, and what it was trained on."""

    autoencoder: AutoencoderConfig = field(default_factory=AutoencoderConfig)
    denoiser: DenoiserConfig = field(default_factory=DenoiserConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    anatomies: Mapping[str, Anatomy] = field(default_factory=lambda: ANATOMIES)

    def __post_init__(self) -> None:
        _require(
            self.autoencoder.embedding_dim == self.denoiser.channels,
            f"ModelConfig: the autoencoder's embedding_dim {self.autoencoder.embedding_dim} and the denoiser's "
            f"channels {self.denoiser.channels} must be equal",
        )


_TINY_AUTOENCODER = AutoencoderConfig(n_hiddens=8, num_groups=4, n_codes=256, patch_size=16)

PRESETS: dict[str, ModelConfig] = {
    "8x": ModelConfig(),
    "4x": ModelConfig(AutoencoderConfig(downsample=4), DenoiserConfig(token_patch=2)),
    "tiny": ModelConfig(_TINY_AUTOENCODER, DenoiserConfig(dim=24, dim_mults=(1, 1, 2, 4), attention_levels=1)),
}
