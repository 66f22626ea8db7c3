"""ControlNets at tiny size: pairs, resuming, what learns, the folder at the end."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

from meddiff.checkpoint import fingerprint, load_controlnet, load_model, save_model, weights_sha256
from meddiff.config import ANATOMIES, PRESETS, FastMRIConfig, MasksConfig, ScheduleConfig, SparseViewCTConfig
from meddiff.models import BiFlowNet, ControlNet, PatchVolumeAutoencoder
from meddiff.resources import default_dtype
from meddiff.tasks import measure, network_input, reconstruct
from meddiff.training.controlnet import PairDataset, preparation_input, train_controlnet
from meddiff.training.data import draw_seed, list_volumes, preparation
from meddiff.training.options import ControlNetTraining
from meddiff.volume import VolumeError


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("base") / "model"
    autoencoder = PatchVolumeAutoencoder(PRESETS["tiny"].autoencoder)
    autoencoder.codebook.initialise(torch.randn(1, 8, 8, 8, 8))
    anatomies = {"mr_t1_brain": replace(ANATOMIES["mr_t1_brain"], volumes=(((64, 64, 64), (1, 1, 1)),))}
    save_model(folder, autoencoder, BiFlowNet(PRESETS["tiny"].denoiser), ScheduleConfig(), anatomies)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Three volumes of at most 64³ voxels whose tissues are layers of known brightness."""
    folder = tmp_path_factory.mktemp("data")
    x, y, z = np.meshgrid(*(np.linspace(-1, 1, n) for n in (60, 64, 50)), indexing="ij")
    rows = ["file,anatomy,low,high,label"]
    for i in range(3):
        radius = np.sqrt(x**2 + y**2 + ((1 + i / 10) * z) ** 2)
        labels = np.digitize(-radius, (-0.9, -0.6, -0.3)).astype(np.uint8)
        nib.save(nib.Nifti1Image(np.float32(300) * labels, np.eye(4)), folder / f"{i}.nii.gz")
        nib.save(nib.Nifti1Image(labels, np.eye(4)), folder / f"{i}_labels.nii.gz")
        rows.append(f"{i}.nii.gz,mr_t1_brain,0,1000,{i}_labels.nii.gz")
    (folder / "volumes.csv").write_text("\n".join(rows) + "\n")
    return folder


@pytest.fixture
def options(base, data, tmp_path) -> ControlNetTraining:
    return ControlNetTraining(
        out=str(tmp_path / "run"),
        steps=4,
        base=str(base),
        data=str(data / "volumes.csv"),
        task="fast_mri",
        fast_mri=FastMRIConfig(acceleration=8, centre_fraction=0.1),
        save_every=2,
        log_every=1,
        width=4,
    )


def statistics(out: str) -> list[dict]:
    return [json.loads(line) for line in (Path(out) / "stats.jsonl").read_text().splitlines()]


def test_a_killed_run_goes_on_with_the_same_losses(options, tmp_path, killed_at):
    options = replace(options, zero_conv_rate=2.0, snr_gamma=0.05)
    whole = load_file(train_controlnet(options) / "model.safetensors")
    interrupted = replace(options, out=str(tmp_path / "interrupted"))
    killed_at(2, train_controlnet, interrupted)
    again = load_file(train_controlnet(interrupted) / "model.safetensors")
    assert statistics(interrupted.out) == statistics(options.out) and len(statistics(options.out)) == 4
    assert all(torch.equal(whole[key], again[key]) for key in whole)


def test_what_is_written_names_its_base_and_only_the_copy_has_learned(options, base, monkeypatch):
    before = weights_sha256(base)
    seen = []
    forward = BiFlowNet.forward
    monkeypatch.setattr(BiFlowNet, "forward", lambda self, *a: seen.append(self) or forward(self, *a))
    options = replace(options, steps=3, learning_rate=1e-3, ema_every=1, weights="float16")
    folder = train_controlnet(options)
    loaded = load_controlnet(folder)
    assert (loaded.base, loaded.base_sha256, loaded.task) == (str(base), before, options.fast_mri)
    assert loaded.anatomies["mr_t1_brain"].volumes == (((64, 64, 64), (1, 1, 1)),)
    assert {t.dtype for t in load_file(folder / "model.safetensors").values()} == {torch.float16}
    denoiser = load_model(base).denoiser
    assert all(p.grad is None and not p.requires_grad for p in seen[0].parameters())
    assert fingerprint(seen[0]) == fingerprint(denoiser) and weights_sha256(base) == before
    start = ControlNet.from_denoiser(denoiser, loaded.network.control_config).state_dict()
    moved = {
        key.split(".")[0]
        for key, value in loaded.network.state_dict().items()
        if (value - start[key]).abs().max() > 2e-4
    }
    assert moved >= {"init_conv", "downs", "IntraPatchFlow_input", "IntraPatchFlow_mid", "mid_block1", "exits"}


def test_the_pairs_of_fast_mri_are_measurements_of_the_padded_volumes(options, base):
    options = replace(options, steps=1, measurements=2)
    train_controlnet(options)
    data = PairDataset(Path(options.out) / "cache" / "pairs", 8)
    assert len(data) == 6 and set(data.sizes) == {(8, 8, 8)}
    listed = list_volumes(options.data)[0]
    x = preparation(None)({"image": listed.file, "modality": None, "low": 0, "high": 1000})["image"][0]
    padded = torch.full((64, 64, 64), -1.0)
    padded[7:57, 2:62, :] = x
    autoencoder = load_model(base).autoencoder.to(default_dtype(torch.device("cpu")))
    wanted = []
    for i in range(2):
        first = reconstruct(measure(padded, options.fast_mri, draw_seed(0, i)), options.fast_mri)
        wanted.append(network_input(first, options.fast_mri, "latent", autoencoder)[0])
    assert (wanted[0] - wanted[1]).abs().max() > 0.01
    for latent in wanted:
        assert min((condition - latent).abs().max() for condition in data.conditions) < 1e-5


def test_zero_convolutions_may_learn_faster(options, base):
    folder = train_controlnet(replace(options, steps=2, learning_rate=1e-4, zero_conv_rate=10.0, ema_every=1))
    network = load_controlnet(folder).network
    start = ControlNet.from_denoiser(load_model(base).denoiser, network.control_config).state_dict()
    moved = {key: (value - start[key]).abs().max().item() for key, value in network.state_dict().items()}
    assert max(moved[key] for key in moved if key.startswith("exits")) > 1e-3
    assert 0 < max(moved[key] for key in moved if not key.startswith(("exits", "entries"))) < 2.1e-4


def test_masks_know_their_tissues_and_their_brightness(options):
    options = replace(options, task="masks", steps=30, learning_rate=2e-3, save_every=30, preview_every=30)
    folder = train_controlnet(replace(options, preview_steps=2))
    loaded = load_controlnet(folder)
    assert loaded.network.control_config.encoder == "convolutional" and loaded.network.control_config.channels == 4
    assert loaded.network.control_config.widths == (4, 8, 16)
    assert loaded.task.means == pytest.approx((-1, -0.4, 0.2, 0.8), abs=1e-5)
    losses = [line["loss"] for line in statistics(options.out)]
    assert sum(losses[-6:]) < 0.98 * sum(losses[:6])
    assert [path.name for path in (Path(options.out) / "previews").iterdir()] == ["step-00000030.png"]


def test_masks_can_be_painted_and_encoded_as_images_are(options, base):
    options = replace(options, task="masks", encoder="latent", steps=1, preview_every=1, preview_steps=2)
    loaded = load_controlnet(train_controlnet(options))
    assert loaded.network.control_config.encoder == "latent" and loaded.network.control_config.channels == 8
    assert loaded.task.means == pytest.approx((-1, -0.4, 0.2, 0.8), abs=1e-5)
    listed = list_volumes(options.data)[0]
    x = preparation(None, True)(preparation_input(listed, True))["label"][0]
    padded = torch.zeros(64, 64, 64, dtype=torch.long)
    padded[7:57, 2:62, :] = x
    autoencoder = load_model(base).autoencoder.to(default_dtype(torch.device("cpu")))
    (latent,) = network_input(padded, loaded.task, "latent", autoencoder)
    data = PairDataset(Path(options.out) / "cache" / "pairs", 8)
    assert min((condition - latent).abs().max() for condition in data.conditions) < 1e-5


def test_pairs_are_made_once_and_anew_for_another_task(options, monkeypatch):
    calls = []
    encode = PatchVolumeAutoencoder.encode
    monkeypatch.setattr(PatchVolumeAutoencoder, "encode", lambda self, x: calls.append(1) or encode(self, x))
    train_controlnet(replace(options, steps=1))
    assert len(calls) == 6
    for task, more in ((options.fast_mri, 0), (FastMRIConfig(acceleration=4), 6)):
        calls.clear()
        AcceleratorState._reset_state(True)
        train_controlnet(replace(options, steps=1, fast_mri=task))
        assert len(calls) == more
    assert len(list((Path(options.out) / "cache" / "pairs").iterdir())) == 3  # the former task's are gone


def test_sparse_views_at_voxel_size(options):
    options = replace(
        options, task="sparse_view_ct", sparse_view_ct=SparseViewCTConfig(4), encoder="convolutional", steps=1,
        copied=("down_path", "middle"), enters=("init_conv",),
    )  # fmt: skip
    loaded = load_controlnet(train_controlnet(options))
    assert loaded.task == SparseViewCTConfig(4) and loaded.network.control_config.channels == 1
    assert not hasattr(loaded.network, "x_embedder")
    data = PairDataset(Path(options.out) / "cache" / "pairs", 8)
    assert data.conditions[0].shape == (1, 64, 64, 64)


def test_volumes_without_masks_and_masks_that_do_not_fit(options, data, tmp_path):
    options = replace(options, task="masks", steps=1, anatomy="mr_t1_brain")
    with pytest.raises(ValueError, match="has no label; list it in"):
        train_controlnet(replace(options, data=str(data)))
    shifted = np.diag([1.0, 1, 1, 1])
    shifted[0, 3] = 2
    image, labels = nib.load(data / "0.nii.gz"), nib.load(data / "0_labels.nii.gz")
    nib.save(image, tmp_path / "a.nii.gz")
    (tmp_path / "list.csv").write_text("file,label\na.nii.gz,mask.nii.gz\n")
    options = replace(options, data=str(tmp_path / "list.csv"), batch_size=1)
    values = labels.get_fdata().astype(np.uint8)
    for mask, message in [
        (nib.Nifti1Image(values, shifted), "mask.nii.gz: is not aligned with its image: its affine"),
        (nib.Nifti1Image(values[1:], np.eye(4)), "its shape is"),
        (nib.Nifti1Image(values / np.float32(2), np.eye(4)), "whole numbers"),
        (nib.Nifti1Image(2 * values, np.eye(4)), r"mask.nii.gz: masks: labels must be integers in \[0, 4\)"),
        (nib.Nifti1Image(np.minimum(values, 2), np.eye(4)), "no mask holds white_matter"),
    ]:
        nib.save(mask, tmp_path / "mask.nii.gz")
        AcceleratorState._reset_state(True)
        with pytest.raises((VolumeError, ValueError), match=message):
            train_controlnet(options)


def test_options_that_do_not_go_together(options):
    for changes, message in [
        ({"task": "masks", "measurements": 2}, "no measurements"),
        ({"measurements": 0}, "measurements must be at least 1"),
        ({"zero_conv_rate": 0}, "zero_conv_rate must be positive"),
        ({"snr_gamma": 0}, "snr_gamma must be positive"),
    ]:
        with pytest.raises(ValueError, match=message):
            replace(options, **changes)
    assert replace(options, task="masks").task_config == MasksConfig()


def test_two_processes_share_the_pairs_and_the_shards_of_one_controlnet(options, base, tmp_path, two_processes):
    arguments = ["--base", str(base), "--data", options.data, "--task", "fast_mri", "--fast_mri.acceleration", "8"]
    arguments += ["--batch_size", "1", "--ema_every", "1", "--steps", "2", "--width", "4"]
    two_processes("train", "controlnet", "--out", str(tmp_path / "two"), *arguments, launcher="fsdp")
    assert len(list((tmp_path / "two" / "cache" / "pairs").iterdir())) == 3
    loaded = load_controlnet(tmp_path / "two" / "controlnet")
    assert loaded.task.acceleration == 8
    assert loaded.network.exits["middle"].weight.abs().max() > 0
