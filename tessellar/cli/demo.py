"""`tessellar demo EXPORT`: a page to play with in the browser."""

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from tessellar.cli.functions import run_functions
from tessellar.cli.serve import listen
from tessellar.errors import UserError
from tessellar.page.studio import Studio
from tessellar.pipeline import load, load_generator
from tessellar.processes.diffusion import AncestralDiffusion, DiffusionSampler
from tessellar.processes.flow import EulerMaruyama, Flow
from tessellar.protocol.choice import Choice
from tessellar.protocol.guidance import Constant, GuidanceSchedule
from tessellar.protocol.packages import trust, trusted
from tessellar.protocol.ranges import check_whole
from tessellar.sampling.settings import Sampling


def demo(
    model: str,
    other: str | None = None,
    host: str = "127.0.0.1",
    port: int = 7860,
    guidance: GuidanceSchedule = Constant(),  # noqa: B008
    choice: Choice = Choice(),  # noqa: B008
    flow: Flow = EulerMaruyama(),  # noqa: B008
    diffusion: DiffusionSampler = AncestralDiffusion(),  # noqa: B008
    device: str = "auto",
    raw: bool = False,
    package: str = "",
) -> None:
    """A page in the browser: draw and watch, in-paint, reconstruct, compare two exports.

    Args:
        model: export folder, .safetensors, training checkpoint (.ckpt) or hub id; a tokenizer reconstructs only
        other: a second generator to compare with (default: the same one under other settings)
        host: address to listen at; anybody who reaches it may draw
        port: port to listen at; 0 takes a free one
        guidance: where the slider of guidance stands at first
        choice: where temperature and top-k stand at first
        flow: solver of a flow-matching generator and its steps
        diffusion: how tokens of a generator with a diffusion head are drawn
        device: auto, cpu, cuda, cuda:1, ...
        raw: weights of the last step instead of the averaged ones
        package: packages of others whose classes may be built, separated by commas
    """
    trust(package)
    check_whole("port", port, least=0, most=65535)
    if find_spec("gradio") is None:
        raise UserError("the page needs Gradio: pip install 'tessellar[demo]'")
    shown = load(model, device=device, raw=raw, trust=trusted())
    second = None
    if other is not None:
        second = load_generator(other, device=device, raw=raw, trust=trusted())
    studio = Studio(
        shown,
        called(model),
        other=second,
        other_name="" if other is None else called(other),
        defaults=Sampling(guidance, choice, flow=flow, diffusion=diffusion),
    )
    with listen(host, port) as listening:  # a free port, or one line that says it is taken
        free = listening.getsockname()[1]
    from tessellar.page.widgets import show

    print(f"the page is at http://{host}:{free} (Ctrl-C ends it)", flush=True)
    show(studio, host, free)


def called(path: str) -> str:
    """What a model is called: its folder, with the run's where the folder is named `export`."""
    place = Path(path).resolve()
    return f"{place.parent.name}/{place.name}" if place.name == "export" else place.name


def main(argv: Sequence[str] | None = None) -> None:
    """Entry of `tessellar demo`."""
    run_functions(demo, argv, "demo")
