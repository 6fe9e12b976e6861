# SPDX-License-Identifier: Apache-2.0
"""An adapter as tensors in the names and shapes of a server (vLLM, SGLang), in memory or saved into a folder."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor, nn

from graft.combine.adding import make_rank_patterns
from graft.config.base import PeftConfig
from graft.config.pair import FORMAT_VERSION, TRAINING_ONLY
from graft.config.reading import Json
from graft.core.errors import ConfigError, LossError, join_some
from graft.core.layer import AdapterLayer
from graft.core.method import Method, WeightUse
from graft.core.ops import Opaque
from graft.inject.experts import shorten_paths
from graft.inject.parts import AdapterCarriers, ParameterLayerPaths, find_carriers, run_as_call
from graft.inject.stage import find_model_group
from graft.io import files, save
from graft.io.fingerprint import Fingerprint, hash_text
from graft.io.servers import IN, LAYOUTS, OUT, PARAMETERS, WRITERS, FactorPair, ServerBlock, ServerBlocks
from graft.io.tensors import digest_tensors
from graft.methods.lora.config import LoraConfig
from graft.storage.parallel import layout_of, processes, strip_inner_wrappers

PREFIX = "base_model.model."
FACTORS = {"lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B", "lora_shift"}
RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # values that vLLM 0.32 takes as --max-lora-rank


@dataclass(frozen=True)
class AdapterTensors:
    """An adapter in the layout of a server.

    Attributes:
        tensors: {name: tensor}, sorted; copies, contiguous, with the scaling multiplied into B. If processes hold the
            adapter together, only the first of them has tensors.
        config: the fields of adapter_config.json.
        needs: of the server: "max_lora_rank"; "flags", options to start it with; "is_3d_lora_weight", a field of a
            request that loads it into vLLM.
        digest: hash of tensors and config; "" without tensors.
    """

    tensors: dict[str, Tensor]
    config: Json
    needs: Json
    digest: str
    lora_config: PeftConfig = field(repr=False, compare=False)  # the config itself
    base: Fingerprint = field(repr=False, compare=False)  # the fingerprint of the base model

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write adapter_model.safetensors and adapter_config.json into a folder, with the base's fingerprint.

        Without tensors, do nothing.
        """
        if self.tensors:
            files.save_adapter(os.fspath(folder), self.tensors, self.lora_config, True, self.base)


@run_as_call
def adapter_tensors(
    model: nn.Module, adapter_name: str = "default", layout: str = "peft", dtype: torch.dtype | None = None
) -> AdapterTensors:
    """Return an adapter as tensors in the layout of a server, with config, requirements, digest and fingerprint.

    The model does not change. All processes that hold it call this; only the first gets the tensors and a digest, the
    others {} and "".

    An adapter that changed the base at its start (PiSSA) gets factors of twice the rank, for the original base. The
    fingerprint is {} if the file names the module of an adapted parameter, in a layout other than "peft".

    Args:
        layout: "peft"; "vllm", which is "vllm-3d" if vLLM holds the experts of this family as stacks, else "vllm-2d";
            "vllm-shared", "sglang" or "sglang-shared". They differ in names and shapes of experts only.
        dtype: of the tensors; that of A if None.

    Raises:
        ConfigError: there is no such layout.
        AdapterNotFoundError: there is no such adapter.
        LossError: the server cannot run such an adapter; the text has all reasons. No tensor has been collected then,
            except where experts do not share a factor.
        CheckpointError: a tensor is a part of one, or a process is alone.
    """
    if layout not in LAYOUTS:
        raise ConfigError(f"layout={layout!r}: one of {', '.join(LAYOUTS)}.")
    parts, prefix, base, config = find_carriers(model, adapter_name)
    blocks = ServerBlocks(base)
    if layout == "vllm":
        layout = "vllm-3d" if blocks.is_stacked_in_vllm else "vllm-2d"
    view = ServerView(adapter_name, parts, prefix, blocks, layout)
    if why := [*find_obstacles(view, config, model)]:
        raise LossError(f"Adapter '{adapter_name}' cannot be given to a server as '{layout}': {'; '.join(why)}.")
    ranks_here = save.find_adapter_ranks(model, [adapter_name])
    first = not ranks_here or dist.get_rank() == ranks_here[0]
    values = save.get_peft_model_state_dict(model, None, adapter_name, save_embedding_layers=False)
    tensors, ranks = lay_out(view, values, dtype)
    lora_config = make_lora_config(view, config, ranks, base)
    fields = lora_config.to_file_dict()
    local_tensors = tensors if first else {}
    digest = hash_text(digest_tensors(local_tensors) + json.dumps(fields, sort_keys=True)) if local_tensors else ""
    note = save.fingerprint_base(model, adapter_name, False, together=bool(ranks_here))
    if view.hub and any(layer.op.opaque and not layer.site.is_stack for _, layer in view.layers):
        note = {}  # the file names the module that has the parameter, which the fingerprint does not
    return AdapterTensors(local_tensors, fields, server_needs(view, ranks), digest, lora_config, note)


@dataclass
class ServerView:
    """An adapter's carriers, the base's experts, and the layout of a server."""

    adapter: str
    parts: AdapterCarriers
    prefix: str  # of its keys in files
    blocks: ServerBlocks
    layout: str

    @property
    def layers(self) -> Iterator[tuple[str, AdapterLayer]]:
        """Yield each adapted layer with the beginning of its keys in PEFT's files,
        "base_model.model.layers.0.q_proj".
        """
        nests = ParameterLayerPaths(self.parts.layers.values())
        for key, layer in self.parts.layers.items():
            yield f"{self.prefix}{nests.path(key, layer)}", layer

    @property
    def hub(self) -> bool:
        """Whether modules get the names that they have in checkpoints on the hub: in every layout except "peft"."""
        return self.layout != "peft"

    def block(self, layer: AdapterLayer) -> ServerBlock | None:
        """Return the block of experts that a layer on a stack belongs to; None for other layers and unknown blocks."""
        return self.blocks.found.get(strip_inner_wrappers(layer.site.path)) if layer.site.is_stack else None

    def path(self, layer: AdapterLayer) -> str:
        """Return a layer's module path: that of hub checkpoints if `hub`, else that in the base."""
        path = strip_inner_wrappers(layer.site.path)
        return self.blocks.find_old_path(path) if self.hub else path


# obstacles: adapters that no server can run


def find_obstacles(view: ServerView, config: PeftConfig | None, model: nn.Module) -> Iterator[str]:
    """Yield each reason why the server cannot run the adapter. Nothing: it can.

    A method other than LoRA is the only reason then. Else the reasons are:

    - Those of `find_layer_obstacles`, each once, with up to 2 of its layers.
    - Modules trained whole or by rows.
    - A `bias` other than "none", and repeated layers.
    - Stages of a pipeline, with more than one process.

    With `config=None` the config's reasons are skipped.
    """
    if config is not None and config.peft_type != "LORA":
        yield f"it is {config.peft_type.value}, and servers load LoRA: convert it (graft.convert_to_lora)"
        return
    layers_by_reason: dict[str, list[str]] = {}
    for stem, layer in view.layers:
        for why in find_layer_obstacles(view, layer):
            layers_by_reason.setdefault(why, []).append(stem.removeprefix(view.prefix))
    for why, layers in layers_by_reason.items():
        yield f"{why} ({join_some(layers, 2)})"
    if view.parts.wrappers:
        yield f"it trains {join_some([*view.parts.wrappers], 2)} whole, or rows of it: merge it, and serve the model"
    if (bias := getattr(config, "bias", "none")) != "none":
        yield f"it trains biases of the base (bias={bias!r}): merge it, and serve the model"
    if getattr(config, "layer_replication", None):
        yield "it repeats layers of the base: serve the model with these"
    if processes() > 1 and find_model_group(model.modules()) is not None:
        yield "its layers are stages of a pipeline: save it, join them (graft.join_stages), and load that"


def find_layer_obstacles(view: ServerView, layer: AdapterLayer) -> Iterator[str]:
    """Yield each reason why the server cannot run the adapter on one layer; nothing if it can.

    The first of these that holds, in all layouts:

    - The method has no product B A as its whole effect.
    - It saves other tensors than plain factors (except those for training only), or a bias of B.
    - It holds factors in blocks, not as whole matrices.

    Another reason in all layouts: its start changed the base weight, and it recorded no `lora_shift`.

    Layouts other than "peft" add at most one reason. A stack needs a known block of experts, for "vllm-3d" in the usual
    orientation. An opaque layer needs the parameter "weight". Any other layer is linear or an embedding.
    """
    m: Method = layer.methods[view.adapter]
    containers = {slot.container for slot in layer.slots(view.adapter) if slot.saved}
    strange = sorted(name for name in containers - FACTORS if not name.startswith(TRAINING_ONLY))
    biased = any(slot.container == "lora_B" and slot.path == "bias" for slot in layer.slots(view.adapter))
    if m.effect.product is None:
        yield f"{type(m).__name__} does more than to add B A"
    elif strange or biased:
        yield f"servers know no {', '.join(strange or ['bias of B'])}"
    elif "lora_A" in containers and not is_full_size(layer, m):
        yield f"the factors of {type(m).__name__} are no whole matrices: export it (graft export)"
    if WeightUse.CHANGES in m.uses_weight() and "lora_shift" not in containers:
        yield f"the start of {type(m).__name__} changed the base, and nothing says how"
    if view.layout == "peft":
        return
    if layer.site.is_stack:
        path = strip_inner_wrappers(layer.site.path)
        block = view.block(layer)
        if block is None:
            yield view.blocks.unknown.get(path, f"{path} is no module of experts")
        elif view.layout == "vllm-3d" and block.exchanged:
            yield f"{type(layer.site.module).__name__} holds its stacks the other way round: take 'vllm-2d'"
    elif layer.op.opaque and layer.site.parameter != "weight":
        yield f"no server adapts a parameter '{layer.site.parameter}'"
    elif not (layer.op.linear or layer.op.takes_ids or layer.op.opaque):
        yield f"no server of language models adapts a {layer.site.type_name}"


def is_full_size(layer: AdapterLayer, m: Method) -> bool:
    """Return True if A is (r, in) and B is (out, r), with A flattened from its second dimension on.

    Sharded or empty factors and stacks give True unchecked.
    """
    A, B = m.pair
    out, fan_in = layer.op.dims(layer.site.module)
    if layer.site.is_stack or layout_of(A) is not None or not A.numel():
        return True
    return A.flatten(1).shape[1] == fan_in and len(B) == out and len(A) == B.shape[1]


# tensors


def lay_out(
    view: ServerView, values: dict[str, Tensor], dtype: torch.dtype | None
) -> tuple[dict[str, Tensor], dict[str, int]]:
    """Return the tensors of the layout, sorted by name and contiguous, and the rank of each adapted module or stack by
    its path.

    Factors of experts are grouped by block and written by the layout's writer; a block that lacks one of its stacks
    gets zeros. Factors of a block with exchanged stacks are transposed and swapped. Ranks of experts are noted by stack
    for "vllm-3d", otherwise by the modules of the written names. SGLang's layouts pad all factors to the largest rank,
    which all ranks then are.

    Raises:
        LossError: experts do not share a factor, in a layout that ends in "-shared".
    """
    out: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    experts: dict[str, dict[str, FactorPair]] = {}
    for stem, layer in view.layers:
        A, B, ends = read_factors(values, stem, layer, layer.scaling[view.adapter], dtype)
        block = view.block(layer) if view.hub else None
        if block is None:
            path = view.path(layer)
            at = path if view.hub else stem.removeprefix(view.prefix)
            out |= {f"{PREFIX}{at}.{ends[0]}": A, f"{PREFIX}{at}.{ends[1]}": B}
            named = f"{path}.{layer.site.parameter}" if layer.op.opaque and not view.hub else path
            ranks[named] = len(A) // (layer.site.shape[0] if layer.site.is_stack else 1)
            continue
        pair = FactorPair(*Opaque.split_matrices(A, B, layer.site.shape[0]))
        pair = FactorPair(pair.B.mT, pair.A.mT) if block.exchanged else pair
        experts.setdefault(block.path, {})[PARAMETERS[layer.site.parameter]] = pair
    for path, pairs in experts.items():
        block = view.blocks.found[path]
        only = next(iter(pairs.values()))
        pairs = {which: pairs[which] if which in pairs else block.make_zeros(which, only) for which in (IN, OUT)}
        if view.layout.endswith("-shared") and (why := why_not_shared(pairs)) is not None:
            raise LossError(f"Adapter '{view.adapter}' cannot be given to a server as '{view.layout}': {why} ({path}).")
        written = dict(WRITERS[view.layout](block, pairs))
        out |= {f"{PREFIX}{key}": t for key, t in written.items()}
        if view.layout == "vllm-3d":
            ranks |= {f"{block.hub_path}.{block.parameters[which]}": pair.A.shape[1] for which, pair in pairs.items()}
        else:
            ranks |= {key.partition(".lora_")[0]: t.shape[-2] for key, t in written.items() if ".lora_A" in key}
    if view.layout.startswith("sglang"):
        out, ranks = pad_ranks(out, max(ranks.values())), dict.fromkeys(ranks, max(ranks.values()))
    return {key: out[key].contiguous() for key in sorted(out)}, ranks


def why_not_shared(pairs: Mapping[str, FactorPair]) -> str | None:
    """Return a text that says which stacked factor differs between experts, or None if each equals that of the first
    expert.

    `pairs` maps IN and OUT to factors of all experts; A of the input is compared, then B of the output. A shared layout
    would hold each of the two once.
    """
    for which, t in ((IN, pairs[IN].A), (OUT, pairs[OUT].B)):
        if bool((t != t[:1]).any()):
            return f"the experts' {'A of the input' if which == IN else 'B of the output'} differ"
    return None


def read_factors(
    values: dict[str, Tensor], stem: str, layer: AdapterLayer, scaling: float, dtype: torch.dtype | None
) -> tuple[Tensor, Tensor, tuple[str, str]]:
    """Return A, B times `scaling`, and the two endings of their names, from the values of an adapter's file.

    Embeddings have other endings than linear layers. If the adapter changed the base at its start, its `lora_shift` is
    appended, negated, so that the factors fit the original base; the rank grows by that of the shift. Both are copies
    of dtype `dtype`, that of A if None; the product is computed in float32. A missing factor is a KeyError.
    """
    ends = ("lora_embedding_A", "lora_embedding_B") if layer.op.takes_ids else ("lora_A.weight", "lora_B.weight")
    A, B = (values[f"{stem}.{end}"].detach() for end in ends)
    dtype = A.dtype if dtype is None else dtype
    A, B = A.clone(), B.float() * scaling
    if (gone := values.get(f"{stem}.lora_shift.A")) is not None:
        B_gone = values[f"{stem}.lora_shift.B"].detach().float().to(B.device)
        A = torch.cat([A.float(), gone.detach().float().to(A.device)])
        B = torch.cat([B, -B_gone], 1)
    return A.to(dtype), B.to(dtype), ends


def pad_ranks(tensors: dict[str, Tensor], rank: int) -> dict[str, Tensor]:
    """Return new factors with zeros appended up to `rank` in the rank's dimension: rows of A, columns of B.

    Stacked factors are padded in each matrix.
    """
    out = {}
    for key, t in tensors.items():
        if key.rpartition(".lora_")[2] in ("A.weight", "embedding_A"):
            out[key] = nn.functional.pad(t, (0, 0, 0, rank - t.shape[-2]))
        else:
            out[key] = nn.functional.pad(t, (0, rank - t.shape[-1]))
    return out


# config


def make_lora_config(view: ServerView, config: object, ranks: dict[str, int], base: nn.Module) -> LoraConfig:
    """Return the config of plain LoRA with scaling 1 for these tensors: alpha is the rank, and so in `alpha_pattern`.

    `r` is the largest rank; `rank_pattern` has the others. Targets are the shortest names that no other module has,
    sorted. Stacks are `target_parameters` in the layouts "peft" and "vllm-3d", otherwise None. Task type and the base's
    name come from `config`; `inference_mode` is True.

    Args:
        ranks: of each module by path, and of each stack by module and parameter.
    """
    r = max(ranks.values())
    every = {view.blocks.find_old_path(path) if view.hub else path for path in view.blocks.tree.modules}
    parameters = {path for path in ranks if path not in every} if view.layout in ("peft", "vllm-3d") else set()
    lora_config = LoraConfig(r=r, lora_alpha=r, task_type=getattr(config, "task_type", None))
    lora_config.base_model_name_or_path = getattr(config, "base_model_name_or_path", None)
    save.describe_base(lora_config, base)
    lora_config.target_modules = sorted(shorten_paths({*ranks} - parameters, every))
    unadapted = {stack.path for stack in view.blocks.stacks} | {f"{path}.weight" for path in every}
    lora_config.target_parameters = sorted(shorten_paths(parameters, unadapted, 2)) or None
    lora_config.rank_pattern = make_rank_patterns(dict(sorted(ranks.items())))
    lora_config.alpha_pattern = dict(lora_config.rank_pattern)
    lora_config.inference_mode, lora_config.peft_version = True, FORMAT_VERSION
    return lora_config


def server_needs(view: ServerView, ranks: dict[str, int]) -> Json:
    """Return the server's requirements: "max_lora_rank", "flags" to start it with, and "is_3d_lora_weight".

    Flags are "--enable-lora --max-lora-rank <rank>". SGLang gets the largest rank, and "--lora-target-modules" with the
    sorted last names of the modules in `ranks`. vLLM gets the next of 1, 8, 16, 32, 64, 128, 256, 320 and 512 (the rank
    itself beyond 512). It also gets "--enable-moe-shared-loras" for experts in the layout "vllm-shared". For experts in
    another form, stacked or single, than vLLM expects it gets "--enable-mixed-moe-lora-format". "is_3d_lora_weight" is
    True only on vLLM, for experts in the layouts "peft" and "vllm-3d".
    """
    r = max(ranks.values())
    experts = any(view.block(layer) is not None for _, layer in view.layers)
    if view.layout.startswith("sglang"):
        modules = sorted({path.rpartition(".")[2] for path in ranks})
        flags = ["--enable-lora", "--max-lora-rank", str(r), "--lora-target-modules", *modules]
        return {"max_lora_rank": r, "flags": flags, "is_3d_lora_weight": False}
    limit = next((n for n in RANKS if n >= r), r)
    flags = ["--enable-lora", "--max-lora-rank", str(limit)]
    stacked = view.layout in ("peft", "vllm-3d")
    if experts and view.layout == "vllm-shared":
        flags.append("--enable-moe-shared-loras")
    elif experts and stacked != view.blocks.is_stacked_in_vllm:
        flags.append("--enable-mixed-moe-lora-format")
    return {"max_lora_rank": limit, "flags": flags, "is_3d_lora_weight": experts and stacked}
