# SPDX-License-Identifier: Apache-2.0
"""kohya's sd-scripts and LyCORIS: one file, modules by their paths with "_" for ".", alpha next to the factors."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from graft import BaseModelMismatchError, CheckpointError, PeftError
from graft.files import names
from graft.files.errors import make_damage_error
from graft.files.formats import Base, one_file
from graft.files.holding import FormatLimits, divide_alpha, fit_to_format, get_factor_pair, make_shape_error
from graft.files.names import find_common_method, is_pipeline, join_pipeline, select_pipeline_part
from graft.files.neutral import AdapterFile, Kind, LowRank, OtherMethod
from graft.files.pickles import mentions_name, read_tensors
from graft.files.tensors import Tensor, make_tensor, read_header, write_safetensors

NAME = "kohya"
FOLDER = ("adapter.safetensors",), ()
PREFIXES = {  # prefix in the file → parts of a pipeline; "": the base is one model
    "lora_unet_": ("unet", "transformer", ""),
    "lora_transformer_": ("transformer", ""),
    "lora_te_": ("text_encoder", ""),
    "lora_te1_": ("text_encoder", ""),
    "lora_te2_": ("text_encoder_2", ""),
    "lora_te3_": ("text_encoder_3", ""),
    "lycoris_": ("",),
}
KEY = re.compile(rf"({'|'.join(PREFIXES)})[^.]+\.[a-z].*")
DOWN, UP, MID = "lora_down.weight", "lora_up.weight", "lora_mid.weight"
LOW_RANK = {DOWN, UP, MID, "alpha", "dora_scale"}
LOHA = {"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2"}
LOKR = {"lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2"}
WHOLE = {"diff": "weight", "diff_b": "bias", "w_norm": "weight", "b_norm": "bias"}  # differences → tensors of the base
OTHERS = {  # a tensor that tells the method → its name, and the tensors that it has
    "oft_blocks": ("LyCORIS OFT", {"oft_blocks", "rescale", "alpha"}),
    "a1.weight": ("LyCORIS GLoRA", {"a1.weight", "a2.weight", "b1.weight", "b2.weight", "bm.weight", "alpha"}),
    "on_input": ("LyCORIS IA3", {"weight", "on_input"}),
    "lambda_layer": ("LyCORIS T-LoRA", {"q_layer.weight", "p_layer.weight", "lambda_layer", "alpha"}),
}
FULL, DORA_OF_INPUTS, DORA_OF_OTHERS = "LyCORIS full", "LyCORIS DoRA of inputs", "LyCORIS DoRA of another method"
OWN = frozenset({method for method, _ in OTHERS.values()} | {FULL, DORA_OF_INPUTS, DORA_OF_OTHERS})
HOLDS = FormatLimits(parts=frozenset({"magnitude", "conv", "mid"}), methods=OWN | {"LOHA", "LOKR"}, magnitudes=True)


def recognises(path: str) -> bool:
    """Return True for a file, or the only one of a folder, with more than half of its names in kohya's form.

    A .pt or .ckpt file is searched for names of factors without loading it.
    """
    file = one_file(path, ".safetensors", ".pt", ".ckpt")
    if file is None:
        return False
    if not file.endswith(".safetensors"):
        return mentions_name(file, b"lora_down.weight", b"hada_w1_a", b"lokr_w")
    keys = [*read_header(file)[0]]
    return bool(keys) and sum(KEY.fullmatch(key) is not None for key in keys) > len(keys) // 2


def read(path: str, base: Base | None = None) -> AdapterFile:
    """Read a file; without a base the modules have the file's flat names.

    Names without a known prefix go to `unknown_keys`. The base's name is `ss_sd_model_name` of the metadata.

    If the base is one model and the file a pipeline's, the parts that are not this model keep flat names. If the base
    has no such modules, the file is read with diffusers where its names are of a model's first release.

    Raises:
        CheckpointError: factors are missing or do not fit each other, or two names are one module of the base.
        BaseModelMismatchError: the base has no such modules, and diffusers finds none under their first names.
    """
    file = one_file(path, ".safetensors", ".pt", ".ckpt") or path
    tensors, metadata = read_tensors(file)
    out = AdapterFile(NAME, file, metadata=metadata, has_flat_names=base is None, base=metadata.get("ss_sd_model_name"))
    modules = out.group_by_module(
        tensors, lambda key: key.partition(".")[::2] if key.startswith((*PREFIXES,)) else None
    )
    by_part: dict[str, dict[str, dict[str, Tensor]]] = {}
    for name, of_module in modules.items():
        by_part.setdefault(components_of(name)[0], {})[name] = of_module
    try:
        if base is None or is_pipeline(base) or len(by_part) < 2 or "" in by_part:
            take_modules(out, modules, base)
            out.method, out.is_pipeline = find_common_method(out, out.method), is_pipeline(base)
            return out
        parts = {part: take_part(out, of_part, base) for part, of_part in by_part.items()}
        if all(part.has_flat_names for part in parts.values()):
            raise names.make_missing_error(out, modules, base)
    except BaseModelMismatchError:
        if (renamed := of_first_release(file, base)) is None:
            raise
        return renamed
    whole = join_pipeline(parts, file)
    unknown_keys, method = out.unknown_keys + whole.unknown_keys, find_common_method(whole, whole.method)
    return replace(whole, has_flat_names=False, unknown_keys=unknown_keys, method=method)


def take_part(adapter: AdapterFile, modules: Mapping[str, dict[str, Tensor]], base: Base) -> AdapterFile:
    """Return the adapter of one part of a pipeline: by the base's paths, or by the file's names if the base lacks
    modules.

    Raises:
        CheckpointError: factors are missing or do not fit each other.
    """
    for known in (base, None):
        out = replace(adapter, modules={}, full={}, unknown_keys=[], has_flat_names=known is None)
        try:
            take_modules(out, modules, known)
            break
        except BaseModelMismatchError:
            continue
    out.method = find_common_method(out, out.method)
    return out


def take_modules(out: AdapterFile, modules: Mapping[str, dict[str, Tensor]], base: Base | None) -> None:
    """Read these modules of a file into `out`, by the base's paths, or without a base by the file's names.

    Raises:
        CheckpointError: factors are missing or do not fit each other, a tensor has too few dimensions, or two names are
            one module of the base.
        BaseModelMismatchError: the base lacks some of them.
    """
    paths = dict(zip(modules, modules)) if base is None else match_modules(out, modules, base)
    for name, of_module in modules.items():
        try:
            read_module(out, paths[name], name, of_module, base)
        except IndexError as e:  # a tensor has fewer dimensions than its name says
            shapes = {leaf: t.shape for leaf, t in of_module.items()}
            raise make_damage_error(f"{out.path}: the tensors of '{name}' have shapes that cannot be: {shapes}") from e


def components_of(name: str) -> tuple[str, ...]:
    """Return the parts of a pipeline that may have a module, by its name's prefix such as "lora_te1_"; "" means that
    the base is one model.

    Raises StopIteration for a name without a known prefix.
    """
    return PREFIXES[next(prefix for prefix in PREFIXES if name.startswith(prefix))]


def of_first_release(file: str, base: Base | None) -> AdapterFile | None:
    """Return the adapter of a safetensors file with names of a model's first release, as sd-scripts write them for
    Flux. Its `format` is kohya's `NAME`.

    diffusers renames the tensors, and splits products of q, k and v. The modules of the part for this base
    (`select_pipeline_part`) are checked, and the whole adapter is returned.

    None if there is no base or the file is no .safetensors. Also None for any PeftError in reading, renaming or the
    check; other errors pass through.
    """
    from graft.files.formats import diffusers

    if base is None or not file.endswith(".safetensors"):
        return None
    try:
        adapter = diffusers.make_adapter(file, diffusers.read_renamed(file, base), {})
        names.check_modules(select_pipeline_part(adapter, base), base)
    except PeftError:  # then the file is not of this base
        return None
    return replace(adapter, format=NAME)


def match_modules(adapter: AdapterFile, modules: Mapping[str, object], base: Base) -> dict[str, str]:
    """Return name in the file → path in the base.

    The name without its prefix is looked up among the base's names with "_" for ".", within the parts of the prefix.

    Raises:
        BaseModelMismatchError: the base has no module for a name; all such names are listed.
        CheckpointError: two names are one module, or one name fits two modules.
    """
    flat = names.FlatNames(base)
    paths: dict[str, str] = {}
    absent = []
    for name in modules:
        prefix = next(prefix for prefix in PREFIXES if name.startswith(prefix))
        path = flat.find(name.removeprefix(prefix), PREFIXES[prefix])
        if path is None:
            absent.append(name)
        else:
            paths[name] = path
    if absent:
        raise names.make_missing_error(adapter, absent, base)
    names.index_by_name(
        paths, lambda path, a, b: f"{adapter.path} has {path} twice, as {a} and as {b}. Remove one of them."
    )
    return paths


def read_module(out: AdapterFile, path: str, name: str, tensors: dict[str, Tensor], base: Base | None) -> None:
    """Read one module of a file into `out.modules`: LoRA, LoHa, LoKr, or another method of LyCORIS, by the names of its
    tensors. Differences of whole tensors are added as well, see `add_whole_tensor`.

    LoHa and LoKr get the scale alpha / rank. Tensors without a meaning go to `out.unknown_keys`. DoRA of a method other
    than LoRA keeps all tensors as they are, as `OtherMethod`.

    Raises:
        CheckpointError: factors are missing or do not fit each other.
    """
    unread = dict(tensors)

    def take(*leaves: str) -> dict[str, Tensor]:
        """Return those of the tensors called `leaves` that are not read yet, and mark them as read."""
        return {leaf: unread.pop(leaf) for leaf in leaves if leaf in unread}

    if DOWN in tensors or UP in tensors:
        of_module = take(*LOW_RANK)
        out.modules[path] = read_kohya_pair(out.path, name, of_module)
    elif "hada_w1_a" in tensors or LOKR & tensors.keys():
        module = OtherMethod("LOHA", take(*LOHA)) if "hada_w1_a" in tensors else OtherMethod("LOKR", take(*LOKR))
        module.scale = divide_alpha(take("alpha").get("alpha"), module.rank)
        out.modules[path] = module
    else:
        for sign, (method, leaves) in OTHERS.items():
            if sign in tensors:
                out.modules[path] = OtherMethod(method, take(*leaves))
                break
    for leaf, values in take(*WHOLE).items():
        add_whole_tensor(out, f"{path}.{WHOLE[leaf]}", leaf, values, base)
    if "dora_scale" in unread and path in out.modules:  # DoRA of another method than LoRA
        out.modules[path] = OtherMethod(DORA_OF_OTHERS, tensors)
        unread.pop("dora_scale")
    out.unknown_keys += [f"{name}.{leaf}" for leaf in unread]


def read_kohya_pair(file: str, name: str, tensors: dict[str, Tensor]) -> LowRank | OtherMethod:
    """Return a module's factors with scale, magnitude and Tucker core, as a convolution if A has more than two
    dimensions. DoRA with a magnitude for each input is `OtherMethod` with all tensors.

    The scale is alpha / rank, and 1 without alpha or for alpha 0. A flat B of a convolution gets the dimensions of a
    kernel of size 1. The magnitude is flattened to a number for each output.

    Raises:
        CheckpointError: a factor is missing, or factors, core or magnitude do not fit each other.
    """
    (A, B), mid = get_factor_pair(tensors, (DOWN, UP), file, name), tensors.get(MID)
    rank = A.shape[0] if A.shape else 0
    if len(A.shape) < 2 or len(B.shape) < 2 or B.shape[1] != rank or (mid and mid.shape[:2] != (rank, rank)):
        raise make_shape_error(file, name, A, B)
    if len(A.shape) > 2 and len(B.shape) == 2:
        B = B.reshape(*B.shape, *[1] * (len(A.shape) - 2))
    magnitude = tensors.get("dora_scale")
    if magnitude is not None:
        if magnitude.shape[0] != B.shape[0] and magnitude.shape[:2] == (1, A.shape[1]):
            return OtherMethod(DORA_OF_INPUTS, tensors)
        if magnitude.nbytes == 0 or magnitude.shape[0] != B.shape[0] or set(magnitude.shape[1:]) - {1}:
            raise make_damage_error(f"{file}: dora_scale of '{name}' is {magnitude.shape}, for {B.shape[0]} outputs")
        magnitude = magnitude.reshape(B.shape[0])
    kind: Kind = "conv" if len(A.shape) > 2 else "linear"
    return LowRank(A, B, divide_alpha(tensors.get("alpha"), rank), kind, magnitude, mid=mid)


def add_whole_tensor(out: AdapterFile, key: str, leaf: str, difference: Tensor, base: Base | None) -> None:
    """Add base value + difference to `out.full` in float32, if the base has values.

    Else keep the difference as a module of method "LyCORIS full"; if the module has factors, its key goes to
    `unknown_keys`.

    Raises:
        CheckpointError: the base's tensor has another shape.
    """
    base_value = None if base is None else base.tensors.get(key)
    path = key.rpartition(".")[0]
    if base_value is None:
        of_module = out.modules.setdefault(path, OtherMethod(FULL, {}))
        if isinstance(of_module, LowRank) or of_module.method != FULL:
            out.unknown_keys.append(f"{path}.{leaf}")
        else:
            of_module.tensors[leaf] = difference
        return
    if base_value.shape != difference.shape:
        raise CheckpointError(
            f"{out.path}: the difference of {key} is {difference.shape}, not {base_value.shape}. Give its own base."
        )
    out.full[key] = make_tensor((base_value.read() + difference.read()).astype("f4"), "F32")


def write(adapter: AdapterFile, path: str, base: Base | None = None, lossy: bool = False) -> list[str]:
    """Write one file. Return descriptions of the losses.

    An adapter that was read from this format without a base keeps its names, and a kohya file its metadata; others get
    {"format": "pt"}.

    Raises:
        LossError: without `lossy`, a part cannot be held, or magnitudes need the base's weights.
        BaseNeededError: the names are another format's flat names.
    """
    own_names = adapter.format == NAME and adapter.has_flat_names
    fitted, lost = fit_to_format(replace(adapter, has_flat_names=False) if own_names else adapter, HOLDS, NAME, lossy)
    paths = {name: name for name in fitted.modules} if own_names else name_modules(fitted)
    tensors: dict[str, Tensor] = {}
    for module, of_module in fitted.modules.items():
        tensors |= {f"{paths[module]}.{leaf}": values for leaf, values in list_leaves(of_module).items()}
    write_safetensors(path, tensors, fitted.metadata if fitted.format == NAME else {"format": "pt"})
    return lost


def name_modules(adapter: AdapterFile) -> dict[str, str]:
    """Return path → name in a file: the prefix of its part of a pipeline, or "lycoris_", and the path with "_" for ".".

    The first text encoder is "te1" if there is a second one, else "te".
    """
    second = any(path.startswith("text_encoder_2.") for path in adapter.modules)
    prefixes = {"unet": "lora_unet_", "transformer": "lora_transformer_", "text_encoder_2": "lora_te2_",
                "text_encoder_3": "lora_te3_", "text_encoder": "lora_te1_" if second else "lora_te_"}  # fmt: skip
    out = {}
    for path, name in names.flatten_paths(adapter.modules).items():
        part = path.partition(".")[0]
        out[path] = prefixes[part] + name.removeprefix(f"{part}_") if part in prefixes else f"lycoris_{name}"
    return out


def list_leaves(module: LowRank | OtherMethod) -> dict[str, Tensor]:
    """Return a module's tensors by the ends of their names, with alpha = scale · rank in float32.

    LoRA also gets its Tucker core and its magnitude, shaped (out, 1, …), if it has them. Another method keeps its
    tensors and an alpha among them; without scale no alpha is added. Readers take alpha 0 for 1: with scale 0 the up
    factor (for LoHa and LoKr the first one) becomes zeros, and alpha is the rank. LoKr without a rank gets its scale in
    lokr_w1.
    """
    if isinstance(module, OtherMethod):
        out = dict(module.tensors)
        if module.scale is not None and "alpha" not in out:
            out["alpha"] = make_tensor(np.array((module.scale or 1.0) * (module.rank or 1), "f4"))
            if not module.scale:  # an alpha of 0 means 1 to every reader
                first = next(name for name in ("hada_w1_a", "lokr_w1", "lokr_w1_a") if name in out)
                out[first] = make_tensor(np.zeros(out[first].shape, "f4"), out[first].dtype)
            elif module.method == "LOKR" and not module.rank and module.scale != 1:  # readers ignore its alpha
                out["lokr_w1"] = make_tensor((out["lokr_w1"].read() * module.scale).astype("f4"), out["lokr_w1"].dtype)
        return out
    alpha = module.scale * module.rank
    out = {DOWN: module.A, UP: module.B, "alpha": make_tensor(np.array(alpha, "f4"))}
    if not alpha:  # 0 means 1 to every reader
        out[UP] = make_tensor(np.zeros(module.B.shape, "f4"), module.B.dtype)
        out["alpha"] = make_tensor(np.array(module.rank, "f4"))
    if module.mid is not None:
        out[MID] = module.mid
    if module.magnitude is not None:
        out["dora_scale"] = module.magnitude.reshape(*module.magnitude.shape[:1], *[1] * (len(module.A.shape) - 1))
    return out
