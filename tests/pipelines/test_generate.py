from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
from collections import namedtuple

import pytest
import torch

import meddiff
from meddiff.pipelines import generate_volumes, jobs_from_count
from meddiff.pipelines.generate import launched_process
from meddiff.volume import Volume

pytestmark = pytest.mark.filterwarnings("ignore:generate")
SIZE, OPTIONS = (64, 64, 64), {"steps": 1, "eta": 0.5}


@pytest.fixture(scope="module")
def model():
    return meddiff.untrained("tiny", dtype=torch.float32, device="cpu")


@pytest.fixture(scope="module")
def jobs(model):
    return jobs_from_count(model, 3, 5, "mr_knee", SIZE)


@pytest.fixture(scope="module")
def finished(model, jobs, tmp_path_factory):
    """A folder with all volumes; tests take copies of it."""
    folder = tmp_path_factory.mktemp("finished") / "volumes"
    outcome = generate_volumes(model, jobs, folder, report=lambda line: None, **OPTIONS)
    assert (outcome.made, outcome.found, outcome.failed) == (3, 0, {})
    return folder


@pytest.fixture
def folder(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "volumes")


def volumes(folder):
    return {path.name: path.read_bytes() for path in folder.glob("*.nii.gz")}


def test_the_folder_holds_volumes_records_and_manifest(model, jobs, finished):
    names = [job.file for job in jobs]
    assert names == [f"mr_knee-0000{i}.nii.gz" for i in range(3)]
    records = [name.replace(".nii.gz", ".json") for name in names]
    assert sorted(p.name for p in finished.iterdir()) == sorted([*names, *records, "manifest.jsonl", "request.json"])
    lines = [json.loads(line) for line in (finished / "manifest.jsonl").read_text().splitlines()]
    assert [line["file"] for line in lines] == names and [line["seed"] for line in lines] == [5, 6, 7]
    wanted = {"anatomy": "mr_knee", "size": [64, 64, 64], "spacing_mm": [1, 1, 1], "solver": "ddim", "steps": 1}
    for line in lines:
        assert wanted.items() <= line.items() and line["eta"] == 0.5 and line["model"] == model.fingerprint


def test_a_volume_is_that_of_its_seed_in_any_batch_order_and_thread(model, jobs, finished, tmp_path):
    model.generate("mr_knee", SIZE, seed=6, **OPTIONS).save(tmp_path / "alone.nii.gz")
    assert (tmp_path / "alone.nii.gz").read_bytes() == (finished / jobs[1].file).read_bytes()
    others = tmp_path / "others"
    outcome = generate_volumes(model, jobs[::-1], others, batch=2, overlap=True, report=lambda line: None, **OPTIONS)
    assert outcome.made == 3 and volumes(others) == volumes(finished)
    assert [json.loads(line)["seed"] for line in (others / "manifest.jsonl").read_text().splitlines()] == [7, 6, 5]


def test_a_run_goes_on_where_it_was_killed(model, jobs, finished, folder):
    """Killed before the second volume was renamed, its record being there, and with the manifest of one volume."""
    (folder / jobs[1].file).unlink()
    (folder / jobs[2].file).unlink()
    (folder / jobs[2].file.replace(".nii.gz", ".json")).unlink()
    partial = folder / ".partial-0"
    partial.mkdir()
    (partial / ".0123456789abcdef.nii.gz").write_bytes(b"half a volume")
    (partial / jobs[1].file).write_bytes(b"a whole one")
    manifest = (finished / "manifest.jsonl").read_text()
    (folder / "manifest.jsonl").write_text(manifest.splitlines(keepends=True)[0])
    before = (folder / jobs[0].file).stat()
    said = []
    outcome = generate_volumes(model, jobs, folder, report=said.append, **OPTIONS)
    assert (outcome.made, outcome.found, outcome.failed) == (2, 1, {})
    after = (folder / jobs[0].file).stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert volumes(folder) == volumes(finished) and not partial.exists()
    without_time = [
        [{**json.loads(line), "created": ""} for line in text.splitlines()]
        for text in (manifest, (folder / "manifest.jsonl").read_text())
    ]
    assert without_time[0] == without_time[1]
    assert said[0] == "1 of 3 volumes are there already" and sum("wrote" in line for line in said) == 2


def test_a_finished_request_is_left_alone(model, jobs, folder, monkeypatch):
    monkeypatch.setattr(type(model), "sample", None)
    (folder / "manifest.jsonl").unlink()
    outcome = generate_volumes(model, jobs, folder, report=lambda line: None, **OPTIONS)
    assert (outcome.made, outcome.found) == (0, 3)
    assert len((folder / "manifest.jsonl").read_text().splitlines()) == 3


@pytest.mark.parametrize(
    "count, seed, options, message",
    [
        (3, 5, {"steps": 2}, "steps 1 there, 2 now"),
        (3, 5, {"eta": 0.0}, "eta 0.5 there, 0.0 now"),
        (3, 6, {}, r"mr_knee-00000.nii.gz: seed 5 there, 6 now.* and 1 more difference|seed 5 there, 6 now"),
        (2, 5, {}, "mr_knee-00002.nii.gz is not asked for any more"),
    ],
)
def test_another_request_is_refused(model, finished, count, seed, options, message):
    before = volumes(finished)
    with pytest.raises(ValueError, match=f"another request: .*({message})"):
        jobs = jobs_from_count(model, count, seed, "mr_knee", SIZE)
        generate_volumes(model, jobs, finished, report=lambda line: None, **OPTIONS | options)
    assert volumes(finished) == before


def test_a_request_may_grow(model, folder, finished):
    jobs = jobs_from_count(model, 4, 5, "mr_knee", SIZE)
    outcome = generate_volumes(model, jobs, folder, report=lambda line: None, **OPTIONS)
    assert (outcome.made, outcome.found) == (1, 3) and volumes(finished).items() < volumes(folder).items()


def test_volumes_of_unknown_origin_and_other_files_are_refused(model, jobs, folder):
    (folder / "request.json").write_text("[1]")
    with pytest.raises(ValueError, match="request.json is no request"):
        generate_volumes(model, jobs, folder, **OPTIONS)
    (folder / "request.json").unlink()
    with pytest.raises(ValueError, match="holds mr_knee-00000.nii.gz without a request.json"):
        generate_volumes(model, jobs, folder, **OPTIONS)


def test_two_runs_do_not_work_in_one_folder(model, jobs, tmp_path):
    place = tmp_path / ".partial-0"
    place.mkdir()
    theirs = os.open(place, os.O_RDONLY)
    fcntl.flock(theirs, fcntl.LOCK_EX)
    with pytest.raises(ValueError, match="another run is at work"):
        generate_volumes(model, jobs, tmp_path, **OPTIONS)
    os.close(theirs)
    assert list(tmp_path.iterdir()) == [place]


def test_one_bad_volume_does_not_lose_the_rest_of_its_batch(model, jobs, finished, tmp_path, monkeypatch):
    sample, asked = type(model).sample, []

    def diverging(self, noise, y, seed, **options):
        asked.append(seed)
        if 6 in seed:
            raise FloatingPointError("sample: the noise estimate is not finite")
        return sample(self, noise, y, seed=seed, **options)

    monkeypatch.setattr(type(model), "sample", diverging)
    outcome = generate_volumes(model, jobs, tmp_path, batch=3, report=lambda line: None, **OPTIONS)
    assert asked == [[5, 6, 7], [5], [6], [7]]
    assert (outcome.made, outcome.failed) == (2, {jobs[1].file: "sample: the noise estimate is not finite"})
    assert volumes(tmp_path) == {k: v for k, v in volumes(finished).items() if k != jobs[1].file}
    assert len((tmp_path / "manifest.jsonl").read_text().splitlines()) == 2
    monkeypatch.undo()
    assert generate_volumes(model, jobs, tmp_path, report=lambda line: None, **OPTIONS).made == 1
    assert volumes(tmp_path) == volumes(finished)


@pytest.mark.parametrize("free", [0, 2**40])
def test_a_full_disk_is_reported_and_costs_nothing_finished(model, jobs, finished, tmp_path, monkeypatch, free):
    """The second volume finds the disk full. Without room nothing more is denoised; with room the third one is made."""
    save, sample, calls = Volume.save, type(model).sample, []

    def full(self, path):
        if path.name == jobs[1].file:
            raise OSError(errno.ENOSPC, "atomic_write: No space left on device")
        save(self, path)

    def counted(self, *arguments, **options):
        calls.append(options["seed"])
        return sample(self, *arguments, **options)

    monkeypatch.setattr(Volume, "save", full)
    monkeypatch.setattr(type(model), "sample", counted)
    usage = namedtuple("usage", "total used free")(2**40, 0, free)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    four = jobs_from_count(model, 4, 5, "mr_knee", SIZE)
    outcome = generate_volumes(model, four, tmp_path, report=lambda line: None, **OPTIONS)
    assert "No space left" in outcome.failed[jobs[1].file]
    assert not (tmp_path / jobs[1].file.replace(".nii.gz", ".json")).exists()
    # the worker is one volume behind: the third was denoised before the second failed
    if free:
        assert (outcome.made, len(outcome.failed), len(calls)) == (3, 1, 4)
    else:
        assert (outcome.made, len(outcome.failed), len(calls)) == (2, 2, 3)
        assert "no room for 1 MiB" in outcome.failed[four[3].file]
    assert all(volumes(finished)[name] == data for name, data in volumes(tmp_path).items() if name in volumes(finished))


def test_what_breaks_the_worker_ends_the_run(model, jobs, tmp_path, monkeypatch):
    def broken(self, latent, target, record):
        raise RuntimeError("an error of the program")

    monkeypatch.setattr(type(model), "decode_sample", broken)
    with pytest.raises(RuntimeError, match="an error of the program"):
        generate_volumes(model, jobs, tmp_path, overlap=True, report=lambda line: None, **OPTIONS)
    monkeypatch.undo()
    assert generate_volumes(model, jobs[:1], tmp_path / "next", report=lambda line: None, **OPTIONS).made == 1


def test_sizes_that_cannot_be_made_do_not_stop_the_others(model, tmp_path, monkeypatch):
    from meddiff.pipelines import plan

    monkeypatch.setattr(plan, "available_bytes", lambda device: 2**22)
    large = jobs_from_count(model, 1, 1, "mr_knee", (128, 128, 128))
    small = jobs_from_count(model, 2, 1, "mr_knee", SIZE)[1:]
    outcome = generate_volumes(model, [*large, *small], tmp_path, report=lambda line: None, **OPTIONS)
    assert outcome.made == 1 and "4 MiB are free" in outcome.failed[large[0].file]


def test_the_process_of_a_launch(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    assert launched_process() == (0, 1, 0)
    for name, value in (("RANK", "5"), ("WORLD_SIZE", "8"), ("LOCAL_RANK", "1")):
        monkeypatch.setenv(name, value)
    assert launched_process() == (5, 8, 1)
