"""Captions of a training set, for what is learnt from them before a run (a BPE)."""

from tessellar.data.dataset import IndexedDataset

MOST_CAPTIONS = 20_000


def training_captions(dataset: IndexedDataset) -> list[str]:
    """Captions of a set, of at most MOST_CAPTIONS samples that lie evenly in it."""
    step = -(-len(dataset) // MOST_CAPTIONS)
    return dataset.captions(range(0, len(dataset), step))
