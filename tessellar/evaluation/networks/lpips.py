"""LPIPS (arXiv 1801.03924) through torchmetrics, whose package holds the linear heads on top of the
backbone.

The backbone is torchvision's VGG-16 or AlexNet; papers on tokenizers report VGG. Its weights come
from a file, so that LPIPS also works offline, or from torchvision's download.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Literal
from urllib.error import URLError

from torch import Tensor, nn

from tessellar.checkpoints.weights import load_strict
from tessellar.errors import UserError
from tessellar.tensor_files import read_state

Backbone = Literal["vgg", "alex"]


def load_lpips(weights: str | Path | None = None, backbone: Backbone = "vgg") -> nn.Module:
    """A frozen module (x, y in [-1, 1], [B, 3, H, W]) -> distances [B, 1, 1, 1].

    `weights` is torchvision's file for the backbone (.pth or .safetensors); without it they are
    downloaded. Raises UserError where neither works.
    """
    # Slow to import, and seldom needed.
    from torchmetrics.functional.image.lpips import _LPIPS

    if weights is not None:
        network = _LPIPS(net=backbone, pnet_rand=True)
        load_strict(network.net, backbone_state(Path(weights), network.net), str(weights))
        return network.requires_grad_(False)
    try:
        return _LPIPS(net=backbone).requires_grad_(False)
    except (URLError, OSError, RuntimeError) as error:
        raise UserError(
            f"the {backbone} weights of LPIPS cannot be downloaded ({error}); give torchvision's file: "
            "--lpips_weights FILE"
        ) from error


def backbone_state(path: Path, backbone: nn.Module) -> Mapping[str, Tensor]:
    """Tensors of a torchvision file (`features.0.weight`) under the backbone's names
    (`slice1.0.weight`).
    """
    state = read_state(path)
    theirs = {name: f"features.{name.split('.', 1)[1]}" for name in backbone.state_dict()}
    return {ours: state[name] for ours, name in theirs.items() if name in state}
