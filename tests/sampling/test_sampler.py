from __future__ import annotations

import pytest
import torch

from meddiff.config import PRESETS, ScheduleConfig
from meddiff.kernels.diffusion_step import COEFFICIENTS, diffusion_step
from meddiff.models import BiFlowNet
from meddiff.sampling import NoiseSchedule, sample_latent, solver_timesteps
from meddiff.sampling.solvers import ddim_table, ddpm_table


@pytest.fixture(scope="module")
def denoiser(reference_weights):
    return reference_weights(BiFlowNet(PRESETS["tiny"].denoiser))


@pytest.fixture(scope="module")
def schedule():
    return NoiseSchedule()


Y = torch.tensor([1])


def test_ddim_is_the_reference(denoiser, schedule, reference, relative_error):
    wanted = reference("ddim10_tiny_patch1")
    latent = sample_latent(denoiser, schedule, wanted["z"], wanted["y"], steps=10)
    assert relative_error(latent, wanted["latent"]) < 1e-5


def test_timesteps(schedule):
    assert solver_timesteps(schedule, "ddim", 10) == [999, 888, 777, 666, 555, 444, 333, 222, 111, 0]
    assert solver_timesteps(schedule, "ddim", 1) == [0]
    assert solver_timesteps(schedule, "ddim", 1000) == list(range(999, -1, -1))
    for steps in (2, 7, 50, 999):
        linspace = torch.linspace(0, 999, steps, dtype=torch.float64).long().flip(0).tolist()
        wanted = [i * 999 // (steps - 1) for i in range(steps)][::-1]
        assert solver_timesteps(schedule, "ddim", steps) == wanted
        assert max(abs(a - b) for a, b in zip(wanted, linspace, strict=True)) <= 1  # rounding of linspace
    assert len(solver_timesteps(schedule, "ddim")) == 50
    assert solver_timesteps(schedule, "ddpm") == list(range(999, -1, -1))


def test_ddim_with_eta_has_the_moments_of_its_equation(schedule):
    t, eta = torch.tensor([600]), 0.7
    x0 = torch.full((1, 1, 1, 1, 1), 0.3)
    estimate = torch.full_like(x0, -0.5)
    x = schedule.add_noise(x0, t, estimate).repeat(1, 1, 64, 64, 64)
    fresh = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    diffusion_step(x, estimate.expand(x.shape), ddim_table(schedule, [600, 400], eta)[0].float(), fresh)
    a, b = schedule.signal(torch.tensor([600, 400]))
    sigma = eta * ((1 - b) / (1 - a)).sqrt() * (1 - a / b).sqrt()
    assert x.double().mean().item() == pytest.approx(
        (b.sqrt() * 0.3 - (1 - b - sigma**2).sqrt() * 0.5).item(), abs=5e-3
    )
    assert x.double().std().item() == pytest.approx(sigma.item(), rel=0.01)


def test_ddpm_is_the_posterior(schedule, denoiser, reference, relative_error):
    """Without noise the reference's mean; the noise has its variance, and the last step none."""
    z, wanted = reference("ddim10_tiny_patch1")["z"], reference("ddpm_posterior_tiny_patch1")
    table = ddpm_table(schedule, solver_timesteps(schedule, "ddpm"), eta=0.0).flip(0)
    for step in (0, 1, 500, 998, 999):
        x = z.clone()
        estimate = denoiser(z, torch.tensor([step]), torch.tensor([1]), torch.tensor([8, 8, 16]) / 64)
        diffusion_step(x, estimate, table[step].float())
        assert relative_error(x, wanted[f"mean_t{step}"]) < 1e-5
    noise_scale = table[:, COEFFICIENTS.index("c_n")]
    torch.testing.assert_close(noise_scale[1:], schedule.posterior_variance[1:].double().sqrt(), rtol=1e-6, atol=0)
    assert noise_scale[0] == 0


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_the_seed_decides_whatever_else_runs(denoiser, schedule, eta):
    def run(seed, batch=1):
        return sample_latent(denoiser, schedule, (8, 8, 16), Y.expand(batch), steps=3, eta=eta, seed=seed)

    torch.manual_seed(1)
    first = run(7)
    torch.manual_seed(2)
    torch.randn(100)
    assert torch.equal(run(7), first)
    assert not torch.allclose(run(8), first, atol=0.1)
    both = run(6, batch=2)
    torch.testing.assert_close(both[1:], first, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(run([7, 3], batch=2)[:1], first, rtol=1e-3, atol=1e-3)
    state = torch.get_rng_state()
    run(7)
    assert torch.equal(torch.get_rng_state(), state)


def test_ddpm_runs_all_steps(schedule):
    class Counting(torch.nn.Module):
        config = PRESETS["tiny"].denoiser
        device = torch.device("cpu")
        seen = []

        def forward(self, x, t, y, resolution):
            self.seen.append(int(t))
            return x * schedule.sqrt_one_minus_alphas_cumprod[t]

    model = Counting()
    latent = sample_latent(model, schedule, (8, 8, 8), Y, solver="ddpm", seed=3)
    assert model.seen == list(range(999, -1, -1))
    assert latent.abs().max() <= 1.01 and latent.std() > 0.01


@pytest.mark.parametrize("solver", ["ddim", "dpmsolver++"])
def test_a_constant_latent_is_found_by_every_solver(schedule, solver):
    """An estimator that knows x0 = 0.3 leads there, for ddim but for the noise of t = 0; the start stays as it was."""

    class Knowing(torch.nn.Module):
        config = PRESETS["tiny"].denoiser
        device = torch.device("cpu")

        def forward(self, x, t, y, resolution):
            signal = schedule.signal(t)[:, None, None, None, None]
            return ((x - 0.3 * signal.sqrt()) / (1 - signal).sqrt()).bfloat16()

    noise = torch.randn(1, 8, 8, 8, 8, generator=torch.Generator().manual_seed(0))
    given = noise.clone()
    latent = sample_latent(Knowing(), schedule, noise, Y, solver=solver)
    assert torch.equal(noise, given) and latent.is_contiguous() and latent.dtype == torch.float32
    remaining = {"ddim": (1 - schedule.signal(torch.tensor(0))).sqrt().item(), "dpmsolver++": 0.0}[solver]
    assert (latent - 0.3).std().item() == pytest.approx(remaining, abs=3e-3)
    assert (latent - 0.3).mean().abs() < 1e-3


def test_dpmsolver_is_not_ddim(denoiser, schedule, reference):
    """Both clip; with this untrained network they end elsewhere, and within the clip."""
    z = reference("ddim10_tiny_patch1")["z"]
    latent = sample_latent(denoiser, schedule, z, Y, solver="dpmsolver++", steps=3)
    assert latent.isfinite().all() and latent.abs().max() <= 1
    assert (latent - sample_latent(denoiser, schedule, z, Y, steps=3)).abs().max() > 0.1


@pytest.mark.parametrize("solver", ["ddim", "ddpm", "dpmsolver++"])
def test_a_corrected_x0_is_what_every_solver_goes_on_with(solver):
    """An estimator that believes in 0.3, corrected to 0.8: all end there, and corrections see the former."""
    schedule = NoiseSchedule(ScheduleConfig(timesteps=40))
    seen = []

    class Knowing(torch.nn.Module):
        config = PRESETS["tiny"].denoiser
        device = torch.device("cpu")

        def forward(self, x, t, y, resolution):
            signal = schedule.signal(t)[:, None, None, None, None]
            return ((x - 0.3 * signal.sqrt()) / (1 - signal).sqrt()).float()

    def correct(x0, step):
        seen.append((step, (x0 - 0.3).abs().max().item()))
        return x0 + 0.5

    model = Knowing()
    latent = sample_latent(model, schedule, (8, 8, 8), Y, solver=solver, seed=2, correct_x0=correct)
    assert [step for step, _ in seen] == solver_timesteps(schedule, solver)
    assert max(error for _, error in seen) < 1e-3
    # ddim stays at t = 0
    remaining = (1 - schedule.signal(torch.tensor(0))).sqrt().item() if solver == "ddim" else 0.0
    assert (latent - 0.8).std().item() == pytest.approx(remaining, abs=3e-3)
    assert (latent - 0.8).mean().abs() < 3e-3


@pytest.mark.parametrize("solver", ["ddim", "dpmsolver++"])
def test_a_correction_that_changes_nothing_is_none(denoiser, schedule, solver):
    def run(**options):
        return sample_latent(denoiser, schedule, (8, 8, 8), Y, solver=solver, steps=4, seed=2, **options)

    assert torch.equal(run(), run(correct_x0=lambda x0, step: x0.clone()))


def test_resolution_is_the_latent_size_over_64(schedule):
    class Recording(torch.nn.Module):
        config = PRESETS["tiny"].denoiser
        device = torch.device("cpu")

        def forward(self, x, t, y, resolution):
            self.resolution = resolution
            return torch.zeros_like(x)

    model = Recording()
    sample_latent(model, schedule, (8, 16, 24), Y, steps=1)
    assert model.resolution.tolist() == [0.125, 0.25, 0.375]


def test_non_finite_estimates_stop_with_the_step_named(schedule):
    class Diverging(torch.nn.Module):
        config = PRESETS["tiny"].denoiser
        device = torch.device("cpu")

        def forward(self, x, t, y, resolution):
            return x / (t[0] > 500)

    with pytest.raises(FloatingPointError, match=r"step 3 of 5 \(t = 499\)"):
        sample_latent(Diverging(), schedule, (8, 8, 8), Y, steps=5)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"solver": "euler"}, "unknown solver 'euler'"),
        ({"solver": "ddpm", "steps": 10}, "all 1000 steps"),
        ({"steps": 0}, r"\[1, 1000\]"),
        ({"solver": "dpmsolver++", "steps": 0}, r"\[1, 999\]"),
        ({"solver": "dpmsolver++", "steps": 1000}, r"\[1, 999\]"),
        ({"solver": "dpmsolver++", "eta": 0.5}, "eta"),
        ({"steps": 1001}, r"\[1, 1000\]"),
        ({"eta": 2.0}, "eta"),
        ({"eta": 0.5, "solver": "ddpm", "steps": None}, "eta"),
        ({"seed": -1}, "seed"),
        ({"seed": [1, 2]}, "seed"),
        ({"y": torch.tensor([7])}, r"\[0, 7\)"),
        ({"y": torch.tensor([0.0])}, "integer"),
        ({"noise": torch.zeros(2, 8, 8, 8, 8)}, r"noise must be \[1, 8, D, H, W\]"),
        ({"noise": (8, 8, 9)}, "multiples of 8"),
    ],
)
def test_errors_say_what_was_wanted(denoiser, schedule, options, message):
    arguments = {"noise": (8, 8, 8), "y": Y, "steps": 2} | options
    with pytest.raises(ValueError, match=message):
        sample_latent(denoiser, schedule, **arguments)
