from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path

import pytest
import torch

from meddiff.config import PRESETS
from meddiff.models import LatentScale, PatchVolumeAutoencoder
from meddiff.models.autoencoder import AttentionBlock, ResBlock
from meddiff.volume import IntensityScale

TINY = PRESETS["tiny"].autoencoder
MANIFEST = json.loads((Path(__file__).parents[1] / "data" / "state_dict_manifest.json").read_text())
TRAINING_ONLY = ("volume_discriminator.", "perceptual_loss.")


@pytest.fixture(scope="module")
def autoencoder(reference_weights):
    return reference_weights(PatchVolumeAutoencoder(TINY))


@pytest.mark.parametrize("preset", ["8x", "4x"])
def test_keys_and_shapes_are_the_released_ones(preset):
    with torch.device("meta"):
        model = PatchVolumeAutoencoder(PRESETS[preset].autoencoder)
    released = MANIFEST[f"patchvolume_{preset}"]
    assert {key: list(t.shape) for key, t in model.state_dict().items()} == {
        key: shape for key, shape in released.items() if not key.startswith(TRAINING_ONLY)
    }


@pytest.mark.parametrize(
    "name, downsample",
    [("patchvolume_8x_tiny", 8), ("patchvolume_4x_tiny", 4), ("patchvolume_8x_tiny_grid", 8)],
)
def test_reference_outputs(name, downsample, reference, reference_weights, relative_error):
    model = reference_weights(PatchVolumeAutoencoder(dataclasses.replace(TINY, downsample=downsample)))
    wanted = reference(name)
    latent = model.encode(wanted["input"].float())
    assert relative_error(latent, wanted["latent"]) < 1e-5
    indices, rows = model.quantize(latent)
    assert indices.dtype == torch.int64
    clear = wanted["margin"] > 1e-4
    assert clear.float().mean() > 0.9
    assert torch.equal(indices[clear], wanted["indices"].long()[clear])
    assert torch.equal(rows.movedim(1, -1), model.codebook.embeddings[indices])

    volume = model.decode(wanted["indices"].long())
    if "reconstruction" in wanted:
        assert relative_error(volume, wanted["reconstruction"]) < 1e-5
    else:
        assert relative_error(volume[:, 0, volume.shape[2] // 2], wanted["reconstruction_mid"]) < 1e-5
        assert relative_error(volume[..., volume.shape[4] // 2][:, 0], wanted["reconstruction_axial"]) < 1e-5


def test_patches_are_cut_and_put_back_in_order(autoencoder):
    x = torch.rand(2, 1, 32, 48, 64) * 2 - 1
    latent = autoencoder.encode(x)
    assert latent.shape == (2, 8, 4, 6, 8) and latent.dtype == torch.float32
    for b, i, j, k in [(0, 0, 0, 0), (0, 1, 0, 3), (1, 0, 2, 1), (1, 1, 2, 3)]:
        patch = x[b : b + 1, :, 16 * i : 16 * i + 16, 16 * j : 16 * j + 16, 16 * k : 16 * k + 16]
        alone = autoencoder.pre_vq_conv(autoencoder.encoder(patch))[0]
        there = latent[b, :, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2, 2 * k : 2 * k + 2]
        torch.testing.assert_close(there, alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("patch_batch", [1, 5, 100])
def test_the_patch_batch_does_not_matter(autoencoder, patch_batch):
    x = torch.rand(1, 1, 32, 32, 32)
    torch.testing.assert_close(autoencoder.encode(x, patch_batch), autoencoder.encode(x, 3), rtol=1e-4, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_patches_that_are_copied_meanwhile_are_encoded_as_those_that_are_there(reference_weights):
    autoencoder = reference_weights(PatchVolumeAutoencoder(TINY)).to("cuda", torch.bfloat16)
    x = torch.rand(1, 1, 64, 80, 96, generator=torch.Generator().manual_seed(0)) * 2 - 1
    there = autoencoder.encode(x.cuda(), patch_batch=3)
    for _ in range(3):
        assert torch.equal(autoencoder.encode(x, patch_batch=3), there)


def test_other_sizes_are_padded_with_edge_values_and_cropped(autoencoder):
    x = torch.rand(1, 1, 17, 5, 30)
    padded = torch.empty(1, 1, 32, 16, 32)
    for axis_index in [(d, h, w) for d in range(32) for h in range(16) for w in range(32)]:
        d, h, w = axis_index
        padded[0, 0, d, h, w] = x[0, 0, min(d, 16), min(h, 4), min(w, 29)]
    torch.testing.assert_close(autoencoder.encode(x), autoencoder.encode(padded))
    out = autoencoder(x)
    assert out.shape == x.shape
    torch.testing.assert_close(out, autoencoder(padded)[:, :, :17, :5, :30])


def test_original_units_of_any_dtype_and_strides(autoencoder):
    scale = IntensityScale(-900, 1100)
    x = torch.randint(-1000, 1200, (1, 1, 30, 17, 16), dtype=torch.int16, generator=torch.Generator().manual_seed(0))
    wanted = autoencoder.encode(scale.normalize(x))
    turned = x.permute(4, 3, 2, 1, 0).contiguous().permute(4, 3, 2, 1, 0)
    for voxels in (x, turned, turned.double()):
        assert torch.equal(autoencoder.encode(voxels, window=(scale.low, scale.high)), wanted)


def test_encoding_to_codes_is_encoding_and_quantising(autoencoder):
    x = torch.rand(2, 1, 20, 16, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    latent, indices, rows = autoencoder.encode_to_codes(x)
    assert torch.equal(latent, autoencoder.encode(x))
    wanted = autoencoder.quantize(latent)
    assert torch.equal(indices, wanted[0]) and torch.equal(rows, wanted[1])


def test_decoding_a_latent_is_decoding_its_codes(autoencoder):
    z = torch.randn(1, 8, 2, 3, 2, generator=torch.Generator().manual_seed(0))
    wanted = autoencoder.decode(autoencoder.quantize(z)[0])
    scaled = autoencoder.codebook.latent_scale().scale(z)
    torch.testing.assert_close(autoencoder.decode_latent(scaled), wanted)
    rows = autoencoder.post_vq_conv(autoencoder.quantize(z)[1])
    torch.testing.assert_close(wanted, autoencoder.decoder(rows), rtol=1e-4, atol=1e-5)


def test_a_batch_is_two_runs_of_one(autoencoder):
    indices = torch.randint(0, TINY.n_codes, (2, 3, 2, 4), generator=torch.Generator().manual_seed(0))
    both = autoencoder.decode(indices)
    for b in range(2):
        torch.testing.assert_close(both[b : b + 1], autoencoder.decode(indices[b : b + 1]), rtol=1e-4, atol=1e-5)


def test_disjoint_tiles_warn_and_have_seams(autoencoder):
    indices = torch.randint(0, TINY.n_codes, (1, 5, 4, 4), generator=torch.Generator().manual_seed(1))
    joint = autoencoder.decode(indices)
    with pytest.warns(UserWarning, match="seams"):
        tiled = autoencoder.decode(indices, joint=False, tile=16)
    assert tiled.shape == joint.shape
    torch.testing.assert_close(tiled[:, :, 16:32, :16, 16:], autoencoder.decode(indices[:, 2:4, :2, 2:]))
    torch.testing.assert_close(tiled[:, :, 32:, 16:, 16:], autoencoder.decode(indices[:, 4:, 2:, 2:]))
    assert (tiled - joint).abs().max() > 0.01
    with pytest.warns(UserWarning):
        torch.testing.assert_close(autoencoder.decode(indices, joint=False, tile=256), joint)


def test_bfloat16_keeps_codes_and_layout(reference, reference_weights, relative_error):
    model = reference_weights(PatchVolumeAutoencoder(TINY)).to(torch.bfloat16)
    wanted = reference("patchvolume_8x_tiny")
    assert model.codebook.embeddings.dtype == torch.float32
    latent = model.encode(wanted["input"])
    assert latent.dtype == torch.float32 and relative_error(latent, wanted["latent"]) < 0.03
    volume = model.decode(wanted["indices"].long())
    assert volume.dtype == torch.bfloat16 and relative_error(volume, wanted["reconstruction"]) < 0.03


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_activations_stay_channels_last(dtype):
    model = PatchVolumeAutoencoder(TINY).to(dtype).eval()
    strided = []

    def look(module, inputs, output):
        if not output.is_contiguous(memory_format=torch.channels_last_3d):
            strided.append(type(module).__name__)

    layers = (torch.nn.Conv3d, torch.nn.ConvTranspose3d, torch.nn.GroupNorm, ResBlock, AttentionBlock)
    hooks = [m.register_forward_hook(look) for m in model.modules() if isinstance(m, layers)]
    model(torch.rand(2, 1, 16, 32, 16))
    assert len(hooks) > 50 and strided == []


def test_attention_spans_the_volume(autoencoder):
    block = autoencoder.decoder.mid_block.attn
    x = torch.randn(1, TINY.widths[-1], 3, 2, 4)
    q, k, v = torch.nn.functional.linear(block.norm(x).flatten(2).mT.double(), block.to_qkv.weight.double()).chunk(
        3, dim=-1
    )
    heads = []
    for h in range(4):
        part = slice(32 * h, 32 * h + 32)
        weights = (q[..., part] @ k[..., part].mT / 32**0.5).softmax(-1)
        heads.append(weights @ v[..., part])
    mixed = torch.cat(heads, -1) @ block.to_out.weight.flatten(1).double().T + block.to_out.bias.double()
    torch.testing.assert_close(block(x), x + mixed.mT.reshape(x.shape).float(), rtol=1e-4, atol=1e-4)


def test_latent_scale_and_its_inverse(autoencoder):
    scale = autoencoder.codebook.latent_scale()
    codes = autoencoder.codebook.embeddings
    assert (scale.minimum, scale.maximum) == (codes.min().item(), codes.max().item())
    scaled = scale.scale(codes)
    assert (scaled.min().item(), scaled.max().item()) == pytest.approx((-1, 1), abs=1e-6)
    torch.testing.assert_close(scaled, 2 * (codes - codes.min()) / (codes.max() - codes.min()) - 1)
    torch.testing.assert_close(scale.unscale(scaled), codes)
    with pytest.raises(ValueError, match="must exceed"):
        LatentScale(1.0, 1.0)


def test_training_gets_gradients(reference):
    model = PatchVolumeAutoencoder(TINY)
    with torch.enable_grad():
        z = model.encode(reference("patchvolume_8x_tiny")["input"])
        model.decoder(model.post_vq_conv(z)).square().mean().backward()
    without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert without == []


def test_errors_say_what_was_wanted(autoencoder):
    with pytest.raises(ValueError, match=r"\[B, 1, D, H, W\], got \(1, 2, 16, 16, 16\)"):
        autoencoder.encode(torch.zeros(1, 2, 16, 16, 16))
    with pytest.raises(TypeError, match="int16"):
        autoencoder.encode(torch.zeros(1, 1, 16, 16, 16, dtype=torch.int16))
    with pytest.raises(ValueError, match=r"\[0, 256\), got 0 to 256"):
        autoencoder.decode(torch.tensor([[[[0, 256]]]]))
    with pytest.raises(ValueError, match=r"\[B, d, h, w\]"):
        autoencoder.decode(torch.zeros(2, 2, 2, dtype=torch.int64))
    with pytest.raises(ValueError, match="multiple of 8"):
        autoencoder.decode(torch.zeros(1, 2, 2, 2, dtype=torch.int64), joint=False, tile=12)
    with pytest.raises(ValueError, match=r"\[B, 8, d, h, w\], got \(1, 4, 2, 2, 2\)"):
        autoencoder.decode_latent(torch.zeros(1, 4, 2, 2, 2))


def test_too_little_memory_is_said_beforehand(autoencoder):
    with pytest.raises(MemoryError, match=r"16×16×16 voxels in float32 need at least .* MB beside the weights"):
        autoencoder.decode(torch.zeros(1, 2, 2, 2, dtype=torch.int64), memory_budget=1000)


def test_a_budget_below_whole_tensors_gives_the_same(autoencoder, relative_error):
    indices = torch.randint(0, TINY.n_codes, (1, 6, 5, 5), generator=torch.Generator().manual_seed(0))
    whole, planned = autoencoder.decode(indices), autoencoder.decode(indices, memory_budget=4_000_000)
    assert not torch.equal(planned, whole)
    # PyTorch's float32 statistics are the less exact ones, so float64 is the judge.
    exact = copy.deepcopy(autoencoder).double().decoder
    rows = torch.nn.functional.embedding(indices, autoencoder._code_table()).permute(0, 4, 1, 2, 3).double()
    for volume in (whole, planned):
        assert relative_error(volume, exact(rows)) < 1e-5


def test_slabs_make_up_the_volume(autoencoder):
    indices = torch.randint(0, TINY.n_codes, (2, 4, 3, 3), generator=torch.Generator().manual_seed(0))
    slabs = [[], []]

    def receive(slab, sample, start):
        assert start == sum(s.shape[2] for s in slabs[sample])
        slabs[sample].append(slab)

    assert autoencoder.decode(indices, on_slab=receive) is None
    assert len(slabs[0]) > 1
    whole = autoencoder.decode(indices)
    assert torch.equal(torch.cat([torch.cat(s, 2) for s in slabs]), whole)
    latent = torch.rand(1, 8, 2, 2, 2) * 2 - 1
    slabs[0].clear()
    assert autoencoder.decode_latent(latent, on_slab=receive) is None
    assert torch.equal(torch.cat(slabs[0], 2), autoencoder.decode_latent(latent))
    with pytest.raises(ValueError, match="on_slab is for the joint decode"):
        autoencoder.decode(indices, joint=False, on_slab=receive)
