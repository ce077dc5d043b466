"""Verifiers that look at images: CLIP (arXiv 2103.00020), a classifier, the likeness to a reference.

Their networks are files of the user's. One that measures is refused (`refuse_evaluator`), and the record of
the samples names the others, so that `evaluate.py` does not judge samples by what chose them.
"""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tessellar.checkpoints.building import build_filled
from tessellar.errors import UserError
from tessellar.networks.facts import (
    NetworkFacts,
    UsedNetwork,
    marks_of,
    refuse_evaluator,
    sha256_of,
)
from tessellar.sampling.search.verifiers import Candidates, Subject, Verifier
from tessellar.tensor_files import read_safetensors, require_file
from tessellar.text.bpe import require
from tessellar.text.encoders import published_vocabulary

if TYPE_CHECKING:
    from tessellar.networks.vision import VisionModel

# timm is imported where a network is made: plain sampling does not wait for it.

# Of images in [0, 1], as CLIP was trained (arXiv 2103.00020, official code).
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
CLIP_SCALE = 2.5  # CLIPScore's w (arXiv 2104.08718)


def normalised(
    images: Tensor, size: tuple[int, int], mean: tuple[float, ...], std: tuple[float, ...]
) -> Tensor:
    """Images in about [-1, 1] as a network of a size reads them: clamped, resized, standardised."""
    unit = (images.float().clamp(-1, 1) + 1) / 2
    if unit.shape[-2:] != size:
        unit = F.interpolate(unit, size, mode="bicubic", antialias=True)
    shift = torch.tensor(mean, device=images.device).view(3, 1, 1)
    scale = torch.tensor(std, device=images.device).view(3, 1, 1)
    return (unit - shift) / scale


@dataclass(frozen=True)
class Clip(Verifier):
    """2.5 max(cos, 0) between the image and the prompt, or `template` with the name of its class, by CLIP
    through `transformers`: a local folder, or a hub id.
    """

    source: str = "openai/clip-vit-base-patch16"
    template: str = "a photo of a {}"

    @cached_property
    def _loaded(self) -> tuple[Any, Any]:
        library = require("transformers")
        folder = Path(self.source).expanduser()
        for file in sorted(folder.glob("*.safetensors")) if folder.is_dir() else ():
            refuse_evaluator(file)
        try:
            config = library.AutoConfig.from_pretrained(self.source, trust_remote_code=False)
            if config.model_type != "clip":
                raise UserError(f"{self.source} is a {config.model_type}, not a CLIP model")
            model = library.CLIPModel.from_pretrained(self.source, use_safetensors=True)
        except UserError:
            raise
        except (OSError, ValueError) as error:
            first = str(error).strip().splitlines()[0][:160]
            raise UserError(f"the CLIP model {self.source} cannot be loaded ({first})") from error
        return published_vocabulary(self.source), model.float().eval().requires_grad_(False)

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

    @torch.no_grad()
    def measure(self, candidates: Candidates) -> Tensor:
        assert candidates.images is not None
        vocabulary, model = self._loaded
        model = model.to(candidates.images.device)
        limit = model.config.text_config.max_position_embeddings
        read = vocabulary(
            [self.text(candidates.subject)], truncation=True, max_length=limit, return_tensors="pt"
        ).to(candidates.images.device)
        side = model.config.vision_config.image_size
        pixels = normalised(candidates.images, (side, side), CLIP_MEAN, CLIP_STD)
        found = model(
            input_ids=read["input_ids"],
            attention_mask=read["attention_mask"],
            pixel_values=pixels,
        )
        likeness = F.cosine_similarity(found.image_embeds, found.text_embeds)
        return (CLIP_SCALE * likeness.clamp(min=0))[:, None].cpu()

    def networks(self) -> tuple[UsedNetwork, ...]:
        files = sorted(Path(self.source).expanduser().glob("*.safetensors"))
        digest = sha256_of(files[0]) if len(files) == 1 else ""
        return (UsedNetwork(self.source, digest, marks_of(self._loaded[1].vision_model)),)


@dataclass(frozen=True)
class Classifier(Verifier):
    """The log-probability of the image's class by a classifier, found by the name of the class.

    `weights` is a file of `evaluate.py extractor --purpose teacher`, which says what it is. Raises UserError
    for an evaluation network.
    """

    weights: str = ""

    @cached_property
    def _loaded(self) -> tuple[NetworkFacts, nn.Module]:
        if not self.weights:
            raise UserError("the Classifier verifier needs a file: --search.verifier.weights FILE")
        path = Path(self.weights).expanduser()
        require_file(path)
        refuse_evaluator(path)
        state, metadata = read_safetensors(path)
        facts = NetworkFacts.from_metadata(metadata, path)
        if not facts.num_classes:
            raise UserError(f"{path} holds a network without classes")

        from tessellar.networks.timm_networks import create_network

        def make() -> nn.Module:
            with torch.random.fork_rng(devices=[]):  # a search draws the same without it
                return create_network(facts.arch, facts.options, num_classes=facts.num_classes)

        network = build_filled(make, state, str(path), str(path))
        return facts, network.eval().requires_grad_(False)

    def target(self, subject: Subject) -> int:
        """The network's class of a subject; raises UserError where there is none."""
        facts, _ = self._loaded
        if subject.label is None:
            raise UserError("the Classifier verifier scores classes; this generator reads prompts")
        if subject.name in facts.class_names:
            return facts.class_names.index(subject.name)
        if subject.name and facts.class_names:
            known = ", ".join(facts.class_names[:10])
            raise UserError(f"{subject.name!r} is no class of {self.weights}, which knows {known}")
        if subject.label >= facts.num_classes:
            raise UserError(
                f"{self.weights} has {facts.num_classes} classes, none of number {subject.label}"
            )
        return subject.label

    def check(self, subject: Subject) -> None:
        self.target(subject)

    @torch.no_grad()
    def measure(self, candidates: Candidates) -> Tensor:
        assert candidates.images is not None
        facts, network = self._loaded
        height, width = facts.image_size
        images = normalised(candidates.images, (height, width), facts.mean, facts.std)
        logits = network.to(images.device)(images)
        return logits.log_softmax(-1)[:, self.target(candidates.subject), None].cpu()

    def networks(self) -> tuple[UsedNetwork, ...]:
        facts, network = self._loaded
        digest = sha256_of(Path(self.weights).expanduser())
        return (UsedNetwork(facts.name, digest, marks_of(network)),)


@dataclass(frozen=True)
class Reconstruction(Verifier):
    """Likeness to a reference image: minus the mean squared error of pixels, or with `weights` the cosine of
    pooled features of a vision network (a teacher's file, or `name` of a timm network and its weights).
    """

    weights: str = ""
    name: str | None = None

    @cached_property
    def _loaded(self) -> "VisionModel":
        from tessellar.networks.vision import VisionModel

        return VisionModel(self.name, weights=self.weights)

    def check(self, subject: Subject) -> None:
        if subject.reference is None:
            raise UserError("the Reconstruction verifier needs a reference image: --image FILE")
        if self.weights:
            self._loaded.check_filled()

    @torch.no_grad()
    def measure(self, candidates: Candidates) -> Tensor:
        images = candidates.images
        reference = candidates.subject.reference
        assert images is not None and reference is not None
        images = images.float().clamp(-1, 1)
        reference = reference.to(images.device)[None]
        if not self.weights:
            return -(images - reference).square().flatten(1).mean(1, keepdim=True).cpu()
        model = self._loaded.to(images.device)
        likeness = F.cosine_similarity(model.pooled(images), model.pooled(reference))
        return likeness[:, None].cpu()

    def networks(self) -> tuple[UsedNetwork, ...]:
        if not self.weights:
            return ()
        model = self._loaded
        path = Path(self.weights).expanduser()
        digest = sha256_of(path) if path.is_file() else ""
        return (UsedNetwork(model.label, digest, marks_of(model.network)),)
