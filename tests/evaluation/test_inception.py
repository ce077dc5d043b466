"""The Inception network against torch-fidelity's, from one weights file; what may be called FID."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric
from torch_fidelity.metric_prc import prc_features_to_metric

from tessellar.errors import UserError
from tessellar.evaluation.collect import Collected, Needs, collect
from tessellar.evaluation.metrics import check_metrics, distance_name, measure, named
from tessellar.evaluation.networks import inception as module
from tessellar.evaluation.networks.inception import Inception
from tessellar.evaluation.networks.loading import load_extractor
from tessellar.evaluation.networks.resize import clean_bicubic
from tessellar.evaluation.references import Reference
from tessellar.evaluation.sources import ImageBatch

COUNT = 6  # of images a side; one costs a tenth of a second


class Both(NamedTuple):
    """The same images through both codes."""

    theirs: list[dict[str, Tensor]]
    ours: list[Collected]
    extractor: Inception


@pytest.fixture(scope="session")
def both(inception_file: Path, random_images: Callable[..., Tensor]) -> Both:
    sets = [
        random_images(COUNT, size=48, seed=1),
        random_images(COUNT, size=48, seed=2, smooth=3) // 2,
    ]
    names = ["2048", "logits_unbiased"]
    network = FeatureExtractorInceptionV3(
        "x", names, feature_extractor_weights_path=str(inception_file)
    )
    with torch.no_grad():
        theirs = [network.convert_features_tuple_to_dict(network(images)) for images in sets]
    extractor = load_extractor(inception_file)
    assert isinstance(extractor, Inception)
    needs = Needs(spatial=True, score="blocks-of-5000", keep=COUNT)
    ours = [
        collect([ImageBatch(images, torch.arange(COUNT))], COUNT, extractor, needs, 7)
        for images in sets
    ]
    return Both(theirs, ours, extractor)


def test_features_equal_torch_fidelity(both: Both) -> None:
    for theirs, ours in zip(both.theirs, both.ours, strict=True):
        assert ours.features is not None and theirs["2048"].std() > 0.01
        torch.testing.assert_close(
            ours.features, theirs["2048"], rtol=1e-4, atol=1e-4 * float(theirs["2048"].max())
        )


def test_metrics_equal_torch_fidelity(both: Both) -> None:
    a, b = (t["2048"] for t in both.theirs)
    kid = kid_features_to_metric(a, b, kid_subset_size=COUNT, verbose=False)
    prc = prc_features_to_metric(a, b, verbose=False)
    isc = isc_features_to_metric(both.theirs[0]["logits_unbiased"], splits=1, shuffle=False)
    reference = Reference("b", "", both.ours[1].moments, features=both.ours[1].features)
    values = measure(both.ours[0], reference, both.extractor, ["is", "kid", "pr"])
    name = both.extractor.name
    assert values[f"KD({name})"] == pytest.approx(kid["kernel_inception_distance_mean"], rel=1e-3)
    ours, theirs = values[f"IS({name})"] - 1, isc["inception_score_mean"] - 1
    assert ours == pytest.approx(theirs, rel=1e-3) and ours > 0.01
    assert values[f"precision({name})"] == pytest.approx(prc["precision"], rel=1e-3)
    assert values[f"recall({name})"] == pytest.approx(prc["recall"], rel=1e-3)


def test_distance_equals_torch_fidelity(both: Both) -> None:
    """Over all 2048 features, six images a side: covariances of rank 5."""
    statistics = [fid_features_to_statistics(t["2048"]) for t in both.theirs]
    theirs = fid_statistics_to_metric(*statistics, verbose=False)["frechet_inception_distance"]
    reference = Reference("b", "", both.ours[1].moments)
    (ours,) = measure(both.ours[0], reference, both.extractor, ["fd"]).values()
    assert ours == pytest.approx(theirs, rel=1e-3) and ours > 0.1


def test_spatial_features_are_the_first_branch_of_mixed_6(
    both: Both, random_images: Callable[..., Tensor]
) -> None:
    """The block's output begins with the branch that TensorFlow calls mixed_6/conv; channels come last."""
    images = random_images(1, size=48)
    seen = {}
    hook = both.extractor.network.Mixed_6d.branch1x1.register_forward_hook(
        lambda *a: seen.update(branch=a[2])
    )
    spatial = both.extractor(images).spatial
    hook.remove()
    assert spatial is not None and spatial.shape == (1, 2023)
    torch.testing.assert_close(
        spatial.reshape(1, 17, 17, 7), seen["branch"][:, :7].permute(0, 2, 3, 1)
    )


def test_spatial_distance_is_named_after_the_network(both: Both) -> None:
    reference = Reference("b", "", both.ours[1].moments, spatial=both.ours[1].spatial)
    assert list(measure(both.ours[0], reference, both.extractor, ["sfd"])) == [
        f"sFD({both.extractor.name})"
    ]
    with pytest.raises(UserError, match="no spatial statistics"):
        check_metrics(
            ["sfd"], both.extractor, Reference("b", "", both.ours[1].moments), has_originals=False
        )


def test_only_published_weights_are_called_fid(both: Both, monkeypatch: pytest.MonkeyPatch) -> None:
    assert both.extractor.distance == f"FD(inception-{both.extractor.sha256[:8]})"
    monkeypatch.setattr(module, "INCEPTION", both.extractor.sha256)
    assert distance_name(both.extractor, 50_000) == "FID" and named("IS", both.extractor) == "IS"
    assert (
        distance_name(both.extractor, 10_000) == "FID-10k"
        and distance_name(both.extractor, 1234) == "FID-1234"
    )
    assert distance_name(both.extractor, 50_000, reconstructions=True) == "rFID"
    monkeypatch.setattr(both.extractor, "resize", "clean-bicubic")
    assert distance_name(both.extractor, 50_000) == "FID(clean-bicubic)"
    assert named("KID", both.extractor) == "KD(clean-bicubic)"


def test_clean_resize_is_pillows_on_each_channel_as_float(
    random_images: Callable[..., Tensor],
) -> None:
    images = random_images(2, size=40)
    resized = clean_bicubic(images, (23, 31))
    channel = Image.fromarray(images[1, 2].numpy().astype("float32")).resize(
        (31, 23), Image.Resampling.BICUBIC
    )
    torch.testing.assert_close(resized[1, 2], torch.tensor(np.array(channel)).clamp(0, 255))
    assert resized.shape == (2, 3, 23, 31) and bool((resized != resized.round()).any())


@pytest.mark.usefixtures("offline")
def test_offline_without_weights_is_one_clear_message() -> None:
    with pytest.raises(UserError, match="cannot be downloaded.*no network.*give a file instead"):
        load_extractor("inception")


def test_files_that_are_no_inception_are_refused(tmp_path: Path) -> None:
    torch.save({"weight": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(UserError, match="other.pth does not hold the weights"):
        load_extractor(tmp_path / "other.pth")
    torch.save(print, tmp_path / "code.pth")
    with pytest.raises(UserError, match="code"):
        load_extractor(tmp_path / "code.pth")
