"""The files of this folder, as commit 9f261a2 wrote them: exports, checkpoints, a cache, and what its code gave.

Kept as a record. It runs on that commit alone (later ones have moved the classes that it names):

    git worktree add ../old 9f261a2, then copy this folder to ../old/tests/data_of_versions/v0.1
    cd ../old && OMP_NUM_THREADS=1 PYTHONPATH=$PWD python tests/data_of_versions/v0.1/make.py

`exports/<system>/` holds `config.yaml` and `model.safetensors` as exported, and `expected.safetensors`: inputs with the
outputs of 9f261a2. `runs/<run>/` holds the run's YAML (`run.yaml`), what `train.py` wrote after 3 updates,
`moments.json` (norms of the optimizers' states and the weight decay, by parameter) and `after.safetensors` (parameters
after 2 updates more, resumed). `cache/` holds tokens of coloured shapes by `exports/vit_vq`.
`tests/test_older_versions.py` reads it all.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from tessellar.cli.train import parse
from tessellar.interop.export import export_generator, export_tokenizer
from tessellar.models.condition import Condition
from tessellar.models.conditioners import (
    CaptionConditioner,
    ClassConditioner,
    Conditioner,
    EncoderConditioner,
)
from tessellar.models.flextok_ar import FlexAR
from tessellar.models.generator import Generator
from tessellar.models.har import HAR
from tessellar.models.heads.logits import Logits
from tessellar.models.hita_ar import HitaAR
from tessellar.models.llamagen import LlamaGen
from tessellar.models.mar import MAR
from tessellar.models.maskgit import MaskGIT
from tessellar.models.next_entity import NextEntity
from tessellar.models.rar import RAR
from tessellar.models.retok_gpt import ReToKGPT
from tessellar.models.token_shuffle import TokenShuffle
from tessellar.models.toy import TableGenerator
from tessellar.models.var import VAR
from tessellar.models.xar import XAR
from tessellar.pipeline import ImageGenerator
from tessellar.sampling.apg import APG
from tessellar.sampling.settings import Sampling
from tessellar.tokenizers.base import Tokenizer
from tessellar.tokenizers.flextok import FlexTok
from tessellar.tokenizers.flextok_transformer import TransformerSize
from tessellar.tokenizers.flextok_vae import flextok_vae
from tessellar.tokenizers.flow_decoding import FlowDecoding, FlowTraining
from tessellar.tokenizers.hita import Hita
from tessellar.tokenizers.hita_vision import HitaVision
from tessellar.tokenizers.kl_vae import KLVAE
from tessellar.tokenizers.llamagen_vq import LlamaGenVQ
from tessellar.tokenizers.losses.blur_discriminator import BlurDiscriminator
from tessellar.tokenizers.losses.diff_augment import DiffAugment
from tessellar.tokenizers.losses.dino_discriminator import DinoDiscriminator
from tessellar.tokenizers.losses.discriminator import PatchGAN
from tessellar.tokenizers.maskgit_vqgan import MaskGITVQGAN, PixelDecoder, ProxyCodes
from tessellar.tokenizers.one_d_piece import OneDPiece, TailDrop
from tessellar.tokenizers.quantizers.base import Quantizer
from tessellar.tokenizers.quantizers.bsq import BSQ
from tessellar.tokenizers.quantizers.clustering import ClusteringVQ
from tessellar.tokenizers.quantizers.ema_vq import EMAVectorQuantizer
from tessellar.tokenizers.quantizers.fsq import FSQ
from tessellar.tokenizers.quantizers.gaussian import GaussianBottleneck
from tessellar.tokenizers.quantizers.ibq import IBQ
from tessellar.tokenizers.quantizers.lfq import LFQ
from tessellar.tokenizers.quantizers.multi_scale import MultiScaleQuantizer
from tessellar.tokenizers.quantizers.product_vq import ProductQuantizer
from tessellar.tokenizers.quantizers.projected import Projected
from tessellar.tokenizers.quantizers.residual_vq import ResidualQuantizer
from tessellar.tokenizers.quantizers.simvq import SimVQ
from tessellar.tokenizers.quantizers.vq import VectorQuantizer
from tessellar.tokenizers.restok import ResTok
from tessellar.tokenizers.retok import ReToK
from tessellar.tokenizers.retok_qformer import QFormerSize
from tessellar.tokenizers.scale_pyramid import ScalePyramid
from tessellar.tokenizers.titok import TiTok, ViTSize
from tessellar.tokenizers.var_vqvae import VARVQVAE
from tessellar.tokenizers.vit_vq import ViTVQ
from tessellar.vision import Teacher, VisionModel

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[2]
CLASSES = 3
CAPTIONS = ["a red circle on blue", "a green square"]


# Tokenizers


def vit(quantizer: Quantizer, size: int = 8) -> ViTVQ:
    """2 x 2 tokens of 8 x 8 pixels, 4 x 4 of 16 x 16."""
    return ViTVQ(
        quantizer, size, patch_size=4, width=8, encoder_depth=1, decoder_depth=1, num_heads=2
    )


def line(quantizer: Quantizer, length: int) -> OneDPiece:
    """A sequence of tokens without a convolution."""
    sizes = {"encoder_size": ViTSize(8, 1, 2), "decoder_size": ViTSize(8, 1, 2)}
    return OneDPiece(quantizer, image_size=8, patch_size=4, num_tokens=length, **sizes)


def teacher() -> Teacher:
    options: Any = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 1, "num_heads": 2}
    network = VisionModel("test_vit", options=options)
    network.filled = True
    return Teacher(network)


def flextok(vae: KLVAE | None = None, **options: Any) -> FlexTok:
    return FlexTok(
        FSQ((4, 3)),
        image_size=8,
        num_tokens=4,
        vae=vae,
        encoder_size=TransformerSize(8, 1, 4),
        decoder_size=TransformerSize(12, 2, 4),
        decoding=FlowDecoding(3, 2.0, APG()),
        training_settings=FlowTraining(null=0.0),
        **options,
    )


def hita(image_size: int = 8, multipliers: tuple[int, ...] = (1, 1)) -> Hita:
    options: Any = {"img_size": 16, "patch_size": 8, "embed_dim": 24, "depth": 1, "num_heads": 2}
    vision = HitaVision("vit_tiny_patch16_224", options=options)
    vision.filled = True
    return Hita(
        VectorQuantizer(12, 4),
        VectorQuantizer(10, 4),
        vision,
        image_size=image_size,
        channels=32,
        multipliers=multipliers,
        num_res_blocks=1,
        width=16,
        depth=1,
        num_heads=2,
        mlp_dim=16,
        holistic=3,
        shift=2,
        dropout=0.0,
        vision_dim=24,
        vision_loss=1.0,
    )


def restok(legacy: bool = False) -> ResTok:
    return ResTok(
        VectorQuantizer(12, 4),
        image_size=16,
        num_tokens=16,
        min_tokens=4,
        channels=32,
        multipliers=(1,),
        num_res_blocks=1,
        z_channels=32,
        encoder_width=16,
        encoder_depth=3,
        encoder_heads=2,
        decoder_width=16,
        decoder_depth=1,
        decoder_heads=2,
        stages=2,
        legacy=legacy,
        teacher=None if legacy else teacher(),
        vision_dim=None if legacy else 24,
    )


def retok() -> ReToK:
    return ReToK(
        VectorQuantizer(12, 4, rotation=True),
        image_size=8,
        num_tokens=4,
        always=2,
        channels=32,
        multipliers=(1, 1),
        num_res_blocks=1,
        z_channels=8,
        encoder_size=QFormerSize(8, 1, 2),
        decoder_size=QFormerSize(12, 2, 2),
        semantic_dim=24,
        semantic_layer=1,
        teacher=teacher(),
    )


def vqgan() -> MaskGITVQGAN:
    return MaskGITVQGAN(
        VectorQuantizer(12, 4, l2_normalize=False),
        image_size=8,
        channels=32,
        multipliers=(1, 1),
        num_res_blocks=1,
    )


def titok(quantizer: Quantizer, **options: Any) -> TiTok:
    sizes = {"encoder_size": ViTSize(8, 1, 2), "decoder_size": ViTSize(8, 1, 2)}
    return TiTok(quantizer, image_size=8, patch_size=2, num_tokens=3, **sizes, **options)


def two_stages() -> TiTok:
    pixels = PixelDecoder(12, 4, channels=32, multipliers=(1, 1), num_res_blocks=1)
    return titok(
        VectorQuantizer(10, 4), pixels=pixels, mixes=True, stage="proxy", target=ProxyCodes(vqgan())
    )


def var_vqvae(image_size: int = 4, multipliers: tuple[int, ...] = (1, 1)) -> VARVQVAE:
    quantizer = MultiScaleQuantizer(12, 4, (1, 2))
    return VARVQVAE(quantizer, image_size, channels=32, multipliers=multipliers, num_res_blocks=1)


def residual(depth: int | None = None, **options: Any) -> ResidualQuantizer:
    return ResidualQuantizer(
        (VectorQuantizer(12, 4, False), VectorQuantizer(8, 4, False))[: depth or 2], **options
    )


KL = GaussianBottleneck
TOKENIZERS: dict[str, Callable[[], Tokenizer]] = {
    "vit_vq": lambda: vit(VectorQuantizer(12, 4), 16),
    "vit_kl": lambda: vit(KL(3, scale=0.5)),
    "llamagen_vq": lambda: LlamaGenVQ(VectorQuantizer(12, 4), 8, 32, (1, 1), 1, z_channels=8),
    "kl_vae": lambda: KLVAE(KL(3, scale=0.5), 8, 8, (1, 2), 1, groups=4),
    "scale_pyramid": lambda: ScalePyramid(vit(KL(3, scale=0.5))),
    "maskgit_vqgan": vqgan,
    "var_vqvae": var_vqvae,
    "titok": lambda: titok(VectorQuantizer(12, 4)),
    "titok_two_stages": two_stages,
    "titok_kl": lambda: titok(KL(3, scale=0.5)),
    "one_d_piece": lambda: line(VectorQuantizer(12, 4), 4),
    "one_d_piece_tail_drop": lambda: OneDPiece(
        VectorQuantizer(12, 4), 8, 4, 4, ViTSize(8, 1, 2), ViTSize(8, 1, 2), drop=TailDrop()
    ),
    "flextok": flextok,
    "flextok_latents": lambda: flextok(
        flextok_vae(4, 8, scale=0.5, widths=(8, 8), num_res_blocks=1, groups=4)
    ),
    "flextok_repa": lambda: flextok(repa_dim=24, teacher=teacher()),
    "hita": hita,
    "restok": restok,
    "restok_legacy": lambda: restok(legacy=True),
    "retok": retok,
}
QUANTIZERS: dict[str, Callable[[], Quantizer]] = {
    "vq_rotation": lambda: VectorQuantizer(12, 4, False, rotation=True),
    "vq_restarts": lambda: VectorQuantizer(12, 4, init_step=2, restart_every=3, restart_until=9),
    "ema_vq": lambda: EMAVectorQuantizer(12, 4, threshold=0.1, decay=0.9),
    "clustering": lambda: ClusteringVQ(12, 4),
    "simvq": lambda: SimVQ(12, 4),
    "ibq": lambda: IBQ(12, 4),
    "fsq": lambda: FSQ((4, 3, 3)),
    "fsq_symmetric": lambda: FSQ((4, 2, 5), symmetric=True),
    "lfq": lambda: LFQ(4),
    "lfq_groups": lambda: LFQ(6, groups=2, big_endian=True),
    "lfq_bits": lambda: LFQ(6, form="bits"),
    "bsq": lambda: BSQ(6, 3),
    "bsq_index": lambda: BSQ(4, 4, "index", analytical=False),
    "residual": lambda: residual(dropout=0.5),
    "residual_shared": lambda: ResidualQuantizer((EMAVectorQuantizer(12, 4, False),), depth=3),
    "product": lambda: ProductQuantizer(
        (VectorQuantizer(8, 2), ResidualQuantizer((LFQ(3), LFQ(3)), ratio=2.0))
    ),
    "projected": lambda: Projected(FSQ((3, 3)), 6),
}
DISCRIMINATORS: dict[str, Callable[[], nn.Module]] = {
    "patch_gan": lambda: PatchGAN(4, 1),
    "blur": lambda: BlurDiscriminator(32, 1, 2),
    "dino": lambda: DinoDiscriminator(teacher(), layers=(0,), kernel=3, augment=DiffAugment()),
}


# Generators: a tokenizer, and what is made of its layout

SMALL: Any = {"width": 8, "depth": 1, "num_heads": 2}
CLASS: Any = {"num_classes": CLASSES, **SMALL}
LLAMA: Any = {"ffn_multiple_of": 8, "dropout": 0.0, **CLASS}
Made = tuple[Callable[[], Tokenizer], Callable[[Any], Generator]]


def grid() -> Tokenizer:
    return vit(VectorQuantizer(12, 4))


def sequence() -> Tokenizer:
    return line(VectorQuantizer(12, 4), 8)


def holistic() -> Tokenizer:
    return hita(4, (1,))


def scales() -> Tokenizer:
    return var_vqvae(2, (1,))


def latents() -> Tokenizer:
    return vit(KL(3, scale=0.5))


def t2i(layout: Any) -> LlamaGen:
    return LlamaGen(
        layout, num_classes=None, caption_dim=6, caption_length=5, ffn_multiple_of=8, **SMALL
    )


GENERATORS: dict[str, Made] = {
    "llamagen": (grid, lambda layout: LlamaGen(layout, **LLAMA)),
    "llamagen_sequence": (sequence, lambda layout: LlamaGen(layout, **LLAMA)),
    "llamagen_features": (grid, t2i),
    "llamagen_t5": (grid, t2i),
    "retok_gpt": (sequence, lambda layout: ReToKGPT(layout, **LLAMA)),
    "flextok_ar": (sequence, lambda layout: FlexAR(layout, learned_positions=True, **CLASS)),
    "flextok_ar_text": (
        sequence,
        lambda layout: FlexAR(
            layout, num_classes=None, text_dim=6, text_hidden=8, text_length=5, **SMALL
        ),
    ),
    "har": (sequence, lambda layout: HAR(layout, **LLAMA)),
    "hita_ar": (holistic, lambda layout: HitaAR(layout, **LLAMA)),
    "next_cell": (grid, lambda layout: NextEntity(layout, "cell:1x2", **LLAMA)),
    "next_random": (grid, lambda layout: NextEntity(layout, "random:0", random_order=1.0, **LLAMA)),
    "next_level": (sequence, lambda layout: NextEntity(layout, "level:1,1,2,4", **LLAMA)),
    "rar": (grid, lambda layout: RAR(layout, hidden=16, dropout=0.0, **CLASS)),
    "maskgit": (sequence, lambda layout: MaskGIT(layout, hidden=16, dropout=0.0, **CLASS)),
    "maskgit_uvit": (grid, lambda layout: MaskGIT(layout, "uvit", hidden=16, dropout=0.0, **CLASS)),
    "token_shuffle": (
        grid,
        lambda layout: TokenShuffle(layout, num_classes=CLASSES, ffn_hidden=12, **SMALL),
    ),
    "token_shuffle_text": (
        grid,
        lambda layout: TokenShuffle(
            layout, text_vocab=270, caption_length=6, ffn_hidden=12, **SMALL
        ),
    ),
    "token_shuffle_features": (
        grid,
        lambda layout: TokenShuffle(
            layout, caption_dim=6, caption_length=5, ffn_hidden=12, tied=True, **SMALL
        ),
    ),
    "var": (
        scales,
        lambda layout: VAR(layout, latent_dim=4, mlp_ratio=2.0, drop_path=0.0, **CLASS),
    ),
    "var_shared": (
        scales,
        lambda layout: VAR(
            layout, latent_dim=4, mlp_ratio=2.0, drop_path=0.0, shared_modulation=True, **CLASS
        ),
    ),
    "xar": (latents, lambda layout: XAR(layout, "cell:1x2", dropout=0.0, mlp_ratio=2.0, **CLASS)),
    "xar_scales": (
        lambda: ScalePyramid(latents()),
        lambda layout: XAR(layout, "scale", dropout=0.0, mlp_ratio=2.0, **CLASS),
    ),
    "mar": (
        latents,
        lambda layout: MAR(
            layout,
            decoder_width=12,
            head_width=8,
            head_depth=1,
            buffer=2,
            mlp_ratio=2.0,
            steps=3,
            **CLASS,
        ),
    ),
    "table": (grid, lambda layout: TableGenerator(layout, CLASSES, entity_size=2)),
}


def conditioner_of(name: str, generator: Generator) -> Conditioner:
    """The generator's own; trained, or another one, where the name says so."""
    if name == "llamagen_t5":
        return EncoderConditioner("google/flan-t5-xl", length=5)
    conditioner = generator.make_conditioner()
    if isinstance(conditioner, CaptionConditioner):
        conditioner.prepare(lambda: CAPTIONS)
    return conditioner


def condition_of(model: ImageGenerator) -> Condition:
    """Of two samples."""
    conditioner = model.conditioner
    if isinstance(conditioner, ClassConditioner):
        return conditioner.of_labels(torch.tensor([2, 0]))
    if isinstance(conditioner, CaptionConditioner):
        return conditioner.of_texts(CAPTIONS)
    valid = torch.arange(5) >= torch.tensor([[0], [2]])
    return Condition(valid=valid, features=normal(2, 5, 6, seed=3) * valid[..., None])


# Values


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def shake(module: nn.Module) -> None:
    """Weights that are zero nowhere, and few different values of them, so that git packs them well."""
    for number, parameter in enumerate(module.parameters()):
        parameter.add_(0.15 * normal(*parameter.shape, seed=number))
        parameter.copy_((parameter * 32).round() / 32)


def shrink(module: nn.Module) -> None:
    """Kernels of convolutions in bfloat16, which holds the shaken values as they are: half the size of a file."""
    for part in module.modules():
        if isinstance(part, nn.Conv2d):
            part.weight.data = part.weight.data.bfloat16()


def images_of(tokenizer: Tokenizer) -> Tensor:
    height, width = tokenizer.image_size
    return normal(2, 3, height, width, seed=7).clamp(-1, 1)


@torch.no_grad()
def export_of_tokenizer(
    name: str, tokenizer: Tokenizer, discriminator: nn.Module | None = None
) -> None:
    shake(tokenizer)
    tokenizer.eval()
    images = images_of(tokenizer)
    tokens = tokenizer.encode(images)
    expected = {"images": images, "tokens": tokens, "decoded": tokenizer.decode(tokens)}
    if discriminator is not None:
        shake(discriminator)
    shrink(tokenizer)
    folder = export_tokenizer(tokenizer, HERE / "exports" / name, discriminator=discriminator)
    finish(folder, expected)


@torch.no_grad()
def export_of_generator(name: str, tokenizer: Tokenizer, make: Callable[[Any], Generator]) -> None:
    shake(tokenizer)
    generator = make(tokenizer.layout)
    shake(generator)
    model = ImageGenerator(tokenizer, generator, conditioner_of(name, generator)).eval()
    condition = condition_of(model)
    tokens = tokenizer.encode(images_of(tokenizer))
    torch.manual_seed(0)
    expected = {f"loss.{term}": value for term, value in generator.loss(tokens, condition).items()}
    if tokenizer.layout.is_categorical:
        distribution = generator.predict(
            generator.start(condition), tokens, generator.entities.count
        )
        assert isinstance(distribution, Logits)
        expected["logits"] = distribution.logits
    expected["drawn"] = model.sample_tokens(condition, Sampling(), [0, 1])
    given = {
        f"condition.{part}": tensor
        for part, tensor in condition._asdict().items()
        if tensor is not None
    }
    shrink(tokenizer)
    folder = export_generator(model, HERE / "exports" / name)
    finish(folder, {"tokens": tokens, **given, **expected})


def finish(folder: Path, expected: dict[str, Tensor]) -> None:
    """What it gives stands beside it; the model card is left out."""
    (folder / "README.md").unlink()
    save_file(
        {name: tensor.contiguous().clone() for name, tensor in expected.items()},
        folder / "expected.safetensors",
    )
    for name, tensor in expected.items():
        assert not bool(tensor.isnan().any()), f"{folder.name} {name}"


def exports() -> None:
    shutil.rmtree(HERE / "exports", ignore_errors=True)
    for name, make in TOKENIZERS.items():
        torch.manual_seed(0)
        export_of_tokenizer(name, make())
    for name, make in QUANTIZERS.items():
        torch.manual_seed(0)
        export_of_tokenizer(f"quantizer_{name}", vit(make()))
    for name, make in DISCRIMINATORS.items():
        torch.manual_seed(0)
        export_of_tokenizer(f"discriminator_{name}", vit(VectorQuantizer(12, 4)), make())
    for name, (tokenizer, make) in GENERATORS.items():
        torch.manual_seed(0)
        export_of_generator(name, tokenizer(), make)


# Runs and the cache


def command(folder: Path, script: str, *arguments: str) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, script, *arguments], cwd=folder, env=environment, check=True)


def cache(folder: Path) -> None:
    shapes = [
        "--data",
        "tessellar.data.ShapesData",
        "--data.size=16",
        "--data.length=32",
        "--data.val_length=8",
    ]
    command(folder, "convert.py", "cache", "exports/vit_vq", *shapes, "--out", "cache")
    shutil.rmtree(HERE / "cache", ignore_errors=True)
    shutil.copytree(folder / "cache", HERE / "cache")


def run(folder: Path, name: str) -> None:
    """Train 3 updates, keep what they wrote, train 2 more."""
    config = ["--config", f"runs_of/{name}/run.yaml"]
    command(folder, "train.py", *config, "--name", name)
    kept, made = HERE / "runs" / name, folder / "runs" / name
    for file in ("config.yaml", "run.json", "metrics.csv", "checkpoints/last.ckpt"):
        shutil.copy(made / file, kept / Path(file).name)
    moments(folder, kept, config)
    again = [
        "--name",
        f"{name}-again",
        "--resume",
        f"runs_of/{name}/last.ckpt",
        "--trainer.max_steps",
        "5",
    ]
    command(folder, "train.py", *config, *again)
    after = torch.load(
        folder / "runs" / f"{name}-again" / "checkpoints" / "last.ckpt", weights_only=True
    )
    frozen = "model.tokenizer."
    trained = {k: v for k, v in after["state_dict"].items() if not k.startswith(frozen)}
    save_file({k: v.contiguous() for k, v in trained.items()}, kept / "after.safetensors")


def moments(folder: Path, kept: Path, config: list[str]) -> None:
    """Norms of each parameter's optimizer state and its weight decay, by the parameter's name."""
    before = Path.cwd()
    os.chdir(folder)
    module = parse([*config, "--name", "moments"]).model
    os.chdir(before)
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    states = torch.load(kept / "last.ckpt", weights_only=True)["optimizer_states"]
    optimizers = [optimizer for player in module.make_players() for optimizer in player.optimizers]
    found: dict[str, Any] = {}
    for optimizer, state in zip(optimizers, states, strict=True):
        for group, saved in zip(optimizer.param_groups, state["param_groups"], strict=True):
            for parameter, index in zip(group["params"], saved["params"], strict=True):
                tensors = state["state"][index]
                norms = {
                    key: float(torch.as_tensor(value).double().norm())
                    for key, value in tensors.items()
                }
                found[names[id(parameter)]] = {
                    "weight_decay": saved["weight_decay"],
                    "state": norms,
                }
    (kept / "moments.json").write_text(json.dumps(found, indent=1) + "\n")


def main() -> None:
    torch.set_num_threads(1)
    if chosen := sys.argv[1:]:
        print("only the runs", *chosen)
    else:
        exports()
    with TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "exports").symlink_to(HERE / "exports")
        (folder / "runs_of").symlink_to(HERE / "runs")
        if chosen:
            (folder / "cache").symlink_to(HERE / "cache")
        for script in ("train.py", "convert.py"):
            (folder / script).symlink_to(ROOT / script)
        if not chosen:
            cache(folder)
        for yaml in sorted((HERE / "runs").glob("*/run.yaml")):
            if not chosen or yaml.parent.name in chosen:
                run(folder, yaml.parent.name)


if __name__ == "__main__":
    main()
