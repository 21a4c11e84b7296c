"""FSDP1 flattens weights, so adapted layers refuse it by name, also for inference. A state dict is right or refused."""

from __future__ import annotations

import pytest

from forked_process import run_forked

PROGRAM = """
import sys
import torch
import torch.distributed as dist
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.fsdp.wrap import ModuleWrapPolicy

from models import adapted_perceptron, perceptron
from paca.layers import PacaLayer

parts, keep, training = (argument == "True" for argument in sys.argv[1:])
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)


def wrapped(model):
    kinds = {PacaLayer, *(type(m) for m in model.modules() if isinstance(m, (PacaLayer, torch.nn.Linear)))}
    policy = ModuleWrapPolicy(kinds) if parts else None
    return FullyShardedDataParallel(
        model, use_orig_params=keep, auto_wrap_policy=policy, device_id=torch.device("cpu")
    )


def outcome(name, action):
    try:
        with torch.set_grad_enabled(training):
            action()
        print(name, "ran")
    except RuntimeError as error:
        print(name, error)


def frozen():
    model = adapted_perceptron()
    return wrapped(model.requires_grad_(False))


def loaded_again(state):
    fresh = adapted_perceptron()
    for parameter in fresh.parameters():
        parameter.data.zero_()
    fresh.load_state_dict(state)
    assert torch.equal(fresh(x), adapted_perceptron()(x))


x = torch.randn(4, 7)
outcome("stock:", lambda: wrapped(perceptron())(x))
outcome("forward:", lambda: frozen()(x))
twice = frozen()
outcome("forward:", lambda: twice(x))
outcome("forward:", lambda: twice(x))
if keep:
    outcome("disabling:", lambda: frozen().module.base_model.disable_adapter_layers())
outcome("state dict:", lambda: loaded_again(frozen().state_dict()))
dist.destroy_process_group()
"""


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("parts", [False, True])
def test_an_adapted_model_under_fsdp1_is_refused_by_name(parts, keep, training):
    """`parts`: each layer by itself; `keep`: its original parameters (`use_orig_params`)."""
    ended = run_forked(PROGRAM, parts, keep, training)
    assert ended.returncode == 0, ended.stderr
    stock, *refused, state_dict = ended.stdout.splitlines()
    assert stock == "stock: ran"
    assert state_dict == "state dict: ran" or "FSDP1" in state_dict
    assert len(refused) == 3 + keep
    assert all("FSDP1" in line and "FSDP2 (fully_shard" in line for line in refused), refused
