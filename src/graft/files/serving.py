# SPDX-License-Identifier: Apache-2.0
"""Will a server take an adapter, and do what it says? What is known of servers is data: servers.json.

A row there says of a server: under this condition it does that. A condition is one of the functions below, which
returns what in the adapter fulfils it, for people to read; nothing if the adapter does not.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property

from graft.config import pair
from graft.config.reading import Json
from graft.core.errors import join_some
from graft.files.base import BaseDescription
from graft.files.bases import view_by_model_names
from graft.files.errors import UnknownServerError
from graft.files.lint import list_gaps
from graft.files.names import check_shapes, group_layers_by_kind, split_layer_number
from graft.files.neutral import AdapterFile, LowRank, OtherMethod
from graft.files.tensors import read_header

DATA = os.path.join(os.path.dirname(__file__), "servers.json")
VERDICTS = ("refused", "wrong", "ignored", "ok")  # ok: a thing to know
OF_SGLANG = re.compile(r".*\.experts\.(gate_up|gate|up|down)_proj\.lora_[AB]\.weight")


@dataclass(frozen=True)
class ServerOptions:
    """How a server is started, where that decides.

    Attributes:
        max_rank: `--max-lora-rank`; None: the server's own default.
        targets: `--lora-target-modules`; None: all that the server knows.
    """

    max_rank: int | None = None
    targets: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Server:
    """What the data says of a server, but for its rows.

    Attributes:
        version: that was run or read, on `date`.
        formats: of adapter files that it loads.
        max_rank: the default of its limit, if it has one.
        heads: modules that it takes whole.
    """

    name: str
    version: str
    date: str
    formats: tuple[str, ...]
    max_rank: int | None = None
    heads: tuple[str, ...] = ()


@dataclass(frozen=True)
class Finding:
    """What a server does with an adapter, and why.

    Attributes:
        verdict: "refused", "wrong" (it loads, and computes something else), "ignored" (it loads, and that part does
            nothing), or "ok" (with something to know).
        what: in the adapter makes it do so.
        evidence: "run": by us, with this version; "source": read in its source or documentation; else a thread.
    """

    server: str
    version: str
    date: str
    condition: str
    verdict: str
    what: str
    does: str
    remedy: str
    evidence: str

    @property
    def ok(self) -> bool:
        return self.verdict == "ok"


@dataclass(frozen=True)
class Subject:
    """What a condition looks at."""

    adapter: AdapterFile
    server: Server
    options: ServerOptions = field(default_factory=ServerOptions)
    base: BaseDescription | None = None

    @property
    def config(self) -> Json:
        return self.adapter.config

    @property
    def low_rank(self) -> dict[str, LowRank]:
        return self.adapter.low_rank

    @cached_property
    def absent_modules(self) -> list[str]:
        """The modules that the model which the server runs does not have."""
        paths = [owner_path(path, module) for path, module in self.adapter.modules.items()]
        return [] if self.base is None else [path for path in paths if path not in self.modules]

    @cached_property
    def modules(self) -> set[str]:
        """The base's modules, by its files and, if these lack some of the adapter's, by its model too.

        Files of multimodal models have other names in part: `language_model.model.layers` in the file,
        `model.language_model.layers` in the model.
        """
        if self.base is None:
            return set()
        known = {*self.base.modules}
        paths = {owner_path(path, module) for path, module in self.adapter.modules.items()}
        more = None if known.issuperset(paths) else view_by_model_names(self.base)
        return known if more is None else known.union(more.modules)


Condition = Callable[[Subject], Iterable[str]]
CONDITIONS: dict[str, Condition] = {}


def register_condition(function: Condition) -> Condition:
    CONDITIONS[function.__name__] = function
    return function


@cache
def read_server_data() -> Json:
    with open(DATA, encoding="utf-8") as f:
        document: Json = json.load(f)
    return document


def list_servers() -> dict[str, Server]:
    """Return the servers that the data knows, by name."""
    return {
        name: Server(
            name, row["version"], row["date"], tuple(row["formats"]), row.get("max_rank"), tuple(row.get("heads", ()))
        )
        for name, row in read_server_data()["servers"].items()
    }


def get_server(name: str) -> Server:
    """Return a server that the data knows; raise UnknownServerError if it does not."""
    known = list_servers()
    if name not in known:
        raise UnknownServerError(f"Nothing is known of the server {name!r}; there are {', '.join(known)}.")
    return known[name]


def check_servers(
    adapter: AdapterFile,
    names: Sequence[str],
    base: BaseDescription | None = None,
    options: ServerOptions | None = None,
) -> list[Finding]:
    """Return what these servers do with an adapter as its file stands, other than apply it.

    Args:
        names: of servers in the data: "vllm", "llama.cpp".
        base: the model that they serve; without it, names of modules cannot be compared.

    Raises:
        UnknownServerError: there is nothing known of a server.
        BaseModelMismatchError: factors make no update of the base's weight, by their shapes.
    """
    asked = [get_server(name) for name in dict.fromkeys(names)]
    if base is not None:
        # whose weight the file has as well
        copied_paths = {name.rpartition(".")[0] for name in list_copied_weights(adapter)}
        check_shapes({path: of for path, of in adapter.low_rank.items() if path not in copied_paths}, adapter, base)
    findings = []
    for server in asked:
        subject = Subject(adapter, server, options or ServerOptions(), base)
        for row in (*read_server_data()["every"], *read_server_data()["servers"][server.name]["rows"]):
            if what := list(CONDITIONS[row["when"]](subject)):
                where = "BASE" if base is None else base.path
                known = dict(server=server.name, adapter=adapter.path, format=server.formats[0], base=where)
                known["max_rank"] = str(subject.options.max_rank or server.max_rank)
                remedy = read_server_data()["remedies"][row["remedy"]].format(**known)
                facts = server.name, server.version, server.date, row["when"], row["verdict"], join_some(what, 3)
                findings.append(Finding(*facts, row["does"], remedy, row.get("evidence", "run")))
    return findings


# conditions: of the file


@register_condition
def another_format(s: Subject) -> Iterable[str]:
    if s.adapter.format not in s.server.formats:
        yield f"the file is of the format {s.adapter.format}"


@register_condition
def torch_file(s: Subject) -> Iterable[str]:
    if s.adapter.format == "peft" and not os.path.exists(os.path.join(s.adapter.path, pair.SAFETENSORS)):
        yield pair.TORCH


@register_condition
def file_of_added_tokens(s: Subject) -> Iterable[str]:
    path = os.path.join(s.adapter.path, "added_tokens.json")
    if os.path.isdir(s.adapter.path) and os.path.exists(path):
        yield "added_tokens.json"


@register_condition
def fields_missing(s: Subject) -> Iterable[str]:
    if s.adapter.format == "peft" and s.adapter.method == "LORA":
        yield from (name for name in ("r", "lora_alpha", "target_modules") if s.config.get(name) is None)


@register_condition
def not_whole(s: Subject) -> Iterable[str]:
    return (f"it lacks {what}" for what in list_gaps(s.adapter, s.base))


@register_condition
def unknown_keys(s: Subject) -> Iterable[str]:
    return s.adapter.unknown_keys


# conditions: what the adapter is


@register_condition
def another_method(s: Subject) -> Iterable[str]:
    if s.adapter.method != "LORA":
        yield f"its method is {s.adapter.method}"


def make_variant_condition(name: str) -> Condition:
    def of(s: Subject) -> Iterable[str]:
        if any(module.method == name for module in s.adapter.modules.values()):
            yield name

    return of


CONDITIONS |= {
    "kasa": make_variant_condition("KASA"),
    "blocks": make_variant_condition("BDLORA"),
    "pooled": make_variant_condition("QALORA"),
}


@register_condition
def dora(s: Subject) -> Iterable[str]:
    return (f"magnitude of {path}" for path, lora in s.low_rank.items() if lora.magnitude is not None)


@register_condition
def dora_of_kohya(s: Subject) -> Iterable[str]:
    return dora(s) if s.adapter.format == "kohya" else ()


@register_condition
def transformer_of_kohya(s: Subject) -> Iterable[str]:
    """Of OneTrainer's and ComfyUI's names, which `graft convert --to kohya` writes."""
    if s.adapter.format == "kohya" and s.adapter.path.endswith(".safetensors"):
        names = {key.partition(".")[0] for key in read_header(s.adapter.path)[0]}
        yield from sorted(name for name in names if name.startswith("lora_transformer_"))


@register_condition
def stacks_of_sglang(s: Subject) -> Iterable[str]:
    """Experts in 3-D factors by names of their projections."""
    path = os.path.join(s.adapter.path, pair.SAFETENSORS)
    if s.adapter.is_server_layout and os.path.exists(path):
        header = read_header(path)[0]
        yield from sorted(key for key, t in header.items() if len(t.shape) == 3 and OF_SGLANG.fullmatch(key))


@register_condition
def bias(s: Subject) -> Iterable[str]:
    yield from (f"lora_bias of {path}" for path, lora in s.low_rank.items() if lora.bias is not None)
    yield from (name for name in s.adapter.full if is_lone_bias(name, s.adapter))


@register_condition
def extra_tensors(s: Subject) -> Iterable[str]:
    names = {name for lora in s.low_rank.values() for name in lora.extra if not name.startswith("lora_shift")}
    return sorted(names)


@register_condition
def invocation_tokens(s: Subject) -> Iterable[str]:
    if s.config.get("alora_invocation_tokens"):
        yield f"alora_invocation_tokens={s.config['alora_invocation_tokens']}"


@register_condition
def layer_replication(s: Subject) -> Iterable[str]:
    if s.config.get("layer_replication"):
        yield f"layer_replication={s.config['layer_replication']}"


@register_condition
def base_changed_and_kept(s: Subject) -> Iterable[str]:
    return (f"lora_shift of {path}" for path, lora in s.low_rank.items() if lora.shift is not None)


@register_condition
def base_changed(s: Subject) -> Iterable[str]:
    if s.adapter.changed_base is not None:
        yield f"init_lora_weights={s.config.get('init_lora_weights')!r}"


# conditions: beside the low-rank products


def is_lone_bias(name: str, adapter: AdapterFile) -> bool:
    return name.endswith(".bias") and f"{name.removesuffix('bias')}weight" not in adapter.full


def list_norms(adapter: AdapterFile) -> list[str]:
    """Return the modules trained whole whose weight is a vector."""
    weights = {name.rpartition(".")[0]: t for name, t in adapter.full.items() if name.endswith(".weight")}
    return [module for module, t in weights.items() if len(t.shape) == 1]


def list_copied_weights(adapter: AdapterFile) -> list[str]:
    """Return the names of weights of the base that stand in a file beside factors of the same module, as they were."""
    return [name for name in adapter.full if name.rpartition(".")[0] in adapter.modules and name.endswith(".weight")]


@register_condition
def whole_norms(s: Subject) -> Iterable[str]:
    return list_norms(s.adapter)


@register_condition
def whole_modules(s: Subject) -> Iterable[str]:
    names = {*s.adapter.full} - {*list_copied_weights(s.adapter)}
    modules = {name.rpartition(".")[0] for name in names if not is_lone_bias(name, s.adapter)}
    return sorted(m for m in modules - {*list_norms(s.adapter)} if last_name(m) not in s.server.heads)


@register_condition
def another_vocabulary(s: Subject) -> Iterable[str]:
    """Of an embedding that got other rows after the base was made."""
    shapes = {} if s.base is None else s.base.shapes
    for name in list_copied_weights(s.adapter):
        shape, base_shape = s.adapter.full[name].shape, shapes.get(name)
        if base_shape is not None and shape != base_shape:
            yield f"{name} has the shape {shape}, the base's {base_shape}"


@register_condition
def token_rows(s: Subject) -> Iterable[str]:
    return (f"{len(rows.load()) // 8} rows of {name}" for name, (rows, _) in s.adapter.rows.items())


@register_condition
def embeddings(s: Subject) -> Iterable[str]:
    return (path for path, lora in s.low_rank.items() if lora.kind == "embedding")


@register_condition
def output_head(s: Subject) -> Iterable[str]:
    return (path for path in s.low_rank if last_name(path) == "lm_head")


@register_condition
def experts(s: Subject) -> Iterable[str]:
    return (path for path, lora in s.low_rank.items() if lora.kind == "experts" and not s.adapter.is_server_layout)


@register_condition
def stacks_of_peft(s: Subject) -> Iterable[str]:
    """Experts as PEFT has them, for a base of which the server wants them one by one."""
    from graft.io.servers import STACKED_IN_VLLM  # loads torch

    kind = "" if s.base is None else str(s.base.config.get("model_type"))
    return () if kind.startswith(STACKED_IN_VLLM) else experts(s)


@register_condition
def kernels(s: Subject) -> Iterable[str]:
    for path, lora in s.low_rank.items():
        if lora.kind == "conv" and any(n > 1 for n in lora.A.shape[2:]):
            yield f"a kernel of {' × '.join(map(str, lora.A.shape[2:]))} on {path}"


# conditions: rank and scale


def read_r_and_alpha(s: Subject) -> tuple[float, float] | None:
    """Return r and lora_alpha of a config of PEFT."""
    r, alpha = s.config.get("r"), s.config.get("lora_alpha")
    if isinstance(r, (int, float)) and isinstance(alpha, (int, float)) and r > 0:
        return float(r), float(alpha)
    return None


def list_wrong_scales(s: Subject, expected: Callable[[LowRank, float, float], float]) -> Iterable[str]:
    """Yield the modules whose scale is not what a server makes of a rank and the config's r and lora_alpha."""
    if (numbers := read_r_and_alpha(s)) is not None:
        for path, lora in s.low_rank.items():
            server_scale = expected(lora, *numbers)
            if not math.isclose(lora.scale, server_scale, rel_tol=1e-6):
                yield f"{path} has the scale {lora.scale:.4g}, and would get {server_scale:.4g}"


@register_condition
def rank_above_the_limit(s: Subject) -> Iterable[str]:
    limit = s.options.max_rank or s.server.max_rank
    if limit is not None:
        yield from (
            f"{path} has rank {h.rank}, the limit is {limit}" for path, h in s.low_rank.items() if h.rank > limit
        )


@register_condition
def rank_above_128(s: Subject) -> Iterable[str]:
    return (f"{path} has rank {h.rank}" for path, h in s.low_rank.items() if h.rank > 128)


@register_condition
def several_ranks(s: Subject) -> Iterable[str]:
    ranks = {h.rank for h in s.low_rank.values()}
    if len(ranks) > 1:
        yield f"ranks {sorted(ranks)}"


@register_condition
def scale_is_not_one(s: Subject) -> Iterable[str]:
    return list_wrong_scales(s, lambda lora, r, alpha: 1.0)


@register_condition
def scale_is_not_alpha_by_the_rank(s: Subject) -> Iterable[str]:
    return list_wrong_scales(s, lambda lora, r, alpha: alpha / lora.rank)


@register_condition
def scale_is_not_alpha_by_r(s: Subject) -> Iterable[str]:
    return list_wrong_scales(s, lambda lora, r, alpha: alpha / r)


@register_condition
def scale_is_not_the_configs(s: Subject) -> Iterable[str]:
    return list_wrong_scales(s, lambda lora, r, alpha: alpha / (math.sqrt(r) if s.config.get("use_rslora") else r))


@register_condition
def scale_is_not_told(s: Subject) -> Iterable[str]:
    """Of diffusers' files: neither metadata nor alphas say it, and the reader takes one."""
    if s.adapter.format == "diffusers" and "lora_adapter_metadata" not in s.adapter.metadata:
        yield from (path for path, lora in s.low_rank.items() if lora.scale != 1.0)


# conditions: which modules


@register_condition
def regular_expression(s: Subject) -> Iterable[str]:
    targets = s.config.get("target_modules")
    if isinstance(targets, str) and targets not in ("all-linear", "all"):
        yield f"target_modules={targets!r}"


@register_condition
def q_without_v(s: Subject) -> Iterable[str]:
    for path in s.low_rank:
        stem, _, name = path.rpartition(".")
        if name == "q_proj" and f"{stem}.v_proj" not in s.low_rank:
            yield path


@register_condition
def some_layers_only(s: Subject) -> Iterable[str]:
    """A kind of module that not every layer has an adapter on."""
    kinds = group_layers_by_kind(s.low_rank)
    every = {layer for layers in kinds.values() for layer in layers}
    base_layers = dict.fromkeys(kinds, every) if s.base is None else group_layers_by_kind(s.modules)
    for kind, layers in kinds.items():
        if missing := base_layers.get(kind, layers) - layers:
            yield f"{kind.replace('#', 'N')} on {len(layers)} of {len(layers | missing)} layers"


@register_condition
def targets_excluded(s: Subject) -> Iterable[str]:
    packed = [{"q_proj", "k_proj", "v_proj"}, {"gate_proj", "up_proj"}] if s.server.name == "vllm" else []
    listed = s.options.targets
    if listed is not None:
        more = {name for pack in packed if pack & {*listed} for name in pack}
        yield from sorted({last_name(path) for path in s.low_rank} - {*listed, *more})


def owner_path(path: str, module: LowRank | OtherMethod) -> str:
    """Return the path of the module that holds what is adapted."""
    return path.rpartition(".")[0] if module.kind == "experts" else path


@register_condition
def modules_missing(s: Subject) -> Iterable[str]:
    """Of a name that no module of the base has."""
    names = {last_name(m) for m in s.modules}
    return [path for path in s.absent_modules if last_name(path) not in names]


@register_condition
def layers_missing(s: Subject) -> Iterable[str]:
    """Beyond the base's last layer."""
    kinds = group_layers_by_kind(s.modules)
    return [path for path in s.absent_modules if (numbered := split_layer_number(path)) and numbered[0] in kinds]


@register_condition
def prefixes_differ(s: Subject) -> Iterable[str]:
    """Of a name that modules of the base have, elsewhere: the adapter was trained with another class of the model."""
    apart = {*modules_missing(s), *layers_missing(s)}
    return [path for path in s.absent_modules if path not in apart]


def last_name(path: str) -> str:
    return path.rpartition(".")[2]
