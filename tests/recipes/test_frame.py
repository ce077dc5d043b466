"""The comparison of recipes itself: what it takes for equal, and that nothing recorded is left out silently."""

from tessellar.cli.recipes import Difference, compare, recorded_facts
from tessellar.data.crops import Resize
from tests.recipes.frame import CONFIGS, DIFFERENCES, ENTRIES


def test_a_recorded_fact_that_has_nothing_of_ours_is_a_mismatch() -> None:
    (found,) = compare({"dropout.mystery": 0.1}, {"dropout.token": 0.1})
    assert str(found) == "dropout.mystery: recorded 0.1, ours 'nothing'"


def test_numbers_words_and_lists_are_compared_by_their_meaning() -> None:
    recorded = recorded_facts(
        {
            "optimizer": {"lr": 1e-4, "betas": [0.9, 0.95], "eps": None},
            "augmentation": {
                "crop": "random 256",
                "resize": "shorter side 288 (1.125 * 256), Lanczos",
                "flip": 0.0,
            },
            "losses": [{"name": "a", "weight": 1.0, "reduction": "mean"}],
            "note": "a remark",
        }
    )
    ours = {
        "optimizer.lr": 0.0001,
        "optimizer.betas": [0.9, 0.95],
        "framing.crop": "random",
        "framing.size": 256,
        "framing.resize": Resize(1.125, "lanczos"),
        "framing.flip": False,
        "losses.a.weight": 1,
    }
    assert compare(recorded, ours) == []
    wrong = {
        "optimizer.lr": 0.00011,
        "framing.resize": Resize(1.125, "bicubic"),
        "framing.flip": True,
        "losses.a.weight": 0.5,
    }
    found = {item.name for item in compare(recorded, ours | wrong)}
    assert found == {"optimizer.lr", "augmentation.resize", "augmentation.flip", "losses.a.weight"}


def test_words_without_a_meaning_are_a_mismatch() -> None:
    assert [
        item.name
        for item in compare({"augmentation.crop": "some other crop"}, {"framing.crop": "adm"})
    ] == ["augmentation.crop"]


def test_a_difference_covers_what_its_patterns_say() -> None:
    difference = Difference(("var_*",), "generator", "schedule.factor.*", "why")
    assert difference.covers("var_d16", "generator", "schedule.factor.50")
    assert not difference.covers("rar_b", "generator", "schedule.factor.50")
    assert not difference.covers("var_d16", "discriminator", "schedule.factor.50")
    assert not difference.covers("var_d16", "generator", "schedule.updates")


def test_lists_name_recipes_that_exist() -> None:
    names = {path.stem for path in CONFIGS.glob("*.yaml")}
    assert set(ENTRIES) <= names
    assert all(
        any(
            difference.concerns(name, side)
            for name, entry in ENTRIES.items()
            for side in entry.parts
        )
        for difference in DIFFERENCES
    )
