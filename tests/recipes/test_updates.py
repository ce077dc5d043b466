"""Thirty updates of the training loop follow the recorded rule of the official one, in float64.

The reference below is written from `recipe.json`: AdamW by hand, decay by the recorded names, clipping by the whole
norm, and the schedule in the words of its `kind`, shortened to thirty updates with six of warm-up. The losses are our
own at the recorded weights, whose equality with the official ones is shown by the replays; batches and noise are the
same on both sides.
"""

import copy
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import lightning as L
import pytest
import torch
from torch import Tensor, nn

from tessellar.layers.tags import tag, tags
from tessellar.protocol.condition import Condition
from tessellar.protocol.generator import Generator
from tessellar.protocol.layout import Continuous, Layout
from tessellar.protocol.tokenizer import Tokenizer, TokenizerOutput
from tessellar.schedules import Schedule
from tessellar.tokenizers.var import VARVQVAE
from tessellar.training.generator_module import GeneratorModule
from tessellar.training.optim import OptimizerSettings
from tests.interop.official_names import Imported, imported, recipe
from tests.recipes.frame import recipe_of

UPDATES = 30
WARMUP = 6
BATCH = 4


class Case(NamedTuple):
    """A recording's part, the YAML of ours that follows it, and its schedule in the words of its `kind`."""

    system: str
    part: str
    config: str
    factor: Callable[[int], float]


def cosine(end: float) -> Callable[[int], float]:
    """Linear warm-up from 0, then half a cosine to `end`."""

    def factor(update: int) -> float:
        if update < WARMUP:
            return update / WARMUP
        progress = (update - WARMUP) / (UPDATES - WARMUP)
        return end + (1 - end) * (1 + math.cos(math.pi * progress)) / 2

    return factor


def constant(update: int) -> float:
    """Linear warm-up from 0, then constant."""
    return min(1.0, update / WARMUP)


def lin0(update: int) -> float:
    """VAR's: warm-up from 0.005, hold 5 % of the rest, linear to 0.1 at the last update (UPDATES - 1)."""
    if update < WARMUP:
        return 0.005 + 0.995 * update / WARMUP
    passed = (update - WARMUP) / (UPDATES - 1 - WARMUP)
    return 1.0 if passed < 0.05 else 0.1 + 0.9 * (1 - passed) / 0.95


CASES = {
    "RAR": Case("titok_rar", "generator", "rar_b", cosine(0.025)),
    "VAR": Case("var", "generator_d16", "var_d16", lin0),
    "MAR": Case("mar", "generator", "mar_b", constant),
    "HAR": Case("restok", "generator", "har_l", cosine(0.1)),
    "MaskGIT": Case("titok_maskgit", "generator_vit", "maskgit_titok_l32", cosine(0.05)),
}


class Declared(Tokenizer):
    """A layout alone; batches bring their tokens."""

    def __init__(self, layout: Layout) -> None:
        super().__init__()
        self.layout = layout
        self.image_size = (8, 8)

    def encode(self, images: Tensor) -> Tensor:
        raise NotImplementedError

    def decode(self, tokens: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, images: Tensor) -> TokenizerOutput:
        raise NotImplementedError

    @property
    def last_layer(self) -> Tensor:
        raise NotImplementedError


class Trained(NamedTuple):
    """A generator in float64, its tokenizer, and which of its parameters decay officially."""

    generator: Generator
    tokenizer: Tokenizer
    decays: dict[str, bool]


def from_recording(name: str, case: Case) -> Trained:
    """The recorded instance."""
    facts = recipe(case.system)[case.part]["decay"]
    item = next(item for item in imported(case.system) if is_of(item, facts["file"], name))
    generator = copy_with_tags(item.module).double().train().requires_grad_(True)
    assert isinstance(generator, Generator)
    decays = {}
    for ours, sources in item.names.items():
        said = {facts["names"][source.removeprefix(facts["file"] + "/")] for source in sources}
        (decays[ours],) = said
    tokenizer: Tokenizer = Declared(generator.layout)
    if name == "VAR":  # reads the maps of its tokenizer
        tokenizer = next(i.module for i in imported(case.system) if isinstance(i.module, VARVQVAE))
        tokenizer = copy.deepcopy(tokenizer).double()
        generator.bind(tokenizer)
    return Trained(generator, tokenizer, decays)


def copy_with_tags(module: nn.Module) -> nn.Module:
    """A copy whose parameters are tagged as the module's are, which a plain copy's are not."""
    made = copy.deepcopy(module)
    for new, old in zip(made.parameters(), module.parameters(), strict=True):
        tag(new, *tags(old))
    return made


def is_of(item: Imported, file: str, name: str) -> bool:
    """Whether an imported module is of class `name` and filled from the file."""
    return type(item.module).__name__ == name and all(
        source.startswith(file) for source in item.all_names
    )


def batches(layout: Layout) -> list[dict[str, Tensor]]:
    draw = torch.Generator().manual_seed(0)
    made = []
    for _ in range(UPDATES):
        tokens = torch.stack([tokens_of(layout, draw) for _ in range(BATCH)])
        labels = torch.randint(5, (BATCH,), generator=draw)
        made.append({"tokens": tokens, "label": labels})
    return made


def tokens_of(layout: Layout, draw: torch.Generator) -> Tensor:
    kind = layout.segments[0].kind
    if isinstance(kind, Continuous):
        return torch.randn(layout.length, kind.dim, generator=draw, dtype=torch.float64)
    return torch.randint(kind.vocab, (layout.length,), generator=draw)  # type: ignore[union-attr]


class SameNoise(L.Callback):
    """The random numbers of update i are those of seed i."""

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, number: int) -> None:
        torch.manual_seed(number)


def trained_by_the_loop(case: Case, start: Trained) -> dict[str, Tensor]:
    """Parameters after the updates of Lightning's loop with the YAML's settings."""
    settings = recipe_of(case.config).model
    schedule = {**settings["schedule"], "warmup": WARMUP}
    if schedule.get("decay") == "linear":
        # theirs ends at the last update, ours one behind it: 1 of 333,800, but 1 of 30 here
        schedule["length"] = UPDATES - 1
        schedule["decay_start"] = (WARMUP + 0.05 * (UPDATES - 1 - WARMUP)) / (UPDATES - 1)
    module = GeneratorModule(
        start.tokenizer,
        lambda _: start.generator,
        optimizer=OptimizerSettings(**settings["optimizer"]),
        schedule=Schedule(**schedule),
        clip=settings["clip"],
    )
    trainer = L.Trainer(
        max_steps=UPDATES,
        accelerator="cpu",
        precision="64-true",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[SameNoise()],
    )
    data = torch.utils.data.DataLoader(batches(start.generator.layout), batch_size=None)  # type: ignore[arg-type]
    trainer.fit(module, data)
    return {name: p.detach().clone() for name, p in start.generator.named_parameters()}


def trained_by_the_rule(case: Case, start: Trained) -> dict[str, Tensor]:
    """Parameters after the updates of the recorded rule."""
    facts = recipe(case.system)[case.part]
    optimizer = facts["optimizer"]
    beta1, beta2 = optimizer["betas"]
    parameters = dict(start.generator.named_parameters())
    first = {name: torch.zeros_like(p) for name, p in parameters.items()}
    second = {name: torch.zeros_like(p) for name, p in parameters.items()}
    for update, batch in enumerate(batches(start.generator.layout)):
        lr = optimizer["lr"] * case.factor(update)
        for name, gradient in clipped(start.generator, batch, update, facts["grad_clip"]):
            p = parameters[name].data
            first[name].mul_(beta1).add_(gradient, alpha=1 - beta1)
            second[name].mul_(beta2).add_(gradient.square(), alpha=1 - beta2)
            mean = first[name] / (1 - beta1 ** (update + 1))
            deviation = (second[name] / (1 - beta2 ** (update + 1))).sqrt()
            decay = optimizer["weight_decay"] if start.decays[name] else 0.0
            p.mul_(1 - lr * decay)
            p.sub_(lr * mean / (deviation + optimizer["eps"]))
    return {name: p.detach().clone() for name, p in parameters.items()}


def clipped(
    generator: Generator, batch: dict[str, Tensor], update: int, clip: float
) -> Iterator[tuple[str, Tensor]]:
    """Gradients by name, together of norm `clip` at most; zero where the loss does not reach."""
    torch.manual_seed(update)
    loss = torch.stack(list(losses(generator, batch).values())).sum()
    names, parameters = zip(*generator.named_parameters(), strict=True)
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
    norm = torch.stack([gradient.norm() for gradient in gradients]).norm()
    factor = min(1.0, clip / (float(norm) + 1e-6))
    return zip(names, [gradient * factor for gradient in gradients], strict=True)


def losses(generator: Generator, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return generator.loss(batch["tokens"], Condition(ids=batch["label"]))


@pytest.mark.parametrize("name", CASES)
def test_thirty_updates_follow_the_recorded_rule(name: str) -> None:
    case = CASES[name]
    start = from_recording(name, case)
    reference = copy.deepcopy(start)
    torch.set_default_dtype(torch.float64)
    try:
        ours = trained_by_the_loop(case, start)
        theirs = trained_by_the_rule(case, reference)
    finally:
        torch.set_default_dtype(torch.float32)
    far = {}
    for key, expected in theirs.items():
        difference = float((ours[key] - expected).norm() / expected.norm().clamp(min=1e-12))
        if difference > 1e-5:
            far[key] = difference
    assert far == {}
