"""FlexTok's checkpoints (arXiv 2502.13967): official keys to ours and back, driven by the official
config.

The config stands in `config.json` beside the weights and in the metadata of the safetensors file.
It names the modules (so the keys), the levels of FSQ, the heads, the null condition, the largest
time step and the scale of the latents; sizes are read from the tensors. Nothing of it is
instantiated: only these facts are read.
"""

import ast
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from einops import rearrange
from safetensors import safe_open
from torch import Tensor

from tessellar.checkpoints.weights import load_strict, part_of
from tessellar.errors import UserError
from tessellar.interop.importer import FLAT, ImportOptions, TokenizerImporter
from tessellar.interop.keys import KeyTable, Rule, table
from tessellar.interop.options import require
from tessellar.processes.flow import Times
from tessellar.tokenizers.flextok.flow_decoding import FlowTraining
from tessellar.tokenizers.flextok.official_vae import KEYS as VAE_KEYS
from tessellar.tokenizers.flextok.official_vae import vae_from_official
from tessellar.tokenizers.flextok.tokenizer import FlexTok
from tessellar.tokenizers.flextok.transformer import TransformerSize
from tessellar.tokenizers.quantizers.fsq import FSQ

Config = Mapping[str, Any]
PARTS = ("vae", "encoder", "decoder", "regularizer")
VAE = "vae.vae."
# Options with one value here, by the class of a module; the mask is causal in the encoder alone.
SUPPORTED: dict[str, dict[str, Any]] = {
    "PatchEmbedder": {"flatten_patches": False},
    "PositionalEmbeddingAdder": {"posemb_scaling": "absolute"},
    "Registers1D": {"ordering_mode": "nested"},
    "FlexTransformer": {"qk_norm": True, "gated_mlp": True, "mlp_ratio": 4.0},
    "LinearHead": {"use_mup_readout": False},
    "ToPatchesLinearHead": {"use_mup_readout": False},
    "BlockWiseSequencePacker": {"per_subseq_embs": True},  # two sets of vectors, see below
    "TimestepEmbedder": {"frequency_embedding_size": 256},
    "FSQ": {"drop_quant_p": 0.0, "corrupt_tokens_p": 0.0},
}
MASKS = {"encoder": "causal_last", "decoder": "full"}
# Of the official class; the released configs give their own.
DEFAULT_MAX_TIMESTEP = 1000.0
# theirs: gate1 gate2 shift1 scale1 shift2 scale2; ours: gate1 gate2 scale1 scale2 shift1 shift2
TO_OURS = [0, 1, 3, 5, 2, 4]
TO_THEIRS = [0, 1, 4, 2, 5, 3]


def _rows(order: list[int]) -> Any:
    def permuted(t: Tensor) -> Tensor:
        sets = rearrange(t, "(kind six d) ... -> kind six d ...", kind=2, six=6)
        return rearrange(sets[:, order], "kind six d ... -> (kind six d) ...")

    return permuted


class Modules:
    """Module entries of one side by the name of their class."""

    def __init__(self, config: Config, side: str) -> None:
        self.side = side
        self.entries = config[side]["module_dict"]

    def find(self, *classes: str, **values: Any) -> tuple[str, Config]:
        """Name and entry of the one module of a class whose entry has the given values."""
        for name, entry in self.entries.items():
            fits = all(entry.get(key) == value for key, value in values.items())
            if str(entry.get("_target_", "")).rpartition(".")[2] in classes and fits:
                return f"{self.side}.module_dict.{name}", entry
        raise UserError(f"the FlexTok config's {self.side} has no {' or '.join(classes)}")

    def key(self, *classes: str, **values: Any) -> str:
        return self.find(*classes, **values)[0]


def keys(config: Config) -> KeyTable:
    """The table of all keys but the VAE's, with the names that the config gives to the modules."""
    encoder = Modules(config, "encoder")
    decoder = Modules(config, "decoder")
    pairs = {}
    rules = []
    for side, modules, sincos in (
        ("encoder", encoder, {}),
        ("decoder", decoder, {"posemb_type": "sincos"}),
    ):
        blocks = f"{modules.key('FlexTransformer')}.blocks.{{i}}"
        pairs[f"{modules.key('PatchEmbedder')}.patch_proj.{{tensor}}"] = (
            f"{side}.embed.proj.{{tensor}}"
        )
        pairs[f"{modules.key('PositionalEmbeddingAdder', **sincos)}.posembs"] = (
            f"{side}.embed.table"
        )
        pairs[f"{blocks}.attn.{{layer}}.weight"] = f"{side}.blocks.{{i}}.attention.{{layer}}.weight"
        for theirs, ours in (("fc1", "w1"), ("fc3", "w3"), ("fc2", "w2")):
            pairs[f"{blocks}.mlp.{theirs}.weight"] = f"{side}.blocks.{{i}}.mlp.{ours}.weight"
        adaptive = (
            f"{blocks}.adaLN_modulation.1.{{tensor}}",
            f"{side}.blocks.{{i}}.modulation.vectors.linear.{{tensor}}",
        )
        rules.append(Rule(*adaptive, _rows(TO_OURS), _rows(TO_THEIRS)))
    patches = decoder.key("ToPatchesLinearHead")
    time = decoder.key("TimestepEmbedder")
    learned = decoder.key("PositionalEmbeddingAdder", posemb_type="learnable_sum")
    pairs |= {
        f"{encoder.key('Registers1D')}.registers": "encoder.registers",
        f"{encoder.key('LinearHead')}.proj.{{tensor}}": "encoder.head.{tensor}",
        f"{decoder.key('LinearLayer')}.proj.{{tensor}}": "decoder.from_code.{tensor}",
        f"{decoder.key('MaskedNestedDropout')}.dropout_mask_token": "decoder.mask_token",
        f"{decoder.key('LearnedNullCond', 'ZeroNullCond')}.nullcond": "decoder.null",
        f"{time}.mlp.0.{{tensor}}": "decoder.time.fc1.{tensor}",
        f"{time}.mlp.2.{{tensor}}": "decoder.time.fc2.{tensor}",
        f"{patches}.adaLN_modulation.1.{{tensor}}": "decoder.modulation.linear.{tensor}",
        f"{patches}.proj.{{tensor}}": "decoder.head.{tensor}",
    }
    rules.append(
        Rule(
            f"{learned}.posembs",
            "decoder.register_positions",
            lambda t: t[0, 0].T,
            lambda t: t.T[None, None],
        )
    )
    return table(pairs, *rules)


def from_official(
    state: Mapping[str, Tensor], config: Config, image_size: int | None = None
) -> FlexTok:
    """The tokenizer of an official state dict and config, for square images (None: of the size of
    its tables).
    """
    missing = [part for part in PARTS if part not in config]
    if missing:
        raise UserError(
            f"this is not the config of a FlexTok tokenizer: {', '.join(missing)} is absent"
        )
    refuse_other_options(config)
    own_keys = keys(config)
    ours = own_keys.from_official(_without(state, VAE), "the FlexTok file")
    for key in ("encoder.embed.table", "decoder.register_positions"):
        if key not in ours:
            raise UserError(f"these are not the weights of a FlexTok tokenizer: {key} is absent")
    vae_state = part_of(state, VAE)
    made = built(ours, vae_state, config, image_size)
    for key, tensor in made.state_dict().items():
        if key.startswith(("vae.", "quantizer.")):
            ours[key] = tensor
    load_strict(made, ours, "the FlexTok file")
    return made.eval()


def _without(state: Mapping[str, Tensor], *starts: str) -> dict[str, Tensor]:
    """The tensors whose names begin otherwise."""
    return {key: tensor for key, tensor in state.items() if not key.startswith(starts)}


def to_official(tokenizer: FlexTok, config: Config) -> dict[str, Tensor]:
    """Official state dict, with the names of a config; the inverse of `from_official`."""
    assert tokenizer.vae is not None
    state = tokenizer.state_dict()
    theirs = keys(config).to_official(_without(state, "vae.", "quantizer.", "repa."))
    # Scale and counters are in no official file.
    vae = _without(part_of(state, "vae."), "quantizer.")
    for key, tensor in VAE_KEYS.to_official(vae).items():
        theirs[f"{VAE}{key}"] = tensor
    return theirs


def refuse_other_options(config: Config) -> None:
    """Raises UserError for options that would make another model of the same weights."""
    require(config["regularizer"], "the FlexTok config's regularizer", SUPPORTED["FSQ"])
    patches = Modules(config, "encoder").find("PatchEmbedder")[1]["patch_sizes"]
    for side, mask in MASKS.items():
        modules = Modules(config, side)
        for name, entry in modules.entries.items():
            supported = SUPPORTED.get(_class(modules, name), {})
            one_size = {"patch_sizes": patches}
            require(entry, f"the FlexTok config's {name}", {**supported, **one_size})
        packer, entry = modules.find("BlockWiseSequencePacker")
        require(entry, f"the FlexTok config's {packer.rpartition('.')[2]}", {"mask_mode": mask})
    trunk, entry = Modules(config, "decoder").find("FlexTransformer")
    # Their default is 1.
    expansion = {"adaLN_expansion": entry.get("adaLN_expansion", 1)}
    require(expansion, f"the FlexTok config's {trunk.rpartition('.')[2]}", {"adaLN_expansion": 2})


def built(
    ours: Mapping[str, Tensor], vae_state: Mapping[str, Tensor], config: Config, size: int | None
) -> FlexTok:
    encoder = Modules(config, "encoder")
    decoder = Modules(config, "decoder")
    patches = encoder.find("PatchEmbedder")[1]["patch_sizes"]
    if len(set(patches)) != 1:
        raise UserError(f"patch_sizes is {list(patches)}; only square patches are supported")
    patch = int(patches[0])
    table_side = ours["encoder.embed.table"].shape[-1]
    stride = 2 ** len({key.split(".")[2] for key in vae_state if ".downsamplers." in key})
    side = size or table_side * patch * stride
    null_key = decoder.key("LearnedNullCond", "ZeroNullCond")
    groups = (config.get("vae_base_config_override") or {}).get("norm_num_groups", 32)
    vae = vae_from_official(vae_state, side, float(config["vae"]["scaling_factor"]), groups)
    trunk = decoder.find("FlexTransformer")[1]
    time = decoder.find("TimestepEmbedder")[1]
    return FlexTok(
        FSQ(tuple(config["regularizer"]["levels"])),
        side,
        num_tokens=len(ours["encoder.registers"]),
        vae=vae,
        patch_size=patch,
        encoder_size=_size(ours, "encoder", encoder.find("FlexTransformer")[1]),
        decoder_size=_size(ours, "decoder", trunk),
        training_settings=training_of(config, decoder),
        tap=(trunk.get("intermediate_layers") or [1])[0],
        null="learned" if _class(decoder, null_key) == "LearnedNullCond" else "zero",
        max_timestep=float(time.get("max_timestep", DEFAULT_MAX_TIMESTEP)),
        table=table_side,
    )


def _class(modules: Modules, key: str) -> str:
    return str(modules.entries[key.rpartition(".")[2]]["_target_"]).rpartition(".")[2]


def _size(ours: Mapping[str, Tensor], side: str, entry: Config) -> TransformerSize:
    depth = len({key.split(".")[2] for key in ours if key.startswith(f"{side}.blocks.")})
    return TransformerSize(
        ours[f"{side}.embed.table"].shape[1], depth, int(entry.get("head_dim", 64))
    )


def training_of(config: Config, decoder: Modules) -> FlowTraining:
    """What the config says about training."""
    noise = config.get("flow_matching_noise_module") or {}
    times = Times(
        "logit_normal" if noise.get("ln", False) else "mode",
        float(noise.get("mode_scale", 0.0)),
        bool(noise.get("stratisfied", False)),
    )
    return FlowTraining(
        lengths=decoder.find("MaskedNestedDropout")[1].get("size_sampling_mode", "uniform"),
        null=float(decoder.find("LearnedNullCond", "ZeroNullCond")[1].get("dropout_prob", 0.0)),
        times=times,
        sample_posterior=bool(config["vae"].get("sample_posterior", True)),
    )


def read_config(file: str | Path) -> dict[str, Any]:
    """The official config of a weights file: `config.json` beside it, else the file's metadata."""
    beside = Path(file).with_name("config.json")
    try:
        if beside.is_file():
            return json.loads(beside.read_text(encoding="utf-8"))
        with safe_open(str(file), "pt") as opened:
            return {key: plain_data(text) for key, text in (opened.metadata() or {}).items()}
    except (OSError, ValueError, SyntaxError, yaml.YAMLError) as error:
        raise UserError(
            f"{beside} or the metadata of {file} is no FlexTok config ({error})"
        ) from error


def plain_data(text: str) -> Any:
    """Plain data that was written as Python or YAML; anything else is refused by both readers."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return yaml.safe_load(re.sub(r"\bNone\b", "null", text))


def _build(state: Mapping[str, Tensor], options: ImportOptions) -> FlexTok:
    if options.file is None:
        raise UserError(
            "FlexTok's weights need their config: config.json beside them, or the file's own metadata"
        )
    return from_official(state, read_config(options.file), options.image_size)


OFFICIAL = TokenizerImporter(
    what="a FlexTok tokenizer",
    marks=("encoder.module_dict.*", "decoder.module_dict.*"),
    entries=FLAT,
    keys=None,  # the config gives the modules their names
    build=_build,
)
