"""The page itself: Gradio's widgets over `Studio`. The only file that imports Gradio (extra `demo`).

Nothing is fetched from elsewhere: no analytics, no share link, fonts of the system.
"""

# pyright: reportMissingImports=false, reportPrivateImportUsage=false
import os
from collections.abc import Callable, Iterator
from functools import wraps
from typing import Any, TypeVar

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when Gradio is imported

import gradio as gr  # noqa: E402
from PIL import Image  # noqa: E402

from tessellar.errors import UserError  # noqa: E402
from tessellar.page.studio import Controls, Studio  # noqa: E402
from tessellar.sampling.decode import Ancestral  # noqa: E402

T = TypeVar("T")
THEME = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"])


def said_by_gradio(call: Callable[..., T]) -> Callable[..., T]:
    """A mistake of the user is a line on the page, not a traceback."""

    @wraps(call)
    def wrapped(*arguments: Any) -> T:
        try:
            return call(*arguments)
        except UserError as error:
            raise gr.Error(str(error), print_exception=False) from error

    return wrapped


def page(studio: Studio) -> gr.Blocks:
    """The page of a studio; of a tokenizer alone, it reconstructs."""
    draws = not isinstance(studio.model, type(studio.tokenizer))
    with gr.Blocks(analytics_enabled=False, title=f"tessellar: {studio.name}") as blocks:
        gr.Markdown(f"## {studio.name}\n`{studio.tokenizer.layout}`")
        if draws:
            with gr.Tab("Draw", id="draw"):
                drawn = _draw_tab(studio)
            with gr.Tab("In-paint", id="inpaint"):
                _inpaint_tab(studio, drawn)
        with gr.Tab("Reconstruct", id="reconstruct"):
            _reconstruct_tab(studio)
        if draws:
            with gr.Tab("Compare", id="compare"):
                _compare_tab(studio)
    return blocks


def _subject(studio: Studio, id: str) -> gr.components.Component:
    """A list of classes, or a line for a prompt."""
    subjects = studio.subjects
    if subjects:
        return gr.Dropdown(
            subjects, value=subjects[0], label="class", allow_custom_value=True, elem_id=id
        )
    return gr.Textbox(label="prompt", placeholder="what to draw", elem_id=id)


def _how(studio: Studio, id: str) -> list[gr.components.Component]:
    """Guidance, temperature, top-k."""
    scale = getattr(studio.defaults.guidance, "scale", 1.0)
    choice = studio.defaults.choice
    return [
        gr.Slider(0, 20, value=scale, step=0.1, label="guidance", elem_id=f"{id}-guidance"),
        gr.Slider(
            0,
            2,
            value=choice.temperature,
            step=0.05,
            label="temperature (0: greedy)",
            elem_id=f"{id}-temperature",
        ),
        gr.Number(choice.top_k, label="top-k (0: all)", precision=0, elem_id=f"{id}-top-k"),
    ]


def _seed(id: str) -> gr.Number:
    return gr.Number(0, label="seed", precision=0, elem_id=f"{id}-seed")


def _algorithm(studio: Studio, id: str) -> gr.Dropdown:
    names = studio.algorithms
    chosen = type(studio.defaults.algorithm).__name__
    value = chosen if chosen in names else Ancestral.__name__
    return gr.Dropdown(names, value=value, label="algorithm", elem_id=f"{id}-algorithm")


def _picture(label: str, id: str, **options: Any) -> gr.Image:
    """A picture that the page shows, below its name."""
    gr.Markdown(f"**{label}**")
    return gr.Image(
        show_label=False,
        elem_id=id,
        format="png",
        type="pil",
        interactive=False,
        buttons=["download"],
        **options,
    )


def _draw_tab(studio: Studio) -> gr.Image:
    with gr.Row():
        with gr.Column(scale=1, min_width=240):
            controls = [_subject(studio, "draw-subject"), *_how(studio, "draw"), _seed("draw")]
            controls.append(_algorithm(studio, "draw"))
            button = gr.Button("Draw", variant="primary", elem_id="draw-go")
        with gr.Column(scale=2, min_width=320):
            image = _picture("image", "draw-image")
            said = gr.Markdown(elem_id="draw-said")
            evaluations = _picture("tokens an evaluation", "draw-evaluations")
        with gr.Column(scale=2, min_width=320):
            tokens = _picture("tokens and their entropies", "draw-tokens")

    def draw(*values: Any) -> Iterator[tuple[Any, ...]]:
        try:
            for frame in studio.frames(Controls(*values)):
                yield frame.image, frame.tokens, frame.evaluations, frame.said
        except UserError as error:
            raise gr.Error(str(error), print_exception=False) from error

    button.click(
        draw,
        controls,
        [image, tokens, evaluations, said],
        show_progress="hidden",
        api_visibility="private",
    )
    return image


def _inpaint_tab(studio: Studio, drawn: gr.Image) -> None:
    with gr.Row():
        with gr.Column(scale=2, min_width=420):
            editor = gr.ImageEditor(
                type="pil",
                label="draw over what is to be drawn anew",
                sources=["upload"],
                brush=gr.Brush(default_size=40, colors=["#ff2020"], color_mode="fixed"),
                transforms=(),
                layers=False,
                canvas_size=(400, 400),
                format="png",
                elem_id="inpaint-editor",
            )
            take = gr.Button("Take the picture of the first tab", elem_id="inpaint-take")
        with gr.Column(scale=1, min_width=240):
            subject = _subject(studio, "inpaint-subject")
            controls = [subject, *_how(studio, "inpaint"), _seed("inpaint")]
            particles = gr.Number(1, label="particles", precision=0, elem_id="inpaint-particles")
            button = gr.Button("In-paint", variant="primary", elem_id="inpaint-go")
        with gr.Column(scale=2, min_width=320):
            image = _picture("in-painted", "inpaint-image")
            said = gr.Markdown(elem_id="inpaint-said")

    @said_by_gradio
    def inpaint(edited: Any, particles: Any, *values: Any) -> tuple[Any, ...]:
        return studio.inpaint(edited, Controls(*values), particles)

    @said_by_gradio
    def taken(picture: Image.Image | None) -> dict[str, Any]:
        if picture is None:
            raise UserError("nothing is drawn yet on the first tab")
        return {"background": picture, "layers": [], "composite": picture}

    take.click(taken, drawn, editor, api_visibility="private")
    button.click(inpaint, [editor, particles, *controls], [image, said], api_visibility="private")


def _reconstruct_tab(studio: Studio) -> None:
    least, most = studio.kept_range
    with gr.Row():
        with gr.Column(min_width=300):
            picture = gr.Image(
                label="picture",
                type="pil",
                sources=["upload"],
                elem_id="reconstruct-picture",
            )
            label = "tokens kept"
            if least == most:
                label = "tokens kept (this tokenizer decodes all of them or none)"
            kept = gr.Slider(
                min(least, most - 1) if most > 1 else 0,
                most,
                value=most,
                step=1,
                label=label,
                interactive=least < most,
                elem_id="reconstruct-kept",
            )
            button = gr.Button("Reconstruct", variant="primary", elem_id="reconstruct-go")
        with gr.Column(min_width=300):
            seen = _picture("as the tokenizer sees it", "reconstruct-seen")
        with gr.Column(min_width=300):
            image = _picture("reconstruction", "reconstruct-image")
            said = gr.Markdown(elem_id="reconstruct-said")
    reconstruct = said_by_gradio(studio.reconstruct)
    outputs = [seen, image, said]
    button.click(reconstruct, [picture, kept], outputs, api_visibility="private")
    kept.release(
        reconstruct, [picture, kept], outputs, api_visibility="private", trigger_mode="always_last"
    )


def _compare_tab(studio: Studio) -> None:
    with gr.Row():
        subject = _subject(studio, "compare-subject")
        seed = _seed("compare")
        count = gr.Slider(1, 16, value=4, step=1, label="images", elem_id="compare-count")
        button = gr.Button("Compare", variant="primary", elem_id="compare-go")
    sides = []
    images = []
    with gr.Row():
        for id, name in (("left", studio.name), ("right", studio.other_name or studio.name)):
            with gr.Column():
                gr.Markdown(f"**{name}**")
                sides.append([*_how(studio, id), _algorithm(studio, id)])
                images.append(_picture("images", f"compare-{id}"))
    width = len(sides[0])

    @said_by_gradio
    def compare(subject: str, seed: float, count: float, *values: Any) -> tuple[Any, ...]:
        asked = []
        for guidance, temperature, top_k, algorithm in (values[:width], values[width:]):
            asked.append(Controls(subject, guidance, temperature, top_k, int(seed or 0), algorithm))
        return studio.compare(asked[0], asked[1], count)

    button.click(
        compare, [subject, seed, count, *sides[0], *sides[1]], images, api_visibility="private"
    )


def show(studio: Studio, host: str, port: int, wait: bool = True) -> gr.Blocks:
    """Serve the page at `host`:`port`; returns when it is stopped, or at once without `wait`."""
    blocks = page(studio)
    blocks.queue()
    blocks.launch(
        server_name=host,
        server_port=port,
        share=False,
        quiet=True,
        prevent_thread_lock=not wait,
        enable_monitoring=False,
        ssr_mode=False,
        footer_links=[],
        theme=THEME,
    )
    return blocks
