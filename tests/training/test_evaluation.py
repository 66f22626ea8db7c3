"""Scores of volumes whose scores are known, and the whole command at tiny size."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.networks.nets import resnet10

from meddiff.checkpoint import save_component
from meddiff.config import PRESETS
from meddiff.models import PatchVolumeAutoencoder
from meddiff.training.data import list_volumes, preparation
from meddiff.training.evaluation import (
    distribution_distances,
    evaluate,
    reconstruction_scores,
    seam_score,
    similarity,
)
from meddiff.training.options import EvaluationOptions
from meddiff.volume import VolumeError


@pytest.fixture(scope="module")
def autoencoder():
    torch.manual_seed(0)
    network = PatchVolumeAutoencoder(PRESETS["tiny"].autoencoder).eval()
    network.codebook.initialise(torch.randn(1, 8, 8, 8, 8))
    return network


@pytest.fixture
def options(autoencoder, volumes, tmp_path) -> EvaluationOptions:
    save_component(tmp_path / "autoencoder", "autoencoder", autoencoder)
    return EvaluationOptions(out=str(tmp_path / "scores.json"), data=str(volumes), model=str(tmp_path / "autoencoder"))


def noise(*size: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(1, 1, *size, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def test_psnr_is_that_of_the_definition():
    x = noise(24, 20, 22)
    assert similarity(x * 0.9, x)["psnr"] == pytest.approx(10 * math.log10(4 / (0.1 * x).square().mean()), rel=1e-4)


def test_ssim_is_that_of_the_definition_in_the_middle_window():
    """One window: 11³ voxels leave a single position."""
    x, y = noise(11, 11, 11), noise(11, 11, 11, seed=1)
    axis = torch.exp(-(torch.arange(-5, 6).double() ** 2) / (2 * 1.5**2))
    window = axis[:, None, None] * axis[None, :, None] * axis[None, None, :]
    window /= window.sum()
    mx, my = ((window * v[0, 0]).sum() for v in (x, y))
    vx, vy = ((window * v[0, 0] ** 2).sum() - m**2 for v, m in ((x, mx), (y, my)))
    covariance = (window * x[0, 0] * y[0, 0]).sum() - mx * my
    c1, c2 = (0.01 * 2) ** 2, (0.03 * 2) ** 2
    wanted = (2 * mx * my + c1) * (2 * covariance + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2))
    assert similarity(y, x)["ssim"] == pytest.approx(wanted.item(), abs=1e-4)


@pytest.mark.parametrize(
    "size, names", [(10, {"psnr"}), (11, {"psnr", "ssim", "ms_ssim"}), (41, {"psnr", "ssim", "ms_ssim"})]
)
def test_volumes_smaller_than_the_window_have_no_ssim(size, names):
    x = noise(size, size, size)
    scores = similarity(x, x)
    assert set(scores) == names
    assert all(scores[name] == pytest.approx(1, abs=1e-4) for name in names - {"psnr"})


def test_seam_score_of_steps_of_known_height():
    x = torch.zeros(1, 1, 16, 16, 16)
    x += torch.arange(16.0)[None, None, :, None, None]  # steps of 1 along D
    x[:, :, 8:] += 2  # 3 at the one face
    # faces: D 3, H 0, W 0; elsewhere: D 14 steps of 1, H and W 14 of 0
    assert seam_score(x, 8) == pytest.approx((3 / 3) / (14 / 42))
    assert seam_score(x.transpose(2, 4), 8) == pytest.approx(3.0)
    assert math.isnan(seam_score(torch.zeros(1, 1, 16, 16, 16), 8)) and math.isnan(seam_score(x, 16))


def test_disjoint_decoding_is_scored_against_the_same_original(autoencoder):
    x = noise(32, 16, 24) / 4
    scores = reconstruction_scores(autoencoder, x, disjoint=True)
    with torch.inference_mode():
        indices, _ = autoencoder.quantize(autoencoder.encode(x))
        halves = [torch.cat([autoencoder.decode(p) for p in part.split(2, 3)], 4) for part in indices.split(2, dim=1)]
    assert indices.shape == (1, 4, 2, 4) and len(halves) == 2
    y = torch.cat(halves, 2)[..., :24].clamp(-1, 1)
    assert scores["disjoint_seam"] == pytest.approx(seam_score(y, 16), rel=1e-4)
    assert scores["disjoint_psnr"] == pytest.approx(similarity(y, x)["psnr"], rel=1e-4)
    joint = autoencoder(x).clamp(-1, 1)
    assert scores["psnr"] == pytest.approx(similarity(joint, x)["psnr"], rel=1e-4) != scores["disjoint_psnr"]
    assert scores["seam_original"] == pytest.approx(seam_score(x, 16))


def test_fid_of_shifted_features_is_the_squared_shift():
    generator = torch.Generator().manual_seed(0)
    real = torch.randn(64, 4, generator=generator)
    shift = torch.tensor([3.0, 0, 0, -4.0])
    distances = distribution_distances(real + shift, real)
    assert distances["fid"] == pytest.approx(25, rel=1e-4)
    assert distances["mmd"] == pytest.approx(25, abs=1) and abs(distribution_distances(real, real)["mmd"]) < 0.2
    assert distribution_distances(real[:10] + shift, real)["count"] == 10
    with pytest.raises(ValueError, match="two volumes of each kind, got 1 and 64"):
        distribution_distances(real[:1], real)


def test_the_file_holds_every_volume_and_the_means(options, volumes, autoencoder):
    evaluate(replace(options, generated=str(volumes)))
    written = json.loads(open(options.out).read())
    assert [v["file"] for v in written["volumes"]] == [f"{i}.nii.gz" for i in range(4)]
    assert written["volumes"][0]["size"] == [24, 20, 28]
    for name, mean in written["mean"].items():
        assert mean == pytest.approx(np.mean([v[name] for v in written["volumes"]]))
    listed = list_volumes(volumes)[1]
    x = preparation(None)({"image": listed.file, "modality": None, "low": None, "high": None})["image"][None]
    network = autoencoder.to(getattr(torch, written["dtype"]))
    assert written["volumes"][1] | reconstruction_scores(network, x) == written["volumes"][1]
    # the same volumes on both sides
    assert abs(written["generated"]["fid"]) < 1e-3 and written["generated"]["count"] == 4
    assert written["features"]["extractor"] == "autoencoder" and len(written["features"]["sha256"]) == 64


def test_medicalnet_features_come_from_a_local_file(options, volumes, tmp_path, capsys):
    torch.manual_seed(1)
    network = resnet10(spatial_dims=3, n_input_channels=1, feed_forward=False, shortcut_type="B", bias_downsample=False)
    weights = tmp_path / "weights.pth"
    torch.save({"state_dict": {f"module.{key}": value for key, value in network.state_dict().items()}}, weights)
    options = replace(options, generated=str(volumes), features="medicalnet", features_weights=str(weights))
    evaluate(options)
    written = json.loads(open(options.out).read())
    assert written["features"]["weights"] == "weights.pth" and written["features"]["sha256"] in capsys.readouterr().out
    assert abs(written["generated"]["fid"]) < 1e-3

    with pytest.raises(ValueError, match="need features_weights"):
        evaluate(replace(options, features_weights=None))
    torch.save({"state_dict": {"a": torch.ones(1)}}, weights)
    with pytest.raises(ValueError, match="not the weights of MedicalNet"):
        evaluate(options)


def test_bad_files_and_folders(options, volumes, tmp_path, caplog):
    data = tmp_path / "data"
    data.mkdir()
    (data / "bad.nii").write_bytes(b"nothing")
    with pytest.raises(VolumeError, match=r"bad\.nii"):
        evaluate(replace(options, data=str(data)))
    with pytest.raises(ValueError, match="none of its volumes"):
        evaluate(replace(options, data=str(data), on_bad="skip"))
    nib.save(nib.load(volumes / "0.nii.gz"), data / "good.nii.gz")
    evaluate(replace(options, data=str(data), on_bad="skip"))
    assert [v["file"] for v in json.loads(open(options.out).read())["volumes"]] == ["good.nii.gz"]
    assert "bad.nii" in caplog.text
    with pytest.raises(ValueError, match="no folder"):
        replace(options, out=str(tmp_path / "nowhere" / "scores.json"))
