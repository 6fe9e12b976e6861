# SPDX-License-Identifier: Apache-2.0
"""`install` after the modules that ask for PEFT were imported, with and without PEFT in the environment."""

import importlib.util
import json
import textwrap

import pytest

from tests.compat.test_compat import run

HIDDEN = "from tests.compat.hiding import hide; hide()"  # before anything is loaded
WITH_AND_WITHOUT = pytest.mark.parametrize(
    "hidden", [pytest.param(True, id="without PEFT", marks=pytest.mark.slow), pytest.param(False, id="with PEFT")]
)
CLIENTS = [
    pytest.param(
        name,
        marks=[] if importlib.util.find_spec(name) else pytest.mark.skip(reason="`make test-clients` has the package"),
    )
    for name in ("trl", "diffusers")
]


def process(code: str, hidden: bool) -> str:
    return run((HIDDEN + "\n" if hidden else "") + textwrap.dedent(code), forked=not hidden)


TRAINS = """
import os, tempfile
from transformers import Trainer, TrainingArguments, trainer, trainer_utils
from transformers.utils import is_peft_available
from accelerate.utils import is_peft_model
import graft, graft.compat.peft as alias
from tests import models

def checkpoint():
    model = graft.get_peft_model(models.make("llama"), graft.LoraConfig(target_modules=["q_proj"]))
    ids = models.inputs("llama")["input_ids"][0]
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(folder, max_steps=1, save_steps=1, report_to=[], use_cpu=True, disable_tqdm=True)
        Trainer(model, arguments, train_dataset=[{"input_ids": ids, "labels": ids}] * 2).train()
        return set(os.listdir(f"{folder}/checkpoint-1")) & {"model.safetensors", "adapter_model.safetensors"}, model

before = [is_peft_available(), getattr(trainer, "PeftModel", None), getattr(trainer_utils, "PeftModel", None)]
alias.install()
users = [m for m in (trainer, trainer_utils) if "PeftModel" in open(m.__file__).read()]  # one of them in transformers 4
assert is_peft_available() and {m.PeftModel for m in users} == {graft.PeftModel}
files, model = checkpoint()
assert files == {"adapter_model.safetensors"}, files
assert is_peft_model(model)
alias.uninstall()
assert is_peft_available() is before[0] and (not before[0] or trainer.PeftModel is before[1])
"""


@WITH_AND_WITHOUT
def test_a_trainer_that_was_there_before(hidden):
    process(TRAINS, hidden)


@WITH_AND_WITHOUT
@pytest.mark.parametrize("client", CLIENTS)
def test_clients_that_were_there_before(client, hidden):
    process(OF_CLIENTS[client], hidden)


OF_CLIENTS = {
    "trl": """
        from trl import SFTTrainer
        from trl.trainer import sft_trainer, utils
        import graft, graft.compat.peft as alias
        alias.install()
        assert sft_trainer.PeftModel is utils.PeftModel is graft.PeftModel
        assert sft_trainer.get_peft_model is graft.get_peft_model and sft_trainer.peft.LoraConfig is graft.LoraConfig
        from trl import DPOTrainer
        from trl.trainer import dpo_trainer
        assert dpo_trainer.PeftModel is graft.PeftModel
        """,
    "diffusers": """
        import sys
        from diffusers import StableDiffusionPipeline, UNet2DConditionModel
        from diffusers.hooks import layerwise_casting
        from diffusers.loaders import lora_base, lora_pipeline
        import diffusers, graft.compat.peft as alias
        alias.install()
        import peft.helpers
        from peft.tuners.tuners_utils import BaseTunerLayer
        assert diffusers.utils.is_peft_available() and diffusers.utils.is_peft_version(">=", "0.17")
        assert lora_base.BaseTunerLayer is layerwise_casting.BaseTunerLayer is BaseTunerLayer
        assert layerwise_casting.disable_input_dtype_casting is peft.helpers.disable_input_dtype_casting
        assert layerwise_casting._SHOULD_DISABLE_PEFT_INPUT_AUTOCAST and lora_pipeline._LOW_CPU_MEM_USAGE_DEFAULT_LORA
        told = [vars(m)["USE_PEFT_BACKEND"] for m in list(sys.modules.values()) if "USE_PEFT_BACKEND" in vars(m)]
        assert len(told) > 3 and all(told)
        """,
}


HELD = """
import importlib, json, pkgutil, sys
import graft.compat.peft as alias

client = "{client}"
for m in pkgutil.walk_packages(importlib.import_module(client).__path__, client + ".", onerror=lambda name: None):
    if not any(part in m.name for part in (".commands", ".cli", ".scripts", "__main__")):
        try:
            importlib.import_module(m.name)
        except Exception:
            pass  # needs other packages
alias.install()

def of_peft(name, value):
    home = value.__name__ if type(value) is type(sys) else str(getattr(value, "__module__", ""))
    return home.partition(".")[0] in ("peft", "graft") or "peft" in name.lower() and isinstance(value, (bool, str))

modules = [(n, m) for n, m in sorted(sys.modules.items()) if n.partition(".")[0] == client and m is not None]
named = lambda m: sorted((k, getattr(v, "__name__", str(v))) for k, v in vars(m).items() if of_peft(k, v))
print(json.dumps({{name: named(m) for name, m in modules}}))
"""


@pytest.mark.slow
@pytest.mark.parametrize("client", CLIENTS)
def test_the_table_has_all_that_clients_hold(client):
    """What the modules of clients hold is the same whether PEFT was there when they were imported, or not."""
    with_it, without = (json.loads(process(HELD.format(client=client), h).splitlines()[-1]) for h in (False, True))
    lacks = {m: [x for x in names if x not in without.get(m, names)] for m, names in with_it.items()}
    assert not {m: names for m, names in lacks.items() if names} and any(with_it.values())


def test_who_goes_on_using_peft_is_named():
    run(
        """
        import sys, types
        import transformers.trainer as trainer, peft
        import graft, graft.compat.peft as alias
        theirs = peft.PeftModel
        assert trainer.PeftModel is theirs

        def said():
            try:
                alias.install()
            except ImportError as e:
                return str(e)
        assert "__main__" in said() and "transformers" not in said() and "force=True" in said()
        assert trainer.PeftModel is theirs and sys.modules["peft"] is peft and not alias.is_installed()
        config = peft.LoraConfig()
        mine = types.ModuleType("mine")
        exec("class Mine(Base): pass", mine.__dict__ | {"Base": theirs}, mine.__dict__)
        sys.modules["mine"] = mine
        del peft, theirs
        text = said()
        assert "mine" in text and "LoraConfig" in text and "__main__" not in text, text
        del config, sys.modules["mine"], mine
        alias.install()
        assert trainer.PeftModel is graft.PeftModel
        """
    )


def test_a_peft_that_a_program_has_hidden():
    run(
        """
        import sys
        for name in [name for name in sys.modules if name.partition(".")[0] == "peft"]:
            del sys.modules[name]
        sys.modules["peft"] = None  # an import of it raises
        import graft, graft.compat.peft as alias
        alias.install()
        import peft
        assert peft.LoraConfig is graft.LoraConfig
        alias.uninstall()
        assert sys.modules["peft"] is None
        """
    )


OTHER = """
import sys, types
import transformers.trainer as trainer
from transformers.utils import is_peft_available
import graft, graft.compat.peft as alias

def imported(name, source):
    module = types.ModuleType(name)
    exec(source, vars(module))
    sys.modules[name] = module
    return module
"""


@pytest.mark.slow
def test_another_client_that_has_looked_is_named_and_all_is_as_before():
    process(
        OTHER
        + """
source = "try:\\n    import peft\\n    HAS_PEFT = True\\nexcept ImportError:\\n    HAS_PEFT = False"
other = imported("other.inside", source)
assert other.HAS_PEFT is False and not is_peft_available()
try:
    alias.install()
except ImportError as e:
    assert str(e).startswith("other.inside.HAS_PEFT says") and "first import of other, or" in str(e), e
else:
    raise AssertionError
assert not alias.is_installed() and not is_peft_available() and not hasattr(trainer, "PeftModel")
assert "peft" not in sys.modules
alias.install(force=True)
assert other.HAS_PEFT is False and trainer.PeftModel is graft.PeftModel
""",
        hidden=True,
    )


@WITH_AND_WITHOUT
def test_no_source_of_a_client_runs_again(hidden):
    """A name that a module has from elsewhere stays; one that is not there yet is set."""
    process(
        OTHER
        + """
source = "runs = []\\nruns.append(1)\\ndef get_peft_model(): pass\\nfrom transformers.utils import is_peft_available\\n"
source += "if is_peft_available():\\n    runs.append(2)\\n    from peft import PeftModel\\n    import peft\\n"
client = imported("trl.trainer.new_trainer", source)
runs, own = list(client.runs), client.get_peft_model
alias.install()
import peft
assert client.runs == runs and client.PeftModel is graft.PeftModel and client.peft is peft
assert client.get_peft_model is own
alias.uninstall()
assert hasattr(client, "PeftModel") == (2 in runs) and client.get_peft_model is own and client.runs == runs
assert not (2 in runs) or client.PeftModel is trainer.PeftModel is not graft.PeftModel
""",
        hidden,
    )


def test_a_model_beside_a_trainer_that_does_not_know_it_says_so_once():
    run(
        """
        import warnings
        from transformers import trainer
        import graft, graft.compat.peft as alias
        from tests import models

        def said():
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                graft.get_peft_model(models.make("llama"), graft.LoraConfig(target_modules=["q_proj"]))
            return [str(w.message) for w in caught]

        (text,) = said()
        assert "graft.compat.peft.install()" in text and "Trainer" in text
        assert said() == []
        """
    )


@pytest.mark.parametrize("installs", [True, False])
def test_a_model_that_was_there_before_the_trainer(installs):
    """What Trainer asks of it tells of Trainer; one that knows graft's models is no reason to."""
    run(
        f"""
        import warnings
        import graft, graft.compat.peft as alias
        from tests import models
        warnings.simplefilter("error", graft.PeftWarning)
        model = graft.get_peft_model(models.make("llama"), graft.LoraConfig(target_modules=["q_proj"]))
        from transformers import Trainer, TrainingArguments
        if {installs}:
            alias.install()
        arguments = TrainingArguments("/nowhere", report_to=[], use_cpu=True)
        try:
            Trainer(model, arguments)
        except graft.PeftWarning as e:
            assert not {installs} and "install()" in str(e)
        else:
            assert {installs}
        """
    )


@pytest.mark.parametrize("installs", [True, False])
def test_smoothed_labels_are_shifted(installs):
    """Trainer computes that loss itself, by labels that it keeps from the model."""
    run(
        f"""
        import tempfile, warnings
        import graft, graft.compat.peft as alias
        if {installs}:
            alias.install()
        from transformers import Trainer, TrainingArguments
        from transformers.trainer_pt_utils import LabelSmoother
        from tests import models
        warnings.simplefilter("ignore")
        config = graft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")
        for mixed in {{False, {installs}}}:
            model = graft.get_peft_model(models.make("llama"), config, mixed=mixed)
            assert repr(model).startswith("PeftM") and repr(model).count("LlamaForCausalLM(") == 1
            ids = models.inputs("llama")["input_ids"][:1]
            arguments = TrainingArguments(tempfile.mkdtemp(), max_steps=1, report_to=[], use_cpu=True,
                                          disable_tqdm=True, label_smoothing_factor=0.1, save_strategy="no")
            found = Trainer(model, arguments, train_dataset=[dict(input_ids=ids[0], labels=ids[0])]).train()
            wanted = LabelSmoother(0.1)(dict(logits=models.make("llama")(ids).logits), ids, shift_labels=True)
            assert abs(found.training_loss - float(wanted)) < 1e-5, (found.training_loss, wanted)
        """
    )
