# SPDX-License-Identifier: Apache-2.0
"""The network next to the model: a small copy of the base model's architecture, or a loaded one."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from inspect import signature
from pathlib import Path
from typing import Annotated, Any

from torch import Tensor, nn

from graft.config.fields import COUNT, LayerRange, Targeted
from graft.config.reading import read_object, read_weights
from graft.core.base_config import text_config
from graft.core.errors import ConfigError
from graft.core.method import Tuner
from graft.storage.offload import copy_into_memory, without_hooks

MIRROR = "mirror"  # the shadow network is of the base model's own class
SIZES = ("num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size")


@dataclass(kw_only=True)
class ShadowConfig(Targeted, LayerRange):
    """SHADOW: h ← h + α Up Down (h - s) before each block, s ← (1 - g) s + g T h after it.

    s starts as a small network's output.

    Raises:
        ConfigError: a number that is not positive, or a size for a network that is loaded.
    """

    peft_type: str = "SHADOW"
    r: Annotated[int, COUNT] = 8  # width of Down
    shadow_alpha: float = 0.1  # α
    shadow_dropout: float = 0.2  # of Down's output
    init_weights: bool = True  # Up is zero: the adapter starts as nothing
    shadow_model: str = MIRROR  # or a folder, or a name on the hub
    shadow_num_hidden_layers: Annotated[int | None, COUNT] = None  # of a mirror; None: 1
    shadow_hidden_size: Annotated[int | None, COUNT] = None  # of a mirror; None, here and below: as the base model
    shadow_num_attention_heads: Annotated[int | None, COUNT] = None
    shadow_intermediate_size: Annotated[int | None, COUNT] = None
    share_embeddings: bool = True  # a mirror as wide as the base model uses its word embeddings
    update_hidden_size: Annotated[int | None, COUNT] = None  # width of T and of the gate's network; None: r
    auxiliary_loss_weight: float = 0.05  # of the shadow network's own loss

    def __post_init__(self) -> None:
        """Validate the fields; set `hidden_size` to 0, which `prepare` fills for one model.

        Raises:
            ConfigError: a size of a mirror is set with a `shadow_model` that is loaded.
        """
        super().__post_init__()
        self.hidden_size = 0  # no field: it is that of one model
        names = [f"shadow_{size}" for size in SIZES if getattr(self, f"shadow_{size}") is not None]
        if self.shadow_model != MIRROR and names:
            raise ConfigError(
                f"{', '.join(names)} can only be set with shadow_model='{MIRROR}': '{self.shadow_model}' has its sizes "
                "already. Leave them out."
            )


PROJECTED, DETACHED = "causal_lm_with_hidden_projection", "DetachedShadowModel"
PROJECTION = "shadow_hidden_projection.weight"


def network_from(where: str, width: int) -> tuple[nn.Module, nn.Module | None]:
    """Return the network at `where` (a folder or a name on the hub), with frozen embeddings, and its projection to
    `width`, or None.

    Reads three kinds by config.json: a file of PEFT (model_type "causal_lm_with_hidden_projection"), a detached shadow
    model (architectures ["DetachedShadowModel"]), or any model of transformers, which has no projection. No remote code
    runs. The width of a network without projection is not checked.

    Raises:
        ConfigError: the projection is to another width.
    """
    from transformers import AutoConfig, AutoModel

    raw = read_object(_file(where, "config.json"))
    if raw.get("model_type") == PROJECTED:
        inner = dict(raw["shadow_model_config"])
        network, projection = _load_network(AutoConfig.for_model(**inner), where, "shadow_model.")
    elif raw.get("architectures") == [DETACHED]:
        network, projection = _load_network(
            AutoConfig.from_pretrained(where, trust_remote_code=False), where, "backbone."
        )
    else:
        network, projection = AutoModel.from_pretrained(where, trust_remote_code=False), None
    if projection is not None and projection.out_features != width:
        raise ConfigError(
            f"The shadow network of '{where}' projects to {projection.out_features} numbers, and the base model is "
            f"{width} wide. Choose a network for this model."
        )
    embeddings = network.get_input_embeddings()
    if embeddings is not None:
        embeddings.requires_grad_(False)
    return network, projection


def _load_network(config: object, where: str, prefix: str) -> tuple[nn.Module, nn.Linear | None]:
    """Return a network of `config` with the values of model.safetensors under `prefix`, and the projection in the file
    ("shadow_hidden_projection.weight"), a linear layer without bias; None if it has none.

    The file must hold each value of the network: torch's RuntimeError names those that are missing or unknown. No
    remote code runs.
    """
    from transformers import AutoModel

    network = AutoModel.from_config(config, trust_remote_code=False)
    tensors = read_weights(_file(where, "model.safetensors"), f"The shadow network of '{where}'")
    network.load_state_dict({k.removeprefix(prefix): t for k, t in tensors.items() if k.startswith(prefix)})
    weight = tensors.get(PROJECTION)
    if weight is None:
        return network, None
    projection = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    projection.load_state_dict({"weight": weight})
    return network, projection


def _file(where: str, name: str) -> Path:
    """Return the path of a file of `where`, a folder or a repository, which is downloaded into transformers' cache."""
    from transformers.utils import cached_file

    return Path(str(cached_file(where, name)))


LISTS = ("layers", "h", "blocks", "single_transformer_blocks", "transformer_blocks")  # names of stacks of blocks
HEADS = ("score", "classifier")
EMBEDDINGS = "embed_tokens"  # where networks share word embeddings, PEFT's lack their own only if these are called so


def containers_of(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield (path with a dot at its end, module) of the model, and of the backbones within it, the outermost first.

    The model's path is "". The next backbone is the first child of these names: "model", "transformer", "base_model",
    "decoder", the module's `base_model_prefix`, "language_model". It ends at a module without such a child.
    """
    path, module = "", model
    while True:
        yield path, module
        prefix = getattr(module, "base_model_prefix", "")
        inner = dict.fromkeys(("model", "transformer", "base_model", "decoder", prefix, "language_model"))
        children = ((name, module._modules.get(name)) for name in inner if name)
        name, child = next(((n, m) for n, m in children if isinstance(m, nn.Module)), ("", None))
        if child is None:
            return
        path, module = f"{path}{name}.", child


def stack_of(model: nn.Module) -> tuple[nn.Module, str, int] | None:
    """Return the module that holds the stack of blocks, the path of that stack, and the number of blocks; None without
    a stack.

    The stack is the first ModuleList that is not empty, in the outermost of `containers_of`. Its name is "layers", "h",
    "blocks", "single_transformer_blocks" or "transformer_blocks", tried in this order.
    """
    for path, container in containers_of(model):
        for name in LISTS:
            stack = container._modules.get(name)
            if isinstance(stack, nn.ModuleList) and len(stack):
                return container, f"{path}{name}", len(stack)
    return None


def list_block_paths(model: nn.Module) -> list[str]:
    """Return the paths of all blocks in the model's stack: "layers.0", "layers.1", …

    Raises:
        AttributeError: the model has no stack of blocks (`stack_of`).
    """
    stack = stack_of(model)
    if stack is not None:
        return [f"{stack[1]}.{i}" for i in range(stack[2])]
    raise AttributeError(
        f"SHADOW finds no stack of blocks in a {type(model).__name__}. Name the blocks in target_modules."
    )


def require_width(model: nn.Module) -> int:
    """Return the `hidden_size` of the model's config (of a multimodal one, its text's).

    Raises ConfigError if there is none.
    """
    size = getattr(text_config(model), "hidden_size", None)
    if size is None:
        raise ConfigError(f"The config of {type(model).__name__} has no hidden_size for SHADOW. Use another method.")
    return int(size)


def make_modules(model: nn.Module, cfg: ShadowConfig) -> dict[str, nn.Module]:
    """Return the modules that SHADOW adds: "shadow_backbone", the mirror or loaded network, "shadow_projection" to the
    model's width, and for SEQ_CLS "shadow_head".

    The projection is the file's, an identity for equal widths, else a new linear layer without bias. The head is a copy
    of the model's `score`, or else `classifier`, without hooks. All are in the model's training mode.

    Raises:
        ConfigError: the mirror would have output embeddings, as the model has no backbone with a stack of blocks; or
            the model has no head for SEQ_CLS.
    """
    width = require_width(model)
    mirrors = cfg.shadow_model == MIRROR
    backbone, projection = (mirror(model, cfg), None) if mirrors else network_from(cfg.shadow_model, width)
    if mirrors and stack_of(model) is None and backbone.get_output_embeddings() is not None:
        raise ConfigError(
            f"SHADOW finds no stack of blocks in a {type(model).__name__} to build its network from. "
            "Name a smaller model as shadow_model, or choose a method that adapts layers."
        )
    modules: dict[str, nn.Module] = {"shadow_backbone": backbone}
    network_width = require_width(backbone)
    if projection is None:
        projection = nn.Identity() if network_width == width else nn.Linear(network_width, width, bias=False)
    modules["shadow_projection"] = projection
    if cfg.task_type == "SEQ_CLS":
        head = next((getattr(model, n) for n in HEADS if hasattr(model, n)), None)
        if head is None:
            raise ConfigError(
                f"SHADOW copies the head for SEQ_CLS, and {type(model).__name__} has no '{HEADS[0]}' or '{HEADS[1]}'. "
                "Load the base by AutoModelForSequenceClassification."
            )
        modules["shadow_head"] = without_hooks(copy_into_memory(head))  # it stands where the network does
    for module in modules.values():
        module.train(model.training)
    return modules


def mirror(model: nn.Module, cfg: ShadowConfig) -> Any:
    """Return a network of the class of the base model's backbone, with new values and the sizes of the config.

    Sizes are the number of blocks, width, heads and MLP width. It has one block if the config gives no number of them;
    `layer_types` is cut to that number, and other sizes stay the base's. With `share_embeddings`, an equal width and a
    forward that takes `inputs_embeds` it is marked with `needs_embeddings`, and its child `embed_tokens`, if there is
    one, becomes None.
    """
    stack = stack_of(model)
    base: Any = model if stack is None else stack[0]
    config = copy.deepcopy(base.config)
    sizes = {size: getattr(cfg, f"shadow_{size}") for size in SIZES}
    sizes["num_hidden_layers"] = sizes["num_hidden_layers"] or 1
    for name, value in sizes.items():
        if value is not None:
            setattr(config, name, value)
    if vars(config).get("layer_types") is not None:  # others count layers of one kind, as Mamba's
        config.layer_types = config.layer_types[: config.num_hidden_layers]
    network: Any = type(base)(config)
    takes_embeddings = "inputs_embeds" in signature(network.forward).parameters
    shares = cfg.share_embeddings and takes_embeddings and config.hidden_size == base.config.hidden_size
    if shares:
        network.needs_embeddings = True
        if EMBEDDINGS in network._modules:
            network._modules[EMBEDDINGS] = None
    return network


def last_loss(tuner: Tuner) -> Tensor | None:
    """Return the shadow network's own loss in the last call with labels, detached; None if there was none.

    Of several active shadow adapters it is the first one's that has a loss.
    """
    names = (name for name in tuner.active_adapters if tuner.peft_config[name].peft_type == "SHADOW")
    return next((tuner.states[name] for name in names if name in tuner.states), None)
