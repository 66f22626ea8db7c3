"""Segmentation mask → image: masks as conditions, and the tissues that an image shows."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from meddiff.config import MasksConfig

_MOST_ROUNDS = 1000


def one_hot(labels: Tensor, config: MasksConfig) -> Tensor:
    """Integer labels [D, H, W] → float32 [K, D, H, W]. Raises ValueError for labels that are no tissue's."""
    classes = len(config.tissues)
    if labels.is_floating_point() or labels.numel() == 0 or labels.min() < 0 or labels.max() >= classes:
        found = f"{labels.dtype} in [{labels.min()}, {labels.max()}]" if labels.numel() else "none"
        raise ValueError(f"masks: labels must be integers in [0, {classes}) ({', '.join(config.tissues)}), got {found}")
    return torch.stack([labels == tissue for tissue in range(classes)]).float()


def paint(labels: Tensor, config: MasksConfig) -> Tensor:
    """Integer labels [D, H, W] → a float32 image: the tissues evenly spaced from -1, the first, to 1, the last.

    Raises ValueError for labels that are no tissue's.
    """
    return one_hot(labels, config).argmax(0).float() * (2 / (len(config.tissues) - 1)) - 1


def classify(x: Tensor, config: MasksConfig) -> Tensor:
    """The tissue with the nearest mean intensity. [D, H, W] in [-1, 1] → int64 [D, H, W].

    The means begin as those of the training images, and Lloyd's algorithm (k-means, at most 1000 rounds) refines them
    on the image itself. Moderate changes of contrast and brightness therefore do not matter. The threshold above the
    darkest tissue is fixed: half-way between the two darkest means of training.

    Raises ValueError where the means of training are not known, and for an image that is not finite.
    """
    if not config.means:
        raise ValueError("classify: the means of the tissues are not known; a trained ControlNet has them")
    if not x.isfinite().all():
        raise ValueError("classify: the image is not finite; check what made it")
    order = sorted(range(len(config.means)), key=config.means.__getitem__)
    means = torch.tensor([config.means[tissue] for tissue in order], dtype=torch.float64)
    darkest = (means[0] + means[1]) / 2
    values = x.detach().float().flatten().cpu().sort().values.double()
    sums = torch.cat([values.new_zeros(1), values.cumsum(0)])
    for _ in range(_MOST_ROUNDS):
        thresholds = (means[1:] + means[:-1]) / 2
        thresholds[0] = darkest
        edges = F.pad(torch.searchsorted(values, thresholds, right=True), (1, 0))
        edges = torch.cat([edges, edges.new_tensor([len(values)])])
        counts = edges.diff()
        found = torch.where(counts > 0, sums[edges].diff() / counts, means)
        if torch.equal(found, means):
            break
        means = found
    return torch.tensor(order, device=x.device)[torch.bucketize(x.float().contiguous(), thresholds.to(x.device))]
