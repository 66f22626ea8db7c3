from __future__ import annotations

import numpy as np
import pytest
import torch

from meddiff.volume import IntensityScale, Volume, VolumeError, file_to_tensor_axes, tensor_to_file_axes

SHAPE = (2, 3, 4)
DATA = np.arange(24, dtype=np.float32).reshape(SHAPE)
AFFINE = np.diag([1.5, 2.0, 2.5, 1.0])


def test_axis_rule_is_xyz_to_hwd():
    data, volume = DATA, Volume(DATA, AFFINE, IntensityScale(0, 30))
    tensor = volume.to_tensor()
    assert tensor.shape == (1, 1, 4, 2, 3) and tensor.is_contiguous() and tensor.dtype == torch.float32
    for x, y, z in np.ndindex(*SHAPE):
        assert tensor[0, 0, z, x, y].item() == pytest.approx(data[x, y, z] / 15 - 1, abs=1e-6)
    np.testing.assert_array_equal(file_to_tensor_axes(data)[3, 1, 2], data[1, 2, 3])
    np.testing.assert_array_equal(tensor_to_file_axes(file_to_tensor_axes(data)), data)
    np.testing.assert_array_equal(tensor_to_file_axes(tensor[0, 0].numpy()), tensor[0, 0].permute(1, 2, 0))
    assert volume.spacing == pytest.approx((1.5, 2.0, 2.5)) and volume.shape == SHAPE


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_tensor_to_volume_and_back(dtype):
    tensor = torch.linspace(-1, 1, 24, dtype=dtype).reshape(1, 1, 4, 2, 3).requires_grad_()
    volume = Volume.from_tensor(tensor, intensity=IntensityScale.ct(), spacing=(0.7, 0.8, 1))
    np.testing.assert_array_equal(volume.affine, np.diag([0.7, 0.8, 1, 1]))
    assert volume.shape == SHAPE and volume.data.dtype == np.float32
    assert volume.data[1, 2, 3] == 1000 and volume.data[0, 0, 0] == -1000
    torch.testing.assert_close(volume.to_tensor(), tensor.detach().float())
    again = volume.with_tensor(-tensor)
    np.testing.assert_allclose(again.data, -volume.data, atol=1e-4)
    assert again.intensity == volume.intensity and again.source is volume.source
    np.testing.assert_array_equal(again.affine, volume.affine)


def test_to_tensor_never_shares_memory():
    volume = Volume.from_tensor(torch.zeros(1, 1, 4, 2, 3), intensity=IntensityScale(-1, 1), spacing=(1, 1, 1))
    volume.to_tensor().fill_(1)
    assert not volume.data.any()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"tensor": torch.zeros(4, 2, 3)}, r"must be \[1, 1, D, H, W\], got \(4, 2, 3\)"),
        ({"tensor": torch.zeros(2, 1, 4, 2, 3)}, "must be"),
        ({"spacing": None}, "either affine or spacing"),
        ({"affine": np.eye(4)}, "either affine or spacing"),
        ({"spacing": None, "affine": np.diag([-1, 1, 1, 1])}, "must be RAS.*LAS"),
        ({"spacing": (1, 0, 1)}, "affine must be"),
        ({"spacing": None, "affine": np.eye(3)}, "affine must be"),
        ({"tensor": torch.full((1, 1, 2, 2, 2), torch.nan)}, "8 of 8 voxels are NaN"),
        ({"tensor": torch.zeros(1, 1, 0, 2, 2)}, "no empty axis"),
    ],
)
def test_from_tensor_refuses(options, words):
    options = {"tensor": torch.zeros(1, 1, 2, 2, 2), "spacing": (1, 1, 1), "intensity": IntensityScale.ct()} | options
    with pytest.raises(VolumeError, match=words):
        Volume.from_tensor(**options)


def test_with_tensor_refuses_another_shape():
    volume = Volume(DATA, AFFINE, IntensityScale.ct())
    with pytest.raises(VolumeError, match=r"must be \(1, 1, 4, 2, 3\).*got \(1, 1, 2, 3, 4\)"):
        volume.with_tensor(torch.zeros(1, 1, 2, 3, 4))


def test_intensity_maps_and_clips():
    scale = IntensityScale.ct(-200, 600)
    values = torch.tensor([-3000.0, -200, 0, 600, 3000])
    torch.testing.assert_close(scale.normalize(values), torch.tensor([-1, -1, -0.5, 1, 1]))
    torch.testing.assert_close(
        scale.denormalize(torch.tensor([-1.0, -0.5, 1, 1.5])), torch.tensor([-200.0, 0, 600, 800])
    )
    torch.testing.assert_close(scale.denormalize(scale.normalize(values[1:4])), values[1:4])
    assert IntensityScale.ct() == IntensityScale(-1000, 1000, "CT")
    assert IntensityScale.percentiles(np.arange(1001)) == IntensityScale(5, 995, "MR")


@pytest.mark.parametrize(("low", "high"), [(3, 3), (4, 3), (np.nan, 1), (0, np.inf)])
def test_intensity_refuses_an_empty_range(low, high):
    with pytest.raises(VolumeError, match="low < high.*window="):
        IntensityScale(low, high)
    with pytest.raises(VolumeError, match="CT.*MR.*PET"):
        IntensityScale(0, 1, "PET")


@pytest.mark.parametrize(
    ("data", "affine"), [(DATA[0], AFFINE), (DATA, np.diag([1, 1, 0, 1])), (DATA, AFFINE[:3]), (DATA + np.inf, AFFINE)]
)
def test_volume_checks_itself(data, affine):
    with pytest.raises(VolumeError):
        Volume(data, affine, IntensityScale.ct())
