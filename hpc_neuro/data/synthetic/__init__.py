"""Synthetic neurons: random trees (or any SWC), and a microscope that images them. Everything is seeded."""

from hpc_neuro.data.synthetic.dataset import SyntheticConfig, write_dataset
from hpc_neuro.data.synthetic.microscope import Microscope, render_stack
from hpc_neuro.data.synthetic.trees import TreeForm, grow_random_tree

__all__ = ["Microscope", "SyntheticConfig", "TreeForm", "grow_random_tree", "render_stack", "write_dataset"]
