"""Batch norm over the batch of all processes, on any device.

torch's SyncBatchNorm refuses CPUs, and it must be asked for. Statistics of one process's share would make a run depend
on how many processes it has, so this layer always takes those of the global batch; alone it is nn.BatchNorm2d.
"""

import torch
from torch import Tensor, nn

from tessellar import distributed
from tessellar.layers.precision import at_least_float32


class BatchNorm2d(nn.BatchNorm2d):
    """Maps [B, C, H, W]; same parameters, buffers and names as torch's. Every process calls it equally often."""

    def forward(self, input: Tensor) -> Tensor:
        if not (self.training and distributed.is_distributed()):
            return super().forward(input)
        with torch.autocast(input.device.type, enabled=False):
            return self._global(at_least_float32(input)).to(input.dtype)

    def _global(self, x: Tensor) -> Tensor:
        count = x.new_full((1,), x.numel() // x.shape[1])
        total = distributed.sum_over_ranks(torch.cat([x.sum((0, 2, 3)), count]))
        count = total[-1].detach()
        mean = total[:-1] / count
        centred = x - mean[:, None, None]
        variance = distributed.sum_over_ranks(centred.square().sum((0, 2, 3))) / count
        self._track(mean.detach(), variance.detach() * count / (count - 1))
        scaled = centred * (variance + self.eps).rsqrt()[:, None, None]
        if self.weight is None:
            return scaled
        return scaled * self.weight[:, None, None] + self.bias[:, None, None]

    @torch.no_grad()
    def _track(self, mean: Tensor, variance: Tensor) -> None:
        """Running statistics, with the unbiased variance as torch has them."""
        if self.running_mean is None or self.running_var is None or self.num_batches_tracked is None:
            return
        self.num_batches_tracked += 1
        share = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean.to(self.running_mean), share)
        self.running_var.lerp_(variance.to(self.running_var), share)
