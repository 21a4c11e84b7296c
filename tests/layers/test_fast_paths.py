"""Mixed batches through torch's own transformer encoders, whose fast path reads weights without calling a layer."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from models import adapt


class Encoder(nn.Module):
    """Two encoder layers in evaluation mode, with an even number of heads: torch's fast path takes them."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 12, batch_first=True), 2)

    def forward(self, x, padding=None):
        return self.layers(x, src_key_padding_mask=padding)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("padded", [False, True])
def test_a_mixed_batch_reaches_the_layers_behind_a_fast_path(padded):
    torch.manual_seed(0)
    model = adapt(Encoder(), target_modules=["linear1", "linear2"]).eval()
    x, padding = torch.randn(3, 5, 8), torch.zeros(3, 5, dtype=torch.bool)
    padding[1, 3:] = True
    given = (x, padding) if padded else (x,)
    encoder = model.base_model.model.layers
    before = [dict(vars(module)) for module in encoder.modules()]
    with torch.no_grad():
        adapted = model(*given)
        with model.disable_adapter():
            base = model(*given)
        mixed = model(*given, adapter_names=["default", "default", "__base__"])
        again = model(*given)
    seen = ~padding  # at padded places the fast path has zeros
    torch.testing.assert_close(mixed[:2][seen[:2]], adapted[:2][seen[:2]])
    torch.testing.assert_close(mixed[2], base[2])
    assert not torch.allclose(adapted[:2], base[:2], atol=1e-3)
    assert torch.equal(again, adapted)
    assert [dict(vars(module)) for module in encoder.modules()] == before  # the fast path is back


@pytest.mark.parametrize("call", ["state_dict", "deepcopy"])
def test_a_fast_path_that_is_not_entered_through_the_model_has_the_columns(call):
    torch.manual_seed(0)
    model = adapt(Encoder(), target_modules=["linear1", "linear2"]).eval()
    encoder, x = model.base_model.model.layers, torch.randn(3, 5, 8)
    with torch.no_grad():
        want = encoder(x)
        with model.disable_adapter():
            assert not torch.allclose(encoder(x), want, atol=1e-3)
        copy.deepcopy(model) if call == "deepcopy" else model.state_dict()  # which park the columns for the moment
        assert torch.equal(encoder(x), want)
        assert torch.equal(model(x), want)
