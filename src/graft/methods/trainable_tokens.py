# SPDX-License-Identifier: Apache-2.0
"""Trainable tokens: train some rows of an embedding (and of a head tied to it). A feature of PEFT, without a paper."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from graft.config.base import PeftConfig
from graft.core.base_config import input_embeddings
from graft.core.containers import Transient
from graft.core.effect import Effect, Rewrite
from graft.core.errors import ConfigError
from graft.core.method import COMPARISON, Method, PublishedRate, WeightUse
from graft.kernels.waits import copy_on_device


@dataclass(kw_only=True)
class TrainableTokensConfig(PeftConfig):
    """Trainable tokens: the embedding rows `token_indices` train; all others stay as they are."""

    peft_type: str = "TRAINABLE_TOKENS"
    token_indices: list[int] = field(default_factory=list)
    target_modules: list[str] | set[str] | str | None = None  # None: the model's input embedding
    init_weights: bool = True  # start from the rows there are; else N(0, 1)


class TrainableTokens(Method[TrainableTokensConfig]):
    """Trainable tokens: rows `token_indices` of W are those of a table (tokens, dim) that trains.

    A feature of PEFT, without a paper.
    """

    prefix = "trainable_tokens_"
    published_lr = PublishedRate(0.2, 0.2, COMPARISON)
    always_tied = True

    trainable_tokens_delta: nn.Parameter  # (k, d): the rows themselves, not a difference
    trainable_tokens_original: Tensor  # (k, d): those of the base, for callers of PEFT
    sorted_tokens: Tensor  # (k,) int, ascending
    order_of_tokens: Tensor  # (k,) int: row of `trainable_tokens_delta` for each of `sorted_tokens`
    token_indices: list[int]
    repeats: bool  # a token is named several times

    @classmethod
    def default_targets(cls, model: nn.Module) -> list[str] | str | None:
        """Return the path of the model's input embedding; ["embed_tokens"] if the model does not tell it."""
        embedding = input_embeddings(model)
        path = next((name for name, m in model.named_modules() if m is embedding), None)
        return path or ["embed_tokens"]  # a path alone is a string, as in PEFT's files

    def check(self) -> str | None:
        """Return a reason against layers other than embeddings and linear ones (known, with a matrix).

        Then raise ConfigError if `token_indices` is empty.

        Then return a reason against indices outside of the rows; else that of `Method.check`. Rows are the ids of an
        embedding, or the outputs of a linear layer. Indices above them get a hint to `resize_token_embeddings`.
        """
        site = self.site
        if not site.op.known or len(site.shape) != 2:
            return "Only embeddings and linear layers have a row for each token"
        if not self.cfg.token_indices:
            raise ConfigError(f"token_indices is empty. Name the tokens of '{site.key}' to train.")
        rows = site.in_features if site.op.takes_ids else site.out_features
        outside = [i for i in self.cfg.token_indices if not 0 <= i < rows]
        if not outside:
            return super().check()
        more = f", which resize_token_embeddings({max(outside) + 1}) makes more" if max(outside) >= rows else ""
        return f"Token indices {outside} are outside its {rows} rows{more}"

    @classmethod
    def check_together(cls, methods: Sequence[TrainableTokens]) -> None:
        """Raise ValueError if two of these adapters train the same token; it names the later adapter."""
        seen: set[int] = set()
        for m in methods:
            if seen & set(m.token_indices):
                raise ValueError(
                    f"Token indices of adapter {m.name} are already defined and would result in undefined merging "
                    "behavior. Only disjunct token indices are currently supported."
                )
            seen |= set(m.token_indices)

    def uses_weight(self) -> WeightUse:
        """Return `WeightUse.STARTS | WeightUse.BEFORE_LOAD`: `init_values` copies rows of the weight, also before a
        load.

        With `init_weights=False` `WeightUse.READS | WeightUse.BEFORE_LOAD`.
        """
        return (WeightUse.STARTS if self.cfg.init_weights else WeightUse.READS) | WeightUse.BEFORE_LOAD

    def describe(self) -> Effect:
        """Return a `Rewrite` by `fold` and `post`, which acts on the output without its bias (`apart`) and gives rows
        of another table (`looks_up`).
        """
        return Rewrite(self.fold, post=self.post, apart=True, looks_up=True)

    def build(self, shared: dict[str, object]) -> dict[str, object]:
        """Return uninitialised `trainable_tokens_delta` (k, d), trained, and the facts `token_indices`, a list, and
        `repeats`, whether one is named twice.

        Buffers that no file holds: `trainable_tokens_original` (k, d), uninitialised, `sorted_tokens` (k,), and
        `order_of_tokens` (k,), their places in the list, by a sort that is not stable. d is the site's `out_features`
        if its op takes ids, else `in_features`. Floating-point tensors are made on the default device, in the default
        dtype.
        """
        width = self.site.out_features if self.site.op.takes_ids else self.site.in_features
        indices = list(self.cfg.token_indices)
        tokens, order = torch.tensor(indices).sort()
        return dict(
            trainable_tokens_delta=nn.Parameter(torch.empty(len(indices), width)),
            trainable_tokens_original=Transient(torch.empty(len(indices), width)),
            sorted_tokens=Transient(tokens),
            order_of_tokens=Transient(order),
            token_indices=indices,
            repeats=len(set(indices)) < len(indices),
        )

    def init_values(self) -> None:
        """Fill `trainable_tokens_original` with a copy of the base's rows (of an embedding's canonical weight:
        columns), and make `trainable_tokens_delta` a new parameter with the same values, both in the base's dtype.

        With `init_weights=False` the trained rows stay the parameter of `build`, with normal values.
        """
        W = self.layer.W0.detach()
        rows = (W.T if self.site.op.takes_ids else W)[self.token_indices]  # a copy
        self.layer.trainable_tokens_original[self.name] = rows
        if self.cfg.init_weights:
            self.layer.trainable_tokens_delta[self.name] = nn.Parameter(rows.clone())
        else:
            nn.init.normal_(self.trainable_tokens_delta)

    def tie_to_embedding(self, source: Method) -> None:
        """Use the parameter of `source` as this layer's own `trainable_tokens_delta`."""
        self.layer.trainable_tokens_delta[self.name] = source.trainable_tokens_delta

    @property
    def rows(self) -> Tensor:
        """The trained rows (k, d) on the layer's device: those of a tied head are the embedding's, which may be
        elsewhere.

        A token that is named several times has the mean of its rows. Each of the rows gets the whole gradient, as in
        PEFT.
        """
        rows = copy_on_device(self.trainable_tokens_delta, self.sorted_tokens.device)
        if not self.repeats:
            return rows
        first = torch.searchsorted(self.sorted_tokens, self.order_to_token())  # (k,): one number for each token
        one = rows.detach()[self.order_of_tokens[first]]  # the others are usually equal to it: so is the mean
        sums, counts = (torch.zeros_like(t).index_add(0, first, t) for t in (rows - one, torch.ones_like(rows[:, :1])))
        return one + ((sums / counts.clamp(min=1)).detach() + (sums - sums.detach()))[first]

    def post(self, x: Tensor, y: Tensor) -> Tensor:
        """Return y with the outputs of the trained tokens replaced: of an embedding where x is one of them, of a head
        their logits. The new values are cast to y's dtype.
        """
        layer, rows = self.layer, self.rows
        if not layer.op.takes_ids:
            logits = layer.op.call(layer.base_layer, self.cast(x), rows, None)
            return y.index_copy(-1, self.order_to_token(), logits.to(y.dtype))
        place = torch.searchsorted(self.sorted_tokens, x).clamp_(max=len(self.token_indices) - 1)
        hit = self.sorted_tokens[place] == x
        token_rows = layer.op.lookup(layer.base_layer, self.order_of_tokens[place], rows)
        return torch.where(hit.unsqueeze(-1), token_rows.to(y.dtype), y)

    def order_to_token(self) -> Tensor:
        """Return the token of each row of the table, (k,)."""
        return self.sorted_tokens[self.order_of_tokens.argsort()]

    def fold(self, W: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return W with the tokens' rows (of an embedding's canonical weight: columns) replaced by the trained ones,
        cast to W's dtype, in a new tensor, and the bias unchanged.
        """
        rows, tokens = self.rows.to(W.dtype), self.order_to_token()
        if self.layer.op.takes_ids:
            return W.index_copy(1, tokens, rows.T), b
        return W.index_copy(0, tokens, rows), b
