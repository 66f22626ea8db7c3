"""Whole jobs: from volumes and conditions to volumes."""

from meddiff.pipelines.control import Condition, TrainedControl, generate_controlled
from meddiff.pipelines.latents import EncodedVolume
from meddiff.pipelines.model import MedDiffusion

__all__ = ["Condition", "EncodedVolume", "MedDiffusion", "TrainedControl", "generate_controlled"]
