"""The numbers of the papers' recipes, as they were published; `recipes/` names where."""

from __future__ import annotations

from typing import Any

import pytest
from tools.plan_recipes import recipes

CONTENT = {recipe.name.removeprefix("recipes/").removesuffix(".yaml"): recipe.content for recipe in recipes()}
MMLU = {"max_length": 512, "batch": (2, 4), "num_train_epochs": 1}
OASST1 = {"batch": (4, 4), "lr_scheduler_type": "cosine", "num_train_epochs": 1}
OF_70B = {**OASST1, "batch": (8, 2), "quantization": "nf4"}
PACA, LORA = {"r": 16, "alpha": 64, "learning_rate": 1e-4}, {"r": 8, "alpha": 32, "learning_rate": 3e-4}
PEFTS = {"max_steps": 5000, "batch": (4, 1), "max_length": 768}
PUBLISHED: dict[str, dict[str, Any]] = {
    **{f"paper/mmlu-{model}-paca": MMLU | PACA for model in ("llama2-7b", "llama2-13b", "llama3-8b")},
    **{f"paper/mmlu-{model}-lora": MMLU | LORA for model in ("llama2-7b", "llama2-13b", "llama3-8b")},
    "paper/oasst1-llama3-8b-paca": OASST1 | {"r": 64, "learning_rate": 5e-3},
    "paper/oasst1-llama3-8b-lora": OASST1 | {"r": 64, "learning_rate": 5e-4},
    "paper/oasst1-llama3.1-70b-qpaca": OF_70B | {"r": 64},
    "paper/oasst1-llama3.1-70b-qlora": OF_70B | {"r": 64},
    "paper/guanaco-llama3-8b-gaudi2-paca": {
        "r": 8,
        "alpha": 16,
        "learning_rate": 1.8e-3,
        "num_train_epochs": 2,
        "max_length": 512,
    },
    "peft/metamathqa-llama3.2-3b-paca-r80": PEFTS | {"r": 80, "target_modules": ["q_proj", "v_proj"]},
    "peft/metamathqa-llama3.2-3b-paca-r32": PEFTS | {"r": 32},
    "peft/metamathqa-llama3.2-3b-lora-r32": PEFTS | {"r": 32},
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_recipe_has_the_published_numbers(name: str) -> None:
    content = CONTENT[name]
    method, train = content.get("paca") or content["lora"], content["train"]
    found = {**train, **method, "quantization": content["model"].get("quantization")}
    found["alpha"] = method.get("paca_alpha", method.get("lora_alpha"))
    found["batch"] = (train["per_device_train_batch_size"], train.get("gradient_accumulation_steps", 1))
    expected = PUBLISHED[name]
    assert {key: found[key] for key in expected} == expected
