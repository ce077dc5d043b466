"""Counters of a server in the text form of Prometheus."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from tessellar.serving.queue import Batch, Queue

SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100)


class Metrics:
    """What a server counts; `text()` is the page `/metrics`."""

    def __init__(self) -> None:
        registry = CollectorRegistry()
        self.registry = registry
        self.requests = Counter(
            "tessellar_requests", "Requests for images by outcome", ["outcome"], registry=registry
        )
        self.pictures = Counter("tessellar_images", "Images drawn", registry=registry)
        self.tokens = Counter("tessellar_tokens", "Tokens drawn", registry=registry)
        self.evaluations = Counter(
            "tessellar_evaluations", "Evaluations of the generator, by image", registry=registry
        )
        self.sizes = Histogram(
            "tessellar_batch_images", "Images of a batch", registry=registry, buckets=SIZES
        )
        self.batch_seconds = Histogram(
            "tessellar_batch_seconds", "Time of a batch", registry=registry, buckets=SECONDS
        )
        self.request_seconds = Histogram(
            "tessellar_request_seconds",
            "Time of a request that was served, waiting included",
            registry=registry,
            buckets=SECONDS,
        )
        for outcome in ("served", "refused", "full", "cancelled", "failed"):
            self.requests.labels(outcome)

    def finished(self, batch: Batch) -> None:
        """Count a batch."""
        self.pictures.inc(batch.pictures)
        self.tokens.inc(batch.tokens)
        self.evaluations.inc(batch.evaluations)
        self.sizes.observe(batch.pictures)
        self.batch_seconds.observe(batch.seconds)

    def watch(self, queue: Queue) -> None:
        """Show how many pictures wait and are drawn."""
        waiting = Gauge("tessellar_waiting_images", "Images that wait", registry=self.registry)
        waiting.set_function(lambda: queue.waiting)
        running = Gauge("tessellar_running_images", "Images being drawn", registry=self.registry)
        running.set_function(lambda: queue.running)

    def text(self) -> bytes:
        """All counters."""
        return generate_latest(self.registry)
