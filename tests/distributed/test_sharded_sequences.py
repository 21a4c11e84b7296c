"""Operations in any order under FSDP2, beside one process. Many more: `make sharded` (docs/reliability.md)."""

from __future__ import annotations

import pytest
from sharded_sequences import failures


@pytest.mark.parametrize(("world", "numbers"), [(2, range(12)), (4, range(100, 104))])
def test_sharded_sequences_give_what_one_process_gives(world, numbers, tmp_path):
    assert failures(numbers, world, 0.0, tmp_path) == []
