"""One optimizer step: the same work for every method, and the numbers taken of it."""

from __future__ import annotations

import time

import pytest
import torch

from bench.tiny_bench import POINT, prepared, settings, step
from paca.bench.base_model import build_base_model
from paca.bench.saved_activations import measure_saved_activations
from paca.bench.settings import Point
from paca.bench.step import TrainingStep, inner_model
from paca.bench.step_budget import PHASES, count_launches, profile_step, time_phases
from paca.bench.timing import time_rounds


@pytest.mark.parametrize("method", ["paca", "lora", "full"])
def test_a_step_moves_what_is_trained_and_leaves_no_gradient(method: str) -> None:
    one = step(method, scope="model", dtype="float32")
    before = [p.detach().clone() for p in one.trained]
    one.run()
    one.run()  # LoRA's A has no gradient while B is zero
    assert all(not torch.equal(p, b) for p, b in zip(one.trained, before, strict=True))
    assert all(p.grad is None for p in one.model.parameters())


def test_the_floor_goes_through_the_whole_model_and_trains_nothing() -> None:
    one = step("frozen", scope="model", dtype="float32")
    gradients: list[torch.Size] = []
    one.model.get_submodule("model.layers.0").register_full_backward_hook(lambda m, i, o: gradients.append(i[0].shape))
    one.run()
    assert gradients == [torch.Size([1, 16, 192])]
    assert not one.trained


def test_with_blocks_all_methods_send_a_gradient_to_the_input() -> None:
    for method in ("frozen", "paca", "lora"):
        one = step(method, dtype="float32")
        one.backward(one.forward())
        assert one._inputs[0].grad is not None
        assert one._inputs[0].grad.abs().sum() > 0
        one.update()
        assert one._inputs[0].grad is None


def test_the_fused_loss_is_the_models_own() -> None:
    losses = [step("paca", scope="model", dtype="float32", loss=loss).forward() for loss in ("logits", "fused")]
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-5, atol=1e-6)


def test_images_are_classified() -> None:
    wanted = settings(model="vit-b16", scope="model", hidden=64, layers=1, vocab=None, image_size=32, dtype="float32")
    base = build_base_model(wanted)
    assert wanted.points(base.vision) == [Point(1, 0)]
    loss = TrainingStep(prepared(base, "lora"), base, wanted, Point(2, 0)).forward()
    assert 5 < loss.item() < 9  # ln(1000) = 6.9


def saved_per_token(one: TrainingStep) -> float:
    found = one.per_block(lambda: measure_saved_activations(one.forward, one.model).bytes)
    assert found is not None
    return found / POINT.seq


def test_one_block_keeps_the_same_whatever_the_depth() -> None:
    found = []
    for layers in (2, 4):
        one = step("lora", layers=layers)
        blocks = inner_model(one.model).layers
        found.append(saved_per_token(one))
        assert len(inner_model(one.model).layers) == layers  # put back
        assert inner_model(one.model).layers is blocks
    assert found[0] == found[1]
    assert step("lora", layers=1).per_block(lambda: 1) is None


def test_lists_within_blocks_are_not_taken_for_the_blocks() -> None:
    one = step("paca")
    alone = saved_per_token(one)
    for block in inner_model(one.model).layers:
        block.mlp.experts = torch.nn.ModuleList([torch.nn.Identity(), torch.nn.Identity()])
    assert saved_per_token(one) == alone
    inner_model(one.model).more = torch.nn.ModuleList([torch.nn.Identity(), torch.nn.Identity()])
    assert one.per_block(lambda: 1) is None


def test_saved_activations_rank_as_the_design_says() -> None:
    order = ("paca+lean+recompute", "paca+lean", "paca", "lora-tuned", "lora")
    saved = {name: saved_per_token(step(name)) for name in (*order, "frozen")}
    kept = [saved[name] for name in order]
    assert kept == sorted(kept)
    assert len(set(kept)) == len(kept)
    # each of the 7 linear layers keeps 4 selected inputs per token in bf16, and a few bytes that name its state
    assert 7 * 4 * 2 <= saved["paca"] - saved["frozen"] <= 7 * 4 * 2 + 7 * 16 / POINT.seq


def test_rounds_rotate_and_a_failing_method_does_not_stop_the_others() -> None:
    ran: list[str] = []

    class Logged:
        abandoned = False
        clock = staticmethod(time.perf_counter)

        def __init__(self, name: str, fails_at: int = 99) -> None:
            self.name, self.left = name, fails_at

        def run(self) -> None:
            ran.append(self.name)
            self.left -= 1
            if self.left < 0:
                raise torch.OutOfMemoryError("no more")

        def abandon(self) -> None:
            self.abandoned = True

    steps = {"a": Logged("a"), "b": Logged("b"), "c": Logged("c", fails_at=3)}
    timings = time_rounds(steps, rounds=4, warmup=1)  # type: ignore[arg-type]
    assert "".join(ran) == "abc" + "abc" + "bca" + "cab" + "ba"
    assert [len(timings[name].seconds) for name in "abc"] == [4, 4, 0]
    assert timings["c"].failure == "out of memory"
    assert steps["c"].abandoned
    assert not steps["a"].abandoned


@pytest.mark.parametrize(("pressed_at", "kept"), [(3, 0), (4, 1), (5, 2)])
def test_ctrl_c_keeps_whole_rounds(pressed_at: int, kept: int) -> None:
    runs = 0

    class Pressed:
        clock = staticmethod(time.perf_counter)

        def run(self) -> None:
            nonlocal runs
            runs += 1
            if runs == 2 * pressed_at:
                raise KeyboardInterrupt

    steps = {"a": Pressed(), "b": Pressed()}
    options = {"rounds": 9, "warmup": 2}
    if not kept:
        with pytest.raises(KeyboardInterrupt):
            time_rounds(steps, **options)  # type: ignore[arg-type]
        return
    timings = time_rounds(steps, **options)  # type: ignore[arg-type]
    assert [(len(t.seconds), t.interrupted) for t in timings.values()] == [(kept, True)] * 2


def test_the_budget_of_a_step_names_its_parts() -> None:
    one = step("paca", dtype="float32")
    one.run()
    phases = time_phases(one)
    assert tuple(phases) == PHASES
    assert all(seconds >= 0 for seconds in phases.values())
    kinds = profile_step(one, rank=4, repeats=1)
    assert {"GEMM", "skinny GEMM", "gather", "attention", "optimizer", "Python and autograd"} <= set(kinds)
    assert "skinny GEMM" not in profile_step(step("frozen", dtype="float32"), rank=4, repeats=1)


def test_what_a_step_launches_is_counted_by_block() -> None:
    """On a CPU, operators: PaCA has other ones than a frozen layer in each block, the optimizer adds to the step."""
    counts, layers = {}, {}
    for method in ("frozen", "paca"):
        one = step(method, dtype="float32")
        counts[method] = count_launches(one)
        passes = count_launches(one, optimizer=False)
        assert passes <= counts[method]
        layers[method] = one.per_block(lambda one=one: count_launches(one, optimizer=False))
        assert 0 < layers[method] < passes / 2
        assert all(p.grad is None for p in one.model.parameters())
    assert layers["frozen"] != layers["paca"]  # one product where autograd has a transpose besides, and the columns'
    assert counts["paca"] > counts["frozen"]
