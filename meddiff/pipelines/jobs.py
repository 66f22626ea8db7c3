"""What is to be generated into a folder: a volume a job, from a count or from a list."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from meddiff.pipelines.model import MedDiffusion, Target

_COLUMNS = ("anatomy", "size", "spacing", "seed", "file")


@dataclass(frozen=True)
class VolumeJob:
    """One volume: its file in the folder, what it shows, voxels and mm along X, Y, Z, and its seed."""

    file: str
    target: Target
    seed: int

    def to_dict(self) -> dict[str, Any]:
        t = self.target
        return {
            "file": self.file,
            "anatomy": t.anatomy,
            "size": list(t.size),
            "spacing_mm": list(t.spacing),
            "seed": self.seed,
        }

    @property
    def record(self) -> str:
        """The file beside it that says how it came about."""
        return f"{_stem(self.file)}.json"


def jobs_from_count(
    model: MedDiffusion, count: int, seed: int, anatomy: str | None, size: Sequence[int] | None, spacing: Any = None
) -> list[VolumeJob]:
    """`count` volumes of one kind, with the seeds from `seed` on. ValueError as `MedDiffusion.target`."""
    target = model.target(anatomy, size, spacing)
    return [VolumeJob(f"{target.anatomy}-{i:05d}.nii.gz", target, seed + i) for i in range(count)]


def jobs_from_list(
    model: MedDiffusion,
    path: str | Path,
    seed: int,
    anatomy: str | None,
    size: Sequence[int] | None,
    spacing: Sequence[float] | None = None,
) -> tuple[list[VolumeJob], dict[str, str]]:
    """The volumes of a CSV file with any of the columns anatomy, size, spacing, seed and file.

    A size is 512 or 256x256x128, a spacing 1 or 0.7x0.7x1, a file a name without folders. What a row leaves out is the
    argument of that name, the seed with the row's number (from 0) added to it; the file is called after both.

    Returns the jobs, and the reasons of the rows that are none.

    Raises ValueError for a file that is no such list, OSError if it cannot be read.
    """
    path, jobs, bad = Path(path), [], {}
    with path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file, skipinitialspace=True, restkey="", restval="")
        unknown = sorted(set(reader.fieldnames or ()) - set(_COLUMNS))
        if unknown:
            raise ValueError(f"generate: {path}: unknown columns {unknown}; known are {', '.join(_COLUMNS)}")
        rows = list(reader)
    names: set[str] = set()
    for i, row in enumerate(rows):
        try:
            if "" in row:
                raise ValueError("more entries than columns")
            given = {name: value.strip() for name, value in row.items() if value and value.strip()}
            target = model.target(
                given.get("anatomy", anatomy),
                triple(given["size"], int) if "size" in given else size,
                triple(given["spacing"], float) if "spacing" in given else spacing,
            )
            name = given.get("file", f"{target.anatomy}-{i:05d}.nii.gz")
            if Path(name).name != name or name.startswith(".") or not name.endswith((".nii", ".nii.gz")):
                raise ValueError(f"file must be a name that ends in .nii or .nii.gz, got {name!r}")
            if _stem(name) in names:
                raise ValueError(f"{name} is the file of another row too")
            number = int(given.get("seed", seed + i))
            if not 0 <= number < 2**63:
                raise ValueError(f"seed must lie in [0, 2**63), got {number}")
            names.add(_stem(name))
            jobs.append(VolumeJob(name, target, number))
        except ValueError as error:
            bad[f"{path.name}, row {i + 1}"] = str(error).removeprefix("generate: ")
    if not rows:
        raise ValueError(f"generate: {path}: lists no volumes")
    return jobs, bad


def triple(text: float | str, number: type[int] | type[float]) -> tuple:
    """One number for all three axes, or three with an x between them. ValueError for anything else."""
    try:
        values = tuple(number(part) for part in str(text).split("x"))
    except ValueError:
        values = ()
    if len(values) not in (1, 3) or not all(v > 0 for v in values):
        raise ValueError(f"expected a positive number, or three such as 256x256x128, got {text}")
    return values * 3 if len(values) == 1 else values


def _stem(name: str) -> str:
    return name.removesuffix(".gz").removesuffix(".nii")
