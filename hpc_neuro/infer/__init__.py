"""The verb `infer`: a trained student over any volume, block by block, then tracing."""

from hpc_neuro.infer import verify, viewer
from hpc_neuro.infer.config import EmptyConfig, InferConfig
from hpc_neuro.infer.verb import forecast, run

COMMANDS = {"verify": verify.main, "serve": viewer.main}
"""What `hpc-neuro infer` does besides running a config."""

__all__ = ["COMMANDS", "EmptyConfig", "InferConfig", "forecast", "run"]
