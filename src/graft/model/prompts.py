# SPDX-License-Identifier: Apache-2.0
"""Prompts: adapters in front of the input. One place puts them into a model, whatever the method and the task.

A prompt enters where the base model's stack of layers begins (`Stack`), in a hook that every forward pass and step of
`generate` runs. Heads and losses are the base model's own, and a cache that holds tokens holds the prompt.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from graft.core.errors import ConfigError, RoutingError
from graft.core.gate import prepares
from graft.core.method import Method, as_it_is
from graft.core.rows import Run
from graft.inject.build import size
from graft.inject.inject import Injection, Options, inject
from graft.inject.parts import Parts
from graft.inject.report import InjectReport, Matched
from graft.inject.stage import absent_from, draw_alike
from graft.inject.survey import Tree
from graft.methods import method_of
from graft.model.registry import Registry
from graft.prompts import admission
from graft.prompts.arguments import put_labels
from graft.prompts.base import PLACE, STORED, Encoders, Prompt
from graft.prompts.entry import attach
from graft.prompts.kv_prefix import fitted
from graft.prompts.prefix_tuning import as_pairs
from graft.prompts.stack import Stack, stacks_of

COUNTED = ("BigBirdForQuestionAnswering",)  # heads that expect as many outputs of the stack as there are tokens


class NoLayers(Method):
    """The method for the injection of a prompt's modules to save: it adapts no layer."""


class Prompts(Registry):
    """The registry of a model's prompts."""

    several = "only one prompt can be in front of the input at a time"

    def __init__(
        self,
        model: nn.Module,
        peft_config: Any,
        adapter_name: str,
        options: Options,
        tree: Tree | None = None,
    ):
        self._begin(model, peft_config, tree)
        self.add_adapter(adapter_name, peft_config, options)
        for stack in self.stacks.values():
            attach(stack)
        self.set_adapter(adapter_name, peft_config.inference_mode)

    def _begin(self, model: nn.Module, config: Any, tree: Tree | None = None) -> None:
        self.checkpointing = self.begin(model, tree).checkpointing
        self.method: type[Prompt] = method_of(config.peft_type)  # type: ignore[assignment]
        self.arguments = set(self.method.arguments)
        self.prompt_encoder = Encoders(self.call)
        self.stacks = stacks_of(model)

    @classmethod
    def plan(cls, model: nn.Module, config: Any, adapter_name: str) -> InjectReport:
        """Return the report of a first prompt on `model`."""
        prompts = cls.__new__(cls)
        prompts._begin(model, config)
        cfg = copy.copy(config)
        made = Injection(model, cfg, NoLayers, adapter_name, keys=()).find()
        made.count_saved()
        prompts._fit(cfg)
        with torch.random.fork_rng(devices=()):
            made.report.matched.append(matched(prompts._made(cfg)))
        return made.report

    def carriers(self) -> Iterator[Any]:
        yield self.prompt_encoder
        yield from self.wrappers.values()

    def parts_of(self, adapter_name: str) -> Parts:
        parts = super().parts_of(adapter_name)
        parts.prompt = self.prompt_encoder[adapter_name]  # type: ignore[assignment]
        return parts

    # adapters

    @prepares
    def add_adapter(self, adapter_name: str, config: Any, options: Options) -> None:
        """Add a prompt, inactive. A call that fails changes nothing."""
        self.check_new(adapter_name, config)
        cfg = copy.copy(config)
        self._fit(cfg)
        if options.values is not None:
            options.values.check_room(size(lambda: [self._made(cfg)]))
        draw_alike(self.model.modules())
        prompt, disabled = self._made(cfg), self.switched_off
        prompt.to(self.stacks["main"].device)
        done = inject(
            self.model, cfg, NoLayers, adapter_name, call=self.call, others=self.peft_config,
            values=options.values, keys=(), heads=options.heads, prompt=prompt, close=self.close,
        )  # fmt: skip
        own = matched(prompt)
        prompt.train(self.model.training)
        self.prompt_encoder.add(adapter_name, prompt)
        done.report.matched.append(own)
        self.take_in(done.parts, disabled)
        config.__dict__.update(cfg.__dict__)
        self.peft_config[adapter_name], self.reports[adapter_name] = config, done.report

    def _made(self, cfg: Any) -> Prompt:
        """Make a prompt of a complete config, on the CPU, with initial values."""
        return self.method(cfg, unwrapped(self.stacks["main"].words))

    def _fit(self, cfg: Any) -> None:
        """Complete the config against the model, or raise ConfigError if it does not fit."""
        if cfg.task_type is None:
            raise ConfigError(
                f"{cfg.peft_type.value} needs a task_type, such as CAUSAL_LM: what becomes of inputs and labels "
                "depends on it."
            )
        if cfg.num_virtual_tokens is None:
            raise ConfigError(f"{cfg.peft_type.value} needs num_virtual_tokens, the length of the prompt.")
        absent = absent_from(self.model)
        if absent:
            raise ConfigError(
                f"{cfg.peft_type.value} acts on all layers at once, and this model is a stage of a pipeline, which "
                f"lacks {len(absent)} modules, such as '{next(iter(absent))}': use a method that acts on layers, such "
                "as LORA."
            )
        coded = "decoder" in self.stacks
        if cfg.task_type == "SEQ_2_SEQ_LM" and not coded:
            raise ConfigError(
                f"task_type=SEQ_2_SEQ_LM needs a model with an encoder and a decoder, and {type(self.model).__name__} "
                "has no decoder of its own: use CAUSAL_LM."
            )
        if cfg.task_type == "CAUSAL_LM" and coded and not cfg.holds_keys:
            raise ConfigError(
                f"task_type=CAUSAL_LM needs a model that is a decoder only, and {type(self.model).__name__} has an "
                "encoder: use SEQ_2_SEQ_LM."
            )
        main = self.stacks["main"]
        admission.check_kind(self.stacks.get("decoder", main) if cfg.holds_keys else main, cfg)
        cfg.fit(getattr(self.model, "config", None), main.width)
        for stack in self._entered(cfg):
            admission.check_size(stack, cfg)
        if type(self.model).__name__ in COUNTED and not cfg.holds_keys:
            raise ConfigError(
                f"{type(self.model).__name__} masks its logits by the tokens of the input, among which a prompt of "
                "embeddings is not: use PREFIX_TUNING, or a method that acts on layers, such as LORA."
            )
        if cfg.task_type == "CAUSAL_LM" and not hasattr(self.model, "prepare_inputs_for_generation"):
            raise ConfigError(
                f"task_type=CAUSAL_LM needs a model that generates text, and {type(self.model).__name__} does not: use "
                "the task_type that it was made for, or FEATURE_EXTRACTION."
            )

    def _entered(self, cfg: Any) -> list[Stack]:
        """Return the stacks that a prompt goes into."""
        if "decoder" not in self.stacks or not (cfg.holds_keys or self._in_decoder(cfg)):
            return [self.stacks["main"]]
        return [self.stacks["decoder"]] if cfg.holds_keys else list(self.stacks.values())

    def _in_decoder(self, cfg: Any) -> bool:
        return self.method.in_decoder and cfg.num_transformer_submodules > 1

    # acting

    def check_generate(self, kwargs: dict[str, Any]) -> None:
        if self.active is None:
            return
        last = self._entered(self.active[0])[-1]
        if last is self.stacks.get("decoder", last):  # else the prompt is in the encoder, which has no cache
            admission.check_caches(kwargs, self.model)
            admission.check_assistant(kwargs, self.model, last)

    def _used(self) -> tuple[str, ...]:
        return super()._used() if self.wrappers else ()  # the prompt has been computed when the model begins

    @property
    def active(self) -> tuple[Any, Prompt] | None:
        """Config and encoder of the prompt that acts now, if one does."""
        if self.prompt_encoder.disable_adapters or not self.active_adapters:
            return None
        name = self.active_adapters[0]
        return self.peft_config[name], self.prompt_encoder[name]  # type: ignore[return-value]

    @contextmanager
    def acting(self, run: Run) -> Iterator[Callable[[Any], Any]]:
        kwargs, arguments = run.kwargs, {name: run.own.get(name) for name in self.method.arguments}
        kwargs.pop("task_ids", None)  # only multitask prompts take it
        if self.call.rows is not None:
            raise RoutingError(
                "adapter_names cannot be used with prompt methods: call set_adapter() for each prompt in turn."
            )
        outer = [stack.begin() for stack in self.stacks.values()]
        try:
            finish, value = self._ready(kwargs, arguments)
            if value is not None:
                self._insert(self.active[0], value)  # type: ignore[index]
            yield finish
            for stack in self.stacks.values():
                stack.check_visited()
        finally:
            for stack, call in zip(self.stacks.values(), outer):
                stack.end(call)

    def _ready(self, kwargs: dict[str, Any], arguments: dict[str, Any]) -> tuple[Callable[[Any], Any], Tensor | None]:
        """Return a function for the output of a call, and the prompt that enters. Change `kwargs`."""
        if self.active is None:
            return as_it_is, None
        cfg, prompt = self.active
        finish: Callable[[Any], Any] = as_it_is
        if not cfg.holds_keys:
            if kwargs.get("labels") is not None:
                main, both = self.stacks["main"], cfg.task_type == "SEQ_2_SEQ_LM" and self._in_decoder(cfg)
                finish = put_labels(self.model, main, cfg, prompt, both, kwargs, arguments)
            if "decoder" in self.stacks:
                admission.drop_encoder_outputs(kwargs, cfg)
        value = prompt(**arguments)
        admission.check_rows(value, kwargs)
        return finish, value

    def _insert(self, cfg: Any, value: Tensor) -> None:
        P, main, decoder = cfg.num_virtual_tokens, self.stacks["main"], self.stacks.get("decoder")
        if cfg.holds_keys:
            (decoder or main).put_keys(value, partial(as_pairs, cfg=cfg))
            return
        rows = value if value.dim() == 3 else value[None]
        main.put_embeddings(rows[:, :P])
        if decoder is not None:
            decoder.now.encoded = P
            if self._in_decoder(cfg):
                decoder.put_embeddings(rows[:, P:])
        elif cfg.task_type == "SEQ_CLS" and hasattr(self.model, "score") and main.module is not self.model:
            main.now.strips = True  # the head looks for the last token at its place in input_ids

    # behind names of a PeftModel

    @property
    def prompt_tokens(self) -> dict[str, Tensor]:
        return {name: torch.arange(config.rows) for name, config in self.peft_config.items()}

    @property
    def word_embeddings(self) -> Any:
        return self.stacks["main"].words

    def stored(self, adapter_name: str) -> Tensor:
        """Return a prompt as in a checkpoint, (tokens, width)."""
        self.check_known([adapter_name])
        return self.prompt_encoder[adapter_name].stored()[STORED].cpu()  # type: ignore[operator,no-any-return]

    def prompt(self, batch_size: int, task_ids: Tensor | None = None) -> Any:
        """Return the active prompt, (batch, tokens, dim), or a cache of keys and values."""
        if self.active is None:
            raise ValueError("No prompt is active: call set_adapter(), or leave disable_adapter().")
        cfg, encoder = self.active
        value = encoder(**({"task_ids": task_ids} if "task_ids" in self.method.arguments else {}))
        if cfg.holds_keys:
            stack = self.stacks.get("decoder", self.stacks["main"])
            pairs = fitted(as_pairs(value, cfg), stack.key_shapes())
            return stack.filled(None, pairs, batch_size)
        value = value if value.dim() == 3 else value[None]
        return value if len(value) == batch_size else value.expand(batch_size, -1, -1)


def matched(prompt: Prompt) -> Matched:
    sized = [(name, p) for name, p in prompt.named_parameters() if p.requires_grad]
    shapes = tuple(f"{name} {tuple(p.shape)}" for name, p in sized)
    return Matched(PLACE, type(prompt).__name__, sum(p.numel() for _, p in sized), shapes)


def unwrapped(words: nn.Module | None) -> nn.Module | None:
    """Return the base model's own embeddings, from which new prompts begin, also if an adapter has others."""
    return getattr(words, "original_module", words)
