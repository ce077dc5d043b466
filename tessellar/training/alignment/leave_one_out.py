"""A reward for the whole distribution: by how much the Fréchet distance of a batch grows where one
image is left out (as in ar-policy-tuning, arXiv 2603.23086).

The distance is between Gaussians with diagonal covariances, f = |m - m_r|^2 + |s - s_r|^2 with
deviations s, in float64. All processes' images are one batch.
"""

from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from tessellar import distributed
from tessellar.errors import UserError
from tessellar.layers.unsaved import Unsaved
from tessellar.networks.vision import VisionModel
from tessellar.protocol.arguments import in_ranges
from tessellar.training.alignment.rewards import Drawn, Material, Reward

Mode = Literal["ema_loo", "loo_batch", "ema_scalar"]
LEAST_VARIANCE = 1e-12  # under the root, as there


def diagonal_frechet(
    mean: Tensor, square: Tensor, real_mean: Tensor, real_deviation: Tensor
) -> Tensor:
    """[...] of means and means of squares [..., D] against a reference."""
    variance = (square - mean.square()).clamp(min=0) + LEAST_VARIANCE
    shift = (mean - real_mean).square().sum(-1)
    return shift + (variance.sqrt() - real_deviation).square().sum(-1)


@in_ranges
class LeaveOneOutFrechet(Reward):
    """f without an image minus f with all: positive where the image helps.

    `ema_loo`: both after a moving average of the moments (decay `decay`) has taken the batch in, so
    that small batches are judged as a part of a large one; the average begins at `own` images of
    the generator that is aligned. `loo_batch`: of the batch alone. `ema_scalar`: the fall of the
    average's f, the same for all images, so no advantage within a group. `network` gives the
    features, `real` training images the reference. Raises UserError for a batch of one image.
    """

    real_mean: Tensor
    real_deviation: Tensor
    mean: Tensor
    square: Tensor
    prepared: Tensor

    def __init__(
        self,
        network: VisionModel,
        mode: Mode = "ema_loo",
        decay: float = 0.5,
        real: int = 10_000,
        own: int = 1_000,
        weight: float = 1.0,
    ) -> None:
        super().__init__(weight)
        self.network = Unsaved(network)
        self.mode = mode
        self.decay = decay
        self.real = real
        self.own = own
        for name in ("real_mean", "real_deviation", "mean", "square"):
            values = torch.zeros(network.pooled_dim, dtype=torch.float64)
            self.register_buffer(name, values)
        self.register_buffer("prepared", torch.tensor(False))

    @property
    def files(self) -> list[Path]:
        file = self.network.module.file
        return [] if file is None else [file]

    @torch.no_grad()
    def prepare(self, material: Material) -> None:
        if bool(self.prepared):
            return
        mean, square = self._moments(material.real(self.real))
        self.set_reference(mean, (square - mean.square()).clamp(min=0).sqrt())
        if self.mode != "loo_batch":
            mean, square = self._moments(material.own(self.own))
            self.mean.copy_(mean)
            self.square.copy_(square)

    def set_reference(self, mean: Tensor, deviation: Tensor) -> None:
        """Mean and deviations [D] of the features of real images."""
        self.real_mean.copy_(mean)
        self.real_deviation.copy_(deviation)
        self.prepared.fill_(True)

    def _moments(self, batches: object) -> tuple[Tensor, Tensor]:
        """Mean and mean of squares [D] over batches of images."""
        total = torch.zeros_like(self.real_mean)
        squares = torch.zeros_like(self.real_mean)
        count = 0
        for images in batches:  # type: ignore[attr-defined]
            features = self.features(images)
            total += features.sum(0)
            squares += features.square().sum(0)
            count += len(features)
        return total / count, squares / count

    def features(self, images: Tensor) -> Tensor:
        """[R, D] of images [R, 3, H, W]."""
        return self.network.module.pooled(images.clamp(-1, 1)).double()

    def forward(self, drawn: Drawn) -> Tensor:
        return self.of_features(self.features(drawn.images)).float()

    def of_features(self, features: Tensor) -> Tensor:
        """Rewards [R] of features [R, D]; the moving average takes them in."""
        count = distributed.all_reduce_sum(torch.tensor(len(features)))
        count = count.to(features)
        if count < 2:
            raise UserError("LeaveOneOutFrechet compares batches of at least 2 images")
        total = distributed.all_reduce_sum(features.sum(0))
        squares = distributed.all_reduce_sum(features.square().sum(0))
        mean = total / count
        square = squares / count
        without_mean = (total - features) / (count - 1)
        without_square = (squares - features.square()) / (count - 1)
        if self.mode == "loo_batch":
            return self._distance(without_mean, without_square) - self._distance(mean, square)
        # What the average becomes with the batch, and with the batch but one image.
        after = (self._taken_in(self.mean, mean), self._taken_in(self.square, square))
        distance = self._distance(*after)
        if self.mode == "ema_scalar":
            rewards = self._distance(self.mean, self.square) - distance
            rewards = rewards.expand(len(features))
        else:
            left_out = self._distance(
                self._taken_in(self.mean, without_mean),
                self._taken_in(self.square, without_square),
            )
            rewards = left_out - distance
        with torch.no_grad():
            self.mean.copy_(after[0])
            self.square.copy_(after[1])
        return rewards

    def _taken_in(self, average: Tensor, batch: Tensor) -> Tensor:
        return self.decay * average + (1 - self.decay) * batch

    def _distance(self, mean: Tensor, square: Tensor) -> Tensor:
        return diagonal_frechet(mean, square, self.real_mean, self.real_deviation)
