"""Which feature network a name or a file means."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from tessellar.checkpoints.building import bounded
from tessellar.errors import UserError
from tessellar.evaluation.networks.extractors import Extractor
from tessellar.networks.facts import PUBLISHED, NetworkFacts, sha256_of
from tessellar.tensor_files import read_pickle, read_safetensors, require_file, say_unchecked

ALL_OF_FDR6 = "fdr6"


def load_extractors(
    sources: Sequence[str | Path], network: NetworkFacts | None = None, resize: str = "any"
) -> list[Extractor]:
    """Extractors for one pass, each by `load_extractor`; "fdr6" stands for the six of FDr^6.

    Raises UserError where two have one name, and for "none" or `network` beside several.
    """
    from tessellar.networks.standard import FDR6

    named: list[str | Path] = []
    for source in sources:
        named += FDR6 if str(source) == ALL_OF_FDR6 else [source]
    if len(named) > 1 and "none" in map(str, named):
        raise UserError("--extractor none stands alone: it says that no network is needed")
    if len(named) > 1 and network is not None:
        raise UserError(
            "--network describes one file; with several networks their files say themselves what they are, "
            "or are given as NAME=FILE"
        )
    if not named:
        raise UserError("--extractor names no network")
    extractors = [load_extractor(source, network, resize) for source in named]
    names = Counter(extractor.name for extractor in extractors)
    twice = [name for name, count in names.items() if count > 1]
    if twice:
        raise UserError(
            f"--extractor: {names[twice[0]]} networks are called {twice[0]!r}; give each once"
        )
    return extractors


def load_extractor(
    source: str | Path = "inception", network: NetworkFacts | None = None, resize: str = "any"
) -> Extractor:
    """An extractor: "inception" or a network of `networks/standard.py` (downloaded, or NAME=FILE), a
    file of Inception weights, a timm network's file, or "none".

    `resize` is for Inception alone: "tf1-bilinear" (also for "any") or "clean-bicubic". A timm
    network's file says in its metadata what it is, or is a published one that is known by its hash,
    or one that `network` describes. Raises UserError where none of this holds.
    """
    from tessellar.evaluation.networks.inception import Inception, is_inception
    from tessellar.evaluation.networks.no_network import NoNetwork
    from tessellar.networks.standard import STANDARD

    if str(source) == "none":
        return NoNetwork()
    if str(source) == "inception":
        return Inception.download(resize)
    if str(source) in STANDARD and not Path(source).exists():
        facts = STANDARD[str(source)]
        return described_network(fetch_weights(facts), facts)
    name, _, file = str(source).partition("=")
    if file and not Path(source).exists():
        if name == "inception":
            require_file(Path(file))
            return Inception.from_file(Path(file), resize)
        if name not in STANDARD:
            known = ", ".join(("inception", *STANDARD))
            raise UserError(f"{name!r} is not a network with a name; there are {known}")
        return described_network(Path(file), STANDARD[name])
    path = Path(source)
    if not path.exists() and not path.suffix:
        known = ", ".join(("inception", *STANDARD, ALL_OF_FDR6))
        raise UserError(
            f"--extractor {source}: the file does not exist, and networks with names are {known}"
        )
    require_file(path)
    if network is not None:
        network.check("--network")
    if path.suffix != ".safetensors":
        return (
            Inception.from_file(path, resize)
            if network is None
            else described_network(path, network)
        )
    state, metadata = read_safetensors(path)
    if is_inception(state):
        return Inception.from_file(path, resize)
    digest = sha256_of(path)
    facts = network or PUBLISHED.get(digest) or NetworkFacts.from_metadata(metadata, path)
    if "teacher" in (facts.purpose, metadata.get("purpose")):
        raise UserError(
            f"{path} is a network for teaching; a model that it taught may not be measured with it"
        )
    if digest not in PUBLISHED:  # else the file's own hash is its checksum
        say_unchecked(path, metadata)
    return _network(facts, state, digest, path)


def described_network(path: Path, facts: NetworkFacts) -> Extractor:
    """A timm network's file (safetensors, or of torch) that `facts` describe; raises UserError where
    it does not fit, or may not measure.
    """
    from tessellar.interop.files import unwrap
    from tessellar.networks.vision import ENTRIES

    require_file(path)
    if path.suffix != ".safetensors":
        state = unwrap(read_pickle(path), str(path), order=ENTRIES, evaluated=False)
        return _network(facts, state, sha256_of(path), path)
    state, metadata = read_safetensors(path)
    if metadata.get("purpose") == "teacher":
        raise UserError(
            f"{path} is a network for teaching; a model that it taught may not be measured with it"
        )
    say_unchecked(path, metadata)
    return _network(facts, state, sha256_of(path), path)


def _network(facts: NetworkFacts, state: Any, digest: str, path: Path) -> Extractor:
    from tessellar.evaluation.networks.timm_network import TimmNetwork, network_of
    from tessellar.networks.timm_networks import as_timm_names

    # A run that measures draws the same numbers as one that does not.
    with bounded(state, str(path)), torch.random.fork_rng(devices=[]), torch.device("meta"):
        shapes = network_of(facts)
    try:
        named = as_timm_names(shapes, state)
    except Exception:  # timm converts files of others unseen: `TimmNetwork` says what does not fit
        named = dict(state)
    return TimmNetwork(facts, named, digest, str(path))


def fetch_weights(facts: NetworkFacts) -> Path:
    """timm's published file of a network, kept in the cache of its hub; raises UserError offline."""
    import timm
    from huggingface_hub import hf_hub_download

    settings = timm.get_pretrained_cfg(facts.arch)
    place = settings.hf_hub_id if settings else None
    try:
        return Path(hf_hub_download(str(place), "model.safetensors"))
    except (
        Exception
    ) as error:  # the hub's client raises many kinds for a network that is not reached
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"the weights of {facts.name} cannot be downloaded ({reason}); give timm's file of "
            f"{facts.arch} instead: --extractor {facts.name}=FILE"
        ) from error
