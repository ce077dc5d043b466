"""Replays of Token-Shuffle's recorded outputs: windows, fused inputs, states, losses, schedules, greedy decoding."""

import torch
from einops import rearrange
from torch import Tensor

from tessellar.errors import UserError
from tessellar.models.token_shuffle.model import TokenShuffle, cross_entropy
from tessellar.models.token_shuffle.official import from_config
from tessellar.parity.recording import Recording
from tessellar.parity.stand_ins import greedy as decode_greedily
from tessellar.protocol.condition import Condition
from tessellar.protocol.entities import take
from tessellar.protocol.guidance import Guidance, GuidanceSettings
from tessellar.protocol.layout import Categorical, grid_layout


def token_shuffle(recording: Recording) -> dict[str, Tensor]:
    """All outputs of the selected cases."""
    generator = _generator(recording)
    with torch.no_grad():
        outputs = _schedules(recording, generator)
        samples = sorted(int(name[4:]) for name in recording.inputs if name.startswith("text"))
        for sample in samples:
            outputs |= _sample(recording, generator, sample)
        outputs |= _shuffle(recording, generator, samples[0])
        outputs |= _greedy_runs(recording, generator, samples[0])
    wanted = set(recording.names("output", recording.cases))
    return {name: tensor for name, tensor in outputs.items() if name in wanted}


def _generator(recording: Recording) -> TokenShuffle:
    config, inputs = recording.config, recording.inputs
    height, width = config["grid"]
    layout = grid_layout(height, width, Categorical(config["image_vocab"]))
    first = next(name for name in sorted(inputs) if name.startswith("text"))
    return from_config(recording.weights["model"], config, layout, bos=int(inputs[first][0]))


def _condition(recording: Recording, sample: int) -> Condition:
    ids = recording.inputs[f"text{sample}"][None]
    return Condition(ids=ids, valid=torch.ones_like(ids, dtype=torch.bool))


def _codes(recording: Recording, sample: int) -> Tensor:
    return recording.inputs["codes"][sample : sample + 1]


def _shuffle(recording: Recording, generator: TokenShuffle, sample: int) -> dict[str, Tensor]:
    """Windows of all samples, and the fused inputs and un-shuffled features of one."""
    entities, codes = generator.entities, recording.inputs["codes"]
    every = torch.zeros(len(codes), dtype=torch.int64)
    grouped = rearrange(entities.get(codes, every, entities.count), "b (m c) -> b m c", c=generator.codes)
    embedded = generator.token_embedding(grouped[sample] + generator.offset)
    index = torch.arange(entities.count)[None]
    hidden = generator.hidden_states(_codes(recording, sample), _condition(recording, sample))
    features = generator.unshuffle(hidden[0, -entities.count :])
    return {
        "windows": grouped,
        "shuffle/concat": generator.shuffle.concatenate(embedded),
        "shuffle/fused": generator.embed(_codes(recording, sample), index, entities)[0],
        "unshuffle/features": features,
        "unshuffle/grid": take(features.flatten(0, 1)[None], entities.inverse[None])[0],
    }


def _sample(recording: Recording, generator: TokenShuffle, sample: int) -> dict[str, Tensor]:
    """States, logits over the joint vocabulary, and the parts of the loss of one sample."""
    condition, codes = _condition(recording, sample), _codes(recording, sample)
    made = generator.predictions(codes, condition)
    assert made.text_logits is not None and made.text_targets is not None
    losses = generator.loss(codes, condition)
    return {
        f"hidden{sample}": generator.hidden_states(codes, condition, more=2)[0],
        f"image_logits{sample}": rearrange(made.logits[0], "(m c) v -> m c v", c=generator.codes),
        f"loss/image{sample}": losses["cross_entropy"],
        f"loss/text{sample}": cross_entropy(made.text_logits, made.text_targets).mean(),
        f"loss/z{sample}": losses.get("z", torch.zeros(())),
    }


def _guidance(recording: Recording, name: str) -> Guidance:
    """A schedule by the recording's name for it (`half-linear`)."""
    return GuidanceSettings(recording.config["cfg_max"], name.replace("-", "_")).make()


def _schedules(recording: Recording, generator: TokenShuffle) -> dict[str, Tensor]:
    scales = {}
    for output in recording.names("output"):
        group, _, name = output.partition("/")
        if group == "cfg":
            guidance, entities = _guidance(recording, name), generator.entities
            if guidance.schedule is None:
                raise UserError(f"{output}: cfg_max {recording.config['cfg_max']} means no guidance")
            scales[output] = guidance.schedule(torch.arange(entities.count)[None], entities)[0]
    return scales


def _greedy_runs(recording: Recording, generator: TokenShuffle, sample: int) -> dict[str, Tensor]:
    """Greedy codes of every recorded schedule, and the guided logits of each step."""
    outputs: dict[str, Tensor] = {}
    for name in recording.names("output"):
        run, _, kind = name.rpartition("/")
        if run.startswith("greedy/") and kind == "codes":
            guidance = _guidance(recording, run.removeprefix("greedy/"))
            tokens, logits = decode_greedily(generator, _condition(recording, sample), guidance)
            steps = rearrange(logits[0], "(m c) v -> m c v", c=generator.codes)
            outputs |= {f"{run}/guided_logits{step}": value for step, value in enumerate(steps)}
            outputs[name] = tokens[0]
    return outputs
