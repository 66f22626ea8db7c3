"""Projections of a body, and what they give back."""

from __future__ import annotations

import builtins

import numpy as np
import pytest
import torch

from meddiff.config import SparseViewCTConfig
from meddiff.tasks import impose, measure, reconstruct
from meddiff.volume import IntensityScale, file_to_tensor_axes


@pytest.fixture(scope="module")
def body(phantom) -> torch.Tensor:
    """[D, H, W] in [-1, 1]"""
    values = torch.from_numpy(file_to_tensor_axes(phantom(40, 48, 6)).copy())
    return IntensityScale.ct().normalize(values)


def distance(a, b):
    return (a - b).square().mean().sqrt().item()


def test_every_view_sees_all_of_the_attenuation(body):
    measurement = measure(body, SparseViewCTConfig(9))
    depth, bins, views = measurement.data.shape
    assert (depth, views) == (6, 9) and bins > np.hypot(40, 48) and measurement.data.dtype == torch.float32
    np.testing.assert_allclose(measurement.sampling, np.arange(9) * 20)
    mass = ((body + 1) / 2).sum((1, 2))
    torch.testing.assert_close(measurement.data.sum(1), mass[:, None].expand(-1, 9), rtol=0.01, atol=0.5)


def test_the_first_view_is_the_sum_along_an_axis(body):
    """At 0° nothing is turned: the ray of a bin runs along H, and the bins are W in the middle of the square."""
    measurement = measure(body, SparseViewCTConfig(4))
    side = measurement.data.shape[1]
    start = side // 2 - 48 // 2
    wanted = ((body + 1) / 2).sum(1)
    torch.testing.assert_close(measurement.data[:, start : start + 48, 0], wanted, rtol=0, atol=1e-3)


def test_more_views_come_closer_and_stay_in_place(body):
    errors = [distance(reconstruct(measure(body, c), c), body) for c in map(SparseViewCTConfig, (6, 12, 180))]
    assert errors[0] > 1.5 * errors[1] and errors[1] > 1.5 * errors[2]
    assert errors[2] < 0.08  # edges are blurred
    few = reconstruct(measure(body, SparseViewCTConfig(24)), SparseViewCTConfig(24))
    assert few.shape == body.shape and few.min() >= -1 and few.max() <= 1
    for shift in ((1, 0), (0, 1), (1, 1), (-1, 0), (0, -1)):
        assert distance(few, body.roll(shift, (1, 2))) > distance(few, body)


def test_imposing_views_brings_an_image_nearer_to_them(body):
    config = SparseViewCTConfig(16)
    measurement = measure(body, config)

    def disagreement(x):
        return distance(measure(x, config).data, measurement.data)

    air = torch.full_like(body, -1)
    once = impose(air, measurement, config)
    assert once.shape == body.shape and once.dtype == torch.float32
    assert disagreement(once) < 0.25 * disagreement(air) and distance(once, body) < 0.6 * distance(air, body)
    assert disagreement(impose(once, measurement, config)) < 0.8 * disagreement(once)
    assert distance(impose(body, measurement, config), body) < 0.03
    with pytest.raises(ValueError, match="must have the measurement's size"):
        impose(body[:3], measurement, config)


def test_it_says_what_is_missing(body, monkeypatch):
    original = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("skimage"):
            raise ImportError(name)
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match="scikit-image: pip install"):
        measure(body, SparseViewCTConfig())
