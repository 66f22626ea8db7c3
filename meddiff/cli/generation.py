"""`meddiff generate`: one volume, steered or not, or many in a folder."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from jsonargparse.typing import PositiveInt

from meddiff.cli.arguments import (
    Dtype,
    UsageError,
    check_target,
    check_window,
    describe_extent,
    load_model,
    parse_triple,
)

if TYPE_CHECKING:
    from meddiff.pipelines import MedDiffusion
    from meddiff.pipelines.jobs import VolumeJob


def generate(
    out: str,
    model: str | None = None,
    untrained: str | None = None,
    anatomy: str | None = None,
    size: PositiveInt | str | None = None,
    spacing: float | str | None = None,
    solver: Literal["ddim", "dpmsolver++", "ddpm"] | None = None,
    steps: PositiveInt | None = None,
    eta: float | None = None,
    order: Literal[1, 2] | None = None,
    timestep_spacing: Literal["linspace", "leading", "trailing"] | None = None,
    t_end: int | None = None,
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
    budget: str | None = None,
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
        solver: ddim or dpmsolver++ (few steps), or ddpm (all 1000); by default the model's own, mostly ddim.
        steps: Denoising steps; by default the model's with its own solver, else 50 for ddim, 20 for dpmsolver++.
        eta: Fresh noise in DDIM, 0 to 1; by default the model's with its own solver, else 0.
        order: Of dpmsolver++, by default 2.
        timestep_spacing: How the steps of ddim and dpmsolver++ are spread, by the names that diffusers gives them; by
            default the model's with its own solver, else linspace.
        t_end: Timestep from which the last step goes to the clean volume; by default the model's, mostly 0.
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
        budget: Memory that decoding may take beside the weights, such as 8GB; by default what is free.
        force: Begin even if a volume takes hours on this CPU.
    """
    from meddiff.pipelines import generate_controlled, jobs_from_count, jobs_from_list
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
        check_target(out, (".nii", ".nii.gz"))
    elif Path(out).exists() and not Path(out).is_dir():
        raise UsageError(f"{out}: with --count or --list, --out is a folder")
    check_target(preview, (".png",))
    voxels, mm = parse_triple(size, int), parse_triple(spacing, float)
    window, given = check_window(low, high), _controls(control, condition, strength)
    _, world, local = launched_process()
    if world > 1 and not many:
        raise UsageError("several processes share the volumes of --count or --list; give one, and a folder")
    if steered and model is None and untrained is None:
        model = _base(given)
    loaded = load_model(model, untrained, _of_process(device, local, world), dtype, budget)
    if decode_device is not None:
        loaded.decode_on(decode_device)
    options = dict(solver=solver, steps=steps, eta=eta, order=order, timestep_spacing=timestep_spacing, t_end=t_end)

    if many:
        if list is None:
            jobs, bad = jobs_from_count(loaded, count, seed, anatomy, voxels, mm), {}
        else:
            jobs, bad = jobs_from_list(loaded, list, seed, anatomy, voxels, mm)
        options |= dict(batch=batch, overlap=decode_device is not None, force=force)
        _generate_many(loaded, jobs, bad, out, **options)
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
    options |= dict(spacing=mm, seed=seed)
    if out.endswith(".nii") and not preview and not steered:
        record = loaded.generate_to(out, anatomy, voxels, **options)
    else:
        if steered:
            volume = generate_controlled(loaded, steering, anatomy, voxels, consistency=consistency, **options)
        else:
            volume = loaded.generate(anatomy, voxels, **options)
        volume.save(out)
        record = volume.record
        if preview:
            save_mid_planes(volume, preview)
    for stage in record["stages"]:
        peak = "" if stage["peak_bytes"] is None else f", peak {stage['peak_bytes'] / 2**30:.1f} GiB"
        print(f"{stage['name']}: {stage['seconds']:.1f} s{peak}")
    print(f"wrote {out} ({describe_extent(record['size'], record['spacing_mm'])}, {record['modality']})")


def _generate_many(
    model: MedDiffusion, jobs: Sequence[VolumeJob], bad: dict[str, str], folder: str, **options: Any
) -> None:
    """`generate_volumes`, told in lines; `bad` are the rows that are no jobs, with what is wrong with them."""
    from meddiff.pipelines import generate_volumes
    from meddiff.pipelines.generate import launched_process

    rank, world, _ = launched_process()
    name = f"[{rank}] " if world > 1 else ""
    outcome = generate_volumes(model, jobs, folder, report=lambda line: print(name + line, flush=True), **options)
    failed = bad | outcome.failed
    if rank == 0:
        for row, reason in bad.items():
            print(f"failed: {row}: {reason}")
        print(f"{outcome.made} volumes made, {outcome.found} were there, {len(failed)} failed: {folder}/manifest.jsonl")
    if failed:
        first, reason = next(iter(failed.items()))
        raise ValueError(
            f"{len(failed)} of {len(jobs) + len(bad)} volumes were not made, such as {first}: {reason}; "
            "the others are there, and the same command tries again"
        )


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


def _of_process(device: str | None, local: int, world: int) -> str | None:
    """The GPU of one of several processes, if none is named."""
    import torch

    if device is not None or world == 1 or not torch.cuda.is_available():
        return device
    return f"cuda:{local % torch.cuda.device_count()}"
