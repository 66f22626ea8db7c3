"""Both stages at tiny size: what learns, what stays, what a run that was killed gives."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

from meddiff.checkpoint import load_component, save_component
from meddiff.models import PatchVolumeAutoencoder
from meddiff.models.autoencoder import ResBlock
from meddiff.training.autoencoder import equalize_latents, initialise, spread_codes, train_autoencoder
from meddiff.training.options import AutoencoderTraining


@pytest.fixture
def options(volumes, tmp_path, tiny_autoencoder_config) -> AutoencoderTraining:
    return AutoencoderTraining(
        out=str(tmp_path / "run"), steps=6, data=str(volumes), model=tiny_autoencoder_config, save_every=2, log_every=1
    )


def statistics(out: str) -> list[dict]:
    return [json.loads(line) for line in (Path(out) / "stats.jsonl").read_text().splitlines()]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_component(folder, "autoencoder").state_dict()


def test_stage_1_learns(options):
    options = replace(options, steps=40, learning_rate=2e-3, save_every=40)
    trained = train_autoencoder(options)
    losses = [line["l1"] for line in statistics(options.out)]
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])
    assert load_component(trained, "autoencoder").codebook.initialised
    assert [path.name for path in (Path(options.out) / "checkpoints").iterdir()] == ["step-00000040"]


def test_a_killed_run_goes_on_with_the_same_losses(options, tmp_path, killed_at):
    options = replace(options, discriminator_start=3)
    whole = weights(train_autoencoder(options))
    interrupted = replace(options, out=str(tmp_path / "interrupted"))
    killed_at(4, train_autoencoder, interrupted)
    assert [line["step"] for line in statistics(interrupted.out)] == [0, 1, 2, 3, 4]
    half = Path(interrupted.out) / "checkpoints" / ".step-00000006"  # as if the next checkpoint had been half written
    half.mkdir()
    again = weights(train_autoencoder(interrupted))
    assert statistics(interrupted.out) == statistics(options.out)
    assert all(torch.equal(whole[key], again[key]) for key in whole)
    assert not half.exists()
    kept = sorted(path.name for path in (Path(interrupted.out) / "checkpoints").iterdir())
    assert kept == ["step-00000004", "step-00000006"]


def test_a_run_that_stops_goes_on_another_time(options, tmp_path):
    whole = weights(train_autoencoder(options))
    parts = replace(options, out=str(tmp_path / "parts"))
    AcceleratorState._reset_state(True)
    assert train_autoencoder(replace(parts, stop=3)) == Path(parts.out)
    assert [line["step"] for line in statistics(parts.out)] == [0, 1, 2]
    assert not (Path(parts.out) / "autoencoder").exists()
    AcceleratorState._reset_state(True)
    again = weights(train_autoencoder(parts))
    assert all(torch.equal(whole[key], again[key]) for key in whole)
    with pytest.raises(ValueError, match="stop must be at least 1"):
        replace(options, stop=0)


def test_quantisation_starts_late(options):
    options = replace(options, quantize_start=3, steps=5)
    trained = load_component(train_autoencoder(options), "autoencoder")
    assert ["commitment" in line for line in statistics(options.out)] == [False, False, False, True, True]
    assert trained.codebook.initialised


@pytest.fixture
def autoencoder(tiny_autoencoder_config) -> PatchVolumeAutoencoder:
    torch.manual_seed(0)
    return PatchVolumeAutoencoder(tiny_autoencoder_config)


def test_a_new_autoencoder_begins_almost_linear(autoencoder):
    initialise(autoencoder)
    for block in autoencoder.modules():
        if isinstance(block, ResBlock):
            x = torch.randn(2, block.norm1.num_channels, 4, 4, 4)
            assert torch.equal(block(x), block.resConv(x))
    for conv in (autoencoder.encoder.conv_blocks[0].down, autoencoder.decoder.conv_blocks[0].up.conv_trans):
        inner = conv(torch.randn(4, conv.in_channels, 12, 12, 12))[..., 2:-2, 2:-2, 2:-2]
        assert inner.var().item() == pytest.approx(1, rel=0.25)


def test_equal_distances_of_latents_change_the_reconstruction_equally(autoencoder):
    channels = autoencoder.config.embedding_dim
    features = torch.randn(4, channels, 4, 4, 4) * torch.logspace(-2, 1, channels).view(-1, 1, 1, 1) + 3

    def latent_and_volume() -> tuple[torch.Tensor, torch.Tensor]:
        z = autoencoder.pre_vq_conv(features)
        return z, autoencoder.decoder(autoencoder.post_vq_conv(z))

    def spread() -> float:
        """Largest over smallest mean square change of the volume, by directions of the latent."""
        z, y = (t.detach() for t in latent_and_volume())
        columns = []
        for c in range(channels):
            step = torch.zeros_like(z)
            step[:, c, 1, 2, 1] = 1e-3
            columns.append((autoencoder.decoder(autoencoder.post_vq_conv(z + step)).detach() - y).flatten() / 1e-3)
        changes = torch.stack(columns) @ torch.stack(columns).T
        values = torch.linalg.eigvalsh(changes)
        return (values[-1] / values[0]).item()

    _, before = latent_and_volume()
    uneven = spread()
    equalize_latents(autoencoder, features)
    z, after = latent_and_volume()
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(z.mean((0, 2, 3, 4)), torch.zeros(channels), rtol=0, atol=1e-3)
    assert z.var((0, 2, 3, 4)).mean().item() == pytest.approx(1, rel=0.02)
    assert spread() < uneven / 5


def test_codes_spread_over_the_range_and_reconstructions_stay(autoencoder):
    book, channels = autoencoder.codebook, autoencoder.config.embedding_dim
    sizes = torch.logspace(-1, 1, channels)
    codes = torch.randn_like(book.embeddings) * sizes + 5 * torch.randn(channels)
    book.embeddings.copy_(codes), book.N.uniform_(1, 5), book.z_avg.copy_(codes * book.N[:, None])
    turned = copy.deepcopy(autoencoder)
    spread_codes(turned)
    new, use = turned.codebook.embeddings, book.N / book.N.sum()
    torch.testing.assert_close(torch.pdist(new), torch.pdist(codes), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(turned.codebook.z_avg, new * book.N[:, None], rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(new.amax(0), -new.amin(0), rtol=1e-4, atol=1e-4)
    variance = use @ (new - use @ new).square()
    torch.testing.assert_close(variance, variance.mean().expand(channels), rtol=1e-3, atol=0)

    def width(codes: torch.Tensor) -> torch.Tensor:
        return (codes - codes.mean(0)).square().mean().sqrt() / (codes.max() - codes.min())

    assert width(new) > 1.5 * width(codes)
    x = torch.rand(1, 1, 32, 16, 16) * 2 - 1
    torch.testing.assert_close(turned.encode_to_codes(x)[1], autoencoder.encode_to_codes(x)[1], rtol=0, atol=0)
    torch.testing.assert_close(turned(x), autoencoder(x), rtol=1e-3, atol=1e-4)


def test_stage_1_can_spread_its_codes(options, tmp_path):
    plain = load_component(train_autoencoder(replace(options, steps=2)), "autoencoder")
    AcceleratorState._reset_state(True)
    run = replace(options, steps=2, out=str(tmp_path / "spread"), spread_codes=True)
    spread = load_component(train_autoencoder(run), "autoencoder")
    spread_codes(plain)
    torch.testing.assert_close(spread.codebook.embeddings, plain.codebook.embeddings)
    AcceleratorState._reset_state(True)
    six = PatchVolumeAutoencoder(replace(options.model, embedding_dim=6))
    save_component(tmp_path / "six", "autoencoder", six)
    with pytest.raises(ValueError, match="spread_codes wants .* not 6"):
        train_autoencoder(replace(run, out=str(tmp_path / "of_six"), initial=str(tmp_path / "six")))
    assert not (tmp_path / "of_six" / "stats.jsonl").exists()  # before the training
    with pytest.raises(ValueError, match="spread_codes is for stage 1"):
        replace(run, stage=2, initial=str(tmp_path / "six"))


def test_stage_2_trains_decoder_and_post_vq_conv_alone(options, tmp_path):
    first = train_autoencoder(options)
    before = weights(first)
    AcceleratorState._reset_state(True)
    second = replace(
        options, out=str(tmp_path / "stage2"), stage=2, initial=str(first), volume_size=(32, 16, 32), steps=3
    )
    after = weights(train_autoencoder(second))
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert {key.split(".")[0] for key in changed} == {"decoder", "post_vq_conv"}
    assert all(key in changed for key in before if key.startswith("decoder."))


def test_stage_2_begins_with_the_discriminator_of_stage_1(options, tmp_path):
    first = train_autoencoder(replace(options, discriminator_start=0, steps=2))
    file = first.with_name("discriminator.safetensors")
    before, end = (
        load_file(file)["model0.0.weight"],
        replace(options, stage=2, initial=str(first), volume_size=(16, 16, 16), steps=2),
    )
    for start, same in ((1, True), (0, False)):  # from step `start` every second step is the discriminator's
        AcceleratorState._reset_state(True)
        run = replace(end, out=str(tmp_path / f"{start}"), discriminator_start=start, discriminator=str(file))
        after = load_file(train_autoencoder(run).with_name("discriminator.safetensors"))
        assert torch.equal(after["model0.0.weight"], before) == same
    with pytest.raises(ValueError, match="discriminator needs discriminator_start"):
        replace(options, discriminator=str(file))


def test_stage_2_without_a_trained_codebook_is_refused(options, tmp_path, tiny_autoencoder_config):
    with pytest.raises(ValueError, match="stage 2 needs initial"):
        replace(options, stage=2)
    with pytest.raises(ValueError, match="final_learning_rate must lie in"):
        replace(options, final_learning_rate=1.0)
    save_component(tmp_path / "fresh", "autoencoder", PatchVolumeAutoencoder(tiny_autoencoder_config))
    with pytest.raises(ValueError, match="codebook was never trained"):
        train_autoencoder(replace(options, stage=2, initial=str(tmp_path / "fresh"), volume_size=(16, 16, 16)))


def test_stage_2_takes_volumes_of_several_sizes(options, volumes, tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    for i in range(4):
        image = nib.load(volumes / f"{i}.nii.gz")
        nib.save(image.slicer[:, :, :16] if i % 2 else image, data / f"{i}.nii.gz")
    first = train_autoencoder(replace(options, steps=1))
    AcceleratorState._reset_state(True)
    second = replace(options, out=str(tmp_path / "stage2"), data=str(data), stage=2, initial=str(first), steps=4)
    train_autoencoder(second)
    assert len(statistics(second.out)) == 4


def test_the_learning_rate_falls_along_a_cosine(options, monkeypatch):
    rates = []
    adam = torch.optim.Adam.step

    def spy(self, *args, **kwargs):
        rates.append(self.param_groups[0]["lr"])
        return adam(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.Adam, "step", spy)
    options = replace(options, steps=4, learning_rate=1e-3, final_learning_rate=2e-4)
    train_autoencoder(options)
    assert rates == pytest.approx([1e-3, 2e-4 + 8e-4 * (2 + 2**0.5) / 4, 6e-4, 2e-4 + 8e-4 * (2 - 2**0.5) / 4])


def test_divergence_is_an_error_that_names_the_step(options):
    with pytest.raises(FloatingPointError, match="not finite at step"):
        train_autoencoder(replace(options, learning_rate=1e30))


def test_previews_are_written(options):
    train_autoencoder(replace(options, steps=2, preview_every=2))
    assert [path.name for path in (Path(options.out) / "previews").iterdir()] == ["step-00000002.png"]


def test_two_processes_sum_their_code_usage(options, tmp_path, two_processes):
    arguments = ["--data", options.data, "--steps", "3", "--save_every", "3", "--log_every", "1", "--batch_size", "1"]
    for name in ("n_hiddens", "num_groups", "n_codes", "patch_size"):
        arguments += [f"--model.{name}", str(getattr(options.model, name))]
    two_processes("train", "autoencoder", "--out", str(tmp_path / "two"), *arguments)
    steps = statistics(str(tmp_path / "two"))
    assert [line["step"] for line in steps] == [0, 1, 2]
    trained = load_component(tmp_path / "two" / "autoencoder", "autoencoder")
    # counts of both processes are in the averages: 2 patches of 2³ latents per step
    total = trained.codebook.N.sum().item()
    wanted = float(options.model.n_codes)
    for _ in range(3):
        wanted = 0.99 * wanted + 0.01 * 2 * 8
    assert total == pytest.approx(wanted, rel=1e-5)
