"""Feature networks: files that describe themselves, precision, refusals, and who may not use them."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tessellar.errors import UserError
from tessellar.evaluation.networks.extractors import Extractor, full_precision
from tessellar.evaluation.networks.loading import load_extractor
from tessellar.evaluation.networks.timm_network import TimmNetwork, network_of
from tessellar.networks.facts import PUBLISHED, NetworkFacts, refuse_evaluator, sha256_of

Images = Callable[..., Tensor]


def test_a_file_describes_itself(tiny: Extractor, tiny_file: Path) -> None:
    assert (tiny.name, tiny.distance, tiny.dim, tiny.num_classes) == ("tiny", "FD(tiny)", 96, 4)
    assert tiny.sha256 == sha256_of(tiny_file)


def test_features_are_the_pooled_vector_of_pixels_in_the_declared_range(
    tiny: TimmNetwork, random_images: Images
) -> None:
    images = random_images(3)
    maps = tiny.network.forward_features(images.float() / 127.5 - 1)  # type: ignore[operator]
    output = tiny(images)
    torch.testing.assert_close(output.features, tiny.network.forward_head(maps, pre_logits=True))  # type: ignore
    torch.testing.assert_close(output.logits, tiny.network.forward_head(maps))  # type: ignore[operator]


def test_loading_draws_no_random_numbers(tiny_file: Path, inception_file: Path) -> None:
    state = torch.get_rng_state()
    for file in (tiny_file, inception_file):
        load_extractor(file)
        assert torch.equal(torch.get_rng_state(), state)


def test_it_stays_in_eval_mode_and_frozen(tiny: Extractor, random_images: Images) -> None:
    images = random_images(4)
    before = tiny(images).features
    tiny.train()
    assert not tiny.training and torch.equal(tiny(images).features, before)
    assert not before.requires_grad and not any(p.requires_grad for p in tiny.parameters())


def test_autocast_around_it_changes_nothing(tiny: Extractor, random_images: Images) -> None:
    images = random_images(4)
    before = tiny(images).features
    with torch.autocast("cpu", torch.bfloat16):
        inside = tiny(images).features
    assert inside.dtype == torch.float32 and torch.equal(inside, before)


def test_tf32_is_off_inside_and_as_before_outside() -> None:
    conv = torch.backends.cudnn.conv  # type: ignore[attr-defined]
    before = conv.fp32_precision
    try:
        conv.fp32_precision = "tf32"
        with full_precision("cpu"):
            assert conv.fp32_precision == "ieee"
        assert conv.fp32_precision == "tf32"
    finally:
        conv.fp32_precision = before


@pytest.mark.parametrize(
    "images", [torch.zeros(1, 3, 32, 32), torch.zeros(1, 1, 32, 32, dtype=torch.uint8)]
)
def test_only_uint8_colour_images_are_measured(images: Tensor, tiny: Extractor) -> None:
    with pytest.raises(UserError, match="uint8 images"):
        tiny(images)


def test_a_declared_resize_is_used(tiny: TimmNetwork, random_images: Images) -> None:
    facts = replace(tiny.facts, resize="clean-bicubic")
    resizing = TimmNetwork(facts, tiny.network.state_dict(), "", "")
    assert resizing(random_images(2, size=50)).features.shape == (2, 96)
    assert resizing.describe() != tiny.describe()


def test_a_file_without_metadata_is_described_by_arguments(
    tiny: TimmNetwork, tiny_file: Path, tmp_path: Path
) -> None:
    save_file(load_file(tiny_file), tmp_path / "bare.safetensors")
    with pytest.raises(UserError, match="does not say what network it holds.*--network.arch"):
        load_extractor(tmp_path / "bare.safetensors")
    assert (
        load_extractor(tmp_path / "bare.safetensors", replace(tiny.facts, name="mine")).distance
        == "FD(mine)"
    )


def test_published_files_are_known_by_their_hash(
    tiny: TimmNetwork, tiny_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_file(load_file(tiny_file), tmp_path / "x.safetensors")
    monkeypatch.setitem(
        PUBLISHED, sha256_of(tmp_path / "x.safetensors"), replace(tiny.facts, name="published")
    )
    assert load_extractor(tmp_path / "x.safetensors").distance == "FD(published)"


def test_the_published_networks_can_be_made() -> None:
    for facts in PUBLISHED.values():
        with torch.device("meta"):
            network = network_of(facts)
        assert network.get_classifier().out_features == facts.num_classes  # type: ignore[operator]


def test_facts_survive_the_metadata() -> None:
    facts = NetworkFacts(
        "n", "resnet10t", 3, (32, 16), "tf1-bilinear", (0.1, 0.2, 0.3), options={"output_stride": 8}
    )
    assert NetworkFacts.from_metadata(facts.to_metadata(), Path("f")) == facts
    with pytest.raises(UserError, match="metadata of f is not JSON"):
        NetworkFacts.from_metadata({"tessellar.evaluator": "{"}, Path("f"))


def test_weights_that_do_not_fit_are_refused(tiny: TimmNetwork, tmp_path: Path) -> None:
    state = {name: tensor.contiguous() for name, tensor in tiny.network.state_dict().items()}
    save_file(
        {"other": torch.zeros(1), **state}, tmp_path / "x.safetensors", tiny.facts.to_metadata()
    )
    with pytest.raises(UserError, match="1 unknown: other"):
        load_extractor(tmp_path / "x.safetensors")
    with pytest.raises(UserError, match="timm cannot make 'resnet9000'"):
        network_of(replace(tiny.facts, arch="resnet9000"))
    with pytest.raises(UserError, match="does not exist"):
        load_extractor(tmp_path / "y.safetensors")


def test_evaluators_are_refused_as_teachers(
    tiny: TimmNetwork, tiny_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match="a loss, a teacher or a filter of samples may not use it"):
        refuse_evaluator(tiny_file)
    save_file({"a": torch.zeros(1)}, tmp_path / "backbone.safetensors")
    refuse_evaluator(tmp_path / "backbone.safetensors")
    monkeypatch.setitem(PUBLISHED, sha256_of(tmp_path / "backbone.safetensors"), tiny.facts)
    with pytest.raises(UserError, match="network for evaluation"):
        refuse_evaluator(tmp_path / "backbone.safetensors")
