"""ControlNets measured at tiny size, against what the same calls give by hand."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

import meddiff
from meddiff.checkpoint import save_controlnet, weights_sha256
from meddiff.cli import main
from meddiff.config import ANATOMIES, PRESETS, ControlNetConfig, FastMRIConfig, MasksConfig
from meddiff.models import ControlNet
from meddiff.tasks import measure, reconstruct
from meddiff.training.controlnet import pad_around
from meddiff.training.data import draw_seed
from meddiff.training.evaluation import similarity
from meddiff.training.options import EvaluationOptions
from meddiff.training.task_evaluation import evaluate_task, tissue_dice

MASKS, FOUR = MasksConfig(means=(-1, -0.4, 0.2, 0.8)), FastMRIConfig()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A base, two ControlNets as they are at the start, and a listed volume of 60×64×50 voxels with its mask."""
    folder = tmp_path_factory.mktemp("models")
    base = meddiff.untrained("tiny", dtype=torch.float32, device="cpu")
    base.save_pretrained(folder / "base")
    anatomy = replace(ANATOMIES["mr_t1_brain"], volumes=(((64, 64, 64), (1.0, 1.0, 1.0)),))
    for name, task, changes in (
        ("fast_mri", FOUR, {}),
        ("masks", MASKS, {"encoder": "convolutional", "channels": 4, "widths": (2, 3, 4)}),
    ):
        network = ControlNet.from_denoiser(base.denoiser, ControlNetConfig(PRESETS["tiny"].denoiser, **changes))
        sha256 = weights_sha256(folder / "base")
        save_controlnet(folder / name, network, task, "base", sha256, {"mr_t1_brain": anatomy})
    x, y, z = np.meshgrid(*(np.linspace(-1, 1, n) for n in (60, 64, 50)), indexing="ij")
    labels = np.digitize(-np.sqrt(x**2 + y**2 + z**2), (-0.9, -0.6, -0.3)).astype(np.uint8)
    nib.save(nib.Nifti1Image(np.float32(300) * labels, np.eye(4)), folder / "a.nii.gz")
    nib.save(nib.Nifti1Image(labels, np.eye(4)), folder / "mask.nii.gz")
    (folder / "list.csv").write_text("file,anatomy,low,high,label\na.nii.gz,mr_t1_brain,0,1000,mask.nii.gz\n")
    return folder


def options(folder: Path, out: Path, task: str, **changes) -> EvaluationOptions:
    values = {"data": str(folder / "list.csv"), "model": str(folder / "base"), "control": str(folder / task)}
    return EvaluationOptions(out=str(out), task=task, steps=1, **values | changes)


def test_fast_mri_is_scored_beside_its_condition(folder, tmp_path):
    written = json.loads(evaluate_task(options(folder, tmp_path / "a.json", "fast_mri", seed=3)).read_text())
    (score,) = written["volumes"]
    x = torch.from_numpy(nib.load(folder / "a.nii.gz").get_fdata(dtype=np.float32).transpose(2, 0, 1) / 500 - 1)
    padded, inside = pad_around(x, 64, -1)
    assert padded.shape == (64, 64, 64) and torch.equal(padded[inside], x) and padded[:7].max() == -1
    first = reconstruct(measure(padded, FOUR, draw_seed(3, 0)), FOUR)[inside]
    for name, value in similarity(first[None, None], x[None, None]).items():
        assert score[f"condition_{name}"] == pytest.approx(value, rel=1e-4)
    assert score["size"] == [60, 64, 50] and written["mean"]["psnr"] == score["psnr"]
    assert written["consistency"] and written["task"]["acceleration"] == 4
    free = evaluate_task(options(folder, tmp_path / "b.json", "fast_mri", seed=3, consistency=False))
    (without,) = json.loads(free.read_text())["volumes"]
    assert without["condition_psnr"] == score["condition_psnr"]
    assert score["psnr"] > without["psnr"] + 3  # measured lines instead of what random weights make


def test_masks_are_scored_by_tissue_from_the_command_line(folder, tmp_path):
    arguments = ["--task", "masks", "--control", str(folder / "masks"), "--steps", "1"]
    arguments += ["--data", str(folder / "list.csv"), "--model", str(folder / "base")]
    arguments += ["--t_end", "300", "--timestep_spacing", "leading"]
    assert main(["evaluate", "--out", str(tmp_path / "a.json"), *arguments]) == 0
    written = json.loads((tmp_path / "a.json").read_text())
    assert (written["steps"], written["t_end"], written["timestep_spacing"]) == (1, 300, "leading")
    (score,) = written["volumes"]
    for tissue in MASKS.tissues:
        assert score[f"original_dice_{tissue}"] == pytest.approx(1) and 0 <= score[f"dice_{tissue}"] < 0.7
    assert "condition_psnr" not in score and score["psnr"] > 0


def test_dice_is_that_of_the_definition_for_the_tissues_of_the_mask():
    labels = torch.tensor([0, 0, 1, 1, 1, 3, 3, 3]).view(2, 2, 2)
    found = torch.tensor([0, 1, 1, 1, 2, 3, 3, 0]).view(2, 2, 2)
    x = torch.tensor(MASKS.means)[found]
    dice = tissue_dice(x, labels, MASKS, "dice_")
    assert dice == pytest.approx({"dice_background": 1 / 2, "dice_csf": 2 / 3, "dice_white_matter": 4 / 5})


def test_what_does_not_go_together_is_refused(folder, tmp_path):
    with pytest.raises(ValueError, match="trained for task fast_mri, not for masks"):
        evaluate_task(options(folder, tmp_path / "a.json", "masks", control=str(folder / "fast_mri")))
    (tmp_path / "list.csv").write_text(f"file\n{folder / 'a.nii.gz'}\n")
    with pytest.raises(ValueError, match="has no label"):
        evaluate_task(options(folder, tmp_path / "a.json", "masks", data=str(tmp_path / "list.csv")))
    (tmp_path / "list.csv").write_text(f"file,anatomy\n{folder / 'a.nii.gz'},mr_knee\n")
    with pytest.raises(ValueError, match="none of its volumes can be used for mr_t1_brain"):
        evaluate_task(options(folder, tmp_path / "a.json", "fast_mri", data=str(tmp_path / "list.csv")))
    with pytest.raises(ValueError, match="task needs control"):
        EvaluationOptions(out=str(tmp_path / "a.json"), data="a", model="b", task="masks")
    with pytest.raises(ValueError, match="steps, consistency: of a task's samples"):
        EvaluationOptions(out=str(tmp_path / "a.json"), data="a", steps=5, consistency=False)
    for changes in ({"disjoint": True}, {"generated": "b"}):
        with pytest.raises(ValueError, match="disjoint and generated are of a model"):
            options(folder, tmp_path / "a.json", "masks", **changes)
