# SPDX-License-Identifier: Apache-2.0
"""graft under PEFT's names: the tables against the installed PEFT, and the alias in processes of its own."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import inspect
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from types import ModuleType
from typing import Any

import peft
import pytest
from torch import nn

from graft.compat.peft.layers import BNB, AuxiliaryTrainingWrapper, layer_class
from graft.compat.peft.modules import names_in, resolve
from graft.compat.peft.names import BESIDE, LAYER_FILES, MAPPINGS, MODULES, WHERE, WITH_BNB, folder
from graft.methods import METHODS, method_of
from tests import fresh
from tests.leaves_out import CONVERSIONS
from tests.pair import both
from tests.samples import each

METHOD_FOLDERS = {  # of methods that PEFT has
    f"tuners.{folder(t)}": t for t, row in METHODS.items() if row.in_peft and hasattr(peft.PeftType, t)
}
NOT_IN_LAYERS = ("MultiheadAttention",)  # layer classes of PEFT's that graft has no counterpart of yet


def run(code: str, *arguments: str, module: str | None = None, forked: bool = True) -> str:
    """What a process of its own prints, which has transformers loaded if it is forked; it must end well."""
    words = ["-W", "ignore", *(["-m", module] if module else ["-c", textwrap.dedent(code)]), *arguments]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([os.getcwd(), *sys.path])}
    if forked:
        done = fresh.run(*words, env=env)
    else:
        done = subprocess.run([sys.executable, *words], capture_output=True, text=True, timeout=300, env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


# the tables


CONVERSION = pytest.param("utils.transformers_weight_conversion", marks=CONVERSIONS)


@pytest.mark.parametrize("path", [CONVERSION if path in CONVERSION.values else path for path in MODULES])
def test_names_are_where_peft_has_them(path, monkeypatch):
    attrs: Any = ModuleType("attr")  # which CorDA's module imports, and PEFT does not depend on
    attrs.dataclass = dataclasses.dataclass
    monkeypatch.setitem(sys.modules, "attr", attrs)
    names = MODULES[path].split()
    packed = [name for name in names if "_bnb_" in name]  # which PEFT has where bitsandbytes is installed
    if packed:
        source = Path(importlib.util.find_spec(f"peft.{path}").origin).read_text()
        assert [name for name in packed if name not in source] == []
    if len(packed) < len(names):
        module = importlib.import_module(f"peft.{path}" if path else "peft")
        assert [name for name in names if name not in packed and not hasattr(module, name)] == []


def test_every_name_stands_for_something():
    listed = {name for names in MODULES.values() for name in names.split()}
    listed |= {name for names in BESIDE.values() for name in names.split()}
    assert set(WHERE) <= listed, "a name that no module hands out"
    for holder, name in WHERE.values():
        assert hasattr(importlib.import_module(holder), name), (holder, name)
    for path, names in MODULES.items():
        assert all(resolve(f"peft.{path}".rstrip("."), name) is not None for name in names.split()), path


@pytest.mark.parametrize("peft_type", [t for t in BESIDE if t in METHODS])
def test_what_a_method_has_beside_its_config_is_where_peft_has_it(peft_type):
    folder = next(path for path, t in METHOD_FOLDERS.items() if t == peft_type)
    theirs = importlib.import_module(f"peft.{folder}.config")
    assert [name for name in BESIDE[peft_type].split() if not hasattr(theirs, name)] == []


@pytest.mark.parametrize("name", MAPPINGS)
def test_default_targets_are_pefts(name):
    assert method_of(MAPPINGS[name]).targets == getattr(peft.utils.constants, name)


def layers_in_peft(path):
    return importlib.import_module(f"peft.{path}.{LAYER_FILES.get(METHOD_FOLDERS[path], 'layer')}")


@pytest.mark.parametrize("path", METHOD_FOLDERS)
def test_every_layer_class_of_a_method_has_a_counterpart(path):
    theirs = layers_in_peft(path)
    for name, cls in inspect.getmembers(theirs, inspect.isclass):
        if issubclass(cls, peft.tuners.tuners_utils.BaseTunerLayer) and cls.__module__ == theirs.__name__:
            own = layer_class(METHOD_FOLDERS[path], name)
            assert own is not None or name.startswith("_") or name in NOT_IN_LAYERS, name


def test_methods_with_a_module_for_bitsandbytes_are_those_of_peft():
    theirs = {t for path, t in METHOD_FOLDERS.items() if importlib.util.find_spec(f"peft.{path}.bnb") is not None}
    assert theirs == set(WITH_BNB)
    for peft_type in WITH_BNB:
        found = names_in(f"peft.tuners.{folder(peft_type)}.bnb")
        names = [name for name in found if not name.startswith("dispatch_")]
        assert names and all(resolve(f"peft.tuners.{folder(peft_type)}.bnb", name).kind in BNB for name in names)


def instances(modules: dict[str, nn.Module], cls: type) -> set[str]:
    return {key for key, module in modules.items() if isinstance(module, cls)}


PLAIN = each("plain", "mlp conv1D embedding conv1d conv2d conv3d llama") + each("head", "mlp")


@pytest.mark.parametrize("sample", PLAIN, ids=str)
def test_isinstance_agrees_with_peft(sample):
    """Every module of the model, against every layer class of every method."""
    ours, theirs = (dict(m.named_modules()) for m in both(sample))
    asked = 0
    for path, peft_type in METHOD_FOLDERS.items():
        for name, cls in inspect.getmembers(layers_in_peft(path), inspect.isclass):
            own = layer_class(peft_type, name)
            if own is None:
                continue
            found = instances(ours, own)
            assert found == instances(theirs, cls), (path, name)
            asked += len(found)
    assert asked
    assert instances(ours, AuxiliaryTrainingWrapper) == instances(theirs, peft.utils.AuxiliaryTrainingWrapper)


def test_layer_classes_only_tell_layers_apart():
    linear, layer = layer_class("LORA", "Linear"), layer_class("LORA", "LoraLayer")
    assert issubclass(linear, layer) and not isinstance(nn.Linear(2, 2), layer)
    with pytest.raises(TypeError, match="base_layer"):
        linear()
    with pytest.raises(AttributeError, match="would change nothing"):
        linear.update_layer = lambda self, x: x


@pytest.mark.parametrize("peft_type", ["LORA", "LOHA", "LOKR"])
def test_a_class_names_the_containers(peft_type):
    """Which diffusers asks of these before it casts a model's layers."""
    tuners = peft.tuners
    theirs = {"LORA": tuners.lora.LoraLayer, "LOHA": tuners.loha.layer.LoHaLayer, "LOKR": tuners.lokr.layer.LoKrLayer}
    theirs = theirs[peft_type]
    assert layer_class(peft_type, theirs.__name__).adapter_layer_names == theirs.adapter_layer_names


# the alias


@pytest.mark.slow
def test_install_and_uninstall():
    run(
        """
        import importlib, importlib.metadata, importlib.util, sys
        import graft, graft.compat.peft as alias
        from graft.compat.peft import children

        def missing(code, kind=ImportError):
            try:
                exec(code, {})
            except kind as e:
                return str(e)
            raise AssertionError(code)

        alias.install()
        alias.install()
        assert sum(type(f).__name__ == "Finder" and "graft" in type(f).__module__ for f in sys.meta_path) == 1
        assert "transformers" not in sys.modules
        assert importlib.util.find_spec("peft") and importlib.util.find_spec("peft.tuners.lora")
        assert importlib.metadata.version("peft") == children.find_default_version()
        assert importlib.metadata.metadata("peft")["Name"] == "peft"

        import peft, peft.tuners.lora.layer, peft.utils.save_and_load
        from peft.tuners.tuners_utils import BaseTunerLayer
        from peft.import_utils import is_bnb_available, is_transformers_ge_v5
        assert peft.LoraConfig is graft.LoraConfig and issubclass(BaseTunerLayer, graft.AdapterLayer)
        assert peft.tuners.lora.LoraLayer is peft.tuners.lora.layer.LoraLayer
        assert is_bnb_available() in (True, False)
        assert is_transformers_ge_v5 == (int(importlib.metadata.version("transformers").split(".")[0]) >= 5)
        assert peft.__version__ == children.find_default_version() and "LoraConfig" in dir(peft)

        from graft.compat.peft.modules import MODULES, OF_METHODS
        for path in (*MODULES, *OF_METHODS):  # each name is there, and each module's star import works
            module = importlib.import_module(f"peft.{path}" if path else "peft")
            assert all(hasattr(module, name) for name in dir(module))
            exec(f"from {module.__name__} import *", {})

        text = "is not in graft yet"
        for code in (
            "from peft import NotThere",
            "import peft.tuners.not_there",
            "from peft.tuners.lora import NotThere",
            "from peft.utils.other import not_there",
            "from peft.tuners.not_there.layer import X",
        ):
            assert text in missing(code), code
        assert text in missing("import peft; peft.NotThere", AttributeError)
        assert "did you mean LoraConfig" in missing("from peft import LoraConfg")
        assert not hasattr(peft, "NotThere") and getattr(peft.tuners, "NotThere", 3) == 3
        assert not isinstance(3, peft.PeftMixedModel)

        alias.uninstall()
        alias.uninstall()
        import peft as real  # the one that is installed
        assert real is not peft and "site-packages" in real.__file__
        assert "Call" in missing("import graft.compat.peft as alias; alias.install()")
        alias.install(force=True, version="9.9")
        import peft
        assert peft.LoraConfig is graft.LoraConfig and peft.__version__ == importlib.metadata.version("peft") == "9.9"
        alias.uninstall()
        import peft
        assert peft is real and sys.modules["peft.tuners"] is real.tuners
        """,
        forked=False,
    )


ARGUMENTS = "import sys, peft; print(peft.__spec__.origin, __name__, sys.argv[1:], sys.path[0])"


def test_command_line(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(ARGUMENTS)
    assert run("", str(script), "--lr", "1", module="graft.compat.peft").split() == [
        *("graft.compat.peft", "__main__", "['--lr',", "'1']", str(tmp_path))
    ]
    (tmp_path / "a_module.py").write_text(ARGUMENTS)
    code = f"import sys, runpy; sys.path.insert(0, {str(tmp_path)!r}); sys.argv[1:] = ['-m', 'a_module', '-x'];"
    printed = run(f"{code} runpy.run_module('graft.compat.peft', run_name='__main__', alter_sys=True)")
    assert printed.startswith("graft.compat.peft __main__ ['-x']")


@pytest.mark.slow
def test_transformers_own_integration():
    """model.add_adapter, set_adapter, load_adapter, … for every method, from a saved PeftModel as well."""
    run(
        """
        import graft.compat.peft
        graft.compat.peft.install()
        import tempfile, torch, graft
        from tests import models
        from tests.samples import each

        def randomize(model):
            g = torch.Generator().manual_seed(1)
            for name, p in model.named_parameters():
                if p.requires_grad:
                    p.data.copy_(torch.randn(p.shape, generator=g) * 0.1)

        samples = [s for s in each("plain", "llama") + each("lm_head", "llama")]
        # transformers fills the state dict, where SHiRA has no places: they are those of the seed, as with PEFT
        samples = [s for s in samples if not graft.method_of(s.method).shares and s.method != "SHIRA"]
        # the wrappers say themselves where their tensors belong
        saved = hasattr(graft.ModulesToSaveWrapper, "adapter_state_dict_load_map")
        for sample in samples if saved else [s for s in samples if s.name == "plain"]:
            batch = models.inputs("llama")
            base = models.make("llama")
            before = models.output(base, batch)
            base.add_adapter(sample.config(graft), "alice")
            randomize(base)
            after = models.output(base, batch)
            assert not torch.allclose(before, after)
            with tempfile.TemporaryDirectory() as folder:
                base.save_pretrained(folder)
                wrapped = graft.PeftModel.from_pretrained(models.make("llama"), folder)
                # mapped memory has another alignment, by which torch may sum in another order
                assert torch.allclose(models.output(wrapped, batch), after, atol=1e-6)
                wrapped.save_pretrained(folder)
                model = models.make("llama")
                # (transformers takes any name that contains the adapter's for one of its tensors: "b" is in "embed")
                info = model.load_adapter(folder, adapter_name="bob")
                if info is not None:  # transformers 4 returns nothing
                    assert not info.missing_keys and not info.unexpected_keys, (sample, info)
            model.add_adapter(sample.config(graft), "carol")
            model.set_adapter("bob")
            assert model.active_adapters() == ["bob"]
            assert torch.allclose(models.output(model, batch), after, atol=1e-6)
            model.disable_adapters()
            assert torch.allclose(models.output(model, batch), before)
            model.enable_adapters()
            assert set(model.get_adapter_state_dict("bob")) == set(base.get_adapter_state_dict("alice"))
            model.delete_adapter("bob")
            assert list(model.peft_config) == ["carol"] == model.active_adapters()
        """
    )


def test_trainer_saves_and_resumes(tmp_path):
    """transformers' Trainer takes the model for a PeftModel: it saves and loads the adapter, not the base."""
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent(
            """
            import os, sys, torch
            from peft import LoraConfig, PeftModel, get_peft_model
            from transformers import Trainer, TrainingArguments
            from accelerate.utils.modeling import is_peft_model
            from tests import models

            model = get_peft_model(models.make("bert-seq"), LoraConfig(task_type="SEQ_CLS", target_modules=["query"]))
            assert is_peft_model(model)
            batch = {k: v for k, v in models.inputs("bert-seq").items() if k == "input_ids"}
            data = [{"input_ids": batch["input_ids"][0], "labels": i % 2} for i in range(8)]
            args = TrainingArguments(
                sys.argv[1], per_device_train_batch_size=4, max_steps=2, save_steps=1, eval_steps=1, report_to=[],
                eval_strategy="steps", load_best_model_at_end=True, disable_tqdm=True, use_cpu=True,
            )
            trainer = Trainer(model, args, train_dataset=data, eval_dataset=data)
            trainer.train()
            files = os.listdir(f"{sys.argv[1]}/checkpoint-1")
            assert "adapter_model.safetensors" in files and "model.safetensors" not in files, files
            trainer.args.max_steps = 3
            trainer.train(resume_from_checkpoint=True)
            trainer.save_model(f"{sys.argv[1]}/out")
            again = PeftModel.from_pretrained(models.make("bert-seq"), f"{sys.argv[1]}/out")
            assert torch.equal(models.output(again, batch), models.output(model.eval(), batch))
            """
        )
    )
    run("", str(script), str(tmp_path / "run"), module="graft.compat.peft")
