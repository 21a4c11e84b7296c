"""Saying in a PEFT config exactly which modules are meant."""

from __future__ import annotations

import pytest
from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key

from paca.convert.target_names import exact_targets
from paca.tuner.rotation.union_config import default_and_pattern

NAMES = {
    "layers",
    *(f"layers.{block}" for block in range(12)),
    *(f"layers.{block}.{layer}" for block in range(12) for layer in ("q", "mlp.up", "mlp.q")),
    "q",
    "head.q",
    "layersX1.q",
}


@pytest.mark.parametrize(
    ("adapted", "expected"),
    [
        ({f"layers.{block}.mlp.up" for block in range(12)}, ["up"]),
        ({f"layers.{block}.mlp.q" for block in range(12)}, ["mlp.q"]),
        ({"layers.1.q"}, ["1.q"]),
        ({"layers.1.q", "layers.1.mlp.up"}, ["1.mlp.up", "1.q"]),
        ({name for name in NAMES if name.endswith("q")}, ["q"]),
        ({"q", "head.q"}, r"head\.q|q"),
        ({"q"}, "q"),
    ],
)
def test_the_targets_match_the_adapted_modules_and_no_other(adapted: set[str], expected: list[str] | str) -> None:
    targets = exact_targets(adapted, NAMES)
    assert targets == expected
    config = LoraConfig(target_modules=targets)
    assert {name for name in NAMES if check_target_module_exists(config, name)} == adapted


def test_a_pattern_gives_each_module_its_own_value() -> None:
    values = dict.fromkeys(sorted(NAMES), 4) | {"q": 7, "layers.1.q": 2, "layers.11.q": 3}
    default, pattern = default_and_pattern(values)
    assert (default, len(pattern)) == (4, 3)
    assert {name: pattern.get(get_pattern_key(list(pattern), name), default) for name in NAMES} == values
