"""Checkpoints on a local Ray cluster of two replicas, one core each; left out where Ray is not installed."""

from __future__ import annotations

import threading

import numpy as np
import psutil
import pytest
from conftest import EXAMPLES, wait_until
from gradio_client import Client, handle_file
from PIL import Image
from random_checkpoints import make_reference, save_reference

import paligemma
from paligemma import PaliGemmaError

pytest.importorskip("ray", reason='the tests of the cluster need: pip install "ray[serve]"')
from paligemma.demo import cluster as module
from paligemma.demo.cluster import GONE, Cluster, RelayedLink, RemoteModel
from paligemma.demo.serving import Models, answer_prompts

SEEDS = (0, 1)  # of the checkpoint's weights, before and after an update
LONG = 900  # tokens of an answer that is still under way when something happens to it
PROMPTS = ["caption en", "detect cat ; dog", "answer en how many cats are there?"]


def noise(seed):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (60, 80, 3), np.uint8))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A folder for each seed; answers never end by themselves."""
    return [
        save_reference(make_reference(std=0.2, seed=seed), tmp_path_factory.mktemp("weights") / str(seed))
        for seed in SEEDS
    ]


@pytest.fixture(scope="module")
def folder(folders, tmp_path_factory):
    """The one that the cluster loads, with the first weights at first."""
    link = tmp_path_factory.mktemp("current") / "checkpoint"
    link.symlink_to(folders[0])
    return link


@pytest.fixture(scope="module")
def cluster():
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("RAY_AUTH_MODE", "disabled")  # else a token is kept in the home folder
        environment.setattr(module, "HEALTH_SECONDS", 1)
        cluster = Cluster(
            "local",
            (2, 2),
            cpus=1,
            device="cpu",
            num_cpus=4,  # two are for a checkpoint that cannot be loaded
            object_store_memory=100_000_000,
            include_dashboard=False,
        )
        yield cluster
        cluster.close()


@pytest.fixture(scope="module")
def models(cluster, folder):
    models = Models([str(folder)], lambda source, **callbacks: cluster.load(source, {"dtype": "float32"}, **callbacks))
    models.get(models.names[0])
    return models


@pytest.fixture
def remote(models):
    return models.get(models.names[0])


@pytest.fixture(scope="module")
def relayed(cluster, models):
    """As a page reaches it that is a client of the cluster (`ray://`)."""
    remote = RemoteModel(RelayedLink(next(iter(cluster._loaded))))
    yield remote
    remote.close()


@pytest.fixture(params=["remote", "relayed"])
def either(request):
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="module")
def local(folders):
    return [paligemma.load(folder, dtype="float32") for folder in folders]


def wait_for_replicas(remote):
    """Until both are there; a new process takes its time where the cores are busy."""
    wait_until(lambda: len(figures(remote, "active_rows")) == 2, seconds=300)


def figures(remote, name):
    """Of each replica."""
    return [one[name] for one in remote.figures_of_replicas()]


def replica_processes():
    processes = psutil.Process().children(recursive=True)
    return [process for process in processes if any("ServeReplica" in word for word in process.cmdline())]


def kill_replicas():
    """Kill both."""
    for process in replica_processes():
        process.kill()


def read(answers, texts, errors, number):
    """Read an answer to its end into `texts`, or what ends it into `errors`, under its number."""
    try:
        texts[number] = "".join(token.text for _, token in answers if token)
    except PaliGemmaError as error:
        errors[number] = str(error)


def test_looking_inside_shows_what_the_model_itself_shows(either, local):
    image, own = EXAMPLES / "cats.png", local[0]
    made = own.stream(image, PROMPTS[0], max_new_tokens=6)
    ids = [token.id for token in made]
    answers = [vlm.resume([image], PROMPTS[0], ids) for vlm in (own, either)]
    here, there = (answer.inspect(3) for answer in answers)
    assert (there.token.id, there.token.text, there.spans) == (here.token.id, here.token.text, here.spans)
    assert [entry.id for entry in there.lens] == [entry.id for entry in here.lens]
    assert np.allclose(there.attention, here.attention, atol=1e-6)
    rival = here.rivals[0].id
    branches = [[token.id for token in answer.branch(3, rival, max_new_tokens=12)] for answer in answers]
    assert branches[0][0] == rival
    assert branches[0] == branches[1]
    assert [len(answer.seconds_without_cache()) for answer in answers] == [6, 6]
    assert [step.name for step in answers[1].walk_through()] == [step.name for step in answers[0].walk_through()]
    encoders = [vlm.inspect_encoder(image, 3).attention for vlm in (own, either)]
    assert np.allclose(*encoders, atol=1e-6)


def test_what_cannot_be_looked_at_is_said(either):
    with pytest.raises(PaliGemmaError, match="There is no token 9"):
        either.resume(EXAMPLES / "cats.png", PROMPTS[0], [5]).inspect(9)


def test_answers_equal_those_of_the_model_itself(either, local):
    images = [EXAMPLES / name for name in ("cats.png", "sign.png")]
    for image in images:
        for prompt in PROMPTS:
            assert either.generate(image, prompt) == local[0].generate(image, prompt)
    sampled = {"temperature": 1.0, "top_k": 50, "seed": 7, "max_new_tokens": 30}
    assert either.generate(images[0], "ocr", **sampled) == local[0].generate(images[0], "ocr", **sampled)
    assert either.generate(images, "ocr") == local[0].generate(images, "ocr")
    batch = list(either.stream_batch([images[0]] * 3, PROMPTS, max_new_tokens=20))
    for number, prompt in enumerate(PROMPTS):
        tokens = [(token.id, token.text) for one, token in batch if one == number and token]
        assert tokens == [(token.id, token.text) for token in local[0].stream(images[0], prompt, max_new_tokens=20)]


def test_tokens_come_while_the_answer_is_made(either):
    answers = either.stream_batch([noise(0)], ["ocr"], max_new_tokens=LONG)
    next(answers)
    assert sum(figures(either, "active_rows")) == 1, "the answer is under way when its first token is here"
    assert len(list(answers)) == LONG  # the other tokens, and the end


@pytest.mark.parametrize(
    ("prompt", "settings", "sentence"),
    [("", {}, "The prompt is empty"), ("ocr", {"seed": -1}, "seed is -1"), ("ocr", {"max_new_tokens": 10**6}, "to 10")],
)
def test_what_is_wrong_with_a_question_is_said_as_by_the_model_itself(either, local, prompt, settings, sentence):
    with pytest.raises(PaliGemmaError, match=sentence) as expected:
        local[0].generate(noise(0), prompt, **settings)
    with pytest.raises(PaliGemmaError) as error:
        either.generate(noise(0), prompt, **settings)
    assert str(error.value) == str(expected.value)


def test_prompts_about_an_image_go_to_the_replica_that_has_its_features(remote):
    misses, hits = (sum(figures(remote, f"feature_cache_{name}")) for name in ("misses", "hits"))
    before = figures(remote, "feature_cache_misses")
    images = [noise(seed) for seed in range(100, 112)]
    for _ in range(3):
        for image in images:
            remote.generate(image, "ocr", max_new_tokens=2)
    assert sum(figures(remote, "feature_cache_misses")) - misses == len(images)
    assert sum(figures(remote, "feature_cache_hits")) - hits == 2 * len(images)
    assert all(after > one for one, after in zip(sorted(before), sorted(figures(remote, "feature_cache_misses"))))


@pytest.mark.parametrize("is_read", [True, False])
def test_a_stopped_answer_is_computed_no_further_at_the_replica(either, is_read):
    stopped, other = (either.stream_batch([noise(1)], ["ocr"], max_new_tokens=LONG) for _ in range(2))
    next(stopped), next(other)
    assert sum(figures(either, "active_rows")) == 2
    reading = threading.Thread(target=list, args=(stopped,))
    if is_read:
        reading.start()
    stopped.close()
    # Both have the same length: if the stopped one went on, they would end in the same step.
    wait_until(lambda: sum(figures(either, "active_rows")) < 2)
    assert sum(figures(either, "active_rows")) == 1
    if is_read:
        reading.join(timeout=20)
        assert not reading.is_alive()
    assert list(stopped) == []
    assert len(list(other)) == LONG


def test_the_page_in_front_is_the_same(serve, models, local, cluster):
    client = Client(serve(models), verbose=False)
    text, _ = client.predict(handle_file(EXAMPLES / "cats.png"), "caption en", max_new_tokens=40, api_name="/generate")
    assert text == local[0].generate(EXAMPLES / "cats.png", "caption en", max_new_tokens=40)


def test_who_streams_from_a_killed_replica_reads_a_sentence_and_the_others_go_on(remote, local):
    before = {process.pid for process in replica_processes()}
    assert len(before) == 2
    answers = [remote.stream_batch([noise(seed)], ["ocr"], max_new_tokens=LONG) for seed in range(8)]
    firsts = [next(answer)[1].text for answer in answers]
    assert all(figures(remote, "active_rows")), "both are busy"
    psutil.Process(min(before)).kill()
    texts, errors = {}, {}
    for number, answer in enumerate(answers):
        read(answer, texts, errors, number)
    assert set(errors.values()) == {GONE}
    assert texts
    for number, text in texts.items():
        assert firsts[number] + text == local[0].generate(noise(number), "ocr", max_new_tokens=LONG)
    for number in errors:
        assert remote.generate(noise(number), "ocr") == local[0].generate(noise(number), "ocr")
    wait_for_replicas(remote)
    assert len({process.pid for process in replica_processes()} - before) == 1


def test_an_answer_that_no_token_has_come_of_is_begun_anew(remote, local):
    answers = remote.stream_batch([noise(2)], ["ocr"])
    kill_replicas()
    assert "".join(token.text for _, token in answers if token) == local[0].generate(noise(2), "ocr")


def test_a_page_tells_who_asked_that_the_machine_has_failed(remote):
    steps = answer_prompts(remote, [noise(3)], ["ocr"], {"max_new_tokens": LONG})
    while not next(steps)[0].times:
        pass
    kill_replicas()
    with pytest.raises(PaliGemmaError, match=GONE):
        list(steps)
    wait_for_replicas(remote)


def test_an_update_of_the_checkpoint_loses_no_answer(cluster, remote, local, folders, folder):
    known = [[one.generate(noise(seed), "ocr", max_new_tokens=100) for seed in range(6)] for one in local]
    given, errors, is_over = [[] for _ in range(6)], {}, threading.Event()

    def ask(number):
        while not is_over.is_set():
            texts = {}
            answers = remote.stream_batch([noise(number)], ["ocr"], max_new_tokens=100)
            read(answers, texts, errors, number)
            given[number].append(texts.get(number))

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    wait_until(lambda: all(given))
    folder.unlink()
    folder.symlink_to(folders[1])
    cluster.update()
    counts = list(map(len, given))
    wait_until(lambda: all(len(some) > count + 1 for some, count in zip(given, counts)))
    is_over.set()
    for thread in threads:
        thread.join(timeout=60)
    assert errors == {}
    for number, some in enumerate(given):
        assert some[0] == known[0][number]
        assert some[-1] == known[1][number]
        assert set(some) == {known[0][number], known[1][number]}


def test_a_busy_replica_gets_a_second_one(cluster, monkeypatch):
    monkeypatch.setattr(module, "UPSCALE_SECONDS", 1)
    monkeypatch.setattr(cluster, "replicas", (1, 2))
    remote = cluster.load(None, {}, lambda *_: None)
    assert len(remote.figures_of_replicas()) == 1
    is_over = threading.Event()

    def ask(number):
        while not is_over.is_set():
            remote.generate(noise(number), "detect cat ; dog", max_new_tokens=60)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(14)]
    for thread in threads:
        thread.start()
    try:
        wait_until(lambda: len(remote.figures_of_replicas()) == 2, seconds=300)
        wait_until(lambda: all(figures(remote, "feature_cache_misses")))
    finally:
        is_over.set()
        for thread in threads:
            thread.join(timeout=60)
    remote.close()
    module.serve.delete(module._application_name(None))
    del cluster._loaded[module._application_name(None)]


def test_a_checkpoint_that_cannot_be_loaded_is_said_with_the_sentence_of_the_loader(cluster, remote, folder):
    with pytest.raises(PaliGemmaError) as error:
        cluster.load("/no/such/folder", {}, lambda *_: None)
    assert (
        str(error.value) == "There is no folder /no/such/folder; please give a folder or a Hub id such as owner/name."
    )
    folder.unlink()
    cluster.update()
    assert remote.generate(noise(0), "ocr"), "what was there goes on"
