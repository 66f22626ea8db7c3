"""The published networks, in plain PyTorch and accelerated: the same results, seams apart."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import meddiff
from meddiff.config import PRESETS


def test_the_report_of_an_autoencoder(autoencoder):
    autoencoder.perceptual_loss = nn.Sequential(nn.Conv2d(3, 4, 3))
    report = meddiff.accelerate(autoencoder)
    replaced = [(row.path, row.method) for row in report.replaced]
    assert replaced == [
        ("encoder", "forward"),
        ("decoder", "forward"),
        ("codebook", "forward"),
        ("", "decode_sliding"),
    ]
    assert [(row.path, row.note) for row in report.left] == [("perceptual_loss", "no structure that meddiff knows")]
    lines = str(report).splitlines()
    assert lines[0].split() == ["module", "class", "method", "replaced", "by", "note"]
    assert "seams" in lines[4] and "(left)" in lines[5] and len(lines) == 6


@pytest.mark.parametrize("quantize", [False, True])
@pytest.mark.parametrize("method", ["patch_encode", "patch_encode_sliding"])
def test_encoding(autoencoder, method, quantize, relative_error):
    x = torch.rand(1, 1, 16, 32, 16) * 2 - 1
    plain = getattr(autoencoder, method)(x, quantize, 16)
    meddiff.accelerate(autoencoder)
    fast = getattr(autoencoder, method)(x, quantize=quantize, patch_size=16)
    assert fast.dtype == plain.dtype and fast.shape == plain.shape
    if quantize:
        assert torch.equal(fast, plain)
    else:
        assert relative_error(fast, plain) < 1e-5


@pytest.mark.parametrize("quantize", [False, True])
def test_decoding(autoencoder, quantize, relative_error):
    latent = torch.randn(2, 8, 2, 3, 1) if quantize else torch.randint(256, (2, 2, 3, 1))
    plain, tiled = autoencoder.decode(latent, quantize), autoencoder.decode_sliding(latent, quantize, 2)
    meddiff.accelerate(autoencoder)
    assert relative_error(tiled, plain) > 1e-2  # its seams
    for fast in (
        autoencoder.decode(latent, quantize=quantize),
        autoencoder.decode_sliding(latent, quantize, tile=2),
        autoencoder.decode_sliding(latent=latent, quantize=quantize),
    ):
        assert fast.shape == plain.shape and relative_error(fast, plain) < 1e-5


def test_codebook(autoencoder, relative_error):
    z = torch.randn(2, 8, 3, 4, 2)
    plain = autoencoder.codebook(z)
    meddiff.accelerate(autoencoder)
    fast = autoencoder.codebook(z)
    assert fast.keys() == plain.keys()
    assert torch.equal(fast["encodings"], plain["encodings"])
    for key, tensor in plain.items():
        assert fast[key].shape == tensor.shape and fast[key].dtype == tensor.dtype
        assert relative_error(fast[key], tensor) < 1e-5, key


@pytest.mark.parametrize("size", [(8, 8, 8), (8, 16, 8)])
def test_denoiser(denoiser, size, relative_error):
    x, time, y = torch.randn(2, 8, *size), torch.tensor([3, 900]), torch.tensor([0, 6])
    res = torch.tensor([size]) / 64 * torch.tensor([[1.0], [2.0]])
    plain = denoiser(x, time, y=y, res=res)
    report = meddiff.accelerate(denoiser)
    assert [(row.path, row.by) for row in report.replaced] == [("", "meddiff's BiFlowNet")]
    for fast in (denoiser(x, time, y=y, res=res), denoiser(x, time, y, res)):
        assert fast.shape == plain.shape and relative_error(fast, plain) < 1e-5


def test_a_denoiser_trains_as_before(denoiser, relative_error):
    denoiser.train()
    x, time, y = torch.randn(1, 8, 8, 8, 8), torch.tensor([3]), torch.tensor([2])
    gradients = []
    with torch.enable_grad():
        for _ in range(2):
            denoiser.zero_grad()
            denoiser(x, time, y=y, res=torch.full((1, 3), 0.125)).square().mean().backward()
            gradients.append(torch.cat([p.grad.flatten() for p in denoiser.parameters() if p.requires_grad]))
            meddiff.accelerate(denoiser)
    assert relative_error(gradients[1], gradients[0]) < 1e-4


def test_an_autoencoder_in_training_mode(autoencoder):
    report = meddiff.accelerate(autoencoder.train())
    assert [row.path for row in report.replaced] == ["encoder"]
    assert {row.path: row.method for row in report.left} == {
        "decoder": "forward",
        "codebook": "forward",
        "": "decode_sliding",
    }
    assert all("training mode" in row.note for row in report.left)
    meddiff.accelerate(autoencoder.eval())
    z = torch.randn(1, 8, 2, 2, 2)
    with torch.enable_grad(), pytest.raises(RuntimeError, match="input that requires a gradient"):
        autoencoder.decoder(z.requires_grad_())
    with pytest.raises(RuntimeError, match="Codebook is in training mode"):
        autoencoder.train().codebook(z)


def test_bfloat16_and_new_weights_after_accelerating(autoencoder, published, relative_error):
    """What becomes of the module's weights becomes of those that run, whatever they were replaced by."""
    other = published.Autoencoder(autoencoder.config).eval()
    indices = torch.randint(256, (1, 2, 2, 2))
    meddiff.accelerate(autoencoder)
    autoencoder.load_state_dict(other.state_dict(), assign=True)
    assert relative_error(autoencoder.decode(indices), other.decode(indices)) < 1e-5
    wanted = other.decode(indices)
    autoencoder.bfloat16()
    fast = autoencoder.decode(indices)
    assert fast.dtype == torch.bfloat16
    error = relative_error(other.bfloat16().decode(indices), wanted)
    assert relative_error(fast, wanted) < 1.5 * error


CHANGES = {
    "padding should be": lambda m: setattr(m.encoder.conv_first, "padding", (0, 0, 0)),
    "eps should be": lambda m: setattr(m.decoder.mid_block.res1.norm1, "eps", 1e-3),
    "it has extra": lambda m: setattr(m.encoder, "extra", nn.Linear(2, 2)),
    "has no conv_blocks.0.res1.norm2": lambda m: delattr(m.decoder.conv_blocks[0].res1, "norm2"),
    "its decoder and what would replace it differ by": lambda m: m.decoder.final_block.__setitem__(1, nn.ReLU()),
    "mid_block has hooks": lambda m: m.encoder.mid_block.register_forward_hook(lambda *_: None),
    "return a dictionary with commitment_loss": lambda m: setattr(m, "codebook", _Renamed(m.codebook).eval()),
}


class _Renamed(nn.Module):
    def __init__(self, codebook: nn.Module) -> None:
        super().__init__()
        for name, buffer in codebook.named_buffers():
            self.register_buffer(name, buffer)

    def forward(self, z: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"quantized": z}


@pytest.mark.parametrize("reason", CHANGES)
def test_what_is_not_quite_the_published_network_is_left(autoencoder, reason):
    CHANGES[reason](autoencoder)
    report = meddiff.accelerate(autoencoder)
    assert not report.replaced and reason in report.left[0].note, str(report)
    assert "forward" not in autoencoder.encoder.__dict__


def test_other_heads_are_found_by_the_probe(published):
    model = published.BiFlowNet(PRESETS["tiny"].denoiser).eval()
    model.IntraPatchFlow_mid[0].heads = 4
    assert "differ by" in meddiff.accelerate(model).left[0].note


def test_autocast_is_no_worse_than_its_own(autoencoder, denoiser, relative_error):
    indices, patch = torch.randint(256, (1, 2, 2, 2)), torch.rand(1, 1, 16, 16, 16)
    x, time, y, res = torch.randn(1, 8, 8, 8, 8), torch.tensor([3]), torch.tensor([2]), torch.full((1, 3), 0.125)

    def run() -> list[torch.Tensor]:
        return [autoencoder.decode(indices), autoencoder.encoder(patch), denoiser(x, time, y=y, res=res)]

    exact = run()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        plain = run()
        reports = [meddiff.accelerate(autoencoder), meddiff.accelerate(denoiser)]
        fast = run()
    assert [len(report.replaced) for report in reports] == [4, 1], "\n".join(map(str, reports))
    for got, rounded, wanted in zip(fast, plain, exact):
        assert relative_error(got, wanted) < 1.5 * relative_error(rounded, wanted)
