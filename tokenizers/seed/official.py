"""SEED-2's checkpoint, `seed_quantizer.pt` (arXiv 2310.01218): official keys to ours and back.

It may hold EVA's vision transformer; where it does not, `eva_vit_g.pth` beside it is read. The head of
the embedding is told by the keys. Sizes are read from the tensors' shapes; heads are the published
ones unless they are given. Weights are stored in float16; here they are float32, so that a few codes
may differ from official float16 inference.
"""

from collections.abc import Mapping
from math import isqrt
from pathlib import Path

from torch import Tensor, nn

from tessellar.errors import UserError
from tessellar.interop.files import unwrap
from tessellar.interop.importer import FLAT, ImportOptions, TokenizerImporter
from tessellar.interop.keys import KeyTable, Rule, table
from tessellar.interop.sizes import count, heads_of
from tessellar.tensor_files import read_pickle
from tessellar.tokenizers.seed.embedding import NarrowedHead
from tessellar.tokenizers.seed.tokenizer import NARROW, SEED, BertSize
from tessellar.tokenizers.seed.vision import EvaVision
from tessellar.tokenizers.titok.official import patch_convolution, patch_matrix

EVA = "visual_encoder."
EVA_FILE = "eva_vit_g.pth"
VISION_HEADS = {1408: 16}
DECODER_HEADS = 12


def qformer_pairs(theirs: str, ours: str) -> dict[str, str]:
    """Of a Q-Former; `theirs` and `ours` are how its keys begin."""
    layer = f"{theirs}bert.encoder.layer.{{i}}."
    block = f"{ours}blocks.{{i}}."
    pairs = {f"{theirs}bert.embeddings.LayerNorm.{{tensor}}": f"{ours}norm.{{tensor}}"}
    for name, own in (("attention", "attention"), ("crossattention", "cross_attention")):
        for linear in ("query", "key", "value"):
            pairs[f"{layer}{name}.self.{linear}.{{tensor}}"] = f"{block}{own}.{linear}.{{tensor}}"
        pairs[f"{layer}{name}.output.dense.{{tensor}}"] = f"{block}{own}.out.{{tensor}}"
        pairs[f"{layer}{name}.output.LayerNorm.{{tensor}}"] = f"{block}{own}.norm.{{tensor}}"
    for suffix, own in (("_query", "of_queries"), ("", "of_texts")):
        pairs[f"{layer}intermediate{suffix}.dense.{{tensor}}"] = f"{block}{own}.fc1.{{tensor}}"
        pairs[f"{layer}output{suffix}.dense.{{tensor}}"] = f"{block}{own}.fc2.{{tensor}}"
        pairs[f"{layer}output{suffix}.LayerNorm.{{tensor}}"] = f"{block}{own}.norm.{{tensor}}"
    for name, own in (("word", "words"), ("position", "positions")):
        pairs[f"{theirs}bert.embeddings.{name}_embeddings.weight"] = f"{ours}text.{own}.weight"
    return pairs


def _blocks() -> dict[str, str]:
    """Both branches behind the codes."""
    pairs = {}
    for blocks, positions, ours in (
        ("blocks", "pos_embed", "recalling"),
        ("blocks_image", "pos_embed_image", "meaning"),
    ):
        pairs[positions] = f"{ours}.positions"
        block = f"{ours}.blocks.{{i}}"
        theirs = f"{blocks}.{{i}}"
        pairs[f"{theirs}.norm1.{{tensor}}"] = f"{block}.attention_norm.{{tensor}}"
        pairs[f"{theirs}.norm2.{{tensor}}"] = f"{block}.mlp_norm.{{tensor}}"
        for part, layer in (
            ("attn", "qkv"),
            ("attn", "proj"),
            ("mlp", "fc1"),
            ("mlp", "fc2"),
        ):
            pairs[f"{theirs}.{part}.{layer}.{{tensor}}"] = f"{block}.{layer}.{{tensor}}"
    return pairs


def _vision() -> dict[str, str]:
    block = f"{EVA}blocks.{{i}}"
    ours = "vision.blocks.{i}"
    pairs = {
        f"{EVA}cls_token": "vision.class_token",
        f"{EVA}pos_embed": "vision.positions",
        f"{EVA}patch_embed.proj.bias": "vision.patch_in.bias",
        f"{block}.attn.q_bias": f"{ours}.q_bias",
        f"{block}.attn.v_bias": f"{ours}.v_bias",
        f"{block}.attn.qkv.weight": f"{ours}.qkv.weight",
        f"{block}.attn.proj.{{tensor}}": f"{ours}.proj.{{tensor}}",
    }
    for norm in ("norm1", "norm2"):
        pairs[f"{block}.{norm}.{{tensor}}"] = f"{ours}.{norm}.{{tensor}}"
    for layer in ("fc1", "fc2"):
        pairs[f"{block}.mlp.{layer}.{{tensor}}"] = f"{ours}.{layer}.{{tensor}}"
    return pairs


KEYS: KeyTable = table(
    {
        **_vision(),
        "ln_vision.{tensor}": "vision_norm.{tensor}",
        "query_tokens": "queries",
        **qformer_pairs("Qformer.", "qformer."),
        "encode_task_layer.{i}.{tensor}": "to_code.{i}.{tensor}",
        "quantize.embedding.weight": "quantizer.codebook.weight",
        "decode_task_layer.{i}.{tensor}": "from_code.{i}.{tensor}",
        **_blocks(),
        "image_down.{i}.weight": "embedding_head.narrow.{i}.weight",
        "distill_image_proj.{tensor}": "embedding_head.out.{tensor}",
        "reverse_tokens": "embedding_head.query",
        **qformer_pairs("Reverse_Qformer.", "embedding_head.qformer."),
    },
    Rule(
        f"{EVA}patch_embed.proj.weight", "vision.patch_in.weight", patch_matrix, patch_convolution
    ),
    drop=("*.position_ids",),
)


def vision_of(state: Mapping[str, Tensor], heads: int | None) -> EvaVision:
    """An empty vision transformer of the sizes that the weights show."""
    width = state[f"{EVA}cls_token"].shape[-1]
    if heads is None and width not in VISION_HEADS:
        raise UserError(f"the number of heads of width {width} is not known: give --num_heads")
    patch_size = state[f"{EVA}patch_embed.proj.weight"].shape[-1]
    side = isqrt(state[f"{EVA}pos_embed"].shape[1] - 1)
    return EvaVision(
        side * patch_size,
        patch_size,
        width=width,
        depth=count(state, r"visual_encoder\.blocks\.(\d+)\."),
        num_heads=heads or VISION_HEADS[width],
        hidden=len(state[f"{EVA}blocks.0.mlp.fc1.bias"]),
    )


def qformer_size(state: Mapping[str, Tensor], heads: int | None) -> BertSize:
    """Of the causal Q-Former."""
    layer = "Qformer.bert.encoder.layer.0"
    width = len(state[f"{layer}.attention.self.query.bias"])
    depth = count(state, r"Qformer\.bert\.encoder\.layer\.(\d+)\.")
    hidden = len(state[f"{layer}.intermediate_query.dense.bias"])
    return BertSize(width, depth, num_heads=heads_of(width, heads), hidden=hidden)


def from_official(
    state: Mapping[str, Tensor],
    heads: tuple[int | None, int | None] = (None, None),
    decoder_heads: int = DECODER_HEADS,
    where: str = "",
) -> SEED:
    """A tokenizer with the sizes that the weights show, filled with them; `heads` are the vision
    transformer's and the Q-Former's. It has no detokenizer.
    """
    OFFICIAL.check(state)
    if f"{EVA}cls_token" not in state:
        raise UserError(
            f"{where or 'the file'} holds no vision transformer: put EVA's {EVA_FILE} beside it"
        )
    vision = vision_of(state, heads[0])
    vocab_size, code_dim = state["quantize.embedding.weight"].shape
    made = SEED(
        vision,
        vision.input_size[0],
        num_tokens=state["query_tokens"].shape[1],
        vocab_size=vocab_size,
        code_dim=code_dim,
        qformer_size=qformer_size(state, heads[1]),
        decoder_depth=count(state, r"blocks_image\.(\d+)\."),
        decoder_heads=decoder_heads,
        embedding_dim=len(state["distill_image_proj.bias"]),
        reverse="reverse_tokens" in state,
    )
    check_narrow(made, state)
    return OFFICIAL.fill(made, state, where)


def check_narrow(made: SEED, state: Mapping[str, Tensor]) -> None:
    """Raise UserError for layers of other sizes than the published ones."""
    if not isinstance(made.embedding_head, NarrowedHead):
        return
    linears = [layer for layer in made.embedding_head.narrow if isinstance(layer, nn.Linear)]
    for number, layer in enumerate(linears):
        key = f"image_down.{2 * number}.weight"
        if key not in state or state[key].shape != layer.weight.shape:
            raise UserError(f"{key} is not of the published sizes {', '.join(map(str, NARROW))}")


def to_official(tokenizer: SEED) -> dict[str, Tensor]:
    """Official state dict of a tokenizer, the vision transformer included; the inverse of
    `from_official`.
    """
    return OFFICIAL.to_official(tokenizer)


def eva_beside(file: str | None) -> dict[str, Tensor]:
    """EVA's weights from the file beside a checkpoint, under the keys of a checkpoint that holds
    them; none where there is no such file.

    Blocks behind the published 39, and what no feature reads, are left out.
    """
    beside = None if file is None else Path(file).with_name(EVA_FILE)
    if beside is None or not beside.is_file():
        return {}
    state = unwrap(read_pickle(beside), str(beside), None, ("module", "model"))
    known = tuple(
        name.removeprefix(EVA)
        for name in (f"{EVA}cls_token", f"{EVA}pos_embed", f"{EVA}patch_embed")
    )
    kept = {}
    for name, tensor in state.items():
        in_block = name.startswith("blocks.") and int(name.split(".")[1]) < 39
        if in_block or name.startswith(known):
            kept[f"{EVA}{name}"] = tensor
    return kept


def _build(state: Mapping[str, Tensor], options: ImportOptions) -> SEED:
    if f"{EVA}cls_token" not in state:
        state = {**state, **eva_beside(options.file)}
    heads = (options.num_heads, options.decoder_heads)
    return from_official(state, heads, where=options.file or "")


OFFICIAL = TokenizerImporter(
    what="a SEED tokenizer",
    marks=(
        "query_tokens",
        "encode_task_layer.0.weight",
        "quantize.embedding.weight",
        "distill_image_proj.weight",
    ),
    entries=FLAT,
    keys=KEYS,
    own=("quantizer.step", "quantizer.counts", "detokenizer.*"),
    build=_build,
)
