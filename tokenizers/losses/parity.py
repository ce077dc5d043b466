"""What replays of several tokenizers need of the losses."""

from collections.abc import Mapping
from typing import Any

import torch

from tessellar.tokenizers.losses.lecam import LeCam


def recorded_lecam(settings: Mapping[str, Any]) -> LeCam:
    """LeCam with the recorded running means of the logits before the step."""
    made = LeCam(settings["lecam_regularization_weight"], settings["lecam_ema_decay"])
    made.means = torch.tensor([settings["ema_real_logits_mean"], settings["ema_fake_logits_mean"]])
    return made
