# SPDX-License-Identifier: Apache-2.0
"""transformers' own way with adapters: the model stays what it is, and has `add_adapter`, `load_adapter` and so on."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.clients import tiny
from tests.clients.pair import scenario


def lora(r: int = 4, **options):
    from peft import LoraConfig

    return LoraConfig(**{**dict(r=r, lora_alpha=8, target_modules=["q_proj", "v_proj"]), **options})


def logits(model):
    import torch

    with torch.no_grad():
        return model.eval()(input_ids=torch.arange(4, 14)[None]).logits


def state(model, name: str) -> dict:
    return {k: t.clone() for k, t in model.get_adapter_state_dict(name).items()}


def saved(folder: Path, name: str, seed: int, **options) -> str:
    """Save an adapter of random values, and return the folder."""
    model = tiny.llama()
    model.add_adapter(lora(**options))
    tiny.randomized(model, seed).save_pretrained(folder / name)
    return str(folder / name)


def reported(report) -> dict:
    """What a loading info says of keys."""
    names = ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")
    return {name: sorted(str(v) for v in getattr(report, name)) for name in names}


@scenario
def test_life(folder):
    """Add two, train one, switch, disable, delete, save, load."""
    import torch

    model = tiny.llama()
    found = {"base": logits(model)}
    model.add_adapter(lora(), "one")
    model.add_adapter(lora(2, target_modules=["o_proj"]), "two")
    found["active"] = [str(a) for a in model.active_adapters()]
    found["trains"] = sorted(tiny.adapter(model))
    tiny.randomized(model)
    model.train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    ids = torch.arange(4, 14)[None]
    losses = []
    for _ in range(3):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    found["losses"] = losses
    for name in ("one", "two"):
        model.set_adapter(name)
        found[name] = {"logits": logits(model), "trains": sorted(tiny.adapter(model)), "state": state(model, name)}
    model.disable_adapters()
    found["disabled"] = logits(model)
    torch.testing.assert_close(found["disabled"], found["base"])
    model.enable_adapters()
    model.set_adapter("one")
    model.save_pretrained(folder / "one")
    found["files"] = tiny.held(folder / "one")
    model.delete_adapter("two")
    found["left"] = {"config": sorted(model.peft_config), "logits": logits(model)}
    fresh = tiny.llama()
    found["report"] = reported(fresh.load_adapter(str(folder / "one"), "again"))
    found["loaded"] = {"logits": logits(fresh), "trains": sorted(tiny.adapter(fresh))}
    torch.testing.assert_close(found["loaded"]["logits"], found["left"]["logits"])
    return found


@scenario
def test_both_active(folder):
    model = tiny.llama()
    for i, name in enumerate(("one", "two")):
        model.load_adapter(saved(folder, name, i, target_modules=["q_proj", "down_proj"][: i + 1]), name)
    found = {"after loading": logits(model), "active": [str(a) for a in model.active_adapters()]}
    model.set_adapter(["one", "two"])
    found["both"] = logits(model)
    model.set_adapter("one")
    found["one"] = logits(model)
    return found


@scenario
def test_from_pretrained(folder):
    """`from_pretrained` on the folder of an adapter finds the base model, and the adapter on it."""
    import transformers

    tiny.llama().save_pretrained(folder / "base")
    base = transformers.AutoModelForCausalLM.from_pretrained(folder / "base")
    base.add_adapter(lora(base_model_name_or_path=str(folder / "base"), modules_to_save=["lm_head"]))
    tiny.randomized(base).save_pretrained(folder / "adapter")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "adapter")
    import torch

    torch.testing.assert_close(logits(model), logits(base))
    config = tiny.held(folder / "adapter")
    config["adapter_config.json"].pop("base_model_name_or_path")  # each side has its own folder
    pipe = transformers.pipeline("text-generation", model=model, tokenizer=tiny.tokenizer())
    text = pipe("one two three", max_new_tokens=5, do_sample=False)[0]["generated_text"]
    return {"logits": logits(model), "files": config, "text": text, "trains": sorted(tiny.adapter(model))}


@scenario
def test_keys_that_do_not_fit(folder):
    """What `load_adapter` reports of tensors that are missing, left over or of another size."""
    from safetensors.torch import load_file

    path = Path(saved(folder, "one", 0)) / "adapter_model.safetensors"
    tensors = load_file(path)
    first = min(tensors)
    less = {k: t for k, t in tensors.items() if k != first}
    more = {**tensors, first.replace("lora_A", "lora_C"): tensors[first]}
    found = {}
    for name, state in {"missing": less, "left over": more}.items():
        model = tiny.llama()
        report = model.load_adapter(peft_config=lora(), adapter_state_dict=state, adapter_name="it")
        found[name] = {**reported(report), "logits": logits(model) if name != "missing" else 0}
    return found


@scenario
def test_hotswap(folder):
    """Adapters of one rank take the place of one; for another rank transformers 5.24 says sizes do not fit."""
    import torch

    paths = [saved(folder, f"{i}", i, r=r) for i, r in enumerate([4, 4, 2])]
    model = tiny.llama()
    model.enable_peft_hotswap(target_rank=4)
    found, outputs = {}, []
    for i, path in enumerate(paths[:2]):
        found[f"report {i}"] = reported(model.load_adapter(path, "it"))
        outputs.append(logits(model))
        alone = tiny.llama()
        alone.load_adapter(path)
        torch.testing.assert_close(logits(alone), outputs[-1])
    assert not torch.allclose(*outputs)
    assert sorted(model.peft_config) == ["it"]
    with pytest.raises(RuntimeError) as error:
        model.load_adapter(paths[2], "it", hotswap=True)
    assert "ignore_mismatched_sizes" in str(error.value)
    return {**found, "outputs": outputs, "after the error": logits(model)}


@scenario
def test_hotswap_compiled(folder):
    """A compiled model is compiled once for all of them."""
    import torch
    from torch._dynamo.testing import CompileCounter

    paths = [saved(folder, f"{i}", i, r=r) for i, r in enumerate([4, 4])]
    model = tiny.llama()
    model.enable_peft_hotswap(target_rank=4)
    model.load_adapter(paths[0], "it")
    ids, count = torch.arange(4, 14)[None], CompileCounter()
    run = torch.compile(model.eval(), backend=count)
    outputs = []
    with torch.no_grad():
        outputs.append(run(input_ids=ids, use_cache=False).logits)
        compiled = count.frame_count
        model.load_adapter(paths[1], "it", hotswap=True)
        outputs.append(run(input_ids=ids, use_cache=False).logits)
    assert compiled
    assert count.frame_count == compiled, "the swap compiled anew"
    return {"outputs": outputs}


@scenario
def test_trainer(folder):
    """Trainer with a model that has an adapter added: checkpoints hold the adapter alone; `load_adapter` reads them."""
    import torch
    from datasets import Dataset
    from transformers import Trainer, TrainingArguments

    def make():
        model = tiny.llama()
        model.add_adapter(lora())
        return model

    rows = tiny.tokenizer()(tiny.sentences(16))["input_ids"]
    data = Dataset.from_dict({"input_ids": rows, "labels": rows})
    args = TrainingArguments(
        str(folder / "out"), max_steps=4, save_steps=2, logging_steps=1, learning_rate=5e-2, use_cpu=True,
        report_to="none", disable_tqdm=True,
    )  # fmt: skip
    trainer = Trainer(make(), args, train_dataset=data)
    trainer.train()
    fresh = tiny.llama()
    fresh.load_adapter(str(folder / "out/checkpoint-4"))
    torch.testing.assert_close(logits(fresh), logits(trainer.model))
    return {
        "logged": tiny.losses(trainer), "files": tiny.held(folder / "out"), "trains": tiny.adapter(trainer.model),
        "logits": logits(fresh),
    }  # fmt: skip


@scenario
def test_other_methods(folder):
    """Methods other than LoRA, added, saved and loaded."""
    import peft
    import torch

    configs = {
        "IA3Config": dict(feedforward_modules=[]),
        "LoHaConfig": dict(r=4, alpha=8),
        "LoKrConfig": dict(r=4),
        "OFTConfig": dict(r=0, oft_block_size=4),
        "BOFTConfig": dict(boft_block_size=4),
    }
    found = {}
    for name, options in configs.items():
        model = tiny.llama()
        model.add_adapter(getattr(peft, name)(target_modules=["q_proj", "v_proj"], **options))
        tiny.randomized(model).save_pretrained(folder / name)
        fresh = tiny.llama()
        report = fresh.load_adapter(str(folder / name))
        torch.testing.assert_close(logits(fresh), logits(model))
        found[name] = {"report": reported(report), "files": tiny.held(folder / name), "logits": logits(fresh)}
    return found


@scenario
def test_more_than_layers(folder):
    """Token rows, a head trained whole, patterns of ranks, saved and loaded by transformers."""
    import torch

    configs = {
        "tokens": dict(trainable_token_indices={"embed_tokens": [5, 6]}),
        "head": dict(modules_to_save=["lm_head"]),
        "ranks": dict(rank_pattern={"layers.1.*q_proj": 2}, alpha_pattern={"v_proj": 3}, use_rslora=True),
        "embedding": dict(target_modules=["embed_tokens", "q_proj"]),
        "some layers": dict(layers_to_transform=[1], bias="all"),
    }
    found = {}
    for name, options in configs.items():
        model = tiny.llama(attention_bias=True)
        model.add_adapter(lora(**options))
        tiny.randomized(model).save_pretrained(folder / name)
        fresh = tiny.llama(attention_bias=True)
        report = fresh.load_adapter(str(folder / name), adapter_name="other", is_trainable=True)
        found[name] = {
            "report": reported(report), "files": tiny.held(folder / name), "trains": tiny.adapter(fresh),
            "logits": [logits(model), logits(fresh)],
        }  # fmt: skip
        torch.testing.assert_close(logits(fresh), logits(model))
    return found


@scenario
def test_pipelines(folder):
    """Text pipelines take a PeftModel; heads for sequences, tokens and questions load by AutoPeftModel."""
    import peft
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    tiny.tokenizer().save_pretrained(folder / "base")
    tasks = {
        "SEQ_CLS": ("BertForSequenceClassification", "AutoPeftModelForSequenceClassification", "text-classification"),
        "TOKEN_CLS": ("BertForTokenClassification", "AutoPeftModelForTokenClassification", "token-classification"),
        "CAUSAL_LM": ("LlamaForCausalLM", "AutoPeftModelForCausalLM", "text-generation"),
    }
    TARGETS = {"Bert": ["query", "value"], "Llam": ["q_proj", "up_proj"]}
    found = {}
    for task, (cls, auto, kind) in tasks.items():
        make = tiny.llama if task == "CAUSAL_LM" else tiny.bert
        make(cls).save_pretrained(folder / "base")
        base = getattr(transformers, cls).from_pretrained("base")
        model = peft.get_peft_model(base, peft.LoraConfig(task_type=task, target_modules=TARGETS[cls[:4]]))
        tiny.randomized(model).save_pretrained(folder / task)
        loaded = getattr(peft, auto).from_pretrained(task).eval()
        torch.testing.assert_close(logits(loaded), logits(model))
        options = dict(max_new_tokens=4, do_sample=False) if task == "CAUSAL_LM" else {}
        pipe = transformers.pipeline(kind, model=loaded, tokenizer=tiny.tokenizer(), device="cpu")
        found[task] = [logits(loaded), tiny.held(folder / task), plain(pipe("one good two", **options))]
    return found


def plain(value):
    """numpy's numbers as Python's."""
    if isinstance(value, list):
        return [plain(v) for v in value]
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items()}
    return value.item() if hasattr(value, "item") else value


@scenario
def test_compiled_and_static_cache(folder):
    """`generate` with a static cache, beams and several adapters of a PeftModel."""
    import peft
    import torch

    model = peft.get_peft_model(tiny.llama(), lora(task_type="CAUSAL_LM"), "one")
    model.add_adapter("two", lora(2, task_type="CAUSAL_LM"))
    ids = torch.arange(4, 12).view(2, 4)
    found = {}
    for i, name in enumerate(("one", "two")):
        model.set_adapter(name)
        tiny.randomized(model, i).eval()
        usual = dict(input_ids=ids, max_new_tokens=6, do_sample=False)
        found[name] = [
            model.generate(**usual), model.generate(**usual, num_beams=3),
            model.generate(**usual, cache_implementation="static", disable_compile=True),
        ]  # fmt: skip
        with model.disable_adapter():
            found["base"] = model.generate(**usual)
    found["mixed"] = model.generate(**usual, adapter_names=["one", "two"])
    return found


@scenario
def test_dora(folder):
    """With PEFT 0.21.2, transformers 5.24 reports DoRA's magnitudes as missing; with graft it loads them."""
    import torch

    model = tiny.llama()
    model.add_adapter(lora(use_dora=True, target_modules="all-linear"))
    tiny.randomized(model).save_pretrained(folder / "dora")
    fresh = tiny.llama()
    report = reported(fresh.load_adapter(str(folder / "dora"), adapter_name="other"))
    if tiny.library() == "graft":
        torch.testing.assert_close(logits(fresh), logits(model))
        assert not any(report.values())
    else:
        assert report["missing_keys"]
    return {"logits": logits(model), "files": tiny.held(folder / "dora")}


@scenario
def test_experts_of_old_files(folder):
    """An adapter on experts that were a module each, before transformers 5, loaded onto stacks of experts."""
    import json

    import peft
    import torch
    import transformers
    from safetensors.torch import save_file

    def mixtral():
        torch.manual_seed(0)
        sizes = dict(num_key_value_heads=2, num_local_experts=3, num_experts_per_tok=2, max_position_embeddings=64)
        return transformers.MixtralForCausalLM(transformers.MixtralConfig(**tiny.SIZES, **sizes))

    g, tensors = torch.Generator().manual_seed(0), {}
    for layer in range(2):
        for expert in range(3):
            for part, (out, into) in {"w1": (32, 16), "w2": (16, 32), "w3": (32, 16)}.items():
                stem = f"base_model.model.model.layers.{layer}.block_sparse_moe.experts.{expert}.{part}"
                tensors[f"{stem}.lora_A.weight"] = torch.randn(2, into, generator=g)
                tensors[f"{stem}.lora_B.weight"] = torch.randn(out, 2, generator=g)
    (folder / "old").mkdir()
    save_file(tensors, folder / "old/adapter_model.safetensors")
    config = dict(peft_type="LORA", r=2, lora_alpha=4, target_modules=["w1", "w2", "w3"], task_type="CAUSAL_LM")
    (folder / "old/adapter_config.json").write_text(json.dumps(config))
    wrapped = peft.PeftModel.from_pretrained(mixtral(), folder / "old")
    own = mixtral()
    report = reported(own.load_adapter(str(folder / "old")))
    assert not torch.allclose(logits(wrapped), logits(mixtral()), atol=1e-2)
    torch.testing.assert_close(logits(own), logits(wrapped))
    return {"logits": logits(wrapped), "report": report, "names": sorted(n for n, _ in own.named_parameters())}
