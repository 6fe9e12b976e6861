# SPDX-License-Identifier: Apache-2.0
"""The base of prompt methods: learned embeddings before the input, or keys and values before each layer's own.

And the carrier of a model's prompts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from graft.config.base import PeftConfig
from graft.config.prompt import PromptLearningConfig
from graft.core.call import Call
from graft.core.carrier import Carrier, CarrierState
from graft.core.containers import Slot, iter_slots
from graft.core.errors import CheckpointError, ConfigError
from graft.core.method import PublishedRate
from graft.core.wrappers import end_offloading
from graft.storage.find import find_device_and_dtype
from graft.storage.fsdp2 import gather_module
from graft.storage.parallel import find_whole_shape, layout_of, write_whole

IGNORED_LABEL = -100  # torch's cross entropy skips it
STORED = "prompt_embeddings"  # name of the prompt in a checkpoint


class Prompt(nn.Module):
    """A prompt adapter: the module that computes its prompt from parameters.

    A subclass makes `embedding` (and any network on top of it) in `__init__`. `graft.model.prompts` puts the prompt
    into the model, for all tasks. `holds_keys` of the config says whether the prompt is keys and values.

    Args:
        cfg: its config, complete.
        words: the base model's word embeddings, if it has any.
    """

    config: ClassVar[type[PromptLearningConfig]]  # its PeftConfig class
    arguments: ClassVar[tuple[str, ...]] = ()  # arguments of the model's forward for `forward` (or `compute_loss`) here
    in_decoder: ClassVar[bool] = False  # an encoder-decoder gets tokens in its decoder as well
    replaces_loss: ClassVar[bool] = False

    # attributes that every Method has, too
    prefix: ClassVar[str] = "prompt_encoder"
    shares: ClassVar[bool] = False
    over_layers: ClassVar[str | None] = None
    published_lr: ClassVar[PublishedRate | None] = None

    embedding: Any

    def __init__(self, cfg: PromptLearningConfig, words: nn.Module | None = None):
        """Set `num_virtual_tokens` from the config. The words are not used here."""
        super().__init__()
        self.num_virtual_tokens = cfg.num_virtual_tokens

    def __init_subclass__(cls, **kwargs: object) -> None:
        """Set `replaces_loss` of the class: True if it or a base class overrides `compute_loss`."""
        super().__init_subclass__(**kwargs)
        cls.replaces_loss = cls.compute_loss is not Prompt.compute_loss

    @classmethod
    def check(cls, cfg: PeftConfig) -> None:
        """Raise ConfigError if the method cannot do something that the config sets; here it can do all."""

    def forward(self, indices: Tensor | None = None, **arguments: Any) -> Tensor:
        """Return the prompt, (tokens, dim), or (batch, tokens, dim) where each sample has its own; here rows of the
        embedding.

        Args:
            indices: which virtual tokens; all of them if None.
            arguments: the arguments of the call that the class names in `arguments`.
        """
        return pick(self.embedding.weight, indices)

    def compute_loss(self, logits: Tensor, labels: Tensor, **arguments: Any) -> Tensor:
        """Return the loss, in place of the base model's.

        Raises NotImplementedError here; a class with an override replaces the loss.

        Args:
            logits: (batch, virtual tokens + tokens, vocabulary).
            labels: (batch, tokens).
        """
        raise NotImplementedError

    def to_file_tensors(self) -> dict[str, Tensor]:
        """Return the tensors that a checkpoint holds, by name: here the computed prompt, detached, as
        `prompt_embeddings`.
        """
        with torch.no_grad():
            return {STORED: self().detach()}

    def restore(self, name: str, value: Tensor) -> None:
        """Put in the tensor that a checkpoint holds under one of the names of `to_file_tensors`.

        A value of the embedding's shape is written into it, for all processes. Another becomes a new embedding with
        the old device, dtype and requires_grad. A subclass then deletes its network, which no file holds.

        Raises:
            CheckpointError: the shape differs, and the embedding is spread over processes.
        """
        old = self.embedding.weight
        if find_whole_shape(old) == value.shape:
            write_whole(old, value)
        elif layout_of(old) is not None:
            raise CheckpointError(
                f"A prompt of shape {tuple(value.shape)} cannot replace the network that computes the present one, as "
                "its tensors are spread over processes. Load the adapter before the model is wrapped."
            )
        else:
            weight = nn.Parameter(value.to(device=old.device, dtype=old.dtype), requires_grad=old.requires_grad)
            self.embedding = nn.Embedding(len(value), value.shape[1], _weight=weight)


def pick(table: Tensor, indices: Tensor | None) -> Tensor:
    """Return rows of a table; a copy of all rows if `indices` is None.

    It is never the table itself: FSDP empties it when the prompt's module returns.
    """
    return table.clone() if indices is None else table[indices]


def words_of(ids: Tensor, words: nn.Module | None, why: str) -> Tensor:
    """Return the base model's embeddings of some tokens, (tokens, dim), in new memory, float32, on the device of the
    words. If FSDP2 has sharded the words, every process must call this.

    Args:
        why: the source of the tokens, for errors.

    Raises:
        ConfigError: the model has no word embeddings, or none of one of these tokens.
    """
    if words is None:
        raise ConfigError(f"{why} needs word embeddings, and the base model has none. Choose another initial value.")
    check_tokens(ids, words, why)
    words = gather_module(words)
    with torch.no_grad():
        return words(ids.to(find_device_and_dtype(words)[0])).detach().clone().to(torch.float32)


def check_tokens(ids: Tensor, words: nn.Module, why: str) -> None:
    """Raise ConfigError, which begins with `why`, if a token is negative, or not below the rows of the base model's
    word embeddings. The text has the first such token.
    """
    size = find_whole_shape(next(words.parameters()))[0]
    unknown = ids[(ids < 0) | (ids >= size)]
    if len(unknown):
        raise ConfigError(
            f"{why} has token {int(unknown[0])}, but the base model knows {size} tokens, from 0 on. Use the base "
            "model's tokenizer."
        )


def shift_tokens_right(input_ids: Tensor, pad_token_id: int, decoder_start_token_id: int) -> Tensor:
    """Return decoder inputs (batch, length) from labels, in a new tensor: the start token, then all labels but the
    last.

    Ignored labels (-100) become padding.

    Raises:
        ValueError: pad_token_id is None.
    """
    if pad_token_id is None:
        raise ValueError("self.model.config.pad_token_id has to be defined: it replaces ignored labels.")
    start = torch.full_like(input_ids[:, :1], decoder_start_token_id)
    shifted = torch.cat([start, input_ids[:, :-1]], dim=1)
    return shifted.masked_fill(shifted == IGNORED_LABEL, pad_token_id)


PLACE = "prompt_encoder"


class Encoders(Carrier, nn.ModuleDict):
    """The carrier of all prompts, by adapter."""

    key = PLACE
    replaces = False

    def __init__(self, call: Call) -> None:
        """Start without prompts, with a new carrier state for `call`."""
        super().__init__()
        self.state = CarrierState(call)
        self.never: dict[str, set[tuple[str, str]]] = {}  # by adapter: parameters that never train

    def __getitem__(self, key: str) -> Prompt:
        """Return the prompt of an adapter.

        Tensors of it that accelerate has offloaded are loaded for good. Raises KeyError for an unknown adapter.
        """
        prompt: Prompt = super().__getitem__(key)  # type: ignore[assignment]
        end_offloading(prompt)
        return prompt

    @property
    def call(self) -> Call | None:
        """The call context of the carrier's state; None without one."""
        return self.state.call

    @property
    def adapters(self) -> list[str]:
        """The names of the adapters with a prompt, in order."""
        return list(self)

    def add(self, adapter: str, prompt: Prompt) -> None:
        """Put in the prompt of an adapter, in place of an older one.

        Note which of its parameters do not train now: they never will. Then freeze all.
        """
        self[adapter] = prompt
        slots = iter_slots(PLACE, self, adapter)
        self.never[adapter] = {(s.container, s.path) for s in slots if s.is_parameter and not s.trains}
        self.require_grad(adapter, False)

    def slots(self, adapter: str) -> list[Slot]:
        """Return the slots of a prompt's tensors; those that never train are marked so.

        Raises KeyError for an adapter without a prompt.
        """
        return list(iter_slots(PLACE, self, adapter, self.never[adapter]))

    def drop(self, adapter: str) -> None:
        """Delete the prompt of an adapter and the note of its parameters. Raises KeyError if there is none."""
        del self[adapter], self.never[adapter]

    def check_active(self, names: Sequence[str]) -> None:
        """Raise ValueError for more than one name: only one prompt can be in front of the input."""
        if len(names) > 1:
            raise ValueError(
                f"Only one prompt can be in front of the input at a time, got {list(names)}. Call set_adapter() with "
                "one of them."
            )
