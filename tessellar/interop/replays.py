"""Which recorded systems can be replayed, and by what.

A replay computes the outputs of some cases of a recording with our modules: `(recording) -> {name: tensor}`, reading
the official config, the weights through an importer, and every input. A new system adds its lines here and a module.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from tessellar.interop.recording import Recording

ReplayFunction = Callable[[Recording], dict[str, Tensor]]


@dataclass(frozen=True)
class Replay:
    """The cases that one function replays; `function` is `module:name` below `tessellar.interop`."""

    function: str
    cases: tuple[str, ...]

    def load(self) -> ReplayFunction:
        module, name = self.function.split(":")
        return getattr(importlib.import_module(f"tessellar.interop.{module}"), name)


REPLAYS: dict[str, tuple[Replay, ...]] = {
    "llamagen": (
        Replay("llamagen_vq_replay:vq", ("vq", "vq_no_l2", "vq_train", "disc", "loss_plain", "loss_adaptive")),
        Replay("llamagen_replay:c2i", ("c2i",)),
        Replay("llamagen_replay:c2i_gen", ("c2i_gen",)),
        Replay("llamagen_replay:sample", ("sample",)),
        Replay("llamagen_replay:t2i", ("t2i",)),
    ),
    "gsd": (
        Replay("gsd_replay:plain", ("shared", "sjd")),
        Replay("gsd_replay:grouped", ("shared", "gsd")),
        Replay("gsd_replay:initial", ("init",)),
    ),
    "retok": (
        Replay("retok_replay:encode", ("tok_shared", "tok_encode")),
        Replay("retok_replay:decode", ("tok_shared", "tok_decode")),
        Replay("retok_replay:train", ("tok_shared", "tok_train")),
        Replay("retok_replay:rotation", ("tok_rot",)),
        Replay("retok_replay:gpt", ("gen_shared", "gen_train")),
        Replay("retok_replay:gpt_decoding", ("gen_shared", "gen_step", "gen_constant", "gen_nocfg")),
    ),
    "mar": (
        Replay("kl_vae:replay", ("vae_main",)),
        Replay("mar_replay:mar", ("gen_schedule", "gen_shared", "gen_diffloss", "gen_diffloss_sample", "gen_train")),
        Replay("mar_replay:mar", ("gen_sample_cfg", "gen_sample_nocfg")),
    ),
    "titok": (
        Replay("titok_replay:vqgan", ("tok_shared", "tok_vqgan")),
        Replay("titok_replay:two_stage", ("tok_shared", "tok_vq2")),
        Replay("titok_replay:discriminator", ("tok_shared", "tok_disc")),
        Replay("titok_replay:single_stage", ("tok_shared", "tok_single")),
        Replay("titok_replay:kl", ("tok_shared", "tok_kl")),
        Replay("titok_replay:clustering", ("tok_cvq",)),
    ),
    "one_d_piece": (
        Replay("one_d_piece_replay:evaluate", ("shared", "encode", "decode")),
        Replay("one_d_piece_replay:train", ("shared", "train")),
    ),
    "titok_rar": (
        Replay(
            "rar_replay:rar",
            ("gen_shared", "gen_perm", "gen_raster", "gen_prefix", "gen_sample_pow", "gen_sample_const"),
        ),
    ),
    "titok_maskgit": tuple(
        Replay(
            f"maskgit_replay:{part}",
            ("gen_shared", *(f"gen_{part}_{run}" for run in ("train", "constant", "linear", "power_cosine"))),
        )
        for part in ("vit", "uvit")
    ),
    "flextok": (
        Replay("flextok_replay:vae", ("shared", "vae")),
        Replay("flextok_replay:encode", ("shared", "enc")),
        Replay("flextok_replay:fsq", ("shared", "fsq")),
        Replay("flextok_replay:time", ("shared", "time")),
        Replay("flextok_replay:velocity", ("shared", "vel")),
        Replay("flextok_replay:mask", ("shared", "dec")),
        Replay("flextok_replay:train", ("shared", "train")),
        Replay("flextok_replay:apg", ("apg",)),
        Replay("flextok_replay:decode", ("shared", "decode")),
    ),
    "flextok_ar": (Replay("flextok_ar_replay:c2i", ("c2i",)), Replay("flextok_ar_replay:t2i", ("t2i",))),
    "xar": (
        Replay("xar_replay:train", ("shared", "train")),
        Replay("xar_replay:sample", ("shared", "sample")),
        Replay("xar_replay:order", ("shared", "order")),
    ),
    "hita": (
        Replay("hita_replay:tokenizer", ("tok_shared", "tok_prep", "tok_main", "tok_loss")),
        Replay(
            "hita_ar:replay",
            ("gen_shared", "gen_train", "gen_incremental", "gen_inpaint", "gen_greedy_nocfg", "gen_greedy_cfg")
            + ("gen_greedy_cfg_interval", "gen_greedy_cfg_train_consistent"),
        ),
    ),
    "token_shuffle": (
        Replay(
            "token_shuffle_replay:token_shuffle",
            ("shared", "shuffle", "sample0", "sample1", "cfg", "greedy_constant", "greedy_half_linear"),
        ),
    ),
    "var": (Replay("var_replay:var", ("shared", "vae", "vq_train", "train", "greedy", "filter")),),
    "restok": (
        Replay(
            "restok_replay:restok",
            ("tok_shared", "tok_main", "tok_train", "tok_loss", "gen_shared", "gen_train", "gen_filter")
            + tuple(f"gen_greedy_{run}" for run in ("nocfg", "const", "step", "linear")),
        ),
    ),
    "quantizers": (
        Replay("quantizers_replay:lfq", ("lfq_lucid", "lfq_lucid_multi", "lfq_lucid_image", "lfq_magvit")),
        Replay("quantizers_replay:lfq", ("lfq_magvit_factorized", "gq_wetok", "gfq_eval")),
        Replay("quantizers_replay:lfq", ("entropy_magvit_t0.01", "entropy_magvit_t1.0")),
        Replay(
            "quantizers_replay:bsq", ("bsq_lucid", "bsq_official_group", "bsq_official_analytical", "ms_bsq_infinity")
        ),
        Replay("quantizers_replay:fsq", ("fsq", "fsq_sym", "fsq_proj")),
        Replay(
            "quantizers_replay:vq", ("vq_taming_legacy1", "vq_taming_legacy0", "vq_llamagen_l2", "ibq", "rotate_to")
        ),
        Replay("quantizers_replay:ema", ("vq_ema", "vq_ema_cos", "vq_ema_norot", "dead_code_mask")),
        Replay(
            "quantizers_replay:simvq",
            ("simvq_official_legacy1", "simvq_official_legacy0", "simvq_lucid_rot1", "simvq_lucid_rot0"),
        ),
        Replay(
            "quantizers_replay:residual",
            ("residual_vq", "grouped_residual_vq", "residual_fsq", "residual_lfq", "product_unitok"),
        ),
    ),
}
