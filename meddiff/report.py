"""Pictures of a volume."""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image

from meddiff.files import atomic_write
from meddiff.volume import Volume, tensor_to_file_axes

_GAP = 4  # pixels between the planes


def save_mid_planes(volume: Volume, path: str | os.PathLike[str]) -> None:
    """Write a PNG of the three middle planes: sagittal, coronal, axial, with the head up and in proportion of the mm.

    Grey values run over the volume's intensity scale.
    """
    x, y, z = (n // 2 for n in volume.shape)
    dx, dy, dz = volume.spacing
    planes = [  # rows go down, so head and front are flipped to the top
        (volume.data[x].T, dy, dz),
        (volume.data[:, y].T, dx, dz),
        (volume.data[:, :, z].T, dx, dy),
    ]
    finest = min(volume.spacing)
    images = []
    for plane, column_mm, row_mm in planes:
        grey = (plane[::-1] - volume.intensity.low) / (volume.intensity.high - volume.intensity.low)
        image = Image.fromarray((grey.clip(0, 1) * 255).round().astype(np.uint8))
        rows, columns = plane.shape
        images.append(image.resize((round(columns * column_mm / finest), round(rows * row_mm / finest))))
    sheet = Image.new("L", (sum(i.width for i in images) + 2 * _GAP, max(i.height for i in images)))
    left = 0
    for image in images:
        sheet.paste(image, (left, (sheet.height - image.height) // 2))
        left += image.width + _GAP
    with atomic_write(path) as temporary:
        sheet.save(temporary, format="PNG")


def save_comparison(tensors: Sequence[torch.Tensor], path: str | os.PathLike[str]) -> None:
    """Write a PNG with a row of mid-planes (sagittal, coronal, axial) per tensor [D, H, W] in [-1, 1] of one size."""
    rows = []
    for tensor in tensors:
        data = tensor_to_file_axes(tensor.detach().float().cpu().numpy())
        x, y, z = (n // 2 for n in data.shape)
        planes = [data[x].T[::-1], data[:, y].T[::-1], data[:, :, z].T[::-1]]
        height = max(len(plane) for plane in planes)
        rows.append(np.hstack([np.pad(p, ((0, height - len(p)), (0, _GAP)), constant_values=-1) for p in planes]))
    sheet = Image.fromarray(((np.vstack(rows).clip(-1, 1) + 1) * 127.5).round().astype(np.uint8))
    with atomic_write(path) as temporary:
        sheet.save(temporary, format="PNG")
