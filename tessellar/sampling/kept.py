"""A set of samples that grows in a folder: what was made stays, so that an interrupted set goes on, and
machines without a process group may share one.

Image i depends on its seed alone, so any part of a set can be made anywhere, at any time. `plan.json`
says what the set is: a folder is only continued by the same plan. An image appears under its name
when it is whole.
"""

import json
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange
from PIL import Image
from torch import Tensor

from tessellar import distributed
from tessellar.errors import UserError, writing
from tessellar.plain_data import read_json
from tessellar.sampling.output import save_png

PLAN = "plan.json"


class KeptSet:
    """`folder` holds the images of `plan` (plain data) that are made; `name_of(i)` is the file of image i.

    All processes make one. Raises UserError where the folder holds another set, or no set.
    """

    def __init__(self, folder: Path, plan: dict[str, Any], name_of: Callable[[int], str]) -> None:
        self.folder = folder
        self.name_of = name_of
        failure = None
        if distributed.rank() == 0:
            try:
                _begin(folder, plan)
            except UserError as error:
                failure = str(error)
        failure = distributed.broadcast(failure)
        if failure is not None:
            raise UserError(failure)
        self._there = set(os.listdir(folder))

    def missing(self, indices: Iterable[int]) -> list[int]:
        """Those of the images that were not there when this set was opened, or last looked at."""
        return [index for index in indices if self.name_of(index) not in self._there]

    def look(self) -> None:
        """See what other processes and machines have made meanwhile."""
        self._there = set(os.listdir(self.folder))

    def write(self, indices: Sequence[int], images: Tensor) -> None:
        """Images `indices`, uint8 [b, 3, H, W]."""
        for index, image in zip(indices, images, strict=True):
            name = self.name_of(index)
            staged = self.folder / f".{name}.{os.getpid()}.png"
            save_png(image, staged)
            staged.replace(self.folder / name)
            self._there.add(name)

    def read(self, index: int) -> Tensor:
        """Image `index`, uint8 [3, H, W]; raises UserError for a damaged file."""
        path = self.folder / self.name_of(index)
        try:
            with Image.open(path) as picture:
                pixels = np.array(picture.convert("RGB"))
        except Exception as error:  # Pillow raises many kinds for damaged files
            reason = " ".join(str(error).split())[:200]
            raise UserError(
                f"{path} cannot be read ({reason}); delete it: it is made again"
            ) from error
        return rearrange(torch.from_numpy(pixels), "h w c -> c h w")


def _begin(folder: Path, plan: dict[str, Any]) -> None:
    """Write the plan, or compare it with the one that is there."""
    wanted = json.loads(json.dumps(plan))
    path = folder / PLAN
    if path.is_file():
        there = read_json(path)
        if there != wanted:
            known = there if isinstance(there, dict) else {}
            keys = [key for key in wanted if known.get(key) != wanted[key]]
            raise UserError(
                f"{folder} holds images of another set (other {', '.join(keys)[:200]}): continue it with its own "
                "command, delete it, or choose another place"
            )
        return
    if folder.is_dir() and any(folder.iterdir()):
        raise UserError(f"{folder} is not empty and holds no {PLAN}: choose another place")
    staged = folder / f"{PLAN}.{os.getpid()}"
    with writing(path, unfinished=staged):
        folder.mkdir(parents=True, exist_ok=True)
        staged.write_text(json.dumps(wanted, indent=1) + "\n", encoding="utf-8")
        staged.replace(path)


def shard_of(text: str | None) -> tuple[int, int]:
    """(0, 4) of "1/4"; (0, 1), which is all, of None. Raises UserError for anything else: an empty
    text is a job script's variable that is not set.
    """
    if text is None:
        return 0, 1
    number, slash, count = text.partition("/")
    plain = number.isdecimal() and count.isdecimal()
    if not slash or not plain or not 1 <= int(number) <= int(count) <= 1_000_000:
        raise UserError(f"--shard {text!r}: shards are 1/4, 2/4, 3/4 and 4/4, for example")
    return int(number) - 1, int(count)


def own_part(total: int, shard: tuple[int, int]) -> list[int]:
    """Which of `total` images this process makes of its shard: every image is in one shard, and there
    in one process.
    """
    number, count = shard
    mine = range(number, total, count)
    return list(mine[distributed.rank() :: distributed.world_size()])
