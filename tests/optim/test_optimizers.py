# SPDX-License-Identifier: Apache-2.0
"""Optimizers for LoRA: the same steps as PEFT's, and the formulas."""

import copy
import pickle
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType

import peft.optimizers
import peft.optimizers.lorafa
import pytest
import torch

import graft
from graft import optim as optimizers
from graft.core.errors import ConfigError
from graft.optim import compute_pro_gradients, invert_gram, invert_gram_by_cholesky
from tests import models
from tests.pair import adapt, both, close_dicts, gradients, outcome, randomize
from tests.raised import refuses
from tests.samples import each, first

SAMPLES = [*each("plain", "mlp conv1D llama"), first("LORA", "mlp", "head"), *each("bias_all rslora", "mlp")]
SAMPLES = [s for s in SAMPLES if s.method == "LORA"]
SIDES = (optimizers, peft.optimizers)


def trained(sample, make, steps=3):
    """Both libraries' models after some steps with the same gradients."""
    states = []
    for model, lib in zip(both(sample), (optimizers, peft.optimizers)):
        randomize(model, sample).eval()
        optimizer = make(lib, model)
        for _ in range(steps):
            gradients(model, sample)
            optimizer.step()
        states.append({n: p.detach() for n, p in model.named_parameters()})
    return states


@pytest.mark.differs("LoRA-FA")
@pytest.mark.differs("Riemannian preconditioning")
@pytest.mark.parametrize("sample", SAMPLES, ids=str)
@pytest.mark.parametrize("name", ["loraplus", "lorafa", "riemannian"])
def test_steps_are_pefts(sample, name, monkeypatch):
    """PEFT's LoRA-FA computes in bfloat16 wherever it can."""
    monkeypatch.setattr(peft.optimizers.lorafa, "is_bf16_available", lambda: False)

    def make(lib, model):
        create = getattr(lib, f"create_{name}_optimizer")
        if name == "lorafa":
            config = model.peft_config["default"]
            return create(model, config.r, config.lora_alpha, lr=0.01, weight_decay=0.1)
        if name == "loraplus":
            return create(model, torch.optim.AdamW, lr=0.01, loraplus_lr_ratio=4.0, loraplus_weight_decay=0.1, eps=1e-4)
        return create(model, torch.optim.SGD, lr=0.01, reg=0.1)

    close_dicts(*trained(sample, make), 1e-4)


@pytest.mark.parametrize("sample", [first("LORA", "embedding"), first("LORA", "mlp", "bias_all")], ids=str)
def test_groups_of_loraplus(sample):
    """Sizes, rates and decay of each."""
    seen = []
    for model, lib in zip(both(sample), (optimizers, peft.optimizers)):
        made = lib.create_loraplus_optimizer(
            model,
            torch.optim.AdamW,
            lr=0.01,
            loraplus_lr_ratio=4.0,
            loraplus_lr_embedding=0.5,
            loraplus_weight_decay=0.1,
        )
        seen.append([(sorted(p.shape for p in g["params"]), g["lr"], g["weight_decay"]) for g in made.param_groups])
    assert seen[0] == seen[1]


class Manager:
    """In the place of the one of bitsandbytes, which is not installed."""

    def __init__(self):
        self.seen = []

    def register_module_override(self, module, name, options):
        self.seen.append((module, name, options))


@pytest.fixture
def manager(monkeypatch):
    made, bnb, optim = Manager(), ModuleType("bitsandbytes"), ModuleType("bitsandbytes.optim")
    bnb.__spec__ = ModuleSpec("bitsandbytes", None)  # others look for it, if they load now
    optim.GlobalOptimManager = type("GlobalOptimManager", (), {"get_instance": staticmethod(lambda: made)})
    bnb.optim = optim
    monkeypatch.setitem(sys.modules, "bitsandbytes", bnb)
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", optim)
    return made


@pytest.mark.parametrize("name", ["Adam8bit", "AdamW8bit", "PagedAdam8bit", "PagedAdamW8bit", "Adam", "AdamW32bit"])
def test_loraplus_keeps_embeddings_in_32_bits(name, manager):
    """Of optimizers that hold their state in 8."""
    kind = type(name, (torch.optim.Adam,), {})
    seen = []
    for model, lib in zip(both(first("LORA", "embedding")), (optimizers, peft.optimizers)):
        made = lib.create_loraplus_optimizer(model, kind, lr=0.01, loraplus_lr_ratio=4.0)
        assert type(made) is kind
        embeddings = [m for m in model.modules() if isinstance(m, torch.nn.Embedding)]
        assert [m for m, _, _ in manager.seen] == (embeddings if "8bit" in name else [])
        seen.append([options for _, *options in manager.seen])
        manager.seen.clear()
    assert seen[0] == seen[1]
    assert seen[0] == ([["weight", {"optim_bits": 32}]] * 2 if "8bit" in name else [])


def test_lorafa_freezes_a():
    model = adapt(graft, first("LORA"))
    made = optimizers.create_lorafa_optimizer(model, lr=0.1)
    assert not any(p.requires_grad for n, p in model.named_parameters() if "lora_A" in n)
    assert {id(p) for g in made.param_groups for p in g["params"]} == {
        id(p) for p in model.parameters() if p.requires_grad
    }
    with pytest.raises(graft.ConfigError, match="betas"):
        optimizers.LoraFAOptimizer([torch.nn.Parameter(torch.ones(1))], betas=(1.0, 0.9))


def made_lorafa(lib, sample, **options):
    model = adapt({optimizers: graft, peft.optimizers: peft}[lib], sample)
    trains = {n: p.requires_grad for n, p in model.named_parameters()}
    config = model.peft_config["default"]
    done = outcome(lambda: lib.create_lorafa_optimizer(model, config.r, config.lora_alpha, lr=0.1, **options))
    return done, trains == {n: p.requires_grad for n, p in model.named_parameters()}


@pytest.mark.parametrize("lib", SIDES)
def test_lorafa_takes_rslora_from_the_config(lib):
    for name, right in (("plain", False), ("rslora", True)):
        done, same = made_lorafa(lib, first("LORA", name=name), use_rslora=right)
        assert done.error is None and done.warned("deprecated") and not same
        done, same = made_lorafa(lib, first("LORA", name=name), use_rslora=not right)
        assert isinstance(done.error, ValueError) and same, "A is not frozen"
        assert f"`use_rslora={not right}` was passed to create_lorafa_optimizer" in str(done.error)


@pytest.mark.differs("`create_lorafa_optimizer`: `r`, `lora_alpha` that are not the config's; a negative `lr`")
def test_lorafa_says_which_options_do_not_count():
    """PEFT takes the scaling of each layer as well, without a word."""
    model = adapt(graft, first("LORA"))
    with pytest.warns(graft.PeftWarning, match=r"r=7 was passed .* has no effect: .* have \{'default': 3\}"):
        optimizers.create_lorafa_optimizer(model, 7, 5, lr=0.1)
    with pytest.warns(graft.PeftWarning, match="lora_alpha=9 was passed"):
        optimizers.create_lorafa_optimizer(model, 3, 9, lr=0.1)


WRONG = [dict(lr=-1.0), dict(betas=(1.0, 0.9)), dict(betas=(0.9, -0.1)), dict(eps=-1.0)]


@pytest.mark.parametrize("options", WRONG, ids=str)
def test_numbers_that_lorafa_refuses(options):
    for cls in (optimizers.LoraFAOptimizer, peft.optimizers.lorafa.LoraFAOptimizer):
        refuses(ValueError, None, cls, [torch.nn.Parameter(torch.ones(1))], **options)


def test_lorafa_that_is_refused_freezes_nothing():
    model = adapt(graft, first("LORA"))
    refuses(graft.ConfigError, "lr and eps must be", optimizers.create_lorafa_optimizer, model, lr=-1.0)
    assert all(p.requires_grad for n, p in model.named_parameters() if "lora_A" in n)


@pytest.mark.parametrize("correct_bias", [True, False])
def test_parameters_without_a_pair_get_pefts_steps(correct_bias):
    found = []
    for cls in (optimizers.LoraFAOptimizer, peft.optimizers.lorafa.LoraFAOptimizer):
        p = torch.nn.Parameter(torch.linspace(-1, 1, 7))
        made = cls([p], lr=0.1, weight_decay=0.2, correct_bias=correct_bias)
        for group in made.param_groups if cls is not optimizers.LoraFAOptimizer else ():
            group.update(names=["weight"], scaling_factors=[None])
        for step in range(3):
            p.grad = (p.detach() - step).sin()
            made.step()
        found.append(p.detach())
    torch.testing.assert_close(*found)


@pytest.mark.differs("groups of `LoraFAOptimizer` with `names` and `scaling_factors`")
def test_groups_for_pefts_class_are_refused():
    """They tell A and B apart by names; B would get plain Adam's steps."""
    group = {"params": [torch.nn.Parameter(torch.ones(1))], "names": ["a.lora_B.default"], "scaling_factors": [1.0]}
    with pytest.raises(graft.ConfigError, match=r"names, scaling_factors is made for PEFT's .*create_lorafa_optimizer"):
        optimizers.LoraFAOptimizer([group])


@pytest.mark.parametrize("again", [copy.deepcopy, lambda pair: copy.deepcopy(copy.deepcopy(pair))], ids=["one", "two"])
@pytest.mark.parametrize("name", ["lorafa", "riemannian", "lorapro", "muon"])
def test_a_copy_takes_the_same_steps(name, again):
    model = adapt(graft, first("LORA"))
    more = {"lorafa": {}, "muon": {"lr": 0.1}}.get(name, {"optimizer_cls": torch.optim.SGD, "lr": 0.1})
    made = getattr(optimizers, f"create_{name}_optimizer")(model, **more)
    pairs = (model, made), again((model, made)), (model, pickle.loads(pickle.dumps(made)))
    states = []
    for net, optimizer in pairs[:2]:
        gradients(net, first("LORA"))
        optimizer.step()
        states.append({n: p.detach() for n, p in net.named_parameters()})
    close_dicts(*states, 0)
    held = [len(o.state_dict()["param_groups"]) for _, o in pairs]
    assert held[0] == held[2] and pairs[2][1].param_groups[0]["params"][0] is not made.param_groups[0]["params"][0]


@pytest.mark.parametrize("name", ["riemannian", "lorapro"])
def test_a_copy_and_a_pickle_still_refuse_closures(name):
    made = getattr(optimizers, f"create_{name}_optimizer")(adapt(graft, first("LORA")), torch.optim.SGD, lr=0.1)
    hooks = len(made._optimizer_step_pre_hooks)
    for other in copy.copy(made), copy.deepcopy(made), pickle.loads(pickle.dumps(made)):
        assert len(other._optimizer_step_pre_hooks) == hooks == 1
        refuses(ConfigError, "closures", other.step, lambda: 0.0)


def test_lorafa_with_a_closure():
    """Which computes the gradients and the loss."""
    model = adapt(graft, first("LORA"))
    made, before = optimizers.create_lorafa_optimizer(model, lr=0.1), randomize(model, first("LORA"))
    before = {n: p.detach().clone() for n, p in before.named_parameters()}

    def closure():
        gradients(model, first("LORA"))
        return 3.5

    assert made.step(closure) == 3.5
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert moved and moved == {n for n in before if "lora_B" in n}


class Needs(torch.optim.SGD):
    def step(self, closure):
        return super().step(closure)


@pytest.mark.parametrize("lib", SIDES)
def test_riemannian_refusals(lib):
    library = {optimizers: graft, peft.optimizers: peft}[lib]
    create, model = lib.create_riemannian_optimizer, adapt(library, first("LORA"))
    refuses(ValueError, "did not find any trainable", create, models.make("mlp"), torch.optim.SGD, lr=0.1)
    for wrong in (dict, torch.optim.SGD([torch.nn.Parameter(torch.ones(1))])):
        refuses(TypeError, "subclass of torch.optim.Optimizer" if wrong is dict else None, create, model, wrong, lr=0.1)
    for needs in (torch.optim.LBFGS, Needs):
        refuses(ValueError, f"{needs.__name__} requires a closure", create, model, needs, lr=0.1)
    made = create(model, torch.optim.SGD, lr=0.1)
    assert isinstance(made, torch.optim.SGD)
    refuses(ValueError, "closures", made.step, lambda: 0.0)


@pytest.mark.parametrize("name", ["riemannian", "lorapro"])
def test_no_closure_passed_by_its_place(name):
    """As by accelerate's optimizers, which are Trainer's."""
    states = []
    for nothing in ((), (None,)):
        model = adapt(graft, first("LORA"))
        made = getattr(optimizers, f"create_{name}_optimizer")(model, torch.optim.SGD, lr=0.1)
        gradients(model, first("LORA"))
        made.step(*nothing)
        states.append({n: p.detach() for n, p in model.named_parameters()})
    close_dicts(*states)


PARTS = [dict(use_bdlora=dict(target_modules_bd_a=["0"])), dict(use_qalora=True, qalora_group_size=2)]


@pytest.mark.parametrize("option", PARTS, ids=str)
def test_factors_that_are_kept_in_part_are_refused(option):
    config = graft.LoraConfig(r=2, target_modules=["0"], **option)
    model = graft.get_peft_model(torch.nn.Sequential(torch.nn.Linear(4, 6)), config)
    for make in (
        lambda: optimizers.create_lorafa_optimizer(model),
        lambda: optimizers.create_riemannian_optimizer(model, torch.optim.SGD, lr=0.1),
    ):
        refuses(graft.ConfigError, f"needs A and B .*{next(iter(option))} makes them smaller", make)


class Experts(torch.nn.Module):
    """The middle one of three is not used."""

    def __init__(self, weight):
        super().__init__()
        self.weight = torch.nn.Parameter(weight)

    def forward(self, x):
        weight = self.weight
        return x @ weight[0].T + (x @ weight[2].T).square()


class Apart(torch.nn.Module):
    def __init__(self, weight):
        super().__init__()
        self.each = torch.nn.ModuleList(torch.nn.Linear(*w.T.shape, bias=False) for w in weight)
        for layer, w in zip(self.each, weight):
            layer.weight.data = w

    def forward(self, x):
        return self.each[0](x) + self.each[2](x).square()


MAKERS = {
    "lorafa": lambda model: optimizers.create_lorafa_optimizer(model, lr=0.1),
    "riemannian": lambda model: optimizers.create_riemannian_optimizer(model, torch.optim.SGD, lr=0.1),
    "lorapro": lambda model: optimizers.create_lorapro_optimizer(model, torch.optim.SGD, lr=0.1),
    "muon": lambda model: optimizers.create_muon_optimizer(model, lr=0.1),
}


@pytest.mark.differs("LoRA-FA and Riemannian preconditioning on stacks of experts")
@pytest.mark.parametrize("name", MAKERS)
def test_matrices_of_a_stack_take_the_steps_of_single_layers(name):
    torch.manual_seed(0)
    weight, x = torch.randn(3, 5, 6), torch.randn(7, 6)
    options = dict(r=2, init_lora_weights=False)
    config = graft.LoraConfig(target_parameters=["0.weight"], target_modules=[], **options)
    stack = graft.get_peft_model(torch.nn.Sequential(Experts(weight.clone())), config)
    single = graft.get_peft_model(Apart(weight.clone()), graft.LoraConfig(target_modules=["0", "1", "2"], **options))
    layer, layers = stack.base_model.model[0], single.base_model.model.each
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    with torch.no_grad():
        for i, one in enumerate(layers):
            one.lora_A["default"].weight.copy_(A[2 * i : 2 * i + 2])
            one.lora_B["default"].weight.copy_(B[:, i::3])
    before = layer.get_delta_weight("default").detach().clone()
    for model in (stack, single):
        made = MAKERS[name](model)
        for _ in range(2):
            model(x).square().mean().backward()
            made.step()
            made.zero_grad()
    after = layer.get_delta_weight("default").detach()
    torch.testing.assert_close(after, torch.stack([one.get_delta_weight("default").detach() for one in layers]))
    assert not torch.equal(after[0], before[0])


@pytest.mark.parametrize("damping", [0.0, 1e-8, 0.01])
@pytest.mark.parametrize("r, n, rank", [(3, 8, 3), (16, 64, 16), (8, 40, 4), (6, 4, 4), (4, 8, 0)])
def test_the_form_for_devices_is_that_of_the_cpu(r, n, rank, damping):
    """On products with the factor, which are all that a step takes."""
    factor = torch.randn(r, rank) @ torch.linalg.qr(torch.randn(n, n)).Q[:rank]
    gradient = torch.randn(5, n) @ factor.T
    if damping == 0.01:
        torch.testing.assert_close(
            invert_gram_by_cholesky(factor, damping), invert_gram(factor, damping), rtol=1e-3, atol=1e-3
        )
    ours, theirs = (gradient @ form(factor, damping) @ factor for form in (invert_gram_by_cholesky, invert_gram))
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


def small():
    model = torch.nn.Sequential(torch.nn.Linear(6, 9), torch.nn.Tanh(), torch.nn.Conv2d(1, 3, 2))
    config = graft.LoraConfig(r=4, target_modules=["0", "2"], init_lora_weights=False)
    return graft.get_peft_model(model, config, autocast_adapter_dtype=False)


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch has it from 2.9 on")
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_muon_takes_torchs_steps_on_b_and_adamw_on_a(decay):
    torch.manual_seed(0)
    model = small()
    A, B = (getattr(model.base_model.model[0], f"lora_{x}")["default"].weight for x in "AB")
    made = optimizers.create_muon_optimizer(model, lr=0.01, muon_lr=0.05, weight_decay=decay)
    likeness = [torch.nn.Parameter(p.detach().clone()) for p in (A, B)]
    theirs = [
        torch.optim.AdamW(likeness[:1], lr=0.01, weight_decay=decay),
        torch.optim.Muon(likeness[1:], lr=0.05, weight_decay=decay, adjust_lr_fn="match_rms_adamw"),
    ]
    for _ in range(4):
        for p in model.parameters():
            p.grad = torch.randn_like(p) if p.requires_grad else None
        for p, q in zip((A, B), likeness):
            q.grad = p.grad.clone()
        before = B.detach().clone()
        made.step()
        for optimizer in theirs:
            optimizer.step()
        torch.testing.assert_close(A, likeness[0])
        torch.testing.assert_close(B - before, likeness[1] - before, rtol=0.05, atol=3e-3)  # torch's is in bfloat16
        likeness[1].data.copy_(B)
    assert B.shape == (9, 4) and all(p.isfinite().all() for p in model.parameters())


def test_muon_refusals():
    with pytest.raises(graft.ConfigError, match="did not find any trainable lora_B"):
        optimizers.create_muon_optimizer(models.make("mlp"), lr=0.1)
    refuses(graft.ConfigError, "momentum", optimizers.create_muon_optimizer, small(), lr=0.1, momentum=1.0)


@pytest.mark.parametrize("B_scale", [1.0, 1e-3, 0.0])
def test_lorapro_changes_the_weight_as_nearly_as_it_can(B_scale):
    """P_B G + (1 - P_B) G P_A, by projections and no Sylvester equation."""
    torch.manual_seed(0)
    A, B, G, s = torch.randn(3, 8), torch.randn(7, 3) * B_scale, torch.randn(7, 8), 1.5
    a, b = compute_pro_gradients(A, B, s * B.T @ G, s * G @ A.T, s)
    P_A, P_B = (torch.linalg.pinv(t.double()) @ t.double() for t in (A, B.T))
    G, one = G.double(), torch.eye(7, dtype=torch.double)
    found = s * (B.double() @ a.double() + b.double() @ A.double())
    torch.testing.assert_close(found, P_B @ G + (one - P_B) @ G @ P_A, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["lorafa", "lorapro"])
def test_an_adapter_whose_scaling_is_0_stays_as_it_is(name):
    """No gradient comes to it, and these optimizers divide by the scaling; the other one trains."""
    model = adapt(graft, first("LORA"))
    model.add_adapter("off", graft.LoraConfig(target_modules=["lin0"]))
    model.base_model.set_adapter(["default", "off"])
    model.base_model.model.lin0.set_scale("off", 0.0)
    made = {
        "lorafa": lambda: optimizers.create_lorafa_optimizer(model, lr=0.1),
        "lorapro": lambda: optimizers.create_lorapro_optimizer(model, torch.optim.SGD, lr=0.1),
    }[name]()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    models.output(model, models.inputs("mlp")).square().mean().backward()
    made.step()
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert any("lora_B.default" in n for n in changed) and not any(".off." in n for n in changed)
    assert all(p.isfinite().all() for p in model.parameters())


def test_lorapro_steps():
    torch.manual_seed(0)
    model = small()
    A, B = (getattr(model.base_model.model[0], f"lora_{x}")["default"].weight for x in "AB")
    made = optimizers.create_lorapro_optimizer(model, torch.optim.SGD, lr=0.1)
    for p in model.parameters():
        p.grad = torch.randn_like(p) if p.requires_grad else None
    a, b = compute_pro_gradients(A.detach(), B.detach(), A.grad, B.grad, 2.0)  # alpha / r
    wanted = A.detach() - 0.1 * a, B.detach() - 0.1 * b
    made.step()
    torch.testing.assert_close((A, B), wanted)
    with pytest.raises(graft.ConfigError, match="create_lorapro_optimizer did not find"):
        optimizers.create_lorapro_optimizer(models.make("mlp"), torch.optim.SGD, lr=0.1)
    refuses(graft.ConfigError, "LoRA-Pro does not support closures", made.step, lambda: 0.0)
