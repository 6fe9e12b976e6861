# SPDX-License-Identifier: Apache-2.0
"""pyreft's interventions: a folder with config.json and `intkey_….bin` for each; ReFT after blocks.

pyreft's files do not say at which tokens they act: every call passes positions. graft writes them under the key `graft`
of config.json, which pyreft keeps and ignores, and reads them there.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

from graft import CheckpointError, LossError, PeftWarning
from graft.config.atomic import replace_file
from graft.config.reading import Json, read_object
from graft.core.errors import join_some, warn
from graft.files.errors import make_damage_error, make_misfit_error
from graft.files.formats import Base
from graft.files.holding import FormatLimits, check_losses, fit_to_format
from graft.files.neutral import AdapterFile, LostModule, OtherMethod
from graft.files.pickles import convert_tensors, from_torch, read_torch, to_torch, write_torch
from graft.files.tensors import Tensor

if TYPE_CHECKING:
    import torch

NAME = "pyreft"
CONFIG = "config.json"
KEY = "intkey_{}.bin"
FOLDER = (KEY.format("*"),), (CONFIG,)
OURS = "graft"
HOLDS = FormatLimits(methods=frozenset({"REFT"}))
KINDS = {  # class of pyreft → (orthogonality, subtract_projection) of ReftConfig
    "LoreftIntervention": (True, True), "NoreftIntervention": (False, True), "DireftIntervention": (True, False),
    "NodireftIntervention": (False, False),
}  # fmt: skip
SOURCE = {"reft_A{}.weight": ("weight", "learned_source.weight"), "reft_A{}.bias": ("bias", "learned_source.bias")}
BLOCK = re.compile(r"(?:.*\.)?\w+\[(\d{1,9})\](?:\.output)?")  # "model.layers[3].output"
SAID = ("prefix_positions", "suffix_positions", "tied_weights", "non_linearity", "dropout")


class Place(NamedTuple):
    """The place of an intervention: a block by its number, its name in the file, and its class."""

    block: int
    key: str
    kind: str


def recognises(path: str) -> bool:
    """Return True for a folder with a config.json that has a list `representations`, and `intervention_types`.

    Other paths give False; a damaged config.json raises CheckpointError.
    """
    if not os.path.isdir(path) or not os.path.isfile(os.path.join(path, CONFIG)):
        return False
    fields = read_object(os.path.join(path, CONFIG))
    return isinstance(fields.get("representations"), list) and "intervention_types" in fields


def read(path: str, base: Base | None = None) -> AdapterFile:
    """Read a folder. A block's second intervention is that of the last tokens.

    The file's config is replaced by: `peft_type` "REFT", `target_modules` "places", `layers`, `inference_mode` True,
    `orthogonality` and `subtract_projection` of the first intervention's class, the fields of `read_positions`, and `r`
    of the first R. `layers` are the sorted numbers of the blocks, or "all". `selected` has all modules. Without graft's
    entry on positions, the defaults are taken with a PeftWarning.

    Raises:
        BaseNeededError: there is no base to count blocks.
        BaseModelMismatchError: the base has no such block.
        CheckpointError: a file is missing or damaged, graft has no such intervention, there is no intervention, or
            blocks have different numbers of them or more than two.
    """
    # loads torch, which a look at headers does not need
    from graft.files.formats.adapterhub_places import find_base_blocks

    fields = read_object(os.path.join(path, CONFIG))
    places = list_places(path, fields)
    blocks, base = find_base_blocks(path, base)
    out = AdapterFile(NAME, path, "REFT", config=fields)
    units: dict[int, int] = {}
    for place in places:
        if place.block >= len(blocks):
            raise make_misfit_error(f"{path} acts after block {place.block}, and {base.path} has {len(blocks)}")
        end = "_suffix" if units.setdefault(place.block, 0) else ""
        units[place.block] += 1
        module = out.modules.setdefault(blocks[place.block].path, OtherMethod("REFT", {}))
        assert isinstance(module, OtherMethod)
        module.tensors.update(read_unit(path, place, end))
    if not places or len(set(units.values())) > 1 or max(units.values()) > 2:
        raise CheckpointError(
            f"{path} has {units} interventions by block: graft reads one for each, or two, for first tokens and last."
        )
    orthogonality, subtract = KINDS[places[0].kind]
    position_fields = read_positions(path, fields, max(units.values()))
    numbers = sorted(units) if len(units) < len(blocks) else "all"
    out.config = {"peft_type": "REFT", "target_modules": "places", "layers": numbers, "inference_mode": True}
    out.config |= {**position_fields, "orthogonality": orthogonality, "subtract_projection": subtract}
    out.config["r"] = next(iter(out.modules.values())).tensors["reft_R"].shape[0]  # type: ignore[union-attr]
    out.selected = frozenset(out.modules)
    return out


def list_places(path: str, fields: Json) -> list[Place]:
    """Return the places of the interventions in a config, in its order; [] if there are none.

    The block is the entry's number for the component "block_output", or the number in a path such as
    "model.layers[3].output". The class is the last name in "<class 'pyreft.interventions.X'>".

    Raises:
        CheckpointError: the config has not one key and class for each intervention, or the classes differ. Also for a
            class other than Loreft-, Noreft-, Direft- and NodireftIntervention, for another place than a block's output
            by "pos", and for a key that is no file name.
    """
    representations, types = fields["representations"], fields["intervention_types"]
    keys = fields.get("sorted_keys")
    if not isinstance(keys, list) or not isinstance(types, list) or not len(keys) == len(types) == len(representations):
        raise make_damage_error(f"{path}: {CONFIG} does not say one key and one class for each intervention")
    places = []
    for entry, key, kind in zip(representations, keys, types):
        layer, component, unit_ = (*entry, *[None] * 3)[:3] if isinstance(entry, list) else (None, None, None)
        name = str(kind).rstrip("'>").rpartition(".")[2]
        match = BLOCK.fullmatch(str(component))
        number = layer if component == "block_output" else int(match[1]) if match else None
        if name not in KINDS or unit_ != "pos" or not isinstance(number, int) or isinstance(number, bool) or number < 0:
            raise CheckpointError(
                f"{path} has an intervention {name} of {component!r}, by {unit_!r}: graft reads {', '.join(KINDS)} of "
                "block_output, by 'pos'."
            )
        if not isinstance(key, str) or os.path.basename(key) != key:
            raise make_damage_error(f"{path}: {key!r} is no name of an intervention")
        places.append(Place(number, key, name))
    if len({place.kind for place in places}) > 1:
        raise CheckpointError(
            f"{path} has interventions of several classes: {join_some(sorted({p.kind for p in places}))}."
        )
    return places


def read_unit(path: str, place: Place, end: str) -> dict[str, Tensor]:
    """Return A, its bias, and R of an intervention, by graft's names with the ending `end`. R is (r, width).

    R comes from `rotate_layer`, transposed, or from its parametrization by torch, which makes it orthonormal, or from
    `proj_layer` as it is. A bias of the projection is ignored if it is 0 or the class has no part for it.

    Raises:
        CheckpointError: the file is missing or damaged, lacks one of the three, their shapes do not fit, or the
            projection has a bias that is not 0.
    """
    from graft.files.formats.adapterhub_places import TURNED, compute_orthonormal_weight

    file = os.path.join(path, KEY.format(place.key))
    if not os.path.isfile(file):
        raise make_damage_error(f"{path} lacks {os.path.basename(file)}")
    state = convert_tensors(read_torch(file), file)
    values = {name.format(end): state[t] for name, sources in SOURCE.items() for t in sources if t in state}
    if "rotate_layer" in state:  # (H, r)
        values[f"reft_R{end}"] = from_torch(to_torch(state["rotate_layer"]).T, file)
    elif {f"rotate_layer.{TURNED}.{name}" for name in ("original", "0.base")} <= state.keys():  # of R.T
        values[f"reft_R{end}"] = from_torch(compute_orthonormal_weight(state, "rotate_layer").T, file)
    elif "proj_layer.weight" in state:
        values[f"reft_R{end}"] = state["proj_layer.weight"]
        bias = state.get("proj_layer.bias")
        if bias is not None and KINDS[place.kind][1] and bias.read().any():
            raise CheckpointError(
                f"{file} has a bias of the projection, which graft's ReFT has not. Use it with pyreft."
            )
    shapes = [values[name].shape for name in sorted(values)]
    if len(values) < 3 or len(shapes[2]) != 2 or shapes[1] != shapes[2] or shapes[0] != shapes[2][:1]:
        raise make_damage_error(f"{file} does not hold A, b and R of one rank and width, but {sorted(state)}: {shapes}")
    return values


def read_state(kind: str, A: Mapping[str, torch.Tensor], R: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return the tensors that pyreft's class `kind` saves, from A's weight and bias and from R (r, width).

    LoReft has A's names as they are, and R transposed. Other classes have A as `learned_source` and the width as
    `embed_dim` and `interchange_dim`. The orthonormal ones of them save torch's parametrization of R transposed, others
    R as `proj_layer.weight`.
    """
    import torch

    from graft.files.formats.adapterhub_places import make_parametrized

    if kind == "LoreftIntervention":
        return {**A, "rotate_layer": R.T}
    width = torch.tensor(R.shape[1])
    state = {f"learned_source.{name}": t for name, t in A.items()} | {"embed_dim": width, "interchange_dim": width}
    if not KINDS[kind][0]:
        return state | {"proj_layer.weight": R}
    layer = make_parametrized(*R.T.shape)
    layer.weight = R.T
    return state | {f"rotate_layer.{name}": t for name, t in layer.state_dict().items()}


def read_positions(path: str, fields: Json, units: int) -> Json:
    """Return the fields of ReftConfig that pyreft's files lack: those that graft wrote there.

    Of these a missing dropout is 0, and other missing ones are left out. Without a dict under "graft", the defaults
    with a PeftWarning: the first 3 tokens, with two interventions for each block also the last 3, no dropout.
    """
    own_fields = fields.get(OURS)
    if isinstance(own_fields, dict):
        return {"dropout": 0.0} | {name: own_fields[name] for name in SAID if name in own_fields}
    first = 3
    last = first if units == 2 else 0
    warn(
        f"{path} does not say at which tokens it acts, nor with which activation: the first {first} of a prompt"
        f"{f' and the last {last}' if last else ''} are taken, and none. If it was trained otherwise, say so in its "
        f'{CONFIG}: "{OURS}": {{"prefix_positions": …, "suffix_positions": …, "non_linearity": …}}.',
        PeftWarning,
    )
    return {"prefix_positions": first, "suffix_positions": last, "dropout": 0.0}


def write(adapter: AdapterFile, path: str, base: Base | None = None, lossy: bool = False) -> list[str]:
    """Write a folder: a config and one pickled file for each block, prefix positions first, then suffix positions.

    Return descriptions of the losses.

    The folder is made if needed. Options of ReFT that pyreft does not know are written to the config under graft's
    name. An orthogonal R is made orthonormal first.

    Raises:
        BaseNeededError: there is no base to count blocks.
        LossError: it is no ReFT; or without `lossy` it acts on other modules than blocks, or has an activation, which
            pyreft's files cannot say. With `lossy` too, if no block is left.
    """
    from graft import ReftConfig, method_of
    from graft.files.formats.adapterhub_places import find_base_blocks

    if adapter.method != "REFT":
        raise LossError(
            f"The format {NAME} holds ReFT alone, and {adapter.path} is {adapter.method}. Choose --to peft."
        )
    numbers = {block.path: i for i, block in enumerate(find_base_blocks(adapter.path, base)[0])}
    known = ReftConfig.__dataclass_fields__
    cfg = ReftConfig(**{name: value for name, value in adapter.config.items() if name in known and name != "peft_type"})
    fitted, lost = fit_to_format(adapter, HOLDS, NAME, lossy)
    lost += [f"non_linearity={cfg.non_linearity}"] if cfg.non_linearity is not None else []
    lost += [LostModule(f"{module}, which is no block") for module in fitted.modules if module not in numbers]
    modules = {numbers[path]: m for path, m in fitted.modules.items() if path in numbers and isinstance(m, OtherMethod)}
    check_losses(adapter, NAME, lost, lossy, modules)
    kind = next(name for name, fits in KINDS.items() if fits == (cfg.orthogonality, cfg.subtract_projection))
    ends = [end for end in ("", "_suffix") if any(f"reft_R{end}" in m.tensors for m in modules.values())]
    files, keys, width = {}, [], 0
    for i, end in enumerate(ends):
        for number, m in sorted(modules.items()):
            A = {name: to_torch(m.tensors[f"reft_A{end}.{name}"]) for name in ("weight", "bias")}
            R = to_torch(m.tensors[f"reft_R{end}"])
            width = R.shape[1]
            state = read_state(kind, A, method_of("REFT").orthonormal(R) if cfg.orthogonality else R)
            key = f"layer_{number}_comp_block_output_unit_pos_nunit_1#{i}"
            keys.append((number, key))
            files[KEY.format(key)] = {name: t.contiguous() for name, t in state.items()}
    config = {
        "representations": [[number, "block_output", "pos", 1, cfg.r, *[None] * 9] for number, _ in keys],
        "intervention_types": [f"<class 'pyreft.interventions.{kind}'>" for _ in keys],
        "intervention_dimensions": [width for _ in keys], "intervention_constant_sources": [True for _ in keys],
        "sorted_keys": [key for _, key in keys], "mode": "parallel",
        OURS: {name: getattr(cfg, name) for name in SAID},
    }  # fmt: skip
    os.makedirs(path, exist_ok=True)
    for name, values in files.items():
        write_torch(os.path.join(path, name), values)
    replace_file(os.path.join(path, CONFIG), json.dumps(config, indent=2) + "\n")
    return lost
