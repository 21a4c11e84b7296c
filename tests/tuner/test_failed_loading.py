"""Whatever fails while an adapter is loaded leaves the caller's model as it was, bit for bit (design, section 3)."""

from __future__ import annotations

import functools
import gc
import importlib
import json
import pkgutil
import tempfile
import weakref
from pathlib import Path
from unittest import mock

import pytest
import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

import paca
from expert_models import STACKS, mixtral
from models import adapt, llama, perceptron, tokens
from paca import PacaConfig
from paca.layers import PacaLayer
from paca.tuner import adapter_file
from quantized_layers import quantized_linear

ADAPTER = "adapter_model.safetensors"
HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_hooks", "_state_dict_hooks", "_load_state_dict_post_hooks")
HOW = ["from_pretrained", "trainable", "with its config", "beside another", "beside one with a saved module"]
SHARED = {"attention_bias": True, "mlp_bias": True}


@functools.cache
def saved(targets, modules):
    """The files of an adapter with embeddings, and perhaps modules, that were saved whole, but for its card."""
    settings = {"target_modules": list(targets), "modules_to_save": modules and list(modules)}
    model = adapt(llama(**SHARED), task_type="CAUSAL_LM", **settings)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder, save_embedding_layers=True)
        return {path.name: path.read_bytes() for path in Path(folder).iterdir() if path.suffix != ".md"}


def save(folder, targets=("q_proj", "down_proj"), modules=("up_proj",)):
    """Such an adapter in `folder`; gives its tensors."""
    for name, content in saved(targets, modules).items():
        (folder / name).write_bytes(content)
    return load_file(folder / ADAPTER)


def caller_has(how):
    """A model that somebody is about to load an adapter into."""
    model = llama(**SHARED)
    model.model.norm.weight.requires_grad_(False)
    if how.startswith("beside"):
        modules = ["up_proj"] if "saved" in how else None
        model = adapt(model, task_type="CAUSAL_LM", target_modules=["q_proj"], modules_to_save=modules)
    logits(model)
    return model


def load(model, folder, how):
    if how.startswith("beside"):
        model.load_adapter(folder, "other")
    else:
        config = PeftConfig.from_pretrained(folder) if how == "with its config" else None
        PeftModel.from_pretrained(model, folder, config=config, is_trainable=how == "trainable")


def logits(model):
    with torch.no_grad():
        return model(input_ids=tokens()).logits


def look_of(model):
    """All that one could find changed, by name: modules, their attributes and hooks, parameters and their bits."""
    look = {"adapters": list(getattr(model, "peft_config", ()))}
    for name, module in model.named_modules():
        look[name] = type(module), set(module.__dict__), module.training, [len(getattr(module, h)) for h in HOOKS]
    for name, parameter in model.named_parameters():
        look[f"{name}, parameter"] = id(parameter), parameter.requires_grad, parameter.data_ptr()
        look[f"{name}, bits"] = parameter.detach().contiguous().view(torch.uint8).flatten().tolist()
    return look


def check_unchanged(model, before, want):
    now, again = look_of(model), logits(model)
    assert set(now) == set(before)
    assert not [f"{name}: {value} became {now[name]}" for name, value in before.items() if now[name] != value]
    assert torch.equal(again, want)


def check_refused(folder, how, error=ValueError):
    model = caller_has(how)
    before, want = look_of(model), logits(model)
    with pytest.raises(error):
        load(model, folder, how)
    check_unchanged(model, before, want)


def made(model, folder):
    get_peft_model(model, PacaConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))


LOADED = [PeftModel.from_pretrained, functools.partial(PeftModel.from_pretrained, low_cpu_mem_usage=True)]


@pytest.mark.parametrize("adapt_it", [made, *LOADED], ids=["made", "loaded", "loaded in the place of meta tensors"])
def test_an_adapter_of_a_model_that_generates_on_one_that_does_not(tmp_path, adapt_it):
    save(tmp_path, modules=())
    model = llama(**SHARED).model  # as AutoModel loads it
    model.norm.weight.requires_grad_(False)
    before, want = look_of(model), model(tokens()).last_hidden_state
    with pytest.raises(ValueError, match="LlamaModel has no prepare_inputs_for_generation"):
        adapt_it(model, tmp_path)
    assert look_of(model) == before
    assert torch.equal(model(tokens()).last_hidden_state, want)


@pytest.mark.parametrize("how", HOW)
def test_what_is_not_broken_loads(tmp_path, how):
    save(tmp_path)
    model = caller_has(how)
    before = look_of(model)
    load(model, tmp_path, how)
    assert look_of(model) != before


PICKLED = {
    "a list": lambda t: list(t.values()),
    "integers": lambda t: dict.fromkeys(t, 3),
    "one integer among tensors": lambda t: {**t, next(iter(t)): 3},
    "names that are numbers": lambda t: dict(enumerate(t.values())),
    "nested": lambda t: {"state_dict": t},
    "nothing": lambda t: None,
    "one tensor": lambda t: next(iter(t.values())),
    "sparse": lambda t: {n: v.to_sparse() for n, v in t.items()},
    "complex": lambda t: {n: v.to(torch.complex64) for n, v in t.items()},
}


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("case", PICKLED)
def test_a_pickle_file_that_holds_something_else(tmp_path, case, how):
    tensors = save(tmp_path)
    (tmp_path / ADAPTER).unlink()
    torch.save(PICKLED[case](tensors), tmp_path / "adapter_model.bin")
    check_refused(tmp_path, how)


DAMAGED = {
    "cut early": lambda content: content[: len(content) // 5],
    "cut late": lambda content: content[:-40],
    "headers": lambda content: content.replace(b"PK\x03\x04", bytes(4)),
    "the last header": lambda content: bytes(4).join(content.rsplit(b"PK\x03\x04", 1)),
    "directory": lambda content: content.replace(b"PK\x01\x02", bytes(4)),
    "names": lambda content: content.replace(b"data.pkl", bytes(8)),
    "pickle": lambda content: content.replace(b"_rebuild_tensor_v2", bytes(18)),
}


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("damage", DAMAGED)
def test_a_damaged_pickle_file(tmp_path, damage, how):
    tensors = save(tmp_path)
    (tmp_path / ADAPTER).unlink()
    path = tmp_path / "adapter_model.bin"
    torch.save(tensors, path)
    path.write_bytes(DAMAGED[damage](path.read_bytes()))
    check_refused(tmp_path, how)


Q = "base_model.model.model.layers.1.self_attn.q_proj."
UP = "base_model.model.model.layers.1.mlp.up_proj."
TOKENS = "base_model.model.model.embed_tokens.weight"


def changed(name, change):
    return lambda t: t.update({name: change(t[name])})


FILES = {
    "extra": lambda t: t.update({"base_model.model.model.layers.9.q_proj.paca_delta": torch.zeros(2, 2)}),
    "saved module of another shape": changed(UP + "weight", lambda v: v[:-1].clone()),
    "saved module with nan": changed(UP + "weight", lambda v: v * float("nan")),
    "saved module of another dimension": changed(UP + "weight", lambda v: v.flatten().clone()),
    "no saved module": lambda t: [t.pop(n) for n in list(t) if "up_proj" in n],
    "embeddings of another shape": changed(TOKENS, lambda v: v[:-1].clone()),
    "embeddings of another dimension": changed(TOKENS, lambda v: v.flatten().clone()),
    "embeddings with nan": changed(TOKENS, lambda v: v * float("nan")),
    "no delta": lambda t: t.pop(Q + "paca_delta"),
    "no indices": lambda t: t.pop(Q + "paca_indices"),
    "a delta with nan": changed(Q + "paca_delta", lambda v: v * float("nan")),
    "a delta of another shape": changed(Q + "paca_delta", lambda v: v[:-1].clone()),
    "nothing": lambda t: t.clear(),
}


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("case", FILES)
def test_a_file_that_does_not_fit(tmp_path, case, how):
    tensors = save(tmp_path)
    FILES[case](tensors)
    save_file(tensors, tmp_path / ADAPTER)
    check_refused(tmp_path, how)


def again(model, **settings):
    return get_peft_model(model, PacaConfig(**{"r": 4, "target_modules": ["q_proj"], **settings}))


SAME_NAME = {
    "a file that does not fit": lambda model, folder: PeftModel.from_pretrained(model, folder),
    "too many columns": lambda model, folder: again(model, r=99_999),
    "more columns, then too many": lambda model, folder: again(model, r=6, rank_pattern={"1.self_attn.q_proj": 99_999}),
    "no such module": lambda model, folder: again(model, target_modules=["nope"]),
    "other layers, and too many": lambda model, folder: again(model, target_modules=["q_proj", "k_proj"], r=70),
    "a saved module that is adapted": lambda model, folder: again(model, modules_to_save=["down_proj"]),
}


@pytest.mark.parametrize("onto", ["the model", "the PeftModel", "the PeftModel, disabled"])
@pytest.mark.parametrize("case", SAME_NAME)
def test_an_adapter_is_there_under_the_same_name(tmp_path, case, onto):
    tensors = save(tmp_path)
    FILES["a delta of another shape"](tensors)
    save_file(tensors, tmp_path / ADAPTER)
    base = llama(**SHARED)
    adapted = adapt(base, task_type="CAUSAL_LM", target_modules=["q_proj", "down_proj"], modules_to_save=["up_proj"])
    adapted.add_adapter("other", PacaConfig(r=4, target_modules=["down_proj", "o_proj"], init_weights=False))
    if onto.endswith("disabled"):
        adapted.base_model.disable_adapter_layers()
    before, want, config = look_of(adapted), logits(adapted), adapted.peft_config["default"]
    with pytest.raises(
        ValueError, match=r"columns were asked|adapter already|no module named|has no tensor|has shape|trained"
    ):
        SAME_NAME[case](base if onto == "the model" else adapted, tmp_path)
    check_unchanged(adapted, before, want)
    assert adapted.peft_config["default"] is config
    if not onto.endswith("disabled"):
        adapted(input_ids=tokens()).logits.square().mean().backward()
        torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=0.1).step()
        assert not torch.equal(logits(adapted), want)


def test_a_lora_adapter_is_there_under_the_same_name():
    model = get_peft_model(llama(**SHARED), LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    before, want = look_of(model), logits(model)
    with pytest.raises(ValueError, match="already adapted by another method"):
        again(model)
    check_unchanged(model, before, want)


def test_what_is_replaced_is_not_kept():
    model = adapt(llama(**SHARED), target_modules=["q_proj"])
    gone = weakref.ref(next(p for name, p in model.named_parameters() if "paca_delta" in name))
    again(model.base_model.model)
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize("how", HOW)
def test_a_saved_module_that_lacks_a_tensor(tmp_path, how):
    tensors = save(tmp_path)
    del tensors[UP + "bias"]
    save_file(tensors, tmp_path / ADAPTER)
    check_refused(tmp_path, how)


CONFIGS = {
    "r is text": {"r": "3"},
    "r is a fraction": {"r": 3.0},
    "alpha is text": {"paca_alpha": "6"},
    "alpha has 400 digits": {"paca_alpha": 10**400},
    "an alpha is beyond float32": {"alpha_pattern": {"q_proj": 1e300}},
    "targets are numbers": {"target_modules": [1, 2]},
    "targets are a number": {"target_modules": 5},
    "targets are a mapping": {"target_modules": {"q_proj": 3}},
    "targets are no expression": {"target_modules": "(q_proj"},
    "exclusions are a number": {"exclude_modules": 5},
    "exclusions are numbers": {"exclude_modules": [5]},
    "saved modules are a number": {"modules_to_save": 5},
    "saved modules are numbers": {"modules_to_save": [5]},
    "saved modules are one text": {"modules_to_save": "up_proj"},
    "saved modules are adapted": {"modules_to_save": ["up_proj", "q_proj"]},
    "saved modules hold what is adapted": {"modules_to_save": ["up_proj", "self_attn"]},
    "saved modules hold what is adapted, by an ending": {"modules_to_save": ["up_proj", "attn"]},
    "blocks are text": {"layers_to_transform": "all"},
    "blocks are texts": {"layers_to_transform": ["0", "1"]},
    "blocks are too many": {"layers_to_transform": [0, 1] * 3_000},
    "pattern is a number": {"layers_to_transform": [0, 1], "layers_pattern": 5},
    "patterns are numbers": {"layers_to_transform": [0, 1], "layers_pattern": [5]},
    "stacks are one text": {"target_parameters": "experts.down_proj"},
    "a rank is text": {"rank_pattern": {"q_proj": "3"}},
    "ranks are a list": {"rank_pattern": [3]},
    "indices are a list": {"indices": [3]},
    "seed is text": {"random_seed": "0"},
    "selection is unknown": {"selection": "best"},
    "task is unknown": {"task_type": "CHAT"},
    "original weights are a number": {"original_weights": 5},
    "init is text": {"init_weights": "no"},
    "quantization is a number": {"base_quantization": 5},
}


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("case", CONFIGS)
def test_a_config_of_wrong_types(tmp_path, case, how):
    save(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **CONFIGS[case]}))
    check_refused(tmp_path, how)


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("text", ["", "[]", '"PACA"', "{}"])
def test_a_config_that_is_none(tmp_path, text, how):
    save(tmp_path)
    (tmp_path / "adapter_config.json").write_text(text)
    check_refused(tmp_path, how, Exception)


INTERRUPTED = {
    "choose_columns": ("paca.tuner.model", 3),
    "update_layer": ("paca.layers.base.PacaLayer", 0),
    "update_layer, later": ("paca.layers.base.PacaLayer", 3),
    "set_adapter": ("paca.layers.base.PacaLayer", 1),
    "paca_layers": ("paca.tuner.model", 0),
    "check_saved_modules": ("paca.tuner.model", 0),
    "check_adapter_tensors": ("paca.tuner.model", 0),
    "check_finite": ("paca.tuner.adapter_checks", 2),
    "_is_rotated": ("paca.tuner.model", 0),
    "install": ("paca.tuner.entry", 0),
}


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("where", INTERRUPTED)
def test_an_interrupt(tmp_path, monkeypatch, where, how):
    save(tmp_path)
    model = caller_has(how)
    before, want = look_of(model), logits(model)
    place, calls_before = INTERRUPTED[where]
    owner, name, calls = pkgutil.resolve_name(place), where.partition(",")[0], []
    real = getattr(owner, name)

    def interrupt(*args, **kwargs):
        calls.append(name)
        if len(calls) == calls_before + 1:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(owner, name, interrupt)
    with pytest.raises(KeyboardInterrupt):
        load(model, tmp_path, how)
    monkeypatch.undo()
    check_unchanged(model, before, want)


def quantized_network(kind):
    model = perceptron()
    model.lin2 = quantized_linear(kind, model.lin2)
    return model


KINDS = {
    "linear": (perceptron, {"target_modules": ["lin1", "lin2"]}),
    "Conv1D": (lambda: perceptron("conv1d"), {"target_modules": ["lin1", "lin2"]}),
    "quantized": (lambda: quantized_network("nf4"), {"target_modules": ["lin1", "lin2"]}),
    "embeddings": (llama, {"target_modules": ["embed_tokens", "q_proj", "lm_head"]}),
    "experts": (mixtral, {"target_modules": ["q_proj"], "target_parameters": STACKS}),
}


@pytest.mark.parametrize("after", [0, 1])
@pytest.mark.parametrize("where", ["update_layer", "set_adapter", "write"])
@pytest.mark.parametrize("beside", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_an_interrupt_while_an_adapter_is_put_in(monkeypatch, kind, beside, where, after):
    build, settings = KINDS[kind]
    model = build()
    next(model.parameters()).requires_grad_(False)
    if beside:
        model = adapt(model, **settings)
    before, real, calls = look_of(model), getattr(PacaLayer, where), []

    def interrupt(layer, *args, **kwargs):
        calls.append(where)
        if len(calls) == after + 1:
            raise KeyboardInterrupt
        return real(layer, *args, **kwargs)

    def put_in():
        if beside:
            model.add_adapter("other", PacaConfig(r=2, **settings))
        else:
            adapt(model, **settings)

    monkeypatch.setattr(PacaLayer, where, interrupt)
    with pytest.raises(KeyboardInterrupt):
        put_in()
    monkeypatch.undo()
    paca.refresh(model)
    now = look_of(model)
    assert not [f"{name}: {value} became {now.get(name)}" for name, value in before.items() if now.get(name) != value]
    assert list(now) == list(before)


def test_columns_of_layers_that_the_adapter_has_not_are_there_at_once(tmp_path):
    """Loading parks all layers; those of the other adapter alone would stay so until the next pass."""
    tensors = save(tmp_path, ("q_proj",), None)
    tensors[next(name for name in tensors if name.endswith("paca_delta"))].fill_(float("nan"))
    save_file(tensors, tmp_path / ADAPTER)
    model = adapt(llama(**SHARED), task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"])
    model(input_ids=tokens()).logits.sum().backward()
    before = look_of(model)
    with pytest.raises(ValueError, match="NaN"):
        model.load_adapter(tmp_path, "second")
    assert {name for name, value in look_of(model).items() if value != before[name]} == set()


def test_a_config_made_by_hand_is_one_that_is_read_with(tmp_path):
    adapt(perceptron(), r=4, target_modules=["lin1"]).save_pretrained(tmp_path)
    model = perceptron()
    with pytest.raises(ValueError, match="has shape"):
        PeftModel.from_pretrained(model, tmp_path, config=PacaConfig(r=5, target_modules=["lin1"]))
    assert not [module for module in model.modules() if isinstance(module, PacaLayer)]
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not hasattr(model, "peft_config")
    config = PacaConfig(r=4, target_modules=["lin1"])
    for _ in range(2):  # and the same one again
        PeftModel.from_pretrained(perceptron(), tmp_path, config=config)
    get_peft_model(perceptron(), config)  # which reads nothing


def test_a_config_is_as_before_when_loading_with_it_failed(tmp_path):
    wrong, right = tmp_path / "wrong", tmp_path / "right"
    adapt(perceptron(), r=4, target_modules=["lin1"]).save_pretrained(wrong)
    adapt(perceptron(), r=5, target_modules=["lin1"]).save_pretrained(right)
    config = PacaConfig(r=5, target_modules=["lin1"], selection="weight_norm")
    with pytest.raises(ValueError, match="has shape"):
        PeftModel.from_pretrained(perceptron(), wrong, config=config)
    fresh = get_peft_model(perceptron(), config)
    chosen = adapt(perceptron(), r=5, target_modules=["lin1"], selection="weight_norm")
    indices = [next(m for m in model.modules() if isinstance(m, PacaLayer)).paca_indices for model in (fresh, chosen)]
    assert torch.equal(indices[0]["default"], indices[1]["default"])  # not random ones, which a file would replace
    PeftModel.from_pretrained(perceptron(), right, config=config)

    read = PacaConfig.from_pretrained(wrong)
    with pytest.raises(ValueError, match="has shape"):
        PeftModel.from_pretrained(perceptron(), right, config=read)
    (right / ADAPTER).write_bytes(b"broken")
    with pytest.raises(ValueError, match=f"{right.name}.*can't be read"):  # what is read, not what the config came from
        PeftModel.from_pretrained(perceptron(), right, config=read)


@pytest.mark.parametrize("wrap", [staticmethod, functools.partial, lambda method: mock.MagicMock(wraps=method)])
def test_a_loader_that_somebody_wrapped_is_only_not_found(tmp_path, monkeypatch, wrap):
    adapt(perceptron(), r=4, target_modules=["lin1"]).save_pretrained(tmp_path)
    plain = PeftModel.from_pretrained
    monkeypatch.setattr(PeftModel, "from_pretrained", wrap(plain))
    importlib.reload(adapter_file)  # as if paca were imported then
    try:
        PeftModel.from_pretrained(perceptron(), tmp_path)
    finally:
        monkeypatch.undo()
        importlib.reload(adapter_file)
