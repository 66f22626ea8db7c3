"""Latents and the denoiser at tiny size: resuming, several sizes in one run, the average, the model at the end."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from safetensors.torch import load_file

from meddiff.checkpoint import load_component, save_component
from meddiff.config import PRESETS, ScheduleConfig
from meddiff.models import BiFlowNet, PatchVolumeAutoencoder
from meddiff.pipelines import MedDiffusion
from meddiff.resources import default_dtype
from meddiff.sampling import NoiseSchedule
from meddiff.training.data import Draws, draw_seed, list_volumes, preparation
from meddiff.training.denoiser import train_denoiser
from meddiff.training.ema import MovingAverage
from meddiff.training.engine import require_served
from meddiff.training.latents import LatentDataset, encode_latents
from meddiff.training.options import DenoiserTraining, LatentOptions
from meddiff.volume import VolumeError


@pytest.fixture(scope="module")
def autoencoder(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("model") / "autoencoder"
    network = PatchVolumeAutoencoder(PRESETS["tiny"].autoencoder)
    network.codebook.initialise(torch.randn(1, 8, 8, 8, 8))
    save_component(folder, "autoencoder", network)
    return folder


@pytest.fixture(scope="module")
def latents(autoencoder, tmp_path_factory) -> Path:
    """Two latents of 8³ and two of 16×8×8, of two classes."""
    folder, random = tmp_path_factory.mktemp("latents"), np.random.default_rng(1)
    rows = []
    for i in range(4):
        shape = (60, 64, 50) if i % 2 else (64, 64, 128)
        nib.save(nib.Nifti1Image(random.normal(size=shape).astype(np.float32), np.eye(4)), folder / f"{i}.nii")
        rows.append({"file": f"{i}.nii", "anatomy": ("mr_t1_brain", "mr_t2_brain")[i // 2]})
    (folder / "list.json").write_text(json.dumps(rows))
    AcceleratorState._reset_state(True)
    return encode_latents(
        LatentOptions(out=str(folder / "out"), data=str(folder / "list.json"), autoencoder=str(autoencoder))
    )


@pytest.fixture
def options(latents, autoencoder, tmp_path) -> DenoiserTraining:
    return DenoiserTraining(
        out=str(tmp_path / "run"),
        steps=4,
        data=str(latents),
        autoencoder=str(autoencoder),
        model=PRESETS["tiny"].denoiser,
        save_every=2,
        log_every=1,
    )


def statistics(out: str) -> list[dict]:
    return [json.loads(line) for line in (Path(out) / "stats.jsonl").read_text().splitlines()]


def test_latents_are_scaled_encoder_outputs(latents, autoencoder):
    data = LatentDataset(latents, 8)
    assert sorted(data.sizes) == [(8, 8, 8)] * 2 + [(16, 8, 8)] * 2
    assert sorted(latent.class_index for latent in data.latents) == [3] * 2 + [4] * 2
    listed = list_volumes(latents.parent / "list.json")[0]
    x = preparation(None)({"image": listed.file, "modality": None, "low": None, "high": None})["image"]
    network = load_component(autoencoder, "autoencoder", dtype=default_dtype(torch.device("cpu")))
    with torch.no_grad():
        z = network.encode(x[None])[0]
    low, high = (bound.item() for bound in network.codebook.embeddings.aminmax())
    torch.testing.assert_close(data[0, 0][0], 2 * (z - low) / (high - low) - 1)


def test_latents_that_are_there_stay_and_changed_volumes_are_encoded_anew(latents, autoencoder, volumes, tmp_path):
    options = LatentOptions(
        out=str(tmp_path / "out"), data=str(tmp_path), autoencoder=str(autoencoder), anatomy="mr_knee"
    )
    source = nib.load(volumes / "0.nii.gz")
    for name in ("a", "b"):
        nib.save(source, tmp_path / f"{name}.nii")
    a, b = sorted(encode_latents(options).iterdir())
    stamps, before = (a.stat().st_mtime_ns, b.stat().st_mtime_ns), load_file(b)["latent"]
    nib.save(nib.Nifti1Image(source.get_fdata() ** 2, np.eye(4)), tmp_path / "b.nii")
    encode_latents(options)
    assert a.stat().st_mtime_ns == stamps[0] and b.stat().st_mtime_ns != stamps[1]
    assert not torch.equal(load_file(b)["latent"], before)


def test_volumes_without_anatomy_and_bad_files(autoencoder, volumes, tmp_path, caplog):
    options = LatentOptions(out=str(tmp_path / "out"), data=str(volumes), autoencoder=str(autoencoder))
    with pytest.raises(ValueError, match="has no anatomy"):
        encode_latents(options)
    (tmp_path / "bad.nii").write_bytes(b"nothing")
    options = replace(options, data=str(tmp_path), anatomy="mr_knee")
    with pytest.raises(VolumeError, match=r"bad\.nii"):
        encode_latents(options)
    with caplog.at_level(logging.WARNING):
        encode_latents(replace(options, on_bad="skip"))
    assert r"bad.nii" in caplog.text
    with pytest.raises(ValueError, match="holds no latents"):
        LatentDataset(tmp_path / "out", 8)


def test_the_average_is_a_copy_first_and_then_follows_slowly():
    network = torch.nn.Linear(1, 1, bias=False)
    average = MovingAverage(network, decay=0.75, every=2, start=3)
    seen = []
    for step, value in enumerate((1.0, 2.0, 3.0, 6.0, 9.0, 10.0)):
        with torch.no_grad():
            network.weight.fill_(value)
        average.update(network, step)
        seen.append(average.network.weight.item())
    assert seen[1:] == [2.0, 2.0, 0.75 * 2 + 0.25 * 6, 3.0, 0.75 * 3 + 0.25 * 10]


def test_a_killed_run_goes_on_with_the_same_losses_and_both_sizes_are_seen(options, tmp_path, monkeypatch, killed_at):
    sizes = []
    forward = BiFlowNet.forward
    monkeypatch.setattr(
        BiFlowNet,
        "forward",
        lambda self, x, *args: sizes.append(tuple(x.shape[2:])) or forward(self, x, *args),
    )
    whole = load_file(train_denoiser(options) / "denoiser" / "model.safetensors")
    assert set(sizes) == {(8, 8, 8), (16, 8, 8)} and len(sizes) == 4
    interrupted = replace(options, out=str(tmp_path / "interrupted"))
    killed_at(2, train_denoiser, interrupted)
    again = load_file(train_denoiser(interrupted) / "denoiser" / "model.safetensors")
    assert statistics(interrupted.out) == statistics(options.out)
    assert all(torch.equal(whole[key], again[key]) for key in whole)


def test_it_learns_and_leaves_a_model_that_generates(options):
    options = replace(options, steps=30, learning_rate=2e-3, save_every=30, ema_start=0, preview_every=30)
    folder = train_denoiser(replace(options, preview_steps=2))
    losses = [line["loss"] for line in statistics(options.out)]
    assert sum(losses[-6:]) < 0.9 * sum(losses[:6])
    assert [path.name for path in (Path(options.out) / "previews").iterdir()] == ["step-00000030.png"]
    with pytest.warns(UserWarning, match="was trained at sizes"):
        volume = MedDiffusion.from_pretrained(folder).generate("mr_t2_brain", (128, 64, 64), steps=2)
    assert volume.shape == (128, 64, 64)


def test_the_model_knows_what_it_was_trained_on_and_takes_the_precision_asked_for(options):
    folder = train_denoiser(replace(options, steps=1, weights="float16"))
    assert {t.dtype for t in load_file(folder / "denoiser" / "model.safetensors").values()} == {torch.float16}
    assert load_file(folder / "autoencoder" / "model.safetensors")["codebook.embeddings"].dtype == torch.float32
    model = MedDiffusion.from_pretrained(folder)
    assert {name: anatomy.volumes for name, anatomy in model.config.anatomies.items()} == {
        "mr_t1_brain": (((64, 64, 128), (1, 1, 1)), ((64, 64, 64), (1, 1, 1))),
        "mr_t2_brain": (((64, 64, 128), (1, 1, 1)), ((64, 64, 64), (1, 1, 1))),
    }
    volume = model.generate(steps=1)  # no warning: the default is what it was trained on
    assert volume.record["anatomy"] == "mr_t1_brain" and volume.shape == (64, 64, 128)
    with pytest.raises(ValueError, match="this model knows mr_t1_brain, mr_t2_brain"):
        model.generate("mr_knee")


def test_the_model_is_sampled_as_its_training_said(options):
    schedule = ScheduleConfig(steps=3, eta=1.0, timestep_spacing="leading")
    model = MedDiffusion.from_pretrained(train_denoiser(replace(options, steps=1, preview_every=1, schedule=schedule)))
    assert model.config.schedule == schedule
    record = model.generate(size=(64, 64, 64)).record
    said = {"solver": "ddim", "steps": 3, "eta": 1.0, "order": 1, "timestep_spacing": "leading"}
    assert {key: record[key] for key in said} == said
    record = model.generate(size=(64, 64, 64), solver="dpmsolver++", steps=2).record
    assert (record["eta"], record["timestep_spacing"]) == (0.0, "linspace")


def test_classes_beyond_the_denoisers_are_refused(options):
    with pytest.raises(ValueError, match="num_classes must be larger"):
        train_denoiser(replace(options, model=replace(options.model, num_classes=4)))


def test_the_loss_is_that_of_all_the_scales_asked_for(options):
    losses = []
    for scales in (1, 3):
        run = replace(options, out=f"{options.out}{scales}", steps=1, loss_scales=scales)
        train_denoiser(run)
        losses.append(statistics(run.out)[0]["loss"])
    assert 1.1 * losses[0] < losses[1] < 3 * losses[0]


@pytest.mark.parametrize("changes", [{"timestep_bias": -1.0}, {"timestep_bias": float("nan")}, {"loss_scales": 0}])
def test_impossible_options_are_refused(options, changes):
    with pytest.raises(ValueError, match=f"DenoiserTraining: {next(iter(changes))} must"):
        replace(options, **changes)


def test_two_processes_share_the_volumes(latents, autoencoder, tmp_path, two_processes):
    again = tmp_path / "latents"
    source = str(latents.parent / "list.json")
    two_processes("train", "latents", "--out", str(again), "--data", source, "--autoencoder", str(autoencoder))
    assert sorted(path.name for path in again.iterdir()) == sorted(path.name for path in latents.iterdir())
    for path in latents.iterdir():
        torch.testing.assert_close(load_file(again / path.name), load_file(path))


@pytest.mark.parametrize("launcher", ["accelerate", "fsdp"])
def test_two_processes_train_one_denoiser_with_the_mean_of_their_gradients(
    launcher, latents, autoencoder, options, tmp_path, two_processes
):
    """FSDP also stops after the second step, and goes on."""
    clip = 0.1
    arguments = ["--data", str(latents), "--autoencoder", str(autoencoder), "--batch_size", "1", "--ema_every", "1"]
    for name in ("dim", "attention_levels"):
        arguments += [f"--model.{name}", str(getattr(options.model, name))]
    arguments += ["--model.dim_mults", str(list(options.model.dim_mults)), "--gradient_clip", str(clip)]
    arguments += ["--steps", "3", "--log_every", "1"]
    two_processes("train", "denoiser", "--out", str(tmp_path / "two"), *arguments, launcher=launcher)

    data = LatentDataset(latents, 8)
    torch.manual_seed(0)
    network = BiFlowNet(options.model)
    adam = torch.optim.Adam(network.parameters(), options.learning_rate)
    batches = [iter(Draws(data.sizes, 1, 0, rank=rank, world_size=2)) for rank in range(2)]
    schedule = NoiseSchedule(ScheduleConfig())
    losses = []
    for step in range(3):
        for rank in range(2):
            torch.manual_seed(draw_seed(0, step, rank))
            x0, y = data[next(batches[rank])[0]]
            x0 = x0[None]
            noise, t = torch.randn_like(x0), schedule.draw_timesteps(1)
            resolution = torch.tensor(x0.shape[2:]) / 64
            estimate = network(schedule.add_noise(x0, t, noise), t, torch.tensor([y]), resolution)
            loss = (estimate - noise).abs().mean()
            (0.5 * loss).backward()
            losses += [loss.item()] if rank == 0 else []
        assert torch.nn.utils.clip_grad_norm_(network.parameters(), clip) > clip
        adam.step()
        adam.zero_grad()
    assert [line["loss"] for line in statistics(str(tmp_path / "two"))] == pytest.approx(losses, rel=1e-4)
    trained = load_file(tmp_path / "two" / "model" / "denoiser" / "model.safetensors")
    for name, value in network.state_dict().items():
        torch.testing.assert_close(trained[name], value, rtol=1e-3, atol=2e-5, msg=name)


def test_what_would_train_wrong_weights_is_refused(options, monkeypatch):
    """DeepSpeed's shards, FSDP 1 and 2 as accelerate sets them up, and FSDP that is asked for where it has none."""
    plugin = SimpleNamespace(fsdp_version=1, cpu_ram_efficient_loading=True, mixed_precision_policy="bf16")
    state = SimpleNamespace(fsdp_plugin=plugin)
    accelerator = SimpleNamespace(distributed_type=DistributedType.DEEPSPEED, state=state)
    with pytest.raises(ValueError, match="DEEPSPEED is not served; configure accelerate for FSDP with fsdp_version 2"):
        require_served(accelerator, True)
    accelerator.distributed_type = DistributedType.FSDP
    with pytest.raises(ValueError, match="FSDP 1 is not served"):
        require_served(accelerator, True)
    plugin.fsdp_version = 2
    with pytest.raises(ValueError, match="an autoencoder changes its weights .*; configure accelerate for DDP"):
        require_served(accelerator, False)
    require_served(accelerator, True)
    assert not plugin.cpu_ram_efficient_loading and plugin.mixed_precision_policy is None
    (Path(options.out) / "checkpoints" / "step-00000002" / "pytorch_model_fsdp_0").mkdir(parents=True)
    with pytest.raises(ValueError, match="step-00000002 was written with FSDP; go on in the same"):
        train_denoiser(options)
    AcceleratorState._reset_state(True)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match="accelerate has no FSDP for CPUs"):
        train_denoiser(options)
