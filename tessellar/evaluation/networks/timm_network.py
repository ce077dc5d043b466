"""Any timm classifier with given weights as a feature network: distances are written FD(name)."""

from collections.abc import Mapping

import torch
from torch import Tensor

from tessellar.checkpoints.building import build_filled
from tessellar.errors import UserError
from tessellar.evaluation.networks.extractors import Extractor, Features
from tessellar.evaluation.networks.resize import RESIZERS
from tessellar.layers.precision import ExactTables
from tessellar.networks.facts import NetworkFacts
from tessellar.networks.timm_networks import create_network


def network_of(facts: NetworkFacts) -> torch.nn.Module:
    """The timm network with random weights; raises UserError where timm does not know it or its
    options.
    """
    try:
        return create_network(facts.arch, facts.options, num_classes=facts.num_classes)
    except UserError:
        raise
    except Exception as error:  # timm raises every kind for options that do not go together
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(
            f"timm cannot make {facts.arch!r} with options {facts.options}: {reason}"
        ) from error


class TimmNetwork(ExactTables, Extractor):
    """Features are what `facts.readout` says; logits are empty where the network has no classes."""

    def __init__(
        self, facts: NetworkFacts, state: Mapping[str, Tensor], sha256: str, where: str
    ) -> None:
        super().__init__()
        self.facts = facts
        self.name = facts.name
        self.resize = facts.resize
        self.sha256 = sha256
        # What a projection gives are no classes.
        self.num_classes = 0 if facts.readout == "head" else facts.num_classes
        self.class_names = facts.class_names
        if self.class_names and len(self.class_names) != self.num_classes:
            raise UserError(
                f"{where} has {self.num_classes} classes, but {len(self.class_names)} class_names"
            )
        # A run that measures draws the same numbers as one that does not.
        with torch.random.fork_rng(devices=[]):
            network = build_filled(lambda: network_of(facts), state, where, where)
        self.network = network.eval().requires_grad_(False).to(memory_format=torch.channels_last)
        self.dim = int(network.num_features)  # type: ignore[arg-type]
        if facts.readout == "pooled":
            self.dim = int(getattr(network, "head_hidden_size", network.num_features))  # type: ignore[arg-type]
        if facts.readout == "head":
            self.dim = facts.num_classes
        # Of channels, to be subtracted and divided by: [3, 1, 1].
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", torch.tensor(facts.mean)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(facts.std)[:, None, None], persistent=False)

    def extract(self, images: Tensor) -> Features:
        x = self.at_network_size(images) / 255
        # Tables are at least float32: back to the images' precision. Convolutions on a CPU are
        # faster on channels-last memory.
        x = ((x - self.mean) / self.std).to(x.dtype).contiguous(memory_format=torch.channels_last)
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.facts.precision == "bf16"):
            maps = self.network.forward_features(x)  # type: ignore[operator]
            features = self.read_out(maps)
            logits = features[:, :0]
            if self.num_classes:
                pooled = self.network.forward_head(maps, pre_logits=True)  # type: ignore[operator]
                logits = self.network.get_classifier()(pooled)  # type: ignore[operator]
        return Features(features.float(), logits.float())

    def read_out(self, maps: Tensor) -> Tensor:
        """Features [B, D] of what the network gives before its head: maps [B, C, h, w] or tokens
        [B, N, C].
        """
        match self.facts.readout:
            case "class-token":
                return maps[:, 0]
            case "mean-map":
                return maps.mean(dim=(2, 3))
            case "head":
                return self.network.forward_head(maps)  # type: ignore[operator]
        return self.network.forward_head(maps, pre_logits=True)  # type: ignore[operator]

    def at_network_size(self, images: Tensor) -> Tensor:
        """float32 images of the network's size; raises UserError if they differ and no resize is
        declared.
        """
        if images.shape[-2:] == self.facts.image_size:
            return images.float()
        if self.facts.resize == "none":
            raise UserError(
                f"images are {tuple(images.shape[-2:])}, {self.name} reads {self.facts.image_size}: measure images of "
                "that size, or use a network that declares a resize"
            )
        return RESIZERS[self.facts.resize](images, self.facts.image_size)

    def describe(self) -> dict[str, object]:
        facts = self.facts
        # Only where they are not as they always were: else older records would differ.
        ways = {}
        if facts.readout != "pooled":
            ways["readout"] = facts.readout
        if facts.precision != "float32":
            ways["precision"] = facts.precision
        return {
            **ways,
            **super().describe(),
            "arch": facts.arch,
            "options": facts.options,
            "image_size": list(facts.image_size),
            "mean": list(facts.mean),
            "std": list(facts.std),
        }
