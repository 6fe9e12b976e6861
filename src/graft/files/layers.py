# SPDX-License-Identifier: Apache-2.0
"""A fine-tuned checkpoint and its base under common parameter names, and the kinds of their modules."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from graft.files.bases import view_by_model_names
from graft.files.formats.peft import TRANSPOSED
from graft.files.names import CONV1D
from graft.files.tensors import are_equal

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

    from graft.files.base import BaseDescription
    from graft.files.neutral import Kind

# names of modules, for bases that no installed library knows
TOKENS = ("embed_tokens", "wte", "word_embeddings", "embed_in", "shared", "tok_embeddings")
EMBEDDINGS = (*TOKENS, "wpe", "position_embeddings", "token_type_embeddings", "embed_positions")
CONV1D_NAMES = ("c_attn", "c_proj", "c_fc", "q_attn")
HEAD = "lm_head.weight"


class CheckpointPair:
    """A fine-tuned checkpoint and its base, under the parameter names of the base's model.

    If no installed library knows the model, names are those of the files, and kinds of modules are guessed from them.
    Values stay unread, except to compare tied tensors.

    Attributes:
        config: of the base.
        model: the base's model on the meta device, or None.
        new: the fine-tuned tensors by name. A tied tensor has all its names, even if the file has only one.
        old: the base's tensors by name, likewise.
        is_tied: the base's model ties tensors.
        twins: further name of a tied tensor → first name, if both checkpoints tie it.
        quantized: the paths of quantized checkpoints; with one, names are those of the files.
    """

    def __init__(self, tuned: BaseDescription, base: BaseDescription):
        """Name the tensors of both checkpoints by the base's model, and find tied tensors.

        If one is quantized, or no library makes a model of the base, `model` is None and the tensors keep their names.
        In a group of tied names, absent ones get the tensor of the first one present. Groups are then compared by
        value, see `_note_twins`.
        """
        self.config, self.model = base.config, None
        self.new, self.old = dict(tuned.tensors), dict(base.tensors)
        self.quantized = [m.path for m in (tuned, base) if "quantization_config" in m.config]
        if not self.quantized and (known := view_by_model_names(base)) is not None:
            from graft.files.skeleton import name_by_model
            from graft.io.servers import ServerBlocks

            self.model = cast("PreTrainedModel", known.model)
            self.experts = ServerBlocks(self.model)
            self.new, self.old = name_by_model(tuned.tensors, self.model), known.tensors
        self.is_tied, self.twins = False, dict[str, str]()
        for group in self._list_tied_groups():
            for side in (self.new, self.old):
                tied_tensor = next((side[name] for name in group if name in side), None)
                if tied_tensor is not None:
                    side.update({name: tied_tensor for name in group if name not in side})
            self._note_twins([name for name in group if name in self.new and name in self.old])

    def _list_tied_groups(self) -> list[list[str]]:
        """Return groups of names that may be one tensor: an embedding and a head, and other tensors that the model can
        tie.

        With a model, `is_tied` is set to whether the model ties any tensors as its config is. Then tie_word_embeddings
        is switched on in the model's config, and the groups found with it are returned. In each group, modules without
        children come first, and among them embeddings.

        Without a model the result is the only token embedding with "lm_head.weight", if a file has such a head, or the
        architecture ends with LMHeadModel or ForCausalLM; else []. `is_tied` is then the config's, or True if the
        config says nothing and the base's files lack the head.
        """
        if self.model is None:
            tokens = [n for n in self.old if module_path(n).rpartition(".")[2] in TOKENS and n.endswith(".weight")]
            kinds = self.config.get("architectures") or ()
            has_head = any(kind.endswith(("LMHeadModel", "ForCausalLM")) for kind in kinds)
            has_head = has_head or HEAD in self.new or HEAD in self.old
            self.is_tied = bool(self.config.get("tie_word_embeddings", HEAD not in self.old))
            return [[tokens[0], HEAD]] if len(tokens) == 1 and has_head else []
        from graft.files.merging.ties import find_tied_groups

        model = self.model
        self.is_tied = bool(find_tied_groups(lambda: model, {}, {}))
        model.config.get_text_config().tie_word_embeddings = True  # the fine-tuned model may tie more than the base
        groups = find_tied_groups(lambda: model, {}, {})
        return [
            sorted(group, key=lambda name: (self.is_container(name), not self.is_embedding(name))) for group in groups
        ]

    def _note_twins(self, group: list[str]) -> None:
        """Add to `twins` each name of a group with the same tensor, in both checkpoints, as an earlier name.

        Reads their values.
        """
        firsts: list[str] = []
        for name in group:
            first = next((f for f in firsts if all(are_equal(s[f], s[name]) for s in (self.new, self.old))), None)
            if first is None:
                firsts.append(name)
            else:
                self.twins[name] = first

    def _module(self, name: str) -> nn.Module | None:
        """Return the model's module of a parameter; None without a model or without such a module."""
        try:
            return None if self.model is None else self.model.get_submodule(module_path(name))
        except AttributeError:
            return None

    def is_called_as_experts(self, path: str) -> bool:
        """Return True if the module's last name is one of `experts.names` and `experts.by_peft` is set: PEFT would take
        it for a matrix of experts, and rewrite a config that names it.

        False without a model.
        """
        return self.model is not None and self.experts.by_peft and path.rpartition(".")[2] in self.experts.names

    def is_embedding(self, name: str) -> bool:
        """Return True if a parameter belongs to an embedding, by its module's `num_embeddings`, or without a module by
        its last name ("embed_tokens", "wte", "wpe" and others).
        """
        module = self._module(name)
        by_name = module_path(name).rpartition(".")[2] in EMBEDDINGS
        return by_name if module is None else hasattr(module, "num_embeddings")

    def is_head(self, name: str) -> bool:
        """Return True if a parameter belongs to the model's output head; without a model or module, to a module named
        lm_head.
        """
        module = self._module(name)
        if module is None or self.model is None:
            return module_path(name).rpartition(".")[2] == "lm_head"
        return module is getattr(self.model, "get_output_embeddings", lambda: None)()

    def is_conv1d(self, name: str) -> bool:
        """Return True if a parameter belongs to a Conv1D, a linear layer with weights (in, out).

        Without a module, GPT-2's names count (c_attn, c_proj, c_fc, q_attn) in a model type that has such layers.
        """
        module = self._module(name)
        if module is None:
            return self.config.get("model_type") in CONV1D and module_path(name).rpartition(".")[2] in CONV1D_NAMES
        return type(module).__name__ == "Conv1D"

    def is_transposed(self, name: str) -> bool:
        """Return True if a stack of experts is stored (in, out), by its module's flag, or without a module for the
        model type "gpt_oss".
        """
        module = self._module(name)
        return bool(
            self.config.get("model_type") in TRANSPOSED if module is None else getattr(module, "is_transposed", False)
        )

    def is_container(self, name: str) -> bool:
        """Return True if a parameter's module has sub-modules, which a save of the whole module would include.

        Without a module, it is True for parameters other than "weight" and "bias".
        """
        module = self._module(name)
        if module is None:
            return name.rpartition(".")[2] not in ("weight", "bias")
        return any(True for _ in module.children())

    def lora_kind(self, name: str, embed: str) -> Kind | None:
        """Return the kind of LoRA for a parameter's change, or None if it has to be stored whole.

        A parameter that is not called "weight" is "experts" if it is 3-D in a module that ends with "experts", else
        None. Weights of embeddings are "embedding"; other 2-D ones are "linear", and higher ones "conv". None are
        vectors, weights of one row or column, modules with groups, and modules of classes outside `torch.nn` other than
        Conv1D.

        Args:
            embed: "lora" or "full"; with "full", embeddings and heads are None.
        """
        path, _, leaf = name.rpartition(".")
        shape = self.new[name].shape
        if leaf != "weight":
            return "experts" if len(shape) == 3 and path.rpartition(".")[2].endswith("experts") else None
        is_whole = embed == "full" and (self.is_head(name) or self.is_embedding(name))
        if is_whole or len(shape) < 2 or min(shape[:2]) == 1:
            return None
        if self.is_embedding(name):
            return "embedding"
        module = self._module(name)
        is_plain = module is None or type(module).__module__.startswith("torch.nn.") or self.is_conv1d(name)
        if not is_plain or getattr(module, "groups", 1) != 1:  # another forward, or no matrix for B A
            return None
        return "linear" if len(shape) == 2 else "conv"


def module_path(name: str) -> str:
    """Return a parameter's name without its last part; "" for a name without a dot."""
    return name.rpartition(".")[0]
