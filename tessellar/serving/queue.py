"""The queue: pictures of all requests that wait, drawn in batches of those that are drawn alike.

A batch is filled from the front of the queue with pictures of the same settings of sampling, up to
`batch_size`; while it is not full it waits `wait` seconds for more. So the first request is always
the next one, and many small requests cost as much as a few large ones. Picture i of a request has its
own seed, so its tokens do not depend on what else is in the batch; its pixels by one level at most.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tessellar.errors import UserError
from tessellar.pipeline import ImageGenerator
from tessellar.protocol.condition import Condition
from tessellar.protocol.ranges import check_name, check_number, check_whole
from tessellar.sampling.report import Recorder
from tessellar.sampling.run import MAX_IMAGES, PRECISIONS, draw
from tessellar.sampling.settings import Sampling
from tessellar.serving.orders import Order
from tessellar.text.conditioners import TextConditioner

log = logging.getLogger(__name__)


class Full(UserError):
    """The queue takes no more pictures now."""


class Abandoned(Exception):
    """Nobody waits for the batch that is being drawn."""


class Made(NamedTuple):
    """A picture: uint8 [3, H, W], its tokens [N, ...] on the CPU, how many were drawn in its batch."""

    image: Tensor
    tokens: Tensor
    batch: int


@dataclass(eq=False)
class Ticket:
    """A request in the queue; `pictures` is done when all of them are. Cancelling it takes what is
    not drawn yet out of the queue.
    """

    order: Order
    pictures: "Future[list[Made]]" = field(default_factory=Future)
    made: dict[int, Made] = field(default_factory=dict)

    @property
    def is_wanted(self) -> bool:
        """Whether anybody still waits for it."""
        return not self.pictures.done()

    def cancel(self) -> bool:
        """Give the request up; False where it is finished already."""
        return self.pictures.cancel()


class Waiting(NamedTuple):
    """One picture in the queue: the `index`-th of a request."""

    ticket: Ticket
    index: int

    @property
    def seed(self) -> int:
        return self.ticket.order.seed + self.index

    @property
    def sampling(self) -> Sampling:
        return self.ticket.order.sampling


class Batch(NamedTuple):
    """What was drawn at once, for the counters."""

    pictures: int
    evaluations: int
    tokens: int
    seconds: float


@dataclass
class WatchingRecorder(Recorder):
    """Counts evaluations, and ends the run when `is_wanted` says that nobody waits for it."""

    is_wanted: Callable[[], bool] = lambda: True

    @contextmanager
    def network(self, device: torch.device) -> Iterator[None]:
        if not self.is_wanted():
            raise Abandoned
        with super().network(device):
            yield


class Queue:
    """Draws what is submitted, in one thread, batch by batch.

    `finished` is told of each batch. Raises UserError for a batch size or a time to wait that is out
    of range.
    """

    def __init__(
        self,
        model: ImageGenerator,
        *,
        batch_size: int = 16,
        wait: float = 0.01,
        most_waiting: int = 1024,
        precision: str = "float32",
        finished: Callable[[Batch], None] = lambda batch: None,
    ) -> None:
        check_whole("batch size", batch_size, least=1, most=MAX_IMAGES)
        check_number("wait", wait, least=0, most=60)
        check_name("precision", precision, PRECISIONS)
        self.model = model.eval()
        self.batch_size = batch_size
        self.wait = wait
        self.most_waiting = most_waiting
        self.precision = precision
        self.finished = finished
        self.running = 0
        self._waiting: deque[Waiting] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="pictures", daemon=True)
        self._thread.start()

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive()

    @property
    def waiting(self) -> int:
        """Pictures that are asked for and not begun."""
        with self._changed:
            return sum(picture.ticket.is_wanted for picture in self._waiting)

    def submit(self, order: Order) -> Ticket:
        """Put all pictures of an order into the queue; raises Full where they have no room."""
        ticket = Ticket(order)
        with self._changed:
            self._drop_unwanted()
            if self._closed:
                raise Full("the server is closing")
            if len(self._waiting) + order.count > self.most_waiting:
                raise Full(
                    f"{len(self._waiting)} pictures wait, and {self.most_waiting} may: try again later"
                )
            self._waiting.extend(Waiting(ticket, index) for index in range(order.count))
            self._changed.notify()
        return ticket

    def close(self) -> None:
        """Draw what waits, then end the thread."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        while True:
            batch = self._next()
            if batch is None:
                return
            self.running = len(batch)
            try:
                self._draw(batch)
            finally:
                self.running = 0

    def _next(self) -> list[Waiting] | None:
        """The next batch, in the order of the seeds; None when the queue is closed and empty.

        In that order a set of pictures is computed in the same way however its requests came in.
        """
        with self._changed:
            while True:
                self._drop_unwanted()
                if self._waiting:
                    break
                if self._closed:
                    return None
                self._changed.wait()
            latest = time.monotonic() + self.wait
            while not self._closed and len(self._alike()) < self.batch_size:
                left = latest - time.monotonic()
                if left <= 0 or not self._changed.wait(left):
                    break
            self._drop_unwanted()
            batch = self._alike()
            for picture in batch:
                self._waiting.remove(picture)
        return sorted(batch, key=lambda picture: picture.seed)

    def _drop_unwanted(self) -> None:
        if any(not picture.ticket.is_wanted for picture in self._waiting):
            wanted = [picture for picture in self._waiting if picture.ticket.is_wanted]
            self._waiting = deque(wanted)

    def _alike(self) -> list[Waiting]:
        """Pictures from the front of the queue that are drawn as the first one is, one batch at most."""
        alike: list[Waiting] = []
        for picture in self._waiting:
            if picture.sampling == self._waiting[0].sampling:
                alike.append(picture)
            if len(alike) == self.batch_size:
                break
        return alike

    def _draw(self, batch: list[Waiting]) -> None:
        """Draw a batch and hand its pictures out; whatever goes wrong is the answer to its requests."""
        if not batch:  # the last request left while the batch was waiting for more
            return
        recorder = WatchingRecorder(
            is_wanted=lambda: any(picture.ticket.is_wanted for picture in batch)
        )
        started = time.perf_counter()
        try:
            drawn = draw(
                self.model,
                conditions_of(self.model, batch),
                batch[0].sampling,
                [picture.seed for picture in batch],
                precision=self.precision,
                recorder=recorder,
            )
        except Abandoned:
            return
        except Exception as error:
            self._failed(batch, error)
            return
        seconds = time.perf_counter() - started
        self.finished(Batch(len(batch), recorder.evaluations, recorder.tokens, seconds))
        rows = zip(batch, drawn.images, drawn.tokens.cpu(), strict=True)
        for picture, image, tokens in rows:
            hand_out(picture, Made(image, tokens, len(batch)))

    def _failed(self, batch: list[Waiting], error: Exception) -> None:
        """A batch that failed is drawn again request by request: one of them must not end the others;
        and of too many pictures for the memory, half of them at once.
        """
        tickets = list(dict.fromkeys(picture.ticket for picture in batch))
        if len(tickets) > 1:
            for ticket in tickets:
                self._draw([picture for picture in batch if picture.ticket is ticket])
        elif isinstance(error, torch.OutOfMemoryError) and len(batch) > 1:
            middle = len(batch) // 2
            self._draw(batch[:middle])
            self._draw(batch[middle:])
        else:
            if not isinstance(error, UserError):
                log.error("request %s failed", tickets[0].order.id, exc_info=error)
            answer(tickets[0], error)


def conditions_of(model: ImageGenerator, batch: Sequence[Waiting]) -> Condition:
    """The condition of each picture of a batch, by row."""
    orders = [(picture.ticket.order, picture.index) for picture in batch]
    if isinstance(model.conditioner, TextConditioner):
        texts = []
        for order, index in orders:
            assert order.texts is not None
            texts.append(order.texts[index])
        return model.conditioner.of_texts(texts)
    return model.class_condition([order.labels[index] for order, index in orders])


def hand_out(picture: Waiting, made: Made) -> None:
    """Give a picture to its request, which is finished with its last one."""
    ticket = picture.ticket
    ticket.made[picture.index] = made
    if len(ticket.made) == ticket.order.count:
        answer(ticket, [ticket.made[index] for index in range(ticket.order.count)])


def answer(ticket: Ticket, outcome: Any) -> None:
    """Finish a request by its pictures or by an error, unless it was cancelled meanwhile."""
    if ticket.pictures.done() or not ticket.pictures.set_running_or_notify_cancel():
        return
    if isinstance(outcome, Exception):
        ticket.pictures.set_exception(outcome)
    else:
        ticket.pictures.set_result(outcome)
