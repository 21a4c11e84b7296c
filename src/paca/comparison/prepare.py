"""Before anything is trained: settings are checked, methods made equal, and what will be trained is known."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from paca.comparison.comparable import batching
from paca.comparison.equal import CameOut, same_memory, same_parameters, same_time
from paca.comparison.flags import around
from paca.comparison.methods import Method
from paca.comparison.plan_table import PlannedMethod
from paca.comparison.settings import Comparison, SettingsFile, check_calibration, run_sections, write_config
from paca.comparison.trial import trials_of
from paca.evaluation.own_data import scorer
from paca.messages.errors import PacaError
from paca.messages.say import say
from paca.pretrained.claims import Claim
from paca.training import load_run_config
from paca.training.config.run_config import RunConfig
from paca.training.plan import Plan
from paca.training.prepare import prepare as prepare_run
from paca.training.trainers import trainer_kind

AUTOCAST = "autocast_adapter_dtype"


def prepare(comparison: Comparison, console: Console, *, dry_run: bool = False) -> list[PlannedMethod]:
    """Make the methods equal, as `comparison.equal` asks, and find out what each will train.

    What was measured is kept in the folder, so the same command takes it from there. While one process prepares, others
    wait.

    Args:
        comparison: Its methods become those that were made equal, and its rates those that `auto` stands for.
        console: Where is told what is measured.
        dry_run: Nothing will be trained: for the rates that `auto` stands for, no weights are fetched from the hub.

    Raises:
        PacaError: A setting is wrong, the folder holds another comparison, or a method can't make a step.
    """
    with comparison.claim("preparation") as claim:
        if not claim.take():
            say(console, f"Waiting for {claim.holder()}, which prepares the same comparison ...")
            claim.take(wait=True)
        comparison.rates.check([method.name for method in comparison.methods])
        twins = _twins(comparison)
        for name, (twin, why) in twins.items():
            say(console, f"{name} is left out: {why} it is {twin} again.")
            comparison.methods = [method for method in comparison.methods if method.name != name]
            comparison.rates.own.pop(name, None)
        if len(comparison.methods) < 2 and twins:
            raise PacaError(
                f"There is nothing to compare {comparison.methods[0].name} with. Give --methods another one, weights "
                f"in 16 bits (--set model.dtype=bfloat16), or no train.{AUTOCAST} in the YAML."
            )
        file = SettingsFile(comparison)
        before = {name: _read(name, values) for name, values in file.read().items()}
        _check(comparison)
        came_out = {**_made_equal(comparison, before, claim, console), **before}
        file.write({name: _written(one) for name, one in came_out.items()})  # it was measured, whatever comes now
        planned = []
        for method in comparison.methods:
            one = came_out[method.name]
            grid = comparison.rates.of(method.name) or one.rates
            plan = plan_of(comparison, one.method, fetch=grid is None and not dry_run)
            planned.append(PlannedMethod(one, plan))
            if comparison.rates.of(method.name) is None:
                grid = comparison.rates.own[method.name] = grid or around(plan.config.train["learning_rate"])
                one.rates = one.rates if dry_run else grid
        file.write({name: _written(one) for name, one in came_out.items()})
    comparison.methods = [one.method for one in planned]
    return planned


def _twins(comparison: Comparison) -> dict[str, tuple[str, str]]:
    """The methods that differ from another in `autocast_adapter_dtype` alone, where it does nothing or the YAML has it
    for all; with the other, and why it is the same."""

    def without(method: Method) -> dict[str, Any]:
        train = {name: value for name, value in method.sections.get("train", {}).items() if name != AUTOCAST}
        return {**method.sections, "train": train}

    twins = {}
    for method in comparison.methods:
        others = (one for one in comparison.methods if one is not method and without(one) == without(method))
        other = next(others, None)
        if other is not None and method.sections.get("train", {}).get(AUTOCAST) is False and other.name not in twins:
            if {**comparison.common.get("train", {}), **other.sections.get("train", {})}.get(AUTOCAST) is False:
                twins[method.name] = other.name, f"with train.{AUTOCAST}: false in the YAML"
                continue
            plan = plan_of(comparison, other)
            if plan.dtype == "float32" and plan.config.model.quantization is None:
                twins[method.name] = other.name, "on weights in float32 (those in 16 bits: --set model.dtype=bfloat16)"
    return twins


def plan_of(comparison: Comparison, method: Method, *, fetch: bool = False) -> Plan:
    """What a run of the method trains.

    Args:
        comparison: With the rates that are known; the rate is `auto` where none are.
        method: One of its methods.
        fetch: Fetch the weights that `auto` depends on, as the run would, if they are on the hub.

    Raises:
        PacaError: Its settings don't fit the model or the data, or its runs would refuse what is known of that.
    """
    try:
        prepared = prepare_run(_config_of(comparison, method), whole=False, fetch=fetch)
        plan, data = prepared.plan, prepared.plan.data
        if (told := plan.refusal()) is not None:
            raise PacaError(f"its runs would refuse this: {told}")
        if (measurement := scorer(plan.config.eval)) is not None and data.eval is not None:
            measurement.check(data.eval.dataset, prepared.outline)
    except PacaError as error:
        raise _of_method(comparison, method, error) from error
    return plan


def _of_method(comparison: Comparison, method: Method, error: PacaError) -> PacaError:
    """The error, without the place in a file that nobody wrote."""
    written = re.escape(str(_file_of(comparison, method)))
    told = re.sub(rf"{written}(, line [0-9]+)?: ", "", str(error))
    missing = re.search(r"\bpeft\.(\w+) is missing", told)
    if missing is not None and method.settings != comparison.common.get(method.kind):
        told += (
            f" Its place is a file of the method's own, with peft: {{peft_type: {method.settings.get('peft_type')}, "
            f"{missing[1]}: ...}} in it: --methods {method.name}=FILE.yaml."
        )
    return PacaError(f"The method {method.name}: {told}")


def _file_of(comparison: Comparison, method: Method) -> Path:
    return comparison.path / "configs" / f"{method.name}.yaml"


def _config_of(comparison: Comparison, method: Method) -> RunConfig:
    """Of a run with the first rate and seed."""
    folder = comparison.path / "trials" / method.name
    rate = next(iter(comparison.rates.of(method.name) or []), None)
    sections = run_sections(comparison.common, method, rate, comparison.seeds[0], folder)
    return load_run_config(write_config(_file_of(comparison, method), sections))


def _check(comparison: Comparison) -> None:
    check_calibration(comparison.common, comparison.methods)
    scored: dict[str, str] = {}
    for method in comparison.methods:
        try:
            config = _config_of(comparison, method)
        except PacaError as error:
            raise _of_method(comparison, method, error) from error
        if trainer_kind(config.train).score is None:
            scored[method.name] = batching(config.as_dict())
    if len(set(scored.values())) > 1:
        told = ", ".join(f"{name} by {how}" for name, how in scored.items())
        raise PacaError(
            f"The methods would not be judged by the same: {told}. Set eval.metric: loss, which is one over tokens; or "
            "train.eval_packing: false beside packing, and one per_device_eval_batch_size and train_sampling_strategy "
            "for all."
        )


def _made_equal(
    comparison: Comparison, before: dict[str, CameOut], claim: Claim, console: Console
) -> dict[str, CameOut]:
    leader, *others = comparison.methods
    methods = [leader, *(method for method in others if method.name not in before)]
    found = [CameOut(method) for method in methods]
    if all(method.name in before for method in comparison.methods):
        return {one.method.name: one for one in found}
    attempt = trials_of(comparison, claim)

    def announce(line: str) -> None:
        say(console, line)

    def count(method: Method) -> int:
        return plan_of(comparison, method).trainable_parameters

    if "parameters" in comparison.equal:
        found = same_parameters(methods, count)
    if "memory" in comparison.equal:
        train = plan_of(comparison, leader).config.train
        batch, accumulation = train["per_device_train_batch_size"], train["gradient_accumulation_steps"]
        counting = trials_of(comparison, claim, count_memory=not torch.cuda.is_available(), keep=True)
        found = same_memory(methods, batch, accumulation, count, counting, announce)
    if "time" in comparison.equal:  # last: a step's time depends on the r and the batch
        steps = plan_of(comparison, leader).steps
        if steps is None:
            raise PacaError("--equal time needs a number of steps, and packing hides it. Give train.max_steps.")
        timed = same_time([one.method for one in found], steps, comparison.common, attempt, announce)
        found = [
            replace(one, note=sized.note, measured={**sized.measured, **one.measured})
            for one, sized in zip(timed, found, strict=True)
        ]
    return {one.method.name: one for one in found}


def _read(name: str, values: dict[str, Any]) -> CameOut:
    return CameOut(Method(name, values["sections"]), values["measured"], values["note"], values.get("rates"))


def _written(one: CameOut) -> dict[str, Any]:
    return {"sections": one.method.sections, "measured": one.measured, "note": one.note, "rates": one.rates}
