"""The command line: `meddiff generate | reconstruct | encode | decode | measure | plan | convert | train … | evaluate |
doctor`.

Exit codes: 0 done, 1 failed (one line on standard error says why), 2 wrong arguments, 130 interrupted.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from jsonargparse import ArgumentParser, DefaultHelpFormatter, Namespace
from jsonargparse.typing import PositiveInt

if TYPE_CHECKING:
    from meddiff.pipelines import MedDiffusion

Dtype = Literal["float32", "bfloat16", "float16"]
Modality = Literal["CT", "MR"]


class UsageError(Exception):
    """Arguments that do not go together."""


class _HelpFormatter(argparse.RawDescriptionHelpFormatter, DefaultHelpFormatter):
    """Keeps the line breaks of the examples."""


def generate(
    out: str,
    model: str | None = None,
    untrained: str | None = None,
    anatomy: str | None = None,
    size: PositiveInt | str | None = None,
    spacing: float | str | None = None,
    solver: Literal["ddim", "dpmsolver++", "ddpm"] = "ddim",
    steps: PositiveInt | None = None,
    eta: float = 0.0,
    order: Literal[1, 2] | None = None,
    timestep_spacing: Literal["linspace", "leading", "trailing"] = "linspace",
    seed: int = 0,
    count: PositiveInt | None = None,
    list: str | None = None,
    batch: PositiveInt | None = None,
    preview: str | None = None,
    control: list[str] | str | None = None,
    condition: list[str] | str | None = None,
    strength: list[float] | float = 1.0,
    low: float | None = None,
    high: float | None = None,
    consistency: bool = True,
    device: str | None = None,
    decode_device: str | None = None,
    dtype: Dtype | None = None,
    force: bool = False,
) -> None:
    """Generate volumes from noise, or one as a condition asks for.

    Args:
        out: NIfTI file to write (.nii or .nii.gz); a .json beside it says how the volume came about. Or, with count or
            list, a folder. It gets manifest.jsonl and its volumes; the same command again goes on where it stopped.
        model: Model folder, or "organisation/name" on the Hugging Face hub; by default the small demo that ships.
        untrained: Preset with random weights instead of a model (8x, 4x, tiny): it generates noise, for trials.
        anatomy: What to generate, see the list below; by default the first that the model was trained for.
        size: Voxels along the file's axes, such as 512 or 256x256x128; by default the first that it was trained for.
        spacing: Voxel spacing in mm along the same axes, such as 1 or 0.7x0.7x1; by default the one of that size.
        solver: ddim or dpmsolver++ (few steps), or ddpm (all 1000).
        steps: Denoising steps; by default 50 for ddim, 20 for dpmsolver++.
        eta: Fresh noise in DDIM, 0 to 1.
        order: Of dpmsolver++, by default 2.
        timestep_spacing: How the steps of ddim and dpmsolver++ are spread, by the names that diffusers gives them.
        seed: The same seed gives the same volume. With count, that of the first volume; each other has the next one.
        count: How many volumes to generate.
        list: CSV file of volumes, with any of the columns anatomy, size, spacing, seed and file (its name).
        batch: Volumes to denoise side by side; by default as many as fit into the memory of a GPU, one on a CPU.
        preview: PNG of the three middle planes to write, of one volume.
        control: ControlNet folder, or a list of them in brackets; their base is the model where none is named.
        condition: For each a mask or a first reconstruction (NIfTI), or what `meddiff measure` wrote. The volume gets
            its size, spacing and affine.
        strength: Of each ControlNet, 0 to 1 or beyond.
        low: Intensity of a reconstruction that maps to -1, as for reconstruct. Goes with high.
        high: Intensity of a reconstruction that maps to 1.
        consistency: Whether what was measured is imposed on the volume, where the condition is a measurement.
        device: Such as cuda, cuda:1 or cpu; by default the GPU where there is one, for each process its own.
        decode_device: Device on which one volume is decoded while others are denoised; by default it is one for both.
        dtype: Of the networks; by default bfloat16 where the device has it.
        force: Begin even if a volume takes hours on this CPU.
    """
    from meddiff.pipelines import generate_controlled, generate_volumes, jobs_from_count, jobs_from_list
    from meddiff.pipelines.generate import launched_process
    from meddiff.pipelines.plan import plan_generation
    from meddiff.report import save_mid_planes

    many = list is not None or (count is not None and not out.endswith((".nii", ".nii.gz")))
    if list is not None and count is not None:
        raise UsageError("give either --count or --list, which has a row for each volume")
    if many and preview:
        raise UsageError("--preview is for one volume")
    steered = control is not None or condition is not None
    if steered and (list is not None or count is not None):
        raise UsageError("--control and --condition are for one volume; leave out --count and --list")
    if not many:
        if count not in (None, 1):
            raise UsageError(f"{out}: with --count {count}, --out is a folder")
        _check_target(out, (".nii", ".nii.gz"))
    elif Path(out).exists() and not Path(out).is_dir():
        raise UsageError(f"{out}: with --count or --list, --out is a folder")
    _check_target(preview, (".png",))
    voxels, mm = _triple(size, int), _triple(spacing, float)
    window, given = _window(low, high), _controls(control, condition, strength)
    rank, world, local = launched_process()
    if world > 1 and not many:
        raise UsageError("several processes share the volumes of --count or --list; give one, and a folder")
    if steered and model is None and untrained is None:
        model = _base(given)
    loaded = _load(model, untrained, _of_process(device, local, world), dtype)
    if decode_device is not None:
        loaded.decode_on(decode_device)
    options = dict(solver=solver, steps=steps, eta=eta, order=order, timestep_spacing=timestep_spacing)

    if many:
        bad = {}
        if list is None:
            jobs = jobs_from_count(loaded, count, seed, anatomy, voxels, mm)
        else:
            jobs, bad = jobs_from_list(loaded, list, seed, anatomy, voxels, mm)
        overlap = decode_device is not None
        name = f"[{rank}] " if world > 1 else ""
        outcome = generate_volumes(
            loaded,
            jobs,
            out,
            batch=batch,
            overlap=overlap,
            force=force,
            report=lambda line: print(name + line, flush=True),
            **options,
        )
        failed = bad | outcome.failed
        if rank == 0:
            for row, reason in bad.items():
                print(f"failed: {row}: {reason}")
            print(
                f"{outcome.made} volumes made, {outcome.found} were there, {len(failed)} failed: {out}/manifest.jsonl"
            )
        if failed:
            first, reason = next(iter(failed.items()))
            raise ValueError(
                f"{len(failed)} of {len(jobs) + len(bad)} volumes were not made, such as {first}: {reason}; "
                "the others are there, and the same command tries again"
            )
        return

    if steered:
        steering = _steering(loaded, given, window)
        extents = steering[0][1].shape
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # generate says it too
            extents = loaded.target(anatomy, voxels, mm).size
    plan = plan_generation(loaded, extents, loaded.settings(**options)["steps"], batch=1)
    if not steered:  # what ControlNets and consistency take comes on top
        print(plan, flush=True)
    plan.require_possible()
    if not force:
        plan.require_patience()
    if out.endswith(".nii") and not preview and not steered:
        record = loaded.generate_to(out, anatomy, voxels, spacing=mm, seed=seed, **options)
    else:
        if steered:
            volume = generate_controlled(
                loaded, steering, anatomy, voxels, spacing=mm, seed=seed, consistency=consistency, **options
            )
        else:
            volume = loaded.generate(anatomy, voxels, spacing=mm, seed=seed, **options)
        volume.save(out)
        record = volume.record
        if preview:
            save_mid_planes(volume, preview)
    for stage in record["stages"]:
        peak = "" if stage["peak_bytes"] is None else f", peak {stage['peak_bytes'] / 2**30:.1f} GiB"
        print(f"{stage['name']}: {stage['seconds']:.1f} s{peak}")
    print(f"wrote {out} ({_extent(record['size'], record['spacing_mm'])}, {record['modality']})")


def measure(
    volume: str,
    out: str,
    control: str,
    modality: Modality | None = None,
    low: float | None = None,
    high: float | None = None,
    seed: int = 0,
) -> None:
    """Simulate what a ControlNet's task would measure of a volume: k-space lines, or projections.

    Args:
        out: File to write (.safetensors), for `meddiff generate --condition`.
        control: ControlNet folder, whose task it is.
        modality: CT (Hounsfield units) or MR; by default judged from the voxels.
        low: Intensity that maps to -1; by default -1000 for CT, the 0.5th percentile for MR. Goes with high.
        high: Intensity that maps to 1; by default 1000 for CT, the 99.5th percentile for MR.
        seed: Of the lines that are measured.
    """
    from meddiff.checkpoint import load_controlnet
    from meddiff.pipelines import Condition
    from meddiff.volume import Volume

    _check_target(out, (".safetensors",))
    task = load_controlnet(control).task
    Condition.simulate(Volume.load(volume, modality, _window(low, high)), task, seed).save(out, task)
    print(f"wrote {out}")


def reconstruct(
    volume: str,
    out: str,
    model: str | None = None,
    untrained: str | None = None,
    modality: Modality | None = None,
    low: float | None = None,
    high: float | None = None,
    device: str | None = None,
    dtype: Dtype | None = None,
) -> None:
    """Send a volume through the autoencoder: encode, quantise, decode jointly.

    Args:
        out: NIfTI file to write, with the same shape, orientation, affine and dtype.
        model: Model folder, or "organisation/name" on the Hugging Face hub; by default the small demo that ships.
        untrained: Preset with random weights instead of a model (8x, 4x, tiny): it gives noise, for trials.
        modality: CT (Hounsfield units) or MR; by default judged from the voxels.
        low: Intensity that maps to -1; by default -1000 for CT, the 0.5th percentile for MR. Goes with high.
        high: Intensity that maps to 1; by default 1000 for CT, the 99.5th percentile for MR.
        device: Such as cuda, cuda:1 or cpu; by default the GPU where there is one.
        dtype: Of the networks; by default bfloat16 where the device has it.
    """
    from meddiff.volume import Volume

    _check_target(out, (".nii", ".nii.gz"))
    window = _window(low, high)
    original = Volume.load(volume, modality, window)
    pipeline = _load(model, untrained, device, dtype)
    if out.endswith(".nii"):
        pipeline.reconstruct_to(out, original)
    else:
        pipeline.reconstruct(original).save(out)
    print(f"wrote {out} ({_extent(original.shape, original.spacing)}, {original.intensity.modality})")


def encode(
    volume: str,
    out: str,
    model: str | None = None,
    untrained: str | None = None,
    modality: Modality | None = None,
    low: float | None = None,
    high: float | None = None,
    device: str | None = None,
    dtype: Dtype | None = None,
) -> None:
    """Encode a volume into a latent file.

    Args:
        out: File to write (.safetensors): code indices, latent, and the volume's geometry and intensities.
        model: Model folder, or "organisation/name" on the Hugging Face hub; by default the small demo that ships.
        untrained: Preset with random weights instead of a model (8x, 4x, tiny), for trials.
        modality: CT (Hounsfield units) or MR; by default judged from the voxels.
        low: Intensity that maps to -1; by default -1000 for CT, the 0.5th percentile for MR. Goes with high.
        high: Intensity that maps to 1; by default 1000 for CT, the 99.5th percentile for MR.
        device: Such as cuda, cuda:1 or cpu; by default the GPU where there is one.
        dtype: Of the networks; by default bfloat16 where the device has it.
    """
    from meddiff.volume import Volume

    _check_target(out, (".safetensors",))
    window = _window(low, high)
    original = Volume.load(volume, modality, window)
    encoded = _load(model, untrained, device, dtype).encode(original)
    encoded.save(out)
    print(f"wrote {out} (latent {'×'.join(map(str, encoded.indices.shape))})")


def decode(
    latent: str,
    out: str,
    model: str | None = None,
    untrained: str | None = None,
    device: str | None = None,
    dtype: Dtype | None = None,
) -> None:
    """Decode a latent file into a volume.

    Args:
        out: NIfTI file to write, in the geometry, units and dtype of the volume that was encoded.
        model: The model that encoded it.
        untrained: The preset with random weights that encoded it.
        device: Such as cuda, cuda:1 or cpu; by default the GPU where there is one.
        dtype: Of the networks; by default bfloat16 where the device has it.
    """
    from meddiff.pipelines import EncodedVolume

    _check_target(out, (".nii", ".nii.gz"))
    encoded = EncodedVolume.load(latent)
    pipeline = _load(model, untrained, device, dtype)
    if out.endswith(".nii"):
        pipeline.decode_to(out, encoded)
    else:
        pipeline.decode(encoded).save(out)
    print(f"wrote {out} ({'×'.join(map(str, encoded.shape))} voxels, {encoded.intensity.modality})")


def plan(
    size: PositiveInt | str = 512,
    preset: Literal["8x", "4x", "tiny"] = "8x",
    budget: str | None = None,
    device: str | None = None,
    dtype: Dtype | None = None,
) -> None:
    """Show how a volume would be decoded jointly within a budget of memory: what is kept, in what slabs, how long.

    Args:
        size: Voxels along the file's axes, such as 512 or 256x256x128; multiples of the downsampling factor.
        preset: Which autoencoder.
        budget: Memory beside the weights, such as 8GB, 900MB or 7.5GiB; by default what is free.
        device: Such as cuda, cuda:1 or cpu; by default the GPU where there is one.
        dtype: Of the network; by default bfloat16 where the device has it.
    """
    import torch

    from meddiff.config import PRESETS
    from meddiff.decode import make_plan
    from meddiff.models import PatchVolumeAutoencoder
    from meddiff.resources import available_bytes, bytes_of, default_device, default_dtype

    config = PRESETS[preset].autoencoder
    x, y, z = _triple(size, int)
    if any(n % config.downsample for n in (x, y, z)):
        raise UsageError(f"--size must be multiples of {config.downsample}, got {size}")
    place = torch.device(device) if device else default_device()
    precision = getattr(torch, dtype) if dtype else default_dtype(place)
    with torch.device("meta"):
        layers = PatchVolumeAutoencoder(config).decoder.layers()
    latent = (1, config.embedding_dim, *(n // config.downsample for n in (z, x, y)))
    try:
        limit = bytes_of(budget) if budget else available_bytes(place)
    except ValueError as error:
        raise UsageError(str(error)) from None
    print(make_plan(layers, latent, precision, place, limit).table())


def convert(out: str, autoencoder: str, denoiser: str) -> None:
    """Turn the released checkpoints of 3D MedDiffusion into a model folder. No code in the files is run.

    Args:
        autoencoder: Lightning checkpoint of the Patch-Volume autoencoder.
        denoiser: Checkpoint of BiFlowNet.
    """
    from meddiff.conversion import convert as convert_files

    print(convert_files(autoencoder, denoiser, out))
    print(f"wrote {out}")


def doctor() -> None:
    """Print what is installed and active, and what to do about what is missing."""
    from meddiff.doctor import examine

    print(examine())


def _anatomies() -> str:
    from meddiff.config import ANATOMIES

    lines = ["anatomies and their released sizes (X×Y×Z voxels):"]
    for name, anatomy in ANATOMIES.items():
        sizes = ", ".join("×".join(map(str, size)) for size in anatomy.sizes())
        lines.append(f"  {name:<17} {anatomy.title}: {sizes}")
    return "\n".join(lines)


# command → function, its positional arguments with their help, examples
_COMMANDS: dict[str, tuple[Callable[..., None], dict[str, str], str]] = {
    "generate": (
        generate,
        {},
        "examples:\n"
        "  meddiff generate --out chest.nii.gz --model DIR --anatomy ct_chest_abdomen --size 512 --seed 1\n"
        "  meddiff generate --out noise.nii.gz --untrained tiny --size 64 --steps 5 --preview noise.png\n"
        "  meddiff generate --out chests --model DIR --anatomy ct_chest_abdomen --count 100 --seed 1\n"
        "  torchrun --nproc-per-node 4 -m meddiff.cli generate --out mixed --model DIR --list volumes.csv\n"
        "  meddiff generate --out brain.nii.gz --control DIR --condition mask.nii.gz\n\n" + _anatomies(),
    ),
    "reconstruct": (
        reconstruct,
        {"volume": "NIfTI file to read."},
        "examples:\n"
        "  meddiff reconstruct brain.nii.gz --out again.nii.gz --model DIR\n"
        "  meddiff reconstruct chest.nii.gz --out again.nii.gz --model DIR --modality CT --low -1000 --high 600",
    ),
    "encode": (
        encode,
        {"volume": "NIfTI file to read."},
        "example:\n  meddiff encode brain.nii.gz --out brain.safetensors --model DIR",
    ),
    "decode": (
        decode,
        {"latent": "File that `meddiff encode` wrote."},
        "example:\n  meddiff decode brain.safetensors --out brain.nii.gz --model DIR",
    ),
    "measure": (
        measure,
        {"volume": "NIfTI file to read."},
        "example:\n  meddiff measure brain.nii.gz --out measured.safetensors --control DIR --low 0 --high 1000",
    ),
    "plan": (
        plan,
        {},
        "examples:\n  meddiff plan --size 512 --budget 8GB\n  meddiff plan --preset 4x --size 256x256x128 --budget 3GB",
    ),
    "convert": (
        convert,
        {"out": "Model folder to write."},
        "example:\n  meddiff convert my-model --autoencoder patchvolume.ckpt --denoiser biflownet.pt",
    ),
    "doctor": (doctor, {}, "example:\n  meddiff doctor"),
}


def _parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="meddiff",
        description="3D medical latent diffusion: generate, reconstruct, encode and decode volumes.",
        epilog="`meddiff COMMAND --help` shows a command's options and examples. Not for clinical use.",
        formatter_class=_HelpFormatter,
    )
    parser.add_argument("--version", action="version", version=_version())
    commands = parser.add_subcommands(required=True, dest="command")
    for name, (function, positionals, examples) in _COMMANDS.items():
        summary = (function.__doc__ or "").splitlines()[0]
        command = ArgumentParser(description=summary, epilog=examples)
        command.add_argument("--config", action="config", help="YAML file with any of the options.")
        for argument, text in positionals.items():
            command.add_argument(argument, type=str, help=text)
        flags = {"force"} if name == "generate" else set()
        command.add_function_arguments(function, skip={*positionals, *flags})
        if flags:
            command.add_argument("--force", action="store_true", help="Begin even if a volume takes hours on this CPU.")
        commands.add_subcommand(name, command, help=summary)
    _add_training(commands)
    return parser


_TRAIN_SUMMARY = "Train the models; options from a YAML file (--config), the command line, or both."
# command → class of its options, module of meddiff.training and function in it that take them
_TRAININGS = {
    "population": ("PopulationOptions", "population", "make_population"),
    "autoencoder": ("AutoencoderTraining", "autoencoder", "train_autoencoder"),
    "latents": ("LatentOptions", "latents", "encode_latents"),
    "denoiser": ("DenoiserTraining", "denoiser", "train_denoiser"),
    "controlnet": ("ControlNetTraining", "controlnet", "train_controlnet"),
}
_EVALUATION = ("EvaluationOptions", "evaluation", "evaluate")
_TASK_EVALUATION = ("EvaluationOptions", "task_evaluation", "evaluate_task")


def _add_training(commands) -> None:
    train = ArgumentParser(
        description=_TRAIN_SUMMARY,
        epilog="example:\n  meddiff train autoencoder --config stage1.yaml\n"
        "several processes:\n  accelerate launch -m meddiff.cli train autoencoder --config stage1.yaml",
        formatter_class=_HelpFormatter,
    )
    commands.add_subcommand("train", train, help=_TRAIN_SUMMARY)
    trainings = train.add_subcommands(required=True, dest="training")
    for name, (options, _, _) in _TRAININGS.items():
        _add_options(trainings, name, options)
    example = "example:\n  meddiff evaluate --data scans --model DIR --out scores.json --generated samples"
    _add_options(commands, "evaluate", _EVALUATION[0], example)


def _add_options(commands, name: str, options: str, epilog: str | None = None) -> None:
    """Add a command whose options are the fields of a class in meddiff.training.options."""
    kind = getattr(importlib.import_module("meddiff.training.options"), options)
    summary = kind.__doc__.splitlines()[0]
    command = ArgumentParser(description=summary, epilog=epilog, formatter_class=_HelpFormatter)
    command.add_argument("--config", action="config", help="YAML file with any of the options.")
    command.add_class_arguments(kind)
    commands.add_subcommand(name, command, help=summary)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # PyTorch's new tensors in huge pages: fewer page faults
    parser = _parser()
    parsed = parser.parse_args([_with_underscores(a) for a in (sys.argv[1:] if arguments is None else arguments)])
    command = parsed.command
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("default")
            warnings.showwarning = _print_warning
            if command in ("train", "evaluate"):
                chosen = parser.instantiate(parsed)[command]
                if command == "train":
                    _train(_TRAININGS[chosen.training], chosen[chosen.training])
                else:
                    _train(_EVALUATION if chosen.task is None else _TASK_EVALUATION, chosen)
            else:
                options = dict(parsed[command])
                options.pop("config", None)
                _COMMANDS[command][0](**options)
    except UsageError as error:
        print(f"meddiff: {error}", file=sys.stderr)
        return 2
    except (OSError, ValueError, MemoryError, FloatingPointError, ImportError) as error:
        print(f"meddiff: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("meddiff: interrupted; nothing was left half written", file=sys.stderr)
        return 130
    return 0


def _with_underscores(argument: str) -> str:
    """`--decode-device=cpu` is `--decode_device=cpu`."""
    name, equals, value = argument.partition("=")
    return "--" + name[2:].replace("-", "_") + equals + value if name.startswith("--") else argument


def _train(command: tuple[str, str, str], chosen: Namespace) -> None:
    kind, module, function = command
    values = dict(chosen)
    values.pop("config", None)
    options = getattr(importlib.import_module("meddiff.training.options"), kind)(**values)
    try:
        train = getattr(importlib.import_module(f"meddiff.training.{module}"), function)
    except ModuleNotFoundError as error:
        raise ImportError(f"training and evaluation need {error.name}: pip install 'meddiff[train]'") from error
    print(f"wrote {train(options)}")


def _load(model: str | None, untrained: str | None, device: str | None, dtype: str | None) -> MedDiffusion:
    import torch

    from meddiff.pipelines import MedDiffusion

    if model is not None and untrained is not None:
        raise UsageError("give either --model DIR or --untrained PRESET (random weights)")
    precision = getattr(torch, dtype) if dtype else None
    if untrained is None:
        return MedDiffusion.from_pretrained(model or "demo", device, precision)
    warnings.warn(f"--untrained {untrained}: random weights, so the result is noise", stacklevel=2)
    return MedDiffusion.untrained(untrained, device=device, dtype=precision)


def _controls(control, condition, strength) -> list[tuple[str, str, float]]:
    """Folder, condition and strength of each ControlNet."""
    controls, conditions = ([v] if isinstance(v, str) else list(v or ()) for v in (control, condition))
    if len(controls) != len(conditions):
        raise UsageError(
            f"every --control needs its --condition: there are {len(controls)} and {len(conditions)}; "
            "several are lists, --control '[A, B]' --condition '[a.nii.gz, b.nii.gz]'"
        )
    strengths = strength if isinstance(strength, list) else [strength] * len(controls)
    if len(strengths) != len(controls):
        raise UsageError(f"give one --strength, or one for each of {len(controls)} ControlNets, got {strength}")
    return list(zip(controls, conditions, strengths))


def _base(given: Sequence[tuple[str, str, float]]) -> str:
    """The model that the first ControlNet steers."""
    from meddiff.checkpoint import load_controlnet

    return load_controlnet(given[0][0]).base


def _steering(model: MedDiffusion, given: Sequence[tuple[str, str, float]], window: tuple[float, float] | None):
    """What `generate_controlled` takes."""
    from meddiff.pipelines import Condition, TrainedControl

    controls = [TrainedControl.from_pretrained(folder, model) for folder, _, _ in given]
    conditions = [Condition.load(file, control.task, window) for control, (_, file, _) in zip(controls, given)]
    return list(zip(controls, conditions, (strength for _, _, strength in given)))


def _check_target(path: str | None, suffixes: tuple[str, ...]) -> None:
    """Refuse a target that cannot be written before the work, not after it."""
    if path is None:
        return
    if not path.endswith(suffixes):
        raise UsageError(f"{path}: the name must end in {' or '.join(suffixes)}")
    if not Path(path).parent.is_dir():
        raise UsageError(f"{path}: there is no folder {Path(path).parent}; make it first")


def _triple(text: float | str | None, number: type[int] | type[float]) -> tuple | None:
    """One number for all three axes, or three with an x between them."""
    from meddiff.pipelines.jobs import triple

    try:
        return None if text is None else triple(text, number)
    except ValueError as error:
        raise UsageError(str(error)) from None


def _of_process(device: str | None, local: int, world: int) -> str | None:
    """The GPU of one of several processes, if none is named."""
    import torch

    if device is not None or world == 1 or not torch.cuda.is_available():
        return device
    return f"cuda:{local % torch.cuda.device_count()}"


def _window(low: float | None, high: float | None) -> tuple[float, float] | None:
    if (low is None) != (high is None):
        raise UsageError("give both --low and --high, or neither")
    return None if low is None else (low, high)


def _extent(shape: Sequence[int], spacing: Sequence[float]) -> str:
    size, mm = ("×".join(f"{n:g}" for n in values) for values in (shape, spacing))
    return f"{size} voxels of {mm} mm"


def _print_warning(message, category, filename, lineno, file=None, line=None) -> None:
    print(f"note: {message}", file=sys.stderr)


def _version() -> str:
    from meddiff import __version__

    return f"meddiff {__version__}"


if __name__ == "__main__":
    sys.exit(main())
