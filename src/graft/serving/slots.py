# SPDX-License-Identifier: Apache-2.0
"""AdapterSlots: a model that serves many LoRA, DoRA and IA3 adapters, any mix of them in one batch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from threading import get_ident
from typing import Any

import torch
from torch import Tensor, nn

from graft import (
    AdapterNotFoundError,
    AlreadyInjectedError,
    CheckpointError,
    ConfigError,
    InUseError,
    LoraConfig,
    PeftConfig,
    RoutingError,
    UnsupportedLayerError,
    get_peft_model_state_dict,
    method_of,
)
from graft.core.errors import join_some
from graft.core.gate import PATIENCE, Gate
from graft.core.rows import BASE, count_copies
from graft.inject.inject import Injection
from graft.inject.parts import check_adapter_name, check_no_pieces, find_gate, get_config, get_gate, get_registry
from graft.io.files import READING, LoadedWeights, read_checkpoint
from graft.serving.fits import A_, KnownAdapter, SlotFactors, check_config, fit_adapter, group_by_layer
from graft.serving.layer import NONE, VECTORS, SlotChoice, SlotLayer, move_to_devices

ValuesRead = Mapping[str, tuple[KnownAdapter, dict[str, SlotFactors]]]  # by name, with the adapter as it was then
TAKEN = "Choose another name, or unload() it first."


@dataclass
class SlotReport:
    """The report of slots: their adapters, and the memory that they take.

    Attributes:
        resident: slot by adapter, the least recently used one first.
        known: all adapters, in slots or not.
        slot_bytes: of all slots and the one of zeros.
        gathered_bytes: factors of the last mixed batch's rows, for its next step.
        host_bytes: adapters in host memory.
    """

    max_adapters: int
    max_rank: int
    layers: int
    resident: dict[str, int]  # slot by adapter, the least recently used one first
    pinned: list[str]
    known: list[str]  # all adapters, in slots or not
    bytes_per_slot: int
    slot_bytes: int  # bytes of all slots and the one of zeros
    gathered_bytes: int  # factors of the last mixed batch's rows, for its next step
    host_bytes: int  # adapters in host memory

    def __str__(self) -> str:
        """Return two lines: the numbers of slots in use, pinned and known adapters, layers and the highest rank; then
        the sizes in MB of 10^6 bytes.
        """
        mb = 1e6
        return (
            f"{len(self.resident)} of {self.max_adapters} slots in use ({len(self.pinned)} pinned), {len(self.known)} "
            f"adapters known; {self.layers} layers, rank ≤ {self.max_rank}\n"
            f"slots {self.slot_bytes / mb:.1f} MB ({self.bytes_per_slot / mb:.2f} MB each), gathered rows "
            f"{self.gathered_bytes / mb:.1f} MB, host {self.host_bytes / mb:.1f} MB"
        )


class AdapterSlots:
    """A model with slots for LoRA adapters on its linear layers, with gains for DoRA and IA3, too. For inference.

    `load` puts an adapter into host memory. Adapters that a batch needs move into slots, and replace the least recently
    used ones. Buffers never change their shape or place: torch compiles a model once, whatever adapters are used. Any
    number of threads may run batches at once, each with its rows: their adapters stay in slots, and a batch waits if
    all slots are in use.

    Args:
        model: a model without adapters. It changes in place; `remove` undoes that.
        max_adapters: how many adapters one batch, and the device, can hold. Or slots by rank, as {8: 90, 64: 10}: an
            adapter gets one of the smallest rank that is enough.
        max_rank: the highest rank of an adapter; zeros fill up smaller ones. With slots by rank it is theirs.
        targets: as `target_modules`: names, one regex, "all-linear", or None for the architecture's default.
        exclude: as `exclude_modules`.
        gains: make room for vectors of inputs and outputs, which DoRA and IA3 need.
        dtype: of the slots; None: as in `PeftModel.from_pretrained`, float32 for a half-precision base.
        keep_gathered: without compiler, keep the factors of a mixed batch's rows from its second forward on, until the
            mix changes. That takes rows × bytes_per_slot of memory in each thread, and saves a copy for every token.
        change_timeout: seconds that a batch waits for slots, and `unload` and `remove` for batches, before they raise
            InUseError; None: without limit.

    Raises:
        NoMatchingPeftModuleError, UnsupportedLayerError, AlreadyInjectedError, ConfigError: nothing has changed.
    """

    def __init__(
        self,
        model: nn.Module,
        max_adapters: int | Mapping[int, int],
        max_rank: int | None = None,
        targets: str | list[str] | set[str] | None = None,
        *,
        exclude: str | list[str] | set[str] | None = None,
        dtype: torch.dtype | None = None,
        gains: bool = False,
        keep_gathered: bool = True,
        change_timeout: float | None = PATIENCE,
    ):
        """Find the target layers as an injection of LoRA would, allocate their slots, and replace the layers in the
        model.

        Of a model that torch.compile has wrapped, the layers are found and replaced in `_orig_mod`.

        Raises:
            AlreadyInjectedError: the model carries adapters. It is checked after the targets have been found.
            Other errors: as `count_slots_by_rank`, `Injection.find` and `check_sites`. The model changes only after all
                slots have been allocated.
        """
        sizes = count_slots_by_rank(max_adapters, max_rank)
        config = LoraConfig(target_modules=targets, exclude_modules=exclude, r=max(sizes))
        injection = Injection(getattr(model, "_orig_mod", model), config, method_of("LORA"), "slots").find()
        carrying = [*injection.tree.layers, *injection.tree.wrappers]
        if carrying:
            raise AlreadyInjectedError(
                f"The model carries adapters already, on {join_some(carrying, 2)}: unload() them, or pass the base "
                "model."
            )
        sites = {key: method.site for key, method in injection.methods.items()}
        check_sites(sites)
        self._allocate(sites, sizes, change_timeout, keep_gathered, dtype, gains)
        self._attach(model, injection)

    def _allocate(
        self, sites: Mapping[str, Any], sizes: dict[int, int], change_timeout: float | None, *options: Any
    ) -> None:
        """Allocate the slots of these sites and set all fields.

        The model does not change; memory may run out. Slots are numbered from 1, by rising rank; of a rank the lowest
        free one is taken first. Slot 0 is the one of zeros.

        Args:
            options: `keep`, `dtype` and `gains` of each SlotLayer.
        """
        self.sizes, self.max_adapters, self.max_rank = sizes, sum(sizes.values()), max(sizes)
        first = next(iter(sites.values()))
        with torch.inference_mode(False):
            self._fills = [0]
            self._choice = SlotChoice(first.weight.where()[0], self._fills)
            self.layers = {key: SlotLayer(site, sizes, self._choice, *options) for key, site in sites.items()}
        self._known: dict[str, KnownAdapter] = {}
        self._leaving: set[str] = set()  # no longer known; `unload` waits for their batches
        self._slots: dict[str, int] = {}  # by adapter, the least recently used one first
        self._pinned: set[str] = set()
        self.gate = Gate(change_timeout)  # its `state_changed` guards the fields below
        self._using: dict[int, list[str | tuple[str, ...]]] = {}  # the names chosen by open `using` blocks, by thread
        self._line: list[object] = []  # requests that wait for slots, the first one first
        self._ranks: dict[str, int] = {}  # of an adapter's slot, in or out of it
        self._free: dict[int, list[int]] = {}  # slots, by rank
        self._rank_of = [0, *(rank for rank, n in self.sizes.items() for _ in range(n))]  # by slot
        for slot in range(self.max_adapters, NONE, -1):
            self._free.setdefault(self._rank_of[slot], []).append(slot)

    def _attach(self, model: nn.Module, injection: Injection) -> None:
        """Replace the target modules that an injection has found by the layers with slots, in all their places.

        Each layer gets the mode of its base layer. The model and its tree of modules are noted for `remove`.
        """
        self.model, self._tree = model, injection.tree
        for key, layer in self.layers.items():
            layer.training = layer.base_layer.training
            self._tree.attach(key, layer)

    @classmethod
    def of(
        cls,
        source: Any,
        names: str | Sequence[str] | None = None,
        *,
        max_adapters: int | Mapping[int, int] | None = None,
        max_rank: int | None = None,
        dtype: torch.dtype | None = None,
        gains: bool = False,
        keep_gathered: bool = True,
        change_timeout: float | None = PATIENCE,
    ) -> AdapterSlots:
        """Serve adapters that are on a model: its base gets slots instead, without a file or a second base.

        All adapters are removed from the source.

        Args:
            source: a PeftModel, or a MultiTrain, such as `sweep.runs`.
            names: of the adapters to load; None: all.
            max_adapters, max_rank: None: as many and as high as these need.
            dtype, gains, keep_gathered, change_timeout: as of AdapterSlots.

        Raises:
            AdapterNotFoundError: there is no such adapter, or none at all.
            InUseError: calls of the model last longer than its `change_timeout`.
            RuntimeError: another thread is in a step of the MultiTrain.
            ConfigError: any adapter of the source is merged, or there is no slot, or `max_rank` is below the ranks of
                these.
            ConfigError, AdapterKeyError, CheckpointError, UnsupportedLayerError: slots cannot hold one of them. In all
                cases, also if memory is short, the adapters are where they were.
        """
        model: nn.Module = source if isinstance(source, nn.Module) else source.model
        with ExitStack() as still:
            if source is not model:
                still.enter_context(source.lock_steps())
            if model is not None:
                still.enter_context(get_gate(model).change("AdapterSlots.of()"))
            configs = {} if model is None else model.peft_config
            names = list(configs) if names is None else [names] if isinstance(names, str) else list(names)
            absent = [name for name in names if name not in configs]
            if absent or not names:
                known = join_some(list(configs)) if configs else "none"
                raise AdapterNotFoundError(
                    f"There is no adapter {join_some(absent) if absent else 'to serve'}. Known: {known}."
                )
            if merged := get_registry(model).merged_adapters:
                raise ConfigError(f"Adapters {join_some(merged)} are merged into the base. Call unmerge_adapter().")
            adapters = {name: (configs[name], get_peft_model_state_dict(model, None, name)) for name in names}
            ranks, targets = [1], dict[str, None]()
            for name, (config, tensors) in adapters.items():
                check_config(name, config, gains)
                layers = group_by_layer(name, tensors, config)
                if wrong := [key for key, below in layers.items() if any(t.dim() > 2 for t in below.values())]:
                    raise ConfigError(
                        f"Adapter '{name}' does not fit: {join_some(wrong)} are not linear, so that they have no "
                        "slots. Leave it out."
                    )
                if broken := [key for key, t in tensors.items() if not t.isfinite().all()]:
                    raise CheckpointError(f"Adapter '{name}' does not fit: {join_some(broken)} are not finite.")
                ranks += [below[A_].shape[0] for below in layers.values() if A_ in below]
                targets |= dict.fromkeys(layers)
            sites = {key: layer.site for key, layer in get_registry(model).layers.items() if key in targets}
            check_sites(sites)
            n = len(names) if max_adapters is None else max_adapters
            rank = max(ranks) if max_rank is None and not isinstance(n, Mapping) else max_rank
            slots, sizes = cls.__new__(cls), count_slots_by_rank(n, rank)
            if max(sizes) < max(ranks):
                raise ConfigError(f"Adapters need max_rank={max(ranks)}, got {max(sizes)}. Pass a higher one.")
            slots._allocate(sites, sizes, change_timeout, keep_gathered, dtype, gains)
            base = source.unload() if source is not model else source.unload(keep_modules=False)
        inner, lora = getattr(base, "_orig_mod", base), method_of("LORA")
        slots._attach(base, Injection(inner, LoraConfig(), lora, "slots", keys=[*slots.layers]).find())
        for name, (config, tensors) in adapters.items():
            slots.load(name, tensors, config=config)
        return slots

    # adapters

    def load(
        self,
        name: str,
        source: object,
        *,
        config: PeftConfig | None = None,
        adapter: str = "default",
        keep: bool = True,
        allow_nonfinite: bool = False,
        **hub: object,
    ) -> None:
        """Make an adapter known.

        Checked in this order: the slots, the name, the options, `keep`, then the source as it is read. The name is
        checked once more at the end.

        It takes a slot when a batch needs it, or with `pin`: one of the smallest rank that is enough.

        Args:
            source: a folder or hub repository; a state dict, with its `config`; or a PeftModel, with the name of its
                `adapter`.
            keep: keep it in host memory; else read it again whenever it gets a slot (from a folder only).
            allow_nonfinite: load NaN and infinite numbers, too.
            **hub: `subfolder`, `revision`, `token`, …; `check_digest=False` loads a file even if its tensors were
                changed after saving.

        Raises:
            AdapterNameError: the name is taken (while `unload` waits for its batches, too), or cannot be one.
            ConfigError, AdapterKeyError, BaseModelMismatchError: it does not fit: its method, ranks or targets.
                ConfigError also if a state dict has no config, or `keep=False` has no folder.
            CheckpointError: the folder holds no adapter, or its files are damaged.
            RoutingError: the slots were removed from the model.
            TypeError: an option is unknown.
        """
        self._check_known([])
        check_adapter_name(name, [*self._known, *self._leaving], TAKEN)
        if unknown := set(hub) - (READING - {"expert_layout"}):
            raise TypeError(f"load() got unexpected keyword arguments: {', '.join(sorted(unknown))}.")
        if not keep and isinstance(source, (nn.Module, Mapping)):
            raise ConfigError(f"Adapter '{name}': keep=False reads it again from a folder. Pass a folder, or keep it.")

        def read() -> dict[str, SlotFactors]:
            """Read the adapter and return its factors by layer, checked against the slots and without gradients.

            If the source is a model, the read counts as a call of it, so that its adapters stay unchanged meanwhile.
            """
            gate = find_gate(source) if isinstance(source, nn.Module) else None
            with nullcontext() if gate is None else gate.call(f"AdapterSlots.load({name!r})"):
                cfg, loaded = self._read_source(name, source, config, adapter, hub)
                with torch.inference_mode(False), torch.no_grad():
                    return fit_adapter(name, cfg, loaded, self.layers, self.max_rank, self.model, allow_nonfinite)

        factors = read()
        with self.gate.state_changed:
            check_adapter_name(name, [*self._known, *self._leaving], TAKEN)
            self._known[name] = KnownAdapter(factors, None) if keep else KnownAdapter(None, read)
            needed = find_highest_rank(factors)
            self._ranks[name] = min(rank for rank in self.sizes if rank >= needed)

    def _read_source(
        self, name: str, source: Any, config: PeftConfig | None, adapter: str, hub: dict[str, Any]
    ) -> tuple[PeftConfig, LoadedWeights]:
        """Return config and tensors of an adapter.

        The source is a model, a state dict, or a folder or name on the hub. Of a model the adapter `adapter` is read,
        with that one's config unless `config` is given.

        A compiled model is unwrapped. Tensors of a state dict are not copied.

        Raises:
            ConfigError: there is no config, or its method is unknown.
            And the errors of reading a folder.
        """
        if isinstance(source, nn.Module):
            source = getattr(source, "_orig_mod", source)
            loaded = LoadedWeights(get_peft_model_state_dict(source, None, adapter), "the model")
            config = config or get_config(source, adapter)
        elif isinstance(source, Mapping):
            loaded = LoadedWeights.from_state_dict(source)
        else:
            try:
                config, loaded = read_checkpoint(source, hub, lambda _: None, config)
            except NotImplementedError as e:
                raise ConfigError(f"Adapter '{name}' does not fit: {e}") from e
        if config is None:
            raise ConfigError(f"Adapter '{name}' comes without its config, which has its scaling. Pass `config`.")
        return config, loaded

    def unload(self, name: str) -> None:
        """Forget an adapter, and free its slot and host memory, once no batch of another thread uses it.

        New batches cannot name it from now on. It is unpinned, and threads that wait for slots are woken.

        Raises:
            RoutingError: it is unknown, or an open `using` block of this thread uses it.
            InUseError: batches of other threads use it for longer than `change_timeout`. It stays.
        """
        with self.gate.state_changed:
            self._check_known([name], base=False)
            if name in self._list_in_use(get_ident()):
                raise RoutingError(f"Adapter '{name}' is in use. Leave the `using` block first.")
            known = self._known.pop(name)
            self._leaving.add(name)
            try:
                self._wait(lambda: name not in self._list_in_use(), f"unload({name!r})")
            except BaseException:
                self._known[name] = known
                raise
            finally:
                self._leaving.discard(name)
            self._pinned.discard(name)
            if name in self._slots:
                slot = self._slots.pop(name)
                self._free[self._rank_of[slot]].append(slot)
            self.gate.state_changed.notify_all()

    def pin(self, *names: str) -> None:
        """Put adapters into slots, and add them to `_pinned`, so that they stay there until `unpin`.

        Waits for slots that other threads use. Files are read under the gate's lock.

        Raises:
            RoutingError: the slots were removed; one is unknown, or "__base__"; or there are more than slots.
            InUseError: batches of other threads use the slots for longer than `change_timeout`.
        """
        with self.gate.state_changed:
            self._check_known(names, base=False)
            self._assign_slots(names, {})
            self._pinned |= set(names)

    def unpin(self, *names: str) -> None:
        """Take adapters out of `_pinned`, so that others may take their slots, and wake threads that wait for slots.

        One that is not pinned is passed over.

        Raises RoutingError if the slots were removed, or for an unknown name, also "__base__".
        """
        with self.gate.state_changed:
            self._check_known(names, base=False)
            self._pinned -= set(names)
            self.gate.state_changed.notify_all()

    @property
    def names(self) -> list[str]:
        """All known adapters."""
        return list(self._known)

    def __contains__(self, name: str) -> bool:
        return name in self._known

    # slots

    def _check_known(self, names: Sequence[str], base: bool = True) -> None:
        """Raise RoutingError if the slots were removed, or for unknown names. With `base`, "__base__" is allowed."""
        if not self.layers:
            raise RoutingError("The slots were removed from the model. Make new ones to serve adapters again.")
        unknown = sorted({n for n in names if n not in self._known and not (base and n == BASE)})
        if unknown:
            raise RoutingError(
                f"Unknown adapter(s): {', '.join(unknown)}. Known are "
                f"{join_some(self.names) if self._known else 'none'}."
            )

    def _list_in_use(self, thread: int | None = None) -> set[str]:
        """Return the adapters that open `using` blocks have chosen, of one thread, or with None of all threads that are
        in a call. "__base__" is left out.
        """
        threads = list(self.gate.calls) if thread is None else [thread]
        blocks = [chosen for t in threads for chosen in self._using.get(t, ())]
        return {n for chosen in blocks for n in ([chosen] if isinstance(chosen, str) else chosen)} - {BASE}

    def _wait(self, ready: Callable[[], bool], what: str) -> None:
        """Wait until `ready` returns True, as other threads' batches end.

        Raises InUseError, with the running batches, after `change_timeout`.
        """
        if not self.gate.state_changed.wait_for(ready, self.gate.timeout):
            running = "; ".join(map(str, list(self.gate.calls.values()))) or "none"
            raise InUseError(
                f"{what} waited {self.gate.timeout:g} s for batches of other threads: {running}. Make more slots "
                f"(max_adapters, now {self._size_text}), unpin adapters, or wait longer (change_timeout)."
            )

    def _assign_slots(self, names: Sequence[str], read: ValuesRead) -> None:
        """Put these adapters into slots; "__base__" and repeated names are left out.

        Waits until other threads' batches leave enough slots; requests are served in order. A thread that uses slots
        already does not wait in line. At the end, also after an error, other waiting threads are woken.

        Args:
            read: values that have been read before.

        Raises:
            RoutingError: there are not so many slots besides pinned ones and those that this thread uses, or an adapter
                was unloaded meanwhile. Nothing has changed.
            InUseError: it waited longer than `change_timeout`.
        """
        wanted = [n for n in dict.fromkeys(names) if n != BASE]
        in_use = self._list_in_use(get_ident())
        if not self._is_room_for({*wanted, *self._pinned, *in_use}):
            busy = sorted((self._pinned | in_use) - set(wanted))
            also = f" beside {join_some(busy)}, which are pinned or in use" if busy else ""
            raise RoutingError(
                f"{len(wanted)} adapters are needed at once{also}, but max_adapters is {self._size_text}. Split the "
                f"batch, or make more slots. Needed: {join_some(wanted)}."
            )
        turn = object()

        def ready() -> bool:
            """Return True if it is the turn of this batch, and its adapters have slots together with those pinned or in
            use.
            """
            first = turn not in self._line or self._line[0] is turn
            return first and self._is_room_for({*wanted, *self._pinned, *self._list_in_use()})

        if not in_use:  # those who use slots already do not wait in line: others may wait for them
            self._line.append(turn)
        try:
            if wanted:
                self._wait(ready, f"A batch of {join_some(wanted)}")
            self._check_known([n for n in wanted if n not in in_use])
            self._fill_slots(wanted, read)
        finally:
            if turn in self._line:
                self._line.remove(turn)
            self.gate.state_changed.notify_all()

    def _is_room_for(self, names: set[str]) -> bool:
        """Return True if there are slots for all of these at once, by rank.

        Names without a rank, such as "__base__", need none.
        """
        needed = Counter(self._ranks[name] for name in names if name in self._ranks)
        return all(n <= self.sizes[rank] for rank, n in needed.items())

    @property
    def _size_text(self) -> str:
        """The number of slots as text; by rank, if there are several ranks.

        With several ranks it is the text of the dict from rank to number of slots, as {8: 4, 16: 2}.
        """
        return str(self.sizes if len(self.sizes) > 1 else self.max_adapters)

    def _fill_slots(self, wanted: Sequence[str], read: ValuesRead) -> None:
        """Write missing adapters into slots of their rank: free ones, else those of the least recently used adapters
        that are neither pinned nor in use. All become the most recently used.

        The values of all are read before the first is written. If writing fails, the slot is free, the adapter that had
        it stays out, and the error is raised.
        """
        fixed = self._pinned | self._list_in_use() | set(wanted)
        missing = [n for n in wanted if n not in self._slots]
        values = {n: self._get_values(n, read.get(n)) for n in missing}
        for name in missing:
            rank = self._ranks[name]
            free = self._free[rank]
            leaving = (n for n, slot in self._slots.items() if n not in fixed and self._rank_of[slot] == rank)
            slot = free.pop() if free else self._slots.pop(next(leaving))
            try:
                self._write_slot(slot, values[name])
            except BaseException:  # such as a lack of memory
                free.append(slot)
                raise
            self._slots[name] = slot
        for name in wanted:
            self._slots[name] = self._slots.pop(name)  # now the most recently used

    def _read_files(self, names: Sequence[str]) -> ValuesRead:
        """Return the values of those adapters that are neither in host memory nor in slots: name → (the KnownAdapter,
        its factors by layer).

        Unknown names are skipped. Files are read without holding other threads.
        """
        absent = [(n, self._known.get(n)) for n in dict.fromkeys(names) if n not in self._slots]
        return {n: (known, known.read()) for n, known in absent if known is not None and known.read is not None}

    def _get_values(
        self, name: str, read: tuple[KnownAdapter, dict[str, SlotFactors]] | None
    ) -> dict[str, SlotFactors]:
        """Return an adapter's values: those read before, unless another adapter has the name since; else from host
        memory or files.

        Raises:
            ConfigError: its folder now holds a higher rank than its slots have.
        """
        known = self._known[name]
        values = read[1] if read is not None and read[0] is known else known.factors or known.read()  # type: ignore[misc]
        rank = find_highest_rank(values)
        if rank > self._ranks[name]:
            raise ConfigError(
                f"Adapter '{name}' has rank {rank} in its folder by now, and had a slot of rank {self._ranks[name]}. "
                "Call unload(), and load it again."
            )
        return values

    def _write_slot(self, slot: int, factors: dict[str, SlotFactors]) -> None:
        """Write an adapter's values into a slot of each layer, in place, with B times its scaling.

        Rows above its rank become zeros, and so does the whole slot of layers that it lacks.

        Where layers have gains, vectors that it lacks become ones, shifts zeros, and `gained` notes if the slot has any
        vector. Factors kept for mixes are dropped. The number of fills rises by one.
        """
        targets, values, scaled, scalings, empty = [], [], [], [], []
        for key, layer in self.layers.items():
            (A, B), f = layer.get_factors(slot), factors.get(key)
            r = 0 if f is None else f.A.shape[0]
            if f is not None:
                targets += [A[:r], B[:r]]
                values += [f.A, f.B]
                scaled.append(B[:r])
                scalings.append(f.scaling)
            if r < A.shape[0]:
                empty += [A[r:], B[r:]]
            if layer.has_gains:
                layer.gained.discard(slot)
                for name, neutral in VECTORS.items():
                    value, to = getattr(f, name, None), getattr(layer, name)[slot]
                    if value is None:
                        to.fill_(neutral)
                    else:
                        targets.append(to)
                        values.append(value)
                        layer.gained.add(slot)
        with torch.inference_mode(False), torch.no_grad():
            torch._foreach_copy_(targets, move_to_devices(values, [t.device for t in targets]))
            torch._foreach_mul_(scaled, scalings)
            if empty:
                torch._foreach_zero_(empty)
        self._fills[0] += 1
        self._choice.gathered.clear()

    # serving

    @contextmanager
    def using(self, names: str | Sequence[str]) -> Iterator[nn.Module]:
        """Run the model with these adapters within the block: `with slots.using([…]): model(…)`. Yields the model.

        The block is a call of the model's gate, so that changes wait for it. The steps are:

        - The gate's call begins.
        - Names are checked, but for those that this thread's open blocks use.
        - Files are read.
        - It waits for slots that other threads use, and fills them.

        Blocks may be nested, and belong to the thread; at the end the choice of the outer block is set again, or the
        base.

        Args:
            names: one adapter for all rows, or a list with one for each row; "__base__" means none.

        Raises:
            RoutingError: no name is given, which is checked first; the slots were removed; an adapter is unknown; or
                there are more than `max_adapters`.
            InUseError: other threads' batches use the slots for longer than `change_timeout`.
        """
        chosen = names if isinstance(names, str) else tuple(names)
        if not chosen:
            raise RoutingError("No adapter is named. Pass one for each row, or '__base__'.")
        each = [chosen] if isinstance(chosen, str) else chosen
        with self.gate.call("a batch of slots", lambda: each):
            thread = get_ident()
            in_use = self._list_in_use(thread)  # `unload` may wait for them already
            self._check_known([n for n in each if n not in in_use])
            read = self._read_files(each)
            with self.gate.state_changed:
                self._assign_slots(each, read)
                blocks = self._using.setdefault(thread, [])
                blocks.append(chosen)
                slots = self._slots_of(chosen)
            try:
                self._set_choice(slots)
                yield self.model
            finally:
                with self.gate.state_changed:
                    blocks.pop()
                    if not blocks:
                        del self._using[thread]
                    slots = self._slots_of(blocks[-1] if blocks else BASE)
                    self.gate.state_changed.notify_all()
                self._set_choice(slots)

    def _slots_of(self, chosen: str | tuple[str, ...]) -> int | list[int]:
        """Return the slot of all rows, or of each; 0 for names without a slot.

        Call it with the gate held, since other threads move adapters.
        """
        if isinstance(chosen, str):
            return self._slots.get(chosen, NONE)
        return [self._slots.get(n, NONE) for n in chosen]

    def _set_choice(self, slots: int | list[int]) -> None:
        """Write this thread's choice: one slot for all rows, or one for each."""
        with torch.inference_mode(False):
            if isinstance(slots, int):
                self._choice.set_all_rows(slots)
            else:
                self._choice.set_rows(slots, next(iter(self.layers.values())).A.device)

    def __call__(self, *args: object, adapter_names: str | Sequence[str] | None = None, **kwargs: object) -> Any:
        """Run the model's forward.

        Args:
            adapter_names: as in `using`; None: those of the `using` block around the call, or no adapter.

        Raises:
            RoutingError: as `using`, or the number of names is not that of rows.
        """
        with self.using(self._name_rows(adapter_names, args, kwargs)):
            return self.model(*args, **kwargs)

    def generate(self, *args: object, adapter_names: str | Sequence[str] | None = None, **kwargs: object) -> Any:
        """Run the model's generate within a `using` block.

        `adapter_names` as in a call, None for those of an outer block or the base; beams and samples of a row share its
        adapter.

        Raises:
            RoutingError: rows of an encoder-decoder have several adapters, and beams or samples. And the errors of
                `using`.
        """
        model: nn.Module = self.model
        names = self._name_rows(adapter_names, args, kwargs)
        copies = count_copies(model, args, kwargs)
        if copies > 1 and len(set(names)) > 1 and getattr(getattr(model, "config", None), "is_encoder_decoder", False):
            raise RoutingError(
                "An encoder sees each row once and the decoder once per beam: several adapters cannot share such a "
                "batch. Generate with num_beams=1, or one adapter at a time."
            )
        with self.using(names if isinstance(names, str) else [n for n in names for _ in range(copies)]):
            return model.generate(*args, **kwargs)

    def _name_rows(
        self, names: str | Sequence[str] | None, args: tuple[object, ...], kwargs: dict[str, object]
    ) -> list[str] | str:
        """Return one name per row of the batch, so that compiled code sees no change between one adapter, several, and
        none. The number of rows is that of the first tensor with dimensions among the inputs.

        None means the names of this thread's innermost `using` block, or "__base__". Without such a tensor, or with no
        rows, a single name is returned as it is; an empty list of names gives "__base__".

        Raises:
            RoutingError: the number of names is not that of rows.
        """
        if names is None:
            names = self._using.get(get_ident(), [BASE])[-1]
        first = next((t for t in (*args, *kwargs.values()) if isinstance(t, Tensor) and t.dim()), None)
        if isinstance(names, str):
            return [names] * len(first) if first is not None and len(first) else names
        if first is not None and len(first) != len(names):
            raise RoutingError(
                "Length of `adapter_names` should be the same as the number of inputs, "
                f"but got {len(names)} and {len(first)} respectively."
            )
        return list(names) or BASE  # BASE for no rows

    # facts

    def report(self) -> SlotReport:
        """Return the `SlotReport` of this moment: numbers of slots, names, and bytes of slots, gathered factors, and
        copies in host memory. The bytes of a slot are the total over max_adapters + 1, rounded down.
        """
        buffers = [t for layer in self.layers.values() for t in layer.tensors]
        total = sum(t.nbytes for t in buffers)
        return SlotReport(
            max_adapters=self.max_adapters,
            max_rank=self.max_rank,
            layers=len(self.layers),
            resident=dict(self._slots),
            pinned=sorted(self._pinned),
            known=self.names,
            bytes_per_slot=total // (self.max_adapters + 1),
            slot_bytes=total,
            gathered_bytes=sum(t.nbytes for pair in self._choice.gathered.values() for t in pair or ()),
            host_bytes=sum(known.nbytes for known in self._known.values()),
        )

    def remove(self) -> nn.Module:
        """Take the slots out of the model, put the base layers back, and return it.

        From then on the slots serve nothing: `load` and `using` raise RoutingError. No adapter has a slot or is pinned,
        and kept factors of mixes are dropped; `names` stays.

        Raises:
            RoutingError: a `using` block of this thread is open.
            InUseError: other threads' batches last longer than `change_timeout`.
        """
        if get_ident() in self._using:
            raise RoutingError("The slots are in use. Leave the `using` block first.")
        with self.gate.change("AdapterSlots.remove()"):
            for key, layer in self.layers.items():
                self._tree.attach(key, layer.base_layer)
            self.layers, self._slots, self._pinned = {}, {}, set()
            self._choice.gathered.clear()
        return self.model


def find_highest_rank(factors: Mapping[str, SlotFactors]) -> int:
    """Return the highest rank of an adapter's layers, the number of rows of A. There must be a layer."""
    return max(f.A.shape[0] for f in factors.values())


def count_slots_by_rank(max_adapters: int | Mapping[int, int], max_rank: int | None) -> dict[int, int]:
    """Return the number of slots by rank, the lowest rank first.

    A number with `max_rank` gives one entry; a mapping of rank → number is sorted.

    Raises:
        ConfigError: a number or rank is below 1, both forms of sizes are passed, or none, or the mapping is empty.
    """
    by_rank = isinstance(max_adapters, Mapping)
    if by_rank != (max_rank is None):
        raise ConfigError("max_rank belongs to a number of slots, not to slots by rank. Pass one of the two forms.")
    counts: Any = max_adapters if by_rank else {max_rank: max_adapters}
    sizes: dict[int, int] = dict(sorted(counts.items()))
    for rank, n in sizes.items() or [(0, 0)]:
        for name, value in (("max_adapters", n), ("max_rank", rank)):
            if value < 1:
                raise ConfigError(f"{name} must be at least 1, got {value}.")
    return sizes


def check_sites(sites: Mapping[str, Any]) -> None:
    """Raise UnsupportedLayerError unless all layers, by path, are linear, called by the model, and computed whole by
    this process.
    """
    for key, site in sites.items():
        if not site.op.linear:
            raise UnsupportedLayerError(f"Target module {key} ({site.type_name}) is not linear. Leave it out.")
        if not site.is_called:
            raise UnsupportedLayerError(
                f"Target module {key} ({site.type_name}) is read by the module around it and never called, so that "
                "slots have no effect. Leave it out of `targets`, or name it in `exclude`."
            )
    check_no_pieces(sites.items(), "Slots serve outputs")
