"""The model that ships: what a person sees who has only installed the package."""

from __future__ import annotations

import json

import nibabel as nib
import numpy as np
import pytest
import torch

import meddiff
from meddiff.checkpoint import SHIPPED, load_controlnet
from meddiff.cli import main
from meddiff.config import ANATOMIES

DEMO = SHIPPED["demo"]
SIZE, SPACING = (192, 192, 192), (1.0, 1.0, 1.0)


@pytest.fixture(scope="module")
def model():
    return meddiff.from_pretrained("demo")


@pytest.fixture(scope="module")
def template() -> list[meddiff.Volume]:
    """The MNI152 template that it learned from, T1 and T2-like, not deformed."""
    pytest.importorskip("nilearn")
    from meddiff.training.population import undeformed

    return undeformed(SIZE, SPACING)


def similarity(a: np.ndarray, b: np.ndarray) -> dict[str, float]:
    from meddiff.training import evaluation

    tensors = [torch.from_numpy(x / 500.0 - 1).float()[None, None] for x in (a, b)]
    return evaluation.similarity(*tensors)


def test_it_is_small_and_has_a_card():
    weights = [path for path in DEMO.rglob("*.safetensors") if "controlnets" not in path.parts]
    assert sum(path.stat().st_size for path in weights) <= 12_000_000
    controls = list((DEMO / "controlnets").rglob("*.safetensors"))
    assert len(controls) == 2 and sum(path.stat().st_size for path in controls) <= 6_000_000
    assert "not a medical model" in (DEMO / "README.md").read_text()
    assert {path.name for path in DEMO.rglob("*") if path.is_file()} == {
        "README.md",
        "config.json",
        "conditions.png",
        "evaluation.json",
        "evaluation_stage1.json",
        "model.safetensors",
        "preview.png",
        "samples.png",
        "task_fast_mri.json",
        "task_masks.json",
    }


def test_it_knows_its_classes_and_sizes(model):
    anatomies = model.config.anatomies
    assert list(anatomies) == ["mr_t1_brain", "mr_t2_brain"]
    assert all(anatomy.class_index == ANATOMIES[name].class_index for name, anatomy in anatomies.items())
    assert {volume for a in anatomies.values() for volume in a.volumes} == {
        (SIZE, SPACING),
        ((128, 192, 128), (1.25, 1.25, 1.25)),
    }


def test_it_reconstructs_the_brain_that_it_learned_from_as_its_card_says(model, template):
    written = json.loads((DEMO / "evaluation.json").read_text())
    for volume, name, psnr, ssim in zip(template, ("mr_t1_brain", "mr_t2_brain"), (28, 24), (0.90, 0.78)):
        scores = similarity(model.reconstruct(volume).data, volume.data)
        assert scores["psnr"] >= psnr and scores["ssim"] >= ssim
        (of_template,) = (v for v in written["volumes"] if v["file"] == f"template_0_{name}.nii.gz")
        assert scores["psnr"] == pytest.approx(of_template["psnr"], abs=0.3)


def test_unseen_brains_are_as_good_and_stage_2_lowers_the_seams():
    written = json.loads((DEMO / "evaluation.json").read_text())
    unseen = [v for v in written["volumes"] if v["file"].endswith("mr_t1_brain.nii.gz") and v["file"][0].isdigit()]
    of_1_mm = [v for v in unseen if tuple(v["size"]) == SIZE]
    assert len(unseen) == 4 and len(of_1_mm) == 2
    assert all(v["psnr"] >= 28 and v["ssim"] >= 0.90 for v in of_1_mm)
    disjoint = json.loads((DEMO / "evaluation_stage1.json").read_text())["mean"]["disjoint_seam"]
    assert written["mean"]["seam"] < disjoint


def test_it_is_the_default_of_the_command_line(tmp_path, template, capsys):
    source, again = tmp_path / "t1.nii.gz", tmp_path / "again.nii.gz"
    template[0].save(source)
    assert main(["reconstruct", str(source), "--out", str(again)]) == 0
    found, wanted = (np.asarray(nib.load(path).dataobj, dtype=np.float32) for path in (again, source))
    assert similarity(found, wanted)["ssim"] >= 0.88  # intensities by percentiles here
    np.testing.assert_allclose(nib.load(again).affine, nib.load(source).affine)


def test_it_generates_different_volumes_of_its_kind(tmp_path, template, capsys):
    from meddiff.training.population import template_maps, tissue_labels
    from meddiff.training.task_evaluation import tissue_dice

    brains = []
    for seed in (1, 2):
        out = tmp_path / f"{seed}.nii.gz"
        assert main(["generate", "--out", str(out), "--seed", str(seed)]) == 0
        record = json.loads((tmp_path / f"{seed}.json").read_text())
        assert record["anatomy"] == "mr_t1_brain" and record["size"] == list(SIZE) and record["model"]["trained"]
        own = {"solver": "ddim", "steps": 35, "eta": 1.0, "timestep_spacing": "leading", "t_end": 300}
        assert {key: record[key] for key in own} == own
        brains.append(nib.load(out).get_fdata() / 1000)
    mean = template[0].data / 1000
    inside = mean > 0.2
    tissues = torch.from_numpy(tissue_labels(template_maps(SIZE, SPACING)[0])).long()
    for brain in brains:
        assert np.corrcoef(brain.ravel(), mean.ravel())[0, 1] > 0.95  # a brain, in its place
        assert np.corrcoef(brain[inside], mean[inside])[0, 1] > 0.65
        found = tissue_dice(torch.from_numpy(2 * brain - 1).float(), tissues, load_controlnet("demo-mask").task, "")
        assert found["white_matter"] > 0.65 and found["grey_matter"] > 0.6  # about where the template has them
        assert 0.5 < brain[inside].mean() < 0.8  # as bright as those that it learned from
        assert brain[~inside].mean() < 0.03  # in a field of air
    assert np.abs(brains[0] - brains[1])[inside].mean() > 0.01


@pytest.fixture(scope="module")
def brains(tmp_path_factory):
    """Folder of two T1 brains that no training saw, with their tissues."""
    pytest.importorskip("nilearn")
    from meddiff.training.options import PopulationOptions
    from meddiff.training.population import make_population

    folder = tmp_path_factory.mktemp("unseen")
    kind = {"sizes": (SIZE,), "spacings": (SPACING,), "displacement": 1.5, "affine": 0.3}
    anatomies = ("mr_t1_brain",)
    make_population(PopulationOptions(out=str(folder), subjects=2, seed=7, anatomies=anatomies, labels=True, **kind))
    return folder


@pytest.fixture(scope="module")
def unseen(brains):
    return brains / "0000_mr_t1_brain.nii.gz"


def test_few_lines_of_k_space_become_a_better_image(tmp_path, unseen, capsys):
    scale, task = ("--modality", "MR", "--low", "0", "--high", "1000"), load_controlnet("demo-fast-mri").task
    measured = tmp_path / "lines.safetensors"
    assert main(["measure", str(unseen), "--out", str(measured), "--control", "demo-fast-mri", *scale]) == 0
    out, steer = tmp_path / "a.nii.gz", ("--control", "demo-fast-mri", "--condition", str(measured))
    assert main(["generate", "--out", str(out), *steer, "--steps", "2"]) == 0
    filled = meddiff.pipelines.Condition.load(measured, task).values.permute(1, 2, 0).numpy()
    truth = nib.load(unseen).get_fdata()
    assert similarity(nib.load(out).get_fdata(), truth)["psnr"] >= similarity(500 * (filled + 1), truth)["psnr"] + 2


def test_a_mask_becomes_a_brain_with_its_tissues(tmp_path, brains, capsys):
    from meddiff.training.task_evaluation import tissue_dice

    out, steer = tmp_path / "a.nii.gz", ("--control", "demo-mask", "--condition", str(brains / "0000_labels.nii.gz"))
    assert main(["generate", "--out", str(out), *steer, "--steps", "10"]) == 0
    task = load_controlnet("demo-mask").task

    def tissues(image, mask: str) -> dict[str, float]:
        x = torch.from_numpy(nib.load(image).get_fdata(dtype=np.float32)) / 500 - 1
        return tissue_dice(x, torch.from_numpy(nib.load(brains / mask).get_fdata()).long(), task, "")

    own, other = tissues(out, "0000_labels.nii.gz"), tissues(out, "0001_labels.nii.gz")
    reached = tissues(brains / "0000_mr_t1_brain.nii.gz", "0000_labels.nii.gz")  # by the true image
    assert own["white_matter"] >= 0.7
    for tissue in ("white_matter", "grey_matter"):
        assert own[tissue] >= 0.85 * reached[tissue] and own[tissue] > other[tissue] + 0.04
