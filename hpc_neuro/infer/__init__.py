"""The verb `infer`: a trained student over any volume, block by block, then tracing."""

from hpc_neuro.infer.config import EmptyConfig, InferConfig
from hpc_neuro.infer.verb import forecast, run

__all__ = ["EmptyConfig", "InferConfig", "forecast", "run"]
