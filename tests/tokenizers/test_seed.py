"""SEED: recorded outputs, causal queries, three stages and what each trains, detokenizers, the importer's two files."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tessellar.errors import UserError
from tessellar.evaluation.token_views import view
from tessellar.interop.importer import ImportOptions
from tessellar.networks.vision import Teacher, teacher
from tessellar.parity.verify import verify
from tessellar.protocol.configured import build
from tessellar.protocol.layout import Categorical, sequence_layout
from tessellar.tokenizers.seed import (
    SEED,
    EvaVision,
    PixelDetokenizer,
    TextSide,
    TimmVision,
    UnCLIP,
    official,
    seed_2,
)
from tessellar.tokenizers.seed.tokenizer import BertSize, to_right

GOLDEN = Path(__file__).parents[1] / "golden" / "seed"
CAPTIONS = ["a red hat", "two blue boots and a bag", "", "a green shirt"]


def vision() -> EvaVision:
    return EvaVision(16, 8, width=24, depth=2, num_heads=3, hidden=30)


def model(seed: int = 0, shaken: bool = True, **options: Any) -> SEED:
    torch.manual_seed(seed)
    sizes: dict[str, Any] = {"num_tokens": 6, "vocab_size": 17, "code_dim": 5, "decoder_depth": 2}
    sizes |= {"qformer_size": BertSize(16, 3, 2, 20), "decoder_heads": 2, "embedding_dim": 9}
    sizes["detokenizer"] = PixelDetokenizer(9, 16, 4, 16, 1, 2)
    made = SEED(vision(), 16, **{**sizes, **options})
    if shaken:
        with torch.no_grad():
            for parameter in made.parameters():
                parameter.add_(0.2 * torch.randn(parameter.shape))
    return made


def images(batch: int = 2) -> Tensor:
    return torch.rand(batch, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1


def tiny_teacher() -> Teacher:
    sizes: dict[str, Any] = {"patch_size": 8, "embed_dim": 9, "depth": 1, "num_heads": 3}
    made = teacher("vit_tiny_patch16_224", None, 16, sizes)
    made.model.filled = True
    return made


def test_every_recorded_output_is_reproduced() -> None:
    report = verify(GOLDEN)
    assert report.passed, report.as_dict()
    assert {c.case for c in report.comparisons} == {"tok", "loss", "variant_reverse", "stage1"}


@torch.no_grad()
def test_tokens_are_causal_and_a_prefix_is_that_of_all_queries() -> None:
    made = model().eval()
    memory = made.memory(made.vision.tokens(images()))
    states = made.states_of(memory)
    torch.testing.assert_close(made.states_of(memory, 4), states[:, :4], atol=1e-5, rtol=0)
    made.queries[:, 3] += 1
    changed = made.states_of(memory)
    assert torch.equal(changed[:, :3], states[:, :3])
    assert bool((changed[:, 3:] != states[:, 3:]).any(-1).all())
    # Cross-attention has no positions: what is read may come in any order.
    shuffled = made.states_of(memory[:, torch.randperm(memory.shape[1])])
    torch.testing.assert_close(shuffled, changed, atol=1e-5, rtol=1e-5)
    # Without the flag all queries see each other.
    both = made.qformer(made.queries, memory[:1], causal=False)
    assert not torch.allclose(both[:, 0], changed[:1, 0])


@torch.no_grad()
def test_tokens_images_and_forward() -> None:
    made = model().eval()
    tokens, output = made.encode(images()), made(images())
    assert made.layout == sequence_layout(6, Categorical(17)) and tokens.shape == (2, 6)
    assert torch.equal(tokens, output.tokens)
    torch.testing.assert_close(made.decode(tokens), output.reconstruction, atol=1e-5, rtol=1e-5)
    embedding = made.embedding(made.quantizer.decode(tokens))
    assert torch.equal(view(made, "semantics")(images()), embedding[:, None])
    for place in range(6):  # every code is heard
        other = tokens.clone()
        other[:, place] = (other[:, place] + 1) % 17
        assert not torch.equal(made.decode(other), output.reconstruction)
    again = build(made.config).eval()
    again.load_state_dict(made.state_dict())
    assert torch.equal(again.encode(images()), tokens)


@pytest.mark.parametrize("reverse", [False, True])
def test_the_codebook_stage_trains_what_is_behind_the_queries(reverse: bool) -> None:
    made = model(reverse=reverse, teacher=tiny_teacher()).train()
    output = made(images())
    assert set(output.losses) == {"codebook", "commitment", "recall", "distill"}
    assert output.reconstruction.shape == (2, 0, 16, 16)
    torch.stack(list(output.losses.values())).sum().backward()
    frozen = ("vision.", "vision_norm.", "queries", "qformer.", "detokenizer.")
    for name, parameter in made.named_parameters():
        trains = not name.startswith(frozen)
        assert (parameter.grad is not None) == parameter.requires_grad == trains, name
        # One query sees itself alone, whatever its scores are.
        is_moved = not trains or bool(parameter.grad.any())  # type: ignore[union-attr]
        assert is_moved or ".attention.query" in name or ".attention.key" in name, name
    # The legacy form: 5 on the commitment, 5 * 0.25 on the codes.
    states = made.states(images())
    latents = made.to_code(states)
    near = made.quantizer.decode(made.quantizer.encode(latents))
    error = (near - latents).square().mean()
    torch.testing.assert_close(output.losses["commitment"], 5 * error)
    torch.testing.assert_close(output.losses["codebook"], 1.25 * error)
    with pytest.raises(UserError, match="embedding_dim is 7; the teacher's embeddings have 9"):
        model(embedding_dim=7, detokenizer=None, teacher=tiny_teacher()).train()(images())


def test_the_contrastive_stage_learns_which_caption_is_whose() -> None:
    text = TextSide(300, 12, 8, label_smoothing=0.0)
    made = model(text=text, stage="contrastive", shaken=False, dropout=0.0).train()
    made.prepare_captions(lambda: CAPTIONS * 3)
    optimizer = torch.optim.Adam([p for p in made.parameters() if p.requires_grad], 3e-3)
    batch = {"image": images(4), "caption": CAPTIONS}
    losses = []
    for _ in range(30):
        output = made.of_batch(batch)
        optimizer.zero_grad()
        output.losses["contrastive"].backward()
        optimizer.step()
        losses.append(float(output.losses["contrastive"].detach()))
    assert output.reconstruction.shape == (4, 0, 16, 16)
    assert losses[-1] < 0.5 * losses[0]
    behind = ("vision.", "to_code", "from_code", "quantizer", "recalling", "meaning")
    for name, parameter in made.named_parameters():
        trains = not name.startswith((*behind, "embedding_head", "detokenizer"))
        assert (parameter.grad is not None) == parameter.requires_grad == trains, name
    # Behind it texts are left out.
    later = model(seed=1)
    later.load_state_dict(later.starting_from(made.state_dict()))
    assert torch.equal(later.eval().states(images()), made.eval().states(images()))
    started = made.starting_from(later.state_dict())
    name = "qformer.blocks.1.{}.fc1.weight"
    assert torch.equal(started[name.format("of_texts")], started[name.format("of_queries")])
    with pytest.raises(UserError, match="the data set gives none"):
        made.train().of_batch({"image": images()})


def test_texts_begin_at_the_left_for_the_q_former() -> None:
    ids = torch.tensor([[0, 0, 5, 6], [7, 8, 9, 1]])
    valid = torch.tensor([[False, False, True, True], [True, True, True, True]])
    moved, seen = to_right(ids, valid)
    assert moved.tolist() == [[5, 6, 0, 0], [7, 8, 9, 1]]
    assert seen.tolist() == [[True, True, False, False], [True] * 4]
    made = model(text=TextSide(300, 12, 8), stage="contrastive").eval()
    with torch.no_grad():
        feature = made.text_feature(moved, seen)
        alone = made.text_feature(torch.tensor([[5, 6]]), torch.ones(1, 2, dtype=torch.bool))
    torch.testing.assert_close(feature[:1], alone, atol=1e-5, rtol=0)


def test_the_detokenizer_alone_is_trained_in_its_stage() -> None:
    made = model(stage="detokenizer").train()
    output = made(images())
    assert output.losses == {}
    output.reconstruction.square().mean().backward()
    for name, parameter in made.named_parameters():
        trains = name.startswith("detokenizer.")
        assert (parameter.grad is not None) == parameter.requires_grad == trains, name
        assert not trains or bool(parameter.grad.any()), name  # type: ignore[union-attr]
    assert made.last_layer is made.detokenizer.to_pixels.weight  # type: ignore[union-attr]


def test_a_vision_transformer_of_timm_in_evas_place() -> None:
    sizes: dict[str, Any] = {"patch_size": 8, "embed_dim": 12, "depth": 1, "num_heads": 2}
    torch.manual_seed(0)
    seen = TimmVision("vit_tiny_patch16_224", None, 16, sizes)
    seen.filled = True
    made = SEED(seen, 16, 4, 11, 3, BertSize(16, 2, 2, 20), 1, 2, 5).eval()
    assert made.memory(seen.tokens(images())).shape == (2, 5, 12)
    assert made.encode(images()).shape == (2, 4)
    with pytest.raises(UserError, match="has no detokenizer, so that it gives no images"):
        made.decode(torch.zeros(1, 4, dtype=torch.int64))


def test_unclip_is_asked_by_its_local_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match="has no model_index.json"):
        UnCLIP(str(tmp_path))
    (tmp_path / "model_index.json").write_text("{}")
    made = UnCLIP(str(tmp_path), image_size=16)
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(UserError, match="unCLIP needs diffusers, which is not installed"):
        made(torch.zeros(1, 9))
    asked: list[dict[str, Any]] = []

    class Pipeline:
        @classmethod
        def from_pretrained(cls, path: str, local_files_only: bool) -> "Pipeline":
            assert path == str(tmp_path) and local_files_only
            return cls()

        def set_progress_bar_config(self, disable: bool) -> None:
            pass

        def to(self, device: torch.device) -> "Pipeline":
            return self

        def __call__(self, **options: Any) -> Any:
            asked.append(options)
            level = float(options["image_embeds"].mean())
            return type("Found", (), {"images": torch.full((1, 3, 32, 32), level)})

    module = type(sys)("diffusers")
    module.StableUnCLIPImg2ImgPipeline = Pipeline  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "diffusers", module)
    drawn = made(torch.tensor([[0.25] * 9, [0.75] * 9]))
    torch.testing.assert_close(drawn[:, 0, 0, 0], torch.tensor([-0.5, 0.5]))
    assert drawn.shape == (2, 3, 16, 16)
    assert asked[0]["num_inference_steps"] == 20 and asked[0]["guidance_scale"] == 10
    assert asked[0]["noise_level"] == 0 and len(asked) == 2
    held = model(detokenizer=made)
    assert held.config["init_args"]["detokenizer"] is None
    assert held.eval().decode(torch.zeros(1, 6, dtype=torch.int64)).shape == (1, 3, 16, 16)
    with pytest.raises(UserError, match="give a PixelDetokenizer"):
        model(detokenizer=made, stage="detokenizer")


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(UserError, match="stage is 'all'"):
        model(stage="all")
    with pytest.raises(UserError, match="learns from captions: give text"):
        model(stage="contrastive")
    with pytest.raises(UserError, match="patches of 5 must divide 16 pixels"):
        EvaVision(16, 5)
    with pytest.raises(UserError, match="this Q-Former has no texts"):
        model().qformer(ids=torch.zeros(1, 2, dtype=torch.int64))


def test_published_sizes() -> None:
    with torch.device("meta"):
        made = seed_2()
        reverse = seed_2(reverse=True)
    counts = {
        "vision": 985_894_528,
        "vision_norm": 2_816,
        "qformer": 105_137_664,
        "to_code": 615_200,
        "from_code": 26_400,
        "quantizer": 262_144,
        "recalling": 28_351_488 + 24_576,
        "meaning": 28_351_488 + 24_576,
        "embedding_head": 233_472 + 1_049_600,
    }
    for name, expected in counts.items():
        assert sum(p.numel() for p in getattr(made, name).parameters()) == expected, name
    assert sum(p.numel() for p in made.parameters()) == 1_149_998_528
    # The file's 881 tensors are these and the Q-Former's numbers of positions.
    assert len(list(made.parameters())) == 880
    assert sum(p.numel() for p in reverse.parameters()) == 1_248_743_104
    head = reverse.embedding_head
    assert sum(p.numel() for p in head.qformer.parameters()) == 99_239_424  # type: ignore[union-attr]


@torch.no_grad()
@pytest.mark.parametrize("reverse", [False, True])
def test_the_file_with_and_without_evas_weights(reverse: bool, tmp_path: Path) -> None:
    made = model(reverse=reverse, detokenizer=None).eval()
    state = official.to_official(made)
    whole = official.from_official(state, (3, 2), 2)
    assert torch.equal(whole.encode(images()), made.encode(images()))
    vectors = made.quantizer.decode(made.encode(images()))
    assert torch.equal(whole.embedding(vectors), made.embedding(vectors))
    inside = {name: t for name, t in state.items() if name.startswith("visual_encoder.")}
    outside = {name: t for name, t in state.items() if name not in inside}
    file = tmp_path / "seed_quantizer.pt"
    with pytest.raises(UserError, match="holds no vision transformer: put EVA's eva_vit_g.pth"):
        official.OFFICIAL.build(
            outside, ImportOptions(num_heads=3, decoder_heads=2, file=str(file))
        )
    eva = {name.removeprefix("visual_encoder."): t for name, t in inside.items()}
    torch.save({**eva, "head.weight": torch.zeros(2, 2)}, tmp_path / "eva_vit_g.pth")
    beside = official.eva_beside(str(file))
    assert beside.keys() == inside.keys()
    again = official.from_official({**outside, **beside}, (3, 2), 2)
    assert torch.equal(again.encode(images()), made.encode(images()))
