"""Other projects' networks on meddiff's operators, in place: their classes, parameters and state dicts stay theirs."""

from meddiff.acceleration.walk import Report, Row, accelerate, restore

__all__ = ["Report", "Row", "accelerate", "restore"]
