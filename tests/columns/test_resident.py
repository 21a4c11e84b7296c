"""The invariants of design section 3, on bare weights."""

from __future__ import annotations

import copy
import threading
import time

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from paca.columns import merging as merging_module
from paca.columns import resident as resident_module
from paca.columns.entry import Entry
from paca.columns.folded import Folded
from paca.columns.kept import Kept, add_scaled, sum_of
from paca.columns.merging import MergeableColumns
from paca.columns.resident import write_together
from paca.columns.state import AdapterColumns, State
from paca.functional.column_blocks import put_columns, runs_of
from reference import dense_weight, nearest

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
MODIFIED = "were modified between forward and backward"


def make(dtype=torch.float32, dim=1, out=9, inp=11, adapters=((3, 0.5),), seed=0, blocks=False):
    g = torch.Generator().manual_seed(seed)
    weight = torch.randn(out, inp, generator=g).to(dtype)
    stored = weight if dim == 1 else weight.t().contiguous()
    resident, columns = MergeableColumns(dim), []
    for number, (r, scale) in enumerate(adapters):
        delta = torch.randn(out, r, generator=g).to(torch.promote_types(dtype, torch.float32))
        indices = torch.arange(number, number + r)
        if not blocks:
            indices = scattered(r, inp, g)
        resident.changed(f"a{number}")
        columns.append(AdapterColumns(f"a{number}", torch.nn.Parameter(delta), indices, scale))
    return stored.clone(), resident, tuple(columns)


def scattered(r, inp, generator):
    """Columns that are written one by one: drawn again if they happen to lie side by side."""
    while True:
        indices = torch.randperm(inp, generator=generator)[:r].sort().values
        if r == inp or runs_of(indices) is None:
            return indices


def now(resident, columns):
    """The columns as the layer above would ask for them: with their present revisions."""
    return tuple(c._replace(revision=resident.revisions.get(c.name, 0)) for c in columns)


def write(resident, weight, columns):
    """As the layer above writes: version counters are looked at first."""
    resident.notice()
    resident.write(weight, now(resident, columns))


def oriented(weight, dim):
    return weight if dim == 1 else weight.t()


def expected(original, columns, dim=1):
    """The invariant itself: the sum in float32 (float64 for float64), in the order of the adapters, rounded once."""
    total = oriented(original, dim).to(torch.promote_types(original.dtype, torch.float32), copy=True)
    for c in columns:
        for part in c.parts():
            summed = torch.add(total[:, part.indices], part.delta.detach().to(total), alpha=part.scale)
            total[:, part.indices] = summed
    return total.to(original.dtype)


def assert_holds(weight, original, columns, dim=1):
    assert torch.equal(oriented(weight, dim), expected(original, columns, dim))


# -- writing and parking ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [1, 0])
@pytest.mark.parametrize("blocks", [False, True])
@pytest.mark.parametrize(
    "adapters", [((1, 1.0),), ((9, 0.3),), ((3, 0.5), (6, 2.0)), ((9, 1.0), (9, 0.1), (1, -3.0))], ids=str
)
def test_the_weight_is_the_sum_rounded_once(dtype, dim, adapters, blocks):
    weight, resident, columns = make(dtype, dim, adapters=adapters, blocks=blocks)
    original = weight.clone()
    write(resident, weight, columns)
    assert_holds(weight, original, columns, dim)
    exact = dense_weight(oriented(original, dim), [(c.delta, c.indices, c.scale) for c in columns])
    magnitude = dense_weight(oriented(original, dim).abs(), [(c.delta.abs(), c.indices, abs(c.scale)) for c in columns])
    wide = torch.finfo(torch.promote_types(dtype, torch.float32)).eps
    bound = (oriented(weight, dim).double() - exact).abs() - (nearest(exact, dtype).double() - exact).abs()
    assert bool((bound <= 2 * len(columns) * wide * magnitude).all())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [1, 0])
@pytest.mark.parametrize("blocks", [False, True])
def test_park_restores_the_weight_bitwise_whatever_was_resident(dtype, dim, blocks):
    weight, resident, columns = make(dtype, dim, adapters=((9, 0.5), (8, 2.0)), blocks=blocks)
    original = weight.clone()
    for wanted in (columns, columns[:1], columns[1:], columns, columns[:1]):
        write(resident, weight, wanted)
        columns[0].delta.data.add_(0.1)
        resident.changed("a0")
        write(resident, weight, wanted)
        assert_holds(weight, original, wanted, dim)
    assert not torch.equal(weight, original)
    resident.park(weight)
    assert torch.equal(weight, original)
    assert resident.positions is None
    write(resident, weight, columns)
    assert_holds(weight, original, columns, dim)


def test_a_million_random_sums_are_rounded_once():
    g = torch.Generator().manual_seed(0)
    weight = torch.randn(20000, 50, generator=g).bfloat16()
    original, resident = weight.clone(), MergeableColumns(1)
    delta = torch.randn(20000, 50, generator=g) * 2.0**-9
    resident.changed("a")
    write(resident, weight, (AdapterColumns("a", delta, torch.arange(50), 0.75),))
    exact = original.double() + 0.75 * delta.double()
    distance = (weight.double() - exact).abs() - (nearest(exact, torch.bfloat16).double() - exact).abs()
    assert bool((distance <= 2.0**-23 * exact.abs()).all())  # the sum in float32 may land on the other side of a tie
    twice = (original.float() + 0.75 * delta.bfloat16().float()).bfloat16()
    assert not torch.equal(weight, twice)


def test_just_above_a_tie_is_rounded_up():
    weight, resident = torch.ones(1, 1, dtype=torch.bfloat16), MergeableColumns(1)
    resident.changed("a")
    delta = torch.tensor([[2.0**-8 + 2.0**-20]])  # rounded to bfloat16 first, it would be a tie
    write(resident, weight, (AdapterColumns("a", delta, torch.tensor([0]), 1.0),))
    assert float(weight) == 1.0078125


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("blocks", [False, True])
def test_values_that_are_not_finite_are_written_and_compared_by_their_bits(dtype, blocks):
    weight, resident, (columns,) = make(dtype, adapters=((9, 1.0),), blocks=blocks)
    original = weight.clone()
    with torch.no_grad():
        columns.delta[:3, 0] = torch.tensor([float("nan"), float("inf"), -1e30])
    write(resident, weight, (columns,))
    want = expected(original, (columns,))
    assert torch.equal(weight.isnan(), want.isnan())
    assert torch.equal(weight[~want.isnan()], want[~want.isnan()])
    revision, version = resident.revisions["a0"], weight._version
    resident.compare(weight)
    write(resident, weight, (columns,))
    assert (resident.revisions["a0"], weight._version) == (revision, version)
    resident.before_backward(weight, resident.state, resident.state.tag)
    resident.park(weight)
    assert torch.equal(weight, original)


@pytest.mark.parametrize("what", ["delta", "scale", "indices", "replaced"])
def test_whatever_changes_the_sum_is_written(what):
    weight, resident, (columns,) = make()
    original = weight.clone()
    write(resident, weight, (columns,))
    if what == "delta":
        columns.delta.detach().add_(1.0)
    elif what == "indices":
        columns.indices.copy_(torch.tensor([0, 1, 2]))  # as load_state_dict does
    elif what == "scale":
        columns = columns._replace(scale=columns.scale / 2)
    else:
        columns = columns._replace(delta=columns.delta.detach() + 1)
        resident.changed("a0")
    assert bool(resident.state.moved()) == (what in ("delta", "indices"))
    write(resident, weight, (columns,))
    assert_holds(weight, original, (columns,))
    assert not resident.state.moved()
    resident.park(weight)
    assert torch.equal(weight, original)


@pytest.mark.parametrize("blocks", [False, True])
def test_nothing_is_written_when_nothing_changed(blocks):
    weight, resident, columns = make(adapters=((9, 0.5), (4, 1.0)), blocks=blocks)
    for wanted in (columns, columns[:1], ()):
        write(resident, weight, wanted)
        version, state = weight._version, resident.state
        write(resident, weight, wanted)
        resident.before_backward(weight, state, state.tag)
        resident.compare(weight)
        write(resident, weight, wanted)
        assert weight._version == version
        assert resident.state is state


@pytest.mark.parametrize("blocks", [False, True])
@pytest.mark.parametrize("adapters", [((9, 1.0),), ((9, 1.0), (3, 1.0))], ids=str)
def test_a_write_touches_only_its_columns_and_allocates_little(adapters, blocks):
    weight, resident, columns = make(out=40, inp=500, adapters=adapters, blocks=blocks)
    untouched = torch.ones(500, dtype=torch.bool)
    for c in columns:
        untouched[c.indices] = False
    weight[:, untouched] = float("nan")  # a write or a read-and-write of all would have to meet these
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            result = func(*args, **(kwargs or {}))
            for tensor in torch.utils._pytree.tree_leaves(result):
                if isinstance(tensor, torch.Tensor) and not shares_memory(tensor, weight):
                    largest = max(largest, tensor.numel())
            return result

    before = weight.clone()
    with Watch():
        write(resident, weight, columns)
        columns[0].delta.detach().add_(1)
        write(resident, weight, columns)
        resident.park(weight)
    assert torch.equal(weight.isnan(), before.isnan())
    assert 0 < largest <= 40 * 12


def shares_memory(one, other):
    return one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()


@pytest.mark.parametrize("blocks", [False, True])
def test_a_weight_made_in_inference_mode_can_be_written_outside_it(blocks):
    with torch.inference_mode():
        weight, resident, columns = make(adapters=((9, 0.5),), blocks=blocks)
    original = weight.clone()
    write(resident, weight, columns)
    assert_holds(weight, original, columns)
    resident.park(weight)
    assert torch.equal(weight, original)


@pytest.mark.parametrize("blocks", [False, True])
def test_writing_in_inference_mode_leaves_the_layer_trainable(blocks):
    weight, resident, (columns,) = make(adapters=((9, 0.5),), blocks=blocks)
    original = weight.clone()
    with torch.inference_mode():
        write(resident, weight, (columns,))
        assert not resident.state.tag.is_inference()
        assert not any(scale.is_inference() for scale in resident.traced.scales)
    columns.delta.detach().add_(1)
    write(resident, weight, (columns,))
    assert_holds(weight, original, (columns,))
    resident.park(weight)
    assert torch.equal(weight, original)


@pytest.mark.parametrize("blocks", [False, True])
def test_a_weight_that_requires_grad_can_be_written(blocks):
    # PEFT freezes the weights of a model after it has put an adapter in.
    weight, resident, columns = make(adapters=((9, 0.5),), blocks=blocks)
    original, weight = weight.clone(), torch.nn.Parameter(weight)
    write(resident, weight, columns)
    assert_holds(weight.detach(), original, columns)
    assert weight.grad_fn is None
    resident.park(weight)
    assert torch.equal(weight, original)


def test_a_park_for_the_moment_tells_the_entry():
    weight, resident, columns = make()
    resident.entry = entry = Entry()
    write(resident, weight, columns)
    resident.park(weight)
    assert not entry.unwritten
    write(resident, weight, columns)
    resident.park(weight, for_now=True)
    assert entry.unwritten


# -- an exception in the middle ---------------------------------------------------------------------------------------


def failing(monkeypatch, name, after):
    """Let a function of the module do the first half of its work, and raise, at the call after `after` others."""
    real, calls = getattr(resident_module, name), 0

    def fail(*args):
        nonlocal calls
        calls += 1
        if calls > after:
            if name == "put_columns":
                weight, dim, positions, values = args
                half = positions.numel() // 2
                real(weight, dim, positions[:half], values.narrow(dim, 0, half))
            raise MemoryError(name)
        return real(*args)

    monkeypatch.setattr(resident_module, name, fail)


@pytest.mark.parametrize("before", ["nothing", "the same columns", "others"])
@pytest.mark.parametrize(
    ("name", "blocks", "after"),
    [("put_columns", False, 0), ("put_columns", False, 1), ("sum_of", False, 0), ("add_scaled", True, 0)],
)
def test_an_interrupted_write_leaves_the_originals_recoverable(before, name, blocks, after, monkeypatch):
    jobs = [make(adapters=((8, 0.5), (9, 2.0)), blocks=blocks, seed=seed) for seed in range(3)]
    originals = [weight.clone() for weight, _, _ in jobs]
    if before != "nothing":
        for weight, resident, columns in jobs:
            write(resident, weight, columns[:1] if before == "the same columns" else columns[1:])
            columns[0].delta.detach().mul_(2)
            resident.notice()
    failing(monkeypatch, name, after)
    with pytest.raises(MemoryError, match=name):
        write_together([(resident, weight, now(resident, columns[:1])) for weight, resident, columns in jobs])
    monkeypatch.undo()
    for (weight, resident, _), original in zip(jobs, originals, strict=True):
        resident.park(weight)
        assert torch.equal(weight, original)
    for (weight, resident, columns), original in zip(jobs, originals, strict=True):
        write(resident, weight, columns[:1])
        assert_holds(weight, original, columns[:1])
        resident.park(weight)
        assert torch.equal(weight, original)


def test_a_half_copied_block_leaves_the_originals_recoverable(monkeypatch):
    weight, resident, columns = make(adapters=((9, 0.5),), blocks=True)
    original, copy_ = weight.clone(), torch._foreach_copy_

    def fail(views, values):
        copy_([view[:4] for view in views], [value[:4] for value in values])
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "_foreach_copy_", fail)
    with pytest.raises(KeyboardInterrupt):
        write(resident, weight, columns)
    monkeypatch.undo()
    assert not torch.equal(weight, original)
    write(resident, weight, columns)
    assert_holds(weight, original, columns)
    resident.park(weight)
    assert torch.equal(weight, original)


def test_a_first_write_that_fails_before_anything_is_kept_can_be_repeated(monkeypatch):
    weight, resident, columns = make()
    original = weight.clone()

    def fail(*args):
        raise MemoryError

    monkeypatch.setattr(Kept, "of", fail)
    with pytest.raises(MemoryError):
        write(resident, weight, columns)
    monkeypatch.undo()
    resident.park(weight)
    assert torch.equal(weight, original)
    write(resident, weight, columns)
    assert_holds(weight, original, columns)


# -- many weights together ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dim", [1, 0])
@pytest.mark.parametrize("blocks", [False, True])
def test_writing_together_equals_writing_one_by_one(dim, blocks):
    dtypes = (torch.float32, torch.bfloat16, torch.float32, torch.float64, torch.float32)
    adapters = (((9, 0.5),), ((9, 0.5),), ((8, 1.5),), ((9, 0.5),), ((8, 0.5), (3, 2.0)))
    jobs = [
        make(dtype, dim, adapters=its, seed=seed, blocks=blocks)
        for seed, (dtype, its) in enumerate(zip(dtypes, adapters, strict=True))
    ]
    originals = [weight.clone() for weight, _, _ in jobs]

    def together(compare=False):
        for weight, resident, _ in jobs:
            resident.notice()
            if compare:
                resident.compare(weight)
        write_together([(resident, weight, now(resident, columns)) for weight, resident, columns in jobs])

    def check():
        for (weight, _, columns), original in zip(jobs, originals, strict=True):
            assert_holds(weight, original, columns, dim)

    together()
    check()
    versions = [weight._version for weight, *_ in jobs]
    together(compare=True)  # nothing changed: nothing is written
    assert [weight._version for weight, *_ in jobs] == versions
    for _, _, columns in jobs:
        columns[0].delta.data.mul_(2)
    together(compare=True)  # a change that version counters do not show
    check()
    for (weight, resident, _), original in zip(jobs, originals, strict=True):
        resident.park(weight)
        assert torch.equal(weight, original)


@pytest.mark.parametrize("ranks", [(3, 6), (6, 3), (3, 3), (9, 9)])
@pytest.mark.parametrize("blocks", [False, True])
def test_another_adapters_columns_are_taken_out_first(ranks, blocks):
    weight, resident, columns = make(adapters=((ranks[0], 0.5), (ranks[1], 2.0)), blocks=blocks)
    original = weight.clone()
    for wanted in (columns[:1], columns[1:], columns, columns[::-1], columns[:1], ()):
        write(resident, weight, wanted)
        assert_holds(weight, original, wanted)
    assert torch.equal(weight, original)


def test_two_jobs_for_one_weight_leave_what_the_second_wants():
    # An optimizer that holds two active adapters of a layer says so once for each.
    weight, resident, columns = make(adapters=((3, 0.5), (6, 2.0)))
    original = weight.clone()
    jobs = []
    for name in ("a0", "a1"):
        resident.changed(name)
        jobs.append((resident, weight, now(resident, columns)))
    write_together(jobs)
    assert_holds(weight, original, columns)
    assert resident.state.columns == now(resident, columns)
    resident.park(weight)
    assert torch.equal(weight, original)


def test_threads_that_write_at_once_write_one_result():
    weight, resident, columns = make(out=300, inp=300, adapters=((64, 0.5),))
    original, wanted = weight.clone(), now(resident, columns)
    barrier = threading.Barrier(8)

    def work():
        barrier.wait()
        resident.write(weight, wanted)

    in_threads([work] * 8)
    assert_holds(weight, original, columns)
    assert weight._version == 1


def test_one_thread_writes_at_a_time(monkeypatch):
    jobs = [make(seed=seed, blocks=True, adapters=((8, 1.0),)) for seed in range(2)]
    jobs += [make(seed=seed) for seed in range(2)]
    inside, most = 0, 0

    def slow(real):
        def run(*args):
            nonlocal inside, most
            inside += 1
            most = max(most, inside)
            time.sleep(0.02)
            inside -= 1
            return real(*args)

        return run

    monkeypatch.setattr(resident_module, "add_scaled", slow(add_scaled))
    monkeypatch.setattr(resident_module, "sum_of", slow(sum_of))
    in_threads([lambda job=job: write(job[1], job[0], job[2]) for job in jobs])
    assert most == 1


def in_threads(tasks):
    threads = [threading.Thread(target=task) for task in tasks]
    for t in threads:
        t.start()
    for t in threads:
        t.join()


# -- what nobody saw --------------------------------------------------------------------------------------------------


def test_a_backward_pass_without_a_trusted_optimizer_is_unaccounted_for():
    weight, resident, columns = make()
    write(resident, weight, columns)
    resident.before_backward(weight, resident.state, resident.state.tag)
    assert resident.unaccounted
    resident.compare(weight)
    assert not resident.unaccounted
    resident.trusted.add("a0")
    resident.before_backward(weight, resident.state, resident.state.tag)
    assert not resident.unaccounted


@pytest.mark.parametrize("parked", [False, True])
@pytest.mark.parametrize("adapters", [((3, 0.5),), ((3, 0.5), (6, 2.0))], ids=str)
def test_comparing_finds_a_write_that_no_version_counter_shows(parked, adapters):
    weight, resident, columns = make(adapters=adapters)
    original = weight.clone()
    write(resident, weight, columns)
    pending = resident.state
    if parked:
        resident.park(weight, for_now=True)
    columns[0].delta.data.add_(1.0)
    assert not pending.moved()
    resident.compare(weight)
    with pytest.raises(RuntimeError, match=MODIFIED):
        resident.before_backward(weight, pending, pending.tag)
    write(resident, weight, columns)
    assert_holds(weight, original, columns)
    resident.park(weight)
    assert torch.equal(weight, original)


def test_comparing_leaves_revisions_alone_where_nothing_was_written():
    weight, resident, columns = make(torch.bfloat16, adapters=((3, 0.5), (6, 2.0)))
    write(resident, weight, columns)
    pending, revisions = resident.state, dict(resident.revisions)
    resident.compare(weight)
    resident.park(weight, for_now=True)
    resident.compare(weight)
    assert resident.revisions == revisions
    resident.before_backward(weight, pending, pending.tag)


# -- passes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("blocks", [False, True])
def test_a_backward_pass_gets_the_columns_of_its_forward_pass_back(blocks):
    weight, resident, columns = make(adapters=((9, 0.5), (8, 2.0)), blocks=blocks)
    original, states = weight.clone(), []
    for wanted in (columns[:1], columns[1:], columns, (columns[0]._replace(scale=3.0),), ()):
        write(resident, weight, wanted)
        states.append(resident.state)
    for state in (*states, *states[::-1]):
        resident.before_backward(weight, state, state.tag)
        assert_holds(weight, original, state.columns)
    resident.park(weight)
    assert torch.equal(weight, original)


def test_a_backward_pass_that_puts_columns_back_tells_the_entry():
    weight, resident, columns = make()
    resident.entry = entry = Entry()
    write(resident, weight, columns)
    state = resident.state
    resident.before_backward(weight, state, state.tag)
    assert not entry.unwritten
    resident.park(weight)
    resident.before_backward(weight, state, state.tag)
    assert entry.unwritten


@pytest.mark.parametrize("parked", [False, True])
@pytest.mark.parametrize("change", ["delta", "indices", "revision"])
def test_a_change_between_forward_and_backward_raises(change, parked):
    weight, resident, (columns,) = make()
    original = weight.clone()
    write(resident, weight, (columns,))
    state = resident.state
    if parked:
        resident.park(weight)
    if change == "delta":
        columns.delta.detach().add_(1)
    elif change == "indices":
        columns.indices.copy_(torch.tensor([0, 1, 2]))
    else:
        resident.changed("a0")  # a step that no version counter shows
    with pytest.raises(RuntimeError, match=f"adapter 'a0' {MODIFIED}"):
        resident.before_backward(weight, state, state.tag)
    resident.park(weight)
    assert torch.equal(weight, original)
    write(resident, weight, (columns,))
    with pytest.raises(RuntimeError, match=f"adapter 'a0' {MODIFIED}"):
        resident.before_backward(weight, state, state.tag)


def test_what_ran_without_columns_does_not_mind_their_changes():
    weight, resident, columns = make()
    original, parked = weight.clone(), resident.state
    write(resident, weight, columns)
    columns[0].delta.detach().add_(1)
    resident.changed("a0")
    resident.before_backward(weight, parked, parked.tag)
    assert torch.equal(weight, original)


def test_one_adapters_change_does_not_concern_another():
    weight, resident, columns = make(adapters=((3, 0.5), (6, 2.0)))
    original = weight.clone()
    write(resident, weight, columns[:1])
    state = resident.state
    resident.changed("a1")
    resident.before_backward(weight, state, state.tag)
    assert_holds(weight, original, columns[:1])


def test_a_deleted_adapter_can_not_be_put_back():
    weight, resident, columns = make()
    write(resident, weight, columns)
    state = resident.state
    resident.park(weight)
    del resident.revisions["a0"]
    with pytest.raises(RuntimeError, match=MODIFIED):
        resident.before_backward(weight, state, state.tag)
    resident.changed("a0")  # added again
    with pytest.raises(RuntimeError, match=MODIFIED):
        resident.before_backward(weight, state, state.tag)


@pytest.mark.parametrize("change", ["merge", "unmerge", "reloaded", "let go"])
def test_a_change_of_the_weight_between_forward_and_backward_raises(change):
    weight, resident, columns = make()
    if change == "unmerge":
        resident.merge(weight, now(resident, columns), safe=False)
        state = resident.state
        resident.unmerge(weight)
    else:
        write(resident, weight, columns)
        state = resident.state
        if change == "merge":
            resident.merge(weight, now(resident, columns), safe=False)
        elif change == "reloaded":
            resident.park(weight)
            resident.reloaded()
        else:
            resident.park(weight)
            resident.base_changed()
    before = weight.clone()
    with pytest.raises(RuntimeError, match=r"merged, unmerged or loaded.*or its adapter unloaded"):
        resident.before_backward(weight, state, state.tag)
    assert torch.equal(weight, before)


def test_a_repeated_pass_with_other_adapters_raises():
    weight, resident, columns = make(adapters=((3, 1.0), (3, 1.0)))
    write(resident, weight, columns[:1])
    first = resident.state
    write(resident, weight, columns[1:])
    with pytest.raises(RuntimeError, match=r"repeats a forward pass with adapter 'a1' active"):
        resident.before_backward(weight, first, resident.state.tag)
    same = State(first.columns, first.base)
    resident.before_backward(weight, first, same.tag)  # a repeated pass with the same ones


def first_pass(resident):
    """What re-entrant checkpointing runs first."""

    def run(x):
        if not torch.is_grad_enabled():
            resident.note_forward()
        return x * 1

    checkpoint(run, torch.ones(1, requires_grad=True), use_reentrant=True)


def repeated_pass(resident):
    """What re-entrant checkpointing runs in the backward pass."""

    def run(x):
        if torch.is_grad_enabled():
            resident.note_forward()
        return x * 1

    checkpoint(run, torch.ones(1, requires_grad=True), use_reentrant=True).backward()


def test_re_entrant_checkpointing_that_repeats_its_first_passes_is_fine():
    weight, resident, columns = make(adapters=((3, 1.0), (3, 1.0)))
    write(resident, weight, columns[:1])
    for _ in range(3):
        first_pass(resident)
        first_pass(resident)
        repeated_pass(resident)
        repeated_pass(resident)


def test_re_entrant_checkpointing_that_repeats_with_other_adapters_raises():
    weight, resident, columns = make(adapters=((3, 1.0), (3, 1.0)))
    write(resident, weight, columns[:1])
    first_pass(resident)
    write(resident, weight, columns[1:])
    with pytest.raises(RuntimeError, match="repeats a forward pass with adapter 'a1' active"):
        repeated_pass(resident)
    write(resident, weight, columns[:1])
    repeated_pass(resident)


def test_re_entrant_checkpointing_that_repeats_with_other_values_raises():
    weight, resident, columns = make()
    write(resident, weight, columns)
    first_pass(resident)
    columns[0].delta.detach().add_(1)
    write(resident, weight, columns)
    with pytest.raises(RuntimeError, match="repeats a forward pass with adapter 'a0' active"):
        repeated_pass(resident)


def test_re_entrant_checkpointing_that_forgets_to_switch_back_raises_at_the_pass_too_many():
    weight, resident, columns = make(adapters=((3, 1.0), (3, 1.0)))
    for wanted in (columns[:1], columns[1:]):
        write(resident, weight, wanted)
        first_pass(resident)
    write(resident, weight, columns[:1])
    repeated_pass(resident)
    with pytest.raises(RuntimeError, match="repeats a forward pass with adapter 'a0' active"):
        repeated_pass(resident)


def test_a_graph_that_is_retained_repeats_its_first_pass_twice():
    weight, resident, columns = make()
    write(resident, weight, columns)
    first_pass(resident)
    repeated_pass(resident)
    repeated_pass(resident)


# -- merging and rotating ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [1, 0])
@pytest.mark.parametrize("blocks", [False, True])
def test_merging_gives_the_resident_values_and_unmerging_the_original_bitwise(dtype, dim, blocks):
    weight, resident, columns = make(dtype, dim, adapters=((8, 0.5), (9, 2.0)), blocks=blocks)
    original = weight.clone()
    write(resident, weight, columns[1:])
    resident.merge(weight, now(resident, columns[:1]), safe=True)
    assert_holds(weight, original, columns[:1], dim)
    resident.merge(weight, now(resident, columns[1:]), safe=False)
    assert_holds(weight, original, columns, dim)
    assert [c.name for c in resident.merged] == ["a0", "a1"]
    resident.unmerge(weight)
    assert torch.equal(weight, original)
    assert resident.merged == ()


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


def test_a_sealed_merge_can_not_be_undone():
    weight, resident, columns = make()
    resident.merge(weight, columns, safe=False)
    merged = weight.clone()
    resident.keep_merged()
    assert resident.merged == ()
    resident.unmerge(weight)
    assert torch.equal(weight, merged)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [1, 0])
@pytest.mark.parametrize("alone", [True, False])
def test_rotating_keeps_what_was_trained_and_parking_restores_the_weight_bitwise(dtype, dim, alone):
    weight, resident, columns = make(dtype, dim, adapters=((3, 0.5), (4, 2.0)))
    original = weight.clone()
    rotated, other = columns
    wanted = (rotated,) if alone else columns
    write(resident, weight, wanted)
    before, pending = weight.clone(), resident.state
    old = rotated.indices.clone()

    def fold():
        nonlocal rotated
        folded = Folded(old, rotated.delta.detach().clone())
        places = [i for i in range(11) if i not in old.tolist()][:3]
        rotated.indices.copy_(torch.tensor(places))
        rotated.delta.detach().zero_()
        resident.changed("a0")
        rotated = rotated._replace(folded=folded)
        return now(resident, (rotated,) if alone else (rotated, other))

    resident.rotate(weight, "a0", fold)
    if alone:
        assert torch.equal(weight, before)
    else:
        assert_holds(weight, original, (rotated, other), dim)
    with pytest.raises(RuntimeError, match="or its columns rotated" if alone else MODIFIED):
        resident.before_backward(weight, pending, pending.tag)
    rotated.delta.detach().add_(0.25)
    wanted = (rotated,) if alone else (rotated, other)
    write(resident, weight, wanted)
    assert_holds(weight, original, wanted, dim)
    halved = (rotated._replace(scale=0.25), *wanted[1:])
    write(resident, weight, halved)
    assert_holds(weight, original, halved, dim)
    resident.merge(weight, now(resident, wanted), safe=True)
    assert_holds(weight, original, wanted, dim)
    resident.unmerge(weight)
    write(resident, weight, wanted)
    resident.park(weight)
    assert torch.equal(weight, original)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [1, 0])
def test_columns_that_were_folded_may_be_trained_again(dtype, dim):
    weight, resident, (rotated,) = make(dtype, dim, adapters=((3, 0.5),))
    original = weight.clone()
    write(resident, weight, (rotated,))

    def exchange():
        """The trained columns are folded; those that were folded, or else new ones, are trained."""
        nonlocal rotated
        folded = Folded(rotated.indices.clone(), rotated.delta.detach().clone())
        if rotated.folded is None:
            others = [column for column in range(11) if column not in folded.indices.tolist()]
            rotated.indices.copy_(torch.tensor(others[:3]))
            rotated.delta.detach().zero_()
        else:
            rotated.indices.copy_(rotated.folded.indices)
            rotated.delta.detach().copy_(rotated.folded.delta)
        resident.changed("a0")
        rotated = rotated._replace(folded=folded)
        return now(resident, (rotated,))

    for _ in range(4):
        before = weight.clone()
        resident.rotate(weight, "a0", exchange)
        assert torch.equal(weight, before)
        rotated.delta.detach().add_(0.25)
        write(resident, weight, (rotated,))
        assert_holds(weight, original, (rotated,), dim)
    resident.park(weight)
    assert torch.equal(weight, original)


# -- the weight as others see it ------------------------------------------------------------------------------------


@pytest.mark.parametrize("blocks", [False, True])
@pytest.mark.parametrize(
    "borrow",
    [lambda w: w.detach(), lambda w: w.detach().view(-1), lambda w: w.detach().numpy(), lambda w: w.data.detach()],
)
@pytest.mark.parametrize("how", ["write", "merge", "before_backward"])
def test_what_was_lent_keeps_the_pretrained_values(borrow, how, blocks):
    weight, resident, columns = make(adapters=((9, 0.5),), blocks=blocks)
    original = weight.clone()
    write(resident, weight, columns)
    state = resident.state
    resident.park(weight, for_now=True)
    resident.handed_out(weight.detach())
    lent = borrow(weight)
    if how == "write":
        write(resident, weight, columns)
    elif how == "merge":
        resident.merge(weight, now(resident, columns), safe=False)
    else:
        resident.before_backward(weight, state, state.tag)
    assert torch.equal(torch.as_tensor(lent).reshape(original.shape), original)
    assert_holds(weight, original, columns)


def test_lending_costs_no_copy_once_the_borrower_is_gone():
    weight, resident, columns = make()
    lent = weight.detach()
    resident.handed_out(lent)
    pointer = weight.data_ptr()
    del lent
    write(resident, weight, columns)
    assert weight.data_ptr() == pointer


def test_what_was_lent_keeps_its_values_when_another_user_has_gone():
    weight, resident, columns = make()
    original, other = weight.clone(), weight.detach()
    resident.handed_out(weight.detach())
    lent = weight.detach()  # of what was handed out, as in {name: value.detach() for ... in model.state_dict()}
    del other  # as many users as before
    write(resident, weight, columns)
    assert torch.equal(lent, original)
    assert_holds(weight, original, columns)


def test_a_weight_that_is_lent_twice_keeps_what_was_lent_first():
    weight, resident, columns = make()
    original = weight.clone()
    first = weight.detach()
    resident.handed_out(first)
    resident.handed_out(weight.detach())
    write(resident, weight, columns)
    assert torch.equal(first, original)
    assert not torch.equal(weight, original)


def test_a_view_that_was_not_lent_does_not_move_the_weight():
    weight, resident, columns = make()
    resident.handed_out(weight.detach())
    write(resident, weight, columns)
    pointer, view = weight.data_ptr(), weight.detach()
    columns[0].delta.detach().add_(1)
    write(resident, weight, columns)
    assert weight.data_ptr() == pointer == view.data_ptr()


def test_resident_columns_are_copied_parked():
    weight, resident, columns = make()
    original = weight.clone()
    write(resident, weight, columns)
    with pytest.raises(RuntimeError, match="parked"):
        copy.deepcopy(resident)
    resident.park(weight)
    twin, twin_weight = copy.deepcopy(resident), weight.clone()
    assert (twin.revisions, twin.state.columns) == ({}, ())  # other processes count their own
    write(twin, twin_weight, columns)
    assert_holds(twin_weight, original, columns)
    assert torch.equal(weight, original)


def test_merged_columns_can_be_unmerged_in_a_copy():
    weight, resident, columns = make()
    original = weight.clone()
    resident.merge(weight, columns, safe=False)
    twin, twin_weight = copy.deepcopy(resident), weight.clone()
    twin.unmerge(twin_weight)
    assert torch.equal(twin_weight, original)
    assert not torch.equal(weight, original)


@pytest.mark.parametrize("active", [False, True])
@pytest.mark.parametrize("where", ["park", "put_columns"])
def test_a_merge_that_ctrl_c_interrupts_can_be_undone_bit_for_bit(monkeypatch, active, where):
    weight, resident, columns = make()
    original = weight.clone()
    if active:
        write(resident, weight, columns)

    def interrupted(*args, **kwargs):
        if where == "put_columns":
            put_columns(*args)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        place = (resident, "park_within") if where == "park" else (merging_module, "put_columns")
        patch.setattr(*place, interrupted)
        with pytest.raises(KeyboardInterrupt):
            resident.merge(weight, columns, safe=False)
    resident.unmerge(weight)
    assert torch.equal(weight, original)


# -- a weight that somebody else writes -------------------------------------------------------------------------------

REFUSED = "written or replaced while the adapter was active"


@pytest.mark.parametrize("how", ["data", "in place"])
@pytest.mark.parametrize("parked", [False, True])
@pytest.mark.parametrize("meet", ["write", "park", "before_backward", "write_together", "merge", "compare"])
def test_a_weight_that_somebody_else_writes_is_refused_wherever_it_is_met(how, parked, meet):
    weight, resident, columns = make()
    weight = torch.nn.Parameter(weight, requires_grad=False)
    write(resident, weight, columns)
    state = resident.state
    if parked:
        resident.park(weight, for_now=True)  # the adapter is active all the same
    if how == "data":
        weight.data = torch.full_like(weight, 2.0)
    else:
        weight.add_(1)
    assert not resident.as_left(weight)
    before, wanted = weight.clone(), now(resident, columns)
    meets = {
        "write": lambda: resident.write(weight, wanted),
        "park": lambda: resident.park(weight),
        "before_backward": lambda: resident.before_backward(weight, state, state.tag),
        "write_together": lambda: write_together([(resident, weight, wanted)]),
        "merge": lambda: resident.merge(weight, wanted, safe=False),
        "compare": lambda: resident.compare(weight),
    }
    with pytest.raises(RuntimeError, match=f"adapted by adapter 'a0' was {REFUSED}"):
        meets[meet]()
    assert torch.equal(weight, before)


def test_a_weight_that_is_moved_or_written_with_the_same_values_is_fine():
    weight, resident, columns = make()
    original = weight.clone()
    write(resident, weight, columns)
    weight.copy_(weight.clone())  # as DistributedDataParallel does
    write(resident, weight, columns)
    weight.data = weight.data.clone()
    write(resident, weight, columns)
    assert_holds(weight, original, columns)
    resident.park(weight)
    assert torch.equal(weight, original)


def test_a_weight_that_is_replaced_by_its_pretrained_one_is_written():
    weight, resident, columns = make()
    original = weight.clone()
    write(resident, weight, columns)
    weight.data = original.clone()
    assert not resident.as_left(weight)
    write(resident, weight, columns)
    assert_holds(weight, original, columns)
    resident.park(weight)
    assert torch.equal(weight, original)


@pytest.mark.parametrize("active_before", [True, False])
def test_a_weight_without_active_columns_is_its_owners_to_change(active_before):
    weight, resident, columns = make()
    if active_before:
        write(resident, weight, columns)
        write(resident, weight, ())
    pending = resident.state
    weight.add_(1)
    changed = weight.clone()
    write(resident, weight, columns)
    assert_holds(weight, changed, columns)
    if active_before:
        with pytest.raises(RuntimeError, match="written by somebody else"):
            resident.before_backward(weight, pending, pending.tag)
    resident.park(weight)
    assert torch.equal(weight, changed)


def test_a_weight_parked_for_a_moment_and_then_disabled_is_its_owners_to_change():
    weight, resident, columns = make()
    write(resident, weight, columns)
    resident.park(weight, for_now=True)  # a state dict, or a copy
    write(resident, weight, ())  # disabled
    weight.add_(1)
    changed = weight.clone()
    write(resident, weight, columns)
    assert_holds(weight, changed, columns)
    resident.park(weight)
    assert torch.equal(weight, changed)


def test_a_half_active_weight_is_moved_between_two_writes():
    weight, resident, columns = make(torch.bfloat16)
    original = weight.clone()
    write(resident, weight, columns)
    resident.park(weight, for_now=True)
    resident.moved()
    weight.data = weight.data.clone()
    write(resident, weight, columns)
    assert_holds(weight, original, columns)
    resident.park(weight)
    assert torch.equal(weight, original)


# -- states ---------------------------------------------------------------------------------------------------------


def test_the_key_of_a_state_is_the_base_and_each_adapters_name_revision_and_scale():
    _, resident, columns = make(adapters=((3, 0.5), (6, 2.0)))
    first, second = now(resident, columns)
    base, adapters = State((first, second), 7).key
    assert base == 7
    assert [key[:3] for key in adapters] == [("a0", first.revision, 0.5), ("a1", second.revision, 2.0)]
    replaced = first._replace(delta=first.delta.clone())
    assert State((replaced, second), 7).key != State((first, second), 7).key
    resident.changed("a0")
    assert resident.revisions["a0"] not in (first.revision, second.revision)


def test_states_differ_with_all_that_the_weight_depends_on_and_so_do_their_tags():
    _, resident, columns = make(adapters=((3, 0.5), (6, 2.0)))
    first, second = now(resident, columns)
    states = [
        State((first,), 0),
        State((first._replace(scale=2.0),), 0),
        State((first._replace(revision=first.revision + 10),), 0),
        State((first._replace(name="another"),), 0),
        State((first, second), 0),
        State((second, first), 0),
        State((first,), 1),
        State((), 0),
        State((), 1),
    ]
    assert len({state.key for state in states}) == len({int(state.tag) for state in states}) == len(states)


def test_equal_states_have_equal_tags():
    _, resident, columns = make()
    wanted = now(resident, columns)
    assert torch.equal(State(wanted, 3).tag, State(wanted, 3).tag)
    assert State(wanted, 3).key == State(wanted, 3).key


def test_a_state_knows_where_its_columns_lie():
    _, _, (columns,) = make()
    state = State((columns,), 0)
    assert state.places == State((columns,), 1).places
    assert state.places == State((columns._replace(scale=2.0, revision=5),), 0).places
    assert state.places != State((columns._replace(indices=columns.indices.clone()),), 0).places
    assert state.places != State((columns, columns), 0).places
    assert state.places != State((), 0).places
    folded = Folded(torch.tensor([0]), torch.zeros(9, 1))
    assert state.places != State((columns._replace(folded=folded),), 0).places
    columns.indices.copy_(columns.indices.clone())
    assert state.places != State((columns,), 0).places


def test_a_state_names_the_adapters_whose_tensors_moved():
    _, _, columns = make(adapters=((3, 0.5), (6, 2.0)))
    state = State(columns, 0)
    assert state.moved() == []
    columns[1].delta.detach().add_(1)
    assert [c.name for c in state.moved()] == ["a1"]
    columns[0].indices.copy_(columns[0].indices.clone())
    assert [c.name for c in state.moved()] == ["a0", "a1"]
    whole = torch.zeros(18, 3)
    state = State((columns[0]._replace(source=whole),), 0)
    whole.add_(1)  # this process's rows of it are a tensor of their own, which does not show that
    assert [c.name for c in state.moved()] == ["a0"]
