"""What identifies a model for things made with it (caches of tokens): its config and its weights."""

import hashlib
import json

from torch import nn

from tessellar.checkpoints.weights import fingerprint
from tessellar.protocol.configured import Configured


def model_fingerprint(model: nn.Module) -> str:
    """16 hex digits over the config and all tensors of a Configured module; the same wherever it was loaded from."""
    if not isinstance(model, Configured):
        raise TypeError(f"{type(model).__name__} has no config")
    facts = json.dumps([model.config, fingerprint(model)], sort_keys=True)
    return hashlib.sha256(facts.encode()).hexdigest()[:16]
