"""Counted operations against the formula, and against the run without counting."""

import pytest
import torch
from torch import nn

from tessellar.callbacks.throughput import Throughput
from tessellar.training.flops import CountFlops, countable, peak, peak_of


def test_a_linear_layers_forward_and_backward_are_counted() -> None:
    layer, x = nn.Linear(8, 16, bias=False), torch.randn(4, 8, requires_grad=True)
    with CountFlops() as count:
        layer(x).sum().backward()
    assert count.total == 3 * 2 * 4 * 8 * 16  # the product, and one for each gradient
    layer(x)
    assert count.total == 3 * 2 * 4 * 8 * 16  # nothing is counted outside


def test_a_training_batch_is_about_six_operations_a_parameter_and_token(fit, make) -> None:
    logged: list[dict[str, float]] = []
    module = make.generator_module()
    module.log_dict = lambda values, **_: logged.append(values)
    module.model.generator.conditioning.dropout = 0.0
    callback = Throughput(every=2)
    fit(module, 2, [callback], data=make.data(8))
    matrices = sum(
        p.numel()
        for n, p in module.model.generator.named_parameters()
        if p.dim() == 2 and "embed" not in n
    )
    assert callback._flops > 0
    ratio = callback._flops / (6 * matrices * 8 * module.tokenizer.layout.length)
    assert 0.8 < ratio < 2.5  # attention and the frozen tokenizer's forward pass come on top
    rates = next(values for values in logged if "speed/tflops_per_second" in values)
    assert (
        rates["speed/tflops_per_second"] > 0 and "speed/mfu" not in rates
    )  # a CPU has no known peak


def test_counting_changes_no_loss(fit, make) -> None:
    _, plain = fit(make.generator_module(), 3)
    _, counted = fit(make.generator_module(), 3, [Throughput(every=1)])
    assert plain == counted


def test_a_failing_step_ends_the_count(fit, make) -> None:
    module = make.generator_module()

    def fail(*_):
        raise RuntimeError("failed")

    module.model.generator.loss = fail
    callback = Throughput(every=1)
    with pytest.raises(RuntimeError, match="failed"):
        fit(module, 2, [callback])
    assert callback._count is None


@pytest.mark.parametrize(
    ("name", "precision", "expected"),
    [
        ("NVIDIA H200", "bf16-mixed", 989.4e12),
        ("NVIDIA H100 80GB HBM3", "32-true", 494.7e12),
        ("NVIDIA H100 PCIe", "bf16-mixed", 756e12),
        ("NVIDIA A100-SXM4-80GB", "bf16-mixed", 312e12),
        ("NVIDIA L40S", "bf16-mixed", 362e12),
        ("NVIDIA GeForce RTX 4090", "bf16-true", 165.2e12),
        ("NVIDIA A1000", "bf16-mixed", None),
        ("Some new GPU", "bf16-mixed", None),
        ("NVIDIA H200", "64-true", None),
    ],
)
def test_peaks_by_name(name: str, precision: str, expected: float | None) -> None:
    assert peak_of(name, precision) == expected
    assert peak(torch.device("cpu"), precision) is None


def test_compiled_blocks_hide_their_operations() -> None:
    block = nn.Linear(2, 2)
    assert countable(block)
    block._compiled_call_impl = block.forward  # what block.compile() sets
    assert not countable(nn.Sequential(block))
