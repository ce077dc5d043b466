"""Hita's generator checkpoints (arXiv 2507.02358), official keys to ours and back, and their recorded outputs.

One official matrix holds both heads, ours are two. Imported weights sample with the official look-up by default.
"""

import re
from collections.abc import Mapping
from math import isqrt

import torch
from torch import Tensor

from tessellar.errors import UserError
from tessellar.interop.hita_replay import recorded_tokenizer
from tessellar.interop.importer import table
from tessellar.interop.llamagen import HEADS
from tessellar.interop.llamagen_replay import greedy, guidance_of
from tessellar.interop.official import ImportOptions
from tessellar.interop.recording import Recording
from tessellar.interop.sizes import count
from tessellar.interop.weights import load_strict
from tessellar.models.condition import Condition
from tessellar.models.heads.logits import Logits
from tessellar.models.hita_ar import HitaAR, Lookup
from tessellar.pipeline import ImageGenerator
from tessellar.sampling.choice import Choice
from tessellar.sampling.decode import decode_from
from tessellar.sampling.guidance import Guidance
from tessellar.sampling.noise import Noise
from tessellar.tokenizers.base import Tokenizer
from tessellar.tokenizers.layout import Categorical, Layout, Segment

GENERATOR_ENTRIES = ("ema", "model")  # the official scripts load the average
KEYS = table(
    {
        "cls_embedding.embedding_table.weight": "conditioning.embedding.weight",
        "slot_embeddings.weight": "holistic_embedding.weight",
        "tok_embeddings.weight": "patch_embedding.weight",
        "slot_pos.weight": "holistic_positions",
        "layers.{i}.attention.{tensor}.weight": "layers.{i}.attention.{tensor}.weight",
        "layers.{i}.feed_forward.{tensor}.weight": "layers.{i}.feed_forward.{tensor}.weight",
        "layers.{i}.{norm}.weight": "layers.{i}.{norm}.weight",
        "norm.weight": "norm.weight",
        "output.holistic": "holistic_output.weight",
        "output.patches": "patch_output.weight",
    },
    drop=("freqs_cis", "*.kv_cache.*"),
)
WIDE_HEADS = {**HEADS, (1920, 48): 32}


def from_official(
    state: Mapping[str, Tensor],
    layout: Layout,
    num_heads: int | None = None,
    lookup: Lookup = "official",
    norm_eps: float = 1e-5,
    rope_base: float = 10000.0,
    condition_dropout: float = 0.1,
    dropout: float = 0.1,
    where: str = "the Hita checkpoint",
) -> HitaAR:
    """A generator of the sizes that the weights show; raises UserError where they do not fit the tokenizer's layout."""
    split = {name: tensor for name, tensor in state.items() if name != "output.weight"}
    first = state["slot_embeddings.weight"].shape[0]
    split |= {"output.holistic": state["output.weight"][:first], "output.patches": state["output.weight"][first:]}
    width = state["norm.weight"].shape[0]
    depth = count(state, r"layers\.(\d+)\.")
    if num_heads is None and (width, depth) not in WIDE_HEADS:
        raise UserError(f"no published Hita generator has width {width} and depth {depth}: give --num_heads")
    generator = HitaAR(
        layout,
        width,
        depth,
        num_heads or WIDE_HEADS[width, depth],
        state["cls_embedding.embedding_table.weight"].shape[0] - 1,
        condition_dropout,
        dropout,
        _multiple(width, state["layers.0.feed_forward.w1.weight"].shape[0]),
        norm_eps,
        rope_base,
        lookup,
    )
    sizes = (first, state["tok_embeddings.weight"].shape[0])
    if generator.vocabularies != sizes or generator.holistic != state["slot_pos.weight"].shape[0]:
        raise UserError(f"{where} predicts {sizes} codes, but the tokenizer gives {layout}: give its own tokenizer")
    load_strict(generator, KEYS.from_official(split, where), where)
    return generator.eval()


def _multiple(width: int, hidden: int) -> int:
    """256 where it gives the hidden size of the feed-forward layer, else that size itself."""
    return 256 if -(-int(8 * width / 3) // 256) * 256 == hidden else hidden


def to_official(generator: HitaAR) -> dict[str, Tensor]:
    """The official state dict; the inverse of `from_official`."""
    state = KEYS.to_official(generator.state_dict())
    heads = state.pop("output.holistic"), state.pop("output.patches")
    return {**state, "output.weight": torch.cat(heads)}


def import_generator(state: Mapping[str, Tensor], tokenizer: Tokenizer, options: ImportOptions) -> ImageGenerator:
    """What `convert.py import hita` makes of a generator's file."""
    generator = from_official(state, tokenizer.layout, options.num_heads)
    return ImageGenerator(tokenizer, generator, generator.make_conditioner())


def _generator(recording: Recording, lookup: Lookup = "official") -> HitaAR:
    config, state = recording.config["generator"], recording.weights["generator"]
    side = isqrt(config["block_size"])
    kinds = [Categorical(state[f"{name}_embeddings.weight"].shape[0]) for name in ("slot", "tok")]
    segments = Segment((config["num_slots"],), kinds[0], "holistic"), Segment((side, side), kinds[1], "patches")
    return from_official(
        state,
        Layout(segments),
        config["n_head"],
        lookup,
        config["norm_eps"],
        config["rope_base"],
        config["class_dropout_prob"],
        config["all_dropouts"],
    )


@torch.no_grad()
def replay(recording: Recording) -> dict[str, Tensor]:
    """Outputs of the selected cases `gen_*`: scores, losses, cached steps, greedy tokens and in-painting."""
    condition = Condition(ids=recording.inputs["ar_cond"])
    outputs: dict[str, Tensor] = {}
    if recording.cases & {"gen_train", "gen_incremental", "gen_inpaint"}:
        tokens = recorded_tokenizer(recording).encode(recording.inputs["image"])
        outputs |= _given(recording, condition, tokens)
    for name in recording.names("output", recording.cases):
        if name.startswith("ar_greedy") and not name.endswith("_image"):
            lookup: Lookup = "train_consistent" if name.endswith("train_consistent") else "official"
            outputs[name] = greedy(_generator(recording, lookup), condition, _guidance(recording, name))[0]
    if "gen_greedy_cfg" in recording.cases:
        outputs["ar_greedy_cfg_image"] = recorded_tokenizer(recording).decode(outputs["ar_greedy_cfg"])
    return outputs


def _guidance(recording: Recording, name: str) -> Guidance:
    """Scale and interval stand in the meanings, the scale of one output in that of the output it refers to."""
    said = recording.meanings[name].lower()
    base = "ar_greedy_cfg" if "nocfg" not in name else name
    found = re.search(r"cfg(?: scale)? (\d+(?:\.\d+)?)", said) or re.search(
        r"cfg scale (\d+(?:\.\d+)?)", recording.meanings[base].lower()
    )
    interval = re.search(r"cfg_interval (\d+)", said)
    if "nocfg" in name or found is None:
        return guidance_of({})
    return guidance_of({"cfg_scale": float(found[1]), **({"cfg_interval": float(interval[1])} if interval else {})})


def _given(recording: Recording, condition: Condition, tokens: Tensor) -> dict[str, Tensor]:
    generator, outputs = _generator(recording), {}
    if "gen_train" in recording.cases:
        losses = generator.loss(tokens, condition)
        hidden = _hidden(generator, tokens, condition)
        outputs["ar_train_logits"] = torch.cat([generator.holistic_output(hidden), generator.patch_output(hidden)], -1)
        outputs |= {"ar_loss_slots": losses["holistic"], "ar_loss_patches": losses["patches"]}
    if "gen_incremental" in recording.cases:
        steps = [_predict(generator, condition, tokens, n) for n in range(generator.entities.count)]
        outputs["ar_incremental_logits"] = torch.cat(steps, 1)
    if "gen_inpaint" in recording.cases:
        found = re.search(r"first (\d+) patch tokens", recording.meanings["ar_inpaint_greedy"])
        assert found is not None, "the meaning says how many patch tokens are forced"
        state = generator.start(condition, _guidance(recording, "ar_inpaint_greedy"))
        first = generator.holistic + int(found[1])
        for step in decode_from(generator, state, Choice(temperature=0), Noise(range(condition.batch)), tokens, first):
            tokens = step.tokens
        outputs["ar_inpaint_greedy"] = tokens
    return outputs


def _predict(generator: HitaAR, condition: Condition, tokens: Tensor, entity: int) -> Tensor:
    predicted = generator.predict(generator.start(condition), tokens, entity + 1, 1)
    assert isinstance(predicted, Logits)
    return predicted.logits


def _hidden(generator: HitaAR, tokens: Tensor, condition: Condition) -> Tensor:
    """Normed hidden states [B, S + N, D] of the training pass, which both heads read at every place."""
    kept: list[Tensor] = []
    handle = generator.norm.register_forward_hook(lambda _, __, output: kept.append(torch.as_tensor(output)))
    generator.score(tokens, condition)
    handle.remove()
    return kept[0]
