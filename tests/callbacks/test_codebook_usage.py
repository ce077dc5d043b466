"""Codebook usage: numbers of known frequencies, per segment and kind; windows; the warning."""

import logging
from types import SimpleNamespace

import pytest
import torch

from tessellar.callbacks.codebook_usage import CodebookUsage, add_counts, codebooks, usage
from tessellar.protocol.layout import (
    Bits,
    Categorical,
    Continuous,
    Factorized,
    Layout,
    Segment,
    sequence_layout,
)


class Module:
    def __init__(self, layout: Layout) -> None:
        self.tokenizer, self.batches, self.updates = SimpleNamespace(layout=layout), 0, 0
        self.logged: dict[str, float] = {}

    def log_dict(self, values: dict[str, float]) -> None:
        self.logged |= values


def batch_end(callback: CodebookUsage, module: Module, tokens: torch.Tensor) -> None:
    module.batches += 1
    module.updates += 1
    callback.on_train_batch_end(None, module, {"tokens": tokens}, None, 0)  # type: ignore[arg-type]


def test_numbers_of_known_frequencies() -> None:
    facts = usage((torch.tensor([4, 4, 0, 0, 0, 0, 0, 0]),))
    assert facts == pytest.approx({"usage": 0.25, "perplexity": 2.0, "dead": 6.0})


def test_each_segment_has_its_own_codebook() -> None:
    layout = Layout(
        (Segment((2,), Categorical(4), "coarse"), Segment((2, 2), Categorical(8), "fine"))
    )
    module, callback = Module(layout), CodebookUsage(every=1)
    batch_end(callback, module, torch.tensor([[0, 1, 0, 1, 2, 3], [2, 3, 3, 2, 1, 0]]))
    assert (
        module.logged["train/codebook_coarse_usage"] == 1.0
        and module.logged["train/codebook_coarse_dead"] == 0
    )
    assert module.logged["train/codebook_fine_usage"] == 0.5
    assert module.logged["train/codebook_fine_perplexity"] == pytest.approx(4.0)


@pytest.mark.parametrize(
    ("kind", "tokens", "expected"),
    [
        (Factorized((4, 2)), [[[0, 0], [1, 0]]], [2 / 4, 1 / 2]),
        (Bits(3), [[[0, 0, 1], [1, 0, 1]]], [1, 1 / 2, 1 / 2]),
    ],
)
def test_factors_and_bits_are_codebooks_of_their_own(kind, tokens, expected: list[float]) -> None:
    layout = sequence_layout(2, kind)
    (counts,) = add_counts([], torch.tensor(tokens), layout)
    parts = counts.split(codebooks(layout.segments[0]))
    assert [float((part > 0).float().mean()) for part in parts] == expected
    assert usage(parts)["usage"] == pytest.approx(sum(expected) / len(expected))


def test_continuous_tokens_have_none() -> None:
    module = Module(sequence_layout(2, Continuous(4)))
    batch_end(CodebookUsage(every=1), module, torch.randn(1, 2, 4))
    assert module.logged == {}


def test_windows_begin_anew() -> None:
    module, callback = Module(sequence_layout(1, Categorical(4))), CodebookUsage(every=2)
    seen = []
    for token in (0, 1, 2, 2):
        batch_end(callback, module, torch.tensor([[token]]))
        seen.append(module.logged.get("train/codebook_usage"))
    assert seen == [None, 0.5, 0.5, 0.25]


def test_validation_counts_all_its_batches() -> None:
    module, callback = Module(sequence_layout(1, Categorical(4))), CodebookUsage()
    for token in (0, 1, 1):
        callback.on_validation_batch_end(None, module, {"tokens": torch.tensor([[token]])}, None, 0)  # type: ignore[arg-type]
    callback.on_validation_epoch_end(None, module)  # type: ignore[arg-type]
    assert module.logged["val/codebook_usage"] == 0.5


def test_a_collapse_is_warned_of_once_and_not_before_its_time(
    caplog: pytest.LogCaptureFixture,
) -> None:
    module, callback = Module(sequence_layout(1, Categorical(100))), CodebookUsage(every=1, grace=3)
    with caplog.at_level(logging.WARNING):
        for _ in range(6):
            batch_end(callback, module, torch.tensor([[7]]))
    assert len(caplog.messages) == 1
    assert (
        "1.0 % of the codebook of tokens" in caplog.messages[0]
        and "update 3" in caplog.messages[0]
        and "restart_every" in caplog.messages[0]
    )


def test_a_frozen_tokenizer_is_not_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    module, callback = (
        Module(sequence_layout(1, Categorical(100))),
        CodebookUsage(every=1, warn_below=0, grace=0),
    )
    with caplog.at_level(logging.WARNING):
        batch_end(callback, module, torch.tensor([[7]]))
    assert caplog.messages == [] and module.logged["train/codebook_usage"] == pytest.approx(0.01)
