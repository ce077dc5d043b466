"""Every YAML under configs/ parses and builds, at real size, on the meta device."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import nn

from tessellar.checkpoints.export import export_generator
from tessellar.cli.train import parse
from tests.recipes.frame import ENTRIES
from tests.training.conftest import make_generator_module
from tests.training.test_alignment import teacher_file

ROOT = Path(__file__).resolve().parents[2] / "configs"
CONFIGS = sorted(ROOT.glob("*/*.yaml"))
READS = {  # module of a generator -> preset whose tokens it reads; the others read LlamaGen's
    "xar": "kl_vae.kl16",
    "mar": "kl_vae.kl16",
    "tokenbridge": "tokenbridge.tokenbridge_kl16",
    "var": "var.var_vqvae",
    "har": "restok.restok_l_128",
    "hita": "hita.hita_v",
    "alitok": "alitok.alitok_256",
    "bitdance": "bitdance.ae_d16c32",
    "tokenflow": "tokenflow.tokenflow_b_256",
    "open_magvit2": "open_magvit2.open_magvit2_256",
    "ibq": "ibq.ibq_16384",
    "bar": "bar_fsq.bar_fsq_256",
    "semanticist": "semanticist.semanticist_l",
    "mingtok": "mingtok.mingtok_512",
}
EXPORTS = {"runs/vat/export": "vat.vat_b256"}  # where the export that a YAML names says more
SIZED = (
    "runs/mingtok(teacher=fmnist-vit)/export",
)  # whose features a generator reads, of a width of its own
PARAMETERS = {
    "t2i/token_shuffle_512": 2_709_390_336,
    "t2i/token_shuffle_1024": 2_789_634_816,
    "t2i/token_shuffle_2048": 2_789_634_816,
    "t2i/tokenflow_7b": 7_027_204_096,
    "imagenet256/mingtok_512": 697_719_584 + 32 + 1_049_600 + 25_344,  # with what only training has
    "imagenet256/mingtok_512_pixels": 697_719_584,
    "imagenet256/mingtok_ar_l": 634_607_136,
    "imagenet256/rectok_b": 171_970_900 + 1_606_336,
    "imagenet256/rectok_b_decoder": 171_970_900,
    "imagenet256/tokenflow_b": 181_902_251,
    "imagenet256/tokenflow_b_decoder": 376_569_643,
    "imagenet256/tokenflow_l": 559_964_139,
    "imagenet256/tokenflow_xl": 554_009_963,
    "imagenet256/vq_16": 71_883_403,
    "imagenet256/vq_8": 70_109_835,
    "imagenet256/llamagen_b": 110_888_448,
    "imagenet256/llamagen_l": 342_910_976,
    "imagenet256/llamagen_xl": 774_699_520,
    "imagenet256/llamagen_xxl": 1_410_972_672,
    "imagenet256/llamagen_3b": 3_096_659_200,
    "imagenet256/kl16": 66_456_019,
    "imagenet256/xar_b": 172_638_224,
    "imagenet256/xar_l": 608_397_968,
    "imagenet256/xar_h": 1_186_024_096,
    "imagenet256/retok_s_s": 136_302_603,
    "imagenet256/retok_s_b": 232_686_347,
    "imagenet256/retok_gpt_xl": 775_028_480,
    "imagenet256/har_l": 326_263_808,
    "imagenet256/var_d16": 310_283_520,
    "imagenet256/var_vqvae": 108_948_355,
    "imagenet256/mar_b": 207_924_768,
    "imagenet256/tokenbridge_l": 486_889_472,
    "imagenet256/tokenbridge_h": 910_040_576,
    "imagenet256/restok_l_128": 661_791_947,
    "imagenet256/hita_ar_l": 376_596_480,
    "imagenet256/titok_stage1": 204_814_095,
    "imagenet256/titok_s128": 83_674_639,
    "imagenet256/titok_b64": 204_814_095,
    "imagenet256/titok_l32": 641_054_735,
    "imagenet256/titok_bl64_vq8k": 390_016_148,
    "imagenet256/titok_bl128_vq8k": 390_179_988,
    "imagenet256/titok_sl256_vq8k": 330_260_884,
    "imagenet256/titok_ll32_vae_c16": 606_879_604,
    "imagenet256/titok_bl64_vae_c16": 389_418_100,
    "imagenet256/titok_bl128_vae_c16": 389_581_940,
    "imagenet256/alitok_stage1": 390_623_032,
    "imagenet256/alitok_stage2": 389_899_308,
    "imagenet256/arpg_l": 319_844_352,
    "imagenet256/randar_l": 342_912_000,
    "imagenet256/lpd_l": 337_157_120,
    "imagenet256/lpd_xl": 751_947_520,
    "imagenet256/lpd_xxl": 1_412_184_576,
    "imagenet256/alitok_b": 177_048_064,
    "imagenet256/alitok_l": 317_851_648,
    "imagenet256/alitok_xl": 662_141_696,
    "imagenet256/ae_d16c32": 460_294_179,
    "imagenet256/uniwetok_128": 697_044_355,
    "imagenet256/bitdance_b_1x": 242_373_152,
    "imagenet256/bitdance_b_4x": 260_102_432,
    "imagenet256/bitdance_b_16x": 260_111_648,
    "imagenet256/bitdance_l_1x": 527_271_968,
    "imagenet256/bitdance_h_1x": 1_007_960_352,
    "imagenet256/vat_b256": 172_030_068,
    "imagenet256/semanticist_ar_l": 488_566_800,
    "imagenet256/semanticist_ar_l_on_xl": 488_566_800,
    "imagenet256/one_d_piece_stage1": 205_256_463,
    "imagenet256/one_d_piece_s256": 83_871_247,
    "imagenet256/one_d_piece_b256": 205_256_463,
    "imagenet256/one_d_piece_l256": 641_742_863,
    "imagenet256/open_magvit2_256": 115_127_829,
    "imagenet256/open_magvit2_128": 112_021_653,
    "imagenet256/open_magvit2_ar_b": 343_570_432,
    "imagenet256/open_magvit2_ar_l": 804_362_240,
    "imagenet256/open_magvit2_ar_xl": 1_486_679_040,
    "imagenet256/ibq_1024": 107_049_859,
    "imagenet256/ibq_8192": 108_884_867,
    "imagenet256/ibq_16384": 110_982_019,
    "imagenet256/ibq_262144": 173_896_579,
    "imagenet256/ibq_ar_b": 342_994_944,
    "imagenet256/ibq_ar_l": 649_640_960,
    "imagenet256/ibq_ar_xl": 1_076_103_168,
    "imagenet256/ibq_ar_xxl": 2_063_331_840,
    "imagenet256/bar_b": 415_322_158 - 256,  # the head's frequencies are a buffer
    "imagenet256/bar_b_2": 415_076_098 - 256,
    "imagenet256/bar_b_4": 415_752_223 - 256,
    "imagenet256/bar_l": 1_107_798_990 - 256,
}


@pytest.mark.parametrize("path", sorted(ROOT.glob("fashion_mnist/*.yaml")), ids=lambda p: p.stem)
def test_a_generator_reads_the_run_that_its_tokenizer_has(path: Path) -> None:
    tokenizer = yaml.safe_load(path.read_text())["model"]["init_args"].get("tokenizer")
    if not isinstance(tokenizer, str):
        return
    run = Path(tokenizer).parent.name
    name = run.partition("(")[0]
    told = re.search(r"The run is called ([^\s]+)\.", path.with_name(f"{name}.yaml").read_text())
    assert run == (told[1] if told else name)


def _tokenizer(config: dict, path: Path) -> str:
    """One whose tokens are of the kind that the generator of a YAML reads; where its sizes matter, that of the YAML
    beside this one that trains the export.
    """
    arguments = config["model"]["init_args"]
    tokenizer = arguments["tokenizer"]
    if tokenizer in SIZED:
        run = Path(tokenizer).parent.name.partition("(")[0]
        beside = path.with_name(f"{run}.yaml")
        described = yaml.safe_load(beside.read_text())["model"]["init_args"]["tokenizer"]
        return yaml.safe_dump(described, default_flow_style=True)
    if isinstance(tokenizer, str) and tokenizer in EXPORTS:
        return f"{{class_path: tessellar.tokenizers.{EXPORTS[tokenizer]}}}"
    generator = arguments["generator"]
    class_path = generator if isinstance(generator, str) else generator["class_path"]
    preset = READS.get(class_path.split(".")[-2], "llamagen.vq_16")
    return f"{{class_path: tessellar.tokenizers.{preset}}}"


def _without_vgg(path: Path, config: dict, folder: Path) -> str:
    """A copy of a tokenizer's YAML without the perceptual loss, whose weights a test does not have."""
    config["model"]["init_args"]["loss"]["init_args"].pop("perceptual", None)
    copy = folder / path.name
    copy.write_text(yaml.safe_dump(config))
    return str(copy)


def _with_small_networks(config: Any, teacher: str) -> Any:
    """The config of an alignment's method without the networks that a test does not have."""
    if isinstance(config, list):
        return [_with_small_networks(item, teacher) for item in config]
    if not isinstance(config, dict):
        return config
    kept = {}
    for name, value in config.items():
        if name != "perceptual":
            kept[name] = teacher if name == "weights" else _with_small_networks(value, teacher)
    if str(kept.get("class_path")).endswith("CLIPScore"):
        return {"class_path": "tessellar.training.alignment.ReconstructionReward"}
    return kept


def _on_a_small_generator(config: dict, folder: Path) -> str:
    """A copy of an alignment's YAML whose source and whose rewards' networks are tiny."""
    arguments = config["model"]["init_args"]
    arguments["source"] = str(export_generator(make_generator_module().model, folder / "source"))
    teacher = teacher_file(folder / "teacher.safetensors")
    arguments["method"] = _with_small_networks(arguments["method"], teacher)
    copy = folder / "alignment.yaml"
    copy.write_text(yaml.safe_dump(config))
    return str(copy)


# Those that tests/recipes builds and reads number by number are left to `make check` here.
BUILT = []
for config in CONFIGS:
    named = f"{config.parent.name}/{config.stem}"
    marks = [pytest.mark.long] if config.stem in ENTRIES or named in ENTRIES else []
    BUILT.append(pytest.param(config, marks=marks, id=named))


def trained_but_evaluating(module: nn.Module) -> list[str]:
    """Parts with trained weights that are not in training mode as a run begins."""
    found = []
    for name, part in module.named_modules():
        if not part.training and any(p.requires_grad for p in part.parameters(recurse=False)):
            found.append(name)
    return found


@pytest.mark.parametrize("path", BUILT)
def test_config_builds(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    name = f"{path.parent.name}/{path.stem}"
    options = [
        "--config",
        str(path),
        "--name",
        "x",
        "--trainer.strategy",
        "auto",
        "--trainer.accelerator",
        "cpu",
    ]
    config = yaml.safe_load(path.read_text())
    is_alignment = "source" in config["model"]["init_args"]
    if is_alignment:
        options[1] = _on_a_small_generator(config, tmp_path)
    elif config["model"]["class_path"].endswith("TokenizerModule"):
        options[1] = _without_vgg(path, config, tmp_path)
    else:
        options.append(f"--model.init_args.tokenizer={_tokenizer(config, path)}")
    # An alignment's model comes from its source, whatever the size.
    with torch.device("cpu" if is_alignment else "meta"):
        cli = parse([*options, "--trainer.devices", "1"])
    count = sum(p.numel() for p in cli.model.ema_target.parameters())
    assert count == PARAMETERS.get(name, count)
    # A decoder that is tuned shows draws as sampling will; its encoder and codes stay frozen.
    assert path.stem == "decoder_tuning" or not trained_but_evaluating(cli.model)
    assert path.read_text().startswith("# ")
