"""Keys of the CNN of the MaskGIT-VQGAN (arXiv 2202.04200), which TiTok decodes with and ResTok
begins and ends with.
"""


def half(theirs: str, ours: str, group: str) -> dict[str, str]:
    """Pairs of its encoder or decoder; `group` is the official name of its levels."""
    return {
        f"{theirs}.{group}.{{i}}.block.{{j}}.nin_shortcut.{{tensor}}": f"{ours}.levels.{{i}}.{{j}}.shortcut.{{tensor}}",
        f"{theirs}.{group}.{{i}}.block.{{j}}.{{layer}}.{{tensor}}": f"{ours}.levels.{{i}}.{{j}}.{{layer}}.{{tensor}}",
        f"{theirs}.mid.{{i}}.nin_shortcut.{{tensor}}": f"{ours}.mid.{{i}}.shortcut.{{tensor}}",
        f"{theirs}.mid.{{i}}.{{layer}}.{{tensor}}": f"{ours}.mid.{{i}}.{{layer}}.{{tensor}}",
        **{
            f"{theirs}.{name}.{{tensor}}": f"{ours}.{name}.{{tensor}}"
            for name in ("conv_in", "norm_out", "conv_out")
        },
    }


def upsampling(theirs: str, ours: str, levels: int) -> dict[str, str]:
    """The official decoder names these after the level before them, counted from the finest."""
    return {
        f"{theirs}.up.{i}.upsample_conv.{{tensor}}": f"{ours}.upsample.{i - 1}.conv.{{tensor}}"
        for i in range(1, levels)
    }
