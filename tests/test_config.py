from __future__ import annotations

import json

import pytest

from meddiff.config import (
    ANATOMIES,
    PRESETS,
    AutoencoderConfig,
    ControlNetConfig,
    DenoiserConfig,
    FastMRIConfig,
    MasksConfig,
    ModelConfig,
    ScheduleConfig,
    SparseViewCTConfig,
    condition_channels,
    task_from_dict,
    task_to_dict,
)


@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_configurations_survive_json(preset):
    for part in (PRESETS[preset].autoencoder, PRESETS[preset].denoiser, PRESETS[preset].schedule):
        assert type(part).from_dict(json.loads(json.dumps(part.to_dict()))) == part


def test_a_schedule_survives_json_with_and_without_how_it_is_sampled():
    schedule = ScheduleConfig(timesteps=40, steps=9, eta=1, timestep_spacing="leading", t_end=10)
    assert ScheduleConfig.from_dict(json.loads(json.dumps(schedule.to_dict()))) == schedule
    assert ScheduleConfig.from_dict({"timesteps": 1000, "s": 0.008}) == ScheduleConfig()


def test_widths():
    assert PRESETS["8x"].autoencoder.widths == (48, 96, 192, 192)
    assert PRESETS["4x"].autoencoder.widths == (48, 96, 96)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: AutoencoderConfig(downsample=6), "power of two"),
        (lambda: AutoencoderConfig(patch_size=20), "multiple of downsample"),
        (lambda: AutoencoderConfig(n_hiddens=50), "multiple of num_groups"),
        (lambda: AutoencoderConfig(n_codes=0), "n_codes must be a positive integer"),
        (lambda: AutoencoderConfig(n_codes=2.5), "n_codes must be a positive integer"),
        (lambda: AutoencoderConfig.from_dict({"width": 48}), r"unknown fields \['width'\]"),
        (lambda: AutoencoderConfig.from_dict([48]), "expected a JSON object"),
        (lambda: DenoiserConfig(dim=80), "multiple of 6"),
        (lambda: DenoiserConfig(dim_mults=(1, 2, 4)), "begin with 1, 1"),
        (lambda: DenoiserConfig(dim_mults=(1, 1)), "three or more"),
        (lambda: DenoiserConfig(dim_mults=(1, 1, 2, 4, 8, 16)), "total stride"),
        (lambda: DenoiserConfig(token_patch=3), "multiple of token_patch"),
        (lambda: DenoiserConfig(attention_levels=6), "exceeds"),
        (lambda: ControlNetConfig(encoder="both"), "'latent' or 'convolutional'"),
        (lambda: ControlNetConfig(channels=0), "channels must be a positive integer"),
        (lambda: ControlNetConfig(widths=()), "widths must be positive integers"),
        (lambda: ControlNetConfig(copied=()), "copied must be one or more of"),
        (lambda: ControlNetConfig(enters=("tokens", "tokens")), "enters must be one or more of"),
        (lambda: ControlNetConfig(copied=("down_path",)), "'intra_patch' must be copied"),
        (lambda: ControlNetConfig(copied=("middle",), enters=("latent",)), "the middle needs"),
        (lambda: SparseViewCTConfig(0), "views must be a positive integer"),
        (lambda: task_from_dict({"name": "magic"}), "name must be one of"),
        (lambda: ScheduleConfig(s=0), r"\(0, 1\)"),
        (lambda: ScheduleConfig(solver="euler"), "solver must be one of ddim"),
        (lambda: ScheduleConfig(steps=0), "steps must be a positive integer"),
        (lambda: ScheduleConfig(eta=2), r"eta must lie in \[0, 1\]"),
        (lambda: ScheduleConfig(solver="dpmsolver++", eta=0.5), "belongs to ddim, got 0.5 with dpmsolver"),
        (lambda: ScheduleConfig(eta=True), "eta must lie"),
        (lambda: ScheduleConfig(solver="ddpm", steps=50), r"steps of ddpm must lie in \[1000, 1000\], got 50"),
        (lambda: ScheduleConfig(timesteps=20, steps=21), r"steps of ddim must lie in \[1, 20\]"),
        (lambda: ScheduleConfig(solver="dpmsolver++", steps=1000), r"\[1, 999\]"),
        (lambda: ScheduleConfig(timestep_spacing="karras"), "linspace, leading, trailing"),
        (lambda: ScheduleConfig(t_end=999), r"t_end must be an integer in \[0, 998\]"),
        (lambda: ScheduleConfig(t_end=0.5), "t_end must be an integer"),
        (lambda: ScheduleConfig(steps=700, t_end=500), r"steps of ddim must lie in \[1, 500\]"),
        (lambda: ModelConfig(denoiser=DenoiserConfig(channels=4)), "must be equal"),
    ],
)
def test_impossible_configurations_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_released_anatomies():
    assert [anatomy.class_index for anatomy in ANATOMIES.values()] == list(range(7))
    chest = ANATOMIES["ct_chest_abdomen"]
    assert chest.sizes() == ((256, 256, 256), (512, 512, 512))
    assert chest.spacing((512, 512, 512)) == (0.7, 0.7, 1)
    assert chest.spacing((128, 128, 128)) == chest.spacing((256, 256, 256)) == (1.25, 1.25, 1.25)
    # tensor D, H, W of 8, 40, 40 are file axes X, Y, Z of 40, 40, 8
    assert ANATOMIES["mr_knee"].sizes() == ((320, 320, 64),)
    assert ANATOMIES["mr_abdomen"].sizes() == ((256, 256, 128),)


@pytest.mark.parametrize("encoder", ["latent", "convolutional"])
@pytest.mark.parametrize("task", [MasksConfig(means=(0.0, 0.1, 0.2, 0.3)), SparseViewCTConfig(9), FastMRIConfig(8)])
def test_tasks_and_what_they_steer_with_survive_json(task, encoder):
    assert task_from_dict(json.loads(json.dumps(task_to_dict(task)))) == task
    channels = condition_channels(task, encoder, DenoiserConfig())
    config = ControlNetConfig(DenoiserConfig(dim=48), encoder, channels, (4, 8), ("down_path",), ("latent",))
    assert ControlNetConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config and config.downsample == 4
    assert channels == (8 if encoder == "latent" else 4 if isinstance(task, MasksConfig) else 1)
