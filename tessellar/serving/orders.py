"""What a client may ask for: the JSON of a request, and the order that is made of it.

The fields are those of OpenAI's images endpoint (`prompt`, `n`, `size`, `response_format`, `user`,
`model`), and ours: `class`, `seed`, `guidance`, `temperature`, `top_k`, `top_p`, `min_p`, `algorithm`,
`tokens`, `id`. Whatever is not taken is answered by one line that says what would be.
"""

import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationError

from tessellar.errors import UserError, in_one_line
from tessellar.pipeline import ImageGenerator
from tessellar.protocol.choice import Choice
from tessellar.protocol.configured import build, class_path
from tessellar.protocol.guidance import Constant, GuidanceSchedule
from tessellar.protocol.nearest import nearest
from tessellar.protocol.ranges import check_whole
from tessellar.sampling.algorithm import Algorithm
from tessellar.sampling.draft_model import DraftModel
from tessellar.sampling.flash import FlashDrafts
from tessellar.sampling.run import balanced_labels, check_seed
from tessellar.sampling.settings import ALGORITHMS, Sampling
from tessellar.text.conditioners import TextConditioner

SERVED = tuple(each for each in ALGORITHMS if each not in (DraftModel, FlashDrafts))
NAME = re.compile(r"[\w.-]{1,64}")
DRAWN_SEEDS = 1 << 32  # seeds that the server draws, where a request names none
LARGEST_OPTION = 10_000  # of whole numbers among the options of an algorithm

Options = dict[str, int | float | bool | str | list[int | float] | None]


class GenerationRequest(BaseModel):
    """The body of a request, as it comes."""

    model_config = ConfigDict(extra="forbid", strict=True, populate_by_name=False)

    prompt: str | None = None
    classes: str | int | list[str | int] | None = Field(default=None, alias="class")
    n: int = 1
    size: str = "auto"
    seed: int | None = None
    response_format: str = "b64_json"
    output_format: str = "png"
    model: str | None = None
    user: str | None = None
    guidance: FiniteFloat | Options | None = None
    temperature: FiniteFloat | None = None
    top_k: int | None = None
    top_p: FiniteFloat | None = None
    min_p: FiniteFloat | None = None
    algorithm: str | Options | None = None
    tokens: bool = False
    id: str | None = None


@dataclass(frozen=True)
class Limits:
    """What one request may ask for, and how much may wait: pictures a request, characters of a prompt,
    bytes of a body, pictures in the queue.
    """

    pictures: int = 16
    prompt: int = 2000
    body: int = 64 * 1024
    waiting: int = 1024

    def __post_init__(self) -> None:
        for name in ("pictures", "prompt", "body", "waiting"):
            check_whole(f"limit of {name}", getattr(self, name), least=1)


@dataclass(frozen=True)
class Order:
    """Pictures of one request: picture i of `labels[i]` (or `texts[i]`) by seed `seed + i`."""

    id: str
    seed: int
    sampling: Sampling
    labels: tuple[int, ...]
    texts: tuple[str, ...] | None = None
    shows_tokens: bool = False

    @property
    def count(self) -> int:
        return len(self.labels)


def read_request(body: bytes) -> GenerationRequest:
    """The request in a body; raises UserError, in one line, for what is none."""
    try:
        return GenerationRequest.model_validate_json(body)
    except ValidationError as error:
        raise UserError(first_mistake(error)) from error


def first_mistake(error: ValidationError) -> str:
    """The first thing that is wrong in a body, in one line."""
    found = error.errors(include_url=False, include_context=False)[0]
    place = found["loc"]
    name = str(place[0]) if place else ""
    if found["type"] == "json_invalid":
        return in_one_line(f"the body is no JSON ({found['msg'][:160]})")
    if not name:
        return 'the body must be a JSON object, such as {"prompt": "...", "n": 1}'
    if found["type"] == "extra_forbidden":
        names = [field.alias or name for name, field in GenerationRequest.model_fields.items()]
        return in_one_line(f"there is no field {name[:80]!r}{nearest(name, names, listed=20)}")
    given = repr(found["input"])[:80]
    return in_one_line(f"{name} is {given}; {found['msg'][:1].lower()}{found['msg'][1:]}")


def order_of(
    request: GenerationRequest,
    model: ImageGenerator,
    name: str,
    defaults: Sampling,
    limits: Limits,
) -> Order:
    """The order of a request to the model called `name`; `defaults` hold where it says nothing.

    Raises UserError, in one line, for what the model or the limits do not take.
    """
    check_fixed(request, model, name)
    check_whole("n", request.n, least=1, most=limits.pictures)
    if request.id is not None and not NAME.fullmatch(request.id):
        raise UserError("id must be 1 to 64 letters, digits, dots, dashes or underscores")
    seed = secrets.randbelow(DRAWN_SEEDS) if request.seed is None else request.seed
    check_seed(seed, request.n)
    labels, texts = subjects(request, model, limits)
    return Order(
        id=request.id or secrets.token_hex(12),
        seed=seed,
        sampling=sampling_of(request, defaults),
        labels=tuple(balanced_labels(request.n, labels)),
        texts=texts,
        shows_tokens=request.tokens,
    )


def check_fixed(request: GenerationRequest, model: ImageGenerator, name: str) -> None:
    """Raise UserError for a model, a size or a form of answer that is not served."""
    if request.model not in (None, name):
        raise UserError(f"there is no model {request.model[:80]!r} here; there is {name!r}")
    height, width = model.image_size
    if request.size not in ("auto", f"{width}x{height}"):
        raise UserError(
            f"size is {request.size[:40]!r}; this model makes images of {width}x{height} (or say auto)"
        )
    if request.response_format != "b64_json":
        raise UserError(
            f"response_format is {request.response_format[:40]!r}; no pictures are kept here that a URL "
            "could name: take b64_json"
        )
    if request.output_format != "png":
        raise UserError(f"output_format is {request.output_format[:40]!r}; images are png")


def subjects(
    request: GenerationRequest, model: ImageGenerator, limits: Limits
) -> tuple[list[int], tuple[str, ...] | None]:
    """Labels to go round, and the texts of all pictures for a model that reads text."""
    if request.prompt is not None and request.classes is not None:
        raise UserError("give either prompt or class, not both")
    if request.prompt is not None and len(request.prompt) > limits.prompt:
        raise UserError(
            f"the prompt has {len(request.prompt)} characters; at most {limits.prompt} are read"
        )
    if isinstance(model.conditioner, TextConditioner):
        if request.prompt is None or not request.prompt.strip():
            raise UserError("this model reads text: give prompt")
        return [0], (request.prompt.strip(),) * request.n
    named = request.prompt if request.classes is None else request.classes
    if named is None:
        raise UserError("say what to draw: class (or prompt), a name or an id of a class")
    try:
        return model.class_ids(named), None
    except OverflowError as error:
        raise UserError(f"class is {str(named)[:40]}, which is no class id") from error


def sampling_of(request: GenerationRequest, defaults: Sampling) -> Sampling:
    """How the pictures are drawn: the server's settings with those of the request in their place."""
    guidance = defaults.guidance
    if isinstance(request.guidance, dict):
        guidance = chosen("guidance", request.guidance, tuple(schedules(GuidanceSchedule)))
    elif request.guidance is not None:
        guidance = Constant(float(request.guidance))
    algorithm = defaults.algorithm
    if request.algorithm is not None:
        given = request.algorithm
        options = {"name": given} if isinstance(given, str) else given
        algorithm = chosen("algorithm", options, SERVED)
        check_cheap(algorithm)
    given_choice: dict[str, Any] = {}
    for name in ("temperature", "top_k", "top_p", "min_p"):
        value = getattr(request, name)
        if value is not None:
            given_choice[name] = value
    choice: Choice = replace(defaults.choice, **given_choice)
    return replace(defaults, guidance=guidance, choice=choice, algorithm=algorithm)


def schedules(base: type) -> list[type]:
    """Public classes of schedules below `base`."""
    found = []
    for below in base.__subclasses__():
        if not below.__name__.startswith("_"):
            found.append(below)
        found += schedules(below)
    return found


def chosen(field: str, options: Mapping[str, Any], classes: tuple[type, ...]) -> Any:
    """The class that `options["name"]` names among `classes`, made with the other options."""
    names = {cls.__name__: cls for cls in classes}
    name = options.get("name")
    if not isinstance(name, str) or name not in names:
        hint = nearest(str(name)[:80], names, listed=20)
        raise UserError(f"{field} is {str(name)[:80]!r}, which is none that is served here{hint}")
    cls = names[name]
    given = {option: value for option, value in options.items() if option != "name"}
    known = [option for option in getattr(cls, "__dataclass_fields__", {})]
    for option, value in given.items():
        if option not in known:
            hint = nearest(option, known, listed=20)
            raise UserError(f"{name} ({field}) has no option {option[:80]!r}{hint}")
        whole = isinstance(value, int) and not isinstance(value, bool)
        if whole:
            check_whole(f"{option} of {name}", value, least=0, most=LARGEST_OPTION)
    config = {"class_path": class_path(cls), "init_args": given}
    return build(config, cls, where=f"{field} {name}")


def check_cheap(algorithm: Algorithm) -> None:
    """Raise UserError for what would hold up the requests of others."""
    if algorithm.compile:
        raise UserError("compiling takes minutes: start the server with --algorithm.compile")
