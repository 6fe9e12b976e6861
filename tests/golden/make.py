# SPDX-License-Identifier: Apache-2.0
"""Write golden files by the graft that is installed: `python -m tests.golden.make STATE [KIND…]`.

STATE names the commit whose source is on the path, and the folder next to this file that gets an archive of each kind.
Golden files stay as they are: a later state gets a folder of its own.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import warnings
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

import graft
from graft.core.errors import LossError
from graft.files.convert import convert_adapter_file
from graft.files.serving import list_servers
from graft.io.servers import LAYOUTS
from graft.methods import ROWS
from tests import families, models, pair
from tests.conformance.samples import CALLED, LAYERS, REFUSED, SAMPLES, STORES, Cell, find
from tests.golden.cases import BASES, CASES, HERE, OUTPUTS, PLAIN, Case, load, pack, run, sampled
from tests.golden.continued import CONTINUED
from tests.golden.verbs import VERBS, clear, document
from tests.models import seeded
from tests.prompts import samples as prompts
from tests.samples import first

STEP = 1 / 32  # values of parameters are multiples of it, which compress to a quarter
LORA: dict[str, Any] = dict(r=2, lora_alpha=3, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
LORA_IDS = dict(r=2, target_modules=["query", "value"])


class Golden:
    """The cases of an archive while they are made in a folder."""

    def __init__(self, root: Path):
        self.root, self.cases, self.outputs = root, dict[str, Any](), dict[str, Tensor]()

    def add_base(self, name: str, model: nn.Module, inputs: dict[str, Tensor]) -> str:
        """Save a base model and its inputs, unless they are there; return the name."""
        folder = self.root / BASES / name
        if not folder.exists():
            folder.mkdir(parents=True)
            if name in PLAIN:
                safetensors.torch.save_file(model.state_dict(), folder / "model.safetensors")
            else:
                model.save_pretrained(folder)
            safetensors.torch.save_file(inputs, folder / "inputs.safetensors")
        return name

    def add(
        self, name: str, base: str, adapters: Any = None, reader: str = "peft", same: Any = None, config: Any = None,
        **call: Any,
    ):  # fmt: skip
        """Record the output of adapters in files, which differs from the base's, and equals the model's if given.

        Args:
            adapters: name and path of each; None: "default" in the folder of the case.
            same: the model whose adapter was saved.
            config: changes of the base's config.
        """
        call = {k: {"tensor": v.tolist()} if isinstance(v, Tensor) else v for k, v in call.items()}
        case = Case(
            base=base, config=config or {}, adapters=adapters or [["default", name]], reader=reader, call=call,
            names=[], keys=[],
        )  # fmt: skip
        model = load(case, self.root)
        output = run(model, case, self.root)
        alone = run(load(case | {"adapters": []}, self.root), case | {"call": {}}, self.root)  # type: ignore[arg-type]
        assert output.shape != alone.shape or (output - alone).abs().max() > 1e-4, f"{name} changes nothing"
        if same is not None:
            torch.testing.assert_close(run(same, case, self.root), output, rtol=1e-4, atol=1e-4)
        case["names"] = sorted(model.state_dict())
        last = case["adapters"][-1][0]
        case["keys"] = sorted(graft.get_peft_model_state_dict(model, adapter_name=last))
        self.cases[name], self.outputs[name] = case, sampled(output)

    def save(self, name: str, model: Any, base: str, **options: Any) -> None:
        """Save a model's adapters as a case, and add it."""
        model.eval().save_pretrained(self.root / name, **options.pop("saving", {}))
        self.add(name, base, **{"same": model} | options)

    def finish(self) -> None:
        for card in self.root.rglob("README.md"):  # nobody reads one
            card.unlink()
        (self.root / CASES).write_text(json.dumps(self.cases, indent=1, sort_keys=True))
        if self.outputs:
            safetensors.torch.save_file(self.outputs, self.root / OUTPUTS)


@torch.no_grad()
def coarse(model: nn.Module, spread: float = 0.3) -> Any:
    """Move all that trains to multiples of `STEP` by values that depend on the names only; return the model."""
    for name, p in model.named_parameters():
        if p.requires_grad and p.is_floating_point():
            with seeded(sum(map(ord, name))):
                p.add_((torch.randn(p.shape) * spread).to(p))
            p.copy_((p / STEP).round() * STEP)
    return model


# adapters


ALWAYS = ("linear", "embedding", "conv2d", "norm")  # layers on which every sample is recorded that adapts them
SOMETIMES = ("Conv1D", "conv1d", "conv2d-grouped", "conv3d")  # one of these for each sample


def add_samples(golden: Golden) -> None:
    """Add every sample of the laws on layers of several types."""
    layers = {layer.name: layer for layer in LAYERS}
    for sample in (*SAMPLES, *CALLED):
        takes = [name for name in (*ALWAYS, *SOMETIMES) if find(REFUSED, sample, layers[name]) is None]
        rare = [name for name in takes if name in SOMETIMES]
        one = rare[zlib.crc32(str(sample).encode()) % len(rare) :][:1] if rare else []
        for layer in [layers[name] for name in takes if name in ALWAYS or name in one]:
            cell = Cell(sample, layer, STORES[0])
            base = golden.add_base(layer.name, cell.base(), {"x": cell.inputs()})
            call = sample.needs(cell.inputs()) if sample.needs else {}
            fresh = Cell(replace(sample, needs=None), layer, STORES[0]).fresh()
            golden.save(f"{sample}-{layer.name}", coarse(fresh), base, **call)


def base_of(golden: Golden, name: str) -> str:
    return golden.add_base(name, prompts.make(name), models.inputs(name))


def add_models(golden: Golden) -> None:
    """Add methods on whole models, where layers share tensors, and what a file holds next to factors."""
    from tests.samples import METHODS

    for method in METHODS:
        if any(s[0] == "plain" and s[1] == "mlp" for s in METHODS[method]):
            sample = first(method)
            golden.save(f"{method}-plain-mlp", coarse(pair.adapt(graft, sample)), base_of(golden, "mlp"))
    rows = {
        "LORA": "patterns-llama tokens-llama tokens_by_name-llama embed-llama lm_head-llama head_mixed-mlp "
        "tied_save-opt tied_target-opt replicated-llama bias_all-opt bias_lora_only-bert classify-bert-seq "
        "norms-bert-seq tasks-t5 default_targets-gpt2 dora_pissa-mlp pissa_niter-mlp regex-llama lora_bias-mlp "
        "save_by_ending-llama",
        "VERA": "plain-llama", "LOHA": "patterns-llama classify-bert-seq", "LOKR": "plain-llama", "OFT": "plain-llama",
        "IA3": "default_targets-llama classify-bert-seq", "LN_TUNING": "plain-llama", "TRAINABLE_TOKENS": "plain-llama",
        "VBLORA": "plain-llama", "UNILORA": "plain-llama",
    }  # fmt: skip
    for method, names in rows.items():
        for row in names.split():
            name, model = row.split("-", 1)
            if any((name, model) == s[:2] for s in METHODS[method]):
                base = base_of(golden, model)
                golden.save(f"{method}-{row}", coarse(pair.adapt(graft, first(method, model, name))), base)
    for sample in prompts.SAMPLES:
        more = {"task_ids": torch.tensor([2, 0, 1])} if sample.method == "MULTITASK_PROMPT_TUNING" else {}
        model = coarse(prompts.adapt(graft, sample))
        golden.save(f"{sample.method}-{sample.name}", model, base_of(golden, sample.model), **more)
    golden.save(
        "PREFIX_TUNING-t5", coarse(prompts.adapt(graft, prompts.on(prompts.first("PREFIX_TUNING"), "t5"))),
        base_of(golden, "t5"),
    )  # fmt: skip
    golden.save(
        "PROMPT_TUNING-bert-seq", coarse(prompts.adapt(graft, prompts.on(prompts.first("PROMPT_TUNING"), "bert-seq"))),
        base_of(golden, "bert-seq"),
    )  # fmt: skip


def made(config: Any, base: str = "llama", name: str = "default", **options: Any) -> Any:
    with seeded(1):
        return coarse(graft.get_peft_model(prompts.make(base), config, name, **options))


def add_others(golden: Golden) -> None:
    """Add methods on blocks and attentions, experts of adapters, stacks of experts, and forms of files."""
    llama = base_of(golden, "llama")
    causal = {"task_type": "CAUSAL_LM"}
    alone = {
        "ADAPTION_PROMPT": graft.AdaptionPromptConfig(adapter_len=3, adapter_layers=2, **causal),
        "MIXLORA": graft.MixLoraConfig(r=2, num_experts=3, init_weights=False),
        "SHADOW": graft.ShadowConfig(
            shadow_hidden_size=16, shadow_num_attention_heads=2, shadow_intermediate_size=20, **causal
        ),
        "SHADOW-own-words": graft.ShadowConfig(share_embeddings=False, init_weights=False, **causal),
        "BOTTLENECK-seq_bn": graft.BottleneckConfig.preset("seq_bn", reduction_factor=4),
        "BOTTLENECK-double": graft.BottleneckConfig.preset("double_seq_bn", reduction_factor=4),
        "REFT-blocks": graft.ReftConfig(r=2, dropout=0.0),
        "STEERING-blocks": graft.SteeringConfig(),
        "LORA-full-fingerprint": graft.LoraConfig(**LORA),
        "LORA-bin": graft.LoraConfig(**LORA),
        "LORA-half": graft.LoraConfig(**LORA),
    }
    saving: dict[str, dict[str, Any]] = {
        "LORA-full-fingerprint": {"fingerprint": "full"}, "LORA-bin": {"safe_serialization": False}
    }  # fmt: skip
    for name, config in alone.items():
        model = made(config)
        if name == "LORA-half":
            for key, p in model.named_parameters():
                p.data = p.data.bfloat16() if "lora_" in key else p.data
        # factors in half precision are loaded in that of the base
        golden.save(name, model, llama, saving=saving.get(name, {}), **{"same": None} if name == "LORA-half" else {})

    several = made(graft.LoraConfig(**LORA))
    with seeded(2):
        several.add_adapter("other", graft.LoraConfig(**{**LORA, "r": 3}))
    several.set_adapter("other")
    coarse(several)
    golden.save("LORA-several", several, llama, adapters=[["default", "LORA-several"], ["other", "LORA-several/other"]])

    allocated = made(
        graft.AdaLoraConfig(init_r=4, target_r=2, total_step=10, tinit=1, tfinal=2, target_modules=["q_proj", "v_proj"])
    )  # fmt: skip
    for step in range(1, 10):
        allocated.train()(**models.inputs("llama")).logits.square().mean().backward()
        allocated.base_model.update_and_allocate(step)
    golden.save("ADALORA-allocated", allocated, llama)

    for i in range(3):
        with seeded(i):
            made(graft.LoraConfig(**LORA)).save_pretrained(golden.root / "experts" / str(i))
    paths = {str(i): f"experts/{i}" for i in range(3)}
    base = prompts.make("llama")
    base.config.use_cache = False
    config = graft.XLoraConfig(hidden_size=24, xlora_depth=1, adapters=paths, **causal)
    with seeded(3):
        golden.save("XLORA", coarse(graft.get_peft_model(base, config)), llama, config={"use_cache": False})
    arrow = graft.ArrowConfig(top_k=2, rng_seed=7)
    routed = graft.create_arrow_model(prompts.make("llama"), [*paths.values()], arrow, []).eval()
    routed.save_pretrained(golden.root / "ARROW")
    parts = ["task_0", "task_1", "task_2", "arrow_router"]
    golden.add("ARROW", llama, [[part, f"ARROW/{part}"] for part in parts], same=routed)

    with seeded(3):
        fused = graft.get_peft_model(
            prompts.make("llama"), graft.BottleneckConfig.preset("seq_bn", reduction_factor=4), "a", mixed=True
        )
        fused.add_adapter("b", graft.BottleneckConfig.preset("seq_bn", reduction_factor=4))
        fused.add_adapter("both", graft.AdapterFusionConfig(adapters=["a", "b"]))
    fused.set_adapter(["a", "b"])
    coarse(fused)
    fused.set_adapter("both")
    coarse(fused, 0.1)
    fused.eval().save_pretrained(golden.root / "FUSION")
    names = [[name, f"FUSION/{name}"] for name in ("a", "b", "both")]
    golden.add("ADAPTER_FUSION", llama, names, "mixed", fused)

    mixed = graft.get_peft_model(prompts.make("llama"), graft.LoraConfig(**LORA), "a", mixed=True)
    mixed.add_adapter("b", graft.LoHaConfig(r=2, target_modules=["q_proj", "v_proj"]))
    mixed.set_adapter("b")
    coarse(mixed).eval().save_pretrained(golden.root / "MIXED")
    golden.add("MIXED-LOHA", llama, [[name, f"MIXED/{name}"] for name in ("a", "b")], "mixed", mixed)

    for family in ("qwen3_moe", "gpt_oss", "mixtral"):
        golden.add_base(family, families.base(family), {"input_ids": families.IDS})
    stacks = ["experts.gate_up_proj", "experts.down_proj"]
    for family, config in {
        "qwen3_moe": graft.LoraConfig(r=2, target_modules=["q_proj"], target_parameters=stacks),
        "gpt_oss": graft.LoraConfig(r=2, target_modules=["q_proj"], target_parameters=stacks),
        "mixtral": graft.LoHaConfig(r=2, target_modules=["q_proj"], target_parameters=stacks),
    }.items():
        with seeded(1):
            model = coarse(graft.get_peft_model(families.base(family), config))
        golden.save(f"experts-{family}", model, family)


def adapters(golden: Golden) -> None:
    """Adapters of all methods, heads, rows of tokens, changes of the base, stacks of experts."""
    add_samples(golden)
    add_models(golden)
    add_others(golden)
    missing = ROWS.keys() - {name.partition("-")[0] for name in golden.cases}
    assert not missing, f"no case has a file of {missing}"


WRITTEN = {  # adapter → the formats that can hold it
    "lora": "gguf torchtune litgpt mlx kohya", "dora": "torchtune mlx kohya", "patterns": "mlx kohya peft",
    "loha": "kohya", "lokr": "kohya", "reft": "pyreft", "hub": "adapterhub", "ia3": "adapterhub",
}  # fmt: skip
EXPORTED = "lora patterns pissa loha"  # for every server


def formats(golden: Golden) -> None:
    """Adapters in the formats of other libraries, and exported for servers."""
    llama, at = base_of(golden, "llama"), golden.root / BASES / "llama"
    targets = dict(target_modules=["q_proj", "v_proj", "down_proj"])
    configs = {
        "lora": graft.LoraConfig(r=2, lora_alpha=3, **targets),
        "dora": graft.LoraConfig(r=2, use_dora=True, **targets),
        "patterns": graft.LoraConfig(r=2, rank_pattern={"q_proj": 3}, alpha_pattern={"v_proj": 5}, **targets),
        "pissa": graft.LoraConfig(r=2, init_lora_weights="pissa", **targets),
        "loha": graft.LoHaConfig(r=2, alpha=3, **targets),
        "lokr": graft.LoKrConfig(r=2, alpha=3, **targets),
        "reft": graft.ReftConfig(r=2, prefix_positions=2, suffix_positions=1, dropout=0.0),
        "hub": graft.LoraConfig(r=2, lora_alpha=2, target_modules=["q_proj", "v_proj"]),
        "ia3": graft.IA3Config(target_modules=["k_proj", "v_proj"], feedforward_modules=[]),
    }
    adapted = {name: made(config) for name, config in configs.items()}
    for name, model in adapted.items():
        model.eval().save_pretrained(golden.root / "adapters" / name)
        for to in WRITTEN.get(name, "").split():
            done = convert_adapter_file(golden.root / "adapters" / name, to, golden.root / to / name, at)
            golden.add(f"{to}-{name}", llama, [["default", os.path.relpath(done.path)]], "foreign", same=model)
    of_mlp = made(graft.LoraConfig(r=2, lora_alpha=3, target_modules=["fc1", "fc2"]), base_of(golden, "mlp"))
    of_mlp.save_pretrained(golden.root / "adapters" / "mlp")
    part = golden.root / "transformer"  # of a pipeline, as diffusers saves one
    shutil.copytree(golden.root / BASES / "mlp", part)
    (part / "config.json").write_text(json.dumps({"_class_name": "SmallTransformer2DModel"}))
    done = convert_adapter_file(golden.root / "adapters" / "mlp", "diffusers", golden.root / "diffusers" / "mlp", part)
    golden.add("diffusers-mlp", "mlp", [["default", os.path.relpath(done.path)]], "foreign", same=of_mlp)
    for server in list_servers().keys() - {"diffusers"}:  # it serves pipelines only
        for name in EXPORTED.split():
            folder = golden.root / "exports" / server / name
            adapted[name].eval().save_pretrained(folder, for_server=server)
            (path,) = [folder] if (folder / "adapter_config.json").exists() else folder.iterdir()
            golden.add(f"{server}-{name}", llama, [["default", str(path)]], "foreign", same=adapted[name])
    for family in ("qwen3_moe", "gpt_oss"):
        golden.add_base(family, families.base(family), {"input_ids": families.IDS})
        stacks = ["experts.gate_up_proj", "experts.down_proj"]
        with seeded(1):
            config = graft.LoraConfig(r=2, target_modules=["q_proj"], target_parameters=stacks)
            model = coarse(graft.get_peft_model(families.base(family), config)).eval()
        for layout in LAYOUTS:
            path = golden.root / "layouts" / layout / family
            try:
                model.save_pretrained(path, layout=layout)
            except LossError:
                continue
            golden.add(f"{layout}-{family}", family, [["default", str(path)]], same=model)


def continued(golden: Golden) -> None:
    """State of trainings, runs, sweeps and merges that go on, and caches of starts that measure data."""
    for name in ("llama", "mlp"):
        base_of(golden, name)
    bases = golden.root / BASES
    for name, work in CONTINUED.items():
        work.begin(golden.root / name, bases)
        with tempfile.TemporaryDirectory() as folder:  # finishing changes files
            there = Path(shutil.copytree(golden.root / name, folder, dirs_exist_ok=True))
            golden.outputs[name], golden.cases[name] = work.finish(there, bases).detach().float(), {}


def verbs(golden: Golden) -> None:
    """Documents that verbs of the command print for programs, and the files that they ran on."""
    prompts.make("llama").save_pretrained("base")
    configs = {
        "a": graft.LoraConfig(**LORA), "b": graft.LoraConfig(**LORA | {"r": 3}),
        "dora": graft.LoraConfig(**LORA, use_dora=True), "loha": graft.LoHaConfig(r=2, target_modules=["q_proj"]),
        "broken": graft.LoraConfig(**LORA, use_rslora=True),
    }  # fmt: skip
    for name, config in configs.items():
        model = made(config)
        if name == "broken":
            next(p for key, p in model.named_parameters() if "lora_B" in key).data.fill_(float("nan"))
        model.save_pretrained(name)
    made(configs["a"]).merge_and_unload().save_pretrained("tuned")
    for name, words in VERBS.items():
        golden.cases[name] = document(words, Path())
    clear(Path())


KINDS: dict[str, Callable[[Golden], None]] = {
    "adapters": adapters,
    "formats": formats,
    "continued": continued,
    "verbs": verbs,
}


def check_source(state: str) -> None:
    """Raise SystemExit unless the graft on the path is the source of a commit, without changes."""
    source = Path(graft.__file__).parents[2]
    said = [
        subprocess.run(["git", "-C", source, *words], capture_output=True, text=True, check=True).stdout
        for words in (["rev-parse", "HEAD"], ["status", "--porcelain", "src"])
    ]
    if not said[0].startswith(state) or said[1]:
        sys.exit(f"{source} is not the source of {state}: git worktree add FOLDER {state}, PYTHONPATH=FOLDER/src:.")


def main(state: str, *kinds: str) -> None:
    check_source(state)
    torch.set_num_threads(1)
    here = Path.cwd()
    for kind in kinds or KINDS:
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            os.chdir(folder)  # paths in files are relative to the archive
            golden = Golden(Path())
            try:
                KINDS[kind](golden)
                golden.finish()
            finally:
                os.chdir(here)
            archive = HERE / state / f"{kind}.tar.gz"
            pack(Path(folder), archive)
        print(f"{archive.relative_to(here)}: {len(golden.cases)} cases, {archive.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main(*sys.argv[1:])
