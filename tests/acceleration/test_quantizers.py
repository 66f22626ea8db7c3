"""Quantisers of other projects, as installed from PyPI: the same numbers, without the matrix."""

from __future__ import annotations

import pytest
import torch
from monai.networks.layers.vector_quantizer import EMAQuantizer, VectorQuantizer
from monai.networks.nets import VQVAE
from vector_quantize_pytorch import VectorQuantize

import meddiff
from meddiff.acceleration.quantizers import nearest_code

LAYOUTS = {
    "sequence": ({}, (2, 33, 12)),
    "channels first": ({"channel_last": False}, (2, 12, 33)),
    "one token each": ({}, (7, 12)),
    "image": ({"accept_image_fmap": True}, (2, 12, 5, 4)),
    "volume": ({"accept_3d_fmap": True}, (2, 12, 3, 4, 5)),
    "empty": ({}, (2, 0, 12)),
}


def both(module, x: torch.Tensor) -> tuple:
    """Results of the plain module and of the accelerated one, which must differ in how they came about."""
    plain = module(x)
    report = meddiff.accelerate(module)
    assert [row.by for row in report.replaced] == ["nearest code without a distance matrix"], str(report)
    return plain, module(x)


def assert_same(got: tuple, wanted: tuple) -> None:
    assert len(got) == len(wanted)
    for a, b in zip(got, wanted):
        assert a.shape == b.shape and a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", [(2, 5, 6, 7), (2, 5, 3, 4, 6)])
def test_ema_quantizer(shape):
    torch.manual_seed(0)
    module = EMAQuantizer(len(shape) - 2, 300, shape[1]).eval()
    plain, fast = both(module, torch.randn(shape))
    assert_same(fast, plain)


def test_ema_quantizer_has_its_gradient():
    torch.manual_seed(0)
    module, gradients = EMAQuantizer(3, 50, 4).eval(), []
    with torch.enable_grad():
        for _ in range(2):
            x = torch.randn(1, 4, 3, 3, 3, generator=torch.Generator().manual_seed(1)).requires_grad_()
            quantized, loss, _ = module(x)
            (quantized.square().sum() + 3 * loss).backward()
            gradients.append(x.grad)
            meddiff.accelerate(module)
    torch.testing.assert_close(gradients[1], gradients[0])


def test_monai_vqvae_as_a_whole():
    torch.manual_seed(0)
    model = VQVAE(3, 1, 1, channels=(4, 8), num_res_channels=4, num_res_layers=1, num_embeddings=64, embedding_dim=6,
                  downsample_parameters=((2, 4, 1, 1),) * 2, upsample_parameters=((2, 4, 1, 1, 0),) * 2)  # fmt: skip
    model.eval()
    x = torch.randn(1, 1, 16, 12, 20)
    plain, index, perplexity = model(x), model.index_quantize(x), model.quantizer.perplexity
    report = meddiff.accelerate(model)
    assert [(row.path, row.method) for row in report.replaced] == [("quantizer.quantizer", "forward")]
    assert [row.path for row in report.left] == ["encoder", "decoder"]
    assert isinstance(model.quantizer, VectorQuantizer)
    assert torch.equal(model.index_quantize(x), index)
    assert_same(model(x), plain)
    torch.testing.assert_close(model.quantizer.perplexity, perplexity)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("cosine", [False, True], ids=["Euclidean", "cosine"])
def test_vector_quantize_layouts(layout, cosine):
    options, shape = LAYOUTS[layout]
    torch.manual_seed(0)
    module = VectorQuantize(dim=12, codebook_size=200, use_cosine_sim=cosine, **options).eval()
    if layout == "empty":  # the plain one cannot
        meddiff.accelerate(module)
        quantized, index, _ = module(torch.zeros(shape))
        assert quantized.shape == shape and index.shape == shape[:2]
        return
    plain, fast = both(module, torch.randn(shape))
    assert_same(fast, plain)


@pytest.mark.parametrize("separate", [False, True])
@pytest.mark.parametrize("cosine", [False, True], ids=["Euclidean", "cosine"])
def test_vector_quantize_heads_and_projections(separate, cosine):
    torch.manual_seed(0)
    options = {"heads": 3, "codebook_dim": 5, "separate_codebook_per_head": separate, "use_cosine_sim": cosine}
    module = VectorQuantize(dim=12, codebook_size=100, accept_3d_fmap=True, **options).eval()
    plain, fast = both(module, torch.randn(2, 12, 3, 4, 2))
    assert_same(fast, plain)


def test_a_cosine_codebook_need_not_be_normalised():
    torch.manual_seed(0)
    module = VectorQuantize(dim=8, codebook_size=100, use_cosine_sim=True).eval()
    module._codebook.embed.mul_(torch.rand(1, 100, 1) + 0.5)
    plain, fast = both(module, torch.randn(3, 50, 8))
    assert_same(fast, plain)


def test_other_arguments_run_as_before():
    torch.manual_seed(0)
    module, x = VectorQuantize(dim=8, codebook_size=40).eval(), torch.randn(2, 6, 8)
    calls = [
        {"mask": torch.arange(6)[None] < torch.tensor([[2], [6]])},
        {"topk": 3},
        {"return_loss_breakdown": True},
        {"indices": torch.zeros(2, 6, dtype=torch.long)},
        {"freeze_codebook": True, "sample_codebook_temp": 0.5},
    ]
    plain = [module(x, **options) for options in calls]
    meddiff.accelerate(module)
    for options, wanted in zip(calls, plain):
        assert_same(module(x, **options)[:2], wanted[:2])


def test_a_learned_codebook_keeps_its_gradient():
    torch.manual_seed(0)
    module = VectorQuantize(dim=8, codebook_size=40, learnable_codebook=True, ema_update=False).eval()
    x, gradients = torch.randn(2, 6, 8), []
    with torch.enable_grad():
        for _ in range(2):
            module.zero_grad()
            module(x)[0].square().sum().backward()
            gradients.append(module._codebook.embed.grad.clone())
            meddiff.accelerate(module)
    assert gradients[0].norm() > 0
    torch.testing.assert_close(gradients[1], gradients[0])


@pytest.mark.parametrize(
    "options, reason", [({"affine_param": True}, "affine_param"), ({"kmeans_init": True}, "not init")]
)
def test_codebooks_that_are_left(options, reason):
    report = meddiff.accelerate(VectorQuantize(dim=8, codebook_size=40, **options).eval())
    assert not report.replaced
    assert reason in report.left[0].note


def test_training_mode():
    module, x = EMAQuantizer(3, 20, 4), torch.randn(1, 4, 2, 2, 2)
    report = meddiff.accelerate(module)
    assert not report.replaced and "eval()" in report.left[0].note
    meddiff.accelerate(module.eval())
    with pytest.raises(RuntimeError, match="EMAQuantizer is in training mode"):
        module.train()(x)
    meddiff.restore(module)
    before = module.embedding.weight.clone()
    module(x)
    assert not torch.equal(module.embedding.weight, before)


@pytest.mark.parametrize("cosine", [False, True])
def test_nearest_code_of_extremes(cosine):
    torch.manual_seed(0)
    tokens, codes = torch.randn(1, 4, 60), torch.randn(30, 4)
    tokens[..., :20] *= 1e4
    codes[:10] *= 1e-6
    score = tokens[0].T.double() @ codes.double().T
    wanted = score.argmax(1) if cosine else (codes.double().square().sum(1) - 2 * score).argmin(1)
    assert torch.equal(nearest_code(tokens, codes, cosine)[0], wanted)
