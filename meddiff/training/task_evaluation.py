"""How well a ControlNet does its task: its images against the truth, and against the condition alone.

Figures are those of `meddiff.training.evaluation`, on the volume's own voxels: what was padded around it is cut off.
"""

from __future__ import annotations

import math
from importlib.metadata import version
from pathlib import Path
from statistics import fmean

import numpy as np
from monai.metrics import compute_dice
from torch import Tensor

from meddiff.config import ANATOMIES, MasksConfig, TaskConfig, task_to_dict
from meddiff.files import write_json
from meddiff.pipelines import Condition, MedDiffusion, TrainedControl
from meddiff.pipelines.control import sample_controlled
from meddiff.progress import progress
from meddiff.tasks import measure, one_hot, reconstruct
from meddiff.tasks.masks import classify
from meddiff.training.controlnet import pad_around, preparation_input, size_unit
from meddiff.training.data import draw_seed, leave_out, list_volumes, preparation
from meddiff.training.evaluation import similarity
from meddiff.training.options import EvaluationOptions


def evaluate_task(options: EvaluationOptions) -> Path:
    """Measure a ControlNet on volumes it has not seen; writes `out`, a JSON file, returns it.

    "volumes" holds for each: psnr (dB), ssim and ms_ssim of the steered sample against the truth, and with the prefix
    "condition_" the same of the first reconstruction that steers it. For masks instead of the latter, the Dice of each
    tissue that the mask has: "dice_…" of the sample's tissues (by its own mean intensities) with the mask, and
    "original_dice_…" of the true image's. "mean" holds the means over the volumes that have a figure.

    Raises ValueError and CheckpointError for options, data and models that cannot be used, VolumeError for a bad file
    where that is fatal.
    """
    model = MedDiffusion.from_pretrained(options.model)
    control = TrainedControl.from_pretrained(options.control, model)
    name = task_to_dict(control.task)["name"]
    if name != options.task:
        raise ValueError(
            f"evaluate: {options.control} was trained for task {name}, not for {options.task}; give --task {name}"
        )
    masks = isinstance(control.task, MasksConfig)
    sampling = {name: getattr(options, name) for name in ("solver", "steps", "eta", "timestep_spacing", "t_end")}
    settings = model.settings(**sampling)
    prepare, unit = preparation(options.spacing, masks), size_unit(model.autoencoder)
    default = next(iter(control.anatomies))
    scores = []
    for i, volume in enumerate(progress("evaluating")(list_volumes(options.data, default))):
        if volume.anatomy not in control.anatomies:
            continue
        if masks and volume.label is None:
            raise ValueError(f"evaluate: {volume.file} has no label; list it in {options.data}")
        try:
            x = prepare(preparation_input(volume, masks))
        except Exception as error:
            leave_out(error, options.on_bad)
            continue
        image, inside = pad_around(x["image"][0], unit, -1)
        labels = pad_around(x["label"][0], unit, 0)[0].long() if masks else None
        condition = _condition(control.task, image, labels, draw_seed(options.seed, i))
        sample = sample_controlled(
            model,
            [(control, condition, options.strength)],
            ANATOMIES[volume.anatomy].class_index,
            **sampling,
            seed=draw_seed(options.seed, i),
            consistency=options.consistency,
        ).cpu()
        truth, y = image[inside], sample[0, 0][inside].clamp(-1, 1)
        d, h, w = truth.shape
        scores.append(
            {"file": Path(volume.file).name, "size": [h, w, d], **similarity(y[None, None], truth[None, None])}
        )
        given = condition.values[inside]
        if masks:
            scores[-1] |= tissue_dice(y, given, control.task, "dice_")
            scores[-1] |= tissue_dice(truth, given, control.task, "original_dice_")
        else:
            alone = similarity(given[None, None], truth[None, None])
            scores[-1] |= {f"condition_{key}": value for key, value in alone.items()}
    if not scores:
        raise ValueError(
            f"evaluate: {options.data}: none of its volumes can be used for {', '.join(control.anatomies)}"
        )
    names = dict.fromkeys(key for score in scores for key, value in score.items() if isinstance(value, float))
    results = {
        "format": "meddiff-task-evaluation-1",
        "task": task_to_dict(control.task),
        "model": options.model,
        "model_sha256": model.fingerprint,
        "control": options.control,
        **{key: settings[key] for key in sampling},
        "seed": options.seed,
        "strength": options.strength,
        "consistency": options.consistency and not masks,
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": str(model.device),
        "data": options.data,
        "versions": {package: version(package) for package in ("meddiff", "torch", "monai")},
        "mean": {key: fmean(score[key] for score in scores if key in score) for key in names},
        "volumes": scores,
    }
    write_json(options.out, results)
    return Path(options.out)


def _condition(task: TaskConfig, image: Tensor, labels: Tensor | None, seed: int) -> Condition:
    """Of a volume whose place in space does not matter."""
    d, h, w = image.shape
    if labels is not None:
        return Condition(labels, (h, w, d), np.eye(4), None, "mask")
    measured = measure(image, task, seed)
    return Condition(reconstruct(measured, task), (h, w, d), np.eye(4), None, "measurement", measured)


def tissue_dice(x: Tensor, labels: Tensor, task: MasksConfig, prefix: str) -> dict[str, float]:
    """Dice of each tissue between an image [D, H, W] in [-1, 1] and a mask, for the tissues that the mask has."""
    wanted = one_hot(labels, task)[None]
    found = one_hot(classify(x, task), task)[None]
    dice = compute_dice(found, wanted, include_background=True, ignore_empty=True)[0].tolist()
    return {prefix + tissue: value for tissue, value in zip(task.tissues, dice) if not math.isnan(value)}
