"""The page in a real browser: every tab is used by its widgets, and pixels are looked at.

Run by tools/browser.sh, which installs Chromium, Gradio and playwright.
"""

import io
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import numpy as np
import pytest
import torch
from PIL import Image

from tessellar.checkpoints.export import export_generator, export_tokenizer
from tessellar.data import ShapesData
from tessellar.images import to_pil
from tessellar.page import charts
from tessellar.page.material import least_kept, reconstructed
from tessellar.page.studio import Controls, Studio
from tessellar.page.watching import UNKNOWN
from tessellar.pipeline import ImageGenerator, load_generator
from tests.tiny.image_generators import of_classes
from tests.tiny.pairs import TOKENIZERS

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif("BROWSER_TEST" not in os.environ, reason="run by tools/browser.sh"),
]
ROOT = Path(__file__).parents[2]
FEW = ["--trainer.precision", "32-true", "--data.batch_size", "16", "--data.val_length", "32"]
PATIENCE = 120_000  # milliseconds


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """That of `make demo`, or one of the same configs after a few updates."""
    made = ROOT / "runs" / "demo-generator" / "export"
    if made.is_dir():
        return made
    folder = tmp_path_factory.mktemp("demo")
    for part, updates in (("tokenizer", "80"), ("generator", "60")):
        words = [
            "--config",
            str(ROOT / "configs" / "demo" / f"{part}.yaml"),
            "--name",
            f"demo-{part}",
        ]
        words += ["--trainer.max_steps", updates, "--trainer.val_check_interval", updates, *FEW]
        subprocess.run([sys.executable, str(ROOT / "train.py"), *words], cwd=folder, check=True)
    return folder / "runs" / "demo-generator" / "export"


@pytest.fixture(scope="module")
def model(export: Path) -> ImageGenerator:
    return load_generator(export)


@pytest.fixture(scope="module")
def other(model: ImageGenerator, tmp_path_factory: pytest.TempPathFactory) -> Path:
    second = of_classes(model.class_names, seed=3)
    return Path(export_generator(second, tmp_path_factory.mktemp("models") / "other"))


@contextmanager
def started(*words: str) -> Iterator[str]:
    """The address of a page that the command serves."""
    # Ctrl-C ends it also where this test runs in the background, whose children ignore it.
    code = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
    code += "from tessellar.cli.main import main; main('demo')"
    command = [sys.executable, "-c", code, *words, "--port", "0"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        yield process.stdout.readline().split()[4]
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(120)


class Visitor:
    """A page in the browser, with every address that it asked for."""

    def __init__(self, page: Any, address: str) -> None:
        self.page = page
        self.address = address
        self.asked: list[str] = []
        page.set_default_timeout(PATIENCE)
        page.on("request", lambda request: self.asked.append(request.url))
        deadline = time.monotonic() + 120
        while True:  # the address is printed a moment before it answers
            try:
                page.goto(address)
                break
            except Exception:
                assert time.monotonic() < deadline
                time.sleep(0.5)
        page.wait_for_selector("button")

    def tab(self, name: str) -> None:
        self.page.get_by_role("tab", name=name).click()

    def fill(self, id: str, value: str) -> None:
        field = self.page.locator(f"#{id} input:visible").first
        field.fill(value)
        field.press("Enter")
        field.press("Tab")

    def choose(self, id: str, option: str) -> None:
        """An option of a list, by the mouse: a key may come before the list is filtered."""
        field = self.page.locator(f"#{id} input:visible").first
        field.click()
        self.page.get_by_role("option", name=option, exact=True).click()
        assert field.input_value() == option

    def image(self, id: str) -> Image.Image:
        """The picture in a widget, as the browser has it."""
        shown = self.page.locator(f"#{id} img").first
        shown.wait_for()
        answer = self.page.request.get(shown.get_attribute("src"))
        return Image.open(io.BytesIO(answer.body())).convert("RGB")

    def said(self, id: str, words: str) -> str:
        """The line of a widget, once it has these words."""
        line = self.page.locator(f"#{id}").filter(has_text=re.compile(words))
        line.wait_for()
        return line.inner_text()

    def screenshot(self, name: str) -> Image.Image:
        """What the browser shows; kept for the docs where PAGE_PICTURES names their folder."""
        time.sleep(1)
        self.page.mouse.move(5, 5)
        taken = self.page.screenshot(full_page=True)
        if "PAGE_PICTURES" in os.environ:
            (Path(os.environ["PAGE_PICTURES"]) / f"page_{name}.png").write_bytes(taken)
        return Image.open(io.BytesIO(taken)).convert("RGB")

    def foreign(self) -> list[str]:
        """Addresses elsewhere that it asked for."""
        own = urlparse(self.address).netloc
        return [url for url in self.asked if urlparse(url).netloc not in ("", own)]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        words = ["--no-sandbox", "--use-gl=angle", "--use-angle=swiftshader"]
        words.append("--enable-unsafe-swiftshader")  # the editor draws with WebGL
        chromium = shutil.which("chromium") or shutil.which("google-chrome")
        launched = playwright.chromium.launch(executable_path=chromium, args=words)
        yield launched
        launched.close()


@pytest.fixture(scope="module")
def visitor(browser: Any, export: Path, other: Path) -> Iterator[Visitor]:
    with started(str(export), "--other", str(other), "--guidance.scale", "2") as address:
        page = browser.new_page(viewport={"width": 1400, "height": 900})
        yield Visitor(page, address)


def far_apart(one: Image.Image, two: Image.Image) -> int:
    """The largest difference of two pictures, in grey levels."""
    assert one.size == two.size
    return int(np.abs(np.asarray(one).astype(int) - np.asarray(two).astype(int)).max())


def colours(picture: Image.Image) -> int:
    return len(set(map(tuple, np.asarray(picture).reshape(-1, 3).tolist())))


def test_an_image_is_drawn_token_by_token(visitor: Visitor, model: ImageGenerator) -> None:
    name = model.class_names[2]
    visitor.choose("draw-subject", name)
    visitor.fill("draw-seed", "7")
    seen = """() => {
        window.seen = [];
        new MutationObserver(() => {
            const image = document.querySelector('#draw-image img');
            if (image && window.seen.at(-1) !== image.src) window.seen.push(image.src);
        }).observe(document.body, {subtree: true, childList: true, attributes: true});
    }"""
    visitor.page.evaluate(seen)
    visitor.page.click("#draw-go")
    length = model.generator.layout.length
    said = visitor.said("draw-said", f"{length} of {length} tokens")
    assert f"in {length} evaluations: 1.00 tokens an evaluation" in said and "nats a token" in said
    expected = model.sample(name, guidance=2.0, seed=7, output="uint8")[0]
    shown = charts.shown(expected)
    assert shown is not None and far_apart(visitor.image("draw-image"), shown) <= 1
    sources = visitor.page.evaluate("window.seen")
    assert len(sources) > 3  # a busy browser leaves most frames out
    unfinished = []
    for source in sources[:-1]:
        frame = Image.open(io.BytesIO(visitor.page.request.get(source).body())).convert("RGB")
        unfinished.append(float((np.asarray(frame) == UNKNOWN).all(-1).mean()))
    assert max(unfinished) > 0.2 and unfinished == sorted(unfinished, reverse=True)
    assert colours(visitor.image("draw-tokens")) > 20
    assert colours(visitor.screenshot("draw")) > 200


def test_another_algorithm_needs_fewer_evaluations(visitor: Visitor, model: ImageGenerator) -> None:
    visitor.choose("draw-algorithm", "SpeculativeJacobi")
    visitor.page.click("#draw-go")
    length = model.generator.layout.length
    said = visitor.said(
        "draw-said", rf"{length} of {length} tokens in (?!{length} )\d+ evaluations"
    )
    found = re.search(r"in (\d+) evaluations: ([\d.]+)", said)
    assert found is not None and int(found[1]) < length and float(found[2]) > 1


def test_a_mistake_is_a_line_on_the_page(visitor: Visitor) -> None:
    visitor.fill("draw-seed", "-3")
    visitor.page.click("#draw-go")
    line = visitor.page.get_by_text(re.compile("seed is -3; it must be"))
    line.first.wait_for()
    visitor.fill("draw-seed", "7")


def test_what_is_drawn_over_is_drawn_anew(visitor: Visitor, model: ImageGenerator) -> None:
    visitor.tab("In-paint")
    visitor.page.click("#inpaint-take")
    canvas = visitor.page.locator("#inpaint-editor canvas").first
    canvas.wait_for()
    time.sleep(5)  # until the picture has come into the editor
    box = canvas.bounding_box()
    assert box is not None
    middle = (box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    mouse = visitor.page.mouse
    mouse.move(*middle)
    mouse.down()
    for step in range(12):
        mouse.move(middle[0] + 5 * step, middle[1] + 3 * step)
        time.sleep(0.05)
    mouse.up()
    time.sleep(1)
    red = np.asarray(visitor.screenshot("inpaint_mask"))
    assert ((red[..., 0] > 240) & (red[..., 1] < 60) & (red[..., 2] < 60)).sum() > 500
    visitor.choose("inpaint-subject", model.class_names[5])
    visitor.fill("inpaint-temperature", "2")
    visitor.page.click("#inpaint-go")
    said = visitor.said("inpaint-said", "tokens kept")
    found = re.search(r"(\d+) of (\d+) tokens kept; the law of the others is", said)
    assert found is not None and 0 < int(found[1]) < int(found[2])
    made = np.asarray(visitor.image("inpaint-image")).astype(int)
    visitor.tab("Draw")
    before = np.asarray(visitor.image("draw-image")).astype(int)
    changed = np.abs(made - before).mean(-1)
    side = made.shape[0]
    inside = changed[side // 2 : side * 3 // 4, side // 2 : side * 3 // 4].mean()
    outside = changed[: side // 4].mean()
    assert inside > outside
    visitor.tab("In-paint")
    visitor.screenshot("inpaint")


def test_a_picture_is_reconstructed(
    visitor: Visitor, model: ImageGenerator, tmp_path: Path
) -> None:
    visitor.tab("Reconstruct")
    height, width = model.image_size
    data = ShapesData(size=height, length=8, val_length=8)
    picture = to_pil(data.val_dataset()[3]["image"][None])[0]
    picture.save(tmp_path / "shape.png")
    visitor.page.set_input_files("#reconstruct-picture input[type=file]", tmp_path / "shape.png")
    visitor.page.locator("#reconstruct-picture img").first.wait_for()
    visitor.page.click("#reconstruct-go")
    made = reconstructed(model.tokenizer, picture)
    assert visitor.said("reconstruct-said", "PSNR").strip() == made.said
    for id, expected in (("seen", made.picture), ("image", made.image)):
        shown = charts.shown(expected)
        assert shown is not None and far_apart(visitor.image(f"reconstruct-{id}"), shown) <= 1
    visitor.screenshot("reconstruct")


def test_two_exports_side_by_side(visitor: Visitor, model: ImageGenerator, other: Path) -> None:
    visitor.tab("Compare")
    visitor.choose("compare-subject", model.class_names[1])
    visitor.fill("compare-seed", "3")
    visitor.page.click("#compare-go")
    left = visitor.image("compare-left")
    right = visitor.image("compare-right")
    controls = Controls(model.class_names[1], guidance=2.0, seed=3)
    studio = Studio(model, "demo", other=load_generator(other))
    expected = studio.compare(controls, controls, 4)
    assert far_apart(left, expected[0]) <= 1 and far_apart(right, expected[1]) <= 1
    assert left.size != right.size or far_apart(left, right) > 30
    visitor.screenshot("compare")


def test_nothing_was_asked_for_elsewhere(visitor: Visitor) -> None:
    assert visitor.foreign() == [] and len(visitor.asked) > 20


def test_a_flexible_tokenizer_has_a_slider(browser: Any, tmp_path: Path) -> None:
    """A tokenizer alone: one tab, and pictures of as many tokens as the slider says."""
    torch.manual_seed(0)
    tokenizer = TOKENIZERS["One-D-Piece"]().eval()
    folder = export_tokenizer(tokenizer, tmp_path / "tokens")
    picture = Image.effect_mandelbrot((64, 64), (-2, -1.5, 1, 1.5), 40).convert("RGB")
    picture.save(tmp_path / "picture.png")
    least = least_kept(tokenizer.layout)
    with started(str(folder)) as address:
        visitor = Visitor(browser.new_page(viewport={"width": 1400, "height": 700}), address)
        assert visitor.page.get_by_role("tab").all_inner_texts() == ["Reconstruct"]
        upload = "#reconstruct-picture input[type=file]"
        visitor.page.set_input_files(upload, tmp_path / "picture.png")
        visitor.page.locator("#reconstruct-picture img").first.wait_for()
        for kept in (tokenizer.layout.length, least):
            visitor.fill("reconstruct-kept", str(kept))
            visitor.page.click("#reconstruct-go")
            made = reconstructed(tokenizer, picture, kept)
            said = visitor.said("reconstruct-said", rf"\b{kept} of").strip()
            assert said.endswith(made.said)  # Gradio's seconds may stand before it
            time.sleep(1)
            shown = charts.shown(made.image)
            assert shown is not None and far_apart(visitor.image("reconstruct-image"), shown) <= 1
        assert visitor.foreign() == []
