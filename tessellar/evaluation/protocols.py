"""Named protocols: everything that a published number fixes and that a reader cannot see in "FID
2.31".

| name           | samples | labels       | network, resize          | reference    | Inception Score |
|----------------|---------|--------------|--------------------------|--------------|-----------------|
| adm-50k        | 50,000  | 50 a class   | Inception, tf1-bilinear  | train (ADM)  | blocks of 5,000 |
| llamagen       | 50,000  | drawn        | Inception, tf1-bilinear  | train (ADM)  | blocks of 5,000 |
| torch-fidelity | 50,000  | 50 a class   | Inception, tf1-bilinear  | train        | 10, shuffled    |
| clean-fid      | 50,000  | 50 a class   | Inception, clean-bicubic | train        | 10, shuffled    |
| rfid-val       | 50,000  | as the data  | Inception, tf1-bilinear  | val          | 10, shuffled    |
| fdr6           | 50,000  | 50 a class   | the six of FDr^6         | train        | 10, shuffled    |
| fmnist-10k     | 10,000  | 1,000 a class| fmnist-resnet10t         | train        | 10, shuffled    |
| free           | any     | any          | any                      | any          | 10, shuffled    |

All of them round to 8 bits in one place (`tessellar.images.to_uint8`) and divide covariances by N -
1. A small set of one's own gets a protocol of its own by `small`.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from tessellar.errors import UserError
from tessellar.measures.inception_score import SplitRule
from tessellar.networks.standard import FDR6

Metric = Literal[
    "fd",
    "sfd",
    "is",
    "kid",
    "pr",
    "accuracy",
    "paired",
    "lpips",
    "mind",
    "cmmd",
    "dc",
    "fdinf",
    "fdr",
]
HELD_OUT = "held-out"
"""The split of validation images that are a share of the training set."""
LabelPlan = Literal["balanced", "random", "data", "any"]


@dataclass(frozen=True)
class Protocol:
    """What is fixed; None and "any" leave it to the user, and the record says what was taken."""

    name: str
    samples: int | None = None
    labels: LabelPlan = "any"
    network: str = "any"
    resize: str = "any"
    reference: Literal["train", "val", "any"] = "any"
    is_splits: SplitRule = "10-shuffled"
    metrics: tuple[Metric, ...] = ("fd",)
    networks: tuple[str, ...] = ()

    def describe(self) -> dict[str, Any]:
        """Plain data for records; which metrics are computed does not change their values."""
        facts = {key: value for key, value in asdict(self).items() if key != "metrics"}
        if not self.networks:  # as records of the first protocols have it
            del facts["networks"]
        return facts

    def check(
        self,
        samples: int,
        labels: str,
        network: str,
        resize: str,
        split: str | None,
        measured: str | None = None,
    ) -> list[str]:
        """Raise UserError where a known fact disagrees; returns warnings about facts that a file
        does not tell.

        `split` is the reference's, `measured` that of the images themselves, where they are of a
        data set.
        """
        if self.reference == "val" and HELD_OUT in (split, measured):
            raise UserError(
                f"protocol {self.name} needs the validation images of the data set; these are held out of its training "
                "images: name the validation set (val_root, val_split or val_shards), or take --protocol free"
            )
        self._require("samples", self.samples, samples)
        self._require("network", self.network, network)
        self._require("resize", self.resize, resize)
        warnings = []
        for what, wanted, given in (
            ("labels", self.labels, labels),
            ("reference", self.reference, split or "unknown"),
        ):
            if given == "unknown" and wanted != "any":
                warnings.append(
                    f"protocol {self.name} needs {what}: {wanted}; this cannot be told from the files"
                )
            else:
                self._require(what, wanted, given)
        return warnings

    def check_networks(self, names: Sequence[str]) -> None:
        """Raise UserError where the protocol has its own networks, and these are others."""
        if self.networks:
            wanted = ", ".join(sorted(self.networks))
            self._require("networks", wanted, ", ".join(sorted(names)))

    def _require(self, what: str, wanted: Any, given: Any) -> None:
        if wanted not in (None, "any", given):
            raise UserError(
                f"protocol {self.name} needs {what}: {wanted}; given is {given} (--protocol free fixes nothing)"
            )


def small(name: str, samples: int, network: str, metrics: tuple[Metric, ...] = ("fd",)) -> Protocol:
    """A protocol for a data set of one's own: class-balanced samples against all training images."""
    return Protocol(name, samples, "balanced", network, "any", "train", metrics=metrics)


_GENERATION = Protocol(
    "", 50_000, "balanced", "inception", "tf1-bilinear", "train", metrics=("fd", "is")
)


def _generation(name: str, **changes: Any) -> Protocol:
    return Protocol(**{**asdict(_GENERATION), "name": name, **changes})


PROTOCOLS = {
    p.name: p
    for p in (
        _generation("adm-50k", is_splits="blocks-of-5000", metrics=("fd", "sfd", "is", "pr")),
        _generation(
            "llamagen",
            labels="random",
            is_splits="blocks-of-5000",
            metrics=("fd", "sfd", "is", "pr"),
        ),
        _generation("torch-fidelity"),
        _generation("clean-fid", resize="clean-bicubic", metrics=("fd", "kid")),
        _generation("rfid-val", labels="data", reference="val", metrics=("fd", "paired")),
        _generation(
            "fdr6",
            network="any",
            resize="any",
            networks=FDR6,
            metrics=("fd", "fdr", "is", "pr"),
        ),
        small("fmnist-10k", 10_000, "fmnist-resnet10t", ("fd", "is", "pr", "accuracy")),
        Protocol("free", metrics=("fd",)),
    )
}


def protocol(name: str) -> Protocol:
    """The protocol of that name; raises UserError, listing the names, for an unknown one."""
    if name not in PROTOCOLS:
        raise UserError(f"protocol {name!r} does not exist; there are {', '.join(PROTOCOLS)}")
    return PROTOCOLS[name]
