"""The states of all global random numbers (python, numpy, torch, every GPU), as tensors and plain
data.

Lightning saves none of them. A checkpoint is opened without unpickling code, so numpy's state is
kept as a tensor.
"""

import random
from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import torch

from tessellar import distributed
from tessellar.randomness import derive

State = dict[str, Any]


def capture() -> State:
    """The states of this process."""
    name, keys, position, has_gauss, gauss = cast(
        tuple[str, np.ndarray, int, int, float], np.random.get_state()
    )
    return {
        "python": random.getstate(),
        "numpy": (name, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, gauss),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
    }


def restore(state: State) -> None:
    """Put states of `capture` back; states of GPUs only where their number is the same."""
    version, keys, gauss = state["python"]
    random.setstate((version, tuple(keys), gauss))
    name, numbers, *rest = state["numpy"]
    np.random.set_state((name, numbers.cpu().numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"].cpu())
    if len(state["cuda"]) == torch.cuda.device_count() and state["cuda"]:
        torch.cuda.set_rng_state_all([s.cpu() for s in state["cuda"]])


def capture_all() -> list[State]:
    """The states of every process, in the order of ranks; a collective call."""
    return distributed.all_gather(capture())


def restore_own(states: Sequence[State]) -> None:
    """Put this process's states back. With another number of processes the first keeps its own, since it draws what all
    share (restarted codes); each of the others takes a new stream derived from it, the same in every such resume."""
    if len(states) == distributed.world_size():
        return restore(states[distributed.rank()])
    restore(states[0])
    if distributed.rank() == 0:
        return
    seed = derive(int(torch.randint(2**62, (1,))), distributed.rank())
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def new_seeds(count: int) -> list[int]:
    """Seeds of so many images, from the global random numbers."""
    return torch.randint(2**62, (count,)).tolist()
