from __future__ import annotations

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

import meddiff
from meddiff.config import PRESETS
from meddiff.models import BiFlowNet
from meddiff.pipelines import plan as plan_module
from meddiff.pipelines.plan import plan_generation, step_bytes


@pytest.fixture(scope="module")
def model():
    return meddiff.untrained("tiny", device="cpu")


@pytest.mark.parametrize("size", [(32, 32, 32), (16, 48, 40)])
def test_a_step_takes_what_was_planned(model, size):
    """Against every allocation of a step, in what this machine multiplies natively, as steps are computed."""
    x, index = torch.zeros(1, 8, *size).contiguous(memory_format=torch.channels_last_3d), torch.zeros(1).long()
    with torch.inference_mode(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        model.denoiser(x, index, index, torch.zeros(3))
    live = peak = 0
    for event in sorted(recorded.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    assert peak > 8 * model.denoiser.config.dim * x[0, 0].numel()
    assert peak <= step_bytes(model.denoiser, size) <= 1.5 * peak


def test_the_large_steps_are_known_beforehand():
    """In gigabytes: what the released models take at 512³ in bfloat16."""
    for preset, size, low, high in (("8x", 64, 0.5, 0.8), ("4x", 128, 4.0, 5.5)):
        with torch.device("meta"):
            denoiser = BiFlowNet(PRESETS[preset].denoiser).bfloat16()
        assert low < step_bytes(denoiser, (size,) * 3) / 2**30 < high


def test_on_a_cpu_one_at_a_time(model):
    plan = plan_generation(model, (64, 128, 192), 10)
    assert (plan.batch, plan.latent, plan.seconds) == (1, (24, 8, 16), None)
    assert plan_generation(model, (64, 64, 64), 10, batch=5).batch == 5
    assert "latent 24×8×16 takes" in str(plan) and "1 at a time" in str(plan)


@pytest.mark.parametrize("free, batch", [(0.5, 1), (1.0, 1), (4.0, 2), (9.0, 5), (1000.0, 8)])
def test_a_gpu_is_filled_to_a_share_of_its_memory(model, monkeypatch, free, batch):
    """A device that says it is one, and has so many times the memory of a step."""
    size = (64, 64, 64)
    need = step_bytes(model.denoiser, model.latent_size(size))
    monkeypatch.setattr(type(model), "device", torch.device("cuda"))
    monkeypatch.setattr(plan_module, "available_bytes", lambda device: int(free * need))
    plan = plan_generation(model, size, 10)
    assert plan.batch == batch and plan.seconds is None
    if free < 1:
        with pytest.raises(MemoryError, match="latent 8×8×8 needs about .* MiB are free"):
            plan.require_possible()
    else:
        plan.require_possible()


def test_hours_are_refused_with_the_estimate(model, monkeypatch):
    monkeypatch.setattr(plan_module, "_QUICK", 0)
    plan = plan_generation(model, (64, 64, 64), 10)
    plan.require_patience()
    assert 0 < plan.seconds < 600 and " s a volume" in str(plan)
    more = plan_generation(model, (64, 64, 64), 10_000)
    assert more.seconds > 20 * plan.seconds
    monkeypatch.setattr(plan_module, "_PATIENCE", plan.seconds / 2)
    with pytest.raises(ValueError, match=r"about \d+ s on this CPU; use a GPU.*--force"):
        plan.require_patience()
