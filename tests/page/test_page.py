"""What the page shows, without Gradio: moments of an image, charts, masks, in-painting, reconstruction."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from tessellar.cli.demo import main
from tessellar.errors import UserError
from tessellar.images import to_uint8
from tessellar.models.maskgit import MaskGIT as MaskGITGenerator
from tessellar.page import charts
from tessellar.page.material import (
    Side,
    inpainted,
    least_kept,
    mask_of,
    reconstructed,
    side_by_side,
)
from tessellar.page.studio import Controls, Studio
from tessellar.page.watching import UNKNOWN, Moment, Wish, entropies, watch
from tessellar.pipeline import ImageGenerator
from tessellar.protocol.choice import Choice
from tessellar.protocol.condition import ClassConditioner
from tessellar.protocol.distribution import Bits, Logits
from tessellar.protocol.layout import Categorical, Layout, Segment
from tessellar.sampling.confidence import MaskGIT
from tessellar.sampling.settings import Sampling
from tessellar.sampling.speculative import SpeculativeJacobi
from tests.tiny.image_generators import of_captions, of_classes
from tests.tiny.pairs import TOKENIZERS

NAMES = ("circle", "star", "ring")


@pytest.fixture(scope="module")
def model() -> ImageGenerator:
    return of_classes(NAMES)


def watched(model: ImageGenerator, wish: Wish) -> list[Moment]:
    moments: list[Moment] = []
    last = watch(model, wish, moments.append)
    assert last is moments[-1] and last.is_finished
    return moments


@pytest.mark.parametrize("algorithm", ["Ancestral", "SpeculativeJacobi"])
def test_an_image_appears_entity_by_entity(model: ImageGenerator, algorithm: str) -> None:
    settings = Sampling(guidance=1.5, choice=Choice(temperature=0.8))
    if algorithm == "SpeculativeJacobi":
        settings = Sampling(
            guidance=1.5, choice=Choice(temperature=0.8), algorithm=SpeculativeJacobi(window=3)
        )
    moments = watched(model, Wish("star", settings, seed=5))
    tokens = model.sample_tokens(model.class_condition([1]), settings, [5])
    assert torch.equal(moments[-1].tokens, tokens[0].cpu())
    expected = model.sample(classes=1, sampling=settings, seeds=[5], output="uint8")[0]
    assert moments[-1].image is not None
    assert (moments[-1].image.int() - expected.int()).abs().max() <= 1
    for number, moment in enumerate(moments, start=1):
        assert len(moment.committed) == number
        assert int(moment.known.sum()) == sum(moment.committed)
        # Known tokens stay, and their cells alone are shown: 2 x 2 cells of 4 x 4 pixels.
        assert torch.equal(moment.tokens[moment.known], tokens[0][moment.known])
        assert moment.image is not None
        hidden = ~moment.known.view(2, 2).repeat_interleave(4, 0).repeat_interleave(4, 1)
        assert bool((moment.image[:, hidden] == UNKNOWN).all())
        assert torch.equal(moment.entropy.isnan(), ~moment.known)
    if algorithm == "Ancestral":
        assert moments[-1].committed == (1, 1, 1, 1)
        assert "4 of 4 tokens in 4 evaluations: 1.00 tokens an evaluation" in moments[-1].summary


def test_entropies_are_those_of_the_laws_that_tokens_were_drawn_from(model: ImageGenerator) -> None:
    """Live ones and those found afterwards agree, and the first is that of the first prediction."""
    choice = Choice(temperature=0.7, top_k=5)
    settings = Sampling(guidance=2.0, choice=choice)
    live = watched(model, Wish("ring", settings, 3))[-1]
    draft = SpeculativeJacobi(window=2)
    later = watched(model, Wish("2", Sampling(2.0, choice, draft), 3))[-1]
    if torch.equal(live.tokens, later.tokens):
        assert torch.allclose(live.entropy, later.entropy, atol=1e-4)
    generator = model.generator
    with torch.no_grad():
        state = generator.start(model.class_condition([2]), settings.guidance.guidance())
        law = generator.predict(state, generator.layout.blank(1))
    assert isinstance(law, Logits)
    p = choice.probs(law.logits)[0, 0]
    assert float(live.entropy[0]) == pytest.approx(float(torch.special.entr(p).sum()), abs=1e-4)
    assert float(later.entropy[0]) == pytest.approx(float(live.entropy[0]), abs=1e-4)


def test_entropies_of_bits_add_up() -> None:
    law = Bits.independent(torch.tensor([[[0.0, 100.0, 0.0]]]))
    found = entropies(law, torch.tensor([[[1, 1, 0]]]), Choice())
    assert found.tolist() == pytest.approx([2 * float(np.log(2))])


def test_maskgit_shows_its_image_and_what_each_step_committed() -> None:
    tokenizer = of_classes(NAMES).tokenizer
    torch.manual_seed(1)
    generator = MaskGITGenerator(
        tokenizer.layout, width=16, depth=1, num_heads=2, hidden=16, num_classes=3
    )
    model = ImageGenerator(tokenizer, generator, ClassConditioner(3)).eval()
    moments = watched(model, Wish("0", Sampling(algorithm=MaskGIT(steps=2)), 1))
    assert len(moments) == 1 and moments[0].image is not None
    assert len(moments[0].committed) == 2


def test_wishes_that_are_none(model: ImageGenerator) -> None:
    def nothing(moment: Moment) -> None:
        raise AssertionError("nothing is to be drawn")

    for subject, said in (
        ("sqare", "no class"),
        ("all", "names 3 classes"),
        ("7", "does not exist"),
    ):
        with pytest.raises(UserError, match=said):
            watch(model, Wish(subject), nothing)
    with pytest.raises(UserError, match="write a prompt"):
        watch(of_captions(), Wish(" "), nothing)
    assert watched(of_captions(), Wish("a red circle"))[-1].image is not None


def layer(size: tuple[int, int], box: tuple[int, int, int, int]) -> Image.Image:
    drawn = Image.new("RGBA", size)
    ImageDraw.Draw(drawn).rectangle(box, fill=(255, 0, 0, 255))
    return drawn


def test_a_mask_is_where_layers_are_drawn_on() -> None:
    layers = [layer((80, 80), (0, 0, 39, 19)), layer((80, 80), (70, 70, 79, 79))]
    expected = torch.zeros(8, 8, dtype=torch.bool)
    expected[:2, :4] = True
    expected[7, 7] = True
    inner = mask_of(layers, (8, 8))
    assert bool(inner[expected].all()) and int(inner.sum()) <= int(expected.sum()) + 12
    with pytest.raises(UserError, match="draw over the part"):
        mask_of([layer((8, 8), (9, 9, 9, 9))], (8, 8))


def test_in_painting_keeps_the_tokens_outside_the_mask(model: ImageGenerator) -> None:
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (16, 16, 3), np.uint8))
    box = [layer((16, 16), (0, 0, 5, 5))]
    image, said = inpainted(model, picture, box, Wish("star"))
    assert said == "3 of 4 tokens kept; the law of the others is approximate"
    tokens = model.encode(picture.resize((8, 8), Image.Resampling.BICUBIC)).repeat(16, 1)
    tokens[:, 0] = torch.arange(16)  # whatever may be drawn in the masked cell
    possible = to_uint8(model.decode(tokens)).int()
    distance = (possible - image.int()).abs().amax((1, 2, 3))
    assert int(distance.min()) <= 1
    warm = Sampling(choice=Choice(temperature=5.0))
    drawn = [inpainted(model, picture, box, Wish("star", warm, seed))[0] for seed in range(6)]
    assert len({str(each.tolist()) for each in drawn}) > 1


def flexible() -> Any:
    """A tokenizer whose prefixes decode."""
    for make in TOKENIZERS.values():
        tokenizer = make()
        layout = tokenizer.layout
        if layout.min_prefix is not None and layout.is_categorical:
            if len(layout.segments) == 1 and layout.min_prefix < layout.length:
                return tokenizer.eval()
    raise AssertionError("no tokenizer of prefixes")


def test_a_picture_from_its_first_tokens(model: ImageGenerator) -> None:
    tokenizer = flexible()
    layout = tokenizer.layout
    picture = Image.new("RGB", (40, 30), "red")
    least = least_kept(layout)
    few = reconstructed(tokenizer, picture, least)
    whole = reconstructed(tokenizer, picture)
    assert few.said.startswith(f"{least} of {layout.length} tokens, ")
    assert whole.said.startswith(f"{layout.length} of {layout.length} tokens, ")
    assert few.image.shape == few.picture.shape == (3, *tokenizer.image_size)
    pixels = torch.tensor([1.0, -1.0, -1.0]).view(1, 3, 1, 1).expand(1, 3, *tokenizer.image_size)
    with torch.no_grad():
        expected = tokenizer.decode(tokenizer.encode(pixels)[:, :least])[0]
    difference = few.image.float() - (127.5 * expected + 127.5).clamp(0, 255)
    assert float(difference.abs().max()) <= 1
    with pytest.raises(UserError, match="number of tokens kept"):
        reconstructed(model.tokenizer, picture, 2)  # a grid, whose prefixes are no images


def test_two_sides_have_the_same_seeds(model: ImageGenerator) -> None:
    warm = Wish("star", Sampling(choice=Choice(temperature=2.0)), seed=9)
    rows = side_by_side([Side(model, Wish("star", seed=9)), Side(model, warm)], 3)
    expected = model.sample(classes=["star"], count=3, seed=9, output="uint8")
    assert torch.equal(torch.stack(rows[0]), expected) and len(rows[1]) == 3
    assert not torch.equal(torch.stack(rows[1]), expected)
    assert charts.rows_shown(rows).width > charts.rows_shown(rows).height


def test_charts_show_what_is_known() -> None:
    layout = Layout((Segment((3, 4), Categorical(9)), Segment((20,), Categorical(9), "rest")))
    known = torch.zeros(32, dtype=torch.bool)
    known[:5] = True
    entropy = torch.where(known, torch.linspace(0, 3, 32), torch.nan)
    tokens = torch.arange(32)
    some = charts.token_chart(Moment(None, tokens, known, entropy, (5,)), layout)
    none = charts.token_chart(
        Moment(None, tokens, torch.zeros_like(known), torch.full((32,), torch.nan), ()), layout
    )
    assert grey_share(none) > grey_share(some) > 0.1
    assert charts.commit_chart([1, 3, 2]).width > 200
    assert charts.shown(None) is None
    big = charts.shown(torch.zeros(3, 8, 8, dtype=torch.uint8))
    assert big is not None and big.size == (384, 384)


def test_the_studio_turns_widgets_into_pictures(model: ImageGenerator) -> None:
    studio = Studio(model, "tiny", other=of_classes(NAMES, seed=1), other_name="second")
    assert studio.subjects == list(NAMES) and studio.kept_range == (4, 4)
    assert "SpeculativeJacobi" in studio.algorithms and "MaskGIT" not in studio.algorithms
    frames = list(studio.frames(Controls("ring", 2.0, 0.9, 5, 3)))
    assert len(frames) == 4 and frames[-1].evaluations is not None
    assert all(frame.image is not None for frame in frames) and frames[0].evaluations is None
    finished = model.sample("ring", Sampling(2.0, Choice(0.9, 5)), seed=3, output="uint8")[0]
    assert (
        np.abs(
            np.asarray(frames[-1].image)[::48, ::48] - finished.permute(1, 2, 0).int().numpy()
        ).max()
        <= 1
    )
    left, right = studio.compare(Controls("ring"), Controls("ring"), 4)
    assert left.size == right.size and left.tobytes() != right.tobytes()
    picture = frames[-1].image
    image, said = studio.inpaint(
        {"background": picture, "layers": [layer((384, 384), (0, 0, 99, 99))]}, Controls("star"), 2
    )
    assert image is not None and said.startswith("3 of 4 tokens kept")
    seen, made, said = studio.reconstruct(picture, 4)
    assert seen is not None and made is not None and said.startswith("4 of 4 tokens")


def test_mistakes_on_the_page_are_one_line(model: ImageGenerator) -> None:
    studio = Studio(model, "tiny")
    mistakes = [
        (lambda: list(studio.frames(Controls("sqare"))), "no class 'sqare'"),
        (lambda: list(studio.frames(Controls("star", seed=-1))), "seed is -1"),
        (lambda: list(studio.frames(Controls("star", temperature=-1))), "temperature is -1"),
        (lambda: list(studio.frames(Controls("star", algorithm="DraftModel"))), "no algorithm"),
        (lambda: studio.wish(Controls("star", top_k=None)), "top_k is None"),  # type: ignore[arg-type]
        (lambda: studio.inpaint(None, Controls("star"), 1), "give a picture first"),
        (lambda: studio.reconstruct(None, 4), "upload a picture"),
        (lambda: studio.compare(Controls("star"), Controls("star"), 0), "images of each side"),
    ]
    for call, said in mistakes:
        with pytest.raises(UserError, match=said):
            call()
    tokenizer = Studio(model.tokenizer, "tokens")
    with pytest.raises(UserError, match="is a tokenizer"):
        list(tokenizer.frames(Controls("star")))


def test_the_command_says_what_is_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("tessellar.cli.demo.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'tessellar\[demo\]'"):
        main([str(tmp_path)])


def grey_share(picture: Image.Image) -> float:
    """The share of pixels in the colour of tokens that are not drawn yet."""
    pixels = np.asarray(picture)
    return float((pixels == 0xDD).all(-1).mean())
