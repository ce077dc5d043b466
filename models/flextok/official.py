"""FlexAR's checkpoints (EPFL-VILAB/FlexAR-*): official keys to ours and back.

Sizes are read from the tensors; heads have 64 channels unless `num_heads` says otherwise. A file
may also hold the image tokenizer and the T5 encoder, which are left aside: the tokenizer is
imported on its own, text comes as features.
"""

import re
from collections.abc import Mapping

from torch import Tensor

from tessellar.errors import UserError
from tessellar.interop.importer import FLAT, GeneratorImporter, ImportOptions
from tessellar.interop.keys import KeyTable, Rule, table
from tessellar.interop.sizes import count, heads_of
from tessellar.models.flextok.model import FlexAR
from tessellar.protocol.layout import Layout

MODEL = "models.ar_image_model."
_BLOCK = f"{MODEL}trunk.blocks.{{i}}"
DROP = ("models.image_tokenizer.*", "models.text_encoder.t5_embedder.*")


def _keys(text: bool) -> KeyTable:
    attention, names = ("self_attn", (1, 2, 3)) if text else ("attn", (1, None, 2))
    pairs = {
        f"{MODEL}preprocessor.embedding.weight": "token_embedding.weight",
        f"{MODEL}preprocessor.positional_embedding": "positions",
        f"{MODEL}preprocessor.cls_embedding.weight": "classes.weight",
        "models.text_encoder.mlp.fc1.weight": "text.0.weight",
        "models.text_encoder.mlp.fc2.weight": "text.2.weight",
        f"{_BLOCK}.{attention}.{{layer}}.{{tensor}}": "layers.{i}.attention.{layer}.{tensor}",
        f"{_BLOCK}.mlp.fc1.weight": "layers.{i}.fc1.weight",
        f"{_BLOCK}.mlp.fc2.weight": "layers.{i}.fc2.weight",
        f"{MODEL}trunk.post_trunk_norm.{{tensor}}": "norm.{tensor}",
        f"{MODEL}head.linear.weight": "output.weight",
    }
    pairs |= {f"{_BLOCK}.cross_attn.W{w}.weight": f"layers.{{i}}.cross.w{w}.weight" for w in "qkv"}
    pairs[f"{_BLOCK}.cross_attn.proj.weight"] = "layers.{i}.cross.proj.weight"
    for number, ours in zip(names, ("attention", "cross", "mlp"), strict=True):
        if number is not None:
            pairs[f"{_BLOCK}.norm_{number}.{{tensor}}"] = f"layers.{{i}}.{ours}_norm.{{tensor}}"
    start = Rule(
        f"{MODEL}preprocessor.sos_token_embed",
        "start_token",
        lambda t: t[0, 0],
        lambda t: t[None, None],
    )
    return table(pairs, start, drop=DROP)


KEYS = {text: _keys(text) for text in (False, True)}


def generator_from_official(
    state: Mapping[str, Tensor], layout: Layout, num_heads: int | None = None, text_length: int = 1
) -> FlexAR:
    """The generator of an official state dict over the tokens of a layout; raises UserError where
    they do not fit.
    """
    OFFICIAL.check(state)
    length, width = state[f"{MODEL}preprocessor.positional_embedding"].shape
    if length != layout.length:
        raise UserError(f"the generator reads {length} tokens; the tokenizer gives {layout}")
    classes = state.get(f"{MODEL}preprocessor.cls_embedding.weight")
    fc1 = state.get("models.text_encoder.mlp.fc1.weight")
    generator = FlexAR(
        layout,
        width,
        depth=count(state, rf"{re.escape(MODEL)}trunk\.blocks\.(\d+)\."),
        num_heads=heads_of(width, num_heads),
        num_classes=None if classes is None else len(classes),
        text_dim=None if fc1 is None else fc1.shape[1],
        text_hidden=None if fc1 is None else len(fc1),
        text_length=text_length,
        qk_norm=any(".q_norm." in key for key in state),
    )
    return OFFICIAL.fill(generator, state)


def to_official(generator: FlexAR) -> dict[str, Tensor]:
    """The official state dict (without tokenizer and text encoder); the inverse of
    `generator_from_official`.
    """
    return OFFICIAL.to_official(generator)


def _keys_of(generator: FlexAR) -> KeyTable:
    return KEYS[generator.text is not None]


def _build(state: Mapping[str, Tensor], layout: Layout, options: ImportOptions) -> FlexAR:
    return generator_from_official(state, layout, options.num_heads)


OFFICIAL = GeneratorImporter(
    what="a FlexAR generator",
    marks=(f"{MODEL}head.linear.weight", f"{MODEL}preprocessor.positional_embedding"),
    entries=FLAT,
    keys=_keys_of,
    own=("conditioning.empty", "conditioning.empty_valid"),
    build=_build,
)
