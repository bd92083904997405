"""The official checkpoints: their names, their sizes, and where they run."""

from __future__ import annotations

import pytest

from paligemma.checkpoints.official import HARDWARE, compute_sizes, official_checkpoints, table


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


def test_official_names_are_listed_once():
    names = [checkpoint.repository for checkpoint in official_checkpoints()]
    assert len(names) == len(set(names)) == 22
    assert {"google/paligemma-3b-mix-224", "google/paligemma2-10b-ft-docci-448"} < set(names)
    assert names[0] == "google/paligemma2-3b-mix-224"
    assert not {"google/paligemma2-28b-ft-docci-448", "google/paligemma-3b-mix-896"} & set(names)


def test_table_has_a_row_for_each_family_size_and_resolution():
    rows = table().splitlines()
    assert len({row.count("|") for row in rows[:14]}) == 1
    assert "`google/paligemma2-10b-{mix,pt,ft-docci}-448` | 9.66 billion |" in table()
