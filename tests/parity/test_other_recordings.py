"""Replays depend on no size or option of one recording: they run on recordings of instances unlike those.

What is recorded here comes from our own modules, asked directly; a replay must find the same through official keys,
config and settings.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tessellar.layers.mamba import Mamba, MambaLayer, Scan, interleaved, laid_out
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
from tessellar.parity.training.tokenunify import OF_A_SCAN, SCANS
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


def scanned(scan: Scan, x: Tensor, gate: Tensor) -> Tensor:
    """One sample [L, E] through a scan, place by place, with nothing but the equations."""
    kernel = scan.conv.weight[:, 0]  # [E, K]
    width = kernel.shape[1]
    a = -scan.a_log.exp()
    state = torch.zeros_like(a)
    outputs = []
    for t in range(len(x)):
        seen = scan.conv.bias.clone()
        for k in range(width):
            if t - width + 1 + k >= 0:
                seen = seen + kernel[:, k] * x[t - width + 1 + k]
        u = torch.nn.functional.silu(seen)
        read = scan.x_proj.weight @ u
        step, enter, leave = read.split([scan.rank, scan.state, scan.state])
        raw = scan.dt_proj.weight @ step + scan.dt_proj.bias
        dt = torch.log1p(raw.exp())
        state = (dt[:, None] * a).exp() * state + dt[:, None] * enter * u[:, None]
        y = state @ leave + scan.skip * u
        outputs.append(y * torch.nn.functional.silu(gate[t]))
    return torch.stack(outputs)


def shaken_layer() -> MambaLayer:
    """A layer unlike the recorded ones, all of whose weights matter."""
    layer = MambaLayer(18, state=3, kernel=3, expand=3, slices=2)
    draw = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=draw) * 0.4)
    return layer


@torch.no_grad()
def test_tokenunify_of_other_sizes() -> None:
    layer = shaken_layer()
    theirs = {}
    for name, tensor in layer.state_dict().items():
        theirs[name] = tensor
    for direction, scan in SCANS.items():
        for their_name, our_name in OF_A_SCAN.items():
            tensor = theirs.pop(f"mamba.{scan}.{our_name}")
            theirs[f"mamba.{their_name.format(direction)}"] = tensor
    state = {f"vit.stages.2.1.{name}": tensor for name, tensor in theirs.items()}
    config = {
        "patch": [1, 2, 3],
        "feat_size": [0, 0, 18],
        "d_state": 3,
        "d_conv": 3,
        "expand": 3,
        "nslices": 2,
    }
    draw = torch.Generator().manual_seed(3)
    volume = torch.rand(2, 4, 6, generator=draw)
    noise = torch.randn(8, 1, 2, 3, generator=draw)
    places = torch.tensor([6, 1, 2])
    given = torch.randn(2, 18, 2, 3, generator=draw)
    recorder = Recorder("tokenunify", config, {"model": state})
    recorder.give("shared", volume=volume, next__num_context=torch.tensor(3))
    recorder.give("shared", next__fill_noise=noise[3:])
    recorder.give("random", random__mask_indices=places, random__fill_noise=noise[:3])
    recorder.give("mamba", mamba__in=given)
    recorder.want("patches", "patches")
    recorder.want("next", "next/context_noise", fill="noise")
    recorder.want("next", "next/target")
    recorder.want("random", "random/input_zero", fill="zero")
    recorder.want("random", "random/input_noise", fill="noise")
    recorder.want("mamba", "mamba/out", stage=2, layer=1)
    outputs = recorder.replay()
    patches = []
    for depth in range(2):
        for row in range(2):
            for column in range(2):
                patches.append(
                    volume[depth : depth + 1, 2 * row : 2 * row + 2, 3 * column : 3 * column + 3]
                )
    assert torch.equal(outputs["patches"], torch.stack(patches))
    assert torch.equal(outputs["next/target"], patches[3])
    context = outputs["next/context_noise"]
    assert torch.equal(context[0, :2], volume[0, :2])  # patches 0 and 1
    assert torch.equal(context[0, 2:, :3], patches[2][0])
    assert torch.equal(context[1, 2:, 3:], noise[7][0])
    hidden = outputs["random/input_noise"]
    assert torch.equal(hidden[1, 2:, :3], noise[0][0])  # patch 6
    assert torch.equal(hidden[0, :2, 3:], noise[1][0])  # patch 1
    zero = outputs["random/input_zero"]
    assert float(zero[0, 2:, :3].abs().sum()) == 0 and torch.equal(zero[1, :2], volume[1, :2])
    expected = []
    for sample in given:
        places_first = layer.norm(sample.flatten(1).T)  # [L, C]
        x, gate = (places_first @ layer.mamba.in_proj.weight.T).chunk(2, dim=-1)
        total = scanned(layer.mamba.forward_scan, x, gate)
        total = total + scanned(layer.mamba.backward_scan, x.flip(0), gate.flip(0)).flip(0)
        order = torch.tensor([0, 3, 1, 4, 2, 5])  # two slices of three, one place of each in turn
        total[order] += scanned(layer.mamba.sliced_scan, x[order], gate[order])
        expected.append((total @ layer.mamba.out_proj.weight.T).T.view(18, 2, 3))
    torch.testing.assert_close(outputs["mamba/out"], torch.stack(expected), atol=2e-4, rtol=1e-4)


@torch.no_grad()
def test_a_one_way_mamba_sees_what_lies_before() -> None:
    torch.manual_seed(0)
    mamba = Mamba(8, state=4)
    x = torch.randn(2, 7, 8)
    other = x.clone()
    other[:, 4:] += 1
    assert torch.equal(mamba(x)[:, :4], mamba(other)[:, :4])
    assert not torch.allclose(mamba(x)[:, 4:], mamba(other)[:, 4:])
    bias = mamba.forward_scan.dt_proj.bias
    step = torch.nn.functional.softplus(bias)
    assert float(step.min()) > 0.0009 and float(step.max()) < 0.11
    assert torch.equal(laid_out(interleaved(x[:, :6], 3), 3), x[:, :6])
    assert interleaved(x[:, :6], 3)[0, :, 0].tolist() == x[0, [0, 2, 4, 1, 3, 5], 0].tolist()


def test_va_pi_of_other_numbers() -> None:
    made, _ = tiny.llamagen_classes()
    old, _ = tiny.llamagen_classes()
    with torch.no_grad():
        for parameter in old.parameters():
            parameter.mul_(1.05)
    gpt = {
        "n_head": 5,
        "multiple_of": 24,
        "vocab_size": 23,
        "block_size": 9,
        "norm_eps": 1e-2,
        "rope_base": 50.0,
    }
    config = {
        "gpt": gpt,
        "group_size": 3,
        "reward_rec_weight": 0.5,
        "reward_perceptual_weight": 2.0,
    }
    weights = {
        "policy": llamagen.to_official(made),
        "old_policy": llamagen.to_official(old),
        "reference": llamagen.to_official(old),
    }
    draw = torch.Generator().manual_seed(4)
    tokens = codes(9, 23)
    mask = torch.rand(2, 8, generator=draw) < 0.3
    drawn = torch.randint(23, (2, 8), generator=draw)
    samples = torch.randint(23, (6, 9), generator=draw)
    images = torch.rand(2, 3, 4, 4, generator=draw)
    shown = torch.rand(6, 3, 4, 4, generator=draw)
    perceptual = torch.rand(6, generator=draw)
    recorder = Recorder("va_pi", config, weights)  # type: ignore[arg-type]
    recorder.give("shared", labels=LABELS, gt_tokens=tokens, sampled_tokens=samples)
    recorder.give("shared", noise__mask=mask.long(), noise__random_tokens=drawn)
    recorder.give("reward", images=images, recon=shown, perceptual=perceptual)
    recorder.want("advantages", "advantages", eps=1e-8, unbiased=True)
    recorder.want("reward", "reward/l1/reward", reward_rec_type="l1")
    settings = {
        "clip_range": 0.05,
        "use_kl_loss": True,
        "kl_coef": 0.3,
        "aux_ce_weight": 0.7,
        "temperature": 1.0,
        "adv_clip_max": 0.6,
    }
    names = [f"loss/mine/{part}" for part in ("total", "policy", "ratio", "kl", "ce", "grad_norm")]
    recorder.want("loss_mine", *names, **settings)
    outputs = recorder.replay()

    squares = (shown - images[[0, 0, 0, 1, 1, 1]]).square().flatten(1).mean(1)
    rewards = (-(0.5 * squares + 2 * perceptual)).view(2, 3)
    expected = (rewards - rewards.mean(1, keepdim=True)) / rewards.std(1, keepdim=True)
    torch.testing.assert_close(outputs["advantages"], expected.flatten(), atol=1e-5, rtol=1e-5)
    errors = (shown - images[[0, 0, 0, 1, 1, 1]]).abs().flatten(1).mean(1)
    torch.testing.assert_close(outputs["reward/l1/reward"], -(0.5 * errors + 2 * perceptual))

    context = torch.cat([torch.where(mask, drawn, tokens[:, :-1]), tokens[:, -1:]], 1)
    logits = logits_of(made.score(context, CLASSES)).log_softmax(-1)
    before = logits_of(old.score(context, CLASSES)).log_softmax(-1).detach()
    total = torch.zeros(())
    for row in range(6):
        at = samples[row][:, None]
        new, was = logits[row // 3].gather(1, at)[:, 0], before[row // 3].gather(1, at)[:, 0]
        ratio = (new - was).exp()
        advantage = expected.flatten()[row].clamp(-0.6, 0.6)
        worst = torch.minimum(ratio * advantage, ratio.clamp(0.95, 1.05) * advantage)
        gap = was - new
        total = total + (-worst + 0.3 * (gap.exp() - gap - 1)).mean() / 6
        torch.testing.assert_close(outputs["loss/mine/ratio"][row], ratio)
    entropy = -logits.gather(-1, tokens[..., None]).mean()
    total = total + 0.7 * entropy
    torch.testing.assert_close(outputs["loss/mine/total"], total, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(outputs["loss/mine/ce"], entropy)
    total.backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in made.parameters() if p.grad is not None])
    torch.testing.assert_close(outputs["loss/mine/grad_norm"], norm, atol=1e-6, rtol=1e-4)
