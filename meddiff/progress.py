"""Progress bars with the time left, for work over two seconds; silent when standard error is no terminal."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import nn
from tqdm import tqdm

_bar = partial(tqdm, disable=None, delay=2, leave=False)


def progress(label: str) -> Callable[[Sequence], Iterable]:
    """A wrapper that shows a bar while a sequence is walked: `for step in progress("sampling")(steps)`."""
    return partial(_bar, desc=label)


def _multiplications(layer: nn.Module, inputs: torch.Tensor, output: torch.Tensor) -> int:
    # A transposed convolution spreads each input voxel over its kernel, a plain one gathers for each output voxel.
    voxels = inputs if isinstance(layer, nn.ConvTranspose3d) else output
    return voxels[:, 0].numel() * layer.weight.numel()


@contextmanager
def convolution_progress(decoder: nn.Module, size: Sequence[int], label: str) -> Iterator[None]:
    """Show the share of a decoder's multiplications that is done, while the block runs it once.

    Args:
        decoder: its convolutions run in the order of their definition, and each transposed one doubles every axis.
        size: the batch and the latent's extents, (B, d, h, w).
    """
    layers = [layer for layer in decoder.modules() if isinstance(layer, (nn.Conv3d, nn.ConvTranspose3d))]
    voxels, total = math.prod(size), 0
    for layer in layers:
        total += voxels * layer.weight.numel()
        voxels *= 8 if isinstance(layer, nn.ConvTranspose3d) else 1

    with _bar(total=total, desc=label, bar_format="{l_bar}{bar}| {elapsed}<{remaining}") as bar:

        def advance(layer: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            bar.update(_multiplications(layer, inputs[0], output))

        hooks = [layer.register_forward_hook(advance) for layer in layers]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
