"""What a network is: architecture, input, purpose, hash; and that an evaluation network never
teaches.
"""

import hashlib
import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import nn

from tessellar.errors import UserError
from tessellar.plain_data import parse_json
from tessellar.protocol.ranges import check_name, check_number, check_whole
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
Resize = Literal["none", "clean-bicubic", "tf1-bilinear", "torch-bicubic", "pil-bicubic"]
Readout = Literal["pooled", "class-token", "mean-map", "head"]
Precision = Literal["float32", "bf16"]
MAX_SIDE = 4096
MAX_CLASSES = 1_000_000
MAX_TEXT = 500


PURPOSE: Purpose = "evaluator"


KEY = "tessellar.evaluator"


@dataclass(frozen=True)
class NetworkFacts:
    """A timm network and its input.

    `arch` and `options` are a network of `timm_networks.py`; images are brought to `image_size` by
    `resize` ("none": they must have that size), scaled to [0, 1], then (x - mean) / std. `training`
    says how the network came about, `purpose` whether it measures or teaches: never both.
    `class_names` are those of its classes, in their order; empty where they are not known.
    `readout` is what its features are: the vector in front of the classifier ("pooled"), the first
    token ("class-token"), the mean of the last map ("mean-map"), or what its last layer gives
    ("head": a projection, so no classes). `precision` is that of its arithmetic.
    """

    name: str
    arch: str
    num_classes: int
    image_size: tuple[int, int]
    resize: Resize = "none"
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    options: dict[str, int | float | bool | str] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    purpose: Purpose = PURPOSE
    class_names: tuple[str, ...] = ()
    readout: Readout = "pooled"
    precision: Precision = "float32"

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
        where = f"the metadata of {path}"
        content = parse_json(metadata[KEY], where)
        if not isinstance(content, dict):
            raise UserError(f"{where} is a {type(content).__name__}, not a mapping")
        known: dict[str, Any] = {f.name: content[f.name] for f in fields(cls) if f.name in content}
        tuples: dict[str, Any] = {
            key: tuple(value) for key, value in known.items() if isinstance(value, list)
        }
        try:
            facts = cls(**(known | tuples))
        except TypeError as error:
            raise UserError(f"{where} cannot be read: {error}") from error
        facts.check(where)
        return facts

    def check(self, where: str) -> None:
        """Raise UserError, naming the entry, for what describes no network; `where` is the file."""
        words = (self.name, self.arch, self.resize, self.purpose, self.readout, self.precision)
        texts = (*words, *self._sequence("class_names"))
        if not all(isinstance(text, str) and len(text) <= MAX_TEXT for text in texts):
            raise UserError(
                f"{where}: name, arch, resize, purpose, readout, precision and class_names must be texts"
            )
        check_name(f"{where}: resize", self.resize, get_args(Resize))
        check_name(f"{where}: readout", self.readout, get_args(Readout))
        check_name(f"{where}: precision", self.precision, get_args(Precision))
        check_name(f"{where}: purpose", self.purpose, get_args(Purpose))
        check_whole(f"{where}: num_classes", self.num_classes, least=0, most=MAX_CLASSES)
        sizes = {"image_size": 2, "mean": 3, "std": 3}
        for name, count in sizes.items():
            if len(self._sequence(name)) != count:
                raise UserError(
                    f"{where}: {name} is {getattr(self, name)!r:.80}; it has {count} numbers"
                )
        for side in self.image_size:
            check_whole(f"{where}: image_size", side, least=1, most=MAX_SIDE)
        for value in self.mean:
            check_number(f"{where}: mean", value)
        for value in self.std:
            check_number(f"{where}: std", value, above=0)

    def _sequence(self, name: str) -> tuple[Any, ...]:
        value = getattr(self, name)
        return tuple(value) if isinstance(value, (list, tuple)) else (value,)


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

INCEPTION = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
"""torch-fidelity's file of FID's network, by its SHA-256."""


@dataclass(frozen=True)
class UsedNetwork:
    """A network that selected samples, for their record: the SHA-256 of its file (empty without one), and
    `marks`: those of its largest tensors, which name it in any file.
    """

    name: str
    sha256: str = ""
    marks: tuple[str, ...] = ()


MARKS = 4
MARK_DIGITS = 16


def marks_of(network: nn.Module) -> tuple[str, ...]:
    """Hashes of the values of a network's largest tensors, whatever their names: two networks that share one
    share trained weights. What is constant (an initialisation with zeros) marks nothing.
    """
    matrices = []
    for tensor in network.state_dict().values():
        if tensor.is_floating_point() and tensor.ndim > 1:
            matrices.append(tensor.detach().cpu().float().contiguous())
    matrices.sort(key=lambda tensor: tensor.numel(), reverse=True)
    marks = []
    for tensor in matrices:
        if len(marks) < MARKS and bool((tensor != tensor.flatten()[0]).any()):
            values = tensor.flatten().view(torch.uint8).numpy()
            marks.append(hashlib.sha256(values).hexdigest()[:MARK_DIGITS])
    return tuple(marks)


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
    if not path.is_file():
        return
    says_so = path.suffix == ".safetensors" and read_metadata(path).get("purpose") == PURPOSE
    if says_so or sha256_of(path) in (*PUBLISHED, INCEPTION):
        raise UserError(
            f"{path} is a network for evaluation; a loss, a teacher or a filter of samples may not use it"
        )
