"""Keys of the convolutional halves of Open-MAGVIT2, WeTok and BitDance, theirs <-> ours.

Their decoders number levels from the finest; ours run them from the coarsest.
"""

from tessellar.interop.keys import KeyTable, table

_BLOCK = {"nin_shortcut.{tensor}": "shortcut.{tensor}", "{layer}.{tensor}": "{layer}.{tensor}"}


def binary_cnn_keys(levels: int, prefix: str = "") -> KeyTable:
    """The table of both halves of that many levels, whose official keys begin with `prefix`."""
    pairs: dict[str, str] = {}
    for side in ("encoder", "decoder"):
        for a, b in _BLOCK.items():
            pairs[f"{prefix}{side}.mid_block.{{i}}.{a}"] = f"{side}.mid.{{i}}.{b}"
        for layer in ("conv_in", "norm_out", "conv_out"):
            pairs[f"{prefix}{side}.{layer}.{{tensor}}"] = f"{side}.{layer}.{{tensor}}"
    for level in range(levels):
        down = f"{prefix}encoder.down.{level}"
        up = f"{prefix}decoder.up.{level}"
        own = f"decoder.levels.{levels - 1 - level}"
        for a, b in _BLOCK.items():
            pairs[f"{down}.block.{{i}}.{a}"] = f"encoder.levels.{level}.res.{{i}}.{b}"
            pairs[f"{up}.block.{{i}}.{a}"] = f"{own}.res.{{i}}.{b}"
        pairs[f"{down}.downsample.{{tensor}}"] = f"encoder.levels.{level}.resample.{{tensor}}"
        pairs[f"{up}.upsample.conv1.{{tensor}}"] = f"{own}.upsample.conv.{{tensor}}"
        adaptive = f"{prefix}decoder.adaptive.{level}"
        pairs[f"{adaptive}.{{layer}}.{{tensor}}"] = f"{own}.adaptive.{{layer}}.{{tensor}}"
    return table(pairs)
