"""Peak bytes of a training step and of the loss, with each lever on and off, and bytes of a run's checkpoints.

    python benchmarks/memory.py [--tiny] [--json FILE]

Bytes are of live tensors, counted exactly on any device (tessellar/training/live_bytes.py); scratch memory of kernels
is not seen. The loss is that of 512 tokens of 65,536 codes at width 768, without the gradient of the output's weight,
against logits and cross-entropy; its time stands beside. The step is forward and backward of LlamaGen-B, two images of
256 tokens of 16,384 codes; its baseline is the same without any lever.
"""

import argparse
import gc
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import torch
from rounds import interleaved, machine, text_of  # benchmarks/rounds.py
from torch import Tensor
from torch.nn import functional as F
from training import batch_of, model  # benchmarks/training.py

import tessellar.models.parts.llama as llama
from tessellar.callbacks.checkpoints import Checkpoints
from tessellar.layers.linear_cross_entropy import linear_cross_entropy
from tessellar.training.live_bytes import LiveBytes


def together(states: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(states, weight), targets, reduction="none")


def loss_rows(rows: int, codes: int, width: int, rounds: int) -> list[dict[str, Any]]:
    """Live bytes, time and distance of the loss in parts from that of all logits."""
    draws = torch.Generator().manual_seed(0)
    states = torch.randn(rows, width, generator=draws).requires_grad_()
    weight = (torch.randn(codes, width, generator=draws) / width**0.5).requires_grad_()
    targets = torch.randint(codes, (rows,), generator=draws)
    found: dict[str, list[Tensor]] = {}

    def one(name: str, function: Callable[..., Tensor]) -> None:
        states.grad = weight.grad = None
        loss = function(states, weight, targets).mean()
        loss.backward()
        assert states.grad is not None and weight.grad is not None
        found[name] = [loss.detach(), states.grad, weight.grad]

    ways = {"all logits": together, "in parts": linear_cross_entropy}
    most = {}
    for name, function in ways.items():
        gc.collect()
        with LiveBytes([tuple(weight.shape)]) as live:
            one(name, function)
        most[name] = live.most
    distances = []
    for ours, theirs in zip(found["in parts"], found["all logits"], strict=True):
        distances.append(float((ours - theirs).norm() / theirs.norm()))
    found.clear()
    calls = {name: (lambda n=name, f=f: one(n, f)) for name, f in ways.items()}
    least = interleaved(calls, rounds)
    results = []
    for name in ways:
        row: dict[str, Any] = {"loss": name, "tokens": rows, "codes": codes, "bytes": most[name]}
        row["of_all_logits"] = most[name] / most["all logits"]
        row["cpu_ms"] = 1e3 * least[name].cpu
        results.append(row)
    names = ("loss_error", "states_gradient_error", "weight_gradient_error")
    results[-1] |= dict(zip(names, distances, strict=True))
    return results


def step_rows(tiny: bool, batch: int) -> list[dict[str, Any]]:
    """Live bytes of forward and backward, parameters and their gradients left out."""
    codes = 64 if tiny else 16384
    results = []
    kept = llama.MANY_CODES
    llama.MANY_CODES = 1
    for name in ("none", "activations again", "loss in parts", "both"):
        generator = model(tiny, codes)
        generator.activation_checkpointing = name in ("activations again", "both")
        generator.chunked_loss = name in ("loss in parts", "both")
        tokens, condition = batch_of(generator, batch)
        gc.collect()
        with LiveBytes({tuple(p.shape) for p in generator.parameters()}) as live:
            generator.loss(tokens, condition)["cross_entropy"].backward()
        results.append({"lever": name, "bytes": live.most})
    llama.MANY_CODES = kept
    for row in results:
        row["of_none"] = row["bytes"] / results[0]["bytes"]
    return results


def checkpoint_rows() -> list[dict[str, Any]]:
    """Bytes of three checkpoints of a small run whose frozen tokenizer is three times its generator."""
    from functools import partial

    from tessellar.data import ShapesData
    from tessellar.models.llamagen import LlamaGen
    from tessellar.tokenizers.quantizers.vq import VectorQuantizer
    from tessellar.tokenizers.vit_vq import ViTVQ
    from tessellar.training.generator_module import GeneratorModule

    tokenizer = ViTVQ(VectorQuantizer(64, 8), 16, 4, 128, 4, 4, 4)
    sizes = {"width": 64, "depth": 2, "num_heads": 2, "num_classes": 10, "ffn_multiple_of": 8}
    module = GeneratorModule(tokenizer, partial(LlamaGen, **sizes))
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        trainer = L.Trainer(
            max_steps=4,
            accelerator="cpu",
            logger=False,
            limit_val_batches=0,
            callbacks=[Checkpoints(root, 2, "val/loss", "min")],
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(module, ShapesData(size=16, length=64, val_length=16, batch_size=8))
        trainer.save_checkpoint(root / "with_tokenizer")
        bytes_of = {path.name: path.stat().st_size for path in root.iterdir()}
    whole = bytes_of.pop("with_tokenizer")
    before = whole * sum(name.endswith(".ckpt") for name in bytes_of)
    now = sum(bytes_of.values())
    return [{"checkpoints": "of a run", "before": before, "now": now, "ratio": now / before}]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    results: dict[str, Any] = {"machine": machine()}
    sizes = (256, 4096, 32) if arguments.tiny else (512, 65_536, 768)
    results["loss"] = loss_rows(*sizes, arguments.rounds)
    results["step"] = step_rows(arguments.tiny, 2)
    results["checkpoints"] = checkpoint_rows()
    for part in ("loss", "step", "checkpoints"):
        for row in results[part]:
            print(text_of(row), flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
