"""What `/health` and `/metrics` say of what is being answered."""

from __future__ import annotations

import threading

import pytest
from conftest import EXAMPLES, wait_until
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families
from starlette.applications import Starlette
from starlette.testclient import TestClient

import app
import paligemma
from paligemma import PaliGemmaError
from paligemma.demo import handlers, hosting
from paligemma.demo.monitoring import Metrics, health_route
from paligemma.demo.serving import EMBEDDED, Models

LABELS = ("checkpoint", "task", "outcome")
IMAGE = Image.open(EXAMPLES / "cats.png")


def client(*routes):
    return TestClient(Starlette(routes=list(routes)))


def read(metrics):
    """The values of all samples, by name and the values of their labels, the outcome last."""
    text = client(metrics.route(None)).get("/metrics").text
    return {
        (sample.name, *(sample.labels[name] for name in LABELS if name in sample.labels)): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def metrics_of(vlm):
    own = paligemma.VisionLanguageModel(vlm.model, vlm.processor)
    models = Models([None], lambda source, **_: own)
    models.get(EMBEDDED)
    return Metrics(models, app.build_page(models))


@pytest.fixture
def metrics(tiny):
    return metrics_of(tiny)


def ask(metrics, prompts, **settings):
    settings = {"max_new_tokens": 64} | settings
    return handlers._answer(metrics._models, EMBEDDED, [IMAGE], prompts, settings)


def test_answers_are_counted_by_task_and_outcome_and_timed(metrics):
    (answers,) = [answers for _, answers, _ in ask(metrics, "caption en\ndetect cat")][-1:]
    stopped = ask(metrics, "is it a secret?")
    next(stopped)
    stopped.close()
    with pytest.raises(PaliGemmaError):
        list(ask(metrics, "caption en", max_new_tokens=0))
    seen = read(metrics)
    requests = {key[2:]: value for key, value in seen.items() if key[0] == "paligemma_requests_total"}
    assert requests == {
        ("caption", "finished"): 1,
        ("detect", "finished"): 1,
        ("question", "stopped"): 1,
        ("caption", "refused"): 1,
    }
    for answer, task in zip(answers, ("caption", "detect")):
        labels = EMBEDDED, task
        assert seen["paligemma_time_to_first_token_seconds_sum", *labels] == pytest.approx(answer.times[0])
        assert seen["paligemma_time_per_token_seconds_count", *labels] == len(answer.times) - 1
        assert seen["paligemma_time_per_token_seconds_sum", *labels] == pytest.approx(
            answer.times[-1] - answer.times[0]
        )
    assert "secret" not in str(seen)


def test_an_answer_that_fails_once_it_is_begun_is_counted_as_failed(metrics, monkeypatch):
    vlm = metrics._models.loaded(EMBEDDED)

    def run_out(*arguments):
        raise MemoryError

    monkeypatch.setattr(vlm.model, "prefill", run_out)
    with pytest.raises(PaliGemmaError, match="memory of cpu is too small"):
        list(ask(metrics, "caption en"))
    assert read(metrics)["paligemma_requests_total", EMBEDDED, "caption", "failed"] == 1


def test_the_engine_the_queue_and_the_memory_are_read_when_asked(long_winded):
    metrics = metrics_of(long_winded)
    vlm = metrics._models.loaded(EMBEDDED)
    running = [vlm.stream(IMAGE, "caption en") for _ in range(2)]
    for answer in running:
        next(answer)
    seen = read(metrics)
    assert seen["paligemma_active_rows", EMBEDDED] == 2
    assert seen["paligemma_queue_length", EMBEDDED] == 0
    cache = vlm.engine._cache
    assert seen["paligemma_cache_bytes", EMBEDDED] == cache.keys.nbytes + cache.values.nbytes > 0
    assert seen["paligemma_feature_cache_misses_total", EMBEDDED] == 1
    assert seen["paligemma_feature_cache_hits_total", EMBEDDED] == 1
    assert seen["process_resident_memory_bytes",] > 2**20
    assert seen["paligemma_page_queue_length",] == 0
    for answer in running:
        answer.close()
    wait_until(lambda: not read(metrics)["paligemma_active_rows", EMBEDDED])


def test_the_metrics_of_a_private_page_need_its_password(metrics, monkeypatch):
    monkeypatch.setattr(hosting, "WRONG_PASSWORD_SECONDS", 0.0)
    http = client(metrics.route(hosting.Password("ada", "love:lace").check))
    for auth, status in ((None, 401), (("ada", "lovelace"), 401), (("ada", "love:lace"), 200)):
        assert http.get("/metrics", auth=auth).status_code == status
    for header in ("Basic", "Basic %%%", "Basic /w==", b"Basic \xe9", "Bearer YWRhOmxvdmU6bGFjZQ=="):
        assert http.get("/metrics", headers={"Authorization": header}).status_code == 401


def test_health_is_that_of_the_first_checkpoint(tiny):
    go_on = threading.Event()

    def load(source, progress, make_room):
        assert go_on.wait(60)
        return tiny

    models = Models([None], load)
    http = client(health_route(models))

    def health():
        response = http.get("/health")
        return response.status_code, response.json()["status"]

    assert health() == (503, "loading")
    models.start(EMBEDDED)
    assert health() == (503, "loading")
    go_on.set()
    models.get(EMBEDDED)
    assert health() == (200, "ready")
    models.close()
    assert health() == (503, "ending")


def test_health_tells_that_loading_has_failed():
    def fail(source, **_):
        raise PaliGemmaError("There is none; please choose another.")

    models = Models([None], fail)
    with pytest.raises(PaliGemmaError):
        models.get(EMBEDDED)
    response = client(health_route(models)).get("/health")
    assert (response.status_code, response.json()) == (503, {"status": "failed"})
