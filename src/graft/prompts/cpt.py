# SPDX-License-Identifier: Apache-2.0
"""CPT: examples in front of the input, their embeddings refined within a small radius (https://arxiv.org/abs/2410.17222)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from torch import Tensor, nn

from graft.config.fields import NOT_NEGATIVE
from graft.config.prompt import PromptLearningConfig
from graft.core.errors import ConfigError
from graft.kernels.waits import constant, raise_unless
from graft.prompts.base import IGNORED_LABEL, STORED, Prompt, pick, words_of

# kind of a token: its type modulo 4 (labels count up in steps of 4, one step per example; 0 itself is padding)
LABEL, INPUT_TEMPLATE, INPUT, OUTPUT_TEMPLATE = 0, 1, 2, 3
NO_RADIUS = 1e-10


@dataclass(kw_only=True)
class CPTConfig(PromptLearningConfig):
    """CPT: tokens of examples in front of the input; their embeddings train, each within a radius."""

    peft_type: str = "CPT"
    cpt_token_ids: list[int] | None = None  # tokens of the examples; None: [0]
    cpt_mask: list[int] | None = None  # attention mask of those tokens
    cpt_tokens_type_mask: list[int] | None = None  # 1 input template, 2 input, 3 output template, 4 label; next 5 …
    opt_weighted_loss_type: Literal["none", "decay"] | None = "none"  # "decay": earlier examples weigh less
    opt_loss_decay_factor: float = 1.0  # factor per example
    opt_projection_epsilon: Annotated[float, NOT_NEGATIVE] = 0.1  # radius of input tokens, for 2048 numbers each
    opt_projection_format_epsilon: Annotated[float, NOT_NEGATIVE] = 0.1  # radius of template tokens
    tokenizer_name_or_path: str | None = None  # without effect

    def __post_init__(self) -> None:
        """Set num_virtual_tokens to the number of the examples' tokens, and fill missing masks with ones.

        Missing token ids become [0].

        Layers, width and heads are cleared, so that `fit` takes the base model's, and num_transformer_submodules is 1,
        whatever was passed.

        Raises:
            ConfigError: task_type is not CAUSAL_LM; the three lists differ in length or are empty; or a negative decay
                factor with the loss type "decay".
        """
        super().__post_init__()
        if self.task_type != "CAUSAL_LM":
            raise ConfigError(f"{type(self).__name__} only supports task_type = CAUSAL_LM.")
        self.num_layers = self.token_dim = self.num_attention_heads = None  # `fit` takes the base model's
        self.num_transformer_submodules = 1
        if self.cpt_token_ids is None:
            self.cpt_token_ids = [0]
        n = self.num_virtual_tokens = len(self.cpt_token_ids)
        self.cpt_mask = [1] * n if self.cpt_mask is None else self.cpt_mask
        self.cpt_tokens_type_mask = [1] * n if self.cpt_tokens_type_mask is None else self.cpt_tokens_type_mask
        if not n or {len(self.cpt_mask), len(self.cpt_tokens_type_mask)} != {n}:
            raise ConfigError(
                "cpt_token_ids, cpt_mask and cpt_tokens_type_mask must have the same length. "
                f"They have {n}, {len(self.cpt_mask)} and {len(self.cpt_tokens_type_mask)} numbers."
            )
        if self.opt_weighted_loss_type == "decay":
            NOT_NEGATIVE.check("opt_loss_decay_factor", self.opt_loss_decay_factor)


class CPTEmbedding(Prompt):
    """The prompt: embedding (the words of the examples, frozen) + delta_embedding, each row within its radius."""

    config = CPTConfig
    arguments = ("input_type_mask",)

    def __init__(self, cfg: Any, words: nn.Module | None = None):
        """Make the frozen embedding of the examples' tokens, and changes of zeros, with a hook that masks gradients of
        labels.

        With inference_mode the embedding is random, as a checkpoint follows. Raises ConfigError for tokens that the
        base model does not know.
        """
        super().__init__(cfg, words)
        self.cfg = cfg
        self.embedding = nn.Embedding(cfg.num_virtual_tokens, cfg.token_dim)
        self.embedding.requires_grad_(False)
        if not cfg.inference_mode:
            ids = torch.tensor(cfg.cpt_token_ids, device="cpu")
            self.embedding.weight = nn.Parameter(words_of(ids, words, "cpt_token_ids"), requires_grad=False)
        self.delta_embedding = nn.Embedding(cfg.num_virtual_tokens, cfg.token_dim)
        nn.init.zeros_(self.delta_embedding.weight)
        self.delta_embedding.weight.register_hook(self._without_labels)

    def _types(self) -> Tensor:
        """Return the types of the examples' tokens, (tokens,), as a cached constant on the prompt's device."""
        return constant(tuple(self.cfg.cpt_tokens_type_mask), torch.long, self.delta_embedding.weight.device)

    def _without_labels(self, grad: Tensor) -> Tensor:
        """Return the gradient (tokens, dim) with zeros for label tokens and padding (types divisible by 4), which keep
        their embeddings.
        """
        return grad * (self._types() % 4 != LABEL)[:, None]

    def radius(self) -> Tensor:
        """Return for each token how far its embedding may move, (tokens,).

        Input tokens (type 2 modulo 4) have the config's epsilon, tokens of templates (1 and 3) its format epsilon,
        times √(token_dim / 2048). Labels and padding have `NO_RADIUS`.
        """
        types, scale = self._types(), (self.cfg.token_dim / 2048) ** 0.5
        template = (types > 0) & ((types % 4 == INPUT_TEMPLATE) | (types % 4 == OUTPUT_TEMPLATE))
        out = torch.full(types.shape, NO_RADIUS, device=types.device)
        out[template] = self.cfg.opt_projection_format_epsilon * scale
        out[(types > 0) & (types % 4 == INPUT)] = self.cfg.opt_projection_epsilon * scale
        return out

    def project(self) -> None:
        """Shorten rows of delta_embedding that are longer than their radius to that length, in place and past autograd.

        Rows of zeros stay.
        """
        delta = self.delta_embedding.weight.data
        seen = delta.clone()  # another thread may run this, too, and writes the same values
        norm, radius = seen.norm(dim=1), self.radius()
        delta.copy_(seen * torch.where(norm > 0, radius / torch.maximum(norm, radius), 1)[:, None])

    def forward(self, indices: Tensor | None = None, **arguments: object) -> Tensor:
        """Return the examples' embeddings plus their changes, (tokens, dim); with `indices` only these tokens.

        Each call first shortens the changes to their radius, in place.
        """
        self.project()
        return pick(self.embedding.weight, indices) + pick(self.delta_embedding.weight, indices)

    def restore(self, name: str, value: Tensor) -> None:
        """Put the value in as the frozen embedding, and set all changes to zero. `name` is unused.

        A value of another shape becomes a new embedding of its size. Raises CheckpointError if the embedding is spread
        over processes.
        """
        super().restore(STORED, value)
        nn.init.zeros_(self.delta_embedding.weight)

    def compute_loss(
        self, logits: Tensor, labels: Tensor, input_type_mask: Tensor | None = None, **arguments: Any
    ) -> Tensor:
        """Return the mean cross entropy of the label tokens, those of the examples and of the input, as (), computed in
        float32.

        Labels of -100 count neither in the sum nor in the number. With opt_weighted_loss_type "decay" each is weighted
        by its example; the sum is still divided by their number (NaN if that is 0). Logits predict the next token.

        Args:
            logits: (batch, virtual tokens + tokens, vocabulary).
            labels: (batch, tokens).
            input_type_mask: (batch, tokens), as `cpt_tokens_type_mask`; None: all of them are labels. Types above 0
                count on from the largest of the examples.

        Raises:
            ValueError: labels or types have another shape, or no token is a label. On CUDA the device checks the last.
        """
        types, batch = self._types(), len(logits)
        length = logits.shape[1] - len(types)
        for name, t in (("labels", labels), ("input_type_mask", input_type_mask)):
            if t is not None and t.shape != (batch, length):
                raise ValueError(f"{name} must be {(batch, length)}, a number for each token, got {tuple(t.shape)}.")
        ids = constant(tuple(self.cfg.cpt_token_ids), torch.long, labels.device)
        input_types = torch.full_like(labels, 4) if input_type_mask is None else input_type_mask.to(labels.device)
        # types of the input count on from the examples
        input_types = torch.where(input_types > 0, input_types + types.max(), input_types)
        kinds = torch.cat([types.to(input_types.device).expand(batch, -1), input_types], dim=1)[:, 1:]
        targets = torch.cat([ids.expand(batch, -1), labels], dim=1)[:, 1:]
        is_label = (kinds > 0) & (kinds % 4 == LABEL)
        none = (
            "No token is a label. The types of the input count on from the largest of cpt_tokens_type_mask, which "
            f"is {max(self.cfg.cpt_tokens_type_mask)} and must be a multiple of 4."
        )
        raise_unless(is_label.any(), lambda: ValueError(none), none)
        mask = is_label & (targets != IGNORED_LABEL)
        weights = self._decay(kinds, is_label) if self.cfg.opt_weighted_loss_type == "decay" else torch.ones_like(kinds)
        logits = logits[:, :-1]
        count = mask.sum()
        if logits.is_cpu:  # on a device this would wait for the number of labels
            logits, targets, weights, mask = logits[mask], targets[mask], weights[mask], mask[mask]
        targets = targets.masked_fill(~mask, IGNORED_LABEL)
        losses = nn.functional.cross_entropy(
            logits.flatten(0, -2).float(), targets.flatten(), reduction="none", ignore_index=IGNORED_LABEL
        )
        return (losses * weights.flatten()).sum() / count

    def _decay(self, kinds: Tensor, is_label: Tensor) -> Tensor:
        """Return each token's weight, float32 (batch, tokens): 1 in the last example, times the decay factor for each
        one before.

        An example is a kind of label token, in ascending order within each row; weights of other tokens mean nothing.
        """
        ordered, places = kinds.masked_fill(~is_label, 0).sort(dim=1)
        example = (ordered.diff(dim=1, prepend=ordered[:, :1]) > 0).cumsum(1)  # a number for each kind, ascending
        age = torch.empty_like(example).scatter(1, places, example[:, -1:] - example)
        return torch.pow(self.cfg.opt_loss_decay_factor, age.float())
