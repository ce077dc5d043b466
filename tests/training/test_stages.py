"""Token-Shuffle's three stages start from each other by `init_from`, with ever longer sequences of positions."""

from functools import partial
from pathlib import Path
from typing import Any

import torch

from tessellar.checkpoints.export import export_generator
from tessellar.models.token_shuffle import TokenShuffle
from tessellar.protocol.condition import Condition
from tessellar.protocol.distribution import Logits
from tessellar.tokenizers.quantizers.vq import VectorQuantizer
from tessellar.tokenizers.vit_vq import ViTVQ
from tessellar.training.generator_module import GeneratorModule


def stage(side: int, start: Path | None = None, fresh: tuple[str, ...] = (), **options: Any):
    """A text model on side x side codes."""
    torch.manual_seed(side)
    tokenizer = ViTVQ(VectorQuantizer(16, 4), 4 * side, 4, 16, 1, 1, 2)
    sizes = {"text_vocab": 300, "caption_length": 4, "tied": True, "ffn_multiple_of": 8, **options}
    generator = partial(TokenShuffle, width=16, depth=1, num_heads=2, **sizes)
    source = None if start is None else str(start)
    return GeneratorModule(tokenizer, generator, init_from=source, init_fresh=fresh)


def first_logits(module: GeneratorModule) -> torch.Tensor:
    """Of the first window, behind a text."""
    text = torch.tensor([[7, 8, 9, 11]])
    condition = Condition(ids=text, valid=torch.ones_like(text, dtype=torch.bool))
    generator = module.model.generator.eval()
    tokens = generator.layout.blank(1)
    with torch.no_grad():
        found = generator.predict(generator.start(condition), tokens)
    assert isinstance(found, Logits)
    return found.logits


def test_each_stage_takes_the_weights_of_the_one_before(tmp_path: Path) -> None:
    """4 x 4 codes without shuffle, 8 x 8 and 16 x 16 in windows of 2: 16, 16 and 64 positions, z-loss in the last."""
    first = stage(4, window=1, mlp_blocks=0)
    with torch.no_grad():
        for parameter in first.model.generator.parameters():
            parameter.normal_(std=0.3, generator=torch.Generator().manual_seed(2))
    path = export_generator(first.model, tmp_path / "512")
    second = stage(8, path, ("shuffle", "unshuffle"))
    shared = first.model.generator.state_dict()
    own = second.model.generator.state_dict()
    assert shared.keys() <= own.keys()
    assert all(torch.equal(own[name], tensor) for name, tensor in shared.items())
    new = own.keys() - shared.keys()
    assert {name.partition(".")[0] for name in new} == {"shuffle", "unshuffle"}

    path = export_generator(second.model, tmp_path / "1024")
    third = stage(16, path, z_loss=1e-5)
    assert third.model.generator.entities.count == 64
    # The same text, the same first window, however long the image is.
    torch.testing.assert_close(first_logits(third), first_logits(second))
    tokens = torch.zeros(1, 256, dtype=torch.int64)
    text = torch.tensor([[7, 8, 9, 11]])
    condition = Condition(ids=text, valid=torch.ones_like(text, dtype=torch.bool))
    losses = third.model.generator.loss(tokens, condition)
    assert float(losses["z"].detach()) > 0 and "z" not in second.model.generator.loss(
        tokens[:, :64], condition
    )
