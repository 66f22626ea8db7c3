from __future__ import annotations

import weakref

import pytest
import torch
from torch import Tensor

from meddiff.config import PRESETS, SOLVER_NAMES, ControlNetConfig, ScheduleConfig
from meddiff.kernels.diffusion_step import COEFFICIENTS, diffusion_step
from meddiff.models import BiFlowNet, Control, ControlNet, SteeredDenoiser
from meddiff.sampling import SOLVERS, NoiseSchedule, Sampler, resolve_sampling, sample_latent, solver_timesteps
from meddiff.sampling import sampler as sampler_module
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
    variance = reference("diffusion_schedule_1000")["posterior_variance"].double()
    torch.testing.assert_close(noise_scale[1:], variance[1:].sqrt(), rtol=1e-6, atol=0)
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
    assert torch.equal(run(6, batch=2)[1:], first)
    assert torch.equal(run([7, 3], batch=2)[:1], first)
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


def test_the_bad_sample_is_named(schedule):
    class DivergingOnClass2(torch.nn.Module):
        config = PRESETS["tiny"].denoiser
        device = torch.device("cpu")

        def forward(self, x, t, y, resolution):
            return x / (y != 2)

    with pytest.raises(FloatingPointError, match=r"of sample 2 of 3 is not finite at step 1 of 4 \(t = 999\)"):
        sample_latent(DivergingOnClass2(), schedule, (8, 8, 8), torch.tensor([1, 2, 0]), steps=4)


def test_samples_of_a_batch_may_be_of_several_classes(denoiser, schedule):
    classes = torch.tensor([3, 0, 6])
    together = sample_latent(denoiser, schedule, (8, 8, 16), classes, steps=2, seed=[5, 9, 2])
    for latent, y, seed in zip(together, classes, (5, 9, 2)):
        assert torch.equal(sample_latent(denoiser, schedule, (8, 8, 16), y[None], steps=2, seed=seed)[0], latent)


class FakeGraph:
    """Runs the captured step, and counts."""

    def __init__(self, step, pool):
        self.step, self.shared, self.replays, self.dropped = step, pool, 0, False

    def replay(self):
        assert not self.dropped
        self.replays += 1
        self.step()

    def pool(self):
        return "pool"

    def reset(self):
        self.dropped = True


@pytest.fixture
def graphs(monkeypatch):
    made = []

    def capture(step, device, pool=None):
        for _ in range(sampler_module.WARM_UPS):
            step()
        made.append(FakeGraph(step, pool))
        return made[-1]

    monkeypatch.setattr(sampler_module, "capture", capture)
    return made


def test_a_graph_serves_all_steps_and_samples_of_a_shape(denoiser, schedule, graphs):
    sampler = Sampler(denoiser, schedule, graphs=True)
    runs = [
        {"noise": (8, 8, 8), "y": Y, "steps": 3, "seed": 1},
        {"noise": (8, 8, 8), "y": torch.tensor([4]), "steps": 2, "seed": 2},
        {"noise": (8, 8, 16), "y": Y, "steps": 2},
        {"noise": (8, 8, 8), "y": Y, "steps": 3, "solver": "dpmsolver++"},
        {"noise": (8, 8, 8), "y": Y, "steps": 3, "eta": 1.0, "seed": 1},
        {"noise": (8, 8, 8), "y": Y, "steps": 3, "seed": 1},
        {"noise": (8, 8, 8), "y": Y.repeat(2), "steps": 3, "seed": 1},
    ]
    results = [sampler.sample(**run) for run in runs]
    assert [graph.replays for graph in graphs] == [3 + 2 + 3, 2, 3, 3, 3]
    assert [graph.shared for graph in graphs] == [None, *["pool"] * 4]
    for run, latent in zip(runs, results):
        assert torch.equal(sample_latent(denoiser, schedule, **run), latent)
    assert torch.equal(results[0], results[5]) and torch.equal(results[6][:1], results[0])

    buffers = [weakref.ref(loop) for loop in sampler._loops.values()]
    sampler.drop()
    graphs_dropped = [graph.dropped for graph in graphs]
    graphs.clear()
    assert all(graphs_dropped) and not any(buffer() for buffer in buffers)
    assert torch.equal(sampler.sample(**runs[0]), results[0]) and graphs[0].shared is None


def test_graphs_do_not_outlive_the_place_of_the_weights(schedule, graphs, reference_weights):
    denoiser = reference_weights(BiFlowNet(PRESETS["tiny"].denoiser))
    sampler = Sampler(denoiser, schedule, graphs=True)
    run = {"noise": (8, 8, 8), "y": Y, "steps": 2}
    before = sampler.sample(**run)
    with torch.no_grad():
        denoiser.init_conv.bias.add_(0.5)  # in its place: the graph reads the new value
    changed = sampler.sample(**run)
    assert len(graphs) == 1 and not torch.allclose(changed, before, atol=1e-3)
    denoiser.init_conv.bias.data = denoiser.init_conv.bias - 0.5
    torch.testing.assert_close(sampler.sample(**run), before, rtol=1e-3, atol=1e-3)
    assert len(graphs) == 2 and graphs[0].dropped and not graphs[1].dropped


def test_a_graph_of_a_steered_denoiser(denoiser, schedule, graphs):
    """Whose controls' weights must not move either, and whose clean latents are corrected between the replays."""
    network = ControlNet.from_denoiser(denoiser, ControlNetConfig(denoiser=denoiser.config))
    for parameter in [*network.entries.parameters(), *network.exits.parameters()]:
        parameter.data = torch.full_like(parameter, 0.05)
    with torch.inference_mode():
        steered = SteeredDenoiser(denoiser, [Control(network, torch.ones(1, 8, 8, 8, 8))])
    sampler = Sampler(steered, schedule, graphs=True)
    run = {"noise": (8, 8, 8), "y": Y.repeat(2), "steps": 2, "correct_x0": lambda x0, step: 0.5 * x0}
    latent = sampler.sample(**run)
    assert torch.equal(latent, sample_latent(steered, schedule, **run)) and graphs[0].replays == 2
    assert not torch.allclose(latent, sample_latent(denoiser, schedule, **run), atol=1e-3)
    network.init_conv.bias.data = network.init_conv.bias + 0.5
    assert not torch.allclose(sampler.sample(**run), latent, atol=1e-3)
    assert len(graphs) == 2 and graphs[0].dropped


def test_without_a_graph_the_steps_run_one_by_one(denoiser, schedule, monkeypatch):
    def capture(step, device, pool=None):
        step()
        raise RuntimeError("operation not permitted when stream is capturing\nmore of it")

    monkeypatch.setattr(sampler_module, "capture", capture)
    sampler, run = Sampler(denoiser, schedule, graphs=True), {"noise": (8, 8, 8), "y": Y, "steps": 2}
    with pytest.warns(UserWarning, match=r"no CUDA graph .*\(operation not permitted when stream is capturing\)"):
        first = sampler.sample(**run)
    assert torch.equal(first, sample_latent(denoiser, schedule, **run))
    assert torch.equal(first, sampler.sample(**run))  # and it is not tried again: no warning, which would be an error


def test_results_are_no_buffers(denoiser, schedule):
    sampler = Sampler(denoiser, schedule)
    first = sampler.sample((8, 8, 8), Y, steps=2, seed=1)
    kept = first.clone()
    sampler.sample((8, 8, 8), Y, steps=2, seed=2)
    assert torch.equal(first, kept) and first.is_contiguous()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"eta": 1.0}, {"solver": "dpmsolver++"}])
def test_a_graph_gives_the_bits_of_its_steps(schedule, reference_weights, dtype, options):
    denoiser = reference_weights(BiFlowNet(PRESETS["tiny"].denoiser)).to("cuda", dtype)
    run = {"noise": (8, 16, 16), "y": torch.tensor([1, 3]), "steps": 4, "seed": 5} | options
    eager = Sampler(denoiser, schedule, graphs=False).sample(**run)
    sampler = Sampler(denoiser, schedule)
    for _ in range(2):
        assert torch.equal(sampler.sample(**run), eager)
    assert all(loop.graph is not None for loop in sampler._loops.values())
    one = sampler.sample(**run | {"y": torch.tensor([3]), "seed": 6})
    assert torch.equal(one, eager[1:])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("options", [{}, {"solver": "ddpm", "steps": None}, {"solver": "dpmsolver++"}])
@pytest.mark.parametrize("graphs", [True, False])
def test_no_step_waits_for_the_device(schedule, reference_weights, graphs, options):
    denoiser = reference_weights(BiFlowNet(PRESETS["tiny"].denoiser)).to("cuda", torch.bfloat16)
    sampler = Sampler(denoiser, schedule, graphs=graphs)
    sampler.sample((8, 8, 8), Y, **{"steps": 3} | options)  # captures, compiles
    waits = []

    class Watched(type(next(iter(sampler._loops.values())))):
        def advance(self):
            torch.cuda.set_sync_debug_mode("error")
            try:
                super().advance()
            finally:
                torch.cuda.set_sync_debug_mode("default")
            waits.append(0)

    for loop in sampler._loops.values():
        loop.__class__ = Watched
    sampler.sample((8, 8, 8), Y, **{"steps": 3} | options)
    assert len(waits) == (1000 if options.get("solver") == "ddpm" else 3)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_gpu_samples_what_the_cpu_samples(denoiser, schedule, reference_weights):
    run = {"noise": (8, 8, 16), "y": Y, "steps": 4, "seed": 3, "eta": 0.5}
    on_gpu = reference_weights(BiFlowNet(PRESETS["tiny"].denoiser)).to("cuda")
    there = sample_latent(on_gpu, schedule, **run).cpu()
    torch.testing.assert_close(there, sample_latent(denoiser, schedule, **run), rtol=1e-2, atol=1e-2)


def test_what_is_left_open_is_as_the_model_says(denoiser):
    own = ScheduleConfig(steps=4, eta=1.0, timestep_spacing="leading", t_end=300)
    schedule, plain = NoiseSchedule(own), NoiseSchedule()
    asked = {"solver": "ddim", "steps": 4, "eta": 1.0, "order": 1, "timestep_spacing": "leading", "t_end": 300}
    assert resolve_sampling(own) == asked and resolve_sampling(own, solver="ddim") == asked
    assert resolve_sampling(own, steps=7, eta=0.0) == asked | {"steps": 7, "eta": 0.0}
    published = {"steps": None, "eta": 0.0, "timestep_spacing": "linspace", "t_end": 0}
    others = published | {"solver": "dpmsolver++", "order": 2}
    assert resolve_sampling(own, solver="dpmsolver++") == others | {"t_end": 300}  # the network's, not the solver's
    assert resolve_sampling(ScheduleConfig()) == asked | published
    of_other = ScheduleConfig(solver="dpmsolver++", steps=7, timestep_spacing="trailing")
    assert resolve_sampling(of_other) == others | {"steps": 7, "timestep_spacing": "trailing"}
    assert resolve_sampling(of_other, solver="ddim") == resolve_sampling(ScheduleConfig())
    assert set(SOLVERS) == set(SOLVER_NAMES)

    latent, options = sample_latent(denoiser, schedule, (8, 8, 8), Y, seed=1), asked | {"seed": 1}
    assert torch.equal(latent, sample_latent(denoiser, plain, (8, 8, 8), Y, **options))
    assert not torch.allclose(latent, sample_latent(denoiser, schedule, (8, 8, 8), Y, eta=0.0, seed=1), atol=1e-3)


@pytest.mark.parametrize("spacing", ["linspace", "leading", "trailing"])
@pytest.mark.parametrize("solver", ["ddim", "dpmsolver++"])
def test_sampling_can_end_early_at_the_estimate_of_the_clean_latent(denoiser, schedule, solver, spacing):
    timesteps = solver_timesteps(schedule, solver, 5, spacing, t_end=400)
    shorter = NoiseSchedule(ScheduleConfig(timesteps=600))
    assert timesteps == [400 + t for t in solver_timesteps(shorter, solver, 5, spacing)]
    seen = {}

    def watch(x0: Tensor, t: int) -> Tensor:
        seen[t] = x0.clone()
        return x0

    run = {"solver": solver, "steps": 5, "timestep_spacing": spacing, "t_end": 400, "seed": 2}
    latent = sample_latent(denoiser, schedule, (8, 8, 8), Y, correct_x0=watch, **run)
    assert list(seen) == timesteps
    torch.testing.assert_close(latent, seen[timesteps[-1]], rtol=0, atol=1e-5)
    torch.testing.assert_close(latent, sample_latent(denoiser, schedule, (8, 8, 8), Y, **run), rtol=0, atol=1e-5)


def test_ddpm_can_end_early_as_well(denoiser, schedule):
    run = {"solver": "ddpm", "t_end": 990, "seed": 2}
    first = sample_latent(denoiser, schedule, (8, 8, 8), Y, **run)
    assert solver_timesteps(schedule, "ddpm", t_end=990) == list(range(999, 989, -1))
    assert first.abs().max() <= 1 and torch.isfinite(first).all()


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
        ({"order": 2}, "order"),
        ({"solver": "dpmsolver++", "order": 3}, "order"),
        ({"timestep_spacing": "karras"}, "linspace, leading, trailing"),
        ({"t_end": -1}, r"t_end must lie in \[0, 998\]"),
        ({"t_end": 999}, r"t_end must lie in \[0, 998\]"),
        ({"t_end": 900, "steps": 101}, r"\[1, 100\]"),
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
