"""What all quantizers promise: tokens and vectors agree, configs rebuild, float32, bad sizes, a step of training."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tessellar.callbacks.codebook_usage import add_counts, codebooks, usage
from tessellar.protocol.configured import build
from tessellar.protocol.layout import Segment, grid_layout
from tessellar.protocol.tokenizer import Quantizer
from tessellar.tokenizers.losses.reconstruction import Reconstruction
from tessellar.tokenizers.losses.tokenizer_loss import TokenizerLoss
from tessellar.tokenizers.quantizers.bsq import BSQ
from tessellar.tokenizers.quantizers.clustering import ClusteringVQ
from tessellar.tokenizers.quantizers.ema_vq import EMAVectorQuantizer
from tessellar.tokenizers.quantizers.fsq import FSQ
from tessellar.tokenizers.quantizers.ibq import IBQ
from tessellar.tokenizers.quantizers.lfq import LFQ
from tessellar.tokenizers.quantizers.product_vq import ProductQuantizer
from tessellar.tokenizers.quantizers.projected import Projected
from tessellar.tokenizers.quantizers.residual_vq import ResidualQuantizer, residual_fsq
from tessellar.tokenizers.quantizers.simvq import SimVQ
from tessellar.tokenizers.quantizers.vq import VectorQuantizer
from tessellar.tokenizers.vit_vq import ViTVQ
from tessellar.training.optim import OptimizerSettings
from tessellar.training.tokenizer_module import TokenizerModule

KINDS: dict[str, Callable[[], Quantizer]] = {
    "vq": lambda: VectorQuantizer(32, 4, entropy_weight=0.1),
    "rotation": lambda: VectorQuantizer(32, 4, False, rotation=True),
    "ema": lambda: EMAVectorQuantizer(32, 4, threshold=0.1, decay=0.9),
    "clustering": lambda: ClusteringVQ(32, 4),
    "simvq": lambda: SimVQ(32, 4),
    "ibq": lambda: IBQ(32, 4),
    "fsq": lambda: FSQ((8, 5, 3)),
    "fsq_symmetric": lambda: FSQ((8, 2, 5), symmetric=True),
    "lfq": lambda: LFQ(6),
    "lfq_groups": lambda: LFQ(6, groups=2, big_endian=True),
    "lfq_bits": lambda: LFQ(6, form="bits"),
    "bsq": lambda: BSQ(6, 3),
    "bsq_index": lambda: BSQ(6, 6, "index", analytical=False),
    "residual": lambda: ResidualQuantizer(
        (VectorQuantizer(16, 4, False), VectorQuantizer(8, 4, False)), dropout=0.5
    ),
    "residual_shared": lambda: ResidualQuantizer((EMAVectorQuantizer(16, 4, False),), depth=3),
    "residual_fsq": lambda: residual_fsq((5, 5, 3), 2),
    "product": lambda: ProductQuantizer(
        (VectorQuantizer(16, 2), ResidualQuantizer((LFQ(3), LFQ(3)), ratio=2.0))
    ),
    "projected": lambda: Projected(FSQ((3, 3)), 6),
}
kinds = pytest.mark.parametrize("name", KINDS)


def make(name: str) -> Quantizer:
    torch.manual_seed(0)
    return KINDS[name]()


def latents(quantizer: Quantizer, *shape: int) -> Tensor:
    return torch.randn(
        *(shape or (3, 7)), quantizer.dim, generator=torch.Generator().manual_seed(1)
    )


@kinds
@torch.no_grad()
def test_tokens_and_vectors_agree(name: str) -> None:
    quantizer = make(name).eval()
    z = latents(quantizer)
    out, tokens = quantizer(z), quantizer.encode(z)
    assert torch.equal(out.tokens, tokens)
    torch.testing.assert_close(quantizer.decode(tokens), out.quantized, atol=1e-6, rtol=1e-6)
    assert torch.equal(
        quantizer.encode(z[1, 2]), tokens[1, 2]
    )  # each vector by itself, of any leading shape
    layout = grid_layout(1, 7, quantizer.kind)
    layout.check(tokens)
    sizes = torch.tensor(codebooks(Segment((1,), quantizer.kind)))
    assert bool((tokens >= 0).all()) and bool((tokens.reshape(-1, len(sizes)) < sizes).all())


@kinds
@torch.no_grad()
def test_a_config_rebuilds_the_quantizer(name: str) -> None:
    quantizer = make(name).eval()
    again = build(quantizer.config).eval()
    again.load_state_dict(quantizer.state_dict())
    z = latents(quantizer)
    assert again.kind == quantizer.kind and torch.equal(again.encode(z), quantizer.encode(z))


@pytest.mark.parametrize(
    "name", [name for name in KINDS if name != "projected"]
)  # its linear maps are mixed
def test_quantization_is_float32_under_autocast(name: str) -> None:
    quantizer = make(name).eval()
    z = latents(quantizer, 2, 50)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed, tokens = quantizer(z), quantizer.encode(z)
    exact = quantizer(z)
    assert mixed.quantized.dtype == torch.float32 and torch.equal(tokens, exact.tokens)
    assert torch.equal(mixed.tokens, exact.tokens)
    assert all(torch.equal(mixed.losses[loss], value) for loss, value in exact.losses.items())


@kinds
def test_it_works_on_the_meta_device(name: str) -> None:
    with torch.device("meta"):
        assert all(p.is_meta for p in KINDS[name]().parameters())


@kinds
def test_vit_vq_takes_a_training_step(name: str) -> None:
    """One update moves the encoder and what the quantizer learns, and leaves codes that no optimizer owns to it."""
    tokenizer = ViTVQ(make(name), 8, 4, 16, 1, 1, 2)
    module = TokenizerModule(
        tokenizer, TokenizerLoss(Reconstruction(l2=1.0)), OptimizerSettings("adamw", lr=1e-2)
    )
    (player,) = module.make_players()
    before = {n: p.detach().clone() for n, p in tokenizer.named_parameters()}
    images = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(2)) * 2 - 1
    output = tokenizer(images)
    terms = module.loss.generator_loss(images, output, 0, tokenizer.last_layer)
    terms.total.backward()
    for optimizer in player.optimizers:
        optimizer.step()
    assert torch.isfinite(terms.total) and all(
        torch.isfinite(p).all() for p in tokenizer.parameters()
    )
    moved = {n for n, p in tokenizer.named_parameters() if not torch.equal(p, before[n])}
    assert {"patch_in.weight", "to_code.weight", "from_code.weight"} <= moved
    assert {
        n for n, p in tokenizer.quantizer.named_parameters(prefix="quantizer") if p.requires_grad
    } <= moved
    counts = add_counts([], output.tokens, tokenizer.layout)
    assert 0 < usage(counts[0].split(codebooks(tokenizer.layout.segments[0])))["usage"] <= 1


@pytest.mark.parametrize(
    ("construct", "message"),
    [
        (lambda: FSQ((8, 1)), "at least 2"),
        (lambda: FSQ((8, 5), clamp=True), "set symmetric"),
        (lambda: LFQ(7, groups=2), "7 bits do not make 2"),
        (lambda: LFQ(6, split=(2, 3)), r"\(2, 3\), which are not 6"),
        (lambda: LFQ(6, form="id"), "'id'; there are index, bits"),
        (lambda: LFQ(64, entropy_weight=0.0), "cannot hold 64 bits"),
        (lambda: LFQ(20), "entropy of 20 bits"),
        (lambda: LFQ(6, entropy_guard="log"), "'log' is not known"),
        (lambda: BSQ(8, 3), "must divide dim 8"),
        (lambda: EMAVectorQuantizer(8, 4, decay=1.5), "decay 1.5"),
        (lambda: EMAVectorQuantizer(0, 4), "vocab_size is 0"),
        (lambda: IBQ(8, 0), "dim 0"),
        (lambda: ResidualQuantizer(()), "needs layers"),
        (lambda: ResidualQuantizer((LFQ(3), LFQ(4))), "all of one dim"),
        (lambda: ResidualQuantizer((LFQ(3), LFQ(3)), depth=2), "repeats a single layer"),
        (lambda: ResidualQuantizer((LFQ(3), LFQ(3)), dropout=0.5, keep=3), r"keep 3 in \[1, 2\]"),
        (lambda: ProductQuantizer(()), "at least one group"),
        (lambda: ProductQuantizer((BSQ(6, 3),)), "no ids"),
    ],
)
def test_options_that_mean_nothing(construct: Callable[[], Quantizer], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        construct()
