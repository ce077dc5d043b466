"""Which feature network a name or a file means."""

from pathlib import Path

from tessellar.errors import UserError
from tessellar.evaluation.networks.extractors import Extractor
from tessellar.networks.facts import PUBLISHED, NetworkFacts, sha256_of
from tessellar.tensor_files import read_safetensors, require_file, say_unchecked


def load_extractor(
    source: str | Path = "inception", network: NetworkFacts | None = None, resize: str = "any"
) -> Extractor:
    """An extractor: "inception" (downloaded), a file of Inception weights, a timm network's file,
    or "none".

    `resize` is for Inception alone: "tf1-bilinear" (also for "any") or "clean-bicubic". A timm
    network is a safetensors file that says in its metadata what it is, or a published one that is
    known by its hash, or one that `network` describes. Raises UserError where none of this holds.
    """
    from tessellar.evaluation.networks.inception import Inception, is_inception
    from tessellar.evaluation.networks.no_network import NoNetwork
    from tessellar.evaluation.networks.timm_network import TimmNetwork

    if str(source) == "none":
        return NoNetwork()
    if str(source) == "inception":
        return Inception.download(resize)
    path = Path(source)
    require_file(path)
    if path.suffix != ".safetensors":
        return Inception.from_file(path, resize)
    state, metadata = read_safetensors(path)
    if is_inception(state):
        return Inception.from_file(path, resize)
    digest = sha256_of(path)
    if network is not None:
        network.check("--network")
    facts = network or PUBLISHED.get(digest) or NetworkFacts.from_metadata(metadata, path)
    if "teacher" in (facts.purpose, metadata.get("purpose")):
        raise UserError(
            f"{path} is a network for teaching; a model that it taught may not be measured with it"
        )
    if digest not in PUBLISHED:  # else the file's own hash is its checksum
        say_unchecked(path, metadata)
    return TimmNetwork(facts, state, digest, str(path))
