"""ZipAR: rows of a grid are generated beside each other, each some tokens behind the row above
(arXiv 2412.04062).

A row begins when the row above has `window` tokens, then all begun rows get one token an
evaluation: C + (R - 1) * window evaluations for R rows of C tokens. Approximate: a token does not
see what the row above lacks at that time. With a window of C it is plain decoding, noise included.

    window 2     0 1 2 3 4 5        number of the evaluation that gives each token
                 2 3 4 5 6 7
                 4 5 6 7 8 9

Different from the official code: places that are not generated yet are hidden. There they are in
the buffer as keys and values of zero, which nothing masks, so that every query gives them some of
its attention; `exact_official` does the same.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tessellar.layers.kv_cache import PlacedCache
from tessellar.protocol.choice import race
from tessellar.protocol.condition import Condition
from tessellar.protocol.distribution import Draws
from tessellar.protocol.entities import put
from tessellar.protocol.generator import Generator
from tessellar.protocol.guidance import NO_GUIDANCE, Guidance
from tessellar.protocol.noise import Noise
from tessellar.protocol.ranges import check_whole
from tessellar.sampling.algorithm import Algorithm
from tessellar.sampling.report import Recorder, forward, running
from tessellar.sampling.rows import laws, rows_of, with_stand_ins


@dataclass(frozen=True)
class ZipAR(Algorithm):
    """ZipAR (arXiv 2412.04062): every row of a grid begins `window` tokens behind the row above.
    Approximate.

    `exact_official`: places that are not generated yet take part in attention, as released.
    """

    window: int = 8
    exact_official: bool = False

    exact: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_whole("window of ZipAR", self.window, least=1)

    @torch.no_grad()
    def __call__(
        self,
        generator: Generator,
        condition: Condition,
        settings: Draws,
        noise: Noise,
        guidance: Guidance = NO_GUIDANCE,
        recorder: Recorder | None = None,
    ) -> Tensor:
        rows, columns = rows_of(generator, "ZipAR")
        with running(recorder, condition.batch, generator.layout.length, noise.device):
            state = generator.start_places(condition, guidance)
            if self.exact_official and isinstance(state.cache, PlacedCache):
                state.cache.reveal()
            tokens = generator.layout.blank(condition.batch).to(noise.device)
            delay = min(self.window, columns)
            for now in range((rows - 1) * delay + columns):
                # Row r has been given this many tokens by the evaluations before this one.
                counts = (now - delay * torch.arange(rows)).clamp(0, columns)
                active = ((counts < columns) & (delay * torch.arange(rows) <= now)).nonzero()[:, 0]
                places = active * columns + counts[active]
                # A row that was completed last time: the row below began with a stand-in.
                complete = (delay * torch.arange(rows - 1) + columns == now).nonzero()[:, 0]
                again = (complete[counts[complete + 1] > 0] + 1) * columns

                # Only the first token of a row reads the last place of the row above.
                ahead = torch.ones(condition.batch, rows, dtype=torch.bool)
                fed = with_stand_ins(tokens, counts.expand(condition.batch, -1), ahead)
                window = torch.cat([places, again]).expand(condition.batch, -1)
                with forward(recorder, tokens.device):
                    distribution = generator.predict_places(state, fed, window)
                state.keep_places(torch.ones_like(window, dtype=torch.bool))

                p = laws(distribution, settings.choice, generator)[:, : len(places)]
                drawn = race(p, noise.exponential(*p.shape[1:]))
                index = places.expand(condition.batch, -1).to(tokens.device)
                tokens = put(tokens, index, drawn, torch.ones_like(index, dtype=torch.bool))
                if recorder is not None:
                    begun = torch.full((condition.batch,), int(counts.sum()))
                    nothing = torch.zeros_like(begun)
                    recorder.window(begun, nothing, nothing + len(places), nothing)
                    everything = torch.ones(p.shape[:-1], dtype=torch.bool, device=p.device)
                    recorder.certainty(p, ~everything, everything)
        return tokens
