import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tessellar.data import (
    CachedTokens,
    CachedTokensData,
    FashionMNIST,
    ImageFolder,
    ImageFolderData,
    Shapes,
)
from tessellar.data.dataset import ImageDataset
from tessellar.data.token_cache.files import read_header
from tessellar.data.token_cache.writing import encode, encode_dataset
from tessellar.errors import UserError
from tessellar.protocol.layout import Bits, Categorical, Continuous, Factorized, Kind, grid_layout
from tessellar.protocol.tokenizer import Tokenizer, TokenizerOutput


class Pixels(Tokenizer):
    """Four tokens an image, one for each quarter, made from its mean colour; `gain` is its only weight."""

    def __init__(self, kind: Kind, size: int = 16) -> None:
        super().__init__()
        self.layout, self.image_size = grid_layout(2, 2, kind), (size, size)
        self.gain = nn.Parameter(torch.ones(()))

    def encode(self, images: Tensor) -> Tensor:
        mean = (
            nn.functional.adaptive_avg_pool2d((images + 1) / 2, 2).flatten(2).transpose(1, 2)
            * self.gain
        )
        match self.layout.segments[0].kind:
            case Categorical(vocab):
                return (mean.mean(2) * (vocab - 1)).long()
            case Factorized(vocabs):
                return (mean[..., : len(vocabs)] * (torch.tensor(vocabs) - 1)).long()
            case Bits(n):
                return (mean.mean(2, keepdim=True) * torch.arange(1, n + 1) % 1 > 0.5).long()
            case _:
                return mean

    def decode(self, tokens: Tensor) -> Tensor:
        return tokens.float()

    def forward(self, images: Tensor) -> TokenizerOutput:
        return TokenizerOutput(images, self.encode(images), {})

    @property
    def last_layer(self) -> nn.Parameter:
        return self.gain


class Fuzzy(Pixels):
    """A continuous tokenizer with a posterior."""

    def posterior(self, images: Tensor) -> tuple[Tensor, Tensor]:
        mean = self.encode(images)
        return mean, 0.5 * torch.ones_like(mean)


def write(
    dataset: ImageDataset, folder: Path, tokenizer: Tokenizer | None = None, **options: Any
) -> CachedTokens:
    encode_dataset(
        tokenizer or Pixels(Categorical(700)), dataset, folder, name="pictures", **options
    )
    return CachedTokens(folder)


@pytest.mark.parametrize("kind", [Categorical(700), Factorized((5, 900)), Bits(11), Continuous(3)])
def test_a_cache_holds_what_the_tokenizer_makes(tmp_path: Path, kind: Kind):
    dataset, tokenizer = Shapes(16, 30), Pixels(kind)
    cache = write(dataset, tmp_path / "cache", tokenizer)
    batch, expected = cache.batch([7, 29, 0]), dataset.batch([7, 29, 0])
    tokens = encode(tokenizer, expected["image"])
    assert torch.equal(batch["tokens"], tokens) and batch["tokens"].dtype == tokens.dtype
    assert batch["caption"] == expected["caption"]
    assert all(torch.equal(batch[key], expected[key]) for key in ("label", "index"))
    assert len(cache) == 30 and cache.class_names == dataset.class_names


def views_of(name: str, image_root: Path, idx_root: Path) -> ImageDataset:
    match name:
        case "ten":
            return ImageFolder(image_root, 16, "ten", ten_ratios=(1.1, 1.3), seed=4)
        case "flip":
            return ImageFolder(image_root, 16, flip=True, seed=4)
        case _:
            return FashionMNIST(idx_root, "test", flip=True, seed=4)


@pytest.mark.parametrize("name, views", [("ten", 20), ("flip", 2), ("fashion-mnist", 2)])
def test_each_visit_gives_the_tokens_of_the_view_that_the_images_would_show(
    tmp_path: Path, image_root: Path, idx_root: Path, name: str, views: int
):
    dataset = views_of(name, image_root, idx_root)
    tokenizer = Pixels(Categorical(60_000), 32 if name == "fashion-mnist" else 16)
    encode_dataset(tokenizer, dataset, tmp_path / "cache", name="x", batch_size=7)
    cache = CachedTokens(tmp_path / "cache", seed=4)
    assert cache.header.views == views
    seen = set()
    for epoch in range(4):
        for each in (cache, dataset):
            each.set_epoch(epoch)
        expected = encode(tokenizer, dataset.batch(range(12))["image"])
        assert torch.equal(cache.batch(range(12))["tokens"], expected)
        seen.add(tuple(expected.flatten().tolist()))
    assert len(seen) > 1
    still = CachedTokens(tmp_path / "cache", augment=False).batch(range(12))["tokens"]
    assert torch.equal(
        still, encode(tokenizer, torch.cat([dataset.views(i)["image"][:1] for i in range(12)]))
    )


def test_random_crops_cannot_be_cached(tmp_path: Path, image_root: Path):
    with pytest.raises(UserError, match="cannot be enumerated"):
        write(ImageFolder(image_root, 16, "random"), tmp_path / "cache")
    assert not list(tmp_path.glob("*cache*"))


def test_a_posterior_is_sampled_anew_at_each_visit(tmp_path: Path):
    cache = write(Shapes(16, 400), tmp_path / "cache", Fuzzy(Continuous(3)))
    assert cache.header.storage.kind == "posterior"
    mean = encode(Pixels(Continuous(3)), Shapes(16, 400).batch(range(400))["image"])
    noise = []
    for epoch in range(2):
        cache.set_epoch(epoch)
        tokens = cache.batch(range(400))["tokens"]
        assert torch.equal(tokens[3], cache.batch([9, 3])["tokens"][1])
        noise.append((tokens - mean) / 0.5)
    assert not torch.equal(noise[0], noise[1])
    both = torch.stack(noise)
    assert abs(both.mean()) < 0.05 and abs(both.std() - 1) < 0.05


def test_corrupt_images_are_replaced_as_in_training_and_counted(tmp_path: Path, image_root: Path):
    (image_root / "cat" / "10.png").write_bytes(b"")
    cache = write(ImageFolder(image_root, 16), tmp_path / "cache")
    batch = cache.batch([3, 4])
    assert torch.equal(batch["tokens"][0], batch["tokens"][1]) and batch["label"].tolist() == [1, 1]
    assert batch["caption"] == ["dog", "dog"] and cache.header.corrupt == 1


def test_workers_and_batches_change_nothing(tmp_path: Path, image_root: Path):
    dataset = ImageFolder(image_root, 16, flip=True)
    parts = [
        write(dataset, tmp_path / f"{n}", num_workers=n, batch_size=b) for n, b in ((0, 64), (2, 5))
    ]
    files = [sorted(p.name for p in part.folder.iterdir()) for part in parts]
    assert files[0] == files[1]
    for name in files[0]:
        assert (parts[0].folder / name).read_bytes() == (parts[1].folder / name).read_bytes()


def test_another_tokenizers_cache_is_refused(tmp_path: Path):
    tokenizer = Pixels(Categorical(700))
    cache = write(Shapes(16, 10), tmp_path / "cache", tokenizer)
    cache.require(tokenizer)
    cache.require(Pixels(Categorical(700)))
    other = Pixels(Categorical(700))
    nn.init.constant_(other.gain, 0.5)
    for wrong in (other, Pixels(Categorical(701))):
        with pytest.raises(UserError, match="was encoded by another tokenizer .*convert.py cache"):
            cache.require(wrong)


class Failing(Shapes):
    """Breaks off in the middle."""

    def batch(self, indices):
        if 8 in indices:
            raise KeyboardInterrupt
        return super().batch(indices)


def test_an_interruption_leaves_nothing_and_an_older_cache_as_it_was(tmp_path: Path):
    with pytest.raises(KeyboardInterrupt):
        write(Failing(16, 10), tmp_path / "new")
    assert list(tmp_path.iterdir()) == []
    older = write(Shapes(16, 10), tmp_path / "old").batch(range(10))["tokens"]
    with pytest.raises(KeyboardInterrupt):
        write(Failing(16, 10, seed=1), tmp_path / "old", overwrite=True)
    assert torch.equal(CachedTokens(tmp_path / "old").batch(range(10))["tokens"], older)
    with pytest.raises(UserError, match="exists; .*--overwrite"):
        write(Shapes(16, 10), tmp_path / "old")
    assert len(write(Shapes(16, 12), tmp_path / "old", overwrite=True)) == 12


def test_a_tokenizer_that_makes_nan_is_refused(tmp_path: Path):
    for broken in (Pixels(Continuous(3)), Fuzzy(Continuous(3))):
        nn.init.constant_(broken.gain, float("nan"))
        with pytest.raises(UserError, match="not finite"):
            write(Shapes(16, 4), tmp_path / "cache", broken)
    assert not list(tmp_path.iterdir())


def test_what_a_kill_leaves_behind_is_not_taken_for_a_cache(tmp_path: Path):
    write(Shapes(16, 10), tmp_path / "cache")
    (tmp_path / "cache" / "header.json").unlink()
    with pytest.raises(UserError, match="is not a complete cache"):
        CachedTokens(tmp_path / "cache")


@pytest.mark.parametrize(
    "name", ["tokens.npy", "labels.npy", "captions.npy", "captions.bin", "header.json"]
)
@pytest.mark.parametrize("damage", ["missing", "empty", "half", "zip", "pickle"])
def test_a_damaged_file_is_named(tmp_path: Path, name: str, damage: str):
    folder = write(Shapes(16, 10), tmp_path / "cache").folder
    match damage:
        case "missing":
            (folder / name).unlink()
        case "empty":
            (folder / name).write_bytes(b"")
        case "half":
            (folder / name).write_bytes((folder / name).read_bytes()[:-20])
        case "zip":
            with open(folder / name, "wb") as file:
                np.savez(file, a=np.arange(3))
        case "pickle":
            with open(folder / name, "wb") as file:
                np.save(file, np.array([print], dtype=object), allow_pickle=True)
    with pytest.raises(UserError, match=name.split(".")[0]):
        CachedTokens(folder)


@pytest.mark.parametrize(
    "change",
    [
        {"count": 11},
        {"count": "many"},
        {"views": 3},
        {"version": 2},
        {"format": "another"},
        {"class_names": ["one"]},
        {"storage": {"kind": "ids", "dtype": "uint8", "shape": [4]}},
        {"storage": {"kind": "ids", "dtype": "O", "shape": [4]}},
        {"layout": {"class_path": "os.system", "init_args": {"command": "true"}}},
        {"layout": {"class_path": "tessellar.protocol.layout.Bits", "init_args": {"n": 3}}},
        {"unknown": 1},
        {"image_size": 16},
    ],
    ids=str,
)
def test_a_header_that_does_not_fit_is_refused(tmp_path: Path, change: dict):
    path = write(Shapes(16, 10), tmp_path / "cache").folder / "header.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError):
        CachedTokens(path.parent)


def test_tokens_outside_the_vocabulary_are_noticed(tmp_path: Path):
    cache = write(Shapes(16, 10), tmp_path / "cache")
    tokens = np.load(cache.folder / "tokens.npy")
    tokens[4] = 700
    np.save(cache.folder / "tokens.npy", tokens)
    damaged = CachedTokens(cache.folder)
    damaged.batch([3, 5])
    with pytest.raises(UserError, match="tokens.npy is damaged .*700"):
        damaged.batch([3, 4])


@pytest.mark.parametrize("name", ["tokens.npy", "labels.npy", "checksums.npy"])
def test_a_flipped_bit_is_noticed(tmp_path: Path, name: str):
    folder = write(Shapes(16, 10), tmp_path / "cache").folder
    content = bytearray((folder / name).read_bytes())
    content[-2 if name == "tokens.npy" else -8] ^= 1  # still a token of the vocabulary, and a class
    (folder / name).write_bytes(content)
    with pytest.raises(UserError, match=f"{name} is damaged"):
        CachedTokens(folder).batch(range(10))


def test_a_cache_without_checksums_is_read_with_one_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    cache = write(Shapes(16, 10), tmp_path / "cache")
    header = cache.folder / "header.json"
    header.write_text(
        json.dumps({k: v for k, v in json.loads(header.read_text()).items() if k != "checksums"})
    )
    (cache.folder / "checksums.npy").unlink()
    caplog.set_level("INFO", "tessellar")
    older = CachedTokens(cache.folder)
    assert caplog.messages == [
        f"{cache.folder} carries no checksums, so damage to it would not be noticed"
    ]
    assert torch.equal(older.batch(range(10))["tokens"], cache.batch(range(10))["tokens"])


def test_a_cache_travels_to_workers_without_its_tokens(tmp_path: Path):
    cache = write(Shapes(16, 800), tmp_path / "cache")
    cache.batch([0])
    content = pickle.dumps(cache)
    moved = pickle.loads(content)
    assert len(content) < 800 * (
        8 + 4
    )  # labels travel, tokens of two bytes each and captions do not
    assert torch.equal(moved.batch([799])["tokens"], cache.batch([799])["tokens"])


def test_the_data_module_reads_both_parts_and_the_facts_of_the_header(
    tmp_path: Path, image_root: Path
):
    images = ImageFolderData(str(image_root), 16, val_share=0.25, batch_size=3, seed=2)
    for part, dataset in (("train", images.train_dataset()), ("val", images.val_dataset())):
        encode_dataset(Pixels(Categorical(700)), dataset, tmp_path / part, name=images.name)
    data = CachedTokensData(str(tmp_path), batch_size=3, seed=2)
    assert (data.name, data.image_size, data.class_names) == (
        "pictures",
        (16, 16),
        images.class_names,
    )
    assert data.fingerprint() == CachedTokensData(str(tmp_path)).fingerprint()
    for ours, theirs in zip(data.train_dataloader(), images.train_dataloader(), strict=True):
        assert torch.equal(ours["index"], theirs["index"]) and torch.equal(
            ours["label"], theirs["label"]
        )
        assert torch.equal(ours["tokens"], Pixels(Categorical(700)).encode(theirs["image"]))
    assert [len(batch["index"]) for batch in data.val_dataloader()] == [3]
    with pytest.raises(UserError, match="holds tokens, not images"):
        data.val_dataset()
    with_images = CachedTokensData(str(tmp_path), images=images)
    assert torch.equal(with_images.val_dataset()[0]["image"], images.val_dataset()[0]["image"])
    assert len(with_images.train_dataset(augment=False)) == 9


def test_a_missing_part_is_named(tmp_path: Path):
    with pytest.raises(UserError, match="train is not a complete cache"):
        CachedTokensData(str(tmp_path)).train_dataloader()


def test_bf16_is_a_choice_and_recorded(tmp_path: Path):
    assert write(Shapes(16, 4), tmp_path / "a").header.precision == "float32"
    assert write(Shapes(16, 4), tmp_path / "b", precision="bf16").header.precision == "bf16"


def test_images_of_another_size_are_refused_before_anything_is_written(tmp_path: Path):
    with pytest.raises(UserError, match="images of 32x32"):
        write(Shapes(32, 4), tmp_path / "cache")
    assert not list(tmp_path.iterdir())


values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.text(max_size=5)
    | st.just("tessellar.protocol.layout.Layout"),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["class_path", "init_args"]), inner)
    ),
    max_leaves=6,
)


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    key=st.sampled_from(
        ["storage", "layout", "count", "views", "class_names", "image_size", "captions"]
    ),
    value=values,
)
def test_any_header_is_read_or_refused(tmp_path: Path, key: str, value: Any):
    path = tmp_path / "cache" / "header.json"
    if not path.exists():
        write(Shapes(16, 4), path.parent)
        shutil.copy(path, tmp_path / "whole.json")
    path.write_text(json.dumps(json.loads((tmp_path / "whole.json").read_text()) | {key: value}))
    try:
        header = read_header(path.parent)
    except UserError as error:
        assert (
            "header.json" in str(error) or "class path" in str(error) or "config of" in str(error)
        )
    else:
        assert header.count > 0 and header.token_layout.length == 4
