# SPDX-License-Identifier: Apache-2.0
"""Defects of PEFT that take one small model to show: the same call in both libraries."""

from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.pytorch_utils import Conv1D

import graft
from tests import models
from tests.methods.test_lora_shift import Tied
from tests.pair import Outcome, close, outcome
from tests.storage.cells import linear
from tests.storage.standins import Gptq

pytestmark = pytest.mark.graft_only

X = torch.linspace(-1, 1, 24).view(3, 8)
IDS = torch.tensor([[1, 2, 3, 4]])


def each(call: Callable[[Any], Any]) -> tuple[Outcome, Outcome]:
    """What PEFT makes of the call, and what graft does."""
    return outcome(lambda: call(peft)), outcome(lambda: call(graft))


def made(lib, base: nn.Module, config: str, **options) -> Any:
    """A model with one adapter, by default on its first layer."""
    models.seed(0)
    return lib.get_peft_model(base, getattr(lib, config)(**{"target_modules": ["0"], **options}))


def one(layer: nn.Module, config: str, **options) -> Callable[[Any], Any]:
    return lambda lib: made(lib, nn.Sequential(layer), config, **options)


def random(model: nn.Module, part: str) -> nn.Module:
    """Give the parameters of that name values that are not zero."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            if part in name:
                p.uniform_(0.2, 0.7)
    return model


class Large(TorchDispatchMode):
    """Count the results that have as many numbers, views aside."""

    def __init__(self, numbers: int) -> None:
        super().__init__()
        self.numbers, self.seen = numbers, 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        made = op(*args, **(kwargs or {}))
        if isinstance(made, Tensor) and made.numel() >= self.numbers and not op.is_view:
            self.seen += 1
        return made


# configs


@pytest.mark.differs("HiRA on Conv1D")
def test_the_config_of_hira_on_conv1d():
    theirs, ours = each(one(Conv1D(6, 8), "HiraConfig", r=2))
    text = "Setting fan_in_fan_out to True"
    assert theirs.warned(text) and ours.warned(text)
    assert not theirs.value.peft_config["default"].fan_in_fan_out
    assert ours.value.peft_config["default"].fan_in_fan_out


@pytest.mark.differs("config arguments")
def test_positional_arguments_of_a_config():
    theirs, ours = each(lambda lib: lib.LoraConfig(None, None))
    assert theirs.error is None and ours.kind is TypeError


@pytest.mark.differs("a `megatron_core` that is not Megatron's")
def test_a_module_that_is_not_megatrons():
    theirs, ours = each(lambda lib: lib.LoraConfig(megatron_config={"a": 1}, megatron_core="tests.pair"))
    assert theirs.error is None
    assert isinstance(ours.error, graft.ConfigError) and "megatron_core" in str(ours.error)
    assert graft.LoraConfig(megatron_config={"a": 1}).megatron_core == "megatron.core"


@pytest.mark.differs("GLoRA with r ≤ 0")
def test_glora_of_rank_0():
    theirs, ours = each(lambda lib: one(nn.Linear(8, 6), "GloraConfig", r=0)(lib)(X))
    assert theirs.value.shape == (3, 6) and isinstance(ours.error, graft.ConfigError)


@pytest.mark.differs("VB-LoRA with `topk` > `num_vectors`")
def test_more_vectors_at_once_than_vblora_has():
    theirs, ours = each(
        lambda lib: one(nn.Linear(8, 6), "VBLoRAConfig", num_vectors=3, topk=4, vector_length=2)(lib)(X)
    )
    assert theirs.kind is RuntimeError and isinstance(ours.error, graft.ConfigError)


@pytest.mark.differs("FRoD: `runtime_offload_base_weight`, `progressbar`")
def test_settings_of_frod_without_effect():
    theirs, ours = each(one(nn.Linear(8, 6), "FrodConfig", runtime_offload_base_weight=True, progressbar=True))
    with torch.no_grad():
        theirs, ours = (o.value.eval()(X) for o in (theirs, ours))
    close(ours, theirs)


# layers


@pytest.mark.differs('HiRA with `init_weights="gaussian"` on convolutions, or None on embeddings')
def test_hira_with_a_gaussian_start_on_a_convolution():
    def spread(lib):
        model = one(nn.Conv2d(3, 6, 3), "HiraConfig", r=2, init_weights="gaussian")(lib)
        uniform = one(nn.Conv2d(3, 6, 3), "HiraConfig", r=2)(lib)
        a, b = (next(p for n, p in m.named_parameters() if "hira_A" in n) for m in (model, uniform))
        return torch.equal(a, b), a.std()

    (theirs, _), (ours, std) = (o.value for o in each(spread))
    assert theirs and not ours and abs(std - 0.5) < 0.1  # 1 / r


@pytest.mark.differs("BOFT on a dilated convolution, or one with groups")
def test_boft_on_convolutions():
    dilated = nn.Conv2d(4, 6, 3, dilation=2, padding=2)
    x = torch.linspace(-1, 1, 100).view(1, 4, 5, 5)
    theirs, ours = each(lambda lib: one(dilated, "BOFTConfig", boft_block_size=2)(lib)(x))
    close(ours.value, dilated(x))
    assert theirs.value.shape != dilated(x).shape
    theirs, ours = each(lambda lib: one(nn.Conv2d(4, 6, 3, groups=2), "BOFTConfig", boft_block_size=2)(lib)(x))
    assert theirs.kind is NotImplementedError and ours.value.shape == (1, 6, 3, 3)


@pytest.mark.differs("PSOFT on a base in float64, on Conv1D")
def test_psoft_on_other_layers():
    theirs, ours = each(lambda lib: one(nn.Linear(8, 6).double(), "PsoftConfig", r=2)(lib)(X.double()))
    assert theirs.kind is TypeError and ours.value.dtype is torch.float64
    theirs, ours = each(lambda lib: one(Conv1D(6, 8), "PsoftConfig", r=2, fan_in_fan_out=True)(lib)(X))
    assert theirs.kind is ValueError and ours.value.shape == (3, 6)


@pytest.mark.differs("TinyLoRA on Conv1D without `fan_in_fan_out`: a second adapter")
def test_a_second_adapter_of_tinylora_on_conv1d():
    def second(lib):
        model = one(Conv1D(6, 8), "TinyLoraConfig", r=2)(lib)
        model.add_adapter("b", lib.TinyLoraConfig(r=2, target_modules=["0"]))
        model.set_adapter("b")
        return model(X)

    theirs, ours = each(second)
    assert theirs.kind is RuntimeError and ours.value.shape == (3, 6)


@pytest.mark.differs("TinyLoRA on a layer that it does not know")
def test_tinylora_on_a_layer_that_it_does_not_know():
    theirs, ours = each(one(nn.LayerNorm(8), "TinyLoraConfig", r=2))
    assert theirs.kind is KeyError and isinstance(ours.error, graft.UnsupportedLayerError)


@pytest.mark.differs("AdaMSS on a base on the meta device")
def test_adamss_on_the_meta_device():
    theirs, ours = each(one(nn.Linear(8, 6, device="meta"), "AdamssConfig", r=2))
    assert theirs.kind is NotImplementedError and isinstance(ours.error, graft.UnsupportedLayerError)


@pytest.mark.differs("OLoRA on Conv1D")
def test_olora_on_conv1d():
    config = dict(r=2, init_lora_weights="olora", fan_in_fan_out=True)
    theirs, ours = each(lambda lib: one(Conv1D(6, 8), "LoraConfig", **config)(lib)(X))
    assert theirs.kind is RuntimeError and ours.value.shape == (3, 6)


@pytest.mark.differs("PiSSA and its like on a weight that another module uses (tied head)")
def test_a_start_that_changes_a_weight_of_two_modules():
    def changed(lib):
        base = Tied()
        before = base.emb.weight.clone()
        made(lib, base, "LoraConfig", r=2, target_modules=["head"], init_lora_weights="pissa")
        return not torch.equal(base.emb.weight, before)

    theirs, ours = each(changed)
    assert theirs.value and isinstance(ours.error, graft.ConfigError)


@pytest.mark.differs("a model of nothing but GPTQ or AWQ layers, which have no parameters")
def test_codes_alone():
    """Layers that have no parameters."""
    theirs, ours = each(one(Gptq(linear()), "LoraConfig", r=2))
    assert theirs.kind is StopIteration and isinstance(ours.value, graft.PeftModel)


@pytest.mark.differs("empty containers (`lora_embedding_A` on a linear layer)")
def test_containers_of_layers():
    def shared(lib):
        model = made(lib, nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 6)), "LoraConfig", target_modules=["0", "1"])
        return model.base_model.model[0].lora_embedding_A is model.base_model.model[1].lora_embedding_A

    theirs, ours = each(shared)
    assert ours.value and not theirs.value


# computing


@pytest.mark.differs("two adapters of LN tuning, or with rows of the same tokens, active on one layer")
def test_two_norms_at_once():
    def together(lib):
        model = one(nn.LayerNorm(8), "LNTuningConfig")(lib)
        model.add_adapter("b", lib.LNTuningConfig(target_modules=["0"]))
        model.base_model.set_adapter(["default", "b"])
        return model

    theirs, ours = each(together)
    assert theirs.error is None and outcome(lambda: theirs.value(X)).kind is ValueError
    assert ours.kind is ValueError and "more than one" in str(ours.error)


@pytest.mark.differs("HRA with `apply_GS`")
def test_vectors_of_hra_that_depend_on_each_other():
    def difference(lib):
        model = one(nn.Linear(8, 6), "HRAConfig", r=4, apply_GS=True)(lib)
        with torch.no_grad():
            for name, p in model.named_parameters():
                if "hra_u" in name:
                    p[:, 1] = p[:, 0]
        return model(X)

    theirs, ours = each(difference)
    assert ours.value.isfinite().all() and not torch.allclose(theirs.value, ours.value)


@pytest.mark.differs('MiSS "mini" merged in half precision')
def test_mini_merged_in_half_precision():
    def merged(lib):
        models.seed(0)
        config = lib.MissConfig(r=4, mini_r=2, init_weights="mini", target_modules=["0"])
        model = lib.get_peft_model(nn.Sequential(nn.Linear(8, 6).half()), config, autocast_adapter_dtype=False)
        model.merge_adapter()
        model.unmerge_adapter()
        return next(p.shape for name, p in model.named_parameters() if "miss" in name)

    theirs, ours = each(merged)
    assert theirs.kind is RuntimeError and ours.value == (4, 2)


@pytest.mark.differs("RoAd: a mixed batch where adapters have heads of their own (`modules_to_save`)")
def test_rows_with_heads_of_road():
    def row(lib):
        config = lambda: lib.RoadConfig(group_size=2, target_modules=["query"], modules_to_save=["classifier"])
        models.seed(0)
        model = lib.get_peft_model(models.make("bert-seq"), config())
        model.add_adapter("b", config())
        random(model, "modules_to_save.b").eval()
        batch = models.inputs("bert-seq")
        with torch.no_grad():
            mixed = model(**batch, adapter_names=["default", "default", "b"]).logits[2]
            model.set_adapter("b")
            return (mixed - model(**batch).logits[2]).abs().max()

    theirs, ours = each(row)
    assert theirs.value > 0.1 and ours.value < 1e-5


@pytest.mark.differs("Lily: `unmerge_adapter`")
def test_unmerging_lily():
    theirs, ours = each(lambda lib: one(nn.Linear(8, 8), "LilyConfig", r=2, num_B=2)(lib).unmerge_adapter())
    assert theirs.kind is NotImplementedError and ours.error is None and ours.warned("unmerged")


@pytest.mark.differs("KaSA beside other adapters, on other layers")
def test_kasa_beside_another_adapter_on_another_layer():
    def beside(lib):
        model = made(
            lib, nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), "LoraConfig", r=2, kasa_config=lib.KasaConfig()
        )
        model.add_adapter("b", lib.LoraConfig(target_modules=["1"]))

    theirs, ours = each(beside)
    assert theirs.kind is ValueError and ours.error is None


@pytest.mark.differs("KaSA: `get_delta_weight`")
def test_the_update_of_kasa():
    def error(lib):
        model = random(one(nn.Linear(8, 8), "LoraConfig", r=2, kasa_config=lib.KasaConfig())(lib), "lora")
        layer = model.base_model.model[0]
        before = layer.get_base_layer().weight.clone()
        delta = layer.get_delta_weight("default")
        layer.merge()
        return (layer.get_base_layer().weight - before - delta).abs().max()

    theirs, ours = each(error)
    assert theirs.value > 0.1 and ours.value < 1e-5


@pytest.mark.differs("combining: VeLoRA, MonteCLoRA")
@pytest.mark.parametrize("kind", ["velora_config", "monteclora_config"])
def test_a_sum_of_velora_and_of_monteclora(kind):
    def combined(lib):
        options = {"velora_config": dict(num_groups=2), "monteclora_config": dict(buffer_size=1)}[kind]
        cls = {"velora_config": lib.VeloraConfig, "monteclora_config": lib.MontecloraConfig}[kind]
        config = lambda: lib.LoraConfig(r=2, target_modules=["0"], **{kind: cls(**options)})
        models.seed(0)
        model = lib.get_peft_model(nn.Sequential(nn.Linear(8, 8)), config())
        model.add_adapter("b", config())
        model.add_weighted_adapter(["default", "b"], [1.0, 1.0], "c", combination_type="linear")
        return getattr(model.peft_config["c"], kind)

    theirs, ours = each(combined)
    assert theirs.value is not None and ours.error is None and ours.value is None


@pytest.mark.differs("combining: options without use (`density` with `linear`)")
def test_a_density_that_nothing_uses():
    def combined(lib):
        model = one(nn.Linear(8, 8), "LoraConfig", r=2)(lib)
        model.add_weighted_adapter(["default"], [1.0], "c", combination_type="linear", density=0.5)

    theirs, ours = each(combined)
    assert not theirs.warned("density") and ours.warned("density")


@pytest.mark.differs("MonteCLoRA: NaN in what it draws from")
def test_draws_of_monteclora_that_are_not_finite():
    def output(lib):
        config = dict(r=2, init_lora_weights=False, monteclora_config=lib.MontecloraConfig(buffer_size=1))
        model = one(nn.Linear(8, 8), "LoraConfig", **config)(lib).train()
        with torch.no_grad():
            for name, p in model.named_parameters():
                if "expert_weights_prior" in name:
                    p.fill_(torch.inf)
        return model(X)

    theirs, ours = each(output)
    assert theirs.value.isfinite().all() and ours.value.isnan().any()


@pytest.mark.differs('aLoRA without `task_type="CAUSAL_LM"`')
def test_alora_without_a_task():
    def acts(lib):
        config = dict(target_modules=["q_proj"], alora_invocation_tokens=[3], init_lora_weights=False)
        model = made(lib, models.make("llama"), "LoraConfig", **config).eval()
        with torch.no_grad():
            y = model(input_ids=IDS).logits
            with model.disable_adapter():
                return not torch.equal(y, model(input_ids=IDS).logits)

    theirs, ours = each(acts)
    assert ours.value and not theirs.value


@pytest.mark.differs("aLoRA with several returned samples (`num_return_sequences`)")
def test_several_samples_of_alora():
    def samples(lib):
        config = dict(target_modules=["q_proj"], alora_invocation_tokens=[3], task_type="CAUSAL_LM")
        model = made(lib, models.make("llama"), "LoraConfig", **config).eval()
        return model.generate(input_ids=IDS, do_sample=True, num_return_sequences=2, max_new_tokens=2)

    theirs, ours = each(samples)
    assert theirs.kind is IndexError and ours.value.shape == (2, 6)


@pytest.mark.differs("DoRA in mixed batches")
def test_rows_of_dora():
    def mixed(lib):
        config = dict(r=2, use_dora=True, target_modules=["q_proj"])
        model = made(lib, models.make("llama"), "LoraConfig", **config).eval()
        model.add_adapter("b", lib.LoraConfig(**config))
        return model(input_ids=IDS.repeat(2, 1), adapter_names=["default", "b"]).logits

    theirs, ours = each(mixed)
    assert theirs.kind is ValueError and ours.value.shape[:2] == (2, 4)


@pytest.mark.differs("trainable tokens on a head with a bias")
def test_token_rows_of_a_head_with_a_bias():
    def difference(lib):
        head = nn.Linear(8, 6)
        return (one(head, "TrainableTokensConfig", token_indices=[1])(lib)(X) - head(X)).abs().max()

    theirs, ours = each(difference)
    assert theirs.value > 0.01 and ours.value < 1e-6


@pytest.mark.differs("trainable tokens: a token that is the embedding's `padding_idx`")
def test_token_rows_of_padding():
    def gradient(lib):
        embedding = one(nn.Embedding(9, 4, padding_idx=3), "TrainableTokensConfig", token_indices=[7, 3])(lib)
        embedding(torch.tensor([3, 7])).sum().backward()
        return next(p.grad for name, p in embedding.named_parameters() if "trainable_tokens_delta" in name)[
            :, 0
        ].tolist()

    theirs, ours = each(gradient)
    assert theirs.value == [1, 0] and ours.value == [1, 1]


@pytest.mark.differs("`scale_layer` and `unscale_layer` of LoRA on an embedding")
def test_scaling_the_layer_of_an_embedding():
    def change(lib):
        embedding = one(nn.Embedding(9, 4), "LoraConfig", init_lora_weights=False)(lib)
        ids = torch.tensor([1, 2])
        before = embedding(ids)
        next(m for m in embedding.modules() if hasattr(m, "scale_layer")).scale_layer(3)
        return (embedding(ids) - before).abs().max()

    theirs, ours = each(change)
    assert theirs.value == 0 and ours.value > 0.01


@pytest.mark.differs("trainable tokens in the forward pass")
def test_token_rows_and_the_whole_table():
    def copies(lib):
        config = dict(token_indices=[3], target_modules=["emb"])
        model = made(lib, models.make("embedding"), "TrainableTokensConfig", **config).get_base_model().eval()
        with torch.no_grad(), Large(model.emb.weight.numel()) as large:
            model.emb(torch.tensor([[1, 2, 3]]))
        return large.seen

    theirs, ours = each(copies)
    assert theirs.value == 1 and ours.value == 0


@pytest.mark.differs("HiRA and LoHa on an embedding")
def test_the_update_of_an_embedding_of_hira():
    def formed(lib):
        layer = one(nn.Embedding(500, 8), "HiraConfig", r=2)(lib).get_base_model()[0].eval()
        with torch.no_grad(), Large(500 * 8) as large:
            layer(torch.tensor([[1, 2, 3]]))
        return large.seen

    theirs, ours = each(formed)
    assert theirs.value > 0 and ours.value == 0


@pytest.mark.differs("`disable_adapter()` where only some layers are switched off")
def test_a_block_where_some_layers_were_off():
    def states(lib):
        model = made(lib, nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 6)), "LoraConfig", target_modules=["0", "1"])
        model.base_model.model[0].enable_adapters(False)
        with model.disable_adapter():
            pass
        return [model.base_model.model[i].disable_adapters for i in (0, 1)]

    theirs, ours = each(states)
    assert theirs.warnings and theirs.value == [False, False]
    assert ours.warnings and ours.value == [True, False]


@pytest.mark.differs("initial values of a whole `MultiheadAttention`")
def test_draws_for_a_whole_attention():
    def drawn(lib):
        made(lib, nn.Sequential(nn.MultiheadAttention(8, 2)), "LoraConfig", r=2)
        return torch.get_rng_state()

    theirs, ours = each(drawn)
    assert not torch.equal(theirs.value, ours.value)


@pytest.mark.differs("dropout masks of LoRA, DoRA, VeRA and AdaLoRA for 64 rows and more")
def test_masks_of_many_rows():
    def trained(lib):
        models.seed(1)
        model = random(one(nn.Linear(8, 6), "LoraConfig", r=2, lora_dropout=0.5)(lib), "lora").train()
        outputs = []
        for rows in (9, 64):
            models.seed(3)
            outputs.append(model(X.repeat(22, 1)[:rows]))
        return outputs

    theirs, ours = each(trained)
    close(ours.value[0], theirs.value[0])
    assert not torch.allclose(ours.value[1], theirs.value[1], atol=1e-3)


@pytest.mark.differs("random initial rows (`init_weights=False`) in half precision")
def test_random_token_rows_in_half_precision():
    def rows(lib):
        config = dict(token_indices=[1, 2, 5], init_weights=False)
        model = one(nn.Embedding(9, 12, dtype=torch.bfloat16), "TrainableTokensConfig", **config)(lib)
        return next(p for name, p in model.named_parameters() if "trainable_tokens_delta" in name).float()

    theirs, ours = each(rows)
    assert not torch.allclose(theirs.value, ours.value, atol=1e-2)


@pytest.mark.differs("EVA with more components than inputs have")
def test_more_components_of_eva_than_inputs():
    def start(lib):
        config = lib.LoraConfig(r=6, target_modules=["0"], init_lora_weights="eva", eva_config=lib.EvaConfig(rho=2.0))
        model = lib.get_peft_model(nn.Sequential(nn.Linear(8, 6)), config)
        lib.initialize_lora_eva_weights(
            model,
            [torch.randn(20, 8) for _ in range(3)],
            forward_fn=lambda m, x: m(x),
            prepare_model_inputs_fn=None,
            prepare_layer_inputs_fn=None,
            show_progress_bar=False,
        )

    theirs, ours = each(start)
    assert theirs.kind is ValueError and ours.error is None
