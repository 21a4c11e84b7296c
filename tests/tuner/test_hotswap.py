"""Another adapter's values in the place of a loaded one's."""

from __future__ import annotations

import json
import shutil
import threading

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import LlamaForSequenceClassification

import paca
from models import adapt, adapted_perceptron, base_state, llama, perceptron, tokens
from paca.layers import paca_layers

ADAPTER = "adapter_model.safetensors"
TARGETS = ["lin1", "lin2"]


@pytest.fixture
def folder(tmp_path):
    """An adapter of rank 3 with other columns, values and scale than `adapted_perceptron`'s."""
    return saved(tmp_path / "other", random_seed=5, paca_alpha=1.5)


def saved(folder, kind="linear", **settings):
    torch.manual_seed(99)
    adapt(perceptron(kind), target_modules=TARGETS, **settings).save_pretrained(folder)
    return folder


def loaded(folder, kind="linear"):
    return peft.PeftModel.from_pretrained(perceptron(kind), folder)


def inputs():
    return torch.randn(4, 7, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
@torch.no_grad()
def test_the_swapped_model_is_the_one_that_loads_the_folder(tmp_path, kind):
    folder = saved(tmp_path / "other", kind, random_seed=5, paca_alpha=1.5)
    model = adapted_perceptron(kind)
    originals = base_state(model)
    x = inputs()
    first = model(x)  # the first adapter's columns are in the weights
    tensors = [(layer.paca_delta["default"], layer.paca_indices["default"]) for layer in paca_layers(model)]
    old_columns = [i.tolist() for _, i in tensors]
    paca.hotswap_adapter(model, folder, "default")
    assert torch.equal(model(x), loaded(folder, kind)(x))
    assert not torch.allclose(model(x), first)
    for layer, (delta, indices) in zip(paca_layers(model), tensors, strict=True):
        assert layer.paca_delta["default"] is delta
        assert layer.paca_indices["default"] is indices
    assert [i.tolist() for _, i in tensors] != old_columns
    for name, value in base_state(model).items():
        assert torch.equal(value, originals[name]), name
    with model.disable_adapter():
        assert torch.equal(model(x), perceptron(kind)(x))


@torch.no_grad()
def test_there_and_back_gives_the_first_outputs_bitwise(tmp_path, folder):
    model = adapted_perceptron()
    model.save_pretrained(tmp_path / "first")
    x = inputs()
    first = model(x)
    for place in (folder, tmp_path / "first"):
        paca.hotswap_adapter(model, place, "default")
        got = model(x)
    assert torch.equal(got, first)


@torch.no_grad()
def test_the_swapped_adapter_is_saved_as_it_now_is(tmp_path, folder):
    model = adapted_perceptron()
    paca.hotswap_adapter(model, folder, "default")
    model.save_pretrained(tmp_path / "again")
    before, after = (json.loads((place / "adapter_config.json").read_text()) for place in (folder, tmp_path / "again"))
    assert after == before
    want = load_file(folder / ADAPTER)
    got = load_file(tmp_path / "again" / ADAPTER)
    assert want.keys() == got.keys()
    assert all(torch.equal(got[name], want[name]) for name in want)


@torch.no_grad()
def test_ranks_and_scales_of_particular_layers(tmp_path):
    pattern = {"rank_pattern": {"lin2": 5}, "target_modules": TARGETS}
    torch.manual_seed(3)
    adapt(perceptron(), paca_alpha=7, alpha_pattern={"lin1": 2}, random_seed=8, **pattern).save_pretrained(tmp_path)
    model = adapt(perceptron(), **pattern)
    paca.hotswap_adapter(model, tmp_path, "default")
    assert [layer.scaling["default"] for layer in paca_layers(model)] == [2 / 3, 7 / 5]
    assert torch.equal(model(inputs()), loaded(tmp_path)(inputs()))


@torch.no_grad()
def test_an_inactive_adapter_and_one_of_several_active_ones(folder):
    model = adapted_perceptron()
    model.load_adapter(folder, "second")
    x = inputs()
    model.base_model.set_adapter(["default", "second"])
    both = model(x)
    model.set_adapter("default")
    first = model(x)
    for layer in paca_layers(model):
        layer.paca_delta["second"].zero_()
    paca.hotswap_adapter(model, folder, "second")
    assert torch.equal(model(x), first)
    model.base_model.set_adapter(["default", "second"])
    assert torch.equal(model(x), both)
    paca.hotswap_adapter(model, folder, "default")  # the same columns twice now
    model.set_adapter("default")
    assert torch.equal(model(x), loaded(folder)(x))


def test_a_compiled_model_is_not_compiled_again(folder):
    model = adapted_perceptron()
    counter = CompileCounterWithBackend("aot_eager")
    inner = torch.compile(model.base_model.model, backend=counter)
    x = inputs()
    inner(x).sum().backward()
    paca.hotswap_adapter(model, folder, "default")
    want = loaded(folder)
    got = inner(x)
    torch.testing.assert_close(got, want(x))
    got.square().sum().backward()
    want.train()
    for p in want.parameters():
        p.requires_grad_(False)
    for layer in paca_layers(want):
        layer.paca_delta["default"].requires_grad_()
    want(x).square().sum().backward()
    for mine, theirs in zip(paca_layers(model), paca_layers(want), strict=True):
        torch.testing.assert_close(mine.paca_delta["default"].grad, theirs.paca_delta["default"].grad)
    assert counter.frame_count == 1
    compiled = torch.compile(model, backend=counter)
    with torch.no_grad():
        compiled(x)
        frames = counter.frame_count
        for place in (folder, folder):
            paca.hotswap_adapter(compiled, place, "default")
            compiled(x)
    assert counter.frame_count == frames
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()


def test_a_swap_writes_and_allocates_columns_only(folder):
    torch.manual_seed(0)
    model = adapted_perceptron()
    with torch.no_grad():
        model(inputs())
        versions = [layer.base_layer.weight._version for layer in paca_layers(model)]
        storages = [layer.base_layer.weight.data_ptr() for layer in paca_layers(model)]
        written = Sizes()
        with written:
            paca.hotswap_adapter(model, folder, "default")
    after = [layer.base_layer.weight._version for layer in paca_layers(model)]
    assert after == [version + 2 for version in versions]  # parked, and written at once
    assert [layer.base_layer.weight.data_ptr() for layer in paca_layers(model)] == storages
    assert written.largest == 4 * 13 * 3  # the bytes of a delta, less than those of any weight


class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
    """The bytes of the largest tensor that an operator makes, not counting those that only show or write another."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and not func._schema.is_mutable and func not in VIEWS:
            self.largest = max(self.largest, result.nbytes)
        return result


VIEWS = {torch.ops.aten.detach.default, torch.ops.aten.alias.default}


@torch.no_grad()
def test_other_adapters_stay_resident_in_a_swap_of_an_inactive_one(folder):
    model = adapted_perceptron()
    model.load_adapter(folder, "second")
    x = inputs()
    first = model(x)
    paca.hotswap_adapter(model, folder, "second")
    assert torch.equal(model(x), first)


def test_training_goes_on_with_the_swapped_values(folder):
    model = adapted_perceptron()
    x = inputs()
    parameters = [layer.paca_delta["default"] for layer in paca_layers(model)]
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    model(x).square().sum().backward()
    paca.hotswap_adapter(model, folder, "default")
    assert all(p.grad is None for p in parameters)  # it belonged to other columns
    loss = model(x).square().sum()
    loss.backward()
    optimizer.step()
    assert model(x).square().sum() < loss


def test_a_graph_that_is_pending_raises(folder):
    model = adapted_perceptron()
    loss = model(inputs()).sum()
    paca.hotswap_adapter(model, folder, "default")
    with pytest.raises(RuntimeError, match="modified between forward and backward"):
        loss.backward()


def test_a_pending_graph_of_another_adapter_is_not_disturbed(folder):
    model = adapted_perceptron()
    model.load_adapter(folder, "second")
    x = inputs()
    model(x).square().sum().backward()
    want = [layer.paca_delta["default"].grad.clone() for layer in paca_layers(model)]
    model.zero_grad()
    loss = model(x).square().sum()
    paca.hotswap_adapter(model, folder, "second")
    loss.backward()
    for layer, w in zip(paca_layers(model), want, strict=True):
        assert torch.equal(layer.paca_delta["default"].grad, w)


def test_an_adapter_that_was_put_in_in_inference_mode(folder):
    with torch.inference_mode():
        model = adapted_perceptron()
        x = inputs()
        model(x)
        assert paca_layers(model)[0].paca_delta["default"].is_inference()
    paca.hotswap_adapter(model, folder, "default")
    with torch.inference_mode():
        want = loaded(folder)
        assert torch.equal(model(x), want(x))
        with model.disable_adapter():
            assert torch.equal(model(x), perceptron()(x))


def test_a_pending_graph_raises_also_where_tensors_have_no_version(folder):
    with torch.inference_mode():
        model = adapted_perceptron()
    for p in model.parameters():
        assert p.is_inference()
    loss = model(inputs().requires_grad_()).sum()
    paca.hotswap_adapter(model, folder, "default")
    with pytest.raises(RuntimeError, match="modified between forward and backward"):
        loss.backward()


def test_swaps_while_other_threads_infer(folder, tmp_path):
    model = adapted_perceptron()
    model.save_pretrained(tmp_path / "first")
    x = inputs()
    stop, problems = threading.Event(), []

    def infer():
        try:
            with torch.no_grad():
                while not stop.is_set():
                    model(x)
        except Exception as error:
            problems.append(error)

    threads = [threading.Thread(target=infer) for _ in range(2)]
    for thread in threads:
        thread.start()
    for place in [tmp_path / "first", folder] * 10:
        paca.hotswap_adapter(model, place, "default")
    stop.set()
    for thread in threads:
        thread.join()
    assert not problems
    with torch.no_grad():
        assert torch.equal(model(x), loaded(folder)(x))
        with model.disable_adapter():
            assert torch.equal(model(x), perceptron()(x))


def test_modules_that_are_trained_whole_are_swapped_too(tmp_path):
    def classifier(seed):
        torch.manual_seed(0)
        model = adapt(LlamaForSequenceClassification(llama().config), modules_to_save=["score"], random_seed=seed, r=2)
        torch.manual_seed(seed)
        with torch.no_grad():
            for n, p in model.named_parameters():
                if "modules_to_save" in n or "paca_delta" in n:
                    p.normal_()
        return model.eval()

    classifier(2).save_pretrained(tmp_path)
    model = classifier(1)
    with torch.no_grad():
        paca.hotswap_adapter(model, tmp_path, "default")
        assert torch.equal(model(input_ids=tokens()).logits, classifier(2)(input_ids=tokens()).logits)


@torch.no_grad()
def test_a_model_that_was_adapted_without_a_peft_model(folder):
    config = paca.PacaConfig(r=3, paca_alpha=6, init_weights=False, target_modules=TARGETS)
    model = peft.inject_adapter_in_model(config, perceptron())
    paca.hotswap_adapter(model, folder, "default")
    assert torch.equal(model(inputs()), loaded(folder)(inputs()))


@torch.no_grad()
def test_a_swap_leaves_the_scale_of_other_adapters(folder):
    model = adapted_perceptron()
    model.load_adapter(folder, "second")
    paca.hotswap_adapter(model, folder, "default")
    assert {layer.scaling["second"] for layer in paca_layers(model)} == {0.5}
    assert {layer.scaling["default"] for layer in paca_layers(model)} == {0.5}


# -- errors ---------------------------------------------------------------------------------------------------------


def broken(folder, case, tmp_path):
    tensors = load_file(folder / ADAPTER)
    delta, indices = (f"base_model.model.lin2.{kind}" for kind in ("paca_delta", "paca_indices"))
    if case == "missing layer":
        del tensors[delta], tensors[indices]
    elif case == "unknown layer":
        tensors["base_model.model.lin3.paca_delta"] = tensors[delta].clone()
    elif case == "nan":
        tensors[delta][0, 0] = float("nan")
    elif case == "range":
        tensors[indices][-1] = 13
    elif case == "shape":
        tensors[delta] = tensors[delta][:-1].contiguous()
    save_file(tensors, folder / ADAPTER)
    if case == "cut short":
        (folder / ADAPTER).write_bytes((folder / ADAPTER).read_bytes()[:50])
    elif case == "no weights":
        (folder / ADAPTER).unlink()
    elif case == "no adapter":
        shutil.rmtree(folder)
    elif case == "rank":
        saved(folder, rank_pattern={"lin2": 4})
    elif case == "lora":
        peft.get_peft_model(perceptron(), peft.LoraConfig(target_modules=TARGETS)).save_pretrained(folder)


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("missing layer", r"has no tensor lin2.paca_delta, which adapter 'default' has.*load_adapter"),
        ("unknown layer", r"holds lin3.paca_delta, but the model has no such layer"),
        ("nan", r"lin2.paca_delta holds NaN or Inf"),
        ("range", r"lin2.paca_indices: column 13 is out of range"),
        ("shape", r"lin2.paca_delta has shape \(4, 3\)"),
        ("cut short", r"adapter_model.safetensors can't be read"),
        ("no weights", r"holds no adapter: it has no adapter_model.safetensors"),
        ("no adapter", r"holds no adapter: it has no adapter_config.json"),
        ("rank", r"lin2 has r=4 in the folder, but adapter 'default' has r=3 there.*load_adapter"),
        ("lora", r"holds a LORA adapter; a PACA adapter can be replaced by a PACA adapter only"),
    ],
)
def test_what_does_not_fit_is_refused_and_changes_nothing(folder, tmp_path, case, message):
    model = adapted_perceptron()
    x = inputs()
    before, config = model(x), model.peft_config["default"]
    broken(folder, case, tmp_path)
    with pytest.raises(ValueError, match=message):
        paca.hotswap_adapter(model, folder, "default")
    assert torch.equal(model(x), before)
    assert model.peft_config["default"] is config
    assert set(model.peft_config) == {"default"}


def test_an_unknown_or_merged_adapter_is_refused(folder):
    model = adapted_perceptron()
    with pytest.raises(ValueError, match=r"no PaCA adapter 'nobody' to replace; loaded are default"):
        paca.hotswap_adapter(model, folder, "nobody")
    model.merge_adapter()
    with pytest.raises(ValueError, match=r"'default' is merged.*unmerge_adapter"):
        paca.hotswap_adapter(model, folder, "default")


def test_a_head_that_the_folder_lacks_is_refused(tmp_path):
    adapt(llama(), target_modules=["q_proj"]).save_pretrained(tmp_path)
    model = adapt(llama(), target_modules=["q_proj"], modules_to_save=["lm_head"])
    with pytest.raises(ValueError, match=r"has no tensor lm_head\.weight"):
        paca.hotswap_adapter(model, tmp_path, "default")
