"""How a run's checkpoints are read and written: one file, or several by torch.distributed.checkpoint."""

from concurrent.futures import Future
from pathlib import Path
from typing import Any

from lightning.fabric.plugins import TorchCheckpointIO

from tessellar.checkpoints.sharded import read_sharded, write_sharded


class RunFiles(TorchCheckpointIO):
    """Lightning's reading and writing of checkpoints, with those of several files beside it.

    `files` says which kind is written; both are read. `under_way` is the write that goes on after
    an asynchronous one returned.
    """

    def __init__(self, files: str = "whole") -> None:
        self.files = files
        self.under_way: Future[Any] | None = None

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None
    ) -> None:
        self.save(checkpoint, path, together=False)

    def save(self, checkpoint: dict[str, Any], path: Any, together: bool) -> None:
        """Write, by all processes `together` or by the one that calls."""
        self.under_way = None
        if self.files == "whole":
            super().save_checkpoint(checkpoint, path)
        else:
            asynchronous = self.files == "asynchronous"
            self.under_way = write_sharded(checkpoint, Path(path), together, asynchronous)

    def load_checkpoint(
        self, path: Any, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        if Path(path).is_dir():
            return read_sharded(Path(path))
        return super().load_checkpoint(path, map_location, weights_only=weights_only)
