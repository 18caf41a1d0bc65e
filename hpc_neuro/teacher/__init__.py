"""The verbs `teacher train`, `teacher continue` and `teacher probe`: 2D teachers of one's own.

A teacher is a timm ViT that learns without labels, from photographs or from slices of microscope volumes. Its folder:

OUT/teacher.safetensors, teacher.json   the weights (float16, timm's names) and their card
OUT/checkpoint.pt, metrics.jsonl        where the same command goes on, and the loss by step
OUT/cache/                              decoded photographs and windows of slices
"""
