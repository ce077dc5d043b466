"""A training step against a bare loop of the official code's operations, and each lever on and off.

    python benchmarks/training.py [--batch 2] [--rounds 5] [--tiny] [--json FILE]

LlamaGen-B over 256 tokens of 16,384 codes. The bare loop does what the official one does in a step
(FoundationVision/LlamaGen, autoregressive/train/train_c2i.py, lines 195 to 215 of its main loop: forward with its loss
under autocast, backward, clip at 1, AdamW, zero_grad, `update_ema` of utils/ema.py over named parameters): equal
weights and losses, which are compared first. Ours is the same through Lightning and our callbacks. Ratios below 1: ours
is faster. `limit` is the step's FLOPs at the speed at which this machine multiplies matrices of 1024.

Levers: fused AdamW, EMA by torch._foreach, activations that are computed again, the loss in parts, compiled blocks
(only with --compile: minutes).
"""

import argparse
import json
import logging
import time
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import torch
from rounds import interleaved, machine, text_of  # benchmarks/rounds.py
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

import tessellar.models.parts.llama as llama
from tessellar.callbacks.ema import EMA
from tessellar.models.llamagen import LlamaGen
from tessellar.protocol.condition import Condition
from tessellar.protocol.layout import Categorical, grid_layout
from tessellar.tokenizers.quantizers.vq import VectorQuantizer
from tessellar.tokenizers.vit_vq import ViTVQ
from tessellar.training.generator_module import GeneratorModule
from tessellar.training.optim import OptimizerSettings

SETTINGS = OptimizerSettings("adamw", lr=1e-4, weight_decay=0.05)


def sizes(tiny: bool) -> llama.Size:
    if tiny:
        return {"width": 64, "depth": 2, "num_heads": 4}
    return llama.SIZE_B


def model(tiny: bool, codes: int) -> LlamaGen:
    torch.manual_seed(0)
    side = 4 if tiny else 16
    layout = grid_layout(side, side, Categorical(codes))
    generator = LlamaGen(
        layout, num_classes=1000, dropout=0.0, condition_dropout=0.0, **sizes(tiny)
    )
    nn.init.normal_(generator.output.weight, std=0.02)
    return generator.train()


def batch_of(generator: LlamaGen, batch: int) -> tuple[Tensor, Condition]:
    draws = torch.Generator().manual_seed(1)
    codes = generator.output.out_features
    tokens = torch.randint(codes, (batch, generator.layout.length), generator=draws)
    return tokens, Condition(ids=torch.randint(1000, (batch,), generator=draws))


def rounding(bf16: bool) -> Any:
    return torch.autocast("cpu", torch.bfloat16) if bf16 else nullcontext()


class BareLoop:
    """The official loop's operations, over our network with equal weights."""

    def __init__(self, generator: LlamaGen, batch: int, bf16: bool) -> None:
        self.generator = generator
        self.average = {n: p.detach().clone() for n, p in generator.named_parameters()}
        self.tokens, self.condition = batch_of(generator, batch)
        self.bf16 = bf16
        # Theirs: two groups, by dimensions; fused where CUDA is there.
        decayed = [p for p in generator.parameters() if p.ndim >= 2]
        others = [p for p in generator.parameters() if p.ndim < 2]
        groups = [
            {"params": decayed, "weight_decay": 0.05},
            {"params": others, "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=1e-4, betas=(0.9, 0.95))
        self.loss = 0.0

    def step(self) -> None:
        with rounding(self.bf16):
            logits = self.generator.score(self.tokens, self.condition).logits  # type: ignore[attr-defined]
            loss = F.cross_entropy(logits.flatten(0, 1), self.tokens.flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(self.generator.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            for name, parameter in self.generator.named_parameters():
                self.average[name].mul_(0.9999).add_(parameter, alpha=1 - 0.9999)
        self.loss = float(loss.detach())


class OwnStep:
    """Our optimizer and average in a plain loop: what is left of the difference is Lightning's."""

    def __init__(
        self, generator: LlamaGen, batch: int, bf16: bool, fused: bool, each: bool
    ) -> None:
        self.generator = generator
        self.tokens, self.condition = batch_of(generator, batch)
        self.bf16 = bf16
        (self.optimizer,) = SETTINGS.make(generator)
        for group in self.optimizer.param_groups:
            group["fused"] = fused
        self.each = each
        self.holder = SimpleNamespace(ema_target=generator, updates=0)
        self.ema = EMA(0.9999)
        self.ema.on_fit_start(None, self.holder)  # type: ignore[arg-type]
        self.average = {n: p.detach().clone() for n, p in generator.named_parameters()}

    def step(self) -> None:
        with rounding(self.bf16):
            loss = self.generator.loss(self.tokens, self.condition)["cross_entropy"]
        loss.backward()
        nn.utils.clip_grad_norm_(self.generator.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.each:
            with torch.no_grad():
                for name, parameter in self.generator.named_parameters():
                    self.average[name].mul_(0.9999).add_(parameter, alpha=1 - 0.9999)
        else:
            self.holder.updates += 1
            self.ema.on_train_batch_end(None, self.holder)  # type: ignore[arg-type]


class _Rows(list[dict[str, Tensor]], Dataset):  # type: ignore[misc]
    """Batches that are there already."""


class Marks(L.Callback):
    """Calls `work` between the batches of a fit, so that its steps may be interleaved with others."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self.losses: list[float] = []
        self.between: Callable[[], None] = lambda: None
        self._since = time.process_time()

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, *_: Any) -> None:
        self.times.append(time.process_time() - self._since)
        self.losses.append(float(outputs["loss"]))
        self.between()
        self._since = time.process_time()


def under_lightning(
    tiny: bool, codes: int, batch: int, bf16: bool, rounds: int, bare: BareLoop
) -> dict[str, Any]:
    """Steps of our module under Lightning, each followed by one of the bare loop."""
    side = 4 if tiny else 16
    tokenizer = ViTVQ(VectorQuantizer(codes, 4), 4 * side, 4, 16, 1, 1, 2)
    options = {"num_classes": 1000, "dropout": 0.0, "condition_dropout": 0.0, **sizes(tiny)}
    module = GeneratorModule(tokenizer, partial(LlamaGen, **options), optimizer=SETTINGS)
    module.model.generator.load_state_dict(bare.generator.state_dict())
    tokens, condition = batch_of(bare.generator, batch)
    assert condition.ids is not None
    times: list[float] = []
    bare_losses: list[float] = []

    def one_of_theirs() -> None:
        since = time.process_time()
        bare.step()
        times.append(time.process_time() - since)
        bare_losses.append(bare.loss)

    marks = Marks()
    marks.between = one_of_theirs
    trainer = L.Trainer(
        max_steps=rounds + 1,
        accelerator="cpu",
        precision="bf16-mixed" if bf16 else "32-true",
        logger=False,
        callbacks=[EMA(0.9999, warmup=False), marks],
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    batches = _Rows([{"tokens": tokens, "label": condition.ids}] * (rounds + 1))
    trainer.fit(module, DataLoader(batches, batch_size=None))
    ours = marks.times[1:]  # the first one allocates
    theirs = times[1:]
    return {
        "ours_cpu_ms": 1e3 * min(ours),
        "bare_cpu_ms": 1e3 * min(theirs),
        "ratio": min(ours) / min(theirs),
        "overhead_ms": 1e3 * (min(ours) - min(theirs)),
        "loss": marks.losses[0],
        "bare_loss": bare_losses[0],
    }


def levers(tiny: bool, batch: int, bf16: bool, rounds: int, compiled: bool) -> list[dict[str, Any]]:
    """Our plain step with each lever on and off, interleaved."""
    codes = 64 if tiny else 16384
    ways: dict[str, Callable[[], None]] = {}
    for name, fused, each in (
        ("all", True, False),
        ("AdamW in a loop", False, False),
        ("EMA in a loop", True, True),
    ):
        ways[name] = OwnStep(model(tiny, codes), batch, bf16, fused, each).step
    again = model(tiny, codes)
    again.activation_checkpointing = True
    ways["activations again"] = OwnStep(again, batch, bf16, True, False).step
    parts = model(tiny, codes)
    parts.chunked_loss = True
    ways["loss in parts"] = OwnStep(parts, batch, bf16, True, False).step
    if compiled:
        blocks = model(tiny, codes)
        for layer in blocks.layers:
            layer.compile()
        ways["compiled blocks"] = OwnStep(blocks, batch, bf16, True, False).step
    kept = llama.MANY_CODES
    llama.MANY_CODES = 1  # so that the lever acts at this number of codes too
    try:
        least = interleaved(ways, rounds)
    finally:
        llama.MANY_CODES = kept
    base = least["all"].cpu
    return [
        {"lever": name, "cpu_ms": 1e3 * one.cpu, "of_all": one.cpu / base}
        for name, one in least.items()
    ]


def flops(generator: LlamaGen, batch: int) -> float:
    return float(generator.work().training_flops) * batch


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tiny", action="store_true", help="a network of two narrow layers")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--precisions", default="float32,bfloat16")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    results: dict[str, Any] = {"machine": machine(), "steps": [], "levers": []}
    print(text_of(results["machine"]), flush=True)
    codes = 64 if arguments.tiny else 16384
    for name in arguments.precisions.split(","):
        bf16 = name == "bfloat16"
        bare = BareLoop(model(arguments.tiny, codes), arguments.batch, bf16)
        row: dict[str, Any] = {"precision": name, "batch": arguments.batch}
        row |= under_lightning(
            arguments.tiny, codes, arguments.batch, bf16=bf16, rounds=arguments.rounds, bare=bare
        )
        row["limit_ms"] = (
            1e3 * flops(bare.generator, arguments.batch) / results["machine"][f"{name}_flops"]
        )
        results["steps"].append(row)
        print(text_of(row), flush=True)
        for lever in levers(
            arguments.tiny, arguments.batch, bf16, arguments.rounds, arguments.compile
        ):
            results["levers"].append({"precision": name, **lever})
            print(text_of(results["levers"][-1]), flush=True)
        if arguments.json:  # after each precision: what is done stays
            arguments.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
