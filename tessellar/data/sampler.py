"""The order of an epoch: every sample exactly once over all ranks, another order each epoch, from
any sample on.

Positions are counted over all ranks: rank r takes positions start + r, start + r + R, ... of one
global order. So step k of R ranks with batch b covers the same samples as step k of one process
with batch R b, and a run may resume with another number of ranks. It derives from torch's
DistributedSampler only so that Lightning recognises it and leaves it alone; that class repeats
samples to fill up the last round, this one does not.
"""

from collections.abc import Iterator, Sized
from typing import Any

import numpy as np
from torch.utils.data import DistributedSampler

from tessellar.randomness import derive


class ResumableSampler(DistributedSampler):
    """Indices of `dataset` for one rank. `drop_last` leaves out N mod R samples, so that ranks are
    equally long.

    With the classes `balance` int64 [N] an epoch, of N samples still, holds each class equally
    often: rare ones are repeated, and of common ones other samples come in each epoch.
    """

    def __init__(
        self,
        dataset: Sized,
        seed: int = 0,
        shuffle: bool = True,
        rank: int = 0,
        world_size: int = 1,
        drop_last: bool = False,
        balance: np.ndarray | None = None,
    ) -> None:
        if not 0 <= rank < world_size:
            raise ValueError(f"rank is {rank}; it must be in [0, world_size = {world_size})")
        super().__init__(dataset, world_size, rank, shuffle, seed, drop_last)  # type: ignore[arg-type]
        self.total = len(dataset) - (len(dataset) % world_size if drop_last else 0)
        self.start = 0
        self.position = 0
        self.balance = balance

    def order(self) -> np.ndarray:
        """The samples of this epoch over all ranks, int64 [total]."""
        if not self.shuffle:
            return np.arange(self.total)
        generator = np.random.default_rng(derive(self.seed, self.epoch))
        if self.balance is not None:
            return balanced_order(self.balance, generator)[: self.total]
        return generator.permutation(len(self.dataset))[: self.total]  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[int]:
        self.position = self.start
        # A start holds for one pass: the next one begins at the beginning.
        self.start = 0
        for index in self.order()[self.position + self.rank :: self.num_replicas].tolist():
            self.position = min(self.position + self.num_replicas, self.total)
            yield index

    def __len__(self) -> int:
        """Samples of this rank in a whole epoch, also where `start` skips some of them."""
        return len(range(self.rank, self.total, self.num_replicas))

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch, for the order and for the data set's augmentation; forgets `start` if
        it is another one.
        """
        if epoch != self.epoch:
            self.start = 0
        self.epoch = epoch
        if hasattr(self.dataset, "set_epoch"):
            self.dataset.set_epoch(epoch)  # type: ignore[attr-defined]

    def seek(self, epoch: int, start: int) -> None:
        """Let the next pass begin in `epoch` after its first `start` samples, counted over all
        ranks.
        """
        if not 0 <= start <= self.total:
            raise ValueError(f"start is {start}; this epoch has {self.total} samples")
        self.set_epoch(epoch)
        self.start = start

    def state_dict(self) -> dict[str, Any]:
        """Epoch and samples drawn so far over all ranks; a loader with workers draws ahead of what
        was trained on.
        """
        length = len(self.dataset)  # type: ignore[arg-type]
        return {
            "epoch": self.epoch,
            "start": self.position,
            "seed": self.seed,
            "length": length,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state` was taken, on any number of ranks; raises ValueError for another
        seed or data size.
        """
        ours = {"seed": self.seed, "length": len(self.dataset)}  # type: ignore[arg-type]
        saved = {key: state[key] for key in ours}
        if saved != ours:
            raise ValueError(f"the saved order has {saved}; this one has {ours}")
        self.seek(state["epoch"], min(state["start"], self.total))


def balanced_order(labels: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """As many samples as there are `labels` int64 [N], of each class that occurs equally many up to
    one, shuffled.

    A class with fewer samples is gone through several times, each time in another order.
    """
    places = [np.flatnonzero(labels == label) for label in np.unique(labels)]
    each, more = divmod(len(labels), len(places))
    lucky = set(generator.permutation(len(places))[:more].tolist())
    drawn = []
    for number, of_class in enumerate(places):
        count = each + (number in lucky)
        rounds = -(-count // len(of_class))
        drawn += [generator.permutation(of_class) for _ in range(rounds)]
        drawn[-1] = drawn[-1][: len(of_class) - (rounds * len(of_class) - count)]
    return generator.permutation(np.concatenate(drawn))
