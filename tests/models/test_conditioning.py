"""Conditioning is one attribute of a generator: it makes the conditioner and the null condition of every one."""

import inspect

import pytest
import torch

from tessellar.errors import UserError
from tessellar.models.flextok import FlexAR
from tessellar.models.llamagen import LlamaGen
from tessellar.protocol.condition import (
    ClassConditioner,
    ClassConditioning,
    Condition,
    Conditioning,
)
from tessellar.protocol.generator import Generator
from tests.tiny.pairs import CLASSES, GENERATORS, TOKENIZERS, reason_against

PAIRS = {g: next(t for t in TOKENIZERS if reason_against(t, g) is None) for g in GENERATORS}


@pytest.mark.parametrize("name", GENERATORS)
def test_a_generator_has_one_conditioning_and_no_rule_of_its_own(name: str) -> None:
    with torch.device("meta"):
        generator = GENERATORS[name](TOKENIZERS[PAIRS[name]]().layout)
    assert isinstance(generator.conditioning, Conditioning)
    conditioner = generator.make_conditioner()
    assert isinstance(conditioner, ClassConditioner) and conditioner.num_classes == CLASSES
    null = generator.null(Condition(ids=torch.tensor([0, 2])))
    assert null.ids is not None and null.ids.tolist() == [CLASSES] * 2
    for method in ("make_conditioner", "null", "drop_condition", "condition_dropout"):
        assert getattr(type(generator), method) is getattr(Generator, method)
    given = "condition_dropout" in inspect.signature(type(generator).__init__).parameters
    assert generator.conditioning.dropout == (0.1 if given else 0.0)


def test_conditions_are_dropped_as_often_as_it_says_and_in_training_alone() -> None:
    generator = LlamaGen(TOKENIZERS["TiTok"]().layout, 16, 1, 2, CLASSES, condition_dropout=0.25)
    labels = Condition(ids=torch.zeros(4000, dtype=torch.int64))
    torch.manual_seed(0)
    dropped = generator.train().drop_condition(labels).ids
    assert dropped is not None and set(dropped.tolist()) == {0, CLASSES}
    assert 900 < int((dropped == CLASSES).sum()) < 1100
    assert generator.eval().drop_condition(labels) is labels
    with pytest.raises(UserError, match=r"condition_dropout is 1.5; it must be a finite number"):
        ClassConditioning(CLASSES, dropout=1.5)


def test_another_class_may_stand_for_none() -> None:
    null = ClassConditioning(5, null_class=0).null(Condition(ids=torch.tensor([3, 4])))
    assert null.ids is not None and null.ids.tolist() == [0, 0]


def test_names_of_the_empty_prompt_of_before_are_taken() -> None:
    """The buffers moved into the conditioning of texts; other generators have no new names."""
    with torch.device("meta"):
        names = list(FlexAR(TOKENIZERS["TiTok"]().layout, 16, 1, 2, None, text_dim=6).state_dict())
        plain = list(FlexAR(TOKENIZERS["TiTok"]().layout, 16, 1, 2, CLASSES).state_dict())
    assert {"conditioning.empty", "conditioning.empty_valid"} <= set(names)
    assert not any(name.startswith("conditioning") for name in plain)
