# SPDX-License-Identifier: Apache-2.0
# Supported inside: rooms may import this module.
"""Loading: from a dict of tensors into a model with adapters, with a report on every key.

Every entry gets its value, and all are checked, before the injection assigns one.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import groupby

import torch
from torch import Tensor, nn

from graft.config.base import PeftConfig
from graft.config.pair import TODAY
from graft.core.base_config import count_tokens, input_embeddings, output_embeddings
from graft.core.errors import AdapterKeyError, BaseModelMismatchError, CheckpointError, PeftWarning, join_some, warn
from graft.core.layer import AdapterLayer
from graft.core.wrappers import is_bias
from graft.inject.beside import TrainableTokensWrapper
from graft.inject.build import assign_values
from graft.inject.job import TensorWriter
from graft.inject.match import Matcher
from graft.inject.parts import AdapterCarriers, find_carriers, get_gate, get_registry, unwrap_model
from graft.inject.stage import find_absent_in_model
from graft.io.base import make_file_namer
from graft.io.entries import PROMPT_WRAPPED, WRAPPED, Entry, find_key, list_entries, list_tied_row_keys, rename_keys
from graft.io.files import LoadedWeights, check_tensors
from graft.io.fingerprint import (
    describe_difference,
    digest_base_tensors,
    list_base_weights,
    list_changed_tensors,
    make_fingerprint,
    match_values,
    rename_weights,
    restrict_to_common,
    select_weights,
)
from graft.io.layouts import convert_stack_layouts, fuse_experts
from graft.io.save import changes_base
from graft.io.servers import convert_server_layout
from graft.io.tensors import find_torn_bias, resize_parameters
from graft.storage.find import innermost
from graft.storage.offload import find_offloaded, is_tied, write_offloaded
from graft.storage.parallel import find_whole_shape, strip_inner_wrappers, write_whole


@dataclass(repr=False)
class LoadReport:
    """The report of a load: every key of the checkpoint, and every tensor of the adapter.

    Loaded and unexpected keys have their names in the checkpoint. Missing and mismatched ones have their names in the
    model's state dict, with the adapter's name, so that callers can filter by it. All have the model's prefix.
    """

    loaded: list[str] = field(default_factory=list)
    base: list[str] = field(default_factory=list)  # tensors of the base model in the checkpoint
    missing_keys: list[str] = field(default_factory=list)  # tensors of the adapter that it does not hold
    unexpected_keys: list[str] = field(default_factory=list)  # keys that fit nothing
    mismatched_keys: list[str] = field(default_factory=list)  # keys of another shape, with ignore_mismatched_sizes
    absent_keys: list[str] = field(default_factory=list)  # keys of modules that another stage of a pipeline has

    def __repr__(self) -> str:
        """Return the counts of loaded and base keys, and up to four names of each other kind.

        Kinds without keys are left out.
        """
        fields = vars(self)
        shown = {n: str(len(v)) if n in ("loaded", "base") else join_some(v, 4) for n, v in fields.items() if v}
        return f"LoadReport({', '.join(f'{name}={text}' for name, text in shown.items())})"

    def __iter__(self) -> Iterator[list[str]]:  # as torch's load_state_dict: missing, unexpected = report
        """Yield the missing keys, then the unexpected ones, as torch's `load_state_dict` returns them."""
        return iter((self.missing_keys, self.unexpected_keys))


ROOM, TIMES = 2**24, 64  # a config may ask for ROOM numbers, and for TIMES as many as the file holds
ROWS = f"{TrainableTokensWrapper.inner_name}.base_layer"  # below an embedding with token rows
Mismatch = tuple[str, torch.Size, torch.Size]  # name in the model, shape in the file, shape in the model


class CheckpointValues:
    """The values of one checkpoint for the carriers of an adapter.

    `report` lists every key once `match_entries` has run.
    """

    def __init__(
        self,
        model: nn.Module,
        config: PeftConfig,
        adapter: str,
        loaded: LoadedWeights,
        strict: bool = True,
        key_mapping: dict[str, str] | None = None,
        ignore_mismatched_sizes: bool = False,
        allow_nonfinite: bool = False,
        prefix: str | None = None,
    ):
        """Check and rename the tensors; nothing is matched yet.

        Expert layouts of servers become PEFT's, and `config` changes in place to match. Without a `key_mapping` the
        model's `_checkpoint_conversion_mapping` applies; a `key_mapping` that fits no key warns. If keys were renamed,
        a fingerprint with renamed weights is kept as well.

        Args:
            strict: missing and unexpected keys are errors; else warnings.
            prefix: that of the model's keys; None: a PeftModel's.

        Raises:
            CheckpointError: a tensor is not a plain one of real numbers.
            NonFiniteError: NaN or infinite numbers, unless `allow_nonfinite`.
            AdapterKeyError: two keys get one name.
            ConfigError: the mapping is not valid.
        """
        check_tensors(loaded.tensors, loaded.path, allow_nonfinite or loaded.finite)
        model_mapping = getattr(model, "_checkpoint_conversion_mapping", None)
        self.model, self.config, self.adapter = model, config, adapter
        file_tensors = clean_keys(loaded.tensors, loaded.path)
        mapping: dict[str, str] | None = model_mapping if key_mapping is None else key_mapping
        self.tensors = rename_keys(file_tensors, mapping, key_mapping is not None) if mapping else file_tensors
        served = convert_server_layout(self.tensors, config, model)
        self.layout = loaded.layout if served is self.tensors else TODAY
        self.tensors, self.path, self.strict = served, loaded.path, strict
        self.fingerprint, self.renamed_fingerprint = loaded.fingerprint, None
        if self.fingerprint and mapping and self.tensors.keys() != file_tensors.keys():
            # the base's modules may have new names too
            self.renamed_fingerprint = rename_weights(self.fingerprint, partial(rename_keys, mapping=mapping))
        self.config_of_file = copy.copy(config)  # which injection rewrites to today's names
        self.ignore_mismatched_sizes, self.prefix = ignore_mismatched_sizes, prefix
        self.report = LoadReport()

    @property
    def names(self) -> Collection[str]:
        """The checkpoint's keys, after renaming."""
        return self.tensors.keys()

    @cached_property
    def matcher(self) -> Matcher:
        """Returns the verdict of the config about a path. Compiled once."""
        return Matcher(self.config)

    def group_entries(
        self, parts: AdapterCarriers, prefix: str
    ) -> Iterator[tuple[AdapterLayer | None, Iterator[Entry]]]:
        """Yield (layer, entries) for the tensors of the adapter that files hold: None for those of no layer.

        Read the entries before the next group. prefix: that of the model's keys.
        """
        return groupby(list_entries(parts, self.adapter, prefix), lambda entry: entry.layer)

    def make_head(self, key: str, module: nn.Module) -> nn.Module | None:
        """Return a copy of a module to save (without its wrapper) with the file's number of labels, if a tensor's first
        dimension alone differs; else None.

        None also if weight and bias would then differ in their labels while mismatched sizes are ignored. Parameters of
        the copy that change their size are not initialized. Warns if it is an embedding of another vocabulary.

        Raises:
            AdapterKeyError: weight and bias would have different numbers of labels, unless mismatched sizes are
                ignored.
        """
        prefix = PROMPT_WRAPPED if self.config.is_prompt_learning else WRAPPED
        original = getattr(module, "original_module", module)
        shapes = {n: find_whole_shape(p) for n, p in original.named_parameters()}
        shapes_in_file = {n: self.tensors[k].shape for n in shapes if (k := f"{prefix}{key}.{n}") in self.tensors}
        new_shapes = {n: s for n, s in shapes_in_file.items() if s != shapes[n] and s[1:] == shapes[n][1:]}
        torn = find_torn_bias(shapes, shapes | new_shapes) if new_shapes else None
        if torn is None or self.ignore_mismatched_sizes:
            if not new_shapes or torn is not None:
                return None
            if advice := self._advise_on_vocabulary((f"{key}.{n}", s, shapes[n]) for n, s in new_shapes.items()):
                warn(
                    f"'{key}' of adapter '{self.adapter}' keeps its size of {self.path}, which config.vocab_size does "
                    f"not say: a loss that the base computes may fail. {advice}",
                    PeftWarning,
                )
            return resize_parameters(original, new_shapes)
        raise AdapterKeyError(
            f"'{key}' of adapter '{self.adapter}' would get a {torn[0]} of shape {tuple(torn[1])} and a bias of shape "
            f"{tuple(torn[2])}, by {self.path}, as of heads of different sizes. Pass "
            "ignore_mismatched_sizes=True to leave them out."
        )

    def _advise_on_vocabulary(self, shapes: Iterable[tuple[str, Sequence[int], Sequence[int]]]) -> str:
        """Return the advice to call `resize_token_embeddings(n)` if one of `shapes` is of an embedding of the base;
        else "".

        Input and output embeddings count. The shapes must differ in one dimension only, which here is the number of
        tokens. The first such tensor decides, and n is its number in the file.

        Args:
            shapes: (name, shape in the file, shape here).
        """
        tables = [m for m in (input_embeddings(self.model), output_embeddings(self.model)) if m is not None]
        named = ((n, m) for n, m in self.model.named_modules() if any(m is t for t in tables))
        rows = {f".{strip_inner_wrappers(n)}.": innermost(m) for n, m in named}
        for name, old, new in shapes:
            table = next((m for key, m in rows.items() if key in f".{name}."), None)
            differ = [(a, b) for a, b in zip(old, new) if a != b]
            if len(differ) == 1 and differ[0][1] == count_tokens(table):
                n = differ[0][0]
                return f"Its base had {n} tokens: call resize_token_embeddings({n}) on this one before loading."
        return ""

    def check_room(self, numbers: float) -> None:
        """Raise CheckpointError if `numbers`, to be allocated by the config, is more than 2²⁴ plus 64 times the count
        in the file.
        """
        count = sum(t.numel() for t in self.tensors.values())
        if numbers > ROOM + TIMES * count:
            size = f"{int(numbers):,} numbers" if numbers < float("inf") else "more numbers than can be counted"
            raise CheckpointError(
                f"The config of adapter '{self.adapter}' describes {size}, and {self.path} holds {count:,}: the two do "
                "not belong together. Load it with its own config."
            )

    def match_entries(self, parts: AdapterCarriers, adapter: str) -> list[tuple[TensorWriter, Tensor]]:
        """Return pairs of a function that writes a tensor, and its value from the file: for each adapter entry, then
        for each base tensor in the same file. A base tensor is overwritten in place, or in its offload store.

        Writes no value, but methods may replace parameters to make room. The file's keys have the carriers' prefix if
        one begins with "base_model.", else none. First checks the file's fingerprint; for layers of opaque modules also
        arranges expert stacks. Shapes of tensors that layers share are refused before any layer changes. Fills in the
        lists of keys in `report`: missing and mismatched entries are left out of the result, keys of another pipeline
        stage count as absent. No list has copies of shared tensors or tied rows, nor tensors that the method ignores.
        Without `strict`, missing and unexpected keys only warn; with `ignore_mismatched_sizes`, so do other shapes.

        Raises:
            AdapterKeyError: a shape differs; one tensor is of integers and the other of floats; or with `strict` a key
                is missing or unexpected.
            BaseModelMismatchError: the file was made for another base; or it holds a tied tensor that is offloaded.
        """
        self.check_base(parts)
        bare = not any(n.startswith("base_model.") for n in self.tensors)
        prefix = "" if bare else parts.prefix
        memory_prefix = parts.prefix if self.prefix is None else self.prefix
        in_memory = partial(replace_prefix, prefix, prefix if parts.prompt is not None else memory_prefix)
        if any(layer.op.opaque for layer in parts.layers.values()):
            self.arrange_stacks(parts, prefix)
        names = set(self.tensors)
        pairs_to_load: list[tuple[Entry, str]] = []
        mismatched: list[Mismatch] = []
        used: set[str] = set()
        by_layer = self.group_entries(parts, prefix)
        groups = [(layer, [(entry, find_key(entry, names)) for entry in group]) for layer, group in by_layer]
        loose = [pair for layer, pairs in groups if layer is None for pair in pairs]
        shapes = [(in_memory(e.label), self.tensors[n].shape, find_whole_shape(e.tensor)) for e, n in loose if n]
        if differ := [mismatch for mismatch in shapes if mismatch[1] != mismatch[2]]:
            self._refuse_mismatches(differ)  # first, as layers may restore values as large as the shared tensors
        fitting = [(e, self.tensors[n]) for e, n in loose if n and e.container]
        shared = {(e.container, e.path): t for e, t in fitting if t.shape == find_whole_shape(e.tensor)}
        for layer, pairs in groups:
            if layer is not None:
                if shared:
                    layer.methods[self.adapter].check_shared(shared)
                pairs = self._restore_layer(layer, pairs, names, used)
            for entry, name in pairs:
                if name is None:
                    self.report.missing_keys.append(in_memory(entry.label))
                    continue
                used.add(name)
                shape, shape_here = self.tensors[name].shape, find_whole_shape(entry.tensor)
                if shape != shape_here:
                    mismatched.append((in_memory(entry.label), shape, shape_here))
                else:
                    pairs_to_load.append((entry, name))
        used |= names & {n for entry, _ in loose for n in entry.also}
        if parts.wrappers:
            used |= names & {*list_tied_row_keys(parts, adapter, prefix)}
        base, misshapen = self.find_base_tensors(names - used, prefix, parts) if names - used else ({}, [])
        mismatched += [(in_memory(name), shape, shape_here) for name, shape, shape_here in misshapen]
        left = names - used - set(base) - {name for name, _, _ in misshapen}
        self.report.absent_keys = sorted(n for n in left if self.is_absent(n.removeprefix(prefix)))
        unexpected = sorted(left - set(self.report.absent_keys))
        self.report.unexpected_keys = [in_memory(n) for n in unexpected]
        if (kind := getattr(self.config, "bias", "none")) != "none":
            self.report.missing_keys += map(in_memory, self._missing_biases(kind, parts, prefix))
        self._check_dtypes([(name, entry.tensor) for entry, name in pairs_to_load] + [*base.items()])
        if mismatched or unexpected or self.report.missing_keys:
            self._report_misfits(mismatched, unexpected)
        self.report.loaded = sorted(name for _, name in pairs_to_load)
        self.report.base = sorted(base)
        values: list[tuple[TensorWriter, Tensor]] = [(e.assign, self.tensors[name]) for e, name in pairs_to_load]
        away = find_offloaded(self.model) if any(t.is_meta for t in base.values()) else {}
        tied = [name for name, t in base.items() if id(t) in away and is_tied(*away[id(t)])]
        if tied:
            raise BaseModelMismatchError(
                f"Adapter '{adapter}' from {self.path} holds '{tied[0]}', which is offloaded and tied to another "
                "module's weight. Move the model to real devices first."
            )
        for name, t in base.items():
            write = partial(write_offloaded, *away[id(t)]) if id(t) in away else partial(write_whole, t)
            values.append((write, self.tensors[name]))
        return values

    def arrange_stacks(self, parts: AdapterCarriers, prefix: str) -> None:
        """Convert the factors of expert stacks in `tensors` to the names and layout that they have here.

        First stacks of the file are converted from `self.layout`, which the config tells; a doubtful layout warns. Then
        files by expert are joined to stacks. `tensors` is a new dict if anything changes.
        """
        what = f"Adapter '{self.adapter}' from {self.path}"
        tensors = convert_stack_layouts(self.tensors, parts, prefix, self.layout, what)
        self.tensors = fuse_experts(tensors, parts, prefix, self.model, self.config_of_file, self.adapter)

    def _check_dtypes(self, found: list[tuple[str, Tensor]]) -> None:
        """Raise AdapterKeyError if integers would be written into floating tensors, or the reverse."""
        wrong = [
            f"'{name}' has dtype {self.tensors[name].dtype}, where {tensor.dtype} is needed"
            for name, tensor in found
            if self.tensors[name].is_floating_point() != tensor.is_floating_point()
        ]
        if wrong:
            raise AdapterKeyError(f"Adapter '{self.adapter}' cannot be loaded from {self.path}: {join_some(wrong)}.")

    def _missing_biases(self, kind: str, parts: AdapterCarriers, prefix: str) -> list[str]:
        """Return the sorted keys of the trained biases that the file lacks: of adapted layers, and with "all" of the
        whole base.

        Opaque layers and, with "all", tensors inside carriers do not count. A key in the file may have the name in the
        file or that in the model. If a kind other than "all" lacks every one of its biases, as PEFT writes it, warns
        and returns [].
        """
        layers = ((key, layer.get_base_layer()) for key, layer in parts.layers.items() if not layer.op.opaque)
        has_bias = [key for key, base_layer in layers if base_layer._parameters.get("bias") is not None]
        in_file = make_file_namer(parts)
        wanted = {in_file(f"{key}.bias"): f"{key}.bias" for key in has_bias}
        if kind == "all":
            carriers = parts.layers.keys() | parts.wrappers.keys()
            names = (name for name, _ in self.model.named_parameters() if is_bias(name))
            wanted |= {in_file(n): strip_inner_wrappers(n) for n in names if carriers.isdisjoint(list_ancestors(n))}
        missing = [a for a, b in wanted.items() if not {prefix + a, prefix + b} & self.tensors.keys()]
        if kind != "all" and missing and len(missing) == len(wanted):
            warn(
                f"Adapter '{self.adapter}' trained biases of the base model (bias='{kind}'), and {self.path} holds "
                "none of them, as PEFT writes it: outputs will differ from training.",
                PeftWarning,
            )
            return []
        return [prefix + name for name in sorted(missing)]

    def _restore_layer(
        self, layer: AdapterLayer, pairs: list[tuple[Entry, str | None]], names: set[str], used: set[str]
    ) -> list[tuple[Entry, str | None]]:
        """Let the layer's method compute its tensors from those of the file, and put them into `tensors`.

        Return the layer's entries with their keys there; None for a missing one. If the file lacks an entry, the method
        gets all keys of the layer, except its base layer's, and may restore it; the entry then has its file name.

        Adds keys that the method consumed for that to `used`, and those of `names` that its `files` leave out.
        Refreshes each entry, as the method may have replaced a parameter; its requires_grad stays.
        """
        method = layer.methods[self.adapter]
        stem = pairs[0][0].stem.removesuffix(pairs[0][0].container)
        used |= names & {f"{stem}{name}" for name, file in method.files.items() if not file}
        places = {(entry.container, entry.path): name for entry, name in pairs if name is not None}
        if len(places) < len(pairs):  # the method may restore missing tensors from others
            below = {n for n in self._keys_by_path.get(stem, ()) if not n.startswith(f"{stem}base_layer.")}
            for key in below - set(places.values()):
                container, _, path = key.removeprefix(stem).partition(".")
                places[container, path] = key
        values = method.from_file_tensors({place: self.tensors[name] for place, name in places.items()}, self.config)
        out: list[tuple[Entry, str | None]] = []
        for entry, name in pairs:
            trains = entry.tensor.requires_grad
            entry.refresh()  # `from_file_tensors` may have made room for values of another shape, by a new parameter
            if entry.tensor.requires_grad != trains:
                entry.tensor.requires_grad = trains
            place = entry.container, entry.path
            if name is None and place in values:
                name = entry.file
                used |= {n for p, n in places.items() if p not in values}
            if name is not None:
                self.tensors[name] = values[place]
            out.append((entry, name))
        return out

    @cached_property
    def _keys_by_path(self) -> dict[str, set[str]]:
        """{path with a dot behind it: keys below it}, of the file.

        Computed once and cached, from the tensors at the first access.
        """
        out: dict[str, set[str]] = defaultdict(set)
        for name in self.tensors:
            for owner in list_ancestors(name):
                out[f"{owner}."].add(name)
        return out

    def find_base_tensors(
        self, names: set[str], prefix: str, parts: AdapterCarriers
    ) -> tuple[dict[str, Tensor], list[Mismatch]]:
        """Return the base model's parameters that `names` name, by key in sorted order, and (key, shape in the file,
        shape here) of those with another shape.

        The latter are not in the first result. A tied parameter counts under each of its names. Names may have parts of
        carriers in them: `base_layer`, `original_module` or that of token rows. Names that fit nothing are ignored.
        Sharded parameters count by their whole shape.
        """
        by_name: dict[str, Tensor] = {}
        in_file = make_file_namer(parts)
        for path, p in self.model.named_parameters(remove_duplicate=False):
            path = strip_inner_wrappers(path)
            by_name[prefix + in_file(path)] = by_name[prefix + path] = p
            if ".base_layer." not in path:  # the injection may be about to wrap the layer
                stem, _, leaf = path.rpartition(".")
                for inner in ("base_layer", "original_module", ROWS):
                    by_name[f"{prefix}{stem}.{inner}.{leaf}"] = p
        out = {n: by_name[n] for n in sorted(names) if n in by_name}  # sharding needs all processes, in one order
        wrong = [n for n in out if find_whole_shape(out[n]) != self.tensors[n].shape]
        return out, [(n, self.tensors[n].shape, find_whole_shape(out.pop(n))) for n in wrong]

    @cached_property
    def absent(self) -> dict[str, str]:
        """The modules on other pipeline stages, with their parents' paths; {} on a whole model.

        Computed once and cached.
        """
        return find_absent_in_model(self.model)

    def is_absent(self, path: str) -> bool:
        """Return True if `path` is that of a module of another pipeline stage (in `absent`), or below one."""
        return any(path == key or path.startswith(f"{key}.") for key in self.absent)

    def check_base(self, parts: AdapterCarriers) -> None:
        """Compare the file's fingerprint with the base; return if the file has none.

        Values are not sampled if the adapter changes the base.

        If names or shapes differ, these steps follow in this order:

        - The `renamed_fingerprint` replaces the file's, if it exists.
        - If they still differ on a pipeline stage, only weights of this stage are compared, and nothing if the file
          does not name its weights.

        For a prompt, always, only weights that both have are compared, and nothing if one of the two does not name its
        weights.

        A difference of names or shapes that remains raises BaseModelMismatchError with `strict`, unless mismatched
        sizes are ignored, and else warns. The text advises on the vocabulary if that differs, else to load the base of
        the config, or "its name was not recorded". With equal shapes, other sampled values or digests only warn;
        tensors with other digests are counted and named.
        """
        if not self.fingerprint:
            return
        of_file = self.fingerprint
        now = make_fingerprint(list_base_weights(parts, self.model), with_values=not changes_base(parts, self.adapter))
        if self.renamed_fingerprint is not None and describe_difference(of_file, now):
            of_file = self.renamed_fingerprint
        if describe_difference(of_file, now) and self.absent:
            if not of_file.get("weights"):
                return
            of_file = select_weights(of_file, lambda key: not self.is_absent(key))
        if parts.prompt is not None:
            both = restrict_to_common(of_file, now)
            if both is None:
                return
            of_file, now = both
        differs = describe_difference(of_file, now)
        if differs:
            old, new = of_file.get("weights") or {}, now.get("weights") or {}
            advice = self._advise_on_vocabulary((key, old[key], new[key]) for key in sorted(old.keys() & new.keys()))
            name = self.config.base_model_name_or_path or "its name was not recorded"
            advice = advice or f"Load the base that it was trained on ({name})."
            text = f"Adapter '{self.adapter}' from {self.path} was made for another base model: {differs}. {advice}"
            if self.strict and not self.ignore_mismatched_sizes:  # else an error names each misfit
                raise BaseModelMismatchError(text)
            warn(text, PeftWarning)
            return
        full = of_file.get("full") or {}
        changed_names = list_changed_tensors(full, digest_base_tensors(self.model, names=full)) if full else []
        if changed_names or not match_values(of_file, now):
            which = f" ({len(changed_names)} of {len(full)} tensors differ: {join_some(changed_names)})"
            which = which if changed_names else ""
            warn(
                f"Adapter '{self.adapter}' from {self.path} was trained on a base model of the same architecture but "
                f"with other weights{which}: expect other outputs than in training.",
                PeftWarning,
            )

    def _refuse_mismatches(self, mismatched: list[Mismatch]) -> None:
        """Raise AdapterKeyError that lists shapes and the remedy, unless mismatched sizes are ignored."""
        if not self.ignore_mismatched_sizes:
            use = self._advise_on_vocabulary(mismatched) or "Use the config it was saved with"
            raise AdapterKeyError(
                f"Error(s) in loading adapter '{self.adapter}' from {self.path}: {format_mismatches(mismatched)}. "
                f"{use.removesuffix('.')}, or pass ignore_mismatched_sizes=True to leave these out."
            )

    def _report_misfits(self, mismatched: list[Mismatch], unexpected: list[str]) -> None:
        """Raise AdapterKeyError for mismatched shapes, unless they are ignored: then warn and put them into
        `report.mismatched_keys`.

        The missing keys in `report` and the unexpected ones raise one AdapterKeyError with `strict`, else one warning.
        If there are both, the text advises `key_mapping`.
        """
        report = self.report
        if mismatched:
            self._refuse_mismatches(mismatched)
            report.mismatched_keys = [n for n, _, _ in mismatched]
            warn(
                f"Some weights of adapter '{self.adapter}' were not initialized from the model checkpoint and are "
                f"being ignored because you passed `ignore_mismatched_sizes=True`: {format_mismatches(mismatched)}"
            )
        parts = []
        if report.missing_keys:
            parts.append(f"Found missing adapter keys while loading the checkpoint: {join_some(report.missing_keys)}.")
        if unexpected:
            parts.append(f"Found keys that fit nothing in the adapter: {join_some(unexpected)}.")
        if not parts:
            return
        text = f"{' '.join(parts)} Adapter '{self.adapter}', checkpoint {self.path}."
        if report.missing_keys and unexpected:
            text += " If these are the same under other names, pass key_mapping={regex in the file: replacement}."
        if self.strict:
            raise AdapterKeyError(f"{text} Pass strict=False to load what fits.")
        warn(text)


def clean_keys(tensors: dict[str, Tensor], path: str) -> dict[str, Tensor]:
    """Return the tensors, in a new dict, by names without the parts of inner wrappers (torch.compile, FSDP,
    checkpointing), which PEFT leaves in them.

    Raises:
        AdapterKeyError: two of them get one name.
    """
    out: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        if (name := strip_inner_wrappers(key)) in out:
            raise AdapterKeyError(
                f"{path} holds '{name}' twice, with and without the name of a wrapper in it. Take one of them out."
            )
        out[name] = tensor
    return out


def format_mismatches(mismatched: list[Mismatch]) -> str:
    """Return "size mismatch for …" with both shapes for each mismatch, shortened if there are many."""
    return join_some(
        [f"size mismatch for {n}: {tuple(a)} in the checkpoint, {tuple(b)} in the model" for n, a, b in mismatched]
    )


def replace_prefix(prefix: str, there: str, name: str) -> str:
    """Return `name` with `there` instead of `prefix` at its beginning.

    A name without the prefix stays; so does one with "base_model." if `prefix` is empty.
    """
    if not prefix and name.startswith("base_model."):
        return name
    return there + name[len(prefix) :] if name.startswith(prefix) else name


def list_ancestors(name: str) -> Iterator[str]:
    """Yield the paths of all modules around a parameter, the innermost first."""
    dot = name.rfind(".")
    while dot > 0:
        yield name[:dot]
        dot = name.rfind(".", 0, dot)


def set_peft_model_state_dict(
    model: nn.Module,
    peft_model_state_dict: dict[str, Tensor],
    adapter_name: str = "default",
    ignore_mismatched_sizes: bool = False,
    low_cpu_mem_usage: bool = False,
    strict: bool = False,
    allow_nonfinite: bool = False,
) -> LoadReport:
    """Write tensors by file key into an adapter that the model has, in place; return the report.

    Keys and shapes are checked first. Then it waits for calls that use the adapter; for all calls if adapters are
    merged or biases train. A training state kept for the adapter is dropped.

    Args:
        ignore_mismatched_sizes: leave out tensors of another shape, with a warning.
        low_cpu_mem_usage: has no effect.
        strict: missing and unexpected keys are errors; else warnings.
        allow_nonfinite: accept NaN and infinite numbers.

    Raises:
        AdapterKeyError: a shape differs or, with `strict`, a key is missing or unexpected.
        AdapterNotFoundError: the model has no such adapter.
        CheckpointError: a tensor is not a plain one of finite real numbers.
    """
    model = unwrap_model(model)
    parts, prefix, base, config = find_carriers(model, adapter_name)
    loaded = LoadedWeights.from_state_dict(peft_model_state_dict)
    values = CheckpointValues(
        base, config, adapter_name, loaded, strict, None, ignore_mismatched_sizes, allow_nonfinite, prefix
    )
    pairs, registry = values.match_entries(parts, adapter_name), get_registry(model)
    whole = any(carrier.merged_adapters for carrier in parts.carriers()) or getattr(config, "bias", "none") != "none"
    with get_gate(model).change(f"set_peft_model_state_dict({adapter_name!r})", None if whole else (adapter_name,)):
        assign_values(parts, adapter_name, pairs)
        if registry is not None:
            registry.states.pop(adapter_name, None)  # the training state of the old values
    return values.report
