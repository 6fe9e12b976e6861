# SPDX-License-Identifier: Apache-2.0
"""A base model and its adapters, by the names that requests give them."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

import graft

from .batches import Batches, Row


class Refused(Exception):
    """A request that cannot be met, and why."""


class Busy(Exception):
    """A request that may be met later."""


PATIENCE = 60  # seconds that a load or unload waits for another
MOST_CHARACTERS = 32  # of a text for each token that the base has a position for


def read_prompt(tokenizer: Any, text: str) -> list[int]:
    """Return the token ids of a text. Drops the end token that some tokenizers append: an answer continues the text."""
    ids: list[int] = tokenizer(text).input_ids
    appended = bool(ids) and ids[-1] == tokenizer.eos_token_id and not text.endswith(tokenizer.eos_token)
    return ids[:-1] if appended else ids


class Models:
    """The base, adapters of any methods that act on layers, and the queue of what they are asked.

    Args:
        base: a folder with a causal language model; with its tokenizer, if prompts may be texts.
        name: the base's name.
        most: rows in a batch.
    """

    def __init__(self, base: str, name: str, device: str, most: int):
        self.name, self.folders = name, {name: base}
        self.changing = threading.Lock()  # one load or unload at a time
        tokenizer = any(Path(base, file).exists() for file in ("tokenizer.json", "tokenizer_config.json"))
        self.tokenizer = AutoTokenizer.from_pretrained(base, trust_remote_code=False) if tokenizer else None
        model = AutoModelForCausalLM.from_pretrained(base, dtype="auto", trust_remote_code=False).to(device)
        ends = model.generation_config.eos_token_id
        ends = [] if ends is None else [ends] if isinstance(ends, int) else ends
        model.generation_config = GenerationConfig(pad_token_id=0)  # how to go on, requests say and nobody else
        self.longest = getattr(model.config, "max_position_embeddings", torch.inf)
        self.vocabulary = model.get_input_embeddings().num_embeddings
        config = graft.LoraConfig(r=1, target_modules="all-linear")
        self.model = graft.get_peft_model(model, config, "none", mixed=True).eval()
        self.model.delete_adapter("none")  # adapters of any methods may come
        self.batches = Batches(self.model, self.tokenizer, ends, most, self.longest)

    @contextmanager
    def change(self) -> Iterator[None]:
        """Wait until no other load or unload runs; raise Busy if that takes too long."""
        if not self.changing.acquire(timeout=PATIENCE):
            raise Busy("Other adapters are being loaded or unloaded: try again.")
        try:
            yield
        finally:
            self.changing.release()

    def load(self, name: str, folder: str) -> None:
        """Load an adapter. Answers go on meanwhile: only the exchange at the end waits for the batch that runs."""
        with self.change():
            if name in self.folders or name == "__base__":
                raise Refused(f"The name {name!r} is taken: unload that adapter first, or give this one another name.")
            if not Path(folder, "adapter_config.json").is_file():  # no hub is asked
                path = str(Path(folder).absolute())
                raise Refused(f"The folder {path!r} holds no adapter: there is no adapter_config.json.")
            try:
                self.model.load_adapter(folder, name)
                token = torch.zeros(2, 1, dtype=torch.long, device=self.model.device)
                with torch.no_grad():  # an adapter that cannot share a batch would fail others' requests
                    self.model(token, adapter_names=[name, "__base__"])
            except Exception as error:
                if name in self.model.peft_config:
                    self.model.delete_adapter(name)
                raise error if isinstance(error, graft.InUseError) else Refused(str(error)) from error
            self.folders[name] = folder

    def unload(self, name: str) -> None:
        """Unload an adapter when the batch that runs has ended. New requests for it are refused from now on."""
        with self.change():
            if name not in self.folders or name == self.name:
                raise graft.AdapterNotFoundError(f"There is no adapter {name!r}.")
            folder = self.folders.pop(name)
            try:
                self.model.delete_adapter(name)
            except Exception:
                self.folders[name] = folder
                raise

    def row(self, name: str, prompt: str | list[int], limit: int, **how: Any) -> Row:
        """Return what to put into the queue.

        Raises:
            AdapterNotFoundError: there is no model of that name.
            Refused: the model cannot go on from the prompt.
        """
        if name not in self.folders:
            raise graft.AdapterNotFoundError(
                f"The model {name!r} does not exist. There are: {', '.join(self.folders)}."
            )
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise Refused(f"{self.name} has no tokenizer: give the prompt as a list of token ids.")
            if len(prompt) > MOST_CHARACTERS * self.longest:  # which takes the tokenizer a while
                raise Refused(f"The prompt's {len(prompt)} characters are too many for {self.longest} tokens.")
            prompt = read_prompt(self.tokenizer, prompt)
        if not prompt or not all(0 <= token < self.vocabulary for token in prompt):
            raise Refused(f"A prompt has at least one token, of 0 to {self.vocabulary - 1}.")
        if len(prompt) + limit > self.longest:
            raise Refused(f"The prompt's {len(prompt)} tokens and max_tokens={limit} exceed {self.longest}.")
        return Row(prompt, "__base__" if name == self.name else name, limit=limit, **how)
