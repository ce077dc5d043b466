"""Captions: a BPE learnt from the run's own, frozen encoders with a cache on disk, prompts from a file."""

import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from tessellar.checkpoints.export import export_generator
from tessellar.cli.sample import main, read_prompts
from tessellar.data.tars.webdataset_tar import WebDatasetTars
from tessellar.errors import UserError
from tessellar.models.llamagen import LlamaGen
from tessellar.models.token_shuffle import TokenShuffle
from tessellar.pipeline import ImageGenerator, load_generator
from tessellar.protocol.condition import ClassConditioner
from tessellar.protocol.configured import build
from tessellar.sampling.settings import Sampling
from tessellar.sampling.speculative import SpeculativeJacobi
from tessellar.text.bpe import BOS, FIRST_PAIR, bpe_of, pad_left, require, train_bpe
from tessellar.text.conditioners import CaptionConditioner, EncoderConditioner, PublishedIds
from tessellar.tokenizers.quantizers.vq import VectorQuantizer
from tessellar.tokenizers.vit_vq import ViTVQ

CAPTIONS = ["a red circle", "a blue circle", "a red square", "the blue square on a table"] * 5


def learnt(vocab_size: int = 300, length: int = 16) -> CaptionConditioner:
    conditioner = CaptionConditioner(vocab_size, length)
    conditioner.prepare(lambda: CAPTIONS)
    return conditioner


def text_model() -> ImageGenerator:
    torch.manual_seed(0)
    tokenizer = ViTVQ(VectorQuantizer(16, 4), 8, 2, 16, 1, 1, 2)
    generator = TokenShuffle(tokenizer.layout, 16, 1, 2, 2, text_vocab=300, caption_length=16)
    for parameter in generator.parameters():
        nn.init.normal_(parameter, std=0.5)
    return ImageGenerator(tokenizer, generator, learnt()).eval()


def test_texts_survive_and_begin_with_one_id() -> None:
    bpe = learnt().bpe
    for text in ("a red circle", "häßlich 漢字 🙂", ""):
        ids = bpe.encode(text, 99)
        assert ids[0] == BOS and bpe.decode(ids) == text
    assert bpe.encode("A RED Circle ", 99) == bpe.encode("a red circle", 99)
    assert (
        len(bpe.encode("a red circle", 99)) <= 4 < len(bpe.encode("zxqv", 99))
    )  # words of the captions are merged
    assert bpe.encode("a red circle and more", 3) == bpe.encode("a red circle", 99)[:3]


def test_a_bpe_is_its_table_of_pairs() -> None:
    merges = train_bpe(CAPTIONS, 20)
    assert merges.shape == (20, 2) and bool((merges < FIRST_PAIR + torch.arange(20)[:, None]).all())
    again = bpe_of(tuple((int(a), int(b)) for a, b in merges), True)
    longest = max(again.encode(text, 99) for text in CAPTIONS)
    assert max(longest) < FIRST_PAIR + 20
    assert torch.equal(train_bpe(CAPTIONS, 20), merges)


def test_captions_are_padded_on_the_left_and_cut() -> None:
    given = learnt(length=6).of_texts(
        ["a red circle", "", "a very long caption that nobody can read"]
    )
    assert given.ids is not None and given.valid is not None
    assert given.ids.shape == (3, 6) and given.valid[1].tolist() == [False] * 5 + [True]
    assert given.ids[given.valid].min() == BOS and bool(given.valid[2].all())
    assert not bool(given.ids[~given.valid].any())


def test_what_the_run_learns_stays_with_its_model(tmp_path: Path) -> None:
    model = text_model()
    loaded = load_generator(export_generator(model, tmp_path / "export"))
    prompts = ["a red circle", "the blue table"]
    assert isinstance(loaded.conditioner, CaptionConditioner)
    before, after = learnt().of_texts(prompts), loaded.conditioner.of_texts(prompts)
    assert before.ids is not None and after.ids is not None and torch.equal(before.ids, after.ids)
    loaded.conditioner.prepare(lambda: ["others"] * 9)  # a resumed run keeps its own
    assert torch.equal(loaded.conditioner.merges, model.conditioner.merges)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="has not been learnt"):
        CaptionConditioner(300).of_texts(["a"])
    with pytest.raises(UserError, match="no captions"):
        learnt()({"label": torch.zeros(1)})
    with pytest.raises(UserError, match="vocab_size 100"):
        CaptionConditioner(100)


def test_prompts_of_a_file(tmp_path: Path) -> None:
    """An image a prompt, whatever the batch, recorded with its text."""
    model, file = text_model(), tmp_path / "prompts.txt"
    file.write_text("a red circle\n\n  the blue square \nzebra\n", encoding="utf-8")
    folder = str(export_generator(model, tmp_path / "export"))
    main(
        [
            folder,
            "--prompts",
            str(file),
            "--out",
            str(tmp_path / "a"),
            "--npz",
            "--guidance.scale",
            "2",
        ]
    )
    main(
        [
            folder,
            "--prompts",
            str(file),
            "--out",
            str(tmp_path / "b"),
            "--guidance.scale",
            "2",
            "--batch-size",
            "2",
        ]
    )
    record = json.loads((tmp_path / "a" / "samples.json").read_text())
    assert (
        record["prompts"] == ["a red circle", "the blue square", "zebra"] and record["count"] == 3
    )
    second = "000001_0001_the-blue-square.png"
    images = [(tmp_path / name / second).read_bytes() for name in ("a", "b")]
    assert images[0] == images[1] != (tmp_path / "a" / "000000_0000_a-red-circle.png").read_bytes()
    with pytest.raises(UserError, match="conditioned on text, not on class ids: give prompts"):
        main([folder, "--out", str(tmp_path / "c")])
    file.write_text("\n")
    with pytest.raises(UserError, match="holds no prompt"):
        read_prompts(str(file), model)
    with pytest.raises(UserError, match="cannot be read"):
        read_prompts(str(tmp_path / "none.txt"), model)
    classes = LlamaGen(model.tokenizer.layout, 16, 1, 2, num_classes=2, ffn_multiple_of=8)
    with pytest.raises(UserError, match="needs a generator that is conditioned on text"):
        read_prompts(str(file), ImageGenerator(model.tokenizer, classes, ClassConditioner(2)))


def test_speculative_decoding_of_captions_gives_the_same_images() -> None:
    model = text_model()
    given = learnt().of_texts(["a red circle", "a table"])
    plain = Sampling().tokens(model.generator, given, [0, 1])
    fast = Sampling(algorithm=SpeculativeJacobi()).tokens(model.generator, given, [0, 1])
    assert plain.shape == fast.shape == (2, 16)


class Encoder:
    """Stands for `transformers`: a token a word, features are the word's length; counts the texts that it reads."""

    __version__ = "0"

    def __init__(self) -> None:
        self.read: list[str] = []
        self.AutoConfig = SimpleNamespace(
            from_pretrained=lambda _, **__: SimpleNamespace(model_type="t5")
        )
        self.AutoTokenizer = SimpleNamespace(from_pretrained=lambda _, **__: self.tokenize)
        self.T5EncoderModel = SimpleNamespace(from_pretrained=lambda _, **__: Lengths())

    def tokenize(self, texts: list[str], max_length: int, **_: object) -> "Encoded":
        self.read += texts
        rows = [torch.tensor([len(word) for word in text.split()][:max_length]) for text in texts]
        width = max(map(len, rows))
        ids = torch.stack([nn.functional.pad(row, (0, width - len(row))) for row in rows])
        return Encoded(input_ids=ids, attention_mask=(ids > 0).long())


class Encoded(dict):
    def to(self, _: object) -> "Encoded":
        return self


class Lengths(nn.Module):
    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> SimpleNamespace:
        return SimpleNamespace(
            last_hidden_state=(input_ids * attention_mask)[..., None].expand(-1, -1, 3) + 0.001
        )


def test_features_are_padded_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library = Encoder()
    monkeypatch.setattr("tessellar.text.encoders.require", lambda _: library)
    conditioner = EncoderConditioner("some/t5", 4, str(tmp_path / "cache"))
    first = conditioner.of_texts(["a red circle", "table", "table"])
    assert first.features is not None and first.valid is not None
    assert first.valid.tolist() == [[False, True, True, True]] + [[False, False, False, True]] * 2
    assert first.features[0, 1:, 0].tolist() == [1, 3, 6] and not bool(
        first.features[~first.valid].any()
    )
    again = EncoderConditioner("some/t5", 4, str(tmp_path / "cache")).of_texts(
        ["table", "a red circle"]
    )
    assert again.features is not None and torch.equal(again.features, first.features[[1, 0]])
    assert library.read == ["a red circle", "table"]
    EncoderConditioner("some/t5", 3, str(tmp_path / "cache")).of_texts(
        ["table"]
    )  # another length, another text
    EncoderConditioner("some/t5", 4, None).of_texts(["table"])
    assert library.read.count("table") == 3
    assert list(conditioner.state_dict()) == []


def test_ids_of_a_published_vocabulary(monkeypatch: pytest.MonkeyPatch) -> None:
    def words(texts: list[str], max_length: int, truncation: bool) -> dict[str, list[list[int]]]:
        assert truncation
        return {"input_ids": [[1, *map(len, text.split())][:max_length] for text in texts]}

    library = Encoder()
    library.AutoTokenizer = SimpleNamespace(from_pretrained=lambda _, **__: words)
    monkeypatch.setattr("tessellar.text.encoders.require", lambda _: library)
    conditioner = PublishedIds("some/llama", 3)
    found = conditioner.of_texts(["a red circle", "table"])
    assert found.ids is not None and found.valid is not None
    assert found.ids[0].tolist() == [1, 1, 3] and found.ids[1, 1:].tolist() == [1, 5]
    assert found.valid.tolist() == [[True] * 3, [False, True, True]]
    assert conditioner.is_prepared and list(conditioner.state_dict()) == []
    # Of a file of others, only what the user trusts is read.
    with pytest.raises(UserError, match="names the text encoder 'some/llama'"):
        build(conditioner.config)

    def absent(source: str, **_: object) -> None:
        raise OSError(f"{source} is not there")

    library.AutoTokenizer = SimpleNamespace(from_pretrained=absent)
    with pytest.raises(UserError, match="the vocabulary of some/llama cannot be read .*not there"):
        PublishedIds("some/llama").of_texts(["x"])


def test_an_unknown_encoder_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    library = Encoder()
    library.AutoConfig = SimpleNamespace(
        from_pretrained=lambda _, **__: SimpleNamespace(model_type="bert")
    )
    monkeypatch.setattr("tessellar.text.encoders.require", lambda _: library)
    with pytest.raises(UserError, match="a/b is a bert; T5 and CLIP"):
        EncoderConditioner("a/b", 4, None).of_texts(["x"])


@pytest.mark.parametrize(
    "found", [None, ModuleType("tokenizers")], ids=["nothing", "our own folder"]
)
def test_the_extra_is_named(found: ModuleType | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the package an import from a checkout finds our folder `tokenizers`, a module without a version."""
    monkeypatch.setitem(sys.modules, "tokenizers", found)
    with pytest.raises(
        UserError, match=r"need Hugging Face's package tokenizers: pip install 'tessellar\[text\]'"
    ):
        require("tokenizers")


def test_rows_of_unequal_length() -> None:
    padded, valid = pad_left([torch.tensor([1, 2]), torch.tensor([3])], 3)
    assert padded.tolist() == [[0, 1, 2], [0, 0, 3]] and valid.sum(1).tolist() == [2, 1]


def test_shuffled_captions_are_a_fixed_permutation() -> None:
    class Tars(WebDatasetTars):
        def __init__(self, shuffled: bool) -> None:
            samples = SimpleNamespace(labels=torch.zeros(50).long().numpy(), __len__=None)
            facts = {
                "labels": samples.labels,
                "captioned": samples.labels == 0,
                "__len__": lambda _: 50,
            }
            samples = type("Samples", (), facts)()
            framing = SimpleNamespace(size=8)
            super().__init__(samples, ("x",), framing, shuffle_captions=shuffled)  # type: ignore[arg-type]

        def own_texts(self, index: int) -> tuple[str, ...]:
            return (str(index),)

    own, told, again = (Tars(s).captions(range(50)) for s in (False, True, True))
    assert own == [str(i) for i in range(50)] and sorted(told) == sorted(own)
    assert told == again and sum(a == b for a, b in zip(own, told, strict=True)) < 10
