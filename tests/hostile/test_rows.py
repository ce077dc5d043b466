"""metrics.csv after a kill at any moment and a resume equals that of an uninterrupted run, row by row."""

import csv
import os
from pathlib import Path

import pytest

from tessellar.callbacks.checkpoints import Checkpoints
from tessellar.cli import train
from tessellar.training.metrics_file import MetricsFile
from tessellar.training.tokenizer_module import TokenizerModule


def rows(name: str) -> list[dict[str, str]]:
    """Rows without what depends on the clock."""
    with open(f"runs/{name}/metrics.csv", newline="") as file:
        table = list(csv.DictReader(file))
    return [{key: value for key, value in row.items() if not key.startswith("speed/")} for row in table]


def killed(name: str, kill) -> None:
    """Run train.py in a process of its own that dies by `kill`."""
    child = os.fork()
    if child == 0:
        kill()
        train.main(["--config", "run.yaml", "--name", name, "--resume", "auto"])
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -9


def die() -> None:
    os.kill(os.getpid(), 9)


def at_batch(number: int):
    def install() -> None:
        TokenizerModule.on_train_batch_start = lambda self, *_: die() if self.batches == number else None  # type: ignore

    return install


def in_validation_of(update: int):
    def install() -> None:
        step = TokenizerModule.validation_step

        def dying(self, batch, index):
            return die() if self.updates == update else step(self, batch, index)

        TokenizerModule.validation_step = dying

    return install


def after_save(number: int):
    """Dies between a checkpoint and whatever would follow."""

    def install() -> None:
        write, done = Checkpoints._write, []

        def dying(self, *given, **named):
            write(self, *given, **named)
            done.append(1)
            if len(done) == number:
                die()

        Checkpoints._write = dying

    return install


KILLS = {
    "batch 5": at_batch(5),
    "batch 6": at_batch(6),
    "validation": in_validation_of(4),
    "first save": after_save(1),
    "third save": after_save(3),
}


@pytest.mark.parametrize("accumulate", [1, 3])
def test_every_row_is_there_once(call, config, folder: Path, accumulate: int) -> None:
    config["trainer"] |= {"max_steps": 8, "val_check_interval": 4 * accumulate}
    config["model"]["init_args"]["accumulate"] = accumulate
    config["data"]["init_args"]["length"] = 400
    assert call(config, name="whole")[0] == 0
    wanted = rows("whole")
    assert [row["step"] for row in wanted][-8:] == [str(n) for n in range(1, 9)]
    for name, kill in KILLS.items():
        killed(name, kill)
        code, said = call(config, "--resume", "auto", name=name)
        assert code == 0, said
        assert rows(name) == wanted, name


def test_a_row_that_was_cut_by_a_kill_is_no_row(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    path.write_text("step,a,b\n1,1,2\n2,3,4\n,9\n3,5,")
    file = MetricsFile(path)
    file.begin(2)
    file.log_metrics({"a": 7.0, "c": 1.0}, 3)
    assert path.read_text() == "step,a,b,c\n1,1,2,\n2,3,4,\n3,7,,1\n"
