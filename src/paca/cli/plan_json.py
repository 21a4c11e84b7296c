"""What `paca plan --json` prints."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from paca.planning.methods import Planned
    from paca.planning.on_device import OnDevice
    from paca.planning.outcome import Outcome


def as_json(outcome: Outcome) -> dict[str, Any]:
    result, rate, found = outcome.result, outcome.rate, outcome.found
    content: dict[str, Any] = {
        "target": outcome.target.name,
        "parameters": result.parameters,
        "trainable": result.trainable,
        "weights": result.weights,
        "lengths": outcome.target.lengths,
        "warning": outcome.target.warning,
        "before_training": outcome.target.before,
        "setting": result.setting.as_dict(),
        "memory": {**result.parts},
        "total": result.total,
        "peak_moment": result.moment,
        "budget": outcome.budget,
        "saved_activations": {**result.saved},
        "typical_sequence_length": outcome.target.typical_length,
        "flops_per_step": outcome.typical.flops,
        "bytes_to_unpack_weights_per_step": outcome.typical.dequantized,
        "unpacking": outcome.unpacking and dataclasses.asdict(outcome.unpacking),
        "rate": rate and {"flops_per_second": {**rate.measured}, "source": rate.source, "load": rate.load},
        "seconds_per_step": outcome.seconds() if outcome.simulated is None else None,
        "steps": outcome.target.steps,
    }
    if outcome.simulated is not None:
        content["simulated"] = _simulated_as_json(outcome.simulated, outcome.steps)
    if outcome.methods:
        content["methods"] = {row.method: _method_as_json(row) for row in outcome.methods}
        content["left_out"] = [*outcome.refused]
    if found is not None:
        content |= {"weights_reason": found.weights_reason, "not_considered": [*found.refused]}
        content["candidates"] = [
            {
                "setting": each.setting.as_dict(),
                "total": each.estimate.total,
                "fits": each.fits,
                "seconds_per_step": rate and each.seconds,
            }
            for each in found.candidates
        ]
    return content


def _method_as_json(row: Planned) -> dict[str, Any]:
    return {
        "r": row.r,
        "alpha": row.alpha,
        "layers": row.estimate.layers,
        "trainable": row.estimate.trainable,
        "total": row.estimate.total,
        "saved_activations": row.estimate.activations,
    }


def _simulated_as_json(simulated: OnDevice, steps: int) -> dict[str, Any]:
    from paca.planning.published_steps import errors_in_words

    device = simulated.device
    return {
        "measured": False,
        "device": device.name,
        "source": device.source,
        "usable_memory": {"bytes": device.usable, "source": device.usable_source},
        "errors": errors_in_words(device),
        "steps": steps,
        "left_out": [*simulated.refused],
        "notes": [*simulated.notes],
        "methods": {
            row.method: {
                **_method_as_json(row),
                "fits": row.estimate.total <= device.usable,
                "seconds_per_step": row.time.total,
                "device_seconds": row.time.device,
                "host_seconds": row.time.host,
                "tokens_per_second": row.tokens_per_second,
                "hours": row.hours(steps),
                "launch_bound": row.time.launch_bound,
                "waits": row.time.waits,
            }
            for row in simulated.rows
        },
    }
