"""Data sets: where their files are, what is in them, how they are augmented. `sets.py` is the place to add one."""

from utils.data.sets import DATASETS, PHOTOS, Dataset, Split, load_dataset, load_datasets

__all__ = ["DATASETS", "PHOTOS", "Dataset", "Split", "load_dataset", "load_datasets"]
