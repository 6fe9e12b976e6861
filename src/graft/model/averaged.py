# SPDX-License-Identifier: Apache-2.0
"""Whether the processes of a model in training go on holding one adapter: who averages its gradients, what it began as.

DDP, FSDP and DeepSpeed look at a model once, when they wrap it. Parameters that come later, or begin to train, train on
each process by itself, and nothing says so.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from graft.core.carrier import carried
from graft.core.containers import Slot
from graft.core.errors import DistributedError, PeftWarning, warn
from graft.core.wrappers import MANAGED
from graft.io.rendezvous import Note, processes
from graft.storage.flat import is_flat, trains
from graft.storage.parallel import layout_of, mastered

REMEDY = (
    "wrap the model again, or set all adapters trainable before wrapping "
    "(model.set_requires_grad([…]) of all their names) and find_unused_parameters=True"
)


def note_start(registry: Any, adapter: str) -> None:
    """Note for the other processes with which values an adapter begins."""
    if processes() > 1:
        held = tensors_of(registry, adapter)
        norms = torch.stack(torch._foreach_norm(held)).tolist() if held else []
        registry.starts[adapter] = Note(str([(tuple(t.shape), t.dtype) for t in held]), str(norms))


def check(registry: Any) -> None:
    """Check that the gradients of what trains will be averaged. Called at the first step after a change.

    Raises:
        DistributedError: those of a parameter will not be.
    """
    ddp = DistributedDataParallel._active_ddp_module
    registry.in_ddp = ddp is not None
    if processes() < 2:
        return
    found = list(slots_of_active(registry))
    trained = {name: slot.tensor for name, slot, _ in found if trains(slot.tensor)}
    if ddp is not None:
        owned = {id(p) for bucket in ddp.reducer._get_zeros_like_grad_buckets() for p in bucket.parameters()}
        refuse([n for n, p in trained.items() if id(p) not in owned], "DistributedDataParallel", REMEDY)
    still = [name for name, slot, wanted in found if wanted and is_flat(slot.tensor) and not trains(slot.tensor)]
    refuse(still, "FullyShardedDataParallel", f"{REMEDY}, or use_orig_params=True")
    if any([is_managed(layer.base_layer) for layer in registry.layers.values()]):
        late = [name for name, slot, _ in found if trains(slot.tensor) and is_late(slot)]
        refuse(late, "FSDP", "inject all adapters before fully_shard (or FullyShardedDataParallel)")
    kept = mastered([*registry.model.parameters(), *trained.values()])
    if kept:
        refuse([n for n, p in trained.items() if id(p) not in kept], "DeepSpeed", "call deepspeed.initialize again")
    if any([layout_of(slot.tensor) is not None or is_managed(slot.owner) for _, slot, _ in found]):
        compare_starts(registry)


def has_copies(registry: Any) -> bool:
    """Return True if each process is known to hold all of one adapter, which they train together."""
    if processes() < 2:
        return False
    return registry.in_ddp or bool(mastered(registry.model.parameters()))


def refuse(names: list[str], who: str, remedy: str) -> None:
    if names:
        raise DistributedError(
            f"{len(names)} parameters train that {who} did not see when it wrapped the model, such as '{names[0]}': "
            f"their gradients would not be averaged, and the processes would drift apart. After set_adapter(), "
            f"add_adapter() or set_requires_grad(): {remedy}."
        )


def compare_starts(registry: Any) -> None:
    """Warn if the processes drew other initial values for an active adapter, which a layout in parts mixes."""
    for adapter in registry.active_adapters:
        note = registry.starts.pop(adapter, None)
        others = [] if note is None else note.others()
        if others:
            warn(
                f"Adapter '{adapter}' began with other values on rank(s) {others} than on this one, and each process "
                "holds a part of it: a mixture that no seed gives again. Call torch.manual_seed() with one seed on "
                "all processes before the adapter is made, or have rank 0's values broadcast.",
                PeftWarning,
            )


def slots_of_active(registry: Any) -> Iterable[tuple[str, Slot, bool]]:
    """Yield the slots of active adapters that can train: name for errors, slot, whether the adapter is to train."""
    for carrier, name in carried(registry.carriers(), registry.active_adapters):
        for slot in carrier.slots(name):
            if slot.trains:
                yield f"{carrier.key}.{slot.container}.{name}", slot, name in carrier.state.trainable


def tensors_of(registry: Any, adapter: str) -> list[Tensor]:
    """Return the floating tensors of an adapter that have values."""
    slots = (s for carrier, name in carried(registry.carriers(), [adapter]) for s in carrier.slots(name))
    held = [s.tensor.detach() for s in slots if s.tensor.is_floating_point() and not s.tensor.is_meta]
    return [t for t in held if t.numel() and layout_of(t) is None]


def is_late(slot: Slot) -> bool:
    """Return True if FSDP does not know a parameter: its module is new, or other parameters there are in parts.

    That the parameter is whole says nothing: FSDP has put those together that its outermost unit has by now.
    """
    if not is_managed(slot.owner):
        return True
    others = [layout_of(p) is not None for p in slot.owner._parameters.values() if p is not None]
    return layout_of(slot.tensor) is None and any(others)


def is_managed(module: nn.Module) -> bool:
    return MANAGED in module.__dict__
