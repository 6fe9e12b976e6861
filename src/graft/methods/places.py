# SPDX-License-Identifier: Apache-2.0
# Supported inside: rooms may import this module.
"""Places in a transformer, found from its structure: blocks, and the layers that end their attentions and MLPs."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

from torch import nn

from graft.config.reading import compile_pattern
from graft.core.base_config import text_config
from graft.core.carrier import carrier_of
from graft.core.errors import ConfigError, NoMatchingPeftModuleError, UnsupportedLayerError, join_some
from graft.core.ops import find_op
from graft.methods.flow import UnfollowedError, flow_of

ATTENTION = re.compile(r"attn|attention", re.IGNORECASE)
CROSS = re.compile(r"cross|enc.*(attn|attention)", re.IGNORECASE)
MLP = re.compile(r"mlp|ffn|^ff$|feed_?forward|moe|DenseReluDense", re.IGNORECASE)
NORM = re.compile(r"norm|(^|_)ln(_|$)", re.IGNORECASE)
BESIDE = re.compile(rf"{NORM.pattern}|mamba|ssm", re.IGNORECASE)  # parts of a block that are no MLP
PARTS = re.compile(r"encoder|decoder|(down|mid|up)_blocks?(\.#)?")  # of a model, with blocks of one kind
OTHERS = re.compile(r"visi|visual|image|audio|speech|sound|video", re.IGNORECASE)  # parts of a model next to its text
# last names of the layers that bring a sublayer back to the width of the block
END = re.compile(
    r"(o_proj|out_proj|proj_out|dense|c_proj|o|wo|out_lin|lin2|linear2|fc2|fc_out|down_proj|dense_4h_to_h|w2|"
    r"ffn_output|\d+)"
)


@dataclass(frozen=True)
class Block:
    """A block of a transformer, by paths in the model.

    Attributes:
        width: the width of its hidden states.
        ends: by attention, the layer that ends it.
        crosses: the attentions to an encoder.
        mlp: the layer that ends its MLP, or the MLP itself where several do (experts).
        norm: the norm of the sum of MLP and residual, if its output is the block's; None before `follow`.
        residual: the module with that residual as its input; None before `follow`.
    """

    path: str
    width: int
    ends: Mapping[str, str]
    crosses: frozenset[str]
    mlp: str
    norm: str | None = None
    residual: str | None = None

    def ends_of(self, cross: bool) -> list[str]:
        """Return the layers that end the attentions to an encoder (`cross`), or those that end the other attentions; []
        if there are none.
        """
        return [end for attention, end in self.ends.items() if (attention in self.crosses) is cross]

    def follow(self, module: nn.Module) -> Block:
        """Return a copy of the block with norm, residual and cross attentions, found by a run of its code without
        values (`flow_of`).

        The paths are those in the model. Cross attentions known by name stay; those that the run finds are added if the
        block has several attentions.

        Raises:
            UnsupportedLayerError: the block adds its MLP to no residual, or not in its first output.
            UnfollowedError: its code cannot run without values. Both errors get the block's path and a remedy.
        """
        inside = f"{self.path}."
        norms = [p for p, m in walk(module) if NORM.search(p.rpartition(".")[2]) or type(m).__name__.endswith("Norm")]
        attentions = [p.removeprefix(inside) for p in self.ends]
        try:
            flow = flow_of(module, attentions, norms, self.mlp.removeprefix(inside))
        except UnsupportedLayerError as e:
            raise type(e)(
                f"Block '{self.path}' ({type(module).__name__}): {e}. Name the modules by target_modules, or those of "
                "a bottleneck by attention_modules, mlp_modules or block_modules."
            ) from e
        norm, residual = (p and inside + p for p in (flow.norm, flow.residual))
        crosses = self.crosses | {inside + p for p in flow.crosses if len(attentions) > 1}
        return replace(self, crosses=crosses, norm=norm, residual=residual)


def walk(module: nn.Module, path: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Yield the path and module of each module of a model, depth first, with adapter layers replaced by their base
    modules. A module that has several paths comes once for each.
    """
    while (carrier := carrier_of(module)) is not None:
        module = carrier.base_module
    yield path, module
    for name, child in module._modules.items():
        if child is not None:
            yield from walk(child, f"{path}.{name}" if path else name)


def find_blocks(model: nn.Module) -> list[Block]:
    """Return the blocks of a model, encoder first, from the names and sizes of its linear layers (`blocks_in`).

    Raises:
        NoMatchingPeftModuleError: the names show no blocks.
    """
    linears: dict[str, tuple[int, int]] = {}
    modules = []
    for path, module in walk(model):
        modules.append(path)
        op = find_op(module)
        if op.linear:
            linears[path] = op.dims(module)
    blocks = blocks_in(linears, modules, getattr(model, "config", None))
    if not blocks:
        raise NoMatchingPeftModuleError(
            f"{type(model).__name__} has no blocks with an attention and an MLP, by their names. Name the modules in "
            f"target_modules. Its linear layers: {join_some(sorted(linears)) or 'none'}."
        )
    return blocks


def chosen_blocks(model: nn.Module, layers: Collection[int] | str) -> list[Block]:
    """Return the blocks with the numbers `layers`, in that order; for "all", or any other text, all blocks, encoder
    first.

    The last block of each module type is followed as a check. A block with code that needs values (UnfollowedError)
    passes.

    Raises:
        ConfigError: the model has no block of such a number; negative ones are none.
        NoMatchingPeftModuleError: the names show no blocks.
        UnsupportedLayerError: the first output of a block does not continue its first input.
    """
    blocks = find_blocks(model)
    if not isinstance(layers, str):
        if any(not 0 <= i < len(blocks) for i in layers):
            raise ConfigError(f"layers={layers}: the model has blocks 0 to {len(blocks) - 1}. Name others.")
        blocks = [blocks[i] for i in layers]
    modules = dict(walk(model))
    for block in {type(modules[block.path]): block for block in blocks}.values():
        with suppress(UnfollowedError):  # which nothing here depends on
            block.follow(modules[block.path])
    return blocks


def blocks_in(linears: Mapping[str, tuple[int, int]], modules: Collection[str], config: Any = None) -> list[Block]:
    """Return the blocks of a model, or [] if there are none.

    A block is a numbered path with an attention below it, and other linear layers or a module with an MLP's name.

    An attention has "attn" or "attention" in its name, in any case. It belongs to the innermost such path around it.
    Blocks with paths that differ only in numbers or in PARTS, such as "encoder" and "decoder", are one list; the
    function returns one list. Lists of the width of the text come first. Of these, those that are not for images or
    sound come first, and then the longest. Routers do not count.

    Args:
        linears: the sizes (out, in) of its linear layers.
        modules: the paths of all modules.
        config: of the model, which may say the width of its text (`text_width`).
    """
    hidden = text_width(config)
    linears = {path: sizes for path, sizes in linears.items() if "router" not in path.split(".")}
    attended: set[str] = set()  # paths that end in a number, with an attention below them
    more: set[str] = set()  # such paths with other layers below them
    for path in linears:
        for block in list_numbered_prefixes(path):
            (attended if ATTENTION.search(path[len(block) :]) else more).add(block)
    for path in modules:
        if MLP.search(path.rpartition(".")[2]):
            more.update(block for block in list_numbered_prefixes(path) if not ATTENTION.search(path[len(block) :]))
    attended &= more
    inside: dict[str, list[str]] = {}  # by block
    for path in linears:
        around = [b for b in list_numbered_prefixes(path) if b in attended and ATTENTION.search(path[len(b) :])]
        inside |= {block: [] for block in around[:1]}  # the innermost
    for path in linears:
        for block in list_numbered_prefixes(path):
            if block in inside:
                inside[block].append(path)
    lists: dict[str, list[str]] = {}
    for block in inside:
        lists.setdefault(PARTS.sub("", re.sub(r"\d+", "#", block)), []).append(block)
    lists_of_blocks = [
        [make_block(block, inside[block], linears, modules) for block in blocks] for blocks in lists.values()
    ]
    wide = [blocks for blocks in lists_of_blocks if blocks[0].width == hidden]
    of_text = [blocks for blocks in wide if not OTHERS.search(blocks[0].path)]
    return max(of_text or wide or lists_of_blocks, key=len, default=[])


def list_numbered_prefixes(path: str) -> list[str]:
    """Return the beginnings of a path that end in a number, the longest first: "a.0.b.1.c" gives "a.0.b.1" and "a.0".

    Without numbers it is [].
    """
    parts = path.split(".")
    return [".".join(parts[: i + 1]) for i in range(len(parts) - 1, -1, -1) if parts[i].isdecimal()]


def make_block(block: str, paths: list[str], linears: Mapping[str, tuple[int, int]], modules: Iterable[str]) -> Block:
    """Return the block at a path, from its linear layers `paths` and the model's modules.

    Layers below one attention are a group; each number of a list of attentions has its own group. A group ends at the
    attention if that holds "experts", else at its last layer of the block's width. Attentions with a name of cross
    attentions count as such only next to other attentions. The MLP ends at the module that holds "experts", if one is
    outside the attentions. Without linear layers outside attentions, norms and state-space parts it is the first module
    with an MLP's name. Else it is `find_last_layer` of these layers, or of those below an MLP's name, if any.

    The width is the output width of the first attention's last layer with a name of END. Without one it is the input
    width of its first projection, or its smaller size if no layer has that output width.
    """
    groups: dict[str, list[str]] = {}  # by attention
    mlp_paths = []
    for path in paths:
        parts = path[len(block) + 1 :].split(".")
        at = next((i for i, part in enumerate(parts) if ATTENTION.search(part)), None)
        if at is not None:
            at += parts[at + 1].isdecimal() if at + 1 < len(parts) else 0  # one of a list of attentions
            groups.setdefault(".".join([block, *parts[: at + 1]]), []).append(path)
        elif not any(BESIDE.search(part) for part in parts[:-1]):
            mlp_paths.append(path)
    first = next(iter(groups.values()))
    sizes = linears[first[0]]  # of the first projection of queries
    width = sizes[1] if any(linears[p][0] == sizes[1] for p in paths) else min(sizes)  # a file may hold (in, out)
    width = next((linears[p][0] for p in reversed(first) if END.fullmatch(p.rpartition(".")[2])), width)
    within = [path for path in modules if path.startswith(f"{block}.")]
    inner = [path for path in within if not ATTENTION.search(path[len(block) :])]
    experts = next((path for path in inner if path.endswith(".experts")), None)
    if experts is not None or not mlp_paths:
        mlp = experts.rpartition(".")[0] if experts else next(p for p in inner if MLP.search(p.rpartition(".")[2]))
    else:
        called = [path for path in mlp_paths if any(map(MLP.search, path[len(block) :].split(".")))]
        mlp = find_last_layer(called or mlp_paths, linears, width)
    return Block(
        block,
        width,
        {
            at: at if f"{at}.experts" in within else find_last_layer(paths, linears, width)
            for at, paths in groups.items()
        },
        frozenset(group for group in groups if CROSS.search(group[len(block) :]) and len(groups) > 1),
        mlp,
    )


def find_last_layer(paths: list[str], linears: Mapping[str, tuple[int, int]], width: int) -> str:
    """Return the layer that ends a sublayer: the last with an output of `width` among those with a name of END, such as
    o_proj or fc2 (all, if none has).

    If none is that wide, return the last of them.
    """
    named = [path for path in paths if END.fullmatch(path.rpartition(".")[2])] or paths
    return ([path for path in named if linears[path][0] == width] or named)[-1]


def match_paths(paths: Iterable[str], names: Collection[str] | str, field: str) -> list[str]:
    """Return the paths that `names` selects, in their order: whole paths or their ends after a dot, or one regular
    expression for whole paths.

    Raises:
        NoMatchingPeftModuleError: no path fits; it tells the field and the names there are.
        ConfigError: the text is no regular expression.
    """
    paths = list(paths)
    if isinstance(names, str):
        regex = compile_pattern(names, field)
        matches = [path for path in paths if regex.fullmatch(path)]
    else:
        matches = [path for path in paths if any(path == n or path.endswith(f".{n}") for n in names)]
    if not matches:
        ends = sorted({path.rpartition(".")[2] for path in paths if path})
        raise NoMatchingPeftModuleError(
            f"{field}={names} matched nothing. Names that the model has: {join_some(ends)}."
        )
    return matches


def find_width(model: nn.Module) -> int | None:
    """Return the width of a model's hidden states by `width_in` of its config (of a multimodal one, its text's); None
    if the config does not say it.
    """
    return width_in(text_config(model))


def text_width(config: Any) -> int | None:
    """Return the width of a model's text, from a config with separate entries for text and images or sound; None for
    other configs.

    config: an object, or the content of a config.json.
    """
    if isinstance(config, Mapping):
        return width_in(SimpleNamespace(**config["text_config"])) if "text_config" in config else None
    text = text_config(SimpleNamespace(config=config))
    return None if text is config else width_in(text)


def width_in(config: object) -> int | None:
    """Return the first of `hidden_size`, `d_model`, `n_embd` and `dim` that a config has and that is not 0 or None;
    None without one.
    """
    return next((v for n in ("hidden_size", "d_model", "n_embd", "dim") if (v := getattr(config, n, None))), None)


ENCODERS = re.compile(r"(.*\.)?encoder\.(.*\.)?(embed_tokens|word_embeddings)")  # embeddings of words


def find_embedding_output(paths: Iterable[str], modules: Collection[str], twofold: bool) -> str | None:
    """Return the path of the module with the output that enters the first block; None without `paths`, those of the
    word embedding.

    Of several paths the first counts. It is the module "embeddings" around the embedding; else "drop" next to it, if
    there is a "wpe"; else "layernorm_embedding" next to it; else the embedding. twofold: the model has an encoder and a
    decoder. Then `paths` are not read: they are those of "embed_tokens" or "word_embeddings" below an "encoder".
    """
    if twofold:
        paths = [path for path in modules if ENCODERS.fullmatch(path)]
    for path in paths:
        around, _, _ = path.rpartition(".")
        if around.rpartition(".")[2] == "embeddings":  # with positions and their norm
            return around
        drop, norm = (f"{around}.{name}".lstrip(".") for name in ("drop", "layernorm_embedding"))
        if drop in modules and f"{around}.wpe".lstrip(".") in modules:  # of the sum with positions
            return drop
        return norm if norm in modules else path
    return None
