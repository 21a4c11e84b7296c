"""What a folder says that it is for, before it is loaded."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig, AutoModelForImageClassification

from paca.pretrained.loading import load_pretrained
from paca.pretrained.purpose import classifier_in, save_classifier_config

LABELS = ["cat", "dog"]
SIZES = {"channel_multiplier": 0.25, "depth_multiplier": 0.1}


def test_nothing_is_missed_of_an_image_processor_of_timm(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("timm")
    config = AutoConfig.for_model("timm_wrapper", architecture="tf_efficientnetv2_s", model_args=SIZES, num_labels=2)
    AutoModelForImageClassification.from_config(config).save_pretrained(tmp_path)
    content = {"architecture": "tf_efficientnetv2_s", "pretrained_cfg": {"input_size": [3, 32, 32]}}
    config_file = tmp_path / "config.json"
    config_file.write_text(json.dumps({**json.loads(config_file.read_text()), **content}))
    logging.getLogger("transformers").addHandler(caplog.handler)
    logging.getLogger("transformers").warning_once.cache_clear()
    try:
        model = load_pretrained(str(tmp_path), auto_class=AutoModelForImageClassification, labels=LABELS)
    finally:
        logging.getLogger("transformers").removeHandler(caplog.handler)
    assert type(model.tokenizer).__name__ == "TimmWrapperImageProcessor"
    assert not caplog.records


@pytest.mark.parametrize("named", [False, True])
def test_a_model_of_timm_has_the_labels_that_it_was_loaded_with(tmp_path: Path, named: bool) -> None:
    """Its config has a list of names, not numbers with names, and the base's own may be in it."""
    pytest.importorskip("timm")
    config = AutoConfig.for_model("timm_wrapper", architecture="tf_efficientnetv2_s", model_args=SIZES, num_labels=5)
    AutoModelForImageClassification.from_config(config).save_pretrained(tmp_path / "base")
    file = tmp_path / "base" / "config.json"
    content = json.loads(file.read_text())
    if not named:
        del content["label_names"]
        file.write_text(json.dumps(content))
    unused: Any = False
    model = load_pretrained(
        str(tmp_path / "base"), tokenizer=unused, auto_class=AutoModelForImageClassification, labels=LABELS
    ).model
    model.save_pretrained(tmp_path / "model")
    (tmp_path / "adapter").mkdir()
    save_classifier_config(tmp_path / "adapter", model)
    for part in ("model", "adapter"):
        found = classifier_in(tmp_path / part)
        assert found is not None
        assert (found.of, found.labels) == ("images", LABELS)
        assert list(AutoConfig.from_pretrained(tmp_path / part).id2label.values()) == LABELS
