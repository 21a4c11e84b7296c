"""The invariants of design section 3, on bare weights."""

from __future__ import annotations

import copy
import threading
import time

import pytest
import torch

from paca.columns.joint_refresh import refresh_together
from paca.columns.resident import ResidentColumns
from paca.columns.state import Columns, State
from paca.functional.rounding import add_once
from reference import dense_weight, nearest

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def make(dtype=torch.float32, input_dim=1, out=9, inp=11, adapters=((3, 0.5),), seed=0):
    g = torch.Generator().manual_seed(seed)
    weight = torch.randn(out, inp, generator=g).to(dtype)
    stored = weight if input_dim == 1 else weight.t().contiguous()
    columns = []
    for number, (r, scale) in enumerate(adapters):
        delta = torch.randn(out, r, generator=g).to(torch.promote_types(dtype, torch.float32))
        indices = torch.randperm(inp, generator=g)[:r].sort().values
        columns.append(Columns(f"a{number}", torch.nn.Parameter(delta), indices, scale))
    return stored.clone(), ResidentColumns(input_dim), tuple(columns)


def oriented(weight, input_dim):
    return weight if input_dim == 1 else weight.t()


def expected(original, columns, input_dim=1):
    """The invariant itself: the float64 sum, rounded once."""
    dense = dense_weight(oriented(original, input_dim), [(c.delta, c.indices, c.scale) for c in columns])
    return nearest(dense, original.dtype)


def assert_holds(weight, original, columns, input_dim=1):
    """Equal to the invariant: bitwise, but for float64, which has no wider type to sum in (fused multiply-adds)."""
    want = expected(original, columns, input_dim)
    if weight.dtype == torch.float64:
        torch.testing.assert_close(oriented(weight, input_dim), want, rtol=1e-15, atol=1e-15)
    else:
        assert torch.equal(oriented(weight, input_dim), want)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("input_dim", [1, 0])
@pytest.mark.parametrize(
    "adapters", [((1, 1.0),), ((11, 0.3),), ((3, 0.5), (6, 2.0)), ((11, 1.0), (11, 0.1), (1, -3.0))], ids=str
)
def test_the_weight_is_the_sum_rounded_once(dtype, input_dim, adapters):
    weight, resident, columns = make(dtype, input_dim, adapters=adapters)
    original = weight.clone()
    resident.want(columns)
    assert resident.stale(weight)
    resident.refresh(weight)
    assert not resident.stale(weight)
    assert_holds(weight, original, columns, input_dim)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("input_dim", [1, 0])
def test_park_restores_the_weight_bitwise_whatever_was_resident(dtype, input_dim):
    weight, resident, columns = make(dtype, input_dim, adapters=((3, 0.5), (6, 2.0)))
    original = weight.clone()
    for wanted in (columns, columns[:1], columns[1:], columns):
        resident.want(wanted)
        resident.refresh(weight)
        columns[0].delta.data.add_(0.1)
        resident.suspect = True
        resident.refresh(weight)
    assert not torch.equal(weight, original)
    resident.park(weight)
    assert torch.equal(weight, original)
    assert resident.stale(weight)  # the adapters are still wanted


def test_a_million_random_roundings_are_correct():
    # bfloat16 weights and small deltas: where rounding to float32 first would round some values twice.
    g = torch.Generator().manual_seed(0)
    weight = torch.randn(20000, 50, generator=g).bfloat16()
    original = weight.clone()
    resident = ResidentColumns(1)
    delta = torch.randn(20000, 50, generator=g) * 2.0**-9
    resident.want((Columns("a", delta, torch.arange(50), 0.75),))
    resident.refresh(weight)
    assert torch.equal(weight, nearest(original.double() + 0.75 * delta.double(), torch.bfloat16))


def test_an_in_place_change_makes_stale():
    weight, resident, (columns,) = make()
    resident.want((columns,))
    resident.refresh(weight)
    with torch.no_grad():
        columns.delta.add_(1.0)
    assert resident.stale(weight)


def test_a_scale_makes_stale():
    weight, resident, (columns,) = make()
    original = weight.clone()
    resident.want((columns,))
    resident.refresh(weight)
    half = columns._replace(scale=columns.scale / 2)
    resident.want((half,))
    assert resident.stale(weight)
    resident.refresh(weight)
    assert torch.equal(weight, expected(original, (half,)))


def test_a_backward_pass_makes_stale_so_that_data_writes_are_seen():
    weight, resident, (columns,) = make()
    original = weight.clone()
    resident.want((columns,))
    resident.refresh(weight)
    resident.before_backward(weight, resident.state, resident.state.tag)
    columns.delta.data.add_(1.0)  # invisible to version counters
    assert resident.stale(weight)
    resident.refresh(weight)
    assert torch.equal(weight, expected(original, (columns,)))
    assert not resident.stale(weight)


def test_a_data_write_after_an_evaluation_between_backward_and_step_is_seen():
    weight, resident, (columns,) = make()
    original = weight.clone()
    resident.want((columns,))
    resident.refresh(weight)
    resident.before_backward(weight, resident.state, resident.state.tag)
    columns.delta.grad = torch.ones_like(columns.delta)
    resident.refresh(weight)  # an evaluation, before the step
    columns.delta.data.sub_(columns.delta.grad)
    columns.delta.grad = None
    assert resident.stale(weight)
    resident.refresh(weight)
    assert torch.equal(weight, expected(original, (columns,)))
    assert not resident.stale(weight)


def test_nothing_is_written_when_nothing_changed():
    weight, resident, (columns,) = make()
    resident.want((columns,))
    resident.refresh(weight)
    version = weight._version
    resident.want((columns._replace(name="renamed"),))
    assert not resident.stale(weight)
    resident.before_backward(weight, resident.state, resident.state.tag)
    resident.refresh(weight)  # suspect, but unchanged: graphs that hold the weight stay valid
    assert weight._version == version


def test_a_refresh_writes_only_its_columns_and_allocates_little():
    from torch.utils._python_dispatch import TorchDispatchMode

    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            result = func(*args, **(kwargs or {}))
            for tensor in torch.utils._pytree.tree_leaves(result):
                if isinstance(tensor, torch.Tensor) and tensor.data_ptr() != weight.data_ptr():
                    largest = max(largest, tensor.numel())
            return result

    weight, resident, columns = make(out=40, inp=500, adapters=((4, 1.0), (3, 1.0)))
    untouched = torch.ones(500, dtype=torch.bool)
    for c in columns:
        untouched[c.indices] = False
    weight[:, untouched] = float("nan")  # a write or a read-and-write of all would have to meet these
    before = weight.clone()
    resident.want(columns)
    with Watch():
        resident.refresh(weight)
    assert torch.equal(weight[:, untouched].isnan(), before[:, untouched].isnan())
    assert largest <= 40 * 7


def test_a_backward_pass_gets_the_columns_of_its_forward_pass_back():
    weight, resident, columns = make(adapters=((3, 0.5), (6, 2.0)))
    original = weight.clone()
    resident.want(columns[:1])
    resident.refresh(weight)
    first = resident.state
    resident.want(columns[1:])
    resident.refresh(weight)
    second = resident.state
    resident.want(())
    resident.refresh(weight)
    assert torch.equal(weight, original)
    for state in (first, second, first):
        resident.before_backward(weight, state, state.tag)
        assert torch.equal(weight, expected(original, state.columns))
    resident.refresh(weight)
    assert torch.equal(weight, original)


def test_a_backward_pass_through_the_parked_weight_gets_it_back():
    weight, resident, columns = make()
    original = weight.clone()
    resident.refresh(weight)
    parked = resident.state
    resident.want(columns)
    resident.refresh(weight)
    resident.before_backward(weight, parked, parked.tag)
    assert torch.equal(weight, original)


@pytest.mark.parametrize("write", ["delta", "indices"])
def test_a_change_between_forward_and_backward_raises(write):
    weight, resident, (columns,) = make()
    resident.want((columns,))
    resident.refresh(weight)
    state = resident.state
    with torch.no_grad():
        columns.delta.add_(1) if write == "delta" else columns.indices.copy_(torch.tensor([0, 1, 2]))
    with pytest.raises(RuntimeError, match="adapter 'a0' were modified between forward and backward"):
        resident.before_backward(weight, state, state.tag)


def test_a_merge_between_forward_and_backward_raises():
    weight, resident, columns = make()
    state = resident.state
    resident.merge(weight, columns, safe=False)
    with pytest.raises(RuntimeError, match="merged, unmerged or loaded"):
        resident.before_backward(weight, state, state.tag)


def test_a_recomputation_with_other_adapters_raises():
    weight, resident, columns = make(adapters=((3, 1.0), (3, 1.0)))
    resident.want(columns[:1])
    resident.refresh(weight)
    first = resident.state
    resident.want(columns[1:])
    resident.refresh(weight)
    with pytest.raises(RuntimeError, match=r"'a0' then, adapter 'a1' now"):
        resident.before_backward(weight, first, resident.state.tag)


def test_equal_states_have_equal_tags():
    _, _, columns = make()
    assert State(columns, 0).tag == State(columns, 0).tag
    tag = State(columns, 0).tag
    with torch.no_grad():
        columns[0].delta.add_(1)
    assert State(columns, 0).tag != tag


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("input_dim", [1, 0])
def test_merging_gives_the_resident_values_and_unmerging_the_original_bitwise(dtype, input_dim):
    weight, resident, columns = make(dtype, input_dim, adapters=((3, 0.5), (6, 2.0)))
    original = weight.clone()
    resident.merge(weight, columns[:1], safe=True)
    assert_holds(weight, original, columns[:1], input_dim)
    resident.merge(weight, columns[1:], safe=False)
    assert_holds(weight, original, columns, input_dim)
    resident.unmerge(weight)
    assert torch.equal(weight, original)


def test_a_safe_merge_of_broken_columns_raises_and_writes_nothing():
    weight, resident, columns = make(adapters=((3, 0.5), (6, 2.0)))
    original = weight.clone()
    columns[1].delta.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match="adapter 'a1' would put NaN"):
        resident.merge(weight, columns[1:], safe=True)
    assert torch.equal(weight, original)
    resident.merge(weight, columns[:1], safe=True)
    merged = weight.clone()
    with pytest.raises(ValueError, match="adapter 'a1' would put NaN"):
        resident.merge(weight, columns[1:], safe=True)
    assert torch.equal(weight, merged)
    resident.unmerge(weight)
    assert torch.equal(weight, original)


def test_indices_that_are_loaded_over_do_not_misplace_the_originals():
    weight, resident, (columns,) = make()
    original = weight.clone()
    resident.want((columns,))
    resident.refresh(weight)
    columns.indices.copy_(torch.tensor([0, 1, 2]))  # as load_state_dict does
    assert resident.stale(weight)
    resident.refresh(weight)
    assert torch.equal(weight, expected(original, (columns,)))
    resident.park(weight)
    assert torch.equal(weight, original)


@pytest.mark.parametrize(
    "borrow",
    [lambda w: w.detach(), lambda w: w.detach().view(-1), lambda w: w.detach().numpy(), lambda w: w.data.detach()],
)
def test_what_was_lent_keeps_the_pretrained_values(borrow):
    weight, resident, columns = make()
    original = weight.clone()
    resident.lend(weight)
    lent = borrow(weight)
    resident.want(columns)
    resident.refresh(weight)
    assert torch.equal(torch.as_tensor(lent).reshape(original.shape), original)
    assert not torch.equal(weight, original)


def test_lending_costs_no_copy_once_the_borrower_is_gone():
    weight, resident, columns = make()
    lent = weight.detach()
    resident.lend(lent)
    pointer = weight.data_ptr()
    del lent
    resident.want(columns)
    resident.refresh(weight)
    assert weight.data_ptr() == pointer


def test_resident_columns_are_copied_parked():
    weight, resident, columns = make()
    resident.want(columns)
    resident.refresh(weight)
    with pytest.raises(RuntimeError, match="parked"):
        copy.deepcopy(resident)
    resident.park(weight)
    assert copy.deepcopy(resident).stale(weight)


def test_refreshing_in_inference_mode_leaves_the_layer_trainable():
    weight, resident, (columns,) = make()
    original = weight.clone()
    resident.want((columns,))
    with torch.inference_mode():
        resident.refresh(weight)
    assert not resident.state.tag_tensor.is_inference()
    with torch.no_grad():
        columns.delta.add_(1)
    resident.refresh(weight)
    assert torch.equal(weight, expected(original, (columns,)))
    resident.park(weight)
    assert torch.equal(weight, original)


@pytest.mark.parametrize("input_dim", [1, 0])
def test_refreshing_together_equals_refreshing_one_by_one(input_dim, monkeypatch):
    # The joint path is for accelerators; its arithmetic is the same on any device.

    jobs = []
    for seed, (dtype, adapters) in enumerate(
        [(torch.float32, ((3, 0.5),)), (torch.float32, ((5, 0.5),)), (torch.float32, ((2, 1.5),))]
    ):
        weight, resident, columns = make(dtype, input_dim, adapters=adapters, seed=seed)
        jobs.append((weight, resident, columns, weight.clone()))
    for _, resident, columns, _ in jobs:
        resident.want(columns)
    together = [(resident, weight) for weight, resident, _, _ in jobs]
    refresh_together(together)
    for weight, resident, columns, original in jobs:
        assert torch.equal(oriented(weight, input_dim), expected(original, columns, input_dim))
        assert not resident.stale(weight)
    versions = [weight._version for weight, *_ in jobs]
    refresh_together(together)  # nothing changed: nothing is written
    assert [weight._version for weight, *_ in jobs] == versions
    for _, _, columns, _ in jobs:
        columns[0].delta.data.mul_(2)
    refresh_together(together)  # a change that version counters do not show
    for weight, resident, columns, original in jobs:
        assert torch.equal(oriented(weight, input_dim), expected(original, columns, input_dim))
        resident.park(weight)
        assert torch.equal(weight, original)


def test_refreshing_together_handles_several_adapters_and_none():
    weight, resident, columns = make(adapters=((3, 0.5), (6, 2.0)))
    original = weight.clone()
    resident.want(columns)
    refresh_together([(resident, weight)])
    assert torch.equal(weight, expected(original, columns))
    resident.want(())
    refresh_together([(resident, weight)])
    assert torch.equal(weight, original)


@pytest.mark.parametrize("ranks", [(3, 6), (6, 3), (3, 3)])
def test_refreshing_together_takes_out_another_adapters_columns_first(ranks):
    # Two adapters ran before one backward pass: it leaves the columns of the first in the weight, the second is wanted.
    weight, resident, columns = make(adapters=((ranks[0], 0.5), (ranks[1], 2.0)))
    original = weight.clone()
    resident.want(columns[:1])
    resident.refresh(weight)
    resident.want(columns[1:])
    refresh_together([(resident, weight)])
    assert torch.equal(weight, expected(original, columns[1:]))
    resident.park(weight)
    assert torch.equal(weight, original)


def test_threads_that_refresh_at_once_write_one_result():
    weight, resident, columns = make(out=300, inp=300, adapters=((64, 0.5),))
    original = weight.clone()
    resident.want(columns)
    barrier = threading.Barrier(8)

    def work():
        barrier.wait()
        if resident.stale(weight):
            resident.refresh(weight)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert torch.equal(weight, expected(original, columns))
    version = weight._version
    assert not resident.stale(weight)
    assert weight._version == version


def test_a_weight_made_in_inference_mode_can_be_written_outside_it():
    with torch.inference_mode():
        weight, resident, columns = make()
    original = weight.clone()
    resident.want(columns)
    resident.refresh(weight)
    assert torch.equal(weight, expected(original, columns))
    resident.park(weight)
    assert torch.equal(weight, original)


def test_just_above_a_tie_is_rounded_up():
    weight = torch.ones(1, 1, dtype=torch.bfloat16)
    resident = ResidentColumns(1)
    resident.want((Columns("a", torch.tensor([[2.0**-8 * (1 + 2.0**-23)]]), torch.tensor([0]), 1.0),))
    resident.refresh(weight)
    assert float(weight) == 1.0078125


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_of_special_values(dtype):
    from paca.functional.rounding import round_once

    values = torch.tensor([0.0, -0.0, float("inf"), -float("inf"), float("nan"), 1e300, -1e300, 1e-300, 6e-8, 65519.99])
    got = round_once(values.double(), dtype)
    want = values.double().to(dtype)
    assert torch.equal(got.isnan(), want.isnan())
    assert torch.equal(got[~got.isnan()], want[~want.isnan()])


def test_a_graph_that_is_pending_when_a_hidden_write_is_found_raises():
    weight, resident, (columns,) = make()
    resident.want((columns,))
    resident.refresh(weight)
    pending = resident.state
    resident.suspect = True
    columns.delta.data.add_(1)
    resident.refresh(weight)
    with pytest.raises(RuntimeError, match="modified between forward and backward"):
        resident.before_backward(weight, pending, pending.tag)


@pytest.mark.parametrize("how", ["data", "in place"])
def test_a_weight_that_somebody_else_writes_is_refused(how):
    weight, resident, columns = make()
    weight = torch.nn.Parameter(weight, requires_grad=False)
    resident.want(columns)
    resident.refresh(weight)
    if how == "data":
        weight.data = torch.full_like(weight, 2.0)  # not drawn: a generator another test seeded gave the original again
    else:
        weight.add_(1)
    assert resident.stale(weight)
    with pytest.raises(RuntimeError, match="written or replaced while the adapter's columns were in it"):
        resident.refresh(weight)


def test_a_weight_that_is_moved_or_written_with_the_same_values_is_fine():
    weight, resident, columns = make()
    original = weight.clone()
    resident.want(columns)
    resident.refresh(weight)
    weight.copy_(weight.clone())  # as DistributedDataParallel does
    resident.refresh(weight)
    weight.data = weight.data.clone()
    resident.refresh(weight)
    assert_holds(weight, original, columns)
    resident.park(weight)
    assert torch.equal(weight, original)


def test_a_weight_that_is_replaced_by_its_pretrained_one_is_refreshed():
    weight, resident, columns = make()
    original = weight.clone()
    resident.want(columns)
    resident.refresh(weight)
    weight.data = original.clone()
    assert resident.stale(weight)
    resident.refresh(weight)
    assert_holds(weight, original, columns)


def test_a_weight_that_somebody_else_wrote_is_refused_wherever_it_is_met():
    for meet in (
        lambda weight, resident, state: resident.park(weight),
        lambda weight, resident, state: resident.before_backward(weight, state, state.tag),
        lambda weight, resident, state: refresh_together([(resident, weight)]),
        lambda weight, resident, state: resident.merge(weight, resident.wanted, safe=False),
    ):
        weight, resident, columns = make()
        resident.want(columns)
        resident.refresh(weight)
        weight.add_(1)
        with pytest.raises(RuntimeError, match="written or replaced while the adapter's columns were in it"):
            meet(weight, resident, resident.state)


def test_a_backward_pass_after_the_weight_was_given_back_raises_and_writes_nothing():
    weight, resident, columns = make()
    original = weight.clone()
    resident.want(columns)
    resident.refresh(weight)
    state = resident.state
    resident.let_go(weight)
    with pytest.raises(RuntimeError, match="or its adapter unloaded"):
        resident.before_backward(weight, state, state.tag)
    assert torch.equal(weight, original)


@pytest.mark.parametrize("hidden", [False, True])
def test_writing_deltas_while_parked(hidden):
    weight, resident, (columns,) = make()
    original = weight.clone()
    resident.refresh(weight)
    parked = resident.state
    resident.want((columns,))
    resident.refresh(weight)
    pending = resident.state

    def write():
        assert torch.equal(weight, original)
        (columns.delta.data if hidden else columns.delta.detach()).add_(1)

    resident.write_parked(weight, write, hidden=hidden)
    with pytest.raises(RuntimeError, match="modified between forward and backward"):
        resident.before_backward(weight, pending, pending.tag)
    resident.refresh(weight)
    assert torch.equal(weight, expected(original, (columns,)))
    resident.before_backward(weight, parked, parked.tag)  # what ran without columns does not mind
    assert torch.equal(weight, original)


def test_tags_differ_with_all_that_the_weight_depends_on():
    _, _, (columns,) = make()
    twin = columns._replace(delta=columns.delta.detach().clone())
    states = [
        State((columns,), 0),
        State((columns._replace(scale=2.0),), 0),
        State((columns._replace(indices=columns.indices.clone()),), 0),
        State((twin,), 0),
        State((columns,), 1),
        State((columns,), 0, 1),
        State((), 0),
        State((), 1),
    ]
    assert len({state.tag for state in states}) == len(states)
    assert State((), 0, 1).tag == State((), 0).tag  # without columns their hidden writes do not matter


def test_a_state_holds_only_what_it_was_made_of():
    _, _, (columns,) = make()
    state = State((columns,), 0)
    assert state.holds((columns,))
    assert state.holds((columns._replace(name="renamed"),))
    assert not state.holds((columns._replace(scale=2.0),))
    assert not state.holds((columns._replace(indices=columns.indices.clone()),))
    assert not state.holds((columns._replace(delta=columns.delta.detach().clone()),))
    assert not state.holds(())
    columns.indices.copy_(columns.indices.clone())
    assert not state.holds((columns,))
    assert not state.holds(state.columns)


def test_nan_in_a_delta_is_written_once():
    weight, resident, (columns,) = make()
    resident.want((columns,))
    with torch.no_grad():
        columns.delta[0, 0] = float("nan")
    resident.refresh(weight)
    state, version = resident.state, weight._version
    resident.suspect = True
    resident.refresh(weight)
    assert weight._version == version
    resident.before_backward(weight, state, state.tag)


def test_the_last_64_states_are_remembered_and_those_of_a_deleted_adapter_dropped():
    _, resident, columns = make(adapters=((3, 0.5), (3, 0.5)))
    states = [State((columns[0]._replace(scale=float(n)),), 0) for n in range(1, 66)]
    other = State(columns[1:], 0)
    for state in (*states, other):
        resident.remember(state)
    assert resident.remembered(states[2].tag) is states[2]
    with pytest.raises(RuntimeError, match="no longer known"):
        resident.remembered(states[1].tag)
    resident.forget(columns[0].delta)
    assert resident.remembered(other.tag) is other
    with pytest.raises(RuntimeError, match="no longer known"):
        resident.remembered(states[2].tag)


def test_a_sealed_merge_can_not_be_undone():
    weight, resident, columns = make()
    resident.merge(weight, columns, safe=False)
    merged = weight.clone()
    resident.seal_merge()
    assert resident.merged == ()
    resident.unmerge(weight)
    assert torch.equal(weight, merged)


def test_one_thread_writes_at_a_time(monkeypatch):
    weight, resident, columns = make()
    resident.want(columns)
    inside, most = 0, 0

    def slow_add(base, change, scale):
        nonlocal inside, most
        inside += 1
        most = max(most, inside)
        time.sleep(0.02)
        inside -= 1
        return add_once(base, change, scale)

    monkeypatch.setattr("paca.columns.resident.add_once", slow_add)
    monkeypatch.setattr("paca.columns.joint_refresh.add_once", slow_add)
    threads = [threading.Thread(target=resident.refresh, args=(weight,)) for _ in range(2)]
    threads += [threading.Thread(target=refresh_together, args=([(resident, weight)],)) for _ in range(2)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert most == 1


def test_a_weight_that_is_lent_twice_keeps_what_was_lent_first():
    weight, resident, columns = make()
    original = weight.clone()
    resident.lend(weight)
    first = weight.detach()
    resident.lend(weight)
    resident.want(columns)
    resident.refresh(weight)
    assert torch.equal(first, original)
    assert not torch.equal(weight, original)


def test_a_graph_that_is_pending_when_refreshing_together_finds_a_hidden_write_raises():
    weight, resident, (columns,) = make()
    resident.want((columns,))
    resident.refresh(weight)
    pending = resident.state
    resident.suspect = True
    columns.delta.data.add_(1)
    refresh_together([(resident, weight)])
    with pytest.raises(RuntimeError, match="modified between forward and backward"):
        resident.before_backward(weight, pending, pending.tag)


def test_an_unmerge_between_forward_and_backward_raises():
    weight, resident, columns = make()
    resident.merge(weight, columns, safe=False)
    state = resident.state
    resident.unmerge(weight)
    with pytest.raises(RuntimeError, match="merged, unmerged or loaded"):
        resident.before_backward(weight, state, state.tag)


def test_a_view_that_was_not_lent_does_not_move_the_weight():
    weight, resident, (columns,) = make()
    resident.lend(weight)
    resident.want((columns,))
    resident.refresh(weight)
    pointer, view = weight.data_ptr(), weight.detach()
    with torch.no_grad():
        columns.delta.add_(1)
    resident.refresh(weight)
    assert weight.data_ptr() == pointer == view.data_ptr()
