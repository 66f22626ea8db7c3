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
from collections.abc import Callable

from jsonargparse import ArgumentParser, DefaultHelpFormatter, Namespace

from meddiff.cli.arguments import UsageError
from meddiff.cli.commands import convert, decode, doctor, encode, measure, plan, reconstruct
from meddiff.cli.generation import generate


class _HelpFormatter(argparse.RawDescriptionHelpFormatter, DefaultHelpFormatter):
    """Keeps the line breaks of the examples."""


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
    written = train(options)
    if os.environ.get("RANK", "0") == "0":  # of torchrun's or accelerate's processes
        print(f"wrote {written}")


def _print_warning(message, category, filename, lineno, file=None, line=None) -> None:
    print(f"note: {message}", file=sys.stderr)


def _version() -> str:
    from meddiff import __version__

    return f"meddiff {__version__}"
