"""`host/roles/provenance.py`: exact counts of the slots that were computed for another module."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_prefillshare.host.roles.provenance import Provenance


@dataclass
class Pool:
    size: int = 32
    page_size: int = 4


def slots(*numbers: int) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.int64)


def test_slots_of_another_module_are_counted_and_own_ones_are_not() -> None:
    provenance = Provenance(Pool())
    planner, coder = provenance.module_id("planner"), provenance.module_id("coder")
    provenance.record(slots(4, 5, 6), planner)
    provenance.record(slots(9), coder)
    assert provenance.count_foreign(slots(4, 5, 6, 9), coder) == 3
    assert provenance.count_foreign(slots(4, 5, 6, 9), planner) == 1
    assert provenance.count_foreign(slots(5, 5, 9), coder) == 2  # as often as it is asked for
    assert provenance.count_foreign(slots(), coder) == 0


def test_a_module_keeps_its_number_and_none_is_that_of_an_unstamped_slot() -> None:
    provenance = Provenance(Pool())
    names = ["planner", "coder", None, "twin"]
    numbers = [provenance.module_id(name) for name in names]
    assert len(set(numbers)) == 4
    assert 0 not in numbers
    assert [provenance.module_id(name) for name in names] == numbers


def test_requests_without_a_module_are_one_module_of_their_own() -> None:
    provenance = Provenance(Pool())
    unnamed, planner = provenance.module_id(None), provenance.module_id("planner")
    assert provenance.module_id("") == unnamed != planner
    provenance.record(slots(1, 2), unnamed)
    assert provenance.count_foreign(slots(1, 2), unnamed) == 0
    assert provenance.count_foreign(slots(1, 2), planner) == 2


def test_slots_that_nobody_computed_are_nobodys() -> None:
    provenance = Provenance(Pool())
    planner = provenance.module_id("planner")
    assert provenance.count_foreign(torch.arange(36), planner) == 0


def test_a_slot_belongs_to_whom_it_was_computed_for_last() -> None:
    provenance = Provenance(Pool())
    planner, coder = provenance.module_id("planner"), provenance.module_id("coder")
    provenance.record(slots(1, 2, 3), planner)
    provenance.record(slots(2, 3), coder)  # evicted, and computed again
    assert provenance.count_foreign(slots(1, 2, 3), planner) == 2
    assert provenance.count_foreign(slots(1, 2, 3), coder) == 1


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_every_slot_of_the_pool_has_a_stamp(dtype: torch.dtype) -> None:
    # SGLang's slots begin behind a page that is never handed out: numbers go up to size + page_size - 1.
    provenance = Provenance(Pool(size=8, page_size=4))
    planner, coder = provenance.module_id("planner"), provenance.module_id("coder")
    provenance.record(torch.arange(12, dtype=dtype), planner)
    assert provenance.count_foreign(torch.arange(12, dtype=dtype), coder) == 12
    with pytest.raises(IndexError):
        provenance.record(torch.tensor([12], dtype=dtype), planner)


@settings(deadline=None)
@given(
    steps=st.lists(
        st.tuples(st.sampled_from(["a", "b", None]), st.lists(st.integers(0, 35), unique=True)), min_size=1, max_size=20
    )
)
def test_counts_are_those_of_a_plain_ledger(steps: list[tuple[str | None, list[int]]]) -> None:
    provenance = Provenance(Pool())
    owner: dict[int, str | None] = {}
    for module, numbers in steps:
        expected = sum(number in owner and owner[number] != module for number in numbers)
        number = provenance.module_id(module)
        assert provenance.count_foreign(slots(*numbers), number) == expected
        provenance.record(slots(*numbers), number)
        owner.update(dict.fromkeys(numbers, module))
