"""Who calls a page, and in which order the calls are answered."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from paligemma.demo.blocks import client_address, take_turns


def call(address, **headers):
    request = SimpleNamespace(client=SimpleNamespace(host=address), headers=headers)
    return SimpleNamespace(request=request)


@pytest.mark.parametrize(
    ("host", "forwarded", "address"),
    [
        ("8.8.8.8", None, "8.8.8.8"),
        ("10.0.0.3", None, "10.0.0.3"),
        ("10.0.0.3", "8.8.8.8, 10.0.0.2", "8.8.8.8"),
        ("8.8.8.8", "1.1.1.1", "8.8.8.8"),
        ("testclient", "1.1.1.1", "testclient"),
    ],
)
def test_an_address_that_is_passed_on_counts_only_from_a_proxy(host, forwarded, address):
    headers = {"x-forwarded-for": forwarded} if forwarded else {}
    assert client_address(call(host, **headers).request) == address


def test_nobody_s_second_call_comes_before_everybody_s_first():
    (one, two, three), other, latest = [call("a") for _ in range(3)], call("b"), call("c")
    assert take_turns([one, two, three, other, latest], []) == [one, other, latest, two, three]
    assert take_turns([one, two, other], [call("a"), call("c")]) == [other, one, two]
    assert take_turns([other, latest, one], [call("b"), call("c")]) == [one, other, latest]
