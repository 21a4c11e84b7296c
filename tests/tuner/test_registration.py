"""Registration, each case in a process of its own: the registry is global."""

from __future__ import annotations

import textwrap

import pytest

from forked_process import run_forked

TRAIN_ONE_STEP = """
    import torch
    from torch import nn
    model = nn.Sequential(nn.Linear(6, 4))
    model = peft.get_peft_model(model, paca.PacaConfig(r=2, target_modules=["0"]))
    assert type(model.base_model) is paca.PacaModel
    model(torch.ones(1, 6)).sum().backward()
"""


def run(*scripts: str) -> str:
    script = "\n".join(textwrap.dedent(s) for s in scripts)
    result = run_forked(script)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_import_registers_on_a_peft_that_knows_no_paca():
    out = run(
        """
        import peft, pickle, copy
        from peft.utils.peft_types import PeftType
        had = "PACA" in PeftType.__members__
        import paca
        assert PeftType.PACA == "PACA" and PeftType("PACA") is PeftType.PACA is PeftType["PACA"]
        assert PeftType.PACA in list(PeftType) and "PACA" in list(PeftType)
        assert pickle.loads(pickle.dumps(PeftType.PACA)) is PeftType.PACA
        assert copy.deepcopy(PeftType.PACA) is PeftType.PACA
        assert isinstance(PeftType.PACA, PeftType) and PeftType.PACA.name == "PACA" and PeftType.PACA.value == "PACA"
        assert PeftType.LORA == "LORA"
        print(had)
        """,
        TRAIN_ONE_STEP,
    )
    assert out.strip() in ("True", "False")


@pytest.mark.parametrize("twice", [False, True])
def test_import_takes_over_a_method_that_is_registered_already(twice):
    """What PEFT >= 0.22 does at import, with dummy classes."""
    run(
        """
        import dataclasses, peft
        from peft import mapping
        from peft.config import PeftConfig
        from peft.tuners.lora import LoraModel
        from peft.utils.peft_types import PeftType, register_peft_method
        if "PACA" not in PeftType.__members__:
            member = str.__new__(PeftType, "PACA")
            member._name_ = member._value_ = "PACA"
            PeftType._member_names_.append("PACA")
            PeftType._member_map_["PACA"] = PeftType._value2member_map_["PACA"] = member
            type.__setattr__(PeftType, "PACA", member)

        @dataclasses.dataclass
        class TheirConfig(PeftConfig):
            r: int = 8
            paca_alpha: int = 8
            target_modules: object = None
            random_seed: int = 3
            something_new: str = "theirs"
            def __post_init__(self):
                super().__post_init__()
                self.peft_type = PeftType.PACA

        class TheirModel(LoraModel):
            prefix = "paca_"

        if PeftType.PACA not in mapping.PEFT_TYPE_TO_CONFIG_MAPPING:
            register_peft_method(name="paca", config_cls=TheirConfig, model_cls=TheirModel)
        import paca
        %s
        assert mapping.PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.PACA] is paca.PacaConfig
        assert mapping.PEFT_TYPE_TO_TUNER_MAPPING[PeftType.PACA] is paca.PacaModel
        assert mapping.PEFT_TYPE_TO_PREFIX_MAPPING[PeftType.PACA] == "paca_"

        import torch
        from torch import nn
        theirs = peft.get_peft_model(nn.Sequential(nn.Linear(6, 4)), TheirConfig(r=2, target_modules=["0"]))
        assert type(theirs.base_model) is paca.PacaModel
        ours = theirs.peft_config["default"]
        assert type(ours) is paca.PacaConfig and ours.r == 2 and ours.random_seed == 3 and ours.paca_alpha == 8
        """
        % ("paca.tuner.registration.register(paca.PacaConfig, paca.PacaModel)" if twice else ""),
        TRAIN_ONE_STEP,
    )
