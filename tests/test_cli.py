"""The command line as a user runs it, in processes of its own where exit codes and streams matter."""

from __future__ import annotations

import json
import subprocess
import sys

import nibabel as nib
import numpy as np
import pytest

import meddiff
from meddiff.cli import main

COMMANDS = ("generate", "reconstruct", "encode", "decode", "measure", "convert", "evaluate", "doctor")


def meddiff_command(*arguments: str, **options) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "meddiff.cli", *arguments], capture_output=True, text=True, **options)


@pytest.fixture
def scan(tmp_path):
    path = tmp_path / "scan.nii.gz"
    data = np.random.default_rng(0).integers(-1000, 1000, (20, 24, 18)).astype(np.int16)
    nib.Nifti1Image(data, np.diag([-1, -1, 2, 1])).to_filename(path)
    return path


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_examples(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    out = capsys.readouterr().out
    assert f"\n  meddiff {command}" in out and "example" in out


def test_generate_writes_volume_record_and_preview(tmp_path):
    done = meddiff_command(
        *("generate", "--out", "a.nii.gz", "--untrained", "tiny", "--size", "64x128x64", "--steps", "1"),
        *("--anatomy", "mr_knee", "--spacing", "0.5x0.5x1", "--seed", "4", "--preview", "a.png", "--device", "cpu"),
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.json", "a.nii.gz", "a.png"]
    image = nib.load(tmp_path / "a.nii.gz")
    assert image.shape == (64, 128, 64) and image.header.get_zooms() == (0.5, 0.5, 1)
    assert json.loads((tmp_path / "a.json").read_text())["seed"] == 4
    assert "random weights" in done.stderr and "sample: " in done.stdout and "wrote a.nii.gz" in done.stdout
    assert "%|" not in done.stderr  # no progress bar where nobody looks


def test_reconstruct_encode_and_decode_agree(tmp_path, scan, capsys):
    model = tmp_path / "model"
    meddiff.untrained("tiny", device="cpu").save_pretrained(model)
    latent, a, b = (str(tmp_path / name) for name in ("latent.safetensors", "a.nii.gz", "b.nii.gz"))
    common = ["--model", str(model), "--device", "cpu"]
    window = ["--modality", "CT", "--low", "-1000", "--high", "600"]
    assert main(["reconstruct", str(scan), "--out", a, *window, *common]) == 0
    assert main(["encode", str(scan), "--out", latent, *window, *common]) == 0
    assert main(["decode", latent, "--out", b, *common]) == 0
    first, second, original = nib.load(a), nib.load(b), nib.load(scan)
    np.testing.assert_array_equal(first.dataobj, second.dataobj)
    assert first.shape == original.shape and first.get_data_dtype() == np.int16
    np.testing.assert_array_equal(first.affine, original.affine)
    assert first.get_fdata().max() <= 600
    assert "CT" in capsys.readouterr().out


def test_options_from_a_file_and_over_it(tmp_path, capsys):
    config = tmp_path / "options.yaml"
    config.write_text("untrained: tiny\nsize: 64\nsteps: 1\nanatomy: ct_legs\nseed: 7\ndevice: cpu\n")
    out = tmp_path / "a.nii"
    assert main(["generate", "--config", str(config), "--out", str(out), "--seed", "8"]) == 0
    record = json.loads((tmp_path / "a.json").read_text())
    assert (record["anatomy"], record["seed"], record["size"]) == ("ct_legs", 8, [64, 64, 64])


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("generate --out a.nii", "--model DIR or --untrained"),
        ("generate --out a.nii --untrained tiny --model DIR", "either"),
        ("generate --out a.png --untrained tiny", ".nii or .nii.gz"),
        ("generate --out nowhere/a.nii --untrained tiny", "no folder nowhere"),
        ("generate --out a.nii --untrained tiny --size 64x64", "256x256x128"),
        ("generate --out a.nii --untrained tiny --size big", "256x256x128"),
        ("generate --untrained tiny", "out"),
        ("generate --out a.nii --untrained tiny --steps none", "steps"),
        ("reconstruct SCAN --out a.nii --untrained tiny --low 3", "both --low and --high"),
        ("encode SCAN --out a.nii --untrained tiny", ".safetensors"),
        ("prepare", "prepare"),
    ],
)
def test_wrong_arguments_end_with_2(arguments, message, tmp_path, scan, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    try:
        code = main(arguments.replace("SCAN", str(scan)).split())
    except SystemExit as stop:
        code = stop.code
    assert code == 2
    assert message in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["scan.nii.gz"]


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("generate --out a.nii --untrained 16x", "unknown preset"),
        ("generate --out a.nii --untrained tiny --anatomy hand", "unknown anatomy"),
        ("generate --out a.nii --untrained tiny --size 65", "multiples of 64"),
        ("generate --out a.nii --model nothing-here", "nothing-here"),
        ("reconstruct missing.nii --out a.nii --untrained tiny", "missing.nii"),
        ("reconstruct SCAN --out a.nii --untrained tiny --low 9 --high 3", "low < high"),
        ("decode missing.safetensors --out a.nii --untrained tiny", "missing.safetensors"),
        ("convert model --autoencoder missing.ckpt --denoiser missing.pt", "missing.ckpt"),
    ],
)
def test_failures_end_with_1_and_one_line(arguments, message, tmp_path, scan, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(arguments.replace("SCAN", str(scan)).split()) == 1
    lines = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("note:")]
    assert len(lines) == 1 and message in lines[0]
    assert [p.name for p in tmp_path.iterdir()] == ["scan.nii.gz"]


def test_doctor_tells_what_is_active():
    done = meddiff_command("doctor")
    assert done.returncode == 0, done.stderr
    found = dict(line.split("  ", 1) for line in done.stdout.splitlines())
    assert found["meddiff"].strip() == meddiff.__version__
    assert "loaded, uses" in found["CPU library"]
    assert {"PyTorch", "CUDA library", "Triton", "xformers", "memory", "default"} <= set(found)


def test_reconstruct_the_mni152_t1(tmp_path):
    datasets = pytest.importorskip("nilearn.datasets")
    source, out = tmp_path / "mni152_t1.nii.gz", tmp_path / "again.nii.gz"
    datasets.load_mni152_template(resolution=1).to_filename(source)
    assert main(["reconstruct", str(source), "--out", str(out), "--untrained", "tiny"]) == 0
    before, after = nib.load(source), nib.load(out)
    assert after.shape == before.shape == (197, 233, 189)
    np.testing.assert_array_equal(after.affine, before.affine)
    assert nib.aff2axcodes(after.affine) == nib.aff2axcodes(before.affine)
    assert after.get_data_dtype() == before.get_data_dtype()
    assert np.isfinite(after.get_fdata()).all() and after.get_fdata().std() > 0
