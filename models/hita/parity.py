"""Hita's generator checkpoints (arXiv 2507.02358), official keys to ours and back, and their recorded outputs.

One official matrix holds both heads, ours are two. Imported weights sample with the official look-up by default.
"""

import re
from math import isqrt

import torch
from torch import Tensor

from tessellar.models.hita.model import HitaAR, Lookup
from tessellar.models.hita.official import from_official
from tessellar.models.llamagen.parity import guidance_of
from tessellar.parity.recording import Recording
from tessellar.parity.stand_ins import greedy
from tessellar.protocol.choice import Choice
from tessellar.protocol.condition import Condition
from tessellar.protocol.distribution import Logits
from tessellar.protocol.guidance import Guidance
from tessellar.protocol.layout import Categorical, Layout, Segment
from tessellar.protocol.noise import Noise
from tessellar.sampling.decode import decode_from
from tessellar.tokenizers.hita.parity import recorded_tokenizer


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
