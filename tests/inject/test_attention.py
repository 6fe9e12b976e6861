# SPDX-License-Identifier: Apache-2.0
"""nn.MultiheadAttention: its input projection is a parameter, and it reads the weight of its output projection."""

import copy

import peft
import pytest
import torch
from torch import nn
from torch.testing import assert_close

import graft
from graft.core.errors import RoutingError, UnsupportedLayerError
from tests.looks import layers
from tests.models import adapted, seeded

WHOLE, OUT = ["attn", "lin"], ["out_proj", "lin"]


class Net(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.attn = nn.MultiheadAttention(12, 3, **options)
        self.lin = nn.Linear(12, 12)

    def forward(self, x):
        keys = x[..., : self.attn.kdim]
        return self.lin(self.attn(x, keys, x, need_weights=False)[0])


def base(**options):
    with seeded(0):
        return Net(**{"batch_first": True, **options}).eval()


X = torch.linspace(-2, 2, 180).sin().view(3, 5, 12)


def net_with(lib=graft, targets=WHOLE, model=None, method="LORA", **config):
    values = dict(r=2, lora_alpha=3, init_lora_weights=False) if method == "LORA" else {}
    cls = lib.PEFT_TYPE_TO_CONFIG_MAPPING[method]
    return adapted(model or base(), cls(target_modules=targets, **values | config), lib=lib, scale=0)


def by_hand(model):
    """The plain model with the adapters' updates in its weights."""
    plain = base()
    change = {key: layer.get_delta_weight("default") for key, layer in layers(model).items()}
    with torch.no_grad():
        plain.lin.weight += change["lin"]
        plain.attn.out_proj.weight += change["attn.out_proj"]
        if "attn" in change:
            plain.attn.in_proj_weight += change["attn"]
    return plain


@pytest.mark.parametrize("targets", [WHOLE, OUT], ids=["attention", "out_proj"])
def test_outputs_gradients_and_merging(targets):
    model = net_with(targets=targets)
    expected = by_hand(model)(X)
    assert_close(model(X), expected)
    model(X).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters() if p.requires_grad)
    with torch.no_grad():
        assert_close(model(X), expected)  # torch's fast path
        with model.disable_adapter():
            assert_close(model(X), base()(X))
        model.merge_adapter()
        assert_close(model(X), expected)
        model.unmerge_adapter()
        assert_close(model(X), expected)
        bare = copy.deepcopy(model).merge_and_unload()
        assert_close(bare(X), expected)
        assert bare.state_dict().keys() == base().state_dict().keys()


def test_names_are_pefts():
    for targets in (WHOLE, OUT, "all-linear"):
        ours, theirs = ({k for k in net_with(lib, targets).state_dict() if "lora" in k} for lib in (graft, peft))
        assert ours == theirs


@pytest.mark.differs("LoRA on a whole `MultiheadAttention`")
def test_files_go_both_ways_though_peft_adds_an_update_twice(tmp_path):
    """In PEFT's files B of the output projection stands for twice its values."""
    ours, theirs = net_with(), net_with(peft)
    ours.save_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    assert_close(peft.PeftModel.from_pretrained(base(), tmp_path / "ours")(X), ours(X))
    assert_close(graft.PeftModel.from_pretrained(base(), tmp_path / "theirs")(X), theirs(X))
    again = graft.PeftModel.from_pretrained(base(), tmp_path / "ours")
    for key, t in ours.state_dict().items():
        assert torch.equal(again.state_dict()[key], t)
    state = graft.get_peft_model_state_dict(ours)
    twin = net_with()
    graft.set_peft_model_state_dict(twin, state)
    assert_close(twin(X), ours(X))


@pytest.mark.parametrize("bias", ["all", "lora_only"])
@torch.no_grad()
def test_biases_below_it_go_both_ways(bias, tmp_path):
    """PEFT's files have the output projection's below `base_layer`; `in_proj_bias` is none that PEFT trains."""
    trained = {}
    for lib in (graft, peft):
        model = net_with(lib, bias=bias)
        held = {n: p for n, p in model.named_parameters() if p.requires_grad and "bias" in n}
        for p in held.values():
            p += torch.linspace(-1, 1, len(p))
        trained[lib] = set(held)
        model.save_pretrained(tmp_path / lib.__name__)
        for reader in (graft, peft) if bias == "all" else (graft,):  # PEFT's files of "lora_only" lack this one
            if lib is graft or bias == "all":
                assert_close(reader.PeftModel.from_pretrained(base(), tmp_path / lib.__name__)(X), model(X))
    assert (
        trained[graft] == trained[peft] and "base_model.model.attn.base_layer.out_proj.base_layer.bias" in trained[peft]
    )


@pytest.mark.differs("an adapter on `MultiheadAttention.out_proj` alone")
def test_an_output_projection_by_itself_is_adapted(tmp_path):
    """PEFT's forward ignores the adapter, and merging adds it."""
    theirs = net_with(peft, ["out_proj"])
    assert_close(theirs(X), base()(X))
    model = net_with(targets=["out_proj"])
    assert not torch.allclose(model(X), base()(X), atol=1e-3)
    model.save_pretrained(tmp_path)
    merged = peft.PeftModel.from_pretrained(base(), tmp_path).merge_and_unload()
    assert_close(merged(X), model(X))


def test_a_model_without_a_wrapper_and_its_state_dict():
    model = graft.inject_adapter_in_model(graft.LoraConfig(r=2, target_modules=["attn"]), base())
    state = graft.get_peft_model_state_dict(model)
    assert set(state) == {
        f"attn{place}.lora_{x}.weight" for place in ("", ".base_layer.out_proj") for x in "AB"
    }  # fmt: skip
    config = graft.LoraConfig(r=2, target_modules=["attn"])
    again = graft.inject_adapter_in_model(config, base(), state_dict=state)
    assert graft.get_peft_model_state_dict(again).keys() == state.keys()


@pytest.mark.differs("other methods on `MultiheadAttention`")
@pytest.mark.parametrize("method, config", [("VERA", dict(r=3)), ("LOHA", dict(r=2, init_weights=False)),
                                            ("OFT", dict(oft_block_size=2, init_weights=False)), ("HRA", dict(r=2)),
                                            ("IA3", dict(feedforward_modules=[]))], ids=str)  # fmt: skip
@torch.no_grad()
def test_other_methods_adapt_it(method, config, tmp_path):
    model = net_with(method=method, **config)
    for p in model.parameters():
        if p.requires_grad:
            p += torch.linspace(-0.3, 0.3, p.numel()).view(p.shape)
    expected = model(X)
    assert (expected - base()(X)).abs().max() > 1e-2
    model.save_pretrained(tmp_path)
    assert_close(graft.PeftModel.from_pretrained(base(), tmp_path)(X), expected)
    model.merge_adapter()
    assert_close(model(X), expected, rtol=1e-4, atol=1e-5)
    model.unmerge_adapter()
    assert_close(model(X), expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_dora_and_two_adapters_at_once():
    model = net_with(use_dora=True)
    with seeded(2):
        model.add_adapter("b", graft.LoraConfig(r=3, target_modules=["out_proj"], init_lora_weights=False))
    model.base_model.set_adapter(["default", "b"])
    expected = model(X)
    model.merge_adapter()
    assert_close(model(X), expected)


def test_dropout_and_a_trained_bias():
    model = net_with(lora_dropout=0.5, bias="lora_only").train()
    with seeded(3):
        a = model(X)
    with seeded(4):
        assert not torch.equal(model(X), a)
    assert torch.equal(model.eval()(X), model(X))


@pytest.mark.differs("an adapter inside `nn.TransformerEncoderLayer` in eval")
def test_an_encoder_layer_calls_it():
    """torch's fast path in the encoder reads all weights itself."""
    with seeded(0):
        encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(12, 3, 20, batch_first=True), 2).eval()
    plain = encoder(X)
    model = net_with(targets=["self_attn"], model=encoder)
    trained = model(X)
    with torch.no_grad():
        assert_close(model(X), trained)
        assert (trained - plain).abs().max() > 1e-2
        assert_close(model.merge_and_unload()(X), trained)


REFUSED = {  # with PEFT's beginning of the text, where it refuses as well
    "velora": (dict(velora_config={}), "does not work with velora_config"),
    "kasa": (dict(kasa_config={}), "adapts linear layers only"),
    "bdlora": (dict(use_bdlora=dict(target_modules_bd_a=["attn"])), "adapts linear layers only"),
    "monteclora": (dict(monteclora_config={}), "MultiheadAttention does not work with monteclora_config"),
    "mica": (dict(init_lora_weights="mica"), "MultiheadAttention does not work with mica"),
    "qalora": (dict(use_qalora=True, qalora_group_size=4), "use_qalora=True has no meaning for layer 'attn'"),
    "alora": (dict(alora_invocation_tokens=[1], task_type="CAUSAL_LM"), "aLoRA .* linear layers only|ALoRA would have"),
    "arrow": (dict(arrow_config={}), "linear layers only|Arrow would have"),
    "pissa": (dict(init_lora_weights="pissa"), r"no meaning for 'attn' \(MultiheadAttention\)"),
    "fan_in_fan_out": (dict(fan_in_fan_out=True), "MultiheadAttention does not work with fan_in_fan_out"),
}


@pytest.mark.differs(
    "variants of LoRA on `MultiheadAttention` and `target_parameters`: `lora_bias`, `fan_in_fan_out`, QA-LoRA"
)
@pytest.mark.parametrize("case", REFUSED)
def test_variants_that_need_a_call_or_a_matrix_are_refused(case):
    config, text = REFUSED[case]
    model = base()
    before = {n: p.requires_grad for n, p in model.named_parameters()}
    with pytest.raises(ValueError, match=text):
        graft.get_peft_model(model, graft.LoraConfig(r=2, target_modules=["attn"], **config))
    assert {n: p.requires_grad for n, p in model.named_parameters()} == before


@pytest.mark.parametrize("lib", [graft, peft])
def test_an_output_projection_of_another_kind_is_refused(lib):
    model = base()
    model.attn.out_proj = nn.Conv1d(12, 12, 1)
    with pytest.raises(TypeError, match=r"out_proj must be an instance of nn\.Linear for MultiheadAttention"):
        lib.get_peft_model(model, lib.LoraConfig(r=2, target_modules=["attn"]))
    assert type(model.attn) is nn.MultiheadAttention


PATTERNS = [
    dict(use_rslora=True, rank_pattern={"attn": 3}, alpha_pattern={"attn": 11}),
    dict(rank_pattern={"out_proj": 3}, alpha_pattern={"attn.out_proj": 7}),  # which is no target, and fits nothing
]


@pytest.mark.parametrize("patterns", PATTERNS, ids=str)
@pytest.mark.filterwarnings("ignore:The following")
@torch.no_grad()
def test_patterns_name_the_attention_for_its_projections_too(patterns, tmp_path):
    ours, theirs = net_with(**patterns), net_with(peft, **patterns)
    assert {k: t.shape for k, t in ours.state_dict().items()} == {k: t.shape for k, t in theirs.state_dict().items()}
    for key, layer in layers(ours).items():
        twin = theirs.get_submodule(f"base_model.model.{key.replace('attn.out', 'attn.base_layer.out')}")
        assert layer.scaling == twin.scaling
    for lib, model in ((graft, ours), (peft, theirs)):
        model.save_pretrained(tmp_path / lib.__name__)
        for reader in (graft, peft):
            assert_close(reader.PeftModel.from_pretrained(base(), tmp_path / lib.__name__)(X), model(X))
    other = net_with(r=3, use_rslora=patterns.get("use_rslora", False))
    other_before = other(X)
    graft.hotswap_adapter(other, tmp_path / "graft", "default")
    assert_close(other(X), ours(X))
    assert (other_before - ours(X)).abs().max() > 1e-3


def test_the_gaussian_start():
    for lib in (graft, peft):
        model = net_with(lib, init_lora_weights="gaussian", r=12)
        A = model.state_dict()["base_model.model.attn.lora_A.default.weight"]
        assert 0.8 < A.std() * 12 < 1.2
        assert_close(model(X), base()(X))


@pytest.mark.filterwarnings("ignore")
def test_refusals():
    with pytest.raises(UnsupportedLayerError, match="Only same embed for query/key/value is supported"):
        net_with(targets=["attn"], model=base(kdim=8))
    with pytest.raises(ValueError, match="MultiheadAttention does not work with lora_bias"):
        net_with(lora_bias=True, init_lora_weights=True)
    with pytest.raises(UnsupportedLayerError, match="without a call of the layer, so that ALoRA would have no effect"):
        net_with(targets=["out_proj"], alora_invocation_tokens=[1])
    model = net_with()
    with pytest.raises(RoutingError, match="does not support mixed adapter batches"):
        model(X, adapter_names=["default", "__base__", "default"])
    assert_close(model(X, adapter_names=["default"] * 3), by_hand(model)(X))
    only = net_with(targets=["out_proj"])
    with pytest.raises(RoutingError, match=r"'attn\.out_proj'.* does not support mixed adapter batches"):
        only(X, adapter_names=["default", "__base__", "default"])
