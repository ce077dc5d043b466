"""`--extractor none`: no features, for measures of pixels alone (PSNR, SSIM, LPIPS), which need no
feature network.
"""

import torch
from torch import Tensor

from tessellar.evaluation.networks.extractors import Extractor, Features


class NoNetwork(Extractor):
    """Gives 0 features of images of any size."""

    name = "none"
    sha256 = ""
    dim = 0
    num_classes = 0
    resize = "any"

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("place", torch.empty(0), persistent=False)

    @property
    def device(self) -> torch.device:
        return next(self.buffers()).device

    def extract(self, images: Tensor) -> Features:
        nothing = torch.empty(len(images), 0, device=self.device)
        return Features(nothing, nothing)
