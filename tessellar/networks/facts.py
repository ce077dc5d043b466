"""What a network is: architecture, input, purpose, hash; and that an evaluation network never
teaches.
"""

import hashlib
import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from tessellar.errors import UserError
from tessellar.tensor_files import read_metadata

# Class names of the sets that the published networks were trained on (tests compare them with the
# sets').
FASHION_MNIST = (
    "t-shirt",
    "trouser",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "ankle boot",
)
SHAPES = (
    "circle",
    "square",
    "triangle",
    "star",
    "cross",
    "ring",
    "diamond",
    "hexagon",
    "heart",
    "crescent",
)

Purpose = Literal["evaluator", "teacher"]


PURPOSE: Purpose = "evaluator"


KEY = "tessellar.evaluator"


@dataclass(frozen=True)
class NetworkFacts:
    """A timm network and its input.

    `arch` and `options` are a network of `timm_networks.py`; images are brought to `image_size` by
    `resize` ("none": they must have that size), scaled to [0, 1], then (x - mean) / std. `training`
    says how the network came about, `purpose` whether it measures or teaches: never both.
    `class_names` are those of its classes, in their order; empty where they are not known.
    """

    name: str
    arch: str
    num_classes: int
    image_size: tuple[int, int]
    resize: Literal["none", "clean-bicubic", "tf1-bilinear"] = "none"
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    options: dict[str, int | float | bool | str] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    purpose: Purpose = PURPOSE
    class_names: tuple[str, ...] = ()

    def to_metadata(self) -> dict[str, str]:
        """Metadata of a safetensors file, by which it describes itself."""
        return {"format": "pt", "purpose": self.purpose, KEY: json.dumps(asdict(self))}

    @classmethod
    def from_metadata(cls, metadata: dict[str, str], path: Path) -> "NetworkFacts":
        """Inverse of `to_metadata`; raises UserError, naming the file, where the metadata says
        nothing.
        """
        if KEY not in metadata:
            raise UserError(
                f"{path} does not say what network it holds; describe it: --network.name NAME --network.arch ARCH "
                "--network.num_classes N --network.image_size '[H,W]'"
            )
        try:
            content = json.loads(metadata[KEY])
            known: dict[str, Any] = {
                f.name: content[f.name] for f in fields(cls) if f.name in content
            }
            tuples: dict[str, Any] = {
                key: tuple(value) for key, value in known.items() if isinstance(value, list)
            }
            return cls(**(known | tuples))
        except (json.JSONDecodeError, TypeError) as error:
            raise UserError(f"the metadata of {path} cannot be read: {error}") from error


PUBLISHED = {
    "43f238abeabdb286f702debb9ca403307f25d4f5c942d9994bc2d5abc7b0ef1c": NetworkFacts(
        name="fmnist-resnet10t",
        arch="resnet10t",
        num_classes=10,
        image_size=(32, 32),
        options={"in_chans": 3, "output_stride": 8},
        training={"data": "Fashion-MNIST, 28 x 28 zero-padded to 32 x 32", "test_accuracy": 0.9115},
        class_names=FASHION_MNIST,
    ),
    "12d5a442ecc2b6f9d61acf61240e226889418c9362f3c3cd19b8a5603d5e5b84": NetworkFacts(
        name="shapes-test_resnet",
        arch="test_resnet",
        num_classes=10,
        image_size=(24, 24),
        training={"data": "shapes", "val_accuracy": 0.9995},
        class_names=SHAPES,
    ),
}


"""Published networks whose files do not say all of this, by the SHA-256 of the file."""


def sha256_of(path: Path) -> str:
    """Hash of a file's content."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def refuse_evaluator(path: str | Path) -> None:
    """Raise UserError if a weights file is a network that measures: it may not teach, select or
    reject samples.

    Whatever loads a teacher, a feature loss or a scorer calls this first; else a model is trained
    for its own exam.
    """
    path = Path(path)
    if path.suffix != ".safetensors" or not path.is_file():
        return
    if read_metadata(path).get("purpose") == PURPOSE or sha256_of(path) in PUBLISHED:
        raise UserError(
            f"{path} is a network for evaluation; a loss, a teacher or a filter of samples may not use it"
        )
