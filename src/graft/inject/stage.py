# SPDX-License-Identifier: Apache-2.0
"""One model on several processes: stages of a pipeline, and equal adapters on all processes that compute a model in
pieces.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from graft.core.call import Call
from graft.core.errors import CheckpointError, DistributedError, PeftWarning, warn
from graft.core.layer import make_adapter_layer
from graft.core.method import Method, WeightUse
from graft.core.random import build_on, read_generator_states, restore_generator_states
from graft.core.site import Site
from graft.inject.match import Matcher
from graft.inject.parts import AdapterCarriers
from graft.inject.survey import ModuleTree, survey_model
from graft.storage.flat import sendable
from graft.storage.fsdp2 import Sharding, find_sharding
from graft.storage.meeting import LONG_PATIENCE, Meeting
from graft.storage.parallel import processes
from graft.storage.shared_work import find_group

T = TypeVar("T")
CALL = "get_peft_model() (or add_adapter, from_pretrained)"  # for errors
MARK = "PipelineIdentityLayer"  # transformers' class


def find_absent_modules(modules: dict[str, nn.Module]) -> dict[str, str]:
    """Return {path: parent's path} of the modules that this process lacks; {} for a whole model.

    These are transformers' placeholders for absent layers (a class named `PipelineIdentityLayer`), and missing blocks
    of each ModuleList or ModuleDict (`list_missing_blocks`). If there are such, each exact `nn.Identity` counts as
    absent, too.

    Args:
        modules: all modules of the model, by path.
    """
    absent = {key: key.rpartition(".")[0] for key, m in modules.items() if type(m).__name__ == MARK}
    for key, m in modules.items():
        if isinstance(m, (nn.ModuleList, nn.ModuleDict)):
            absent |= {f"{key}.{name}": key for name in list_missing_blocks(m)}
    if absent:
        absent |= {k: k.rpartition(".")[0] for k, m in modules.items() if type(m) is nn.Identity and k not in absent}
    return absent


def find_absent_in_model(model: nn.Module) -> dict[str, str]:
    """Return the modules of a model that other pipeline stages have, as `find_absent_modules`, by one survey of it.

    Paths are those of the base model. Returns {} for a single process.
    """
    return find_absent_modules(survey_model(model).modules) if processes() > 1 else {}


def list_missing_blocks(blocks: nn.Module) -> list[str]:
    """Return the names of the missing blocks (None or exactly `nn.Identity`) of a list, in order.

    Returns [] if none is missing, if the list has one entry, or if the blocks that are there have several types or gaps
    between them. If all are missing, all names are returned.
    """
    presence = [m is not None and type(m) is not nn.Identity for m in blocks._modules.values()]
    kinds = {type(m) for m, is_here in zip(blocks._modules.values(), presence) if is_here}
    in_a_row = sum(a != b for a, b in zip([False, *presence], [*presence, False])) == 2
    if all(presence) or len(kinds) > 1 or not (in_a_row or not any(presence)) or len(presence) < 2:
        return []
    return [name for name, is_here in zip(blocks._modules, presence) if not is_here]


def add_remote_sites(sites: dict[str, Site], tree: ModuleTree, matcher: Matcher, adapter: str) -> dict[str, Site]:
    """Return an adapter's sites in the model's order, together with copies for the blocks on other stages.

    An absent block gets the sites of the first block that is here. `sites` itself is returned, without a warning, if no
    list of blocks lacks one.

    Remote sites draw initial values that nobody keeps. So each stage has the values that one process would have drawn.
    Warns if a target outside lists of blocks is on another stage, since values then differ from one process's.
    """
    absent = tree.absent
    lists = {p for p in absent.values() if isinstance(tree.modules.get(p), (nn.ModuleList, nn.ModuleDict))}
    if not lists:
        return sites
    out: dict[str, Site] = {}
    done: set[str] = set()
    for key, site in sites.items():
        parent = next((p for p in lists if key.startswith(f"{p}.")), None)
        if parent is None:
            out[key] = site
        elif parent not in done:
            done.add(parent)
            out |= list_block_sites(parent, sites, tree, matcher)
    remote_paths = [key for key in absent if absent[key] not in lists and matcher(key).outcome == "matched"]
    if remote_paths:
        warn(
            f"'{remote_paths[0]}' is on another stage of the pipeline, so adapter '{adapter}' begins with other "
            "values here than on one process. Load it from a file if all stages have to begin like one process.",
            PeftWarning,
        )
    return out


def list_block_sites(
    parent: str, sites: dict[str, Site], tree: ModuleTree, matcher: Matcher
) -> Iterator[tuple[str, Site]]:
    """Yield (path, site) for all blocks of the list at `parent`, in order. `sites` must have one below it.

    Blocks on this process give their own sites, in the order of `sites`; one without sites gives none.

    Absent blocks get copies of the sites in the first block that has some, with their paths, if `matcher` matches
    those. Sites of parameters are copied without that test.
    """
    by_block: dict[str, dict[str, Site]] = {}  # by name of the block, by path below it
    for key, site in sites.items():
        if key.startswith(f"{parent}."):
            name, _, inner_path = key.removeprefix(f"{parent}.").partition(".")
            by_block.setdefault(name, {})[inner_path] = site
    model = next(iter(by_block.values()))
    for name in tree.modules[parent]._modules:
        path = f"{parent}.{name}"
        if path not in tree.absent:
            yield from ((f"{path}.{inner_path}", site) for inner_path, site in by_block.get(name, {}).items())
            continue
        for inner_path, site in model.items():
            key = f"{path}.{inner_path}"
            if site.op.opaque or matcher(key).outcome == "matched":
                old = site.key.removesuffix(f".{inner_path}")
                yield key, replace(site, key=key, path=key if site.path == site.key else path + site.path[len(old) :])


def discard_initial_values(method: Method, shared: dict[str, object], call: Call) -> None:
    """Draw a layer's initial values on a spare layer, so that the random generator moves on as for one that keeps them.

    The spare layer becomes `method.layer`. Methods that change the base weight run only `build`, not `init_values`.
    """
    spare = make_adapter_layer(method.site, call)
    method.layer = spare
    with build_on(spare.where[0]):
        spare.add(method, method.build(shared))
        if WeightUse.CHANGES not in method.uses_weight():
            method.init_values()


def find_model_group(modules: Iterable[nn.Module]) -> dist.ProcessGroup | None:
    """Return the process group of the first module that is computed in pieces; None if there is none."""
    return next((g for m in modules if (g := find_group(m)) is not None), None)


def attempt(act: Callable[[], T]) -> tuple[T | None, Exception | None]:
    """Call `act`. Return (its result, None), or (None, the exception that it raised)."""
    try:
        return act(), None
    except Exception as e:
        return None, e


class ProcessTeam:
    """The processes that compute one model, in pieces or with a sharded base, and so have to hold equal adapters.

    A broadcast passes through their groups in turn, one per dimension of their mesh, and reaches all from the first.
    """

    def __init__(self, pieces: dist.ProcessGroup | None, sharding: Sharding | None):
        """Take the group of processes that compute the model in pieces, and the sharding of the base; one is None."""
        self.pieces, self.sharding = pieces, sharding
        self.groups = sharding.groups if sharding is not None else [] if pieces is None else [pieces]

    def meet(self, adapter: str, config: Any, paths: Iterable[str], loads: bool) -> None:
        """Wait until all processes of a sharded base come with the same adapter.

        Without a sharding does nothing. Waits at most `LONG_PATIENCE` seconds. The base's name and the revision in the
        config may differ.

        Args:
            paths: of the targets.
            loads: the adapter comes from a checkpoint.

        Raises:
            DistributedError, or CheckpointError with `loads`: a process does not come in time, or has another name,
                config or other targets.
        """
        if self.sharding is None:
            return
        fields = {k: v for k, v in config.to_file_dict().items() if k not in ("base_model_name_or_path", "revision")}
        text = json.dumps(fields, sort_keys=True, default=describe_value)
        paths = sorted(paths)
        targets = f"{len(paths)} targets {digest(str(paths))}"
        task = f"'{adapter}' ({config.peft_type.value}, config {digest(text)}, {targets})"
        error = CheckpointError if loads else DistributedError
        Meeting(CALL, task, self.sharding.ranks, "give one adapter to", error, LONG_PATIENCE)

    def broadcast(self, data: Tensor) -> None:
        """Overwrite `data` in place by the first process's: by that of each group's first process, one group after the
        other. All processes must call this.
        """
        for group in self.groups:
            dist.broadcast(data, dist.get_global_rank(group, 0), group=group)

    def gather(self, thing: object) -> dict[int, object]:
        """Return every process's `thing`, by rank, pickled and sent over each group of the team in turn.

        All processes must call this.
        """
        things = {dist.get_rank(): thing}
        for group in self.groups:
            parts: list[dict[int, object]] = [{}] * dist.get_world_size(group)
            dist.all_gather_object(parts, things, group=group)
            things = {rank: value for part in parts for rank, value in part.items()}
        return things

    def run_on_all(self, act: Callable[[], T]) -> T:
        """Call `act`, which sends nothing, and return its result. If it fails on one process, it fails on all.

        All processes must call this.

        Raises:
            CheckpointError: `act` has failed on other processes alone. The text names their ranks and has the error of
                the lowest: its text, or its class if the text is empty.
            Exception: the error of `act` here.
        """
        result, error = attempt(act)
        text = None if error is None else str(error) or type(error).__name__
        texts = {rank: text for rank, text in self.gather(text).items() if text}
        if error is not None:
            raise error
        if texts:
            raise CheckpointError(f"Rank(s) {sorted(texts)} cannot load the adapter: {texts[min(texts)]}")
        return result  # type: ignore[return-value]

    @contextmanager
    def draw_alike(self) -> Iterator[None]:
        """Within the block, all processes draw as the first does; then a process with another state gets its own back.

        Processes that compute the model in pieces keep one state, that of their first: dropout has to be equal there.
        All processes must call this.
        """
        if self.sharding is None:
            synchronize_generators(self)
            yield
            return
        if self.pieces is not None:
            synchronize_generators(ProcessTeam(self.pieces, None))
        before = read_generator_states()
        synchronize_generators(self)
        differs = not all(map(torch.equal, before, read_generator_states()))
        try:
            yield
        finally:
            if differs:
                restore_generator_states(before)


def describe_value(value: object) -> object:
    """Return a set as a sorted list of texts, and the name of the class of any other value that JSON lacks."""
    return sorted(map(str, value)) if isinstance(value, (set, frozenset)) else type(value).__name__


def digest(text: str) -> str:
    """Return a CRC-32 of a text as 8 hex digits."""
    return f"{zlib.crc32(text.encode()):08x}"


def find_team(modules: Iterable[nn.Module]) -> ProcessTeam | None:
    """Return the processes that hold one model of these modules together, in pieces or sharded by FSDP2; else None.

    Copies, as of DDP, and a model that is yet to be sharded are models of one process each.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return None
    modules = list(modules)
    pieces, sharding = find_model_group(modules) if processes() > 1 else None, find_sharding(modules)
    return None if pieces is None and sharding is None else ProcessTeam(pieces, sharding)


def draw_alike(team: ProcessTeam | None) -> AbstractContextManager[None]:
    """Return a context manager: within its block a team's processes draw equal values. For None it does nothing."""
    return nullcontext() if team is None else team.draw_alike()


def synchronize_generators(team: ProcessTeam) -> None:
    """Copy the states of the first process's random generators to all processes of the team, so that they draw the
    same values. All processes must call this.
    """
    alike = []
    for state in read_generator_states():
        sent = state.to(sendable(state, team.groups[0]), copy=True)
        team.broadcast(sent)
        alike.append(sent.cpu())
    restore_generator_states(alike)


def synchronize_tensors(parts: AdapterCarriers, adapter: str, team: ProcessTeam, loads: bool) -> None:
    """Overwrite an adapter's tensors on all processes of a team with the values of its first process.

    All processes must call this. Empty tensors, those on the meta device and DTensors are left out.

    Args:
        loads: the values came from a checkpoint, so they are only compared.

    Raises:
        CheckpointError: with `loads`, processes have different values.
    """
    tensors = [t for t in list_adapter_tensors(parts, adapter) if not t.is_meta and t.numel()]
    for device in dict.fromkeys(t.device for t in tensors):
        device_tensors = [t for t in tensors if t.device == device]
        data = torch.cat([t.detach().reshape(-1).contiguous().view(torch.uint8) for t in device_tensors])
        if loads:
            check_equal_data(data, adapter, team)
            continue
        team.broadcast(data)
        pieces = data.split([t.numel() * t.itemsize for t in device_tensors])
        for t, part in zip(device_tensors, pieces):
            t.data.copy_(part.clone().view(t.dtype).view(t.shape))


def list_adapter_tensors(parts: AdapterCarriers, adapter: str) -> Iterator[Tensor]:
    """Yield an adapter's tensors, each object once: shared ones, then those of layers with tensors outside checkpoints,
    of heads and rows, and the parameters and buffers of the prompt.

    The order is the same on all processes. DTensors are left out.
    """
    seen: set[int] = set()
    shared = [] if parts.shared is None else [slot.tensor for slot in parts.shared.slots(adapter)]
    layer_tensors = [t for layer in parts.layers.values() for _, t in layer.tensors(adapter, transient=True)]
    rows = [slot.tensor for w in parts.wrappers.values() for slot in w.slots(adapter)]
    prompt = [] if parts.prompt is None else [*parts.prompt.parameters(), *parts.prompt.buffers()]
    for t in (*shared, *layer_tensors, *rows, *prompt):
        if id(t) not in seen and type(t).__name__ != "DTensor":
            seen.add(id(t))
            yield t


def check_equal_data(data: Tensor, adapter: str, team: ProcessTeam) -> None:
    """Raise CheckpointError if the bytes of `data` differ between the processes of a team.

    Gathers a CRC-32 of each, so that all must call this. The text names the ranks that differ from the first.
    """
    checksum: int = zlib.crc32(data.cpu().numpy())  # type: ignore[arg-type]  # an array is a buffer
    checksums = team.gather(checksum)
    first = min(checksums)
    differing_ranks = sorted(rank for rank, digest in checksums.items() if digest != checksums[first])
    if differing_ranks:
        raise CheckpointError(
            f"Adapter '{adapter}' has other values on rank(s) {differing_ranks} than on rank {first}, which compute "
            "one model together. Load the same file on all of them."
        )
