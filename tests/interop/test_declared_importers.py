"""What an `official.py` declares: marks, the entry that is evaluated, buffers from another entry, counters of ours."""

import subprocess
import sys
from collections.abc import Mapping

import pytest
import torch
from torch import Tensor, nn

from tessellar.cli.importing import papers
from tessellar.errors import UserError
from tessellar.interop.importer import FLAT, Buffers, ImportOptions, TokenizerImporter
from tessellar.interop.keys import table


class Normed(nn.Module):
    """A layer with a table that is no parameter, and a counter that only we keep."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 3)
        self.register_buffer("edges", torch.zeros(4))
        self.register_buffer("steps", torch.tensor(7))


def build(state: Mapping[str, Tensor], options: ImportOptions) -> Normed:
    return AVERAGED.fill(Normed(), state)


AVERAGED: TokenizerImporter = TokenizerImporter(
    what="a toy",
    marks=("fc.*",),
    entries=("model_ema", "model"),
    buffers=Buffers("model", ("boundaries",)),
    keys=table({"fc.{tensor}": "layer.{tensor}", "boundaries": "edges"}),
    own=("steps",),
    build=build,  # type: ignore[arg-type]
)
RAW = {"fc.weight": torch.ones(3, 2), "fc.bias": torch.ones(3), "boundaries": torch.arange(4.0)}
AVERAGE = {"fc.weight": torch.full((3, 2), 2.0), "fc.bias": torch.full((3,), 2.0)}


def test_the_average_gets_its_buffers_from_the_raw_weights() -> None:
    content = {"model": RAW, "model_ema": AVERAGE, "epoch": 3}
    made = build(AVERAGED.read(content, "file"), ImportOptions())
    assert torch.equal(made.edges, RAW["boundaries"])  # type: ignore[arg-type]
    assert torch.equal(made.layer.weight, AVERAGE["fc.weight"])
    assert int(made.steps) == 7  # type: ignore[arg-type]
    raw = build(AVERAGED.read(content, "file", "model"), ImportOptions())
    assert torch.equal(raw.layer.weight, RAW["fc.weight"])


def test_a_parameter_is_never_taken_from_another_entry() -> None:
    short = {"fc.weight": AVERAGE["fc.weight"]}
    state = AVERAGED.read({"model": RAW, "model_ema": short}, "file")
    with pytest.raises(UserError, match="1 missing: layer.bias"):
        build(state, ImportOptions())


def test_the_way_back_has_no_counters_of_ours() -> None:
    made = build(RAW, ImportOptions())
    back = AVERAGED.to_official(made)
    assert back.keys() == RAW.keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in RAW.items())


def test_marks_are_looked_for_in_every_entry() -> None:
    other = {"weight": torch.zeros(1)}
    assert AVERAGED.is_in({"model": RAW, "discriminator": other}, "file")
    assert AVERAGED.is_in(
        {"module": {f"module.{name}": tensor for name, tensor in RAW.items()}}, "file"
    )
    assert not AVERAGED.is_in({"model": RAW, "discriminator": other}, "file", "discriminator")
    assert not AVERAGED.is_in({"steps": 3}, "file")
    with pytest.raises(UserError, match=r"these are not the weights of a toy: fc\.\* is absent"):
        AVERAGED.check(other)


@pytest.mark.parametrize("name", sorted(papers()))
def test_every_importer_is_whole(name: str) -> None:
    paper = papers()[name]
    for importer in [*paper.generators, *paper.tokenizers]:
        assert importer.what.startswith(("a ", "an ")) and importer.marks
        assert importer.entries is FLAT or all(importer.entries)
        assert not importer.holds({"weight": torch.zeros(1)})


def test_papers_share_a_tokenizer_by_name_and_a_folder_may_serve_another_paper() -> None:
    found = papers()
    assert found["mar"].tokenizers == found["kl_vae"].tokenizers == found["xar"].tokenizers
    assert [importer.what for importer in found["restok"].generators] == ["a HAR generator"]
    assert "har" not in found and "quantizers" not in found


@pytest.mark.long
def test_importing_loads_neither_lightning_nor_data_sets() -> None:
    """`convert.py import` is used on machines that never train."""
    heavy = ("lightning", "webdataset", "datasets", "tessellar.data", "tessellar.training")
    code = (
        "import sys; from tessellar.cli.convert import main\n"
        "try: main(['import', 'titok', 'absent.bin', '--out', 'nowhere'])\n"
        "except Exception as error: print(error)\n"
        f"print([name for name in {heavy!r} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["absent.bin does not exist", "[]"]
