"""Generators of continuous tokens through the same module as any other: drawn latents, a step, an export, samples."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from tessellar.checkpoints.export import export_generator
from tessellar.models.xar import XAR
from tessellar.pipeline import load_generator
from tessellar.processes.flow import EulerMaruyama
from tessellar.protocol.guidance import Linear
from tessellar.sampling.settings import Sampling
from tessellar.tokenizers.quantizers.gaussian import GaussianBottleneck
from tessellar.tokenizers.scale_pyramid import ScalePyramid
from tessellar.tokenizers.vit_vq import ViTVQ
from tessellar.training.generator_module import GeneratorModule


def module(entity: str) -> GeneratorModule:
    torch.manual_seed(0)
    inner = ViTVQ(GaussianBottleneck(3, scale=0.5), 16, 4, 16, 1, 1, 2)
    for parameter in inner.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    tokenizer = ScalePyramid(inner) if entity == "scale" else inner
    return GeneratorModule(tokenizer, lambda layout: XAR(layout, entity, 24, 1, 2, 4, dropout=0.0))


def batch() -> dict[str, Tensor]:
    stream = torch.Generator().manual_seed(1)
    return {"image": torch.rand(4, 3, 16, 16, generator=stream) * 2 - 1, "label": torch.arange(4)}


@pytest.mark.parametrize("entity", ["cell:2", "scale"])
def test_training_draws_the_latents_and_validation_does_not(entity: str) -> None:
    made = module(entity).train()
    assert not torch.equal(made.tokens_of(batch()), made.tokens_of(batch()))
    made.eval()
    assert torch.equal(made.tokens_of(batch()), made.tokens_of(batch()))
    assert torch.equal(made.tokens_of(batch()), made.tokenizer.encode(batch()["image"]))


@pytest.mark.parametrize("entity", ["token", "cell:2", "image", "scale"])
def test_a_few_steps_lower_the_loss(entity: str) -> None:
    made = module(entity).train()
    optimizer = torch.optim.AdamW(made.model.generator.parameters(), 3e-3)
    losses = []
    for _ in range(30):
        torch.manual_seed(5)
        tokens = made.tokens_of(batch())
        loss = made.model.generator.loss(tokens, made.model.conditioner(batch()))["flow"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize("entity", ["cell:2", "scale"])
def test_an_export_samples_the_same_images(entity: str, tmp_path: Path) -> None:
    model = module(entity).model.eval()
    sampling = Sampling(Linear(2.0), flow=EulerMaruyama(3))
    condition = model.class_condition([0, 3])
    images = model.sample(condition, sampling, [7, 8])
    again = load_generator(export_generator(model, tmp_path / "export"))
    assert images.shape == (2, 3, 16, 16) and torch.equal(
        again.sample(condition, sampling, [7, 8]), images
    )
    alone = model.sample(condition.select(torch.tensor([1])), sampling, [8])
    torch.testing.assert_close(alone[0], images[1], atol=1e-4, rtol=0)
    with torch.autocast("cpu", torch.bfloat16):
        rough = model.sample(condition, sampling, [7, 8])
    assert float((rough - images).abs().mean()) < 0.1 * float(images.std())
