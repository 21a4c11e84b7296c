from __future__ import annotations

import pytest
import torch

from models import llama
from paca.evaluation.log_likelihood import Continuation, likelihoods
from paca.messages.errors import PacaError


def test_a_model_whose_output_is_nan_is_refused_by_name() -> None:
    model = llama()
    with torch.no_grad():
        model.lm_head.weight.fill_(float("nan"))
    with pytest.raises(PacaError, match=r"output is NaN, in float32, so that nothing can be scored"):
        likelihoods(model, [Continuation([1, 2], [3])], batch_size=1)
