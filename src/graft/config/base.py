# SPDX-License-Identifier: Apache-2.0
# Supported inside: rooms may import this module.
"""PeftConfig, the base of all configs, and its file adapter_config.json; the task types; the checks of fields'
types.
"""

from __future__ import annotations

import copy
import json
import os
import re
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import MISSING, Field, asdict, dataclass, fields
from difflib import get_close_matches
from enum import Enum
from functools import cache
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from graft.config.atomic import replace_file
from graft.config.bounds import check_bounds, check_numbers
from graft.config.hub import select_hub_keywords
from graft.config.pair import CONFIG_NAME, FORMAT_VERSION, SAFETENSORS, TORCH, ConfigFile, find_weights
from graft.config.reading import Json, compile_ending, read_object
from graft.core.errors import CheckpointError, ConfigError, ConfigTypeError, PeftError, PeftWarning, shorten_text, warn

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

MACHINE = ("runtime_config",)  # describes a machine; files of some old releases have it
C = TypeVar("C", bound="PeftConfig")


def check_config(config: object) -> None:
    """Raise TypeError unless `config` is a PeftConfig of graft. The text says how to make one of the value."""
    if not isinstance(config, PeftConfig):
        raise TypeError(f"peft_config must be a PeftConfig, {why_no_config(config)}")


def why_no_config(config: object) -> str:
    """Return "got <type>. <remedy>.", which says how to make a config of graft from a value that is none.

    The remedy differs for a class, a mapping, another package's config (with `peft_type` and `to_dict`), and any other
    value.
    """
    name, remedy = type(config).__name__, "Make one, such as graft.LoraConfig(target_modules=[…])"
    if isinstance(config, type):
        name, remedy = config.__name__, f"Call the class: {config.__name__}(…)"
    elif isinstance(config, Mapping):
        remedy = "graft.get_peft_config(config) makes one of a dict with its peft_type"
    elif hasattr(config, "peft_type") and hasattr(config, "to_dict"):
        name, remedy = f"{name} of another package", "graft.get_peft_config(config.to_dict()) makes graft's"
    return f"got {name}. {remedy}."


SYNONYMS = {"rank": "r", "alpha": "lora_alpha", "dropout": "lora_dropout", "targets": "target_modules"}


def suggest_field(name: str, names: Sequence[str]) -> str:
    """Return ". Did you mean '<field>'?" for a keyword that is no field; "" if no field resembles it.

    A synonym counts first ("rank" for `r`), if `names` has its field, then a field that ends in "_<name>", then the
    most similar name.
    """
    ends = [field for field in names if field.endswith(f"_{name}")]
    similar = [SYNONYMS[name]] if SYNONYMS.get(name) in names else ends or get_close_matches(name, names, 1)
    return f". Did you mean '{similar[0]}'?" if similar else ""


def make_type_error(peft_type: object, names: Sequence[str]) -> ConfigError:
    """Return the error for an unknown `peft_type`, with all `names` of methods, after the most similar if there is
    one. Upper and lower case count as equal.
    """
    similar = suggest_field(str(peft_type).upper(), names)
    return ConfigError(f"Unknown peft_type {peft_type!r}{similar or '.'} Known ones: {', '.join(names)}.")


class TaskType(str, Enum):
    """The task that a model is trained for; it selects the PeftModel class."""

    SEQ_CLS = "SEQ_CLS"  # text classification
    SEQ_2_SEQ_LM = "SEQ_2_SEQ_LM"  # encoder-decoder language model
    CAUSAL_LM = "CAUSAL_LM"  # decoder-only language model
    TOKEN_CLS = "TOKEN_CLS"  # token classification
    QUESTION_ANS = "QUESTION_ANS"  # extractive question answering
    FEATURE_EXTRACTION = "FEATURE_EXTRACTION"  # hidden states as embeddings


@dataclass(kw_only=True)
class PeftConfig:
    """The fields that the config of every adapter has; each method adds its own.

    Raises:
        ConfigTypeError: a field has a value of the wrong type.
        ConfigError: a field has a value outside its range.
    """

    task_type: str | TaskType | None = None
    peft_type: Any = None  # a PeftType
    auto_mapping: dict[str, object] | None = None  # class and library of the base model, where there is no task type
    peft_version: str | None = None
    base_model_name_or_path: str | None = None
    revision: str | None = None  # revision of the base model
    inference_mode: bool = False

    # methods/__init__.py fills in both: peft_type → config class, and the enum PeftType
    resolve: ClassVar[Callable[[str], type[PeftConfig]]]
    peft_types: ClassVar[type[Enum]]
    is_prompt_learning: ClassVar[bool] = False
    is_adaption_prompt: ClassVar[bool] = False
    patterns: ClassVar[dict[str, str]] = {}  # field with overrides by layer path → field that they override
    runtime_fields: ClassVar[tuple[str, ...]] = ()  # fields that no file holds
    beyond: ClassVar[frozenset[str]] = frozenset()  # fields that PEFT lacks: files hold them unless they are defaults
    load_options: ClassVar[frozenset[str]] = frozenset()  # options of a load that `take_load_options` knows
    results: ClassVar[tuple[str, ...]] = ()  # fields that training writes: a load into an adapter takes them over
    counters: ClassVar[tuple[str, ...]] = ()  # numbers that are no sizes: seeds, and steps of training

    if not TYPE_CHECKING:  # type checkers read the fields

        def __new__(cls, *_: object, **values: object) -> PeftConfig:
            """Make a config without setting fields.

            Raises ConfigTypeError for a keyword that is no field, with a similar field. A class with a hand-written
            `__init__` is not checked.
            """
            owner = next(base for base in cls.__mro__ if "__init__" in vars(base))
            is_dataclass = "__dataclass_fields__" in vars(owner)  # an __init__ written by hand may take more
            for name in values.keys() - cls.__dataclass_fields__.keys() if is_dataclass else ():
                raise ConfigTypeError(
                    f"{cls.__name__}.__init__() got an unexpected keyword argument '{name}'"
                    + suggest_field(name, [f.name for f in fields(cls) if f.init])
                )
            return super().__new__(cls)

    def __post_init__(self) -> None:
        """Check the fields and convert them: `validate`, then `peft_type` and `task_type` to members of their enums.

        A missing `peft_version` becomes `FORMAT_VERSION`. A class with a fixed `peft_type` keeps it, and warns if
        another was passed. Raises ConfigError for an unknown task type or `peft_type`, and the errors of `validate`.
        """
        if self.peft_version is None:
            self.peft_version = FORMAT_VERSION
        validate(self)
        default = type(self).__dataclass_fields__["peft_type"].default
        if default is not None and self.peft_type not in (default, None):
            warn(f"`peft_type` of a {type(self).__name__} is {default}: {self.peft_type!r} is ignored.", PeftWarning)
        if default is not None or self.peft_type is not None:
            try:
                self.peft_type = self.peft_types(default or self.peft_type)
            except ValueError:
                raise make_type_error(self.peft_type, [*self.peft_types.__members__]) from None
        if self.task_type is not None:
            names = [t.value for t in TaskType]
            if self.task_type not in names:
                raise ConfigError(
                    f"Invalid task type: '{self.task_type}'. "
                    f"Must be one of the following task types: {', '.join(names)}."
                )
            self.task_type = TaskType(self.task_type)

    def __setattr__(self, name: str, value: object) -> None:
        """Set a field. `peft_type` as text becomes the member of the enum; unknown text is set as it is."""
        if name == "peft_type" and isinstance(value, str):
            with suppress(ValueError):  # others refuse an unknown one
                value = self.peft_types(value)
        super().__setattr__(name, value)

    # one layer's view

    def at(self: C, key: str) -> C:
        """Return the config for the layer with path `key`: a shallow copy with the overrides of `patterns`, or this
        config itself if no pattern matches.

        Of each pattern field (`rank_pattern`) the first pattern that matches the path counts. An invalid pattern raises
        ConfigError.
        """
        changes = {}
        for pattern_field, name in self.patterns.items():
            for pattern, value in (getattr(self, pattern_field) or {}).items():
                if self.reaches(pattern, key, pattern_field):
                    changes[name] = value
                    break
        if not changes:
            return self
        config = copy.copy(self)
        for name, value in changes.items():
            setattr(config, name, value)
        return config

    def reaches(self, text: str, key: str, field: str) -> bool:
        """Return True if the regular expression `text`, a key of `field`, matches the end of layer path `key`, from the
        path's start or after a dot.

        Raises ConfigError for an invalid or slow pattern.
        """
        return compile_ending(text, field).match(key) is not None

    # dicts and files

    def to_dict(self) -> Json:
        """Return a dict with deep copies of the fields; nested dataclasses become dicts.

        `runtime_fields` are left out, and so are fields in `beyond` (unknown to PEFT) that have their default. Sets and
        enums stay as they are; a config made of the dict is equal.
        """
        left_out = {k for k in self.beyond if getattr(self, k) == type(self).__dataclass_fields__[k].default}
        return {k: v for k, v in asdict(self).items() if k not in left_out and k not in self.runtime_fields}

    def to_file_dict(self) -> Json:
        """Return the fields of `to_dict` for adapter_config.json: sets as sorted lists, enums as their values."""
        return {k: to_json_value(v) for k, v in self.to_dict().items()}

    def save_pretrained(
        self, save_directory: str | os.PathLike[str], auto_mapping_dict: dict[str, object] | None = None, **_: object
    ) -> None:
        """Write adapter_config.json into a folder, replacing an old one whole; make the folder if there is none.

        Other keywords are ignored.

        Args:
            auto_mapping_dict: written as the field `auto_mapping`, if not None.

        Raises:
            AssertionError: `save_directory` is a file.
        """
        if os.path.isfile(save_directory):
            raise AssertionError(f"Provided path ({save_directory}) should be a directory, not a file")
        os.makedirs(save_directory, exist_ok=True)
        replace_file(os.path.join(save_directory, CONFIG_NAME), self.to_json(auto_mapping_dict))

    def to_json(self, auto_mapping_dict: dict[str, object] | None = None) -> str:
        """Return the text of adapter_config.json (`to_file_dict`), with sorted keys and an indentation of 2.

        `auto_mapping_dict`, if not None, replaces `auto_mapping`.
        """
        values = self.to_file_dict()
        if auto_mapping_dict is not None:
            values["auto_mapping"] = auto_mapping_dict
        return json.dumps(values, indent=2, sort_keys=True)

    def push_to_hub(self, repo_id: str, **kwargs: object) -> object:
        """Save the config to a temporary folder and upload that to the hub; return the hub's answer.

        Raises HubError.
        """
        from graft.config.hub import push

        return push(self.save_pretrained, repo_id, **kwargs)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: object
    ) -> PeftConfig:
        """Read adapter_config.json from a folder or a hub repository, and return a config of the class that its
        peft_type names.

        If a save was cut short, the copy of the config in the weights file counts. Keys that the class does not know
        are left out with a warning. Values in the file override those in `kwargs`, which also has the arguments for the
        hub. Last, the config's `note_source` is called with folder, subfolder and hub arguments.

        Raises:
            CheckpointError: there is no such file, or it is not valid JSON.
            HubError: the hub cannot be reached, or does not give the file.
            ConfigError: its peft_type is unknown, or another field has a value that is not allowed.
            TypeError: the file has no peft_type, and fields that this class does not know.
        """
        hub = select_hub_keywords(kwargs)
        file = ConfigFile(pretrained_model_name_or_path, subfolder, **hub)
        loaded = file.choose_fields(find_weights(file.folder))
        known = {f.name for f in fields(PeftConfig)}
        if loaded.get("peft_type") is None and not set(loaded) <= {f.name for f in fields(cls)} | known:
            raise TypeError(
                f"The {cls.__name__} config that is trying to be loaded is missing required keys: {{'peft_type'}}. "
                f"{file.path} is no adapter's, such as the config of a base model, or damaged."
            )
        config = cls.from_file({k: v for k, v in kwargs.items() if k not in hub} | loaded, file.path)
        config.note_source(pretrained_model_name_or_path, subfolder, **hub)
        return config

    def take_load_options(self, options: dict[str, object]) -> None:
        """Do nothing: a hook for subclasses, called with the options of a load that `load_options` names."""

    def note_source(self, where: str, subfolder: str | None = None, **hub: object) -> None:
        """Do nothing: a hook for subclasses that must know where the config was read, such as X-LoRA's."""

    @classmethod
    def from_file(cls, values: dict[str, object], path: str) -> PeftConfig:
        """Return a config of the values read from the file `path`, of the class that their `peft_type` names; of this
        class without that key.

        `check_kwargs` of that class may change the values. Unknown keys are dropped with a warning. Errors of graft
        keep their class and end with the path.
        """
        try:
            target = cls.find_class(values)
            return target.from_known_fields(target.check_kwargs(**values))
        except PeftError as e:
            raise type(e)(f"{e} See {path}.") from e

    @classmethod
    def from_peft_type(cls, **kwargs: object) -> PeftConfig:
        """Return a config of the class that the keyword `peft_type` names, or of this class without it.

        Unknown keywords are dropped with a warning; `check_kwargs` is not called.
        """
        return cls.find_class(kwargs).from_known_fields(kwargs)

    @classmethod
    def find_class(cls, values: dict[str, object]) -> type[PeftConfig]:
        """Return the config class that `values["peft_type"]` names; this class if it is missing or None.

        Raises:
            ConfigTypeError: `peft_type` is no text.
            ConfigError: no method has that name.
        """
        kind = values.get("peft_type")
        if kind is not None and not isinstance(kind, str):
            raise ConfigTypeError(f"peft_type must be the name of a method, got {describe_value(kind)}.")
        return cls if kind is None else PeftConfig.resolve(kind)

    @classmethod
    def check_kwargs(cls, **kwargs: object) -> Json:
        """Return the values of a file unchanged: a hook.

        Subclasses check or change them before they become a config.
        """
        return kwargs

    @classmethod
    def from_known_fields(cls, values: Json) -> PeftConfig:
        """Return a config of those values that are fields of this class.

        Other keys are dropped with one warning, which names similar fields or suggests a newer version.
        `runtime_fields` are dropped with a warning each. Raises the constructor's errors for values that do not fit.
        """
        known = {f.name for f in fields(cls)}
        for name in cls.runtime_fields:
            if name in values:
                warn(f"'{name}' describes a machine, not an adapter: the stored value is ignored.")
        unknown = sorted(set(values) - known)
        if unknown:
            meant = suggest_names(unknown, known)
            warn(
                f"Unexpected keyword arguments {unknown} for class {cls.__name__}, these are ignored. "
                + (f"Did you mean {meant}? If not, the" if meant else "This probably means that the")
                + " file was written by a newer version, which knows more settings."
            )
        return cls(**{k: v for k, v in values.items() if k in known and k not in cls.runtime_fields})

    @classmethod
    def from_json_file(cls, path_json_file: str, **_: object) -> Json:
        """Return the JSON object in a file without the key "runtime_config", which describes a machine.

        Other arguments are ignored. Raises CheckpointError for invalid JSON or another JSON value.
        """
        return {k: v for k, v in read_object(path_json_file).items() if k not in MACHINE}


SAVE, READ = PeftConfig.save_pretrained, PeftConfig.from_pretrained.__func__  # type: ignore[attr-defined]


def make_files(config: PeftConfig) -> dict[str, bytes]:
    """Return the files of a config, {name: bytes}: adapter_config.json alone, or all files that an overridden
    `save_pretrained` writes.

    An override is called with a temporary folder and the config's `auto_mapping`; the folder is read and deleted.

    Raises:
        CheckpointError: the override fails with any error, writes no valid adapter_config.json, or writes a folder, a
            link or a file with the name of the weights.
    """
    if getattr(config.save_pretrained, "__func__", None) is SAVE:
        return {CONFIG_NAME: config.to_json().encode()}
    name = f"{type(config).__qualname__}.save_pretrained()"
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        try:
            config.save_pretrained(folder, auto_mapping_dict=config.auto_mapping)
            read_object(os.path.join(folder, CONFIG_NAME))
            files = {}
            for of in os.listdir(folder):
                path = os.path.join(folder, of)
                if of in (SAFETENSORS, TORCH) or os.path.islink(path) or not os.path.isfile(path):
                    raise CheckpointError(f"It writes '{of}'. Only files of other names may be next to the weights.")
                with open(path, "rb") as f:
                    files[of] = f.read()
        except Exception as e:
            raise CheckpointError(f"{name} failed, and nothing was saved: {type(e).__name__}: {e}") from e
    return files


def make_config(fields: dict[str, object], path: str, where: str, subfolder: str | None, **hub: object) -> PeftConfig:
    """Return the config of a saved adapter from the fields of its file.

    If a client replaced `from_pretrained` of the class, its result is returned instead: it is called with `where`,
    `subfolder` and `hub`. Else `note_source` is called with these.

    Args:
        path: of the file that has the fields, for errors.

    Raises:
        ConfigError: the fields name no method, or one that is not known.
        ConfigTypeError: the replaced `from_pretrained` returns no config.
    """
    try:
        target = PeftConfig.find_class(fields)
    except PeftError as e:
        raise type(e)(f"{e} See {path}.") from e
    if target is PeftConfig:
        raise ConfigError(
            f"{path} names no peft_type: it is no adapter's, such as the config of a base model, or damaged. Name the "
            "folder of an adapter, pass from_pretrained(…, config=…), or call graft.load_adapter(model, …) for "
            "adapters of other libraries."
        )
    if getattr(target.from_pretrained, "__func__", None) is READ:
        config = PeftConfig.from_file(fields, path)
        config.note_source(where, subfolder, **hub)
        return config
    result = target.from_pretrained(where, subfolder=subfolder, **hub)
    if not isinstance(result, PeftConfig):
        raise ConfigTypeError(
            f"{target.__name__}.from_pretrained() returned {describe_value(result)}, which is no config. "
            "Call it on the class of a method's config."
        )
    return result


def suggest_names(unknown: Iterable[str], known: Iterable[str]) -> str:
    """Return "'<known>' for '<unknown>', …" for each unknown name that resembles a known one; "" if none does (difflib,
    cutoff 0.8).
    """
    matches = [(name, get_close_matches(name, known, n=1, cutoff=0.8)) for name in unknown]
    return ", ".join(f"'{close[0]}' for '{name}'" for name, close in matches if close)


def to_json_value(value: object) -> object:
    """Return `value` as JSON can hold it: enums as values, sets as lists sorted by their items' text, tuples as lists.

    Lists, tuples and values of dicts are converted at any depth; items of sets and keys are not. Other values are
    returned unchanged.
    """
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, (set, frozenset)):
        return sorted(value, key=str)
    if isinstance(value, (list, tuple)):
        return [to_json_value(v) for v in value]
    if isinstance(value, dict):
        return {k: to_json_value(v) for k, v in value.items()}
    return value


# types of fields


@cache
def type_hints(cls: type) -> dict[str, object]:
    """Return the annotations of a class by field, without the bounds of `Annotated`. Cached."""
    return typing.get_type_hints(cls)


def validate(config: DataclassInstance) -> None:
    """Check all fields of a dataclass.

    A field that is None, though its annotation is Any or does not allow None, gets its default first; a factory is
    called for it. One without a default, or with the default None, stays None. Paths become text.

    Raises:
        ConfigTypeError: a value is not of the field's type.
        ConfigError: a value is outside its bound, or a number is too large or not finite.
    """
    hints = type_hints(type(config))
    for f in fields(config):
        value, hint = getattr(config, f.name), hints[f.name]
        if value is None and f.default is not None and (hint is Any or not is_typed(None, hint)):
            default = f.default if f.default_factory is MISSING else f.default_factory()
            value = None if default is MISSING else default  # files contain many `null`
        elif isinstance(value, os.PathLike):
            value = os.fspath(value)
        if value is not getattr(config, f.name):
            setattr(config, f.name, value)
        check_type(config, f, hint)
    check_numbers(config, hints)
    check_bounds(config)


def check_type(config: DataclassInstance, f: Field[Any], hint: object) -> None:
    """Raise ConfigTypeError if the value of field `f` in a dataclass is not of the type `hint`.

    A value that is the default object itself passes. The text has the field, the allowed types, the value and its type.
    """
    value = getattr(config, f.name)
    if value is not f.default and not is_typed(value, hint):
        allowed = re.sub(r"^Annotated\[(.*), \w+(\(.*\))?\]$", r"\1", str(f.type)).replace("NoneType", "None")
        raise ConfigTypeError(
            f"{type(config).__name__}.{f.name} must be {allowed}, got {describe_value(value)} of type "
            f"{type(value).__name__}."
        )


def describe_value(value: object) -> str:
    """Return a shortened `repr` of a value for an error; "a number of thousands of digits" if Python refuses to write
    it.
    """
    try:
        return shorten_text(repr(value))
    except ValueError:  # a number of more digits than Python writes
        return "a number of thousands of digits"


def is_typed(value: object, hint: Any) -> bool:
    """Return True if `value`, and each item in it, has the type of an annotation.

    Any allows all; of a union one type must fit, and a Literal needs one of its values. An int passes for a float, a
    bool passes for neither. A list, tuple, set or frozenset passes for a list or a set. A list or tuple passes for a
    tuple of that length. Keys and values of a dict are checked, too. Any other hint is an isinstance check.
    """
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return True
    if origin in (typing.Union, types.UnionType):
        return any(is_typed(value, a) for a in args)
    if origin is typing.Literal:
        return value in args
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if origin in (list, set):  # a list is fine for a set, and a set for a list
        return isinstance(value, (list, tuple, set, frozenset)) and all(is_typed(v, args[0]) for v in value)
    if origin is tuple:
        return isinstance(value, (list, tuple)) and len(value) == len(args) and all(map(is_typed, value, args))
    if origin is dict:
        return isinstance(value, dict) and all(is_typed(k, args[0]) and is_typed(v, args[1]) for k, v in value.items())
    return isinstance(value, hint)


TASK_HEADS: dict[str, list[str]] = {  # new modules of a task's model: they train, and files hold them
    "SEQ_CLS": ["classifier", "score"],
    "TOKEN_CLS": ["classifier", "score"],
    "QUESTION_ANS": ["qa_outputs"],
}


def add_task_heads(config: Any) -> None:
    """Append the default head names of the config's `task_type` to its `modules_to_save`, without duplicates, in a new
    list.

    They are "classifier" and "score" for SEQ_CLS and TOKEN_CLS, "qa_outputs" for QUESTION_ANS. None counts as an empty
    list.

    Also stores them as `_default_heads`, so that no warning comes if the model lacks them. A config without the field
    `modules_to_save` only gets a PeftWarning. A task without default heads changes nothing.
    """
    if config.task_type in TASK_HEADS and not hasattr(config, "modules_to_save"):
        warn(
            f"{config.peft_type.value} has no modules_to_save: the head of the {config.task_type.value} model stays as "
            "it is, and a fresh one stays random.",
            PeftWarning,
        )
    elif config.task_type in TASK_HEADS:
        names = list(config.modules_to_save or [])
        config.modules_to_save = names + [n for n in TASK_HEADS[config.task_type] if n not in names]
        config._default_heads = TASK_HEADS[config.task_type]  # no model has all of them: no warning
