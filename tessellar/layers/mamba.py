"""Mamba: a selective state space in place of attention (arXiv 2312.00752), as a recurrence in torch.

The reference: it steps through the sequence and needs no kernel, so it is exact and slow. One scan
sees what lies before each place; TokenUnify (arXiv 2405.16847) sums three of them over one
projection, forward, backward and over interleaved slices, and so sees everything.

Suffixes: B batch, L length, E inner width (`expand` x width), S state.
"""

import math

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from tessellar.errors import UserError


def selective_scan(
    x_BLE: Tensor, dt_BLE: Tensor, a_ES: Tensor, b_BLS: Tensor, c_BLS: Tensor
) -> Tensor:
    """y [B, L, E] of h_t = exp(dt A) h_(t-1) + dt B x, y = C h, from h = 0 (equation 2)."""
    h_BES = x_BLE.new_zeros(len(x_BLE), *a_ES.shape)
    outputs = []
    for t in range(x_BLE.shape[1]):
        dt_BE1 = dt_BLE[:, t, :, None]
        entering = dt_BE1 * b_BLS[:, t, None] * x_BLE[:, t, :, None]
        h_BES = (dt_BE1 * a_ES).exp() * h_BES + entering
        outputs.append((h_BES * c_BLS[:, t, None]).sum(-1))
    return torch.stack(outputs, dim=1)


class Scan(nn.Module):
    """One direction: a causal convolution, then a state space whose step and matrices are read from
    the sequence itself; the output is gated.
    """

    def __init__(self, inner: int, state: int, kernel: int, rank: int) -> None:
        super().__init__()
        self.rank = rank
        self.state = state
        self.conv = nn.Conv1d(inner, inner, kernel, groups=inner)
        self.x_proj = nn.Linear(inner, rank + 2 * state, bias=False)
        self.dt_proj = nn.Linear(rank, inner)
        self.a_log = nn.Parameter(torch.empty(inner, state))
        self.skip = nn.Parameter(torch.empty(inner))
        self.init_weights()

    def init_weights(self) -> None:
        """Initialisation of the paper's code (section 3.6).

        | weight        | distribution                                              |
        |---------------|-----------------------------------------------------------|
        | a_log         | ln(1), .., ln(state) in every row                          |
        | skip          | 1                                                         |
        | dt_proj.weight| U(-r, r), r = rank^-0.5                                   |
        | dt_proj.bias  | softplus of it is log-uniform in [0.001, 0.1]             |
        """
        rows = torch.arange(1, self.state + 1, dtype=torch.float32, device=self.a_log.device)
        with torch.no_grad():
            self.a_log.copy_(rows.log().expand_as(self.a_log))
            nn.init.ones_(self.skip)
            nn.init.uniform_(self.dt_proj.weight, -(self.rank**-0.5), self.rank**-0.5)
            share = torch.rand_like(self.dt_proj.bias)
            step = torch.exp(math.log(0.001) + share * math.log(100.0))
            self.dt_proj.bias.copy_(step + torch.log(-torch.expm1(-step)))

    def forward(self, x_BLE: Tensor, gate_BLE: Tensor) -> Tensor:
        padded = F.pad(rearrange(x_BLE, "b l e -> b e l"), (self.conv.kernel_size[0] - 1, 0))
        x_BLE = F.silu(rearrange(self.conv(padded), "b e l -> b l e"))
        sizes = [self.rank, self.state, self.state]
        step_BLR, b_BLS, c_BLS = self.x_proj(x_BLE).split(sizes, dim=-1)
        dt_BLE = F.softplus(self.dt_proj(step_BLR))
        y_BLE = selective_scan(x_BLE, dt_BLE, -self.a_log.exp(), b_BLS, c_BLS)
        return (y_BLE + self.skip * x_BLE) * F.silu(gate_BLE)


class Mamba(nn.Module):
    """Vectors [B, L, width] to as many; place t sees places up to t."""

    def __init__(self, width: int, state: int = 16, kernel: int = 4, expand: int = 2) -> None:
        super().__init__()
        inner = expand * width
        self.in_proj = nn.Linear(width, 2 * inner, bias=False)
        self.forward_scan = self.make_scan(width, state, kernel, inner)
        self.out_proj = nn.Linear(inner, width, bias=False)

    @staticmethod
    def make_scan(width: int, state: int, kernel: int, inner: int) -> Scan:
        """A scan whose step has the paper's rank, a sixteenth of the width."""
        return Scan(inner, state, kernel, rank=math.ceil(width / 16))

    def scanned(self, x_BLE: Tensor, gate_BLE: Tensor) -> Tensor:
        """What the scans make of one projection."""
        return self.forward_scan(x_BLE, gate_BLE)

    def forward(self, x: Tensor) -> Tensor:
        x_BLE, gate_BLE = self.in_proj(x).chunk(2, dim=-1)
        return self.out_proj(self.scanned(x_BLE, gate_BLE))


class TriDirectionalMamba(Mamba):
    """The sum of three scans: forward, backward, and over `slices` chunks of the sequence that are
    interleaved. Every place sees every other.
    """

    def __init__(
        self, width: int, state: int = 16, kernel: int = 4, expand: int = 2, slices: int = 5
    ) -> None:
        super().__init__(width, state, kernel=kernel, expand=expand)
        self.slices = slices
        self.backward_scan = self.make_scan(width, state, kernel, expand * width)
        self.sliced_scan = self.make_scan(width, state, kernel, expand * width)

    def scanned(self, x_BLE: Tensor, gate_BLE: Tensor) -> Tensor:
        if x_BLE.shape[1] % self.slices:
            raise UserError(
                f"{x_BLE.shape[1]} places cannot be cut in {self.slices} slices of one length"
            )
        forward = self.forward_scan(x_BLE, gate_BLE)
        backward = self.backward_scan(x_BLE.flip(1), gate_BLE.flip(1)).flip(1)
        sliced = self.sliced_scan(
            interleaved(x_BLE, self.slices), interleaved(gate_BLE, self.slices)
        )
        return forward + backward + laid_out(sliced, self.slices)


def interleaved(x: Tensor, slices: int) -> Tensor:
    """[B, L, E] with the first place of every slice first, then the second of each, and so on."""
    return rearrange(x, "b (s l) e -> b (l s) e", s=slices)


def laid_out(x: Tensor, slices: int) -> Tensor:
    """The inverse of `interleaved`."""
    return rearrange(x, "b (l s) e -> b (s l) e", s=slices)


class MambaLayer(nn.Module):
    """TokenUnify's layer: the places of a map [B, C, ...] in raster order, normed, through a
    three-way Mamba; there is no residual connection.
    """

    def __init__(
        self, width: int, state: int = 16, kernel: int = 4, expand: int = 2, slices: int = 5
    ) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.mamba = TriDirectionalMamba(width, state, kernel=kernel, expand=expand, slices=slices)

    def forward(self, x: Tensor) -> Tensor:
        places = rearrange(x.flatten(2), "b c l -> b l c")
        mixed = self.mamba(self.norm(places))
        return rearrange(mixed, "b l c -> b c l").reshape(x.shape)
