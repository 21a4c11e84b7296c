"""What each process of a group does with a model that FSDP2 shards; each scenario is a test of `test_fully_sharded`.

Every scenario builds the same adapted model twice, shards one of them, and compares: with the other one, which sees the
whole batch in one process, or with itself before. All processes check.
"""

from __future__ import annotations

import tempfile
import traceback
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from transformers import LlamaForCausalLM
from transformers.distributed import DistributedConfig

import paca
from expert_models import STACKS, mixtral
from models import adapt, adapted_perceptron, gpt2, llama, perceptron, tokens
from paca.layers import paca_layers

SCENARIOS: dict[int, list[str]] = {2: [], 4: []}
"""By how many processes they take."""


def of(world):
    def register(function):
        SCENARIOS[world].append(function.__name__)
        return function

    return register


def run_all(rank: int, world: int, port: int, folder: str) -> None:
    """Run the scenarios of `world` processes, and leave what went wrong in `folder`: empty files if nothing."""
    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", port, is_master=False)  # the test keeps it
    for name in SCENARIOS[world]:
        # A group for each: after a mistake its processes may be at different places.
        own = dist.PrefixStore(name, store)
        dist.init_process_group("gloo", store=own, rank=rank, world_size=world, timeout=timedelta(seconds=20))
        try:
            globals()[name]()
            trouble = ""
        except (Exception, pytest.fail.Exception):
            trouble = f"process {rank}: {traceback.format_exc()}"
        with open(f"{folder}/{name}-{rank}.txt", "w") as file:
            file.write(trouble)
        dist.destroy_process_group()


# -- what they share ---------------------------------------------------------------------------------------------


def mesh(*shape: int):
    names = ("replicate", "shard")[-len(shape) :] if shape else ("shard",)
    return init_device_mesh("cpu", shape or (dist.get_world_size(),), mesh_dim_names=names)


def sharded(model, parts="blocks", **settings):
    """Shard `model`, part by part; the root, which keeps what it gathers until the backward pass, has the rest."""
    settings.setdefault("mesh", mesh())
    if parts == "blocks":
        for block in model.get_base_model().model.layers:
            fully_shard(block, **settings)
    elif parts == "layers":
        for layer in paca_layers(model):
            fully_shard(layer, **settings)
    settings.pop("reshard_after_forward", None)
    return fully_shard(model, **settings)


def pair(build, parts="blocks", **settings):
    """The same model twice: in one process, and sharded."""
    return build(), sharded(build(), parts, **settings)


def adapted_llama(**settings):
    targets = {"target_modules": ["q_proj", "down_proj", "embed_tokens", "lm_head"]}
    return adapt(llama().double(), **{**targets, **settings})


def two_adapters():
    model = adapted_llama()
    model.add_adapter("other", paca.PacaConfig(r=5, paca_alpha=3, init_weights=False, target_modules="all-linear"))
    return model


def mine(batch):
    return batch[dist.get_rank() :: dist.get_world_size()]


def batch(seed=0):
    return tokens(2 * dist.get_world_size(), seed=seed)


def loss_of(model, ids):
    return model(input_ids=ids).logits.square().mean()


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def trainable(model):
    return [p for p in model.parameters() if p.requires_grad]


def optimizer_of(model, **settings):
    return torch.optim.AdamW(trainable(model), **{"lr": 0.02, **settings})


def step(model, optimizer, ids):
    loss = loss_of(model, ids)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.detach()


def averaged(loss):
    loss = loss.clone()
    dist.all_reduce(loss)
    return loss / dist.get_world_size()


def check_gradients(alone, together):
    for (name, a), b in zip(alone.named_parameters(), together.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None), name
        if a.grad is not None:
            torch.testing.assert_close(whole(b.grad), a.grad, rtol=1e-9, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")


def check_state(alone, together, exact=("base_layer",)):
    theirs = together.state_dict()
    for name, value in alone.state_dict().items():
        other = whole(theirs[name])
        if any(part in name for part in exact):
            assert torch.equal(other, value), name
        else:
            torch.testing.assert_close(other, value, rtol=1e-8, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")


def check_training(build, parts="blocks", steps=3, optimizer=None, data=batch, run=step, **settings):
    alone, together = pair(build, parts, **settings)
    first, second = optimizer_of(alone, **(optimizer or {})), optimizer_of(together, **(optimizer or {}))
    for number in range(steps):
        expected = run(alone, first, data(number))
        got = averaged(run(together, second, mine(data(number))))
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-12)
    check_state(alone, together)
    return alone, together


# -- training ----------------------------------------------------------------------------------------------------


@of(2)
def trains_as_one_process():
    check_training(adapted_llama)


@of(2)
def sees_a_second_step_on_the_same_gradients():
    alone, together = pair(adapted_llama)
    outputs = []
    for model, ids in ((alone, batch()), (together, mine(batch()))):
        optimizer = optimizer_of(model, fused=True)
        loss_of(model, ids).backward()
        with torch.no_grad():
            for _ in range(2):
                optimizer.step()
                outputs.append(model(input_ids=batch()).logits)
    torch.testing.assert_close(outputs[2:], outputs[:2])


@of(2)
def refreshes_before_gathering():
    """No column travels on its own but the root module's, once per step."""
    gathered = []
    full_tensor = DTensor.full_tensor

    def counting(tensor, **settings):
        gathered.append(tuple(tensor.shape))
        return full_tensor(tensor, **settings)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DTensor, "full_tensor", counting)
        for targets, expected in ((["q_proj", "down_proj"], []), (["q_proj", "lm_head"], [(64, 3)] * 3)):
            together = sharded(adapted_llama(target_modules=targets))
            optimizer = optimizer_of(together)
            gathered.clear()
            for number in range(3):
                step(together, optimizer, mine(batch(number)))
            assert gathered == expected


@of(2)
def trains_with_an_optimizer_that_hides_its_writes():
    check_training(adapted_llama, optimizer={"fused": True})


@of(2)
def trains_where_only_the_root_is_sharded():
    check_training(adapted_llama, "root")


@of(2)
def trains_where_each_layer_is_sharded():
    check_training(lambda: adapt(llama().double(), target_modules=["q_proj", "down_proj"]), "layers")


def step_of_perceptron(model, optimizer, x):
    loss = model(x).square().mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.detach()


def numbers(seed, width=7):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2 * dist.get_world_size(), width, generator=generator, dtype=torch.float64)


@of(2)
def trains_uneven_rows_and_a_process_without_any():
    def build():
        model = perceptron(dtype=torch.float64)
        model.lin2 = nn.Linear(13, 1).double()  # one row: the second process has none
        torch.manual_seed(1)
        nn.init.normal_(model.lin2.weight)
        nn.init.normal_(model.lin2.bias)
        return adapt(model, target_modules=["lin1", "lin2"])

    check_training(build, "layers", data=numbers, run=step_of_perceptron)


@of(2)
def trains_under_gradient_checkpointing():
    def build(reentrant):
        model = adapted_llama(target_modules=["q_proj", "down_proj", "lm_head"])
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
        return model.train()

    check_training(lambda: build(False))
    check_training(lambda: build(True))


@of(2)
def accumulates_gradients():
    alone, together = pair(adapted_llama)
    first, second = optimizer_of(alone), optimizer_of(together)
    for number in range(2):
        for part in range(3):
            together.set_requires_gradient_sync(part == 2)
            loss_of(alone, batch(number + part)).backward()
            loss_of(together, mine(batch(number + part))).backward()
        check_gradients(alone, together)
        for optimizer in (first, second):
            optimizer.step()
            optimizer.zero_grad()
    check_state(alone, together)


@of(2)
def trains_experts():
    """In float32, which the grouped product asks for."""
    for implementation in ("grouped_mm", "eager"):
        alone, together = pair(
            lambda i=implementation: adapt(mixtral(i), target_modules=["q_proj"], target_parameters=STACKS)
        )
        first, second = (torch.optim.SGD(trainable(model), lr=1.0) for model in (alone, together))
        for number in range(3):
            expected = step(alone, first, batch(number))
            got = averaged(step(together, second, mine(batch(number))))
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-7)
        theirs = together.state_dict()
        for name, value in alone.state_dict().items():
            bounds = {"rtol": 0, "atol": 0} if "base_layer" in name else {"rtol": 1e-3, "atol": 1e-5}
            torch.testing.assert_close(whole(theirs[name]), value, **bounds)


@of(2)
def accumulates_gradients_of_experts():
    for implementation in ("eager", "batched_mm", "grouped_mm"):
        alone, together = pair(
            lambda i=implementation: adapt(mixtral(i), target_modules=["q_proj"], target_parameters=STACKS)
        )
        for number in range(2):
            loss_of(alone, batch(number)).backward()
            loss_of(together, mine(batch(number))).backward()
        for (name, a), b in zip(alone.named_parameters(), together.parameters(), strict=True):
            if a.grad is not None:
                torch.testing.assert_close(whole(b.grad), a.grad, rtol=1e-3, atol=1e-6, msg=name)


@of(2)
def trains_with_prefetching():
    """Weights that are on their way when their rows are written: from the root, and by hand."""
    for by_hand in (False, True):
        alone, together = pair(adapted_llama)
        first, second = optimizer_of(alone), optimizer_of(together)
        blocks = together.get_base_model().model.layers
        if not by_hand:
            together.set_modules_to_forward_prefetch(list(blocks))
        for number in range(3):
            if by_hand and number:
                blocks[0].unshard(async_op=True)
            expected = step(alone, first, batch(number))
            torch.testing.assert_close(averaged(step(together, second, mine(batch(number)))), expected)
        with torch.no_grad(), together.disable_adapter(), alone.disable_adapter():
            assert torch.equal(together(input_ids=batch()).logits, alone(input_ids=batch()).logits)
        check_state(alone, together)


@of(2)
def unloads_while_weights_are_gathered():
    for merge in (False, True):
        alone, together = pair(adapted_llama, reshard_after_forward=False)
        with torch.no_grad(), together.disable_adapter():
            together(input_ids=batch())
            if not merge:
                together.base_model.enable_adapter_layers()
                together(input_ids=batch())
        stock = [m.merge_and_unload() if merge else m.unload() for m in (alone, together)]
        with torch.no_grad():
            torch.testing.assert_close(*(m(input_ids=batch()).logits for m in stock))


@of(2)
def trains_convolutions():
    class Convolutions(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.lin1, self.lin2 = nn.Conv2d(4, 7, 3), nn.Conv1d(6, 5, 2)

        def forward(self, x):
            return self.lin2(torch.tanh(self.lin1(x.reshape(-1, 4, 4, 4))).flatten(2).mT.reshape(-1, 6, 4)[:, :, :3])

    def images(seed):
        return numbers(seed, 6 * 4 * 4 * 4)

    def build():
        return adapt(Convolutions().double(), target_modules=["lin1", "lin2"])

    check_training(build, "layers", data=images, run=step_of_perceptron)


@of(2)
def trains_where_the_rest_is_compiled():
    """An adapted layer is a graph break then."""
    torch._dynamo.reset()
    alone, together = pair(adapted_llama)
    compiled = torch.compile(together, backend="aot_eager")
    first, second = optimizer_of(alone), optimizer_of(together)
    for number in range(2):
        expected = step(alone, first, batch(number))
        torch.testing.assert_close(averaged(step(compiled, second, mine(batch(number)))), expected)
    check_state(alone, together)


@of(2)
def trains_over_quantized_weights():
    from quantized_layers import quantized_linear

    def build():
        model = llama()
        for block in model.model.layers:
            block.mlp.up_proj = quantized_linear("nf4", block.mlp.up_proj)
        return adapt(model, target_modules=["up_proj", "q_proj"])

    alone, together = build(), build()
    packed = {p for p in together.parameters() if not p.is_floating_point()}
    for block in together.get_base_model().model.layers:
        fully_shard(block, mesh=mesh(), ignored_params=packed)
    fully_shard(together, mesh=mesh(), ignored_params=packed)
    first, second = optimizer_of(alone), optimizer_of(together)
    for number in range(3):
        expected, got = step(alone, first, batch(number)), averaged(step(together, second, mine(batch(number))))
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


# -- adapters on, off and others -----------------------------------------------------------------------------------


@of(2)
def reference_policy_between_forward_and_backward():
    """As DPO does it: the policy, the reference without adapter, then the policy's backward pass."""
    for parts in ("blocks", "root"):
        alone, together = pair(adapted_llama, parts)
        for model, ids in ((alone, batch()), (together, mine(batch()))):
            policy = model(input_ids=ids).logits
            with torch.no_grad(), model.disable_adapter():
                reference = model(input_ids=ids).logits
            (policy - reference).square().mean().backward()
        check_gradients(alone, together)


@of(2)
def disabling_gives_the_pretrained_model():
    for parts in ("blocks", "root"):
        alone, together = pair(adapted_llama, parts)
        base = llama().double()
        with torch.no_grad():
            before = together(input_ids=batch()).logits
            with together.disable_adapter():
                assert torch.equal(together(input_ids=batch()).logits, base(input_ids=batch()).logits)
            assert torch.equal(together(input_ids=batch()).logits, before)
            torch.testing.assert_close(before, alone(input_ids=batch()).logits)


@of(2)
def a_reference_pass_first_leaves_gathered_deltas_trainable():
    """As GRPO does it. The root stays gathered, so that `disable_adapter()` freezes shards, and thaws copies."""
    for reshard in (False, True):
        alone, together = pair(adapted_llama, "root")
        for model, ids in ((alone, batch()), (together, mine(batch()))):
            for _ in range(2):
                with torch.no_grad(), model.disable_adapter():
                    reference = model(input_ids=ids).logits
                if reshard and model is together:
                    model.reshard()
                (model(input_ids=ids).logits - reference).square().mean().backward()
        check_gradients(alone, together)


def check_other_adapter_in_between(alone, together):
    for model, ids in ((alone, batch()), (together, mine(batch()))):
        first = model(input_ids=ids).logits
        model.set_adapter("other", inference_mode=True)
        with torch.no_grad():
            second = model(input_ids=ids).logits
        model.set_adapter("default")
        (first - second).square().mean().backward()
    check_gradients(alone, together)


@of(2)
def other_adapter_between_forward_and_backward():
    for parts in ("blocks", "root"):
        check_other_adapter_in_between(*pair(two_adapters, parts))


@of(2)
def what_needs_whole_weights_is_refused():
    together = sharded(two_adapters())
    names = set(paca_layers(together)[0].paca_delta)
    with tempfile.TemporaryDirectory() as folder:
        two_adapters().save_pretrained(folder)
        with pytest.raises(ValueError, match="A hot swap needs whole weights"):
            paca.hotswap_adapter(together, folder, "default")
    with pytest.raises(ValueError, match="get_delta_weight needs whole weights"):
        paca_layers(together)[0].get_delta_weight("default")
    with pytest.raises(ValueError, match="add_weighted_adapter needs whole weights"):
        together.add_weighted_adapter(["default", "other"], [1.0, 1.0], "sum")
    assert set(paca_layers(together)[0].paca_delta) == names
    assert "sum" not in together.peft_config


@of(2)
def two_adapters_at_once_and_scales():
    alone, together = pair(two_adapters)
    for model in (alone, together):
        model.base_model.set_adapter(["default", "other"])
        for layer in paca_layers(model):
            layer.set_scale("other", 0.5)
    with torch.no_grad():
        torch.testing.assert_close(together(input_ids=batch()).logits, alone(input_ids=batch()).logits)
        for model in (alone, together):
            for layer in paca_layers(model):
                layer.set_scale("other", 2.0)
        torch.testing.assert_close(together(input_ids=batch()).logits, alone(input_ids=batch()).logits)


@of(2)
def a_delta_changed_before_the_backward_pass_is_refused():
    together = sharded(adapted_llama())
    loss = loss_of(together, mine(batch()))
    with torch.no_grad():
        for parameter in trainable(together):
            parameter.add_(1)
    with pytest.raises(RuntimeError, match="modified between forward and backward"):
        loss.backward()


@of(2)
def merging_and_unmerging():
    for parts in ("blocks", "root"):
        alone, together = pair(adapted_llama, parts)
        with torch.no_grad():
            resident = together(input_ids=batch()).logits
            together.merge_adapter()
            assert torch.equal(together(input_ids=batch()).logits, resident)
            together.unmerge_adapter()
            assert torch.equal(together(input_ids=batch()).logits, resident)
            with together.disable_adapter():
                together(input_ids=batch())  # what was gathered holds no columns
            together.merge_adapter()
            assert torch.equal(together(input_ids=batch()).logits, resident)
            together.unmerge_adapter()
        check_state(alone, together, exact=("",))


@of(2)
def mixed_batches():
    names = ["default", "__base__", "other", "default"]
    alone, together = pair(lambda: two_adapters().eval())
    with torch.no_grad():
        expected = alone(input_ids=tokens(4), adapter_names=names).logits
        torch.testing.assert_close(together(input_ids=tokens(4), adapter_names=names).logits, expected)


@of(2)
def mixed_batches_see_deltas_written_while_their_copies_are_gathered():
    """The root stays gathered after a pass under `no_grad`."""
    names = ["default", "__base__", "other", "default"]
    alone, together = pair(lambda: two_adapters().eval())
    first, second = optimizer_of(alone, fused=True), optimizer_of(together, fused=True)
    loss_of(alone, batch()).backward()
    loss_of(together, mine(batch())).backward()
    with torch.no_grad():
        for change in ("step", "write", "write between mixed batches"):
            if change != "write between mixed batches":
                together(input_ids=batch())
            if change == "step":
                first.step()
                second.step()
            else:
                for one, other in zip(paca_layers(alone), paca_layers(together), strict=True):
                    if "default" in one.r:
                        one.paca_delta["default"].data.mul_(3)
                        other.paca_delta.shard("default")._local_tensor.data.mul_(3)
                paca.refresh(alone)
                paca.refresh(together)
            expected = alone(input_ids=tokens(4), adapter_names=names).logits
            torch.testing.assert_close(together(input_ids=tokens(4), adapter_names=names).logits, expected)


@of(2)
def values_written_without_a_trace_are_seen_by_refresh():
    alone, together = pair(adapted_llama)
    with torch.no_grad():
        together(input_ids=batch())
        for parameter in trainable(alone):
            parameter.data.mul_(3)
        for layer in paca_layers(together):
            layer.paca_delta.shard("default").to_local().mul_(3)  # this one leaves a trace
        torch.testing.assert_close(together(input_ids=batch()).logits, alone(input_ids=batch()).logits)
        for layer in (*paca_layers(together), *paca_layers(alone)):
            delta = layer.paca_delta["default"] if layer.base_layer.columns.whole else None
            (layer.paca_delta.shard("default")._local_tensor if delta is None else delta).data.mul_(2)
        paca.refresh(together)
        paca.refresh(alone)
        torch.testing.assert_close(together(input_ids=batch()).logits, alone(input_ids=batch()).logits)


@of(2)
def rows_written_while_a_pass_runs_are_waited_for():
    """FSDP2 gathers on other streams, which wait for what came before the pass: steps need no waiting, a look does."""
    waited = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(paca.columns.sharded, "wait_for_writes", waited.append)
        together = sharded(adapted_llama())
        optimizer = optimizer_of(together)
        step(together, optimizer, mine(batch()))
        waited.clear()  # until then no optimizer was known
        step(together, optimizer, mine(batch(1)))
        assert waited == []
        with torch.no_grad():
            for layer in paca_layers(together):
                layer.paca_delta.shard("default").to_local().mul_(3)
            together(input_ids=batch())
        assert waited == [torch.device("cpu")] * len(paca_layers(together))


# -- what is stored ------------------------------------------------------------------------------------------------


@of(2)
def shards_a_model_that_has_run_already():
    """Its columns are in the weights when these are cut, and a state dict shares their memory."""
    for parts in ("blocks", "root"):
        alone, together = adapted_llama(), adapted_llama()
        kept = together.state_dict()
        before = {name: value.clone() for name, value in kept.items()}
        with torch.no_grad():
            together(input_ids=batch())
        sharded(together, parts)
        first, second = optimizer_of(alone), optimizer_of(together)
        for number in range(2):
            expected = step(alone, first, batch(number))
            torch.testing.assert_close(averaged(step(together, second, mine(batch(number)))), expected)
        check_state(alone, together)
        assert all(torch.equal(kept[name], value) for name, value in before.items() if "base_layer" in name)


@of(2)
def shards_a_merged_model():
    alone, together = adapted_llama(), adapted_llama()
    together.merge_adapter()
    sharded(together)
    with torch.no_grad():
        torch.testing.assert_close(together(input_ids=batch()).logits, alone(input_ids=batch()).logits)
        together.unmerge_adapter()
        torch.testing.assert_close(together(input_ids=batch()).logits, alone(input_ids=batch()).logits)
    check_state(alone, together, exact=("",))


@of(2)
def a_state_dict_stays_as_it_was():
    together = sharded(adapted_llama())
    optimizer = optimizer_of(together)
    step(together, optimizer, mine(batch()))
    kept = together.state_dict()
    before = {name: whole(value).clone() for name, value in kept.items() if "base_layer" in name}
    step(together, optimizer, mine(batch(1)))
    with torch.no_grad():
        together(input_ids=batch())
    for name, value in before.items():
        assert torch.equal(whole(kept[name]), value), name
        assert torch.equal(value, adapted_llama().state_dict()[name]), name


@of(2)
def a_full_state_dict_loads_elsewhere():
    alone, together = check_training(adapted_llama, steps=2)
    full = get_model_state_dict(together, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if dist.get_rank() == 0:
        fresh = adapted_llama()
        fresh.load_state_dict(full)
        with torch.no_grad():
            torch.testing.assert_close(fresh(input_ids=batch()).logits, alone(input_ids=batch()).logits)


@of(2)
def loads_a_state_dict():
    trained = adapted_llama()
    step(trained, optimizer_of(trained), batch())
    values = trained.state_dict()
    for assign in (False, True):
        together = sharded(adapted_llama())
        with torch.no_grad():
            together(input_ids=batch())  # columns are in the rows when they are loaded over
        shards = {}
        for name, own in together.state_dict().items():
            value = values[name].clone()
            if isinstance(own, DTensor):
                value = torch.distributed.tensor.distribute_tensor(value, own.device_mesh, own.placements)
            shards[name] = value
        together.load_state_dict(shards, assign=assign)
        with torch.no_grad():
            torch.testing.assert_close(together(input_ids=batch()).logits, trained(input_ids=batch()).logits)
        check_state(trained, together)


@of(2)
def starts_on_the_meta_device():
    """As accelerate shards a model that only the first process has loaded."""
    alone, together = adapted_llama(), adapted_llama()
    with torch.no_grad():
        together(input_ids=batch())
    values = together.state_dict()
    rotary = {name: b.clone() for name, b in together.named_buffers() if "inv_freq" in name}
    sharded(together.to("meta"))
    shards = {
        name: torch.distributed.tensor.distribute_tensor(values[name], own.device_mesh, own.placements)
        if isinstance(own, DTensor)
        else values[name]
        for name, own in together.state_dict().items()
    }
    together.load_state_dict(shards, assign=True)
    for name, buffer in rotary.items():
        parent, _, leaf = name.rpartition(".")
        together.get_submodule(parent).register_buffer(leaf, buffer, persistent=False)
    for p, q in zip(together.parameters(), alone.parameters(), strict=True):
        p.requires_grad_(q.requires_grad)
    first, second = optimizer_of(alone), optimizer_of(together)
    for number in range(2):
        expected = step(alone, first, batch(number))
        torch.testing.assert_close(averaged(step(together, second, mine(batch(number)))), expected)
    check_state(alone, together)


@of(2)
def gathers_in_a_narrower_type():
    """With float32 rows and bfloat16 copies, the model is the merged one in bfloat16."""

    def build():
        return adapt(llama(), target_modules=["q_proj", "down_proj", "lm_head"])

    plain = build().merge_and_unload()
    for parameter in plain.parameters():
        parameter.data = parameter.data.bfloat16()  # buffers stay as they are, here and there
    together = sharded(build(), mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32))
    assert torch.equal(together(input_ids=batch()).logits, plain(input_ids=batch()).logits)
    loss_of(together, mine(batch())).backward()
    assert all(p.grad.dtype == torch.float32 for p in trainable(together))
    step(together, optimizer_of(together), mine(batch()))
    base = build().state_dict()
    for name, value in together.state_dict().items():
        if "base_layer" in name:
            assert torch.equal(whole(value), base[name]), name


@of(2)
def modules_that_are_trained_whole():
    """In blocks of their own and in the root's; by calling them, and by their weight as fused losses read it."""

    def build():
        return adapt(llama().double(), target_modules=["q_proj"], modules_to_save=["lm_head"])

    def by_weight(model, ids):
        base = model.get_base_model()
        base.forward = lambda input_ids: base.model(input_ids=input_ids).last_hidden_state @ base.lm_head.weight.T
        return model(input_ids=ids).square().mean()

    for parts in ("blocks", "root"):
        for loss in (loss_of, by_weight):
            alone, together = pair(build, parts)
            loss(alone, batch()).backward()
            loss(together, mine(batch())).backward()
            check_gradients(alone, together)


@of(2)
def a_weight_that_is_gathered_by_hand_gets_the_gradient_of_one_process():
    """Why `paca train` refuses modules_to_save: TRL's loss gathers an output layer so, if it is sharded by itself. Its
    gradient should be the average over the processes; each gets its rows of its own. Without PaCA."""
    torch.manual_seed(0)
    weight = torch.distributed.tensor.distribute_tensor(torch.randn(6, 4), mesh(), [torch.distributed.tensor.Shard(0)])
    weight.requires_grad_()
    gradients = []
    for rank in range(2):
        whole_weight = whole(weight.detach()).requires_grad_()
        (torch.full((3, 4), rank + 1.0) @ whole_weight.T).square().mean().backward()
        gradients.append(whole_weight.grad)
    (torch.full((3, 4), dist.get_rank() + 1.0) @ weight.full_tensor().T).square().mean().backward()
    got = whole(weight.grad)
    torch.testing.assert_close(got, torch.cat([gradients[0][:3], gradients[1][3:]]))
    assert not torch.allclose(got, sum(gradients) / 2)


# -- refused -------------------------------------------------------------------------------------------------------


@of(2)
def weights_whose_columns_would_be_cut_are_refused():
    with pytest.raises(RuntimeError, match=r"columns run along dimension 0. Only the first dimension"):
        sharded(adapt(gpt2(), target_modules=["c_attn"]), "root")


@of(2)
def adapters_added_to_a_sharded_model_are_refused():
    together = sharded(adapted_llama())
    late = paca.PacaConfig(r=2, target_modules=["q_proj"], init_weights=False)
    with pytest.raises(RuntimeError, match=r"'late' can't be added: the weights are sharded already"):
        together.add_adapter("late", late)
    together.delete_adapter("default")
    with pytest.raises(RuntimeError, match=r"'default' can't be added"):
        together.add_adapter("default", late)


@of(2)
def deltas_that_are_not_sharded_are_refused():
    model = adapted_llama()
    fully_shard(model, mesh=mesh(), ignored_params=set(trainable(model)))
    with pytest.raises(RuntimeError, match=r"is not sharded as the weights below it are"):
        model(input_ids=batch())
    model = adapted_llama(target_modules=["q_proj"])
    frozen = {p for p in model.parameters() if not p.requires_grad}
    fully_shard(model.get_base_model().model.layers[0], mesh=mesh(), ignored_params=frozen)
    with pytest.raises(RuntimeError, match=r"are sharded, and the weight below them is not"):
        model(input_ids=batch())


@of(2)
def different_columns_are_refused():
    model = adapt(llama().double(), target_modules=["q_proj"], random_seed=dist.get_rank())
    with pytest.raises(RuntimeError, match="train different columns of the same weights"):
        sharded(model)(input_ids=batch())


@of(2)
def optimizers_that_do_not_know_shards_are_named():
    import bitsandbytes
    from transformers.optimization import Adafactor

    together = sharded(adapt(llama(), target_modules=["q_proj"]))
    loss_of(together, mine(batch())).backward()
    for kind in (torch.optim.Adafactor, torch.optim.Rprop, Adafactor, bitsandbytes.optim.AdamW8bit):
        with pytest.raises(TypeError, match=rf"{kind.__name__} can't step parameters that FSDP2 shards"):
            kind(trainable(together)).step()


@of(2)
def processes_that_disagree_on_what_is_active_are_told():
    together, first = sharded(two_adapters()), dist.get_rank() == 0
    with torch.no_grad():
        expected = together(input_ids=batch()).logits

        def changes(mine):
            if mine == "scale":
                for layer in paca_layers(together):
                    layer.set_scale("default", 3.0)
            elif mine == "off":
                together.base_model.disable_adapter_layers()
            else:
                together.set_adapter(mine)

        for one, other in (("other", "off"), ("default", "scale")):
            together.base_model.enable_adapter_layers()
            changes(one if first else other)
            with pytest.raises(RuntimeError, match="The processes disagree on what is active: this one has"):
                together(input_ids=batch())
        together.base_model.enable_adapter_layers()
        together.set_adapter("default")
        for layer in paca_layers(together):
            layer.set_scale("default", 1.0)
        assert torch.equal(together(input_ids=batch()).logits, expected)


@of(2)
def a_process_that_switches_alone_is_told():
    together = sharded(two_adapters())
    with torch.no_grad():
        together(input_ids=batch())
        dist.distributed_c10d._get_default_store().set_timeout(timedelta(seconds=1))
        if dist.get_rank() == 0:
            together.set_adapter("other")
            with pytest.raises(RuntimeError, match=r"has the adapters other, others have what they had before"):
                together(input_ids=batch())
            dist.destroy_process_group()
            dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # `run_all` ends it
        else:
            dist.distributed_c10d._set_pg_timeout(timedelta(seconds=2))
            with pytest.raises(RuntimeError):  # the first one left
                together(input_ids=batch())


@of(2)
def rotated_adapters_are_refused():
    model = adapted_perceptron(dtype=torch.float64)
    optimizer = optimizer_of(model)
    step_of_perceptron(model, optimizer, numbers(0))
    paca.rotate(model, optimizer, 1)
    model(numbers(0))
    with pytest.raises(RuntimeError, match=r"were rotated .* can't be taken out"):
        sharded(model, "root")


@of(2)
def rotated_adapters_that_were_parked_are_refused_when_they_are_used():
    model = adapted_perceptron(dtype=torch.float64)
    optimizer = optimizer_of(model)
    step_of_perceptron(model, optimizer, numbers(0))
    paca.rotate(model, optimizer, 1)
    model.base_model.disable_adapter_layers()
    model(numbers(0))
    sharded(model, "root")
    model(numbers(0))
    with pytest.raises(RuntimeError, match=r"'default' was rotated .* can't be put into sharded weights"):
        model.base_model.enable_adapter_layers()


@of(2)
def tensor_parallel_layers_are_refused():
    model = adapted_perceptron()
    module = paca_layers(model)[0].base_layer
    parallelize_module(module, mesh(), ColwiseParallel())
    with pytest.raises(RuntimeError, match=r"as tensor parallelism does it\. That is not supported"):
        model(torch.randn(4, 7))


@of(2)
def plans_of_transformers_are_refused():
    """What `tp_plan="auto"` makes of a model, which is right as long as nothing is adapted."""
    alone, ids = llama().double(), batch()
    with tempfile.TemporaryDirectory() as folder:
        alone.config.save_pretrained(folder)
        save_file(alone.state_dict(), f"{folder}/model.safetensors", {"format": "pt"})  # in every process
        plan = DistributedConfig(tp_size=2, tp_plan="auto")
        model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float64, distributed_config=plan)
    loss_of(alone, ids).backward()
    loss_of(model, ids).backward()
    layers = alone.model.layers[0].self_attn, model.model.layers[0].self_attn
    for name, dim in (("q_proj", 0), ("o_proj", 1)):
        expected, layer = (getattr(attention, name) for attention in layers)
        assert layer.weight.placements == (Shard(dim),)  # rows, or columns: half of them are in each process
        assert "forward" in vars(layer)  # in place of its class's
        torch.testing.assert_close(whole(layer.weight.grad), expected.weight.grad, rtol=1e-12, atol=1e-15)
        with pytest.raises(ValueError, match=rf"{name} is split over processes by a tensor-parallel plan"):
            adapt(model, target_modules=[name])
        with pytest.raises(RuntimeError, match=r"mixed torch\.Tensor and DTensor"):  # how columns are read and written
            layer.weight.detach().index_select(1, torch.tensor([0, 5]))


# -- four processes --------------------------------------------------------------------------------------------------


@of(4)
def trains_with_replicas_of_shards():
    check_training(adapted_llama, mesh=mesh(2, 2))


@of(4)
def pieces_of_gathered_weights():
    """After a forward pass the rows are kept over two processes, and the backward pass gathers them from there."""
    check_training(adapted_llama, reshard_after_forward=2)
    check_other_adapter_in_between(*pair(two_adapters, reshard_after_forward=2))
