"""Vector quantization: nearest codes, straight-through gradients, codes that stay in use."""

import threading
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from tessellar import distributed
from tessellar.tokenizers.quantizers.vq import VectorQuantizer


def quantizer(**options) -> VectorQuantizer:
    torch.manual_seed(0)
    return VectorQuantizer(32, 4, **options)


@pytest.mark.parametrize("l2_normalize", [True, False])
def test_tokens_are_the_nearest_codes(l2_normalize: bool) -> None:
    vq, z = quantizer(l2_normalize=l2_normalize).eval(), torch.randn(3, 7, 4)
    unit = F.normalize(z, dim=-1) if l2_normalize else z
    nearest = torch.cdist(unit, vq.codes()).argmin(-1)
    assert torch.equal(vq.encode(z), nearest)
    torch.testing.assert_close(vq(z).quantized, vq.decode(nearest))
    if l2_normalize:
        torch.testing.assert_close(vq.decode(nearest).norm(dim=-1), torch.ones(3, 7))


def test_scaling_codes_changes_nothing_on_the_sphere() -> None:
    vq, z = quantizer().eval(), torch.randn(2, 9, 4)
    before = vq(z)
    with torch.no_grad():
        vq.codebook.weight.mul_(torch.rand(32, 1) + 0.5)
    after = vq(z)
    assert torch.equal(before.tokens, after.tokens)
    torch.testing.assert_close(before.quantized, after.quantized)


def test_gradient_passes_straight_through_to_the_latent() -> None:
    vq = quantizer(l2_normalize=False)
    z, cotangent = torch.randn(2, 5, 4, requires_grad=True), torch.randn(2, 5, 4)
    (gradient,) = torch.autograd.grad((vq(z).quantized * cotangent).sum(), z)
    torch.testing.assert_close(gradient, cotangent)


def test_rotation_gives_codes_and_turns_gradients_as_it_turns_latents() -> None:
    vq = quantizer(l2_normalize=False, rotation=True)
    z, cotangent = torch.randn(2, 5, 4, requires_grad=True), torch.randn(2, 5, 4)
    out = vq(z)
    assert torch.equal(out.quantized, vq.decode(out.tokens))
    (gradient,) = torch.autograd.grad((out.quantized * cotangent).sum(), z)
    ratio = out.quantized.norm(dim=-1) / z.norm(dim=-1)
    torch.testing.assert_close(
        gradient.norm(dim=-1), ratio * cotangent.norm(dim=-1), atol=1e-5, rtol=1e-4
    )
    (along,) = torch.autograd.grad((vq(z).quantized * out.quantized.detach()).sum(), z)
    cosine = F.cosine_similarity(
        along, z, dim=-1
    )  # what points along the code comes back along the latent
    torch.testing.assert_close(cosine, torch.ones(2, 5), atol=1e-4, rtol=0)


def test_losses_move_codes_and_latents_towards_each_other() -> None:
    vq, z = quantizer(commitment_weight=0.25), torch.randn(2, 5, 4, requires_grad=True)
    losses = vq(z).losses
    torch.testing.assert_close(losses["commitment"], 0.25 * losses["codebook"])
    for name, moved in (("codebook", vq.codebook.weight), ("commitment", z)):
        gradient = torch.autograd.grad(losses[name], moved, retain_graph=True)[0]
        assert float(gradient.abs().max()) > 0
    assert torch.autograd.grad(losses["codebook"], z, allow_unused=True)[0] is None


def test_entropy_loss_rewards_confident_and_diverse_codes() -> None:
    vq = quantizer(entropy_weight=1.0)
    diverse = vq(vq.codes().detach()[None]).losses["entropy"]
    collapsed = vq(vq.codes().detach()[:1].expand(1, 32, 4)).losses["entropy"]
    assert float(diverse.detach()) < float(collapsed.detach())


def test_codes_come_back_into_use_on_clustered_data() -> None:
    """Latents in 24 clusters on one side of the sphere: without restarts few of 32 codes are used, with them most."""
    torch.manual_seed(1)
    centres = F.normalize(torch.randn(24, 16) + 4 * torch.eye(16)[0], dim=-1)

    def used(**options) -> int:
        torch.manual_seed(2)
        vq = VectorQuantizer(32, 16, **options)
        optimizer = torch.optim.SGD(vq.parameters(), 0.5)
        for _ in range(200):
            z = centres[torch.randint(24, (1, 96))] + 0.02 * torch.randn(1, 96, 16)
            sum(vq(z).losses.values()).backward()  # type: ignore[union-attr]
            optimizer.step()
            optimizer.zero_grad()
        return len(vq.eval().encode(centres).unique())

    assert used(init_step=5, restart_every=20) > 16 > used()


def test_maintenance_stops_in_eval_and_after_its_end() -> None:
    vq = quantizer(restart_every=1, restart_until=3)
    before = vq.codebook.weight.clone()
    vq.eval()(torch.randn(1, 4, 4))
    assert torch.equal(before, vq.codebook.weight) and int(vq.step) == 0
    vq.train()
    for _ in range(3):
        vq(torch.randn(1, 4, 4))
    settled = vq.codebook.weight.clone()
    assert not torch.equal(before, settled)
    vq(torch.randn(1, 4, 4))
    assert torch.equal(settled, vq.codebook.weight)


def test_use_counts_since_the_last_restart_only() -> None:
    vq = quantizer(restart_every=3)
    for number in (1, 2):
        vq(torch.randn(1, 10, 4))
        assert int(vq.counts.sum()) == 10 * number
    before = vq.counts.clone()
    tokens = vq(torch.randn(1, 10, 4)).tokens
    assert torch.equal(vq.counts, tokens.flatten().bincount(minlength=32)) and not torch.equal(
        vq.counts, before
    )


def test_quantization_is_float32_under_autocast() -> None:
    vq, z = quantizer().eval(), torch.randn(2, 50, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = vq(z)
    assert mixed.quantized.dtype == torch.float32 and torch.equal(mixed.tokens, vq.encode(z))


class Ranks:
    """Stands in for the processes of a job: one thread each, which meet at every collective operation."""

    def __init__(self, world: int) -> None:
        self.values: list[Any] = [None] * world
        self.barrier = threading.Barrier(world, timeout=20)
        self.local = threading.local()

    def _exchange(self, value: Any) -> list[Any]:
        self.barrier.wait()
        self.values[self.local.rank] = value
        self.barrier.wait()
        return list(self.values)

    def all_reduce_sum(self, x: torch.Tensor) -> torch.Tensor:
        return torch.stack(self._exchange(x)).sum(0)

    def broadcast(self, value: Any) -> Any:
        return self._exchange(value)[0]

    def run(self, rank: int, passes: list[torch.Tensor], vq: VectorQuantizer) -> None:
        self.local.rank = rank
        for z in passes:
            vq(z)


def test_processes_keep_one_codebook_and_restart_what_none_of_them_uses(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Process 0 sees codes 0 to 7, process 1 codes 8 to 15; 16 to 31 are restarted, from latents of both."""
    ranks, codes = Ranks(2), quantizer()
    monkeypatch.setattr(distributed, "all_reduce_sum", ranks.all_reduce_sum)
    monkeypatch.setattr(distributed, "broadcast", ranks.broadcast)
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    monkeypatch.setattr(distributed, "rank", lambda: ranks.local.rank)
    copies = [quantizer(restart_every=2) for _ in range(2)]
    seen = [codes.codes().detach()[None, 8 * rank : 8 * rank + 8] for rank in range(2)]
    threads = [
        threading.Thread(target=ranks.run, args=(r, [seen[r]] * 2, copies[r])) for r in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    first, second = (vq.codebook.weight.detach() for vq in copies)
    assert torch.equal(first, second) and torch.equal(copies[0].counts, copies[1].counts)
    torch.testing.assert_close(first[:16], codes.codes().detach()[:16])
    distances = torch.cdist(first[16:], torch.cat(seen, 1)[0])
    assert float(distances.min(1).values.max()) < 1e-3
    assert {int(code) // 8 for code in distances.argmin(1)} == {0, 1}


def test_a_resumed_quantizer_restarts_at_the_same_pass() -> None:
    passes = [torch.randn(1, 6, 4, generator=torch.Generator().manual_seed(s)) for s in range(9)]

    def run(vq: VectorQuantizer, zs: list[torch.Tensor]) -> VectorQuantizer:
        for z in zs:
            torch.manual_seed(int(vq.step))
            vq(z)
        return vq

    options = {"init_step": 2, "restart_every": 4}
    whole = run(quantizer(**options), passes)
    half = run(quantizer(**options), passes[:5])
    other = quantizer(**options)
    other.load_state_dict(half.state_dict())
    resumed = run(other, passes[5:])
    assert all(
        torch.equal(a, b)
        for a, b in zip(whole.state_dict().values(), resumed.state_dict().values(), strict=True)
    )
    assert not torch.equal(half.codebook.weight, resumed.codebook.weight)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"restart_every": 0}, "restart_every is 0"),
        ({"init_step": -1}, "init_step is -1"),
        ({"restart_until": 5}, "give restart_every"),
    ],
)
def test_options_that_mean_nothing(options: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        VectorQuantizer(8, 4, **options)  # type: ignore[arg-type]
