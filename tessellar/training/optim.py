"""Optimizers from settings, with groups made from tags on parameters (tessellar/layers/tags.py).

Matrices decay unless they are tagged `no_decay`; vectors and scalars do not, unless they are tagged
`decay`. With `name: muon` the matrices tagged `hidden` go to Muon (Keller Jordan, 2024:
orthogonalised momentum, step scaled by max(1, rows / columns)^0.5) and AdamW takes the rest. No
published recipe in this project uses Muon; short runs on a CPU gain from it.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from torch.optim import Optimizer

from tessellar.layers.precision import computes_bfloat16
from tessellar.layers.tags import tags
from tessellar.protocol.arguments import in_ranges
from tessellar.training.muon import Muon
from tessellar.training.transfer import Transfer

FUSED = ("cpu", "cuda")  # devices for which torch has fused Adam and AdamW


@in_ranges
@dataclass(frozen=True)
class OptimizerSettings:
    """Peak learning rates and what else an optimizer needs.

    `decayed`: weight decay acts on what the model's tags say (`tagged`), or on `all` parameters, as
    an official optimizer of a single group does. `transfer`: rates and decays are those of a smaller
    model, carried to this one by its width and depth. `encoder_rate`: the rate of parameters tagged
    `encoder`, as a share of all others'; their decay stays.
    """

    name: Literal["adamw", "adam", "muon"] = "adamw"
    lr: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.0
    decayed: Literal["tagged", "all"] = "tagged"
    muon_lr: float = 0.02
    muon_momentum: float = 0.95
    transfer: Transfer | None = None
    encoder_rate: float = 1.0

    def __post_init__(self) -> None:
        """Raise ValueError for numbers outside of their range; a comparison is false for NaN."""
        for name in ("lr", "muon_lr", "eps"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(
                    f"optimizer.{name} is {getattr(self, name)}; it must be finite, at least 0"
                )
        if not 0 < self.encoder_rate < math.inf:
            raise ValueError(
                f"optimizer.encoder_rate is {self.encoder_rate}; it must be above 0 and finite"
            )
        if not 0 <= self.weight_decay < math.inf:
            raise ValueError(
                f"optimizer.weight_decay is {self.weight_decay}; it must be at least 0 and finite"
            )
        for name, value in (
            ("betas", self.betas[0]),
            ("betas", self.betas[1]),
            ("muon_momentum", self.muon_momentum),
        ):
            if not 0 <= value < 1:
                raise ValueError(f"optimizer.{name} holds {value}; it must be in [0, 1)")

    def make(self, *modules: nn.Module) -> list[Optimizer]:
        """Optimizers over the trainable parameters of `modules`: one, or Muon and AdamW."""
        hidden: list[nn.Parameter] = []
        rest: list[nn.Parameter] = []
        for parameter in nn.ModuleList(modules).parameters():
            if not parameter.requires_grad:
                continue
            # Muon orthogonalises matrices between hidden layers; embeddings and heads stay Adam's.
            by_muon = self.name == "muon" and parameter.ndim == 2 and "hidden" in tags(parameter)
            (hidden if by_muon else rest).append(parameter)
        rates = {} if self.transfer is None else self.transfer.rates(*modules)
        made: list[Optimizer] = [self.adam(rest, rates)] if rest else []
        if hidden:
            slow = hidden[0].device.type == "cpu" and not computes_bfloat16()
            muon = Muon if slow else torch.optim.Muon
            made.append(
                muon(
                    hidden,
                    lr=self.muon_lr,
                    momentum=self.muon_momentum,
                    weight_decay=0.0,
                    adjust_lr_fn="original",
                )
            )
        for group in groups_of(made):
            group["peak_lr"] = group["lr"]
        return made

    def adam(
        self, parameters: list[nn.Parameter], rates: Mapping[int, float] | None = None
    ) -> Optimizer:
        """Adam or AdamW in groups, two where all have one rate: what decays, then what does not.

        `rates` are factors of the rate by the identity of parameters; rate times decay stays.
        """
        rates = rates or {}
        alike: dict[tuple[bool, float, float], list[nn.Parameter]] = {}
        for parameter in parameters:
            decay = self.decayed == "all" or decays(parameter)
            own = self.encoder_rate if "encoder" in tags(parameter) else 1.0
            alike.setdefault((decay, rates.get(id(parameter), 1.0), own), []).append(parameter)
        groups: list[dict[str, Any]] = []
        for decay, rate, own in sorted(alike, reverse=True):
            group: dict[str, Any] = {"params": alike[decay, rate, own]}
            group["weight_decay"] = self.weight_decay / rate if decay else 0.0
            if rate * own != 1.0:
                group["lr"] = self.lr * rate * own
            groups.append(group)
        kind = torch.optim.Adam if self.name == "adam" else torch.optim.AdamW
        # One pass over the memory; on CPUs torch's default is a loop over parameters, six times as slow.
        fused = parameters[0].device.type in FUSED or None
        return kind(groups, lr=self.lr, betas=self.betas, eps=self.eps, fused=fused)


def decays(parameter: nn.Parameter) -> bool:
    """Whether weight decay acts on a parameter, by its tags and else by its dimensions."""
    if "no_decay" in tags(parameter):
        return False
    return parameter.ndim >= 2 or "decay" in tags(parameter)


def groups_of(optimizers: Iterable[Optimizer]) -> Iterator[dict[str, Any]]:
    """Groups of parameters of all optimizers, which hold their settings."""
    for optimizer in optimizers:
        yield from optimizer.param_groups


def set_factor(optimizers: list[Optimizer], factor: float) -> None:
    """Set every group's learning rate to its peak times `factor`."""
    for group in groups_of(optimizers):
        group["lr"] = group["peak_lr"] * factor


def set_weight_decay(optimizers: list[Optimizer], value: Callable[[float], float]) -> None:
    """Set every group's weight decay to `value` of what the group began with.

    That beginning is kept in the group, and so in checkpoints.
    """
    for group in groups_of(optimizers):
        initial = group.setdefault("initial_weight_decay", group["weight_decay"])
        group["weight_decay"] = value(initial)
