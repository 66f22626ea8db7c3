"""The denoising loop: from noise to a latent in the denoiser's range.

A step reads and writes static buffers on the device and finds its timestep and coefficients there by a counter that it
advances itself, so that nothing waits for the host and one CUDA graph serves every step of a shape. The samples of a
batch go through the network side by side, each by itself: on the CPU one after another, on a GPU as parallel branches
of the graph. A sample is therefore the same to the last bit whatever stands beside it.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from meddiff.config import TIMESTEP_SPACINGS, ScheduleConfig
from meddiff.kernels.diffusion_step import COEFFICIENTS, diffusion_step
from meddiff.models.biflownet import BiFlowNet
from meddiff.progress import progress as bar
from meddiff.resources import on_device
from meddiff.sampling.graph import WARM_UPS, Graph, capture
from meddiff.sampling.schedule import NoiseSchedule
from meddiff.sampling.solvers import SOLVERS, end_at_clean

_B, _C_0, _C_EPS = (COEFFICIENTS.index(name) for name in ("b", "c_0", "c_eps"))
RESOLUTION_UNIT = 64  # latent elements per unit of the resolution condition, for every downsampling factor
_STAGED = 2  # steps whose noise is on its way to a GPU


def solver_timesteps(
    schedule: NoiseSchedule, solver: str, steps: int | None = None, timestep_spacing: str = "linspace", t_end: int = 0
) -> list[int]:
    """The timesteps that a solver visits, in order. `steps` None is 50 for ddim, 20 for dpmsolver++, all for ddpm.

    `timestep_spacing` is "linspace", "leading" or "trailing", as in diffusers (Lin et al. 2024, table 2). None of the
    timesteps is below `t_end`: they are those of a schedule that ends there.

    Raises ValueError for an unknown solver or spacing, or a t_end or number of steps that the solver cannot take.
    """
    _require_known(solver)
    if timestep_spacing not in TIMESTEP_SPACINGS:
        raise ValueError(
            f"sample: unknown timestep_spacing {timestep_spacing!r}; known are {', '.join(TIMESTEP_SPACINGS)}"
        )
    kind = SOLVERS[solver]
    if not 0 <= t_end <= schedule.timesteps - 2:
        raise ValueError(f"sample: t_end must lie in [0, {schedule.timesteps - 2}], got {t_end}")
    visited = schedule.timesteps - t_end
    steps = kind.default_steps(visited) if steps is None else steps
    return [t_end + t for t in kind.timesteps(visited, steps, timestep_spacing)]


def _require_known(solver: str) -> None:
    if solver not in SOLVERS:
        raise ValueError(f"sample: unknown solver {solver!r}; known are {sorted(SOLVERS)}")


def resolve_sampling(
    config: ScheduleConfig,
    solver: str | None = None,
    steps: int | None = None,
    eta: float | None = None,
    order: int | None = None,
    timestep_spacing: str | None = None,
    t_end: int | None = None,
) -> dict[str, Any]:
    """All options of a sampler; `steps` None is the solver's own default.

    What is None is the configuration's, where the solver is; with another solver, its own number of steps, eta 0 and
    linspace, but the configuration's t_end. An order of None is the solver's highest.

    Raises ValueError for an unknown solver, or an order or eta that it lacks; `solver_timesteps` for the rest.
    """
    solver = config.solver if solver is None else solver
    _require_known(solver)
    default, highest = config if solver == config.solver else ScheduleConfig(), SOLVERS[solver].order
    eta = default.eta if eta is None else eta
    if not 0 <= eta <= 1 or (eta and solver != "ddim"):
        raise ValueError(f"sample: eta must lie in [0, 1] and belongs to solver 'ddim', got eta={eta} with {solver!r}")
    if order is not None and not 1 <= order <= highest:
        raise ValueError(
            f"sample: order must be 1 or 2 and belongs to solver 'dpmsolver++', got order={order} with {solver!r}"
        )
    return {
        "solver": solver,
        "steps": default.steps if steps is None else steps,
        "eta": eta,
        "order": highest if order is None else order,
        "timestep_spacing": default.timestep_spacing if timestep_spacing is None else timestep_spacing,
        "t_end": config.t_end if t_end is None else t_end,
    }


class NoiseSource:
    """Standard normal noise from one generator per sample.

    Drawn on the CPU, so that a seed gives the same noise whatever the device, the rest of the batch and other users of
    random numbers. Sample b of a batch has seed `seed + b`, unless a seed per sample is given.
    """

    def __init__(self, seed: int | Sequence[int], batch: int) -> None:
        seeds = [seed + b for b in range(batch)] if isinstance(seed, int) else list(seed)
        if len(seeds) != batch or any(not 0 <= s < 2**63 for s in seeds):
            raise ValueError(f"sample: seed must be one integer in [0, 2**63) or {batch} of them, got {seed!r}")
        self._generators = [torch.Generator("cpu").manual_seed(s) for s in seeds]

    def draw(self, out: Tensor) -> None:
        """Fill float32 [B, …], contiguous, on the CPU."""
        for sample, generator in zip(out, self._generators):
            torch.randn(sample.shape, generator=generator, out=sample)


class _NoiseFeed:
    """Puts each step's noise into a loop's buffer: on a GPU through pinned memory, some steps ahead of it."""

    def __init__(self, target: Tensor) -> None:
        self.target = target
        staged = _STAGED if target.device.type == "cuda" else 0
        self.staging = [torch.empty(target.shape, pin_memory=True) for _ in range(staged)]
        self.copied = [torch.cuda.Event() for _ in range(staged)]

    def put(self, source: NoiseSource, step: int) -> None:
        if not self.staging:
            source.draw(self.target)
            return
        slot = step % len(self.staging)
        self.copied[slot].synchronize()  # the copy of some steps ago
        source.draw(self.staging[slot])
        self.target.copy_(self.staging[slot], non_blocking=True)
        self.copied[slot].record()


class _Loop:
    """The buffers of one shape, and the step that takes them further."""

    def __init__(
        self, denoiser: BiFlowNet, shape: Sequence[int], longest: int, stochastic: bool, second_order: bool
    ) -> None:
        self.denoiser = denoiser
        self.device = device = denoiser.device
        batch, longest = shape[0], max(longest, WARM_UPS)

        # in the layout of the network's estimates
        self.x = torch.zeros(*shape, device=device).contiguous(memory_format=torch.channels_last_3d)
        self.x0_prev = torch.zeros_like(self.x) if second_order else None
        self.noise = torch.zeros(*shape, device=device) if stochastic else None
        self.feed = None if self.noise is None else _NoiseFeed(self.noise)
        self.y = torch.zeros(batch, dtype=torch.int64, device=device)
        self.resolution = torch.tensor(shape[2:], dtype=torch.float32, device=device) / RESOLUTION_UNIT

        self.step_index = torch.zeros(1, dtype=torch.int64, device=device)
        self.timesteps = torch.zeros(longest, dtype=torch.int64, device=device)
        self.table = torch.zeros(longest, len(COEFFICIENTS), device=device)
        self.finite = torch.ones(batch, longest, dtype=torch.bool, device=device)

        branches = batch - 1 if device.type == "cuda" else 0
        self.branches = [torch.cuda.Stream(device) for _ in range(branches)]
        self.graph: Graph | None = None

    def capture(self, pool: object | None) -> None:
        """Replay a graph from now on. Where there can be none, say so and go on launching the steps one by one."""
        try:
            self.graph = capture(self.step, self.device, pool)
        except RuntimeError as error:
            reason = str(error).strip().partition("\n")[0]
            warnings.warn(
                f"sample: no CUDA graph of a step for latents {tuple(self.x.shape)} ({reason}); "
                "its kernels are launched one by one",
                stacklevel=2,
            )

    def load(self, start: Tensor, y: Tensor, timesteps: Sequence[int], table: Tensor) -> None:
        """Begin anew: start [B, C, D, H, W], classes [B], and the timesteps with their coefficients."""
        self.x.copy_(start)
        self.y.copy_(y)
        self.timesteps[: len(timesteps)] = torch.tensor(timesteps)
        self.table[: len(timesteps)] = table.float()
        self.step_index.zero_()
        self.finite.fill_(True)

    def step(self) -> None:
        """One step of every sample. Waits for nothing, and touches no memory of the host."""
        if self.branches:
            current = torch.cuda.current_stream(self.device)
            for branch in self.branches:
                branch.wait_stream(current)
        for sample in range(self.x.shape[0]):
            aside = bool(self.branches) and sample > 0
            with torch.cuda.stream(self.branches[sample - 1]) if aside else nullcontext():
                self._step_sample(slice(sample, sample + 1))
        for branch in self.branches:
            current.wait_stream(branch)
        self.step_index += 1

    def advance(self) -> None:
        """`step`, or its graph."""
        self.step() if self.graph is None else self.graph.replay()

    def _step_sample(self, one: slice) -> None:
        x, i = self.x[one], self.step_index
        estimate = self.denoiser(x, self.timesteps.index_select(0, i), self.y[one], self.resolution)
        self.finite[one].index_copy_(1, i, torch.isfinite(estimate).all().view(1, 1))
        noise = None if self.noise is None else self.noise[one]
        x0_prev = None if self.x0_prev is None else self.x0_prev[one]
        diffusion_step(x, estimate, self.table.index_select(0, i)[0], noise, x0_prev)

    def check(self, timesteps: Sequence[int]) -> None:
        """FloatingPointError that names the first bad step so far. Waits for the device."""
        bad = (~self.finite[:, : len(timesteps)]).T.nonzero()
        if len(bad):
            step, sample = bad[0].tolist()
            which = f" of sample {sample + 1} of {len(self.finite)}" if len(self.finite) > 1 else ""
            raise FloatingPointError(
                f"sample: the noise estimate{which} is not finite at step {step + 1} of {len(timesteps)} "
                f"(t = {timesteps[step]}); check the weights, or use dtype float32"
            )


class Sampler:
    """Denoising loops of one denoiser. Buffers, and on a GPU graphs, are kept for every shape that was sampled.

    Sampling on a GPU has not been tried: no GPU has run this yet.

    Args:
        denoiser: noise estimator; its device and dtype are used for the network, the latent itself stays float32.
        schedule: noise schedule.
        graphs: whether steps are replayed as CUDA graphs; None where the denoiser is on a CUDA device.
    """

    def __init__(self, denoiser: BiFlowNet, schedule: NoiseSchedule, graphs: bool | None = None) -> None:
        self.denoiser, self.schedule, self.graphs = denoiser, schedule, graphs
        self._loops: dict[tuple, _Loop] = {}
        self._weights: list[int] = []
        self._pool: object | None = None

    @torch.inference_mode()
    def sample(
        self,
        noise: Tensor | Sequence[int],
        y: Tensor,
        *,
        solver: str | None = None,
        steps: int | None = None,
        eta: float | None = None,
        order: int | None = None,
        timestep_spacing: str | None = None,
        t_end: int | None = None,
        seed: int | Sequence[int] = 0,
        correct_x0: Callable[[Tensor, int], Tensor] | None = None,
        progress: bool = False,
    ) -> Tensor:
        """Sample latents in the denoiser's range (scaled, about [-1, 1]).

        Options that are None are as the schedule's configuration says, see `resolve_sampling`.

        Args:
            noise: the start, float [B, C, D, H, W], or the latent's size (D, H, W) to draw it from `seed`.
            y: classes, integer [B].
            solver: "ddim" (Song et al. 2021), "dpmsolver++" (Lu et al. 2022) or "ddpm" (Ho et al. 2020).
            steps: denoising steps.
            eta: DDIM's share of fresh noise, 0 (deterministic) to 1.
            order: of dpmsolver++, 1 or 2; None is 2.
            timestep_spacing: as in `solver_timesteps`.
            t_end: timestep from which the last step goes to the estimate of the clean latent. Above 0 that is the mean
                of what it could be: fine detail of which a network knows little is left out, and not drawn at random.
            seed: of the start and of the noise in between; sample b has `seed + b` unless one is given per sample.
            correct_x0: replaces each step's estimate of the clean latent, float32 [B, C, D, H, W] in [-1, 1], given
                with its timestep, by one of the same shape: data consistency. The step goes on with the noise that this
                implies.
            progress: show a progress bar.

        Returns:
            Float32 [B, C, D, H, W] on the denoiser's device. A sample does not depend on the others of its batch.

        Raises:
            ValueError: for an unknown solver, or steps, eta, order, spacing, t_end, seed or shapes that do not fit.
            FloatingPointError: if an estimate is not finite; the message names the step. On a GPU it comes at the end.
        """
        denoiser, schedule = self.denoiser, self.schedule
        asked = resolve_sampling(schedule.config, solver, steps, eta, order, timestep_spacing, t_end)
        solver, eta, order = asked["solver"], asked["eta"], asked["order"]
        timesteps = solver_timesteps(schedule, solver, asked["steps"], asked["timestep_spacing"], asked["t_end"])
        if y.ndim != 1 or y.is_floating_point():
            raise ValueError(f"sample: y must be integer [B], got {y.dtype} {tuple(y.shape)}")
        if y.numel() and not 0 <= int(y.min()) <= int(y.max()) < denoiser.config.num_classes:
            raise ValueError(f"sample: classes must lie in [0, {denoiser.config.num_classes}), got {y.tolist()}")

        batch = y.shape[0]
        source = NoiseSource(seed, batch)
        start = noise
        if not isinstance(noise, Tensor):
            start = torch.empty(batch, denoiser.config.channels, *noise)
            source.draw(start)
        if start.ndim != 5 or start.shape[0] != batch:
            raise ValueError(
                f"sample: noise must be [{batch}, {denoiser.config.channels}, D, H, W], got {tuple(start.shape)}"
            )
        table = SOLVERS[solver].table(schedule, timesteps, eta, order)
        table = end_at_clean(table) if asked["t_end"] else table

        with on_device(denoiser.device):
            loop = self._loop(start.shape, solver == "ddpm" or eta > 0, order > 1 or correct_x0 is not None)
            loop.load(start, y, timesteps, table)
            for i, step in enumerate(bar("sampling")(timesteps) if progress else timesteps):
                if loop.feed is not None:
                    loop.feed.put(source, i)
                loop.advance()
                if correct_x0:  # a step is linear in x0, which it leaves in x0_prev, and in the noise (x0 - a·x) / b
                    corrected, row = correct_x0(loop.x0_prev, step), loop.table[i]
                    loop.x += (row[_C_0] + row[_C_EPS] / row[_B]) * (corrected - loop.x0_prev)
                    loop.x0_prev.copy_(corrected)
                if loop.device.type == "cpu":  # where looking costs nothing
                    loop.check(timesteps)
            loop.check(timesteps)
            return loop.x.clone(memory_format=torch.contiguous_format)

    def drop(self) -> None:
        """Give back the buffers and graphs."""
        for loop in self._loops.values():
            if loop.graph is not None:
                loop.graph.reset()
                loop.graph = None
        self._loops.clear()
        self._pool = None

    def _loop(self, shape: Sequence[int], stochastic: bool, second_order: bool) -> _Loop:
        weights = [weight.data_ptr() for weight in self.denoiser.parameters()]
        if weights != self._weights:  # graphs hold on to where the weights were
            self.drop()
            self._weights = weights
        key = (*shape, stochastic, second_order)
        if key not in self._loops:
            loop = _Loop(self.denoiser, shape, self.schedule.timesteps, stochastic, second_order)
            graphs = loop.device.type == "cuda" if self.graphs is None else self.graphs
            if graphs:
                loop.capture(self._pool)
                if loop.graph is not None:
                    self._pool = loop.graph.pool()
            self._loops[key] = loop
        return self._loops[key]


def sample_latent(
    denoiser: BiFlowNet, schedule: NoiseSchedule, noise: Tensor | Sequence[int], y: Tensor, **options: Any
) -> Tensor:
    """Sample once; see `Sampler.sample`. A `Sampler` that is kept samples a shape again without preparing it anew."""
    return Sampler(denoiser, schedule).sample(noise, y, **options)
