"""The discriminator: keys of the released files, and its layers."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import torch.nn.functional as F

from meddiff.training.discriminator import PatchDiscriminator

MANIFEST = json.loads((Path(__file__).parents[1] / "data" / "state_dict_manifest.json").read_text())
PREFIX = "volume_discriminator."


def test_keys_and_shapes_are_those_of_the_released_models():
    for model in ("patchvolume_8x", "patchvolume_4x"):
        wanted = {key.removeprefix(PREFIX): shape for key, shape in MANIFEST[model].items() if key.startswith(PREFIX)}
        assert wanted == {key: list(value.shape) for key, value in PatchDiscriminator().state_dict().items()}


def test_forward_is_the_published_chain_of_layers():
    torch.manual_seed(0)
    network, x = PatchDiscriminator(base_channels=4).eval(), torch.randn(2, 1, 20, 24, 16)
    state, h, features = network.state_dict(), x, []
    for i, stride in enumerate((2, 2, 2, 1, 1)):
        h = F.conv3d(h, state[f"model{i}.0.weight"], state[f"model{i}.0.bias"], stride, 2)
        if i in (1, 2, 3):
            names = ("running_mean", "running_var", "weight", "bias")
            h = F.batch_norm(h, *(state[f"model{i}.1.{name}"] for name in names))
        if i < 4:
            h = F.leaky_relu(h, 0.2)
            features.append(h)
    logits, got = network(x)
    torch.testing.assert_close(logits, h)
    assert len(got) == 4
    for one, other in zip(got, features):
        torch.testing.assert_close(one, other)
