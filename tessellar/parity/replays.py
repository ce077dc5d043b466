"""Replays that are not yet registered by the functions themselves (`tessellar.parity.registration`)."""

import importlib
from collections.abc import Sequence
from dataclasses import dataclass

from tessellar.parity.registration import Replay as Registered
from tessellar.parity.registration import ReplayFunction, replays_of, systems


@dataclass(frozen=True)
class Replay:
    """The cases that one function replays; `function` is `module:name` below `tessellar`."""

    function: str
    cases: tuple[str, ...]

    def load(self) -> ReplayFunction:
        module, name = self.function.split(":")
        return getattr(importlib.import_module(f"tessellar.{module}"), name)


def all_replays_of(system: str, packages: Sequence[str] = ()) -> list[Registered]:
    """Registered replays, and those that only stand here."""
    return [
        *replays_of(system, packages),
        *(Registered(replay.load(), replay.cases) for replay in REPLAYS.get(system, ())),
    ]


def all_systems(packages: Sequence[str] = ()) -> list[str]:
    """Systems of registered replays, and of those that only stand here."""
    return sorted({*systems(packages), *REPLAYS})


REPLAYS: dict[str, tuple[Replay, ...]] = {
    "llamagen": (
        Replay("tokenizers.llamagen.parity:vq", ("vq", "vq_no_l2", "vq_train", "disc", "loss_plain", "loss_adaptive")),
    ),
    "gsd": (
        Replay("parity.decoding.gsd:plain", ("shared", "sjd")),
        Replay("parity.decoding.gsd:grouped", ("shared", "gsd")),
        Replay("parity.decoding.gsd:initial", ("init",)),
    ),
    "retok": (
        Replay("tokenizers.retok.parity:encode", ("tok_shared", "tok_encode")),
        Replay("tokenizers.retok.parity:decode", ("tok_shared", "tok_decode")),
        Replay("tokenizers.retok.parity:train", ("tok_shared", "tok_train")),
        Replay("tokenizers.retok.parity:rotation", ("tok_rot",)),
    ),
    "mar": (Replay("tokenizers.kl_vae.parity:replay", ("vae_main",)),),
    "titok": (
        Replay("tokenizers.titok.parity:vqgan", ("tok_shared", "tok_vqgan")),
        Replay("tokenizers.titok.parity:two_stage", ("tok_shared", "tok_vq2")),
        Replay("tokenizers.titok.parity:discriminator", ("tok_shared", "tok_disc")),
        Replay("tokenizers.titok.parity:single_stage", ("tok_shared", "tok_single")),
        Replay("tokenizers.titok.parity:kl", ("tok_shared", "tok_kl")),
        Replay("tokenizers.titok.parity:clustering", ("tok_cvq",)),
    ),
    "one_d_piece": (
        Replay("tokenizers.one_d_piece.parity:evaluate", ("shared", "encode", "decode")),
        Replay("tokenizers.one_d_piece.parity:train", ("shared", "train")),
    ),
    "flextok": (
        Replay("tokenizers.flextok.parity:vae", ("shared", "vae")),
        Replay("tokenizers.flextok.parity:encode", ("shared", "enc")),
        Replay("tokenizers.flextok.parity:fsq", ("shared", "fsq")),
        Replay("tokenizers.flextok.parity:time", ("shared", "time")),
        Replay("tokenizers.flextok.parity:velocity", ("shared", "vel")),
        Replay("tokenizers.flextok.parity:mask", ("shared", "dec")),
        Replay("tokenizers.flextok.parity:train", ("shared", "train")),
        Replay("tokenizers.flextok.parity:apg", ("apg",)),
        Replay("tokenizers.flextok.parity:decode", ("shared", "decode")),
    ),
    "hita": (Replay("tokenizers.hita.parity:tokenizer", ("tok_shared", "tok_prep", "tok_main", "tok_loss")),),
    "restok": (Replay("tokenizers.restok.parity:restok", ("tok_shared", "tok_main", "tok_train", "tok_loss")),),
    "quantizers": (
        Replay("tokenizers.quantizers.parity:lfq", ("lfq_lucid", "lfq_lucid_multi", "lfq_lucid_image", "lfq_magvit")),
        Replay("tokenizers.quantizers.parity:lfq", ("lfq_magvit_factorized", "gq_wetok", "gfq_eval")),
        Replay("tokenizers.quantizers.parity:lfq", ("entropy_magvit_t0.01", "entropy_magvit_t1.0")),
        Replay(
            "tokenizers.quantizers.parity:bsq",
            ("bsq_lucid", "bsq_official_group", "bsq_official_analytical", "ms_bsq_infinity"),
        ),
        Replay("tokenizers.quantizers.parity:fsq", ("fsq", "fsq_sym", "fsq_proj")),
        Replay(
            "tokenizers.quantizers.parity:vq",
            ("vq_taming_legacy1", "vq_taming_legacy0", "vq_llamagen_l2", "ibq", "rotate_to"),
        ),
        Replay("tokenizers.quantizers.parity:ema", ("vq_ema", "vq_ema_cos", "vq_ema_norot", "dead_code_mask")),
        Replay(
            "tokenizers.quantizers.parity:simvq",
            ("simvq_official_legacy1", "simvq_official_legacy0", "simvq_lucid_rot1", "simvq_lucid_rot0"),
        ),
        Replay(
            "tokenizers.quantizers.parity:residual",
            ("residual_vq", "grouped_residual_vq", "residual_fsq", "residual_lfq", "product_unitok"),
        ),
    ),
}
