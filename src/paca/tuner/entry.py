"""The third door: what no optimizer's hook and no call has written is noticed when a model is entered.
It looks at the version counters of all layers. What no counter shows it looks for in a new mode, when averages and
schedule-free optimizers swap values through `.data`, in a step's closures, and while no optimizer's steps are seen.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import nn
from torch._dynamo.eval_frame import OptimizedModule, skip_code
from torch._dynamo.trace_rules import check as hooks_are_traced
from torch.nn.modules.module import register_module_module_registration_hook

from paca.columns.entry import SEEN_HERE, Entry
from paca.columns.resident import WRITING, write_together
from paca.columns.state import THREAD, may_be_recorded
from paca.columns.stepping import STEPPING, others_step
from paca.layers.base import PacaLayer, paca_layers
from paca.layers.mixed_batch import Running, current_mixed_batch, end_left_over


def write_layers(layers: list[PacaLayer], *, compare: bool = False) -> None:
    """Make the weights of many layers hold what is active."""
    if Running.count:  # in a mixed batch stacks of experts hold one adapter after the other
        layers = [layer for layer in layers if not layer.runs_adapters_in_turn or current_mixed_batch(layer) is None]
    jobs = [layer.job(compare=compare) for layer in layers]
    write_together(job for job in jobs if job is not None and not any(c.delta.is_meta for c in job[2]))


class ModelEntry(Entry):
    """What happens when the adapted model that has these layers is entered."""

    def __init__(self, layers: list[PacaLayer]) -> None:
        self.unwritten = False  # its own: compiled graphs have a guard on it
        self.take(layers)

    def take(self, layers: list[PacaLayer]) -> None:
        """Look after these layers from now on. Those whose weights hold no columns look for themselves as well."""
        self.mark = object()
        self.layers = [layer for layer in layers if layer.mode == "resident"]
        self.others = [layer for layer in layers if layer.mode != "resident"]
        for layer in layers:
            layer.base_layer.columns.entry = self
        self.seen = None

    @torch.compiler.disable(reason="weights of the adapted model are parked: call paca.refresh(model) before this call")
    def look(self, model: nn.Module) -> None:
        """Write what is stale, and find what no version counter shows. Reads only, if there is nothing."""
        if Running.batches:
            end_left_over()
        if sharded := self.sharded and [layer for layer in self.layers if not layer.base_layer.columns.whole]:
            sharded[0].base_layer.columns.entered(model, sharded)
        with WRITING:  # steps and writes of other threads wait
            if others_step(self.layers):  # a layer whose weight is parked waits for its end
                return
            mode = torch.is_grad_enabled(), model.training
            if changed := not self.seen == mode == SEEN_HERE.modes.get(self):
                self.seen, self.since, SEEN_HERE.modes[self] = mode, object(), mode
            # Before the look: a signal's handler that parks weights meanwhile makes each layer look itself, as here.
            self.unwritten = any(batch.entry is self for batch in Running.batches)
            try:
                every = [*self.layers, *self.others]
                untrusted = [one for one in every if mode[0] and not one.base_layer.columns.has_trust()]
                write_layers(every if changed or STEPPING else untrusted, compare=True)
                write_layers([layer for layer in self.layers if layer.stale()])
            except BaseException:
                self.unwritten, self.seen = True, None
                raise

    @torch.compiler.disable
    def _begin(self, model: nn.Module) -> None:
        self.leave(model, (), None)  # a pass that Ctrl-C ended: torch ran no hook then
        THREAD.passes.append((self.mark, may_be_recorded()))
        self.look(model)

    def enter(self, model: nn.Module, args: Any) -> None:
        """The forward pre-hook of the adapted model. Within a graph that is traced it only leaves a guard: whoever
        compiled a function around the model has it run outside of the graph when weights are parked."""
        if not torch.compiler.is_compiling():
            self._begin(model)
        elif self.unwritten:
            self.look(model)

    def leave(self, model: nn.Module, args: Any, output: Any) -> None:
        """The forward hook of the adapted model, also after an exception."""
        while not torch.compiler.is_compiling() and THREAD.passes and THREAD.passes[-1][0] is self.mark:
            del THREAD.passes[-1:]  # there may be none any more: a signal's handler ran the model

    def enter_compiled(self, holder: nn.Module, args: Any) -> None:
        """The forward pre-hook of the `PeftModel`, and of what `torch.compile` makes of a class of torch's own: it runs
        outside of the graph there, where those of the model within can't."""
        if torch.compiler.is_compiling():
            if self.unwritten:
                self.look(holder)
        elif isinstance(holder, OptimizedModule) or torch._C._dynamo.eval_frame.get_eval_frame_callback() is not None:
            self.look(holder)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.take([*self.layers, *self.others])  # a copied or unpickled model's own


# Dynamo neither compiles these hooks by themselves, nor leaves the graph when it traces a model that has them.
for hook in (ModelEntry.enter, ModelEntry.leave, ModelEntry.enter_compiled):
    skip_code(hook.__code__)


def install(model: nn.Module) -> None:
    """Let `model`, which has adapted layers, look when it is entered."""
    if (entry := entry_of(model)) is not None:
        entry.take(paca_layers(model))
        return
    entry = ModelEntry(paca_layers(model))
    model.register_forward_pre_hook(entry.enter, prepend=True)
    model.register_forward_hook(entry.leave, always_call=True)


def remove(model: nn.Module) -> None:
    """Undo `install`."""
    for hooks in (model._forward_pre_hooks, model._forward_hooks):
        for key in [key for key, hook in hooks.items() if isinstance(getattr(hook, "__self__", None), ModelEntry)]:
            hooks.pop(key).__self__.take([])  # type: ignore[attr-defined]  # a compiled holder may look on
            model._forward_hooks_always_called.pop(key, None)


def install_in_holder(tuner: nn.Module, model: nn.Module, refuse: Any) -> None:
    """Let the `PeftModel` whose constructor makes `tuner` look too (it may be compiled), or `refuse` it."""

    def found(holder: nn.Module, name: str, module: nn.Module) -> None:
        if module is waiting() and (entry := entry_of(model)) is not None:
            handle.remove()
            if hasattr(holder, "prepare_inputs_for_generation") and not hasattr(model, "prepare_inputs_for_generation"):
                refuse(module, model, holder)
            holder.register_forward_pre_hook(entry.enter_compiled, prepend=True)

    handle = register_module_module_registration_hook(found)
    waiting = weakref.ref(tuner, lambda _: handle.remove())


def _registered(parent: nn.Module, name: str, module: nn.Module) -> None:
    """Release a base layer that others put into its adapted layer's place by hand (diffusers' unload_lora_weights).
    Of a class of torch's own `torch.compile` traces the hooks too: there its wrapper looks, outside of the graph."""
    layer = parent._modules.get(name)
    if isinstance(layer, PacaLayer) and layer.base_layer is module and hasattr(module, "columns"):
        entry = module.columns.entry
        module.release()
        if entry is not None:
            entry.take([other for other in (*entry.layers, *entry.others) if other is not layer])
    elif isinstance(parent, OptimizedModule) and (entry := entry_of(module)) and hooks_are_traced(type(module).forward):
        parent.register_forward_pre_hook(entry.enter_compiled)


register_module_module_registration_hook(_registered)


def entry_of(model: nn.Module) -> ModelEntry | None:
    """The entry of an adapted model."""
    owners = (getattr(hook, "__self__", None) for hook in model._forward_pre_hooks.values())
    return next((owner for owner in owners if isinstance(owner, ModelEntry)), None)
