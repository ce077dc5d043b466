"""A decoding step as one function that can be compiled whole, and captured as a CUDA graph.

Where all images stand in step, everything that a step reads or writes lies on the device and has
the same shape at every step: the state (`State.fixed`), the counted noise, the tokens and the number
of the entity. So nothing waits for the host: a GPU replays one graph a step. Tokens are those of the
loop in `decode.py`, up to the rounding of what the compiler fuses.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from tessellar.layers.kv_cache import KVCache
from tessellar.protocol.distribution import Draws
from tessellar.protocol.generator import Generator, State
from tessellar.protocol.noise import Noise

BACKEND = "inductor"  # of torch.compile
SHORTEST = 64  # slots that a step attends to at least; doubled as the sequence grows


@dataclass
class Moving:
    """What a step reads and changes, in place."""

    state: State
    tokens: Tensor
    entity: Tensor  # [B] number of the next entity
    noise: Noise

    @property
    def cache(self) -> KVCache:
        assert isinstance(self.state.cache, KVCache)
        return self.state.cache


def step(generator: Generator, moving: Moving, settings: Draws) -> None:
    """Predict the next entity, draw it, put it into the buffer."""
    distribution = generator.predict(moving.state, moving.tokens, count=1, want=1)
    drawn = distribution.sample(settings, moving.noise)
    put = moving.state.entities.put(moving.tokens, moving.entity, 1, drawn)
    moving.tokens.copy_(put)
    moving.entity.add_(1)


def compiled_step() -> Callable[[Generator, Moving, Draws], None]:
    """`step` as one graph, without a break; a mistake that breaks it is an error, not a slow run."""
    return torch.compile(step, fullgraph=True, dynamic=False, backend=BACKEND)


def decode_captured(
    generator: Generator, state: State, settings: Draws, noise: Noise, tokens: Tensor
) -> Tensor:
    """All entities, entity by entity, with a compiled step; on a GPU as replays of CUDA graphs.

    Raises UserError for a generator whose steps have unequal shapes.
    """
    count = state.entities.count
    state = state.fixed(tokens.device)
    batch = state.batch
    entity = torch.zeros(batch, dtype=torch.int64, device=tokens.device)
    moving = Moving(state, tokens.clone(), entity, noise)
    run = compiled_step()
    lengths = reach(state, count)
    for attended in sorted(set(lengths)):
        moving.cache.attended = min(attended, moving.cache.capacity)
        steps = lengths.count(attended)
        if tokens.device.type == "cuda" and steps > 2:
            run(generator, moving, settings)  # compiles
            replay(lambda: run(generator, moving, settings), steps - 1)
        else:
            for _ in range(steps):
                run(generator, moving, settings)
    return moving.tokens


def reach(state: State, count: int) -> list[int]:
    """For each step how many slots it attends to: SHORTEST, doubled until what is written fits. A
    graph serves all steps of one number, and at most half of what it reads is empty.
    """
    assert state.input_ends is not None
    ends = state.input_ends.tolist()
    found = []
    slots = SHORTEST
    for end in ends[1 : count + 1]:
        while slots < end:
            slots *= 2
        found.append(slots)
    return found


def replay(run: Callable[[], None], times: int) -> None:
    """`run` captured as a CUDA graph and replayed; capturing runs nothing."""
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        run()
    for _ in range(times):
        graph.replay()
