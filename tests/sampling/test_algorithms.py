"""Algorithms chosen by name: options, refusals, and that the settings reach the loop."""

import json
from pathlib import Path

import pytest
import torch

from tessellar.errors import UserError
from tessellar.models.llamagen import LlamaGen
from tessellar.parity.table_generator import TableGenerator
from tessellar.protocol.choice import Choice
from tessellar.protocol.condition import Condition
from tessellar.protocol.guidance import GuidanceSettings
from tessellar.protocol.layout import Categorical, grid_layout, sequence_layout
from tessellar.sampling import algorithms
from tessellar.sampling.algorithms import ALGORITHMS, DraftModel, GroupedJacobi, make_algorithm
from tessellar.sampling.report import Recorder
from tessellar.sampling.settings import Sampling

TABLE = TableGenerator(sequence_layout(6, Categorical(3)))
CONDITION = Condition(ids=torch.tensor([0, 1, 2, 0]))
OPTIONS = {
    "ancestral": {},
    "sjd": {"window": 5, "coupling": "maximal", "init": "uniform"},
    "sjd++": {"window": 5, "threshold": 0.4},
    "gsd": {"group_size": 3, "d_threshold": None},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_algorithms_by_name(name: str) -> None:
    recorder = Recorder()
    sampling = Sampling(GuidanceSettings(1.5), Choice(0.9), name, OPTIONS[name])
    tokens = sampling.tokens(TABLE, CONDITION, range(4), recorder)
    TABLE.layout.check(tokens)
    assert torch.equal(tokens, sampling.tokens(TABLE, CONDITION, range(4)))
    assert (recorder.evaluations < 24) == (name != "ancestral")
    facts = json.loads(json.dumps({**sampling.describe(), **recorder.report().as_dict()}))
    assert facts["algorithm"] == name and all(facts[f"algorithm_{k}"] == v for k, v in OPTIONS[name].items())


def test_a_draft_model_by_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """At temperature 0 any draft gives the target's tokens; a draft model of other tokens is refused."""
    drafts = {"same": TableGenerator(TABLE.layout, seed=5), "other": TableGenerator(sequence_layout(4, Categorical(3)))}
    monkeypatch.setattr(algorithms, "_load_generator", drafts.__getitem__)
    sampling = Sampling(choice=Choice(0), algorithm="draft", options={"model": "same", "guidance_scale": 2.0})
    plain = Sampling(choice=Choice(0)).tokens(TABLE, CONDITION, range(4))
    assert torch.equal(sampling.tokens(TABLE, CONDITION, range(4)), plain)
    with pytest.raises(UserError, match="built for 4 tokens"):
        Sampling(algorithm="draft", options={"model": "other"}).tokens(TABLE, CONDITION, range(4))


def test_a_draft_model_that_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(UserError):
        Sampling(algorithm="draft", options={"model": str(tmp_path)}).tokens(TABLE, CONDITION, range(4))


@pytest.mark.parametrize(
    ("name", "options", "reason"),
    [
        ("sdj", {}, "does not exist; there are ancestral, sjd"),
        ("ancestral", {"window": 3}, "no option 'window'; its options are steps"),
        ("sjd", {"windw": 3}, "no option 'windw'; its options are window, init, coupling"),
        ("sjd", {"window": 0}, r"in \[1, 64\]"),
        ("sjd", {"window": 65}, r"in \[1, 64\]"),
        ("sjd", {"window": "wide"}, "'wide'; it must be"),
        ("sjd", {"window": True}, "True; it must be"),
        ("sjd", {"init": 3}, "option 'init' .* is 3"),
        ("sjd", {"init": "zeros"}, "initial drafts 'zeros' do not exist"),
        ("sjd", {"coupling": "strong"}, "coupling 'strong' does not exist"),
        ("sjd++", {"threshold": -1.0}, "at least 0"),
        ("gsd", {"group_size": 0}, "must be positive"),
        ("gsd", {"d_quantile": 1.5}, r"in \(0, 1\]"),
        ("gsd", {"d_threshold": "far"}, "'far'; it must be"),
        ("draft", {}, "needs its option 'model'"),
        ("draft", {"model": "x", "drafts": 0}, "drafts is 0"),
    ],
)
def test_mistakes_are_named_in_one_line(name: str, options: dict, reason: str) -> None:
    with pytest.raises(UserError, match=reason) as error:
        Sampling(algorithm=name, options=options)
    assert "\n" not in str(error.value)


def test_exactness_is_declared() -> None:
    assert {name: algorithm.exact for name, algorithm in ALGORITHMS.items()} == {
        "ancestral": True,
        "sjd": True,
        "sjd++": False,
        "gsd": False,
        "draft": True,
        "maskgit": False,
    }


def test_grouped_decoding_takes_the_embeddings_of_the_generator() -> None:
    generator = LlamaGen(grid_layout(2, 2, Categorical(40)), 32, 1, 4, num_classes=2)
    near = GroupedJacobi(d_quantile=0.25).acceptance(generator)
    table = generator.token_embedding.weight.detach()
    assert near.table is not None and torch.equal(near.table, table)
    distances = torch.pdist(table).square()
    assert float((distances <= near.d_threshold).float().mean()) == pytest.approx(0.25, abs=0.02)  # type: ignore[operator]
    assert GroupedJacobi(d_threshold=0.7).acceptance(generator).d_threshold == 0.7
    with pytest.raises(UserError, match="has none; set d_threshold null"):
        GroupedJacobi().acceptance(TABLE)


def test_options_are_plain_data() -> None:
    made = make_algorithm("draft", {"model": "runs/small", "drafts": 2})
    assert made == DraftModel("runs/small", 2) and made.describe() == {
        "model": "runs/small",
        "drafts": 2,
        "guidance_scale": None,
    }
