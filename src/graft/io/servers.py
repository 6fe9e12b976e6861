# SPDX-License-Identifier: Apache-2.0
# Supported inside: rooms may import this module.
"""Conversion of expert stacks' factors to the layouts of servers, and back.

Here a stack is A (E, r, in) and B (E, out, r), with outputs in the order of the model's parameter. Read in the sources
of vLLM 0.32 and SGLang 0.5.23, November 2026.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from operator import attrgetter
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from graft.config.base import PeftConfig
from graft.core.base_config import model_type
from graft.core.ops import Opaque
from graft.inject.experts import ExpertStack, ExpertStacks, shorten_paths
from graft.storage.find import innermost

if TYPE_CHECKING:
    from graft.methods.lora.config import LoraConfig

IN, OUT = "in", "out"  # the two stacks of a block: the one on its input, and the one that makes its output
PARAMETERS = {"gate_up_proj": IN, "up_proj": IN, "down_proj": OUT}
PARTS = {IN: ("gate_proj", "up_proj"), OUT: ("down_proj",)}  # an expert's parts, for models with stacks on the hub
W = {IN: ("w1", "w3"), OUT: ("w2",)}
ONE_AFTER_THE_OTHER = {"Llama4TextExperts"}  # classes with gate above up that no flag or conversion tells
BY_W_IN_VLLM = ("gpt_oss",)  # types with stacks on the hub; vLLM calls an expert's parts w1, w3 and w2
STACKED_IN_VLLM = ("gpt_oss", "qwen3_5_moe", "qwen3_vl_moe", "qwen3_omni_moe", "interns1_pro")  # beginnings of types
LAYOUTS = ("peft", "vllm", "vllm-2d", "vllm-3d", "vllm-shared", "sglang", "sglang-shared")


class FactorPair(NamedTuple):
    """The factors of one stack: A (E, r, in), B (E, out, r). Where all experts share one, its E is 1."""

    A: Tensor
    B: Tensor


@dataclass(frozen=True)
class ServerBlock:
    """The two stacks of one module of experts, and their names on the hub.

    Attributes:
        path: of the module in the model; `hub_path`: in checkpoints on the hub.
        shapes: (E, out, in) of each stack.
        parts: of each stack, from above.
        interleaved: rows of gate and up in turn.
        exchanged: graft takes inputs for outputs, as PEFT does where the module does not say `is_transposed`.
        numbered: checkpoints on the hub have a module for each expert.
        in_vllm: of each part, its name in an adapter of vLLM with a module for each expert.
    """

    path: str
    hub_path: str
    parameters: dict[str, str]  # IN or OUT → parameter
    shapes: dict[str, tuple[int, ...]]
    parts: dict[str, tuple[str, ...]]
    interleaved: bool
    exchanged: bool
    numbered: bool
    in_vllm: dict[str, str]

    @property
    def is_gated(self) -> bool:
        """True if the input's stack holds gate and up."""
        return len(self.parts[IN]) == 2

    def split_rows(self, B: Tensor) -> list[Tensor]:
        """Return B of the input's stack as [B of gate, B of up], from alternate rows or from halves; [B] without a
        gate.
        """
        if not self.is_gated:
            return [B]
        return [B[:, ::2], B[:, 1::2]] if self.interleaved else [*B.chunk(2, 1)]

    def join_rows(self, parts: list[Tensor]) -> Tensor:
        """Return B of the input's stack from [B of gate, B of up]: rows in turn if the block is interleaved, else gate
        above up. A list of one gives a copy of that B.
        """
        if self.interleaved:
            return torch.stack(parts, 2).flatten(1, 2)
        return torch.cat(parts, 1)

    def split_by_part(self, pairs: Mapping[str, FactorPair]) -> dict[str, FactorPair]:
        """Return the factors of gate, up and down by part name. Gate and up have the same A."""
        out = dict(zip(self.parts[IN], (FactorPair(pairs[IN].A, B) for B in self.split_rows(pairs[IN].B))))
        return out | {self.parts[OUT][0]: pairs[OUT]}

    def make_zeros(self, which: str, like: FactorPair) -> FactorPair:
        """Return zero factors of all experts for the stack `which`, with the rank, dtype and device of `like`."""
        n, out, fan_in = self.shapes[which]
        r = like.A.shape[1]
        return FactorPair(like.A.new_zeros(n, r, fan_in), like.B.new_zeros(n, out, r))


class ServerBlocks(ExpertStacks):
    """The modules of experts of a model, as servers see them.

    Attributes:
        found: the modules, by path.
        unknown: path of a module → why the order of its rows is not known.
    """

    def __init__(self, model: nn.Module):
        """Survey the model and sort its modules of experts, by path, into `found` (ServerBlock) and `unknown` (the
        reason as text).

        `type` is `model_type(model)` if the config has that attribute, even None, else "".
        """
        super().__init__(model)
        self.found, self.unknown = dict[str, ServerBlock](), dict[str, str]()
        self.type = model_type(model) if hasattr(getattr(model, "config", None), "model_type") else ""
        for path, group in groupby(self.stacks, attrgetter("module")):
            block = self.classify_module(path, [*group])
            known: dict[str, Any] = self.found if isinstance(block, ServerBlock) else self.unknown
            known[path] = block

    def classify_module(self, path: str, group: list[ExpertStack]) -> ServerBlock | str:
        """Return the block of a module with these stacks, or a text with the reason why servers cannot take it.

        The reasons are:

        - A stack has another name than gate_up_proj, up_proj (both are IN) and down_proj (OUT), or IN or OUT lacks one.
        - The shapes are not gate, up and down.
        - Gate and up have an unknown order. It is known from the attribute `is_concatenated`, whatever its value, from
          the parts of the input's stack, or from the module's class.

        A stack named `gate_up_proj` holds both gate and up. Then the shapes tell if the stacks are transposed;
        otherwise the module's `is_transposed` does. `exchanged` is set where the two disagree. Rows are interleaved if
        `is_concatenated` is False. The block's shapes are always (experts, out, in).
        """
        named = {PARAMETERS[s.parameter]: s for s in group if s.parameter in PARAMETERS}
        if len(named) < len(group) or len(named) < 2:
            return f"{path} has the stacks {', '.join(s.parameter for s in group)}, which no server knows"
        module = innermost(self.tree.modules[path])
        raw = {which: tuple(module._parameters[s.parameter].shape) for which, s in named.items()}  # type: ignore[union-attr]
        gated = named[IN].parameter == "gate_up_proj"
        parts = {which: s.parts or PARTS[which][not gated and which == IN :] for which, s in named.items()}
        assumed = bool(getattr(module, "is_transposed", False))
        transposed = raw[IN][1] == raw[OUT][2] and raw[IN][2] == 2 * raw[OUT][1] if gated else assumed
        shapes: dict[str, tuple[int, ...]] = {w: (n, b, a) if transposed else (n, a, b) for w, (n, a, b) in raw.items()}
        if len(parts[IN]) != 1 + gated or len(parts[OUT]) != 1 or shapes[IN][1] != (1 + gated) * shapes[OUT][2]:
            return f"{path} has stacks of shapes {[*raw.values()]}, which are not gate, up and down"
        in_order = hasattr(module, "is_concatenated") or named[IN].parts or type(module).__name__ in ONE_AFTER_THE_OTHER
        if gated and not in_order:
            return f"{type(module).__name__} does not say in which order gate and up stand"
        parameters = {which: s.parameter for which, s in named.items()}
        interleaved = gated and not getattr(module, "is_concatenated", True)
        hub_path = self.find_old_path(path)
        in_vllm = {part: part for of in parts.values() for part in of}
        in_vllm = name_parts_by_w(parts) if self.type in BY_W_IN_VLLM else in_vllm
        exchanged, numbered = transposed != assumed, bool(named[IN].parts)
        return ServerBlock(path, hub_path, parameters, shapes, parts, interleaved, exchanged, numbered, in_vllm)

    @property
    def is_stacked_in_vllm(self) -> bool:
        """True if vLLM holds this model type's experts as stacks: it begins with gpt_oss, qwen3_5_moe, qwen3_vl_moe,
        qwen3_omni_moe or interns1_pro.
        """
        return self.type.startswith(STACKED_IN_VLLM)


# writers: the keys and values of one block, by the name of a layout


def write_flat(block: ServerBlock, pairs: Mapping[str, FactorPair]) -> Iterator[tuple[str, Tensor]]:
    """Yield keys and factors as PEFT writes them: two dimensions, the input's stack as "base_layer".

    vLLM's 3d layout.
    """
    for which, inner in ((IN, ".base_layer"), (OUT, "")):
        A, B = Opaque.join_matrices(*pairs[which])
        yield from name_factors(f"{block.hub_path}{inner}", A, B)


def write_by_expert(block: ServerBlock, pairs: Mapping[str, FactorPair]) -> Iterator[tuple[str, Tensor]]:
    """Yield keys and factors of each part of each expert, under "<hub path>.<expert>.<vLLM's name of the part>"."""
    for part, (A, B) in block.split_by_part(pairs).items():
        for e in range(len(A)):
            yield from name_factors(f"{block.hub_path}.{e}.{block.in_vllm[part]}", A[e], B[e])


def name_parts_by_w(parts: Mapping[str, tuple[str, ...]]) -> dict[str, str]:
    """Return {part: vLLM's own name}: w1 for gate, w3 for up, w2 for down. Without a gate up is w1."""
    return {part: name for which in (IN, OUT) for part, name in zip(parts[which], W[which])}


def write_stacked(block: ServerBlock, pairs: Mapping[str, FactorPair]) -> Iterator[tuple[str, Tensor]]:
    """Yield "<hub path>.<parameter>.lora_A.weight", A, then the same for lora_B, for each stack with a pair, in
    SGLang's layout.

    A is passed on. B of the input's stack has the rows of gate above those of up, also for an interleaved model; other
    B's stay. Both are made contiguous.

    pairs: IN or OUT → factors of that whole stack.
    """
    for which, pair in pairs.items():
        B = torch.cat(block.split_rows(pair.B), 1) if which == IN else pair.B
        yield from name_factors(f"{block.hub_path}.{block.parameters[which]}", pair.A, B)


def write_shared(
    block: ServerBlock, pairs: Mapping[str, FactorPair], by_w: bool = False
) -> Iterator[tuple[str, Tensor]]:
    """Yield keys and factors by part for all experts. A of the input and B of the output are those of expert 0.

    The parts are called gate_proj, up_proj and down_proj, or with `by_w` w1, w3 and w2. An ungated block has up_proj,
    or w1, as its only input part.
    """
    names = dict(zip(block.parts[IN], PARTS[IN][not block.is_gated :])) | {block.parts[OUT][0]: "down_proj"}
    names = name_parts_by_w(block.parts) if by_w else names
    shared = {IN: FactorPair(pairs[IN].A[:1], pairs[IN].B), OUT: FactorPair(pairs[OUT].A, pairs[OUT].B[:1])}
    for part, pair in block.split_by_part(shared).items():
        yield from name_factors(f"{block.hub_path}.{names[part]}", *pair)


Writer = Callable[[ServerBlock, Mapping[str, FactorPair]], Iterator[tuple[str, Tensor]]]
WRITERS: dict[str, Writer] = {
    "vllm-2d": write_by_expert, "vllm-3d": write_flat, "vllm-shared": partial(write_shared, by_w=True),
    "sglang": write_stacked, "sglang-shared": write_shared,
}  # fmt: skip


def name_factors(stem: str, A: Tensor, B: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Yield contiguous A and B with their keys "<stem>.lora_A.weight" and "<stem>.lora_B.weight"."""
    yield f"{stem}.lora_A.weight", A.contiguous()
    yield f"{stem}.lora_B.weight", B.contiguous()


# back: from a server's layout to PEFT's


KEY = re.compile(
    r"(?P<prefix>base_model\.model\.)?(?P<experts>.*\bexperts)(?:\.(?P<number>\d+))?(?:\.(?P<part>\w+))?"
    r"\.lora_(?P<side>[AB])\.weight"
)
INNER = "base_layer"  # PEFT's name of the first of two stacks
PartFactors = dict[str, dict[str, dict[int | None, Tensor]]]  # part → A or B → expert, None: all → values


BlockStack = tuple[FactorPair, float]  # the factors of a stack, and the scaling that its file has for them


def convert_server_layout(tensors: dict[str, Tensor], config: PeftConfig, model: nn.Module) -> dict[str, Tensor]:
    """Return a file's tensors with experts in PEFT's layout, if a server's layout holds them.

    `config` then gets the stacks as `target_parameters`, in place, instead of modules that only servers have. The other
    keys get the model's paths instead of the hub's. Both factors of a stack are transposed and exchanged where the
    block needs it; stacks of zeros are left out.

    Returns `tensors` itself, and leaves `config`, in these cases: no key is of experts, the method is not LoRA, the
    keys are as PEFT writes them, or no block can be read. The last also holds for a file by expert with different A of
    gate and up.
    """
    matches = {key: match for key in tensors if (match := KEY.fullmatch(key)) is not None}
    if not matches or config.peft_type != "LORA":
        return tensors
    blocks = ServerBlocks(model)
    by_name = {name: block for block in blocks.found.values() for name in (block.path, block.hub_path)}
    by_block: dict[str, PartFactors] = {}
    used: dict[str, list[str]] = {}
    for key, match in matches.items():
        if (block := by_name.get(match["experts"])) is not None:
            number = None if match["number"] is None else int(match["number"])
            of_part = by_block.setdefault(block.path, {}).setdefault(match["part"] or "", {})
            of_part.setdefault(match["side"], {})[number] = tensors[key]
            used.setdefault(block.path, []).append(key)
    if all(is_in_peft_layout(path, values, used[path], matches) for path, values in by_block.items()):
        return tensors
    read = {path: read_block(blocks.found[path], values, config) for path, values in by_block.items()}
    read = {path: stacks for path, stacks in read.items() if stacks}
    if not read:
        return tensors
    prefix = next(iter(matches.values()))["prefix"] or ""
    paths_by_old = {blocks.find_old_path(path): path for path in blocks.tree.modules}
    gone = {key for path in read for key in used[path]}
    out = {rename_key(key, prefix, paths_by_old): t for key, t in tensors.items() if key not in gone}
    for path, stacks in read.items():
        for which, (pair, _) in stacks.items():
            A, B = (pair.B.mT, pair.A.mT) if blocks.found[path].exchanged else pair
            inner = f".{INNER}" if which == IN and OUT in stacks else ""
            out |= dict(name_factors(f"{prefix}{path}{inner}", *Opaque.join_matrices(A, B)))
    configure_stacks(config, [key.removeprefix(prefix) for key in out], read, blocks)
    return out


def is_in_peft_layout(path: str, values: PartFactors, keys: list[str], matches: Mapping[str, re.Match[str]]) -> bool:
    """Return True if a file's keys of a module are as PEFT writes them, and no A is all zeros.

    PEFT uses the path in the model, and no part name but "base_layer". Servers get zeros for a stack without adapter.
    """
    known_names = all(matches[key]["experts"] == path for key in keys) and not set(values) - {"", INNER}
    return known_names and all(bool(t.any()) for sides in values.values() for t in sides.get("A", {}).values())


def rename_key(key: str, prefix: str, paths_by_old: Mapping[str, str]) -> str:
    """Return a key with the path between `prefix` and ".lora_" replaced by that in the model; other paths stay."""
    path, dot, leaf = key.removeprefix(prefix).partition(".lora_")
    return f"{prefix}{paths_by_old.get(path, path)}{dot}{leaf}"


def read_block(block: ServerBlock, values: PartFactors, config: PeftConfig) -> dict[str, BlockStack]:
    """Return the factors of a block's stacks with their scalings, by IN and OUT.

    Returns {} if a part lacks some expert. A stack is sought under PEFT's name, then under its parameter's (only a
    gated input stack), last by its parts. Those have the block's names, or gate_proj, up_proj and down_proj, or w1, w3
    and w2. A stack that is not found is left out, and so is one of zeros. Rows of gate and up are joined in the model's
    order. Gate and up with different A become one pair of the ranks of both, except in a file by expert, which gives
    {}. A factor that all experts share is expanded to one per expert, as a view.
    """
    n = block.shapes[IN][0]
    parts = {part: pair for part, sides in values.items() if (pair := assemble_factors(sides, n)) is not None}
    if len(parts) < len(values):
        return {}
    out: dict[str, BlockStack] = {}
    for which in (IN, OUT):
        names = [block.parts[which], PARTS[which][-len(block.parts[which]) :], W[which][: len(block.parts[which])]]
        part_names = next((names for names in names if set(names) <= set(parts)), None)
        flat_name = INNER if which == IN else ""
        at = f"{block.hub_path}.{block.parameters[which]}"
        if flat_name in parts:
            pair = parts[flat_name]
        elif which == IN and block.is_gated and block.parameters[IN] in parts:
            A, B = parts[block.parameters[IN]]
            pair = FactorPair(A, block.join_rows([*B.chunk(2, 1)]))
        elif part_names is not None:
            pairs, at = [parts[name] for name in part_names], f"{block.hub_path}.0.{part_names[0]}"
            if len(pairs) == 2 and not torch.equal(pairs[0].A, pairs[1].A):
                if block.numbered and None not in values[part_names[0]]["A"]:
                    return {}  # `fuse_experts` reads it, with the alpha of each part
                pairs = separate_gate_up(pairs)
            B = block.join_rows([p.B for p in pairs]) if block.is_gated and which == IN else pairs[0].B
            pair = FactorPair(pairs[0].A, B)
        else:
            continue
        if not (pair.A.any() or pair.B.any()):
            continue  # zeros, for a server that needs each stack
        path_config: Any = config.at(at)
        r = path_config.r**0.5 if path_config.use_rslora else path_config.r
        out[which] = FactorPair(*(t.expand(n, -1, -1) for t in pair)), float(path_config.lora_alpha / r)
    return out


def assemble_factors(sides: Mapping[str, Mapping[int | None, Tensor]], n: int) -> FactorPair | None:
    """Return A (E or 1, r, in) and B (E or 1, out, r) of all n experts; None if one is missing or has an impossible
    shape.

    A side has one tensor for all experts, under the key None, or a tensor of one shape for each number from 0 to n - 1,
    which are stacked. Two matrices with a rank that n divides are split into those of the experts. Otherwise both must
    have three dimensions and the same rank.
    """
    factors = []
    for side in "AB":
        values = sides.get(side, {})
        if set(values) == {None}:
            factors.append(values[None])
        elif set(values) == {*range(n)} and len({t.shape for t in values.values()}) == 1:
            factors.append(torch.stack([values[e] for e in range(n)]))
        else:
            return None
    A, B = factors
    if A.dim() == B.dim() == 2 and len(A) == B.shape[1] and len(A) % n == 0:
        return FactorPair(*Opaque.split_matrices(A, B.contiguous(), n))
    is_pair = A.dim() == B.dim() == 3 and A.shape[1] == B.shape[2] and {len(A), len(B)} <= {1, n}
    return FactorPair(A, B) if is_pair else None


def separate_gate_up(pairs: list[FactorPair]) -> list[FactorPair]:
    """Return factors of gate and up with one common A, of the ranks of both together, for each expert.

    Each B has zeros for the other's rank. Factors that experts share are repeated for each.
    """
    n = max(len(t) for pair in pairs for t in pair)
    A = torch.cat([pair.A.expand(n, -1, -1) for pair in pairs], 1)
    first, second = (pair.B.expand(n, -1, -1) for pair in pairs)
    zeros = first.new_zeros(n, first.shape[1], second.shape[2]), second.new_zeros(n, second.shape[1], first.shape[2])
    return [FactorPair(A, torch.cat([first, zeros[0]], 2)), FactorPair(A, torch.cat([zeros[1], second], 2))]


def configure_stacks(
    config: Any, keys: list[str], read: Mapping[str, Mapping[str, BlockStack]], blocks: ServerBlocks
) -> None:
    """Set a config's targets, ranks and alphas for converted stacks, in place.

    `target_parameters` gets the stacks, `target_modules` the other modules of the file, both as the shortest
    unambiguous paths. Each stack gets an exact pattern of its rank and of the alpha that gives its scaling. Old
    patterns stay only for those other modules.

    Args:
        keys: those of the file after the conversion, without prefix.
        read: the factors and scalings of each block's stacks.
    """
    every = [stack.path for stack in blocks.stacks]
    names = {path: block.parameters for path, block in blocks.found.items()}
    reads = {f"{path}.{names[path][which]}": of for path, stacks in read.items() for which, of in stacks.items()}
    modules = {key.partition(".lora_")[0] for key in keys} & {*blocks.tree.modules} - {*read}
    ranks, alphas = (select_patterns(config, name, modules) for name in ("rank_pattern", "alpha_pattern"))
    for path, (pair, scaling) in reads.items():
        r = pair.A.shape[1]
        ranks[re.escape(path)], alphas[re.escape(path)] = r, scaling * (r**0.5 if config.use_rslora else r)
    config.target_modules = shorten_paths(sorted(modules), [*blocks.tree.modules])
    config.target_parameters = shorten_paths(sorted(reads), every)
    config.rank_pattern, config.alpha_pattern = ranks, alphas


def select_patterns(config: LoraConfig, name: str, modules: Collection[str]) -> dict[str, float]:
    """Return the patterns in the config's field `name` that reach one of these modules, with their values; {}
    for None.
    """
    patterns = getattr(config, name) or {}
    return {p: value for p, value in patterns.items() if any(config.reaches(p, path, name) for path in modules)}
