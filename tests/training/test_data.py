"""Lists, preparation, random views, and who draws what when."""

from __future__ import annotations

import json
import logging

import nibabel as nib
import numpy as np
import pytest
import torch

from meddiff.training.data import (
    Draws,
    VolumeDataset,
    draw_seed,
    leave_out,
    list_volumes,
    patch_draw,
    preparation,
    volume_draw,
)
from meddiff.volume import Volume, VolumeError


def test_a_folder_lists_its_volumes(volumes):
    listed = list_volumes(volumes, anatomy="mr_t1_brain")
    assert [v.file for v in listed] == [str(volumes / f"{i}.nii.gz") for i in range(4)]
    assert {v.anatomy for v in listed} == {"mr_t1_brain"}


@pytest.mark.parametrize("kind", ["csv", "json"])
def test_lists_name_files_relative_to_themselves(tmp_path, kind):
    path = tmp_path / f"list.{kind}"
    if kind == "csv":
        path.write_text("file,anatomy,modality,low,high\na.nii,mr_knee,MR,0,10\nsub/b.nii,,CT,,\n")
    else:
        rows = [{"file": "a.nii", "anatomy": "mr_knee", "modality": "MR", "low": 0, "high": 10}]
        path.write_text(json.dumps([*rows, {"file": "sub/b.nii", "modality": "CT"}]))
    first, second = list_volumes(path, anatomy="ct_legs")
    assert (first.file, first.anatomy, first.low, first.high) == (str(tmp_path / "a.nii"), "mr_knee", 0, 10)
    assert (second.file, second.anatomy, second.modality) == (str(tmp_path / "sub/b.nii"), "ct_legs", "CT")


@pytest.mark.parametrize(
    "text, message",
    [
        ("file,colour\na.nii,red\n", "entry 1: needs `file` and knows"),
        ("file,anatomy\na.nii,heart\n", "unknown anatomy 'heart'"),
        ("file,modality\na.nii,PET\n", "modality must be CT or MR"),
        ("file,low\na.nii,3\n", "both low and high"),
        ("file,low,high\na.nii,x,3\n", "could not convert"),
        ("file\n", "holds no volumes"),
    ],
)
def test_bad_lists_are_refused(tmp_path, text, message):
    path = tmp_path / "list.csv"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        list_volumes(path)


def test_missing_sources_are_refused(tmp_path):
    with pytest.raises(ValueError, match="no such file"):
        list_volumes(tmp_path / "gone.csv")
    with pytest.raises(ValueError, match="must be a folder, or a list"):
        list_volumes(tmp_path / "gone")


def test_whole_volumes_are_those_of_inference(volumes, tmp_path):
    data = VolumeDataset(list_volumes(volumes), tmp_path, volume_draw((32, 32, 32), 16))
    wanted = Volume.load(volumes / "2.nii.gz").to_tensor()  # [1, 1, 28, 24, 20]
    got = data[2, 0]
    assert got.shape == (1, 1, 32, 32, 32) and got.dtype == torch.float32
    assert torch.equal(got[:, :, 2:30, 4:28, 6:26], wanted)
    assert got[:, :, :2].eq(-1).all() and got[..., :6].eq(-1).all()


def test_whole_volumes_of_any_size_are_padded_to_the_patch(volumes, tmp_path):
    data = VolumeDataset(list_volumes(volumes), tmp_path, volume_draw(None, 16))
    assert data.shapes == [(28, 24, 20)] * 4 and data[0, 0].shape == (1, 1, 32, 32, 32)
    assert torch.equal(data[2, 0][:, :, 2:30, 4:28, 6:26], Volume.load(volumes / "2.nii.gz").to_tensor())


def test_patches_are_turned_only_where_that_is_asked_for(tmp_path):
    ramp = np.arange(16**3, dtype=np.float32).reshape(16, 16, 16)
    nib.save(nib.Nifti1Image(ramp, np.eye(4)), tmp_path / "a.nii")
    listed = list_volumes(tmp_path)
    straight, turned = (VolumeDataset(listed, tmp_path / "cache", patch_draw(16, 1, turns)) for turns in (False, True))
    whole = straight.prepared[0]["image"]
    assert all(torch.equal(straight[0, seed][0], whole) for seed in range(5))
    assert not all(torch.equal(turned[0, seed][0], whole) for seed in range(5))
    assert type(straight[0, 0]) is torch.Tensor  # no MetaTensor, whose every operation passes through Python


def test_resampling_halves_the_voxels(volumes, tmp_path):
    data = VolumeDataset(list_volumes(volumes), tmp_path, volume_draw((16, 16, 16), 16), spacing=(2, 2, 2))
    assert data.prepared[0]["image"].shape == (1, 14, 12, 10)


def test_patches_depend_on_the_seed_alone(volumes, tmp_path):
    data = VolumeDataset(list_volumes(volumes), tmp_path, patch_draw(16, 3))
    one, again, other = data[1, 7], data[1, 7], data[1, 8]
    assert one.shape == (3, 1, 16, 16, 16) and torch.equal(one, again) and not torch.equal(one, other)
    assert one.aminmax().min >= -1 and one.aminmax().max <= 1
    source = set(
        VolumeDataset(list_volumes(volumes), tmp_path, patch_draw(16, 1)).prepared[1]["image"].unique().tolist()
    )
    assert set(one.unique().tolist()) <= source | {-1.0}


def test_small_volumes_are_padded_with_air(volumes, tmp_path):
    data = VolumeDataset(list_volumes(volumes), tmp_path, patch_draw(32, 1))
    assert data[0, 0].shape == (1, 1, 32, 32, 32) and (data[0, 0] == -1).any()


def test_a_changed_file_is_prepared_anew(tmp_path):
    shares = []
    for filled in (4, 8):
        data = np.zeros((16, 16, 16), np.float32)
        data[:filled] = 1
        nib.save(nib.Nifti1Image(data, np.eye(4)), tmp_path / "a.nii")
        prepared = VolumeDataset(list_volumes(tmp_path), tmp_path / "cache", volume_draw((16,) * 3, 16))
        shares.append((prepared[0, 0] > 0).float().mean().item())
    assert shares == [0.25, 0.5]


def test_bad_files_are_fatal_or_named(volumes, tmp_path, caplog):
    listed = list_volumes(volumes)
    bad = tmp_path / "bad.nii.gz"
    bad.write_bytes((volumes / "0.nii.gz").read_bytes()[:500])
    everything = [*listed, *list_volumes(tmp_path)]
    with pytest.raises(VolumeError, match=r"bad\.nii\.gz"):
        VolumeDataset(everything, tmp_path / "cache", patch_draw(16, 1))
    with caplog.at_level(logging.WARNING):
        data = VolumeDataset(everything, tmp_path / "cache", patch_draw(16, 1), on_bad="skip")
    assert len(data) == 4 and "bad.nii.gz" in caplog.text
    with pytest.raises(ValueError, match="none of the 1 files"):
        VolumeDataset(list_volumes(tmp_path), tmp_path / "cache", patch_draw(16, 1), on_bad="skip")


def take(draws: Draws, steps: int) -> list[list[tuple[int, int]]]:
    return [batch for batch, _ in zip(draws, range(steps))]


def test_no_sample_comes_twice_in_an_epoch_over_all_processes():
    buckets = ["a"] * 13 + ["b"] * 9
    processes = [Draws(buckets, 2, seed=3, rank=rank, world_size=2) for rank in range(2)]
    steps = processes[0].steps_per_epoch
    assert steps == 13 // 4 + 9 // 4
    for first_epoch in (0, 1):
        batches = [take(draws, 2 * steps)[first_epoch * steps :][:steps] for draws in processes]
        seen = [index for batch in sum(batches, []) for index, _ in batch]
        assert len(seen) == len(set(seen)) == 4 * steps
        for one, other in zip(*batches):  # every process works on the same shape in a step
            assert len({buckets[index] for index, _ in one + other}) == 1


def test_draws_go_on_where_they_stopped():
    draws = take(Draws([0] * 7, 2, seed=1), 11)
    for start in (0, 2, 3, 7):
        assert take(Draws([0] * 7, 2, seed=1, start=start), 11 - start) == draws[start:]
    assert len({seed for batch in draws for _, seed in batch}) == 22
    assert take(Draws([0] * 7, 2, seed=2), 11) != draws


def test_too_few_samples_for_a_step_are_refused():
    with pytest.raises(ValueError, match=r"takes 4 samples of one shape \(2 per process\).*'b': 3"):
        Draws(["a"] * 4 + ["b"] * 3, 2, seed=0, world_size=2)


def test_seeds_differ_with_every_number():
    seeds = {draw_seed(a, b, c) for a in range(8) for b in range(8) for c in range(8)}
    assert len(seeds) == 512 and all(0 <= seed < 2**32 for seed in seeds)


def test_masks_are_listed_checked_and_resampled_to_whole_numbers(volumes, tmp_path):
    image = nib.load(volumes / "0.nii.gz")
    labels = np.random.default_rng(0).integers(0, 4, image.shape).astype(np.uint8)
    nib.save(nib.Nifti1Image(labels, image.affine), tmp_path / "mask.nii.gz")
    nib.save(image, tmp_path / "image.nii.gz")
    (tmp_path / "list.csv").write_text("file,label\nimage.nii.gz,mask.nii.gz\n")
    (listed,) = list_volumes(tmp_path / "list.csv")
    assert listed.label == str(tmp_path / "mask.nii.gz")
    item = {"image": listed.file, "label": listed.label, "modality": None, "low": None, "high": None}
    prepared = preparation(None, label=True)(item)
    assert np.array_equal(prepared["label"][0], labels.transpose(2, 0, 1))
    coarse = preparation((2.0, 2.0, 2.0), label=True)(item)
    assert coarse["label"].shape == coarse["image"].shape
    assert set(coarse["label"].unique().tolist()) == {0, 1, 2, 3}
    nib.save(nib.Nifti1Image(labels, np.diag([1, 1, 2, 1])), tmp_path / "mask.nii.gz")
    with pytest.raises(Exception) as caught:
        preparation(None, label=True)(item)
    with pytest.raises(VolumeError, match="mask.nii.gz: is not aligned with its image: its spacing is"):
        leave_out(caught.value, "fail")
