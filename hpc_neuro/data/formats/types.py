"""Vocabulary of the readers."""

from __future__ import annotations

from typing import Any

from numpy.typing import NDArray

Array = NDArray[Any]
"""A numpy array of any shape and dtype."""

Index = tuple[slice, ...]
"""One slice with start and stop, step 1, per axis of a stored array."""
