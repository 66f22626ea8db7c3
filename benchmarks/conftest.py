"""pytest-benchmark's baselines: in results/<device>/, with device, versions and commit in them and no host's name."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import common  # noqa: E402

from meddiff.resources import default_device  # noqa: E402

_DEVICE = default_device()


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config) -> None:
    if config.option.benchmark_storage == "file://./.benchmarks":  # its default
        config.option.benchmark_storage = f"file://{common.RESULTS / common.slug(common.device_name(_DEVICE))}"


@pytest.hookimpl(tryfirst=True)
def pytest_benchmark_generate_machine_info() -> dict:
    """What has to be equal for times to be comparable; pytest-benchmark warns where it is not."""
    recorded = common.environment(_DEVICE)
    return {key: recorded[key] for key in ("device", "threads", "versions")}


@pytest.hookimpl(tryfirst=True)
def pytest_benchmark_generate_commit_info() -> dict:
    return {"id": common.environment(_DEVICE)["commit"]}
