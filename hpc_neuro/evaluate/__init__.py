"""The verb `evaluate`: predictions + truth -> metrics.json, metrics.csv, metrics.tex and one HTML report."""

from __future__ import annotations

from hpc_neuro.evaluate.config import EvaluateConfig

__all__ = ["EvaluateConfig", "forecast", "run"]


def forecast(cfg: EvaluateConfig) -> list[str]:
    """Check everything that the run needs and describe what it will do, in lines. Writes nothing."""
    from hpc_neuro.evaluate import verb

    return verb.forecast(cfg)


def run(cfg: EvaluateConfig) -> int:
    """Score the predictions, or resume. Returns the exit code."""
    from hpc_neuro.evaluate import verb

    return verb.run(cfg)
