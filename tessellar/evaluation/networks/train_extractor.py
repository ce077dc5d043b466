"""Train a small timm classifier on any labelled data set, to measure with where no published
network fits.

AdamW, one cycle of the learning rate, label smoothing, flips and shifted crops; averaged weights
are kept. The file says in its metadata what it is and that it may only measure
(`refuse_evaluator`), or, where that is its purpose, teach.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel

from tessellar.data.batch import normalised
from tessellar.data.datamodule import ImageDataModule
from tessellar.errors import UserError
from tessellar.evaluation.networks.timm_network import TimmNetwork, network_of
from tessellar.evaluation.sources import DatasetImages
from tessellar.networks.facts import PURPOSE, NetworkFacts, Purpose
from tessellar.progress import Progress
from tessellar.protocol.ranges import check_number, check_whole
from tessellar.tensor_files import write_safetensors

SMALL = 64  # below this side, ResNets keep a higher resolution


@dataclass(frozen=True)
class Recipe:
    """How a classifier is trained; `crop` is the largest shift in pixels, `ema` the decay of the
    averaged weights.
    """

    epochs: int = 5
    lr: float = 2e-3
    weight_decay: float = 0.05
    label_smoothing: float = 0.1
    flip: bool = True
    crop: int = 2
    ema: float = 0.99
    seed: int = 0

    def __post_init__(self) -> None:
        check_whole("recipe.epochs", self.epochs, least=1, most=1_000_000)
        check_number("recipe.lr", self.lr, above=0)
        check_number("recipe.weight_decay", self.weight_decay, least=0)
        check_number("recipe.label_smoothing", self.label_smoothing, least=0, most=1)
        check_whole("recipe.crop", self.crop, least=0, most=1024)
        check_number("recipe.ema", self.ema, least=0, most=1)
        check_whole("recipe.seed", self.seed, least=0, most=2**63 - 1)


@dataclass(frozen=True)
class Architecture:
    """A timm network; `options` are timm's (ResNets of small images get output_stride 8)."""

    arch: str = "resnet10t"
    options: dict[str, int | float | bool | str] = field(default_factory=dict)
    name: str = ""


def train_extractor(
    data: ImageDataModule,
    out: str | Path,
    architecture: Architecture = Architecture(),  # noqa: B008
    recipe: Recipe = Recipe(),  # noqa: B008
    device: torch.device | str = "cpu",
    purpose: Purpose = PURPOSE,
) -> NetworkFacts:
    """Train, measure the validation accuracy, write a safetensors file to `out`; returns what its
    metadata says.
    """
    if data.num_classes < 2:
        raise UserError(
            f"{data.name} has {data.num_classes} class; a feature network is trained on labelled classes"
        )
    facts = _facts(data, architecture)
    with torch.random.fork_rng():
        torch.manual_seed(recipe.seed)
        network = network_of(facts).to(device)
        average = fit(network, data, recipe)
    state = {}
    for name, tensor in average.state_dict().items():
        state[name] = tensor.detach().cpu().contiguous()
    accuracy = accuracy_of(TimmNetwork(facts, state, "", str(out)).to(device), data)
    training = {"data": data.name, "data_fingerprint": data.fingerprint(), "val_accuracy": accuracy}
    facts = replace(facts, training={**training, **recipe.__dict__}, purpose=purpose)
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    write_safetensors(state, Path(out), facts.to_metadata())
    return facts


def _facts(data: ImageDataModule, architecture: Architecture) -> NetworkFacts:
    height, width = data.image_size
    options = dict(architecture.options)
    if architecture.arch.startswith("resnet") and max(height, width) <= SMALL:
        options.setdefault("output_stride", 8)
    name = architecture.name or f"{data.name}-{architecture.arch}"
    names = tuple(data.class_names)
    return NetworkFacts(
        name,
        architecture.arch,
        data.num_classes,
        (height, width),
        options=options,
        class_names=names,
    )


def fit(network: nn.Module, data: ImageDataModule, recipe: Recipe) -> nn.Module:
    """The averaged network."""
    steps = recipe.epochs * len(data.train_dataloader())
    optimizer = torch.optim.AdamW(network.parameters(), recipe.lr, weight_decay=recipe.weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, recipe.lr, total_steps=max(steps, 2))
    average = AveragedModel(network, multi_avg_fn=averaging(recipe.ema), use_buffers=True)
    network.train()
    device = next(network.parameters()).device
    with Progress("training the network", steps, "steps") as bar:
        for images, labels in _batches(data, recipe):
            logits = network(images.to(device))
            loss = F.cross_entropy(
                logits, labels.to(device), label_smoothing=recipe.label_smoothing
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            average.update_parameters(network)
            bar.update()
    return average.module


def averaging(decay: float) -> Callable[[Sequence[Tensor], Sequence[Tensor], Tensor | int], None]:
    """Exponential average with the warm-up min(decay, (1 + n) / (10 + n)); integer buffers are
    copied.
    """

    @torch.no_grad()
    def update(average: Sequence[Tensor], current: Sequence[Tensor], n: Tensor | int) -> None:
        weight = 1 - min(decay, (1 + int(n)) / (10 + int(n)))
        for ours, theirs in zip(average, current, strict=True):
            ours.lerp_(theirs, weight) if ours.is_floating_point() else ours.copy_(theirs)

    return update


def _batches(data: ImageDataModule, recipe: Recipe) -> Iterator[tuple[Tensor, Tensor]]:
    """Augmented training batches of all epochs."""
    draw = torch.Generator().manual_seed(recipe.seed)
    loader = data.train_dataloader()
    for epoch in range(recipe.epochs):
        loader.sampler.set_epoch(epoch)  # type: ignore[union-attr]
        for batch in loader:
            images = normalised(batch)["image"]
            yield augment(images, recipe.flip, recipe.crop, draw), batch["label"]


def augment(images: Tensor, flip: bool, crop: int, draw: torch.Generator) -> Tensor:
    """Images [B, 3, H, W], each mirrored with probability 0.5 if `flip`, and shifted by up to
    `crop` pixels.
    """
    batch, _, height, width = images.shape
    if flip:
        mirrored = torch.rand(batch, generator=draw) < 0.5
        images = torch.where(mirrored[:, None, None, None], images.flip(-1), images)
    padded = F.pad(images, (crop,) * 4, mode="replicate")
    top, left = torch.randint(0, 2 * crop + 1, (2, batch, 1), generator=draw)
    rows = top + torch.arange(height)
    columns = left + torch.arange(width)
    shifted = padded[torch.arange(batch)[:, None, None], :, rows[:, :, None], columns[:, None, :]]
    return rearrange(shifted, "b h w c -> b c h w")


def accuracy_of(network: TimmNetwork, data: ImageDataModule) -> float:
    """Share of the validation images that the network classifies rightly, seen as an evaluation
    sees them.
    """
    right = 0
    seen = 0
    for batch in DatasetImages(data.val_dataset(), data.name, "val").batches(128):
        if batch.labels is None:
            raise UserError(f"{data.name} gives no labels")
        right += int((network(batch.images).logits.argmax(dim=1).cpu() == batch.labels).sum())
        seen += len(batch.images)
    return right / seen
