# SPDX-License-Identifier: Apache-2.0
"""Two checkpoints of one model by the names of its parameters, and what its modules are."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from graft.config.reading import Json
from graft.files.bases import view_by_model_names
from graft.files.formats.peft import TRANSPOSED
from graft.files.names import CONV1D
from graft.files.tensors import Tensor

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

    from graft.files.base import BaseFiles
    from graft.files.neutral import Kind

# names, for bases of which no library makes a model
TOKENS = ("embed_tokens", "wte", "word_embeddings", "embed_in", "shared", "tok_embeddings")
EMBEDDINGS = (*TOKENS, "wpe", "position_embeddings", "token_type_embeddings", "embed_positions")
CONV1D_NAMES = ("c_attn", "c_proj", "c_fc", "q_attn")
HEAD = "lm_head.weight"


class CheckpointPair:
    """A fine-tuned checkpoint and its base, by the names of the base's model.

    Where no library knows the model, names are those of the files, and they tell what a module is.

    Attributes:
        new, old: the tensors of both, by name. A tied tensor that a file leaves out is there under all its names.
        is_tied: the base's model ties tensors.
        twins: the further names of tied tensors → the first, if both checkpoints have them tied.
        quantized: the paths of those that are quantized, whose names are those of the files.
    """

    def __init__(self, tuned: BaseFiles, base: BaseFiles):
        self.config, self.model = base.config, None
        self.new, self.old = dict(tuned.tensors), dict(base.tensors)
        self.quantized = [m.path for m in (tuned, base) if "quantization_config" in m.config]
        if not self.quantized and (known := view_by_model_names(base)) is not None:
            from graft.files.skeleton import name_by_model
            from graft.inject.experts import ExpertStacks

            self.model, self.experts = cast("PreTrainedModel", known.model), ExpertStacks(known.model)
            self.new, self.old = name_by_model(tuned.tensors, self.model), known.tensors
        self.is_tied, self.twins = False, dict[str, str]()
        for group in self._list_tied_groups():
            for side in (self.new, self.old):
                tied_tensor = next((side[name] for name in group if name in side), None)
                if tied_tensor is not None:
                    side.update({name: tied_tensor for name in group if name not in side})
            self._note_twins([name for name in group if name in self.new and name in self.old])

    def _list_tied_groups(self) -> list[list[str]]:
        """Return the names of what may be one tensor: an embedding and a head, and what else the model can tie.

        The first of each is that of a module without others in it, and of an embedding if there is one.
        """
        if self.model is None:
            tokens = [n for n in self.old if module_path(n).rpartition(".")[2] in TOKENS and n.endswith(".weight")]
            has_head = HEAD in {*self.new, *self.old} or is_causal_model(self.config)
            self.is_tied = bool(self.config.get("tie_word_embeddings", HEAD not in self.old))
            return [[tokens[0], HEAD]] if len(tokens) == 1 and has_head else []
        from graft.files.merging.ties import find_tied_groups

        model = self.model
        self.is_tied = bool(find_tied_groups(lambda: model, {}, {}))
        model.config.get_text_config().tie_word_embeddings = True  # the fine-tuned one may tie what the base does not
        groups = find_tied_groups(lambda: model, {}, {})
        return [
            sorted(group, key=lambda name: (self.is_container(name), not self.is_embedding(name))) for group in groups
        ]

    def _note_twins(self, group: list[str]) -> None:
        """Add those of a group to `twins` that are one tensor in both checkpoints."""
        firsts: list[str] = []
        for name in group:
            first = next((f for f in firsts if all(are_equal(s[f], s[name]) for s in (self.new, self.old))), None)
            if first is None:
                firsts.append(name)
            else:
                self.twins[name] = first

    def _module(self, name: str) -> nn.Module | None:
        """Return the module of a parameter; None: there is no model, or it has no such module."""
        try:
            return None if self.model is None else self.model.get_submodule(module_path(name))
        except AttributeError:
            return None

    def is_called_as_experts(self, path: str) -> bool:
        """Return True if PEFT takes a module's name for that of a matrix of experts, and rewrites a config with it."""
        return self.model is not None and self.experts.by_peft and path.rpartition(".")[2] in self.experts.names

    def is_embedding(self, name: str) -> bool:
        module = self._module(name)
        return (
            module_path(name).rpartition(".")[2] in EMBEDDINGS if module is None else hasattr(module, "num_embeddings")
        )

    def is_head(self, name: str) -> bool:
        module = self._module(name)
        if module is None or self.model is None:
            return module_path(name).rpartition(".")[2] == "lm_head"
        return module is get_output_head(self.model)

    def is_conv1d(self, name: str) -> bool:
        """Return True if a parameter is the weight of a linear layer that stores it (in, out)."""
        module = self._module(name)
        if module is None:
            return self.config.get("model_type") in CONV1D and module_path(name).rpartition(".")[2] in CONV1D_NAMES
        return type(module).__name__ == "Conv1D"

    def is_transposed(self, name: str) -> bool:
        """Return True if the matrices of a stack are stored (in, out), as its module says."""
        module = self._module(name)
        return bool(
            self.config.get("model_type") in TRANSPOSED if module is None else getattr(module, "is_transposed", False)
        )

    def is_container(self, name: str) -> bool:
        """Return True if the module of a parameter has modules in it, which would be saved with it.

        Where no library knows the model, names of other parameters than a weight or a bias are taken for such.
        """
        module = self._module(name)
        if module is None:
            return name.rpartition(".")[2] not in ("weight", "bias")
        return any(True for _ in module.children())

    def lora_kind(self, name: str, embed: str) -> Kind | None:
        """Return the kind of LoRA that a parameter's change becomes; None: it is kept whole.

        Args:
            embed: "lora" or "full", for embeddings and heads.
        """
        path, _, leaf = name.rpartition(".")
        shape = self.new[name].shape
        if leaf != "weight":
            return "experts" if len(shape) == 3 and path.rpartition(".")[2].endswith("experts") else None
        if (
            len(shape) < 2
            or min(shape[:2]) == 1
            or (embed == "full" and (self.is_head(name) or self.is_embedding(name)))
        ):
            return None
        if self.is_embedding(name):
            return "embedding"
        module = self._module(name)
        is_plain = module is None or type(module).__module__.startswith("torch.nn.") or self.is_conv1d(name)
        if not is_plain or getattr(module, "groups", 1) != 1:  # with a forward of its own, or no matrix for B A
            return None
        return "linear" if len(shape) == 2 else "conv"


def module_path(name: str) -> str:
    return name.rpartition(".")[0]


def get_output_head(model: PreTrainedModel) -> nn.Module | None:
    return model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None


def are_equal(a: Tensor, b: Tensor) -> bool:
    """Return True if two tensors are one, value by value."""
    return a is b or ((a.shape, a.dtype) == (b.shape, b.dtype) and a.load() == b.load())


def is_causal_model(config: Json) -> bool:
    return any(kind.endswith(("LMHeadModel", "ForCausalLM")) for kind in config.get("architectures") or ())
