"""Replays of quantizers of public libraries: codes, outputs, losses and gradients (recordings of
`quantizers`).

Everything is computed in float64, as for LlamaGen's losses: temperatures of 0.01 amplify rounding.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from tessellar.interop.keys import KeyTable
from tessellar.interop.options import require
from tessellar.parity.forms import as_vectors
from tessellar.parity.recording import Outputs, Recording
from tessellar.parity.registration import replays
from tessellar.protocol.tokenizer import Quantizer, QuantizerOutput
from tessellar.tokenizers.quantizers import official
from tessellar.tokenizers.quantizers.bsq import BSQ
from tessellar.tokenizers.quantizers.ema_vq import EMAVectorQuantizer
from tessellar.tokenizers.quantizers.entropy import entropies
from tessellar.tokenizers.quantizers.fsq import FSQ
from tessellar.tokenizers.quantizers.ibq import IBQ
from tessellar.tokenizers.quantizers.lfq import LFQ
from tessellar.tokenizers.quantizers.multi_scale_bsq import MultiScaleBSQ
from tessellar.tokenizers.quantizers.projected import Projected
from tessellar.tokenizers.quantizers.residual_vq import ResidualQuantizer, residual_fsq
from tessellar.tokenizers.quantizers.rotation import rotate_to
from tessellar.tokenizers.quantizers.simvq import SimVQ


class Case:
    """One case: its options, weights and inputs, vectors channel-last, and what is recorded of it."""

    def __init__(self, recording: Recording, name: str) -> None:
        self.recording = recording
        self.name = name
        self.config: Mapping[str, Any] = recording.config["cases"][name]
        self.settings = recording.case_settings.get(name, {})
        self.state = recording.state(f"{name}/")

    def input(self, name: str) -> Tensor:
        found = self.recording.inputs[f"{self.name}/{name}"]
        return found.double() if found.is_floating_point() else found

    @property
    def maps(self) -> bool:
        """Whether vectors are recorded as [B, C, h, w]."""
        return len(self.recording.entries[f"{self.name}/x"].shape) == 4

    def vectors(self, name: str = "x") -> Tensor:
        """Recorded vectors as [B, N, C]."""
        found = self.input(name)
        return as_vectors(found) if self.maps else found

    def like_x(self, vectors: Tensor) -> Tensor:
        """[B, N, C] as x is recorded."""
        return (
            vectors.mT.reshape(*vectors.shape[:1], -1, *self.input("x").shape[2:])
            if self.maps
            else vectors
        )

    def load(self, quantizer: Quantizer, keys: KeyTable) -> Quantizer:
        return official.load_official(quantizer, keys, self.state, self.name).double()

    def recorded(self, outputs: Outputs) -> Outputs:
        """Those outputs that are recorded, by full name; single numbers as [1]."""
        kept = {}
        for name, value in outputs.items():
            full = f"{self.name}/{name}"
            if full in self.recording.entries:
                kept[full] = value.reshape(1) if value.ndim == 0 else value
        return kept

    def gradients(self, x: Tensor, out: QuantizerOutput, parameters: Outputs) -> Outputs:
        """Gradients of <quantized, cot> and of the loss, to x and to parameters."""
        wanted = {"x": x, **parameters}
        sources = {"cot": (out.quantized * self.vectors("cot")).sum()}
        if out.losses:
            sources["loss"] = torch.stack(list(out.losses.values())).sum()
        found: Outputs = {}
        for source, value in sources.items():
            grads = torch.autograd.grad(
                value,
                list(wanted.values()),
                retain_graph=True,
                allow_unused=True,
                materialize_grads=True,
            )
            for name, gradient in zip(wanted, grads, strict=True):
                found[f"grad_{name}_from_{source}"] = gradient
            found[f"grad_x_from_{source}"] = self.like_x(found[f"grad_x_from_{source}"])
        return found


Compute = Callable[[Case], Outputs]


def cases(*names: str) -> Callable[[Compute], Compute]:
    """Registers what computes the outputs of one case as the replay of all cases of these names."""

    def register(compute: Compute) -> Compute:
        @replays("quantizers", *names, gradients=True)
        def replay(recording: Recording) -> Outputs:
            outputs: Outputs = {}
            for name in names:
                if name in recording.cases:
                    case = Case(recording, name)
                    outputs |= case.recorded(compute(case))
            return outputs

        return compute

    return register


def _trained(
    case: Case, quantizer: Quantizer, **parameters: Tensor
) -> tuple[Outputs, QuantizerOutput, Tensor]:
    """The usual outputs of one training pass; tokens are `indices`, of maps flattened."""
    x = case.vectors().requires_grad_()
    with torch.no_grad():
        evaluated = quantizer.eval()(x).quantized
        decoded = quantizer.decode(quantizer.encode(x))
    out = quantizer.train()(x)
    loss = torch.stack(list(out.losses.values())).sum() if out.losses else torch.zeros(())
    outputs = {
        "quantized": case.like_x(out.quantized),
        "quantized_eval": case.like_x(evaluated),
        "codes_from_indices": case.like_x(decoded),
        "output_from_indices": case.like_x(decoded),
        "decoded": case.like_x(decoded),
        "indices": out.tokens.flatten() if case.maps else out.tokens,
        "loss": loss,
    }
    if f"{case.name}/cot" in case.recording.entries:
        outputs |= case.gradients(x, out, parameters)
    return outputs, out, x


@cases("fsq", "fsq_sym", "fsq_proj")
def finite_scalar(case: Case) -> Outputs:
    made: Quantizer = FSQ(tuple(case.config["levels"]), case.config.get("preserve_symmetry", False))
    dim = case.config.get("dim", made.dim)
    if dim != made.dim:
        made = case.load(Projected(made, dim), official.PROJECTED)
    return _trained(case, made)[0]


def _lfq_entropies(quantizer: Quantizer, x: Tensor, out: QuantizerOutput) -> Outputs:
    """Entropies and the unweighted commitment of an LFQ or BSQ."""
    if isinstance(quantizer, Projected):
        quantizer, x = quantizer.quantizer, quantizer.project_in(x)
    assert isinstance(quantizer, (LFQ, BSQ))
    weight = quantizer.commitment_weight * (quantizer.dim if isinstance(quantizer, BSQ) else 1)
    found = quantizer.entropies(
        x if isinstance(quantizer, LFQ) else torch.nn.functional.normalize(x, dim=-1)
    )
    return {
        "per_sample_entropy": found.sample.mean(),
        "batch_entropy": found.batch.mean(),
        "codebook_entropy": found.batch.mean(),
        "entropy_aux": found.loss(),
        "commitment": out.losses["commitment"] / weight,
    }


@cases("lfq_lucid", "lfq_lucid_multi", "lfq_lucid_image", "bsq_lucid")
def lucid_lfq(case: Case) -> Outputs:
    made = official.lucid_lfq(case.config)
    if isinstance(made, Projected):
        case.state.pop("mask", None)
        made = case.load(made, official.PROJECTED)
    outputs, out, x = _trained(case, made)
    outputs["aux_loss"] = outputs.pop("loss")
    if case.maps:
        outputs["indices"] = outputs["indices"].view(
            case.recording.entries[f"{case.name}/indices"].shape
        )
    return outputs | _lfq_entropies(made, x, out)


@cases("lfq_magvit", "gq_wetok")
def magvit_lfq(case: Case) -> Outputs:
    made = official.magvit_lfq(case.config)
    outputs, out, x = _trained(case, made)
    return outputs | _lfq_entropies(made, x, out)


@cases("lfq_magvit_factorized")
def factorized_lfq(case: Case) -> Outputs:
    split = tuple(case.config["factorized_bits"])
    pre, post = LFQ(sum(split), split=split).encode(case.vectors()).flatten(0, 1).unbind(-1)
    return {"idx_pre": pre, "idx_post": post}


@cases("gfq_eval")
def gfq(case: Case) -> Outputs:
    made = LFQ(case.config["dim"], case.config["num_codebooks"]).eval()
    tokens = made.encode(case.vectors())
    return {
        "quantized": case.like_x(made(case.vectors()).quantized),
        "group_indices": rearrange(tokens, "b n g -> g (b n)"),
    }


@cases("entropy_magvit_t0.01", "entropy_magvit_t1.0")
def entropy(case: Case) -> Outputs:
    found = entropies(case.input("logits")[..., None, :] / case.config["temperature"])
    return {"sample_entropy": found.sample, "avg_entropy": found.batch, "loss": found.loss()}


@cases("bsq_official_group", "bsq_official_analytical")
def official_bsq(case: Case) -> Outputs:
    dim = case.config["embed_dim"]
    x = case.vectors()
    grouped = official.official_bsq(case.config)
    whole = official.official_bsq(case.config, split=(dim,))
    outputs, out, _ = _trained(case, grouped)
    return {
        **outputs,
        "codebook_entropy": grouped.entropies(torch.nn.functional.normalize(x, dim=-1)).batch.sum(),
        "indices": whole.encode(x),
        "group_indices": out.tokens,
        "codes_from_group_indices": grouped.decode(out.tokens),
    }


@cases("ibq")
def ibq(case: Case) -> Outputs:
    options = case.config
    weights = (options["quant_loss_weight"], options["beta"], options["entropy_loss_weight"])
    made = IBQ(options["n_e"], options["e_dim"], *weights, options["entropy_temperature"])
    case.load(made, official.CODEBOOK)
    outputs, out, x = _trained(case, made, codebook=made.codebook.weight)
    found = made.entropies(made.logits(x))
    quant = torch.stack([loss for name, loss in out.losses.items() if name != "entropy"]).sum()
    return outputs | {
        "quant_loss": quant / options["quant_loss_weight"],
        "sample_entropy": found.sample,
        "avg_entropy": found.batch,
        "entropy_loss": found.loss(),
    }


@cases("vq_taming_legacy1", "vq_taming_legacy0")
def taming(case: Case) -> Outputs:
    made = official.taming(case.config)
    case.load(made, official.CODEBOOK)
    return _trained(case, made, codebook=made.codebook.weight)[0]


@cases("vq_llamagen_l2")
def llamagen(case: Case) -> Outputs:
    made = official.llamagen(case.config)
    case.load(made, official.CODEBOOK)
    outputs, out, _ = _trained(case, made, codebook=made.codebook.weight)
    named = {"vq_loss": "codebook", "commit_loss": "commitment", "entropy_loss": "entropy"}
    return outputs | {name: out.losses.get(ours, torch.zeros(())) for name, ours in named.items()}


@cases("simvq_official_legacy1", "simvq_official_legacy0")
def simvq(case: Case) -> Outputs:
    made = official.simvq(case.config)
    case.load(made, official.SIMVQ)
    return _trained(case, made, proj_weight=made.projection.weight, proj_bias=made.projection.bias)[
        0
    ]


@cases("simvq_lucid_rot1", "simvq_lucid_rot0")
def lucid_simvq(case: Case) -> Outputs:
    made: SimVQ = official.lucid_simvq(case.config)
    case.load(made, official.LUCID_SIMVQ)
    return _trained(case, made, code_transform=made.projection.weight)[0]


@cases("rotate_to")
def rotation(case: Case) -> Outputs:
    x = case.input("x").requires_grad_()
    rotated = rotate_to(x, case.input("target"))
    (gradient,) = torch.autograd.grad((rotated * case.input("cot")).sum(), x)
    return {"quantized": rotated, "grad_x_from_cot": gradient}


@cases("vq_ema", "vq_ema_cos", "vq_ema_norot")
def ema(case: Case) -> Outputs:
    made = official.lucid_ema(case.config)
    case.load(made, official.LUCID_EMA)
    outputs, _, _ = _trained(case, made)
    after = official.to_official(made, official.LUCID_EMA)
    for key, value in after.items():
        outputs[f"after_{key.removeprefix('_codebook.')}"] = value
    return outputs


@cases("dead_code_mask")
def dead_codes(case: Case) -> Outputs:
    sizes = case.input("cluster_size")
    made = EMAVectorQuantizer(sizes.shape[-1], 1, threshold=case.config["threshold_ema_dead_code"])
    made.sizes.copy_(sizes[0])
    return {"expired": made.expired()[None]}


@cases("residual_vq")
def residual_vq(case: Case) -> Outputs:
    made = official.lucid_residual(case.config)
    case.load(made, official.LUCID_RESIDUAL)
    codebooks = {f"codebook{i}": layer.codebook.weight for i, layer in enumerate(made.layers)}  # type: ignore[union-attr]
    outputs, out, x = _trained(case, made, **codebooks)  # type: ignore[arg-type]
    grads = {name: g[None] for name, g in outputs.items() if name.startswith("grad_codebook")}
    losses = [layer.losses["commitment"] for layer in made.scan(x)]
    return (
        outputs
        | grads
        | {"losses": torch.stack(losses), "all_codes": torch.stack(made.parts(out.tokens))}
    )


def _evaluated(case: Case, made: Quantizer) -> Outputs:
    x = case.vectors()
    tokens = made.eval().encode(x)
    return {
        "quantized": made(x).quantized,
        "indices": tokens,
        "output_from_indices": made.decode(tokens),
    }


@cases("grouped_residual_vq")
def grouped_residual_vq(case: Case) -> Outputs:
    made = official.lucid_grouped_residual(case.config)
    outputs = _evaluated(case, case.load(made, official.LUCID_GROUPED))
    return outputs | {
        "indices": rearrange(outputs["indices"], "b n (g q) -> g b n q", g=case.config["groups"])
    }


@cases("residual_fsq")
def residual_finite_scalar(case: Case) -> Outputs:
    return _evaluated(
        case, residual_fsq(tuple(case.config["levels"]), case.config["num_quantizers"])
    )


@cases("residual_lfq")
def residual_lfq(case: Case) -> Outputs:
    layers = tuple(official.lucid_lfq(case.config) for _ in range(case.config["num_quantizers"]))
    return _evaluated(case, ResidualQuantizer(layers, ratio=1 / case.settings["scale_ratio"]))


@cases("product_unitok")
def unitok(case: Case) -> Outputs:
    weight = case.settings["entropy_weight"]
    made = official.unitok(case.config, weight)
    case.load(made, official.PRODUCT)
    first = made.groups[0].codebook.weight  # type: ignore[union-attr]
    outputs, out, _ = _trained(case, made, codebook0=first)  # type: ignore[arg-type]
    return outputs | {
        "indices": out.tokens.mT,
        "vq_loss": out.losses["codebook"] + out.losses["commitment"],
        "entropy_loss": out.losses["entropy"] / weight,
    }


@cases("ms_bsq_infinity")
def multi_scale_bsq(case: Case) -> Outputs:
    require(case.settings, case.name, {"down": "area", "up": "trilinear"})
    sides = case.config["scale_schedule"]
    made = MultiScaleBSQ(case.config["dim"], sides).eval()
    x = case.vectors()
    bits = made.encode(x)
    return {
        "quantized": case.like_x(made(x).quantized),
        "bits": bits,
        "var_inputs": made.next_inputs(bits, len(sides)).mT,
    }
