"""Parallel Jacobi decoding: speculative windows in several rows of a grid at once (PJD, arXiv
2606.05703).

A row begins when the row above has a share `coverage` of its tokens, and never overtakes it. One
evaluation judges a window of drafts in every begun row; a draft sees the committed tokens of earlier
rows and, of its own row, committed tokens and earlier drafts, never another row's drafts.

    topmost row that is incomplete    as SJD (`speculative.py`): the accepted head, and a token of
                                      the residual behind it
    rows below                        the accepted head alone; what is rejected, and all behind it,
                                      is drawn anew of this evaluation's law and judged by the next

Approximate: tokens of rows above that are not committed yet are missing, and nothing is judged
again when they come. With coverage 1 one row is open at a time and the algorithm is SJD, noise
included. The paper has no code; this follows descriptions of it. Inferred: initial drafts, and that
the window of a single open row runs on into rows that have not begun, as SJD's does.

Shapes: B images, F rows with a window, W slots of a window, K windows of all images, V codes.
"""

from dataclasses import dataclass
from math import ceil
from typing import ClassVar, Literal, NamedTuple, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from tessellar.protocol.choice import Choice, race
from tessellar.protocol.condition import Condition
from tessellar.protocol.distribution import Draws
from tessellar.protocol.generator import Generator, State
from tessellar.protocol.guidance import NO_GUIDANCE, Guidance
from tessellar.protocol.noise import Noise
from tessellar.protocol.ranges import check_name, check_number, check_whole
from tessellar.sampling.acceptance import plain_ratio
from tessellar.sampling.algorithm import Algorithm
from tessellar.sampling.couplings import Verdict, fresh, verify
from tessellar.sampling.drafts import fill
from tessellar.sampling.report import Recorder, forward, running
from tessellar.sampling.rows import laws, rows_of, with_stand_ins
from tessellar.sampling.speculative import LARGEST_WINDOW

FirstDrafts = Literal["random", "uniform"]


class Fronts(NamedTuple):
    """Windows of images, the topmost row first: `start` [B, F] is the first place of each, `size`
    [B, F] how many slots it has; 0 where an image has fewer rows with one.
    """

    start: Tensor
    size: Tensor


def fronts_of(counts: Tensor, columns: int, window: int, enough: int) -> Fronts:
    """The windows of images of which `counts` [B, R] tokens of each row are committed; a row begins
    when the row above has `enough`.
    """
    rows = counts.shape[1]
    above = F.pad(counts[:, :-1], (1, 0), value=columns)
    begun = (above >= enough) & (counts < columns)
    # Where the row above is complete, the row goes to its end; else it does not overtake.
    lead = torch.where(above == columns, columns, above) - counts
    size = torch.where(begun, lead.clamp(max=window), 0)
    start = torch.arange(rows) * columns + counts
    # A single row that has begun: its window runs on into those below.
    is_alone = begun & (begun.sum(1, keepdim=True) == 1)
    size = torch.where(is_alone, (rows * columns - start).clamp(max=window), size)
    first = (size == 0).to(torch.int8).argsort(dim=1, stable=True)
    most = int((size > 0).sum(1).max())
    return Fronts(start.gather(1, first)[:, :most], size.gather(1, first)[:, :most])


@dataclass
class Images:
    """Images being decoded: where they go in the result, what is committed `known` [B, N], the
    buffer [B, N] of committed tokens and drafts, the law [B, N, V] of each draft (0: there is
    none), and rows whose first input was read with a stand-in, `borrowed` [B, R].
    """

    image: Tensor
    state: State
    noise: Noise
    known: Tensor
    tokens: Tensor
    law: Tensor
    borrowed: Tensor

    def select(self, index: Tensor) -> "Images":
        """Some of the images; the caches of the others are dropped."""
        there = index.to(self.tokens.device)
        return Images(
            self.image[index],
            self.state.select(index),
            noise=self.noise.select(index),
            known=self.known[index],
            tokens=self.tokens[there],
            law=self.law[there],
            borrowed=self.borrowed[index],
        )


@dataclass(frozen=True)
class ParallelJacobi(Algorithm):
    """PJD (arXiv 2606.05703): SJD in several rows of a grid at once. Approximate.

    A row begins when the row above has the share `coverage` of its tokens; `window` slots at most
    are judged in a row.
    """

    window: int = 16
    coverage: float = 0.25
    init: FirstDrafts = "random"

    exact: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_whole("window", self.window, 1, LARGEST_WINDOW)
        check_number("coverage", self.coverage, above=0, most=1)
        check_name("init", self.init, get_args(FirstDrafts))

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
        grid = rows_of(generator, "parallel Jacobi decoding")
        layout = generator.layout
        with running(recorder, condition.batch, layout.length, noise.device):
            state = generator.start_places(condition, guidance)
            tokens = layout.blank(condition.batch).to(noise.device)
            images = Images(
                torch.arange(condition.batch),
                state,
                noise,
                known=torch.zeros(tokens.shape, dtype=torch.bool),
                tokens=tokens,
                law=torch.zeros(*tokens.shape, int(layout.vocab().max()), device=noise.device),
                borrowed=torch.zeros(condition.batch, grid[0], dtype=torch.bool),
            )
            result = tokens.clone()
            decoder = _Decoder(generator, settings.choice, self, grid, recorder)
            fronts = decoder.filled(images)
            while True:
                decoder.step(images, fronts)
                finished = images.known.all(1)
                if 2 * int(finished.sum()) >= len(finished):
                    result[images.image.to(result.device)] = images.tokens
                    if bool(finished.all()):
                        return result
                    images = images.select((~finished).nonzero()[:, 0])
                fronts = decoder.filled(images)


@dataclass(frozen=True)
class _Decoder:
    """What does not change between passes."""

    generator: Generator
    choice: Choice
    options: ParallelJacobi
    grid: tuple[int, int]
    recorder: Recorder | None

    def counts(self, images: Images) -> Tensor:
        """Committed tokens of each row [B, R]."""
        return images.known.view(len(images.known), *self.grid).sum(-1)

    def filled(self, images: Images) -> Fronts:
        """The windows of the next pass, with initial drafts in slots that have none."""
        columns = self.grid[1]
        enough = ceil(self.options.coverage * columns)
        fronts = fronts_of(self.counts(images), columns, self.options.window, enough)
        drafts = self.options.window - 1
        for front in range(fronts.size.shape[1]) if drafts else ():
            index = (fronts.size[:, front] > 0).nonzero()[:, 0]
            slot = torch.arange(drafts)
            place = fronts.start[index, front][:, None] + slot
            is_there = (slot < fronts.size[index, front][:, None]).to(images.tokens.device)
            place = place.clamp(max=images.tokens.shape[1] - 1).to(images.tokens.device)
            rows = index.to(place.device)[:, None]
            uniform = images.noise.part(index).uniform(drafts)
            new = fill(
                self.options.init,
                torch.full_like(place, -1),
                known=images.tokens[rows[:, 0]],
                vocab=self.generator.layout.vocab().to(place.device)[place],
                law=images.law[rows[:, 0], 0],
                uniform=uniform,
                exponential=uniform,
            )
            is_empty = is_there & (images.law[rows, place].sum(-1) == 0)
            image, slot = is_empty.nonzero(as_tuple=True)
            where = (rows[image, 0], place[image, slot])
            images.tokens[where] = new.tokens[image, slot]
            images.law[where] = new.law[image, slot]
        return fronts

    def step(self, images: Images, fronts: Fronts) -> None:
        """One evaluation of the generator: predict all windows, judge them, commit."""
        batch, most = fronts.size.shape
        columns = self.grid[1]
        slots = self.options.window
        device = images.tokens.device
        counts = self.counts(images)
        row = fronts.start.div(columns, rounding_mode="floor").clamp(max=self.grid[0] - 1)
        is_open = fronts.size > 0

        # Rows that begin now, below a row that is incomplete; the row above them is told.
        above = F.pad(counts[:, :-1], (1, 0), value=columns)
        begins = is_open & (fronts.start % columns == 0) & (above.gather(1, row) < columns)
        lends = torch.zeros_like(images.borrowed)
        image, front = begins.nonzero(as_tuple=True)
        lends[image, row[image, front] - 1] = True
        fed = with_stand_ins(images.tokens, counts, lends)

        slot = torch.arange(slots)
        is_slot = slot < fronts.size[..., None]
        places = torch.where(is_slot, fronts.start[..., None] + slot, -1)
        # The first input of a window is final; all other inputs are drafts of their row.
        groups = torch.arange(1, most + 1)[:, None].repeat(1, slots)
        groups[:, 0] = 0
        repaid = images.borrowed & (above == columns)
        again = torch.where(repaid, torch.arange(self.grid[0]) * columns, -1)
        again = again.sort(1, descending=True).values[:, : int(repaid.sum(1).max())]
        window = torch.cat([places.flatten(1), again], 1)
        groups = F.pad(groups.flatten(), (0, again.shape[1])).expand(batch, -1)
        with forward(self.recorder, device):
            distribution = self.generator.predict_places(images.state, fed, window, groups)
        p = laws(distribution, self.choice, self.generator)[:, : most * slots]

        # Windows one after the other: the topmost of all images, then the second ones.
        front, image = is_open.T.nonzero(as_tuple=True)
        p = p.view(batch, most, slots, -1)[image.to(device), front.to(device)]
        place = places[image, front]
        size = fronts.size[image, front]
        verdict = self.judge(images, p, image, front, place)
        accepted = verdict.accepted.cpu()
        is_top = front == 0
        committed = torch.minimum(accepted + is_top, size)

        is_new = torch.zeros_like(images.known)
        is_committed = slot < committed[:, None]
        is_new[image[:, None].expand_as(place)[is_committed], place[is_committed]] = True
        written, of_slot = (place >= 0).nonzero(as_tuple=True)
        where = (image[written].to(device), place[written, of_slot].to(device))
        chosen = (written.to(device), of_slot.to(device))
        images.tokens[where] = verdict.tokens[..., 0][chosen]
        images.law[where] = verdict.law[:, :, 0][chosen]
        images.known = images.known | is_new

        # Inputs stay whose token is committed: those of the head, and the one behind it.
        keep = torch.zeros(batch, most, slots, dtype=torch.bool)
        keep[image, front] = slot <= committed[:, None]
        keep = F.pad(keep.flatten(1), (0, again.shape[1]), value=True)
        images.state.keep_places(keep & (window >= 0))
        begins_for_good = begins[image, front] & (committed > 0)
        images.borrowed = images.borrowed & ~repaid
        images.borrowed[image[begins_for_good], row[image, front][begins_for_good]] = True
        if self.recorder is not None:
            self._record(
                self.recorder,
                counts,
                is_new=is_new,
                accepted=accepted,
                size=size,
                is_top=is_top,
                committed=committed,
                p=p,
            )

    def judge(
        self, images: Images, p: Tensor, image: Tensor, front: Tensor, place: Tensor
    ) -> Verdict:
        """Verdicts on windows [K, W] by laws p [K, W, V]; noise is drawn for full windows."""
        slots = p.shape[1]
        device = p.device
        uniforms = []
        exponentials = []
        for number in range(int(front.max()) + 1):
            part = images.noise.part(image[front == number])
            uniforms.append(part.uniform(slots - 1, 1))
            exponentials.append(part.exponential(slots, 1, p.shape[-1]))
        uniform = F.pad(torch.cat(uniforms), (0, 0, 0, 1))
        exponential = torch.cat(exponentials)
        rows = image.to(device)[:, None]
        index = place.clamp(min=0).to(device)
        # The last slot of a full window is a fresh sample; slots past the end have no draft.
        has_draft = (place >= 0) & (torch.arange(slots) < slots - 1)
        law = images.law[rows, index] * has_draft.to(device)[..., None]
        p = p[:, :, None]
        verdict = verify(
            p,
            law[:, :, None],
            draft=images.tokens[rows, index][..., None],
            uniform=uniform,
            exponential=exponential,
            acceptance=plain_ratio,
            coupling=fresh,
        )
        # Below the topmost row a rejected token is postponed, so it is a sample of p, too.
        anew = race(p, exponential)
        is_rejected = torch.arange(slots, device=device) == verdict.accepted[:, None]
        is_below = (front > 0).to(device)[:, None]
        tokens = torch.where((is_rejected & is_below)[..., None], anew, verdict.tokens)
        return verdict._replace(tokens=tokens)

    def _record(
        self,
        recorder: Recorder,
        counts: Tensor,
        is_new: Tensor,
        accepted: Tensor,
        size: Tensor,
        is_top: Tensor,
        committed: Tensor,
        p: Tensor,
    ) -> None:
        """One evaluation of every image that is not finished; acceptance by slot is that of the
        topmost windows.
        """
        alive = counts.sum(1) < is_new.shape[1]
        drafted = size[is_top].clamp(max=self.options.window - 1)
        recorder.window(
            counts.sum(1)[alive],
            torch.minimum(accepted[is_top], drafted),
            is_new.sum(1)[alive],
            drafted,
        )
        slot = torch.arange(p.shape[1])
        flags = [
            (slot < n[:, None]).to(p.device)
            for n in (torch.minimum(accepted, committed), committed)
        ]
        recorder.certainty(p, *flags)
