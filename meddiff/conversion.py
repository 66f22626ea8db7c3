"""Conversion of the released 3D MedDiffusion checkpoints (Wang et al., TMI 2025) to model folders.

A released file is a pickle, and a pickle is a program. This module never runs one: `_read_pickle` interprets the
opcodes itself, and can only build dictionaries, lists, tuples, scalars, descriptions of tensors (`_View`) and inert
stand-ins for all else (`_Foreign`). Nothing that a file names is imported or called; only the needed weights are read.
"""

from __future__ import annotations

import io
import math
import pickletools
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import safe_open
from torch import Tensor

from meddiff import checkpoint
from meddiff.checkpoint import CheckpointError, ComponentConfig, abridge
from meddiff.config import AutoencoderConfig, DenoiserConfig, ModelConfig

_MAX_PICKLE_BYTES, _MAX_DEPTH, _MAX_DIMENSIONS, _MAX_NAME = 16 << 20, 64, 8, 200
_LEGACY_HEAD = [0x1950A86A20F9469CFC6C, 1001]  # magic number and protocol of torch's older format
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64}
_DTYPES |= {"Double": torch.float64, "Float": torch.float32, "Half": torch.float16, "BFloat16": torch.bfloat16}
_DTYPES |= {"Long": torch.int64, "Int": torch.int32, "Short": torch.int16, "Char": torch.int8, "Byte": torch.uint8}

_WEIGHTS_KEY = {"autoencoder": "state_dict", "denoiser": "ema"}
_DISCRIMINATOR = "volume_discriminator."
_TRAINING_ONLY = {_DISCRIMINATOR: "discriminator of the training", "perceptual_loss.": "loss of the training"}
_TRAINING_STATE = ("opt", "optimizer_states", "lr_schedulers", "scaler", "callbacks", "loops")
_BESIDE = {"model": "weights before the moving average"} | dict.fromkeys(_TRAINING_STATE, "state of the training")

_CONSTANTS = {"NONE": lambda: None, "NEWTRUE": lambda: True, "NEWFALSE": lambda: False}
_CONSTANTS |= {"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_SET": list, "EMPTY_TUPLE": tuple}
_TUPLES = {"TUPLE": None, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3, "FROZENSET": None}  # None: down to the mark
_ADDITIONS = {"APPEND": 1, "SETITEM": 2, "APPENDS": None, "SETITEMS": None, "ADDITEMS": None}


@dataclass
class ComponentReport:
    """Where every tensor of one released file went. Names of tensors beside the weights are paths in the file."""

    file: str
    config: dict[str, Any] = field(default_factory=dict)
    taken: dict[str, str] = field(default_factory=dict)  # name → "torch.float16 (48, 1, 3, 3, 3)", as in the file
    skipped: dict[str, str] = field(default_factory=dict)  # name → reason
    missing: list[str] = field(default_factory=list)
    unexplained: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


@dataclass
class ConversionReport:
    """The parity report of a conversion; `str` gives a summary, `to_dict` all of it as plain JSON types."""

    autoencoder: ComponentReport
    denoiser: ComponentReport

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        lines = []
        for name, part in (("autoencoder", self.autoencoder), ("denoiser", self.denoiser)):
            counts = {kind: len(getattr(part, kind)) for kind in ("taken", "skipped", "missing", "unexplained")}
            lines.append(f"{name}: {part.file!r}: " + ", ".join(f"{count} {kind}" for kind, count in counts.items()))
            lines += [f"  skipped {count}: {reason}" for reason, count in Counter(part.skipped.values()).items()]
            lines += [f"  {note}" for note in part.notes] + [f"  {part.config}"]
        return "\n".join(lines)


def convert(
    autoencoder_file: str | Path,
    denoiser_file: str | Path,
    out_folder: str | Path,
    *,
    autoencoder_config: AutoencoderConfig | None = None,
    denoiser_config: DenoiserConfig | None = None,
) -> ConversionReport:
    """Turns the two released files into a model folder for `load_model`, with the report as `conversion.json` in it.

    Args:
        autoencoder_file: PyTorch Lightning checkpoint (weights under `state_dict`), a bare state dict, or safetensors.
        denoiser_file: training file (weights taken from `ema`), a bare state dict, or safetensors.
        out_folder: new, empty, or a model folder, which is then replaced.
        autoencoder_config, denoiser_config: override what the files say and what their shapes imply.

    All weights are written in float32. Raises CheckpointError, and writes nothing, when a file is damaged or hostile, a
    weight is missing, misshapen, not floating-point or not finite, or a tensor has no explanation; the error's `report`
    is that file's ComponentReport, as far as it got.
    """
    checkpoint.require_replaceable(Path(out_folder).expanduser().resolve())
    encoder_config, encoder_state, encoder_report = _read("autoencoder", autoencoder_file, autoencoder_config)
    flow_config, flow_state, flow_report = _read("denoiser", denoiser_file, denoiser_config)
    try:
        model = ModelConfig(encoder_config, flow_config)
    except ValueError as error:
        raise CheckpointError(f"{autoencoder_file} and {denoiser_file} do not belong together: {error}") from None
    report = ConversionReport(encoder_report, flow_report)
    models = {"autoencoder": (encoder_config, encoder_state), "denoiser": (flow_config, flow_state)}
    checkpoint.write_model_folder(out_folder, models, model.schedule, {"conversion.json": report.to_dict()})
    return report


def _read(
    component: str, file: str | Path, config: ComponentConfig | None
) -> tuple[ComponentConfig, dict[str, Tensor], ComponentReport]:
    file = Path(file).expanduser()
    report = ComponentReport(file.name)
    with _open(file, report) as (contents, read_storage):
        views = _weights(component, contents, report)
        shapes = {key: view.shape for key, view in views.items()}
        config = config or _infer(component, contents, shapes, report)
        report.config = config.to_dict()
        expected = {key: tuple(t.shape) for key, t in checkpoint.build_empty(component, config).state_dict().items()}
        report.missing = [key for key in expected if key not in views]
        report.unexplained += [key for key in views if key not in expected]
        problems = checkpoint.key_problems(expected, shapes | dict.fromkeys(report.unexplained, ()))
        dtypes = {key: view.storage.dtype for key, view in views.items()}
        odd = [f"{key!r} is {dtype}" for key, dtype in dtypes.items() if not (dtype and dtype.is_floating_point)]
        problems += [f"{len(odd)} tensors not floating-point: {abridge(odd)}"] if odd else []
        if problems:
            raise CheckpointError(
                f"does not fit the {component} {config}: {'; '.join(problems)}; check that this is the {component}'s "
                f"file, or give {component}_config"
            )
        state = {}
        for key in expected:
            stored = _tensor(views[key], read_storage)
            state[key] = stored.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
            checkpoint.require_finite(component, key, state[key])
            report.taken[key] = f"{stored.dtype} {views[key].shape}"
    return config, state, report


def read_discriminator(file: str | Path, wanted: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of the discriminator in a released autoencoder's file, or in a file that holds nothing else.

    Args:
        file: PyTorch Lightning checkpoint, state dict or safetensors; keys may begin with `volume_discriminator.`.
        wanted: a state dict with the keys, shapes and dtypes that they must have, or be converted to.

    Raises CheckpointError for a file that is damaged or hostile, or whose weights are others or not finite.
    """
    file = Path(file).expanduser()
    report = ComponentReport(file.name)
    with _open(file, report) as (contents, read_storage):
        weights = _state_dict("autoencoder", contents, report)
        prefixed = {key: view for key, view in weights.items() if key.startswith(_DISCRIMINATOR)}
        views = {key.removeprefix(_DISCRIMINATOR): view for key, view in (prefixed or weights).items()}
        shapes = {key: tuple(tensor.shape) for key, tensor in wanted.items()}
        if problems := checkpoint.key_problems(shapes, {key: view.shape for key, view in views.items()}):
            raise CheckpointError(f"holds no discriminator that fits: {'; '.join(problems)}")
        if odd := [repr(key) for key in wanted if views[key].storage.dtype is None]:
            raise CheckpointError(f"{len(odd)} tensors of unknown dtypes: {abridge(odd)}")
        state = {key: _tensor(views[key], read_storage).to(like.dtype, copy=True) for key, like in wanted.items()}
        for key, tensor in state.items():
            checkpoint.require_finite("discriminator", key, tensor)
    return state


def _tensor(view: _View, read_storage: Callable[[_Storage], Tensor]) -> Tensor:
    return read_storage(view.storage).as_strided(view.shape, view.stride, view.offset)


def _weights(component: str, contents: Any, report: ComponentReport) -> dict[str, _View]:
    """The model's weights in `contents`. All other tensors go to the report, as skipped or as unexplained."""
    weights = _state_dict(component, contents, report)
    for prefix, reason in _TRAINING_ONLY.items():
        report.skipped |= {key: reason for key in weights if key.startswith(prefix)}
    return {key: view for key, view in weights.items() if key not in report.skipped}


def _state_dict(component: str, contents: Any, report: ComponentReport) -> dict[str, _View]:
    """The state dict that `contents` is, or holds under the component's key; tensors beside it go to the report."""
    place = _WEIGHTS_KEY[component]
    weights = contents
    if isinstance(contents, dict) and not all(isinstance(value, _View) for value in contents.values()):
        weights = contents.get(place)
        for path, leaf in _leaves({key: value for key, value in contents.items() if key != place}):
            if isinstance(leaf, _View) and path[0] in _BESIDE:
                report.skipped["/".join(path)[:_MAX_NAME]] = _BESIDE[path[0]]
            elif isinstance(leaf, _View):
                report.unexplained.append("/".join(path)[:_MAX_NAME])
    if not isinstance(weights, dict) or not weights:
        raise CheckpointError(f"must be a state dict, or have one as {place!r}; is this the {component}'s file?")
    strangers = [repr(str(key)) for key, value in weights.items() if type(key) is not str or type(value) is not _View]
    if strangers:
        raise CheckpointError(f"{len(strangers)} entries of the state dict are no tensors: {abridge(strangers)}")
    if all(key.startswith("module.") for key in weights):
        weights = {key.removeprefix("module."): view for key, view in weights.items()}
        report.notes.append("took the prefix 'module.' of distributed training off every key")
    return weights


def _infer(
    component: str, contents: dict[Any, Any], shapes: Mapping[str, Sequence[int]], report: ComponentReport
) -> ComponentConfig:
    try:
        if component == "denoiser":
            return checkpoint.infer_denoiser_config(shapes)
        said: dict[str, set[int]] = {"num_groups": set(), "patch_size": set()}
        for path, leaf in _leaves(contents.get("hyper_parameters")):
            # An OmegaConf node keeps its value under _content and _val.
            names = [part for part in path if part not in ("_content", "_val") and not part.isdigit()]
            if type(leaf) is int and "_metadata" not in names and names and names[-1] in said:
                said[names[-1]].add(leaf)
        settings = {name: min(values) for name, values in said.items() if len(values) == 1}
        report.notes += [f"{name} = {value}, from the file's hyper-parameters" for name, value in settings.items()]
        try:
            return checkpoint.infer_autoencoder_config(shapes, **settings)
        except ValueError as error:
            report.notes.append(f"num_groups and patch_size as released, because {error}")
            return checkpoint.infer_autoencoder_config(shapes)
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"no {component} configuration follows from the shapes of the weights: {error!r}; check that this is the "
            f"{component}'s file, or give {component}_config"
        ) from None


def _leaves(root: Any) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every (path, leaf) below `root`. Enters each container once, whatever refers to it."""
    seen, todo = set(), [((), root)]
    while todo:
        path, node = todo.pop()
        parts = node.parts if isinstance(node, _Foreign) else node
        if not isinstance(parts, (dict, list, tuple)):
            yield path, node
        elif id(node) not in seen:
            seen.add(id(node))
            if len(path) > _MAX_DEPTH:
                raise CheckpointError(f"{path[0]!r} is nested more than {_MAX_DEPTH} deep; do not trust this file")
            children = parts.items() if isinstance(parts, dict) else enumerate(parts)
            todo.extend(((*path, str(key)[:_MAX_NAME]), child) for key, child in children)


@contextmanager
def _open(file: Path, report: ComponentReport) -> Iterator[tuple[Any, Callable[[_Storage], Tensor]]]:
    """Yields the contents of a released file, and a function that reads a storage as a 1-D tensor.

    Every error here and in the body of the `with` becomes a CheckpointError with the file's name and the report.
    """
    try:
        with open(file, "rb") as stream:
            if file.suffix == ".safetensors":
                with safe_open(file, framework="pt") as stored:
                    views = {key: _safetensors_view(key, stored.get_slice(key)) for key in stored.keys()}  # noqa: SIM118
                    yield views, lambda storage: stored.get_tensor(storage.key).view(-1)
            else:
                contents, read = (_open_zip if stream.read(4) == b"PK\x03\x04" else _open_legacy)(stream)
                yield contents, lambda storage: torch.frombuffer(bytearray(read(storage)), dtype=storage.dtype)
    except CheckpointError as error:
        raise CheckpointError(f"{file}: {error}", report) from None
    except Exception as error:  # a damaged or hostile file can provoke any
        message = f"{file}: cannot be read ({error!r}); check the path, or download the file again"
        raise CheckpointError(message, report) from error


def _safetensors_view(key: str, part: Any) -> _View:
    shape, dtype = tuple(part.get_shape()), _DTYPES.get(part.get_dtype())
    stride = tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))
    return _View(_Storage(key, dtype, math.prod(shape)), 0, shape, stride)


def _open_zip(stream: BinaryIO) -> tuple[Any, Callable[[_Storage], bytes]]:
    """Torch's format since 1.6: an uncompressed zip of */data.pkl and a record */data/KEY for each storage."""
    archive, file_size = zipfile.ZipFile(stream), stream.seek(0, io.SEEK_END)
    roots = [name.removesuffix("data.pkl") for name in archive.namelist() if name.endswith("/data.pkl")]
    if len(roots) != 1:
        raise CheckpointError(f"is a zip file with {len(roots)} data.pkl in it, not a torch checkpoint")

    def record(name: str, size: int | None = None) -> bytes:
        info, limit = archive.NameToInfo.get(roots[0] + name), _MAX_PICKLE_BYTES if size is None else file_size
        stored = info is not None and info.compress_type == zipfile.ZIP_STORED
        if not stored or info.file_size > limit or size not in (None, info.file_size):
            raise CheckpointError(f"record {name!r} is missing, compressed or not of its size; download the file again")
        return archive.read(info)

    if roots[0] + "byteorder" in archive.NameToInfo and record("byteorder") != b"little":
        raise CheckpointError("was written on a big-endian machine; write it again on a little-endian one")
    contents = _read_pickle(io.BytesIO(record("data.pkl")), {})
    return contents, lambda storage: record(f"data/{storage.key}", storage.numel * storage.dtype.itemsize)


def _open_legacy(stream: BinaryIO) -> tuple[Any, Callable[[_Storage], bytes]]:
    """Torch's format before 1.6: five pickles, then for each storage its length (int64) and its data."""
    stream.seek(0)
    head = io.BytesIO(stream.read(_MAX_PICKLE_BYTES))
    storages: dict[str, _Storage] = {}
    if [_read_pickle(head, storages), _read_pickle(head, storages)] != _LEGACY_HEAD:
        raise CheckpointError("is no file of torch.save, or one too old; save it again with torch 1.6 or newer")
    _, contents, keys = (_read_pickle(head, storages) for _ in range(3))
    starts, offset, file_size = {}, head.tell(), stream.seek(0, io.SEEK_END)
    for storage in (storages[key] for key in keys):
        stream.seek(offset)
        if int.from_bytes(stream.read(8), "little") != storage.numel:
            raise CheckpointError(f"storage {storage.key!r} is not of its size; download the file again")
        starts[storage.key] = offset + 8
        offset += 8 + storage.numel * storage.dtype.itemsize
    if offset > file_size:
        raise CheckpointError(f"ends after {file_size} bytes of at least {offset}; download the file again")

    def read(storage: _Storage) -> bytes:
        stream.seek(starts[storage.key])
        return stream.read(storage.numel * storage.dtype.itemsize)

    return contents, read


@dataclass(frozen=True)
class _Storage:
    key: str
    dtype: torch.dtype | None  # None: not among _DTYPES
    numel: int


@dataclass(frozen=True)
class _View:
    """A tensor, described and not read. All numbers are in elements."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    def __post_init__(self) -> None:
        if not len(self.shape) == len(self.stride) <= _MAX_DIMENSIONS:
            raise CheckpointError("holds a tensor whose shape and stride disagree; do not trust this file")
        numbers = (self.offset, *self.shape, *self.stride)
        last = self.offset + sum((n - 1) * step for n, step in zip(self.shape, self.stride, strict=True))
        outside = math.prod(self.shape) > self.storage.numel or (0 not in self.shape and last >= self.storage.numel)
        if outside or any(type(number) is not int or number < 0 for number in numbers):
            raise CheckpointError(
                f"holds a tensor of shape {self.shape}, stride {self.stride} and offset {self.offset}, which reaches "
                f"outside its storage of {self.storage.numel} elements; do not trust this file"
            )


class _Foreign:
    """Stands for a class or function that a pickle names, and for whatever it would return. Keeps its parts, inert."""

    def __init__(self, name: str, *parts: Any) -> None:
        self.name, self.parts = name, list(parts)


def _read_pickle(stream: BinaryIO, storages: dict[str, _Storage]) -> Any:
    """Interprets the next pickle of `stream` without running it; adds the storages it refers to to `storages`.

    Raises CheckpointError for what torch.save does not write, and nearly anything for a malformed pickle.
    """
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[int, Any] = {}

    def take(count: int | None) -> list[Any]:
        start = marks.pop() if count is None else len(stack) - count
        items, stack[start:] = stack[start:], []
        return items

    for opcode, argument, _ in pickletools.genops(stream):
        name = opcode.name
        if name in _CONSTANTS:
            stack.append(_CONSTANTS[name]())
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(memo[argument])
        elif name in ("BINPUT", "LONG_BINPUT", "MEMOIZE"):
            memo[len(memo) if argument is None else argument] = stack[-1]
        elif name == "MARK":
            marks.append(len(stack))
        elif name in _TUPLES:
            stack.append(tuple(take(_TUPLES[name])))
        elif name in _ADDITIONS:
            _add(take(_ADDITIONS[name]), stack[-1], keyed=name.startswith("SETITEM"))
        elif name == "BUILD":
            state = stack.pop()
            if isinstance(stack[-1], _Foreign):
                stack[-1].parts.append(state)
        elif name in ("GLOBAL", "STACK_GLOBAL"):
            stack.append(_Foreign(".".join(argument.split(" ", 1) if argument else take(2))))
        elif name in ("REDUCE", "NEWOBJ"):
            stack.append(_construct(*take(2)))
        elif name == "BINPERSID":
            stack.append(_describe_storage(stack.pop(), storages))
        elif name == "STOP":
            return stack.pop()
        elif opcode.arg and opcode.stack_after and opcode.stack_after != [pickletools.anyobject]:
            stack.append(argument)  # a number, a string or bytes
        elif name not in ("PROTO", "FRAME"):
            raise CheckpointError(f"holds the pickle opcode {name}, unknown in checkpoints; do not trust this file")


def _describe_storage(identity: Any, storages: dict[str, _Storage]) -> _Storage:
    match identity:
        case ("storage", _Foreign(name=kind), str(key), _, int(numel), *view) if view in ([], [None]):
            storage = _Storage(key, _DTYPES.get(kind.removeprefix("torch.").removesuffix("Storage")), numel)
            if storages.setdefault(key, storage) == storage:
                return storage
    raise CheckpointError("refers to a storage in a way that torch.save does not; do not trust this file")


def _construct(callee: Any, arguments: Any) -> Any:
    """What a call in the pickle stands for. The three functions of torch and Python that matter are acted out here."""
    if not (isinstance(callee, _Foreign) and isinstance(arguments, tuple)):
        raise CheckpointError("calls what is no function or class; do not trust this file")
    match callee.name, arguments:
        case "collections.OrderedDict", ():
            return {}
        case "torch._utils._rebuild_tensor_v2", (_Storage(), _, tuple(), tuple(), *_):
            return _View(*arguments[:4])
        case "torch._utils._rebuild_parameter", (_View() as view, *_):
            return view
    return _Foreign(callee.name, arguments)


def _add(items: list[Any], target: Any, keyed: bool) -> None:
    if isinstance(target, _Foreign):
        target.parts.append({} if keyed else [])
        target = target.parts[-1]
    if type(target) is not (dict if keyed else list):
        raise CheckpointError(f"adds items to a {type(target).__name__}; do not trust this file")
    if keyed:
        # The hash of a nested tuple recurses without limit, so compound keys become stand-ins.
        keys = (key if isinstance(key, (str, int, float, bytes)) else _Foreign("key", key) for key in items[::2])
        target.update(zip(keys, items[1::2], strict=True))
    else:
        target.extend(items)
