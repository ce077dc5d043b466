"""Joint training: gradients reach what they should and nothing else, soft inputs are the hard ones, a
resumed run is the uninterrupted one, the export samples."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tessellar
from tessellar.callbacks.ema import EMA
from tessellar.checkpoints.card import Record
from tessellar.errors import UserError
from tessellar.models.har import HAR
from tessellar.models.llamagen import LlamaGen
from tessellar.models.maskgit import MaskGIT
from tessellar.models.rar import RAR
from tessellar.protocol.condition import Condition
from tessellar.tokenizers.losses.discriminator import PatchGAN
from tessellar.tokenizers.losses.reconstruction import Reconstruction
from tessellar.tokenizers.losses.tokenizer_loss import TokenizerLoss
from tessellar.tokenizers.one_d_piece import OneDPiece
from tessellar.tokenizers.quantizers.ibq import IBQ
from tessellar.tokenizers.quantizers.vq import VectorQuantizer
from tessellar.tokenizers.titok import ViTSize
from tessellar.tokenizers.vit_vq import ViTVQ
from tessellar.training.joint_module import JointModule
from tessellar.training.methods.joint import Ramp, assignment, expected_vectors, soft_inputs
from tessellar.training.optim import OptimizerSettings
from tessellar.training.tokenizer_module import TokenizerModule
from tessellar.training.transfer import Transfer
from tests.tiny.pairs import TOKENIZERS
from tests.training.test_resume import Drawing, SaveAll, differences, everything

LLAMA = partial(
    LlamaGen, width=16, depth=1, num_heads=2, num_classes=10, ffn_multiple_of=8, dropout=0.0
)
HAR_SMALL = partial(
    HAR, width=16, depth=1, num_heads=2, num_classes=10, ffn_multiple_of=8, dropout=0.0
)
PARTS = ("encoder", "codes", "decoder", "generator")


def make(tokenizer=None, discriminator: nn.Module | None = None, **options: Any) -> JointModule:
    torch.manual_seed(0)
    tokenizer = tokenizer or ViTVQ(IBQ(16, 4), 16, 4, 16, 1, 1, 2)
    loss = TokenizerLoss(Reconstruction(l1=1.0), discriminator=discriminator, adversarial_start=1)
    settings = {"generator": LLAMA, "optimizer": OptimizerSettings(lr=1e-3), **options}
    module = JointModule(tokenizer, loss=loss, **settings)
    for parameter in module.model.generator.parameters():
        nn.init.normal_(parameter, std=0.3)
    return module


def batch_of(count: int = 4) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(1)
    return {
        "image": torch.rand(count, 3, 16, 16, generator=draw) * 2 - 1,
        "label": torch.arange(count),
    }


def reached(module: JointModule, loss: Tensor) -> set[str]:
    """The parts that the gradient of a loss reaches."""
    tokenizer = module.tokenizer
    groups = {
        "encoder": tokenizer.encoder,
        "codes": tokenizer.quantizer,
        "decoder": tokenizer.decoder,
        "generator": module.model.generator.layers,
    }
    module.zero_grad()
    loss.backward(retain_graph=True)
    found = set()
    for name, part in groups.items():
        if any(p.grad is not None and bool(p.grad.any()) for p in part.parameters()):
            found.add(name)
    return found


def terms_of(module: JointModule) -> dict[str, Tensor]:
    batch = batch_of()
    output = module.tokenizer.of_batch(batch)
    z = module.watched.taken()
    condition = module.model.conditioner(batch)
    return module.generator_terms(batch["image"], output.tokens, z, condition)[0]


@pytest.mark.parametrize(
    "options, likelihood, prediction",
    [
        ({}, {"encoder", "codes", "generator"}, set(PARTS)),
        ({"likelihood": Ramp(0.0)}, {"generator"}, {"codes", "decoder", "generator"}),
        (
            {"prediction_trains_generator": False},
            {"encoder", "codes", "generator"},
            {"codes", "decoder"},
        ),
    ],
)
def test_gradients_reach_what_they_should(options, likelihood, prediction) -> None:
    module = make(**options).train()
    terms = terms_of(module)
    assert reached(module, terms["cross_entropy"]) == likelihood
    assert reached(module, terms["prediction"]) == prediction


@pytest.mark.parametrize("generator", [LLAMA, HAR_SMALL], ids=["llamagen", "har"])
def test_soft_inputs_have_the_values_of_hard_ones_and_the_gradient_of_soft_ones(generator) -> None:
    tokenizer = OneDPiece(IBQ(16, 4), 16, 4, 16, ViTSize(16, 1, 2), ViTSize(16, 1, 2))
    made = make(tokenizer, generator=generator).eval().teacher_forced[0]
    tokens = torch.randperm(16)[None]  # each code once, so that rows of the table are places
    condition = Condition(ids=torch.tensor([1]))
    p = torch.randn(1, 16, 16).softmax(-1).requires_grad_()
    hard = made.score(tokens, condition).logits
    (of_table,) = torch.autograd.grad(hard.square().sum(), made.token_table())
    for weight in (1.0, 0.25):
        with soft_inputs(made, p, weight):
            soft = made.score(tokens, condition).logits
        assert torch.equal(soft, hard)
        loss = soft.square().sum()
        of_p, again = torch.autograd.grad(loss, [p, made.token_table()])
        torch.testing.assert_close(again, of_table)
        # The gradient of p Emb: that of the vector which is read there, against every vector.
        expected = weight * of_table[tokens] @ made.token_table().T
        torch.testing.assert_close(of_p, expected)
    assert made.reader is None and made.veil is None
    assert bool(of_p[0, :-1].any(-1).sum() >= 8) and not bool(of_p[0, -1].any())


def test_certain_predictions_are_the_reconstruction() -> None:
    module = make().eval()
    tokens = torch.randint(16, (2, 16))
    certain = nn.functional.one_hot(tokens, 16).float()
    vectors = expected_vectors(module.quantized[0], certain)
    assert torch.equal(module.quantized[0].render(vectors), module.tokenizer.decode(tokens))


def test_the_assignment_is_of_the_codes_that_are_chosen() -> None:
    for quantizer in (IBQ(16, 4), VectorQuantizer(16, 4)):
        tokenizer = ViTVQ(quantizer, 16, 4, 16, 1, 1, 2)
        images = batch_of()["image"]
        p = assignment(tokenizer, tokenizer.latents(images), 0.1)
        assert torch.equal(p.argmax(-1), tokenizer.encode(images))
        torch.testing.assert_close(p.sum(-1), torch.ones(4, 16))


def test_ramps() -> None:
    ramp = Ramp(0.5, start=10, warmup=5)
    assert [ramp.at(update) for update in (0, 9, 10, 12, 14, 100)] == pytest.approx(
        [0, 0, 0.1, 0.3, 0.5, 0.5]
    )
    assert Ramp(0.5).at(0) == 0.5


def test_a_resumed_run_is_the_uninterrupted_one_and_averages_both(fit, tmp_path: Path) -> None:
    def run(steps: int, *callbacks, **options):
        module = make(
            discriminator=PatchGAN(8, 1), accumulate=2, likelihood=Ramp(0.1, start=1, warmup=2)
        )
        ema = EMA(0.9)
        drawing = Drawing()
        trainer, losses = fit(module, steps, [ema, drawing, *callbacks], **options)
        return everything(module, trainer, ema, drawing), module, ema

    whole, module, ema = run(3, SaveAll(tmp_path))
    resumed, _, _ = run(3, ckpt_path=tmp_path / "batch_3.ckpt")
    assert not differences(whole, resumed)
    moved = make(discriminator=PatchGAN(8, 1)).model.state_dict()
    changed = {
        n.split(".")[0]
        for n, t in module.model.state_dict().items()
        if not torch.equal(t, moved[n])
    }
    assert changed == {"tokenizer", "generator"}
    loaded = tessellar.load(tmp_path / "batch_6.ckpt")
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, ema.average[name].to(tensor.dtype)), name
    raw = tessellar.load(tmp_path / "batch_6.ckpt", raw=True)
    assert torch.equal(raw.tokenizer.patch_in.weight, module.tokenizer.patch_in.weight)


def test_without_what_joins_them_the_tokenizer_is_trained_as_alone(fit) -> None:
    """From its first batch on, as a run makes it: no test may put the module into its mode."""
    nothing = Ramp(0.0)
    joint = make(likelihood=nothing, prediction=nothing)
    fit(joint, 3)
    torch.manual_seed(0)
    loss = TokenizerLoss(Reconstruction(l1=1.0))
    tokenizer = ViTVQ(IBQ(16, 4), 16, 4, 16, 1, 1, 2)
    alone = TokenizerModule(tokenizer, loss, optimizer=OptimizerSettings(lr=1e-3))
    fit(alone, 3)
    moved = dict(joint.tokenizer.named_parameters())
    for name, parameter in alone.tokenizer.named_parameters():
        assert torch.equal(parameter, moved[name]), name


def test_the_export_holds_both_and_samples_and_validation_logs(fit, tmp_path: Path) -> None:
    module = make()
    logged: dict[str, set[str]] = {"train": set(), "val": set()}
    module.log_terms = lambda stage, terms, size: logged[stage].update(terms)
    _, losses = fit(module, 2, limit_val_batches=1, val_check_interval=2)
    common = {"loss", "cross_entropy", "accuracy"}
    assert common | {"prediction", "predicted_l1", "assignment_entropy", "l1"} <= logged["train"]
    assert common | {"psnr", "predicted_psnr", "nats_per_image"} == logged["val"]
    module.export(tmp_path / "export", Record(title="joint"))
    loaded = tessellar.load(tmp_path / "export")
    images = loaded.sample([0, 3], seed=1, output="tensor")
    assert images.shape == (2, 3, 16, 16) and bool(torch.isfinite(images).all())
    real = batch_of()["image"]
    module.eval()
    assert torch.equal(loaded.encode(real), module.tokenizer.encode(real))
    assert loaded.class_names == module.class_names != ()


def test_nested_dropout_draws_prefixes_of_ordered_tokens() -> None:
    tokenizer = OneDPiece(IBQ(16, 4), 16, 4, 16, ViTSize(16, 1, 2), ViTSize(16, 1, 2))
    module = make(tokenizer, nested_dropout=True).train()
    lengths = {module.drawn_prefix() for _ in range(200)}
    assert min(lengths) == 1 and max(lengths) == 16 and make().drawn_prefix() is None
    assert bool(torch.isfinite(terms_of(module)["prediction"]))
    with pytest.raises(UserError, match="prefixes"):
        make(nested_dropout=True)


def test_parts_that_no_gradient_joins_are_refused() -> None:
    for name in ("KL VAE", "VAR's VQVAE", "FlexTok", "BitDance's autoencoder"):
        with pytest.raises(UserError, match="one codebook"):
            make(TOKENIZERS[name](), generator=lambda layout: LLAMA(ViTVQ(IBQ(16, 4), 16).layout))
    with pytest.raises(UserError, match="teacher forcing"):
        make(generator=partial(MaskGIT, width=16, depth=1, num_heads=2, hidden=24, num_classes=10))
    with pytest.raises(UserError, match="table"):
        make(generator=partial(RAR, width=16, depth=1, num_heads=2, hidden=24, num_classes=10))
    with pytest.raises(UserError, match="reads images"):
        make().images_of({"tokens": torch.zeros(1)})


def test_starts_are_carried_over_in_both_parts_and_before_a_source_is_read(tmp_path: Path) -> None:
    """Hidden matrices start at m^-1/2 of their size, each part by its own settings; weights that are
    taken along stay as they are.
    """

    def deviations(module: JointModule) -> tuple[float, float]:
        mixing = module.tokenizer.encoder.blocks[0].fc1.weight
        feeding = module.model.generator.layers[0].feed_forward.w1.weight
        return float(mixing.detach().std()), float(feeding.detach().std())

    def started(mine: OptimizerSettings, generators: OptimizerSettings | None = None, **options):
        torch.manual_seed(0)
        loss = TokenizerLoss(Reconstruction(l1=1.0))
        tokenizer = ViTVQ(IBQ(16, 4), 16, 4, 16, 1, 1, 2)
        settings = {"optimizer": mine, "generator_optimizer": generators, **options}
        return JointModule(tokenizer, LLAMA, loss, **settings)

    plain = OptimizerSettings()
    carried = OptimizerSettings(transfer=Transfer(4))  # the width is 16: half the start
    tokenizer, generator = deviations(started(plain))
    assert deviations(started(carried)) == pytest.approx((tokenizer / 2, generator / 2))
    assert deviations(started(carried, plain)) == pytest.approx((tokenizer / 2, generator))
    assert deviations(started(plain, carried)) == pytest.approx((tokenizer, generator / 2))
    source = started(plain)
    source.export(tmp_path / "export", Record(title="joint", data="noise"))
    taken = started(carried, init_from=str(tmp_path / "export"))
    assert deviations(taken) == pytest.approx((tokenizer, generator / 2))
