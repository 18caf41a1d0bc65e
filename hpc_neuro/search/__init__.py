"""The verb `search`: a space of train configs, the study over it, and what came out. `launch` runs the trials."""

from hpc_neuro.search.config import SearchConfig
from hpc_neuro.search.verb import forecast, run

__all__ = ["SearchConfig", "forecast", "run"]
