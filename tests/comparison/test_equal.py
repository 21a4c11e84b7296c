"""Parameters, time and memory made equal, with made-up measurements."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from paca.comparison.equal import ROUNDS, same_memory, same_parameters, same_time
from paca.comparison.methods import Method
from paca.comparison.trial import Trial, TrialFailed, Try
from paca.messages.errors import PacaError

PACA = Method("paca", {"paca": {"r": 16, "paca_alpha": 32}})
LORA = Method("lora", {"lora": {"r": 8, "lora_alpha": 16}})
FULL = Method("full", {"full": {}})


def quiet(line: str) -> None:
    pass


def parameters(method: Method) -> int:
    r = method.settings.get("r")
    return {"paca": lambda: 100 * r, "lora": lambda: 150 * r + 40, "full": lambda: 10**6}[method.name]()


def test_ranks_follow_so_that_parameters_are_as_near_as_can_be() -> None:
    paca, lora, full = same_parameters([PACA, LORA, FULL], parameters)
    assert paca.method == PACA
    assert lora.method.settings == {"r": 10, "lora_alpha": 20}  # 1540 for 1600; 11 has 1690
    assert full.method == FULL
    assert "no r" in full.note


def test_a_rank_is_at_least_one() -> None:
    small = PACA.with_rank(1)
    _, lora = same_parameters([small, LORA], parameters)
    assert lora.method.settings["r"] == 1


def test_a_rank_is_found_where_twice_the_first_one_is_more_than_the_layers_have() -> None:
    def count(method: Method) -> int:
        if method.settings["r"] > 24:
            raise PacaError("r=32 columns were asked for, but this layer has 24")
        return parameters(method)

    _, paca = same_parameters([LORA.with_rank(4), PACA], count)
    assert paca.method.settings["r"] == 6  # 600 for 640
    assert paca.note == ""
    _, widest = same_parameters([LORA.with_rank(20), PACA], count)
    assert widest.method.settings == {"r": 24, "paca_alpha": 48}
    assert widest.note == "can train no more than r 24, and would need r 30"


def test_parameters_that_do_not_follow_r_are_told() -> None:
    _, odd = same_parameters([PACA, LORA], lambda method: 100 if method.name == "paca" else 7)
    assert odd.method == LORA
    assert "don't follow" in odd.note


@pytest.mark.parametrize(("parameters_of", "r", "note"), [
    (lambda r: 46_000 // r + 800, 6, ""),  # fewer with a larger r, as RandLoRA's
    (lambda r: 2048, 8, "don't follow"),
    (lambda r: max(2048, 8192 - 64 * r), 1, ""),
    (lambda r: 512 * min(max(r, 8), 16), 64, ""),  # the same for the first two that are looked at
    (lambda r: min(256 * r, 2048), 8, "nearer than r 8, with 0.25 × the parameters"),  # LoKr's end somewhere
])  # fmt: skip
def test_a_rank_is_looked_for_where_parameters_are_not_linear_in_it(
    parameters_of: Callable[[int], int], r: int, note: str
) -> None:
    odd = Method("randlora", {"peft": {"peft_type": "RANDLORA", "r": r if note or r > 32 else 32}})
    leader = Method("paca", {"paca": {"r": 32, "paca_alpha": 32}})

    def count(method: Method) -> int:
        return 8192 if method is leader else parameters_of(method.settings["r"])

    _, came_out = same_parameters([leader, odd], count)
    assert note in came_out.note
    if not note:
        assert came_out.note == ""
        assert parameters_of(came_out.method.settings["r"]) == pytest.approx(8192, rel=0.05)


def drifting(step_seconds: dict[str, float]) -> tuple[Try, list[str]]:
    """A machine that takes half as long again in each round."""
    order: list[str] = []

    def attempt(method: Method, steps: int) -> Trial:
        drift = 1.5 ** (len(order) // len(step_seconds))
        order.append(method.name)
        return Trial(step_seconds[method.name] * steps * drift, 0)

    return attempt, order


def test_steps_follow_from_step_times_whatever_the_machine_drifts() -> None:
    attempt, order = drifting({"paca": 0.75, "lora": 1.0, "full": 3.0})
    lines: list[str] = []
    paca, lora, full = same_time([PACA, LORA, FULL], 120, {}, attempt, lines.append)
    assert lines[0] == f"Timing steps, round 1 of {ROUNDS}: paca ..."
    assert all(line.endswith(" left of the timing ...") for line in lines[1:])
    assert paca.method == PACA  # it leads: its steps are the YAML's
    assert lora.method.sections["train"]["max_steps"] == 90
    assert full.method.sections["train"]["max_steps"] == 30
    assert lora.measured["step_ratio"] == pytest.approx(4 / 3)
    assert len(order) == 3 * ROUNDS
    assert order[:3] == ["paca", "lora", "full"]
    assert order[3:6] == ["lora", "full", "paca"]  # turns rotate


def test_a_method_that_makes_no_step_is_told() -> None:
    def attempt(method: Method, steps: int) -> Trial:
        if method.name == "lora":
            raise TrialFailed("out of memory", out_of_memory=True)
        return Trial(1.0, 1)

    with pytest.raises(PacaError, match="lora can't make a step: out of memory"):
        same_time([PACA, LORA], 10, {}, attempt, quiet)
    told: list[str] = []
    (_, lora) = same_memory([PACA, LORA], 4, 1, parameters, attempt, told.append)
    assert told[-1] == "This counts as too large, as it ended in: out of memory"  # it may have been killed by hand
    assert lora.method == LORA
    assert "does not fit" in lora.note
    assert lora.measured == {}


def test_a_method_that_fails_for_other_reasons_than_memory_is_not_said_not_to_fit() -> None:
    """As one whose optimizer needs a package that is not there."""

    def attempt(method: Method, steps: int) -> Trial:
        if method.name == "lora":
            raise TrialFailed("No module named 'galore_torch'")
        return Trial(1.0, 1)

    with pytest.raises(PacaError, match="lora can't make a step: No module named 'galore_torch'"):
        same_memory([PACA, LORA], 4, 1, parameters, attempt, quiet)


def test_settings_that_count_steps_follow_the_steps_and_shares_stay() -> None:
    """LoRA had 105 steps of which 100 were a warm-up made for 200."""
    turning = PACA.with_settings("paca", rotate_every=20)
    attempt, _ = drifting({"paca": 1.0, "lora": 2.0, "turning": 0.5})
    methods = [PACA, LORA, Method("turning", turning.sections)]
    common = {"train": {"warmup_steps": 100}}
    paca, lora, turned = same_time(methods, 200, common, attempt, quiet)
    assert "warmup_steps" not in paca.method.sections.get("train", {})
    assert lora.method.sections["train"] == {"warmup_steps": 50, "max_steps": 100}
    assert lora.measured["scaled"] == {"warmup_steps": 50}
    assert turned.method.sections["train"] == {"warmup_steps": 200, "max_steps": 400}
    assert turned.method.settings["rotate_every"] == 40
    assert turned.measured["scaled"] == {"warmup_steps": 200, "rotate_every": 40}
    _, lora, _ = same_time(methods, 200, {"train": {"warmup_steps": 0.05}}, attempt, quiet)
    assert lora.method.sections["train"] == {"max_steps": 100}
    assert lora.measured["scaled"] == {}
    decays = {"lr_scheduler_kwargs": {"num_decay_steps": 60, "min_lr_ratio": 0.1, "num_stable_steps": None}}
    _, lora, _ = same_time(methods, 200, {"train": decays}, attempt, quiet)
    halved = {"num_decay_steps": 30, "min_lr_ratio": 0.1, "num_stable_steps": None}
    assert lora.method.sections["train"] == {"lr_scheduler_kwargs": halved, "max_steps": 100}
    assert lora.measured["scaled"] == {"num_decay_steps": 30}
    text = {"lr_scheduler_kwargs": '{"num_decay_steps": 60, "num_stable_steps": 1}'}
    _, lora, _ = same_time(methods, 200, {"train": text}, attempt, quiet)
    assert lora.method.sections["train"]["lr_scheduler_kwargs"] == {"num_decay_steps": 30, "num_stable_steps": 1}
    assert lora.measured["scaled"] == {"num_decay_steps": 30}
    own = LORA.with_settings("train", warmup_steps=1)
    _, lora = same_time([PACA, own], 200, common, attempt, quiet)
    assert lora.method.sections["train"]["warmup_steps"] == 1  # not 0.5, a share


def memory(per_sequence: dict[str, int], most_r: int = 10**9, room: int = 10**9) -> Callable[[Method, int], Trial]:
    def attempt(method: Method, steps: int) -> Trial:
        r, batch = method.settings.get("r", 0), method.sections.get("train", {}).get("per_device_train_batch_size", 4)
        if r > most_r:
            raise TrialFailed("r is too large")
        if r > room:
            raise TrialFailed("killed", out_of_memory=True)
        return Trial(1.0, 1000 + batch * per_sequence[method.name] + 2 * r)

    return attempt


def sizes(method: Method) -> tuple[int, int, int]:
    train = method.sections["train"]
    return method.settings["r"], train["per_device_train_batch_size"], train["gradient_accumulation_steps"]


def test_a_method_that_needs_more_takes_smaller_batches_and_accumulates() -> None:
    paca, lora = same_memory([PACA, LORA], 4, 2, parameters, memory({"paca": 100, "lora": 190}), quiet)
    assert paca.measured == {"peak": 1432}
    r, batch, accumulation = sizes(lora.method)
    assert (batch, accumulation) == (2, 4)
    # 1432 - 1000 - 2 x 190 leaves 52 bytes, for r 26; the search ends at 6 % of it
    assert 25 <= r <= 26
    assert lora.method.settings["lora_alpha"] == 2 * r
    assert lora.measured["peak"] == 1000 + 2 * 190 + 2 * r <= 1432


def test_a_method_keeps_the_batch_of_its_own_file() -> None:
    larger = LORA.with_settings("train", per_device_train_batch_size=6, gradient_accumulation_steps=1)
    _, lora = same_memory([PACA, larger], 4, 2, parameters, memory({"paca": 100, "lora": 120}), quiet)
    assert sizes(lora.method)[1:] == (3, 2)  # six sequences a step as before, where the leader has eight
    _, lora = same_memory(
        [PACA, LORA.with_settings("train", gradient_accumulation_steps=3)],
        4,
        2,
        parameters,
        memory({"paca": 100, "lora": 90}),
        quiet,
    )
    assert sizes(lora.method)[1:] == (4, 3)


@pytest.mark.parametrize("bytes_of_r", [lambda r: 3 * r, lambda r: 3 * r + r * r // 500, lambda r: 64 * (r // 16)])
def test_the_largest_rank_is_found_in_a_few_trials(bytes_of_r: Callable[[int], int]) -> None:
    """A trial trains on the longest batch: eleven of them took LoRA's r from 8 to 168."""
    tried: list[int] = []

    def attempt(method: Method, steps: int) -> Trial:
        if method.name == "paca":
            return Trial(1.0, 2000)
        tried.append(method.settings["r"])
        return Trial(1.0, 1000 + bytes_of_r(tried[-1]))

    _, lora = same_memory([PACA, LORA], 1, 1, parameters, attempt, quiet)
    r = lora.method.settings["r"]
    assert bytes_of_r(r) <= 1000 < bytes_of_r(r + max(1, r // 16))
    assert lora.measured["peak"] == 1000 + bytes_of_r(r)
    assert len(tried) == len(set(tried)) <= 6


def test_a_method_that_needs_less_gets_more_columns() -> None:
    _, paca = same_memory([LORA, PACA], 4, 1, parameters, memory({"paca": 60, "lora": 100}), quiet)
    r, batch, accumulation = sizes(paca.method)
    assert (batch, accumulation) == (4, 1)
    assert 82 <= r <= 88


def test_r_grows_no_further_than_the_layers_have_it() -> None:
    def count(method: Method) -> int:
        if method.settings["r"] > 40:
            raise PacaError("r=41 columns were asked for, but this layer has 40")
        return parameters(method)

    takes = {"paca": 60, "lora": 100}
    _, paca = same_memory([LORA, PACA], 4, 1, count, memory(takes, most_r=40), quiet)
    assert 38 <= paca.method.settings["r"] <= 40
    _, paca = same_memory([LORA, PACA], 4, 1, parameters, memory(takes, room=40), quiet)
    assert 38 <= paca.method.settings["r"] <= 40
    with pytest.raises(PacaError, match="paca can't make a step: r is too large"):  # though its layers have that r
        same_memory([LORA, PACA], 4, 1, parameters, memory(takes, most_r=40), quiet)


def test_memory_of_a_method_without_r_is_equalled_by_its_batch_alone() -> None:
    _, full = same_memory([PACA, FULL], 4, 1, parameters, memory({"paca": 100, "full": 300}), quiet)
    assert full.method.sections["train"]["per_device_train_batch_size"] == 1
    assert "no r" in full.note
