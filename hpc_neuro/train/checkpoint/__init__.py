"""Checkpoints: written whole or not at all, found again, and read by any number of ranks at any ZeRO stage.

folder.py        what a checkpoint's folder contains, which one is the newest, which ones are removed
saver.py         saving in the background, agreed on by all ranks; reading back
tensor_files.py  the files of tensors, cut into ranges that any number of ranks can read
"""
