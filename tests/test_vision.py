"""Vision models: frozen, with their own preprocessing, safely loaded; in an export as a part, not as a teacher."""

import copy
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import tessellar
from tessellar.checkpoints.export import export_tokenizer
from tessellar.errors import UserError
from tessellar.networks.facts import NetworkFacts
from tessellar.networks.vision import Preprocessing, Teacher, VisionModel, stand_ins, teacher
from tessellar.protocol.configured import build
from tessellar.tensor_files import read_safetensors
from tessellar.tokenizers.quantizers.vq import VectorQuantizer
from tessellar.tokenizers.vit_vq import tokenizer as vit_vq

VIT: Any = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 2}


@pytest.fixture
def images() -> Tensor:
    return torch.rand(2, 3, 16, 16) * 2 - 1


def write(path: Path, purpose: Any = "teacher", seed: int = 0, facts: bool = True) -> str:
    """What `evaluate.py extractor` writes: a small vision transformer with its classifier."""
    torch.manual_seed(seed)
    network = timm.create_model("test_vit", num_classes=4, **VIT)
    told = NetworkFacts("stripes-vit", "test_vit", 4, (16, 16), options=dict(VIT), purpose=purpose)
    state = {name: tensor.contiguous() for name, tensor in network.state_dict().items()}
    save_file(state, path, metadata=told.to_metadata() if facts else None)
    return str(path)


@pytest.fixture
def file(tmp_path: Path) -> str:
    return write(tmp_path / "teacher.safetensors")


def test_its_own_file_tells_everything(file: str, images: Tensor) -> None:
    model = VisionModel(weights=file)
    reference: Any = timm.create_model("test_vit", num_classes=4, **VIT).eval()
    reference.load_state_dict(read_safetensors(Path(file))[0])
    assert model.label == "stripes-vit" and model.grid == (4, 4) and model.dim == 24
    assert model.preprocessing.mean == (0.5, 0.5, 0.5) and not any(
        p.requires_grad for p in model.parameters()
    )
    hidden = reference.forward_features(images)  # mean and std of 0.5 turn [-1, 1] into itself
    found = model.features(images)
    torch.testing.assert_close(torch.cat(found, dim=1), hidden)
    torch.testing.assert_close(
        model.pooled(images), reference.forward_head(hidden, pre_logits=True)
    )
    assert torch.equal(model.patch_features(images), found.patches) and model.pooled_dim == 24


@pytest.mark.parametrize(
    "name", ["test_vit", "vit_small_patch14_reg4_dinov2", "vit_small_patch16_dinov3"]
)
def test_last_layer_is_the_normed_output(name: str, images: Tensor) -> None:
    options: Any = {"img_size": 28, "depth": 1} if "dinov" in name else {"img_size": 32}
    options |= {"patch_size": 14} if "dinov" in name else {}
    model = VisionModel(name, options=options)
    model.filled = True
    assert model.input_size == (options["img_size"],) * 2
    hidden = model.network.forward_features(model.preprocess(images))  # type: ignore[operator]
    torch.testing.assert_close(torch.cat(model.features(images), dim=1), hidden)
    assert model.grid[0] * model.grid[1] == model.patch_features(images).shape[1]


@pytest.mark.parametrize(
    ("layers", "message"), [((-2, -1), "unequal size"), ((5,), "5 layers"), ((), "5 layers")]
)
def test_layers_that_do_not_go_together(layers: tuple[int, ...], message: str) -> None:
    with pytest.raises(UserError, match=message):
        VisionModel("test_resnet", layers=layers)


def test_convolutional_patches_are_its_map(images: Tensor) -> None:
    model = VisionModel("test_resnet", image_size=64)
    model.filled = True
    maps = model.network.forward_features(model.preprocess(images))  # type: ignore[operator]
    found = model.features(images)
    torch.testing.assert_close(found.patches, maps.flatten(2).mT)
    assert found.prefix.shape[1] == 0 and found.patches.shape == (2, 4, model.dim)


def test_layers_of_a_transformer_stand_side_by_side(file: str, images: Tensor) -> None:
    both, last = VisionModel(weights=file, layers=(-1, 0)), VisionModel(weights=file)
    assert both.dim == 48
    assert torch.equal(both.patch_features(images)[..., 24:], last.patch_features(images))


def test_preprocessing(file: str) -> None:
    images = torch.tensor([-1.0, 0.0, 1.0]).view(1, 3, 1, 1).expand(1, 3, 8, 8)
    how = Preprocessing((0.0, 0.5, 1.0), (1.0, 0.5, 0.25))
    out = VisionModel(weights=file, preprocessing=how).preprocess(images)
    assert out.shape[-2:] == (16, 16)
    torch.testing.assert_close(out[0, :, 3, 5], torch.tensor([0.0, 0.0, 0.0]), atol=1e-6, rtol=0)


def test_always_in_eval_mode_and_gradients_reach_the_images(file: str, images: Tensor) -> None:
    model = VisionModel(weights=file)
    assert not model.train().training and not model.network.training
    (gradient,) = torch.autograd.grad(
        model.patch_features(images.requires_grad_()).square().sum(), images
    )
    assert gradient.abs().sum() > 0


def test_randomness_around_it_is_the_same(file: str) -> None:
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    VisionModel(weights=file)
    assert torch.equal(torch.rand(3), expected)


class WithVision(vit_vq.ViTVQ):
    """A tokenizer whose encoder would read a vision model, and one that is only taught by it."""

    def __init__(self, vision: VisionModel | None = None, taught_by: Teacher | None = None) -> None:
        super().__init__(VectorQuantizer(8, 4), 16, 8, 16, 1, 1, 2)
        self.vision, self.taught_by = vision, taught_by


def test_part_of_a_model_is_in_its_export(
    file: str, images: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vit_vq, "WithVision", WithVision, raising=False)
    monkeypatch.setattr(WithVision, "__module__", vit_vq.__name__)
    ours = WithVision(VisionModel(weights=file, layers=(0,)))
    expected = ours.vision.patch_features(images)  # type: ignore[union-attr]
    folder = export_tokenizer(ours, tmp_path / "export")
    Path(file).unlink()
    back = tessellar.load(folder)
    assert isinstance(back, WithVision) and back.vision is not None
    assert torch.equal(back.vision.patch_features(images), expected)
    assert back.config == ours.config and file not in str(back.config)


def test_teacher_is_not_in_the_export(
    file: str, images: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vit_vq, "WithVision", WithVision, raising=False)
    monkeypatch.setattr(WithVision, "__module__", vit_vq.__name__)
    ours = WithVision(taught_by=teacher(weights=file))
    plain = WithVision()
    assert ours.config == plain.config and ours.state_dict().keys() == plain.state_dict().keys()
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in plain.parameters())
    folder = export_tokenizer(ours, tmp_path / "export")
    Path(file).unlink()
    back = tessellar.load(folder)
    assert isinstance(back, WithVision) and back.taught_by is None
    ours.load_state_dict(back.state_dict())


def test_teacher_follows_its_module_and_gives_no_gradients(file: str, images: Tensor) -> None:
    ours = WithVision(taught_by=teacher(weights=file))
    assert ours.taught_by is not None
    assert not ours.taught_by(images.requires_grad_()).patches.requires_grad
    ours.double()
    assert ours.taught_by.model.mean.dtype == torch.float64
    copied = copy.deepcopy(ours).taught_by
    assert copied is not None and copied(images.double()).patches.dtype == torch.float64


def test_meta_device_needs_no_file() -> None:
    with torch.device("meta"):
        model = VisionModel("vit_base_patch14_dinov2", "not-there.pth", 224)
    assert model.grid == (16, 16) and model.dim == 768 and next(model.parameters()).is_meta


def test_weights_of_another_image_size_are_resampled(tmp_path: Path, images: Tensor) -> None:
    path = tmp_path / "plain.safetensors"
    file = write(path, facts=False)
    larger = VisionModel("test_vit", file, 32, options=VIT)
    assert larger.grid == (8, 8) and larger.patch_features(images).shape == (2, 64, 24)


def test_weights_as_the_authors_of_dinov2_publish_them(tmp_path: Path, images: Tensor) -> None:
    """With a mask token, for images of another size, in a torch file."""
    name = "vit_small_patch14_dinov2"
    theirs: Any = timm.create_model(name, img_size=42, num_classes=0, depth=1)
    torch.save({**theirs.state_dict(), "mask_token": torch.zeros(1, 384)}, tmp_path / "dinov2.pth")
    same, other = (
        VisionModel(name, str(tmp_path / "dinov2.pth"), size, options={"depth": 1})
        for size in (42, 28)
    )
    for model in (same, other):
        assert torch.equal(model.network.state_dict()["norm.weight"], theirs.norm.weight)
    torch.testing.assert_close(
        torch.cat(same.features(images), dim=1),
        theirs.eval().forward_features(same.preprocess(images)),
    )
    assert other.patch_features(images).shape == (2, 4, 384)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "test_vit", "weights": "none.pth"}, "there are no weights none.pth"),
        ({"name": "no_such_network"}, "timm cannot make 'no_such_network'"),
        ({}, "needs the name of a timm network"),
    ],
)
def test_mistakes_are_told_in_one_line(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        VisionModel(**arguments)
    assert "\n" not in str(error.value)


def test_without_weights_it_says_so(images: Tensor) -> None:
    with pytest.raises(UserError, match="has no weights"):
        VisionModel("test_vit", options=VIT).pooled(images)


def test_download_that_fails_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: object, **__: object) -> nn.Module:
        raise OSError("no route\nto host")

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(
        UserError, match="cannot download 'test_vit' .no route to host.; give a file"
    ) as error:
        VisionModel("test_vit", "download")
    assert "\n" not in str(error.value)


def test_another_network_and_an_evaluator_are_refused(file: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds the network test_vit, not resnet18"):
        VisionModel("resnet18", file)
    with pytest.raises(UserError, match="network for evaluation"):
        VisionModel(weights=write(tmp_path / "evaluator.safetensors", "evaluator"))
    with pytest.raises(UserError, match="does not fit"):
        VisionModel("test_resnet", write(tmp_path / "plain.safetensors", facts=False))


def test_stand_ins_of_a_config_are_named(file: str, tmp_path: Path) -> None:
    published = write(tmp_path / "plain.safetensors", facts=False)
    config = {
        "model": {
            "teacher": {"init_args": {"weights": file}},
            "loss": [{"weights": published}, {"weights": 1}],
        }
    }
    assert stand_ins(config) == ["stripes-vit"]
    assert stand_ins({"weights": "download", "vgg": "none.pth"}) == []


def test_config_is_rebuilt_without_the_file(file: str) -> None:
    model = VisionModel(weights=file)
    again = build(model.config)
    assert again.config == model.config and not again.filled
