"""Sampling draws from the distribution that the settings name, the reference's own."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from transformers.generation.logits_process import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from paligemma import PaliGemmaError
from paligemma.sampling import Sampler

SETTINGS = [(1.0, 0, 1.0), (0.7, 0, 1.0), (1.0, 5, 1.0), (1.0, 0, 0.6), (1.5, 7, 0.8), (0.3, 0, 0.05), (2.0, 500, 0.9)]


def reference_probabilities(logits, temperature, top_k, top_p):
    scores = TemperatureLogitsWarper(temperature)(None, logits)
    if top_k:
        scores = TopKLogitsWarper(top_k)(None, scores)
    if top_p < 1:
        scores = TopPLogitsWarper(top_p)(None, scores)
    return scores.softmax(-1)


@pytest.mark.parametrize(("temperature", "top_k", "top_p"), SETTINGS)
def test_draws_follow_the_reference_distribution(temperature, top_k, top_p):
    logits = torch.randn(1, 40, generator=torch.Generator().manual_seed(0)) * 2
    expected = reference_probabilities(logits, temperature, top_k, top_p)[0]
    draws = 40_000
    ids = Sampler(temperature, top_k, top_p)(logits.expand(draws, -1), torch.Generator().manual_seed(1))
    frequencies = torch.bincount(ids, minlength=40) / draws
    assert frequencies[expected == 0].sum() == 0
    logs = Sampler(temperature, top_k, top_p).log_probabilities(logits)[0]
    assert (logs.exp() - expected).abs().max() <= 1e-6
    assert torch.equal(logs.isinf(), expected == 0)
    # Five standard deviations of a frequency of that many draws.
    assert ((frequencies - expected).abs() <= 5 * (expected * (1 - expected) / draws).sqrt() + 1e-4).all()


def test_temperature_zero_takes_the_likeliest():
    logits = torch.randn(3, 50)
    assert Sampler(0.0, top_k=3, top_p=0.5)(logits).equal(logits.argmax(-1))


@pytest.mark.parametrize("temperature", [1e-3, 1e-5, 1e-10, 1e-46])
def test_a_temperature_near_zero_takes_the_likeliest(temperature):
    assert Sampler(temperature)(torch.tensor([[1.0, 5.0, 20.0, -3.0]])).tolist() == [2]


@pytest.mark.parametrize("top_p", [1e-9, 1e-300, Fraction(1, 10**400)])
def test_a_top_p_near_zero_takes_the_likeliest(top_p):
    logits = torch.randn(3, 50)
    assert Sampler(1.0, top_p=top_p)(logits).equal(logits.argmax(-1))
    assert Sampler(1.0, top_p=top_p).log_probabilities(logits).amax(-1).tolist() == [0.0] * 3


def test_of_tokens_whose_probabilities_add_up_to_top_p_no_more_is_kept():
    assert Sampler(1.0, top_p=0.5).log_probabilities(torch.zeros(1, 2)).exp().sort().values.tolist() == [[0.0, 1.0]]


@pytest.mark.parametrize("settings", [{"top_k": 10**400}, {"top_k": 1e300}, {"top_p": Fraction(1)}])
def test_a_filter_that_leaves_nothing_out_is_off(settings):
    logits = torch.randn(64, 50)
    drawn, expected = (
        Sampler(Fraction(3, 2), **chosen)(logits, torch.Generator().manual_seed(0)) for chosen in (settings, {})
    )
    assert drawn.equal(expected)


def test_top_k_of_one_takes_the_likeliest():
    logits = torch.randn(3, 50)
    assert Sampler(2.0, top_k=1)(logits).equal(logits.argmax(-1))


def test_the_same_seed_draws_the_same():
    logits = torch.randn(64, 100)
    one, same, other = (Sampler(1.0)(logits, torch.Generator().manual_seed(seed)) for seed in (7, 7, 8))
    assert one.equal(same)
    assert not one.equal(other)


@pytest.mark.parametrize("settings", [{}, {"top_p": 1 - 1e-6}, {"top_k": 100, "top_p": 1 - 1e-6}])
def test_what_rounding_changes_of_nearly_equal_logits_changes_no_draw(settings):
    generator = torch.Generator().manual_seed(0)
    logits, rounded = (torch.randn(64, 100, generator=generator) * 1e-6 for _ in range(2))
    draws = [Sampler(1.0, **settings)(some, torch.Generator().manual_seed(1)) for some in (logits, rounded)]
    assert draws[0].equal(draws[1])


def test_top_k_spares_the_sort_of_the_vocabulary():
    with torch.profiler.profile() as profile:
        Sampler(1.0, top_k=10, top_p=0.9)(torch.randn(1, 257_216))
    operations = {event.key for event in profile.key_averages()}
    assert "aten::topk" in operations
    assert "aten::sort" not in operations


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"temperature": float("inf")},
        {"temperature": 10**400},
        {"temperature": 10**5000},
        {"temperature": Fraction(10**400)},
        {"top_k": -1},
        {"top_k": 1.5},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"top_p": float("nan")},
        {"top_p": 10**400},
        {"temperature": None},
        {"temperature": "hot"},
        {"top_k": float("inf")},
        {"top_k": -(10**5000)},
        {"top_k": "9" * 1000},
        {"top_k": None},
        {"top_p": True},
    ],
)
def test_a_setting_out_of_range_is_refused_by_name(settings):
    with pytest.raises(PaliGemmaError, match=f"^{next(iter(settings))} is .{{1,50}}; please give"):
        Sampler(**settings)
