"""The plugin of napari: results as layers, `trace` on a layer, and the places to proofread as a table.

napari.yaml   what napari reads: the reader and the two widgets
layers        results as napari's layer tuples; needs no napari
trace_layer   `trace` on a layer
places_table  the table

`pip install 'hpc_neuro[napari]'` installs both. Importing the package imports neither napari nor Qt.
"""
