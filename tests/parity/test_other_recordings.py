"""Replays depend on no size or option of one recording: they run on recordings of instances unlike those.

What is recorded here comes from our own modules, asked directly; a replay must find the same through official keys,
config and settings.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tessellar.models.llamagen import official as llamagen
from tessellar.models.mar import MAR
from tessellar.models.mar import official as mar
from tessellar.models.maskgit import MaskGIT
from tessellar.models.maskgit import official as maskgit
from tessellar.models.rar import official as rar
from tessellar.models.retok import official as retok
from tessellar.models.xar import XAR
from tessellar.models.xar import official as xar
from tessellar.parity.recording import Entry, Recording, WeightFiles
from tessellar.parity.registration import replays_of
from tessellar.parity.stand_ins import greedy, logits_of
from tessellar.protocol.condition import Condition
from tessellar.protocol.guidance import Guidance, LateLinear
from tests.tiny import other_generators as tiny

LABELS = torch.tensor([0, 3])
CLASSES = Condition(ids=LABELS)
Weights = dict[str, dict[str, Tensor]]


class InMemory(WeightFiles):
    """Weights by part that need no file."""

    def __init__(self, weights: Weights) -> None:
        super().__init__(Path("nowhere"), dict.fromkeys(weights, ""), {})
        self._read = dict(weights)


class Recorder:
    """A recording in the making."""

    def __init__(self, system: str, config: dict[str, Any], weights: Weights) -> None:
        self.system = system
        self.config = config
        self.weights = weights
        self.entries: dict[str, Entry] = {}
        self.tensors: dict[str, Tensor] = {}

    def give(self, case: str, **inputs: Tensor) -> None:
        """Inputs of a case; `__` in a name stands for `/`."""
        for name, tensor in inputs.items():
            self._add(name.replace("__", "/"), "input", case, {}, tensor)

    def want(self, case: str, *names: str, **settings: Any) -> None:
        """Outputs that a replay is to compute."""
        for name in names:
            self._add(name, "output", case, settings, None)

    def _add(
        self, name: str, role: str, case: str, settings: dict[str, Any], tensor: Tensor | None
    ) -> None:
        self.entries[name] = Entry(role, case, (), "", "", 0.0, 0.0, settings)
        if tensor is not None:
            self.tensors[name] = tensor

    def replay(self) -> dict[str, Tensor]:
        """What the replays of the system compute; they must read every input and compute every output."""
        cases = {entry.case for entry in self.entries.values()}
        weights = InMemory(self.weights)
        made = Recording(
            Path("nowhere"), self.system, self.config, self.entries, self.tensors, weights, cases
        )
        outputs: dict[str, Tensor] = {}
        for replay in replays_of(self.system):
            if replay.covers_any(made.output_cases):
                outputs |= replay.function(made)
        assert set(outputs) == set(made.names("output"))
        assert made.inputs.used == set(made.names("input"))
        return outputs


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def codes(length: int, vocab: int) -> Tensor:
    return torch.randint(vocab, (2, length), generator=torch.Generator().manual_seed(5))


@torch.no_grad()
def test_llamagen() -> None:
    made, _ = tiny.llamagen_classes()
    config = {
        "n_head": 5,
        "multiple_of": 24,
        "vocab_size": 23,
        "block_size": 9,
        "norm_eps": 1e-2,
        "rope_base": 50.0,
    }
    recorder = Recorder("llamagen", {"c2i": config}, {"c2i": llamagen.to_official(made)})  # type: ignore[arg-type]
    recorder.give("c2i_gen", c2i__gen_labels=LABELS)
    recorder.want(
        "c2i_gen", "c2i/greedy_late/tokens", "c2i/greedy_late/logits", cfg_scale=3.0, cfg_interval=4
    )
    outputs = recorder.replay()
    unguided = greedy(made, CLASSES)
    assert outputs["c2i/greedy_late/tokens"].shape == (2, 9)
    assert not torch.allclose(outputs["c2i/greedy_late/logits"][:, 0], unguided.logits[:, 0])


@torch.no_grad()
@pytest.mark.parametrize("schedule", ["linear", "linear_re"])
def test_retok(schedule: str) -> None:
    made, _ = tiny.retok_gpt()
    config = {"block_size": 9, "vocab_size": 23, "n_head": 3, "multiple_of": 20, "norm_eps": 1e-2}
    recorder = Recorder("retok", {"gpt": config}, {"generator": retok.gpt_to_official(made)})  # type: ignore[arg-type]
    recorder.give("gen_train", gpt__tokens=codes(9, 23), gpt__class_ids=LABELS)
    recorder.want("gen_train", "gpt/logits", "gpt/loss", "gpt/logits_uncond")
    names = ("gpt/gen_other/ids", "gpt/gen_other/probs")
    recorder.want("gen_other", *names, cfg_scale=2.5, cfg_schedule=schedule)
    outputs = recorder.replay()
    guided = greedy(
        made, CLASSES, Guidance(LateLinear(2.5, start=1.0001, falling=schedule == "linear_re"))
    )
    assert torch.equal(outputs["gpt/logits"], logits_of(made.score(codes(9, 23), CLASSES)))
    assert torch.equal(outputs["gpt/gen_other/probs"], guided.logits.softmax(-1))


def test_mar_of_two_shapes_without_a_linear_schedule() -> None:
    made, _ = tiny.mar_of_two_shapes()
    assert isinstance(made, MAR)
    heads = {"encoder_num_heads": 4, "decoder_num_heads": 3}
    config = {"img_size": 32, "vae_stride": 8, "vae_embed_dim": 3, **heads}
    config |= {"diffusion_batch_mul": 4, "num_sampling_steps": "5"}
    recorder = Recorder("mar", {"mar": config}, {"generator": mar.to_official(made)})
    orders = torch.tensor([[2, 0, 3, 1], [1, 3, 0, 2]])
    recorder.give("gen_shared", mar__labels=LABELS, mar__orders=orders)
    steps = torch.randint(1000, (32,), generator=torch.Generator().manual_seed(5))
    recorder.give("gen_train", mar__latents=noise(2, 3, 4, 4), mar__label_drop=torch.tensor([0, 1]))
    recorder.give(
        "gen_train", mar__num_masked=torch.tensor([3]), mar__t=steps, mar__noise=noise(32, 12)
    )
    names = ("mar/tokens", "mar/mask", "mar/encoder_out", "mar/z", "mar/loss", "mar/grad_norm")
    recorder.want("gen_train", *names)
    settings = {"num_iter": 3, "cfg": 2.0, "cfg_schedule": "constant", "temperature": 1.0}
    recorder.want(
        "gen_sample_flat", "mar_sample_flat/latents", "mar_sample_flat/cfg_per_iter", **settings
    )
    for number, size in enumerate(made.sets(orders, 3).sizes):
        rows = 2 * size // made.patch**2
        draws = {
            f"iter{number}__x_T": noise(rows, 12),
            f"iter{number}__noise": noise(5, 2 * rows, 12),
        }
        recorder.give(
            "gen_sample_flat",
            **{f"mar_sample_flat__{name}": tensor for name, tensor in draws.items()},
        )
    outputs = recorder.replay()
    masked = torch.tensor([[True, False, True, True], [True, True, False, True]])
    patches = outputs["mar/tokens"]
    assert torch.equal(outputs["mar/mask"] > 0, masked)
    assert torch.equal(outputs["mar/z"], made.backbone(patches, ~masked, CLASSES).detach())
    assert outputs["mar_sample_flat/cfg_per_iter"].tolist() == [2.0] * 3
    assert outputs["mar_sample_flat/latents"].shape == (2, 3, 4, 4)


@torch.no_grad()
def test_maskgit_with_masks_of_unequal_size() -> None:
    made, _ = tiny.maskgit_vit()
    assert isinstance(made, MaskGIT)
    config = {"image_seq_len": 9, "codebook_size": 23, "num_attention_heads": 3}
    recorder = Recorder("titok_maskgit", config, {"vit": maskgit.to_official(made)})
    tokens = codes(9, 23)
    masked = torch.arange(9) < torch.tensor([[1], [6]])
    hidden = torch.where(masked, 23, tokens)
    recorder.give(
        "gen_shared", tokens=tokens, class_ids=LABELS, mask=masked.byte(), masked_tokens=hidden
    )
    settings = {"label_smoothing": 0.0, "loss_weight_unmasked_token": 0.3}
    names = ("vit/logits_cond", "vit/logits_uncond", "vit/mlm_loss", "vit/mlm_acc")
    recorder.want("gen_vit_train", *names, **settings)
    settings = {"guidance_decay": "linear", "guidance_scale": 2.0, "num_sample_steps": 3}
    settings |= {"randomize_temperature": 1.0, "softmax_temperature_annealing": False}
    recorder.want("gen_vit_fast", "vit/gen_fast/ids", **settings)
    draws = {"u_tokens": noise(3, 2, 9, 23).sigmoid(), "u_conf": noise(3, 2, 9).sigmoid()}
    recorder.give(
        "gen_vit_fast", **{f"vit__gen_fast__{name}": tensor for name, tensor in draws.items()}
    )
    outputs = recorder.replay()
    made.label_smoothing = 0.0
    made.known_weight = 0.3
    assert torch.equal(outputs["vit/logits_cond"], made.logits(tokens, masked, CLASSES))
    assert torch.equal(outputs["vit/mlm_loss"], made.masked_loss(tokens, masked, CLASSES))
    assert outputs["vit/gen_fast/ids"].shape == (2, 9)


@torch.no_grad()
def test_rar_in_any_order() -> None:
    made, _ = tiny.rar_of_other_heads()
    config = {"image_seq_len": 9, "codebook_size": 23}
    recorder = Recorder("titok_rar", config, {"model": rar.to_official(made)})  # type: ignore[arg-type]
    recorder.give("gen_shared", tokens=codes(9, 23), condition=LABELS + 24)
    recorder.want("gen_prefix", "prefix/logits", prefix_length=4)
    settings = {"guidance_scale": 3.0, "guidance_scale_pow": 2.0, "randomize_temperature": 1.5}
    recorder.want("gen_sample_warm", "gen_warm/ids", "gen_warm/probs", **settings)
    outputs = recorder.replay()
    scores = logits_of(made.score(codes(9, 23), CLASSES))
    torch.testing.assert_close(outputs["prefix/logits"], scores[:, :5])
    assert outputs["gen_warm/ids"].shape == (2, 9)


def test_xar_of_small_cells() -> None:
    made = tiny.shaken(XAR(tiny.LATENTS, "cell:2x2", 24, 2, 3, tiny.CLASSES, decoder_depth=1))
    config = {"patch_size": 1, "clusters": 4, "label_drop_prob": 0.1, "proj_dropout": 0.0}
    for side in ("encoder", "decoder"):
        config |= {f"{side}_num_heads": 3, f"{side}_embed_dim": 24}
    recorder = Recorder("xar", config, {"model": xar.to_official(made)})
    recorder.give("shared", train__latents=noise(2, 3, 4, 4))
    draws = {"sample__x_T": noise(4, 2, 4, 3), "sample__sde_noise": noise(4, 2, 2, 4, 3)}
    recorder.give("sample", sample__labels=LABELS, **draws)
    settings = {"num_steps": 3, "cfg": 2.0, "cfg_schedule": "linear", "cfg_start": 1.5}
    recorder.want("sample", "sample/sde_latents", sampler="euler_maruyama_sampler", **settings)
    recorder.want("sample", "sample/ode_latents", sampler="euler_sampler", **settings)
    recorder.want("sample", "sample/timestep_index", **settings)
    call = {"sampler": "euler_maruyama_sampler", "cell": 1, "call": 2, **settings}
    recorder.want("sample", "sample/cell1_call2_input", "sample/cell1_call2_velocity", **call)
    recorder.want("order", "order/cell", entity="cell", k=1)
    recorder.want("order", "order/scales", entity="scale", scales=[1, 3], interpolation="nearest")
    outputs = recorder.replay()
    assert (
        outputs["sample/sde_latents"].shape == outputs["sample/ode_latents"].shape == (2, 3, 4, 4)
    )
    assert outputs["sample/timestep_index"].shape == (3,)
    assert outputs["sample/cell1_call2_input"].shape == (4, 4, 3)
    assert outputs["order/cell"].tolist() == list(range(16))
    assert outputs["order/scales"].shape == (2, 10, 3)
