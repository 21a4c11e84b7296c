from __future__ import annotations

import copy
import gc
import io
import weakref

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from tiny_architectures import ARCHITECTURES, GATED
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
)

from paca.bench.saved_activations import measure_saved_activations
from paca.lean import is_lean, make_lean, undo_lean
from paca.messages.errors import PacaError

RECOMPUTE = [None, "mlp"]
DTYPES = [torch.float32, torch.bfloat16, torch.float64]


def instance_state(model: nn.Module) -> list[set[str]]:
    return [set(vars(module)) for module in model.modules()]


def saved_bytes(model: nn.Module, batch: int = 2, length: int = 64) -> int:
    width = model.get_input_embeddings().weight.shape[1]
    x = torch.randn(batch, length, width, dtype=model.get_input_embeddings().weight.dtype, requires_grad=True)
    return measure_saved_activations(lambda: model(inputs_embeds=x, use_cache=False).logits, model).bytes


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("recompute", RECOMPUTE)
@pytest.mark.parametrize("trained", ["everything", "nothing"])
def test_step_is_that_of_the_stock_model(tiny_model, run, architecture, dtype, recompute, trained):
    model = tiny_model(architecture, dtype).requires_grad_(trained == "everything")
    _, exact = run(copy.deepcopy(model).double())
    stock_logits, stock = run(model)
    make_lean(model, recompute)
    assert is_lean(model)
    logits, gradients = run(model)
    assert torch.equal(logits, stock_logits)
    assert gradients.keys() == stock.keys()
    # As close to the float64 model as the stock model is. (Its norms compute in float32 even there.)
    eps = max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps)
    for name, want in exact.items():
        scale = want.norm() + 1e-3
        error = (gradients[name].double() - want).norm() / scale
        assert error <= 1.2 * (stock[name].double() - want).norm() / scale + 4 * eps, name


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("recompute", RECOMPUTE)
def test_undo_leaves_no_trace(tiny_model, run, architecture, recompute):
    model = tiny_model(architecture)
    state, (logits, gradients) = instance_state(model), run(model)
    assert undo_lean(model) is model  # nothing to undo
    assert make_lean(make_lean(model), recompute) is model  # the second call replaces the first
    undo_lean(undo_lean(model))
    assert instance_state(model) == state
    assert not is_lean(model)
    again_logits, again = run(model)
    assert torch.equal(again_logits, logits)
    assert all(torch.equal(again[name], gradient) for name, gradient in gradients.items())


@pytest.mark.parametrize("architecture", GATED)
def test_gated_blocks_keep_less(tiny_model, architecture):
    # Wide enough that the parts weigh as in real models; eager attention's square matrices would hide them.
    sizes = {"hidden_size": 64, "intermediate_size": 224, "attn_implementation": "sdpa"}
    if architecture == "gemma2":
        sizes["attn_implementation"] = "eager"
    model = tiny_model(architecture, torch.bfloat16, **sizes).requires_grad_(False)
    stock = saved_bytes(model)
    lean = saved_bytes(make_lean(model))
    recomputing = saved_bytes(make_lean(model, "mlp"))
    tokens, layers = 2 * 64, 2
    # Each MLP: the activated gate (m), then gate and up (2 m). Each norm in a block: the float32 copy, twice the input.
    assert stock - lean >= layers * tokens * (224 + 2 * 64) * 2
    assert lean - recomputing >= layers * tokens * 2 * 224 * 2
    assert saved_bytes(undo_lean(model)) == stock


def test_llama_shaped_blocks_meet_the_targets(tiny_model):
    sizes = {"hidden_size": 128, "intermediate_size": 448, "num_attention_heads": 8, "num_key_value_heads": 2}
    model = tiny_model("llama", torch.bfloat16, num_hidden_layers=4, **sizes).requires_grad_(False).model
    x = torch.randn(1, 64, 128, dtype=torch.bfloat16, requires_grad=True)

    def bytes_now() -> int:
        return measure_saved_activations(lambda: model(inputs_embeds=x, use_cache=False)[0], model).bytes

    stock = bytes_now()
    make_lean(model)
    assert bytes_now() <= 0.70 * stock
    make_lean(model, "mlp")
    assert bytes_now() <= 0.32 * stock


def test_plain_blocks_keep_less(tiny_model):
    for architecture, kept_elements, lean_bytes in (("opt", 37 * 2, 37 / 8), ("gpt2", 5 * 37 * 2, 37 * 2)):
        model = tiny_model(architecture, torch.bfloat16).requires_grad_(False)
        stock, lean = saved_bytes(model), saved_bytes(make_lean(model))
        tokens, layers = 2 * 64, 2
        assert stock - lean >= layers * tokens * (kept_elements - lean_bytes) * 0.75, architecture
    recomputing = saved_bytes(make_lean(model, "mlp"))
    assert lean - recomputing >= layers * tokens * 37 * 2
    assert saved_bytes(make_lean(model)) == lean  # nothing of the former choice is left
    assert saved_bytes(undo_lean(model)) == stock


def test_one_attention_mask_for_all_layers(tiny_model):
    model = tiny_model("llama", torch.bfloat16, num_hidden_layers=3).requires_grad_(False)
    mask = torch.ones(2, 64, dtype=torch.long)
    mask[0, :5] = 0
    x = torch.randn(2, 64, 24, dtype=torch.bfloat16, requires_grad=True)

    def masks_kept() -> int:
        saved = measure_saved_activations(
            lambda: model(inputs_embeds=x, attention_mask=mask, use_cache=False).logits, model
        )
        return sum(tensor.shape == (2, 1, 64, 64) for tensor in saved.tensors)

    assert masks_kept() == 3
    make_lean(model)
    assert masks_kept() == 1


def test_a_mask_that_is_filled_anew_in_place_is_read_anew(tiny_model):
    model = tiny_model("llama", torch.float32).requires_grad_(False).train()
    mask = torch.ones(12, 12, dtype=torch.bool).tril()[None, None].expand(2, 1, 12, 12).clone()
    x = torch.randn(2, 12, 24, requires_grad=True)

    def logits() -> Tensor:
        return model(inputs_embeds=x, attention_mask=mask, use_cache=False).logits

    first, want = logits(), []
    make_lean(model)
    assert torch.equal(logits(), first)
    mask[..., 1:6] = False
    got = logits()
    undo_lean(model)
    want = logits()
    assert not torch.equal(want, first)
    assert torch.equal(got, want)


def test_evaluation_runs_the_stock_forward(tiny_model, run):
    model = tiny_model("llama", torch.bfloat16).eval()
    tokens = torch.arange(1, 11).view(2, 5)
    with torch.no_grad():
        want = model(tokens).logits
        assert torch.equal(make_lean(model, "mlp")(tokens).logits, want)
        assert model.generate(tokens, max_new_tokens=3, do_sample=False).shape == (2, 8)


@pytest.mark.parametrize("recompute", RECOMPUTE)
def test_copies_and_pickles_are_lean_and_independent(tiny_model, run, recompute):
    model = make_lean(tiny_model("llama"), recompute)
    logits, gradients = run(model)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(model), torch.load(buffer, weights_only=False)):
        assert is_lean(other)
        assert saved_bytes(other) == saved_bytes(model)
        other_logits, other_gradients = run(other)
        assert torch.equal(other_logits, logits)
        assert all(torch.equal(other_gradients[name], gradient) for name, gradient in gradients.items())
        with torch.no_grad():  # the copy reads its own weights
            for parameter in other.model.layers.parameters():
                parameter.zero_()
        assert not torch.equal(run(other)[0], logits)
        assert torch.equal(run(model)[0], logits)
        undo_lean(other)
        assert is_lean(model)


def test_state_dict_is_unchanged(tiny_model):
    model = tiny_model("qwen3")
    keys = list(model.state_dict())
    assert list(make_lean(model, "mlp").state_dict()) == keys


def test_a_lean_model_is_freed_without_the_garbage_collector(tiny_model):
    model = make_lean(tiny_model("llama"), "mlp")
    norm, mlp = weakref.ref(model.model.layers[0].input_layernorm), weakref.ref(model.model.layers[0].mlp)
    gc.collect()
    gc.disable()
    try:
        del model
        assert norm() is None
        assert mlp() is None
    finally:
        gc.enable()


def test_accelerate_hooks_before_and_after(tiny_model, run):
    model = tiny_model("llama")
    logits, _ = run(model)
    mlp = model.model.layers[0].mlp
    stock = saved_bytes(model)
    add_hook_to_module(mlp, ModelHook())
    make_lean(model)
    lean = saved_bytes(model)
    assert lean < stock
    assert torch.equal(run(model)[0], logits)
    add_hook_to_module(model.model.layers[1].mlp, ModelHook())  # moves the lean forward aside
    assert saved_bytes(model) == lean
    undo_lean(model)
    assert not is_lean(model)
    assert saved_bytes(model) == stock
    remove_hook_from_module(mlp)
    assert torch.equal(run(model)[0], logits)


def test_unknown_blocks_are_refused_by_name():
    config = MixtralConfig(vocab_size=31, hidden_size=24, intermediate_size=37, num_hidden_layers=1)
    config.num_attention_heads, config.num_key_value_heads, config.num_local_experts = 2, 1, 2
    model = MixtralForCausalLM(config)
    with pytest.raises(PacaError, match=r"MixtralDecoderLayer.*LlamaDecoderLayer"):
        make_lean(model)
    assert not is_lean(model)
    with pytest.raises(PacaError, match="none found"):
        make_lean(nn.Linear(2, 2))
    with pytest.raises(PacaError, match=r"torch\.nn\.modules\.transformer\.TransformerEncoderLayer"):
        make_lean(nn.TransformerEncoder(nn.TransformerEncoderLayer(4, 2), 2))


def test_a_subclass_of_a_known_block_is_unknown(tiny_model):
    model = tiny_model("llama")
    block = model.model.layers[1]
    block.__class__ = type("MyDecoderLayer", (type(block),), {})
    with pytest.raises(PacaError, match="MyDecoderLayer"):
        make_lean(model)
    assert not is_lean(model)


def test_unknown_parts_are_refused_and_the_model_left_alone(tiny_model):
    model = tiny_model("llama", hidden_act="tanh")
    with pytest.raises(PacaError, match=r"layers\.0.*Tanh.*silu"):
        make_lean(model)
    assert not is_lean(model)

    model = tiny_model("llama")
    model.model.layers[1].mlp.__class__ = type("OtherMLP", (type(model.model.layers[1].mlp),), {})
    with pytest.raises(PacaError, match=r"layers\.1.*OtherMLP"):
        make_lean(model)
    assert not is_lean(model)

    model = tiny_model("llama")
    norm = model.model.layers[1].input_layernorm
    norm.forward = lambda x: x
    with pytest.raises(PacaError, match="forward of its own"):
        make_lean(model)
    assert not is_lean(model)


def test_wrong_recompute_is_refused(tiny_model):
    with pytest.raises(PacaError, match=r"'attention'.*None or 'mlp'"):
        make_lean(tiny_model("llama"), "attention")


def test_opt_can_be_recomputed_only_where_nothing_is_left_to_drop(tiny_model):
    make_lean(tiny_model("opt"), "mlp")
    model = tiny_model("opt", activation_function="gelu")
    make_lean(model)
    with pytest.raises(PacaError, match=r"OPTDecoderLayer.*recompute=None"):
        make_lean(model, "mlp")
    assert is_lean(model)  # as it was


@pytest.mark.parametrize("recompute", RECOMPUTE)
def test_gemma3_with_its_vision_tower(recompute):
    shared = {"hidden_size": 24, "intermediate_size": 37, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {**shared, "vocab_size": 40, "head_dim": 10, "num_key_value_heads": 1, "pad_token_id": 0}
    vision = {**shared, "image_size": 8, "patch_size": 4}
    config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_id=39)
    torch.manual_seed(0)
    model = Gemma3ForConditionalGeneration(config).bfloat16().train()
    tokens = torch.tensor([[1, 39, 39, 39, 39, 2, 3]])
    pixels = torch.randn(1, 3, 8, 8).bfloat16()
    inputs = {"input_ids": tokens, "pixel_values": pixels, "token_type_ids": (tokens == 39).long()}

    def step() -> tuple[torch.Tensor, list[torch.Tensor]]:
        model.zero_grad()
        logits = model(**inputs, use_cache=False).logits
        logits.float().pow(2).mean().backward()
        return logits.detach(), [p.grad.clone() for p in model.model.vision_tower.parameters() if p.grad is not None]

    logits, stock = step()
    make_lean(model, recompute)
    lean_logits, lean = step()
    assert torch.equal(lean_logits, logits)
    for got, want in zip(lean, stock, strict=True):
        assert (got - want).norm() <= 0.05 * want.norm()


class OtherNorms:
    """Where `kernels` loads norms from; what they give is not what the model's own do."""

    def load(self):
        class Opposite(nn.Module):
            def forward(self, hidden_states):
                return -hidden_states

        return Opposite


puts_kernels = pytest.mark.skipif(
    not hasattr(PreTrainedModel, "reset_kernels"), reason="transformers < 5.25 puts no kernels on what it loads"
)


@puts_kernels
@pytest.mark.parametrize("wrapped", [False, True])
def test_a_loaded_model_stays_lean_in_both_modes(tiny_model, run, tmp_path, wrapped):
    # transformers puts kernels on a model that it loads, and again whenever its mode changes.
    kernels = pytest.importorskip("kernels")

    def lean_modules():
        return [name for name, module in whole.named_modules() if "forward" in vars(module)]

    tiny_model("llama").save_pretrained(tmp_path)
    expected, _ = run(AutoModelForCausalLM.from_pretrained(tmp_path))
    with kernels.use_kernel_mapping({"RMSNorm": {"cpu": OtherNorms()}}):
        model = AutoModelForCausalLM.from_pretrained(tmp_path)
        assert not torch.equal(run(model)[0], expected)
        whole = nn.Sequential(model) if wrapped else model
        make_lean(whole)
        lean = lean_modules()
        assert len(lean) == 2 * (1 + 1 + 2) + 1  # attention, MLP and norms of two blocks, and the last norm
        for mode in (True, False, True):
            whole.train(mode)
            assert lean_modules() == lean
        assert torch.equal(run(model)[0], expected)
        assert torch.equal(run(undo_lean(model))[0], expected)
        assert not model.use_kernels


@puts_kernels
def test_a_refused_model_keeps_its_kernels(tiny_model, run, tmp_path):
    kernels = pytest.importorskip("kernels")
    tiny_model("llama").save_pretrained(tmp_path)
    with kernels.use_kernel_mapping({"RMSNorm": {"cpu": OtherNorms()}}):
        model = AutoModelForCausalLM.from_pretrained(tmp_path)
        expected, _ = run(model)
        model.model.layers[1].mlp.forward = lambda x: x
        with pytest.raises(PacaError, match="forward of its own"):
            make_lean(model)
        del model.model.layers[1].mlp.forward
        assert torch.equal(run(model)[0], expected)
        assert model.use_kernels
