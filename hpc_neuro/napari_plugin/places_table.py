"""The places to proofread as a table; a click shows the place."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from qtpy.QtWidgets import QAbstractItemView, QTableWidget, QTableWidgetItem

from hpc_neuro.napari_plugin.layers import PLACES

if TYPE_CHECKING:
    import napari.layers
    import napari.viewer

_COLUMNS = ("rank", "kind", "doubt", "z", "y", "x")
"""Columns of the table; coordinates are in voxels."""


class PlacesTable(QTableWidget):  # type: ignore[misc]  # Qt is not installed where types are checked
    """Every place of the layers of places in the viewer, those of one layer in their order."""

    def __init__(self, napari_viewer: napari.viewer.Viewer) -> None:
        super().__init__(0, len(_COLUMNS))
        self._viewer = napari_viewer
        self._places = list[tuple[Any, int]]()
        self.setHorizontalHeaderLabels(list(_COLUMNS))
        # The rank numbers the rows already.
        self.verticalHeader().hide()
        self.setEditTriggers(QAbstractItemView.EditTrigger.NoEditTriggers)
        self.setSelectionBehavior(QAbstractItemView.SelectionBehavior.SelectRows)

        self.fill()
        self.currentCellChanged.connect(self._show_row)
        # A result may be opened after the table.
        for event in (napari_viewer.layers.events.inserted, napari_viewer.layers.events.removed):
            event.connect(self.fill)

    def fill(self, _event: Any = None) -> None:
        """List the places of the layers that are there now."""
        layers = [layer for layer in self._viewer.layers if layer.metadata.get(PLACES)]
        self._places = [(layer, index) for layer in layers for index in range(len(layer.data))]
        self.setRowCount(len(self._places))

        for row, (layer, index) in enumerate(self._places):
            features = layer.features.iloc[index]
            texts = [str(features["rank"]), str(features["kind"]), f"{features['doubt']:.2f}"]
            texts += [f"{value:.0f}" for value in layer.data[index]]
            for column, text in enumerate(texts):
                self.setItem(row, column, QTableWidgetItem(text))

        # All columns fit the narrow dock.
        self.resizeColumnsToContents()

    def _show_row(self, row: int, *_: int) -> None:
        # Qt tells -1 when the table becomes empty.
        if 0 <= row < len(self._places):
            jump_to(self._viewer, *self._places[row])


def jump_to(viewer: napari.viewer.Viewer, layer: napari.layers.Points, index: int) -> None:
    """Show a point of a layer: its slice, in the middle of the view, and selected."""
    world = layer.data_to_world(layer.data[index])
    viewer.dims.set_point(range(len(world)), world)
    viewer.scene.camera.center = tuple(world)[-3:]
    layer.selected_data = {index}
