from __future__ import annotations

import torch

import meddiff.progress
from meddiff.config import PRESETS
from meddiff.models import PatchVolumeAutoencoder
from meddiff.progress import convolution_progress, progress


def test_quiet_when_not_a_terminal(capfd):
    assert list(progress("walking")(range(3))) == [0, 1, 2]
    assert capfd.readouterr() == ("", "")


def test_the_bar_of_a_decoder_ends_full(monkeypatch):
    bars = []

    def record(*arguments, **options):
        bars.append(meddiff.progress.tqdm(*arguments, **options | {"disable": False, "file": open("/dev/null", "w")}))
        return bars[-1]

    monkeypatch.setattr(meddiff.progress, "_bar", record)
    for preset in ("8x", "4x"):
        with torch.device("meta"):
            decoder = PatchVolumeAutoencoder(PRESETS[preset].autoencoder).decoder
            with convolution_progress(decoder, (2, 3, 4, 5), "decoding"):
                decoder(torch.empty(2, 8, 3, 4, 5))
        assert bars[-1].n == bars[-1].total > 1e9
    assert not any(layer._forward_hooks for layer in decoder.modules())
