"""The official checkpoints: their names, their sizes, and where they run."""

from __future__ import annotations

import re

import pytest

from paligemma.checkpoints.official import HARDWARE, compute_sizes, table


@pytest.mark.parametrize(
    ("family", "size", "parameters", "fitting"),
    [
        ("PaliGemma", "3B", 2.92e9, ["CPU basic", "T4", "L4, A10G", "ZeroGPU"]),
        ("PaliGemma 2", "3B", 3.03e9, ["CPU basic", "T4", "L4, A10G", "ZeroGPU"]),
        ("PaliGemma 2", "10B", 9.66e9, ["CPU basic", "L4, A10G", "ZeroGPU"]),
        ("PaliGemma 2", "28B", 27.65e9, ["ZeroGPU"]),
    ],
)
def test_sizes_of_official_checkpoints_are_those_published(family, size, parameters, fitting):
    sizes = compute_sizes(family, size, 224)
    assert sizes.parameters == pytest.approx(parameters, rel=0.002)
    assert [hardware for hardware in HARDWARE if sizes.fits(hardware)] == fitting


def test_the_table_lists_every_checkpoint_once():
    rows = table().splitlines()[:14]
    assert len({row.count("|") for row in rows}) == 1
    assert "`google/paligemma2-10b-{mix,pt,ft-docci}-448` | 9.66 billion |" in table()
    names = []
    for family, purposes, resolution in re.findall(r"`google/(.*b)-\{?([\w,-]+?)\}?-(\d+)`", "\n".join(rows)):
        names += [f"{family}-{purpose}-{resolution}" for purpose in purposes.split(",")]
    assert len(names) == len(set(names)) == 22
    assert {"paligemma-3b-mix-224", "paligemma2-10b-ft-docci-448"} < set(names)
    assert names[0] == "paligemma2-3b-mix-224"
    assert not {"paligemma2-28b-ft-docci-448", "paligemma-3b-mix-896"} & set(names)
