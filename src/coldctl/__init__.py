"""Recycle finetuned models by ColD Fusion (arXiv 2212.01378): finetune, fuse, evaluate, publish, again."""

__version__ = "0.1.0"
