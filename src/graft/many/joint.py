# SPDX-License-Identifier: Apache-2.0
"""One pass of the model for the batches of several adapters: the batches that share it, their arguments, and the output
of each.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from graft import ConfigError
from graft.many.loader import Batch

MASK, POSITIONS = "attention_mask", "position_ids"
TARGETS = ("start_positions", "end_positions")  # and all that has "label" in its name: no arguments of the pass
BY_TOKEN = ("start_logits", "end_logits")  # outputs (rows, tokens)


class RunBatch(NamedTuple):
    """A batch and the name of its run, which is also the name of the adapter.

    Attributes:
        loss: the loss of this batch; None: the run's.
        mean_of: the loss is divided by this number, the batches in the mean of a step.
    """

    name: str
    batch: Batch
    loss: Callable[..., object] | None = None
    mean_of: int = 1


@dataclass
class ForwardArguments:
    """The arguments of a model's forward.

    Attributes:
        names: of the arguments; empty if there is only `**kwargs`.
        accepts_any: forward has `**kwargs` and no named argument.
        exact: if True, batches of other lengths or with padding do not share a pass, since they would round
            differently.
        pad: the token that fills rows up. Classifiers look for the last token that is another one.
    """

    names: frozenset[str]
    accepts_any: bool  # it takes any
    exact: bool = True  # rows of other lengths, or padded, do not share a pass with these: they would round otherwise
    pad: int = 0  # the token that fills rows up: classifiers look for the last other one

    @property
    def accepts_mask(self) -> bool:
        """Return True if forward has an argument `attention_mask`."""
        return MASK in self.names

    @classmethod
    def read_signature(cls, model: nn.Module, exact: bool = True) -> ForwardArguments:
        """Return the arguments of a model's forward by its signature, with its padding token.

        Positional-only arguments and `*args` do not count, and `**kwargs` only if no argument has a name.
        """
        params = inspect.signature(model.forward).parameters.values()
        named = frozenset(p.name for p in params if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY))
        return cls(named, not named and any(p.kind is p.VAR_KEYWORD for p in params), exact, find_padding_token(model))

    def list_unknown(self, batch: Mapping[str, object]) -> list[str]:
        """Return the keys of a batch, in its order, that forward does not take and that are no targets; with
        `accepts_any`, none.
        """
        return [k for k in batch if not (self.accepts_any or k in self.names or is_target(k))]

    def select(self, batch: Mapping[str, object]) -> Batch:
        """Return a new dict of the entries of a batch that forward takes (with `accepts_any`, all), without targets
        such as labels.
        """
        return {k: v for k, v in batch.items() if (self.accepts_any or k in self.names) and not is_target(k)}


def find_padding_token(model: nn.Module) -> int:
    """Return `pad_token_id` of the model's text config, or of its config if it has no single text config.

    Return 0 if there is no config, no int as a token or as `vocab_size`, or a token outside the vocabulary.
    """
    config = getattr(model, "config", None)
    with suppress(AttributeError, ValueError):  # no config of parts, or several with texts
        config = config.get_text_config()  # type: ignore[union-attr]
    token, tokens = (getattr(config, name, None) for name in ("pad_token_id", "vocab_size"))
    return token if isinstance(token, int) and isinstance(tokens, int) and 0 <= token < tokens else 0


def is_target(name: str) -> bool:
    """Return True for names of targets: with "label" in them, `start_positions` and `end_positions`."""
    return "label" in name or name in TARGETS


def measure_batch(item: RunBatch, arguments: ForwardArguments) -> tuple[int, int, tuple[object, ...]]:
    """Return the number of rows, the number of tokens of a row, and the traits: batches with equal traits may share a
    pass.

    The number of tokens is the largest second dimension of an argument, 1 if there is none.

    Traits are dtypes and shapes of arguments, values of those without rows, whether rows are masked (False without
    `exact`), and whether they are packed (False with a mask). A mask (rows, tokens) is none. The number of tokens is no
    trait without `exact`, if forward accepts a mask and rows are not packed.

    Raises:
        ConfigError: the arguments have no rows, or different numbers of rows.
    """
    kwargs = arguments.select(item.batch)
    tensors = {k: v for k, v in kwargs.items() if isinstance(v, Tensor) and v.dim()}
    rows = {len(v) for v in tensors.values()}
    if len(rows) != 1:
        shapes = {k: tuple(v.shape) for k, v in tensors.items()} or f"only {sorted(item.batch)}"
        raise ConfigError(
            f"Run '{item.name}': the model takes {sorted(arguments.names)}, and a batch has {shapes}. Give "
            "it tensors with one row per sample."
        )
    if rows == {0}:
        raise ConfigError(f"Run '{item.name}': a batch has no rows. Leave it out.")
    lengths = [v.shape[1] for v in tensors.values() if v.dim() > 1]
    masked = arguments.exact and is_masked(kwargs.get(MASK))
    packed = MASK not in kwargs and is_packed(kwargs.get(POSITIONS))
    fixed = arguments.exact or packed is not False  # padding needs a mask, and with a mask models ignore positions
    traits: list[tuple[object, ...]] = [("masked", masked), ("packed", packed)]
    for key, value in sorted(kwargs.items()):
        if key not in tensors:
            traits.append((key, identify_value(value, item)))
        elif key == MASK and value.dim() == 2:
            continue  # who has none gets ones
        elif value.dim() > 1 and arguments.accepts_mask and key != MASK:
            traits.append((key, value.dtype, value.shape[2:], value.shape[1] if fixed else None))
        else:
            traits.append((key, value.dtype, value.shape[1:]))
    return rows.pop(), max(lengths, default=1), tuple(traits)


def is_masked(mask: Tensor | None) -> bool | None:
    """Return True if a mask leaves tokens out, since models compute without a mask if it does not; False for no mask.

    Return None for a mask on a device, to avoid waiting for it; bits depend on more than masks there.
    """
    if mask is None:
        return False
    return not bool(mask.all()) if mask.is_cpu else None


def is_packed(positions: Tensor | None) -> bool | None:
    """Return True if positions (rows, tokens) do not rise by one everywhere: rows hold several texts, and models make a
    mask of the positions.

    Return False for no positions or another number of dimensions, and None on a device.
    """
    if positions is None or positions.dim() != 2:
        return False
    return bool((positions.diff(dim=1) != 1).any()) if positions.is_cpu else None


def identify_value(value: object, item: RunBatch) -> object:
    """Return the number in a tensor (), or the text of a None, bool, number or str, to compare batches by.

    For a tensor on a device return its id, to avoid waiting for the device. For any other value return the id of the
    batch, so that its batch shares no pass.
    """
    if isinstance(value, Tensor):
        return value.item() if value.is_cpu else id(value)
    plain = value is None or isinstance(value, (bool, int, float, str))
    return repr(value) if plain else id(item.batch)


def divide_passes(
    items: Sequence[RunBatch],
    arguments: ForwardArguments,
    at_once: int,
    refuse: Callable[[RunBatch, Exception], None] | None = None,
) -> list[list[RunBatch]]:
    """Divide batches into passes, grouped by traits, the groups in the order of their first batches.

    Within a group the order stays.

    Batches of one pass have equal traits (`measure_batch`) and up to `at_once` tokens, counted with padding. A batch
    that does not fit into the last pass of its group begins a new one; a larger batch has a pass alone. refuse: is
    called with each batch that the model cannot take, and the ConfigError; the batch is left out. None: the error is
    raised.
    """
    passes_by_traits: dict[tuple[object, ...], list[list[RunBatch]]] = {}
    sizes: dict[int, tuple[int, int]] = {}  # rows and longest row, by group
    for item in items:
        try:
            rows, tokens, traits = measure_batch(item, arguments)
        except ConfigError as error:
            if refuse is None:
                raise
            refuse(item, error)
            continue
        passes = passes_by_traits.setdefault(traits, [[]])
        n, longest = sizes.get(id(passes[-1]), (0, 0))
        if passes[-1] and (n + rows) * max(longest, tokens) > at_once:
            passes.append([])
            n, longest = 0, 0
        passes[-1].append(item)
        sizes[id(passes[-1])] = n + rows, max(longest, tokens)
    return [group for passes in passes_by_traits.values() for group in passes]


def join_batches(items: Sequence[RunBatch], arguments: ForwardArguments) -> tuple[Batch, OutputSplitter]:
    """Return the arguments of one pass for all batches, and the splitter of its output.

    Only arguments that forward takes are used, with the names of the first batch; one that another batch lacks raises
    KeyError. Rows are concatenated in the order of `items`; a single batch's tensors stay the same objects. Tensors of
    unequal second dimensions are padded on the right, token ids with `arguments.pad` and others with 0. If forward
    accepts a mask and lengths differ or a batch has one, batches without a mask get ones, of dtype long. Values without
    rows are those of the first batch. The splitter gets the numbers of rows, and the lengths of the decoder's input
    where there is one.
    """
    batches = [arguments.select(item.batch) for item in items]
    mains = [find_main_argument(g) for g in batches]
    lengths = [m.shape[1] if m.dim() > 1 else 1 for m in mains]
    if arguments.accepts_mask and (len({*lengths}) > 1 or any(MASK in g for g in batches)):
        for g, main in zip(batches, mains):
            if MASK not in g:
                g[MASK] = torch.ones(main.shape[:2], dtype=torch.long, device=main.device)
    out = {}
    for key, first in batches[0].items():
        values = [g[key] for g in batches]
        if not (isinstance(first, Tensor) and first.dim()):
            out[key] = first
            continue
        if first.dim() > 1 and len({v.shape[1] for v in values}) > 1:
            values = pad_tokens(values, arguments.pad if key.endswith("input_ids") else 0)
        out[key] = values[0] if len(values) == 1 else torch.cat(values)
    follows = [next((g[k] for k in DECODER if k in g), main) for g, main in zip(batches, mains)]
    return out, OutputSplitter([len(m) for m in mains], [f.shape[1] if f.dim() > 1 else 1 for f in follows])


TOKENS = ("input_ids", "inputs_embeds")
DECODER = ("decoder_input_ids", "decoder_inputs_embeds")  # if they are there, the output has their tokens


def find_main_argument(kwargs: Batch) -> Tensor:
    """Return the tensor with the tokens: the first name of `TOKENS` that is there, else the first tensor of two or more
    dimensions, else the first with rows, masks left out, else the mask. Raises KeyError if there is no mask either.
    """
    if (named := next((kwargs[k] for k in TOKENS if isinstance(kwargs.get(k), Tensor)), None)) is not None:
        return named
    tensors = [v for k, v in kwargs.items() if isinstance(v, Tensor) and v.dim() and k != MASK]
    return max(tensors, key=lambda t: t.dim() > 1) if tensors else kwargs[MASK]


def pad_tokens(tensors: Sequence[Tensor], value: int) -> list[Tensor]:
    """Return tensors (rows, tokens, …) padded with `value` on the right of dimension 1, all to the longest."""
    longest = max(t.shape[1] for t in tensors)
    return [nn.functional.pad(t, [0, 0] * (t.dim() - 2) + [0, longest - t.shape[1]], value=value) for t in tensors]


@dataclass
class OutputSplitter:
    """Splits the output of a pass into the outputs of its batches.

    Attributes:
        rows: number of rows of each batch.
        lengths: number of tokens of a row in each batch.
    """

    rows: list[int]
    lengths: list[int]  # tokens of each part's rows

    def split(self, output: object, name: str = "") -> Sequence[object]:
        """Return for each batch an output of the same class, with the batch's rows and without padding.

        A mapping without `to_tuple` becomes a dict. `name`: the key of a tensor in its mapping, for `_split_tensor`.

        For a single batch it is the output itself.

        Tensors, and entries of mappings, tuples and lists, are split; other values go to each batch as they are.
        Tensors are split by one operation for all batches, so that the backward pass makes one concatenation.
        """
        if len(self.rows) == 1:
            return [output]
        if isinstance(output, Tensor):
            return self._split_tensor(name, output)
        if isinstance(output, Mapping):
            columns = {k: self.split(v, k) for k, v in output.items()}
            return [make_output(output, {k: c[i] for k, c in columns.items()}) for i in range(len(self.rows))]
        if isinstance(output, (tuple, list)):
            make: Any = getattr(type(output), "_make", type(output))  # a named tuple takes no list
            several = [self.split(v) for v in output]
            return [make([c[i] for c in several]) for i in range(len(self.rows))]
        return [output] * len(self.rows)

    def covers_all_rows(self, output: object) -> bool:
        """Return True if an output that is a tensor, or each tensor among the entries of a mapping, tuple or list, has
        all rows.

        Scalars and tensors in inner tuples, such as states of blocks, do not count.
        """
        if isinstance(output, Mapping):
            output = tuple(output.values())
        values = output if isinstance(output, (tuple, list)) else (output,)
        return all(len(t) == sum(self.rows) for t in values if isinstance(t, Tensor) and t.dim())

    def _split_tensor(self, name: str, t: Tensor) -> list[Tensor]:
        """Return the rows of each batch, as views.

        A tensor without dimensions or with another number of rows goes whole to every batch.

        Padding is cut from dimension 1 if the batches' lengths differ and it has the longest of them. That applies to
        tensors of three or more dimensions, and to those of two in `BY_TOKEN`, such as start and end logits. Cut pieces
        are contiguous copies.
        """
        if not t.dim() or len(t) != sum(self.rows):
            return [t] * len(self.rows)
        pieces, longest = t.split(self.rows) if len(self.rows) > 1 else (t,), max(self.lengths)
        if min(self.lengths) == longest or t.dim() < (2 if name in BY_TOKEN else 3) or t.shape[1] != longest:
            return list(pieces)
        return [p if n == longest else p[:, :n].contiguous() for p, n in zip(pieces, self.lengths)]


def make_output(like: Mapping[str, object], values: dict[str, object]) -> object:
    """Return values as an object of the class of `like` if that has `to_tuple`, as a ModelOutput has, else as
    a dict.
    """
    return type(like)(**values) if hasattr(like, "to_tuple") else dict(values)
