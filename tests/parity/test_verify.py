"""`verify`: passes on the recorded outputs, and notices every way in which a replay or a recording can be wrong."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from tessellar.cli.convert import main, print_report
from tessellar.errors import UserError
from tessellar.parity.recording import Entry, read_recording
from tessellar.parity.verify import Report, compare, verify

GOLDEN = Path(__file__).parents[1] / "golden" / "llamagen"
FAST = ["c2i", "sample"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(GOLDEN, tmp_path / "llamagen"))


def edit(path: Path, change: Callable[[dict], object]) -> None:
    if path.suffix == ".json":
        content = json.loads(path.read_text())
        change(content)
        path.write_text(json.dumps(content))
    else:
        tensors = load_file(path)
        change(tensors)
        save_file({name: t.contiguous() for name, t in tensors.items()}, path)


def failed(report: Report) -> set[str]:
    return {c.name for c in report.comparisons if not c.passed}


def test_every_recorded_output_is_reproduced() -> None:
    report = verify(GOLDEN)
    recorded = json.loads((GOLDEN / "meta.json").read_text())["tensors"]
    assert {c.name for c in report.comparisons} == {
        n for n, facts in recorded.items() if facts["role"] == "output"
    }
    assert report.leftovers == [] and failed(report) == set()


def test_some_cases_alone() -> None:
    report = verify(GOLDEN, FAST)
    assert report.passed and {c.case for c in report.comparisons} == set(FAST)
    with pytest.raises(UserError, match="has no case c2j; there are c2i, c2i_gen"):
        verify(GOLDEN, ["c2j"])
    with pytest.raises(UserError, match="shared has no outputs, only inputs"):
        verify(GOLDEN, ["shared"])


def test_a_changed_weight_fails_what_depends_on_it(folder: Path) -> None:
    edit(folder / "weights_c2i.safetensors", lambda t: t["layers.1.attention.wo.weight"].mul_(1.5))
    report = verify(folder, FAST)
    assert failed(report) == {"c2i/logits", "c2i/loss", "c2i/grad_norm"}
    worst = next(c for c in report.comparisons if c.name == "c2i/logits")
    assert worst.error > worst.tolerance and "of 4608 values outside" in worst.note


@pytest.mark.parametrize(
    ("option", "value"),
    [("rope_base", 100), ("norm_eps", 0.1), ("n_head", 4), ("block_size", 9), ("vocab_size", 95)],
)
def test_options_come_from_the_recorded_config(folder: Path, option: str, value: float) -> None:
    edit(folder / "meta.json", lambda meta: meta["config"]["c2i"].update({option: value}))
    assert not verify(folder, ["c2i"]).passed


@pytest.mark.parametrize(
    ("output", "setting", "value"),
    [
        ("c2i/greedy_cfg/tokens", "cfg_scale", 3.5),
        ("c2i/greedy_cfg_interval/tokens", "cfg_interval", 1),
        ("sample/topk/probs", "temperature", 1.9),
        ("sample/topk/probs", "top_k", 6),
        ("sample/topp/probs", "top_p", 0.5),
    ],
)
def test_settings_are_data(folder: Path, output: str, setting: str, value: float) -> None:
    def change(meta: dict) -> None:
        assert setting in meta["tensors"][output]["settings"]
        meta["tensors"][output]["settings"][setting] = value

    edit(folder / "meta.json", change)
    report = verify(folder, ["c2i_gen", "sample"])
    assert any(name.startswith(output.rpartition("/")[0]) for name in failed(report))


def test_settings_of_a_case_hold_for_its_tensors_unless_they_have_their_own(folder: Path) -> None:
    def change(meta: dict) -> None:
        meta["cases"]["sample"] = {"settings": {"temperature": 0.9, "top_p": 0.5}}
        for name, facts in meta["tensors"].items():
            if name.startswith("sample/") and facts["role"] == "output":
                del facts["settings"]["temperature"]

    edit(folder / "meta.json", change)
    assert verify(folder, ["sample"]).passed


def test_a_setting_that_is_not_recorded_is_said(folder: Path) -> None:
    def change(meta: dict) -> None:
        del meta["tensors"]["c2i/gen_logits_prefix5"]["settings"]["prefix_length"]

    other = Path(shutil.copytree(GOLDEN.parent / "flextok_ar", folder.parent / "flextok_ar"))
    edit(other / "meta.json", change)
    lines = verify(other, ["c2i"]).leftovers
    assert (
        "neither 'c2i/gen_logits_prefix5' nor its case has the setting 'prefix_length'" in lines[0]
    )


def test_cases_that_are_no_table_are_said(folder: Path) -> None:
    edit(folder / "meta.json", lambda meta: meta.update(cases={"c2i": "training"}))
    with pytest.raises(UserError, match="`cases` is not a table of settings by case"):
        verify(folder)


def test_a_case_out_of_scope_is_named_and_counted(
    folder: Path, capsys: pytest.CaptureFixture
) -> None:
    units = GOLDEN.parent / "tokenunify"
    report = verify(units)
    assert report.passed and not report.leftovers
    (left,) = report.out_of_scope
    assert left.case == "net" and left.outputs == 6 and "segmentation" in left.reason
    assert not any(c.case == "net" for c in report.comparisons)
    assert report.as_dict()["out_of_scope"][0]["outputs"] == 6
    assert not verify(units, ["net"]).passed  # nothing is compared, which is no success
    print_report(report)
    shown = capsys.readouterr().out
    assert "out of scope: case net, 6 outputs: the 3D segmentation network" in shown
    assert "12 outputs compared, 0 failed, 0 left over, 6 out of scope" in shown
    assert verify(folder, ["sample"]).out_of_scope == []


def test_what_is_for_people_decides_nothing(folder: Path) -> None:
    def change(meta: dict) -> None:
        meta["notes"] = "cfg_scale=9"
        for facts in meta["tensors"].values():
            facts["meaning"] = "temperature 7, top_k=1, cfg_scale=9"

    edit(folder / "meta.json", change)
    assert verify(folder, ["c2i_gen", "sample"]).passed


def test_what_is_left_over_is_listed(folder: Path) -> None:
    extra = {
        "role": "input",
        "case": "c2i",
        "shape": [1],
        "dtype": "float32",
        "meaning": "",
        "atol": 0,
        "rtol": 0,
    }

    def change(meta: dict) -> None:
        meta["tensors"]["c2i/unheard"] = extra
        meta["tensors"]["c2i/uncomputed"] = {**extra, "role": "output"}
        meta["tensors"]["c2i/absent"] = extra
        meta["tensors"]["c2i/odd"] = {**extra, "role": "ouput"}

    names = ("c2i/unheard", "c2i/uncomputed", "c2i/odd", "c2i/undescribed")
    edit(folder / "meta.json", change)
    edit(folder / "io.safetensors", lambda t: t.update({n: torch.zeros(1) for n in names}))
    report = verify(folder, ["c2i"])
    assert report.leftovers == [
        "input not used: c2i/unheard",
        "input missing from io.safetensors: c2i/absent",
        "tensor of unknown role: c2i/odd",
        "in io.safetensors, but not in meta.json: c2i/undescribed",
    ]
    assert [(c.name, c.note) for c in report.comparisons if not c.passed] == [
        ("c2i/uncomputed", "no replay computes it")
    ]


def test_an_output_that_is_computed_but_not_recorded_is_listed(folder: Path) -> None:
    edit(folder / "meta.json", lambda meta: meta["tensors"].pop("c2i/loss"))
    edit(folder / "io.safetensors", lambda t: t.pop("c2i/loss"))
    assert verify(folder, ["c2i"]).leftovers == ["computed, but not recorded: c2i/loss"]


def test_an_unused_weight_file_is_listed_unless_cases_were_chosen(folder: Path) -> None:
    shutil.copy(folder / "weights_c2i.safetensors", folder / "more.safetensors")
    edit(folder / "meta.json", lambda meta: meta["files"].update(more="more.safetensors"))
    assert verify(folder).leftovers == ["weights not used: more"]
    assert verify(folder, FAST).passed


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("norm.weight"), "1 missing: norm.weight"),
        (lambda t: t.update({"layers.0.bias": torch.zeros(1)}), "1 unknown: layers.0.bias"),
        (
            lambda t: t.update({"output.weight": torch.zeros(96, 47)}),
            "1 of another shape: output.weight",
        ),
    ],
)
def test_weights_that_do_not_fit_fail_their_cases_and_no_others(
    folder: Path, change: Callable[[dict], object], message: str
) -> None:
    edit(folder / "weights_c2i.safetensors", change)
    report = verify(folder, FAST)
    inputs = ["input not used: c2i/labels", "input not used: c2i/tokens"]
    assert message in report.leftovers[0] and report.leftovers[1:] == inputs
    assert {c.name for c in report.comparisons if c.passed} == {
        f"sample/{n}/probs" for n in ("topk", "topp", "both")
    }


def test_bfloat16_storage_is_cast(folder: Path) -> None:
    exact = load_file(folder / "weights_c2i.safetensors")
    edit(
        folder / "weights_c2i.safetensors",
        lambda t: t.update({n: x.bfloat16() for n, x in t.items()}),
    )
    edit(
        folder / "meta.json",
        lambda meta: meta["storage"].update({"weights_c2i.safetensors": "bfloat16"}),
    )
    report = verify(folder, ["c2i"])
    assert any(not torch.equal(x, x.bfloat16().float()) for x in exact.values())
    assert failed(report) == {"c2i/logits", "c2i/loss", "c2i/grad_norm"} and report.leftovers == []


def test_a_recording_that_contradicts_itself_fails(folder: Path) -> None:
    edit(
        folder / "io.safetensors",
        lambda t: t.update({"sample/topk/probs": t["sample/topk/probs"].double()}),
    )
    edit(
        folder / "io.safetensors",
        lambda t: t.update({"sample/topp/probs": t["sample/topp/probs"][:2]}),
    )
    report = verify(folder, ["sample"])
    assert failed(report) == {"sample/topk/probs", "sample/topp/probs"}
    assert all(
        "meta.json says float32 (4, 96)" in c.note for c in report.comparisons if not c.passed
    )


# --- comparison


def entry(atol: float, rtol: float, shape: tuple[int, ...] = (3,), dtype: str = "float32") -> Entry:
    return Entry("output", "case", shape, dtype, "", atol, rtol)


def test_tolerance_is_absolute_plus_relative() -> None:
    theirs = torch.tensor([0.0, 10.0, -100.0])
    near, far = (
        theirs + torch.tensor([0.09, 0.19, -1.09]),
        theirs + torch.tensor([0.09, 0.21, -1.09]),
    )
    assert compare("x", entry(0.1, 0.01), near, theirs).passed
    result = compare("x", entry(0.1, 0.01), far, theirs)
    assert (
        not result.passed
        and result.error == pytest.approx(0.21)
        and result.tolerance == pytest.approx(0.2)
    )


@given(st.lists(st.integers(-5, 5), min_size=3, max_size=3), st.integers(0, 2))
def test_zero_tolerances_mean_equal(values: list[int], place: int) -> None:
    theirs = torch.tensor(values)
    changed = theirs.clone()
    changed[place] += 1
    exact = entry(0, 0, dtype="int64")
    assert compare("x", exact, theirs.clone(), theirs).passed
    assert not compare("x", exact, changed, theirs).passed


def test_values_that_are_not_numbers_never_pass() -> None:
    theirs = torch.tensor([0.0, float("inf"), float("-inf")])
    assert compare("x", entry(1, 0), theirs.clone(), theirs).passed
    for wrong in (
        [float("nan"), float("inf"), float("-inf")],
        [0.0, 1.0, float("-inf")],
        [0.0, float("inf"), float("inf")],
    ):
        assert not compare("x", entry(1, 1), torch.tensor(wrong), theirs).passed
    assert not compare("x", entry(1, 0), torch.zeros(3), torch.tensor([float("nan"), 0, 0])).passed
    assert not compare("x", entry(1, 0), torch.zeros(1), torch.zeros(3)).passed


# --- the command


def test_command_passes_and_prints_every_output(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(GOLDEN), "--case", *FAST]) == 0
    text = capsys.readouterr().out
    assert "c2i/rope_table" in text and "passed: 7 outputs compared, 0 failed, 0 left over" in text


def test_command_fails_with_the_name_of_the_output(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    edit(folder / "io.safetensors", lambda t: t["c2i/loss"].add_(0.01))
    assert main(["verify", str(GOLDEN), str(folder), "--case", "c2i"]) == 1
    line = next(line for line in capsys.readouterr().out.splitlines() if "FAILED" in line)
    assert "c2i/loss" in line


def test_command_speaks_json(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    edit(folder / "io.safetensors", lambda t: t["c2i/loss"].add_(0.01))
    assert main(["verify", str(folder), "--case", "c2i", "--json"]) == 1
    report = json.loads(capsys.readouterr().out)[0]
    assert report["system"] == "llamagen" and not report["passed"]
    assert [o["name"] for o in report["outputs"] if not o["passed"]] == ["c2i/loss"]


def test_unknown_system_is_exit_code_2(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    edit(folder / "meta.json", lambda meta: meta.update(system="dalle"))
    assert main(["verify", str(folder)]) == 2
    text = capsys.readouterr().out
    assert "system 'dalle' is not known; there are " in text and "llamagen" in text


@pytest.mark.parametrize(
    ("content", "message"),
    [("{", "is not JSON"), ('{"system": "llamagen"}', "lacks config, tensors")],
)
def test_what_is_no_recording_is_said(folder: Path, content: str, message: str) -> None:
    (folder / "meta.json").write_text(content)
    with pytest.raises(UserError, match=message):
        verify(folder)
    (folder / "meta.json").unlink()
    with pytest.raises(UserError, match="is not a folder of recorded outputs"):
        verify(folder)


def test_recorded_gradients_do_not_depend_on_kernels() -> None:
    """Their tolerance is as small as float32's rounding there, so they are replayed in float64."""
    errors = []
    for enabled in (True, False):
        with torch.backends.mkldnn.flags(enabled=enabled):
            report = verify(GOLDEN, ["loss_plain"])
        assert report.passed
        errors.append([c.error for c in report.comparisons if "grad" in c.name])
    assert errors[0] == pytest.approx(errors[1], rel=1e-6)


def test_an_output_that_grows_roundings_is_as_exact_as_these() -> None:
    theirs = torch.tensor([1.0, -2.0, 3.0])
    exact = entry(1e-6, 0)
    near = theirs + 0.01
    assert not compare("x", exact, near, theirs).passed
    allowed = compare("x", exact, near, theirs, 0.005)
    assert allowed.passed and allowed.note == "roundings reach 5.0e-03"
    assert not compare("x", exact, near, theirs, 0.002).passed  # 4 reaches are 0.008
    assert not compare("x", exact, near + 1, theirs, 0.005).passed


def test_the_reach_is_measured_by_the_replay() -> None:
    recording = read_recording(Path(__file__).parents[1] / "golden" / "bitdance_t2i_head")
    value = torch.zeros(3)
    assert recording.grown("a", value, value + 0.5, value - 2.0) is value
    assert recording.reach == {"a": 2.0}
