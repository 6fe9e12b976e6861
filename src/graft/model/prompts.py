# SPDX-License-Identifier: Apache-2.0
"""Prompts: adapters in front of the input, put into a model in one place, whatever the method and the task.

A prompt enters where the base model's stack of layers begins (`PromptStack`), by a hook that every forward pass and
every step of `generate` runs. It is embeddings in front of the input, or keys and values in the empty cache. The hook
also widens arguments that count tokens: masks, positions, types (`prompts/arguments.py`). Heads and losses are the base
model's, and a cache that holds tokens holds the prompt. Under gradient checkpointing transformers gives layers no
cache: `prompts/replays.py` then gives each layer the prompt's, read-only, when the backward pass runs the layer again.

A prompt of keys and values can begin as those of a text, or of a cache that a model has filled.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from graft.config.prompt import PromptLearningConfig
from graft.core.carrier import Carrier
from graft.core.errors import ConfigError, RoutingError, warn
from graft.core.gate import prepares
from graft.core.method import Method, return_unchanged
from graft.core.rows import Finish, Run
from graft.inject.build import count_needed_numbers
from graft.inject.find import check_not_fsdp1
from graft.inject.inject import Injection
from graft.inject.job import Options
from graft.inject.parts import AdapterCarriers, get_registry, unwrap_model, use_mode
from graft.inject.report import InjectReport, Matched
from graft.inject.stage import draw_alike, find_absent_in_model, find_team
from graft.inject.survey import ModuleTree, survey_model
from graft.methods import method_of
from graft.model.registry import Registry
from graft.prompts.arguments import put_labels
from graft.prompts.base import PLACE, STORED, Encoders, Prompt, check_tokens
from graft.prompts.entry import (
    attach,
    check_generation,
    check_kind,
    check_rows,
    check_size,
    drop_encoder_outputs,
)
from graft.prompts.kv_prefix import fit_pairs
from graft.prompts.prefix_tuning import as_pairs, from_pairs
from graft.prompts.stack import PromptStack, stacks_of

COUNTED = ("BigBirdForQuestionAnswering",)  # their heads need as many outputs of the stack as there are tokens


class NoLayers(Method):
    """The method for the injection of a prompt's `modules_to_save`: it adapts no layer."""


class Prompts(Registry):
    """The registry of a model's prompts, all of one method. One can be active at a time."""

    peft_config: dict[str, PromptLearningConfig]  # type: ignore[assignment]
    method: type[Prompt]
    several = "only one prompt can be in front of the input at a time"

    def __init__(self, model: nn.Module, config: PromptLearningConfig, tree: ModuleTree | None = None):
        """Register a model without prompts. It gets an empty `prompt_encoder`, and its stacks of layers are found."""
        super().__init__(model, method_of(config.peft_type), tree)
        self.arguments = set(self.method.arguments)
        self.prompt_encoder = Encoders(self.call)
        self.stacks = stacks_of(model)

    def start(self, adapter_name: str, config: PromptLearningConfig, options: Options) -> None:
        """Add the first prompt, hook the stacks of the model, and make the prompt active and, unless `inference_mode`,
        trainable.
        """
        self.add_adapter(adapter_name, config, options)
        for stack in self.stacks.values():
            attach(stack)
        self.set_adapter(adapter_name, config.inference_mode)

    @classmethod
    def plan(cls, model: nn.Module, config: PromptLearningConfig, adapter_name: str) -> InjectReport:
        """Return the report of a first prompt on `model`: the modules trained whole, and in `matched` the row of
        `describe_prompt`.

        A prompt is made for a moment, from a copy of the config. Model, config and the CPU's random numbers do not
        change. Raises the errors of `_fit`.
        """
        prompts = cls(model, config)
        cfg = copy.copy(config)
        injection = Injection(model, cfg, NoLayers, adapter_name, keys=()).find()
        injection.report_heads_and_rows()
        prompts._fit(cfg, adapter_name)
        with torch.random.fork_rng(devices=()):
            injection.report.matched.append(describe_prompt(prompts._make_prompt(cfg)))
        return injection.report

    def carriers(self) -> Iterator[Carrier]:
        """Yield the encoders of all prompts, then the wrappers of modules trained whole."""
        yield self.prompt_encoder
        yield from self.wrappers.values()

    def parts_of(self, adapter_name: str) -> AdapterCarriers:
        """Return the carriers of a prompt: its encoder as `prompt`, its wrappers, and None as `shared`.

        Offloaded tensors of the encoder are loaded for good.
        """
        parts = super().parts_of(adapter_name)
        parts.shared, parts.prompt = None, self.prompt_encoder[adapter_name]
        return parts

    # adapters

    @prepares
    def add_adapter(self, adapter_name: str, config: PromptLearningConfig, options: Options) -> InjectReport:  # type: ignore[override]
        """Add a prompt, inactive, and return the report.

        The config gets the sizes of the model at the end. On an error nothing has changed. The survey in `tree` is used
        once, and the report's `matched` gets a row for the prompt. The prompt is on the main stack's device, in the
        model's training mode.

        After these checks processes of a pipeline or of a sharded model meet; then they draw equal initial values.

        Raises:
            ConfigError: the config does not fit the model: see `_fit`.
            AdapterNameError: the name is taken.
            CheckpointError: `options.values` has far fewer numbers than the config describes.
        """
        self.check_new(adapter_name, config)
        cfg = copy.copy(config)
        self._fit(cfg, adapter_name)
        if options.values is not None:
            options.values.check_room(count_needed_numbers(lambda: {"": self._make_prompt(cfg)}))
        team = find_team(self.model.modules())
        if team is not None:
            team.meet(adapter_name, cfg, (), options.values is not None)
        tree, self.tree = self.tree, None
        with draw_alike(team):
            prompt = self._make_prompt(cfg)
            prompt.to(self.stacks["main"].device)
            done = Injection(
                self.model, cfg, NoLayers, adapter_name, call=self.call, other_configs=self.peft_config,
                tree=tree or survey_model(self.model), options=options, keys=(), prompt=prompt,
            ).run()  # fmt: skip
        done.report.matched.append(describe_prompt(prompt))
        prompt.train(self.model.training)
        self.prompt_encoder.add(adapter_name, prompt)
        config.__dict__.update(cfg.__dict__)
        self.peft_config[adapter_name] = config
        return self.register_injection(adapter_name, done)

    def _make_prompt(self, cfg: PromptLearningConfig) -> Prompt:
        """Return a new prompt of a complete config, on the CPU, with initial values: words of the base's embeddings if
        the config says so.

        If the words are wrapped, for example trained whole, those of their `original_module` count.
        """
        words = self.stacks["main"].words
        return self.method(cfg, getattr(words, "original_module", words))

    def _fit(self, cfg: PromptLearningConfig, adapter_name: str) -> None:
        """Set the sizes in the config from the model, and check that a prompt of it fits the model.

        Sizes are set only after the checks of task_type, num_virtual_tokens, pipeline and encoder; an error after that
        leaves them set.

        Raises:
            ConfigError: task_type or num_virtual_tokens is None. The model is a stage of a pipeline. The task is
                SEQ_2_SEQ_LM without a decoder, or CAUSAL_LM with embeddings and an encoder, or without
                `prepare_inputs_for_generation`. The sizes or the kind of prompt do not fit the stacks. The head needs
                as many outputs as tokens (BigBirdForQuestionAnswering), for prompts of embeddings.
            DistributedError: FSDP1 has wrapped the model, and the prompt would train (`inference_mode` is False).
        """
        if not cfg.inference_mode:
            check_not_fsdp1(self.model.named_modules(), adapter_name, find_team(self.model.modules()))
        if cfg.task_type is None:
            raise ConfigError(
                f"{cfg.peft_type.value} needs a task_type, such as CAUSAL_LM: it decides how inputs and labels change."
            )
        if cfg.num_virtual_tokens is None:
            raise ConfigError(f"{cfg.peft_type.value} needs num_virtual_tokens, the length of the prompt.")
        absent = find_absent_in_model(self.model)
        if absent:
            raise ConfigError(
                f"{cfg.peft_type.value} acts on all layers at once, and this stage of a pipeline lacks {len(absent)} "
                f"modules, such as '{next(iter(absent))}'. Use a method that acts on layers, such as LORA."
            )
        coded, name = "decoder" in self.stacks, type(self.model).__name__
        if cfg.task_type == "SEQ_2_SEQ_LM" and not coded:
            raise ConfigError(f"task_type=SEQ_2_SEQ_LM needs a separate decoder, and {name} has none: use CAUSAL_LM.")
        if cfg.task_type == "CAUSAL_LM" and coded and not cfg.holds_keys:
            raise ConfigError(f"task_type=CAUSAL_LM needs a decoder only, and {name} has an encoder: use SEQ_2_SEQ_LM.")
        main = self.stacks["main"]
        check_kind(self.stacks.get("decoder", main) if cfg.holds_keys else main, cfg)
        cfg.fit(getattr(self.model, "config", None), main.width)
        for stack in self._find_stacks(cfg):
            check_size(stack, cfg)
        if name in COUNTED and not cfg.holds_keys:
            raise ConfigError(
                f"{name} masks its logits by the tokens of the input, without a prompt of embeddings. Use "
                "PREFIX_TUNING, or a method that acts on layers, such as LORA."
            )
        if cfg.task_type == "CAUSAL_LM" and not hasattr(self.model, "prepare_inputs_for_generation"):
            raise ConfigError(
                f"task_type=CAUSAL_LM needs a model that generates text, and {name} does not: use its own task_type, "
                "or FEATURE_EXTRACTION."
            )

    def _find_stacks(self, cfg: PromptLearningConfig) -> list[PromptStack]:
        """Return the stacks that a prompt goes into: the decoder for keys and values; encoder and decoder for
        embeddings of two submodules; else the main one.
        """
        if "decoder" not in self.stacks or not (cfg.holds_keys or self._in_decoder(cfg)):
            return [self.stacks["main"]]
        return [self.stacks["decoder"]] if cfg.holds_keys else list(self.stacks.values())

    def _in_decoder(self, cfg: PromptLearningConfig) -> bool:
        """Return True if the method can enter decoders and the config has more than one submodule, so that the prompt
        has embeddings for the decoder as well.
        """
        return self.method.in_decoder and (cfg.num_transformer_submodules or 1) > 1

    # acting

    def check_generate(self, kwargs: dict[str, object]) -> None:
        """Raise ValueError for arguments of `generate` that do not work with the active prompt: filled or static
        caches, assistant models.

        Nothing is checked without an active prompt, or for a prompt in the encoder only.
        """
        if self.active is None:
            return
        last = self._find_stacks(self.active[0])[-1]
        if last is self.stacks.get("decoder", last):  # else the prompt is in the encoder, which has no cache
            check_generation(kwargs, self.model, last)

    def _names_used(self) -> tuple[str, ...]:
        """Return the names that a call holds, as the base class does, if the model has modules trained whole: the
        active adapters and the mark ACTIVE.

        Without such modules return (): the prompt is computed when the call begins.
        """
        return super()._names_used() if self.wrappers else ()  # the prompt has been computed when the model begins

    @property
    def active(self) -> tuple[PromptLearningConfig, Prompt] | None:
        """Config and encoder of the active prompt; None if no prompt is active or prompts are disabled."""
        if self.prompt_encoder.disable_adapters or not self.active_adapters:
            return None
        name = self.active_adapters[0]
        return self.peft_config[name], self.prompt_encoder[name]

    @contextmanager
    def enter_methods(self, run: Run) -> Iterator[Finish]:
        """Put the active prompt into the stacks for one run of the model, and yield a function that finishes its
        output.

        Arguments of the method are read from `run`; `task_ids` is removed from the model's keywords. Nested calls get
        their states back.

        Raises:
            RoutingError: the call has `adapter_names`.
            ValueError: the prompts of `task_ids` are not as many as the samples.
            RuntimeError: after the run, if the model never called a stack with a prompt.
        """
        kwargs, arguments = run.kwargs, {name: run.graft_arguments.get(name) for name in self.method.arguments}
        kwargs.pop("task_ids", None)  # only multitask prompts take it
        if self.call.rows is not None:
            raise RoutingError(
                "adapter_names cannot be used with prompt methods: call set_adapter() for each prompt in turn."
            )
        outer = [stack.begin() for stack in self.stacks.values()]
        try:
            yield self._put_prompt(kwargs, arguments)
            for stack in self.stacks.values():
                stack.check_visited()
        finally:
            for stack, call in zip(self.stacks.values(), outer):
                stack.end(call)

    def _put_prompt(self, kwargs: dict[str, object], arguments: dict[str, object]) -> Finish:
        """Compute the active prompt, give it to the stacks by `_insert`, and return a function for the output of the
        call. If no prompt is active, only return a function that returns its input.

        For a prompt of embeddings, labels in `kwargs` are widened by ignored tokens (or moved to the finishing
        function). With a decoder stack, outputs of an encoder that lack the prompt are dropped, with a warning. Raises
        ValueError if the prompt's rows do not fit the batch.
        """
        if self.active is None:
            return return_unchanged
        cfg, prompt = self.active
        finish: Finish = return_unchanged
        if not cfg.holds_keys:
            if kwargs.get("labels") is not None:
                main, both = self.stacks["main"], cfg.task_type == "SEQ_2_SEQ_LM" and self._in_decoder(cfg)
                finish = put_labels(self.model, main, cfg, prompt, both, kwargs, arguments)
            if "decoder" in self.stacks:
                drop_encoder_outputs(kwargs, cfg)
        value = prompt(**arguments)
        check_rows(value, kwargs)
        self._insert(cfg, value)
        return finish

    def _insert(self, cfg: PromptLearningConfig, value: Tensor) -> None:
        """Give the prompt's tensor to the stacks that the run enters, in their `now`.

        Keys and values go to the decoder, or to the main stack without one. Embeddings are split: the first tokens to
        the main stack, the rest to the decoder if the prompt enters it. A decoder notes the number of encoded tokens.

        For SEQ_CLS with a `score` head and no decoder, unless the stack is the model itself, the prompt's outputs are
        cut off: `strips` of the stack's `now` becomes True. The head seeks the last token at its place in input_ids.
        """
        P, main, decoder = cfg.num_virtual_tokens or 0, self.stacks["main"], self.stacks.get("decoder")
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
        """PEFT's indices of the virtual tokens, 0 to `rows` - 1 of each config, by adapter: new tensors on the default
        device.
        """
        return {name: torch.arange(config.rows) for name, config in self.peft_config.items()}

    @property
    def word_embeddings(self) -> nn.Module | None:
        """The word embeddings of the main stack; None if it has none."""
        return self.stacks["main"].words

    def file_prompt(self, adapter_name: str) -> Tensor:
        """Return a prompt as in a checkpoint, (tokens, width), on the CPU, without gradient.

        Raises AdapterNotFoundError if it is not loaded.
        """
        self.check_known([adapter_name])
        return self.prompt_encoder[adapter_name].to_file_tensors()[STORED].cpu()

    def prompt(self, batch_size: int, task_ids: Tensor | None = None) -> Any:
        """Return the active prompt for a batch: (batch, tokens, dim), or a new cache with its keys and values.

        A prompt that has a row for each of the batch is returned as it is, any other is expanded as a view. The cache
        is that of the decoder, if there is one, with the layers that can hold their pair.

        Args:
            task_ids: (batch,), for multitask prompts; others ignore it.

        Raises:
            ValueError: no prompt is active.
        """
        if self.active is None:
            raise ValueError("No prompt is active: call set_adapter(), or leave disable_adapter().")
        cfg, encoder = self.active
        value = encoder(**({"task_ids": task_ids} if "task_ids" in self.method.arguments else {}))
        if cfg.holds_keys:
            stack = self.stacks.get("decoder", self.stacks["main"])
            pairs = fit_pairs(as_pairs(value, cfg), stack.shapes)
            return stack.fill_cache(None, pairs, batch_size)
        value = value if value.dim() == 3 else value[None]
        return value if len(value) == batch_size else value.expand(batch_size, -1, -1)


def describe_prompt(prompt: Prompt) -> Matched:
    """Return a report's row for a prompt, at the path "prompt_encoder": its class, and number and shapes (as "name (n,
    m)") of its parameters that train.
    """
    sized = [(name, p) for name, p in prompt.named_parameters() if p.requires_grad]
    shapes = tuple(f"{name} {tuple(p.shape)}" for name, p in sized)
    return Matched(PLACE, type(prompt).__name__, sum(p.numel() for _, p in sized), shapes)


# keys and values of a text, or of a cache


Pair = tuple[Tensor, Tensor]  # key and value of one layer, each (1, heads, tokens, head_dim)


def prompt_embeddings_from_past_key_values(past_key_values: object, *, num_virtual_tokens: int) -> Tensor:
    """Return the first tokens of a cache as a prompt, (tokens, 2 · layers · heads · head_dim).

    Args:
        past_key_values: of one sequence: a cache of transformers, or an iterable with (key, value) for each layer, each
            (1, heads, tokens, head_dim).
        num_virtual_tokens: how many tokens to take.

    Raises:
        ValueError: the cache is empty, too short, not of one sequence, or its layers differ in shape.
        TypeError: it is no cache.
    """
    return from_pairs(read_pairs(past_key_values, num_virtual_tokens), num_virtual_tokens)


def initialize_kv_prefix_from_past_key_values(
    model: nn.Module, *, adapter_name: str | None = None, past_key_values: object, num_virtual_tokens: int | None = None
) -> Tensor:
    """Set a CARTRIDGE or PREFIX_TUNING adapter to the first tokens of a cache, and return the new prompt.

    Waits until no call uses the adapter.

    Args:
        adapter_name: the first active one if None.
        past_key_values: as in `prompt_embeddings_from_past_key_values`, of the same base model.
        num_virtual_tokens: the adapter's own number, or None.

    Returns:
        The new prompt, (tokens, 2 · layers · heads · head_dim), in the cache's dtype.

    Raises:
        ValueError: as `prompt_embeddings_from_past_key_values`; or the adapter holds no keys and values, computes them
            by a projection, or has another shape or number of tokens. The adapter is then as before.
        TypeError: it is no cache, or `model` is no PeftModel.
    """
    name, config, encoder = find_prefix_adapter(model, adapter_name, num_virtual_tokens)
    tokens = config.num_virtual_tokens
    pairs = read_pairs(past_key_values, tokens)
    cache_shape = len(pairs), pairs[0][0].shape[1], pairs[0][0].shape[3]
    heads = config.num_attention_heads
    need = config.num_layers, heads, config.token_dim // heads
    if cache_shape != need:
        raise ValueError(
            "The cache has {} layers with {} heads of {}, but adapter '{}' needs {} with {} of {}: fill it with the "
            "adapter's own base model.".format(*cache_shape, name, *need)
        )
    values = from_pairs(pairs, tokens).detach()
    with get_registry(unwrap_model(model)).call.gate.change(f"new keys and values of adapter '{name}'", (name,)):
        encoder.load_prompt_embeddings(values)
    return values


def initialize_kv_prefix_from_text(
    model: nn.Module,
    tokenizer: object,
    *,
    text: str,
    adapter_name: str | None = None,
    num_virtual_tokens: int | None = None,
    use_chat_template: bool = True,
    max_length: int | None = None,
) -> Tensor:
    """Set a CARTRIDGE or PREFIX_TUNING adapter to the keys and values of the first tokens of a text, and return the new
    prompt.

    The base model reads just these tokens, without adapters and gradients, in eval mode: later tokens do not change
    them. They go into a new DynamicCache without the model's config. If the model has word embeddings, token ids are
    checked against them.

    Args:
        tokenizer: the base model's.
        text: a text of at least as many tokens as the adapter has.
        adapter_name: the first active one if None.
        num_virtual_tokens: the adapter's own number, or None.
        use_chat_template: let the tokenizer present the text as a system message, if it has a template for chats.
        max_length: take no more tokens of the text than these.

    Returns:
        The new prompt, (tokens, 2 · layers · heads · head_dim), in the base model's dtype.

    Raises:
        ValueError: the text is too short, the tokenizer another model's, the model an encoder-decoder, or the adapter
            does not fit (as in `initialize_kv_prefix_from_past_key_values`). The adapter is then as before.
    """
    from transformers import DynamicCache

    name, config, _ = find_prefix_adapter(model, adapter_name, num_virtual_tokens)
    stack = get_registry(unwrap_model(model)).stacks["main"]
    if stack.in_pair:
        raise ValueError(f"Adapter '{name}' is in a decoder that cannot read a text without its encoder.")
    ids, P = tokenize_text(tokenizer, text, use_chat_template, max_length), config.num_virtual_tokens
    if ids.shape[1] < P:
        raise ValueError(
            f"Need at least {P} cached tokens, got {ids.shape[1]}: adapter '{name}' has as many virtual tokens. Pass a "
            "longer text or max_length, or make the prompt shorter."
        )
    if stack.words is not None:
        check_tokens(ids, stack.words, "The text")
    cache = DynamicCache()  # without the model's config it also keeps tokens outside a sliding window
    with torch.no_grad(), model.disable_adapter(), use_mode(stack.module, False):
        stack.module(input_ids=ids[:, :P].to(stack.device), use_cache=True, **{stack.cache_name: cache})
    return initialize_kv_prefix_from_past_key_values(model, adapter_name=name, past_key_values=cache)


def find_prefix_adapter(
    model: nn.Module, adapter_name: str | None, num_virtual_tokens: int | None
) -> tuple[str, Any, Prompt]:
    """Return name, config and encoder of an adapter with keys and values that a caller can set.

    Args:
        adapter_name: None: the first active one.
        num_virtual_tokens: the number that the caller expects, or None.

    Raises:
        TypeError: `model` is no PeftModel.
        AdapterNotFoundError: the adapter is not loaded.
        ValueError: no adapter is active, it holds no keys and values, computes them by a network (prefix_projection),
            shares them between submodules, or has another number of tokens.
    """
    registry = get_registry(unwrap_model(model))
    if registry is None:
        raise TypeError(
            f"model must be a PeftModel with a CARTRIDGE or PREFIX_TUNING adapter, got {type(model).__name__}."
        )
    if adapter_name is None:
        if not registry.active_adapters:
            raise ValueError(f"No adapter is active: pass adapter_name, one of {', '.join(registry.peft_config)}.")
        adapter_name = registry.active_adapters[0]
    registry.check_known([adapter_name])
    config = registry.peft_config[adapter_name]
    if not getattr(config, "holds_keys", False):
        raise ValueError(
            f"Adapter '{adapter_name}' must be a CARTRIDGE or PREFIX_TUNING adapter (got {config.peft_type.value}): "
            "others hold no keys and values."
        )
    encoder = registry.prompt_encoder[adapter_name]
    if getattr(encoder, "prefix_projection", False):
        raise ValueError(
            "Initialization from KV cache is not supported for prefix tuning with `prefix_projection=True`: keys and "
            f"values of adapter '{adapter_name}' are computed by a network. Make it with prefix_projection=False."
        )
    if config.num_transformer_submodules > 1:
        raise ValueError(
            f"Adapter '{adapter_name}' has num_transformer_submodules={config.num_transformer_submodules}: its layers "
            "share keys and values, which cannot be set to a cache's. Make it with num_transformer_submodules=1."
        )
    if num_virtual_tokens not in (None, config.num_virtual_tokens):
        raise ValueError(
            f"num_virtual_tokens={num_virtual_tokens}, but adapter '{adapter_name}' has {config.num_virtual_tokens}: "
            "leave it out."
        )
    return adapter_name, config, encoder


def tokenize_text(tokenizer: Any, text: str, use_chat_template: bool, max_length: int | None) -> Tensor:
    """Return the ids of a text's tokens, (1, tokens), int64, the first `max_length` of them (None: all).

    With `use_chat_template` and a tokenizer that has one, the text is a system message without a generation prompt. If
    the template refuses that, warn and use the plain text.
    """
    ids = None
    template = getattr(tokenizer, "chat_template", "unknown") if hasattr(tokenizer, "apply_chat_template") else None
    if use_chat_template and template is not None:
        try:
            ids = tokenizer.apply_chat_template(
                [{"role": "system", "content": text}],
                tokenize=True, add_generation_prompt=False, return_tensors="pt", return_dict=False,
            )  # fmt: skip
        except Exception as e:  # templates raise errors of many types
            warn(
                f"The tokenizer's chat template does not take a system message ({e}): the text is used without the "
                "template. Pass use_chat_template=False to allow that."
            )
    if ids is None:
        cut = dict(truncation=max_length is not None, max_length=max_length)
        ids = tokenizer(text, return_tensors="pt", **cut)["input_ids"]
    return torch.as_tensor(ids).reshape(1, -1)[:, :max_length].long()


def read_pairs(cache: object, tokens: int) -> list[Pair]:
    """Return (key, value) of each layer of a cache, whole and in the order of layers, after checks; nothing is cut to
    `tokens`.

    Raises:
        ValueError: `tokens` is None or not positive. The cache is empty, shorter than `tokens`, of several sequences,
            or not of rank 4. Heads or head_dim differ between layers.
        TypeError: it is no cache.
    """
    if tokens is None or tokens <= 0:
        raise ValueError(f"`num_virtual_tokens` must be positive, got {tokens}.")
    pairs = find_pairs(cache)
    if not pairs:
        raise ValueError("Empty `past_key_values`.")
    both = [t for pair in pairs for t in pair]
    odd = next((t for t in both if t.ndim != 4), None)
    if odd is not None:
        raise ValueError(
            "Expected key/value tensors with rank 4, (1, heads, tokens, head_dim), got one with shape "
            f"{tuple(odd.shape)}."
        )
    shapes = [(t.shape[0], t.shape[1], t.shape[3]) for t in both]
    batch = max(shape[0] for shape in shapes)
    if batch != 1:
        raise ValueError(
            f"`past_key_values` must come from a single sequence (batch=1). Got batch={batch}: pass one sample's rows."
        )
    if len(set(shapes)) > 1:
        raise ValueError(
            "Inconsistent head shapes across layers in `past_key_values`: a prompt has keys and values of one shape, "
            f"here are (heads, head_dim) {', '.join(map(str, sorted({s[1:] for s in shapes})))}."
        )
    shortest = min(t.shape[2] for t in both)
    if shortest < tokens:
        raise ValueError(f"Need at least {tokens} cached tokens, got {shortest}.")
    return pairs


def find_pairs(cache: object) -> list[Pair]:
    """Return (key, value) of each layer of a cache, uncut.

    Accepted are caches of transformers with `layers` or `to_legacy_cache`; of an encoder-decoder cache the
    self-attention's is used. Iterables of lists or tuples that begin with two tensors are accepted, too; further items
    are dropped. An empty one gives [].

    Raises:
        TypeError: it is another object, such as None, a tensor or a text.
        ValueError: a layer of a cache is empty, or has dropped its first tokens.
    """
    cache = getattr(cache, "self_attention_cache", cache)
    if hasattr(cache, "layers"):
        return [pair_at(i, layer) for i, layer in enumerate(cache.layers)]
    if hasattr(cache, "to_legacy_cache"):
        cache = cache.to_legacy_cache()
    if isinstance(cache, Iterable) and not isinstance(cache, (Tensor, str)):
        layers = [tuple(layer[:2]) if isinstance(layer, (tuple, list)) else () for layer in cache]
        if all(len(layer) == 2 and all(isinstance(t, Tensor) for t in layer) for layer in layers):
            return layers
    raise TypeError(
        f"Unsupported `past_key_values` type {type(cache).__name__}: expected a cache of transformers, or an iterable "
        "with a pair of tensors (key, value) for each layer."
    )


def pair_at(index: int, layer: Any) -> Pair:
    """Return keys and values of one layer of a cache, as views cut to the tokens that it has seen: a static cache has
    room left.

    Raises:
        ValueError: the layer holds none, or has dropped its first tokens (a sliding window).
    """
    keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
    seen = int(layer.get_seq_length()) if keys is not None else 0
    if keys is None or values is None or not seen:
        raise ValueError(f"Empty `past_key_values`: layer {index} holds no keys and values.")
    if seen > keys.shape[-2]:
        raise ValueError(
            f"Layer {index} of the cache has seen {seen} tokens and keeps {keys.shape[-2]}: the first ones, which the "
            "prompt needs, are gone. Fill it with fewer tokens, or use a DynamicCache() without a config."
        )
    return keys[..., :seen, :], values[..., :seen, :]  # a static cache has room that is not filled
