"""The size of a checkpoint's weights, read before anything is loaded."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import huggingface_hub
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from paca.pretrained.gguf import kept_of
from paca.pretrained.location import Location, locate
from paca.pretrained.weight_size import size_of_loaded, weight_size
from tiny_checkpoint import save_base
from tiny_gguf import write_gguf

KINDS = {"self_attn.q_proj": 0.1, "mlp.up_proj": 0.3}


def checkpoint() -> dict[str, Tensor]:
    """Nine blocks of two kinds of weights, and what must not count beside them."""
    torch.manual_seed(0)
    weights = {
        f"model.layers.{n}.{kind}.weight": size * torch.randn(96, 64) for n in range(9) for kind, size in KINDS.items()
    }
    others = {"model.embed_tokens.weight": torch.full((128, 64), 9.0), "lm_head.weight": torch.full((128, 64), 9.0)}
    others |= {f"model.layers.{n}.input_layernorm.weight": torch.full((64,), 9.0) for n in range(9)}
    others |= {f"model.layers.{n}.lora_A.weight": torch.full((4, 64), 9.0) for n in range(9)}
    return {name: tensor.bfloat16() for name, tensor in (weights | others).items()}


def in_parts(folder: Path, whole: str) -> None:
    tensors = checkpoint()
    places = {name: f"part-{number % 3}{Path(whole).suffix}" for number, name in enumerate(tensors)}
    for part in set(places.values()):
        SAVE[whole]({name: tensors[name] for name in tensors if places[name] == part}, folder / part)
    (folder / f"{whole}.index.json").write_text(json.dumps({"weight_map": places}))


SAVE: dict[str, Callable[..., None]] = {"model.safetensors": save_file, "pytorch_model.bin": torch.save}


@pytest.mark.parametrize("parts", [False, True])
@pytest.mark.parametrize("name", list(SAVE))
def test_it_is_the_root_mean_square_of_the_layers_weights(tmp_path: Path, name: str, parts: bool) -> None:
    in_parts(tmp_path, name) if parts else SAVE[name](checkpoint(), tmp_path / name)
    assert weight_size(Location("folder", str(tmp_path))) == pytest.approx((0.1**2 / 2 + 0.3**2 / 2) ** 0.5, rel=0.02)


def test_convolutions_count_unless_each_channel_has_its_own(tmp_path: Path) -> None:
    torch.manual_seed(0)
    weights = {
        "blocks.0.conv_pw.weight": 0.1 * torch.randn(96, 64, 1, 1),
        "blocks.1.conv.weight": 0.3 * torch.randn(96, 8, 3, 3),
        "blocks.1.conv_dw.weight": torch.full((96, 1, 3, 3), 9.0),
        "conv_stem.weight": torch.full((32, 3, 3, 3), 9.0),
    }
    save_file(weights, tmp_path / "model.safetensors")
    size = weight_size(Location("folder", str(tmp_path)))
    assert size == pytest.approx((0.1**2 / 2 + 0.3**2 / 2) ** 0.5, rel=0.02)


def test_a_gguf_file_tells_it_too_and_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "cache"))
    base = save_base(tmp_path / "base")
    file = write_gguf(tmp_path / "tiny.gguf", base)
    kept_of(str(file)).mkdir(parents=True)  # its config is kept there
    (kept_of(str(file)) / "weight_size.json").touch()  # as a process leaves it that is killed while it writes
    size = weight_size(locate(str(file)))
    assert size == pytest.approx(weight_size(locate(str(base))), rel=0.05)  # it is quantized
    monkeypatch.setattr("paca.pretrained.gguf.require_gguf", lambda: pytest.fail("it is read again"))
    assert weight_size(locate(str(file))) == size


def test_what_can_not_be_read_tells_nothing(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"no such file")
    assert weight_size(Location("folder", str(tmp_path))) is None
    assert weight_size(Location("folder", str(tmp_path / "nowhere"))) is None
    save_file(
        {"model.layers.0.mlp.up_proj.weight": torch.ones(64, 64, dtype=torch.int8)}, tmp_path / "model.safetensors"
    )
    assert weight_size(Location("folder", str(tmp_path))) is None


def test_weights_in_floats_of_8_bits_tell_nothing(tmp_path: Path) -> None:
    """Their scales are no weights, and what has none may be routers alone."""
    weight = torch.ones(64, 64).to(torch.float8_e4m3fn)
    scale, router = torch.full((64, 64), 9.0), torch.ones(64, 64)
    for name, file in (("scaled", "model.safetensors"), ("pickled", "pytorch_model.bin")):
        tensors = {
            "model.layers.0.mlp.up_proj.weight": weight,
            "model.layers.0.mlp.up_proj.weight_scale_inv": scale,
            "model.layers.0.mlp.gate.weight": router,
        }
        (tmp_path / name).mkdir()
        save = save_file if file.endswith("safetensors") else torch.save
        save(tensors, tmp_path / name / file)
        assert weight_size(Location("folder", str(tmp_path / name))) is None
    layer = nn.Linear(64, 64, bias=False)
    layer.weight = nn.Parameter(weight, requires_grad=False)
    layer.weight_scale_inv = nn.Parameter(scale)
    assert size_of_loaded(nn.Sequential(layer, nn.Linear(64, 64))) is None


@pytest.mark.parametrize("value", [0.0, math.nan])
def test_weights_of_zeros_or_nan_tell_nothing(tmp_path: Path, value: float) -> None:
    save_file({"model.layers.0.mlp.weight": torch.full((64, 64), value)}, tmp_path / "model.safetensors")
    assert weight_size(Location("folder", str(tmp_path))) is None


def test_scales_of_quantized_weights_are_no_weights(tmp_path: Path) -> None:
    names = ("scales", "weight_scale", "zeros")
    scales = {f"model.layers.0.q_proj.{name}": torch.full((32, 64), 0.01).half() for name in names}
    save_file({**scales, "model.layers.0.q_proj.qweight": torch.ones(64, 64).int()}, tmp_path / "model.safetensors")
    assert weight_size(Location("folder", str(tmp_path))) is None


def test_the_hub_is_asked_for_weights_only_where_they_will_be_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_file(checkpoint(), tmp_path / "model.safetensors")
    asked: list[str] = []

    def download(name: str, file: str, **options: object) -> str:
        asked.append(file)
        if file.endswith("json"):
            raise FileNotFoundError(file)
        return str(tmp_path / file)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setattr("paca.pretrained.hub.only_from_cache", lambda *args: False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    assert weight_size(Location("hub", "owner/name")) is None
    assert asked == []
    assert weight_size(Location("hub", "owner/name"), fetch=True) == pytest.approx(0.224, rel=0.02)
    assert set(asked) == {"model.safetensors.index.json", "model.safetensors"}
