# SPDX-License-Identifier: Apache-2.0
"""Predictions of how a server treats an adapter. The knowledge about servers is data, in servers.json.

A row there says of a server: under this condition it does that. Each condition is a method of `Subject`. It yields
texts for people on the parts of the adapter that fulfil it, and nothing if the adapter does not.
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
from graft.files.names import check_shapes, group_layers_by_kind, last_name, split_layer_number
from graft.files.neutral import AdapterFile, LowRank, OtherMethod
from graft.files.tensors import read_header

DATA = os.path.join(os.path.dirname(__file__), "servers.json")
VERDICTS = ("refused", "wrong", "ignored", "ok")  # ok: a remark
OF_SGLANG = re.compile(r".*\.experts\.(gate_up|gate|up|down)_proj\.lora_[AB]\.weight")


@dataclass(frozen=True)
class ServerOptions:
    """Start options of a server that change its verdicts.

    Attributes:
        max_rank: `--max-lora-rank`; None: the server's default.
        targets: `--lora-target-modules`; None: all modules that the server knows.
    """

    max_rank: int | None = None
    targets: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Server:
    """The data on a server, without its rows.

    Attributes:
        version: the version that was run or read, on `date`.
        formats: formats of adapter files that it loads.
        max_rank: its default rank limit; None if it has none.
        heads: last names of modules that it loads as whole weights.
    """

    name: str
    version: str
    date: str
    formats: tuple[str, ...]
    max_rank: int | None = None
    heads: tuple[str, ...] = ()


@dataclass(frozen=True)
class Finding:
    """One effect of a server on an adapter, with the reason.

    Attributes:
        condition: name of the condition's function.
        verdict: "refused"; "wrong": it loads, and computes something else; "ignored": it loads, and that part has no
            effect; "ok": a remark.
        what: the parts of the adapter that cause it.
        does: the effect, as a verb phrase.
        evidence: "run": tested with this version; "source": read in its source or documentation; otherwise a link.
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
        """True if the finding is only a remark. The other verdicts are "refused", "wrong" and "ignored"."""
        return self.verdict == "ok"


def make_variant_condition(name: str) -> Callable[[Subject], Iterable[str]]:
    """Return a condition that yields `name` if a module has that method."""

    def find_variant(subject: Subject) -> Iterable[str]:
        """Yield the variant's name if a module of the adapter has it."""
        if any(module.method == name for module in subject.adapter.modules.values()):
            yield name

    return find_variant


@dataclass(frozen=True)
class Subject:
    """An adapter, a server with its options, and the base if it is known. Methods without arguments are conditions."""

    adapter: AdapterFile
    server: Server
    options: ServerOptions = field(default_factory=ServerOptions)
    base: BaseDescription | None = None

    @property
    def low_rank(self) -> dict[str, LowRank]:
        """The adapter's LoRA modules by path."""
        return self.adapter.low_rank

    @cached_property
    def absent_modules(self) -> list[str]:
        """The paths of adapted modules, by the layers that own them, that the server's model lacks; [] without a base.

        Computed once.
        """
        paths = [owner_path(path, module) for path, module in self.adapter.modules.items()]
        return [] if self.base is None else [path for path in paths if path not in self.modules]

    @cached_property
    def modules(self) -> set[str]:
        """The base's module paths: those of its files, plus those of its model if the files lack an adapted module.

        Empty without a base. Computed once.

        Multimodal models have other names in files (`language_model.model.layers`) than in the model
        (`model.language_model.layers`).
        """
        if self.base is None:
            return set()
        known = {*self.base.modules}
        paths = {owner_path(path, module) for path, module in self.adapter.modules.items()}
        more = None if known.issuperset(paths) else view_by_model_names(self.base)
        return known if more is None else known.union(more.modules)

    def find(self, condition: str) -> list[str]:
        """Return the texts that the method `condition` yields; [] if the adapter does not fulfil it.

        An unknown name raises AttributeError.
        """
        return list(getattr(self, condition)())

    # conditions: of the file

    def another_format(self) -> Iterable[str]:
        """Yield "the file is of the format F" if the server does not load that format."""
        if self.adapter.format not in self.server.formats:
            yield f"the file is of the format {self.adapter.format}"

    def torch_file(self) -> Iterable[str]:
        """Yield "adapter_model.bin" if an adapter in PEFT's format has no adapter_model.safetensors in its folder,
        whether there is an adapter_model.bin or not.
        """
        if self.adapter.format == "peft" and not os.path.exists(os.path.join(self.adapter.path, pair.SAFETENSORS)):
            yield pair.TORCH

    def file_of_added_tokens(self) -> Iterable[str]:
        """Yield "added_tokens.json" if the adapter's folder has that file."""
        path = os.path.join(self.adapter.path, "added_tokens.json")
        if os.path.isdir(self.adapter.path) and os.path.exists(path):
            yield "added_tokens.json"

    def fields_missing(self) -> Iterable[str]:
        """Yield those of r, lora_alpha and target_modules that are missing or None in a LoRA config of PEFT; nothing
        for other formats and methods.
        """
        if self.adapter.format == "peft" and self.adapter.method == "LORA":
            yield from (name for name in ("r", "lora_alpha", "target_modules") if self.adapter.config.get(name) is None)

    def not_whole(self) -> Iterable[str]:
        """Yield "it lacks P" for each part P that the config names and the file lacks (`list_gaps`, with the base)."""
        return (f"it lacks {what}" for what in list_gaps(self.adapter, self.base))

    def unknown_keys(self) -> Iterable[str]:
        """Return the adapter's list of keys without a known meaning."""
        return self.adapter.unknown_keys

    # conditions: what the adapter is

    def another_method(self) -> Iterable[str]:
        """Yield "its method is M" if the adapter's method is not LORA."""
        if self.adapter.method != "LORA":
            yield f"its method is {self.adapter.method}"

    kasa, blocks, pooled = map(make_variant_condition, ("KASA", "BDLORA", "QALORA"))

    def dora(self) -> Iterable[str]:
        """Yield "magnitude of P" for the path P of each LoRA module with a magnitude."""
        return (f"magnitude of {path}" for path, lora in self.low_rank.items() if lora.magnitude is not None)

    def dora_of_kohya(self) -> Iterable[str]:
        """Yield the texts of `dora` if the file is of the format kohya; else nothing."""
        return self.dora() if self.adapter.format == "kohya" else ()

    def transformer_of_kohya(self) -> Iterable[str]:
        """Yield, sorted, the module names that begin with "lora_transformer_" in the header of a kohya .safetensors
        file.

        OneTrainer, ComfyUI and `graft convert --to kohya` write these names.
        """
        if self.adapter.format == "kohya" and self.adapter.path.endswith(".safetensors"):
            names = {key.partition(".")[0] for key in read_header(self.adapter.path)[0]}
            yield from sorted(name for name in names if name.startswith("lora_transformer_"))

    def stacks_of_sglang(self) -> Iterable[str]:
        """Yield, sorted, the keys of experts' 3-D factors with SGLang's names of projections, in the
        adapter_model.safetensors of an adapter in a server's layout.
        """
        path = os.path.join(self.adapter.path, pair.SAFETENSORS)
        if self.adapter.is_server_layout and os.path.exists(path):
            header = read_header(path)[0]
            yield from sorted(key for key, t in header.items() if len(t.shape) == 3 and OF_SGLANG.fullmatch(key))

    def bias(self) -> Iterable[str]:
        """Yield "lora_bias of P" for each LoRA module with a bias, then the name of each whole bias that was trained
        without its weight.
        """
        yield from (f"lora_bias of {path}" for path, lora in self.low_rank.items() if lora.bias is not None)
        yield from (name for name in self.adapter.full if is_lone_bias(name, self.adapter))

    def extra_tensors(self) -> Iterable[str]:
        """Return the names of extra tensors in LoRA modules, sorted and once each, without those of a shift."""
        names = {name for lora in self.low_rank.values() for name in lora.extra if not name.startswith("lora_shift")}
        return sorted(names)

    def invocation_tokens(self) -> Iterable[str]:
        """Yield "alora_invocation_tokens=…", if the config has some."""
        if self.adapter.config.get("alora_invocation_tokens"):
            yield f"alora_invocation_tokens={self.adapter.config['alora_invocation_tokens']}"

    def layer_replication(self) -> Iterable[str]:
        """Yield "layer_replication=…", if the config has repeated layers."""
        if self.adapter.config.get("layer_replication"):
            yield f"layer_replication={self.adapter.config['layer_replication']}"

    def base_changed_and_kept(self) -> Iterable[str]:
        """Yield "lora_shift of P" for each LoRA module with a stored shift of the base (PiSSA and others, as graft
        saves them).
        """
        return (f"lora_shift of {path}" for path, lora in self.low_rank.items() if lora.shift is not None)

    def base_changed(self) -> Iterable[str]:
        """Yield "init_lora_weights=…" from the config, if it changed the base and the file does not describe the
        change.
        """
        if self.adapter.changed_base is not None:
            yield f"init_lora_weights={self.adapter.config.get('init_lora_weights')!r}"

    # conditions: further tensors

    def whole_norms(self) -> Iterable[str]:
        """Return the modules with a weight that is a vector and was trained whole: norms."""
        return list_norms(self.adapter)

    def whole_modules(self) -> Iterable[str]:
        """Return the modules trained whole that the server does not load, sorted, without norms, lone biases and copied
        weights.
        """
        names = {*self.adapter.full} - {*list_copied_weights(self.adapter)}
        modules = {name.rpartition(".")[0] for name in names if not is_lone_bias(name, self.adapter)}
        return sorted(m for m in modules - {*list_norms(self.adapter)} if last_name(m) not in self.server.heads)

    def another_vocabulary(self) -> Iterable[str]:
        """Yield "N has the shape S, the base's T" for each copied weight N of another shape than the base's: an
        embedding that was resized.

        Nothing without a base.
        """
        shapes = {} if self.base is None else self.base.shapes
        for name in list_copied_weights(self.adapter):
            shape, base_shape = self.adapter.full[name].shape, shapes.get(name)
            if base_shape is not None and shape != base_shape:
                yield f"{name} has the shape {shape}, the base's {base_shape}"

    def token_rows(self) -> Iterable[str]:
        """Yield "n rows of N" for each embedding weight N with n trained rows. Reads the row numbers."""
        return (f"{len(rows.load()) // 8} rows of {name}" for name, (rows, _) in self.adapter.rows.items())

    def embeddings(self) -> Iterable[str]:
        """Yield the paths of LoRA modules of kind "embedding"."""
        return (path for path, lora in self.low_rank.items() if lora.kind == "embedding")

    def output_head(self) -> Iterable[str]:
        """Yield the paths of LoRA modules with the last name lm_head."""
        return (path for path in self.low_rank if last_name(path) == "lm_head")

    def experts(self) -> Iterable[str]:
        """Yield the paths of stacks of experts with LoRA, unless the file has a server's layout already."""
        return (
            path for path, lora in self.low_rank.items() if lora.kind == "experts" and not self.adapter.is_server_layout
        )

    def stacks_of_peft(self) -> Iterable[str]:
        """Yield the texts of `experts`, unless vLLM loads stacks for the base's model type (a prefix in
        STACKED_IN_VLLM).

        Without a base they are yielded.
        """
        from graft.io.servers import STACKED_IN_VLLM  # loads torch

        kind = "" if self.base is None else str(self.base.config.get("model_type"))
        return () if kind.startswith(STACKED_IN_VLLM) else self.experts()

    def kernels(self) -> Iterable[str]:
        """Yield "a kernel of 3 × 3 on P" for each convolution P with LoRA and a kernel size above 1."""
        for path, lora in self.low_rank.items():
            if lora.kind == "conv" and any(n > 1 for n in lora.A.shape[2:]):
                yield f"a kernel of {' × '.join(map(str, lora.A.shape[2:]))} on {path}"

    # conditions: rank and scale

    def rank_above_the_limit(self) -> Iterable[str]:
        """Yield "P has rank r, the limit is n" for each LoRA module above the server's limit.

        The limit is that of the options, where None and 0 count as not set, or the server's default. Yields nothing
        without one.
        """
        limit = self.options.max_rank or self.server.max_rank
        if limit is not None:
            yield from (
                f"{path} has rank {h.rank}, the limit is {limit}" for path, h in self.low_rank.items() if h.rank > limit
            )

    def rank_above_128(self) -> Iterable[str]:
        """Yield "P has rank r" for each LoRA module with a rank above 128."""
        return (f"{path} has rank {h.rank}" for path, h in self.low_rank.items() if h.rank > 128)

    def several_ranks(self) -> Iterable[str]:
        """Yield one text "ranks [4, 8]" with the sorted ranks of LoRA modules if there is more than one."""
        ranks = {h.rank for h in self.low_rank.values()}
        if len(ranks) > 1:
            yield f"ranks {sorted(ranks)}"

    def scale_is_not_one(self) -> Iterable[str]:
        """Yield a text for each LoRA module with a scale other than 1, as `list_wrong_scales` words it; nothing if the
        config lacks r or lora_alpha.
        """
        return list_wrong_scales(self, lambda lora, r, alpha: 1.0)

    def scale_is_not_alpha_by_the_rank(self) -> Iterable[str]:
        """Yield a text for each LoRA module with a scale other than lora_alpha / the module's rank; nothing if the
        config lacks r or lora_alpha.
        """
        return list_wrong_scales(self, lambda lora, r, alpha: alpha / lora.rank)

    def scale_is_not_alpha_by_r(self) -> Iterable[str]:
        """Yield a text for each LoRA module with a scale other than lora_alpha / r of the config; nothing if it lacks
        one of them.
        """
        return list_wrong_scales(self, lambda lora, r, alpha: alpha / r)

    def scale_is_not_the_configs(self) -> Iterable[str]:
        """Yield a text for each LoRA module with a scale other than the config's: lora_alpha / r, with use_rslora
        lora_alpha / √r.

        Nothing if the config lacks r or lora_alpha.
        """
        return list_wrong_scales(
            self, lambda lora, r, alpha: alpha / (math.sqrt(r) if self.adapter.config.get("use_rslora") else r)
        )

    def scale_is_not_told(self) -> Iterable[str]:
        """Yield the paths of LoRA modules with a scale other than 1 in a diffusers file without
        `lora_adapter_metadata`: readers take 1 then.
        """
        if self.adapter.format == "diffusers" and "lora_adapter_metadata" not in self.adapter.metadata:
            yield from (path for path, lora in self.low_rank.items() if lora.scale != 1.0)

    # conditions: which modules

    def regular_expression(self) -> Iterable[str]:
        """Yield "target_modules='…'" if the config's field is a regular expression: any text but "all" and
        "all-linear".
        """
        targets = self.adapter.config.get("target_modules")
        if isinstance(targets, str) and targets not in ("all-linear", "all"):
            yield f"target_modules={targets!r}"

    def q_without_v(self) -> Iterable[str]:
        """Yield the path of each q_proj with LoRA if the v_proj next to it has none."""
        for path in self.low_rank:
            stem, _, name = path.rpartition(".")
            if name == "q_proj" and f"{stem}.v_proj" not in self.low_rank:
                yield path

    def some_layers_only(self) -> Iterable[str]:
        """Yield "layers.N.q_proj on 2 of 4 layers" for each kind of module that has LoRA in some layers but not in all
        layers that have such a module.

        Without a base, all layers with any LoRA count.
        """
        kinds = group_layers_by_kind(self.low_rank)
        every = {layer for layers in kinds.values() for layer in layers}
        base_layers = dict.fromkeys(kinds, every) if self.base is None else group_layers_by_kind(self.modules)
        for kind, layers in kinds.items():
            if missing := base_layers.get(kind, layers) - layers:
                yield f"{kind.replace('#', 'N')} on {len(layers)} of {len(layers | missing)} layers"

    def targets_excluded(self) -> Iterable[str]:
        """Yield, sorted, the last names of LoRA modules that the server's `--lora-target-modules` excludes; nothing
        without that option.

        vLLM includes all of q, k, v, or of gate and up, if one is listed.
        """
        packed = [{"q_proj", "k_proj", "v_proj"}, {"gate_proj", "up_proj"}] if self.server.name == "vllm" else []
        listed = self.options.targets
        if listed is not None:
            more = {name for pack in packed if pack & {*listed} for name in pack}
            yield from sorted({last_name(path) for path in self.low_rank} - {*listed, *more})

    def modules_missing(self) -> Iterable[str]:
        """Return the adapted modules that the base lacks, if no module of the base has their last name."""
        names = {last_name(m) for m in self.modules}
        return [path for path in self.absent_modules if last_name(path) not in names]

    def layers_missing(self) -> Iterable[str]:
        """Return the adapted modules that the base lacks in this layer, but has in other layers."""
        kinds = group_layers_by_kind(self.modules)
        return [path for path in self.absent_modules if (numbered := split_layer_number(path)) and numbered[0] in kinds]

    def prefixes_differ(self) -> Iterable[str]:
        """Return the other adapted modules that the base lacks: their last name exists under other prefixes, as in
        another class of the model.
        """
        apart = {*self.modules_missing(), *self.layers_missing()}
        return [path for path in self.absent_modules if path not in apart]


@cache
def read_server_data() -> Json:
    """Return the content of servers.json, read once."""
    with open(DATA, encoding="utf-8") as f:
        document: Json = json.load(f)
    return document


def list_servers() -> dict[str, Server]:
    """Return all servers in servers.json, by name."""
    return {
        name: Server(
            name, row["version"], row["date"], tuple(row["formats"]), row.get("max_rank"), tuple(row.get("heads", ()))
        )
        for name, row in read_server_data()["servers"].items()
    }


def get_server(name: str) -> Server:
    """Return a server by its name in any case.

    Reads servers.json once. Raises UnknownServerError, with the known names, if there is none.
    """
    known = list_servers()
    if name.lower() not in known:
        raise UnknownServerError(f"The server {name!r} is unknown. Choose one of {', '.join(known)}.")
    return known[name.lower()]


def check_servers(
    adapter: AdapterFile,
    names: Sequence[str],
    base: BaseDescription | None = None,
    options: ServerOptions | None = None,
) -> list[Finding]:
    """Return the findings on an adapter for each of these servers: all effects except for applying it correctly.

    Findings are in the order of the servers, then of the rows in servers.json, those for every server first. Names in
    another case or repeated count once; each text names up to 3 parts. Each finding's remedy has names filled in.

    Args:
        names: of servers in servers.json: "vllm", "llama.cpp".
        base: the served model; without it, module names and shapes are not compared.
        options: start options, the same for all servers.

    Raises:
        UnknownServerError: a server is unknown.
        BaseModelMismatchError: LoRA factors do not fit the base's weight.
    """
    asked = [get_server(name) for name in dict.fromkeys(map(str.lower, names))]
    if base is not None:
        # modules with a copied weight, which may be resized
        copied_paths = {name.rpartition(".")[0] for name in list_copied_weights(adapter)}
        check_shapes({path: of for path, of in adapter.low_rank.items() if path not in copied_paths}, adapter, base)
    findings = []
    for server in asked:
        subject = Subject(adapter, server, options or ServerOptions(), base)
        for row in (*read_server_data()["every"], *read_server_data()["servers"][server.name]["rows"]):
            if what := subject.find(row["when"]):
                where = "BASE" if base is None else base.path
                known = dict(server=server.name, adapter=adapter.path, format=server.formats[0], base=where)
                known["max_rank"] = str(subject.options.max_rank or server.max_rank)
                remedy = read_server_data()["remedies"][row["remedy"]].format(**known)
                facts = server.name, server.version, server.date, row["when"], row["verdict"], join_some(what, 3)
                findings.append(Finding(*facts, row["does"], remedy, row.get("evidence", "run")))
    return findings


def is_lone_bias(name: str, adapter: AdapterFile) -> bool:
    """Return True if a whole tensor is a bias, and its module's weight was not trained whole."""
    return name.endswith(".bias") and f"{name.removesuffix('bias')}weight" not in adapter.full


def list_norms(adapter: AdapterFile) -> list[str]:
    """Return the modules with a vector `<module>.weight` that was trained whole, in the order of the file."""
    weights = {name.rpartition(".")[0]: t for name, t in adapter.full.items() if name.endswith(".weight")}
    return [module for module, t in weights.items() if len(t.shape) == 1]


def list_copied_weights(adapter: AdapterFile) -> list[str]:
    """Return the whole weights `<module>.weight` of modules that also have factors: copies of the base's weights."""
    return [name for name in adapter.full if name.rpartition(".")[0] in adapter.modules and name.endswith(".weight")]


def list_wrong_scales(s: Subject, expected: Callable[[LowRank, float, float], float]) -> Iterable[str]:
    """Yield "P has the scale a, and would get b" for each LoRA module with another scale (relative 1e-6) than
    `expected(module, r, lora_alpha)`, the server's.

    Nothing if r and lora_alpha in the config are no numbers, or r is not positive.
    """
    r, alpha = s.adapter.config.get("r"), s.adapter.config.get("lora_alpha")
    if isinstance(r, (int, float)) and isinstance(alpha, (int, float)) and r > 0:
        for path, lora in s.low_rank.items():
            server_scale = expected(lora, float(r), float(alpha))
            if not math.isclose(lora.scale, server_scale, rel_tol=1e-6):
                yield f"{path} has the scale {lora.scale:.4g}, and would get {server_scale:.4g}"


def owner_path(path: str, module: LowRank | OtherMethod) -> str:
    """Return the path of the module that holds the adapted weight: without the parameter's name for experts, otherwise
    the path itself.
    """
    return path.rpartition(".")[0] if module.kind == "experts" else path
