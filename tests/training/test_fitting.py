"""Fine-tuning on other classes and sizes: what fits is taken along, what is new is said, the rest is refused."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tessellar.checkpoints.export import export_generator, export_tokenizer
from tessellar.checkpoints.fitting import Sizes, load_fitting, place_classes
from tessellar.errors import UserError
from tessellar.models.llamagen import LlamaGen
from tessellar.models.maskgit import MaskGIT
from tessellar.models.retok import ReToKGPT
from tessellar.pipeline import ImageGenerator
from tessellar.protocol.condition import ClassConditioner
from tessellar.protocol.layout import Categorical, grid_layout
from tessellar.tokenizers.losses.tokenizer_loss import TokenizerLoss
from tessellar.tokenizers.quantizers.vq import VectorQuantizer
from tessellar.tokenizers.vit_vq import ViTVQ
from tessellar.training.generator_module import GeneratorModule
from tessellar.training.tokenizer_module import TokenizerModule

OPTIONS = {"width": 16, "depth": 1, "num_heads": 2, "ffn_multiple_of": 8}
NAMES = ("circle", "square", "triangle")


def tokenizer(size: int = 16) -> ViTVQ:
    torch.manual_seed(0)
    return ViTVQ(VectorQuantizer(16, 4), size, 4, 16, 1, 1, 2)


def exported(
    folder: Path, names: tuple[str, ...] = NAMES, kind: Any = LlamaGen, **options: Any
) -> str:
    made = kind(tokenizer().layout, num_classes=3, **(options or OPTIONS))
    for parameter in made.parameters():
        nn.init.normal_(parameter)
    model = ImageGenerator(tokenizer(), made, ClassConditioner(3), class_names=names)
    return str(export_generator(model, folder))


def tuned(source: str, classes: int, size: int = 16, **more: Any) -> GeneratorModule:
    torch.manual_seed(1)
    options = more.pop("options", OPTIONS)
    make = partial(more.pop("kind", LlamaGen), num_classes=classes, **options)
    return GeneratorModule(tokenizer(size), make, init_from=source, **more)


def rows(model: Any) -> torch.Tensor:
    return model.generator.conditioning.embedding.weight.detach().clone()


class Data:
    """Stands for a data module in the setup of a run."""

    def __init__(self, *names: str) -> None:
        self.class_names = names


def set_up(module: GeneratorModule, *names: str) -> None:
    assert module.start is not None
    module._place_classes(module.start, names)


def test_classes_are_found_by_name_and_new_ones_are_said(tmp_path: Path, caplog) -> None:
    source = exported(tmp_path / "source")
    there = rows(
        GeneratorModule(
            tokenizer(), partial(LlamaGen, num_classes=3, **OPTIONS), init_from=source
        ).model
    )
    torch.manual_seed(1)
    fresh = rows(GeneratorModule(tokenizer(), partial(LlamaGen, num_classes=4, **OPTIONS)).model)
    module = tuned(source, 4)
    set_up(module, "arrow", "square", "triangle", "zebra")
    here = rows(module.model)
    assert torch.equal(here[[1, 2, 4]], there[[1, 2, 3]])  # the last row stands for no class
    assert torch.equal(here[[0, 3]], fresh[[0, 3]])
    assert "2 known by name ('square', 'triangle'), 2 new ('arrow', 'zebra')" in caplog.text
    assert torch.equal(
        module.model.generator.output.weight,
        tuned(source, 3).model.generator.output.weight,
    )


def test_as_many_classes_in_another_order_keep_their_rows(tmp_path: Path) -> None:
    source = exported(tmp_path / "source")
    there = rows(tuned(source, 3).model)
    module = tuned(source, 3)
    set_up(module, "square", "triangle", "circle")
    assert torch.equal(rows(module.model), there[[1, 2, 0, 3]])


def test_a_source_without_names_keeps_rows_by_number_or_none(tmp_path: Path, caplog) -> None:
    source = exported(tmp_path / "source", names=())
    there = rows(tuned(source, 3).model)
    same = tuned(source, 3)
    set_up(same, "a", "b", "c")
    assert torch.equal(rows(same.model), there) and not caplog.messages
    fewer = tuned(source, 2)
    set_up(fewer, "a", "b")
    assert torch.equal(rows(fewer.model)[2], there[3]) and not torch.equal(
        rows(fewer.model)[:2], there[:2]
    )
    assert "does not name its 3 classes: all 2 of this run are new" in caplog.text


def test_classes_in_a_table_that_is_shared_with_codes(tmp_path: Path) -> None:
    layout = grid_layout(4, 4, Categorical(16))
    make = partial(MaskGIT, layout, "vit", 16, 1, 2, 32)
    theirs, ours = make(num_classes=3), make(num_classes=2)
    before = ours.backbone.embedding.weight.detach().clone()
    fitted = load_fitting(
        ours,
        theirs.state_dict(),
        "source",
        theirs=Sizes(layout, None, 3),
        ours=Sizes(layout, None, 2),
    )
    assert place_classes(ours, fitted.classes, NAMES, ("triangle", "new")) == ["new"]
    old, new = theirs.backbone.embedding.weight, ours.backbone.embedding.weight
    assert torch.equal(new[:17], old[:17]) and torch.equal(new[-1], old[-1])
    assert torch.equal(new[17], old[19]) and torch.equal(new[18], before[18])


def test_positions_are_resampled_to_another_size(tmp_path: Path, caplog) -> None:
    options = {"width": 16, "depth": 1, "num_heads": 2}
    source = exported(tmp_path / "source", kind=ReToKGPT, **options)
    with caplog.at_level("INFO", "tessellar"):
        larger = tuned(source, 3, size=32, kind=ReToKGPT, options=options)
    small = tuned(source, 3, kind=ReToKGPT, options=options).model.generator.position_embedding
    large = larger.model.generator.position_embedding
    assert small.shape == (17, 16) and large.shape == (65, 16)
    assert torch.equal(large[0], small[0])
    torch.testing.assert_close(large[1:].mean(0), small[1:].mean(0), atol=0.05, rtol=0)
    assert "1 resampled to another size: position_embedding" in caplog.text


def test_a_tokenizer_starts_from_one_of_another_size(tmp_path: Path, caplog) -> None:
    source = str(export_tokenizer(tokenizer(), tmp_path / "tok"))
    with caplog.at_level("INFO", "tessellar"):
        module = TokenizerModule(tokenizer(32), TokenizerLoss(), init_from=source)
    shapes = "(1 x 16 x 16 to 1 x 64 x 16)"
    told = f"decoder.positions {shapes}, encoder.positions {shapes}"
    assert f"2 resampled to another size: {told}" in caplog.text
    there = tokenizer().state_dict()
    here = module.tokenizer.state_dict()
    same = [name for name in here if name.split(".")[-1] != "positions"]
    assert all(torch.equal(here[name], there[name]) for name in same)


def test_any_other_difference_is_refused_with_the_way_out(tmp_path: Path, caplog) -> None:
    source = exported(tmp_path / "source")
    wider = {**OPTIONS, "depth": 2}
    with pytest.raises(UserError, match="unknown|missing") as caught:
        tuned(source, 3, options=wider)
    assert "To leave tensors as they are made: --model.init_fresh '[layers.1." in str(caught.value)
    with caplog.at_level("INFO", "tessellar"):
        module = tuned(source, 3, options=wider, init_fresh=["layers.1"])
    assert "new, not taken along: layers.1." in caplog.text
    assert torch.equal(
        module.model.generator.output.weight, tuned(source, 3).model.generator.output.weight
    )
    with pytest.raises(
        UserError, match="init_fresh: neither the model nor .* has 'outputs'; did you mean 'output"
    ):
        tuned(source, 3, init_fresh=["outputs"])
    vocabulary = ViTVQ(VectorQuantizer(32, 4), 16, 4, 16, 1, 1, 2)
    make = partial(LlamaGen, num_classes=3, **OPTIONS)
    with pytest.raises(
        UserError, match="2 of another shape: output.weight .*init_fresh '.output.weight, token_emb"
    ):
        GeneratorModule(vocabulary, make, init_from=source)
    named = ["output", "token_embedding"]
    GeneratorModule(vocabulary, make, init_from=source, init_fresh=named)
