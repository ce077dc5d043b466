"""tessellar: image tokenizers and autoregressive image generators behind one layout and one
protocol.

`tessellar/tokenizers` and `tessellar/models` are symbolic links to the folders of the same name at
the checkout's root, where they can be read and edited without shadowing Hugging Face's package
`tokenizers`. git, wheels and sdists carry them; a zip download, or a checkout on Windows without
`core.symlinks`, may turn the links into small text files. Then this package cannot be imported from
that folder: clone with symbolic links enabled, or install the wheel.

Importing this package imports nothing heavy; `tessellar.load` imports torch when it is called.
"""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tessellar.pipeline import ImageGenerator
    from tessellar.protocol.tokenizer import Tokenizer


def load(
    path: "str | Path", *, raw: bool = False, trust: "Sequence[str]" = ()
) -> "Tokenizer | ImageGenerator":
    """A tokenizer or an image generator from an export's folder, its safetensors file, a `.ckpt`,
    or a hub id.

    Checkpoints give their averaged (EMA) weights unless `raw`. Only classes of this package are
    built, and of the packages that `trust` names, whose code runs. On the CPU, in eval mode. Raises
    `tessellar.errors.UserError` where nothing that fits can be loaded.
    """
    from tessellar.pipeline import load as load_model

    return load_model(path, raw=raw, trust=trust)


def _check_links(package: Path) -> None:
    """Raise ImportError where a link of the package was checked out as a text file."""
    broken = [name for name in ("tokenizers", "models", "configs") if (package / name).is_file()]
    if broken:
        raise ImportError(
            f"{package / broken[0]} should be a symbolic link but is a text file, as zip downloads and Windows "
            "checkouts make it: clone with symbolic links enabled (git config core.symlinks true), or install the wheel"
        )


_check_links(Path(__file__).parent)
