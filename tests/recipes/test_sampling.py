"""Every published variant has a file of sampling settings, which holds the recorded numbers and runs."""

import math
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from tessellar.checkpoints.export import export_generator
from tessellar.cli.sample import main
from tessellar.pipeline import ImageGenerator
from tessellar.protocol import guidance
from tessellar.protocol.entities import Entities
from tests.recipes.frame import CONFIGS, ROOT, recorded
from tests.tiny.pairs import GENERATORS, TOKENIZERS

FOLDER = CONFIGS / "sampling"
FILES: dict[str, dict[str, Any]] = yaml.safe_load(
    (ROOT / "docs" / "recipes" / "sampling.yaml").read_text()
)
SYSTEMS = sorted({entry["system"] for entry in FILES.values()})
# Where a recording's `guidance` is added to the conditional logits, c + w (c - u), which is ours plus 1.
ADDED = ("t = cfg * k/(K-1), logits = (1+t) c - t u", "linear")
NOT_ADDED = ("linear (on features)",)  # TokenBridge's: u + w (c - u), as ours
NO_FILTER = {None: 0, "none": 0}
OF_HITA = "the guidance scale is not published (test_net.py default 1.5)"
SEARCHED = "scale found by search"


def published(system: str) -> list[dict[str, Any]]:
    return recorded(system)["sampling"]


def holds(entry: dict[str, Any], facts: dict[str, Any]) -> bool:
    """Whether a line of the list is of a recorded variant; some are recorded at several numbers of steps."""
    same_steps = entry.get("steps", facts.get("steps")) == facts.get("steps")
    named = any(fnmatchcase(facts["variant"], pattern) for pattern in entry["variants"])
    return same_steps and named


def held(name: str) -> list[dict[str, Any]]:
    """The recorded variants whose settings a file holds."""
    entry = FILES[name]
    matches = [facts for facts in published(entry["system"]) if holds(entry, facts)]
    assert matches, f"{name}: no such variant in the recording"
    return matches


def settings(name: str) -> dict[str, Any]:
    return yaml.safe_load((FOLDER / f"{name}.yaml").read_text())


def options(name: str, part: str) -> dict[str, Any]:
    return settings(name).get(part, {}).get("init_args", {})


def test_every_published_variant_has_a_file() -> None:
    assert {path.stem for path in FOLDER.glob("*.yaml")} == set(FILES)
    for system in SYSTEMS:
        entries = [entry for entry in FILES.values() if entry["system"] == system]
        for facts in published(system):
            found = [entry for entry in entries if holds(entry, facts)]
            assert len(found) == 1, (system, facts["variant"], found)


@pytest.mark.parametrize("name", FILES)
def test_a_file_holds_the_recorded_numbers(name: str) -> None:
    for facts in held(name):
        recorded = facts if FILES[name]["system"] != "flextok" else facts["ar"]
        if recorded.get("note") not in (OF_HITA, SEARCHED):
            assert options(name, "guidance")["scale"] == pytest.approx(scale_of(recorded))
        assert options(name, "guidance").get("power") == recorded.get("power")
        check_draw(name, recorded)
        check_steps(name, recorded)


def scale_of(recorded: dict[str, Any]) -> float:
    """Our guidance scale, u + w (c - u), of a recorded one."""
    if isinstance(recorded["guidance"], list):  # Open-MAGVIT2's: one a sub-token
        return recorded["guidance"][0]
    curve = recorded.get("guidance_schedule") or "constant"
    added = any(curve == words or curve.startswith(f"{words} (") for words in ADDED)
    return recorded["guidance"] + (added and curve not in NOT_ADDED)


def check_draw(name: str, recorded: dict[str, Any]) -> None:
    """Temperature and filters, where the algorithm or the diffusion has them or else the choice."""
    choice = settings(name).get("choice", {})
    temperature = recorded.get("temperature")
    if temperature is not None:
        ours = {
            **{"temperature": 1.0},
            **choice,
            **options(name, "diffusion"),
            **options(name, "algorithm"),
        }
        if isinstance(temperature, list):  # one a sub-token, and so the scales
            assert [ours["temperature"], *ours["further_temperatures"]] == temperature
            scales = options(name, "guidance")
            assert [scales["scale"], *scales["further"]] == recorded["guidance"]
        else:
            assert ours["temperature"] == temperature
    top_k = recorded.get("top_k")
    assert choice.get("top_k", 0) == NO_FILTER.get(top_k, top_k)
    top_p = recorded.get("top_p")
    none = top_p in (None, "none", 0.0)  # FlexTok's 0.0 is no filter
    assert choice.get("top_p", 1.0) == (1.0 if none else top_p)
    again = [
        (draw.get("top_k", 0), draw.get("top_p", 0))
        for draw in options(name, "algorithm").get("again", [])
    ]
    assert again == [tuple(draw) for draw in recorded.get("redraws", [])]
    assert choice.get("bit_steps") == recorded.get("bit_steps")
    annealed = recorded.get("softmax_temperature_annealing", True)
    assert options(name, "algorithm").get("anneal", True) is bool(annealed)


def check_steps(name: str, recorded: dict[str, Any]) -> None:
    """Evaluations where the algorithm takes them; those of a solver or a diffusion."""
    steps = options(name, "algorithm").get("steps")
    assert steps in (None, recorded["steps"])
    solver = recorded.get("solver_steps")
    if settings(name).get("flow", {}).get("class_path") == "EulerMaruyamaToData":
        solver += 1  # the step to the data behind the recorded ones
    assert options(name, "flow").get("steps") == solver
    assert options(name, "diffusion").get("steps") == recorded.get("diffusion_steps")


@pytest.mark.parametrize("name", ["maskgit_titok_l32", "maskgit_titok_b64"])
def test_maskgits_curve_does_not_reach_its_end(name: str) -> None:
    (facts,) = held(name)
    schedule = guidance.Linear(**options(name, "guidance"))
    values = schedule(torch.arange(8)[None], Entities(torch.arange(32), (4,) * 8))[0]
    assert values.tolist() == pytest.approx(facts["guidance_usual"])


def test_maskgits_power_cosine_is_the_recorded_formula() -> None:
    """u + w (c - u), w = 1 + (6.9 - 1) (1 - cos(pi (s / 64)^3)) / 2: 6.9 is not raised by 1."""
    schedule = guidance.PowerCosine(**options("maskgit_titok_s128", "guidance"))
    values = schedule(torch.arange(64)[None], Entities(torch.arange(64), (1,) * 64))[0]
    expected = [1 + 5.9 * (1 - math.cos(math.pi * (s / 64) ** 3)) / 2 for s in range(64)]
    assert values.tolist() == pytest.approx(expected, abs=1e-5)
    assert max(values.tolist()) < 6.9


@cache
def exported(tokenizer: str, generator: str, folder: Path) -> str:
    """An export of a tiny model of the kind."""
    torch.manual_seed(0)
    made = TOKENIZERS[tokenizer]()
    predictor = GENERATORS[generator](made.layout)
    whole = ImageGenerator(made, predictor, predictor.make_conditioner())
    return str(export_generator(whole, folder / f"{tokenizer} {generator}"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("exports")


@pytest.mark.parametrize("name", FILES)
def test_a_file_is_parsed_and_run(name: str, folder: Path, tmp_path: Path) -> None:
    """On a tiny export, in fewer steps."""
    model = exported(*FILES[name]["pair"], folder)
    argv = [model, "--config", str(FOLDER / f"{name}.yaml"), "--count", "2", "--no-grid"]
    argv += ["--out", str(tmp_path / "set")]
    for part in ("algorithm", "flow", "diffusion"):
        if "steps" in options(name, part):
            argv += [f"--{part}.steps", "2"]
    if "bit_steps" in settings(name).get(
        "choice", {}
    ):  # of as many bits as a position of the tiny one has
        bits = 16 * (4 if "patches" in FILES[name]["pair"][1] else 1)
        argv += ["--choice.bit_steps", f"[{bits // 4}, {bits - bits // 4}]"]
    main(argv)
    record = yaml.safe_load((tmp_path / "set" / "samples.json").read_text())
    expected = options(name, "guidance")
    assert expected.items() <= record["sampling"]["guidance"]["init_args"].items()
    assert len(list((tmp_path / "set").glob("*.png"))) == 2
