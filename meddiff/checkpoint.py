"""Model folders: JSON and safetensors only, written whole or not at all, and checked before any of it is used.

    config.json                      {"format": "meddiff", "version": 1, "components": [...],
                                      "schedule": ScheduleConfig: of the noise, and how it is sampled by default,
                                      "anatomies": {...}: what it was trained on, where that is not the released table}
    autoencoder/config.json          AutoencoderConfig
    autoencoder/model.safetensors    state dict of PatchVolumeAutoencoder
    denoiser/config.json             DenoiserConfig
    denoiser/model.safetensors       state dict of BiFlowNet

A folder may also hold conversion.json, the report of meddiff.conversion.

A ControlNet's folder holds no base, but its name and the SHA-256 of its weights:

    config.json                      {"format": "meddiff-controlnet", "version": 1, "network": ControlNetConfig,
                                      "task": {"name": ..., ...}, "base": {"source": ..., "sha256": ...},
                                      "anatomies": {...}: what it was trained on}
    model.safetensors                state dict of ControlNet
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
import shutil
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from meddiff.config import (
    ANATOMIES,
    Anatomy,
    AutoencoderConfig,
    ControlNetConfig,
    DenoiserConfig,
    ModelConfig,
    ScheduleConfig,
    TaskConfig,
    anatomies_from_dict,
    anatomies_to_dict,
    condition_channels,
    task_from_dict,
    task_to_dict,
)
from meddiff.files import atomic_write, write_json
from meddiff.models import BiFlowNet, ControlNet, PatchVolumeAutoencoder

ComponentConfig = AutoencoderConfig | DenoiserConfig | ControlNetConfig

FORMAT, VERSION = "meddiff", 1
CONTROL_FORMAT = "meddiff-controlnet"
COMPONENTS: dict[str, tuple[type[ComponentConfig], Callable[[Any], nn.Module]]] = {
    "autoencoder": (AutoencoderConfig, PatchVolumeAutoencoder),
    "denoiser": (DenoiserConfig, BiFlowNet),
}
_DEMO = Path(__file__).parent / "demo"
SHIPPED = {
    "demo": _DEMO,
    "demo-fast-mri": _DEMO / "controlnets" / "fast_mri",
    "demo-mask": _DEMO / "controlnets" / "mask",
}
_CONFIG, _WEIGHTS = "config.json", "model.safetensors"
_EXTRA_FILES = ("conversion.json",)
_STORED_DTYPES = ("F32", "BF16", "F16")
_MAX_JSON_BYTES = 1 << 20
_SHA256 = re.compile("[0-9a-f]{64}")
_HUB_ID = re.compile(r"(?P<repo>[\w-][\w.-]*/[\w-][\w.-]*)(@(?P<revision>[\w./-]+))?")


class CheckpointError(ValueError):
    """A model file or folder that cannot be used; the message names the file, the key and the way out.

    `report` is the meddiff.conversion.ComponentReport of a released file that does not convert, where there is one.
    """

    def __init__(self, message: str, report: Any = None) -> None:
        super().__init__(message)
        self.report = report


@dataclass
class LoadedModel:
    """What a model folder holds, ready for inference."""

    autoencoder: PatchVolumeAutoencoder
    denoiser: BiFlowNet
    schedule: ScheduleConfig
    anatomies: Mapping[str, Anatomy]
    path: Path


def save_model(
    folder: str | Path,
    autoencoder: PatchVolumeAutoencoder,
    denoiser: BiFlowNet,
    schedule: ScheduleConfig,
    anatomies: Mapping[str, Anatomy] = ANATOMIES,
) -> None:
    """Writes a model folder, or replaces one, in one step: on any failure what was there before is still there.

    `anatomies` is what the denoiser was trained on: name → class and volumes. Weights keep their dtype. Raises
    CheckpointError for NaN or inf weights and where `folder` holds other things.
    """
    models = {"autoencoder": autoencoder, "denoiser": denoiser}
    states = {name: (module.config, module.state_dict()) for name, module in models.items()}
    write_model_folder(folder, states, schedule, anatomies=anatomies)


def load_model(
    folder_or_hub_id: str | Path, device: torch.device | str | None = None, dtype: torch.dtype | None = None
) -> LoadedModel:
    """The model that ships under a name of SHIPPED, or in a local folder, or in a Hugging Face repository
    `org/name[@revision]` (JSON and safetensors only).

    Args:
        folder_or_hub_id: looked for in this order; "./demo" is a folder, "demo" the shipped model.
        device: where the weights go; None is the CPU.
        dtype: of the weights: torch.float32 (also None), torch.bfloat16, or torch.float16 on CUDA, else a TypeError.
            The codebook is float32 always.

    The modules are in eval mode, need no gradients, and their 5-D weights are in channels_last_3d.
    Raises CheckpointError, naming file and key, for anything missing, malformed, unknown, misshapen or not finite.
    """
    device = torch.device("cpu" if device is None else device)
    dtype = torch.float32 if dtype is None else dtype
    allowed = (torch.float32, torch.bfloat16) + ((torch.float16,) if device.type == "cuda" else ())
    if dtype not in allowed:
        raise TypeError(f"load_model: dtype on {device.type} must be one of {allowed}, got {dtype}")
    folder = locate(folder_or_hub_id)
    schedule, anatomies = _read_folder_config(folder)
    files = {name: folder / name / _CONFIG for name in COMPONENTS}
    configs = {name: _parse(COMPONENTS[name][0], _read_json(file), file) for name, file in files.items()}
    try:
        ModelConfig(**configs, schedule=schedule)
    except ValueError as error:
        raise CheckpointError(f"{folder}: the components do not belong together: {error}") from None
    modules = {name: _load_component(folder / name, name, config, device, dtype) for name, config in configs.items()}
    return LoadedModel(**modules, schedule=schedule, anatomies=anatomies, path=folder)


def save_component(folder: str | Path, component: str, module: nn.Module) -> None:
    """Writes one component of a model ("autoencoder" or "denoiser") to a folder, or replaces it there, in one step.

    Weights keep their dtype. Raises CheckpointError for NaN or inf weights and where `folder` holds other things.
    """
    folder = Path(folder).expanduser().resolve()
    others = {path.name for path in folder.iterdir()} - {_CONFIG, _WEIGHTS} if folder.is_dir() else set()
    if others:
        raise CheckpointError(f"{folder}: will not be replaced, it also holds {abridge(sorted(others))}")
    staging = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}")
    try:
        _write_component(staging, module.config.to_dict(), module.state_dict(), f"{folder} ({component})")
        _move_into_place(staging, folder)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def load_component(
    folder: str | Path, component: str, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> nn.Module:
    """One component of a model, from the folder that `save_component` wrote or from within a model folder.

    In eval mode, without gradients. Raises CheckpointError, naming file and key, as `load_model` does.
    """
    folder = Path(folder).expanduser()
    file = folder / _CONFIG
    config = _parse(COMPONENTS[component][0], _read_json(file), file)
    return _load_component(folder, component, config, torch.device(device), dtype)


@dataclass
class LoadedControlNet:
    """What a ControlNet's folder holds, ready for inference."""

    network: ControlNet
    task: TaskConfig
    base: str  # the model that it steers: a folder or a hub repository
    base_sha256: str  # `weights_sha256` of it
    anatomies: Mapping[str, Anatomy]
    path: Path


def save_controlnet(
    folder: str | Path,
    network: ControlNet,
    task: TaskConfig,
    base: str,
    base_sha256: str,
    anatomies: Mapping[str, Anatomy],
) -> None:
    """Writes a ControlNet's folder, or replaces one, in one step; the base is stored by name and hash.

    Weights keep their dtype. Raises CheckpointError for NaN or inf weights and where `folder` holds other things.
    """
    folder = Path(folder).expanduser().resolve()
    entries = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    if entries - {_CONFIG, _WEIGHTS} or (entries and _read_json(folder / _CONFIG).get("format") != CONTROL_FORMAT):
        raise CheckpointError(f"{folder}: will not be replaced, it is no {CONTROL_FORMAT} folder; choose another one")
    top = {
        "format": CONTROL_FORMAT,
        "version": VERSION,
        "task": task_to_dict(task),
        "base": {"source": base, "sha256": base_sha256},
        "anatomies": anatomies_to_dict(anatomies),
        "network": network.control_config.to_dict(),
    }
    staging = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}")
    try:
        _write_component(staging, top, network.state_dict(), str(folder))
        _move_into_place(staging, folder)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def load_controlnet(
    source: str | Path, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> LoadedControlNet:
    """The ControlNet that `locate` finds; whether the base fits is the caller's check.

    In eval mode, without gradients. Raises CheckpointError, naming file and key, for anything missing, malformed,
    unknown, misshapen or not finite.
    """
    folder = locate(source)
    file = folder / _CONFIG
    values = _read_json(file)
    _check_format(values, CONTROL_FORMAT, file, "`meddiff train controlnet` writes such folders")
    wanted = {"format", "version", "task", "base", "anatomies", "network"}
    if set(values) != wanted:
        raise CheckpointError(f"{file}: fields must be {sorted(wanted)}, got {sorted(values)}")
    base = values["base"]
    if not (
        isinstance(base, dict)
        and base.keys() == {"source", "sha256"}
        and all(isinstance(value, str) for value in base.values())
        and _SHA256.fullmatch(base["sha256"])
    ):
        raise CheckpointError(f"{file}: base must hold source and sha256, got {base!r:.200}")
    config = _parse(ControlNetConfig, values["network"], file)
    try:
        anatomies, task = anatomies_from_dict(values["anatomies"]), task_from_dict(values["task"])
        channels = condition_channels(task, config.encoder, config.denoiser)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{file}: {error}") from None
    if config.channels != channels:
        raise CheckpointError(
            f"{file}: the task's condition has {channels} channels, and the network {config.channels}"
        )
    network = _load_component(folder, "controlnet", config, torch.device(device), dtype)
    return LoadedControlNet(network, task, base["source"], base["sha256"], anatomies, folder)


def weights_sha256(folder: str | Path) -> str:
    """SHA-256 (hex) of a model folder's weights as they are stored: the files of all components, in their order.

    Raises CheckpointError where one is missing.
    """
    digest = hashlib.sha256()
    for component in COMPONENTS:
        file = Path(folder) / component / _WEIGHTS
        try:
            with file.open("rb") as stream:
                while block := stream.read(1 << 24):
                    digest.update(block)
        except OSError as error:
            raise CheckpointError(f"{file}: not readable: {error}; fetch or convert the model again") from None
    return digest.hexdigest()


def fingerprint(*modules: nn.Module) -> str:
    """SHA-256 (hex) over names, shapes, dtypes and values of the state dicts, whatever the device and memory format."""
    digest = hashlib.sha256()
    for index, module in enumerate(modules):
        for name, tensor in sorted(module.state_dict().items()):
            digest.update(f"{index} {name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def infer_autoencoder_config(
    shapes: Mapping[str, Sequence[int]], num_groups: int = 24, patch_size: int = 64
) -> AutoencoderConfig:
    """The configuration that a state dict's shapes (name → shape) imply.

    `num_groups` and `patch_size` leave no trace in the shapes; their defaults are those of the released models.
    Raises LookupError or ValueError where the shapes are of another model.
    """
    n_hiddens, image_channels = shapes["encoder.conv_first.weight"][:2]
    n_codes, embedding_dim = shapes["codebook.embeddings"]
    return AutoencoderConfig(
        n_hiddens=n_hiddens,
        num_groups=num_groups,
        embedding_dim=embedding_dim,
        n_codes=n_codes,
        downsample=2 ** _count("encoder.conv_blocks.{}.down.weight", shapes),
        patch_size=patch_size,
        image_channels=image_channels,
    )


def infer_denoiser_config(
    shapes: Mapping[str, Sequence[int]], num_heads: int = 8, num_groups: int = 24
) -> DenoiserConfig:
    """The configuration that a state dict's shapes (name → shape) imply.

    `num_heads` and `num_groups` leave no trace in the shapes; their defaults are those of the released models.
    Raises LookupError or ValueError where the shapes are of another model.
    """
    dim, channels = shapes["init_conv.weight"][:2]
    levels = _count("downs.{}.0.block1.proj.weight", shapes)
    token_patch = shapes["x_embedder.proj.weight"][2]
    return DenoiserConfig(
        dim=dim,
        dim_mults=tuple(shapes[f"downs.{i}.0.block1.proj.weight"][0] // max(dim, 1) for i in range(levels)),
        channels=channels,
        num_classes=shapes["cond_emb.weight"][0],
        sub_volume=token_patch * round(shapes["pos_embed"][1] ** (1 / 3)),
        token_patch=token_patch,
        num_heads=num_heads,
        mlp_ratio=shapes["IntraPatchFlow_input.0.0.mlp.fc1.weight"][0] // max(dim, 1),
        mid_blocks=_count("IntraPatchFlow_mid.{}.mlp.fc1.weight", shapes),
        attention_levels=sum(f"downs.{i}.1.fn.norm.gamma" in shapes for i in range(levels)),
        num_groups=num_groups,
    )


def _count(pattern: str, keys: Mapping[str, Any]) -> int:
    return next(i for i in itertools.count() if pattern.format(i) not in keys)


class _Uninitialised(TorchFunctionMode):
    """Modules keep parameters as they are allocated: on the meta device nn.init imports torch._dynamo, for 1 s."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        is_init = getattr(function, "__module__", None) == "torch.nn.init"
        return kwargs["tensor"] if is_init else function(*args, **kwargs)


def build_empty(component: str, config: ComponentConfig) -> nn.Module:
    """The component's module on the meta device: names and shapes without memory."""
    try:
        with torch.device("meta"), _Uninitialised():
            return (ControlNet if component == "controlnet" else COMPONENTS[component][1])(config)
    except (RuntimeError, OverflowError, TypeError) as error:
        reason = str(error).partition("\n")[0]
        raise CheckpointError(f"{component}: no module can be built from {config}: {reason}") from None


def key_problems(expected: Mapping[str, Sequence[int]], found: Mapping[str, Sequence[int]]) -> list[str]:
    """Missing, unknown and misshapen keys (name → shape), one line for each kind there is."""
    wrong = [
        f"{key!r} is {tuple(found[key])} and should be {tuple(shape)}"
        for key, shape in expected.items()
        if key in found and tuple(found[key]) != tuple(shape)
    ]
    kinds = {
        "missing keys": [repr(key) for key in expected if key not in found],
        "unknown keys": [repr(key) for key in found if key not in expected],
        "wrong shapes": wrong,
    }
    return [f"{len(items)} {kind}: {abridge(items)}" for kind, items in kinds.items() if items]


def abridge(items: Iterable[str], limit: int = 5) -> str:
    """The first few of `items`, and how many more there are."""
    items = list(items)
    return ", ".join(items[:limit]) + (f" and {len(items) - limit} more" if len(items) > limit else "")


def require_finite(where: str | Path, key: str, tensor: Tensor) -> None:
    """Raises CheckpointError where a weight is NaN or inf."""
    if not torch.isfinite(tensor).all():
        raise CheckpointError(
            f"{where}: {key!r} holds NaN or inf (as {tensor.dtype}); the training diverged or the file is damaged"
        )


def require_replaceable(folder: Path) -> None:
    """Raises CheckpointError unless `folder` is absent, empty, or a meddiff model folder with nothing else in it."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: is a file; choose a folder for the model")
    known = {_CONFIG, *_EXTRA_FILES, *COMPONENTS} | {f"{c}/{file}" for c in COMPONENTS for file in (_CONFIG, _WEIGHTS)}
    subfolders = [folder / name for name in COMPONENTS if (folder / name).is_dir()]
    entries = [path for parent in (folder, *subfolders) for path in parent.iterdir()]
    others = sorted({path.relative_to(folder).as_posix() for path in entries} - known)
    if others:
        raise CheckpointError(f"{folder}: will not be replaced, it also holds {abridge(others)}; choose another folder")
    if entries and _read_json(folder / _CONFIG).get("format") != FORMAT:
        raise CheckpointError(f"{folder}: will not be replaced, it is no {FORMAT} model folder; choose another folder")


def write_model_folder(
    folder: str | Path,
    models: Mapping[str, tuple[ComponentConfig, Mapping[str, Tensor]]],
    schedule: ScheduleConfig,
    extras: Mapping[str, Any] | None = None,
    anatomies: Mapping[str, Anatomy] = ANATOMIES,
) -> None:
    """Writes a whole model folder beside its place, then moves it there.

    Args:
        models: component name → (configuration, state dict on any device).
        extras: name of a further JSON file → its content; only names that a model folder may hold.
        anatomies: what the denoiser was trained on.
    """
    folder = Path(folder).expanduser().resolve()
    require_replaceable(folder)
    staging = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}")
    try:
        for name, (config, state) in models.items():
            _write_component(staging / name, config.to_dict(), state, f"{folder} ({name})")
        for file, content in (extras or {}).items():
            write_json(staging / file, content)
        top = {"format": FORMAT, "version": VERSION, "components": list(models), "schedule": schedule.to_dict()}
        if anatomies != ANATOMIES:
            top["anatomies"] = anatomies_to_dict(anatomies)
        write_json(staging / _CONFIG, top)
        _move_into_place(staging, folder)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _write_component(folder: Path, config: dict[str, Any], state: Mapping[str, Tensor], name: str) -> None:
    for key, tensor in state.items():
        require_finite(name, key, tensor)
    folder.mkdir(parents=True)
    with atomic_write(folder / _WEIGHTS) as temporary:
        tensors = {key: tensor.detach().cpu().contiguous() for key, tensor in state.items()}
        save_file(tensors, temporary, metadata={"format": "pt"})
    write_json(folder / _CONFIG, config)


def _move_into_place(staging: Path, folder: Path) -> None:
    retired = staging.with_name(f"{staging.name}.old")
    if folder.exists():
        folder.rename(retired)
    try:
        staging.rename(folder)
    except BaseException:
        if retired.exists():
            retired.rename(folder)
        raise
    shutil.rmtree(retired, ignore_errors=True)


def locate(source: str | Path) -> Path:
    """The folder of a model or a ControlNet: one that ships (SHIPPED), a local one, or the copy of a hub repository.

    Raises CheckpointError where there is none.
    """
    if source in SHIPPED:
        return SHIPPED[source]
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder
    hub_id = _HUB_ID.fullmatch(str(source))
    if hub_id is None:
        raise CheckpointError(
            f"load_model: there is no folder {str(source)!r}, and it is no hub id either (those read org/name or "
            "org/name@revision)"
        )
    from huggingface_hub import snapshot_download

    try:
        patterns = ["*.json", f"*/{_CONFIG}", _WEIGHTS, f"*/{_WEIGHTS}"]
        return Path(snapshot_download(hub_id["repo"], revision=hub_id["revision"], allow_patterns=patterns))
    except Exception as error:  # the hub client's own errors and those of its HTTP library
        raise CheckpointError(
            f"load_model: there is no folder {str(source)!r}, and no download from the hub: {error}; "
            "check the name, the network and the access token"
        ) from error


def _read_json(file: Path) -> dict[str, Any]:
    try:
        if file.stat().st_size > _MAX_JSON_BYTES:
            raise ValueError(f"larger than {_MAX_JSON_BYTES} bytes")
        values = json.loads(file.read_bytes())
    except FileNotFoundError:
        raise CheckpointError(
            f"{file}: missing; a model folder holds {_CONFIG} and, per component, NAME/{_CONFIG} and NAME/{_WEIGHTS}"
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: not readable as JSON: {error}; fetch or convert the model again") from None
    if not isinstance(values, dict):
        raise CheckpointError(f"{file}: must hold a JSON object, got {type(values).__name__}")
    return values


def _parse(config_class: type[Any], values: Any, file: Path) -> Any:
    try:
        return config_class.from_dict(values)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{file}: {error}") from None


def _read_folder_config(folder: Path) -> tuple[ScheduleConfig, Mapping[str, Anatomy]]:
    file = folder / _CONFIG
    values = _read_json(file)
    _check_format(values, FORMAT, file, "`meddiff convert` reads released files")
    unknown = sorted(set(values) - {"format", "version", "components", "schedule", "anatomies"})
    if unknown:
        raise CheckpointError(f"{file}: unknown fields {unknown}")
    components = values.get("components")
    if not isinstance(components, list) or sorted(map(repr, components)) != sorted(map(repr, COMPONENTS)):
        raise CheckpointError(f"{file}: components must be {list(COMPONENTS)}, got {components!r}")
    try:
        anatomies = anatomies_from_dict(values["anatomies"]) if "anatomies" in values else ANATOMIES
    except ValueError as error:
        raise CheckpointError(f"{file}: {error}") from None
    return _parse(ScheduleConfig, values.get("schedule"), file), anatomies


def _check_format(values: dict[str, Any], wanted: str, file: Path, remedy: str) -> None:
    if values.get("format") != wanted:
        raise CheckpointError(f"{file}: format must be {wanted!r}, got {values.get('format')!r}; {remedy}")
    version = values.get("version")
    if type(version) is not int or version < 1:
        raise CheckpointError(f"{file}: version must be a positive integer, got {version!r}")
    if version > VERSION:
        raise CheckpointError(f"{file}: version {version} is newer than this meddiff, which knows {VERSION}; upgrade")


def _depth(config: ComponentConfig) -> int:
    if isinstance(config, AutoencoderConfig):
        return config.levels
    if isinstance(config, ControlNetConfig):
        return len(config.widths) + _depth(config.denoiser)
    return len(config.dim_mults) + config.mid_blocks


def _load_component(
    folder: Path, component: str, config: ComponentConfig, device: torch.device, dtype: torch.dtype
) -> nn.Module:
    file = folder / _WEIGHTS
    try:
        with safe_open(file, framework="pt") as stored:
            slices = {key: stored.get_slice(key) for key in stored.keys()}  # noqa: SIM118 (not a dict)
            # Before anything is built: a configuration may ask for a billion blocks.
            depth = _depth(config)
            if depth > len(slices):
                raise CheckpointError(f"{folder / _CONFIG}: describes {depth} blocks; {file} has {len(slices)} tensors")
            module = build_empty(component, config)
            expected = {key: tensor.shape for key, tensor in module.state_dict().items()}
            problems = key_problems(expected, {key: part.get_shape() for key, part in slices.items()})
            dtypes = {key: part.get_dtype() for key, part in slices.items()}
            odd = [f"{key!r} is {d}" for key, d in dtypes.items() if d not in _STORED_DTYPES]
            if odd:
                problems.append(f"{len(odd)} dtypes not among {_STORED_DTYPES}: {abridge(odd)}")
            if problems:
                raise CheckpointError(f"{file}: does not fit {folder / _CONFIG}: {'; '.join(problems)}")
            state = {}
            for key in expected:
                tensor = stored.get_tensor(key)
                state[key] = tensor.to(
                    device,
                    torch.float32 if key.startswith("codebook.") else dtype,
                    copy=True,
                    memory_format=torch.channels_last_3d if tensor.ndim == 5 else torch.contiguous_format,
                )
                require_finite(file, key, state[key])
    except FileNotFoundError:
        raise CheckpointError(f"{file}: missing; fetch or convert the model again") from None
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file}: not a whole safetensors file: {error}; fetch or convert it again") from None
    module.load_state_dict(state, assign=True)
    return module.requires_grad_(False).eval()
