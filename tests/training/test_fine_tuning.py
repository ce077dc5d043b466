"""`init_from`: what comes along with the weights of a source, what is compared, and what is said of the rest."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from tessellar.checkpoints.export import export_generator, export_tokenizer
from tessellar.errors import UserError
from tessellar.models.token_shuffle import TokenShuffle
from tessellar.protocol.condition import ClassConditioner, Conditioner
from tessellar.text.conditioners import CaptionConditioner, EncoderConditioner, FeatureConditioner
from tessellar.tokenizers.losses.discriminator import PatchGAN
from tessellar.tokenizers.losses.lecam import LeCam
from tessellar.tokenizers.losses.tokenizer_loss import TokenizerLoss
from tessellar.tokenizers.quantizers.vq import VectorQuantizer
from tessellar.tokenizers.vit_vq import ViTVQ
from tessellar.training.generator_module import GeneratorModule
from tessellar.training.tokenizer_module import TokenizerModule

SOURCE_CAPTIONS = ["a large red circle on a grey background"] * 9


def tokenizer(seed: int = 0, heads: int = 2) -> ViTVQ:
    torch.manual_seed(seed)
    return ViTVQ(VectorQuantizer(16, 4), 16, 4, 16, 1, 1, heads)


def text_module(
    conditioner: Conditioner | None = None,
    seed: int = 0,
    init_from: Path | None = None,
    **sizes: Any,
) -> GeneratorModule:
    options = {
        "width": 16,
        "depth": 1,
        "num_heads": 2,
        "text_vocab": 300,
        "caption_length": 16,
        **sizes,
    }
    source = None if init_from is None else str(init_from)
    return GeneratorModule(
        tokenizer(seed), partial(TokenShuffle, **options), conditioner, init_from=source
    )


def feature_module(
    conditioner: Conditioner | None = None, init_from: Path | None = None
) -> GeneratorModule:
    return text_module(conditioner, init_from=init_from, text_vocab=None, caption_dim=8)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """An export whose BPE was learnt from other captions than the shapes have."""
    model = text_module().model
    assert isinstance(model.conditioner, CaptionConditioner)
    model.conditioner.prepare(lambda: SOURCE_CAPTIONS)
    return export_generator(model, tmp_path / "source")


def table(module: GeneratorModule) -> torch.Tensor:
    assert isinstance(module.model.conditioner, CaptionConditioner)
    return module.model.conditioner.merges.clone()


def test_the_bpe_comes_with_the_generator_and_is_not_learnt_again(
    fit, make, source: Path, caplog
) -> None:
    with caplog.at_level("INFO", "tessellar"):
        tuned = text_module(init_from=source)
    assert caplog.messages == []  # everything is as it was there
    before = table(tuned)
    fit(tuned, 2)
    fresh = text_module()
    fit(fresh, 2)
    assert torch.equal(table(tuned), before) and not torch.equal(table(fresh), before)


def test_the_bpe_comes_out_of_a_checkpoint_too(fit, source: Path, tmp_path: Path) -> None:
    first = text_module(init_from=source)
    trainer, _ = fit(first, 1)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    assert torch.equal(table(text_module(init_from=tmp_path / "last.ckpt")), table(first))


def test_a_source_whose_bpe_was_never_learnt_says_so(tmp_path: Path, caplog) -> None:
    folder = export_generator(text_module().model, tmp_path / "unlearnt")
    given = CaptionConditioner(300, 16)
    given.prepare(lambda: SOURCE_CAPTIONS)
    assert text_module(given, init_from=folder).model.conditioner.is_prepared
    assert caplog.messages == [
        f"the conditioner of {folder} has learnt nothing yet: this run's captions are learnt"
    ]


@pytest.mark.parametrize(
    ("conditioner", "said"),
    [
        (
            FeatureConditioner(),
            "reads caption tokens (CaptionConditioner); this run gives it caption features",
        ),
        (ClassConditioner(300), "this run gives it class ids (ClassConditioner)"),
        (CaptionConditioner(400, 16), "has vocab_size 300, this run's has 400"),
        (CaptionConditioner(300, 16, lowercase=False), "has lowercase True, this run's has False"),
    ],
)
def test_a_conditioner_that_means_other_things_is_refused(
    source: Path, conditioner, said: str
) -> None:
    with pytest.raises(UserError) as error:
        text_module(conditioner, init_from=source)
    assert (
        said in str(error.value)
        and str(source) in str(error.value)
        and "\n" not in str(error.value)
    )


def test_another_length_of_captions_is_said(source: Path, caplog) -> None:
    tuned = text_module(CaptionConditioner(300, 12), init_from=source)
    assert caplog.messages == [f"{source} has other settings: conditioner.length 16 there, 12 here"]
    assert bool(tuned.model.conditioner.is_prepared)


T5 = "google/flan-t5-xl"
CLIP = "openai/clip-vit-base-patch32"


def test_features_may_come_from_elsewhere_and_that_is_said(tmp_path: Path, caplog) -> None:
    folder = export_generator(feature_module().model, tmp_path / "features")
    feature_module(EncoderConditioner(T5, 16, cache=None), init_from=folder)
    assert caplog.messages == [
        f"{folder} has other settings: conditioner FeatureConditioner there, EncoderConditioner here"
    ]
    caplog.clear()
    encoded = export_generator(
        feature_module(EncoderConditioner(T5, 16)).model, tmp_path / "encoded"
    )
    feature_module(EncoderConditioner(CLIP, 16, cache=None), init_from=encoded)
    assert caplog.messages == [
        f"{encoded} has other settings: conditioner.source {T5!r} there, {CLIP!r} here"
    ]


def test_another_tokenizer_than_the_sources_is_said(source: Path, caplog) -> None:
    text_module(seed=1, init_from=source)
    (line,) = caplog.messages
    assert f"{source} was trained on the tokens of another tokenizer than this run's" in line


def test_another_layout_is_said(make, tmp_path: Path, caplog) -> None:
    """Weights with rotary positions fit any grid."""
    folder = export_generator(make.generator_module().model, tmp_path / "small")
    made = make.generator_module().model.generator
    larger = ViTVQ(VectorQuantizer(16, 4), 32, 4, 16, 1, 1, 2)
    options = {
        name: made.config["init_args"][name]
        for name in ("width", "depth", "num_heads", "num_classes")
    }
    GeneratorModule(
        larger, partial(type(made), **options, ffn_multiple_of=8), init_from=str(folder)
    )
    assert caplog.messages[0] == (
        f"{folder} was trained on 4x4 tokens of Categorical(vocab=16); "
        "this run's tokenizer gives 8x8 tokens of Categorical(vocab=16)"
    )
    assert "image_size 16 there, 32 here" in caplog.messages[1]


def test_settings_that_no_shape_shows_are_said(source: Path, caplog) -> None:
    text_module(init_from=source, num_heads=4)
    assert caplog.messages == [f"{source} has other settings: generator.num_heads 2 there, 4 here"]


def test_a_tokenizer_says_what_is_left_behind(fit, make, tmp_path: Path, caplog) -> None:
    trained = make.tokenizer_module(PatchGAN(8, 1))
    trained.loss.lecam = LeCam()
    trainer, _ = fit(trained, 2)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    caplog.clear()
    with caplog.at_level("INFO", "tessellar"):
        alone = TokenizerModule(
            tokenizer(1), TokenizerLoss(), init_from=str(tmp_path / "last.ckpt")
        )
        both = TokenizerLoss(discriminator=PatchGAN(8, 1))
        TokenizerModule(tokenizer(1), both, init_from=str(tmp_path / "last.ckpt"))
    assert torch.equal(alone.tokenizer.last_layer, trained.tokenizer.last_layer)
    assert caplog.messages == [
        f"{tmp_path}/last.ckpt: tokenizer taken, not its discriminator, loss.lecam, optimizer states",
        f"{tmp_path}/last.ckpt: tokenizer and discriminator taken, not its loss.lecam, optimizer states",
    ]


def test_a_tokenizer_of_other_settings_says_so(tmp_path: Path, caplog) -> None:
    folder = export_tokenizer(tokenizer(), tmp_path / "vq")
    TokenizerModule(tokenizer(heads=4), TokenizerLoss(), init_from=str(folder))
    assert caplog.messages == [f"{folder} has other settings: tokenizer.num_heads 2 there, 4 here"]
