"""Images made while they are measured: seeds, labels, captions, reconstructions."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tessellar.data.sets.shapes import Shapes, ShapesData
from tessellar.errors import UserError
from tessellar.evaluation.engine import evaluate_samples
from tessellar.evaluation.generation import GeneratedImages, Reconstructions
from tessellar.evaluation.networks.extractors import Extractor
from tessellar.evaluation.protocols import protocol
from tessellar.evaluation.references import reference_from
from tessellar.evaluation.sources import DatasetImages, ImageBatch
from tessellar.images import to_uint8
from tessellar.pipeline import ImageGenerator
from tessellar.protocol.condition import ClassConditioner, Condition, Conditioner
from tessellar.sampling.settings import Sampling
from tessellar.tokenizers.quantizers.vq import VectorQuantizer
from tessellar.tokenizers.vit_vq import ViTVQ


class Paint(ImageGenerator):
    """Tokens are (class or length of the caption, seed); images show them as grey levels."""

    def __init__(self, conditioner: Conditioner) -> None:
        nn.Module.__init__(self)
        self.conditioner, self.weight = conditioner, nn.Parameter(torch.zeros(1))

    def sample_tokens(
        self, condition: Condition, sampling: Sampling, seeds: Sequence[int], recorder: Any = None
    ) -> Tensor:
        assert condition.ids is not None
        return torch.stack([condition.ids.flatten(), torch.tensor(seeds)], dim=1)

    def decode(self, tokens: Tensor) -> Tensor:
        return (tokens.float() / 127.5 - 1)[:, [0, 1, 0], None, None].expand(-1, -1, 32, 32)


class Words(Conditioner):
    def forward(self, batch: dict[str, Any]) -> Condition:
        return Condition(ids=torch.tensor([len(c) for c in batch["caption"]]))


def painted(batches: list[ImageBatch]) -> list[tuple[int, int, int]]:
    """(place, token 0, token 1) of each image."""
    rows = [
        torch.stack([b.index, b.images[:, 0, 0, 0], b.images[:, 1, 0, 0]], dim=1) for b in batches
    ]
    return [tuple(row) for row in torch.cat(rows).tolist()]


def test_sample_i_has_class_i_mod_c_and_seed_plus_i() -> None:
    source = GeneratedImages(Paint(ClassConditioner(3)), 7, Sampling(), seed=40)
    batches = list(source.batches(3))
    assert painted(batches) == [(i, i % 3, 40 + i) for i in range(7)]
    assert torch.cat([b.labels for b in batches if b.labels is not None]).tolist() == [
        0,
        1,
        2,
        0,
        1,
        2,
        0,
    ]
    assert source.label_plan == "balanced" and source.describe()["seed"] == 40
    assert source.describe()["sampling"] == Sampling().describe()


def test_labels_may_be_drawn_uniformly() -> None:
    """Label i depends on the seed and i alone, so a longer set begins with a shorter one."""
    model = Paint(ClassConditioner(5))
    whole = GeneratedImages(model, 4000, Sampling(), seed=3, random_classes=True)
    part = GeneratedImages(model, 50, Sampling(), seed=3, random_classes=True)
    other = GeneratedImages(model, 50, Sampling(), seed=4, random_classes=True)
    assert whole.labels is not None and part.labels is not None and other.labels is not None
    assert whole.labels[:50].tolist() == part.labels.tolist() != other.labels.tolist()
    counts = whole.labels.bincount(minlength=5)
    assert counts.min() > 700 and counts.max() < 900 and len(set(counts.tolist())) > 1
    assert whole.label_plan == "random" == whole.describe()["labels"]
    drawn = painted(list(part.batches(9)))
    assert [row[1] for row in drawn] == part.labels.tolist()
    protocol("llamagen").check(50_000, "random", "inception", "tf1-bilinear", "train")
    with pytest.raises(UserError, match="adm-50k needs labels: balanced; given is random"):
        protocol("adm-50k").check(50_000, "random", "inception", "tf1-bilinear", "train")


def test_text_conditions_follow_the_captions_of_the_data() -> None:
    data = Shapes(32, 4)
    lengths = [len(c) for c in data.batch(range(4)).get("caption", [])]
    source = GeneratedImages(Paint(Words()), 6, Sampling(), seed=9, data=data)
    assert painted(list(source.batches(4))) == [(i, lengths[i % 4], 9 + i) for i in range(6)]
    with pytest.raises(UserError, match="conditioned on text: give --data"):
        GeneratedImages(Paint(Words()), 6, Sampling())


@pytest.mark.parametrize("change", [{"seed": 1}, {"count": 8}])
def test_the_fingerprint_knows_how_samples_are_made(change: dict[str, int]) -> None:
    settings = {"count": 7, "seed": 0, **change}
    model = Paint(ClassConditioner(3))
    sources = [
        GeneratedImages(model, s["count"], Sampling(), s["seed"])
        for s in ({"count": 7, "seed": 0}, settings)
    ]
    assert sources[0].fingerprint() != sources[1].fingerprint()


def test_reconstructions_stand_beside_their_originals() -> None:
    torch.manual_seed(0)
    tokenizer = ViTVQ(VectorQuantizer(16, 4), 16, 4, 16, 1, 1, 2).train()
    data = Shapes(16, 9)
    source = Reconstructions(tokenizer, DatasetImages(data, "shapes", "val"))
    batches = list(source.batches(4))
    originals = data.batch(range(9))["image"]
    assert tokenizer.training and source.count == 9 and source.split == "val"
    assert torch.equal(
        torch.cat([b.originals for b in batches if b.originals is not None]), to_uint8(originals)
    )
    expected = to_uint8(tokenizer.eval().decode(tokenizer.encode(originals)).detach())
    got = torch.cat([b.images for b in batches])
    assert int((got.int() - expected.int()).abs().max()) <= 1 and not torch.equal(
        got, to_uint8(originals)
    )


def test_reconstructions_are_measured_against_their_originals(
    tiny: Extractor, random_images: Callable[..., Tensor]
) -> None:
    """A tokenizer that loses nothing has rFD 0 and full similarity."""

    class Perfect(ViTVQ):
        def encode(self, images: Tensor) -> Tensor:
            return images

        def decode(self, tokens: Tensor) -> Tensor:
            return tokens

    data = ShapesData(size=32, val_length=30)
    source = DatasetImages(data.val_dataset(), data.name, "val")
    tokenizer = Perfect(VectorQuantizer(16, 4), 32, 4, 16, 1, 1, 2)
    record = evaluate_samples(
        Reconstructions(tokenizer, source),
        tiny,
        reference_from(source, tiny),
        metrics=["fd", "paired"],
    )
    assert set(record["metrics"]) == {"rFD(tiny)", "PSNR", "SSIM"}
    assert record["metrics"]["rFD(tiny)"] == pytest.approx(0, abs=1e-9)
    assert record["metrics"]["SSIM"] == pytest.approx(1) and record["reference"]["split"] == "val"
