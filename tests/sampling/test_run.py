"""A set of samples: an image depends on its seed and class alone, whatever the batch, the order and the process."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tessellar.errors import UserError
from tessellar.models.llamagen import LlamaGen
from tessellar.pipeline import ImageGenerator
from tessellar.protocol.choice import Choice
from tessellar.protocol.condition import ClassConditioner
from tessellar.protocol.guidance import PowerCosine
from tessellar.sampling.run import Drawing, balanced_labels
from tessellar.sampling.settings import GREEDY, Sampling
from tessellar.text.conditioners import FeatureConditioner
from tessellar.tokenizers.quantizers.vq import VectorQuantizer
from tessellar.tokenizers.vit_vq import ViTVQ

SAMPLINGS = {
    "greedy": GREEDY,
    "sampled": Sampling(choice=Choice(top_k=9, top_p=0.95)),
    "guided": Sampling(PowerCosine(2.0, power=2.0)),
}


@pytest.fixture(scope="module")
def model() -> ImageGenerator:
    torch.manual_seed(0)
    tokenizer = ViTVQ(VectorQuantizer(16, 4), 16, 4, 16, 1, 1, 2)
    generator = LlamaGen(tokenizer.layout, 32, 2, 2, num_classes=5, ffn_multiple_of=8)
    for parameter in generator.parameters():
        nn.init.normal_(parameter, std=0.3)
    return ImageGenerator(tokenizer, generator, ClassConditioner(5)).eval()


def draw(
    model: ImageGenerator,
    sampling: Sampling,
    count: int = 7,
    indices: Sequence[int] | None = None,
    **options: Any,
) -> dict[int, Tensor]:
    labels = balanced_labels(count, 5)
    batches = Drawing(sampling, **options).of_classes(model, labels, indices)
    return {
        i: image for indices, images in batches for i, image in zip(indices, images, strict=True)
    }


def assert_same(ours: dict[int, Tensor], theirs: dict[int, Tensor]) -> None:
    """Equal up to one grey level: batches of other sizes may add in another order."""
    assert ours.keys() == theirs.keys()
    assert all(int((ours[i].int() - theirs[i].int()).abs().max()) <= 1 for i in ours)


@pytest.mark.parametrize("name", SAMPLINGS)
def test_an_image_is_the_same_in_any_batch_and_share(model: ImageGenerator, name: str) -> None:
    whole = draw(model, SAMPLINGS[name], seed=3)
    assert (
        list(whole) == list(range(7))
        and whole[0].shape == (3, 16, 16)
        and whole[0].dtype == torch.uint8
    )
    for size in (1, 3):
        assert_same(draw(model, SAMPLINGS[name], seed=3, batch_size=size), whole)
    odd = draw(model, SAMPLINGS[name], seed=3, indices=range(1, 7, 2))
    assert_same(odd, {i: whole[i] for i in (1, 3, 5)})


def test_an_image_has_seed_plus_index(model: ImageGenerator) -> None:
    """Image 5 of seed 0 is image 0 of seed 5: the plan gives both class 0."""
    first, later = (
        draw(model, SAMPLINGS["sampled"], seed=0),
        draw(model, SAMPLINGS["sampled"], seed=5, count=2),
    )
    assert_same({0: first[5], 1: first[6]}, later)
    assert not torch.equal(first[0], first[5])


def test_bf16_draws_images_and_leaves_the_model_as_it_was(model: ImageGenerator) -> None:
    images = draw(model, SAMPLINGS["greedy"], precision="bf16")
    assert len(images) == 7 and next(model.parameters()).dtype == torch.float32
    assert model.generator.training is False


def test_mistakes_are_told_before_anything_is_drawn(model: ImageGenerator) -> None:
    with pytest.raises(UserError, match="class id 5 does not exist; classes are 0 to 4"):
        Drawing(Sampling()).of_classes(model, [0, 5])
    with pytest.raises(UserError, match="precision 'fp8' does not exist; there are float32, bf16"):
        Drawing(Sampling(), precision="fp8")
    with pytest.raises(UserError, match="batch size is 0"):
        Drawing(Sampling(), batch_size=0)
    text = LlamaGen(
        model.tokenizer.layout, 32, 1, 2, num_classes=None, caption_dim=4, ffn_multiple_of=8
    )
    with pytest.raises(UserError, match="conditioned on text"):
        Drawing(Sampling()).of_classes(
            ImageGenerator(model.tokenizer, text, FeatureConditioner()), [0]
        )


def test_labels_go_round_the_classes() -> None:
    assert balanced_labels(7, 3) == [0, 1, 2, 0, 1, 2, 0]
    assert balanced_labels(3, [9, 4]) == [9, 4, 9]
    with pytest.raises(UserError, match="no classes"):
        balanced_labels(3, [])
