"""The discriminator: keys of the released files, and its layers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from meddiff.checkpoint import CheckpointError
from meddiff.conversion import read_discriminator
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


@pytest.mark.parametrize("prefix", [PREFIX, "", f"module.{PREFIX}"])
def test_weights_of_released_and_of_own_files(tmp_path, prefix):
    network = PatchDiscriminator(base_channels=4)
    state = {prefix + key: tensor.clone() for key, tensor in network.state_dict().items()}
    if PREFIX in prefix:
        state[prefix.replace(PREFIX, "decoder.weight")] = torch.zeros(3)
    torch.save({"epoch": 3, "state_dict": state}, tmp_path / "a.ckpt")
    save_file(state, tmp_path / "a.safetensors")
    for file in (tmp_path / "a.ckpt", tmp_path / "a.safetensors"):
        read = read_discriminator(file, PatchDiscriminator(base_channels=4).state_dict())
        assert read.keys() == network.state_dict().keys()
        assert all(torch.equal(read[key], tensor) for key, tensor in network.state_dict().items())


def test_files_without_its_weights_are_refused(tmp_path):
    network, file = PatchDiscriminator(base_channels=4), tmp_path / "a.safetensors"
    wanted = network.state_dict()
    with pytest.raises(CheckpointError, match="a.safetensors: cannot be read"):
        read_discriminator(file, wanted)
    for change, message in (
        ({"model0.0.bias": torch.zeros(5)}, r"'model0.0.bias' is \(5,\) and should be \(4,\)"),
        ({"model0.0.bias": torch.full((4,), float("nan"))}, "'model0.0.bias' holds NaN"),
        ({"decoder.weight": torch.zeros(3)}, "1 unknown keys: 'decoder.weight'"),
    ):
        save_file(wanted | change, file)
        with pytest.raises(CheckpointError, match=f"a.safetensors.*{message}"):
            read_discriminator(file, wanted)
