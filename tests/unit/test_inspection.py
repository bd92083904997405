"""An answer that is over shows what each step was like inside, and goes on from any other token."""

from __future__ import annotations

import inspect
import json
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from conftest import EXAMPLES, ROOT
from random_checkpoints import make_reference, save_reference
from torch.utils.flop_counter import FlopCounterMode

import paligemma
from paligemma import PaliGemmaError
from paligemma.gemma import operations
from paligemma.inspection import ANSWER, CANDIDATES, IMAGE, PROMPT, mask_blocks
from paligemma.kv_cache import KeptCache, KeptCaches, KVCache
from paligemma.model import prefix_lm_mask
from paligemma.prefill import MAX_KEPT_BYTES
from paligemma.sampling import Sampler

CATS, MUSIC = EXAMPLES / "cats.png", EXAMPLES / "music.png"
ASK = "answer en how many cats are there on the left?"
BOUND = 1e-5


@pytest.fixture(scope="module", params=["gemma", "gemma2"])
def random_vlm(request, tmp_path_factory):
    """A random checkpoint of two key/value heads, whose answers do not end by themselves."""
    reference = make_reference(family=request.param, kv_heads=2, std=0.2)
    return paligemma.load(save_reference(reference, tmp_path_factory.mktemp(request.param)))


@pytest.fixture(scope="module")
def answered(tiny):
    """What the embedded checkpoint found, with its tokens."""
    answer = tiny.stream(CATS, "detect cat")
    return answer, list(answer)


def forget(vlm, max_bytes=MAX_KEPT_BYTES):
    """Drop all keys and values that are kept, those of answers that were just closed as well, and keep so many from now on."""
    vlm.engine.call(lambda: setattr(vlm.engine.prefill, "kept", KeptCaches(max_bytes)))


def text_of(vlm, before):
    """A function of each further token that gives what it adds to the text of those before."""
    text = vlm.processor.text_stream()
    for token_id in before:
        text.push(token_id)
    return text.push


def same(one, other, bound=BOUND):
    """Whether two inspections are equal up to rounding."""
    return (
        np.abs(one.attention - other.attention).max() <= bound
        and np.abs(one.logits - other.logits).max() <= bound * 100
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8", "int4"])
def test_the_last_layer_of_the_lens_and_the_token_have_the_probabilities_of_the_model(dtype):
    vlm = paligemma.load(dtype=dtype, device="cpu")
    answer = vlm.stream(CATS, "detect cat")
    tokens = list(answer)
    assert len(tokens) > 8
    for index, token in enumerate(tokens):
        seen = answer.inspect(index)
        assert (seen.token.id, seen.lens[-1].id) == (token.id, token.id)
        assert seen.token.probability == pytest.approx(token.probability, abs=BOUND if dtype != "bfloat16" else 0.02)
        assert seen.lens[-1].probability == pytest.approx(seen.token.probability, abs=BOUND)
        assert seen.attention.shape == (6, 4, 256 + 4 + index)
        assert seen.attention.sum(-1) == pytest.approx(1, abs=1e-3)


def test_rivals_are_the_likeliest_other_tokens(answered):
    answer, tokens = answered
    seen = answer.inspect(0)
    probabilities = torch.from_numpy(seen.logits).softmax(0)
    assert seen.token.text == tokens[0].text
    assert [rival.id for rival in seen.rivals] == probabilities.topk(6).indices.tolist()[1:]
    assert [rival.probability for rival in seen.rivals] == pytest.approx(probabilities.topk(6).values.tolist()[1:])
    assert len(seen.candidates) == CANDIDATES


def test_a_sampled_token_has_likelier_rivals(tiny):
    answer = tiny.stream(CATS, "detect cat", temperature=5.0, seed=1, max_new_tokens=4)
    next(answer)
    answer.close()
    seen = answer.inspect(0)
    assert seen.token.id not in [rival.id for rival in seen.rivals]
    assert seen.rivals[0].probability > seen.token.probability


@pytest.mark.parametrize("settings", [(0.0, 0, 1.0), (0.7, 0, 1.0), (1.5, 3, 1.0), (1.0, 0, 0.5), (2.0, 20, 0.9)])
def test_the_distribution_is_what_the_sampler_draws_from(answered, settings):
    seen = answered[0].inspect(0)
    expected = Sampler(*settings).log_probabilities(torch.from_numpy(seen.logits)[None])[0].exp()
    assert expected.sum() == pytest.approx(1, abs=1e-5)
    shown = seen.distribution(*settings)
    assert [one.id for one in shown] == [one.id for one in seen.candidates[:20]]
    for one in shown:
        assert one.probability == pytest.approx(expected[one.id].item())
        assert one.is_cut_off == (expected[one.id] == 0)
    assert not any(one.is_cut_off for one in seen.distribution(temperature=0.01)), "unlikely is not cut off"
    with pytest.raises(PaliGemmaError, match="top_p is 2"):
        seen.distribution(top_p=2)


def test_spans_cover_all_positions_and_share_the_attention(tiny):
    answer = tiny.stream([CATS, MUSIC], "caption en", max_new_tokens=3)
    list(answer)
    seen = answer.inspect(2)
    ends = [(span.kind, span.end) for span in seen.spans]
    prefix = len(tiny.processor.input_ids("caption en", 2))
    assert ends == [(IMAGE, 256), (IMAGE, 512), (PROMPT, prefix), (ANSWER, prefix + 2)]
    assert [span.start for span in seen.spans] == [0, 256, 512, prefix]
    assert sum(seen.shares.values()) == pytest.approx(1, abs=1e-5)
    image = seen.heat_map(image=0).sum() + seen.heat_map(image=1).sum()
    assert seen.shares[IMAGE] == pytest.approx(image, abs=1e-5)
    assert seen.heat_map(2, 1, image=1).ravel() == pytest.approx(seen.attention[2, 1, 256:512])
    assert seen.heat_map(-1).ravel() == pytest.approx(seen.attention[5, :, :256].mean(axis=0))
    assert seen.texts[:2] == ("<bos>", "caption")
    assert len(seen.texts) == seen.position + 1 - 512
    assert [answer.inspect(0).spans[-1].kind, answer.inspect(0).shares[ANSWER]] == [PROMPT, 0]


def test_blocks_are_the_mask_of_the_model(answered):
    seen = answered[0].inspect(0)
    length, prefix = seen.mask[-1].rows.end, seen.spans[-1].end
    drawn = torch.zeros(length, length, dtype=torch.bool)
    for block in seen.mask:
        rows, columns = slice(block.rows.start, block.rows.end), slice(block.columns.start, block.columns.end)
        part = drawn[rows, columns]
        part |= {"full": True, "nothing": False, "causal": torch.ones_like(part).tril()}[block.kind]
    assert torch.equal(drawn, prefix_lm_mask(length, torch.tensor([prefix]), None)[0, 0])
    assert mask_blocks(()) == ()


def test_a_branch_says_what_forcing_its_token_says(random_vlm):
    vlm, new = random_vlm, 12
    answer = vlm.stream([CATS, MUSIC], ASK, max_new_tokens=new)
    list(answer)
    prefix = vlm.processor.input_ids(ASK, 2)
    pixel_values = torch.cat([vlm.processor.pixel_values(paligemma.images.open_image(one)) for one in (CATS, MUSIC)])[
        None
    ]
    for index in (0, 1, 7, new - 1):
        rival = answer.inspect(index).rivals[2]
        expected = [*answer.token_ids[:index], rival.id]
        while len(expected) < new:
            with torch.inference_mode():
                logits = vlm.model(pixel_values, torch.tensor([prefix + expected]), torch.tensor([len(prefix)]))
            expected.append(int(logits[0, -1].argmax()))
        branch = answer.branch(index, rival.id, max_new_tokens=new)
        tokens = list(branch)
        assert branch.token_ids == expected
        assert tokens[0].probability == pytest.approx(rival.probability)
        assert [token.text for token in tokens] == list(map(text_of(vlm, expected[:index]), expected[index:]))
        again = branch.branch(index, answer.token_ids[index], max_new_tokens=new)
        list(again)
        assert again.token_ids == answer.token_ids


def test_a_branch_computes_only_what_comes_after_it(random_vlm, monkeypatch):
    answer = random_vlm.stream(CATS, ASK, max_new_tokens=20)
    list(answer)
    rival = answer.inspect(15).rivals[0]
    runs = []
    for name in ("prefill", "decode"):
        method = getattr(random_vlm.model, name)
        monkeypatch.setattr(
            random_vlm.model, name, lambda *given, name=name, method=method: runs.append(name) or method(*given)
        )
    list(answer.branch(15, rival.id, max_new_tokens=20))
    assert runs == ["decode"] * 4


def test_an_end_token_ends_a_branch(answered, tiny):
    answer, tokens = answered
    end = tiny.config.eos_token_ids[0]
    branch = answer.branch(5, end)
    assert list(branch) == []
    assert branch.token_ids == [token.id for token in tokens[:5]]
    assert branch.inspect(4).token.id == tokens[4].id


def test_an_answer_is_read_again_where_its_keys_and_values_were_dropped(random_vlm):
    answer = random_vlm.stream([CATS, MUSIC], ASK, max_new_tokens=30)
    list(answer)
    kept = [answer.inspect(index) for index in range(30)]
    forget(random_vlm)
    assert all(same(kept[index], answer.inspect(index)) for index in range(30))
    forget(random_vlm)
    resumed = random_vlm.resume([CATS, MUSIC], ASK, answer.token_ids)
    assert all(same(kept[index], resumed.inspect(index)) for index in (0, 29))
    forget(random_vlm, max_bytes=0)
    assert same(kept[3], answer.inspect(3))
    assert list(answer.branch(3, kept[3].rivals[0].id, max_new_tokens=9))
    assert random_vlm.engine.prefill.kept.nbytes == 0
    forget(random_vlm)


def test_a_resumed_answer_goes_on_as_the_whole_one(random_vlm):
    whole = random_vlm.stream(CATS, ASK, max_new_tokens=20)
    tokens = list(whole)
    stopped = random_vlm.stream(CATS, ASK, max_new_tokens=20)
    first = [next(stopped) for _ in range(6)]
    stopped.close()
    assert stopped.token_ids == [token.id for token in first]
    for drop in (lambda: None, lambda: forget(random_vlm)):
        drop()
        resumed = random_vlm.resume(CATS, ASK, stopped.token_ids, max_new_tokens=20)
        assert [token.id for token in resumed] == [token.id for token in tokens[6:]]
        assert resumed.token_ids == whole.token_ids
    assert list(random_vlm.resume(CATS, ASK, whole.token_ids, max_new_tokens=20)) == []


def test_answers_made_together_can_be_seen_inside(tiny):
    images, prompts = [CATS, MUSIC, CATS], ["detect cat", "caption en", "caption en"]
    batch = tiny.stream_batch(images, prompts)
    texts = [""] * 3
    for number, token in batch:
        texts[number] += token.text if token else ""
    for number, (image, prompt) in enumerate(zip(images, prompts)):
        alone = tiny.stream(image, prompt)
        assert "".join(token.text for token in alone) == texts[number]
        assert batch.answer(number).token_ids == alone.token_ids
        assert same(batch.answer(number).inspect(2), alone.inspect(2))


def test_a_stopped_answer_can_be_seen_inside_as_far_as_it_was_read(tiny):
    batch = tiny.stream_batch([CATS], ["caption en"])
    tokens = [next(batch)[1] for _ in range(3)]
    answer = batch.answer(0)
    assert answer.inspect(1).token.id == tokens[1].id  # while it is being made, too
    batch.close()
    assert batch.answer(0).token_ids == [token.id for token in tokens]
    assert batch.answer(0).inspect(2).token.id == tokens[2].id
    with pytest.raises(PaliGemmaError, match="no token 3 in this answer; please give a whole number from 0 to 2"):
        batch.answer(0).inspect(3)


def test_what_has_no_token_or_failed_is_not_kept(random_vlm, monkeypatch):
    forget(random_vlm)
    answer = random_vlm.stream(CATS, ASK)
    answer.close()
    decode = random_vlm.model.decode
    monkeypatch.setattr(random_vlm.model, "decode", lambda *given: decode(*given) * float("nan"))
    failed = random_vlm.stream(CATS, ASK)
    next(failed)
    with pytest.raises(PaliGemmaError, match="not finite"):
        next(failed)
    assert random_vlm.engine.prefill.kept.nbytes == 0
    assert failed.inspect(0).token.id == failed.token_ids[0]
    for look in (answer.walk_through, lambda: answer.inspect(0), lambda: answer.branch(0, 5)):
        with pytest.raises(PaliGemmaError, match="This answer has no token"):
            look()


@pytest.mark.parametrize(
    ("look", "sentence"),
    [
        (
            lambda vlm, answer: answer.inspect(-1),
            "There is no token -1 in this answer; please give a whole number from 0",
        ),
        (lambda vlm, answer: answer.inspect("one"), "There is no token one"),
        (lambda vlm, answer: answer.branch(0, 2401), "token_id is 2401; please give a whole number from 0 to 2400"),
        (lambda vlm, answer: answer.branch(0, 300, top_k=-1), "top_k is -1"),
        (lambda vlm, answer: answer.branch(0, 300, max_new_tokens=10**6), "max_new_tokens is 1000000"),
        (lambda vlm, answer: vlm.inspect_encoder(CATS, 256), "patch is 256; please give a whole number from 0 to 255"),
        (lambda vlm, answer: vlm.inspect_encoder("none.png", 0), "none.png"),
        (lambda vlm, answer: vlm.resume(CATS, "ocr", [1e9]), "token_ids has 1000000000.0; please give whole numbers"),
        (lambda vlm, answer: vlm.resume(CATS, "ocr", [300] * 2000), "token_ids has 2000 tokens, but"),
        (lambda vlm, answer: vlm.resume(CATS, "", [300]), "The prompt is empty"),
    ],
)
def test_what_cannot_be_seen_is_refused_with_a_sentence(tiny, answered, look, sentence):
    with pytest.raises(PaliGemmaError, match=sentence):
        look(tiny, answered[0])


def test_kept_bytes_are_bounded_and_what_was_asked_for_last_stays():
    def cache(key, length):
        return KeptCache(
            key, list(range(length)), torch.zeros(1, 1, length, 1), torch.zeros(1, 1, length, 1), 0.0, [], None
        )

    kept = KeptCaches(8 * 30)  # 8 bytes a position
    for key in ("a", "b", "c"):
        kept.keep(cache(key, 10))
    assert kept.find("a", range(3)) is None  # other ids, since a range is no list
    assert kept.find("a", [0, 1]) is not None
    kept.keep(cache("d", 10))
    assert [kept.find(key, [0]) is not None for key in "abcd"] == [True, False, True, True]
    kept.keep(cache("a", 12))  # in place of the shorter, and of what that leaves no room for
    assert kept.nbytes == 8 * 22
    kept.keep(cache("e", 31))
    assert kept.find("e", [0]) is None
    assert kept.nbytes == 8 * 22


def test_the_engine_keeps_within_its_bytes(random_vlm):
    text, positions = random_vlm.config.text, len(random_vlm.processor.input_ids(ASK)) + 6
    forget(random_vlm, max_bytes=int(2.5 * positions * text.cached_numbers * 4))
    for number in range(6):
        random_vlm.generate(CATS, f"{ASK} {number}", max_new_tokens=5)
        kept = random_vlm.engine.call(lambda: random_vlm.engine.prefill.kept)
        assert 0 < kept.nbytes <= kept.max_bytes
    assert len(kept._kept) == 2
    forget(random_vlm)


def test_changed_weights_are_not_mixed_with_what_was_kept(random_vlm):
    answer = random_vlm.stream(CATS, ASK, max_new_tokens=5)
    list(answer)
    before = answer.inspect(3)
    weight = random_vlm.model.language_model.layers[0].mlp.gate_proj.weight
    weight.data = -weight.data
    after = answer.inspect(3)
    forget(random_vlm)
    assert same(after, answer.inspect(3))
    weight.data = -weight.data
    assert not same(before, after)
    assert same(before, answer.inspect(3))


def test_looking_inside_leaves_what_others_are_answered_unchanged(random_vlm):
    alone = [
        [token.id for token in random_vlm.stream(CATS, f"{ASK} {number}", max_new_tokens=40)] for number in range(3)
    ]
    answer = random_vlm.stream(MUSIC, ASK, max_new_tokens=10)
    list(answer)
    expected, problems, is_over = answer.inspect(4), [], threading.Event()

    def look():
        while not is_over.is_set():
            if not same(expected, answer.inspect(4)):
                problems.append("differs")
            forget(random_vlm)

    looking = threading.Thread(target=look)
    looking.start()
    try:
        batch = random_vlm.stream_batch([CATS] * 3, [f"{ASK} {number}" for number in range(3)], max_new_tokens=40)
        together = [[], [], []]
        for number, token in batch:
            together[number] += [token.id] if token else []
    finally:
        is_over.set()
        looking.join(timeout=60)
    assert together == alone
    assert not problems


def test_only_the_engines_thread_runs_the_model(tiny, monkeypatch):
    threads = set()
    for name in ("prefill", "decode", "hidden_states", "logits", "image_features"):
        method = getattr(tiny.model, name)

        def run(*given, method=method, **named):
            threads.add(threading.current_thread().name.split("_")[0])
            return method(*given, **named)

        monkeypatch.setattr(tiny.model, name, run)
    answer = tiny.stream(CATS, "caption en", max_new_tokens=3)
    list(answer)
    answer.inspect(0)
    answer.seconds_without_cache()
    answer.walk_through()
    list(answer.branch(0, 300, max_new_tokens=2))
    tiny.inspect_encoder(CATS, 0)
    assert threads == {"engine"}
    hooks = [module for module in tiny.model.modules() if module._forward_hooks or module._forward_pre_hooks]
    assert not hooks


@pytest.mark.parametrize("whole", [False, True])
def test_operations_are_those_that_torch_counts(tmp_path, whole):
    model = paligemma.load(save_reference(make_reference(family="gemma2", kv_heads=2), tmp_path)).model
    text, prefix = model.config.text, 20
    features = torch.randn(1, 16, text.hidden_size)
    cache = KVCache(text, 1, 40, torch.float32, "cpu")
    ids = torch.full((1, prefix), 300)
    with FlopCounterMode(display=False) as counted, torch.inference_mode():
        model.prefill(features, ids, cache)
        if not whole:
            before = counted.get_total_flops()
            model.decode(ids[:, :1], cache, prefix + 1)
    flops = counted.get_total_flops() if whole else counted.get_total_flops() - before
    assert flops == 2 * (operations(text, prefix, prefix) if whole else operations(text, 1, prefix + 1))


def test_cache_facts_are_those_of_the_cache(answered, tiny):
    answer, tokens = answered
    first, last = answer.inspect(0).cache, answer.inspect(len(tokens) - 1).cache
    kept = tiny.engine.prefill.kept._kept[-1]
    assert last.positions == first.positions + len(tokens) - 1
    assert last.bytes == (kept.keys.nbytes + kept.values.nbytes) * last.positions // len(kept.ids)
    assert last.bytes_without_groups == 2 * last.bytes  # four query heads, two key/value heads
    assert last.prefill_seconds > max(last.step_seconds) > 0
    assert len(last.step_seconds) == len(tokens) - 1
    assert first.operations == first.operations_without_cache < last.operations < last.operations_without_cache
    assert len(answer.seconds_without_cache()) == len(tokens)


def test_the_walk_names_the_code_and_the_sizes_of_each_step(answered, tiny):
    answer, tokens = answered
    steps = answer.walk_through()
    names = ["patches", "embeddings", "encoder", "projector", "prefix", "prefill", "decode"]
    assert [step.name for step in steps] == names
    shapes = [(256, 588), (256, 192), (256, 192), (256, 192), (4, 192), (2401,), (2401,)]
    assert [step.shape for step in steps] == shapes
    for step in steps:
        source = (ROOT / step.file).read_text().splitlines()
        assert source[step.line - 1].strip().startswith(f"def {step.function.split('.')[-1]}(")
        assert len(step.values) == 6
    assert f"“{tokens[0].text}”, with probability {tokens[0].probability:.3f}" in steps[5].text
    assert f"“{tokens[1].text}”, with probability {tokens[1].probability:.3f}" in steps[6].text
    pixels = tiny.processor.pixel_values(paligemma.images.open_image(CATS))
    assert steps[0].values == pytest.approx(pixels[0, 0, 0, :6].tolist())
    features = tiny.model.vision_tower.embeddings(pixels)[0]
    cosines = torch.cosine_similarity(features[:, None], features[None], dim=-1)
    assert f"is {cosines[~torch.eye(256, dtype=torch.bool)].mean():.3f} in the mean" in steps[1].text


def test_all_that_is_seen_can_be_sent(answered):
    seen = answered[0].inspect(1)
    values = json.loads(json.dumps(seen.to_json(with_heads=True)))
    assert np.asarray(values["attention"]) == pytest.approx(seen.attention, abs=1e-6)
    assert np.asarray(seen.to_json()["attention"]) == pytest.approx(seen.attention.mean(axis=1), abs=1e-6)
    assert values["token"]["text"] == seen.token.text
    names = set(inspect.signature(type(seen)).parameters)
    assert names - set(values) == {"logits"}


def test_views_that_are_read_again_come_one_after_another(random_vlm, monkeypatch):
    answers = [random_vlm.stream(CATS, f"{ASK} {number}", max_new_tokens=3) for number in range(4)]
    assert all(list(answer) for answer in answers)
    forget(random_vlm, max_bytes=0)
    depths, depth, prefill = [], [0], random_vlm.model.prefill

    def counted(*given):
        depth[0] += 1
        depths.append(depth[0])
        try:
            return prefill(*given)
        finally:
            depth[0] -= 1

    monkeypatch.setattr(random_vlm.model, "prefill", counted)
    with ThreadPoolExecutor() as pool:
        seen = list(pool.map(lambda answer: answer.inspect(1), answers))
    assert [one.token.id for one in seen] == [answer.token_ids[1] for answer in answers]
    assert depths == [1] * 4
    forget(random_vlm)
