"""Captions in every reader: read as a person reads them, drawn where there are several, said where they are missing."""

import json
import logging
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from tessellar.checkpoints.export import export_tokenizer
from tessellar.cli.sample import read_prompts
from tessellar.cli.train import main as train
from tessellar.data import ImageFolderData, WebDatasetData, WebDatasetStreamData
from tessellar.data.captions import UnreadableText, decode_text, read_captions
from tessellar.data.dataset import IndexedDataset
from tessellar.data.token_cache.cached_tokens import CachedTokens, CachedTokensData
from tessellar.data.token_cache.writing import encode_dataset
from tessellar.errors import UserError
from tessellar.evaluation.generation import GeneratedImages
from tessellar.models.token_shuffle import TokenShuffle
from tessellar.pipeline import ImageGenerator
from tessellar.sampling.settings import Sampling
from tessellar.tokenizers.quantizers.vq import VectorQuantizer
from tessellar.tokenizers.vit_vq import ViTVQ

SEVERAL = ["a cat", "one cat", "the cat"]


def pictures(make_tar, make_png, path: Path, texts: list, field: str = "json") -> str:
    """A tar of one picture a text; None leaves its text out."""
    members = {}
    for i, text in enumerate(texts):
        content = json.dumps({"caption": text}).encode() if field == "json" else text
        members |= {f"{i:03}.png": make_png(i)} | (
            {} if text is None else {f"{i:03}.{field}": content}
        )
    return str(make_tar(path, members))


def seen(data: IndexedDataset, epochs: int, index: int = 0) -> list[str]:
    texts = []
    for epoch in range(epochs):
        data.set_epoch(epoch)
        texts.append(data.batch([index])["caption"][0])
    return texts


@pytest.mark.parametrize(
    "content, text",
    [
        ("café".encode("utf-8-sig"), "café"),
        ("café".encode("utf-16"), "café"),
        (b"\xfe\xff" + "café".encode("utf-16-be"), "café"),
        ("café".encode("utf-32"), "café"),
        (b"  one\r\ntwo\r\n\r\n", "one\ntwo"),
        (b"", ""),
    ],
)
def test_a_text_file_is_read_as_a_person_reads_it(content: bytes, text: str):
    assert decode_text(content, "x.txt") == text


@pytest.mark.parametrize(
    "content, why",
    [
        ("café".encode("latin-1"), "x.txt is not UTF-8 .*byte 3"),
        (b"\xff\xfea", "x.txt is not UTF-16"),
        ("cat".encode("utf-16-le"), "x.txt holds zero bytes: save it as UTF-8"),
    ],
)
def test_what_is_no_text_is_named(content: bytes, why: str):
    with pytest.raises(UnreadableText, match=why):
        decode_text(content, "x.txt")


def test_a_caption_is_a_text_or_a_list_of_texts():
    assert (
        read_captions(" a\r\n", "x") == ("a",)
        and read_captions(None, "x") == read_captions(" ", "x") == ()
    )
    assert (
        read_captions(["a", None, "", "b "], "x")
        == read_captions(np.array(["a", "b"]), "x")
        == ("a", "b")
    )
    for wrong in (5, 1.5, True, b"a", {"raw": "a"}, [1], [["a"]], [{"raw": "a"}]):
        with pytest.raises(
            UnreadableText, match="x: the caption is .*must be text, or a list of texts"
        ):
            read_captions(wrong, "x")


def test_of_several_captions_of_a_tar_each_visit_draws_one(tmp_path: Path, make_tar, make_png):
    data = WebDatasetData(
        pictures(make_tar, make_png, tmp_path / "t.tar", [SEVERAL] * 8), 12, val_share=0.25
    )
    train_set, again = data.train_dataset(), data.train_dataset()
    assert set(seen(train_set, 20)) == set(SEVERAL) and seen(train_set, 20) == seen(again, 20)
    assert len(set(train_set.captions(range(6)))) > 1  # images draw for themselves
    assert (
        set(seen(data.val_dataset(), 5))
        == set(seen(data.train_dataset(augment=False), 5))
        == {"a cat"}
    )


def test_of_several_captions_of_a_stream_each_visit_draws_one(tmp_path: Path, make_tar, make_png):
    url = pictures(make_tar, make_png, tmp_path / "t.tar", [SEVERAL] * 8)
    data = WebDatasetStreamData(url, url, size=12, epoch_length=32, batch_size=8, buffer=4)
    assert {c for batch in data.train_dataloader() for c in batch["caption"]} == set(SEVERAL)
    assert {c for batch in data.val_dataloader() for c in batch["caption"]} == {"a cat"}
    data.check_captions()


@pytest.fixture
def tokenizer() -> ViTVQ:
    torch.manual_seed(0)
    return ViTVQ(VectorQuantizer(16, 4), 12, 4, 16, 1, 1, 2).eval()


def test_a_cache_keeps_all_captions_and_draws_those_that_its_images_draw(
    tmp_path: Path, make_tar, make_png, tokenizer
):
    texts = [SEVERAL, "a dog", ["x", "y"], None]
    images = WebDatasetData(
        pictures(make_tar, make_png, tmp_path / "t.tar", texts), 12, val_share=0.25, flip=True
    )
    dataset = images.train_dataset()
    encode_dataset(tokenizer, dataset, tmp_path / "cache/train", name="t")
    cache, first = (
        CachedTokens(tmp_path / "cache/train"),
        CachedTokens(tmp_path / "cache/train", augment=False),
    )
    for index in range(len(dataset)):
        assert seen(cache, 12, index) == seen(dataset, 12, index)
    assert first.captions(range(3)) == images.train_dataset(augment=False).captions(range(3))


def test_missing_captions_are_empty_and_their_share_is_said_once(
    tmp_path: Path, make_tar, make_png, caplog: pytest.LogCaptureFixture
):
    texts = [b"cap %d" % i if i % 2 else None for i in range(20)]
    data = WebDatasetData(
        pictures(make_tar, make_png, tmp_path / "half.tar", texts, "txt"), 12, name="my set"
    )
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            captions = data.train_dataset().captions(range(19))
    missing = captions.count("")
    assert missing >= 9 and all(text == "" or text.startswith("cap ") for text in captions)
    (said,) = [record.getMessage() for record in caplog.records]
    assert (
        said.startswith(f"{missing} of 19 images (")
        and "half.tar:000: an empty text is taken" in said
    )


def test_a_stream_says_that_captions_are_missing(
    tmp_path: Path, make_tar, make_png, caplog: pytest.LogCaptureFixture
):
    url = pictures(make_tar, make_png, tmp_path / "t.tar", ["a", None, "b", None])
    data = WebDatasetStreamData(url, url, size=12, epoch_length=4, batch_size=2)
    with caplog.at_level(logging.WARNING):
        assert [c for batch in data.val_dataloader() for c in batch["caption"]] == [
            "a",
            "",
            "b",
            "",
        ]
    assert caplog.text.count("no caption") == 1 and "t.tar:001" in caplog.text


def test_sets_without_any_caption_are_refused_by_whatever_reads_text(
    tmp_path: Path, make_tar, make_png, tokenizer
):
    tar = pictures(make_tar, make_png, tmp_path / "t.tar", [None] * 4)
    data = WebDatasetData(tar, 12, val_share=0.25, name="my set")
    assert "caption" not in data.train_dataset()[0]  # and not the name of the set
    with pytest.raises(UserError, match="my set has no captions, which this generator reads"):
        data.check_captions()
    with pytest.raises(UserError, match="gives no captions"):
        data.train_dataset().captions([0])
    for part, dataset in (("train", data.train_dataset()), ("val", data.val_dataset())):
        encode_dataset(tokenizer, dataset, tmp_path / "cache" / part, name="my set")
    with pytest.raises(UserError, match="my set has no captions"):
        CachedTokensData(str(tmp_path / "cache")).check_captions()
    stream = WebDatasetStreamData(tar, tar, size=12, epoch_length=4, batch_size=2)
    with pytest.raises(UserError, match="none of the first 4 samples of .*t.tar has a caption"):
        stream.check_captions()
    reads = TokenShuffle(tokenizer.layout, 16, 1, 2, 1, text_vocab=300, caption_length=8)
    model = ImageGenerator(tokenizer, reads, reads.make_conditioner())
    with pytest.raises(UserError, match="the data set given has no captions"):
        GeneratedImages(model, 2, Sampling(), data=data.val_dataset())


def test_classes_called_by_numbers_are_no_captions_and_words_are_said(
    tmp_path: Path, make_png, caplog: pytest.LogCaptureFixture
):
    for root, names in (("numbers", ("1", "2")), ("words", ("red_fox", "owl"))):
        for name in names:
            (tmp_path / root / name).mkdir(parents=True)
            for i in range(4):
                (tmp_path / root / name / f"{i}.png").write_bytes(make_png(i))
    with pytest.raises(UserError, match="numbers has no captions"):
        ImageFolderData(str(tmp_path / "numbers"), 12, val_share=0.3).check_captions()
    with caplog.at_level(logging.WARNING):
        ImageFolderData(str(tmp_path / "words"), 12, val_share=0.3).check_captions()
    assert "words has no captions of its own: the names of its classes are the texts" in caplog.text


def test_a_text_to_image_run_on_a_set_without_captions_stops_before_it_begins(
    tmp_path: Path, make_tar, make_png, tokenizer, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    export_tokenizer(tokenizer, tmp_path / "tok")
    tar = pictures(make_tar, make_png, tmp_path / "t.tar", [None] * 8)
    sizes = {
        "width": 16,
        "depth": 1,
        "num_heads": 2,
        "window": 1,
        "text_vocab": 300,
        "caption_length": 8,
    }
    config = {
        "model": {
            "class_path": "tessellar.training.generator_module.GeneratorModule",
            "init_args": {
                "tokenizer": str(tmp_path / "tok"),
                "generator": {
                    "class_path": "tessellar.models.token_shuffle.TokenShuffle",
                    "init_args": sizes,
                },
            },
        },
        "data": {
            "class_path": "tessellar.data.WebDatasetData",
            "init_args": {"shards": tar, "size": 12},
        },
        "trainer": {"max_steps": 1, "accelerator": "cpu", "precision": "32-true"},
    }
    Path("run.yaml").write_text(json.dumps(config))
    with pytest.raises(UserError, match="has no captions, which this generator reads"):
        train(["--config", "run.yaml", "--name", "t2i", "--data.batch_size", "2"])
    assert not Path("runs/t2i").exists()


def test_prompts_are_read_as_a_person_reads_them(tmp_path: Path, tokenizer):
    reads = TokenShuffle(tokenizer.layout, 16, 1, 2, 1, text_vocab=300, caption_length=8)
    read = partial(read_prompts, model=ImageGenerator(tokenizer, reads, reads.make_conditioner()))
    (tmp_path / "p.txt").write_bytes("a café\r\n\r\na dog\r\n".encode("utf-16"))
    assert read(str(tmp_path / "p.txt")) == ["a café", "a dog"]
    (tmp_path / "p.txt").write_bytes("a café".encode("latin-1"))
    with pytest.raises(UserError, match="--prompts .*p.txt is not UTF-8"):
        read(str(tmp_path / "p.txt"))
