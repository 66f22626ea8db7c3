"""Segmentation mask → image: masks as conditions, and the tissues that an image shows."""

from __future__ import annotations

import torch
from torch import Tensor

from meddiff.config import MasksConfig


def one_hot(labels: Tensor, config: MasksConfig) -> Tensor:
    """Integer labels [D, H, W] → float32 [K, D, H, W]. Raises ValueError for labels that are no tissue's."""
    classes = len(config.tissues)
    if labels.is_floating_point() or labels.numel() == 0 or labels.min() < 0 or labels.max() >= classes:
        found = f"{labels.dtype} in [{labels.min()}, {labels.max()}]" if labels.numel() else "none"
        raise ValueError(f"masks: labels must be integers in [0, {classes}) ({', '.join(config.tissues)}), got {found}")
    return torch.stack([labels == tissue for tissue in range(classes)]).float()


def classify(x: Tensor, config: MasksConfig) -> Tensor:
    """The tissue with the nearest mean: a threshold half-way between means. [D, H, W] in [-1, 1] → int64 [D, H, W].

    Raises ValueError where the means are not known.
    """
    if not config.means:
        raise ValueError("classify: the means of the tissues are not known; a trained ControlNet has them")
    order = sorted(range(len(config.means)), key=config.means.__getitem__)
    means = torch.tensor([config.means[tissue] for tissue in order], device=x.device)
    return torch.tensor(order, device=x.device)[torch.bucketize(x.float(), (means[1:] + means[:-1]) / 2)]
