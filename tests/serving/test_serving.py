"""`tessellar serve`: what it draws is what `sample.py` draws; bad input is one line; the queue's batches."""

import asyncio
import base64
import io
import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from fastapi.testclient import TestClient
from PIL import Image

from tessellar.checkpoints.export import export_generator
from tessellar.cli.sample import main as sample_main
from tessellar.images import to_uint8
from tessellar.pipeline import ImageGenerator
from tessellar.sampling.settings import Sampling
from tessellar.sampling.speculative import SpeculativeJacobi
from tessellar.serving.app import Server, application
from tessellar.serving.orders import Limits, Order
from tessellar.serving.queue import Batch, Full, Queue
from tests.tiny.image_generators import of_captions, of_classes

ROOT = Path(__file__).parents[2]
NAMES = ("circle", "star", "ring")
URL = "/v1/images/generations"


@pytest.fixture(scope="module")
def model() -> ImageGenerator:
    return of_classes(NAMES)


@pytest.fixture
def client(model: ImageGenerator) -> Iterator[TestClient]:
    server = Server(model, "tiny", limits=Limits(pictures=8, prompt=40, body=2000))
    with TestClient(application(server)) as client:
        yield client


def pixels(item: dict[str, Any]) -> torch.Tensor:
    picture = Image.open(io.BytesIO(base64.b64decode(item["b64_json"])))
    assert picture.mode == "RGB"
    return torch.from_numpy(np.array(picture)).int()


def test_images_are_those_of_sample_py_to_the_byte(
    client: TestClient, model: ImageGenerator, tmp_path: Path
) -> None:
    export = export_generator(model, tmp_path / "export")
    words = ["--classes", "star,0", "--count", "4", "--seed", "7", "--batch-size", "4"]
    words += ["--guidance.scale", "1.5", "--choice.temperature", "0.9", "--choice.top_k", "9"]
    sample_main([str(export), "--out", str(tmp_path / "set"), *words])
    files = sorted((tmp_path / "set").glob("0*.png"))
    body = {"class": "star,0", "n": 4, "seed": 7, "guidance": 1.5, "temperature": 0.9, "top_k": 9}
    answer = client.post(URL, json={**body, "size": "8x8", "user": "me", "model": "tiny"}).json()
    assert [item["batch"] for item in answer["data"]] == [4] * 4
    assert [item["class_name"] for item in answer["data"]] == ["star", "circle"] * 2
    assert [item["seed"] for item in answer["data"]] == [7, 8, 9, 10] and answer["seed"] == 7
    served = [base64.b64decode(item["b64_json"]) for item in answer["data"]]
    assert served == [file.read_bytes() for file in files]


def test_tokens_do_not_depend_on_the_batch(client: TestClient, model: ImageGenerator) -> None:
    body = {"class": 1, "n": 5, "seed": 3, "algorithm": {"name": "SpeculativeJacobi", "window": 3}}
    together = client.post(URL, json={**body, "tokens": True}).json()["data"]
    sampling = Sampling(algorithm=SpeculativeJacobi(window=3))
    expected = model.sample_tokens(model.class_condition([1] * 5), sampling, range(3, 8))
    assert [item["tokens"] for item in together] == expected.tolist()
    for index, item in enumerate(together):
        alone = {**body, "n": 1, "seed": 3 + index, "tokens": True}
        single = client.post(URL, json=alone).json()["data"][0]
        assert single["tokens"] == item["tokens"]
        assert (pixels(single) - pixels(item)).abs().max() <= 1


def test_a_seed_is_drawn_and_told(client: TestClient) -> None:
    first = client.post(URL, json={"prompt": "ring"}).json()
    second = client.post(URL, json={"prompt": "ring"}).json()
    assert first["seed"] != second["seed"]
    again = client.post(URL, json={"prompt": "ring", "seed": first["seed"]}).json()
    assert again["data"] == first["data"]


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"{", "the body is no JSON"),
        (b"[1]", "must be a JSON object"),
        (b'{"prompt": "\xff"}', "the body is no JSON"),
        ({}, "say what to draw"),
        ({"prompt": "sqare"}, "there is no class 'sqare'"),
        ({"class": 3}, "class id 3 does not exist; classes are 0 to 2"),
        ({"class": -1}, "class id -1 does not exist"),
        ({"class": 10**30}, "class id"),
        ({"class": []}, "no class is named"),
        ({"class": 1, "prompt": "star"}, "either prompt or class"),
        ({"prompt": "s" * 41}, "has 41 characters; at most 40"),
        ({"prompt": "x" * 3000}, "more than 2000 bytes"),
        ({"class": 1, "n": 0}, "n is 0; it must be an integer in [1, 8]"),
        ({"class": 1, "n": 9}, "n is 9; it must be an integer in [1, 8]"),
        ({"class": 1, "n": "2"}, "n is '2'; input should be a valid integer"),
        ({"class": 1, "size": "1024x1024"}, "this model makes images of 8x8"),
        ({"class": 1, "response_format": "url"}, "take b64_json"),
        ({"class": 1, "output_format": "webp"}, "images are png"),
        ({"class": 1, "model": "dall-e-3"}, "there is 'tiny'"),
        ({"class": 1, "seed": -1}, "seed is -1"),
        ({"class": 1, "seed": 2**63}, "seed is"),
        (b'{"class": 1, "temperature": NaN}', "temperature is nan"),
        ({"class": 1, "temperature": -1}, "temperature is -1"),
        ({"class": 1, "guidance": 1e9}, "guidance"),
        ({"class": 1, "guidance": {"name": "Linaer"}}, "did you mean 'Linear'"),
        ({"class": 1, "guidence": 2}, "there is no field 'guidence'; did you mean 'guidance'?"),
        ({"class": 1, "algorithm": "Anzestral"}, "did you mean 'Ancestral'"),
        ({"class": 1, "algorithm": "DraftModel"}, "none that is served here"),
        ({"class": 1, "algorithm": {"name": "Ancestral", "compile": True}}, "takes minutes"),
        (
            {"class": 1, "algorithm": {"name": "SpeculativeJacobi", "window": 10**9}},
            "window of Spec",
        ),
        (
            {"class": 1, "algorithm": {"name": "SpeculativeJacobi", "windwo": 1}},
            "no option 'windwo'",
        ),
        ({"class": 1, "algorithm": "MaskGIT"}, "MaskGIT"),  # met only when it is drawn
        ({"class": 1, "id": "a b"}, "id must be"),
        (b'{"prompt": "a\\nb\\u2028c"}', "there is no class 'a\\nb"),
    ],
)
def test_bad_input_is_answered_by_one_line(client: TestClient, body: Any, said: str) -> None:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    answer = client.post(URL, content=content)
    assert answer.status_code in (400, 413)
    error = answer.json()["error"]
    assert said in error["message"] and len(error["message"].splitlines()) == 1
    assert client.post(URL, json={"class": 0, "seed": 1}).status_code == 200


def test_unknown_paths_and_methods_are_errors_of_the_same_form(client: TestClient) -> None:
    assert client.get("/v1/nothing").json()["error"]["code"] == 404
    assert client.get(URL).json()["error"]["code"] == 405
    assert "no request 'x' is open" in client.delete(f"{URL}/x").json()["error"]["message"]


def test_health_models_and_metrics(client: TestClient) -> None:
    client.post(URL, json={"class": "all", "n": 3, "seed": 1})
    client.post(URL, json={"class": 9})
    health = client.get("/health").json()
    assert health["status"] == "ok" and health["size"] == "8x8" and health["waiting"] == 0
    assert client.get("/v1/models").json()["data"][0]["class_names"] == list(NAMES)
    lines = client.get("/metrics").text.splitlines()
    assert "tessellar_images_total 3.0" in lines and "tessellar_tokens_total 12.0" in lines
    assert "tessellar_evaluations_total 12.0" in lines and "tessellar_waiting_images 0.0" in lines
    assert 'tessellar_requests_total{outcome="served"} 1.0' in lines
    assert 'tessellar_requests_total{outcome="refused"} 1.0' in lines
    assert 'tessellar_batch_images_bucket{le="4.0"} 1.0' in lines


class Gate:
    """Holds a model's drawing until it is opened."""

    def __init__(self, model: ImageGenerator, monkeypatch: pytest.MonkeyPatch) -> None:
        self.open = threading.Event()
        self.begun = threading.Event()
        predict = model.generator.predict

        def held(*args: Any, **kwargs: Any) -> Any:
            self.begun.set()
            assert self.open.wait(20)
            return predict(*args, **kwargs)

        monkeypatch.setattr(model.generator, "predict", held)


@pytest.fixture
def gate(model: ImageGenerator, monkeypatch: pytest.MonkeyPatch) -> Gate:
    return Gate(model, monkeypatch)


def order(name: str, seed: int = 0, count: int = 1, sampling: Sampling | None = None) -> Order:
    return Order(name, seed, sampling or Sampling(), (0,) * count)


def test_what_is_drawn_alike_is_drawn_together(model: ImageGenerator, gate: Gate) -> None:
    batches: list[Batch] = []
    queue = Queue(model, batch_size=4, wait=0, finished=batches.append)
    first = queue.submit(order("first"))
    assert gate.begun.wait(20)
    warm = Sampling(guidance=2.0)
    others = [queue.submit(order("a", 5)), queue.submit(order("b", 1, 2, warm))]
    others += [queue.submit(order("c", 2, 3)), queue.submit(order("d", 9))]
    assert queue.waiting == 7
    gate.open.set()
    queue.close()
    assert [batch.pictures for batch in batches] == [1, 4, 2, 1]  # a + c, b, d
    for ticket in (first, *others):
        assert len(ticket.pictures.result()) == ticket.order.count
    expected = model.sample(classes=[0] * 3, seed=2, output="uint8")
    together = torch.stack([made.image for made in others[2].pictures.result()])
    assert (together.int() - expected.int()).abs().max() <= 1


def test_a_full_queue_says_so_and_a_cancelled_request_makes_room(
    model: ImageGenerator, gate: Gate
) -> None:
    batches: list[Batch] = []
    queue = Queue(model, batch_size=4, wait=0, most_waiting=3, finished=batches.append)
    running = queue.submit(order("running"))
    assert gate.begun.wait(20)
    waiting = queue.submit(order("waiting", 1, 3))
    with pytest.raises(Full, match="3 pictures wait, and 3 may"):
        queue.submit(order("late", 4))
    assert waiting.cancel() and queue.waiting == 0
    late = queue.submit(order("late", 4))
    gate.open.set()
    queue.close()
    assert len(running.pictures.result()) == len(late.pictures.result()) == 1
    assert [batch.pictures for batch in batches] == [1, 1]
    with pytest.raises(Full, match="closing"):
        queue.submit(order("after"))


def test_a_batch_that_nobody_waits_for_is_given_up(model: ImageGenerator, gate: Gate) -> None:
    batches: list[Batch] = []
    queue = Queue(model, wait=0, finished=batches.append)
    ticket = queue.submit(order("gone", 0, 2))
    assert gate.begun.wait(20) and ticket.cancel()
    gate.open.set()
    after = queue.submit(order("after"))
    queue.close()
    assert len(after.pictures.result()) == 1 and [batch.pictures for batch in batches] == [1]


def test_one_bad_request_does_not_end_those_of_its_batch(model: ImageGenerator, gate: Gate) -> None:
    queue = Queue(model, wait=0)
    first = queue.submit(order("first"))
    assert gate.begun.wait(20)
    bad = queue.submit(Order("bad", 1, Sampling(), (77,)))
    good = queue.submit(order("good", 2))
    gate.open.set()
    queue.close()
    assert len(first.pictures.result()) == len(good.pictures.result()) == 1
    assert bad.pictures.exception() is not None


def test_delete_ends_a_request(model: ImageGenerator, gate: Gate) -> None:
    with TestClient(application(Server(model, "tiny"))) as client:
        answers: list[Any] = []
        body = {"class": 0, "id": "mine", "seed": 1}
        asking = threading.Thread(target=lambda: answers.append(client.post(URL, json=body)))
        asking.start()
        assert gate.begun.wait(20)
        assert "'mine' is open already" in client.post(URL, json=body).json()["error"]["message"]
        assert client.delete(f"{URL}/mine").json() == {"id": "mine", "cancelled": True}
        asking.join(20)
        assert answers[0].status_code == 409 and answers[0].json()["error"]["type"] == "cancelled"
        gate.open.set()
        assert client.delete(f"{URL}/mine").status_code == 404
        outcome = 'tessellar_requests_total{outcome="cancelled"} 1.0'
        assert outcome in client.get("/metrics").text


def test_prompts_of_a_model_that_reads_text() -> None:
    model = of_captions()
    with TestClient(application(Server(model, "tiny"))) as client:
        body = {"prompt": "a red circle", "n": 2, "seed": 4}
        data = client.post(URL, json={**body, "tokens": True}).json()["data"]
        condition = model.conditioner.of_texts(["a red circle"] * 2)  # type: ignore[operator]
        tokens = model.sample_tokens(condition, Sampling(), [4, 5])
        assert [item["tokens"] for item in data] == tokens.tolist()
        images = to_uint8(model.decode(tokens)).permute(0, 2, 3, 1).int()
        assert (torch.stack([pixels(item) for item in data]) - images).abs().max() <= 1
        error = client.post(URL, json={"prompt": " "}).json()["error"]
        assert error["message"] == "this model reads text: give prompt"
        assert "give prompt" in client.post(URL, json={"class": 1}).json()["error"]["message"]


def test_an_image_is_served_while_others_wait_for_more(model: ImageGenerator) -> None:
    """A batch that is full does not wait; one that is not waits no longer than it is told."""
    queue = Queue(model, batch_size=2, wait=30)
    started = time.monotonic()
    tickets = [queue.submit(order("a")), queue.submit(order("b", 1))]
    for ticket in tickets:
        assert ticket.pictures.result(timeout=20)[0].batch == 2
    queue.close()
    assert time.monotonic() - started < 20


@pytest.mark.long
def test_200_requests_at_once_lose_none(model: ImageGenerator, tmp_path: Path) -> None:
    """Over real sockets, by the command; every answer holds the tokens of its own seed."""
    export = export_generator(model, tmp_path / "export")
    code = "from tessellar.cli.main import main; main('serve')"
    command = [sys.executable, "-c", code, str(export), "--port", "0", "--batch-size", "32"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        url = line.split()[-1]
        assert line.startswith("serving export at http://127.0.0.1:")
        answers = asyncio.run(asked_at_once(url, 200))
        base = url.removesuffix(URL)
        counted = httpx.get(f"{base}/metrics").text.splitlines()
        assert 'tessellar_requests_total{outcome="served"} 200.0' in counted
        assert "tessellar_waiting_images 0.0" in counted
        refused = httpx.post(url, content=b"{").json()["error"]["message"]
        assert refused.startswith("the body is no JSON")
    finally:
        process.terminate()
        assert process.wait(30) in (0, -signal.SIGTERM)
    condition = model.class_condition([i % 3 for i in range(200)])
    expected = model.sample_tokens(condition, Sampling(), range(200)).tolist()
    assert [answer["data"][0]["tokens"] for answer in answers] == expected
    assert max(answer["data"][0]["batch"] for answer in answers) > 8


async def asked_at_once(url: str, count: int) -> list[dict[str, Any]]:
    """The answers to `count` requests that are open at the same time, image i by seed i."""
    limits = httpx.Limits(max_connections=count)
    async with httpx.AsyncClient(limits=limits, timeout=120) as client:
        bodies = [{"class": i % 3, "seed": i, "tokens": True} for i in range(count)]
        responses = await asyncio.gather(*(client.post(url, json=body) for body in bodies))
    assert [response.status_code for response in responses] == [200] * count
    return [response.json() for response in responses]
