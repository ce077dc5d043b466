import logging

import pytest

from tessellar.data.damage import Damage
from tessellar.data.image_file import UnreadableImage
from tessellar.errors import UserError


class Images:
    """Numbers as images, some of them corrupt; `tried` lists the reads."""

    def __init__(self, total: int, bad: set[int], share: float) -> None:
        self.bad, self.tried = bad, []
        self.damage = Damage(total, share, lambda index: f"image-{index}")

    def __call__(self, index: int) -> int:
        return self.damage.read(index, self.open)[0]

    def open(self, index: int) -> str:
        self.tried.append(index)
        if index in self.bad:
            raise UnreadableImage(f"image-{index} is torn")
        return str(index)


def test_the_next_readable_image_comes_in_place_of_a_corrupt_one():
    images = Images(10, {3, 4, 9}, 0.5)
    assert [images(i) for i in (2, 3, 4, 9)] == [2, 5, 5, 0]
    assert images.damage.corrupt == [3, 4, 9]


def test_what_an_index_gives_does_not_depend_on_the_order_of_visits():
    forwards, backwards = Images(10, {0, 5, 6}, 0.5), Images(10, {0, 5, 6}, 0.5)
    assert [forwards(i) for i in range(10)] == [backwards(i) for i in reversed(range(10))][::-1]


def test_a_corrupt_image_is_opened_once():
    images = Images(10, {3}, 0.5)
    assert [images(3), images(3)] == [4, 4] and images.tried == [3, 4, 4]


def test_the_first_is_named_once(caplog: pytest.LogCaptureFixture):
    images = Images(100, {3, 4}, 0.1)
    with caplog.at_level(logging.WARNING):
        images(3)
        images(4)
    assert [
        record.getMessage() for record in caplog.records if "image-3 is torn" in record.getMessage()
    ]
    assert len(caplog.records) == 1


def test_above_the_share_the_run_stops_and_says_so():
    images = Images(200, set(range(50)), 0.05)
    with pytest.raises(
        UserError, match="11 of 11 .* max_corrupt 0.05 allows; one is image-0, the last: image-10"
    ):
        images(0)


def test_a_large_set_is_judged_by_what_was_read():
    images = Images(
        100_000, set(range(0, 100_000, 50)), 0.01
    )  # every fiftieth is twice what is allowed
    with pytest.raises(UserError, match="allows"):
        for i in range(3000):
            images(i)
    tolerant = Images(100_000, set(range(0, 100_000, 50)), 0.03)
    assert all(tolerant(i) in (i, i + 1) for i in range(3000))


def test_one_corrupt_image_of_few_is_borne_unless_none_is_allowed():
    assert Images(5, {1}, 0.01)(1) == 2
    with pytest.raises(UserError, match="^image-1 is torn$"):
        Images(5, {1}, 0.0)(1)
    with pytest.raises(ValueError, match="max_corrupt is 1.5"):
        Images(5, set(), 1.5)


def test_a_set_without_any_readable_image_ends():
    with pytest.raises(UserError):
        Images(1, {0}, 0.5)(0)
