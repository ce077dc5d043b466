"""CLIP as a verifier, on a tiny model that is made here; marks name a network in any file."""

from pathlib import Path

import pytest
import torch

from tessellar.errors import UserError
from tessellar.networks.clip import MEAN, STD
from tessellar.networks.facts import marks_of
from tessellar.networks.timm_networks import create_network
from tessellar.sampling.search.network_verifiers import Clip
from tessellar.sampling.search.verifiers import Candidates, Subject


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> str:
    import transformers

    from tokenizers import Tokenizer, models, pre_tokenizers  # noqa: TID251

    words = ["[PAD]", "[UNK]", "a", "photo", "of", "cat", "red", "[END]"]
    vocabulary = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, "[UNK]"))
    vocabulary.pre_tokenizer = pre_tokenizers.Whitespace()
    folder = tmp_path_factory.mktemp("clip")
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=vocabulary, pad_token="[PAD]", unk_token="[UNK]"
    ).save_pretrained(folder)
    sizes = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "projection_dim": 8,
    }
    text = {**sizes, "vocab_size": 8, "max_position_embeddings": 8, "eos_token_id": 7}
    vision = {**sizes, "image_size": 16, "patch_size": 8}
    torch.manual_seed(0)
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)
    transformers.CLIPModel(config).save_pretrained(folder)
    return str(folder)


def test_the_score_is_the_clip_score(clip: str) -> None:
    import transformers

    images = torch.rand(3, 3, 16, 16) * 2 - 1
    verifier = Clip(clip)
    found = verifier.measure(Candidates(images, Subject(0, "cat")))[:, 0]
    model = transformers.CLIPModel.from_pretrained(clip).eval()
    ids = torch.tensor([[2, 3, 4, 2, 5]])  # a photo of a cat
    mean, std = torch.tensor(MEAN).view(3, 1, 1), torch.tensor(STD).view(3, 1, 1)
    with torch.no_grad():
        out = model(input_ids=ids, pixel_values=((images + 1) / 2 - mean) / std)
    cosine = (out.image_embeds * out.text_embeds).sum(-1)
    assert torch.allclose(found, 2.5 * cosine.clamp(min=0), atol=1e-5)
    prompt = verifier.measure(Candidates(images, Subject(prompt="red cat")))[:, 0]
    assert not torch.equal(found, prompt)
    assert len(verifier.networks()[0].marks) == 4 and len(verifier.networks()[0].sha256) == 64


def test_what_clip_cannot_score_is_said(clip: str) -> None:
    with pytest.raises(UserError, match="names of its classes"):
        Clip(clip).check(Subject(3))
    with pytest.raises(UserError, match="template"):
        Clip(clip, template="a photo").check(Subject(3, "cat"))


def test_marks_name_a_network_whatever_its_file_and_its_classifier(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = create_network("test_resnet", {}, num_classes=3)
    bare = create_network("test_resnet", {}, num_classes=0)
    bare.load_state_dict(network.state_dict(), strict=False)
    assert set(marks_of(network)) & set(marks_of(bare))
    other = create_network("test_resnet", {}, num_classes=3)
    assert not set(marks_of(network)) & set(marks_of(other))
