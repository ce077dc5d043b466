"""Replays of LPD (recordings of system `lpd`): orders, training passes, cached decoding, filters,
positions, rates.

Their sequence is ours: the class, tokens of the groups so far, queries. What a block is given shows
the masks and inputs.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tessellar.errors import UserError
from tessellar.interop.options import check_options
from tessellar.layers.kv_cache import KVCache, NoCache, Slots
from tessellar.models.lpd.model import LPD, resize_positions
from tessellar.models.lpd.official import KEYS, from_official
from tessellar.parity.recording import Recording
from tessellar.parity.registration import replays
from tessellar.parity.stand_ins import (
    Calls,
    Decoded,
    choice_of,
    drawn,
    gradient_norm,
    gradient_norms,
    logits_of,
)
from tessellar.protocol.condition import Condition
from tessellar.protocol.distribution import Logits
from tessellar.protocol.entities import Entities, take
from tessellar.protocol.guidance import NO_GUIDANCE, Constant, Guidance, Linear
from tessellar.protocol.layout import Categorical, grid_layout
from tessellar.protocol.local_order import Chances, Thresholds, local_order_of
from tessellar.protocol.noise import Noise
from tessellar.sampling.decode import decode_from
from tessellar.sampling.settings import GREEDY
from tessellar.schedules import Schedule

READ = (
    "img_size vqgan_stride decoder_embed_dim decoder_depth decoder_num_heads mlp_ratio label_drop_prob class_num "
    "vqgan_vocab_size train decode decode_one filters resize_to lr orders"
).split()


def _generator(recording: Recording) -> LPD:
    config = recording.config
    check_options(config, "the config", READ)
    side = config["img_size"] // config["vqgan_stride"]
    layout = grid_layout(side, side, Categorical(config["vqgan_vocab_size"]))
    heads = config["decoder_num_heads"]
    made = from_official(recording.weights["model"], layout, heads, steps=1, dropout=0.0)
    found = (made.output.in_features, len(made.layers), made.num_classes)
    expected = tuple(config[name] for name in ("decoder_embed_dim", "decoder_depth", "class_num"))
    if found != expected:
        raise UserError(f"the weights are of {found}, not of the config's {expected}")
    return made


class Given:
    """What the first block is given at each pass from now on: inputs, and who sees whom."""

    def __init__(self, generator: LPD) -> None:
        self.inputs: list[Tensor] = []
        self.slots: list[Slots] = []
        generator.layers[0].register_forward_pre_hook(self._keep)

    def _keep(self, module: nn.Module, given: tuple[Any, ...]) -> None:
        x, _, shared = given
        self.inputs.append(x)
        self.slots.append(shared.slots)

    @property
    def mask(self) -> Tensor:
        """Of the last pass, [n, S]."""
        slots = self.slots[-1]
        n = slots.index.shape[1]
        if slots.mask is not None:
            return slots.mask[0, 0]
        everything = torch.ones(n, slots.stop, dtype=torch.bool)
        return everything.tril() if slots.is_causal else everything


@replays("lpd", "order_*")
def orders(recording: Recording) -> dict[str, Tensor]:
    """Orders of six grids from recorded chances."""
    outputs = {}
    for name in recording.outputs("order/*/order"):
        settings = recording.settings(name)
        place = name.removesuffix("order")
        starts = recording.inputs[f"{place}fps_first"].tolist()
        chances = Chances(
            int(recording.inputs[f"{place}first"]),
            recording.inputs[f"{place}rank"].numpy().astype(np.float64),
            lambda step, cells, starts=starts: starts[step],
        )
        side = settings["grid_size"]
        thresholds = Thresholds(settings["proximity_threshold"], settings["repulsion_threshold"])
        found = local_order_of((side, side), settings["group_sizes"], chances, thresholds)
        outputs[name] = torch.tensor(found)
    return outputs


def _entities(recording: Recording, orders: str, name: str) -> Entities:
    sizes = recording.settings(name)["group_sizes"]
    return Entities(recording.inputs[orders], tuple(sizes))


@replays("lpd", "train_*", gradients=True)
def training(recording: Recording) -> dict[str, Tensor]:
    """Training passes: mask, input, logits, loss, gradients."""
    outputs: dict[str, Tensor] = {}
    tokens = recording.inputs["tokens"]
    labels = Condition(ids=recording.inputs["labels"])
    for name in recording.outputs("train_*/loss"):
        part = name.partition("/")[0]
        generator = _generator(recording).train()
        given = Given(generator)
        entities = _entities(recording, "orders", name)
        kept = recording.inputs[f"{part}/label_drop"] == 0
        scores = generator.score(tokens, labels.where(kept, generator.null(labels)), entities)
        assert isinstance(scores, Logits)
        targets = take(tokens, entities.order)
        loss = scores.cross_entropy(targets)
        outputs |= {
            f"{part}/mask": given.mask,
            f"{part}/input": given.inputs[-1],
            f"{part}/logits": scores.logits,
            f"{part}/loss": loss,
            f"{part}/targets": targets,
            f"{part}/grad_norm": gradient_norm(loss, generator),
        }
        norms = gradient_norms(loss, generator, KEYS.to_official)
        for norm in recording.outputs(f"{part}/grad_norm/*"):
            outputs[norm] = norms[recording.settings(norm)["grad_to"]]
    return outputs


@replays("lpd", "tf")
def scores(recording: Recording) -> dict[str, Tensor]:
    """Logits of given tokens, in groups and one by one, with a class and without one."""
    generator = _generator(recording)
    outputs = {}
    for name in recording.outputs("tf/logits*"):
        condition = Condition(ids=recording.inputs["labels"])
        if recording.settings(name).get("uncond", False):
            condition = generator.null(condition)
        entities = _entities(recording, "orders", name)
        outputs[name] = logits_of(generator.score(recording.inputs["tokens"], condition, entities))
    return outputs


@replays("lpd", "decode_mask")
def mask_of_decoding(recording: Recording) -> dict[str, Tensor]:
    """Which places of the class and the groups see which, as real tokens."""
    name = "decode/attn_mask"
    generator = _generator(recording)
    entities = _entities(recording, "decode/orders", name)
    state = generator.start(Condition(ids=recording.inputs["labels"]), entities=entities)
    places = torch.arange(entities.length + 1)[None]
    slots = NoCache(torch.device("cpu")).reserve(generator.visibility(state, places))
    assert slots.mask is not None
    return {name: slots.mask[0, 0]}


def _guidance(settings: Any) -> Guidance:
    """A scale of 1 is one branch; `linear` counts tokens and stays below the scale."""
    scale = settings["cfg"]
    if scale == 1:
        return NO_GUIDANCE
    linear = settings["cfg_schedule"] == "linear"
    return Guidance(Linear(scale, reach_end=False) if linear else Constant(scale))


def _condition(recording: Recording, generator: LPD, name: str) -> Condition:
    condition = Condition(ids=recording.inputs["labels"])
    has_labels = recording.settings(name).get("labels", True)
    return condition if has_labels else generator.null(condition)


@replays("lpd", *(f"decode_{run}" for run in ("linear", "constant", "nocfg", "uncond", "one")))
def decoding(recording: Recording) -> dict[str, Tensor]:
    """Greedy decoding with the cache; of one run what some steps read, hide and keep."""
    outputs: dict[str, Tensor] = {}
    for name in recording.outputs("decode_*/tokens"):
        part = name.partition("/")[0]
        settings = recording.settings(name)
        if not settings["greedy"]:
            continue
        orders = f"{part}/orders" if f"{part}/orders" in recording.inputs else "decode/orders"
        entities = _entities(recording, orders, name)
        generator = _generator(recording)
        steps = _Steps(generator)
        state = generator.start(
            _condition(recording, generator, name), _guidance(settings), entities
        )
        noise = Noise(range(state.batch))
        tokens = generator.layout.blank(state.batch)
        logits = []
        for step in decode_from(generator, state, GREEDY, noise, tokens):
            tokens = step.tokens
            logits.append(logits_of(step.distribution))
            steps.look(state.cache)
        found = Decoded(tokens, torch.cat(logits, dim=1))
        outputs |= _decoded(part, entities, found)
        for wanted in recording.outputs(f"{part}/step*/*"):
            number = recording.settings(wanted)["step"]
            outputs[wanted] = steps.seen[number][wanted.rpartition("/")[2]]
    return outputs


class _Steps:
    """What each step of decoding reads, and what it leaves in the cache."""

    def __init__(self, generator: LPD) -> None:
        self.norm = generator.norm
        self.given = Given(generator)
        self.last = Calls(generator.layers[-1])
        self.seen: list[dict[str, Tensor]] = []

    def look(self, cache: Any) -> None:
        assert isinstance(cache, KVCache)
        slots = self.given.slots[-1]
        self.seen.append(
            {
                "positions": slots.index[0],
                "input": self.given.inputs[-1],
                "hidden": self.norm(self.last.outputs[-1]),
                "k_cache_first": cache.data[0, 0, :, :, : slots.stop].clone(),
                "v_cache_last": cache.data[-1, 1, :, :, : slots.stop].clone(),
            }
        )


def _decoded(part: str, entities: Entities, found: Decoded) -> dict[str, Tensor]:
    return {
        f"{part}/tokens": found.tokens,
        f"{part}/tokens_in_order": take(found.tokens, entities.order),
        f"{part}/guided_logits": found.logits,
    }


@replays("lpd", "decode_random")
def drawing(recording: Recording) -> dict[str, Tensor]:
    """Decoding at recorded uniforms, with the probabilities that they are compared with."""
    part = "decode_random"
    generator = _generator(recording)
    settings = recording.settings(f"{part}/tokens")
    entities = _entities(recording, "decode/orders", f"{part}/tokens")
    choice = choice_of(settings)
    found = drawn(
        generator,
        _condition(recording, generator, f"{part}/tokens"),
        _guidance(settings),
        choice,
        uniforms=recording.inputs[f"{part}/u"],
        entities=entities,
    )
    return {**_decoded(part, entities, found), f"{part}/probs": choice.probs(found.logits)}


@replays("lpd", "filter")
def filters(recording: Recording) -> dict[str, Tensor]:
    """Which logits top-k and top-p keep."""
    logits = recording.inputs["filter/logits"]
    names = recording.outputs("filter/*")
    return {name: choice_of(recording.settings(name)).probs(logits) > 0 for name in names}


@replays("lpd", "resize")
def resizing(recording: Recording) -> dict[str, Tensor]:
    """The position table of other grids."""
    table = recording.weights["model"]["pos_embed"]
    outputs = {}
    for name in recording.outputs("resize/*"):
        side = recording.settings(name)["grid_size"]
        outputs[name] = resize_positions(table, (side, side))
    return outputs


@replays("lpd", "lr")
def learning_rates(recording: Recording) -> dict[str, Tensor]:
    """Both schedules at fractional epochs; after its last epoch a schedule stays where it is."""
    outputs = {}
    for name in recording.outputs("lr/*"):
        settings = recording.settings(name)
        epochs = settings["epochs"]
        schedule = Schedule(
            decay="cosine",
            warmup=settings["warmup_epochs"],
            warmup_from=0.0,
            decay_start=settings.get("lr_decay_start_epoch", 0) / epochs,
            final=settings["min_lr"] / settings["lr"],
        )
        factors = [
            schedule.factor(epoch, epochs) for epoch in recording.inputs["lr/epoch"].tolist()
        ]
        outputs[name] = settings["lr"] * torch.tensor(factors, dtype=torch.float64)
    return outputs
