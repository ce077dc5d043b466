"""Order annealing: the share of randomly ordered samples falls from one to zero in training (RAR,
arXiv 2411.00776).

RAR-L's best of the paper's schedules: all orders random for half of the updates, then a linear fall
to raster order that ends at three quarters. The share is a function of the update's number, so a
resumed run needs no state.
"""

from typing import Any, ClassVar

from lightning import Callback, LightningModule, Trainer

from tessellar.errors import UserError
from tessellar.protocol.arguments import COUNTS, in_ranges


@in_ranges
class OrderAnnealing(Callback):
    """Share 1 until update `start`, linear to 0 at update `end`, then 0.

    Raises UserError for updates out of order, or a generator without orders.
    """

    ranges: ClassVar = {"end": COUNTS}

    def __init__(self, start: int, end: int) -> None:
        if not 0 <= start < end:
            raise UserError(f"order annealing from update {start} to {end}: give 0 <= start < end")
        self.start = start
        self.end = end

    def share(self, update: int) -> float:
        """Share of randomly ordered samples at an update."""
        return min(max((self.end - update) / (self.end - self.start), 0.0), 1.0)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        generator = getattr(getattr(pl_module, "model", None), "generator", None)
        if getattr(generator, "random_order", None) is None:
            raise UserError("OrderAnnealing needs a generator with random orders, such as RAR")
        generator.random_order = self.share(pl_module.updates)  # type: ignore[union-attr, operator]
