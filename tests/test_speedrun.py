"""The speedrun: time is that of all processes, a record needs every seed, the page holds its table."""

import json
import runpy
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import speedrun
from benchmarks.speedrun import Attempt, Speedrun, read_entry, record_of, timed
from tessellar.cli import evaluate
from tessellar.errors import UserError

GENERATED = Path(__file__).parents[1] / "tools" / "hour" / "generated.py"
ATTEMPT = Attempt(0, {"tokenizer": 300.0, "generator": 200.0}, 1.9, 0.87, [(500.0, 1.9)])
BURN = "import time\nwhile time.process_time() < 0.3: pass"


def test_time_is_that_of_a_process_and_its_children(tmp_path: Path) -> None:
    log = tmp_path / "log.txt"
    waiting = timed(
        [sys.executable, "-S", "-c", "import time; time.sleep(0.5); print('done')"], log
    )
    assert waiting < 0.4 and log.read_text() == "done\n"  # waiting is not work
    child = f"import subprocess, sys; subprocess.run([sys.executable, '-S', '-c', {BURN!r}])"
    assert timed([sys.executable, "-c", child], log) >= 0.3
    with pytest.raises(UserError, match=f"ended with 3: see {log}"):
        timed([sys.executable, "-S", "-c", "raise SystemExit(3)"], log)


def test_commands_of_an_entry(tmp_path: Path) -> None:
    entry = read_entry("baseline")
    for updates in (None, 8):
        run = Speedrun(entry, tmp_path, tmp_path / "net", tmp_path, updates)
        tokenizer, generator = (run.words(stage, "x-1", 1) for stage in entry.stages)
        assert "{" not in " ".join(tokenizer + generator)
        steps = [words[words.index("--trainer.max_steps") + 1] for words in (tokenizer, generator)]
        assert steps == (["8", "8"] if run.updates else ["1000", "500"])
        assert "--keep_every" in generator and "--keep_every" not in tokenizer
        assert f"{run.runs}/x-1-tokenizer/export" in generator  # what the first stage writes
    with pytest.raises(UserError, match="no entry 'fast'; there are baseline"):
        read_entry("fast")


def test_a_record_needs_every_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = read_entry("baseline")
    monkeypatch.setattr(speedrun, "commit", lambda: "abc")
    three = [replace(ATTEMPT, seed=seed) for seed in (0, 1, 2)]
    assert record_of(entry, three, trial=False)["reached"]
    assert record_of(entry, [ATTEMPT], trial=False)["why_not"] == "seed 0 alone"
    slower = replace(ATTEMPT, seed=1, distance=2.01)
    missed = record_of(entry, [three[0], slower, three[2]], trial=False)
    assert missed["why_not"] == "the target was missed" and not missed["reached"]
    assert not record_of(entry, three, trial=True)["reached"]
    monkeypatch.setattr(speedrun, "commit", lambda: "abc-dirty")
    assert not record_of(entry, three, trial=False)["reached"]


def test_a_finished_stage_is_taken_and_a_half_one_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran = []

    def stage(words: list[str], log: Path) -> float:
        log.write_text("")
        ran.append(log.stem)
        if len(ran) == 2:
            raise UserError("killed")
        return 10.0 * len(ran)

    monkeypatch.setattr(speedrun, "timed", stage)
    monkeypatch.setattr(speedrun, "commit", lambda: "abc")
    run = Speedrun(read_entry("baseline"), tmp_path, tmp_path / "net", tmp_path / "out")
    with pytest.raises(UserError, match="killed"):
        run.stages("x-0", 0)
    half = tmp_path / "out" / "x-0-generator.log"
    with pytest.raises(UserError, match=f"{half} is of a stage that did not end"):
        run.stages("x-0", 0)
    half.unlink()
    assert run.stages("x-0", 0) == {"tokenizer": 10.0, "generator": 30.0}
    assert run.stages("x-0", 0) == {"tokenizer": 10.0, "generator": 30.0} and len(ran) == 3
    monkeypatch.setattr(speedrun, "commit", lambda: "def")
    with pytest.raises(UserError, match="another commit or of other settings"):
        run.stages("x-0", 0)


def test_records_and_their_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speedrun, "commit", lambda: "abc")
    page = tmp_path / "page.md"
    start, end = speedrun.MARKS
    page.write_text(f"above\n\n{start}\nold\n{end}\n\nbelow\n")
    records = tmp_path / "records.json"
    entry = read_entry("baseline")
    slow = replace(ATTEMPT, cpu_seconds={"tokenizer": 900.0})
    missed = replace(ATTEMPT, distance=5.0, cpu_seconds={"tokenizer": 1.0})
    for attempt in (slow, ATTEMPT, missed):
        three = [replace(attempt, seed=seed) for seed in (0, 1, 2)]
        speedrun.append(record_of(entry, three, trial=False), records, page)
    assert len(json.loads(records.read_text())) == 3
    text = page.read_text()
    assert text.startswith("above\n") and text.endswith("below\n") and "old" not in text
    rows = [line.split(" | ")[0] for line in text.splitlines() if line.startswith("| ")]
    # Fastest first; what missed stands below.
    assert rows == ["| CPU-seconds", "| 500", "| 900", "| CPU-seconds", "| 1"]
    assert text.index("| 900") < text.index("Tried, and no record:") < text.index("| 1 |")
    assert "(the target was missed)" in text
    with pytest.raises(UserError, match="no record"):
        speedrun.append(record_of(entry, [ATTEMPT], trial=True), records, page)


def test_the_page_holds_the_table_of_the_records() -> None:
    known = json.loads(speedrun.RECORDS.read_text()) if speedrun.RECORDS.is_file() else []
    text = speedrun.PAGE.read_text()
    assert speedrun.with_table(text, known) == text


@pytest.mark.long
def test_a_trial_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(speedrun, "commit", lambda: "abc")  # also where sources change meanwhile
    runpy.run_path(str(GENERATED))["fashion"](tmp_path / "data")
    words = ["extractor", "--data", "tessellar.data.FashionMNISTData", "--data.root", "data"]
    words += [
        "--architecture.arch",
        "test_resnet",
        "--recipe.epochs",
        "1",
        "--out",
        "net.safetensors",
    ]
    evaluate.main(words)
    given = ["--data", "data", "--network", "net.safetensors", "--updates", "4", "--seeds", "1"]
    speedrun.main([*given, "--folder", "out"])
    record = json.loads(Path("out/record.json").read_text())
    (seed,) = record["seeds"]
    assert record["trial"] and not record["reached"] and seed["seed"] == 1
    assert set(seed["cpu_seconds"]) == {"tokenizer", "generator"}
    assert [spent for spent, _ in seed["curve"]] == sorted(spent for spent, _ in seed["curve"])
    assert len(seed["curve"]) == 4  # three milestones and the end
    speedrun.main([*given, "--folder", "out"])  # all is finished: nothing runs again
    assert json.loads(Path("out/record.json").read_text())["seeds"] == [seed]
