"""`python -m hpc_neuro` is `hpc-neuro`."""

import sys

from hpc_neuro.cli import run_process

if __name__ == "__main__":
    sys.exit(run_process())
