"""Drawing free tokens given those that are kept.

Exact where the order allows it: kept tokens that come first in the order are a prompt, so the law of the rest is
the generator's conditional one. Generators that take any order (`Generator.free_order`: RAR, BAR, RandAR, ARPG,
LPD, MAR, TokenBridge, MaskGIT) begin with whatever is kept. Elsewhere kept tokens behind a free one are put in
their places as the order reaches them: a free token is drawn given those before it, and does not know of later ones.
That is an approximation; several `particles`, weighed by how likely they make the kept tokens and drawn by that
weight (sampling-importance resampling, Rubin 1987), come nearer to the conditional law the more there are.

Shapes: B images, K particles, N tokens, T tokens of an entity.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tessellar.errors import UserError
from tessellar.protocol.choice import race
from tessellar.protocol.condition import Condition
from tessellar.protocol.distribution import Distribution, Logits
from tessellar.protocol.entities import Entities
from tessellar.protocol.generator import Generator
from tessellar.protocol.guidance import Blend, Guidance
from tessellar.protocol.noise import Noise
from tessellar.randomness import derive
from tessellar.sampling.decode import Ancestral, decode_from
from tessellar.sampling.report import Recorder, running
from tessellar.sampling.settings import Sampling


@dataclass(frozen=True)
class Order:
    """The order to draw in: its first `first` entities are kept; `exact`: no other token is."""

    entities: Entities
    first: int
    exact: bool


def order_around(
    generator: Generator, kept: Tensor, noise: Noise, steps: int | None = None
) -> Order:
    """The order in which tokens are drawn around those that are `kept` [N].

    Where the generator takes any order, kept units come first; then its own plan goes on.
    """
    plan = generator.plan(noise, steps)
    if generator.free_order() is not None:
        plan = kept_first(plan, kept)
    of_entities = kept[plan.order.view(-1, plan.length)[0]].split(plan.sizes)
    first = 0
    while first < plan.count and bool(of_entities[first].all()):
        first += 1
    rest = any(bool(part.any()) for part in of_entities[first:])
    return Order(plan, first, exact=not rest)


def in_units(generator: Generator, kept: Tensor) -> Tensor:
    """What can be kept of `kept` [N]: of units of several tokens, those that are kept as a whole."""
    units = generator.free_order()
    if units is None:
        return kept
    whole = torch.zeros_like(kept)
    for places in units.order.split(units.sizes):
        whole[places] = kept[places].all()
    return whole


def kept_first(plan: Entities, kept: Tensor) -> Entities:
    """A plan whose kept tokens [N] come first, in its own order, as entities of one token where all are, else
    as one; the others follow in sets that end where those of the plan end.
    """
    behind = (~kept)[plan.order].to(torch.int8)
    index = behind.argsort(dim=-1, stable=True)
    order = plan.order.gather(-1, index)
    count = int(kept.sum())
    if set(plan.sizes) == {1} or count == 0:
        return Entities(order, plan.sizes)
    ends = [count, *(end for end in plan.ends.tolist() if end > count)]
    sizes = [count, *(after - before for before, after in zip(ends, ends[1:], strict=False))]
    return Entities(order, tuple(sizes))


@torch.no_grad()
def draw_given(
    generator: Generator,
    condition: Condition,
    sampling: Sampling,
    seeds: Sequence[int],
    tokens: Tensor,
    kept: Tensor,
    particles: int = 1,
    blend: Blend | None = None,
    recorder: Recorder | None = None,
) -> Tensor:
    """Tokens [B, N, ...]: those of `tokens` at places that are `kept` [N], the others drawn anew; image b
    depends on `seeds[b]` and its condition alone.

    With several `particles` the order is that of the generator. Raises UserError for a decoding algorithm that
    cannot be given tokens, and for particles of a prediction without a likelihood.
    """
    algorithm = sampling.algorithm
    if not isinstance(algorithm, Ancestral) or algorithm.compile:
        raise UserError(
            f"{type(algorithm).__name__} cannot be given tokens: edits are drawn by Ancestral, not compiled"
        )
    device = next(generator.parameters()).device
    images = torch.arange(len(tokens)).repeat_interleave(particles)
    all_seeds = []
    for seed in seeds:
        all_seeds += [seed, *(derive(seed, number) for number in range(1, particles))]
    noise = Noise(all_seeds, device)
    order = order_around(generator, kept, noise, algorithm.steps)
    schedule = sampling.guidance.guidance().schedule
    if blend is not None:
        blend = Blend(blend.other.select(images.to(device)), blend.share)
    rows = tokens.to(device)[images.to(device)]
    log_weight = torch.zeros(len(images), dtype=torch.float64)
    with running(recorder, len(images), generator.layout.length, device):
        state = generator.start(
            condition.to(device).select(images.to(device)),
            Guidance(schedule, blend),
            order.entities,
        )
        for step in decode_from(
            generator,
            state,
            sampling,
            noise,
            rows,
            first=order.first,
            recorder=recorder,
            kept=kept,
            skip=particles == 1,
        ):
            rows = step.tokens
            if particles > 1:
                entity = torch.full((len(rows),), step.entity)
                places = order.entities.indices(entity, 1)
                drawn = order.entities.get(rows, entity, 1)
                each = token_log_prob(step.distribution, drawn, sampling)
                log_weight += torch.where(kept[places], each.double().cpu(), 0).sum(1)
    if particles == 1:
        return rows
    chosen = chosen_particles(log_weight.view(len(tokens), particles), seeds)
    return rows[(torch.arange(len(tokens)) * particles + chosen).to(device)]


def token_log_prob(distribution: Distribution, values: Tensor, sampling: Sampling) -> Tensor:
    """Log-probability [B, T] of each token of an entity, of logits under the processed law."""
    if isinstance(distribution, Logits):
        probs = sampling.choice.probs(distribution.logits)
        return probs.gather(-1, values[..., None])[..., 0].log()
    found = distribution.log_prob(values)
    if found is None:
        raise UserError("particles need a generator with a likelihood; this one draws real numbers")
    return found


def chosen_particles(log_weight: Tensor, seeds: Sequence[int]) -> Tensor:
    """One particle [B] of each image, drawn by its weight [B, K]; evenly where none has any."""
    none = log_weight.isneginf().all(1, keepdim=True)
    weight = torch.where(none, 0.0, log_weight).softmax(-1)
    noise = Noise([derive(seed, log_weight.shape[1], 0) for seed in seeds])
    return race(weight, noise.exponential(log_weight.shape[1]).to(weight.dtype))
