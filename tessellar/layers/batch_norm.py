"""Batch norm over the batch of all processes, on any device.

torch's SyncBatchNorm refuses CPUs, and it must be asked for. Statistics of one process's share
would make a run depend on how many processes it has, so this layer always takes those of the global
batch; alone it is nn.BatchNorm2d. Running statistics are left as they are by a batch that is not
finite.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tessellar import distributed
from tessellar.layers.precision import at_least_float32


class BatchNorm2d(nn.BatchNorm2d):
    """Maps [B, C, H, W]; same parameters, buffers and names as torch's. Every process calls it
    equally often.
    """

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return super().forward(input)
        if not distributed.is_distributed():
            return self._alone(input)
        with torch.autocast(input.device.type, enabled=False):
            return self._global(at_least_float32(input)).to(input.dtype)

    def _alone(self, x: Tensor) -> Tensor:
        """As torch's, which writes into the running statistics that it is given: copies of them."""
        if (
            self.running_mean is None
            or self.running_var is None
            or self.num_batches_tracked is None
        ):
            return super().forward(x)
        mean = self.running_mean.clone()
        variance = self.running_var.clone()
        y = F.batch_norm(
            x,
            mean,
            variance,
            weight=self.weight,
            bias=self.bias,
            training=True,
            momentum=self._share(),
            eps=self.eps,
        )
        self._keep(mean, variance)
        return y

    def _global(self, x: Tensor) -> Tensor:
        # Two passes, mean before variance: E[x^2] - E[x]^2 would lose digits. Both are sums over all
        # processes through which gradients flow, as in one process with the whole batch.
        count = x.new_full((1,), x.numel() // x.shape[1])
        total = distributed.sum_over_ranks(torch.cat([x.sum((0, 2, 3)), count]))
        count = total[-1].detach()
        mean = total[:-1] / count
        centred = x - mean[:, None, None]
        variance = distributed.sum_over_ranks(centred.square().sum((0, 2, 3))) / count
        if self.running_mean is not None and self.running_var is not None:
            share = self._share()
            unbiased = variance.detach() * count / (count - 1)  # as torch has it
            self._keep(
                self.running_mean.lerp(mean.detach().to(self.running_mean), share),
                self.running_var.lerp(unbiased.to(self.running_var), share),
            )
        scaled = centred * (variance + self.eps).rsqrt()[:, None, None]
        if self.weight is None:
            return scaled
        return scaled * self.weight[:, None, None] + self.bias[:, None, None]

    def _share(self) -> float:
        """The share of this batch in the running statistics."""
        if self.momentum is not None:
            return self.momentum
        assert self.num_batches_tracked is not None
        return 1 / (float(self.num_batches_tracked) + 1)

    @torch.no_grad()
    def _keep(self, mean: Tensor, variance: Tensor) -> None:
        """Take over new running statistics, unless they are not finite."""
        assert (
            self.running_mean is not None
            and self.running_var is not None
            and self.num_batches_tracked is not None
        )
        finite = torch.isfinite(torch.stack([mean, variance])).all()
        self.num_batches_tracked += finite
        self.running_mean.copy_(torch.where(finite, mean, self.running_mean))
        self.running_var.copy_(torch.where(finite, variance, self.running_var))
