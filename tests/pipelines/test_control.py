"""Steered generation at tiny size: what is refused, what a condition changes, and that measurements stay."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

import meddiff
from meddiff.checkpoint import CheckpointError, save_controlnet, weights_sha256
from meddiff.cli import main
from meddiff.config import ANATOMIES, PRESETS, ControlNetConfig, FastMRIConfig, MasksConfig, SparseViewCTConfig
from meddiff.models import ControlNet
from meddiff.pipelines import Condition, MedDiffusion, TrainedControl, generate_controlled
from meddiff.pipelines.control import latent_correction
from meddiff.tasks import measure
from meddiff.tasks.fast_mri import k_space
from meddiff.volume import IntensityScale, Volume, VolumeError

SIZE = (64, 64, 64)
FOUR = FastMRIConfig()
ANATOMY = {"fast_mri": "mr_t1_brain", "masks": "mr_t1_brain", "sparse_view_ct": "ct_chest_abdomen"}
TASKS = {"fast_mri": FOUR, "masks": MasksConfig(means=(-1, -0.4, 0.2, 0.8)), "sparse_view_ct": SparseViewCTConfig(12)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A base, and beside it a ControlNet for each task whose convolutions are open."""
    folder = tmp_path_factory.mktemp("models")
    meddiff.untrained("tiny", dtype=torch.float32, device="cpu").save_pretrained(folder / "base")
    base = meddiff.from_pretrained(folder / "base", device="cpu", dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)  # of the condition encoders
    for name, task in TASKS.items():
        config = ControlNetConfig(denoiser=PRESETS["tiny"].denoiser)
        if name == "masks":
            config = replace(config, encoder="convolutional", channels=4, widths=(4, 6, 8))
        network = ControlNet.from_denoiser(base.denoiser, config)
        for parameter in [*network.entries.parameters(), *network.exits.parameters()]:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
        anatomy = replace(ANATOMIES[ANATOMY[name]], volumes=((SIZE, (1.0, 1.0, 1.0)),))
        sha256 = weights_sha256(folder / "base")
        save_controlnet(folder / name, network, task, str(folder / "base"), sha256, {ANATOMY[name]: anatomy})
    return folder


@pytest.fixture(scope="module")
def model(folder) -> MedDiffusion:
    return meddiff.from_pretrained(folder / "base", device="cpu", dtype=torch.float32)


@pytest.fixture(scope="module")
def controls(folder, model) -> dict[str, TrainedControl]:
    return {name: TrainedControl.from_pretrained(folder / name, model) for name in TASKS}


AFFINE = np.array([[1.0, 0, 0, -30], [0, 1, 0, -31], [0, 0, 1, -32], [0, 0, 0, 1]])


@pytest.fixture(scope="module")
def scan() -> Volume:
    """Smooth, in 0…800."""
    x, y, z = np.meshgrid(*(np.linspace(-1, 1, n) for n in SIZE), indexing="ij")
    inside = (x / 0.8) ** 2 + (y / 0.9) ** 2 + (z / 0.7) ** 2 < 1
    return Volume(np.float32(400) * inside * (1 + np.sin(5 * x) * np.cos(4 * y)), AFFINE, IntensityScale(0, 1000))


def mask(seed: int = 0) -> np.ndarray:
    coarse = np.random.default_rng(seed).integers(0, 4, (8, 8, 8))
    return coarse.repeat(8, 0).repeat(8, 1).repeat(8, 2).astype(np.uint8)


def save_mask(path: Path, labels: np.ndarray, affine: np.ndarray = AFFINE) -> str:
    Volume.of_labels(labels, affine).save(path)
    return str(path)


def test_the_measured_k_space_of_the_result_is_the_measurement(model, controls, scan):
    condition = Condition.simulate(scan, FOUR, seed=3)
    assert condition.values.shape == SIZE and condition.measurement.sampling.sum() == 16
    result = generate_controlled(model, [(controls["fast_mri"], condition, 1.0)], steps=2, seed=1)
    scaled = torch.from_numpy(result.data.transpose(2, 0, 1).copy()) / 500 - 1  # not clipped
    got, lines = k_space(scaled)[..., condition.measurement.sampling], condition.measurement.data
    torch.testing.assert_close(got, lines[..., condition.measurement.sampling], rtol=0, atol=1e-3)
    np.testing.assert_allclose(result.affine, AFFINE)
    assert result.intensity == scan.intensity
    assert result.record["controls"][0]["consistency"] and result.record["controls"][0]["task"]["name"] == "fast_mri"
    assert result.record["modality"] == "MR" and result.record["steps"] == 2 and result.record["seed"] == 1
    assert [stage["name"] for stage in result.record["stages"]] == ["sample", "decode"]
    free = generate_controlled(model, [(controls["fast_mri"], condition, 1.0)], steps=2, seed=1, consistency=False)
    assert np.abs(free.data - result.data).mean() > 1 and not free.record["controls"][0]["consistency"]


def test_a_correction_moves_the_latent_by_what_changes_in_the_volume(model, scan):
    scale = model.autoencoder.codebook.latent_scale()
    with torch.inference_mode():
        x0 = scale.scale(model.autoencoder.encode(scan.to_tensor()))
        assert torch.equal(latent_correction(model, lambda v: v)(x0, 5), x0)
        target = scan.to_tensor().roll(5, 3)
        moved = latent_correction(model, lambda v: target)(x0, 5)
        there = scale.scale(model.autoencoder.encode(target))
        again = scale.scale(model.autoencoder.encode(model.autoencoder.decode_latent(x0).clamp(-1, 1)))
        torch.testing.assert_close(moved, x0 + there - again)


def test_masks_change_the_volume_and_strength_0_is_the_base(model, controls, tmp_path):
    control = controls["masks"]
    files = [save_mask(tmp_path / f"{i}.nii.gz", mask(i)) for i in range(2)]
    conditions = [Condition.load(file, control.task) for file in files]
    options = {"solver": "dpmsolver++", "steps": 2, "seed": 4}
    first, second = (generate_controlled(model, [(control, c, 1.0)], **options) for c in conditions)
    assert np.abs(first.data - second.data).mean() > 1
    base = generate_controlled(model, [(control, conditions[0], 0.0)], **options)
    with pytest.warns(UserWarning, match="was trained at sizes"):
        plain = model.generate("mr_t1_brain", SIZE, **options)
    np.testing.assert_array_equal(base.data, plain.data)
    np.testing.assert_allclose(base.affine, AFFINE)


def test_sparse_view_ct_from_a_file_to_a_file(folder, model, tmp_path, capsys):
    """A body in Hounsfield units, stored as int16 with its patient's left first, measured, and generated in place."""
    x, y, z = np.meshgrid(*(np.linspace(-1, 1, n) for n in SIZE), indexing="ij")
    body = np.full(SIZE, -1000, np.int16)
    for centre, half, hounsfield in [
        ((0, 0, 0), (0.85, 0.65, 0.95), 20),
        ((-0.4, 0.05, 0.1), (0.27, 0.38, 0.6), -820),
        ((0.4, 0.05, 0.1), (0.27, 0.38, 0.6), -840),
        ((-0.35, 0, -0.7), (0.35, 0.4, 0.3), 65),
        ((0, -0.45, 0), (0.12, 0.12, 0.9), 650),
    ]:
        body[sum(((a - c) / h) ** 2 for a, c, h in zip((x, y, z), centre, half)) < 1] = hounsfield
    affine = np.diag([-1.0, 1, 1, 1])
    nib.save(nib.Nifti1Image(body, affine), tmp_path / "ct.nii.gz")
    measured, out = str(tmp_path / "measured.safetensors"), tmp_path / "out.nii.gz"
    control = str(folder / "sparse_view_ct")
    assert main(["measure", str(tmp_path / "ct.nii.gz"), "--out", measured, "--control", control]) == 0
    condition = Condition.load(measured, TASKS["sparse_view_ct"])
    error = (condition.values - Volume.load(tmp_path / "ct.nii.gz").to_tensor()[0, 0]).square().mean().sqrt()
    assert error < 0.15
    arguments = ["generate", "--out", str(out), "--control", control, "--condition", measured, "--steps", "1"]
    assert main([*arguments, "--device", "cpu", "--dtype", "float32"]) == 0  # the base is the ControlNet's
    result = nib.load(out)
    images = [result.get_fdata(dtype=np.float32)]
    assert result.shape == SIZE and result.get_data_dtype() == np.int16
    assert nib.aff2axcodes(result.affine) == ("R", "A", "S")
    np.testing.assert_allclose(result.affine, Volume.load(tmp_path / "ct.nii.gz").affine)
    # one sweep over the views takes most of what the untrained network made back to the body
    assert main([*arguments, "--device", "cpu", "--dtype", "float32", "--consistency", "false"]) == 0
    images.append(nib.load(out).get_fdata(dtype=np.float32))
    errors = []
    for image in images:
        x = IntensityScale.ct().normalize(torch.from_numpy(image.transpose(2, 0, 1).copy()))
        views = measure(x, TASKS["sparse_view_ct"]).data
        errors.append((views - condition.measurement.data).square().mean().sqrt())
    assert errors[0] < 0.5 * errors[1]
    assert json.loads((tmp_path / "out.json").read_text())["controls"][0]["task"] == {
        "name": "sparse_view_ct",
        "views": 12,
    }


def test_another_base_is_refused(folder, model, tmp_path):
    other = meddiff.untrained("tiny", seed=1, dtype=torch.float32, device="cpu")
    with pytest.raises(ValueError, match="masks steers .*base.*and this model is .*random weights"):
        TrainedControl.from_pretrained(folder / "masks", other)
    other.save_pretrained(tmp_path / "other")
    other = meddiff.from_pretrained(tmp_path / "other", device="cpu", dtype=torch.float32)
    with pytest.raises(ValueError, match="load the base that it was trained for"):
        TrainedControl.from_pretrained(folder / "masks", other)
    shutil.copytree(folder / "base", tmp_path / "copy")  # another place, the same weights, in another precision
    copy = meddiff.from_pretrained(tmp_path / "copy", device="cpu", dtype=torch.bfloat16)
    assert TrainedControl.from_pretrained(folder / "masks", copy).network.dtype == torch.bfloat16
    with pytest.raises(CheckpointError, match="format must be 'meddiff-controlnet'"):
        TrainedControl.from_pretrained(folder / "base", model)


def test_conditions_that_do_not_fit_are_refused(model, controls, tmp_path):
    control = controls["masks"]

    def generate(labels, affine=AFFINE, more=(), **options):
        condition = Condition.load(save_mask(tmp_path / "mask.nii.gz", labels, affine), control.task)
        return generate_controlled(model, [(control, condition, 1.0), *more], steps=1, **options)

    coarse, oblique = np.diag([2.0, 1, 1, 1]), AFFINE.copy()
    oblique[0, 3] += 5
    elsewhere = Condition.load(save_mask(tmp_path / "elsewhere.nii.gz", mask(), oblique), control.task)
    for message, arguments in {
        r"multiples of 64 voxels, got \(64, 64, 60\); crop or pad it to \(64, 64, 64\)": {"labels": mask()[:, :, :60]},
        r"its spacing is \(2.0, 1.0, 1.0\) mm.*trained at \(1.0, 1.0, 1.0\); resample": {"affine": coarse},
        "elsewhere.nii.gz: is not aligned with .*mask.nii.gz: its affine": {"more": [(control, elsewhere, 1.0)]},
        "size .128, 64, 64. was asked for": {"size": (128, 64, 64)},
        "spacing .1, 1, 2. was asked for": {"spacing": (1, 1, 2)},
        "was trained on mr_t1_brain, not on 'mr_knee'": {"anatomy": "mr_knee"},
        r"labels must be integers in \[0, 4\)": {"labels": mask() * 2},
    }.items():
        with pytest.raises(ValueError, match=message):
            generate(**{"labels": mask()} | arguments)
    with pytest.raises(ValueError, match="needs a condition, and there is none"):
        generate_controlled(model, [])
    with pytest.raises(VolumeError, match="missing.nii.gz: no such file"):
        Condition.load(tmp_path / "missing.nii.gz", control.task)
    with pytest.raises(ValueError, match="has no measurement"):
        Condition.simulate(Volume(np.ones(SIZE, np.float32), AFFINE, IntensityScale(0, 1)), control.task)


@pytest.mark.parametrize("damage", ["missing", "truncated", "foreign", "another task", "another size", "not finite"])
def test_damaged_measurements_are_refused(scan, tmp_path, damage):
    from safetensors import safe_open
    from safetensors.torch import save_file

    path, task = tmp_path / "measured.safetensors", FOUR
    Condition.simulate(scan, FOUR).save(path, FOUR)
    with safe_open(path, "pt") as file:
        tensors, metadata = {key: file.get_tensor(key) for key in ("data", "sampling")}, file.metadata()
    if damage == "missing":
        path.unlink()
    elif damage == "truncated":
        path.write_bytes(path.read_bytes()[:-10])
    elif damage == "foreign":
        save_file(tensors, path)
    elif damage == "another task":
        task = SparseViewCTConfig()
    elif damage == "another size":
        save_file({**tensors, "sampling": torch.ones(60, dtype=torch.bool)}, path, metadata)
    else:
        tensors["data"][0, 0, 0, 0] = torch.nan
        save_file(tensors, path, metadata)
    with pytest.raises((ValueError, FileNotFoundError), match="measured.safetensors"):
        Condition.load(path, task)


def test_measurements_survive_the_disk(scan, tmp_path):
    condition = Condition.simulate(scan, FOUR, seed=9)
    condition.save(tmp_path / "measured.safetensors", FOUR)
    again = Condition.load(tmp_path / "measured.safetensors", FOUR)
    assert torch.equal(again.measurement.data, condition.measurement.data)
    assert torch.equal(again.values, condition.values) and again.intensity == scan.intensity
    assert again.shape == scan.shape and np.array_equal(again.affine, scan.affine)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("--control A", "there are 1 and 0"),
        ("--condition a.nii", "there are 0 and 1"),
        ("--control [A,B] --condition a.nii", "there are 2 and 1"),
        ("--control A --condition a.nii --strength [1,2]", "give one --strength"),
        ("--control A --condition a.nii --low 3", "both --low and --high"),
        ("--control A --condition a.nii --count 2", "are for one volume; leave out --count and --list"),
        ("--control A --condition a.nii --list volumes.csv", "are for one volume; leave out --count and --list"),
    ],
)
def test_controls_without_conditions_end_with_2(arguments, message, capsys, tmp_path):
    assert main(["generate", "--out", str(tmp_path / "a.nii"), *arguments.split()]) == 2
    assert message in capsys.readouterr().err
