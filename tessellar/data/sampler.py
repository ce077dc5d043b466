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
from torch.utils.data import Dataset, DistributedSampler

from tessellar.errors import UserError
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


class BucketSampler(ResumableSampler):
    """Batches instead of samples: lists of indices of one rank, all of one bucket.

    Sample i is of bucket `buckets[i]`. Step k of R ranks takes `batch_size` R samples of one bucket, so
    it is the step of one process with a batch of that size. In training (`drop_last`) every batch is
    whole: what is left of a bucket is left out, other samples in each epoch. Positions count samples, as
    those of the base do, and stand at the ends of batches alone: a run goes on with the same number of
    samples a step.
    """

    def __init__(
        self,
        dataset: Sized,
        buckets: np.ndarray,
        batch_size: int,
        seed: int = 0,
        shuffle: bool = True,
        rank: int = 0,
        world_size: int = 1,
        drop_last: bool = False,
    ) -> None:
        super().__init__(dataset, seed, shuffle, rank, world_size, drop_last)
        self.buckets = buckets
        self.step = batch_size * world_size
        counts = np.bincount(buckets)
        self.total = int((counts - counts % self.step).sum() if drop_last else len(buckets))

    def groups(self) -> list[np.ndarray]:
        """The samples of each step of this epoch, over all ranks."""
        count = len(self.buckets)
        generator = np.random.default_rng(derive(self.seed, self.epoch))
        order = generator.permutation(count) if self.shuffle else np.arange(count)
        groups = []
        for bucket in np.unique(self.buckets):
            members = order[self.buckets[order] == bucket]
            for first in range(0, len(members), self.step):
                group = members[first : first + self.step]
                if len(group) == self.step or not self.drop_last:
                    groups.append(group)
        if self.shuffle:
            groups = [groups[place] for place in generator.permutation(len(groups))]
        return groups

    def order(self) -> np.ndarray:
        return np.concatenate([np.empty(0, dtype=np.int64), *self.groups()])

    def __iter__(self) -> Iterator[list[int]]:  # type: ignore[override]
        start = self.start
        self.start = 0
        self.position = 0
        for group in self.groups():
            self.position += len(group)
            mine = group[self.rank :: self.num_replicas].tolist()
            if self.position > start and mine:
                yield mine

    def __len__(self) -> int:
        """Batches of this rank in a whole epoch."""
        counts = np.bincount(self.buckets)
        whole, left = np.divmod(counts, self.step)
        return int(whole.sum() if self.drop_last else (whole + (left > self.rank)).sum())

    def seek(self, epoch: int, start: int) -> None:
        """As the base's; raises UserError for a place within a batch."""
        super().seek(epoch, start)
        if start % self.step and start != self.total:
            raise UserError(
                f"the run was at sample {start} of an epoch, within a batch of {self.step} over all processes: "
                "continue it with the number of images a step that it had"
            )

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "step": self.step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """As the base's; raises ValueError for another number of samples a step too."""
        if state.get("step") != self.step:
            raise ValueError(
                f"the saved order has {state.get('step')} samples a step; this one has {self.step}"
            )
        super().load_state_dict(state)


class ByBatches(Dataset):
    """A data set whose index is the list of indices of a batch, for loaders whose sampler makes the
    batches.
    """

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, indices: list[int]) -> Any:
        return self.dataset.__getitems__(indices)
