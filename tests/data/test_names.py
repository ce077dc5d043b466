"""Names of a million files: one buffer, the same texts, nothing copied into a worker."""

import pickle
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tessellar.data.dataset import _digest_of, digest
from tessellar.data.image_file import read_image
from tessellar.data.names import Names

TEXTS = ["a.png", "", "dog/ä b.jpeg", "of another system \udc80.png", 'quoted "\\.png']


def test_names_are_the_texts_that_were_given():
    names = Names(TEXTS)
    assert list(names) == TEXTS and [names[i] for i in range(-5, 5)] == TEXTS * 2
    assert names == tuple(TEXTS) and names != [*TEXTS[1:], "a.png"] and names != TEXTS[:4]
    assert names[1:4] == TEXTS[1:4] and "a.png" in names and len(Names([])) == 0
    with pytest.raises(IndexError):
        names[5]


def test_names_are_taken_in_any_order_and_again_from_what_was_taken():
    taken = Names(TEXTS).take([3, 0, 0, 1, 4])
    assert list(taken) == [TEXTS[3], TEXTS[0], TEXTS[0], TEXTS[1], TEXTS[4]]
    assert taken.take(np.array([4, 0])) == [TEXTS[4], TEXTS[3]]
    assert len(taken.take([])) == 0 and list(taken.take([3])) == [""]


def test_a_worker_that_is_not_forked_gets_a_handle_not_the_names():
    names = Names(f"n{i:08d}/n{i:08d}_{i}.JPEG" for i in range(20_000))
    assert len(bytes(ForkingPickler.dumps(names))) < 5_000 < 500_000 < len(pickle.dumps(names))
    assert names._content.is_shared() and names[19_999] == "n00019999/n00019999_19999.JPEG"


@pytest.mark.parametrize("name", TEXTS)
def test_the_shorter_way_to_the_hash_of_a_name_gives_the_same_hash(name: str):
    assert _digest_of(name) == digest(file=name)


def test_an_upright_rgb_file_is_not_copied_after_decoding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    pixels = torch.randint(256, (8, 12, 3), dtype=torch.uint8).numpy()
    Image.fromarray(pixels).save(tmp_path / "a.png")
    for name in ("convert", "copy", "transpose"):
        monkeypatch.setattr(Image.Image, name, lambda *_, **__: pytest.fail("a copy was made"))
    assert np.array_equal(np.asarray(read_image(tmp_path / "a.png")), pixels)


def test_a_turned_file_is_turned(tmp_path: Path):
    image = Image.new("RGB", (4, 2), "red")
    exif = image.getexif()
    exif[0x0112] = 6  # turned by a quarter
    image.save(tmp_path / "turned.png", exif=exif)
    assert read_image(tmp_path / "turned.png").size == (2, 4)
