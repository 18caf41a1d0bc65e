"""The verb `evaluate`: predictions + truth -> metrics.json, metrics.csv, metrics.tex and one HTML report."""

from hpc_neuro.evaluate.config import EvaluateConfig
from hpc_neuro.evaluate.verb import forecast, run

__all__ = ["EvaluateConfig", "forecast", "run"]
