"""Replays of VAR's transformer and sampler (recordings of system `var`)."""

from tessellar.models.var.model import VAR
from tessellar.models.var.official import from_official
from tessellar.parity.forms import to_unit
from tessellar.parity.generation import filtered
from tessellar.parity.recording import Outputs, Recording
from tessellar.parity.registration import replays
from tessellar.parity.stand_ins import greedy, logits_of
from tessellar.protocol.guidance import NO_GUIDANCE, Guidance, Linear
from tessellar.tokenizers.var import VARVQVAE
from tessellar.tokenizers.var.parity import recorded_vqvae

READ = (
    "num_classes depth embed_dim num_heads mlp_ratio shared_aln attn_l2_norm cond_drop_rate patch_nums drop_path_rate"
).split()
SUPPORTED = {"norm_eps": 1e-6, "drop_rate": 0.0, "attn_drop_rate": 0.0}


def recorded_generator(recording: Recording, vqvae: VARVQVAE) -> VAR:
    """Our generator with the recorded weights and options, over the recorded tokenizer."""
    config = recording.options("var", READ, SUPPORTED)
    recording.check_sizes({"patch_nums": list(vqvae.quantizer.sides)}, "var")
    generator = from_official(
        recording.state("var."),
        vqvae.layout,
        config["num_heads"],
        condition_dropout=config.get("cond_drop_rate", 0.1),
        drop_path=config.get("drop_path_rate", 0.0),
    )
    generator.bind(vqvae)
    return generator


@replays("var", "train")
def scores(recording: Recording) -> Outputs:
    """Logits of all scales, with a class and without one."""
    vqvae = recorded_vqvae(recording)
    generator = recorded_generator(recording, vqvae)
    tokens = vqvae.encode(recording.inputs["image"])
    condition = recording.classes("labels")
    return {
        "var.logits": logits_of(generator.score(tokens, condition)),
        "var.logits_uncond": logits_of(generator.score(tokens, generator.null(condition))),
    }


@replays("var", "greedy")
def decoding(recording: Recording) -> Outputs:
    """Their scale t = cfg k / (K - 1) multiplies c - u beside c, so ours goes from 1 to 1 + cfg."""
    # Greedy is their top_k of 1; more_smooth reads soft tokens: inputs that are no function of tokens.
    settings = recording.options("sample", ("cfg", "top_p"), {"more_smooth": False, "top_k": 1})
    vqvae = recorded_vqvae(recording)
    generator = recorded_generator(recording, vqvae)
    guidance = Guidance(Linear(1 + settings["cfg"])) if settings["cfg"] else NO_GUIDANCE
    decoded = greedy(generator, recording.classes("labels"), guidance)
    return {
        "greedy.idx": decoded.tokens,
        "greedy.logits": decoded.logits,
        "greedy.image01": to_unit(vqvae.decode(decoded.tokens).clamp(-1, 1)),
    }


@replays("var", "filter")
def filters(recording: Recording) -> Outputs:
    """Which logits top-k and top-p keep."""
    found = filtered(recording, "filter.*.keep", logits="filter.logits")
    return {name: probs > 0 for name, probs in found.items()}
