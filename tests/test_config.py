from __future__ import annotations

import json

import peft
import pytest

import paca
from models import adapted_perceptron


def test_the_fields_are_those_of_pefts_own_paca_and_ours():
    config = paca.PacaConfig()
    assert config.peft_type == "PACA"
    for name in [
        "r",
        "paca_alpha",
        "target_modules",
        "exclude_modules",
        "layers_to_transform",
        "layers_pattern",
        "random_seed",
        "init_weights",
        "modules_to_save",
        "rank_pattern",
        "alpha_pattern",
    ]:
        assert hasattr(config, name)


def test_a_config_survives_a_round_trip(tmp_path):
    config = paca.PacaConfig(
        r=4,
        paca_alpha=8,
        target_modules=["v_proj", "q_proj"],
        rank_pattern={"q_proj": 2},
        alpha_pattern={"v_proj": 1.5},
        indices={"q_proj": [3, 1]},
        random_seed=5,
        task_type="CAUSAL_LM",
    )
    config.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "adapter_config.json").read_text())
    assert stored["peft_type"] == "PACA"
    assert stored["target_modules"] == ["q_proj", "v_proj"]
    assert not {"loading", "trainable_before"} & set(stored)
    for cls in (paca.PacaConfig, peft.PeftConfig):
        assert cls.from_pretrained(tmp_path) == config


@pytest.mark.parametrize(
    ("name", "hint"),
    [("lora_alpha", "'paca_alpha'"), ("alpha", "'paca_alpha'"), ("rank", "'r'"), ("target_module", "'target_modules'")],
)
def test_a_setting_under_another_name_is_refused_with_ours(name, hint):
    with pytest.raises(TypeError, match=f"unexpected keyword argument, '{name}'. Did you mean {hint}\\?$"):
        paca.PacaConfig(**{name: 8})


def test_all_settings_of_lora_are_told_at_once_each_with_what_to_do():
    lora = {"lora_alpha": 16, "lora_dropout": 0.05, "bias": "none", "use_rslora": True, "use_dora": False, "hwat": 1}
    with pytest.raises(TypeError, match="got an unexpected keyword argument, 'lora_alpha', and 5 more") as caught:
        paca.PacaConfig(r=8, task_type="CAUSAL_LM", modules_to_save=["score"], **lora)
    lines = str(caught.value).splitlines()[1:]
    for (name, _), line in zip(lora.items(), lines, strict=False):
        assert line.startswith(f"  '{name}': ")
    assert lines[0].endswith("Did you mean 'paca_alpha'?")
    assert "no dropout. Leave it out." in lines[1]
    assert "biases stay frozen, as with bias='none'. Leave it out" in lines[2]
    assert "set paca_alpha instead" in lines[3]
    assert lines[4].endswith("it is LoRA's alone. Leave it out.")
    assert lines[5].endswith("there is no such setting.")
    with pytest.raises(TypeError, match=r"argument, 'lora_dropout': PaCA has no dropout\. Leave it out\.$"):
        paca.PacaConfig(lora_dropout=0.1)
    with pytest.raises(TypeError, match=r"argument, 'hwat'\.$"):
        paca.PacaConfig(hwat=1)


def test_many_unknown_settings_are_not_all_listed():
    with pytest.raises(TypeError, match="and 999 more") as caught:
        paca.PacaConfig(**{f"{number:04}{'x' * 500}": 1 for number in range(1000)})
    assert len(str(caught.value)) < 8_000


def test_every_setting_of_lora_has_a_hint():
    others = peft.LoraConfig.__dataclass_fields__.keys() - paca.PacaConfig.__dataclass_fields__.keys() - {"lora_alpha"}
    for name in others - {"_custom_modules"}:
        with pytest.raises(TypeError, match=f"argument, '{name}': .*Leave (it|this) out"):
            paca.PacaConfig(**{name: None})


def test_a_config_written_by_a_newer_peft_loads_with_a_warning(tmp_path):
    paca.PacaConfig(target_modules=["q"]).save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "from_the_future": 1}))
    with pytest.warns(UserWarning, match="from_the_future"):
        assert peft.PeftConfig.from_pretrained(tmp_path).target_modules == {"q"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"r": 0}, r"^r must be a whole number"),
        ({"r": 2.5}, r"^r must be a whole number"),
        ({"r": True}, r"^r must be a whole number"),
        ({"rank_pattern": {"q": -1}}, r"^rank_pattern\['q'\] must be"),
        ({"paca_alpha": 0}, r"^paca_alpha must be a positive number"),
        ({"paca_alpha": float("nan")}, r"^paca_alpha must be"),
        ({"alpha_pattern": {"q": "x"}}, r"^alpha_pattern\['q'\] must be"),
        ({"selection": "best"}, r"selection='best' is unknown; choose one of random"),
        ({"target_modules": "q.*", "layers_to_transform": [0]}, "target_modules given as one string"),
        ({"layers_pattern": "layers"}, "layers_to_transform counts, but that is not set"),
        ({"indices": [1, 2]}, "indices must map"),
        ({"indices": {}}, "indices must map"),
        ({"indices": {"q": None}}, r"^indices\['q'\] must be a list of column numbers"),
        ({"indices": {"q": "12"}}, r"^indices\['q'\] must be a list of column numbers"),
        ({"indices": {"(": [1]}}, r"^indices has the key '\('"),
        ({"rank_pattern": {"(": 1}}, r"^rank_pattern has the key '\('"),
        ({"random_seed": "first"}, "^random_seed must be a whole number"),
        ({"task_type": "NONSENSE"}, "Invalid task type"),
    ],
)
def test_settings_that_can_not_work_are_refused_by_name(settings, message):
    with pytest.raises(ValueError, match=message):
        paca.PacaConfig(**settings)


@pytest.mark.parametrize("name", ["rank_pattern", "alpha_pattern"])
def test_a_pattern_that_maps_nothing_is_refused(name):
    with pytest.raises(ValueError, match=f"{name} must map names of modules to numbers"):
        paca.PacaConfig(**{name: "q_proj"})


def test_the_card_of_a_saved_adapter_says_once_how_it_is_loaded(tmp_path):
    """PEFT's own card does not: who gets the folder meets `KeyError: 'PACA'`."""
    model = adapted_perceptron()
    for _ in range(2):
        model.save_pretrained(tmp_path)
        assert (tmp_path / "README.md").read_text().count("import paca  #") == 1
    assert "--to peft" in (tmp_path / "README.md").read_text()


def test_a_readme_of_others_stays(tmp_path):
    (tmp_path / "README.md").write_text("# My project\n")
    paca.PacaConfig().save_pretrained(str(tmp_path))
    assert (tmp_path / "README.md").read_text() == "# My project\n"
