# SPDX-License-Identifier: Apache-2.0
"""Options, layers and calls that methods refuse, each with the nearest that they take."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import graft
from graft.core.effect import Rewrite
from graft.core.errors import AdapterNotFoundError, CheckpointError, UnsupportedLayerError
from graft.inject.match import minimize_names
from graft.io.compose import join_stages
from tests.models import make
from tests.raised import refuses

BD = dict(target_modules_bd_a=["lin0"], nblocks=2)
# a config, options that are refused, a part of the text, and options in their place that are not
OPTIONS = [
    ("AdaLora", dict(init_lora_weights="loftq"), "not support LOFTQ", {}),
    ("AdaLora", dict(use_dora=True), "ADALORA does not support DoRA", {}),
    ("AdaLora", dict(total_step=None), "does not work when `total_step` is None", dict(total_step=1)),
    ("AdaLora", dict(total_step=0), "supply a value > 0", dict(total_step=2)),
    ("AdaLora", dict(tinit=5, tfinal=5), "tinit=5, tfinal=5, total_step=10", dict(tinit=5, tfinal=4)),
    ("Bottleneck", dict(mh_adapter=False, output_adapter=True, non_linearity="none such"), "none such", {}),
    ("Deft", dict(r=0), "`r` should be a positive integer", dict(r=1)),
    ("FourierFT", dict(random_loc_seed=None), "`random_loc_seed` must be a number", dict(random_loc_seed=0)),
    ("FourierFT", dict(n_frequency_pattern={"0": 0}), "`n_frequency` should be a positive", dict(n_frequency=1)),
    ("Lily", dict(r=0), "`r`", dict(r=1)),
    ("Lily", dict(stride_A=0), "stride_A", dict(stride_A=1)),
    ("Lily", dict(num_B=1), "num_B", dict(num_B=2)),
    ("Miss", dict(mini_r=0), "`mini_r` should be a positive integer", dict(mini_r=1)),
    ("IA3", dict(feedforward_modules=["fc1"]), r"but has \['fc1'\]", dict(feedforward_modules=["lin0"])),
    ("Lora", dict(use_dora=True, megatron_config={}), None, {}),
    ("Lora", dict(use_dora=True, megatron_config={"a": 1}), "set `use_dora=False`", dict(megatron_config={"a": 1})),
    ("Lora", dict(megatron_config={"a": 1}, megatron_core="own"), "must name a module of Megatron", {}),
    ("Lora", dict(use_dora=True, use_qalora=True), "variant combination", dict(use_qalora=True)),
    ("Lora", dict(velora_config=dict(init_type="none")), "Unsupported `init_type` 'none'",
     dict(velora_config=dict(init_type="random"))),
    ("MoeLora", dict(router_loss=True, top_k=None), "with top_k=None", dict(router_loss=False, top_k=None)),
    ("MoeLora", dict(num_experts=2, top_k=3), "top_k", dict(num_experts=3, top_k=3)),
    ("Psoft", dict(psoft_alpha=0), "must not be 0", dict(psoft_alpha=1)),
    ("Reft", dict(non_linearity="none such"), "Unknown non_linearity", dict(non_linearity="TANH")),
    ("Reft", dict(prefix_positions=0), "nor both 0", dict(prefix_positions=0, suffix_positions=1)),
    ("Reft", dict(prefix_positions=-1, suffix_positions=2), "must not be negative", dict(prefix_positions=1)),
    ("Reft", dict(prefix_positions=3, suffix_positions=-1), "must not be negative", {}),
    ("Road", dict(variant="road_3"), "Invalid variant road_3", dict(variant="road_2")),
    ("Road", dict(group_size=3), "divisible by 2", dict(group_size=2)),
    ("Road", dict(group_size=0), "divisible by 2", dict(group_size=4)),
    ("Shadow", dict(shadow_model="folder", shadow_hidden_size=4), "shadow_hidden_size can only be set", {}),
    ("TLora", dict(r=2, min_rank=3), "between 1 and r=2, got 3", dict(r=2, min_rank=2)),
    ("TLora", dict(r=2, min_rank=0), "between 1 and r=2, got 0", dict(r=2, min_rank=1)),
]  # fmt: skip
BASE = {"AdaLora": dict(total_step=10), "IA3": dict(target_modules=["lin0"], feedforward_modules=[])}


def config_of(name, options):
    return getattr(graft, f"{name}Config")(**BASE.get(name, {}) | options)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "name, options, text, taken", OPTIONS, ids=[f"{n}-{' '.join(o)}-{i}" for i, (n, o, *_) in enumerate(OPTIONS)]
)
def test_options(name, options, text, taken):
    config_of(name, taken)
    if text is None:
        config_of(name, options)
        return
    refuses(graft.ConfigError, text, config_of, name, options)


# the same for an adapter on "mlp", of which lin0 has 10 inputs and 12 outputs
LAYERS = [
    ("IA3", dict(feedforward_modules=None, target_modules=["lin0"]), "specify `feedforward_modules`", {}),
    ("Lora", dict(use_bdlora=BD | dict(target_modules_bd_b=["lin0"])), "overlapping modules",
     dict(use_bdlora=BD)),
    ("Lora", dict(use_bdlora=BD | dict(target_modules_bd_a=["fc1"])), "matches neither A nor B",
     dict(use_bdlora=dict(target_modules_bd_a=["fc1"], nblocks=2, match_strict=False))),
    ("Lora", dict(use_bdlora=BD | dict(nblocks=3), r=6), "sizes 10 and r=6, not divisible by 3", dict(r=6)),
    ("Lora", dict(use_bdlora=BD | dict(nblocks=5), r=6), "not divisible by 5",
     dict(use_bdlora=BD | dict(nblocks=5), r=5)),
    ("Lora", dict(use_bdlora=dict(target_modules_bd_b=["lin0"], nblocks=2), lora_bias=True), "has no bias",
     dict(use_bdlora=BD, lora_bias=True)),
    ("Lora", dict(use_bdlora=BD, init_lora_weights="olora"), "cannot fill", dict(init_lora_weights="olora")),
    ("Lora", dict(use_bdlora=BD, init_lora_weights="eva"), "cannot fill",
     dict(use_bdlora=BD, init_lora_weights="gaussian")),
    ("Lora", dict(init_lora_weights="mica", r=11), "MiCA requires .* r=11", dict(init_lora_weights="mica", r=10)),
    ("Lora", dict(init_lora_weights="pissa_niter_x"), r"pissa_niter_\[number", {}),
    ("Lora", dict(init_lora_weights="pissa_niter_1000"), "999 is the most", dict(init_lora_weights="pissa_niter_3")),
    ("Lora", dict(use_qalora=True, qalora_group_size=3), "qalora_group_size",
     dict(use_qalora=True, qalora_group_size=5)),
    ("Psoft", dict(r=11), r"`r` \(11\) must be less", dict(r=10)),
    ("Svft", dict(r=11), "smaller r than 11", dict(r=10)),
    ("Supertuning", dict(sparsity=0.995), "leaves 0 entries", dict(sparsity=0.99)),
    ("TLora", dict(r=11), "smaller r than 11", dict(r=10)),
    ("TLora", dict(r=8, min_rank=4, rank_pattern={"lin0": 3}), "has r=3",
     dict(r=8, min_rank=3, rank_pattern={"lin0": 3})),
    ("Shira", dict(mask_type="own", r=2), "has no mask", dict(r=2)),
]  # fmt: skip


def inject(name, options):
    config = config_of(name, {"target_modules": ["lin0"]} | options)
    return graft.get_peft_model(make("mlp"), config)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "name, options, text, taken", LAYERS, ids=[f"{n}-{' '.join(o)}-{i}" for i, (n, o, *_) in enumerate(LAYERS)]
)
def test_layers(name, options, text, taken):
    inject(name, taken)
    refuses(graft.ConfigError, text, inject, name, options)


def masked(shape):
    def mask(layer, r, **_):
        return (torch.arange(shape[0] * shape[1]) < 22).view(shape).float()

    config = graft.ShiraConfig(r=1, mask_type="own", target_modules=["lin0"])
    config.mask_fn = mask
    return graft.get_peft_model(make("mlp"), config)


def lora(**options):
    return graft.get_peft_model(make("mlp"), graft.LoraConfig(**{"r": 2, "target_modules": ["lin0"], **options}))


def with_heads(heads):
    config = graft.LoraConfig(r=2, target_modules=["lin0"], modules_to_save=["head"])
    return graft.get_peft_model(make("mlp"), config, heads=heads)


def two_tokens(second):
    model = graft.get_peft_model(
        make("embedding"), graft.TrainableTokensConfig(token_indices=[1, 3], target_modules=["emb"])
    )
    model.add_adapter("other", graft.TrainableTokensConfig(token_indices=second, target_modules=["emb"]))
    model.base_model.set_adapter(["default", "other"])


class Silent(nn.Module):
    """A model whose class has no parameters that could be targets."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3, 3))
        self.inner = nn.Linear(3, 3)


SHAPE = make("mlp").lin0.weight.shape
CALLS = {
    "a mask of another shape": (lambda: masked((3, 3)), graft.ConfigError, r"mask of shape \(3, 3\)",
                                lambda: masked(SHAPE)),
    "no tokens": (lambda: two_tokens([]), graft.ConfigError, "token_indices is empty", lambda: two_tokens([2])),
    "tokens of two": (lambda: two_tokens([3, 4]), ValueError, "already defined", lambda: two_tokens([2, 4])),
    "a method": (lambda: graft.DeftConfig(decomposition_method="svd"), graft.ConfigTypeError, "'relu', 'qr'", None),
    "more frequencies than numbers": (
        lambda: inject("FourierFT", dict(n_frequency=121)), UnsupportedLayerError, "is 121 and the product is 120",
        lambda: inject("FourierFT", dict(n_frequency=120))),
    "blocks of MiSS": (
        lambda: inject("Miss", dict(r=2, mini_r=5, init_weights="mini")), UnsupportedLayerError,
        r"lin0.*\(12\) must be divisible by `mini_r` \(5\)",
        lambda: inject("Miss", dict(r=2, mini_r=6, init_weights="mini"))),
    "heads that are no mapping": (lambda: with_heads([nn.Linear(12, 3)]), graft.ConfigError, "modules by name",
                                  lambda: with_heads({"head": nn.Linear(12, 3)})),
    "a head of no name": (lambda: with_heads({"lin0": nn.Linear(12, 3)}), graft.ConfigError, r"\['head'\]", None),
    "a head that is no module": (lambda: with_heads({"head": "x"}), graft.ConfigError, "got str", None),
    "a head of another width": (
        lambda: with_heads({"head": nn.Linear(11, 3)}), graft.ConfigError, "takes 11 .* has 12", None),
    "a class": (lambda: graft.get_peft_model(nn.Linear, graft.LoraConfig()), TypeError, "the class Linear", None),
    "a text as model": (lambda: graft.get_peft_model("llama", graft.LoraConfig()), TypeError, "got 'llama'", None),
    "a parameter of the root": (lambda: graft.get_peft_model(Silent(), graft.LoraConfig(target_parameters=["weight"])),
                                graft.ConfigError, "top-level module", None),
    "no targets to shorten": (lambda: minimize_names([], ["a"]), ValueError, "list or set",
                              lambda: minimize_names(["b"], ["a"])),
    "a text of targets": (lambda: minimize_names("ab", ["a"]), ValueError, "list or set", None),
    "an empty target": (lambda: minimize_names(["", "b"], ["a"]), ValueError, "empty string", None),
    "a target among others": (lambda: minimize_names(["a.b"], ["c", "a.b"]), ValueError, r"\['a\.b'\]",
                              lambda: minimize_names(["a.b"], ["c"])),
    "a part and what is after": (lambda: Rewrite(part=max, post=max), TypeError, "no `post`", None),
    "a part that is apart": (lambda: Rewrite(part=max, apart=True), TypeError, "not `apart`", None),
    "ahead and before": (lambda: Rewrite(ahead=max, pre=max, block=True), TypeError, "no `pre`", None),
    "ahead of no block": (lambda: Rewrite(ahead=max), TypeError, "block=True", lambda: Rewrite(ahead=max, block=True)),
    "no parts": (lambda: join_stages([], "x"), CheckpointError, "no parts to join", None),
    "presets of ReFT": (lambda: graft.ReftConfig.preset("x"), graft.ConfigError, "no preset 'x'; there are loreft",
                        lambda: graft.ReftConfig.preset("noreft")),
    "presets of bottlenecks": (lambda: graft.BottleneckConfig.preset("x"), graft.ConfigError, "no preset 'x'",
                               lambda: graft.BottleneckConfig.preset("houlsby")),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("call", CALLS)
def test_calls(call):
    act, error, text, taken = CALLS[call]
    if taken is not None:
        taken()
    refuses(error, text, act)


def test_a_merged_adapter_stays():
    model = lora()
    model.merge_adapter()
    layer = model.base_model.model.lin0
    with pytest.raises(ValueError, match=r"Cannot delete adapter\(s\) \['default'\] while they are merged"):
        layer.delete_adapter("default")
    assert layer.merged_adapters == ["default"]


def test_names_that_a_base_lacks():
    model = lora()
    tensors = graft.get_base_model_state_dict(model)
    fewer = {k: t for k, t in tensors.items() if k != "lin0.bias"}
    with pytest.raises(RuntimeError, match=r"Missing key\(s\) in state_dict: \['lin0\.bias'\]\. $"):
        graft.set_base_model_state_dict(model, fewer)
    with pytest.raises(RuntimeError, match=r"model: Unexpected key\(s\) in state_dict: \['x'\]"):
        graft.set_base_model_state_dict(model, tensors | {"x": tensors["lin0.bias"]})
    report = graft.set_base_model_state_dict(model, fewer | {"x": tensors["lin0.bias"]}, strict=False)
    assert (report.missing_keys, report.unexpected_keys) == (["lin0.bias"], ["x"])


@pytest.mark.parametrize("shapes, refused", [([(2, 3), (4, 2)], False), ([(3, 3), (4, 2)], True)])
def test_ranks_that_have_no_product(shapes, refused):
    op = lora().base_model.model.lin0.op
    A, B = map(torch.ones, shapes)
    if refused:
        refuses(NotImplementedError, "A of rank 3 and B of rank 2", op.product, A, B, (4, 3))
        return
    assert_close(op.product(A, B, (4, 3)), torch.full((4, 3), 2.0))


def test_adapters_that_are_not_there():
    refuses(AdapterNotFoundError, "x", graft.get_peft_model_state_dict, lora(), adapter_name="x")


def test_a_base_that_is_no_float_has_no_singular_values():
    base = make("mlp")
    base.lin0.weight = nn.Parameter(base.lin0.weight.to(torch.int8), requires_grad=False)
    with pytest.raises((TypeError, UnsupportedLayerError), match="lin0"):
        graft.get_peft_model(base, graft.LoraConfig(init_lora_weights="pissa", target_modules=["lin0"]))
