"""Replays of LPD (recordings of system `lpd`): orders, training passes, cached decoding, filters,
positions, rates.

Their sequence is ours: the class, tokens of the groups so far, queries. What a block is given shows
the masks and inputs.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tessellar.layers.kv_cache import KVCache, NoCache, Slots
from tessellar.models.lpd.model import LPD, resize_positions
from tessellar.models.lpd.official import KEYS, from_official
from tessellar.parity.generation import (
    filtered,
    guidance_of,
    learning_rates,
    scores_of,
    with_dropped,
)
from tessellar.parity.recording import Outputs, Recording
from tessellar.parity.registration import replays
from tessellar.parity.stand_ins import (
    Calls,
    Decoded,
    choice_of,
    drawn,
    gradient_norm,
    logits_of,
    recorded_norms,
    steps_of,
)
from tessellar.protocol.condition import Condition
from tessellar.protocol.entities import Entities, take
from tessellar.protocol.guidance import Constant, Guidance, Linear
from tessellar.protocol.layout import Categorical, grid_layout
from tessellar.protocol.local_order import Chances, Thresholds, local_order_of
from tessellar.protocol.noise import Noise
from tessellar.sampling.settings import GREEDY
from tessellar.schedules import Schedule

READ = (
    "img_size vqgan_stride decoder_embed_dim decoder_depth decoder_num_heads mlp_ratio label_drop_prob class_num "
    "vqgan_vocab_size train decode decode_one filters resize_to lr orders"
).split()


def recorded_generator(recording: Recording) -> LPD:
    """Our generator with the recorded weights and options."""
    config = recording.options(read=READ)
    side = config["img_size"] // config["vqgan_stride"]
    layout = grid_layout(side, side, Categorical(config["vqgan_vocab_size"]))
    made = from_official(
        recording.weights["model"],
        layout,
        config["decoder_num_heads"],
        steps=1,
        dropout=0.0,
        condition_dropout=config.get("label_drop_prob", 0.1),
    )
    sizes = {
        "decoder_embed_dim": made.output.in_features,
        "decoder_depth": len(made.layers),
        "class_num": made.num_classes,
    }
    recording.check_sizes(sizes)
    return made


def _entities(recording: Recording, orders: str, name: str) -> Entities:
    sizes = recording.settings(name)["group_sizes"]
    return Entities(recording.inputs[orders], tuple(sizes))


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
        if slots.mask is not None:
            assert isinstance(slots.mask, Tensor)
            return slots.mask[0, 0]
        everything = torch.ones(slots.index.shape[1], slots.stop, dtype=torch.bool)
        return everything.tril() if slots.is_causal else everything


@replays("lpd", "order_*")
def orders(recording: Recording) -> Outputs:
    """Orders of six grids from recorded chances."""
    outputs = {}
    for name, settings in recording.each("order/*/order"):
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


@replays("lpd", "train_*", gradients=True)
def training(recording: Recording) -> Outputs:
    """Training passes: mask, input, logits, loss, gradients."""
    outputs: Outputs = {}
    tokens = recording.inputs["tokens"]
    labels = recording.classes("labels")
    for name in recording.outputs("train_*/loss"):
        part = name.partition("/")[0]
        generator = recorded_generator(recording).train()
        given = Given(generator)
        entities = _entities(recording, "orders", name)
        condition = with_dropped(labels, generator, recording.inputs[f"{part}/label_drop"])
        scores = scores_of(generator, tokens, condition, entities)
        targets = take(tokens, entities.order)
        loss = scores.cross_entropy(targets)
        named = f"{part}/grad_norm/*"
        outputs |= {
            f"{part}/mask": given.mask,
            f"{part}/input": given.inputs[-1],
            f"{part}/logits": scores.logits,
            f"{part}/loss": loss,
            f"{part}/targets": targets,
            f"{part}/grad_norm": gradient_norm(loss, generator),
            **recorded_norms(recording, named, loss, generator, to_official=KEYS.to_official),
        }
    return outputs


@replays("lpd", "tf")
def scores(recording: Recording) -> Outputs:
    """Logits of given tokens, in groups and one by one, with a class and without one."""
    generator = recorded_generator(recording)
    outputs = {}
    for name, settings in recording.each("tf/logits*"):
        condition = recording.classes("labels")
        if settings.get("uncond", False):
            condition = generator.null(condition)
        entities = _entities(recording, "orders", name)
        outputs[name] = logits_of(generator.score(recording.inputs["tokens"], condition, entities))
    return outputs


@replays("lpd", "decode_mask")
def mask_of_decoding(recording: Recording) -> Outputs:
    """Which places of the class and the groups see which, as real tokens."""
    name = "decode/attn_mask"
    generator = recorded_generator(recording)
    entities = _entities(recording, "decode/orders", name)
    state = generator.start(recording.classes("labels"), entities=entities)
    places = torch.arange(entities.length + 1)[None]
    slots = NoCache(torch.device("cpu")).reserve(generator.visibility(state, places))
    assert isinstance(slots.mask, Tensor)
    return {name: slots.mask[0, 0]}


def _guidance(settings: Mapping[str, Any]) -> Guidance:
    """A scale of 1 is one branch; `linear` counts tokens and stays below the scale."""
    schedules = {
        "linear": lambda scale: Linear(scale, reach_end=False),
        "constant": Constant,
    }
    return guidance_of(settings["cfg"], settings["cfg_schedule"], schedules)


def _condition(recording: Recording, generator: LPD, settings: Mapping[str, Any]) -> Condition:
    condition = recording.classes("labels")
    return condition if settings.get("labels", True) else generator.null(condition)


def _decoded(part: str, entities: Entities, found: Decoded) -> Outputs:
    return {
        f"{part}/tokens": found.tokens,
        f"{part}/tokens_in_order": take(found.tokens, entities.order),
        f"{part}/guided_logits": found.logits,
    }


class StepsSeen:
    """What each step of decoding reads, and what it leaves in the cache."""

    def __init__(self, generator: LPD) -> None:
        self.norm = generator.norm
        self.given = Given(generator)
        self.last = Calls(generator.layers[-1])
        self.facts: list[Outputs] = []

    def look(self, cache: Any) -> None:
        assert isinstance(cache, KVCache)
        slots = self.given.slots[-1]
        self.facts.append(
            {
                "positions": slots.index[0],
                "input": self.given.inputs[-1],
                "hidden": self.norm(self.last.outputs[-1]),
                "k_cache_first": cache.data[0, 0, :, :, : slots.stop].clone(),
                "v_cache_last": cache.data[-1, 1, :, :, : slots.stop].clone(),
            }
        )


@replays("lpd", *(f"decode_{run}" for run in ("linear", "constant", "nocfg", "uncond", "one")))
def decoding(recording: Recording) -> Outputs:
    """Greedy decoding with the cache; of one run what some steps read, hide and keep."""
    outputs: Outputs = {}
    for name, settings in recording.each("decode_*/tokens"):
        if not settings["greedy"]:
            continue
        part = name.partition("/")[0]
        orders = f"{part}/orders" if f"{part}/orders" in recording.inputs else "decode/orders"
        entities = _entities(recording, orders, name)
        generator = recorded_generator(recording)
        condition = _condition(recording, generator, settings)
        state = generator.start(condition, _guidance(settings), entities)
        seen = StepsSeen(generator)
        steps = []
        for step in steps_of(generator, state, GREEDY, Noise(range(state.batch))):
            steps.append(step)
            seen.look(state.cache)
        logits = torch.cat([logits_of(step.distribution) for step in steps], dim=1)
        outputs |= _decoded(part, entities, Decoded(steps[-1].tokens, logits))
        for wanted, of_step in recording.each(f"{part}/step*/*"):
            outputs[wanted] = seen.facts[of_step["step"]][wanted.rpartition("/")[2]]
    return outputs


@replays("lpd", "decode_random")
def drawing(recording: Recording) -> Outputs:
    """Decoding at recorded uniforms, with the probabilities that they are compared with."""
    part = "decode_random"
    generator = recorded_generator(recording)
    settings = recording.settings(f"{part}/tokens")
    entities = _entities(recording, "decode/orders", f"{part}/tokens")
    choice = choice_of(settings)
    found = drawn(
        generator,
        _condition(recording, generator, settings),
        _guidance(settings),
        choice,
        uniforms=recording.inputs[f"{part}/u"],
        entities=entities,
    )
    return {**_decoded(part, entities, found), f"{part}/probs": choice.probs(found.logits)}


@replays("lpd", "filter")
def filters(recording: Recording) -> Outputs:
    """Which logits top-k and top-p keep."""
    found = filtered(recording, "filter/*", logits="filter/logits")
    return {name: probs > 0 for name, probs in found.items()}


@replays("lpd", "resize")
def resizing(recording: Recording) -> Outputs:
    """The position table of other grids."""
    table = recording.weights["model"]["pos_embed"]
    outputs = {}
    for name, settings in recording.each("resize/*"):
        side = settings["grid_size"]
        outputs[name] = resize_positions(table, (side, side))
    return outputs


@replays("lpd", "lr")
def rates(recording: Recording) -> Outputs:
    """Both schedules at fractional epochs; after its last epoch a schedule stays where it is."""
    outputs = {}
    for name, settings in recording.each("lr/*"):
        peak = settings["lr"]
        epochs = settings["epochs"]
        schedule = Schedule(
            decay="cosine",
            warmup=settings["warmup_epochs"],
            warmup_from=0.0,
            decay_start=settings.get("lr_decay_start_epoch", 0) / epochs,
            final=settings["min_lr"] / peak,
        )
        outputs[name] = learning_rates(schedule, peak, recording.inputs["lr/epoch"], epochs)
    return outputs
