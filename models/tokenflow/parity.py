"""Replays of TokenFlow's generator (recordings of system `tokenflow_t2i`): inputs, mask, scores, and
decoding in one, two and three steps a scale.

The recorded sequence has one place behind the image, which predicts the mark that closes it.
"""

import torch
from torch import Tensor

from tessellar.layers.kv_cache import NEVER
from tessellar.models.tokenflow.model import TokenFlowAR
from tessellar.models.tokenflow.official import from_official
from tessellar.parity.forms import as_map
from tessellar.parity.generation import filtered
from tessellar.parity.recording import Outputs, Recording
from tessellar.parity.registration import replays
from tessellar.parity.stand_ins import logits_of
from tessellar.protocol.condition import Condition
from tessellar.protocol.guidance import NO_GUIDANCE, Guidance, Linear
from tessellar.protocol.in_loop import ScaleInputs
from tessellar.protocol.layout import Layout
from tessellar.protocol.noise import Noise
from tessellar.sampling.redrawn import redrawn_from
from tessellar.sampling.settings import GREEDY
from tessellar.tokenizers.tokenflow import SharedQuantizer
from tessellar.tokenizers.tokenflow.official import CODEBOOKS

READ = (
    "hidden layers heads ffn rms_eps qk_norm_eps rope_theta vocab pad_id image_token_start codebook_size "
    "semantic_code_dim pixel_code_dim scales text_len image_start_pieces cfg"
).split()
TOWER = "tokenizer."  # of the codebooks, which the official file of the generator does not hold


class Codebooks(SharedQuantizer, ScaleInputs):
    """What the generator asks of its tokenizer, of codebooks alone."""

    @property
    def latent_dim(self) -> int:
        return self.dim

    def code_vectors(self, tokens: Tensor) -> Tensor:
        return self.vectors(tokens)


def recorded_codebooks(recording: Recording) -> Codebooks:
    """The recorded codebooks."""
    config = recording.config
    state = recording.state(TOWER)
    semantic, pixel = (state[name] for name in CODEBOOKS)
    made = Codebooks(
        config["codebook_size"],
        config["semantic_code_dim"],
        pixel_dim=config["pixel_code_dim"],
        sides=tuple(config["scales"]),
    )
    made.codebook.weight.data.copy_(torch.cat([semantic, pixel], 1))
    return made.eval()


def recorded_generator(recording: Recording) -> TokenFlowAR:
    """The recorded generator, bound to the codebooks."""
    config = recording.options("", READ, {"projector": "Linear-GELU(erf)-Linear"})
    codebooks = recorded_codebooks(recording)
    weights = recording.weights["model"]
    state = {name: tensor for name, tensor in weights.items() if not name.startswith(TOWER)}
    layout = Layout(codebooks.segments)
    # Read before the prompts are, whose ids it tells from padding.
    padding = len(state["lm_head.weight"]) - int(layout.vocab().max()) - 1
    recording.check_sizes({"pad_id": padding})
    made = from_official(
        state,
        layout,
        text_length=config["text_len"],
        opening=tuple(recording.inputs["prompts"][0, config["text_len"] :].tolist()),
        negative=real_ids(recording.inputs["negative_prompt"], config),
        norm_eps=config["rms_eps"],
        qk_norm_eps=config["qk_norm_eps"],
        rope_base=config["rope_theta"],
    )
    sizes = {
        "hidden": made.width,
        "layers": len(made.layers),
        "heads": made.num_heads,
        "image_token_start": made.offset,
    }
    recording.check_sizes(sizes)
    made.bound = (codebooks,)
    return made


def real_ids(prompt: Tensor, config: dict) -> tuple[int, ...]:
    """The text of a prompt [P] without padding and without the mark."""
    text = prompt[: config["text_len"]]
    return tuple(text[text != config["pad_id"]].tolist())


def condition_of(recording: Recording) -> Condition:
    """The recorded prompts without the mark, which the generator adds."""
    text = recording.inputs["prompts"][:, : recording.config["text_len"]]
    return Condition(ids=text, valid=text != recording.config["pad_id"])


@replays("tokenflow_t2i", "shared", "train")
def teacher_forced(recording: Recording) -> Outputs:
    """What is read, who sees whom, and what is predicted over the whole vocabulary."""
    made = recorded_generator(recording)
    codes = recording.inputs["codes"]
    condition = condition_of(recording)
    state = made._state(condition, NO_GUIDANCE, made.entities)
    assert state.prefix is not None
    place = torch.arange(state.prefix.length + made.layout.length)[None]
    block = made.visibility(state, place).expand(len(codes), -1)
    # A query of padding sees everything here and nothing there: nobody reads what it becomes.
    allowed = (block[:, None] <= block[..., None]) & (block != NEVER)[..., None]
    return {
        "next_scale_features": recorded_codebooks(recording).next_inputs(
            codes, made.entities.count
        ),
        "inputs_embeds": made._inputs(state, place, codes),
        "allowed": allowed[:, None].float(),
        "logits": made.output(made.hidden_states(codes, condition)),
        "loss_vision": made.loss(codes, condition)["cross_entropy"],
    }


@replays("tokenflow_t2i", "shared", "greedy_*")
def decoding(recording: Recording) -> Outputs:
    """Greedy codes with a cache, in one or more steps a scale; their t = cfg k / (S - 1) multiplies
    c - u beside c, so ours goes from 1 to 1 + cfg.
    """
    made = recorded_generator(recording)
    codebooks = recorded_codebooks(recording)
    condition = condition_of(recording)
    outputs = {}
    for name, settings in recording.each("greedy/*/codes"):
        assert settings["greedy"] and settings["first_repeated_scale"] == 1
        again = (GREEDY.choice,) * (settings["steps_per_scale"] - 1)
        state = made.start(condition, Guidance(Linear(1 + settings["cfg"])))
        blank = made.layout.blank(condition.batch)
        noise = Noise(range(condition.batch))
        *_, last = redrawn_from(made, state, again, GREEDY, noise, blank)
        outputs[name] = last.tokens
        outputs[name.replace("codes", "guided_logits_last")] = logits_of(last.distribution)
        total = codebooks.decode(last.tokens)
        outputs[name.replace("codes", "final_map")] = as_map(total, codebooks.sides[-1])
    return outputs


@replays("tokenflow_t2i", "filter")
def filters(recording: Recording) -> Outputs:
    """Probabilities behind top-k and top-p."""
    return filtered(recording, "filter/probs_*", logits="filter/logits")
