"""How layers start: the published constant at published widths, and a rule that follows the width
below them.
"""

from torch import nn

STD = 0.02  # of ViT, GPT-2 and of the tokenizers that follow them


def start_layers(module: nn.Module, kinds: tuple[type, ...], small: bool) -> None:
    """Weights of the layers of `kinds` within: truncated normal of 0.02, in a `small` model torch's
    default; biases 0.

    A constant suits the widths that it was published for. A layer multiplies its input's deviation by about
    std * sqrt(fan_in): 0.45 for 0.02 and 512 inputs, but 0.2 for 96, and after a few such layers latents of different
    images are the same (docs/tokenizers.md, ReToK). Torch's default, uniform of deviation (3 fan_in)^-0.5, makes that
    0.58 at every width.
    """
    for part in module.modules():
        if not isinstance(part, kinds):
            continue
        if small:
            part.reset_parameters()  # type: ignore[operator]
        else:
            nn.init.trunc_normal_(part.weight, std=STD)  # type: ignore[arg-type]
        if part.bias is not None:
            nn.init.zeros_(part.bias)  # type: ignore[arg-type]
