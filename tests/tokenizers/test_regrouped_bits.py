"""Trained binary tokens in another form: the same bits, the same images, one cache, one export."""

from functools import partial
from pathlib import Path

import pytest
import torch

from tessellar.checkpoints.export import export_tokenizer
from tessellar.checkpoints.reading import load_tokenizer
from tessellar.data.sets.shapes import ShapesData
from tessellar.data.token_cache.cached_tokens import CachedTokens
from tessellar.data.token_cache.writing import encode_dataset
from tessellar.errors import UserError
from tessellar.models.bar import BAR
from tessellar.models.llamagen import LlamaGen
from tessellar.models.open_magvit2 import OpenMAGVIT2AR
from tessellar.protocol.layout import Bits, Categorical, Factorized, Kind
from tessellar.tokenizers.bar_fsq import BARFSQ
from tessellar.tokenizers.parts.regrouped_bits import RegroupedBits
from tessellar.tokenizers.quantizers.binary_fsq import BinaryFSQ
from tessellar.tokenizers.quantizers.lfq import LFQ
from tessellar.tokenizers.quantizers.vq import VectorQuantizer
from tessellar.tokenizers.vit_vq import ViTVQ
from tessellar.training.generator_module import GeneratorModule

FORMS: list[tuple[str, tuple[int, ...] | None, Kind]] = [
    ("index", None, Categorical(64)),
    ("index", (2, 4), Factorized((4, 16))),
    ("bits", None, Bits(6)),
]


def of_bits() -> BARFSQ:
    torch.manual_seed(0)
    return BARFSQ(BinaryFSQ(6), 16, 4, 16, 1, 2, 2.0, 16, 1, 2).eval()


def of_ids() -> ViTVQ:
    torch.manual_seed(0)
    return ViTVQ(LFQ(6, split=(3, 3)), 16, 4, 16, 1, 1, 2).eval()


def images() -> torch.Tensor:
    return torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1


@pytest.mark.parametrize(("form", "split", "kind"), FORMS)
@pytest.mark.parametrize("make", [of_bits, of_ids])
def test_every_form_decodes_to_the_same_images(
    make: type, form: str, split: tuple[int, ...] | None, kind: Kind
) -> None:
    inner = make()
    outer = RegroupedBits(inner, form, split).eval()
    tokens = outer.encode(images())
    outer.layout.check(tokens)
    assert outer.layout.segments[0].kind == kind
    assert torch.equal(outer.to_source(tokens), inner.encode(images()))
    assert torch.equal(outer.decode(tokens), inner.decode(inner.encode(images())))
    assert torch.equal(outer.from_source(inner.encode(images())), tokens)


def test_the_first_bit_is_the_least_significant() -> None:
    outer = RegroupedBits(of_bits(), split=(2, 4))
    bits = torch.tensor([[[1, 0, 0, 1, 0, 0]]])
    assert outer.from_source(bits).tolist() == [[[1, 2]]]


def test_an_export_holds_the_inner_tokenizer(tmp_path: Path) -> None:
    export_tokenizer(of_bits(), tmp_path / "inner")
    outer = RegroupedBits(str(tmp_path / "inner")).eval()
    export_tokenizer(outer, tmp_path / "outer")
    (tmp_path / "inner").rename(tmp_path / "moved")
    loaded = load_tokenizer(tmp_path / "outer")
    assert torch.equal(loaded.encode(images()), outer.encode(images()))


def test_what_does_not_fit_is_one_line() -> None:
    with pytest.raises(UserError, match="split \\[2, 2\\] makes 4 bits; a token has 6"):
        RegroupedBits(of_bits(), split=(2, 2))
    with pytest.raises(UserError, match="'words'"):
        RegroupedBits(of_bits(), "words")
    with pytest.raises(UserError, match="no powers of two"):
        RegroupedBits(ViTVQ(VectorQuantizer(24, 4), 16, 4, 16, 1, 1, 2))


def test_one_cache_of_the_bits_serves_every_form(tmp_path: Path) -> None:
    inner = of_bits()
    data = ShapesData(size=16, length=6, val_length=4)
    encode_dataset(inner, data.train_dataset(), tmp_path / "train", name="shapes")
    cache = CachedTokens(tmp_path / "train", seed=3)
    bits = cache.batch(range(6))
    readers = (LlamaGen, OpenMAGVIT2AR, BAR)
    for (form, split, _), reader in zip(FORMS, readers, strict=True):
        outer = RegroupedBits(inner, form, split).eval()
        cache.require(outer)
        made = GeneratorModule(outer, partial(reader, width=16, depth=1, num_heads=2))
        tokens = made.tokens_of({**bits})
        outer.layout.check(tokens)
        assert torch.equal(outer.to_source(tokens), bits["tokens"])
