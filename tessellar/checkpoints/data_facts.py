"""What a run is trained on, as its checkpoints and `run.json` keep it: which class has which id,
and which images.

Plain data in a checkpoint under DATA_KEY. A resume compares it with the data it is given; whoever
needs names of classes for a checkpoint's ids reads them here (`facts_in`).
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from tessellar.errors import UserError

DATA_KEY = "training_data"
PARTS = {"train": "training", "val": "validation"}


@dataclass(frozen=True)
class DataFacts:
    """`class_names[k]` is the class with id k; fingerprints (16 hex digits) are those of the part's
    content.
    """

    name: str
    class_names: tuple[str, ...]
    image_size: tuple[int, int]
    train: str
    val: str

    def as_dict(self) -> dict[str, Any]:
        """Plain data for a checkpoint or JSON."""
        return asdict(self) | {
            "class_names": list(self.class_names),
            "image_size": list(self.image_size),
        }


def facts_in(checkpoint: Any, where: str) -> DataFacts | None:
    """What a checkpoint says it was trained on; None where it says nothing (older ones, or data of
    another kind).

    Raises UserError for an entry that is not one of ours.
    """
    entry = checkpoint.get(DATA_KEY) if isinstance(checkpoint, Mapping) else None
    if entry is None:
        return None
    try:
        facts = DataFacts(
            name=entry["name"],
            class_names=tuple(entry["class_names"]),
            image_size=tuple(entry["image_size"]),
            train=entry["train"],
            val=entry["val"],
        )
    except (KeyError, TypeError) as error:
        raise UserError(
            f"{where}: what it says of its data ({DATA_KEY}) cannot be read: {error!r}"
        ) from error
    texts = (facts.name, facts.train, facts.val, *facts.class_names)
    if not all(isinstance(text, str) for text in texts):
        raise UserError(f"{where}: what it says of its data ({DATA_KEY}) is not text")
    return facts


def other_class(then: tuple[str, ...], now: tuple[str, ...]) -> str | None:
    """The first difference of two lists of classes, or None.

    Of two sets with one class the names are not compared: they are those of the folder or the set,
    which may move.
    """
    if then == now or len(then) == len(now) == 1:
        return None
    counts = "" if len(then) == len(now) else f" ({len(then)} classes then, {len(now)} now)"
    for label, (old, new) in enumerate(zip(then, now, strict=False)):
        if old != new:
            return f"class {label} was {old!r} and is now {new!r}{counts}"
    label = min(len(then), len(now))
    if len(then) > len(now):
        return f"class {label} was {then[label]!r} and is gone{counts}"
    return f"class {label} is new: {now[label]!r}{counts}"


def other_content(then: DataFacts, now: DataFacts) -> str | None:
    """Which samples are others, for example `training and validation data`; None where all are the
    same.
    """
    changed = [name for part, name in PARTS.items() if getattr(then, part) != getattr(now, part)]
    return f"{' and '.join(changed)} data" if changed else None
