"""What the page's events call: from the values of its widgets to what it shows. Needs no Gradio.

One lock: a model draws one thing at a time.
"""

import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from queue import Queue
from typing import Any, NamedTuple

from PIL import Image

from tessellar.errors import UserError
from tessellar.page import charts
from tessellar.page.material import Side, inpainted, least_kept, reconstructed, side_by_side
from tessellar.page.watching import Moment, Wish, watch
from tessellar.pipeline import ImageGenerator
from tessellar.protocol.choice import Choice
from tessellar.protocol.guidance import Constant
from tessellar.protocol.masked import MaskedGenerator
from tessellar.protocol.tokenizer import Tokenizer
from tessellar.sampling.algorithm import Algorithm
from tessellar.sampling.confidence import MaskGIT
from tessellar.sampling.decode import Ancestral
from tessellar.sampling.draft_model import DraftModel
from tessellar.sampling.flash import FlashDrafts
from tessellar.sampling.settings import ALGORITHMS, Sampling

NEEDS_FILES = (DraftModel, FlashDrafts)


class Controls(NamedTuple):
    """Values of the widgets that say how to draw."""

    subject: str
    guidance: float = 1.0
    temperature: float = 1.0
    top_k: int = 0
    seed: int = 0
    algorithm: str = "Ancestral"


class Frame(NamedTuple):
    """What the page shows of a moment; the chart of evaluations only when the image is finished."""

    image: Image.Image | None
    tokens: Image.Image
    evaluations: Image.Image | None
    said: str


@dataclass
class Studio:
    """The models of a page: an export, and a second one to compare it with."""

    model: ImageGenerator | Tokenizer
    name: str
    other: ImageGenerator | None = None
    other_name: str = ""
    defaults: Sampling = field(default_factory=Sampling)
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def tokenizer(self) -> Tokenizer:
        model = self.model
        return model.tokenizer if isinstance(model, ImageGenerator) else model

    @property
    def generator(self) -> ImageGenerator:
        """The model that draws; raises UserError where there is none."""
        if not isinstance(self.model, ImageGenerator):
            raise UserError(f"{self.name} is a tokenizer, which draws nothing")
        return self.model

    @property
    def subjects(self) -> list[str]:
        """Names (or ids) of the classes; empty for a model that reads text."""
        model = self.generator
        if model.num_classes is None:
            return []
        return list(model.class_names) or [str(label) for label in range(model.num_classes)]

    @property
    def algorithms(self) -> list[str]:
        """Names of the algorithms that the generator can be drawn by, as far as its kind says."""
        masked = isinstance(self.generator.generator, MaskedGenerator)
        if masked:
            return [Ancestral.__name__, MaskGIT.__name__]
        left_out = (*NEEDS_FILES, MaskGIT)
        return [each.__name__ for each in ALGORITHMS if each not in left_out]

    @property
    def kept_range(self) -> tuple[int, int]:
        """The fewest and the most tokens that a picture can be made of."""
        layout = self.tokenizer.layout
        return least_kept(layout), layout.length

    def wish(self, controls: Controls) -> Wish:
        """What the controls ask for; raises UserError for values out of range."""
        choice = Choice(
            temperature=float(controls.temperature),
            top_k=whole("top_k", controls.top_k),
            top_p=self.defaults.choice.top_p,
        )
        sampling = Sampling(
            guidance=Constant(float(controls.guidance)),
            choice=choice,
            algorithm=algorithm_of(controls.algorithm),
            flow=self.defaults.flow,
            diffusion=self.defaults.diffusion,
        )
        return Wish(controls.subject or "", sampling, whole("seed", controls.seed))

    def frames(self, controls: Controls) -> Iterator[Frame]:
        """The image of the controls as it appears; raises UserError for what cannot be drawn."""
        model = self.generator
        wish = self.wish(controls)
        for moment in self._moments(model, wish):
            yield frame_of(moment, model)

    def _moments(self, model: ImageGenerator, wish: Wish) -> Iterator[Moment]:
        """Moments of an image while a thread of its own draws it: it ends, whoever stops looking."""
        found: Queue[Moment | BaseException | None] = Queue()

        def draw() -> None:
            try:
                with self.lock:
                    watch(model, wish, found.put)
                found.put(None)
            except BaseException as error:  # raised again by the one who looks
                found.put(error)

        threading.Thread(target=draw, name="drawing", daemon=True).start()
        while (moment := found.get()) is not None:
            if isinstance(moment, BaseException):
                raise moment
            yield moment

    def inpaint(
        self, edited: Mapping[str, Any] | None, controls: Controls, particles: int
    ) -> tuple[Image.Image | None, str]:
        """What the editor shows, its drawn part drawn anew. Raises UserError without a picture."""
        picture = None if edited is None else edited.get("background")
        if edited is None or not isinstance(picture, Image.Image):
            raise UserError("give a picture first: upload one, or take the one that was drawn")
        layers: Sequence[Image.Image] = edited.get("layers") or []
        with self.lock:
            image, said = inpainted(
                self.generator,
                picture,
                layers,
                self.wish(controls),
                particles=whole("particles", particles),
            )
        return charts.shown(image), said

    def reconstruct(
        self, picture: Image.Image | None, kept: float
    ) -> tuple[Image.Image | None, Image.Image | None, str]:
        """A picture as the tokenizer sees it, and from its first tokens. Raises UserError without one."""
        if picture is None:
            raise UserError("upload a picture first")
        with self.lock:
            made = reconstructed(self.tokenizer, picture, whole("tokens", kept))
        return charts.shown(made.picture), charts.shown(made.image), made.said

    def compare(
        self, left: Controls, right: Controls, count: float
    ) -> tuple[Image.Image, Image.Image]:
        """Images of both sides for the same seeds: of the second model, or of the first one twice."""
        sides = [
            Side(self.generator, self.wish(left)),
            Side(self.other or self.generator, self.wish(right)),
        ]
        with self.lock:
            rows = side_by_side(sides, whole("images", count))
        columns = max(1, round(len(rows[0]) ** 0.5))
        pages = []
        for row in rows:
            lines = [row[start : start + columns] for start in range(0, len(row), columns)]
            pages.append(charts.rows_shown(lines))
        return pages[0], pages[1]


def frame_of(moment: Moment, model: ImageGenerator) -> Frame:
    """What the page shows of a moment."""
    evaluations = charts.commit_chart(moment.committed) if moment.is_finished else None
    tokens = charts.token_chart(moment, model.generator.layout)
    return Frame(charts.shown(moment.image), tokens, evaluations, moment.summary)


def algorithm_of(name: str) -> Algorithm:
    """An algorithm by its name, with its own options; raises UserError for another name."""
    for each in ALGORITHMS:
        if each.__name__ == name and each not in NEEDS_FILES:
            return each()  # type: ignore[call-arg]
    raise UserError(f"there is no algorithm {name!r} on this page")


def whole(name: str, value: Any) -> int:
    """A whole number of a widget; raises UserError for what is none."""
    try:
        number = int(value)
    except (TypeError, ValueError, OverflowError) as error:
        raise UserError(f"{name} is {value!r}; it must be a whole number") from error
    if number != value:
        raise UserError(f"{name} is {value!r}; it must be a whole number")
    return number
