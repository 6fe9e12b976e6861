# SPDX-License-Identifier: Apache-2.0
"""Weights that only their module knows how to use are never taken for dense ones."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.testing import assert_close

import graft
from graft.core.errors import UnsupportedLayerError
from graft.storage.find import DENSE, FOREIGN, PACKED, find_store, find_tensor_store
from tests.conformance.stores import Coded, held
from tests.models import adapted, disturb, seeded
from tests.raised import refuses

X = torch.linspace(-1, 1, 30).view(5, 6)


class Beside(nn.Linear):
    """Computes with a packed copy of its weight, as quanto does."""

    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.codes = self.weight.detach().clone()

    def forward(self, x):
        return F.linear(x, self.codes, self.bias)


class Unknown(Tensor):
    """Values that torch's functions see; none of its storage, as in torchao's tensors."""

    @staticmethod
    def __new__(cls, values: Tensor):
        made = Tensor._make_wrapper_subclass(cls, values.shape, dtype=values.dtype, requires_grad=False)
        made.values_ = values
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.detach.default:
            return cls(args[0].values_)
        if func not in (torch.ops.aten.t.default, torch.ops.aten.addmm.default, torch.ops.aten.mm.default):
            raise NotImplementedError(f"{func} of an Unknown")
        return func(*[a.values_ if isinstance(a, Unknown) else a for a in args], **(kwargs or {}))


def conv1d():
    from transformers.pytorch_utils import Conv1D

    return Conv1D


class Marked(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, W):
        ctx.save_for_backward(W)
        return (x @ W.T).view(-1, W.shape[0])

    @staticmethod
    def backward(ctx, g):
        return g @ ctx.saved_tensors[0], None


class Int8(nn.Linear):
    """Integer codes and a scale; its output is a view that a Function has made, as bitsandbytes' is."""

    def __init__(self, *sizes):
        super().__init__(*sizes, bias=False)
        W = self.weight.detach()
        self.scale = W.abs().max().item() / 127
        self.weight = nn.Parameter((W / self.scale).round().to(torch.int8), requires_grad=False)

    def forward(self, x):
        return Marked.apply(x, self.weight * self.scale)


def with_unknown():
    layer = nn.Linear(6, 4)
    layer.weight = nn.Parameter(Unknown(layer.weight.detach()), requires_grad=False)
    return layer


KINDS = {
    "another copy": (
        lambda: Beside(6, 4),
        "Beside has a replaced forward, which may use its weight in another way than",
    ),
    "codes": (lambda: Int8(6, 4), "its weight holds int8, not plain floating-point numbers"),
    "a tensor subclass": (with_unknown, "its weight is of type Unknown, which graft does not know"),
}
kinds = pytest.mark.parametrize("kind", KINDS)


def net(kind):
    with seeded(0):
        return nn.Sequential(KINDS[kind][0](), nn.Tanh(), nn.Linear(4, 3)).requires_grad_(False).eval()


def lora(**options):
    return graft.LoraConfig(r=2, target_modules=["0"], **options)


@kinds
def test_adapters_run_and_train_beside_it(kind):
    base, model = net(kind), adapted(net(kind), {"a": lora()})
    layer = model.base_model.model[0]
    assert layer.quantization_backend == "foreign"
    A, B = (getattr(layer, name)["a"].weight for name in ("lora_A", "lora_B"))
    assert_close(layer(X), base[0](X) + X @ A.T @ B.T * layer.scaling["a"])
    x = X.clone().requires_grad_()
    model(x).square().sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in (A, B)) and x.grad.abs().sum() > 0
    with model.disable_adapter():
        assert torch.equal(model(X), base(X))


@kinds
@pytest.mark.parametrize("grad", [True, False])
def test_mixed_batches_run_beside_it(kind, grad):
    model = adapted(net(kind), dict.fromkeys("ab", lora()))
    names = ["a", "b", "__base__", "b", "a"]
    with torch.set_grad_enabled(grad):
        mixed = model(X, adapter_names=names)
    rows = []
    for i, name in enumerate(names):
        if name == "__base__":
            rows.append(net(kind)(X[i : i + 1]))
        else:
            model.set_adapter(name)
            rows.append(model(X[i : i + 1]))
    assert_close(mixed, torch.cat(rows))


@pytest.mark.differs(
    "a weight that is not dense (integer codes, float8, an unknown tensor subclass such as torchao's), or a layer "
    "class with a forward of its own (bitsandbytes, quanto, fp8, weight standardization)"
)
@kinds
@pytest.mark.parametrize("safe", [True, False])
def test_merging_is_refused_and_the_adapter_is_not_lost(kind, safe):
    model = adapted(net(kind), {"a": lora()})
    expected = model(X)
    for merge in (model.merge_adapter, model.merge_and_unload):
        refuses(NotImplementedError, f"layer '0': .*{KINDS[kind][1]}.*[Kk]eep them unmerged", merge, safe_merge=safe)
    assert torch.equal(model(X), expected) and not model.base_model.model[0].merged
    assert torch.equal(model.unload()(X), net(kind)(X))


READERS = {
    "DoRA": lora(use_dora=True),
    "HiRA": graft.HiraConfig(r=2, target_modules=["0"]),
    "MiSS bat": graft.MissConfig(r=2, init_weights="bat", target_modules=["0"]),
    "OFT": graft.OFTConfig(oft_block_size=2, target_modules=["0"]),
    "PSOFT": graft.PsoftConfig(r=2, ab_svd_init="psoft_init", target_modules=["0"]),
}


def beside(kind):
    """The same layers, the first of which is dense."""
    base, plain = net(kind), nn.Linear(6, 4)
    plain.weight.data = weight_by_hand(base[0])
    plain.bias = base[0].bias
    return nn.Sequential(plain, *base[1:]).requires_grad_(False).eval()


def weight_by_hand(layer):
    with torch.no_grad():
        return (layer(torch.eye(6)) - layer(torch.zeros(1, 6))).T.contiguous()


@pytest.mark.differs("unknown modules and tensors")
@kinds
@pytest.mark.parametrize("method", READERS)
def test_what_reads_the_weight_has_it_from_a_layer_that_is_linear(kind, method):
    def run(base):
        with seeded(1):
            model = disturb(graft.get_peft_model(base, copy.copy(READERS[method])))
        x = X.clone().requires_grad_()
        y = model(x)
        y.square().sum().backward()
        return model, [y, x.grad, *[p.grad for p in model.parameters() if p.grad is not None]]

    (model, ours), (_, theirs) = run(net(kind)), run(beside(kind))
    assert len(ours) == len(theirs) > 2
    assert_close(ours, theirs)
    refuses(NotImplementedError, f"{KINDS[kind][1]}.*, and graft does not know how to write it", model.merge_adapter)
    expected = model(X)
    plain = model.merge_and_unload(dequantize=True)
    assert type(plain[0]) is nn.Linear
    assert_close(plain(X), expected)


class Derived(Beside):
    """Computes its bias."""

    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.part = nn.Parameter(self._parameters.pop("bias").detach() / 2)

    bias = property(lambda self: 2 * self.part)


class Turned(conv1d()):
    """Holds (in, out)."""

    def forward(self, x):
        return x @ self.weight + self.bias


@pytest.mark.parametrize("kind", [Derived, Turned])
def test_layers_of_other_shapes_are_read(kind):
    with seeded(0):
        layer = kind(4, 6) if kind is Turned else kind(6, 4)
    assert find_store(layer) is FOREIGN and FOREIGN.why_unreadable(layer, "weight") is None
    W = FOREIGN.read(layer, "weight")
    assert_close(W, layer.weight if kind is Turned else layer.codes)
    model = disturb(graft.get_peft_model(nn.Sequential(layer), lora(use_dora=True))).eval()
    y = model(X)
    plain = model.merge_and_unload(dequantize=True)
    assert type(plain[0]) is nn.Linear
    assert_close(plain(X), y)


def test_nothing_is_kept_of_what_was_read():
    layer = Int8(6, 4)
    layer.train()
    layer.register_forward_hook(lambda *_: pytest.fail("a hook ran"))
    before = dict(vars(layer)), torch.random.get_rng_state()
    assert FOREIGN.why_unreadable(layer, "weight") is None
    W = FOREIGN.read(layer, "weight")
    assert_close(W, layer.weight * layer.scale)
    assert vars(layer) == before[0] and torch.equal(torch.random.get_rng_state(), before[1])
    layer.weight.data.zero_()
    assert not FOREIGN.read(layer, "weight").any()


class Bent(Beside):
    def forward(self, x):
        return super().forward(x).relu()


class Gentle(Beside):
    """Bends where its output is large."""

    def forward(self, x):
        return super().forward(x).clamp(-2, 2)


class Summing(Beside):
    def forward(self, x):
        return super().forward(x).cumsum(0)


class Twice(Beside):
    """Adds its bias two times."""

    def forward(self, x):
        return super().forward(x) + self.bias


class Fails(Beside):
    def forward(self, x):
        if not torch.is_grad_enabled():
            raise RuntimeError("no kernel for this device")
        return super().forward(x)


NOT_LINEAR = {
    Bent: "it is not linear",
    Gentle: "it is not linear",
    Summing: "it is not linear",
    Twice: "its output for an input of zeros is not its bias",
    Fails: "running the layer to read it ends in RuntimeError: no kernel for this device",
}


@pytest.mark.parametrize("kind", NOT_LINEAR)
def test_what_is_not_linear_is_refused_before_anything_has_changed(kind):
    with seeded(0):
        base = nn.Sequential(kind(6, 4))
    names, plain = [name for name, _ in base.named_modules()], base(X)
    why = f"{kind.__name__} has a replaced forward, .*, and {NOT_LINEAR[kind]}"
    refuses(UnsupportedLayerError, f"needs its weight, and {why}", graft.get_peft_model, base, lora(use_dora=True))
    assert [name for name, _ in base.named_modules()] == names and torch.equal(base(X), plain)
    model = graft.get_peft_model(base, lora())
    refuses(NotImplementedError, f"Cannot dequantize layer '0': {why}", model.merge_and_unload, dequantize=True)


def test_a_layer_on_the_meta_device_is_refused():
    base = nn.Sequential(Int8(6, 4)).to("meta")
    with pytest.raises(UnsupportedLayerError, match="its packed weight is on the meta device"):
        graft.get_peft_model(base, lora(use_dora=True))


@kinds
def test_an_initialisation_that_changes_the_base_is_refused(kind):
    with pytest.raises(UnsupportedLayerError, match=f"which it would change: {KINDS[kind][1]}"):
        graft.get_peft_model(net(kind), lora(init_lora_weights="pissa"))


def test_the_codes_of_a_layer_as_a_target_are_the_layer():
    x = torch.randn(3, 6)
    named, by_layer = (
        graft.get_peft_model(net("codes"), graft.LoraConfig(r=2, target_modules=modules, target_parameters=parameters))
        for modules, parameters in (([], ["0.weight"]), (["0"], None))
    )
    assert "base_model.model.0.lora_A.default.weight" in named.state_dict()
    by_layer.load_state_dict(named.state_dict())
    assert torch.equal(named(x), by_layer(x))


@kinds
@pytest.mark.parametrize("bias", ["none", "lora_only"])
def test_it_is_saved_and_loaded(kind, bias, tmp_path):
    with seeded(1):
        model = disturb(graft.get_peft_model(net(kind), lora(bias=bias))).eval()
    model.save_pretrained(tmp_path)
    loaded = graft.PeftModel.from_pretrained(net(kind), tmp_path).eval()
    assert_close(loaded(X), model(X))


def test_a_layer_that_is_quantized_later_refuses_merging():
    with seeded(0):
        model = disturb(graft.get_peft_model(nn.Sequential(nn.Linear(6, 4)), lora()))
    base = model.base_model.model[0].base_layer
    base.weight = nn.Parameter(Unknown(base.weight.detach()), requires_grad=False)
    refuses(NotImplementedError, "its weight is of type Unknown", model.merge_adapter)


class Cast(nn.Linear):
    """Casts its input, and is a linear layer otherwise."""

    def forward(self, x):
        return F.linear(x.to(self.weight.dtype), self.weight, self.bias)


def test_a_class_says_that_it_is_like_its_row():
    base = nn.Sequential(Cast(6, 4))
    model = graft.get_peft_model(base, lora())
    with pytest.raises(NotImplementedError, match=r"OPS\.add\('tests\.storage\.test_foreign\.Cast'") as raised:
        model.merge_adapter()
    code = str(raised.value).partition("say so with ")[2].partition(". Keep")[0]
    base = model.unload()
    eval(code)
    model = disturb(graft.get_peft_model(base, lora()))
    expected = model(X)
    model.merge_adapter()
    assert_close(model(X), expected)


class Scaled(nn.Embedding):
    embed_scale = 3.0

    def forward(self, ids):
        return super().forward(ids) * self.embed_scale


class Shifted(nn.Embedding):
    def forward(self, ids):
        return super().forward(ids + 2)


def falcon():
    from transformers.models.falcon.modeling_falcon import FalconLinear

    return FalconLinear(6, 4)


def bool_buffer():
    layer = nn.Linear(6, 4)
    del layer.weight
    layer.register_buffer("weight", torch.ones(4, 6, dtype=torch.int8))
    return layer


@pytest.mark.parametrize(
    "make, store",
    [
        (lambda: nn.Linear(6, 4), DENSE),
        (lambda: nn.Linear(6, 4, device="meta", dtype=torch.float16), DENSE),
        (lambda: nn.MultiheadAttention(4, 2).out_proj, DENSE),
        (lambda: parametrizations.weight_norm(nn.Linear(6, 4)), DENSE),
        (lambda: nn.LayerNorm(4), DENSE),
        (lambda: Scaled(6, 4), DENSE),
        (falcon, DENSE),
        (lambda: Shifted(6, 4), FOREIGN),
        (lambda: Beside(6, 4), FOREIGN),
        (lambda: held(nn.Linear(6, 4), Coded), FOREIGN),
        (with_unknown, FOREIGN),
        (bool_buffer, FOREIGN),
        (lambda: nn.Linear(6, 4).to(torch.float8_e4m3fn), FOREIGN),
    ],
)
def test_the_rule(make, store):
    assert find_store(make()) is store


def test_a_parameter_that_its_module_computes_with_is_dense_whatever_the_forward():
    assert find_tensor_store(Shifted(6, 4), "weight") is DENSE
    assert find_tensor_store(with_unknown(), "weight") is PACKED
