# SPDX-License-Identifier: Apache-2.0
"""Ways to damage an adapter folder, or to make a malicious one. Each takes a random generator and a folder."""

from __future__ import annotations

import io
import json
import os
import pickle
import random
import zipfile
from collections.abc import Callable
from functools import cache
from typing import Any

import torch

from tests.trust.good import BIN, CONFIG, TENSORS, Folder, seeds

Damage = Callable[[random.Random, Folder], None]
DAMAGES: dict[str, tuple[int, Damage]] = {}  # by name: weight and function
MARK = "GRAFT_FUZZ_MARK"  # environment variable: a file that no code may write
PATHOLOGICAL = [
    "(a+)+$",
    "(.*)*x",
    "(([a-z])+.)+[A-Z]([a-z])+$",
    "(l|la|lay|a|y|e|r|s)+x",
    "((.*)(.*)(.*))*!",
    "(.*a){25}",
    "(?:.?){40}.{40}!",
    "(\\w*\\.?)*$!",
    "((a{1,99}){1,99}){1,99}",
]
INVALID = [
    "(",
    "[",
    "*",
    "a**",
    "(?P<n>a)(?P<n>b)",
    "\\",
    "(?<=a*)b",
    "a{9999999999999}",
    "(" * 3000 + ")" * 3000,
    "(?z)",
]
REGEX_FIELDS = (
    "target_modules",
    "exclude_modules",
    "rank_pattern",
    "alpha_pattern",
    "modules_to_save",
    "layers_pattern",
    "feedforward_modules",
)


def damage(weight: int = 1) -> Callable[[Damage], Damage]:
    def add(function: Damage) -> Damage:
        DAMAGES[function.__name__] = weight, function
        return function

    return add


def weights_in(folder: Folder) -> str:
    return TENSORS if TENSORS in folder else BIN


# configs


def edited(folder: Folder, change: Callable[[dict], Any]) -> None:
    config = json.loads(folder[CONFIG])
    change(config)
    folder[CONFIG] = json.dumps(config).encode()


def anything(rng: random.Random, depth: int = 0) -> Any:
    """Return a JSON value of any type and size."""
    numbers = [0, 1, 2, 3, -1, 7, 10**6, 2**31, 2**63, -(2**63), 10**30, 10**400, 0.0, -0.5, 1.5, 1e-300, 1e300]
    texts = [
        "",
        "a",
        "LORA",
        "fc1",
        ".*",
        "all-linear",
        "none",
        "all",
        "pissa",
        "pissa_niter_99999999",
        "olora",
        "\0",
        "..",
        "../../x",
        "/etc/passwd",
        "é" * 300,
        "a" * 5000,
        "orthogonal",
        "gaussian",
        "bat",
        "mini",
        "TEXT",
        "\ud800",
    ]
    simple = [rng.choice(numbers), rng.choice(texts), None, True, False]
    if depth > 3 or rng.random() < 0.7:
        return rng.choice(simple)
    inner = [anything(rng, depth + 1) for _ in range(rng.randrange(4))]
    return inner if rng.random() < 0.5 else {rng.choice(texts): v for v in inner}


@damage(8)
def any_field(rng, folder):
    def change(config):
        config[rng.choice(list(config))] = anything(rng)

    edited(folder, change)


@damage(4)
def number_field(rng, folder):
    def change(config):
        names = [k for k, v in config.items() if isinstance(v, (int, float)) and not isinstance(v, bool)]
        if names:
            config[rng.choice(names)] = rng.choice([0, -1, 1, 2, 5, 64, 10**5, 10**7, 10**9, 2**40, 0.5, 1e-9, 1e30])

    edited(folder, change)


@damage(2)
def null_number(rng, folder):
    def change(config):
        names = [k for k, v in config.items() if v is None]
        config[rng.choice(names)] = rng.choice([0, 1, -3, 10**6, 10**8, [10**6], {"a": 1}])

    edited(folder, change)


@damage(2)
def drop_field(rng, folder):
    edited(folder, lambda config: config.pop(rng.choice(list(config))))


@damage(2)
def other_method(rng, folder):
    other = json.loads(rng.choice(seeds()).files[CONFIG])
    keep = rng.random() < 0.5
    folder[CONFIG] = json.dumps(
        json.loads(folder[CONFIG]) | ({"peft_type": other["peft_type"]} if keep else other)
    ).encode()


@damage(1)
def unknown_method(rng, folder):
    edited(
        folder,
        lambda config: config.update(peft_type=rng.choice(["XLORA", "", 3, [], {}, None, True, ["LORA"], "lora"])),
    )


@damage(2)
def odd_number_text(rng, folder):
    text = folder[CONFIG].decode()
    name = rng.choice([k for k in json.loads(text)])
    value = rng.choice(["1e400", "-1e400", "NaN", "Infinity", "9" * 5000, "-" + "9" * 5000, "1" + "0" * 20, "1E-9999"])
    config = json.loads(text)
    config[name] = "@@"
    if rng.random() < 0.3:
        config[name] = {"a": ["@@"]}
    folder[CONFIG] = json.dumps(config).replace('"@@"', value).encode()


@damage(1)
def deep_nesting(rng, folder):
    depth = rng.choice([20, 40, 500, 2000, 100_000])
    left, right = rng.choice([("[", "]"), ('{"a":', "}")])
    inner = rng.choice(["1", '"x"', ""]) if left == "[" else "1"
    config = json.loads(folder[CONFIG])
    config[rng.choice(list(config))] = "@@"
    folder[CONFIG] = json.dumps(config).replace('"@@"', left * depth + inner + right * depth).encode()


@damage(1)
def odd_config_text(rng, folder):
    text = folder[CONFIG]
    folder[CONFIG] = rng.choice(
        [
            b"",
            b"[]",
            b"3",
            b"null",
            b'"x"',
            b"{}",
            b"{",
            text[: rng.randrange(len(text))],
            text + b"x",
            b"\xef\xbb\xbf" + text,
            b"\xff\xfe" + text,
            text.replace(b",", b",,", 1),
            text[:-2] + b', "r": 1, "r": 2}',
            text.decode().encode("utf-16"),
            b"{" * 100_000,
            b'{"a": "' + b"x" * 20_000_000 + b'"}',
            b"[" + b"1," * 200_000 + b"1]",
        ]
    )


@damage(2)
def flipped_config(rng, folder):
    text = bytearray(folder[CONFIG])
    for _ in range(rng.choice([1, 1, 1, 2, 8])):
        text[rng.randrange(len(text))] ^= 1 << rng.randrange(8)
    folder[CONFIG] = bytes(text)


@damage(4)
def regular_expression(rng, folder):
    pattern = rng.choice([*PATHOLOGICAL, *INVALID])

    def change(config):
        fields = [f for f in REGEX_FIELDS if f in config]
        if not fields:
            return
        field = rng.choice(fields)
        if field.endswith("_pattern") and field != "layers_pattern":
            config[field] = {pattern: 2}
        else:
            config[field] = pattern if field != "modules_to_save" and rng.random() < 0.8 else [pattern]
        if field == "layers_pattern":
            config["layers_to_transform"] = [0, 1]

    edited(folder, change)


@damage(1)
def many_entries(rng, folder):
    n = rng.choice([50, 3000, 50_000])

    def change(config):
        fields = [f for f in (*REGEX_FIELDS, "layers_to_transform", "token_indices", "cpt_token_ids") if f in config]
        if fields:
            field = rng.choice(fields)
            names = [f"name{i}.fc{i % 7}" for i in range(n)]
            config[field] = (
                list(range(n))
                if field in ("layers_to_transform", "token_indices", "cpt_token_ids")
                else dict.fromkeys(names, 3)
                if field.endswith("k_pattern") or field.startswith("alpha")
                else names
            )

    edited(folder, change)


@damage(2)
def known_option(rng, folder):
    options = [
        {"use_dora": True},
        {"use_rslora": True},
        {"bias": "all"},
        {"bias": "lora_only"},
        {"lora_bias": True},
        {"layer_replication": [[0, 10**6]]},
        {"layer_replication": [[0, 1]] * 5000},
        {"init_lora_weights": "pissa"},
        {"init_lora_weights": "olora"},
        {"init_lora_weights": "pissa_niter_100000"},
        {"kasa_config": {"beta": "x"}},
        {"kasa_config": {}},
        {"trainable_token_indices": [0] * 10**5},
        {"trainable_token_indices": {"emb": [0, 1]}},
        {"modules_to_save": ["head"]},
        {"modules_to_save": ["layers"]},
        {"modules_to_save": [""]},
        {"lora_alpha": 0},
        {"task_type": "SEQ_CLS"},
        {"fan_in_fan_out": True},
        {"save_only_topk_weights": True},
        {"save_projection": False},
        {"num_cayley_neumann_terms": 10**6},
        {"eps": -1.0},
        {"eps": 0.0, "coft": True},
        {"rank_pattern": {"fc1": 10**6}},
        {"alpha_pattern": {"fc1": 1e30}},
        {"auto_mapping": {}},
        {"auto_mapping": {"parent_library": "os"}},
        {"num_virtual_tokens": 10**7},
        {"num_layers": 10**5},
        {"token_dim": 10**6},
        {"num_tasks": 10**6},
        {"num_ranks": 10**6},
        {
            "prompt_tuning_init": "TEXT",
            "prompt_tuning_init_text": "x",
            "tokenizer_name_or_path": ".",
            "tokenizer_kwargs": {"trust_remote_code": True},
        },
        {"inference_mode": False},
        {"adapter_len": 10**7},
        {"r": 10**7},
        {"num_vectors": 10**7},
        {"vector_length": 1},
        {"topk": 3},
        {"projection_prng_key": 2**70},
        {"target_modules": []},
    ]
    edited(folder, lambda config: config.update(rng.choice(options)))


# safetensors


def unpacked(data: bytes) -> tuple[dict[str, Any], bytes]:
    n = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + n]), data[8 + n :]


def packed(header: dict[str, Any] | bytes, body: bytes) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + body


def safe(function: Damage) -> Damage:
    """Let a damage of safetensors pass by torch files."""

    def run(rng: random.Random, folder: Folder) -> None:
        if TENSORS in folder:
            function(rng, folder)
        else:
            flipped_weights(rng, folder)

    run.__name__ = function.__name__
    return run


@damage(4)
def flipped_weights(rng, folder):
    name = weights_in(folder)
    data = bytearray(folder[name])
    end = rng.choice([8, 300, len(data), len(data)])
    for _ in range(rng.choice([1, 1, 2, 30])):
        data[rng.randrange(min(end, len(data)))] ^= 1 << rng.randrange(8)
    folder[name] = bytes(data)


@damage(2)
def cut_weights(rng, folder):
    name = weights_in(folder)
    data = folder[name]
    folder[name] = rng.choice([data[: rng.randrange(len(data))], data + b"\0" * rng.randrange(1, 99), b"", b"\0" * 64])


@damage(6)
@safe
def edited_header(rng, folder):
    header, body = unpacked(folder[TENSORS])
    names = [n for n in header if n != "__metadata__"]
    name = rng.choice(names)
    entry = header[name]
    what = rng.randrange(9)
    if what == 0:
        entry["dtype"] = rng.choice(["F64", "F16", "BF16", "I32", "U8", "BOOL", "C64", "F8_E4M3", "F4", "I64", "X"])
    elif what == 1:
        shape = entry["shape"]
        entry["shape"] = rng.choice(
            [shape[::-1], [1, *shape], [*shape, 1], [], [0], [-1], [10**12], [2**62, 2], shape[:1]]
        )
    elif what == 2:
        entry["data_offsets"] = [rng.choice([0, -1, 10**15, len(body)]), rng.choice([0, 4, len(body), 2**63])]
    elif what == 3:
        header[
            rng.choice(["", "x", name + ".x", "base_model.model." + name, name.replace("base_model.", ""), "\0"])
        ] = header.pop(name)
    elif what == 4:
        del header[name]
    elif what == 5:
        other = rng.choice(names)
        header[name], header[other] = header[other], header[name]
    elif what == 6:
        header["__metadata__"] = rng.choice(
            [{}, {"format": "tf"}, {"a": 1}, [], None, {"format": "pt", "x": "y" * 10**5}]
        )
    elif what == 7:
        entry[rng.choice(list(entry))] = anything(rng)
    else:
        header[rng.choice(["", "extra", "base_model.model.head.weight", "base_model.model.lin0.base_layer.weight"])] = {
            "dtype": "F32",
            "shape": [0],
            "data_offsets": [0, 0],
        }
    folder[TENSORS] = packed(header, body)


@damage(4)
@safe
def odd_note(rng, folder):
    header, body = unpacked(folder[TENSORS])
    notes = [json.dumps(anything(rng)) for _ in range(3)]
    note = json.loads(header["__metadata__"].get("graft_base", "{}"))
    if note:
        note[rng.choice(list(note))] = anything(rng)
    notes += [json.dumps(note), "{", "9" * 5000, '{"n": 1e400}', "[" * 5000, "NaN", ""]
    header["__metadata__"]["graft_base"] = rng.choice(notes)
    folder[TENSORS] = packed(header, body)


def retensored(folder: Folder, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    """Write other tensors, in the format that the folder has."""
    import safetensors.torch

    name = weights_in(folder)
    if name == TENSORS:
        header, _ = unpacked(folder[name])
        tensors = safetensors.torch.load(folder[name])
        change(tensors)
        tensors = {k: t.contiguous().clone() for k, t in tensors.items()}
        folder[name] = safetensors.torch.save(tensors, header.get("__metadata__"))
    else:
        tensors = torch.load(io.BytesIO(folder[name]), weights_only=True)
        change(tensors)
        folder[name] = saved(tensors)


def saved(what: Any, **options: Any) -> bytes:
    out = io.BytesIO()
    torch.save(what, out, **options)
    return out.getvalue()


@damage(5)
def other_tensors(rng, folder):
    def change(tensors):
        name = rng.choice(list(tensors))
        t = tensors[name]
        flat = t.clone().flatten()
        if flat.numel() and flat.is_floating_point():
            flat[rng.randrange(flat.numel())] = rng.choice([float("nan"), float("inf"), -float("inf")])
        tensors[name] = rng.choice(
            [
                flat.view(t.shape),
                flat.view(t.shape),
                t.long(),
                t.bool(),
                t.half(),
                t.double(),
                t.bfloat16(),
                t.T if t.dim() == 2 else t[:1],
                t[:-1],
                torch.cat([t, t]),
                torch.zeros(()),
                torch.zeros(0),
                t.to(torch.float8_e4m3fn),
                t * 1e30,
            ]
        )
        if rng.random() < 0.1:
            tensors[rng.choice(["", "x", name + "x"])] = torch.ones(2)

    retensored(folder, change)


@damage(2)
def missing_tensors(rng, folder):
    def change(tensors):
        for name in rng.sample(list(tensors), min(len(tensors), rng.choice([1, 1, 2, 99]))):
            del tensors[name]

    retensored(folder, change)


@damage(1)
def other_head(rng, folder):
    def change(tensors):
        for name in [n for n in tensors if "head" in n or "classifier" in n or n.endswith(".bias")]:
            if rng.random() < 0.6:
                t = tensors[name]
                tensors[name] = torch.randn(rng.choice([1, 4, 7, len(t)]), *t.shape[1:])

    retensored(folder, change)


# torch files


class Payload:
    """An object that writes the mark when it is unpickled."""

    def __reduce__(self):
        return os.system, (f'touch "${MARK}"',)


@damage(6)
def torch_file(rng, folder):
    import safetensors.torch

    name = weights_in(folder)
    if name == TENSORS:
        tensors = safetensors.torch.load(folder.pop(name))
    else:
        tensors = torch.load(io.BytesIO(folder.pop(name)), weights_only=True)
    key = rng.choice(list(tensors))
    t = tensors[key].float()
    meta = torch.empty(t.shape, device="meta")
    kinds: list[Any] = [
        t.to_sparse(),
        meta,
        t.to(torch.complex64),
        torch.quantize_per_tensor(t, 0.1, 0, torch.qint8),
        t.requires_grad_(),
        torch.nn.Parameter(t),
        t[:1].expand(t.shape) if t.dim() else t,
        t.long(),
        torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
        [t],
        None,
        3,
        "x",
        {"a": t},
        Payload(),
        t.double() * float("nan"),
        torch.ones(1).expand(10**6, 10**4),
        t.to(torch.float8_e5m2),
        torch.empty(10**6, 10**6, device="meta"),
        torch.sparse_coo_tensor(torch.zeros(2, 1).long(), torch.ones(1), (10**7, 10**7)),
    ]
    tensors[key] = rng.choice(kinds)
    whole: list[Any] = [tensors] * 8 + [
        [tensors],
        t,
        Payload(),
        {1: t},
        {"a": Payload()},
        None,
        {},
        tuple(tensors.items()),
    ]
    data = saved(rng.choice(whole), _use_new_zipfile_serialization=rng.random() < 0.8)
    if rng.random() < 0.15:
        data = rng.choice(
            [
                pickle.dumps(Payload()),
                pickle.dumps({"a": Payload()}),
                data[: len(data) // 2],
                b"PK\3\4" + b"\0" * 50,
                bomb(),
                b"\x80\x02" + b"(" * 10_000,
                b"\x80\x04\x8d" + (2**60).to_bytes(8, "little"),
            ]
        )
    folder[BIN] = data


@cache
def bomb() -> bytes:
    """Return a torch file, one of whose parts is 800 MB of zeros, compressed."""
    source = saved({"a": torch.zeros(4)})
    out = io.BytesIO()
    with (
        zipfile.ZipFile(io.BytesIO(source)) as old,
        zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as new,
    ):
        for info in old.infolist():
            with new.open(info.filename, "w") as part:
                if info.filename.endswith("data/0"):
                    for _ in range(100):
                        part.write(b"\0" * 8_000_000)
                else:
                    part.write(old.read(info))
    return out.getvalue()


# folders


@damage(2)
def missing_or_more_files(rng, folder):
    what = rng.randrange(5)
    if what == 0:
        del folder[rng.choice(list(folder))]
    elif what == 1:
        folder.clear()
    elif what == 2:
        folder[BIN] = pickle.dumps(Payload())
    elif what == 3:
        name = weights_in(folder)
        folder[name + "/"] = folder.pop(name)  # a folder in its place
    else:
        folder[CONFIG + "/"] = folder.pop(CONFIG)


@damage(2)
def foreign(rng, folder):
    """Take the weights, or all, of another adapter."""
    other = rng.choice(seeds()).files
    if rng.random() < 0.5:
        folder.pop(weights_in(folder))
        folder[weights_in(other)] = other[weights_in(other)]
    else:
        folder.clear()
        folder.update(other)


@damage(1)
def code(rng, folder):
    """Bring code along, and names for it."""
    folder["evil.py"] = f'import os\nopen(os.environ["{MARK}"], "w")\nclass T: pass\n'.encode()
    mapping = {"AutoTokenizer": ["evil.T", None], "AutoModelForCausalLM": "evil.T", "AutoConfig": "evil.T"}
    folder["config.json"] = json.dumps({"model_type": "evil", "auto_map": mapping}).encode()
    folder["tokenizer_config.json"] = json.dumps({"tokenizer_class": "T", "auto_map": mapping}).encode()
    library = rng.choice(["evil", "os", "subprocess", "transformers", "transformers.evil", "", "..", 3, None])
    edited(
        folder,
        lambda config: config.update(
            auto_mapping=rng.choice(
                [{"parent_library": library, "base_model_class": "T"}, {"base_model_class": "system"}, {}, mapping]
            ),
            base_model_name_or_path=rng.choice([".", "evil", None]),
            auto_map=mapping,
            tokenizer_kwargs={"trust_remote_code": True},
        ),
    )


@damage(1)
def nothing(rng, folder):
    """Leave the folder as it is."""


def choose(rng: random.Random) -> list[str]:
    names, weights = list(DAMAGES), [w for w, _ in DAMAGES.values()]
    return rng.choices(names, weights, k=rng.choice([1, 1, 1, 1, 2, 3]))
