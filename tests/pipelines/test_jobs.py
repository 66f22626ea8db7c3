from __future__ import annotations

import pytest
import torch

import meddiff
from meddiff.pipelines import jobs_from_list

SIZE = (64, 64, 64)


@pytest.fixture(scope="module")
def model():
    return meddiff.untrained("tiny", dtype=torch.float32, device="cpu")


@pytest.mark.filterwarnings("ignore:generate")
def test_a_list_gives_every_row_its_own(model, tmp_path):
    path = tmp_path / "jobs.csv"
    path.write_text(
        "anatomy, size, seed, file\n"
        "ct_legs,64x64x128,,\n"
        ",,42,mine.nii\n"
        "hand,64,1,\n"
        "ct_legs,65,1,\n"
        "ct_legs,64,-1,\n"
        "ct_legs,64,many,\n"
        "ct_legs,64,1,../a.nii\n"
        "ct_legs,64,1,mine.nii.gz\n"
        "ct_legs,64,1,a.nii,surplus\n"
    )
    jobs, bad = jobs_from_list(model, path, 100, "mr_knee", SIZE, (1, 1, 2))
    assert [(job.file, job.target.anatomy, job.target.size, job.target.spacing, job.seed) for job in jobs] == [
        ("ct_legs-00000.nii.gz", "ct_legs", (64, 64, 128), (1, 1, 2), 100),
        ("mine.nii", "mr_knee", (64, 64, 64), (1, 1, 2), 42),
    ]
    reasons = [
        "unknown anatomy",
        "multiples of 64",
        "seed must",
        "many",
        "must be a name",
        "another row",
        "more entries",
    ]
    assert list(bad) == [f"jobs.csv, row {i}" for i in range(3, 10)]
    for reason, wanted in zip(bad.values(), reasons):
        assert wanted in reason

    path.write_text("anatomy,colour\nct_legs,red\n")
    with pytest.raises(ValueError, match=r"unknown columns \['colour'\]; known are anatomy, size"):
        jobs_from_list(model, path, 0, None, None)
    path.write_text("")
    with pytest.raises(ValueError, match="lists no volumes"):
        jobs_from_list(model, path, 0, None, None)
