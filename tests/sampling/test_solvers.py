"""Every solver against diffusers' scheduler of the same kind, step by step."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler
from torch import Tensor

from meddiff.config import ScheduleConfig
from meddiff.kernels.diffusion_step import COEFFICIENTS, diffusion_step, diffusion_step_ref
from meddiff.sampling import NoiseSchedule, solver_timesteps
from meddiff.sampling.solvers import SOLVERS

SHAPE = (2, 3, 4, 5, 6)

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers with NumPy 2


@pytest.fixture(scope="module")
def schedule() -> NoiseSchedule:
    return NoiseSchedule()


def peer(kind: type, schedule: NoiseSchedule, **options):
    """A scheduler with our β. It multiplies them in float32, so that ᾱ would be off by up to 3e-4: it gets our ᾱ."""
    scheduler = kind(trained_betas=schedule.betas.tolist(), **options)
    scheduler.alphas_cumprod = schedule.signal(torch.arange(schedule.timesteps))
    return scheduler


def estimate_of(schedule: NoiseSchedule, spread: float) -> Callable[[Tensor, int], Tensor]:
    """The exact noise estimate for x0 ~ N(0.1, spread²)."""

    def estimate(x: Tensor, t: int) -> Tensor:
        signal = schedule.signal(torch.tensor(t)).to(x.dtype)
        noise = (1 - signal).sqrt()
        return noise * (x - 0.1 * signal.sqrt()) / (signal * spread**2 + noise**2)

    return estimate


def trajectory(
    schedule: NoiseSchedule,
    solver: str,
    timesteps: list[int],
    estimate: Callable,
    dtype: torch.dtype,
    eta: float = 0.0,
    order: int = 2,
):
    """Our x after every step: of the operator for float32, of its definition for float64, with diffusers' noise."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)).to(dtype)
    x0_prev = torch.full_like(x, torch.nan) if SOLVERS[solver].order > 1 else None
    for t, row in zip(timesteps, SOLVERS[solver].table(schedule, timesteps, eta, order).to(dtype), strict=True):
        noisy = eta > 0 or (solver == "ddpm" and t > 0)
        fresh = torch.randn(SHAPE, generator=generator, dtype=torch.float64).to(dtype) if noisy else None
        if dtype == torch.float32:
            diffusion_step(x, estimate(x, t), row, fresh, x0_prev)
        else:
            x, x0 = diffusion_step_ref(x, estimate(x, t), row, fresh, x0_prev)
            x0_prev = None if x0_prev is None else x0
        yield x.double()


def peer_trajectory(scheduler, timesteps: list[int], estimate: Callable, **options):
    x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)).double()
    for t in timesteps:
        x = scheduler.step(estimate(x, t), t, x, **options).prev_sample
        yield x


def assert_same(xs, others, atol: float) -> None:
    for i, (x, wanted) in enumerate(zip(xs, others, strict=True)):
        error = (x - wanted).abs().max().item()
        assert error < atol, f"step {i}: {error:.1e}"


def assert_agrees(schedule: NoiseSchedule, solver: str, timesteps: list[int], spread: float, theirs, atol, eta=0.0):
    """In float64 with diffusers; and the float32 operator with that, whose x0 is a difference of numbers of size a."""
    arguments = (schedule, solver, timesteps, estimate_of(schedule, spread))
    assert_same(trajectory(*arguments, torch.float64, eta), theirs, atol)
    table = dict(zip(COEFFICIENTS, SOLVERS[solver].table(schedule, timesteps, eta).unbind(1)))
    rounding = 1.5e-6 * (table["a"] * table["c_0"].abs()).max().item() + 1e-5
    assert_same(trajectory(*arguments, torch.float32, eta), trajectory(*arguments, torch.float64, eta), rounding)


# At a spread of 0.1 nothing is clipped, at 2 much is.


def test_ddpm(schedule):
    spread = 0.5
    timesteps, estimate = solver_timesteps(schedule, "ddpm"), estimate_of(schedule, spread)
    scheduler = peer(DDPMScheduler, schedule, clip_sample=True, variance_type="fixed_small")
    scheduler.set_timesteps(1000)
    assert scheduler.timesteps.tolist() == timesteps
    theirs = peer_trajectory(scheduler, timesteps, estimate, generator=torch.Generator().manual_seed(1))
    assert_agrees(schedule, "ddpm", timesteps, spread, theirs, 1e-9)


@pytest.mark.parametrize("spread", [0.1, 2.0])
@pytest.mark.parametrize("eta", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("steps", [10, 28])
def test_ddim(schedule, steps, eta, spread):
    """At steps whose timesteps are evenly apart, as diffusers goes from t to t - T // steps."""
    timesteps, estimate = solver_timesteps(schedule, "ddim", steps), estimate_of(schedule, spread)
    scheduler = peer(DDIMScheduler, schedule, clip_sample=True, set_alpha_to_one=False)
    scheduler.final_alpha_cumprod = scheduler.alphas_cumprod[0]
    scheduler.num_inference_steps = steps - 1
    assert {a - b for a, b in zip(timesteps, timesteps[1:])} == {1000 // (steps - 1)}
    theirs = peer_trajectory(scheduler, timesteps, estimate, eta=eta, generator=torch.Generator().manual_seed(1))
    assert_agrees(schedule, "ddim", timesteps, spread, theirs, 1e-9, eta)


class ClippingDPMSolver(DPMSolverMultistepScheduler):
    """diffusers' own has no plain clip."""

    def convert_model_output(self, *args, **kwargs) -> Tensor:
        return super().convert_model_output(*args, **kwargs).clamp(-1, 1)


@pytest.mark.parametrize("spread", [0.1, 2.0])
@pytest.mark.parametrize("steps", [1, 2, 3, 14, 20, 37])
def test_dpmsolver(schedule, steps, spread):
    timesteps, estimate = solver_timesteps(schedule, "dpmsolver++", steps), estimate_of(schedule, spread)
    kind = DPMSolverMultistepScheduler if spread < 1 else ClippingDPMSolver
    scheduler = peer(kind, schedule)  # dpmsolver++, order 2, midpoint, linspace, a last sigma of zero: the defaults
    scheduler.set_timesteps(steps)
    assert scheduler.timesteps.tolist() == timesteps
    sigmas = ((1 - scheduler.alphas_cumprod) / scheduler.alphas_cumprod).sqrt()[timesteps]
    torch.testing.assert_close(scheduler.sigmas[:-1], sigmas.float())
    scheduler.sigmas = torch.cat([sigmas, sigmas.new_zeros(1)])  # it keeps them as float32
    # and x, between its steps
    assert_agrees(schedule, "dpmsolver++", timesteps, spread, peer_trajectory(scheduler, timesteps, estimate), 1e-5)


@pytest.mark.parametrize("spacing", ["linspace", "leading", "trailing"])
@pytest.mark.parametrize("order", [1, 2])
def test_dpmsolver_of_other_orders_and_spacings(schedule, order, spacing):
    timesteps, estimate = solver_timesteps(schedule, "dpmsolver++", 15, spacing), estimate_of(schedule, 0.1)
    scheduler = peer(DPMSolverMultistepScheduler, schedule, solver_order=order, timestep_spacing=spacing)
    scheduler.set_timesteps(15)
    assert scheduler.timesteps.tolist() == timesteps
    sigmas = ((1 - scheduler.alphas_cumprod) / scheduler.alphas_cumprod).sqrt()[timesteps]
    scheduler.sigmas = torch.cat([sigmas, sigmas.new_zeros(1)])
    ours = trajectory(schedule, "dpmsolver++", timesteps, estimate, torch.float64, order=order)
    assert_same(ours, peer_trajectory(scheduler, timesteps, estimate), 1e-5)


@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@pytest.mark.parametrize("steps", [10, 25])
def test_ddim_of_other_spacings(schedule, steps, spacing):
    """At steps that divide T, as diffusers goes from t to t - T // steps, and below 0 to the final ᾱ."""
    timesteps, estimate = solver_timesteps(schedule, "ddim", steps, spacing), estimate_of(schedule, 0.5)
    scheduler = peer(DDIMScheduler, schedule, clip_sample=True, set_alpha_to_one=False, timestep_spacing=spacing)
    scheduler.final_alpha_cumprod = scheduler.alphas_cumprod[0]
    scheduler.set_timesteps(steps)
    assert scheduler.timesteps.tolist() == timesteps
    assert_agrees(schedule, "ddim", timesteps, 0.5, peer_trajectory(scheduler, timesteps, estimate), 1e-9)


@pytest.mark.parametrize("spacing", ["linspace", "leading", "trailing"])
def test_timesteps_are_those_of_diffusers(schedule, spacing):
    for solver, kind in {"dpmsolver++": DPMSolverMultistepScheduler, "ddim": DDIMScheduler}.items():
        if (solver, spacing) == ("ddim", "linspace"):
            continue  # theirs are rounded, ours are the released model's
        scheduler = peer(kind, schedule, timestep_spacing=spacing)
        for steps in (*range(1, 40), 50, 100, 333, 500, 998, 999):
            scheduler.set_timesteps(steps)
            ours = solver_timesteps(schedule, solver, steps, spacing)
            # of some numbers of steps they have one timestep more, -1
            assert ours == scheduler.timesteps.tolist()[:steps]
            assert len(ours) == steps == len(set(ours)) and 0 <= min(ours) <= max(ours) <= 999
    assert len(solver_timesteps(schedule, "dpmsolver++")) == 20


def test_dpmsolver_converges_with_second_order(schedule):
    """To the solution of the probability flow, along which (x - 0.1 √ᾱ) / √(0.2² ᾱ + 1 - ᾱ) does not change."""
    start = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)).double()
    signal = schedule.signal(torch.tensor(999))
    wanted = 0.1 + 0.2 * (start - 0.1 * signal.sqrt()) / (signal * 0.2**2 + 1 - signal).sqrt()
    errors = []
    for steps in (20, 40, 80):
        timesteps = solver_timesteps(schedule, "dpmsolver++", steps)
        *_, x = trajectory(schedule, "dpmsolver++", timesteps, estimate_of(schedule, 0.2), torch.float64)
        errors.append((x - wanted).abs().mean().item())
    assert errors[2] < 1e-3 and errors[0] > 3.5 * errors[1] > 3.5**2 * errors[2]


def test_short_schedules():
    short = NoiseSchedule(ScheduleConfig(timesteps=10))
    assert [len(solver_timesteps(short, solver)) for solver in ("ddim", "ddpm", "dpmsolver++")] == [10, 10, 9]
