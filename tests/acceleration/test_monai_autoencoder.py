"""MONAI's KL autoencoders, as installed from PyPI: any size in any memory, and the numbers of the unsplit decoder."""

from __future__ import annotations

import copy

import pytest
import torch
from monai.apps.generation.maisi.networks.autoencoderkl_maisi import AutoencoderKlMaisi
from monai.networks.nets import AutoencoderKL

import meddiff
from meddiff.acceleration import monai_autoencoder

BY = [("encoder", "level by level within the memory there is"), ("decoder", "joint decode within the memory there is")]


def maisi(channels=(8, 16, 16), groups=8, splits=1, **options) -> AutoencoderKlMaisi:
    """With the depth of the published configuration."""
    torch.manual_seed(0)
    sizes = {"spatial_dims": 3, "in_channels": 1, "out_channels": 1, "latent_channels": 4, "num_channels": channels}
    norms = {"norm_num_groups": groups, "norm_eps": 1e-6, "attention_levels": [False] * 3}
    options = {"num_res_blocks": [2, 2, 2], "num_splits": splits, "dim_split": 1} | options
    return AutoencoderKlMaisi(**sizes, **norms, **options).eval()


def kl(**options) -> AutoencoderKL:
    torch.manual_seed(0)
    defaults = {"channels": (8, 16, 24), "num_res_blocks": (1, 2, 1), "norm_num_groups": 8, "latent_channels": 3}
    return AutoencoderKL(3, attention_levels=(False, False, True), **defaults | options).eval()


MODELS = {
    "MAISI": maisi,
    "MAISI with attention": lambda: maisi(with_decoder_nonlocal_attn=True),
    "KL": kl,
    "KL, one linear layer for q, k and v": lambda: kl(use_combined_linear=True, include_fc=False),
    "KL, no attention in the middle": lambda: kl(with_decoder_nonlocal_attn=False, use_flash_attention=True),
}


@pytest.mark.parametrize("name", MODELS)
def test_decoding_odd_sizes(name, relative_error):
    model = MODELS[name]()
    latents = [torch.randn(1, model.latent_channels, *size) for size in ((3, 5, 2), (1, 1, 1))]
    plain = [model.decode(z) for z in latents]
    report = meddiff.accelerate(model)
    assert [(row.path, row.by) for row in report.replaced] == BY, str(report)
    for z, wanted in zip(latents, plain):
        assert relative_error(model.decode(z), wanted) < 1e-5
        assert relative_error(model.decode_stage_2_outputs(z), wanted) < 1e-5


def test_encoding_goes_on_after_memory_ran_out_within_a_slab(monkeypatch, relative_error, caplog):
    model, x, slabs, failed = maisi(), torch.randn(1, 1, 40, 8, 8), [], []
    wanted = model.encode(x)[0]
    call, take = monai_autoencoder._Halved.__call__, monai_autoencoder._Halved._take

    def recorded(halved, slab, sample, start):
        slabs.append((start, slab.shape[2]))
        call(halved, slab, sample, start)

    def run_out_once(halved, slab, sample, start):
        if start == 20 and not failed:
            failed.append(slabs[-1])
            raise MemoryError
        take(halved, slab, sample, start)

    meddiff.accelerate(model)
    monkeypatch.setattr(monai_autoencoder._Halved, "__call__", recorded)
    monkeypatch.setattr(monai_autoencoder._Halved, "_take", run_out_once)
    assert relative_error(model.encode(x)[0], wanted) < 1e-5
    assert failed == [(16, 16)] and "planning again" in caplog.text  # in the second part of the second slab


@pytest.mark.parametrize("name", MODELS)
def test_encoding_odd_sizes(name, relative_error):
    model, volumes = MODELS[name](), [torch.randn(2, 1, *size) for size in ((13, 20, 7), (4, 4, 4))]
    plain = [model.encode(x) for x in volumes]
    meddiff.accelerate(model)
    for x, wanted in zip(volumes, plain):
        for fast, expected in zip(model.encode(x), wanted):
            assert fast.is_contiguous() and fast.shape == expected.shape
            assert relative_error(fast, expected) < 1e-5


def test_an_encoder_within_a_budget(relative_error):
    model, x = maisi(), torch.randn(1, 1, 18, 40, 33)
    wanted = model.encode(x)
    meddiff.accelerate(model, memory_budget=1)
    with pytest.raises(MemoryError, match=r"18×40×33 voxels in float32 need at least (\S+) MB") as error:
        model.encode(x)
    least = 1.05e6 * float(str(error.value).split("at least ")[1].split()[0])
    level = 8 * x.nbytes  # one tensor of the first level
    assert least < 1.5 * level
    out = 8 * 9 * 20 * 16 * 4
    meddiff.accelerate(model, memory_budget=int(least) + out)
    for fast, expected in zip(model.encode(x), wanted):
        assert relative_error(fast, expected) < 1e-5


def test_an_encoder_trains_as_before(relative_error):
    model, x, gradients = maisi().train(), torch.randn(1, 1, 9, 8, 12), []
    with torch.enable_grad():
        for _ in range(2):
            model.zero_grad()
            model.encode(x)[0].square().mean().backward()
            gradients.append(torch.cat([p.grad.flatten() for p in model.encoder.parameters()]))
            report = meddiff.accelerate(model)
    assert [row.path for row in report.replaced] == ["encoder"]
    assert relative_error(gradients[1], gradients[0]) < 1e-4


def test_the_published_widths(relative_error):
    """The decoder without splits is the truth; what is split differs at sizes that the splits do not divide."""
    model = maisi((64, 128, 256), 32, splits=4)
    whole = copy.deepcopy(model)
    for layer in whole.modules():
        if hasattr(layer, "num_splits"):
            layer.num_splits = 1
    z = torch.randn(1, 4, 2, 3, 1)
    meddiff.accelerate(model)
    assert relative_error(model.decode(z), whole.decode(z)) < 1e-5
    x = torch.randn(1, 1, 8, 7, 9)
    assert relative_error(model.encode(x)[0], whole.encode(x)[0]) < 1e-5


def test_a_budget_is_kept_or_refused(relative_error):
    model, z = maisi(), torch.randn(1, 4, 4, 24, 24)
    wanted = model.decode(z)
    meddiff.accelerate(model, memory_budget=10**5)
    with pytest.raises(MemoryError, match=r"need at least (\S+) MB") as error:
        model.decode(z)
    least = int(1.05e6 * float(str(error.value).split("at least ")[1].split()[0]))
    whole = meddiff.decode.make_plan(meddiff.decode.layers_of(model.decoder), z.shape, z.dtype, z.device).peak_bytes
    assert least < 0.6 * whole
    meddiff.accelerate(model, memory_budget=least)
    assert relative_error(model.decode(z), wanted) < 1e-5


def test_autocast_is_no_worse_than_its_own(relative_error):
    model, z = maisi(), torch.randn(1, 4, 4, 4, 4)
    wanted = model.decode(z)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        error = relative_error(model.decode(z), wanted)
        meddiff.accelerate(model)
        fast = model.decode(z)
    assert fast.dtype == torch.bfloat16
    assert 1e-4 < relative_error(fast, wanted) < 1.1 * error


def test_compiled_around(relative_error):
    model, z = maisi(), torch.randn(1, 4, 2, 2, 2)
    wanted = model.decode(z)
    meddiff.accelerate(model)
    assert relative_error(torch.compile(model.decode, backend="eager")(z), wanted) < 1e-5


def test_the_gradient_is_refused_and_restoring_brings_it_back():
    model, z = maisi(), torch.randn(1, 4, 1, 1, 1)
    meddiff.accelerate(model)
    with torch.enable_grad():
        with pytest.raises(RuntimeError, match="MaisiDecoder got an input that requires a gradient"):
            model.decode(z)
        meddiff.restore(model)
        assert model.decode(z).requires_grad


@pytest.mark.parametrize(
    "model, reason",
    [
        (lambda: kl(use_convtranspose=True), r"blocks.6.deconv (ConvTranspose3d) must be 4³"),
        (lambda: maisi(use_convtranspose=True), r"blocks.3.conv.conv.conv (ConvTranspose3d) must be 4³"),
        (lambda: maisi(norm_float16=True), "be computed in float32"),
    ],
)
def test_what_is_left(model, reason):
    report = meddiff.accelerate(model())
    assert not report.replaced
    assert any(reason in row.note for row in report.left), str(report)
