"""Exact, resumable DistributedDataParallel training of waste image classifiers on plain WebDataset tars."""

__version__ = "0.1.0"
