from __future__ import annotations

import time

import pytest
import torch

from meddiff.resources import StageMeter, available_bytes, bytes_of, default_device, default_dtype

CPU = torch.device("cpu")


def test_meter_sees_time_and_memory_of_its_own_stage():
    meter = StageMeter(CPU)
    with meter.stage("small"):
        time.sleep(0.05)
    with meter.stage("large"):
        torch.ones(2**26)  # 256 MiB
    with meter.stage("small again"):
        pass
    small, large, again = meter.stages
    assert [stage.name for stage in meter.stages] == ["small", "large", "small again"]
    assert 0.05 <= small.seconds < 1
    assert large.peak_bytes - small.peak_bytes > 200 * 2**20
    assert large.peak_bytes - again.peak_bytes > 200 * 2**20
    assert meter.to_dicts()[0]["name"] == "small"


def test_free_memory_is_known_and_plausible():
    free = available_bytes(CPU)
    assert 2**20 < free < 2**50


def test_defaults_exist():
    assert default_device().type in ("cpu", "cuda")
    assert default_dtype(CPU) in (torch.float32, torch.bfloat16)


@pytest.mark.parametrize(
    "text, wanted", [("8GB", 8e9), ("900 mb", 9e8), ("7.5GiB", 7.5 * 2**30), ("4096", 4096), ("1k", 1000), ("12B", 12)]
)
def test_amounts_of_memory(text, wanted):
    assert bytes_of(text) == wanted


@pytest.mark.parametrize("text", ["", "much", "0GB", "-1GB", "8XB", "8iB", "1e9"])
def test_what_is_no_amount_of_memory(text):
    with pytest.raises(ValueError, match="expected a positive amount of memory"):
        bytes_of(text)
