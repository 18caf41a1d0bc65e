"""The verb `infer`: a trained student over any volume, block by block, then tracing.

Importing the package does not import torch.
"""

from __future__ import annotations

from hpc_neuro.infer.config import InferConfig

__all__ = ["InferConfig", "forecast", "run"]


def forecast(cfg: InferConfig) -> list[str]:
    """Check everything that the run needs and describe what it will do, in lines. Writes nothing."""
    # Imported late, because it imports torch, which takes seconds.
    from hpc_neuro.infer import verb

    return verb.forecast(cfg)


def run(cfg: InferConfig) -> int:
    """Predict and trace, or resume. Returns the exit code."""
    from hpc_neuro.infer import verb

    return verb.run(cfg)
