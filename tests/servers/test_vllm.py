# SPDX-License-Identifier: Apache-2.0
"""A real vLLM: what `check` says of adapters it does, what `export` writes it applies, what is broken `verify` names.

make test-serving
"""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import graft
from examples import servers
from examples.start import start_vllm
from graft import ServerError
from graft.core.errors import PeftError
from graft.files import formats
from graft.files.ask import Connection
from graft.files.base import read_base_files
from graft.files.export import export_adapter_file
from graft.files.serving import check_servers
from graft.files.verify import verify_server
from graft.io.servers import ServerBlocks
from graft.serving import Versions
from tests.files import adapters
from tests.model import test_adapter_tensors as experts
from tests.models import seeded
from tests.servers.common import broken, model, words

PYTHON = os.environ.get("GRAFT_VLLM")
pytestmark = pytest.mark.skipif(not PYTHON, reason="needs an environment with vLLM: make test-serving")
ENVIRONMENT = {
    "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TORCHDYNAMO_DISABLE": "1",
    "VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS": "3000",
}  # fmt: skip
APPLIED = ["scaled", "patterns", "rslora", "regex", "paths", "one layer"]  # as they stand
EXPORTED = [*APPLIED, "pissa", "olora", "velora", "monteclora", "qalora", "bdlora", "kasa"]
REFUSED = [
    "dora",
    "bias",
    "whole head",
    "whole norm",
    "rows",
    "velora",
    "qalora",
    "bdlora",
    "kasa",
    "pissa",
    "alora",
    "high",
]


@pytest.fixture(scope="session")
def url(base):
    given = os.environ.get("GRAFT_VLLM_URL")  # of one that serves the same base already
    if given:
        yield given
        return
    os.environ |= ENVIRONMENT
    with start_vllm(str(PYTHON), base, "base", {}) as at:
        yield at


def load(url, path):
    """Load an adapter into the server; return its name there."""
    load.number = getattr(load, "number", 0) + 1
    name = f"a{os.getpid()}-{load.number}"
    body = {"lora_name": name, "lora_path": str(path)}
    Connection(url, 600).send("/v1/load_lora_adapter", body)
    return name


def verdict(url, name, path):
    own = lambda base: adapters.quietly(graft.PeftModel.from_pretrained, base, str(path)).eval()
    return verify_server(Connection(url, 600), model(), own, name, "base")


@pytest.mark.parametrize("name", APPLIED)
def test_an_adapter_that_check_lets_pass(name, url, base, folder):
    assert not check_servers(formats.read(folder(name)), ["vllm"], read_base_files(base))
    found = verdict(url, load(url, folder(name)), folder(name))
    assert found.ok and found.deviations["applied"] < 1e-4 < 0.1 < found.effect


@pytest.mark.parametrize("name", REFUSED)
def test_an_adapter_that_check_says_it_refuses(name, url, base, folder):
    from graft.files.serving import ServerOptions

    found = check_servers(formats.read(folder(name)), ["vllm"], read_base_files(base), ServerOptions(max_rank=64))
    assert {f.verdict for f in found} == {"refused"}
    with pytest.raises(ServerError, match="Worker failed with error"):
        load(url, folder(name))


@pytest.mark.parametrize("name", EXPORTED)
def test_what_export_writes(name, url, base, folder, tmp_path):
    held = read_base_files(base)
    export_adapter_file(formats.read(folder(name), held), "vllm", held, str(tmp_path))
    found = verdict(url, load(url, tmp_path), folder(name))
    assert found.ok and found.deviations["applied"] < 1e-4 < 0.1 < found.effect


@pytest.mark.parametrize("name", ["pissa", "olora"])
def test_a_start_that_a_file_of_peft_does_not_keep(name, url, base, folder, tmp_path):
    path = broken(tmp_path, folder(name), change=lambda n: "lora_shift" not in n)
    found = check_servers(formats.read(path), ["vllm"], read_base_files(base))
    assert [(f.condition, f.verdict) for f in found] == [("base_changed", "refused")]
    with pytest.raises(ServerError, match="init_lora_weights"):
        load(url, path)


def test_another_method_as_lora(url, tmp_path):
    made = adapters.quietly(adapters.moved, model(), graft.LoHaConfig(r=4, target_modules=adapters.LISTED))
    made.save_pretrained(tmp_path / "loha")
    made.save_pretrained(tmp_path / "vllm", for_server="vllm")
    with pytest.raises(ServerError, match="Worker failed with error"):
        load(url, tmp_path / "loha")
    assert verdict(url, load(url, tmp_path / "vllm"), tmp_path / "vllm").ok


# adapters broken on purpose


def test_a_scale_that_is_off(url, folder, tmp_path):
    path = broken(tmp_path, folder("scaled"), {"lora_alpha": 24})
    found = verdict(url, load(url, path), folder("scaled"))
    assert found.verdict == "scale off" and found.scale == pytest.approx(4, rel=1e-3)


def test_rslora_that_is_not_read(url, folder, tmp_path):
    path = broken(tmp_path, folder("rslora"), {"use_rslora": False})
    found = verdict(url, load(url, path), folder("rslora"))
    assert found.scale == pytest.approx(0.5, rel=1e-3) and "use_rslora" in found.text


def test_rslora_that_is_not_read_where_ranks_differ(url, tmp_path):
    options = dict(r=4, lora_alpha=8, target_modules=adapters.LISTED, use_rslora=True, rank_pattern={"up_proj": 16})
    adapters.quietly(adapters.moved, model(), graft.LoraConfig(**options)).save_pretrained(tmp_path / "a")
    path = broken(tmp_path, tmp_path / "a", {"use_rslora": False})
    assert verdict(url, load(url, path), tmp_path / "a").verdict == "use_rslora not read"


def test_patterns_that_are_not_read(url, folder, tmp_path):
    path = broken(tmp_path, folder("patterns"), {"alpha_pattern": {"q_proj": 4}})
    assert verdict(url, load(url, path), folder("patterns")).verdict == "patterns not read"


def test_names_of_another_class(url, base, folder, tmp_path):
    path = broken(tmp_path, folder("scaled"), None, lambda n: n.replace("model.layers", "model.language_model.layers"))
    assert {f.verdict for f in check_servers(formats.read(path), ["vllm"], read_base_files(base))} == {"ignored"}
    assert verdict(url, load(url, path), folder("scaled")).verdict == "not applied"
    held = read_base_files(base)
    export_adapter_file(formats.read(path), "vllm", held, str(tmp_path / "out"))
    assert verdict(url, load(url, tmp_path / "out"), folder("scaled")).ok


def test_another_adapter(url, folder, tmp_path):
    with seeded(9):
        made = graft.PeftModel.from_pretrained(model(), folder("scaled"))
        for p in made.parameters():
            p.data.add_(torch.randn(p.shape), alpha=0.2) if p.shape[0] == 4 or p.shape[-1] == 4 else None
    made.save_pretrained(tmp_path)
    assert verdict(url, load(url, tmp_path), folder("scaled")).verdict == "another adapter"


def test_a_name_that_is_unknown(url, folder):
    with pytest.raises(PeftError, match=re.escape("no model 'nobody'")):
        verdict(url, "nobody", folder("scaled"))


# experts: vLLM's kernels for their adapters need a GPU, its loaders do not


CASES = [
    *((family, "vllm-2d") for family in ("qwen2_moe", "qwen3_moe", "mixtral", "phimoe", "lfm2_moe", "olmoe", "jamba",
                                         "granitemoe", "minimax_m2", "ernie", "glm4_moe", "qwen3_next", "nemotron_h",
                                         "gpt_oss", "qwen3_5_moe")),
    *((family, "vllm-3d") for family in ("gpt_oss", "qwen3_5_moe", "qwen3_moe", "mixtral")),
    *((family, "vllm-shared") for family in ("qwen3_moe", "mixtral")),
]  # fmt: skip


ARCHITECTURES = {"phimoe": "PhiMoEForCausalLM"}  # where transformers writes them otherwise


def test_what_vllm_makes_of_experts(tmp_path):
    """Each expert's products are what merging adds to its weights."""
    jobs, wanted = [], {}
    for n, (family, layout) in enumerate(CASES):
        policy = experts.with_experts(family)
        if layout == "vllm-shared":
            experts.shared(policy)
        made = graft.adapter_tensors(policy, layout=layout)
        made.save(tmp_path / f"{n}")
        block = next(iter(ServerBlocks(policy.get_base_model()).found.values()))
        gate_up, down = changes(policy, block.path)
        wanted[n] = rows_of(policy, gate_up, layout), down
        jobs.append(dict(folder=str(tmp_path / f"{n}"), block=block.hub_path, layout=layout, experts=4,
                         architecture=ARCHITECTURES.get(family, type(policy.get_base_model()).__name__),
                         out=str(tmp_path / f"{n}.safetensors")))  # fmt: skip
    here = str(Path(__file__).with_name("in_vllm.py"))
    run = subprocess.run([PYTHON, here], input=json.dumps(jobs), capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    for n, (family, layout) in enumerate(CASES):
        held = load_file(tmp_path / f"{n}.safetensors")
        products = [held[f"{i}.B"] @ held[f"{i}.A"] for i in range(len(held) // 2)]
        ins, down = wanted[n]
        if layout == "vllm-3d":
            got = products
        else:
            got = [products[0] if len(ins) == 1 else torch.cat([products[0], products[2]], 1), products[1]]
        for a, b in zip(got, [torch.cat(ins, 1), down], strict=True):
            torch.testing.assert_close(a, b, msg=lambda text, at=(family, layout): f"{at}: {text}")


def changes(policy, path):
    """What merging adds to the two stacks of a block, (E, out, in)."""
    block = policy.get_base_model().get_submodule(path)
    stacks = {name: p for name, p in block.named_parameters() if name.endswith("proj") and p.dim() == 3}
    before = {name: p.detach().clone() for name, p in stacks.items()}
    policy.merge_adapter()
    after = [p.detach() - before[name] for name, p in stacks.items()]
    policy.unmerge_adapter()
    return [t.mT if getattr(base_of(block), "is_transposed", False) else t for t in after]


def base_of(block):
    while hasattr(block, "base_layer"):
        block = block.base_layer
    return block


def rows_of(policy, gate_up, layout):
    """Gate and up of a stack as it is in the model; all of it for vLLM's stacks, which are as the model's."""
    if layout == "vllm-3d" or gate_up.shape[1] == policy.config.to_dict().get("moe_intermediate_size"):
        return [gate_up]
    if policy.config.model_type == "gpt_oss":
        return [gate_up[:, ::2], gate_up[:, 1::2]]
    return [*gate_up.chunk(2, 1)]


# versions of a policy


def test_versions_of_a_policy(url, base, tmp_path):
    """The class of the page on reinforcement learning: three versions, each of which answers as the policy did."""
    server = servers.Vllm([url], str(tmp_path))
    policy = adapters.quietly(adapters.moved, model(), graft.LoraConfig(**dict(r=4, target_modules=adapters.LISTED)))
    versions = Versions(f"policy{os.getpid()}", server.load, server.unload, keep=2)
    names = []
    for n in range(3):
        policy.save_pretrained(tmp_path / f"as-it-was-{n}")
        names.append(versions.publish(graft.adapter_tensors(policy, layout="vllm")))
        found = verdict(url, names[-1], tmp_path / f"as-it-was-{n}")
        assert found.ok and found.deviations["applied"] < 1e-4 < 0.1 < found.effect
        with seeded(n):
            for p in policy.parameters():
                if p.requires_grad:
                    p.data.add_(torch.randn(p.shape), alpha=0.1)
    assert verdict(url, names[1], tmp_path / "as-it-was-1").ok  # still there
    assert verdict(url, names[2], tmp_path / "as-it-was-1").verdict == "another adapter"
    with pytest.raises(PeftError, match="no model"):
        verdict(url, names[0], tmp_path / "as-it-was-0")
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith("policy")) == sorted(names[1:])
    send = lambda name, made: Connection(url, 600).send(
        "/v1/load_lora_adapter", {"lora_name": name, "lora_path": "/no"}
    )
    with pytest.raises(ServerError, match="answers 4"):  # no such folder
        Versions("broken", send, server.unload).publish(graft.adapter_tensors(policy))


def test_versions_of_a_policy_with_experts(tmp_path):
    """Experts' LoRA through vLLM's own loader, slots and router; a plugin of plain torch stands in for the kernels."""
    base = qwen3_moe()
    base.save_pretrained(tmp_path / "base")
    words(64).save_pretrained(tmp_path / "base")
    stacks = ["experts.gate_up_proj", "experts.down_proj"]
    both = dict(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    with seeded(1):
        policy = graft.get_peft_model(base, graft.LoraConfig(**both, target_parameters=stacks)).eval()
        policy.add_adapter("down", graft.LoraConfig(r=2, target_parameters=stacks[1:], init_lora_weights=False))
    with servers.vllm_on_a_cpu(PYTHON, tmp_path / "base", 8, str(tmp_path)) as server:
        versions, names = Versions("policy", server.load, server.unload, keep=3), []
        for n, (adapter, layout) in enumerate([("default", "vllm"), ("default", "vllm"), ("down", "vllm-2d")]):
            policy.save_pretrained(tmp_path / f"{n}", selected_adapters=[adapter])
            names.append(versions.publish(graft.adapter_tensors(policy, adapter, layout)))
            with seeded(n):
                for p in policy.parameters():
                    if p.requires_grad:
                        p.data.add_(torch.randn(p.shape), alpha=0.1)
        for n, name in enumerate(names):
            path = tmp_path / f"{n}" / ("down" if n == 2 else "")
            own = lambda base, path=path: graft.PeftModel.from_pretrained(base, path).eval()
            found = verify_server(Connection(server.urls[0], 600), qwen3_moe(), own, name, "base")
            assert found.ok and found.deviations["applied"] < 1e-4 < 0.1 < found.effect
        with pytest.raises(ServerError, match="expected target modules"):  # SGLang's layout, as `graft check` says
            server.load("sglang", graft.adapter_tensors(policy, "default", "sglang"))


def qwen3_moe():
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    sizes = dict(hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, head_dim=32)
    of_experts = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, num_key_value_heads=2)
    with seeded(0):
        config = Qwen3MoeConfig(
            vocab_size=64, initializer_range=0.2, max_position_embeddings=128, **sizes, **of_experts
        )
        return Qwen3MoeForCausalLM(config).eval()


# last, as they leave something behind in the server


def test_lm_head(url, folder, tmp_path):
    """vLLM on a CPU answers for the base with the lm_head of the adapter that it loaded or ran last."""
    whole = load(url, folder("lm_head"))
    assert verdict(url, whole, folder("lm_head")).verdict == "in the base too"
    path = broken(
        tmp_path, folder("lm_head"), {"target_modules": ["q_proj", "v_proj"]}, change=lambda n: "lm_head" not in n
    )
    found = verdict(url, load(url, path), folder("lm_head"))
    assert found.verdict == "missing" and found.text.startswith("lm_head missing")
