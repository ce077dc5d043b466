"""Several networks in one pass: the numbers of separate runs, each image made once, one record."""

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor

from tessellar.cli.evaluate import main
from tessellar.errors import UserError
from tessellar.evaluation.engine import Yardstick, evaluate, evaluate_samples
from tessellar.evaluation.networks.extractors import Extractor
from tessellar.evaluation.networks.loading import load_extractor, load_extractors
from tessellar.evaluation.networks.resize import RESIZERS
from tessellar.evaluation.networks.timm_network import TimmNetwork, network_of
from tessellar.evaluation.record import differences
from tessellar.evaluation.references import references_from
from tessellar.evaluation.sources import ImageBatch, ImageSource
from tessellar.networks import standard
from tessellar.networks.facts import NetworkFacts
from tessellar.networks.standard import FDR6, FDR6_VALIDATION, STANDARD

Images = Callable[..., Tensor]

TOKENS = NetworkFacts(
    "tokens", "test_vit", 0, (48, 48), resize="torch-bicubic", readout="class-token",
    options={"dynamic_img_size": True, "dynamic_img_pad": True},
)  # fmt: skip
MAPS = NetworkFacts("maps", "test_convnext", 0, (40, 40), resize="pil-bicubic", readout="mean-map")


def write_network(facts: NetworkFacts, path: Path, **metadata: str) -> Path:
    torch.manual_seed(1)
    said = metadata or facts.to_metadata()
    save_file(network_of(facts).eval().state_dict(), path, metadata=said)
    return path


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory, tiny_file: Path) -> list[str]:
    """A classifier, and two networks without classes that read images in other sizes and ways."""
    folder = tmp_path_factory.mktemp("networks")
    tokens = write_network(TOKENS, folder / "tokens.safetensors")
    maps = write_network(MAPS, folder / "maps.safetensors")
    return [str(tiny_file), str(tokens), str(maps)]


@pytest.fixture(scope="module")
def networks(files: list[str]) -> list[Extractor]:
    return load_extractors(files)


class Counted(ImageSource):
    """Counts how often each image is made."""

    name = "counted"

    def __init__(self, images: Tensor) -> None:
        self.images = images
        self.count = len(images)
        self.made: list[int] = []

    def batches(self, batch_size: int) -> Iterator[ImageBatch]:
        for index in torch.arange(self.count).split(batch_size):
            self.made += index.tolist()
            yield ImageBatch(self.images[index], index, index % 4)

    def fingerprint(self) -> str:
        return f"counted {self.count}"


def test_three_networks_in_one_pass_equal_three_runs(
    networks: list[Extractor], random_images: Images
) -> None:
    metrics = ("fd", "is", "kid", "pr", "accuracy")
    samples = Counted(random_images(30, seed=1))
    reference = Counted(random_images(41, seed=2))
    references = references_from(reference, networks, batch_size=8)
    yardsticks = [Yardstick(*pair) for pair in zip(networks, references, strict=True)]
    joint = evaluate(samples, yardsticks, metrics=metrics, batch_size=8)
    assert samples.made == list(range(30)) and reference.made == list(range(41))
    alone: dict[str, float] = {}
    for network in networks:
        own = metrics if network.num_classes else ("fd", "kid", "pr")
        (one,) = references_from(Counted(random_images(41, seed=2)), [network], batch_size=8)
        record = evaluate_samples(samples, network, one, metrics=own, batch_size=8)
        alone |= record["metrics"]
        assert joint["fingerprints"][network.name] == record["fingerprint"]
        assert not differences(joint, record)
    assert joint["metrics"].keys() == alone.keys() and "FD(maps)" in alone and "accuracy" in alone
    for name, value in alone.items():
        assert joint["metrics"][name] == pytest.approx(value, rel=1e-12, abs=1e-12), name


def test_only_what_the_cache_lacks_is_computed(
    networks: list[Extractor], random_images: Images, tmp_path: Path
) -> None:
    images = Counted(random_images(20))
    references_from(images, networks[:1], tmp_path)
    references_from(images, networks, tmp_path)
    assert len(images.made) == 40 and len(list(tmp_path.iterdir())) == 3
    again = references_from(images, networks[::-1], tmp_path)
    assert len(images.made) == 40
    assert [one.moments.dim for one in again] == [one.dim for one in networks[::-1]]


def test_records_that_share_no_network_or_another_reference_are_not_comparable(
    networks: list[Extractor], random_images: Images
) -> None:
    samples = Counted(random_images(20))
    records = []
    for chosen, seed in (
        (networks[:2], 3),
        (networks[1:], 3),
        (networks[2:], 3),
        (networks[1:], 4),
    ):
        references = references_from(Counted(random_images(25, seed=seed)), chosen)
        yardsticks = [Yardstick(*pair) for pair in zip(chosen, references, strict=True)]
        records.append(evaluate(samples, yardsticks))
    assert differences(records[0], records[1]) == []
    assert differences(records[0], records[2]) == ["networks: tiny, tokens / maps"]
    (line,) = differences(records[0], records[3])
    assert line.startswith("tokens: reference:")


def test_the_command_takes_several_in_any_place(
    files: list[str], random_images: Images, write_npz: Callable[..., Path], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    write_npz(random_images(20, seed=1), tmp_path / "s.npz", torch.arange(20) % 4)
    write_npz(random_images(30, seed=2), tmp_path / "r.npz")
    main(["samples", "s.npz", "--reference", "r.npz", "--extractor", *files, "--out", "a.json"])
    main(["samples", "--extractor", *files, "s.npz", "--reference", "r.npz", "--out", "b.json"])
    main(["stats", "r.npz", "--extractor", *files, "--out", "ref.npz"])
    kept = [f"ref-{name}.npz" for name in ("maps", "tiny", "tokens")]
    words = ["--reference", *kept, "--metrics", "fd", "is", "--out", "c.json"]
    main(["samples", "--extractor", *files, "s.npz", *words])
    a, b, c = (json.loads(Path(f"{name}.json").read_text()) for name in "abc")
    assert a["metrics"] == b["metrics"]
    assert set(a["metrics"]) == {"FD(tiny)", "FD(tokens)", "FD(maps)"}
    for name, value in a["metrics"].items():
        assert c["metrics"][name] == pytest.approx(value, rel=1e-9)
    assert "IS(tiny)" in c["metrics"] and "IS(maps)" not in c["metrics"]
    assert "FD(tokens)" in capsys.readouterr().out
    with pytest.raises(UserError, match="2 files of statistics for 3 networks"):
        main(["samples", "s.npz", "--reference", *kept[:2], "--extractor", *files])


def test_a_network_without_classes_has_no_inception_score(
    files: list[str], random_images: Images, write_npz: Callable[..., Path], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    write_npz(random_images(20), tmp_path / "s.npz", torch.arange(20) % 4)
    for metric in ("is", "accuracy"):
        with pytest.raises(UserError, match=f"{metric}.*needs a network with classes, and tokens"):
            main(["samples", "s.npz", "--extractor", files[1], "--metrics", metric])
        with pytest.raises(UserError, match="needs a network with classes; tokens, maps have none"):
            main(["samples", "s.npz", "--extractor", *files[1:], "--metrics", metric])


def test_networks_that_cannot_stand_together_are_refused(files: list[str]) -> None:
    for sources, line in (
        ([files[0], files[0]], "2 networks are called 'tiny'"),
        (["none", files[0]], "none stands alone"),
        (["dinov3"], "the file does not exist, and networks with names are inception, convnext"),
        (["dinov3=x.safetensors"], "'dinov3' is not a network with a name"),
        (["dinov2=x.safetensors"], "x.safetensors"),
        ([], "names no network"),
    ):
        with pytest.raises(UserError, match=line):
            load_extractors(sources)
    with pytest.raises(UserError, match="--network describes one file"):
        load_extractors(files, TOKENS)


def test_a_standard_network_reads_the_files_of_others(
    random_images: Images, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, offline: None
) -> None:
    """Tiny networks in the files' formats: with a classifier, without one, as a torch checkpoint."""
    facts = replace(TOKENS, name="dinov2")
    monkeypatch.setitem(standard.STANDARD, "dinov2", facts)
    torch.manual_seed(3)
    theirs = timm.create_model("test_vit", num_classes=7).eval()
    save_file(theirs.state_dict(), tmp_path / "timm.safetensors", metadata={"format": "pt"})
    torch.save({"model": theirs.state_dict()}, tmp_path / "authors.pth")
    images = random_images(3)
    x = RESIZERS["torch-bicubic"](images, (48, 48)) / 255
    sized = timm.create_model("test_vit", num_classes=0, **facts.options).eval()  # type: ignore[arg-type]
    body = {name: t for name, t in theirs.state_dict().items() if not name.startswith("head")}
    sized.load_state_dict(body)
    with torch.no_grad():
        expected = sized.forward_features((x - 0.5) / 0.5)[:, 0]  # type: ignore[operator]
    for file in ("timm.safetensors", "authors.pth"):
        network = load_extractor(f"dinov2={tmp_path / file}")
        torch.testing.assert_close(network(images).features, expected)
        assert network.num_classes == 0 and network(images).logits.shape == (3, 0)
        described = load_extractor(tmp_path / file, facts)
        assert torch.equal(described(images).features, network(images).features)
    with pytest.raises(UserError, match="other.safetensors does not fit.* missing"):
        load_extractor(f"dinov2={write_network(MAPS, tmp_path / 'other.safetensors', format='pt')}")


def test_readouts(random_images: Images, tmp_path: Path) -> None:
    head = replace(TOKENS, num_classes=5, readout="head")
    network = load_extractor(write_network(head, tmp_path / "head.safetensors"))
    assert isinstance(network, TimmNetwork)
    assert (network.dim, network.num_classes) == (5, 0)
    images = random_images(2, size=48)
    x = (images.float() / 255 - 0.5) / 0.5
    torch.testing.assert_close(network(images).features, network.network(x).detach())
    maps = load_extractor(write_network(MAPS, tmp_path / "maps.safetensors"))
    assert isinstance(maps, TimmNetwork)
    small = random_images(2, size=40)
    found = maps.network.forward_features((small.float() / 255 - 0.5) / 0.5)  # type: ignore[operator]
    torch.testing.assert_close(maps(small).features, found.mean((2, 3)))
    assert maps.describe()["readout"] == "mean-map"


def test_resizers_of_the_field() -> None:
    """torch's overshoots at an edge and is not clamped; Pillow's gives 8-bit values."""
    edge = torch.zeros(1, 3, 8, 8, dtype=torch.uint8)
    edge[..., 4:] = 255
    free = RESIZERS["torch-bicubic"](edge, (16, 16))
    whole = RESIZERS["pil-bicubic"](edge, (16, 16))
    assert free.min() < 0 and free.max() > 255
    assert torch.equal(whole, whole.round()) and whole.min() == 0 and whole.max() == 255
    assert float((free.clamp(0, 255) - whole).abs().max()) < 4


@pytest.mark.parametrize("name", ["convnext", "dinov2-256", "siglip2", "clip-336"])
def test_standard_networks_have_the_sizes_of_the_papers(name: str) -> None:
    sizes = {"convnext": 1024, "siglip2": 1152, "clip-336": 768}
    facts = STANDARD[name]
    with torch.device("meta"):
        network = network_of(facts)
        x = network.forward_features(torch.zeros(1, 3, *facts.image_size))  # type: ignore[operator]
        patches = {"dinov2-256": 361 + 1, "siglip2": 196, "clip-336": 577}
        if name in patches:
            assert x.shape[1] == patches[name]
        read = {
            "class-token": lambda: x[:, 0],
            "mean-map": lambda: x.mean((2, 3)),
            "head": lambda: network.forward_head(x),  # type: ignore[operator]
            "pooled": lambda: network.forward_head(x, pre_logits=True),  # type: ignore[operator]
        }[facts.readout]()
    assert read.shape == (1, sizes.get(name, 1024))


def test_the_six_networks_are_known() -> None:
    assert set(FDR6_VALIDATION) == set(FDR6) and set(FDR6) - {"inception"} <= set(STANDARD)
    for name, facts in STANDARD.items():
        facts.check(name)
        assert facts.name == name


def test_weights_that_cannot_be_downloaded_are_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError("no network")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", refuse)
    with pytest.raises(UserError, match="of mae cannot be downloaded .*--extractor mae=FILE"):
        load_extractor("mae")
