"""Many volumes into a folder: resumable, shared among processes, several at a time.

The folder holds request.json (what was asked for), a NIfTI file with its .json record for every finished volume, and
manifest.jsonl, one line for each of those. A volume appears by one rename of a complete file, after its record: where
both are, it is finished. A run that was killed at any moment goes on where it was.

Processes started by torchrun or `accelerate launch` take every n-th volume each, and wait for each other at the end.
"""

from __future__ import annotations

import errno
import fcntl
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from meddiff.files import atomic_write, write_json
from meddiff.pipelines.jobs import VolumeJob
from meddiff.pipelines.model import MedDiffusion
from meddiff.pipelines.plan import GenerationPlan, plan_generation
from meddiff.resources import StageMeter
from meddiff.volume import Volume

_FORMAT = "meddiff-volumes-1"
_BAD_ITEM = (OSError, ValueError, MemoryError, FloatingPointError, torch.OutOfMemoryError)
_FULL = (errno.ENOSPC, errno.EDQUOT)


@dataclass
class Outcome:
    """What became of a request's volumes, in all processes.

    made, found: finished by this run, and by one before
    failed: the others, by file or line of the list, with the reason
    """

    made: int = 0
    found: int = 0
    failed: dict[str, str] = field(default_factory=dict)


def launched_process() -> tuple[int, int, int]:
    """Rank, number of processes, and rank on this machine, as torchrun and `accelerate launch` put them into the
    environment; 0, 1, 0 without them."""
    rank, world, local = (os.environ.get(name) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    return (0, 1, 0) if rank is None or world is None else (int(rank), int(world), int(local or 0))


def generate_volumes(
    model: MedDiffusion,
    jobs: Sequence[VolumeJob],
    folder: str | Path,
    *,
    batch: int | None = None,
    overlap: bool = False,
    force: bool = False,
    report: Callable[[str], None] = print,
    **options: Any,
) -> Outcome:
    """Generate the volumes of `jobs` that are not in the folder yet.

    A volume depends on its seed, target and options alone, not on batch, order or number of processes.

    Args:
        folder: is made if it is not there.
        batch: volumes that are denoised side by side; None as many as the memory of a GPU allows, one on a CPU.
        overlap: decode in a thread of its own while the next volumes are denoised: for an autoencoder on another device
            than the denoiser. Files are written in that thread in any case.
        force: begin even if the estimate for one volume is hours.
        report: is told what was planned, made and left out, in lines.
        options: solver, steps, eta, order, timestep_spacing, t_end, as for `MedDiffusion.generate`.

    Returns:
        The outcome. Whatever keeps one volume from being made is in it and does not stop the others.

    Raises:
        ValueError: if the folder holds another request's volumes, another run is at work there, an option is wrong, or
            (without `force`) a volume would take hours.
        OSError: if the folder cannot be written at all.
    """
    folder, (rank, world, _) = Path(folder), launched_process()
    settings = model.settings(**options)
    folder.mkdir(parents=True, exist_ok=True)
    with _process_group(world), _workplace(folder, rank) as partial:
        _settle_request(folder, jobs, settings)
        mine = jobs[rank::world]
        run = _Run(model, folder, partial, _Manifest(folder, jobs), settings, options, overlap, rank == 0, report)
        todo = [job for job in mine if not _is_finished(folder, job)]
        run.outcome.found = len(mine) - len(todo)
        if run.outcome.found:
            report(f"{run.outcome.found} of {len(mine)} volumes are there already")

        sizes = list(dict.fromkeys(job.target.size for job in todo))
        plans = {size: plan_generation(model, size, settings["steps"], batch) for size in sizes}
        for plan in plans.values():
            report(str(plan))
            if not force:
                plan.require_patience()
        with ThreadPoolExecutor(max_workers=1) as run.worker:
            for size, plan in plans.items():
                run.generate([job for job in todo if job.target.size == size], plan)
            run.settle()
        outcome = _gather(run.outcome, world)
        if rank == 0:
            run.manifest.refresh()
    return outcome


class _Run:
    """The work of one process."""

    def __init__(
        self,
        model: MedDiffusion,
        folder: Path,
        partial: Path,
        manifest: _Manifest,
        settings: dict[str, Any],
        options: dict[str, Any],
        overlap: bool,
        keeps_manifest: bool,
        report: Callable[[str], None],
    ) -> None:
        self.model, self.folder, self.partial, self.manifest = model, folder, partial, manifest
        self.settings, self.options = settings, options
        self.overlap, self.keeps_manifest, self.report = overlap, keeps_manifest, report
        self.outcome = Outcome()
        self.worker: ThreadPoolExecutor
        self.in_work: tuple[VolumeJob, Future] | None = None  # at most one volume, beside the ones being denoised
        self.disk_was_full = False

    def generate(self, jobs: Sequence[VolumeJob], plan: GenerationPlan) -> None:
        """Jobs of one size."""
        try:
            plan.require_possible()
        except MemoryError as error:
            for job in jobs:
                self.fail(job, error)
            return
        for start in range(0, len(jobs), plan.batch):
            self.make([job for job in jobs[start : start + plan.batch] if self.has_room(job)])

    def make(self, jobs: Sequence[VolumeJob]) -> None:
        """Denoise the jobs side by side, and hand each to the worker."""
        if not jobs:
            return
        meter = StageMeter(self.model.device)
        try:
            with meter.stage("sample"):
                latents = self.model.sample(
                    self.model.latent_size(jobs[0].target.size),
                    torch.tensor([job.target.class_index for job in jobs]),
                    seed=[job.seed for job in jobs],
                    **self.options,
                )
        except _BAD_ITEM as error:
            if len(jobs) == 1:
                self.fail(jobs[0], error)
            else:  # whichever it is, the others are not lost
                for job in jobs:
                    self.make([job])
            return
        for job, latent in zip(jobs, latents.split(1)):
            record = {"seed": job.seed, **self.settings, "batch": len(jobs), "stages": meter.to_dicts()}
            if self.overlap:
                self.hand_over(job, self.decode_and_write, job, latent, record)
                continue
            try:
                volume = self.model.decode_sample(latent, job.target, record)
            except _BAD_ITEM as error:
                self.fail(job, error)
            else:
                self.hand_over(job, self.write, job, volume)

    def decode_and_write(self, job: VolumeJob, latent: Tensor, record: dict[str, Any]) -> None:
        self.write(job, self.model.decode_sample(latent, job.target, record))

    def write(self, job: VolumeJob, volume: Volume) -> None:
        record = self.folder / job.record
        write_json(record, volume.record)
        try:
            replace(volume, record=None).save(self.partial / job.file)
            os.replace(self.partial / job.file, self.folder / job.file)
        except BaseException:
            record.unlink(missing_ok=True)
            raise

    def hand_over(self, job: VolumeJob, work: Callable[..., None], *arguments: Any) -> None:
        """Let the worker do it, as soon as it is done with what it has."""
        self.settle()
        self.in_work = (job, self.worker.submit(work, *arguments))

    def settle(self) -> None:
        """Wait for the worker, and account for what it did."""
        if self.in_work is None:
            return
        (job, future), self.in_work = self.in_work, None
        try:
            future.result()
        except _BAD_ITEM as error:
            self.fail(job, error)
        else:
            self.outcome.made += 1
            self.report(f"wrote {self.folder / job.file}")
            if self.keeps_manifest:
                try:
                    self.manifest.refresh()
                except OSError as error:  # it is written again at the end
                    self.report(f"the manifest is behind: {error}")

    def fail(self, job: VolumeJob, error: BaseException) -> None:
        self.disk_was_full |= isinstance(error, OSError) and error.errno in _FULL
        reason = str(error).strip() or repr(error)
        self.outcome.failed[job.file] = reason
        self.report(f"failed: {job.file}: {reason}")

    def has_room(self, job: VolumeJob) -> bool:
        """False where the disk was full and has no room for this volume's voxels: then it is not worth the work."""
        voxel_bytes = 2 if job.target.modality == "CT" else 4
        need = voxel_bytes * math.prod(job.target.size)
        if not self.disk_was_full or shutil.disk_usage(self.folder).free >= need:
            return True
        self.fail(job, OSError(errno.ENOSPC, f"no room for {need / 2**20:.0f} MiB in {self.folder}"))
        return False


class _Manifest:
    """manifest.jsonl: a line for each finished volume, in the order of the jobs, made from the volumes' records."""

    def __init__(self, folder: Path, jobs: Sequence[VolumeJob]) -> None:
        self.folder, self.jobs = folder, jobs
        self.lines: dict[str, str] = {}

    def refresh(self) -> None:
        new = [job for job in self.jobs if job.file not in self.lines and _is_finished(self.folder, job)]
        for job in new:
            record = json.loads((self.folder / job.record).read_text(encoding="utf-8"))
            sampling = ("solver", "steps", "eta", "order", "timestep_spacing", "t_end")
            kept = {name: record[name] for name in ("class", *sampling, "dtype", "device", "created")}
            line = job.to_dict() | kept | {"model": record["model"]["sha256"]}
            self.lines[job.file] = json.dumps(line, ensure_ascii=False) + "\n"
        if new:
            lines = (self.lines[job.file] for job in self.jobs if job.file in self.lines)
            with atomic_write(self.folder / "manifest.jsonl") as temporary:
                temporary.write_text("".join(lines), encoding="utf-8")


@contextmanager
def _process_group(world: int) -> Iterator[None]:
    """The processes of a launch, where there are several. They meet once, at the end, hours apart perhaps."""
    join = world > 1 and not dist.is_initialized()
    if join:
        dist.init_process_group("gloo", timeout=timedelta(days=30))
    try:
        yield
    finally:
        if join:
            dist.destroy_process_group()


def _gather(outcome: Outcome, world: int) -> Outcome:
    """The outcomes of all processes in one. A launcher ends all processes when one of them fails: so they wait."""
    if world == 1:
        return outcome
    outcomes: list[Any] = [None] * world
    dist.all_gather_object(outcomes, outcome)
    failed = {file: reason for each in outcomes for file, reason in each.failed.items()}
    return Outcome(sum(each.made for each in outcomes), sum(each.found for each in outcomes), failed)


@contextmanager
def _workplace(folder: Path, rank: int) -> Iterator[Path]:
    """A folder in the folder for this process's unfinished files; what a killed one left there is removed.

    Locked for as long as the process lives, so that two runs do not make the same volumes.
    """
    place = folder / f".partial-{rank}"
    place.mkdir(exist_ok=True)
    lock = os.open(place, os.O_RDONLY)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"generate: another run is at work in {folder}; wait for it, or stop it") from None
        except OSError:  # a file system without locks
            pass
        for remains in place.iterdir():
            remains.unlink()
        yield place
        place.rmdir()
    finally:
        os.close(lock)


def _settle_request(folder: Path, jobs: Sequence[VolumeJob], settings: dict[str, Any]) -> None:
    """Write request.json, or see that the one that is there asks for the same. It may grow by new volumes."""
    model = {"sha256": settings["model"]["sha256"], "trained": settings["model"]["trained"]}
    wanted = {
        "format": _FORMAT,
        **{name: value for name, value in settings.items() if name != "model"},
        "model": model,
        "volumes": [job.to_dict() for job in jobs],
    }
    path = folder / "request.json"
    foreign = [job.file for job in jobs if (folder / job.file).exists()]  # before the file, which precedes them
    if path.exists():
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            volumes = {volume["file"]: volume for volume in found["volumes"]}
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"generate: {path} is no request of `meddiff generate`: {error!r:.200}") from None
        if found == wanted:
            return
        differences = [
            f"{name} {found.get(name)!r} there, {value!r} now"
            for name, value in wanted.items()
            if name != "volumes" and found.get(name) != value
        ]
        now = {job.file: job.to_dict() for job in jobs}
        for file, volume in volumes.items():
            if file not in now:
                differences.append(f"{file} is not asked for any more")
            elif now[file] != volume:
                names = [name for name in now[file] if now[file][name] != volume.get(name)]
                differences += [f"{file}: {name} {volume.get(name)!r} there, {now[file][name]!r} now" for name in names]
        if differences:
            more = f" and {len(differences) - 3} more differences" if len(differences) > 3 else ""
            raise ValueError(
                f"generate: {folder} holds the volumes of another request: {'; '.join(differences[:3])}{more}. "
                "Choose another folder, or give the options of that request"
            )
    elif foreign:
        raise ValueError(f"generate: {folder} holds {foreign[0]} without a request.json; choose another folder")
    write_json(path, wanted)


def _is_finished(folder: Path, job: VolumeJob) -> bool:
    return (folder / job.file).exists() and (folder / job.record).exists()
