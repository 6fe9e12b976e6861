# SPDX-License-Identifier: Apache-2.0
"""`install` after the modules that ask for PEFT were imported, with and without PEFT in the environment."""

import importlib.util
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
        assert trainer.PeftModel is theirs and sys.modules["peft"] is peft and not alias.installed()
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


@pytest.mark.slow
def test_a_module_that_cannot_look_again_is_named_and_all_is_as_before():
    process(
        """
import sys, transformers.trainer as trainer, types
from transformers.utils import is_peft_available
assert not is_peft_available()
import graft.compat.peft as alias
bad = types.ModuleType("trl.bad")
source = "from transformers.utils import is_peft_available\\nif is_peft_available():\\n    from peft import NoSuch\\n"
import tempfile, os
folder = tempfile.mkdtemp(); path = os.path.join(folder, "bad.py"); open(path, "w").write(source)
import importlib.util
spec = importlib.util.spec_from_file_location("trl.bad", path)
bad = importlib.util.module_from_spec(spec); spec.loader.exec_module(bad); sys.modules["trl.bad"] = bad
try:
    alias.install()
except ImportError as e:
    assert "trl.bad, line 2" in str(e) and "NoSuch" in str(e) and "install()" in str(e), e
else:
    raise AssertionError
assert not alias.installed() and not is_peft_available() and not hasattr(trainer, "PeftModel")
assert "peft" not in sys.modules
""",
        hidden=True,
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
