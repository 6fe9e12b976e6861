# SPDX-License-Identifier: Apache-2.0
"""Places in a transformer, found from its structure: blocks, and what ends their attentions and MLPs."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass

from torch import nn

from graft.config.reading import pattern
from graft.core.base_config import text_config
from graft.core.carrier import carrier_of
from graft.core.errors import ConfigError, NoMatchingPeftModuleError, some
from graft.core.ops import find_op

ATTENTION = re.compile(r"attn|attention", re.IGNORECASE)
CROSS = re.compile(r"cross|enc.*(attn|attention)", re.IGNORECASE)
MLP = re.compile(r"mlp|ffn|feed_?forward|moe|DenseReluDense", re.IGNORECASE)
NORM = re.compile(r"norm|(^|_)ln(_|$)", re.IGNORECASE)
# last names of the layers that bring a sublayer back to the width of the block
END = re.compile(
    r"(o_proj|out_proj|proj_out|dense|c_proj|o|wo|out_lin|lin2|linear2|fc2|fc_out|down_proj|dense_4h_to_h|w2|"
    r"ffn_output)"
)
# norms that stand after their sublayers, by model type: the one after the MLP
POST_LN = {
    **dict.fromkeys(
        ["bert", "roberta", "xlm-roberta", "electra", "camembert", "deberta", "deberta-v2", "layoutlm", "ernie"],
        "output.LayerNorm",
    ),
    "distilbert": "output_layer_norm",
    "albert": "full_layer_layer_norm",
    "bart": "final_layer_norm",
}
# of norms that stand before their sublayers, that of the MLP: the first of these names that a block has
BEFORE_MLP = re.compile(
    r"pre_feedforward_layernorm|pre_mlp_layernorm|ln_mlp|post_attention_layernorm|ln_2|layernorm_after|norm2|layer_norm2|"
    r"ffn_norm|final_layer_norm"
)


@dataclass(frozen=True)
class Block:
    """A block of a transformer, by paths in the model.

    Attributes:
        width: of its hidden states.
        attentions: the layers that end its attentions to itself.
        crosses: those that end its attentions to an encoder.
        mlp: the layer that ends its MLP, or the MLP itself where several do (experts).
        first: the first layer of the MLP.
        norms: in the order in which the block defines them.
    """

    path: str
    width: int
    attentions: tuple[str, ...]
    crosses: tuple[str, ...]
    mlp: str
    first: str
    norms: tuple[str, ...] = ()

    def norm_after_mlp(self, model_type: str) -> str | None:
        """Return the norm after the MLP and its residual; None if norms stand before their sublayers."""
        path = f"{self.path}.{POST_LN.get(model_type)}"
        return path if path in self.norms else None

    def norm_before_mlp(self) -> str | None:
        """Return the norm before the MLP, whose input is the residual."""
        found = [n for n in self.norms if BEFORE_MLP.fullmatch(n.rpartition(".")[2])]
        ranked = sorted(found, key=lambda n: BEFORE_MLP.pattern.split("|").index(n.rpartition(".")[2]))
        return ranked[0] if ranked else self.norms[-1] if self.norms else None


def walk(module: nn.Module, path: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Yield the modules of a model with their paths, as they are without adapters."""
    while (carrier := carrier_of(module)) is not None:
        module = carrier.base_module
    yield path, module
    for name, child in module._modules.items():
        if child is not None:
            yield from walk(child, f"{path}.{name}" if path else name)


def blocks_of(model: nn.Module) -> list[Block]:
    """Return the blocks of a model, encoder first.

    Raises:
        NoMatchingPeftModuleError: it has none that can be told.
    """
    linears: dict[str, tuple[int, int]] = {}
    modules = []
    for path, module in walk(model):
        modules.append(path)
        op = find_op(module)
        if op.linear:
            linears[path] = op.dims(module)
    found = blocks_in(linears, modules)
    if not found:
        raise NoMatchingPeftModuleError(
            f"{type(model).__name__} has no blocks with an attention and an MLP whose names tell: name the modules in "
            f"target_modules. Its linear layers: {some(sorted(linears)) or 'none'}."
        )
    return found


def chosen_blocks(model: nn.Module, layers: Collection[int] | str) -> list[Block]:
    """Return the blocks of these numbers, encoder first; all for "all".

    Raises:
        ConfigError: the model has no block of such a number.
        NoMatchingPeftModuleError: it has none that can be told.
    """
    blocks = blocks_of(model)
    if isinstance(layers, str):
        return blocks
    if any(not 0 <= i < len(blocks) for i in layers):
        raise ConfigError(f"layers={layers}: the model has blocks 0 to {len(blocks) - 1}.")
    return [blocks[i] for i in layers]


def blocks_in(linears: Mapping[str, tuple[int, int]], modules: Collection[str]) -> list[Block]:
    """Return the blocks of a model, by the sizes (out, in) of its linear layers and the paths of all modules."""
    inside: dict[str, list[str]] = {}  # by block
    plain = [path for path in linears if not ATTENTION.search(path)]
    mlps = [path for path in modules if MLP.search(path.rpartition(".")[2])]
    for path in linears:
        for block in numbered(path) if ATTENTION.search(path) else ():
            if any(p.startswith(f"{block}.") for p in (*plain, *mlps)):
                inside.setdefault(block, [])
                break
    for block in inside:
        inside[block] = [path for path in linears if path.startswith(f"{block}.")]
    lists: dict[str, list[str]] = {}
    for block in inside:
        lists.setdefault(re.sub(r"\d+", "#", block), []).append(block)
    longest = max(lists, key=lambda name: len(lists[name]), default="")
    both = longest.replace("encoder", "decoder")
    chosen = [block for name, blocks in lists.items() if name.replace("encoder", "decoder") == both for block in blocks]
    return [made(block, inside[block], linears, modules) for block in chosen]


def numbered(path: str) -> list[str]:
    """Return the beginnings of a path that end in a number, the longest first."""
    parts = path.split(".")
    return [".".join(parts[: i + 1]) for i in range(len(parts) - 1, -1, -1) if parts[i].isdecimal()]


def made(block: str, own: list[str], linears: Mapping[str, tuple[int, int]], modules: Iterable[str]) -> Block:
    groups: dict[str, list[str]] = {}  # by attention
    rest = []
    for path in own:
        parts = path[len(block) + 1 :].split(".")
        at = next((i for i, part in enumerate(parts) if ATTENTION.search(part)), None)
        if at is None:
            rest.append(path)
        else:
            groups.setdefault(".".join(parts[: at + 1]), []).append(path)
    sizes = linears[next(iter(groups.values()))[0]]  # of the first projection of queries
    width = sizes[1] if any(linears[p][0] == sizes[1] for p in own) else min(sizes)  # a file may hold (in, out)
    crosses = [group for group in groups if CROSS.search(group) and len(groups) > 1]
    within = [path for path in modules if path.startswith(f"{block}.")]
    several = next((path for path in within if path.endswith(".experts")), None)
    if several is not None or not rest:
        mlp = several.rpartition(".")[0] if several else next(p for p in within if MLP.search(p.rpartition(".")[2]))
        first = mlp
    else:
        mlp, first = end(rest, linears, width), rest[0]
    return Block(
        block,
        width,
        tuple(end(paths, linears, width) for group, paths in groups.items() if group not in crosses),
        tuple(end(groups[group], linears, width) for group in crosses),
        mlp,
        first,
        tuple(path for path in within if NORM.search(path.rpartition(".")[2])),
    )


def end(paths: list[str], linears: Mapping[str, tuple[int, int]], width: int) -> str:
    """Return the layer that ends a sublayer: of those with a name that says so, the last that is as wide."""
    named = [path for path in paths if END.fullmatch(path.rpartition(".")[2])] or paths
    return ([path for path in named if linears[path][0] == width] or named)[-1]


def named(paths: Iterable[str], names: Collection[str] | str, field: str) -> list[str]:
    """Return the paths that a field of a config names: whole ones or their ends, or one regular expression.

    Raises:
        NoMatchingPeftModuleError: there is no such path.
        ConfigError: it is no regular expression.
    """
    paths = list(paths)
    if isinstance(names, str):
        regex = pattern(names, field)
        found = [path for path in paths if regex.fullmatch(path)]
    else:
        found = [path for path in paths if any(path == n or path.endswith(f".{n}") for n in names)]
    if not found:
        ends = sorted({path.rpartition(".")[2] for path in paths if path})
        raise NoMatchingPeftModuleError(f"{field}={names} matched nothing. Names that the model has: {some(ends)}.")
    return found


def hidden_size(model: nn.Module) -> int | None:
    """Return the width of a model's hidden states, as its config says; None if it does not."""
    config = text_config(model)
    return next((v for n in ("hidden_size", "d_model", "n_embd", "dim") if (v := getattr(config, n, None))), None)
