"""Searching for a set of images: image i by its own seed, class or prompt, one after the other."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from tessellar import distributed
from tessellar.images import to_uint8
from tessellar.protocol.condition import Condition, Conditioner
from tessellar.protocol.configured import describe
from tessellar.protocol.generator import Generator
from tessellar.protocol.tokenizer import Tokenizer
from tessellar.sampling.prepare import prepared
from tessellar.sampling.report import Recorder, running
from tessellar.sampling.run import check_seed
from tessellar.sampling.search.beam import ARFree, Beam, Lookahead
from tessellar.sampling.search.best_of import BestOfN
from tessellar.sampling.search.journal import Journal, digest_of
from tessellar.sampling.search.network_verifiers import Classifier, Clip, Reconstruction
from tessellar.sampling.search.searching import Found, Search, Task
from tessellar.sampling.search.verifiers import Ensemble, Likelihood, Subject
from tessellar.sampling.settings import Sampling
from tessellar.text.conditioners import TextConditioner

# What users choose among by name.
SEARCHES = (BestOfN, Beam, Lookahead, ARFree)
VERIFIERS = (Likelihood, Clip, Reconstruction, Classifier, Ensemble)


class SearchableModel(Protocol):
    """What images are searched for with; `tessellar.pipeline.ImageGenerator` is one."""

    tokenizer: Tokenizer
    generator: Generator
    conditioner: Conditioner
    class_names: tuple[str, ...]

    def class_condition(self, labels: Sequence[int]) -> Condition: ...

    def parameters(self) -> Iterator[nn.Parameter]: ...


@dataclass
class Searching:
    """How a set is searched for: image i with seed `seed + i`; `found` collects what came of each image."""

    search: Search
    sampling: Sampling
    seed: int = 0
    reference: Tensor | None = None
    precision: str = "float32"
    recorder: Recorder | None = None
    journal: Journal | None = None
    found: dict[int, Found] = field(default_factory=dict)

    def keep_journal(self, folder: Path, asked_for: dict[str, Any]) -> None:
        """Write down choices in `folder`, or go on with those that lie there for the same request:
        `asked_for` (plain data), the search, the settings and the seed.
        """
        reference = None if self.reference is None else digest_of(self.reference)
        request = {
            **asked_for,
            "search": describe(self.search),
            "sampling": self.sampling.describe(),
            "seed": self.seed,
            "precision": self.precision,
            "reference": reference,
        }
        self.journal = Journal(folder, request)

    def facts(self) -> dict[str, Any]:
        """What the record of the samples says: the search, the networks that chose, and what it took."""
        calls: dict[int, int] = {}
        scores: dict[int, float] = {}
        own = {i: (found.calls, float(found.scores[0])) for i, found in self.found.items()}
        for part in distributed.all_gather(own):
            for index, (count, score) in part.items():
                calls[index] = count
                scores[index] = score
        return {
            "search": describe(self.search),
            "selected_by": [asdict(network) for network in self.search.verifier.networks()],
            "verifier_calls": sum(calls.values()),
            "scores": [round(scores[index], 6) for index in sorted(scores)],
        }

    def finish(self) -> None:
        """The images are written: the journal is not needed any more."""
        if self.journal is not None:
            self.journal.remove()

    def batches(
        self,
        model: SearchableModel,
        labels: Sequence[int],
        indices: Sequence[int],
        texts: Sequence[str] | None = None,
    ) -> Iterator[tuple[list[int], Tensor]]:
        """(index, uint8 image [1, 3, H, W]) of images `indices`, of class `labels[i]`, or of `texts[i]`.

        Raises UserError, before anything is drawn, for what cannot be searched or scored.
        """
        check_seed(self.seed, max(indices, default=0) + 1)
        self.search.check(model.generator, self.sampling)
        subjects = [self.subject(model, labels, texts, i) for i in range(len(labels))]
        for subject in dict.fromkeys((s.label, s.name, s.prompt) for s in subjects):
            label, name, prompt = subject
            self.search.verifier.check(Subject(label, name, prompt, self.reference))
        if self.journal is not None:
            self.journal.open()
        for index in indices:
            found = self.one(model, index, labels[index], subjects[index])
            self.found[index] = found
            yield [index], to_uint8(found.images[:1]).cpu()

    def subject(
        self,
        model: SearchableModel,
        labels: Sequence[int],
        texts: Sequence[str] | None,
        index: int,
    ) -> Subject:
        """What image `index` should show."""
        if texts is not None:
            return Subject(prompt=texts[index], reference=self.reference)
        label = labels[index]
        name = model.class_names[label] if model.class_names else ""
        return Subject(label=label, name=name, reference=self.reference)

    @torch.no_grad()
    def one(self, model: SearchableModel, index: int, label: int, subject: Subject) -> Found:
        """The search for image `index`."""
        conditioner = model.conditioner
        if subject.prompt:
            assert isinstance(conditioner, TextConditioner)
            condition = conditioner.of_texts([subject.prompt])
        else:
            condition = model.class_condition([label])
        task = Task(
            generator=model.generator,
            tokenizer=model.tokenizer,
            condition=condition,
            sampling=self.sampling,
            seed=self.seed + index,
            subject=subject,
            recorder=self.recorder,
            precision=self.precision,
        )
        progress = None if self.journal is None else self.journal.of(index)
        mode = model.generator.training
        model.generator.eval()
        try:
            # A decoding algorithm counts its own runs.
            counted = None if self.search.uses_algorithm else self.recorder
            length = model.generator.layout.length
            dtype = torch.bfloat16 if self.precision == "bf16" else None
            with prepared(model.generator, dtype), running(counted, 1, length, task.device):
                return self.search(task, progress=progress)
        finally:
            model.generator.train(mode)
