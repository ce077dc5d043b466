"""`tessellar serve EXPORT`: images over HTTP, in the form of OpenAI's images endpoint."""

import socket
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from tessellar.cli.functions import run_functions
from tessellar.errors import UserError
from tessellar.pipeline import load_generator
from tessellar.processes.diffusion import AncestralDiffusion, DiffusionSampler
from tessellar.processes.flow import EulerMaruyama, Flow
from tessellar.protocol.choice import Choice
from tessellar.protocol.guidance import Constant, GuidanceSchedule
from tessellar.protocol.packages import trust, trusted
from tessellar.protocol.ranges import check_whole
from tessellar.sampling.algorithm import Algorithm
from tessellar.sampling.decode import Ancestral
from tessellar.sampling.settings import Sampling

NEEDED = ("fastapi", "uvicorn", "prometheus_client")


def serve(
    model: str,
    host: str = "127.0.0.1",
    port: int = 8000,
    name: str = "",
    guidance: GuidanceSchedule = Constant(),  # noqa: B008
    choice: Choice = Choice(),  # noqa: B008
    algorithm: Algorithm = Ancestral(),  # noqa: B008
    flow: Flow = EulerMaruyama(),  # noqa: B008
    diffusion: DiffusionSampler = AncestralDiffusion(),  # noqa: B008
    batch_size: int = 16,
    wait: float = 0.01,
    most_images: int = 16,
    most_waiting: int = 1024,
    precision: Literal["float32", "bf16"] = "float32",
    device: str = "auto",
    raw: bool = False,
    package: str = "",
) -> None:
    """Serve images of a generator over HTTP: POST /v1/images/generations, /health, /metrics.

    Args:
        model: export folder, .safetensors, training checkpoint (.ckpt) or hub id
        host: address to listen at; anybody who reaches it may ask, so a proxy should stand before others
        port: port to listen at; 0 takes a free one
        name: name of the model in requests (default: that of the folder)
        guidance: classifier-free guidance where a request names none
        choice: how a token is drawn, where a request says nothing
        algorithm: decoding algorithm where a request names none; --algorithm.help lists them
        flow: solver of a flow-matching generator and its steps
        diffusion: how tokens of a generator with a diffusion head are drawn
        batch_size: images that are drawn at once, of several requests where they are drawn alike
        wait: seconds that a batch which is not full waits for more
        most_images: images that one request may ask for
        most_waiting: images that may wait; a request beyond them is answered by 429
        precision: arithmetic of the generator
        device: auto, cpu, cuda, cuda:1, ...
        raw: weights of the last step instead of the averaged ones
        package: packages of others whose classes may be built, separated by commas
    """
    trust(package)
    missing = [needed for needed in NEEDED if find_spec(needed) is None]
    if missing:
        raise UserError(f"serving needs {', '.join(missing)}: pip install 'tessellar[serve]'")
    import uvicorn

    from tessellar.serving.app import Server, application
    from tessellar.serving.orders import Limits

    limits = Limits(pictures=most_images, waiting=most_waiting)
    check_whole("port", port, least=0, most=65535)
    generator = load_generator(model, device=device, raw=raw, trust=trusted())
    listening = listen(host, port)
    server = Server(
        generator,
        name or Path(model).resolve().name,
        defaults=Sampling(guidance, choice, algorithm, flow, diffusion),
        limits=limits,
        batch_size=batch_size,
        wait=wait,
        precision=precision,
    )
    bound = listening.getsockname()[1]
    print(f"serving {server.name} at http://{host}:{bound}/v1/images/generations", flush=True)
    config = uvicorn.Config(application(server), log_level="warning")
    uvicorn.Server(config).run(sockets=[listening])


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens; raises UserError where it cannot."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=1024)
    except OSError as error:
        raise UserError(
            f"cannot listen at {host}:{port} ({error.strerror or error}): give --host and --port"
        ) from error


def main(argv: Sequence[str] | None = None) -> None:
    """Entry of `tessellar serve`."""
    run_functions(serve, argv, "serve")
