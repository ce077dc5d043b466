"""PatchGAN discriminator (pix2pix, arXiv 1611.07004; as taming-transformers and LlamaGen use it).

Different from their code: in several processes its batch norms see the batch of all of them.
"""

from torch import Tensor, nn

from tessellar.layers.batch_norm import BatchNorm2d
from tessellar.protocol.configured import Configured


class PatchGAN(Configured, nn.Module):
    """Images [B, 3, H, W] to logits [B, 1, h, w]; `depth` strided stages. 2,765,633 parameters at
    the defaults.
    """

    def __init__(self, channels: int = 64, depth: int = 3, in_channels: int = 3) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(in_channels, channels, 4, 2, 1), nn.LeakyReLU(0.2)]
        previous = channels
        for stage in range(1, depth + 1):
            width = channels * min(2**stage, 8)
            stride = 2 if stage < depth else 1
            layers += [
                nn.Conv2d(previous, width, 4, stride, 1, bias=False),
                BatchNorm2d(width),
                nn.LeakyReLU(0.2),
            ]
            previous = width
        layers.append(nn.Conv2d(previous, 1, 4, 1, 1))
        self.main = nn.Sequential(*layers)
        self.init_weights()

    def init_weights(self) -> None:
        """Convolutions N(0, 0.02); batch-norm weights N(1, 0.02), biases 0."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0.0, 0.02)
            elif isinstance(module, nn.BatchNorm2d):
                nn.init.normal_(module.weight, 1.0, 0.02)
                nn.init.zeros_(module.bias)

    def forward(self, images: Tensor) -> Tensor:
        return self.main(images.contiguous())
