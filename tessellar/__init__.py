"""Image tokenizers and autoregressive image generators behind one layout and one protocol.

    import tessellar

    generator = tessellar.load_generator("runs/shapes-generator/export")
    images = generator.sample(classes=["circle", 3], guidance=1.5, seed=0)  # PIL images
    images[0].save("circle.png")

    tokenizer = tessellar.load_tokenizer("runs/shapes-tokenizer/export")
    tokens = tokenizer.encode(images)  # PIL images, uint8, or floats [B, 3, H, W] in [-1, 1]
    again = tokenizer.decode(tokens)  # floats [B, 3, H, W], about [-1, 1]

Models are exports of `tessellar train`, checkpoints, hub ids, or published checkpoints by name
(`llamagen/c2i-b-256`; `tessellar list weights`). `tessellar.load` takes both kinds;
`generator.class_names` lists what can be asked for. Mistakes raise `tessellar.errors.UserError`, a
ValueError that says in one line what would be right.

Importing this package imports nothing heavy; the functions import torch when they are called.

`tessellar/tokenizers` and `tessellar/models` are symbolic links to the folders of the same name at
the checkout's root, where they can be read and edited without shadowing Hugging Face's package
`tokenizers`. git, wheels and sdists carry them; a zip download, or a checkout on Windows without
`core.symlinks`, may turn the links into small text files. Then this package cannot be imported from
that folder: clone with symbolic links enabled, or install the wheel.
"""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from tessellar.pipeline import ImageGenerator
    from tessellar.protocol.tokenizer import Tokenizer

__all__ = ["load", "load_generator", "load_tokenizer"]


def load(
    path: "str | Path",
    *,
    device: "str | torch.device" = "cpu",
    dtype: "torch.dtype | None" = None,
    raw: bool = False,
    trust: "Sequence[str]" = (),
) -> "Tokenizer | ImageGenerator":
    """A tokenizer or an image generator from an export's folder, its safetensors file, a `.ckpt`,
    a hub id `owner/name[@revision]`, or a published checkpoint by its name (`tessellar list weights`).

    On `device`, in `dtype` (default: as stored), in eval mode. Checkpoints give their averaged (EMA)
    weights unless `raw`. Only classes of this package are built, and of the packages that `trust`
    names, whose code runs. Raises `tessellar.errors.UserError`, a ValueError, where nothing that
    fits can be loaded.
    """
    from tessellar.checkpoints.zoo import is_published

    if is_published(path):
        from tessellar.cli.importing import load_published

        return load_published(str(path), device=device, dtype=dtype)
    from tessellar.pipeline import load as load_model

    return load_model(path, device=device, dtype=dtype, raw=raw, trust=trust)


def load_generator(
    path: "str | Path",
    *,
    device: "str | torch.device" = "cpu",
    dtype: "torch.dtype | None" = None,
    raw: bool = False,
    trust: "Sequence[str]" = (),
) -> "ImageGenerator":
    """As `load`, but only an image generator will do."""
    from tessellar.checkpoints.zoo import is_published

    if is_published(path):
        from tessellar.cli.importing import load_published_generator

        return load_published_generator(str(path), device=device, dtype=dtype)
    from tessellar.pipeline import load_generator as load_model

    return load_model(path, device=device, dtype=dtype, raw=raw, trust=trust)


def load_tokenizer(
    path: "str | Path",
    *,
    device: "str | torch.device" = "cpu",
    dtype: "torch.dtype | None" = None,
    raw: bool = False,
    trust: "Sequence[str]" = (),
    image_size: "tuple[int, int] | None" = None,
) -> "Tokenizer":
    """As `load`, but only a tokenizer will do.

    `image_size` (height, width) makes a convolutional one take images of that size, rectangles too.
    """
    from tessellar.checkpoints.zoo import is_published

    if is_published(path):
        from tessellar.cli.importing import load_published_tokenizer

        return load_published_tokenizer(
            str(path), device=device, dtype=dtype, image_size=image_size
        )
    from tessellar.pipeline import load_tokenizer as load_model

    return load_model(path, device=device, dtype=dtype, raw=raw, trust=trust, image_size=image_size)


def _check_links(package: Path) -> None:
    """Raise ImportError where a link of the package was checked out as a text file."""
    broken = [name for name in ("tokenizers", "models", "configs") if (package / name).is_file()]
    if broken:
        raise ImportError(
            f"{package / broken[0]} should be a symbolic link but is a text file, as zip downloads and Windows "
            "checkouts make it: clone with symbolic links enabled (git config core.symlinks true), or install the wheel"
        )


_check_links(Path(__file__).parent)
