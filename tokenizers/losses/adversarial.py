"""Adversarial losses: hinge, non-saturating (of each logit, or of an image's mean logit as in
SEED-Voken) and vanilla; the adaptive weight of VQGAN (arXiv
2012.09841, equation 7).

The official LlamaGen code swaps the arguments of its non-saturating losses; these have them the
right way round.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from tessellar import distributed
from tessellar.layers.precision import at_least_float32
from tessellar.protocol.arguments import AMOUNTS, in_ranges

Kind = Literal["hinge", "non_saturating", "non_saturating_image"]
DiscriminatorKind = Literal["hinge", "vanilla", "non_saturating"]


def generator_adversarial(fake: Tensor, kind: Kind = "hinge") -> Tensor:
    """What the generator side minimises, of discriminator logits on its images."""
    fake = at_least_float32(fake)
    if kind == "hinge":
        return -fake.mean()
    if kind == "non_saturating_image":
        fake = fake.flatten(1).mean(1)
    return F.softplus(-fake).mean()


def discriminator_adversarial(
    real: Tensor, fake: Tensor, kind: DiscriminatorKind = "hinge"
) -> Tensor:
    """What the discriminator minimises, of its logits on real and generated images.

    `vanilla` is `non_saturating` halved, as in taming-transformers.
    """
    real = at_least_float32(real)
    fake = at_least_float32(fake)
    if kind == "hinge":
        return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())
    total = F.softplus(-real).mean() + F.softplus(fake).mean()
    return 0.5 * total if kind == "vanilla" else total


def adaptive_weight(
    reconstruction: Tensor,
    adversarial: Tensor,
    last_layer: Tensor,
    lowest: float = 0.0,
    highest: float = 1e4,
    eps: float = 1e-4,
) -> Tensor:
    """Ratio of the two losses' gradient norms at the last layer, |rec| / (|adv| + eps), within
    [lowest, highest].

    In several processes the gradients are those of the global batch, so that all of them take the
    same weight.
    """
    # lambda = |d rec / d w| / (|d adv / d w| + eps), w the last layer (VQGAN, equation 7).
    (rec,) = torch.autograd.grad(reconstruction, last_layer, retain_graph=True)
    (adv,) = torch.autograd.grad(adversarial, last_layer, retain_graph=True)
    rec = distributed.mean_over_ranks(rec)
    adv = distributed.mean_over_ranks(adv)
    return (rec.norm() / (adv.norm() + eps)).clamp(lowest, highest).detach()


@in_ranges
@dataclass(frozen=True)
class AdaptiveWeight:
    """Bounds of the adaptive weight, and `eps` beside the adversarial gradient's norm. The defaults
    are VQGAN's.

    `summed`: the bounds are those of a reconstruction loss that is summed over an image's values,
    as LDM's (arXiv 2112.10752). Ours is a mean, of which both the weight and its bounds are that
    many times smaller. Raises ValueError for bounds that are negative or crossed.
    """

    ranges: ClassVar = {"lowest": AMOUNTS, "highest": AMOUNTS}

    lowest: float = 0.0
    highest: float = 1e4
    eps: float = 1e-4
    summed: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.lowest <= self.highest or self.eps <= 0:
            raise ValueError(
                f"the adaptive weight lies between {self.lowest} and {self.highest}, eps is {self.eps}: bounds are at "
                "least 0 and in order, eps above 0"
            )

    def __call__(
        self, reconstruction: Tensor, adversarial: Tensor, last_layer: Tensor, values: int
    ) -> Tensor:
        """The weight for a mean reconstruction loss of images of so many values."""
        scale = values if self.summed else 1
        bounds = (self.lowest / scale, self.highest / scale)
        return adaptive_weight(reconstruction, adversarial, last_layer, *bounds, eps=self.eps)
