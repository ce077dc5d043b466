"""Throughput: what is counted and when, over resumes; rates from a clock that the test turns."""

import multiprocessing
import time
from multiprocessing.synchronize import Event
from types import SimpleNamespace

import pytest
import torch

from tessellar.callbacks import throughput
from tessellar.callbacks.throughput import Throughput
from tessellar.training.base import TrainingModule


class Module(TrainingModule):
    """Only what the callback reads."""

    def __init__(self) -> None:
        super().__init__(None, 1, 1)
        self.logged: list[dict[str, float]] = []

    ema_target = property(lambda self: self)  # type: ignore[assignment]

    def make_players(self):
        return []

    def parts(self):
        return {}

    total_updates = 4  # type: ignore[assignment]

    def log_dict(self, values, **_):
        self.logged.append(values)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Wall and CPU time under the test's control."""
    times = SimpleNamespace(wall=100.0, cpu=10.0)
    monkeypatch.setattr(throughput.time, "perf_counter", lambda: times.wall)
    monkeypatch.setattr(throughput, "cpu_time", lambda: times.cpu)
    return times


TRAINER = SimpleNamespace(is_global_zero=True, world_size=2, max_steps=4, precision="32-true")


def train(callback: Throughput, module: Module, clock: SimpleNamespace, batches: int) -> None:
    """Batches of 4 images of 8 tokens: 1 s of waiting, 3 s of work each."""
    callback.on_train_start(TRAINER, module)  # type: ignore[arg-type]
    for _ in range(batches):
        clock.wall += 1
        callback.on_train_batch_start(TRAINER, module)  # type: ignore[arg-type]
        clock.wall, clock.cpu = clock.wall + 3, clock.cpu + 2
        module.batches, module.updates = module.batches + 1, module.updates + 1
        outputs = {"tokens": torch.zeros(4, 8), "loss": torch.tensor(0.5)}
        callback.on_train_batch_end(TRAINER, module, outputs, None, 0)  # type: ignore[arg-type]
    callback.on_train_end(TRAINER, module)  # type: ignore[arg-type]


def test_rates_and_costs(clock: SimpleNamespace) -> None:
    callback, module = Throughput(every=2), Module()
    train(callback, module, clock, 4)
    assert [values["speed/samples_seen"] for values in module.logged] == [16, 32]  # two processes
    for values in module.logged:
        assert values["speed/images_per_second"] == pytest.approx(2.0)
        assert values["speed/tokens_per_second"] == pytest.approx(16.0)
        assert values["speed/data_wait_share"] == pytest.approx(0.25)
    assert callback.costs() == {
        "samples_seen": 32,
        "tokens_seen": 256,
        "cpu_seconds": 8.0,
        "wall_seconds": 16.0,
    }


def test_totals_go_on_after_a_resume(clock: SimpleNamespace) -> None:
    first = Throughput(every=2)
    train(first, Module(), clock, 2)
    again = Throughput(every=2)
    again.load_state_dict(first.state_dict())
    clock.wall, clock.cpu = 0.0, 0.0  # another process
    train(again, Module(), clock, 2)
    assert again.costs() == {
        "samples_seen": 32,
        "tokens_seen": 256,
        "cpu_seconds": 8.0,
        "wall_seconds": 16.0,
    }


def test_the_memory_of_a_gpu_is_logged(clock: SimpleNamespace, monkeypatch) -> None:
    monkeypatch.setattr(throughput, "gpu_memory", lambda device: 1.5)
    module = Module()
    train(Throughput(every=2), module, clock, 4)
    assert [values["speed/gpu_memory_gb"] for values in module.logged] == [1.5, 1.5]


def burn(seconds: float, done: Event, leave: Event) -> None:
    """Take CPU time, say so, and wait."""
    while time.process_time() < seconds:
        pass
    done.set()
    leave.wait(30)


def test_cpu_time_counts_processes_that_still_run() -> None:
    context = multiprocessing.get_context("fork")
    done, leave = context.Event(), context.Event()
    before = throughput.cpu_time()
    process = context.Process(target=burn, args=(0.3, done, leave))
    process.start()
    assert done.wait(60)
    assert throughput.cpu_time() - before >= 0.25
    leave.set()
    process.join()
    assert 0.25 <= throughput.cpu_time() - before < 3
