"""LPIPS (arXiv 1801.03924): distance of VGG-16 features, as a frozen loss whose weights are
injected.

The VGG-16 weights (ImageNet classification, torchvision's `vgg16`) come from a path; the small
linear heads ship with torchmetrics. Always in eval mode: the official LlamaGen training leaves
dropout on the feature differences switched on, which is not copied.
"""

from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tessellar.absent import stays_random
from tessellar.checkpoints.weights import load_strict
from tessellar.errors import UserError
from tessellar.layers.precision import ExactTables, at_least_float32
from tessellar.tensor_files import read_state

CHANNELS = (64, 128, 256, 512, 512)
LAYERS = (2, 2, 3, 3, 3)  # convolutions before each read-out
MEAN = (-0.030, -0.088, -0.188)
STD = (0.458, 0.448, 0.450)  # for inputs in [-1, 1]


class VGGFeatures(nn.Module):
    """VGG-16's convolutions; features after relu1_2, 2_2, 3_3, 4_3, 5_3. Keys as torchvision's
    `features`.
    """

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        self.reads: list[int] = []
        previous = 3
        for width, count in zip(CHANNELS, LAYERS, strict=True):
            for _ in range(count):
                layers += [nn.Conv2d(previous, width, 3, padding=1), nn.ReLU()]
                previous = width
            self.reads.append(len(layers) - 1)
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers[:-1])

    def forward(self, x: Tensor) -> list[Tensor]:
        outputs = []
        for number, layer in enumerate(self.features):
            x = layer(x)
            if number in self.reads:
                outputs.append(x)
        return outputs


class LPIPS(ExactTables):
    """Distance [B] of images [B, 3, H, W] in [-1, 1].

    `vgg` is a path to torchvision's VGG-16 weights (.pth or .safetensors); `heads` to LPIPS's
    linear heads, by default the ones inside torchmetrics. Raises UserError where a file is missing.
    """

    def __init__(self, vgg: str, heads: str | None = None) -> None:
        super().__init__()
        self.backbone = VGGFeatures()
        self.heads = nn.ModuleList(nn.Conv2d(width, 1, 1, bias=False) for width in CHANNELS)
        self.register_buffer("mean", torch.tensor(MEAN).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(STD).view(1, 3, 1, 1), persistent=False)
        self.mean: Tensor
        self.std: Tensor
        if not stays_random(vgg):
            self._read(vgg, heads)
        self.eval().requires_grad_(False)

    def _read(self, vgg: str, heads: str | None) -> None:
        """The weights of both files."""
        if not Path(vgg).is_file():
            raise UserError(
                f"the perceptual loss needs torchvision's VGG-16 weights; there is no file {vgg}. Give their path, or "
                "set the perceptual weight to 0"
            )
        state = {k: v for k, v in read_state(Path(vgg)).items() if k.startswith("features.")}
        load_strict(self.backbone, state, vgg)
        of_heads = Path(heads) if heads else bundled_heads()
        lines = {}
        # Theirs are lin0.model.1.weight, ...
        for key, tensor in read_state(of_heads).items():
            lines[f"{key.split('.')[0].removeprefix('lin')}.weight"] = tensor
        load_strict(self.heads, lines, str(of_heads))

    def train(self, mode: bool = True) -> "LPIPS":
        """Stays in eval mode."""
        return super().train(False)

    def forward(self, images: Tensor, reconstruction: Tensor) -> Tensor:
        ours = self.features(images)
        theirs = self.features(reconstruction)
        # Products, not convolutions: under autocast the features may be bfloat16, their distance is
        # not.
        # LPIPS (arXiv 1801.03924, equation 1): channels of unit length, squared differences weighed
        # by the heads, means over the map, a sum over layers.
        distances = []
        for a, b, weight in zip(ours, theirs, self.heads.parameters(), strict=True):
            weighed = (_unit(a) - _unit(b)).square() * weight[0]
            distances.append(weighed.sum(1).mean(dim=(1, 2)))
        return torch.stack(distances).sum(0)

    def features(self, images: Tensor) -> list[Tensor]:
        """Maps of the layers that are compared, of images [B, 3, H, W] in [-1, 1]."""
        return self.backbone(((images - self.mean) / self.std).to(images.dtype))


def _unit(x: Tensor) -> Tensor:
    return F.normalize(at_least_float32(x), dim=1, eps=1e-10)


def bundled_heads() -> Path:
    spec = find_spec("torchmetrics")
    assert spec is not None and spec.origin is not None, (
        "torchmetrics is a dependency of this package"
    )
    return Path(spec.origin).parent / "functional/image/lpips_models/vgg.pth"
