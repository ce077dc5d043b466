"""Alignment: methods by which a trained generator is made better by rewards or contrasts, after
training. A YAML chooses one for `tessellar.training.alignment_module.AlignmentModule`.
"""

from tessellar.training.alignment.cca import CCA
from tessellar.training.alignment.grpo import GRPO
from tessellar.training.alignment.leave_one_out import LeaveOneOutFrechet
from tessellar.training.alignment.rewards import (
    ClassifierReward,
    CLIPScore,
    ReconstructionReward,
)
from tessellar.training.alignment.va_pi import DecoderTuning, StraightThrough, VAPi

__all__ = [
    "CCA",
    "GRPO",
    "CLIPScore",
    "ClassifierReward",
    "DecoderTuning",
    "LeaveOneOutFrechet",
    "ReconstructionReward",
    "StraightThrough",
    "VAPi",
]
