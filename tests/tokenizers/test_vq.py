"""Vector quantization: nearest codes, straight-through gradients, codes that stay in use."""

import pytest
import torch
from torch.nn import functional as F

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


def test_quantization_is_float32_under_autocast() -> None:
    vq, z = quantizer().eval(), torch.randn(2, 50, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = vq(z)
    assert mixed.quantized.dtype == torch.float32 and torch.equal(mixed.tokens, vq.encode(z))
