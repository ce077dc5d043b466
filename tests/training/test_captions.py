"""Text to image through the trainer: a BPE of the run's captions, resuming, pictures and distances with captions."""

from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks.caption_control import measure, others
from tessellar.callbacks.fid import FID
from tessellar.callbacks.grids import Grids
from tessellar.data.sets.shapes import ShapesData
from tessellar.evaluation.generation import GeneratedImages
from tessellar.models.token_shuffle import TokenShuffle, token_shuffle_2b7
from tessellar.pipeline import load_generator
from tessellar.sampling.settings import Sampling
from tessellar.text.conditioners import CaptionConditioner, TextConditioner
from tessellar.tokenizers.quantizers.vq import VectorQuantizer
from tessellar.tokenizers.vit_vq import ViTVQ
from tessellar.training.generator_module import GeneratorModule, training_captions


def module(**options: Any) -> GeneratorModule:
    torch.manual_seed(0)
    sizes = {
        "width": 16,
        "depth": 1,
        "num_heads": 2,
        "text_vocab": 300,
        "caption_length": 16,
        **options,
    }
    return GeneratorModule(
        ViTVQ(VectorQuantizer(16, 4), 16, 4, 16, 1, 1, 2), partial(TokenShuffle, **sizes)
    )


def test_a_run_learns_its_captions_once_and_exports_them(
    fit, make: SimpleNamespace, tmp_path: Path
) -> None:
    trained = module()
    trainer, losses = fit(trained, 3)
    conditioner = trained.model.conditioner
    assert (
        isinstance(conditioner, CaptionConditioner)
        and bool(conditioner.trained)
        and len(losses) == 3
    )
    words = conditioner.bpe.encode(make.data().train_dataset().captions([0])[0], 99)
    assert len(words) < 16  # of about 30 bytes
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    loaded = load_generator(tmp_path / "a.ckpt")
    assert torch.equal(loaded.conditioner.merges, conditioner.merges)  # type: ignore[arg-type]
    resumed = module()
    fit(
        resumed,
        4,
        data=ShapesData(size=16, length=64, val_length=16, batch_size=8, seed=5),
        ckpt_path=tmp_path / "a.ckpt",
    )
    assert torch.equal(resumed.model.conditioner.merges, conditioner.merges)  # type: ignore[arg-type]


def test_captions_of_a_set_are_spread_over_it() -> None:
    asked: list[range] = []
    dataset: Any = SimpleNamespace(
        captions=lambda r: asked.append(r) or ["x"] * len(r), __len__=None
    )
    dataset = type(
        "Set", (), {"captions": staticmethod(dataset.captions), "__len__": lambda _: 50_001}
    )()
    assert len(training_captions(dataset)) == 16_667 and asked == [range(0, 50_001, 3)]


def test_pictures_and_distances_follow_the_captions_of_the_validation_set(
    tmp_path: Path, make: SimpleNamespace
) -> None:
    made, data = module(), make.data()
    conditioner = made.model.conditioner
    assert isinstance(conditioner, TextConditioner)
    conditioner.prepare(lambda: training_captions(data.train_dataset()))
    grids = Grids(SimpleNamespace(folder=tmp_path), Sampling(), columns=2)  # type: ignore[arg-type]
    trainer: Any = SimpleNamespace(
        is_global_zero=True, sanity_checking=False, loggers=[], datamodule=data
    )
    batch = data.val_dataset().batch(range(10))
    grids.on_validation_batch_end(trainer, made, {}, batch, 0)
    grids.on_validation_epoch_end(trainer, made)
    assert (tmp_path / "pictures" / "samples_0000000.png").is_file()
    source = FID("x", num_samples=5)._source(trainer, made)
    assert isinstance(source, GeneratedImages) and source.label_plan == "data"
    images = torch.cat([part.images for part in source.batches(2)])
    given = conditioner.of_texts(data.val_dataset().captions(range(5)))
    tokens = made.model.sample_tokens(given, Sampling(), range(5))
    expected = made.model.decode(tokens)
    assert images.shape == (5, 3, 16, 16)
    assert float((images / 127.5 - 1 - expected.clamp(-1, 1)).abs().max()) < 0.01


def test_a_caption_tells_nothing_to_a_model_that_cannot_read_it(make: SimpleNamespace) -> None:
    """Gain is 0 where attention is off, and not where it is on."""
    made, data = module(), make.data()
    for parameter in made.model.generator.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    made.model.conditioner.prepare(lambda: training_captions(data.train_dataset()))  # type: ignore[operator]
    made.eval()
    reads = measure(made.model, data, 8, 2)
    assert reads["images"] == 8 and reads["gain"] != 0 and reads["own"] > 0
    assert reads["gain"] == pytest.approx(reads["other"] - reads["own"])
    torch.nn.init.zeros_(made.model.generator.layers[0].attention.wo.weight)  # type: ignore[union-attr, index, arg-type]
    blind = measure(made.model, data, 8, 2)
    assert blind["gain"] == pytest.approx(0, abs=1e-4) and blind["none"] == pytest.approx(
        blind["own"], rel=1e-4
    )


def test_nobody_gets_his_own_caption() -> None:
    for order in others(7, 3):
        assert sorted(order.tolist()) == list(range(7)) and not bool(
            (order == torch.arange(7)).any()
        )


def test_facts_are_known_before_anything_is_allocated() -> None:
    """2048 x 2048 images at f16: 16,384 codes in 4,096 positions behind a prompt of 512."""
    with torch.device("meta"):
        tokenizer = ViTVQ(VectorQuantizer(16384, 8), 2048, 16, 16, 1, 1, 2)
        facts = GeneratorModule(tokenizer, token_shuffle_2b7).facts()
    assert (facts.tokens, facts.entities, facts.positions) == (16384, 4096, 4608)
    assert facts.trained == 2_789_634_816 and facts.memory == 20 * facts.trained + 4 * facts.frozen
    assert str(facts).startswith(
        "16,384 tokens an image in 4,096 entities; 4,608 positions; about 117"
    )
