"""Watching an image appear: after each evaluation of the generator, what is known of it.

Algorithms that go entity by entity are watched while they draw. Those that judge drafts in order
(speculative ones) are watched afterwards: what they commit is never changed, so behind each evaluation
the first entities are those of the finished image. Of those that work at several places at once
(MaskGIT, ZipAR, ParallelJacobi) the finished image is shown, with how much each evaluation committed.

Shapes: N tokens, T tokens of an entity.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from tessellar.errors import UserError
from tessellar.pipeline import ImageGenerator
from tessellar.protocol.choice import Choice
from tessellar.protocol.condition import Condition
from tessellar.protocol.distribution import Chained, Distribution, Logits, with_values
from tessellar.protocol.entities import Entities, take
from tessellar.protocol.noise import Noise
from tessellar.sampling.confidence import MaskGIT
from tessellar.sampling.decode import EntityByEntity
from tessellar.sampling.parallel_jacobi import ParallelJacobi
from tessellar.sampling.prepare import prepared
from tessellar.sampling.report import Recorder, running
from tessellar.sampling.run import as_uint8, check_seed
from tessellar.sampling.settings import Sampling
from tessellar.sampling.zipar import ZipAR
from tessellar.text.conditioners import TextConditioner

SEVERAL_PLACES = (MaskGIT, ZipAR, ParallelJacobi)
UNKNOWN = 200  # grey level of what is not drawn yet


class Moment(NamedTuple):
    """What is known behind some evaluations: an image uint8 [3, H, W] (None where so few tokens are
    none), tokens [N, ...], which of them are known [N], their entropies in nats [N] (NaN where they are
    not known), and how many tokens each evaluation committed.
    """

    image: Tensor | None
    tokens: Tensor
    known: Tensor
    entropy: Tensor
    committed: tuple[int, ...]

    @property
    def is_finished(self) -> bool:
        return bool(self.known.all())

    @property
    def summary(self) -> str:
        """Tokens, evaluations, tokens an evaluation, entropy, in one line."""
        there = int(self.known.sum())
        evaluations = len(self.committed)
        text = f"{there} of {len(self.known)} tokens in {evaluations} evaluations"
        if evaluations:
            text += f": {there / evaluations:.2f} tokens an evaluation"
        entropies = self.entropy[~self.entropy.isnan()]
        if len(entropies):
            text += f"; {float(entropies.mean()):.2f} nats a token"
        return text


Show = Callable[[Moment], None]


@dataclass(frozen=True)
class Wish:
    """What to draw: a class by name or id, or a prompt, how, and by which seed."""

    subject: str
    sampling: Sampling = Sampling()  # noqa: RUF009
    seed: int = 0


@dataclass
class CommitRecorder(Recorder):
    """Notes how many entities each evaluation commits, of one image."""

    commits: list[int] = field(default_factory=list)

    def window(self, first: Tensor, accepted: Tensor, committed: Tensor, drafted: Tensor) -> None:
        super().window(first, accepted, committed, drafted)
        self.commits += committed.tolist()


def condition_of(model: ImageGenerator, subject: str) -> Condition:
    """The condition, one row, of a class by name or id, or of a prompt.

    Raises UserError for what is no class, or an empty prompt.
    """
    if isinstance(model.conditioner, TextConditioner):
        if not subject.strip():
            raise UserError("write a prompt first")
        return model.conditioner.of_texts([subject.strip()])
    labels = model.class_ids(subject)
    if len(labels) > 1:
        raise UserError(f"{subject!r} names {len(labels)} classes; name one")
    return model.class_condition(labels)


def watch(model: ImageGenerator, wish: Wish, show: Show) -> Moment:
    """Draw one image, call `show` with every moment of it, and return the last one.

    Its tokens are those of `sample.py` for the same seed and settings. Raises UserError for a wish that
    the model does not take.
    """
    check_seed(wish.seed)
    condition = condition_of(model, wish.subject).to(model.device)
    mode = model.generator.training
    model.generator.eval()
    try:
        with torch.no_grad(), prepared(model.generator):
            algorithm = wish.sampling.algorithm
            if isinstance(algorithm, EntityByEntity) and not algorithm.compile:
                return _while_drawing(model, condition, wish, algorithm, show)
            return _afterwards(model, condition, wish, show)
    finally:
        model.generator.train(mode)


def _while_drawing(
    model: ImageGenerator,
    condition: Condition,
    wish: Wish,
    algorithm: EntityByEntity,
    show: Show,
) -> Moment:
    generator = model.generator
    noise = Noise([wish.seed], model.device)
    recorder = CommitRecorder()
    tokens = generator.layout.blank(1).to(model.device)
    moment = Moment(None, tokens[0], *_nothing(generator.layout.length), ())
    with running(recorder, 1, generator.layout.length, noise.device):
        state = generator.start(
            condition, wish.sampling.guidance.guidance(), algorithm.plan(generator, noise)
        )
        steps = algorithm.steps_of(generator, state, wish.sampling, noise, tokens, recorder)
        known = moment.known.clone()
        entropy = moment.entropy.clone()
        for step in steps:
            number = torch.tensor([step.entity])
            places = state.entities.indices(number, 1)[0].cpu()
            drawn = state.entities.get(step.tokens, number, 1)
            known[places] = True
            entropy[places] = entropies(step.distribution, drawn, wish.sampling.choice)
            moment = Moment(
                partial_image(model, step.tokens, known),
                step.tokens[0].cpu(),
                known.clone(),
                entropy.clone(),
                sizes_of(recorder.commits, state.entities),
            )
            show(moment)
    return moment


def _afterwards(model: ImageGenerator, condition: Condition, wish: Wish, show: Show) -> Moment:
    generator = model.generator
    recorder = CommitRecorder()
    tokens = wish.sampling.tokens(generator, condition, [wish.seed], recorder)
    plan = generator.entities
    everything = torch.ones(plan.length, dtype=torch.bool)
    if isinstance(wish.sampling.algorithm, SEVERAL_PLACES):
        # Their evaluations commit tokens, not entities of the plan.
        entropy = torch.full((plan.length,), torch.nan)
        image = as_uint8(model.decode(tokens))[0]
        moment = Moment(image, tokens[0].cpu(), everything, entropy, tuple(recorder.commits))
        show(moment)
        return moment
    entropy = entropies_given(model, condition, tokens, wish.sampling)
    done = 0
    moment = Moment(None, tokens[0].cpu(), *_nothing(plan.length), ())
    for count in range(1, len(recorder.commits) + 1):
        done += recorder.commits[count - 1]
        known = torch.zeros(plan.length, dtype=torch.bool)
        known[plan.order.view(-1, plan.length)[0, : int(plan.ends[done])]] = True
        moment = Moment(
            partial_image(model, tokens, known),
            tokens[0].cpu(),
            known,
            torch.where(known, entropy, torch.nan),
            sizes_of(recorder.commits[:count], plan),
        )
        show(moment)
    return moment


def _nothing(length: int) -> tuple[Tensor, Tensor]:
    """No token known, no entropy either."""
    return torch.zeros(length, dtype=torch.bool), torch.full((length,), torch.nan)


def sizes_of(commits: Sequence[int], entities: Entities) -> tuple[int, ...]:
    """Tokens that evaluations committed, of the numbers of entities that they did."""
    done = 0
    sizes = []
    for count in commits:
        sizes.append(int(entities.ends[done + count] - entities.ends[done]))
        done += count
    return tuple(sizes)


def partial_image(model: ImageGenerator, tokens: Tensor, known: Tensor) -> Tensor | None:
    """The image uint8 [3, H, W] of tokens [1, N, ...] of which some are known [N].

    Of tokens that decode from any prefix, that of the first ones; of a grid the cells that are not
    known are grey. None where neither is so and some are missing.
    """
    layout = model.generator.layout
    if bool(known.all()):
        return as_uint8(model.decode(tokens))[0]
    first = int(known.long().cumprod(0).sum())
    if layout.min_prefix is not None and first == int(known.sum()):
        if first < layout.min_prefix:
            return None
        return as_uint8(model.decode(tokens[:, :first]))[0]
    if layout.grid is None:
        return None
    image = as_uint8(model.decode(tokens))[0]
    cells = known.view(1, 1, *layout.grid).float()
    shown = F.interpolate(cells, image.shape[1:], mode="nearest")[0, 0].bool()
    return torch.where(shown, image, torch.full_like(image, UNKNOWN))


def entropies(distribution: Distribution, drawn: Tensor, choice: Choice) -> Tensor:
    """Entropies in nats [T] of the processed laws that the tokens `drawn` [1, T, ...] come from.

    Of tokens of several indices, the sum over them, each given those before it. NaN for real numbers.
    """
    if isinstance(distribution, Logits):
        return torch.special.entr(choice.probs(distribution.logits)).sum(-1)[0].cpu()
    if not isinstance(distribution, Chained):
        return torch.full((drawn.shape[1],), torch.nan)
    walk = distribution.walk()
    known = torch.zeros_like(drawn)
    total = torch.zeros(drawn.shape[1])
    for stage, members in enumerate(distribution.stages):
        laws = distribution.choice_at(choice, stage).probs(walk(known, stage))
        total += torch.special.entr(laws).sum((-1, -2))[0].cpu()
        known = with_values(known, members, drawn[..., list(members)])
    return total


def entropies_given(
    model: ImageGenerator, condition: Condition, tokens: Tensor, sampling: Sampling
) -> Tensor:
    """Entropies in nats [N] of the law of each token given those before it, from one evaluation."""
    generator = model.generator
    state = generator.start(condition, sampling.guidance.guidance())
    distribution = generator.predict(state, tokens, state.entities.count)
    order = state.entities.order.view(-1, state.entities.length)[:1]
    found = entropies(distribution, take(tokens, order), sampling.choice)
    placed = torch.empty(len(found))
    placed[order[0].cpu()] = found.float()
    return placed
