# SPDX-License-Identifier: Apache-2.0
"""Prompts of many requests, answered in mixed batches as they arrive. One thread runs the model."""

from __future__ import annotations

import math
import queue
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

import graft

CONTEXT = 5  # tokens before the new ones
PATIENCE = 8  # tokens that wait for the rest of a character


class Piece(NamedTuple):
    """What a token adds to an answer."""

    text: str
    tokens: list[int]
    ended: str | None  # why this piece is the last: "stop" or "length"


@dataclass(eq=False)
class Row:
    """A prompt and its answer."""

    prompt: list[int]
    adapter: str  # or "__base__"
    tell: Callable[[Piece | Exception], Any]  # called in the thread that runs the model
    limit: int  # tokens
    temperature: float = 0.0  # 0: the most likely token
    top_p: float = 1.0
    seed: int | None = None
    stops: Sequence[str] = ()
    made: list[int] = field(default_factory=list)
    over: bool = False  # it has ended, or nobody waits for it

    def __post_init__(self) -> None:
        self.generator = torch.Generator()
        self.generator.manual_seed(self.generator.seed() if self.seed is None else self.seed)
        self.searches = [Search(stop) for stop in self.stops]
        self.held = ""  # text that may begin a stop
        self.window = self.prompt[-CONTEXT:]  # the last tokens
        self.settled = len(self.window)  # of these, those whose text is known

    def drawn(self, scores: Tensor) -> Tensor:
        """Return scores (vocabulary,) whose largest is a draw from softmax(scores / temperature): Gumbel's trick."""
        scores = scores / self.temperature
        if self.top_p < 1:
            ordered, order = scores.sort(descending=True)
            likely = ordered.softmax(-1)
            beyond = likely.cumsum(-1) - likely >= self.top_p  # those before it are likely enough without it
            scores = scores.scatter(0, order, ordered.masked_fill(beyond, -torch.inf))
        noise = torch.empty(scores.shape).exponential_(generator=self.generator).log_()  # on the CPU: as the seed says
        return scores - noise.to(scores.device)

    def take(self, token: int, ends: Sequence[int], tokenizer: Any) -> None:
        """Add a token to the answer, and tell what is settled by now."""
        ended = "stop" if token in ends else None
        if not ended:
            self.made.append(token)
            self.window.append(token)
            ended = "length" if len(self.made) == self.limit else None
        text = self.text(tokenizer, ended is not None)
        self.held += text
        back = [n for search in self.searches if (n := search.feed(text))]
        if back:
            text, ended = self.held[: -max(back)], "stop"
        elif ended:
            text = self.held
        else:
            text = self.held[: len(self.held) - max((search.matched for search in self.searches), default=0)]
        self.held = self.held[len(text) :]
        if ended:  # else as it is: its client may have left meanwhile
            self.over = True
        self.tell(Piece(text, [] if token in ends else [token], ended))

    def text(self, tokenizer: Any, last: bool) -> str:
        """Return the text of the tokens since the last call; none while a character lacks bytes, but for `last` ones.

        Only a window of tokens is decoded: time is linear in the answer's length. Those before the new ones are there
        since several tokenizers drop a space at the beginning.
        """
        if tokenizer is None:
            return ""
        before, text = (tokenizer.decode(ids, skip_special_tokens=True)
                        for ids in (self.window[: self.settled], self.window))  # fmt: skip
        if text.endswith("\ufffd") and not last and len(self.window) - self.settled < PATIENCE:
            return ""
        self.window = self.window[-CONTEXT:]
        self.settled = len(self.window)
        return text[len(before) :]


class Search:
    """The search for a stop in a text that comes in pieces: Knuth, Morris and Pratt's, in linear time."""

    def __init__(self, stop: str):
        self.stop, self.matched = stop, 0  # characters at the end of the text with which the stop may begin
        self.shorter = [0]  # length of a beginning → the next shorter one that is its end, too
        for n in range(1, len(stop)):
            self.shorter.append(self.step(self.shorter[-1], stop[n]))

    def step(self, matched: int, character: str) -> int:
        """Return how much of the stop matches after one more character."""
        while matched and self.stop[matched] != character:
            matched = self.shorter[matched - 1]
        return matched + (self.stop[matched] == character)

    def feed(self, text: str) -> int:
        """Return how many characters before the end of `text` the stop begins; 0 if it is not there."""
        for n, character in enumerate(text):
            self.matched = self.step(self.matched, character)
            if self.matched == len(self.stop):
                return len(self.stop) + len(text) - n - 1
        return 0


class Draw(LogitsProcessor):
    """Has the largest score of each row be its own draw, so that rows may differ in temperature and seed."""

    def __init__(self, rows: list[Row]):
        self.rows = rows

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return torch.stack(
            [row.drawn(own) if row.temperature and not row.over else own for row, own in zip(self.rows, scores)]
        )


class Tell(StoppingCriteria):
    """Gives each row its new token. The batch ends when all rows have."""

    def __init__(self, rows: list[Row], ends: Sequence[int], tokenizer: Any):
        self.rows, self.ends, self.tokenizer = rows, ends, tokenizer

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        for row, token in zip(self.rows, input_ids[:, -1].tolist()):  # waits for the device: so do clients
            if not row.over:
                row.take(token, self.ends, self.tokenizer)
        return torch.tensor([row.over for row in self.rows], device=input_ids.device)


class Batches:
    """One model, and the thread that runs it. Rows that arrive while a batch runs make up the next one.

    Args:
        longest: tokens of a text that the model has positions for.
        room: rows that may wait.
    """

    def __init__(
        self, model: Any, tokenizer: Any, ends: Sequence[int], most: int, longest: float = math.inf, room: int = 512
    ):
        self.model, self.tokenizer, self.ends, self.most, self.longest = model, tokenizer, ends, most, longest
        self.room, self.adding = room, threading.Lock()
        self.sizes: Counter[int] = Counter()  # of batches: rows → how many
        self.waiting: queue.SimpleQueue[Row] = queue.SimpleQueue()
        threading.Thread(target=self.run, name="batches", daemon=True).start()

    def add(self, rows: Sequence[Row]) -> bool:
        """Have rows wait for their turn; return False if there is no room for all of them."""
        with self.adding:
            if self.waiting.qsize() + len(rows) > self.room:
                return False
            for row in rows:
                self.waiting.put(row)
            return True

    def run(self) -> None:
        first = None  # of the next batch
        while True:
            rows, first = [first or self.waiting.get()], None
            while first is None and len(rows) < self.most and not self.waiting.empty():
                row = self.waiting.get()
                if self.fit([*rows, row]):
                    rows.append(row)
                else:
                    first = row
            try:
                self.answer(rows)
            except Exception as error:
                for row in rows:
                    if not row.over:
                        row.over = True
                        row.tell(error)

    def fit(self, rows: list[Row]) -> bool:
        """Return whether the model can go on from each prompt until the last answer has ended: ended rows go along."""
        return max(len(row.prompt) for row in rows) + max(row.limit for row in rows) <= self.longest

    def answer(self, rows: list[Row]) -> None:
        with graft.calling(self.model):  # whatever adapter is there now stays, as it is, until the batch ends
            for row in rows:
                if row.adapter != "__base__" and row.adapter not in self.model.peft_config:
                    row.over = True
                    row.tell(graft.AdapterNotFoundError(f"The model {row.adapter!r} was unloaded before its turn."))
            rows = [row for row in rows if not row.over]
            if rows:
                self.sizes[len(rows)] += 1
                self.generate(rows)

    def generate(self, rows: list[Row]) -> None:
        width, device = max(len(row.prompt) for row in rows), self.model.device
        before = [width - len(row.prompt) for row in rows]  # padding
        ids = [[0] * n + row.prompt for n, row in zip(before, rows)]
        mask = [[0] * n + [1] * len(row.prompt) for n, row in zip(before, rows)]
        self.model.generate(
            input_ids=torch.tensor(ids, device=device),
            attention_mask=torch.tensor(mask, device=device),
            adapter_names=[row.adapter for row in rows],
            max_new_tokens=max(row.limit for row in rows),
            do_sample=False,
            logits_processor=LogitsProcessorList([Draw(rows)]),
            stopping_criteria=StoppingCriteriaList([Tell(rows, self.ends, self.tokenizer)]),
        )
