"""Vision foundation models: frozen timm networks that teach a tokenizer, or that its encoder reads.

A network by timm's name, with weights from a file (safetensors or torch, opened with
`weights_only`), or downloaded when asked; or a small one that `evaluate.py extractor --purpose
teacher` trained here, whose file says what it is. Two ways to use one: as a part of a model
(`VisionModel`: its weights are in the export, which needs no other file), or for training alone
(`Teacher`: neither in the state dict nor in the config of the model that it teaches).
"""

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from tessellar.absent import stays_random
from tessellar.checkpoints.building import bounded
from tessellar.checkpoints.weights import load_strict
from tessellar.errors import UserError
from tessellar.interop.files import unwrap
from tessellar.layers.precision import ExactTables, at_least_float32
from tessellar.layers.unsaved import Unsaved
from tessellar.networks.facts import KEY, NetworkFacts, refuse_evaluator
from tessellar.networks.timm_networks import (
    Options,
    as_timm_names,
    check_network,
    create_network,
)
from tessellar.protocol.configured import Configured, LossOnly, describe, refuse_outside
from tessellar.tensor_files import (
    read_metadata,
    read_pickle,
    read_safetensors,
    require_file,
    say_unchecked,
)

DOWNLOAD = "download"
ENTRIES = ("state_dict_ema", "model_ema", "teacher", "state_dict", "model")
"""Entries of training checkpoints by timm and by self-distillation (DINO): averaged weights, which are used, first."""


class VisionFeatures(NamedTuple):
    """What precedes the patches (class token, registers) [B, P, D], and the patches in raster order
    [B, h * w, D].
    """

    prefix: Tensor
    patches: Tensor


@dataclass(frozen=True)
class Preprocessing:
    """From images in [-1, 1] to a network's input; `mean` and `std` are of images in [0, 1], None
    is the network's.
    """

    mean: tuple[float, float, float] | None = None
    std: tuple[float, float, float] | None = None
    interpolation: str = "bicubic"
    antialias: bool = True


class VisionModel(Configured, ExactTables):
    """A frozen timm network `name`, always in eval mode.

    `weights`: a file, "download" (timm's own), or None where a state dict will fill it. A file that
    `evaluate.py extractor` wrote tells `name`, `image_size`, `options` and `preprocessing` itself.
    `layers`: blocks or stages whose normed outputs are the features, side by side in channels, in
    order of depth (negative: from the last). Raises UserError for a network that timm does not
    know, for weights that are not there or do not fit, and for an evaluation network.
    """

    def __init__(
        self,
        name: str | None = None,
        weights: str | None = None,
        image_size: int | None = None,
        options: Options = {},  # noqa: B006
        preprocessing: Preprocessing = Preprocessing(),  # noqa: B008
        layers: tuple[int, ...] = (-1,),
        label: str | None = None,
    ) -> None:
        super().__init__()
        if weights is not None:
            refuse_outside(f"weights of a vision model, {weights}")
        downloads = weights == DOWNLOAD
        on_meta = torch.get_default_device().type == "meta"
        at_random = weights is not None and name is not None and stays_random(weights)
        file = None
        if weights is not None and not downloads and not at_random and not (on_meta and name):
            file = read_weights(weights)
        facts = file.facts if file else None
        self.file = Path(weights).expanduser() if weights and file else None
        self.name = network_name(name, facts, weights)
        self.label = label or (facts.name if facts else self.name)
        self.options = {**(facts.options if facts else {}), **options}
        check_network(self.name, self.options)
        with bounded(file.state, str(weights)) if file else nullcontext():
            self.network = create(self.name, image_size, self.options, downloads)
        given = (image_size, image_size) if image_size else facts and facts.image_size
        self.input_size = given or input_size_of(self.network)
        self.preprocessing = completed(preprocessing, facts, self.network)
        self.layers = counted_layers(self.network, tuple(layers), self.name)
        for buffer, values in (("mean", self.preprocessing.mean), ("std", self.preprocessing.std)):
            self.register_buffer(buffer, torch.tensor(values).view(3, 1, 1), persistent=False)
        self.mean: Tensor
        self.std: Tensor
        self.filled = downloads or at_random
        if file:
            self.fill(file.state, str(weights))
        self.register_load_state_dict_post_hook(_mark_filled)
        self.eval().requires_grad_(False)

    def fill(self, state: Mapping[str, Tensor], where: str) -> None:
        """Weights as timm or the network's authors publish them; raises UserError where they do not
        fit.
        """
        load_strict(self.network, as_timm_names(self.network, state), where)
        self.filled = True

    @property
    def config(self) -> dict[str, Any]:
        """Without the weights' path and with what their file told: a rebuilt model is filled from a
        state dict.
        """
        recorded = super().config
        found = {
            "name": self.name,
            "weights": None,
            "image_size": self.input_size[0],
            "options": self.options,
            "layers": list(self.layers),
            "preprocessing": describe(self.preprocessing),
            "label": self.label,
        }
        return {**recorded, "init_args": {**recorded["init_args"], **found}}

    def train(self, mode: bool = True) -> Self:
        """Stays in eval mode."""
        return super().train(False)

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of the patches."""
        reduction: Any = self.network.feature_info[self.layers[-1]]["reduction"]  # type: ignore[index]
        height, width = (-(-side // reduction) for side in self.input_size)
        return height, width

    @property
    def dim(self) -> int:
        """Channels of the patches, over all layers."""
        return sum(self.network.feature_info[layer]["num_chs"] for layer in self.layers)  # type: ignore[index, misc]

    @property
    def pooled_dim(self) -> int:
        return int(getattr(self.network, "head_hidden_size", self.network.num_features))  # type: ignore[arg-type]

    def preprocess(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] in [-1, 1] to the network's size, mean and standard deviation."""
        images = at_least_float32(images)
        if images.shape[-2:] != self.input_size:
            how = self.preprocessing
            images = F.interpolate(
                images, self.input_size, mode=how.interpolation, antialias=how.antialias
            )
        normalised = ((images + 1) / 2 - self.mean) / self.std
        return normalised.to(images.dtype)

    def features(self, images: Tensor) -> VisionFeatures:
        """Prefix tokens and patches of images [B, 3, H, W] in [-1, 1]; gradients reach images that
        take them.
        """
        self.check_filled()
        has_prefix = bool(getattr(self.network, "num_prefix_tokens", 0))
        arguments: dict[str, Any] = {"norm": True, "output_fmt": "NCHW", "intermediates_only": True}
        if has_prefix:
            arguments["return_prefix_tokens"] = True
        found = self.network.forward_intermediates(
            self.preprocess(images), list(self.layers), **arguments
        )  # type: ignore[operator]
        of_patches = []
        of_prefix = []
        for item in found:
            maps = item[0] if has_prefix else item
            vectors = rearrange(at_least_float32(maps), "b c h w -> b (h w) c")
            of_patches.append(vectors)
            of_prefix.append(at_least_float32(item[1]) if has_prefix else vectors[:, :0])
        patches = torch.cat(of_patches, dim=-1)
        prefix = torch.cat(of_prefix, dim=-1)
        return VisionFeatures(prefix, patches)

    def patch_features(self, images: Tensor) -> Tensor:
        """Patches [B, h * w, D] of images [B, 3, H, W] in [-1, 1]; `grid` is (h, w), `dim` is D."""
        return self.features(images).patches

    def pooled(self, images: Tensor) -> Tensor:
        """What the network's classifier would read, [B, pooled_dim]."""
        self.check_filled()
        hidden = self.network.forward_features(self.preprocess(images))  # type: ignore[operator]
        return at_least_float32(self.network.forward_head(hidden, pre_logits=True))  # type: ignore[operator]

    def forward(self, images: Tensor) -> Tensor:
        return self.patch_features(images)

    def check_filled(self) -> None:
        """Raises UserError where nothing has filled the weights."""
        if not self.filled:
            raise UserError(
                f"the vision model {self.name} has no weights: give weights=FILE, or weights={DOWNLOAD} where the "
                "network may be used"
            )


class Teacher(LossOnly, Unsaved[VisionModel]):
    """A vision model that only a training loss reads.

    It moves with the module that holds it, but is no part of it. It runs in the precision around
    it, as the teachers of ReToK (`vq_train.py`) and ResTok (inside its forward pass) do under
    autocast; its features are compared in float32.
    """

    @property
    def model(self) -> VisionModel:
        return self.module

    @property
    def dim(self) -> int:
        return self.model.dim

    @property
    def grid(self) -> tuple[int, int]:
        return self.model.grid

    @torch.no_grad()
    def forward(self, images: Tensor) -> VisionFeatures:
        """Features of images [B, 3, H, W] in [-1, 1], without gradients."""
        return self.model.features(images)


def teacher(
    name: str | None = None,
    weights: str | None = None,
    image_size: int | None = None,
    options: Options = {},  # noqa: B006
    preprocessing: Preprocessing = Preprocessing(),  # noqa: B008
    layers: tuple[int, ...] = (-1,),
    label: str | None = None,
) -> Teacher:
    """A Teacher in one line of YAML; arguments as VisionModel's."""
    return Teacher(
        VisionModel(
            name,
            weights,
            image_size=image_size,
            options=options,
            preprocessing=preprocessing,
            layers=layers,
            label=label,
        )
    )


@dataclass(frozen=True)
class WeightsFile:
    """A file's state dict, and what its metadata says about the network (None: nothing)."""

    state: dict[str, Tensor]
    facts: NetworkFacts | None = None


def read_weights(path: str) -> WeightsFile:
    """Weights of a timm network; raises UserError where the file is missing, holds code or is an
    evaluation network.
    """
    file = Path(path).expanduser()
    if not file.exists():
        raise UserError(
            f"there are no weights {path}: give a file, or weights={DOWNLOAD} where the network may be used"
        )
    require_file(file)
    refuse_evaluator(file)
    if file.suffix != ".safetensors":
        return WeightsFile(unwrap(read_pickle(file), path, order=ENTRIES, evaluated=False))
    state, metadata = read_safetensors(file)
    say_unchecked(file, metadata)
    return WeightsFile(
        state, NetworkFacts.from_metadata(metadata, file) if KEY in metadata else None
    )


def stand_ins(config: Any) -> list[str]:
    """Names of the networks trained here that a run's config (plain data) lets teach, for the name
    of the run.
    """
    if isinstance(config, Mapping):
        path = config.get("weights")
        found = []
        if isinstance(path, str) and path != DOWNLOAD:
            found += stand_in_of(Path(path).expanduser())
        for value in config.values():
            found += stand_ins(value)
        return found
    if isinstance(config, (list, tuple)):
        found = []
        for value in config:
            found += stand_ins(value)
        return found
    return []


def stand_in_of(path: Path) -> list[str]:
    if path.suffix != ".safetensors" or not path.is_file():
        return []
    metadata = read_metadata(path)
    return [NetworkFacts.from_metadata(metadata, path).name] if KEY in metadata else []


def network_name(name: str | None, facts: NetworkFacts | None, weights: str | None) -> str:
    """timm's name; raises UserError where nothing tells it, or the file tells another."""
    if facts and name not in (None, facts.arch):
        raise UserError(f"{weights} holds the network {facts.arch}, not {name}")
    if name is None and facts is None:
        raise UserError(
            "a vision model needs the name of a timm network: its weights file does not tell it"
        )
    return facts.arch if facts else str(name)


def create(name: str, image_size: int | None, options: Options, download: bool) -> nn.Module:
    """The network without a classifier; raises UserError where timm cannot make or download it."""
    sized: Options = {**options, "img_size": image_size} if image_size else options
    for arguments in (sized, options):  # convolutional networks take no img_size
        try:
            # A run with a teacher draws the same numbers as one without.
            with torch.random.fork_rng(devices=[]):
                return create_network(name, arguments, num_classes=0, download=download)
        except UserError:
            raise
        except TypeError as error:
            reason: Exception = error
        except Exception as error:  # timm and its hub client raise many kinds, also for a network that is not reached
            reason = error
            break
    what = "download" if download else "make"
    hint = "; give a file of its weights instead" if download else ""
    raise UserError(
        f"timm cannot {what} {name!r} ({' '.join(str(reason).split())[:200]}){hint}"
    ) from reason


def counted_layers(network: nn.Module, layers: tuple[int, ...], name: str) -> tuple[int, ...]:
    """Layers counted from the first, in order; raises UserError where one is not there or has a map
    of another size.
    """
    info: Any = network.feature_info
    bad = [layer for layer in layers if not -len(info) <= layer < len(info)]
    if bad or not layers:
        raise UserError(f"{name} has {len(info)} layers; layers is {list(layers)}")
    counted = tuple(sorted(layer % len(info) for layer in layers))
    if len({info[layer]["reduction"] for layer in counted}) > 1:
        raise UserError(
            f"the layers {list(layers)} of {name} have maps of unequal size; take layers of one size"
        )
    return counted


def completed(how: Preprocessing, facts: NetworkFacts | None, network: nn.Module) -> Preprocessing:
    """Mean and standard deviation where they are not given: the file's, else timm's."""
    cfg: Any = network.pretrained_cfg
    mean = how.mean or (facts.mean if facts else tuple(cfg["mean"]))
    std = how.std or (facts.std if facts else tuple(cfg["std"]))
    return replace(how, mean=mean, std=std)


def input_size_of(network: nn.Module) -> tuple[int, int]:
    size = getattr(getattr(network, "patch_embed", None), "img_size", None)
    return tuple(size) if size else tuple(network.pretrained_cfg["input_size"][1:])  # type: ignore[index, return-value]


def _mark_filled(module: nn.Module, _: Any) -> None:
    module.filled = True  # type: ignore[assignment]
