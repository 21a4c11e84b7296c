"""The rows of the table of layers: every kind in plain floats, and weights that accelerate offloads."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import paca
from expert_models import STACKS, gpt_oss, mixtral
from models import gpt2, llama, tokens
from support_matrix.subject import Pair, Refused, Subject, pair, random_input

RESIDENT, ADDITIVE = frozenset({"resident"}), frozenset({"additive"})
DEVICE_MAP = {"first": "cpu", "second": "disk"}
BOTH = {"target_modules": ["first", "second"]}


def three_texts() -> Tensor:
    return tokens(3, 5)


def _pair(key: str, title: str, first: Any, second: Any, *shape: int, **settings: Any) -> Subject:
    def base(folder: Path | None = None) -> Pair:
        return pair(first, second)

    return Subject(
        key, title, RESIDENT, base, base, lambda: random_input(*shape), **{"targets": BOTH, "column_dim": 1, **settings}
    )


def _model(key: str, title: str, make: Callable[[], nn.Module], targets: dict[str, Any], **settings: Any) -> Subject:
    return Subject(
        key,
        title,
        RESIDENT,
        lambda folder: make().eval(),
        settings.pop("plain", lambda: make().eval()),
        three_texts,
        targets,
        **settings,
    )


class Words(nn.Module):
    """Two embeddings, added and mixed."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Embedding(64, 6, padding_idx=0)
        self.second = nn.Embedding(64, 6)
        self.mix = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.mix(torch.tanh(self.first(x)) * self.second(x))


def mixture(model: Any) -> list[nn.Module]:
    return [model.model.layers[0].mlp]


def _experts(implementation: str) -> Subject:
    return _model(
        f"experts-{implementation.replace('_', '-')}",
        f"stack of experts, `{implementation}`",
        lambda: mixtral(implementation, num_hidden_layers=1),
        {"target_parameters": STACKS, "task_type": "CAUSAL_LM"},
        plain=lambda: mixtral("eager", num_hidden_layers=1).eval(),
        column_dim=-1,
        compiled=mixture,
    )


def small_llama(**settings: Any) -> nn.Module:
    return llama(num_hidden_layers=1, **settings)


def untied_llama() -> nn.Module:
    model = small_llama(tie_word_embeddings=True)
    paca.untie_embeddings(model)
    return model


RESIDENT_LAYERS = (
    _pair(
        "linear",
        "`nn.Linear`",
        lambda: nn.Linear(7, 13),
        lambda: nn.Linear(13, 5),
        *(3, 4, 7),
        language_model=lambda folder: small_llama(),
    ),
    _pair(
        "linear-blocks",
        "`nn.Linear`, columns in blocks",
        lambda: nn.Linear(40, 48),
        lambda: nn.Linear(48, 5),
        *(3, 4, 40),
        targets={**BOTH, "r": 20, "selection": "random_blocks"},
        language_model=lambda folder: small_llama(),
    ),
    _pair(
        "conv1d-gpt2",
        "`Conv1D` (GPT-2)",
        lambda: Conv1D(13, 7),
        lambda: Conv1D(5, 13),
        *(3, 4, 7),
        column_dim=0,
        language_model=lambda folder: gpt2(),
    ),
    _pair(
        "conv1d",
        "`nn.Conv1d`",
        lambda: nn.Conv1d(3, 6, 3, padding=2, padding_mode="circular"),
        lambda: nn.Conv1d(6, 5, 2),
        *(3, 3, 8),
    ),
    _pair(
        "conv2d",
        "`nn.Conv2d`",
        lambda: nn.Conv2d(3, 6, 3, padding="same", dilation=2),
        lambda: nn.Conv2d(6, 5, (1, 2), stride=2),
        *(3, 3, 7, 6),
    ),
    _pair(
        "conv2d-groups",
        "`nn.Conv2d` with `groups`",
        lambda: nn.Conv2d(4, 6, 3, padding=1, groups=2),
        lambda: nn.Conv2d(6, 4, 3, groups=2),
        *(3, 4, 7, 6),
    ),
    _pair("conv3d", "`nn.Conv3d`", lambda: nn.Conv3d(3, 4, 2), lambda: nn.Conv3d(4, 3, 1), 3, 3, 4, 3, 5),
    _model("embedding", "`nn.Embedding`", Words, BOTH),
    _model(
        "lm-head",
        "output layer (`lm_head`) with a weight of its own",
        small_llama,
        {"target_modules": ["lm_head"], "task_type": "CAUSAL_LM"},
        compiled=lambda model: [model.lm_head],
    ),
    _model(
        "untied",
        "tied embeddings after `paca.untie_embeddings`",
        untied_llama,
        {"target_modules": ["embed_tokens", "lm_head"], "task_type": "CAUSAL_LM"},
        compiled=lambda model: [model.model.embed_tokens, model.lm_head],
    ),
    *(_experts(implementation) for implementation in ("grouped_mm", "batched_mm", "eager")),
    _model(
        "experts-transposed",
        "stack of experts, stored `(E, in, out)` (gpt-oss)",
        lambda: gpt_oss("grouped_mm", num_hidden_layers=1, layer_types=["full_attention"]),
        {"target_parameters": STACKS, "task_type": "CAUSAL_LM"},
        plain=lambda: gpt_oss("eager", num_hidden_layers=1, layer_types=["full_attention"]).eval(),
        column_dim=-2,
        compiled=mixture,
    ),
)


# -- offloaded ------------------------------------------------------------------------------------------------------


def linear_pair() -> Pair:
    return pair(lambda: nn.Linear(7, 13), lambda: nn.Linear(13, 5))


def conv1d_pair() -> Pair:
    return pair(lambda: Conv1D(13, 7), lambda: Conv1D(5, 13))


def _offloaded(key: str, title: str, base: Any, plain: Any, **settings: Any) -> Subject:
    return Subject(key, title, ADDITIVE, base, plain, lambda: random_input(3, 4, 7), targets=BOTH, **settings)


def offloaded_llama(folder: Path) -> nn.Module:
    return cpu_offload(small_llama(), execution_device=torch.device("cpu"))


def dispatched(folder: Path) -> nn.Module:
    """`first` on the CPU, `second` in a safetensors file."""
    model: Any = linear_pair()
    model._no_split_modules = []  # PEFT asks for what transformers' models have
    folder.mkdir(exist_ok=True)
    weights = folder / "weights.safetensors"
    save_file(model.state_dict(), weights)
    index = {
        name: {"safetensors_file": str(weights), "weight_name": name, "dtype": "float32"} for name in model.state_dict()
    }
    model.second.to("meta")  # as from_pretrained leaves what stays on the disk
    return dispatch_model(model, dict(DEVICE_MAP), main_device="cpu", offload_index=index)


def dispatch_again(folder: Path) -> dict[str, Any]:
    """How `PeftModel.from_pretrained` is told to dispatch the model with its adapter."""
    return {"device_map": {f"base_model.model.{name}": place for name, place in DEVICE_MAP.items()}}


OFFLOADED = (
    _offloaded(
        "linear-cpu-offload",
        "`nn.Linear` offloaded to the CPU",
        lambda folder: cpu_offload(linear_pair()),
        linear_pair,
        language_model=offloaded_llama,
    ),
    _offloaded(
        "linear-disk-offload",
        "`nn.Linear` offloaded to the disk",
        lambda folder: disk_offload(linear_pair(), folder / "offloaded"),
        linear_pair,
        language_model=lambda folder: disk_offload(small_llama(), folder, execution_device=torch.device("cpu")),
    ),
    _offloaded(
        "conv1d-gpt2-cpu-offload",
        "`Conv1D` (GPT-2) offloaded to the CPU",
        lambda folder: cpu_offload(conv1d_pair()),
        conv1d_pair,
        column_dim=0,
        language_model=lambda folder: cpu_offload(gpt2(), execution_device=torch.device("cpu")),
    ),
    Subject(
        "dispatched",
        "`nn.Linear`, a `device_map` over CPU and disk",
        frozenset({"additive", "resident"}),
        dispatched,
        linear_pair,
        lambda: random_input(3, 4, 7),
        BOTH,
        loading=dispatch_again,
        language_model=offloaded_llama,
    ),
)


# -- refused --------------------------------------------------------------------------------------------------------


class OwnForward(nn.Linear):
    """A subclass that may use its weight in a way of its own."""


def _refused(key: str, title: str, make: Callable[[], nn.Module], **targets: Any) -> Refused:
    return Refused(key, title, make, targets or {"target_modules": ["target"]})


def _one(layer: nn.Module) -> nn.Module:
    return nn.ModuleDict({"target": layer})


def _offloaded_one(layer: nn.Module) -> nn.Module:
    model = nn.ModuleDict({"body": _one(layer)})
    return cpu_offload(model, execution_device=torch.device("cpu"))


def _offloaded_experts() -> nn.Module:
    return cpu_offload(mixtral("grouped_mm", num_hidden_layers=1), execution_device=torch.device("cpu"))


REFUSED_LAYERS = (
    _refused("depthwise", "depthwise convolution", lambda: _one(nn.Conv2d(4, 4, 3, groups=4))),
    _refused("transposed", "transposed convolution", lambda: _one(nn.ConvTranspose2d(4, 4, 3))),
    _refused("max-norm", "`nn.Embedding(max_norm=…)`", lambda: _one(nn.Embedding(7, 4, max_norm=1.0))),
    _refused("sparse", "`nn.Embedding(sparse=True)`", lambda: _one(nn.Embedding(7, 4, sparse=True))),
    _refused("subclass", "subclass of an adapted class", lambda: _one(OwnForward(4, 4))),
    _refused("bilinear", "any other class, such as `nn.Bilinear`", lambda: _one(nn.Bilinear(4, 4, 4))),
    _refused(
        "tied-embedding", "tied weights: the embedding", lambda: gpt2(), target_modules=["wte"], task_type="CAUSAL_LM"
    ),
    _refused(
        "tied-head",
        "tied weights: the output layer",
        lambda: small_llama(tie_word_embeddings=True),
        target_modules=["lm_head"],
        task_type="CAUSAL_LM",
    ),
    _refused("conv2d-offload", "`nn.Conv2d` offloaded", lambda: _offloaded_one(nn.Conv2d(4, 6, 3))),
    _refused("embedding-offload", "`nn.Embedding` offloaded", lambda: _offloaded_one(nn.Embedding(7, 4))),
    _refused(
        "experts-offload",
        "stack of experts, offloaded",
        _offloaded_experts,
        target_parameters=STACKS,
    ),
)
