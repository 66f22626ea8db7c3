"""The population: two contrasts of the same anatomy, different subjects, the same ones for the same seed."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from meddiff.training import population
from meddiff.training.data import list_volumes
from meddiff.training.options import PopulationOptions
from meddiff.training.population import make_population, undeformed
from meddiff.volume import Volume

SIZE, SPACING = (32, 48, 32), (5.0, 5.0, 5.0)


@pytest.fixture
def options(tmp_path) -> PopulationOptions:
    return PopulationOptions(
        out=str(tmp_path / "a"), subjects=2, sizes=[SIZE, (32, 32, 32)], spacings=[SPACING, (6.0, 6.0, 6.0)], seed=5
    )


def test_subjects_differ_and_their_contrasts_share_the_anatomy(options):
    listed = list_volumes(make_population(options))
    assert [v.anatomy for v in listed] == ["mr_t1_brain", "mr_t2_brain"] * 2
    volumes = [Volume.load(v.file, v.modality, (v.low, v.high)) for v in listed]
    assert [v.shape for v in volumes] == [SIZE] * 2 + [(32, 32, 32)] * 2
    assert volumes[0].spacing == SPACING and volumes[2].spacing == (6, 6, 6)
    t1, t2 = (v.data / 1000 for v in volumes[:2])
    assert t1.min() >= 0 and 0.9 < t1.max() <= 1
    inside = t1 > 0.3
    assert 0.05 < inside.mean() < 0.5  # a brain in a field of air
    assert ((t2 > 0.1) & inside).sum() / inside.sum() > 0.95  # the same shape
    assert np.corrcoef(t1[inside], t2[inside])[0, 1] < -0.3  # and the opposite contrast


def test_the_seed_decides_and_finished_volumes_stay(options, tmp_path):
    first = [v.file for v in list_volumes(make_population(options))]
    again = [v.file for v in list_volumes(make_population(replace(options, out=str(tmp_path / "b"))))]
    other = [v.file for v in list_volumes(make_population(replace(options, out=str(tmp_path / "c"), seed=6)))]
    read = [[Volume.load(file, "MR", (0, 1000)).data for file in files] for files in (first, again, other)]
    assert all(np.array_equal(one, two) for one, two in zip(read[0], read[1]))
    assert not any(np.array_equal(one, two) for one, two in zip(read[0], read[2]))
    template = undeformed(SIZE, SPACING)[0]
    assert np.abs(template.data - read[0][0]).mean() > 5

    stamps = [Volume.load(file, "MR", (0, 1000)).source.path.stat().st_mtime_ns for file in first]
    make_population(replace(options, subjects=3))
    assert [Volume.load(file, "MR", (0, 1000)).source.path.stat().st_mtime_ns for file in first] == stamps


def test_one_thread_does_not_unfold_the_deformation(options, monkeypatch):
    seen, deform = [], population.Rand3DElasticd.__call__
    monkeypatch.setattr(
        population.Rand3DElasticd, "__call__", lambda *a: (seen.append(torch.get_num_threads()), deform(*a))[1]
    )
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        make_population(replace(options, subjects=1))
        assert seen == [2] and torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(threads)


def test_the_template_can_lead_the_list(options):
    listed = list_volumes(make_population(replace(options, subjects=1, template=True)))
    assert [v.file.rsplit("/", 1)[1].split("_mr")[0] for v in listed] == ["template_0"] * 2 + ["template_1"] * 2 + [
        "0000"
    ] * 2
    for i, wanted in enumerate(undeformed(SIZE, SPACING) + undeformed((32, 32, 32), (6.0, 6.0, 6.0))):
        found = Volume.load(listed[i].file, "MR", (0, 1000))
        np.testing.assert_allclose(found.data, wanted.data, atol=0.05)
        np.testing.assert_allclose(found.affine, wanted.affine)


def test_labels_are_deformed_with_the_images_which_stay_the_same(options, tmp_path):
    """At 5 mm a voxel is a mixture, so that tissues differ in their means and overlap."""
    plain = list_volumes(make_population(options))
    listed = list_volumes(make_population(replace(options, out=str(tmp_path / "b"), labels=True, template=True)))
    assert [v.label.rsplit("/", 1)[1] for v in listed[::2]] == [
        f"{name}_labels.nii.gz" for name in ("template_0", "template_1", "0000", "0001")
    ]
    assert [v.label for v in listed[::2]] == [v.label for v in listed[1::2]] and plain[0].label is None
    for before, after in zip(plain, listed[4:]):
        assert np.array_equal(*(Volume.load(v.file, "MR", (0, 1000)).data for v in (before, after)))
    for v in listed[::2]:
        labels, t1 = Volume.load_labels(v.label), Volume.load(v.file, "MR", (0, 1000))
        assert labels.shape == t1.shape and np.array_equal(labels.affine, t1.affine)
        assert labels.source.header.get_data_dtype() == np.uint8
        assert set(np.unique(labels.data)) == {0, 1, 2, 3}
        background, csf, grey, white = (t1.data[labels.data == tissue].mean() for tissue in range(4))
        assert background < 30 < csf < grey < white
    subjects = [Volume.load_labels(v.label).data for v in (listed[0], listed[4])]
    assert (subjects[0] != subjects[1]).mean() > 0.02

    # labels that were not asked for at first join the images
    joined = list_volumes(make_population(replace(options, labels=True)))
    assert np.array_equal(Volume.load_labels(joined[0].label).data, subjects[1])


def test_one_contrast_can_be_left_out_and_the_other_stays_the_same(options, tmp_path):
    t2 = [v for v in list_volumes(make_population(options)) if v.anatomy == "mr_t2_brain"]
    alone = list_volumes(
        make_population(replace(options, out=str(tmp_path / "b"), anatomies=["mr_t2_brain"], template=True))
    )
    assert {v.anatomy for v in alone} == {"mr_t2_brain"} and not list((tmp_path / "b").glob("*t1*"))
    assert len(alone) == len(t2) + len(options.sizes)
    for a, b in zip(alone[len(options.sizes) :], t2):
        assert np.array_equal(*(Volume.load(v.file, "MR", (0, 1000)).data for v in (a, b)))
    with pytest.raises(ValueError, match="anatomies must be among"):
        replace(options, anatomies=["ct_head"])


def test_sizes_and_spacings_must_match(options):
    with pytest.raises(ValueError, match="one spacing for each size"):
        replace(options, spacings=[SPACING])
