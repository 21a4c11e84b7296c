"""Defects that the code once had, each as the user met it. (What fails while loading: tuner/test_failed_loading.py.)"""

from __future__ import annotations

import contextlib
import copy
import threading
import traceback
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import paca
from expert_models import STACKS, mixtral
from forked_process import run_forked
from models import adapt, adapted_perceptron, llama, perceptron, tokens
from paca.layers import paca_layers
from quantized_layers import quantized_linear

X = torch.randn(4, 7, generator=torch.Generator().manual_seed(3))


def deltas_of(model, name="default"):
    return [layer.paca_delta[name] for layer in paca_layers(model)]


def two_adapters(build=adapted_perceptron):
    model = build()
    first = model.peft_config["default"]
    like = {"target_modules": first.target_modules, "r": first.r, "selection": first.selection}
    model.add_adapter("other", paca.PacaConfig(**like, paca_alpha=2, init_weights=False, random_seed=9))
    model.set_adapter("default")
    return model


def output_of(model):
    with torch.no_grad():
        return model(X)


def naive_output(base, deltas, layers):
    """What `base`, a stock model, gives for `X` once it is `W0 + scale * delta`."""
    base = copy.deepcopy(base)
    with torch.no_grad():
        for stock, delta, layer in zip((base.lin1, base.lin2), deltas, layers, strict=True):
            stock.weight[:, layer.paca_indices["default"]] += layer.scaling["default"] * delta
        return base(X)


# -- threads -----------------------------------------------------------------------------------------------------------

INFER_WHILE_TRAINING = """
import threading
import peft, torch
from torch import nn
import paca

torch.manual_seed(0)
model = nn.Sequential(*(nn.Linear(32, 32) for _ in range(8)))
model = peft.get_peft_model(model, paca.PacaConfig(r=4, init_weights=False, target_modules=[str(n) for n in range(8)]))
x = torch.randn(4, 32)
deltas = [p for p in model.parameters() if p.requires_grad]
optimizer = torch.optim.AdamW(deltas, lr=1e-3)
model(x).sum().backward()
optimizer.step()
optimizer.zero_grad()
with torch.no_grad():
    want = model(x)
done, trouble = threading.Event(), []

def infer():
    try:
        while not done.is_set():
            with torch.no_grad():
                if not torch.equal(model(x), want):
                    trouble.append("another output")
                    return
    except BaseException as error:
        trouble.append(repr(error))

threads = [threading.Thread(target=infer) for _ in range(4)]
for thread in threads:
    thread.start()
for _ in range(200):
    model(x).sum().backward()
    for delta in deltas:
        delta.grad = None
done.set()
for thread in threads:
    thread.join()
print(trouble)
"""


def test_inference_in_threads_while_another_runs_backward_does_not_crash():
    ended = run_forked(INFER_WHILE_TRAINING)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout == "[]\n"


def test_a_state_dict_that_is_taken_while_others_infer_leaves_outputs_right():
    """Outputs meanwhile may be the pretrained model's (docs/method.md); nothing crashes, and it is over afterwards."""
    model, base = adapted_perceptron(), perceptron()
    want, originals = output_of(model), {n: p.clone() for n, p in base.state_dict().items()}
    done, trouble = threading.Event(), []

    def infer():
        try:
            while not done.is_set():
                output_of(model)
        except BaseException as error:
            trouble.append(error)

    threads = [threading.Thread(target=infer) for _ in range(3)]
    for thread in threads:
        thread.start()
    for _ in range(50):
        taken = model.state_dict()
    done.set()
    for thread in threads:
        thread.join()
    assert trouble == []
    assert torch.equal(output_of(model), want)
    del taken
    last = model.state_dict()
    for name, value in originals.items():
        module, _, kind = name.partition(".")
        assert torch.equal(last[f"base_model.model.{module}.base_layer.{kind}"], value)
    with model.disable_adapter():
        assert torch.equal(output_of(model), base(X))


# -- two pending losses ------------------------------------------------------------------------------------------------


def fused_step(model):
    torch.optim.AdamW(deltas_of(model), lr=0.1, fused=True).step()


def data_write(model):
    for delta in deltas_of(model):
        delta.data.mul_(1.5)
    paca.refresh(model)


def switched(model):
    model.set_adapter("other")
    model.set_adapter("default")


def disabled(model):
    with model.disable_adapter():
        output_of(model)


def switched_and_used(model):
    model.set_adapter("other")
    output_of(model)
    model.set_adapter("default")


PARKS = {
    "nothing": lambda model: None,
    "state dict": lambda model: model.state_dict(),
    "disabled": disabled,
    "switched": switched,
    "switched and used": switched_and_used,
    "copied": copy.deepcopy,
    "state dict, then disabled": lambda model: (model.state_dict(), disabled(model)),
}
FORWARDS = {
    "no forward": lambda model: None,
    "forward": lambda model: model(X),
    "forward without gradients": output_of,
}


def quantized_network():
    model = perceptron()
    model.lin2 = quantized_linear("nf4", model.lin2)
    return adapt(model, target_modules=["lin1", "lin2"])


NETWORKS = {
    "linear": adapted_perceptron,
    "Conv1D": lambda: adapted_perceptron("conv1d"),
    "quantized": quantized_network,
}


@pytest.mark.parametrize("forward", FORWARDS)
@pytest.mark.parametrize("park", PARKS)
@pytest.mark.parametrize("change", [fused_step, data_write])
@pytest.mark.parametrize("network", NETWORKS)
def test_a_loss_that_is_pending_while_the_deltas_change_can_not_be_sent_back(network, change, park, forward):
    model = two_adapters(NETWORKS[network])
    first, second = model(X).sum(), model(X + 1).square().sum()
    first.backward()
    change(model)
    PARKS[park](model)
    FORWARDS[forward](model)
    with pytest.raises(RuntimeError, match="between forward and backward"):
        second.backward()


@pytest.mark.parametrize("park", PARKS)
@pytest.mark.parametrize("network", NETWORKS)
def test_a_loss_that_is_pending_while_weights_are_parked_is_right(network, park):
    model, other = two_adapters(NETWORKS[network]), two_adapters(NETWORKS[network])
    for one, between in ((model, PARKS[park]), (other, PARKS["nothing"])):
        first, second = one(X).sum(), one(X + 1).square().sum()
        first.backward()
        between(one)
        second.backward()
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(deltas_of(model), deltas_of(other), strict=True))


def run_with_others(model):
    others = {name: p.detach() * 1.5 for name, p in model.named_parameters() if "paca_delta.default" in name}
    with torch.no_grad():
        torch.func.functional_call(model, others, X)


AWAY = {"switched": lambda model: model.set_adapter("other"), "run with other deltas": run_with_others}


@pytest.mark.parametrize("back", [False, True])
@pytest.mark.parametrize("away", AWAY)
@pytest.mark.parametrize("network", NETWORKS)
def test_deltas_that_are_written_while_others_are_in_the_weight_end_a_pending_loss_with_refresh(network, away, back):
    model = two_adapters(NETWORKS[network])
    pending = model(X).square().sum()
    AWAY[away](model)
    for delta in deltas_of(model):
        delta.data.mul_(1.5)
    paca.refresh(model)
    if back:
        model.set_adapter("default")
    with pytest.raises(RuntimeError, match="between forward and backward"):
        pending.backward()


# -- writes by others --------------------------------------------------------------------------------------------------


def train(model, steps=1):
    optimizer = torch.optim.AdamW(deltas_of(model), lr=0.1)
    for _ in range(steps):
        model(X).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()


AVERAGES = {"equal": {}, "exponential": {"multi_avg_fn": get_ema_multi_avg_fn(0.5)}}


@pytest.mark.parametrize("parked", [False, True])
@pytest.mark.parametrize("updates", [1, 3])
@pytest.mark.parametrize("trained_before", [False, True])
@pytest.mark.parametrize("kind", AVERAGES)
def test_an_averaged_model_is_right_or_raises(kind, trained_before, updates, parked):
    model = adapted_perceptron()
    if trained_before:
        train(model)
    average = AveragedModel(model, **AVERAGES[kind])
    seen = []
    for _ in range(updates):
        train(model)
        if parked:
            model.state_dict()
        average.update_parameters(model)
        seen.append([d.detach().clone() for d in deltas_of(model)])
    mean = seen[0]
    for number, deltas in enumerate(seen[1:], 2):
        share = 0.5 if kind == "exponential" else 1 / number
        mean = [m + share * (d - m) for m, d in zip(mean, deltas, strict=True)]
    want = naive_output(perceptron(), mean, paca_layers(model))
    try:
        got = output_of(average)
    except RuntimeError:
        with pytest.raises(RuntimeError, match="AveragedModel"):  # and goes on raising
            output_of(average)
    else:
        torch.testing.assert_close(got, want)
    torch.testing.assert_close(output_of(model), naive_output(perceptron(), deltas_of(model), paca_layers(model)))


def mixed_batch_and_back(model):
    model.eval()
    model(X, adapter_names=["default", "__base__", "__base__", "default"])


def backward_of_the_base(model):
    """Leaves the weights without columns, though the adapter is active."""
    with model.disable_adapter():
        base = model(X.clone().requires_grad_())
    model(X).sum().backward()
    base.sum().backward()


FOR_ONE_PASS = {"mixed batch": mixed_batch_and_back, "backward of the base": backward_of_the_base}
WRITES = {
    "scaled": lambda w: w.mul_(2),
    "copied over": lambda w: w.copy_(torch.full_like(w, 0.25)),
    "one value": lambda w: w.select(1, 0).add_(1),
    "averaged": lambda w: torch._foreach_lerp_([w], [torch.ones_like(w)], 0.5),
}
USES = {
    "inference": output_of,
    "training": lambda model: model(X),
    "a state dict": lambda model: model.state_dict(),
    "disabling": lambda model: model.base_model.disable_adapter_layers(),
    "a step": train,
}


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("park", ["nothing", "state dict", "copied", *FOR_ONE_PASS])
@pytest.mark.parametrize("write", WRITES)
def test_a_write_into_the_base_weight_of_an_active_adapter_raises_at_the_next_use(write, park, use):
    model = adapt(perceptron(), target_modules=["lin1"], indices={"lin1": [0, 2, 5]})
    (PARKS | FOR_ONE_PASS)[park](model)
    with torch.no_grad():
        WRITES[write](paca_layers(model)[0].base_layer.weight)
    with pytest.raises(RuntimeError, match="written or replaced while the adapter was active"):
        USES[use](model)


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("park", ["state dict", "copied"])
@pytest.mark.parametrize("write", WRITES)
def test_a_write_into_a_parked_base_weight_that_no_version_counter_shows_raises_too(write, park, use):
    """As an average written by hand does it, with parameters' `.data`."""
    model = adapt(perceptron(), target_modules=["lin1"], indices={"lin1": [0, 2, 5]})
    PARKS[park](model)
    WRITES[write](paca_layers(model)[0].base_layer.weight.data)
    with pytest.raises(RuntimeError, match="written or replaced while the adapter was active"):
        USES[use](model)


@pytest.mark.parametrize("write", WRITES)
def test_a_write_into_the_base_weight_of_a_disabled_adapter_is_its_owners(write):
    model, base = adapted_perceptron(), perceptron()
    with model.disable_adapter(), torch.no_grad():
        WRITES[write](paca_layers(model)[0].base_layer.weight)
        WRITES[write](base.lin1.weight)
    torch.testing.assert_close(output_of(model), naive_output(base, deltas_of(model), paca_layers(model)))
    with model.disable_adapter():
        assert torch.equal(output_of(model), base(X))


# -- checkpointing -----------------------------------------------------------------------------------------------------


class Blocks(nn.Module):
    """Three linear layers, which repeat their forward pass in the backward pass, or don't."""

    def __init__(self, **how):
        super().__init__()
        torch.manual_seed(0)
        self.lin1, self.lin2, self.lin3 = nn.Linear(7, 7), nn.Linear(7, 7), nn.Linear(7, 7)
        self.how = how

    def forward(self, x):
        for layer in (self.lin1, self.lin2, self.lin3):
            x = checkpoint(lambda y, a=layer: torch.tanh(a(y)), x, **self.how) if self.how else torch.tanh(layer(x))
        return x


def blocks(**how):
    return two_adapters(lambda: adapt(Blocks(**how), target_modules=["lin1", "lin2", "lin3"]))


CHECKPOINTS = {"re-entrant": {"use_reentrant": True}, "not re-entrant": {"use_reentrant": False}}


def input_that_requires_grad():
    return X.clone().requires_grad_()


@pytest.mark.parametrize("another", ["default", "other", "none"])
@pytest.mark.parametrize("how", CHECKPOINTS)
def test_two_adapters_that_are_checkpointed_each_get_their_own_gradients(how, another):
    gradients = []
    for model in (blocks(**CHECKPOINTS[how]), blocks()):
        model.set_adapter("default")
        first = model(input_that_requires_grad()).sum()
        model.set_adapter("other")
        second = model(input_that_requires_grad()).square().sum()
        second.backward()
        if another != "none":
            model.set_adapter(another)
            model(input_that_requires_grad())
        model.set_adapter("default")
        first.backward()
        gradients.append([d.grad for name in ("default", "other") for d in deltas_of(model, name)])
    for checkpointed, plain in zip(*gradients, strict=True):
        assert torch.equal(checkpointed, plain)


@pytest.mark.parametrize("between", ["nothing", "inference", "state dict"])
@pytest.mark.parametrize("how", CHECKPOINTS)
def test_a_pass_that_is_repeated_under_another_adapter_raises(how, between):
    model = blocks(**CHECKPOINTS[how])
    loss = model(input_that_requires_grad()).sum()
    model.set_adapter("other")
    if between == "inference":
        output_of(model)
    elif between == "state dict":
        model.state_dict()
    with pytest.raises(RuntimeError, match="checkpointing repeats a forward pass"):
        loss.backward()


def scale_deltas(model):
    with torch.no_grad():
        for delta in deltas_of(model):
            delta.mul_(1.2)


@pytest.mark.parametrize("first", ["write", "park"])
@pytest.mark.parametrize("park", ["nothing", "state dict", "copied", "switched", "run with other deltas"])
@pytest.mark.parametrize("how", CHECKPOINTS)
def test_a_pass_that_is_repeated_with_written_deltas_raises_whatever_is_parked(how, park, first):
    model = blocks(**CHECKPOINTS[how])
    loss = model(input_that_requires_grad()).sum()
    for change in (scale_deltas, {**PARKS, **AWAY}[park])[:: 1 if first == "write" else -1]:
        change(model)
    if park == "switched":  # nowhere else: a call would look for what changed
        model.set_adapter("default")
    with pytest.raises(RuntimeError, match=r"checkpointing repeats|between forward and backward"):
        loss.backward()


# -- nothing waits for the device --------------------------------------------------------------------------------------

WAITING = {"_local_scalar_dense", "equal", "is_nonzero", "nonzero", "item", "unique", "_unique2", "masked_select"}


def called_by_paca():
    frames = traceback.walk_stack(None)
    return any(frame.f_code.co_filename.startswith(str(Path(paca.__file__).parent)) for frame, _ in frames)


class Waits(TorchDispatchMode):
    """The operators of ours that wait for an accelerator, while it is active; tags are always on the CPU."""

    def __init__(self, model):
        super().__init__()
        self.model, self.names = model, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in WAITING and not self._is_tag(args[0]) and called_by_paca():
            self.names.append(name)
        return func(*args, **(kwargs or {}))

    def _is_tag(self, tensor):
        tags = [layer.base_layer.columns.state.tag for layer in paca_layers(self.model)]
        return any(tensor.data_ptr() == tag.data_ptr() for tag in tags)


class Convolutions(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.convolution, self.linear = nn.Embedding(64, 8), nn.Conv1d(8, 6, 3), nn.Linear(6, 5)

    def forward(self, input_ids):
        return self.linear(self.convolution(self.embedding(input_ids).mT).mT)


def language_model(**settings):
    return adapt(llama(), target_modules=["q_proj", "down_proj"], **settings)


def checkpointed_language_model():
    model = language_model()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    return model.train()


def both_active():
    model = two_adapters(language_model)
    model.base_model.set_adapter(["default", "other"])
    return model


def two_on_convolutions():
    model = two_adapters(STEPPING["convolution and embedding"])
    model.base_model.set_adapter(["default", "other"])
    return model


STEPPING = {
    "linear": language_model,
    "in blocks": lambda: language_model(selection="random_blocks", r=8),
    "convolution and embedding": lambda: adapt(Convolutions(), target_modules=["embedding", "convolution", "linear"]),
    "experts": lambda: adapt(mixtral("grouped_mm"), target_modules=["q_proj"], target_parameters=STACKS),
    "two adapters": both_active,
    "two adapters, convolution and embedding": two_on_convolutions,
    "checkpointed": checkpointed_language_model,
}


@pytest.mark.parametrize("optimizer_class", [torch.optim.SGD, paca.FactoredAdamW])
@pytest.mark.parametrize("case", STEPPING)
def test_nothing_waits_for_the_device_in_a_training_step(case, optimizer_class):
    model = STEPPING[case]()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = optimizer_class(trained, lr=0.01)

    def step():
        result = model(input_ids=tokens())
        (result if isinstance(result, torch.Tensor) else result.logits).square().mean().backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    step()
    step()
    with Waits(model) as trusted:
        step()
    assert trusted.names == []
    with Waits(model) as asked:
        paca.refresh(model)
    assert "equal" in asked.names  # so that the check above can fail


# -- interrupted writes ------------------------------------------------------------------------------------------------


class Wide(nn.Module):
    """Wide enough for columns that lie in blocks."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.lin1, self.lin2 = nn.Linear(40, 40), nn.Linear(40, 33)

    def forward(self, x):
        return self.lin2(torch.tanh(self.lin1(x.repeat(1, 6)[:, :40])))


def block_network():
    return adapt(Wide(), target_modules=["lin1", "lin2"], selection="random_blocks", r=8)


def step_of(model):
    for delta in deltas_of(model):
        delta.grad = torch.ones_like(delta)
    torch.optim.SGD(deltas_of(model), lr=0.1).step()


INTERRUPTED = {"a step": step_of, "a switch": switched, "a scale": lambda m: paca_layers(m)[0].set_scale("default", 3)}


@pytest.mark.parametrize("copied", [0, 1])
@pytest.mark.parametrize("call", INTERRUPTED)
def test_an_interrupted_write_is_made_up_for(monkeypatch, call, copied):
    model, real = two_adapters(block_network), torch._foreach_copy_

    def interrupt(views, values):
        if copied:
            real(views[:copied], values[:copied])
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(torch, "_foreach_copy_", interrupt)
        with contextlib.suppress(KeyboardInterrupt):
            INTERRUPTED[call](model)
            pytest.fail("nothing was written together")
    model.set_adapter("default")
    layers = paca_layers(model)
    torch.testing.assert_close(output_of(model), naive_output(Wide(), deltas_of(model), layers))
    with model.disable_adapter():
        assert torch.equal(output_of(model), Wide()(X))
    state, base = model.state_dict(), Wide()
    for number, stock in enumerate((base.lin1, base.lin2), 1):
        assert torch.equal(state[f"base_model.model.lin{number}.base_layer.weight"], stock.weight)


# -- tensors in the parameters' places ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_a_loss_is_pending_while_the_model_runs_with_other_deltas(kind):
    model = adapted_perceptron(kind)
    model(X).pow(2).sum().backward()
    expected = [delta.grad.clone() for delta in deltas_of(model)]
    model.zero_grad()
    pending = model(X).pow(2).sum()
    others = {name: torch.randn_like(p) for name, p in model.named_parameters() if p.requires_grad}
    with torch.no_grad():
        assert not torch.allclose(torch.func.functional_call(model, others, X), model(X))
    pending.backward()
    for delta, gradient in zip(deltas_of(model), expected, strict=True):
        assert torch.equal(delta.grad, gradient)


def test_a_model_is_converted_where_torch_swaps_parameters():
    model, expected = adapted_perceptron(), adapted_perceptron().double()
    deltas = deltas_of(model)
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        model.double()
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    assert all(now is before for now, before in zip(deltas_of(model), deltas, strict=True))
    for twin in (model, expected):
        optimizer = torch.optim.AdamW(deltas_of(twin), lr=0.1, fused=True)
        twin(X.double()).pow(2).sum().backward()
        optimizer.step()
    assert torch.equal(model(X.double()), expected(X.double()))


@pytest.mark.parametrize("park", FOR_ONE_PASS)
def test_a_base_weight_may_change_once_adapters_are_disabled_whatever_parked_it(park):
    model = adapted_perceptron()
    FOR_ONE_PASS[park](model)
    with model.disable_adapter(), torch.no_grad():
        for layer in paca_layers(model):
            layer.base_layer.weight.mul_(2)
        doubled = copy.deepcopy(model.get_base_model())
    with model.disable_adapter():
        assert torch.equal(output_of(model), doubled(X))
    deltas = [delta.detach() for delta in deltas_of(model)]
    base = perceptron()
    with torch.no_grad():
        for stock in (base.lin1, base.lin2):
            stock.weight.mul_(2)
    torch.testing.assert_close(output_of(model), naive_output(base, deltas, paca_layers(model)))


@pytest.mark.parametrize("write", WRITES)
def test_a_write_into_a_weight_while_an_adapter_is_merged_raises_when_it_is_unmerged(write):
    model = adapt(perceptron(), target_modules=["lin1"], indices={"lin1": [0, 2, 5]})
    model.merge_adapter()
    weight = paca_layers(model)[0].base_layer.weight
    with torch.no_grad():
        weight.copy_(weight.clone())  # the same values
    model.unmerge_adapter()
    model.merge_adapter()
    with torch.no_grad():
        WRITES[write](weight)
    with pytest.raises(RuntimeError, match="written or replaced while the adapter was active"):
        model.unmerge_adapter()


def test_memory_without_values_is_filled_by_a_state_dict():
    model, expected = adapted_perceptron(), output_of(adapted_perceptron())
    saved = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        for layer in paca_layers(model):
            layer.paca_indices["default"].fill_(2**40)  # as unwritten memory may hold
    model._apply(lambda tensor: tensor)
    for device in ("cpu", "meta", "cpu"):
        model.to_empty(device=device)
    model.load_state_dict(saved)
    assert torch.equal(output_of(model), expected)


def test_ctrl_c_after_a_layer_was_merged_leaves_a_model_that_can_be_unmerged(monkeypatch):
    model, plain = adapted_perceptron(), perceptron()
    first = paca_layers(model)[0]
    merge = first.base_layer.columns.merge

    def interrupted(*args, **kwargs):
        merge(*args, **kwargs)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(first.base_layer.columns, "merge", interrupted)
        with pytest.raises(KeyboardInterrupt):
            model.merge_adapter()
    model.unmerge_adapter()
    with model.disable_adapter():
        assert torch.equal(output_of(model), plain(X))


def test_a_checkpointed_pass_that_is_repeated_with_adapters_disabled_raises():
    model = adapted_perceptron()
    y = checkpoint(model, X.clone().requires_grad_(), use_reentrant=True)  # the other kind raises by itself
    model.base_model.disable_adapter_layers()
    with pytest.raises(RuntimeError, match="repeats a forward pass with no adapter active"):
        y.sum().backward()


def test_a_checkpointed_pass_with_adapters_disabled_is_repeated():
    model = adapted_perceptron()
    model.base_model.disable_adapter_layers()
    x = X.clone().requires_grad_()
    checkpoint(model, x, use_reentrant=True).sum().backward()
    assert x.grad is not None
