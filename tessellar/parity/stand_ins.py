"""What replays of several systems need in place of chance, of networks that were not recorded, and
of a training step.

Shapes: B images, N tokens, T tokens of an entity, V vocabulary.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tessellar.errors import UserError
from tessellar.parity.recording import Outputs, Recording
from tessellar.protocol.choice import Choice
from tessellar.protocol.condition import Condition
from tessellar.protocol.distribution import Distribution, Logits
from tessellar.protocol.entities import Entities
from tessellar.protocol.generator import Generator, State
from tessellar.protocol.guidance import NO_GUIDANCE, Guidance
from tessellar.protocol.noise import Noise
from tessellar.sampling.decode import Step, decode_from
from tessellar.sampling.settings import GREEDY, Sampling


class RecordedNoise(Noise):
    """Recorded draws [B, *shape], handed out one after the other, of whatever law they are."""

    def __init__(self, draws: Iterable[Tensor]) -> None:
        super().__init__([])
        self.draws = iter(draws)

    def _next(self, *shape: int) -> Tensor:
        drawn = next(self.draws, None)
        if drawn is None:
            raise UserError(
                f"noise of shape {shape} is asked for, but all that was recorded is used"
            )
        if drawn.shape[1:] != shape:
            raise UserError(
                f"noise of shape {shape} is asked for, recorded is {tuple(drawn.shape[1:])}"
            )
        return drawn

    def uniform(self, *shape: int) -> Tensor:
        return self._next(*shape)

    def normal(self, *shape: int) -> Tensor:
        return self._next(*shape)

    def exponential(self, *shape: int) -> Tensor:
        return self._next(*shape)


class Fixed(nn.Module):
    """A network whose recorded output stands for it, whatever it is given (a perceptual distance)."""

    def __init__(self, output: Tensor) -> None:
        super().__init__()
        self.output = output

    def forward(self, *given: Any) -> Tensor:
        return self.output


class FixedDiscriminator(nn.Module):
    """Recorded logits: `real` of these very images, `fake` of all others."""

    def __init__(self, images: Tensor, real: Tensor, fake: Tensor) -> None:
        super().__init__()
        self.images = images
        self.real = real
        self.fake = fake

    def forward(self, images: Tensor) -> Tensor:
        return self.real if images is self.images else self.fake


class Calls:
    """First argument and result of every call of a module, from now on."""

    def __init__(self, module: nn.Module) -> None:
        self.inputs: list[Tensor] = []
        self.outputs: list[Tensor] = []
        module.register_forward_hook(self._keep)

    def _keep(self, module: nn.Module, given: tuple[Any, ...], result: Any) -> None:
        self.inputs.append(given[0])
        self.outputs.append(result)


class Decoded(NamedTuple):
    """Tokens [B, N], and the guided logits [B, n V] of every decoded entity."""

    tokens: Tensor
    logits: Tensor


def logits_of(distribution: Distribution) -> Tensor:
    """Logits [B, T, V] of a prediction that has them."""
    assert isinstance(distribution, Logits), f"{type(distribution).__name__} has no logits"
    return distribution.logits


@torch.no_grad()
def greedy(
    generator: Generator,
    condition: Condition,
    guidance: Guidance = NO_GUIDANCE,
    tokens: Tensor | None = None,
    first: int = 0,
    last: int | None = None,
) -> Decoded:
    """Most likely tokens of entities `first` .. `last` (exclusive; all), behind those given in
    `tokens` [B, N].
    """
    state = generator.start(condition, guidance)
    noise = Noise(range(condition.batch))
    return decoded(generator, state, GREEDY, noise, tokens=tokens, first=first, last=last)


@torch.no_grad()
def drawn(
    generator: Generator,
    condition: Condition,
    guidance: Guidance,
    choice: Choice,
    uniforms: Tensor,
    entities: Entities | None = None,
) -> Decoded:
    """Tokens by the inverse cumulative distribution of `choice` at recorded uniforms [B, N], in
    generation order.
    """
    state = generator.start(condition, guidance, entities)
    settings = Sampling(choice=InverseCdf(choice.temperature, choice.top_k, choice.top_p))
    draws = uniforms.split(state.entities.sizes, dim=1)
    return decoded(generator, state, settings, RecordedNoise(draws))


@torch.no_grad()
def decoded(
    generator: Generator,
    state: State,
    settings: Sampling,
    noise: Noise,
    tokens: Tensor | None = None,
    first: int = 0,
    last: int | None = None,
) -> Decoded:
    """What the decoding loop makes of a state, with the logits of its steps."""
    logits = []
    for step in steps_of(generator, state, settings, noise, tokens=tokens, first=first, last=last):
        tokens = step.tokens
        logits.append(logits_of(step.distribution))
    assert tokens is not None, "no entity was decoded"
    return Decoded(tokens, torch.cat(logits, dim=1))


def steps_of(
    generator: Generator,
    state: State,
    settings: Sampling,
    noise: Noise,
    tokens: Tensor | None = None,
    first: int = 0,
    last: int | None = None,
) -> Iterator[Step]:
    """The steps of the decoding loop; nothing is given unless `tokens` [B, N] are."""
    if tokens is None:
        tokens = generator.layout.blank(state.batch)
    return decode_from(generator, state, settings, noise, tokens, first=first, last=last)


class InverseCdf(Choice):
    """A token is the number of vocabulary entries whose cumulative probability is at most a
    uniform draw.
    """

    def draw(self, logits: Tensor, noise: Noise) -> Tensor:
        uniform = noise.uniform(*logits.shape[1:-1])[..., None]
        below = self.probs(logits).cumsum(-1) <= uniform
        return below.sum(-1).clamp(max=logits.shape[-1] - 1)


def choice_of(settings: Mapping[str, Any]) -> Choice:
    """Temperature and filters of recorded settings; what they do not name, or name as 0, is off."""
    return Choice(
        temperature=settings.get("temperature", 1.0),
        top_k=settings.get("top_k") or 0,
        top_p=settings.get("top_p") or 1.0,
    )


def gradient_norm(loss: Tensor, module: nn.Module) -> Tensor:
    """2-norm of the gradient of `loss` with respect to all parameters of a module that it depends
    on.
    """
    gradients = torch.autograd.grad(
        loss, list(module.parameters()), retain_graph=True, allow_unused=True
    )
    return nn.utils.get_total_norm([gradient for gradient in gradients if gradient is not None])


def gradient_norms(
    loss: Tensor, module: nn.Module, to_official: Callable[[dict[str, Tensor]], dict[str, Tensor]]
) -> dict[str, Tensor]:
    """2-norm of the gradient of `loss` by official name of each parameter that it depends on;
    `to_official` puts our names back into theirs.
    """
    named = dict(module.named_parameters())
    found = torch.autograd.grad(loss, list(named.values()), retain_graph=True, allow_unused=True)
    gradients = {
        name: gradient for name, gradient in zip(named, found, strict=True) if gradient is not None
    }
    return {name: gradient.norm() for name, gradient in to_official(gradients).items()}


def recorded_norms(
    recording: Recording,
    pattern: str,
    loss: Tensor,
    module: nn.Module,
    to_official: Callable[[dict[str, Tensor]], dict[str, Tensor]],
) -> Outputs:
    """The norms of `gradient_norms` that are recorded: outputs whose setting `grad_to` names the
    parameter.
    """
    norms = gradient_norms(loss, module, to_official)
    return {name: norms[settings["grad_to"]] for name, settings in recording.each(pattern)}
