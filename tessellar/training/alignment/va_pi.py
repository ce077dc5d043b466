"""VA-pi: a generator is aligned with pixels under teacher forcing (arXiv 2512.19680), and the two
baselines of its table.

The tokens of a real image are read, every token is drawn anew given the true ones before it, and the
tokenizer's decoder shows what that looks like: minus the distance to the image is the reward of a
policy gradient, with a cross-entropy of the true tokens beside it. No roll-out and no reward model.

Different from the released code: all samples of an image share one forward pass where no dropout is
at work, and a sample's ratio is taken token by token as there, not of the sequence as in the paper.
"""

from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tessellar.errors import UserError
from tessellar.models.parts.prefix_transformer import generated
from tessellar.pipeline import ImageGenerator
from tessellar.protocol.arguments import AMOUNTS, SHARES, SIZES, in_ranges
from tessellar.protocol.choice import Choice
from tessellar.protocol.condition import Condition
from tessellar.protocol.distribution import Distribution, Logits
from tessellar.protocol.tokenizer import QuantizedTokenizer, Tokenizer
from tessellar.training.alignment.drawing import drawn_groups, require_group, require_warm
from tessellar.training.alignment.method import (
    AlignmentMethod,
    Batch,
    Terms,
    decoded,
    in_mode,
    score,
    ungenerated,
)
from tessellar.training.alignment.policy import (
    clipped_surrogate,
    group_advantages,
    k3,
    log_probs,
    log_probs_of_groups,
    policy_facts,
    tempered,
)
from tessellar.training.alignment.rewards import Drawn, ReconstructionReward, Reward, repeated
from tessellar.training.methods.context_noise import ContextNoise
from tessellar.training.methods.generated_tokens import RollOut, decoder_parameters

Mode = Literal["eval", "train", "twice"]


def read_context(noise: ContextNoise | None, model: ImageGenerator, batch: Batch) -> Tensor:
    """The true tokens as teacher forcing reads them: with noise, where there is any."""
    if noise is None:
        return batch.tokens
    return noise.corrupt(batch.tokens, model.generator.layout, batch.progress)


def targets_of(model: ImageGenerator, batch: Batch) -> Tensor:
    """The true tokens, in generation order."""
    return generated(batch.tokens, model.generator.entities)


@in_ranges
class VAPi(AlignmentMethod):
    """`group_size` draws an image; the same noisy context serves drawing and cross-entropy.

    `mode` says where the new log-probabilities come from. `eval`: the pass that the samples were
    drawn from, so that ratios are 1 and the update is REINFORCE with a group's baseline. `train`, as
    the released script: a pass of each sample with dropout and dropped labels, whose ratios differ
    from 1 at once. `twice`: the policy's as in `eval`, the cross-entropy from a second pass with
    dropout. `token_dropout` is the share of tokens that the policy's loss leaves out, `kl` weighs
    the distance to the generator as it began, `advantage_clip` bounds advantages. `choice` is how
    tokens are drawn; log-probabilities have its temperature, not its filters. Raises UserError for a
    group of one or a greedy choice.
    """

    ranges: ClassVar = {
        "group_size": SIZES,
        "decode_at_once": SIZES,
        "token_dropout": SHARES,
        "kl": AMOUNTS,
        "clip_range": AMOUNTS,
        "advantage_clip": AMOUNTS,
    }

    def __init__(
        self,
        reward: Reward | None = None,
        group_size: int = 8,
        mode: Mode = "train",
        clip_range: float = 0.2,
        advantage_clip: float | None = 5.0,
        ce_weight: float = 0.1,
        context_noise: ContextNoise | None = None,
        token_dropout: float = 0.0,
        kl: float = 0.0,
        choice: Choice = Choice(),  # noqa: B008
        decode_at_once: int = 8,
    ) -> None:
        super().__init__()
        require_group(group_size)
        require_warm(choice)
        self.reward = reward or ReconstructionReward()
        self.group_size = group_size
        self.mode: Mode = mode
        self.clip_range = clip_range
        self.advantage_clip = advantage_clip
        self.ce_weight = ce_weight
        self.context_noise = context_noise
        self.token_dropout = token_dropout
        self.kl = kl
        self.choice = choice
        self.decode_at_once = decode_at_once

    @property
    def needs_reference(self) -> bool:
        return self.kl > 0

    @property
    def rewards(self) -> Sequence[Reward]:
        return (self.reward,)

    def terms(self, model: ImageGenerator, batch: Batch) -> Terms:
        context = read_context(self.context_noise, model, batch)
        takes_gradient = self.mode != "train"
        with torch.set_grad_enabled(takes_gradient), in_mode(model.generator, False):
            scores = score(model.generator, context, batch.condition)
        samples = drawn_groups(scores, self.choice, self.group_size, like=batch.tokens)
        policy = tempered(scores, self.choice.temperature)
        new = log_probs_of_groups(policy, samples)
        old = new.detach()
        rewards = self.rewards_of(model, batch, samples)
        advantages = group_advantages(rewards, self.group_size)
        if self.advantage_clip is not None:
            advantages = advantages.clamp(-self.advantage_clip, self.advantage_clip)
        targets = targets_of(model, batch)
        if self.mode == "train":
            rows = context.repeat_interleave(self.group_size, 0)
            again = self.with_dropout(model, rows, batch.condition)
            new = log_probs(tempered(again, self.choice.temperature), samples.flatten(0, 1))
            cross_entropy = -log_probs(again, targets.repeat_interleave(self.group_size, 0)).mean()
        elif self.mode == "twice" and self.ce_weight:
            again = self.with_dropout(model, context, batch.condition)
            cross_entropy = -log_probs(again, targets).mean()
        else:
            cross_entropy = -log_probs(scores, targets).mean()
        surrogate = clipped_surrogate(new, old, advantages, self.clip_range)
        each = surrogate.loss
        logged = policy_facts(rewards, surrogate, self.group_size, self.clip_range)
        if self.kl:
            divergence = k3(self.reference_log_probs(context, batch.condition, samples), new)
            each = each + self.kl * divergence
            logged["kl"] = divergence.mean()
        losses = {
            "policy": mean_of_kept(each, self.token_dropout),
            "cross_entropy": self.ce_weight * cross_entropy,
        }
        return Terms(losses, logged)

    @torch.no_grad()
    def rewards_of(self, model: ImageGenerator, batch: Batch, samples: Tensor) -> Tensor:
        """Rewards [R] of samples [B, G, N, ...], which are in generation order."""
        tokens = ungenerated(samples.flatten(0, 1), model.generator.entities)
        images = decoded(model, tokens, self.decode_at_once)
        originals = None
        if self.reward.reads_originals:
            originals = batch.images.repeat_interleave(self.group_size, 0)
        drawn = Drawn(images, originals, repeated(batch.data, self.group_size))
        with torch.autocast(images.device.type, enabled=False):
            return self.reward(drawn)

    def with_dropout(
        self, model: ImageGenerator, context: Tensor, condition: Condition
    ) -> Distribution:
        """Scores of rows [B or R, N, ...] with dropout and dropped conditions, whatever the mode
        around.
        """
        times = len(context) // condition.batch
        rows = torch.arange(condition.batch).repeat_interleave(times)
        generator = model.generator
        with in_mode(generator, True):
            repeated_condition = generator.drop_condition(condition.select(rows))
            return score(generator, context, repeated_condition)

    @torch.no_grad()
    def reference_log_probs(self, context: Tensor, condition: Condition, samples: Tensor) -> Tensor:
        """Log-probabilities [R, N] of the samples under the generator as it began."""
        assert self.reference is not None
        with in_mode(self.reference, False):
            scores = score(self.reference, context, condition)
        return log_probs_of_groups(tempered(scores, self.choice.temperature), samples)


def mean_of_kept(each: Tensor, dropout: float) -> Tensor:
    """Mean over samples of the mean over tokens of [R, N]; of a sample's tokens a random share is
    left out, never all.
    """
    if dropout == 0:
        return each.mean()
    drawn = torch.rand(each.shape, device=each.device)
    kept = (drawn >= dropout) | (drawn == drawn.amax(1, keepdim=True))
    return ((each * kept).sum(1) / kept.sum(1)).mean()


@in_ranges
class StraightThrough(AlignmentMethod):
    """The distance to the image by back-propagation through the decoder: a hard choice of codes
    whose gradient is that of the soft one.

    `choice` is a Gumbel-softmax (released code) or the arg max of the softmax (paper). The codes are
    those that the decoder reads, normalised where it expects that; the released baseline multiplies
    by raw ones. Raises UserError for a tokenizer without one codebook in front of its decoder.
    """

    ranges: ClassVar = {"decode_at_once": SIZES}

    def __init__(
        self,
        reward: ReconstructionReward | None = None,
        choice: Literal["gumbel", "argmax"] = "gumbel",
        temperature: float = 1.0,
        ce_weight: float = 0.1,
        context_noise: ContextNoise | None = None,
    ) -> None:
        super().__init__()
        self.reward = reward or ReconstructionReward()
        self.choice = choice
        self.temperature = temperature
        self.ce_weight = ce_weight
        self.context_noise = context_noise

    @property
    def rewards(self) -> Sequence[Reward]:
        return (self.reward,)

    def attach(self, model: ImageGenerator) -> None:
        super().attach(model)
        with torch.no_grad():
            code_vectors(model.tokenizer)

    def terms(self, model: ImageGenerator, batch: Batch) -> Terms:
        generator = model.generator
        context = read_context(self.context_noise, model, batch)
        scores = score(generator, context, generator.drop_condition(batch.condition))
        if not isinstance(scores, Logits):
            raise UserError(
                f"StraightThrough chooses among codes; {type(scores).__name__} has no single logits"
            )
        chosen = self.chosen(scores.logits.float())
        with torch.autocast(chosen.device.type, enabled=False):
            table = code_vectors(model.tokenizer)
            vectors = ungenerated(chosen, generator.entities) @ table
            images = model.tokenizer.render(vectors)  # type: ignore[operator]
            reward = self.reward(Drawn(images, batch.images, batch.data)).mean()
        cross_entropy = -log_probs(scores, targets_of(model, batch)).mean()
        losses = {"distance": -reward, "cross_entropy": self.ce_weight * cross_entropy}
        return Terms(losses, {"reward": reward})

    def chosen(self, logits: Tensor) -> Tensor:
        """One-hot choices [B, N, V] with the gradient of the soft ones."""
        if self.choice == "gumbel":
            return F.gumbel_softmax(logits, self.temperature, hard=True)
        soft = (logits / self.temperature).softmax(-1)
        hard = F.one_hot(soft.argmax(-1), soft.shape[-1]).to(soft)
        return hard + soft - soft.detach()


def code_vectors(tokenizer: Tokenizer) -> Tensor:
    """Vectors [V, C] of all codes as the decoder reads them; raises UserError for a tokenizer that
    has not one codebook right in front of its decoder.
    """
    vocabularies: list[int] = []
    if tokenizer.layout.is_categorical:
        vocabularies = tokenizer.layout.vocab().unique().tolist()
    plain = type(tokenizer).decode is QuantizedTokenizer.decode and len(vocabularies) == 1
    if not plain:
        raise UserError(
            f"StraightThrough needs a tokenizer with one codebook in front of its decoder, such as LlamaGen's; "
            f"{type(tokenizer).__name__} has none"
        )
    assert isinstance(tokenizer, QuantizedTokenizer)
    device = next(tokenizer.parameters()).device
    return tokenizer.quantizer.decode(torch.arange(vocabularies[0], device=device)[None])[0]


@in_ranges
class DecoderTuning(AlignmentMethod):
    """The other way round: the generator stays, the tokenizer's decoder learns to show its draws as
    the images that they were drawn for. Encoder and codes stay too.

    Draws are under teacher forcing by `choice`, or with `roll_out` whole sequences that keep a share
    of the true tokens (RobusTok, arXiv 2509.12474). Raises UserError for a tokenizer whose `decode`
    no gradient passes.
    """

    trained = "tokenizer"

    def __init__(
        self,
        reward: ReconstructionReward | None = None,
        choice: Choice = Choice(),  # noqa: B008
        roll_out: RollOut | None = None,
    ) -> None:
        super().__init__()
        self.reward = reward or ReconstructionReward()
        self.choice = choice
        self.roll_out = roll_out

    @property
    def rewards(self) -> Sequence[Reward]:
        return (self.reward,)

    def parameters_of(self, model: ImageGenerator) -> list[nn.Parameter]:
        return decoder_parameters(model.tokenizer)

    def drawn(self, model: ImageGenerator, batch: Batch) -> Tensor:
        """Tokens [B, N, ...] that the generator draws for the images of a batch."""
        if self.roll_out is not None:
            return self.roll_out.tokens(model, batch.tokens, batch.condition)
        with torch.no_grad(), in_mode(model.generator, False):
            scores = score(model.generator, batch.tokens, batch.condition)
        samples = drawn_groups(scores, self.choice, 1, like=batch.tokens)
        return ungenerated(samples[:, 0], model.generator.entities)

    def terms(self, model: ImageGenerator, batch: Batch) -> Terms:
        tokens = self.drawn(model, batch)
        images = decoded(model, tokens, len(tokens))
        with torch.autocast(images.device.type, enabled=False):
            reward = self.reward(Drawn(images, batch.images, batch.data)).mean()
        return Terms({"distance": -reward}, {"reward": reward})
