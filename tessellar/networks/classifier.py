"""A frozen classifier whose opinion of an image is a reward or chooses among candidates: a timm network
from a file that says what it is, as `evaluate.py extractor --purpose teacher` writes it. Never one
that measures.
"""

from pathlib import Path
from typing import Self

import torch
from torch import Tensor, nn

from tessellar.checkpoints.building import build_filled
from tessellar.errors import UserError
from tessellar.networks.facts import NetworkFacts, refuse_evaluator
from tessellar.networks.preprocessing import standardised
from tessellar.networks.timm_networks import create_network
from tessellar.tensor_files import read_safetensors, require_file


class Classifier(nn.Module):
    """Scores of classes, of images of any size.

    Raises UserError for a file that is missing, is an evaluation network or does not say what it
    holds.
    """

    def __init__(self, weights: str) -> None:
        super().__init__()
        self.file = Path(weights).expanduser()
        require_file(self.file)
        refuse_evaluator(self.file)
        state, metadata = read_safetensors(self.file)
        facts = NetworkFacts.from_metadata(metadata, self.file)
        if not facts.num_classes:
            raise UserError(f"{self.file} holds a network without classes")
        self.facts = facts

        def make() -> nn.Module:
            with torch.random.fork_rng(devices=[]):  # what is drawn is the same without it
                return create_network(facts.arch, facts.options, num_classes=facts.num_classes)

        self.network = build_filled(make, state, str(self.file), str(self.file))
        self.eval().requires_grad_(False)

    def train(self, mode: bool = True) -> Self:
        """Stays in eval mode."""
        return super().train(False)

    def class_of(self, label: int, name: str | None) -> int:
        """The network's number of a class: that of its name where the network knows names, else its
        own. Raises UserError where there is none.
        """
        facts = self.facts
        if name in facts.class_names:
            return facts.class_names.index(name)
        if name and facts.class_names:
            known = ", ".join(facts.class_names[:10])
            raise UserError(f"{name!r} is no class of {self.file}, which knows {known}")
        if label >= facts.num_classes:
            raise UserError(f"{self.file} has {facts.num_classes} classes, none of number {label}")
        return label

    def forward(self, images: Tensor) -> Tensor:
        """Logits [B, classes], float32, of images [B, 3, H, W] in about [-1, 1]."""
        height, width = self.facts.image_size
        pixels = standardised(images, (height, width), self.facts.mean, self.facts.std)
        return self.network(pixels).float()
