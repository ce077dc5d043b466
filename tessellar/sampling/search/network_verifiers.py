"""Verifiers that look at images: CLIP (arXiv 2103.00020), a classifier, the likeness to a reference.

Their networks are files of the user's. One that measures is refused (`refuse_evaluator`), and the record of
the samples names the others, so that `evaluate.py` does not judge samples by what chose them.
"""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from tessellar.errors import UserError
from tessellar.networks.clip import Clip as ClipNetwork
from tessellar.networks.facts import UsedNetwork, marks_of, refuse_evaluator, sha256_of
from tessellar.sampling.search.verifiers import Candidates, Subject, Verifier

if TYPE_CHECKING:
    from tessellar.networks.classifier import Classifier as ClassifierNetwork
    from tessellar.networks.vision import VisionModel

# timm is imported where a network is made: plain sampling does not wait for it.


@dataclass(frozen=True)
class Clip(Verifier):
    """2.5 max(cos, 0) between the image and the prompt, or `template` with the name of its class, by CLIP
    through `transformers`: a local folder, or a hub id.
    """

    source: str = "openai/clip-vit-base-patch16"
    template: str = "a photo of a {}"

    @cached_property
    def _network(self) -> ClipNetwork:
        for file in self._files:
            refuse_evaluator(file)
        return ClipNetwork(self.source)

    @property
    def _files(self) -> list[Path]:
        """Weights in a local folder."""
        return sorted(Path(self.source).expanduser().glob("*.safetensors"))

    def text(self, subject: Subject) -> str:
        """What images are compared with."""
        return subject.prompt or self.template.format(subject.name)

    def check(self, subject: Subject) -> None:
        if not subject.prompt and not subject.name:
            raise UserError(
                "the Clip verifier needs prompts, or a generator that knows the names of its classes"
            )
        if not subject.prompt and "{}" not in self.template:
            raise UserError(f"the template {self.template!r} of Clip has no {{}} for the class")
        self._network.eval()

    @torch.no_grad()
    def measure(self, candidates: Candidates) -> Tensor:
        images = candidates.images
        assert images is not None
        network = self._network.to(images.device)
        return network(images, [self.text(candidates.subject)])[:, None].cpu()

    def networks(self) -> tuple[UsedNetwork, ...]:
        digest = sha256_of(self._files[0]) if len(self._files) == 1 else ""
        marks = marks_of(self._network.model.vision_model)
        return (UsedNetwork(self.source, digest, marks),)


@dataclass(frozen=True)
class Classifier(Verifier):
    """The log-probability of the image's class by a classifier, found by the name of the class.

    `weights` is a file of `evaluate.py extractor --purpose teacher`, which says what it is. Raises UserError
    for an evaluation network.
    """

    weights: str = ""

    @cached_property
    def _network(self) -> "ClassifierNetwork":
        from tessellar.networks.classifier import Classifier as ClassifierNetwork

        if not self.weights:
            raise UserError("the Classifier verifier needs a file: --search.verifier.weights FILE")
        return ClassifierNetwork(self.weights)

    def target(self, subject: Subject) -> int:
        """The network's class of a subject; raises UserError where there is none."""
        facts = self._network.facts
        if subject.label is None:
            raise UserError("the Classifier verifier scores classes; this generator reads prompts")
        if subject.name in facts.class_names:
            return facts.class_names.index(subject.name)
        if subject.name and facts.class_names:
            known = ", ".join(facts.class_names[:10])
            raise UserError(f"{subject.name!r} is no class of {self.weights}, which knows {known}")
        if subject.label >= facts.num_classes:
            raise UserError(f"{self.weights} has {facts.num_classes} classes, no {subject.label}")
        return subject.label

    def check(self, subject: Subject) -> None:
        self.target(subject)

    @torch.no_grad()
    def measure(self, candidates: Candidates) -> Tensor:
        images = candidates.images
        assert images is not None
        logits = self._network.to(images.device)(images)
        return logits.log_softmax(-1)[:, self.target(candidates.subject), None].cpu()

    def networks(self) -> tuple[UsedNetwork, ...]:
        network = self._network
        marks = marks_of(network.network)
        return (UsedNetwork(network.facts.name, sha256_of(network.file), marks),)


@dataclass(frozen=True)
class Reconstruction(Verifier):
    """Likeness to a reference image: minus the mean squared error of pixels, or with `weights` the cosine of
    pooled features of a vision network (a teacher's file, or `name` of a timm network and its weights).
    """

    weights: str = ""
    name: str | None = None

    @cached_property
    def _network(self) -> "VisionModel":
        from tessellar.networks.vision import VisionModel

        return VisionModel(self.name, weights=self.weights)

    def check(self, subject: Subject) -> None:
        if subject.reference is None:
            raise UserError("the Reconstruction verifier needs a reference image: --image FILE")
        if self.weights:
            self._network.check_filled()

    @torch.no_grad()
    def measure(self, candidates: Candidates) -> Tensor:
        images = candidates.images
        reference = candidates.subject.reference
        assert images is not None and reference is not None
        images = images.float().clamp(-1, 1)
        reference = reference.to(images.device)[None]
        if not self.weights:
            return -(images - reference).square().flatten(1).mean(1, keepdim=True).cpu()
        model = self._network.to(images.device)
        likeness = F.cosine_similarity(model.pooled(images), model.pooled(reference))
        return likeness[:, None].cpu()

    def networks(self) -> tuple[UsedNetwork, ...]:
        if not self.weights:
            return ()
        model = self._network
        path = Path(self.weights).expanduser()
        digest = sha256_of(path) if path.is_file() else ""
        return (UsedNetwork(model.label, digest, marks_of(model.network)),)
