"""The command line as a user runs it, in processes of its own where exit codes and streams matter."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import nibabel as nib
import numpy as np
import pytest

import meddiff
from meddiff.cli import main

COMMANDS = ("generate", "reconstruct", "encode", "decode", "measure", "plan", "convert", "evaluate", "doctor")


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
    assert done.stderr.count("quality at other sizes") == 1
    assert "random weights" in done.stderr and "sample: " in done.stdout and "wrote a.nii.gz" in done.stdout
    assert "%|" not in done.stderr  # no progress bar where nobody looks


MANY = ["--untrained", "tiny", "--size", "64", "--steps", "2", "--anatomy", "mr_knee", "--device", "cpu"]
ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}


def test_a_killed_run_goes_on(tmp_path):
    """SIGKILL as soon as two volumes are there; whole files alone are left, and none is made again."""
    command = [sys.executable, "-m", "meddiff.cli", "generate", "--out", "volumes", "--count", "6", *MANY]
    folder = tmp_path / "volumes"
    run = subprocess.Popen(command, cwd=tmp_path, env=ONE_THREAD, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while len(list(folder.glob("*.nii.gz"))) < 2:
        assert run.poll() is None
        time.sleep(0.01)
    run.send_signal(signal.SIGKILL)
    assert run.wait() == -signal.SIGKILL
    there = {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in folder.glob("*.nii.gz")}
    assert 2 <= len(there) < 6
    for name in there:
        assert nib.load(folder / name).get_fdata().shape == (64, 64, 64)
        assert json.loads((folder / name.replace(".nii.gz", ".json")).read_text())["anatomy"] == "mr_knee"

    done = subprocess.run(command, cwd=tmp_path, env=ONE_THREAD, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"{6 - len(there)} volumes made, {len(there)} were there, 0 failed" in done.stdout
    for name, identity in there.items():
        assert ((folder / name).stat().st_ino, (folder / name).stat().st_mtime_ns) == identity
    lines = [json.loads(line) for line in (folder / "manifest.jsonl").read_text().splitlines()]
    assert [line["file"] for line in lines] == [f"mr_knee-0000{i}.nii.gz" for i in range(6)]
    assert len({(folder / line["file"]).read_bytes() for line in lines}) == 6
    assert not any(path.name.startswith(".") for path in folder.iterdir())


def test_two_processes_share_the_volumes(tmp_path):
    """Of a list with a bad row: the others are made, each by one process, and both end with 1."""
    (tmp_path / "jobs.csv").write_text("anatomy,seed\nmr_knee,3\nct_legs,4\nhand,5\nmr_knee,6\n")
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "meddiff.cli", "generate"]
    done = subprocess.run(
        [sys.executable, *command, "--out", "shared", "--list", "jobs.csv", *MANY],
        cwd=tmp_path,
        env=ONE_THREAD,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 1, done.stderr[-3000:]
    names = ["mr_knee-00000.nii.gz", "ct_legs-00001.nii.gz", "mr_knee-00003.nii.gz"]
    wrote = sorted(line for line in done.stdout.splitlines() if "wrote" in line)
    assert wrote == [f"[{i}] wrote shared/{names[j]}" for i, j in ((0, 0), (0, 2), (1, 1))]
    assert "failed: jobs.csv, row 3: unknown anatomy 'hand'" in done.stdout
    assert "3 volumes made, 0 were there, 1 failed" in done.stdout
    assert "1 of 4 volumes were not made, such as jobs.csv, row 3: unknown anatomy 'hand'" in done.stderr
    folder = tmp_path / "shared"
    lines = [json.loads(line) for line in (folder / "manifest.jsonl").read_text().splitlines()]
    assert [(line["file"], line["seed"]) for line in lines] == [(name, seed) for name, seed in zip(names, (3, 4, 6))]
    assert not any(path.name.startswith(".") for path in folder.iterdir())

    alone = ["generate", "--out", "alone.nii.gz", *MANY, "--anatomy", "ct_legs", "--seed", "4"]
    assert meddiff_command(*alone, cwd=tmp_path, env=ONE_THREAD).returncode == 0
    assert (tmp_path / "alone.nii.gz").read_bytes() == (folder / names[1]).read_bytes()


def test_generate_refuses_another_request_and_hours(tmp_path, capsys, monkeypatch):
    from meddiff.pipelines import plan

    out = str(tmp_path / "volumes")
    arguments = ["generate", "--out", out, "--count", "1", *MANY]
    assert main([*arguments, "--decode-device", "cpu"]) == 0
    assert main([*arguments, "--seed", "1"]) == 1
    assert "another request: mr_knee-00000.nii.gz: seed 0 there, 1 now" in capsys.readouterr().err

    monkeypatch.setattr(plan, "_QUICK", 0)
    monkeypatch.setattr(plan, "_PATIENCE", 1e-3)
    single = ["generate", "--out", str(tmp_path / "a.nii"), *MANY]
    assert main(single) == 1
    captured = capsys.readouterr()
    assert "plan: a denoising step at latent 8×8×8 takes" in captured.out and "--force" in captured.err
    assert main([*arguments, "--count", "2"]) == 1 and "on this CPU" in capsys.readouterr().err
    assert main([*single, "--force"]) == 0


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
        ("generate --out a.nii --untrained tiny --model DIR", "either"),
        ("generate --out a.png --untrained tiny", ".nii or .nii.gz"),
        ("generate --out nowhere/a.nii --untrained tiny", "no folder nowhere"),
        ("generate --out a.nii --untrained tiny --size 64x64", "256x256x128"),
        ("generate --out a.nii --untrained tiny --size big", "256x256x128"),
        ("generate --untrained tiny", "out"),
        ("generate --out a.nii --untrained tiny --count 2", "--out is a folder"),
        ("generate --out scan.nii.gz/ --untrained tiny --count 2", "--out is a folder"),
        ("generate --out a --untrained tiny --count 2 --list a.csv", "either --count or --list"),
        ("generate --out a --untrained tiny --count 2 --preview a.png", "--preview"),
        ("generate --out a.nii --untrained tiny --steps none", "steps"),
        ("generate --out a.nii --untrained tiny --budget much", "8GB, 900MB or 7.5GiB"),
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
        ("generate --out a --untrained tiny --list missing.csv", "missing.csv"),
        ("generate --out a.nii --model nothing-here", "nothing-here"),
        ("generate --out a.nii --untrained tiny --size 64 --steps 1 --budget 1KB", "at least"),
        ("reconstruct SCAN --out a.nii.gz --untrained tiny --budget 1KB", "at least"),
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


def test_plan_shows_what_a_budget_means(capsys):
    common = ["plan", "--size", "512x512x256", "--dtype", "bfloat16", "--device", "cpu"]
    tables = []
    for budget in ("40GB", "8GB", "8192MiB"):
        assert main([*common, "--budget", budget]) == 0
        tables.append(capsys.readouterr().out)
    assert "recomputed" not in tables[0] and "recomputed" in tables[1] and "1×256×512×512" in tables[0]
    peaks = [float(table.splitlines()[-1].split()[1]) for table in tables]
    assert 8 < peaks[0] <= 40 and peaks[1] <= 8 and peaks[2] <= 8.6
    assert main([*common, "--budget", "1GB"]) == 1
    assert "need at least" in capsys.readouterr().err
    assert main(["plan", "--size", "100", "--budget", "8GB"]) == 2
    assert main(["plan", "--budget", "much"]) == 2


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
