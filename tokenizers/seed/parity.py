"""Replays of SEED (recordings of system `seed`): codes and the embedding, the losses of both stages,
the variant with a reverse Q-Former, texts.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tessellar.interop.keys import table
from tessellar.interop.options import check_options, check_sizes
from tessellar.parity.recording import Outputs, Recording
from tessellar.parity.registration import replays
from tessellar.tokenizers.losses.alignment import cosine_distance
from tessellar.tokenizers.seed.official import from_official, qformer_pairs
from tessellar.tokenizers.seed.qformer import FeedForward, TextEmbedding
from tessellar.tokenizers.seed.tokenizer import NARROW, SEED, TextSide

VARIANT = "variant_reverse."
STAGE_1 = "stage1."
READ = (
    "image_size patch_size vit_width vit_depth vit_heads vit_mlp_ratio qformer_hidden qformer_layers "
    "qformer_heads qformer_intermediate num_query codebook_size codebook_dim decoder_depth decoder_heads "
    "image_features_dim vocab_size max_position_embeddings proj_dim"
).split()


def recorded_tokenizer(recording: Recording, reverse: bool = False) -> SEED:
    """The recorded tokenizer, checked against the config."""
    supported = {
        "cross_attention_freq": 2,
        "layer_norm_eps_bert": 1e-12,
        "image_down": list(NARROW),
    }
    config = recording.options("", READ, supported)
    state = {}
    for name, tensor in recording.weights["model"].items():
        if not name.startswith((VARIANT, STAGE_1)):
            state[name] = tensor
    if reverse:
        for name, tensor in recording.weights["model"].items():
            if name.startswith(VARIANT):
                state[name.removeprefix(VARIANT)] = tensor
        state = {name: t for name, t in state.items() if not name.startswith("image_down.")}
    heads = (config["vit_heads"], config["qformer_heads"])
    made = from_official(state, heads, config["decoder_heads"])
    vision: Any = made.vision
    block: Any = made.qformer.blocks[0]
    head: Any = made.embedding_head
    width = made.queries.shape[-1]
    found = {
        "image_size": made.image_size[0],
        "patch_size": vision.patch_size,
        "vit_width": vision.dim,
        "vit_depth": len(vision.blocks),
        "qformer_hidden": width,
        "qformer_layers": len(made.qformer.blocks),
        "qformer_intermediate": block.of_queries.fc1.out_features,
        "num_query": made.layout.length,
        "codebook_size": len(made.quantizer.codebook.weight),
        "codebook_dim": made.quantizer.dim,
        "decoder_depth": len(made.meaning.blocks),
        "image_features_dim": head.out.out_features,
    }
    check_sizes(config, "the config", found)
    hidden = int(vision.dim * config["vit_mlp_ratio"])
    check_sizes({"hidden": hidden}, "vit_mlp_ratio", {"hidden": vision.blocks[0].fc1.out_features})
    return made


def states_of(made: SEED, recording: Recording) -> tuple[Tensor, Tensor]:
    """What the queries read, and the causal states."""
    memory = made.memory(made.vision(recording.inputs["image"]))
    return memory, made.states_of(memory)


@replays("seed", "shared", "tok")
def codes(recording: Recording) -> Outputs:
    """From images to codes, and to the embedding."""
    check_options(
        recording.settings("image_embed"), "image_embed", (), {"use_qformer_image": False}
    )
    made = recorded_tokenizer(recording)
    memory, states = states_of(made, recording)
    latents = made.to_code(states)
    quantized = made.quantizer(latents)
    vectors = made.quantizer.decode(quantized.tokens)
    return {
        "vision_tokens": memory,
        "causal_tokens": states,
        "code_in": latents,
        "quant": quantized.quantized,
        "indices": quantized.tokens,
        "query_up": made.from_code(vectors),
        "image_embed": made.embedding(vectors),
    }


@replays("seed", "shared", "loss")
def codebook_stage(recording: Recording) -> Outputs:
    """Losses of the codebook stage; ours are weighted already."""
    made = recorded_tokenizer(recording)
    settings = recording.settings("loss/total")
    found = {
        "vq_weight": made.loss_weights.vq,
        "distill_weight": made.loss_weights.distill,
        "recon_s_weight": made.loss_weights.reconstruct,
        "beta": made.loss_weights.codebook,
        "legacy": True,
    }
    check_sizes(settings, "loss/total", found)
    _, states = states_of(made, recording)
    target = recording.inputs["loss/clip_target"]
    output = made.codebook_pass(states, target, made.image_size)
    vectors = made.quantizer(made.to_code(states)).quantized
    recalled = made.recalling(made.from_code(vectors))
    losses = output.losses
    vq = (losses["codebook"] + losses["commitment"]) / made.loss_weights.vq
    total = torch.stack(list(losses.values())).sum()
    return {
        "loss/vq_legacy": vq,
        "recon_s": recalled,
        "loss/recon_s": cosine_distance(recalled, states).mean(),
        "loss/distill": F.mse_loss(made.embedding(vectors), target),
        "loss/total": total,
    }


@replays("seed", "shared", "variant_reverse")
def reverse_head(recording: Recording) -> Outputs:
    """The embedding that one query reads from the codes."""
    name = "variant_reverse/image_embed"
    supported = {"use_qformer_image": True, "num_reverse_query": 1}
    check_options(recording.settings(name), name, (), supported)
    made = recorded_tokenizer(recording, reverse=True)
    _, states = states_of(made, recording)
    vectors = made.quantizer.decode(made.quantizer.encode(made.to_code(states)))
    return {name: made.embedding(vectors)}


def with_texts(made: SEED, recording: Recording) -> SEED:
    """The tokenizer with the recorded text side."""
    config = recording.config
    state = {}
    for name, tensor in recording.weights["model"].items():
        if name.startswith(STAGE_1):
            state[name.removeprefix(STAGE_1)] = tensor
    settings = recording.settings("stage1/itc_loss")
    check_options(
        settings, "stage1/itc_loss", ("label_smoothing", "temperature"), {"world_size": 1}
    )
    width = made.queries.shape[-1]
    hidden = config["qformer_intermediate"]
    made.text = TextSide(
        config["vocab_size"],
        config["max_position_embeddings"],
        dim=config["proj_dim"],
        label_smoothing=settings["label_smoothing"],
    )
    made.qformer.text = TextEmbedding(
        config["vocab_size"], config["max_position_embeddings"], width
    )
    for block in made.qformer.blocks:
        block.of_texts = FeedForward(width, hidden, 0.0)
    made.vision_head = nn.Linear(width, config["proj_dim"])
    made.text_head = nn.Linear(width, config["proj_dim"])
    made.temperature = nn.Parameter(torch.tensor(0.0))
    keys = table(
        {
            **qformer_pairs("Qformer.", "qformer."),
            "vision_proj.{tensor}": "vision_head.{tensor}",
            "text_proj.{tensor}": "text_head.{tensor}",
            "temp": "temperature",
        },
        drop=("*.position_ids",),
    )
    ours = keys.from_official(state)
    missing = made.load_state_dict(ours, strict=False)
    assert not missing.unexpected_keys, missing.unexpected_keys
    assert all(name in ours for name, _ in made.named_parameters() if ".of_texts." in name)
    check_sizes(settings, "stage1/itc_loss", {"temperature": round(float(made.temperature), 6)})
    return made.eval()


@replays("seed", "shared", "stage1")
def contrastive_stage(recording: Recording) -> Outputs:
    """Texts, features, the loss, and queries with a text behind them."""
    check_options(
        recording.settings("stage1/joint_tokens"),
        "stage1/joint_tokens",
        (),
        {"causal_queries": True, "queries_see_text": True},
    )
    for name, supported in (
        ("stage1/text_tokens", {"causal": False}),
        ("stage1/image_feat", {"query": -1}),
        ("stage1/text_feat", {"token": 0}),
    ):
        check_options(recording.settings(name), name, (), supported)
    made = with_texts(recorded_tokenizer(recording), recording)
    memory, states = states_of(made, recording)
    ids = recording.inputs["stage1/text_ids"]
    valid = recording.inputs["stage1/text_mask"].bool()
    queries = made.queries.expand(len(ids), -1, -1)
    return {
        "stage1/text_tokens": made.qformer(ids=ids, valid=valid),
        "stage1/image_feat": made.image_feature(states),
        "stage1/text_feat": made.text_feature(ids, valid),
        "stage1/itc_loss": made.contrastive_loss(states, ids, valid),
        "stage1/joint_tokens": made.qformer(queries, memory, ids, valid),
    }
