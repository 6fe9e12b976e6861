# SPDX-License-Identifier: Apache-2.0
"""Prompt tuning: learned embeddings in front of the input (https://arxiv.org/abs/2104.08691)."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from graft.config.prompt import PromptLearningConfig
from graft.core.errors import ConfigError, PeftWarning, warn
from graft.core.method import PublishedRate
from graft.prompts.base import Prompt, words_of
from graft.storage.parallel import find_whole_shape


class PromptTuningInit(str, Enum):
    """The initial value of a prompt."""

    TEXT = "TEXT"  # the embeddings of a text, cut or repeated to length
    SAMPLE_VOCAB = "SAMPLE_VOCAB"  # embeddings of random tokens
    RANDOM = "RANDOM"  # normal numbers


@dataclass(kw_only=True)
class PromptTuningConfig(PromptLearningConfig):
    """Prompt tuning: num_virtual_tokens learned embeddings in front of the input."""

    peft_type: str = "PROMPT_TUNING"
    prompt_tuning_init: Any = PromptTuningInit.RANDOM  # a PromptTuningInit
    prompt_tuning_init_text: str | None = None  # for TEXT
    tokenizer_name_or_path: str | None = None  # for TEXT: the base model's tokenizer
    tokenizer_kwargs: dict | None = None  # type: ignore[type-arg]  # for TEXT: passed to AutoTokenizer.from_pretrained
    inits: ClassVar[type[Enum]] = PromptTuningInit

    def __post_init__(self) -> None:
        """Check the fields after those of the base class, and make prompt_tuning_init a member of the class's enum
        (`inits`).

        Raises:
            ConfigError: prompt_tuning_init is no member; TEXT has an empty tokenizer_name_or_path or
                prompt_tuning_init_text; or there are tokenizer_kwargs without TEXT.
        """
        super().__post_init__()
        init = self.prompt_tuning_init
        names = [kind.value for kind in self.inits]
        if init not in names:
            raise ConfigError(f"prompt_tuning_init must be one of {', '.join(names)}, got {init!r}.")
        self.prompt_tuning_init = self.inits(init)
        if init == "TEXT":
            for name in ("tokenizer_name_or_path", "prompt_tuning_init_text"):
                if not getattr(self, name):
                    raise ConfigError(f"When prompt_tuning_init='TEXT', {name} can't be None.")
        if self.tokenizer_kwargs and init != "TEXT":
            raise ConfigError("tokenizer_kwargs only valid when using prompt_tuning_init='TEXT'.")


class PromptEmbedding(Prompt):
    """The prompt of prompt tuning: (tokens, dim), without a network."""

    config = PromptTuningConfig
    published_lr = PublishedRate(0.3, 0.3, "arXiv 2104.08691, its code, with Adafactor")

    def __init__(self, cfg: Any, words: nn.Module | None = None):
        """Make the embedding of `cfg.rows` tokens: random, or unless inference_mode is set the words of a text (TEXT)
        or of random tokens (SAMPLE_VOCAB).

        Words are copied; random tokens are drawn from torch's generator, with repetition.

        Raises:
            ConfigError: the text has no tokens, or tokens that the base model does not know.
            OSError: there is no such tokenizer.
        """
        super().__init__(cfg, words)
        self.embedding = nn.Embedding(cfg.rows, cfg.token_dim)
        if cfg.inference_mode or cfg.prompt_tuning_init not in ("TEXT", "SAMPLE_VOCAB"):
            return
        assert words is not None, "a prompt of embeddings is for models that have some"
        origin = f"prompt_tuning_init='{cfg.prompt_tuning_init.value}'"
        if cfg.prompt_tuning_init == "TEXT":
            ids = text_ids(cfg)
            origin += f" with tokenizer_name_or_path='{cfg.tokenizer_name_or_path}'"
        else:
            ids = torch.randint(0, find_whole_shape(next(words.parameters()))[0], (cfg.rows,))
        self.embedding.weight = nn.Parameter(words_of(ids, words, origin))


def text_ids(cfg: PromptTuningConfig) -> Tensor:
    """Return the tokens of the initial text, cut or repeated to the number of the embedding's rows, as a tensor
    (rows,).

    Code that a tokenizer brings never runs, as the config may come from anywhere: trust_remote_code is switched off,
    with a PeftWarning if `tokenizer_kwargs` has a true one. The config stays.

    Raises:
        OSError: there is no such tokenizer, or loading raises an OSError or ValueError. Other errors pass unchanged.
        ConfigError: the text has no tokens.
    """
    from transformers import AutoTokenizer

    options = dict(cfg.tokenizer_kwargs or {})
    if options.get("trust_remote_code"):
        warn("tokenizer_kwargs: trust_remote_code is ignored, since a config may come from anywhere.", PeftWarning)
    options["trust_remote_code"] = False
    try:
        tokenizer = AutoTokenizer.from_pretrained(cfg.tokenizer_name_or_path, **options)
    except (OSError, ValueError) as e:  # ValueError: a path that does not exist, before transformers 5
        raise OSError(f"tokenizer_name_or_path='{cfg.tokenizer_name_or_path}' cannot be loaded: {e}") from e
    ids = tokenizer(cfg.prompt_tuning_init_text)["input_ids"]
    if not ids:
        raise ConfigError(f"prompt_tuning_init_text={cfg.prompt_tuning_init_text!r} has no tokens.")
    return torch.tensor((ids * -(-cfg.rows // len(ids)))[: cfg.rows])
