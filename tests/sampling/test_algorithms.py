"""Algorithms of sampling settings: options, refusals, descriptions, and that the settings reach the loop."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from jsonargparse import ArgumentParser

from tessellar.errors import UserError
from tessellar.models.arpg import ARPG
from tessellar.models.llamagen import LlamaGen
from tessellar.models.rar import RAR
from tessellar.models.token_shuffle import TokenShuffle
from tessellar.parity.table_generator import TableGenerator
from tessellar.processes.apg import APG
from tessellar.processes.diffusion import AncestralDiffusion
from tessellar.processes.flow import Euler, EulerMaruyama
from tessellar.protocol.choice import Choice
from tessellar.protocol.condition import Condition
from tessellar.protocol.guidance import Constant, PowerCosine
from tessellar.protocol.layout import Categorical, grid_layout, sequence_layout
from tessellar.sampling import draft_model
from tessellar.sampling.confidence import MaskGIT
from tessellar.sampling.decode import Ancestral
from tessellar.sampling.draft_model import DraftModel
from tessellar.sampling.redrawn import Redrawn
from tessellar.sampling.report import Recorder
from tessellar.sampling.settings import ALGORITHMS, GREEDY, Sampling
from tessellar.sampling.speculative import (
    GroupedJacobi,
    ReusingJacobi,
    SiblingJacobi,
    SpeculativeJacobi,
)
from tessellar.tokenizers.flextok import FlowDecoding

TABLE = TableGenerator(sequence_layout(6, Categorical(3)))
CONDITION = Condition(ids=torch.tensor([0, 1, 2, 0]))
MADE = {
    "ancestral": Ancestral(),
    "sjd": SpeculativeJacobi(window=5, coupling="maximal", init="uniform"),
    "sjd++": ReusingJacobi(window=5, threshold=0.4),
    "gsd": GroupedJacobi(group_size=3, d_threshold=None),
}


@pytest.mark.parametrize("name", MADE)
def test_algorithms_of_settings(name: str) -> None:
    recorder = Recorder()
    sampling = Sampling(Constant(1.5), Choice(0.9), MADE[name])
    tokens = sampling.tokens(TABLE, CONDITION, range(4), recorder)
    TABLE.layout.check(tokens)
    assert torch.equal(tokens, sampling.tokens(TABLE, CONDITION, range(4)))
    assert (recorder.evaluations < 24) == (name != "ancestral")


def test_a_description_is_plain_data_of_which_the_same_settings_are_made() -> None:
    """What a record says under `sampling` may be put under `sampling` of a YAML."""
    sampling = Sampling(
        PowerCosine(3.0, power=2.0), Choice(0.9), MADE["gsd"], Euler(7), AncestralDiffusion(9)
    )
    described = json.loads(json.dumps(sampling.describe()))
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--sampling", type=Sampling)
    read = parser.parse_object({"sampling": described})
    assert parser.instantiate(read).sampling == sampling
    assert (
        described["algorithm"]["init_args"]["group_size"] == 3
        and described["choice"]["temperature"] == 0.9
    )


def test_choices_of_redrawing_are_plain_data_too() -> None:
    sampling = Sampling(algorithm=Redrawn((Choice(top_k=100, top_p=0.8), Choice(0.0))))
    described = json.loads(json.dumps(sampling.describe()))
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--sampling", type=Sampling)
    read = parser.parse_object({"sampling": described})
    assert parser.instantiate(read).sampling == sampling


def test_redrawing_asks_for_a_generator_that_reads_drafts() -> None:
    with pytest.raises(UserError, match="TableGenerator reads no draft of the entity"):
        Sampling(algorithm=Redrawn()).tokens(TABLE, CONDITION, range(4))


def test_a_draft_model_by_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """At temperature 0 any draft gives the target's tokens; a draft model of other tokens is refused."""
    drafts = {
        "same": TableGenerator(TABLE.layout, seed=5),
        "other": TableGenerator(sequence_layout(4, Categorical(3))),
    }
    monkeypatch.setattr(draft_model, "load_draft", drafts.__getitem__)
    sampling = Sampling(choice=Choice(0), algorithm=DraftModel("same", guidance_scale=2.0))
    plain = GREEDY.tokens(TABLE, CONDITION, range(4))
    assert torch.equal(sampling.tokens(TABLE, CONDITION, range(4)), plain)
    with pytest.raises(UserError, match="built for 4 tokens"):
        Sampling(algorithm=DraftModel("other")).tokens(TABLE, CONDITION, range(4))


def test_a_draft_model_that_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(UserError):
        Sampling(algorithm=DraftModel(str(tmp_path))).tokens(TABLE, CONDITION, range(4))


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: SpeculativeJacobi(window=0), r"window is 0; it must be an integer in \[1, 64\]"),
        (lambda: SpeculativeJacobi(window=65), r"in \[1, 64\]"),
        (lambda: SpeculativeJacobi(window="wide"), "window is 'wide'; it must be an integer"),  # type: ignore
        (lambda: SpeculativeJacobi(window=True), "window is True"),
        (
            lambda: SpeculativeJacobi(init="zeros"),
            "init is 'zeros'; it must be one of random, uniform",
        ),  # type: ignore
        (
            lambda: SpeculativeJacobi(coupling="strong"),
            "coupling is 'strong'; it must be one of none, maximal",
        ),  # type: ignore
        (lambda: SiblingJacobi(siblings=0), r"siblings is 0; it must be an integer in \[1, 16\]"),
        (lambda: ReusingJacobi(threshold=-1.0), "at least 0"),
        (lambda: ReusingJacobi(threshold=NAN), "threshold is nan; it must be a finite number"),
        (lambda: GroupedJacobi(group_size=0), "group_size is 0"),
        (lambda: GroupedJacobi(p_threshold=NAN), "p_threshold is nan"),
        (lambda: GroupedJacobi(d_threshold=INF), "d_threshold is inf"),
        (lambda: GroupedJacobi(d_quantile=1.5), r"in \(0, 1\]"),
        (lambda: GroupedJacobi(d_quantile=NAN), "d_quantile is nan"),
        (lambda: DraftModel("x", drafts=0), "drafts is 0"),
        (lambda: DraftModel("x", guidance_scale=NAN), "guidance_scale is nan"),
        (lambda: Ancestral(0), "steps of Ancestral is 0"),
        (lambda: MaskGIT(0), "steps of MaskGIT is 0"),
        (lambda: MaskGIT(temperature=INF), "temperature of MaskGIT is inf"),
        (
            lambda: Choice(temperature=NAN),
            "temperature is nan; it must be a finite number in \\[0, ",
        ),
        (lambda: Choice(temperature=INF), "temperature is inf"),
        (lambda: Choice(top_p=NAN), "top_p is nan"),
        (lambda: Choice(min_p=NAN), "min_p is nan"),
        (lambda: EulerMaruyama(1), "flow steps is 1; it must be an integer in \\[2, "),
        (lambda: EulerMaruyama(temperature=-0.5), "flow temperature is -0.5"),
        (lambda: Euler(0), "flow steps is 0"),
        (lambda: AncestralDiffusion(1), "diffusion steps is 1"),
        (lambda: AncestralDiffusion(temperature=NAN), "diffusion temperature is nan"),
        (lambda: APG(momentum=NAN), "momentum of adaptive projected guidance is nan"),
        (lambda: FlowDecoding(guidance=NAN), "guidance of the flow decoder is nan"),
        (lambda: Sampling(algorithm="sjd"), "algorithm is 'sjd'; it must be a Algorithm"),  # type: ignore
    ],
)
def test_mistakes_are_named_in_one_line(make: Callable[[], object], reason: str) -> None:
    with pytest.raises(UserError, match=reason) as error:
        make()
    assert "\n" not in str(error.value)


def test_exactness_is_declared() -> None:
    assert [algorithm.__name__ for algorithm in ALGORITHMS if algorithm.exact] == [
        "Ancestral",
        "SpeculativeJacobi",
        "SiblingJacobi",
        "DraftModel",
        "FlashDrafts",
    ]


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


@pytest.mark.parametrize("name", ["text", "rar", "arpg"])
def test_grouped_decoding_takes_the_rows_of_codes_out_of_a_table_of_more(name: str) -> None:
    """Text ids come before the codes, a mask and classes behind them."""
    grid = grid_layout(2, 2, Categorical(40))
    if name == "text":
        text = TokenShuffle(grid, 32, 1, 4, 1, 0, text_vocab=300, ffn_multiple_of=8)
        rows = text.token_embedding.weight[302:]
        found = GroupedJacobi().acceptance(text).table
    else:
        made = RAR(grid, 32, 1, 4, 64, 5) if name == "rar" else ARPG(grid, 32, 2, 4, 5, 2)
        rows = made.embedding.weight[:40]
        found = GroupedJacobi().acceptance(made).table
    assert found is not None and found.shape == (40, 32) and torch.equal(found, rows)
