"""Image stacks with a known neuron, as a microscope would give them."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter

from hpc_neuro.core.geometry import Shape
from hpc_neuro.core.morphology import Tree
from tests.helpers.shapes import grow_crooked_tree, paint_tree

SHAPE: Shape = (40, 96, 128)


def make_neuron(seed: int = 3, branches: int = 3) -> Tree:
    """A tree of a trunk and side branches inside `SHAPE`."""
    return grow_crooked_tree(seed, SHAPE, branches)


def take_picture(
    tree: Tree, brightness: float = 120.0, background: float = 20.0, noise: float = 4.0, seed: int = 0
) -> NDArray[np.uint8]:
    """The tree as a blurred 8-bit stack with noise."""
    signal = gaussian_filter(paint_tree(tree, SHAPE, 1.8), 0.8)
    image = background + brightness * signal + np.random.default_rng(seed).normal(0, noise, SHAPE)
    return np.asarray(np.clip(image, 0, 255), dtype=np.uint8)
