"""A tiny instance of every generator of a paper, unlike the recorded one, and what its importer makes of it.

Other widths, depths, heads, layouts and options; shaken so that no two tensors are alike.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import nn

from tessellar.models.alitok import AliTokAR
from tessellar.models.alitok import official as alitok
from tessellar.models.bar import BAR
from tessellar.models.bar import official as bar
from tessellar.models.bitdance import BitDance
from tessellar.models.bitdance import official as bitdance
from tessellar.models.flextok import FlexAR
from tessellar.models.flextok import official as flextok
from tessellar.models.har import HAR
from tessellar.models.har import official as har
from tessellar.models.hita import HitaAR
from tessellar.models.hita import official as hita
from tessellar.models.ibq import IBQAR
from tessellar.models.ibq import official as ibq
from tessellar.models.llamagen import LlamaGen
from tessellar.models.llamagen import official as llamagen
from tessellar.models.lpd import LPD
from tessellar.models.lpd import official as lpd
from tessellar.models.mar import MAR
from tessellar.models.mar import official as mar
from tessellar.models.maskgit import MaskGIT
from tessellar.models.maskgit import official as maskgit
from tessellar.models.open_magvit2 import OpenMAGVIT2AR
from tessellar.models.open_magvit2 import official as open_magvit2
from tessellar.models.rar import RAR
from tessellar.models.rar import official as rar
from tessellar.models.retok import ReToKGPT
from tessellar.models.retok import official as retok
from tessellar.models.semanticist import SemanticistAR
from tessellar.models.semanticist import official as semanticist
from tessellar.models.token_shuffle import TokenShuffle
from tessellar.models.token_shuffle import official as token_shuffle
from tessellar.models.tokenbridge import KL16_ORDER, TokenBridge
from tessellar.models.tokenbridge import official as tokenbridge
from tessellar.models.tokenflow import TokenFlowAR
from tessellar.models.tokenflow import official as tokenflow
from tessellar.models.tokenflow.parity import Codebooks
from tessellar.models.var import VAR
from tessellar.models.var import official as var
from tessellar.models.xar import XAR
from tessellar.models.xar import official as xar
from tessellar.protocol.condition import Condition
from tessellar.protocol.generator import Generator
from tessellar.protocol.layout import (
    Bits,
    Categorical,
    Continuous,
    Factorized,
    Layout,
    Segment,
    grid_layout,
    sequence_layout,
)
from tessellar.tokenizers.kl_vae import KLVAE
from tessellar.tokenizers.quantizers.gaussian import GaussianBottleneck
from tessellar.tokenizers.tokenbridge import PostQuantized
from tessellar.tokenizers.var import VARVQVAE, MultiScaleQuantizer

M = TypeVar("M", bound=nn.Module)
Pair = tuple[Generator, Generator]

CLASSES = 5
GRID = grid_layout(3, 3, Categorical(23))
SEQUENCE = sequence_layout(9, Categorical(23))
LATENTS = grid_layout(4, 4, Continuous(3))


def shaken(module: M) -> M:
    """Weights that are all different, and large enough that mistakes show."""
    draw = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=draw))
    return module.eval()


def classes() -> Condition:
    return Condition(ids=torch.tensor([0, 3]))


def captions(dim: int, length: int) -> Condition:
    features = torch.randn(2, length, dim, generator=torch.Generator().manual_seed(1))
    valid = torch.arange(length) >= torch.tensor([[0], [1]])
    return Condition(valid=valid, features=features)


def llamagen_classes() -> Pair:
    made = LlamaGen(GRID, 40, 2, 5, CLASSES, ffn_multiple_of=24, norm_eps=1e-2, rope_base=50.0)
    state = llamagen.to_official(shaken(made))
    return made, llamagen.from_official(state, GRID, 5, norm_eps=1e-2, rope_base=50.0)


def llamagen_captions() -> Pair:
    made = LlamaGen(GRID, 24, 3, 3, None, caption_dim=10, caption_length=7)
    return made, llamagen.from_official(llamagen.to_official(shaken(made)), GRID, 3)


def ibq_of_a_wide_grid() -> Pair:
    layout = grid_layout(2, 5, Categorical(23))
    made = IBQAR(layout, 40, 3, 5, CLASSES, dropout=0.0, gate_scale=0.5, ffn_multiple_of=24)
    return made, ibq.from_official(ibq.to_official(shaken(made)), layout, 5)


def open_magvit2_of_three_blocks_in_a_token() -> Pair:
    layout = grid_layout(2, 5, Factorized((8, 4)))
    made = OpenMAGVIT2AR(
        layout, 40, 1, 5, 3, CLASSES, dropout=0.0, ffn_multiple_of=24, condition_dropout=0.0
    )
    return made, open_magvit2.from_official(open_magvit2.to_official(shaken(made)), layout, 5)


def retok_gpt() -> Pair:
    made = ReToKGPT(SEQUENCE, 24, 3, 3, CLASSES, ffn_multiple_of=20, norm_eps=1e-2)
    state = retok.gpt_to_official(shaken(made))
    return made, retok.gpt_from_official(state, SEQUENCE, 3, norm_eps=1e-2)


def har_of_other_levels() -> Pair:
    layout = sequence_layout(32, Categorical(23))
    made = HAR(
        layout, 24, 3, 3, CLASSES, first=2, ffn_multiple_of=20, norm_eps=1e-2, rope_base=50.0
    )
    state = har.to_official(shaken(made))
    return made, har.from_official(state, layout, 3, first=2, norm_eps=1e-2, rope_base=50.0)


def hita_of_two_vocabularies() -> Pair:
    holistic = Segment((5,), Categorical(11), "holistic")
    layout = Layout((holistic, Segment((3, 3), Categorical(23), "patches")))
    made = HitaAR(layout, 24, 3, 3, CLASSES, ffn_multiple_of=20, norm_eps=1e-2, rope_base=50.0)
    state = hita.to_official(shaken(made))
    return made, hita.from_official(
        state, layout, 3, "train_consistent", norm_eps=1e-2, rope_base=50.0
    )


def flextok_classes() -> Pair:
    made = FlexAR(SEQUENCE, 24, 3, 3, CLASSES, qk_norm=False)
    return made, flextok.generator_from_official(flextok.to_official(shaken(made)), SEQUENCE, 3)


def flextok_text() -> Pair:
    made = FlexAR(SEQUENCE, 20, 2, 5, None, text_dim=10, text_hidden=28, text_length=4)
    return made, flextok.generator_from_official(flextok.to_official(shaken(made)), SEQUENCE, 5, 4)


def rar_of_other_heads() -> Pair:
    made = RAR(SEQUENCE, 24, 3, 2, 44, CLASSES)
    return made, rar.from_official(rar.to_official(shaken(made)), SEQUENCE)


def alitok_of_other_segments() -> Pair:
    """Another grid, no prefix that fits it, and heads of another width."""
    kind = Categorical(23)
    layout = Layout((Segment((3,), kind, "prefix"), Segment((2, 4), kind, "patches")))
    options = {"norm_eps": 1e-2, "rope_base": 50.0, "dropout": 0.0}
    made = AliTokAR(layout, 40, 3, 5, CLASSES, **options)  # type: ignore[arg-type]
    return made, alitok.from_official(alitok.to_official(shaken(made)), layout, **options)


def lpd_of_other_heads() -> Pair:
    layout = grid_layout(2, 5, Categorical(23))
    options = {"steps": 4, "repulsion": 1.0}
    made = LPD(layout, 40, 3, 5, CLASSES, dropout=0.0, mlp_ratio=3.0, **options)  # type: ignore[arg-type]
    state = lpd.to_official(shaken(made))
    return made, lpd.from_official(state, layout, 5, dropout=0.0, **options)  # type: ignore[arg-type]


def _bitdance(layout: Layout, patch: int, **sizes: int) -> Pair:
    made = BitDance(
        layout,
        40,
        3,
        5,
        patch=patch,
        num_classes=CLASSES,
        repeats=3,
        condition_dropout=0.0,
        flip=0.0,
        **sizes,  # type: ignore[arg-type]
    )
    state = bitdance.to_official(shaken(made))
    again = bitdance.from_official(
        state, layout, 5, head_dim=sizes.get("head_dim", 64), repeats=3, flip=0.0
    )
    return made, again


def _bar(layout: Layout, patch: int, **sizes: int) -> Pair:
    made = BAR(layout, 40, 3, 5, patch, num_classes=CLASSES, dropout=0.0, **sizes)  # type: ignore[arg-type]
    return made, bar.from_official(bar.to_official(shaken(made)), layout)


def bar_of_many_bits() -> Pair:
    return _bar(grid_layout(3, 3, Bits(70)), 1, head_width=24, head_depth=2)


def bar_of_patches_on_a_wide_grid() -> Pair:
    return _bar(grid_layout(2, 4, Bits(3)), 2, head_width=36, head_depth=1)


def bitdance_of_three_modulations() -> Pair:
    sizes = {"head_width": 24, "head_depth": 3, "head_groups": 3, "class_tokens": 1}
    return _bitdance(grid_layout(2, 5, Bits(7)), 1, **sizes)


def bitdance_of_patches_on_a_wide_grid() -> Pair:
    sizes = {"head_width": 48, "head_depth": 4, "head_groups": 2, "head_dim": 12, "class_tokens": 5}
    return _bitdance(grid_layout(3, 6, Bits(70)), 3, **sizes)


def maskgit_vit() -> Pair:
    made = MaskGIT(SEQUENCE, "vit", 24, 3, 3, 44, CLASSES)
    return made, maskgit.from_official(maskgit.to_official(shaken(made)), SEQUENCE, 3)


def maskgit_uvit() -> Pair:
    made = MaskGIT(SEQUENCE, "uvit", 24, 6, 2, 44, CLASSES)
    return made, maskgit.from_official(maskgit.to_official(shaken(made)), SEQUENCE, 2)


# Another width, depth and number of heads on each side of the masked backbone, and a buffer.
TWO_SHAPES: dict[str, Any] = {
    "width": 16,
    "depth": 3,
    "num_heads": 4,
    "decoder_width": 24,
    "decoder_depth": 1,
    "decoder_heads": 3,
    "head_width": 20,
    "head_depth": 3,
    "num_classes": CLASSES,
    "buffer": 5,
    "mlp_ratio": 3.0,
    "steps": 3,
}


def mar_of_two_shapes() -> Pair:
    made = MAR(LATENTS, patch=2, **TWO_SHAPES)
    return made, mar.from_official(mar.to_official(shaken(made)), LATENTS, 4, decoder_heads=3)


def post_quantized(channels: int, levels: int) -> PostQuantized:
    """A tokenizer of 4 x 4 tokens of `channels` indices each."""
    vae = KLVAE(GaussianBottleneck(channels, scale=1.0), 32, 8, (1, 1, 1, 1), 1, groups=8)
    return PostQuantized(vae, levels)


def _tokenbridge(channels: int, levels: int, **options: Any) -> Pair:
    """Both bound to one tokenizer, which says what tokens stand for."""
    tokenizer = post_quantized(channels, levels)
    none = {"dropout": 0.0, "condition_dropout": 0.0}
    made = TokenBridge(tokenizer.layout, head_heads=5, **TWO_SHAPES, **none, **options)
    state = tokenbridge.to_official(shaken(made))
    again = tokenbridge.from_official(state, tokenizer.layout, 4, decoder_heads=3)
    for generator in (made, again):
        generator.bind(tokenizer)
    return made, again


def tokenbridge_of_two_shapes() -> Pair:
    return _tokenbridge(5, 7)


def tokenbridge_of_groups() -> Pair:
    """Pairs of KL-16's channels are one class."""
    return _tokenbridge(16, 3, group=2, channel_order=KL16_ORDER)


def tokenbridge_in_parallel() -> Pair:
    return _tokenbridge(4, 6, parallel=True)


def xar_of_two_depths() -> Pair:
    made = XAR(LATENTS, "cell:2x4", 24, 3, 3, CLASSES, mlp_ratio=3.0, decoder_depth=1)
    return made, xar.from_official(xar.to_official(shaken(made)), LATENTS, 3, "cell:2x4")


def semanticist_of_first_tokens() -> Pair:
    layout = sequence_layout(9, Continuous(5), min_prefix=1)
    sizes: dict[str, Any] = {"num_tokens": 7, "head_width": 20, "head_depth": 3}
    made = SemanticistAR(layout, 24, 3, 3, CLASSES, dropout=0.0, ffn_multiple_of=20, **sizes)
    state = semanticist.to_official(shaken(made))
    again = semanticist.from_official(state, layout, 3)
    again.layers.apply(_without_dropout)
    return made, again


def _without_dropout(module: nn.Module) -> None:
    if isinstance(module, nn.Dropout):
        module.p = 0.0


def _vqvae() -> VARVQVAE:
    return shaken(VARVQVAE(MultiScaleQuantizer(23, 6, (1, 3, 4)), 16, 32, (1, 1, 2), 1))


def _bound(*generators: VAR) -> tuple[VAR, ...]:
    vqvae = _vqvae()
    for generator in generators:
        generator.bind(vqvae)
    return generators


def var_of_other_scales() -> Pair:
    layout = _vqvae().layout
    made = shaken(VAR(layout, 24, 3, 3, CLASSES, 6, mlp_ratio=3.0))
    first, second = _bound(made, var.from_official(var.to_official(made), layout))
    return first, second


def var_of_shared_modulation() -> Pair:
    layout = _vqvae().layout
    made = shaken(VAR(layout, 24, 2, 4, CLASSES, 6, shared_modulation=True, l2_norm=False))
    first, second = _bound(made, var.from_official(var.to_official(made), layout, 4))
    return first, second


def token_shuffle_of_wide_windows() -> Pair:
    layout = grid_layout(3, 6, Categorical(23))
    made = TokenShuffle(
        layout,
        width=36,
        depth=3,
        num_heads=6,
        window=3,
        mlp_blocks=1,
        mlp_ratio=2.0,
        text_vocab=11,
        bos=2,
        rope_base=50.0,
        num_kv_heads=3,
        ffn_hidden=52,
        norm_eps=1e-2,
        tied=True,
    )
    state = token_shuffle.to_official(shaken(made))
    return made, token_shuffle.from_official(state, layout, 6, bos=2, rope_base=50.0, norm_eps=1e-2)


def tokenflow_of_other_scales() -> Pair:
    """Wider heads, marks on both sides, and a text to move away from."""
    codebooks = Codebooks(23, 4, 3, sides=(1, 3, 4))
    layout = Layout(codebooks.segments)
    marks: dict[str, Any] = {"opening": (3, 4), "closing": (5,), "negative": (2, 9)}
    options = {"norm_eps": 1e-2, "qk_norm_eps": 1e-3, "rope_base": 50.0}
    sizes: dict[str, Any] = {"text_vocab": 11, "text_length": 5, "latent_dim": 7, "ffn_hidden": 28}
    made = TokenFlowAR(
        layout, 48, 3, 3, None, condition_dropout=0.0, bos=2, **sizes, **marks, **options
    )
    state = tokenflow.to_official(shaken(made))
    again = tokenflow.from_official(state, layout, text_length=5, bos=2, **marks, **options)
    made.bound = again.bound = (codebooks,)
    return made, again


def text() -> Condition:
    ids = torch.tensor([[2, 5, 7], [2, 1, 9]])
    return Condition(ids=ids, valid=torch.ones_like(ids, dtype=torch.bool))


OF_CLASSES: list[Callable[[], Pair]] = [
    alitok_of_other_segments,
    bar_of_many_bits,
    bar_of_patches_on_a_wide_grid,
    bitdance_of_three_modulations,
    bitdance_of_patches_on_a_wide_grid,
    lpd_of_other_heads,
    llamagen_classes,
    ibq_of_a_wide_grid,
    open_magvit2_of_three_blocks_in_a_token,
    retok_gpt,
    har_of_other_levels,
    hita_of_two_vocabularies,
    flextok_classes,
    rar_of_other_heads,
    maskgit_vit,
    maskgit_uvit,
    mar_of_two_shapes,
    tokenbridge_of_two_shapes,
    tokenbridge_of_groups,
    tokenbridge_in_parallel,
    xar_of_two_depths,
    semanticist_of_first_tokens,
    var_of_other_scales,
    var_of_shared_modulation,
]
OF_OTHERS: list[tuple[Callable[[], Pair], Condition]] = [
    (llamagen_captions, captions(10, 7)),
    (flextok_text, captions(10, 4)),
    (token_shuffle_of_wide_windows, text()),
    (tokenflow_of_other_scales, text()),
]
CASES = [*((make, classes()) for make in OF_CLASSES), *OF_OTHERS]
