# SPDX-License-Identifier: Apache-2.0
"""AdapterLayer: a base layer and the adapters on it. The only place where Method, Op and Store meet."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from graft.core import merging
from graft.core.call import Call, Rows
from graft.core.errors import AdapterNotFoundError, PeftWarning, UnsupportedLayerError, warn
from graft.core.lean import ModuleDict, begin, lean
from graft.core.method import Method
from graft.core.ops import Op, is_stock
from graft.core.params import FACTS, BufferDict, Flag, Slot, Transient, container_for, slots_of
from graft.core.place import UPCAST, place_tensor
from graft.core.site import Site, Store
from graft.kernels.eager import eager, has_no_hooks


@lean
class AdapterLayer(nn.Module):
    """Runs `base_layer` with the active adapters.

    Containers such as `lora_A` are keyed by adapter, so that names in memory are PEFT's:
    `…q_proj.lora_A.default.weight`, `…q_proj.base_layer.weight`.
    """

    site: Site
    op: Op
    store: Store
    method: type[Method]
    order: Literal["in", "out"]  # in which the method acts on this layer type
    call: Call
    methods: dict[str, Method]  # by adapter
    in_features: int
    out_features: int
    fan_in: int
    _slots: dict[str, list[Slot]]  # by adapter, see `slots`
    additive: bool  # all adapters only add to the output
    output_is_new: bool  # the base layer's output may be overwritten
    scaling: dict[str, float]  # of methods that have one
    containers: list[str]
    holders: list[str]  # those of them that are modules
    trainable: set[str]  # adapters that require gradients
    attached: set[str]  # names of containers that belong to the model, not to this layer
    active_adapters: list[str]
    merged_adapters: list[str]
    disable_adapters: bool
    cast_input_dtype_enabled: bool = True  # adapters get their input in their own dtype
    _scaling_at_start: dict[str, float]
    _original: Any  # the base weight before an injection that is still under way
    _undo: list[tuple[str, Any, Any]]  # (kind, state of the weight, of the bias) of each merge
    _live: tuple[Method, ...]  # the methods that `forward` runs
    _folded: bool
    _joins: bool
    _replaced: bool
    _rewrites_input: bool
    _adds_output: bool
    _sees_call: bool
    _arguments: tuple[str, ...]  # names of the base layer's positional ones, where the method sees them

    def __init__(self, site: Site, method: type[Method], call: Call):
        begin(self)
        output_is_new = site.op.output_is_new and site.store.exact and is_stock(site.module)
        # past nn.Module.__setattr__, which would look for a parameter in each
        self.__dict__.update(
            site=site,
            op=site.op,
            store=site.store,
            method=method,
            order=method.acts(site),
            call=call,
            methods={},
            _slots={},
            in_features=site.in_features,
            out_features=site.out_features,
            fan_in=site.fan_in,
            containers=[],
            holders=[],
            trainable=set(),
            attached=set(),
            active_adapters=[],
            merged_adapters=[],
            disable_adapters=False,
            _scaling_at_start={},
            _original=None,
            _undo=[],
            _live=(),
            _folded=method.through_weight(site),
            additive=method.additive,
            output_is_new=output_is_new,
            _joins=method.joins,
            _replaced=method.replaces,
            _rewrites_input=method.rewrites_input,
            _adds_output=method.adds_output,
            _sees_call=method.sees_call,
            _arguments=tuple(inspect.signature(site.module.forward).parameters) if method.sees_call else (),
        )
        self._modules["base_layer"] = site.module
        self.__dict__["training"] = site.module.training

    @property
    def base_layer(self) -> Any:
        """Quicker than `nn.Module.__getattr__`, which would find it, too."""
        return self._modules["base_layer"]

    # adapters

    def add(self, adapter: str, values: dict[str, Any], method: type[Method] | None = None) -> Method:
        """Take in what `Method.build` declared for `adapter`. `method`: the variant that serves it, if it is one."""
        slots: list[Slot] = []
        own, modules, known = self.__dict__, self._modules, self.containers
        training = self.base_layer.training
        for key, value in values.items():
            if type(value) in FACTS:
                if key in known:
                    own[key][adapter] = value
                else:
                    own[key] = {adapter: value}
                    known.append(key)
                continue
            if isinstance(value, BufferDict):  # shared by the model: the container itself stands here
                if key not in modules:
                    self.add_module(key, value)
                    self.attached.add(key)
                continue
            if key not in known:
                self._open(key, value, training)
            container: Any = modules[key] if key in modules else own[key]
            if isinstance(value, nn.Module):
                container._modules[adapter] = value
                if not value._modules and not value._buffers:
                    value.__dict__["training"] = training
                    held = container._modules
                    for name, p in value._parameters.items():
                        if p is not None:
                            slots.append(Slot(key, name, value, name, True, True, held, value))
                else:
                    value.train(training)
                    slots += slots_of(key, container, adapter)
                continue
            container[adapter] = value.tensor if isinstance(value, Transient) else value
            slots += slots_of(key, container, adapter)
        if not self.methods:
            own.update({key: container for key, container in self.method.empty.items() if key not in modules})
        made = self.methods[adapter] = (method or self.method)(self, adapter)
        own["additive"] = self.additive and made.additive
        self._slots[adapter] = slots
        if "scaling" in values:
            self._scaling_at_start[adapter] = values["scaling"]
        return made

    def _open(self, key: str, value: Any, training: bool) -> None:
        """Make a container for values like this one."""
        container = container_for(value)
        self.containers.append(key)
        if isinstance(container, nn.Module):
            self.__dict__.pop(key, None)  # an empty one of `Method.empty`
            self._modules[key] = container
            self.holders.append(key)
            container.__dict__["training"] = training
        else:
            self.__dict__[key] = container

    def place(self, adapter: str, upcast: bool = True) -> int:
        """Move a new adapter to the base weight's device and dtype, half precision to float32 if `upcast`.

        It is frozen. Returns how many of its numbers can train.
        """
        device, dtype = self.store.where(self.base_layer)
        upcast = upcast and self.method.upcast
        widens = upcast and dtype in UPCAST
        size = -sum([p.numel() for p in self.methods[adapter].frozen()])
        for _, _, owner, attribute, trains, *_ in self._slots[adapter]:  # as they were just made
            t: Any = owner._parameters[attribute] if trains else owner._buffers[attribute]
            if trains:
                size += t.numel()
                t.requires_grad = False
            if widens or t.dtype != dtype or (t.device != device and not t.is_meta):
                place_tensor(owner, attribute, device, dtype, upcast)
        return size

    def delete_adapter(self, adapter: str, new_active_adapters: list[str] | None = None) -> None:
        """Forget `adapter`; if it was active, what `new_active_adapters` names is so now, else see `delete_from`."""
        delete_from(self, adapter, new_active_adapters)

    def forget(self, adapter: str) -> None:
        """Forget `adapter` and its tensors; an adapter that is merged must be unmerged before."""
        if adapter in self.merged_adapters:
            raise ValueError(
                f"Cannot delete adapter(s) ['{adapter}'] while they are merged. Please unmerge them first."
            )
        modules, own = self._modules, self.__dict__
        for key in self.containers:
            container: Any = modules.get(key)
            if container is None:
                own[key].pop(adapter, None)
            elif type(container) is ModuleDict:  # past its own methods, which take as long as all the rest
                container._modules.pop(adapter, None)
            elif adapter in container:
                del container[adapter]
        self.methods.pop(adapter, None)
        if not self.additive:
            own["additive"] = all(m.additive for m in self.methods.values())
        self._slots.pop(adapter, None)
        self.trainable.discard(adapter)
        self._scaling_at_start.pop(adapter, None)
        if adapter in self.active_adapters:
            own["active_adapters"] = [a for a in self.active_adapters if a != adapter]
            self.replan()

    def slots(self, adapter: str) -> list[Slot]:
        """Where its tensors stand now. Looked up again where a module has been replaced, pruned or parametrized."""
        slots = self._slots.get(adapter, [])
        for _, _, owner, attribute, trains, _, held, root in slots:
            if held.get(adapter) is not root or attribute not in (owner._parameters if trains else owner._buffers):
                break
        else:
            return slots
        if self._replaced and adapter in self.merged_adapters:  # its module and the base layer have changed places
            return list(slots_of(self.containers[0], ModuleDict({adapter: self.base_layer}), adapter))
        slots = [slot for key in self.holders for slot in slots_of(key, self._modules[key], adapter)]
        self._slots[adapter] = slots
        return slots

    def tensors(self, adapter: str, transient: bool = False) -> Iterator[tuple[str, str, nn.Module, str, Tensor]]:
        """(container, path below the adapter's name, owner, attribute, tensor) of all that a checkpoint holds.

        `transient`: also of buffers that it does not hold.
        """
        for slot in self.slots(adapter):
            if slot.saved or transient:
                yield slot.container, slot.path, slot.owner, slot.attribute, slot.tensor

    def parameters_of(self, adapter: str) -> Iterator[nn.Parameter]:
        for slot in self.slots(adapter):
            if slot.trains:
                yield slot.tensor  # type: ignore[misc]

    def require_grad(self, adapter: str, requires_grad: bool) -> None:
        if adapter not in self.methods:
            return
        frozen = [id(p) for p in self.methods[adapter].frozen()] if requires_grad else ()
        for p in self.parameters_of(adapter):
            p.requires_grad = requires_grad and id(p) not in frozen
        (self.trainable.add if requires_grad else self.trainable.discard)(adapter)

    def check_active(self, names: Sequence[str]) -> None:
        """Raise if these adapters cannot be active together here."""
        self.method.check_together([self.methods[n] for n in names if n in self.methods])

    def set_adapter(self, adapters: str | Sequence[str], inference_mode: bool = False) -> None:
        """Make `adapters` the active ones (in this order) and, unless for inference, the trainable ones."""
        names = [adapters] if isinstance(adapters, str) else list(adapters)
        if len(names) > 1:
            self.check_active(names)
        if self.merged_adapters and not (names == self.active_adapters and self.holds(names)):
            warn("Adapter cannot be set when the model is merged. Unmerging the model first.")
            self.unmerge()
        for name in self.trainable.difference(names):
            self.require_grad(name, False)
        for name in names:
            self.require_grad(name, not inference_mode)
        self.activate(names, not inference_mode)

    def activate(self, names: list[str], train: bool) -> None:
        """Make these the active ones; the caller sees to it that exactly they require gradients, if `train`."""
        own = self.__dict__
        methods = own["methods"]
        own["trainable"] = methods.keys() & names if train else set()
        own["active_adapters"] = names
        idle = own["disable_adapters"] or own["merged_adapters"]
        own["_live"] = () if idle else tuple([methods[n] for n in names if n in methods])

    def flags(self, adapter: str) -> list[Flag] | None:
        """Where the parameters stand that can train; None if that must be asked each time, by `require_grad`."""
        if adapter in self.methods and self.methods[adapter].frozen():
            return None
        slots = [slot for slot in self.slots(adapter) if slot.trains]
        if any(slot.held.get(adapter) is not slot.root for slot in slots):
            return None
        return [(slot.held, slot.root, slot.owner._parameters, slot.attribute) for slot in slots]

    def holds(self, names: list[str]) -> bool:
        """Whether what is merged is what these adapters do here, and nothing else."""
        return self.merged_adapters == [n for n in names if n in self.methods]

    def enable_adapters(self, enabled: bool) -> None:
        """Switch all adapters on or off. Switching off while merged unmerges."""
        if not enabled and self.merged_adapters:
            self.unmerge()
        self.__dict__["disable_adapters"] = not enabled
        self.replan()

    def replan(self) -> None:
        """Decide, once per change, what `forward` does."""
        own = self.__dict__  # setting an attribute of a module takes ten times as long
        methods = own["methods"]
        idle = own["disable_adapters"] or own["merged_adapters"]
        own["_live"] = () if idle else tuple([methods[n] for n in own["active_adapters"] if n in methods])

    # the base weight, changed by an initialisation

    def rewrite_base(self, W: Tensor) -> None:
        """Replace the base weight (canonical), so that `rollback` can put it back until `settle`."""
        base, name = self.base_layer, self.site.parameter
        why = None if self.site.on_meta else self.store.unread(base, name) or self.store.fixed(base, name)
        if why is not None:
            raise UnsupportedLayerError(
                f"{self.method.__name__} cannot be initialised from the weight of layer '{self.site.key}', which it "
                f"would change: {why}. Or choose another initialisation."
            )
        if self._original is None:
            self._original = self.store.snapshot(base, name, False)
        self.store.write(base, name, self.op.uncanon(W), False)

    def rollback(self) -> None:
        if self._original is not None:
            self.store.restore(self.base_layer, self.site.parameter, self._original)
        self._original = None

    def settle(self) -> None:
        self.__dict__["_original"] = None

    # forward

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.call.rows is not None and (rows := self.call.current()) is not None:
            return self._forward_rows(rows, *args, **kwargs)
        if not self._live:
            return self.base_layer(*args, **kwargs)
        if self._sees_call:
            return self._run_call(None, args, kwargs)
        return self._run(self._live, *args, **kwargs)

    def _run(self, live: tuple[Method, ...], x: Tensor, *args: Any, **kwargs: Any) -> Any:
        if self._replaced:
            return live[0].replacement()(x, *args, **kwargs)
        if self._folded:
            return self._run_folded(live, x)
        if self._rewrites_input:
            for m in live if self.order == "in" else reversed(live):
                x = m.pre(x).to(x.dtype)
        if not self._adds_output:
            return self.base_layer(x, *args, **kwargs)
        if (
            self._joins
            and not (args or kwargs)
            and self.may_fuse
            and not (torch.is_grad_enabled() and self.base_trains)
        ):
            y = live[0].join(x)
            if len(live) == 1:
                return y
            live = live[1:]
        else:
            y = self.store.protect(self.base_layer(x, *args, **kwargs))
        dtype = y.dtype
        for m in live:
            y = m.post(x, y)
        return y.to(dtype)

    @property
    def may_fuse(self) -> bool:
        """Whether the base layer's output may be written to, and its weight used past a call, now."""
        return self.output_is_new and eager() and has_no_hooks(self._modules["base_layer"])  # type: ignore[arg-type]

    @property
    def base_weight(self) -> Tensor:
        """Canonical."""
        return self.op.canon(self.store.read(self.base_layer, self.site.parameter))

    @property
    def base_trains(self) -> bool:
        b = getattr(self.base_layer, "bias", None)
        return self.base_weight.requires_grad or (b is not None and b.requires_grad)

    def effective_weight(self) -> Tensor:
        """The weight with the live adapters folded in, as the base layer stores it; gradients flow."""
        W = self.store.read(self.base_layer, self.site.parameter)
        if not self._live:
            return W
        W, b = self.op.canon(W), getattr(self.base_layer, "bias", None)
        for m in self._live if self.order == "out" else reversed(self._live):
            W, b = m.fold(W, b)
        return self.op.uncanon(W)

    def _run_folded(self, live: tuple[Method, ...], x: Tensor) -> Tensor:
        W = self.op.canon(self.store.read(self.base_layer, self.site.parameter))
        b = getattr(self.base_layer, "bias", None)
        out = W.dtype if self.op.takes_ids else x.dtype
        for m in live if self.order == "out" else reversed(live):
            W, b = m.fold(W.to(m.dtype), None if b is None else b.to(m.dtype))
            x = x if self.op.takes_ids else x.to(m.dtype)
        return self.op.call(self.base_layer, x, W, b).to(out)

    def _run_call(self, rows: Rows | None, args: tuple, kwargs: dict[str, Any]) -> tuple:
        """A module with several inputs: what adapters do, they do to the first item of what it returns."""
        y, *others = self.base_layer(*args, **kwargs)
        x = self.method.input_of(self.base_layer, {**dict(zip(self._arguments, args)), **kwargs})
        if rows is not None:
            return self._add_rows(rows, rows.take(x, self.site.key), y), *others
        for m in self._live:
            y = m.post(x, y)
        return y, *others

    def _forward_rows(self, rows: Rows, *args: Any, **kwargs: Any) -> Any:
        if self.disable_adapters:
            return self.base_layer(*args, **kwargs)
        if self._sees_call:
            return self._run_call(rows, args, kwargs)
        x, args = rows.take(args[0], self.site.key, self.op.takes_ids), args[1:]
        if len(rows.segments) == 1:
            m = self.methods.get(rows.segments[0][0])  # type: ignore[arg-type]
            return self.base_layer(x, *args, **kwargs) if m is None else self._run((m,), x, *args, **kwargs)
        if self.additive:
            return self._add_rows(rows, x, self.base_layer(x, *args, **kwargs))
        parts = []
        for adapter, index in rows.segments:
            m = self.methods.get(adapter)  # type: ignore[arg-type]
            part = x.index_select(0, index)
            if m is None:
                parts.append(self.base_layer(part, *args, **kwargs))
            else:
                parts.append(self._run((m,), part, *args, **kwargs))
        return torch.cat(parts).index_select(0, rows.inverse)

    def _add_rows(self, rows: Rows, x: Tensor, y: Tensor) -> Tensor:
        """y with each adapter's part added to the rows that use it."""
        y = self.store.protect(y)
        if y.is_leaf and y.requires_grad:
            y = y.clone()  # a hook made it so; it cannot be added to in place
        return self.method.add_rows(self, rows, x, y)

    # merging

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None, undoable: bool = True) -> None:
        """Write the adapters into the base weight, which then does their work alone.

        Args:
            safe_merge: check that the result is finite before anything is written.
            adapter_names: which ones; the active ones if None.
            undoable: keep what `unmerge` needs.

        Raises:
            ValueError: `safe_merge` found a value that is not finite, or adapters are disabled.
            NotImplementedError: the method, or the way the weight is stored, has no merged form.
        """
        names = [n for n in merging.not_merged(self, adapter_names) if n in self.methods]
        if names:
            merging.check(self, names, safe_merge, undoable)
            merging.merge(self, names, undoable)
            self.replan()

    def unmerge(self) -> None:
        """Take merged adapters out again: by subtraction where that is exact enough, else from a snapshot."""
        if not self.merged_adapters:
            warn("Already unmerged. Nothing to do.")
            return
        merging.unmerge(self)
        self.replan()

    # scaling

    def set_scale(self, adapter: str, scale: float) -> None:
        """Multiply the configured scaling of `adapter` by `scale`."""
        if adapter in self._scaling_at_start:
            self.scaling[adapter] = scale * self._scaling_at_start[adapter]
        elif adapter in self.methods:
            self._no_scaling()

    def scale_layer(self, scale: float) -> None:
        """Multiply the current scaling of the active adapters by `scale`."""
        self._rescale(lambda adapter: self.scaling[adapter] * scale, changes=scale != 1)

    def unscale_layer(self, scale: float | None = None) -> None:
        """Divide the current scaling of the active adapters by `scale`, or reset it."""
        start = self._scaling_at_start
        self._rescale(lambda a: start[a] if scale is None else self.scaling[a] / scale, changes=scale not in (None, 1))

    def _rescale(self, new: Any, changes: bool) -> None:
        for adapter in self.active_adapters:
            if adapter in self._scaling_at_start:
                self.scaling[adapter] = new(adapter)
            elif adapter in self.methods and changes:
                self._no_scaling()

    def _no_scaling(self) -> None:
        warn(
            f"Scaling has no meaning for {self.method.__name__} adapters (layer '{self.site.key}'): ignored.",
            PeftWarning,
        )

    # PEFT's names

    @property
    def weight(self) -> Tensor:
        return self.get_base_layer().weight  # type: ignore[return-value]

    @property
    def bias(self) -> Tensor | None:
        return self.get_base_layer().bias  # type: ignore[return-value]

    @property
    def fan_in_fan_out(self) -> bool:
        """Whether the base layer stores (in, out)."""
        return self.op.transposed and not self.op.takes_ids

    @property
    def adapters(self) -> list[str]:
        return list(self.methods)

    @property
    def quantization_backend(self) -> str | None:
        return None if self.store.name == "dense" else self.store.name

    @property
    def merged(self) -> bool:
        return bool(self.merged_adapters)

    @property
    def active_adapter(self) -> list[str]:
        """A list here and on the tuner; on a PeftModel a name."""
        return self.active_adapters

    @property
    def adapter_layer_names(self) -> tuple[str, ...]:
        """Containers of what trains, empty ones too; those that a variant of the method adds come last."""
        names = dict.fromkeys((*self.method.layer_names, *(n for m in self.methods.values() for n in m.layer_names)))
        return tuple(n for n in names if n in self._modules or n in self.__dict__)

    @property
    def other_param_names(self) -> tuple[str, ...]:
        return tuple(k for k in self.containers if k not in self.adapter_layer_names)

    @property
    def is_target_conv_1d_layer(self) -> bool:
        """Whether the base layer is transformers' Conv1D."""
        return self.site.type_name == "Conv1D"

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        for name in [adapter_names] if isinstance(adapter_names, str) else adapter_names:
            self.require_grad(name, requires_grad)

    def get_base_weight(self) -> Tensor:
        """As the base layer stores it, dense."""
        return self.store.read(self.get_base_layer(), self.site.parameter)

    def get_base_layer(self) -> nn.Module:
        base = self.base_layer
        while isinstance(base, AdapterLayer):
            base = base.base_layer
        return base

    def get_delta_weight(self, adapter: str) -> Tensor:
        """ΔW of `adapter` in the orientation that the base layer stores."""
        if adapter not in self.methods:
            raise AdapterNotFoundError(f"Adapter {adapter} not found on layer '{self.site.key}'.")
        return self.op.uncanon(self.methods[adapter].delta())

    def _get_name(self) -> str:
        return f"{self.method.__module__.removeprefix('graft.methods.').split('.')[0]}.{self.type_name}"

    @property
    def type_name(self) -> str:
        """PEFT's class name for this kind of layer."""
        return "Linear" if self.site.type_name == "Conv1D" else self.site.type_name

    def extra_repr(self) -> str:
        return f"adapters={list(self.methods)}, active={self.active_adapters}"


def delete_from(part: Any, adapter: str, new: list[str] | None = None) -> None:
    """Delete `adapter` from one layer or wrapper. If it was active, the others that were stay so; if there are none,
    those in `new` become so, or the first (by name) that is left."""
    was_active = adapter in part.active_adapters
    part.forget(adapter)
    if not was_active:
        return
    left = list(part.active_adapters)
    if new is not None:
        left = new
    elif not left and part.adapters:
        left = sorted(part.adapters)[:1]
        warn(f"Adapter {adapter} was active which is now deleted. Setting active adapter to {left[0]}.")
    part.set_adapter(left)
