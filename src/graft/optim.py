# SPDX-License-Identifier: Apache-2.0
"""Optimizers for A and B of LoRA: LoRA+, LoRA-FA, Riemannian preconditioning, LoRA-Pro, Muon."""

from __future__ import annotations

import inspect
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from graft.core.carrier import layer_in
from graft.core.errors import ConfigError, PeftWarning, warn
from graft.core.layer import AdapterLayer
from graft.core.ops import Opaque
from graft.inject.parts import get_registry

Group = dict[str, Any]  # of parameters, or the state of one, as an optimizer holds it

__all__ = [
    "LoraFAOptimizer",
    "LoraMuonOptimizer",
    "create_lorafa_optimizer",
    "create_loraplus_optimizer",
    "create_lorapro_optimizer",
    "create_muon_optimizer",
    "create_riemannian_optimizer",
]


Pair = tuple[nn.Parameter, nn.Parameter, float, int]  # A, B, scaling and number of matrices


def find_pairs(model: nn.Module) -> Iterator[Pair]:
    """Yield A, B, scaling and number of matrices of each adapter in a layer's `lora_A` and `lora_B`, active or not.

    Passed over are modules that are no adapter layers, and layers without a `ModuleDict` of that name, such as
    embeddings. The number is 1, but for an `Opaque` op, such as a stack of experts, its `count_matrices`. Raises
    ConfigError as `check_plain_factors`, before it yields that adapter.
    """
    for layer in model.modules():
        if layer_in(layer) is layer and "lora_A" in layer.holders and isinstance(layer.lora_A, nn.ModuleDict):
            Bs = layer.lora_B
            for name, A in layer.lora_A.items():
                check_plain_factors(layer, name)
                op = layer.site.op
                matrices = op.count_matrices(layer.site.module) if isinstance(op, Opaque) else 1
                yield A.weight, Bs[name].weight, layer.scaling[name], matrices


def split_stack(A: Tensor, B: Tensor, matrices: int) -> tuple[Tensor, Tensor]:
    """Return A and B of each matrix of a stack, (n, r, in) and (n, out, r); A and B themselves for one matrix.

    Also for gradients and other tensors of their shapes.
    """
    return Opaque.split_matrices(A.contiguous(), B.contiguous(), matrices) if matrices > 1 else (A, B)


def join_stack(A: Tensor, B: Tensor, matrices: int) -> tuple[Tensor, Tensor]:
    """Return A (n·r, in) and B (out, r·n) of a stack from those of each matrix; A and B themselves for one matrix."""
    return Opaque.join_matrices(A, B) if matrices > 1 else (A, B)


def check_plain_factors(layer: AdapterLayer, adapter: str) -> None:
    """Raise ConfigError if the adapter's `use_bdlora` or `use_qalora` is set: they make the weights of A and B smaller
    than their matrices.
    """
    cfg = layer.methods[adapter].cfg
    for option in ("use_bdlora", "use_qalora"):
        if getattr(cfg, option):
            raise ConfigError(
                f"This optimizer needs A and B as matrices, and for adapter '{adapter}' (layer '{layer.key}') {option} "
                "makes them smaller. Choose another optimizer, such as LoRA+."
            )


def invert_gram(factor: Tensor, damping: float) -> Tensor:
    """Return the pseudo-inverse of factor factorᵀ + damping · 1, (…, r, r) in float32, for a matrix (…, r, n).

    On a CPU by `pinv`; on other devices by Cholesky, as the host would wait for an SVD.
    """
    if not factor.is_cpu:
        return invert_gram_by_cholesky(factor, damping)
    factor = factor.float()
    eye = torch.eye(factor.shape[-2], device=factor.device)
    return torch.linalg.pinv(factor @ factor.mT + damping * eye)


def invert_gram_by_cholesky(factor: Tensor, damping: float) -> Tensor:
    """Return about the pseudo-inverse of G + damping · 1, where G = factor factorᵀ, without a wait of the host.

    In float32.

    With damping c above the rounding of float32 it is R = (G + c)⁻¹. Else c is that rounding, and with E = c R the
    result is R (1 + E) (1 - E²). That is G⁻¹ up to (c / λ)², and 0 in directions where G is 0. Computes in float64, on
    MPS in float32.
    """
    wide = factor.to(torch.float32 if factor.device.type == "mps" else torch.float64)
    r = wide.shape[-2]
    G, eye = wide @ wide.mT, torch.eye(r, dtype=wide.dtype, device=wide.device)
    least = r * torch.finfo(torch.float32).eps * max_diagonal(G) + torch.finfo(torch.float32).tiny
    c = least.clamp(min=damping)
    L = torch.linalg.cholesky_ex(G + c * eye)[0]
    inverse = torch.linalg.solve_triangular(L, eye, upper=False)
    R = inverse.mT @ inverse
    E = c * R
    return torch.where(least > damping, R @ (eye + E) @ (eye - E @ E), R).float()


def max_diagonal(G: Tensor) -> Tensor:
    """Return the largest number on the diagonal of each matrix, (…, 1, 1)."""
    return G.diagonal(dim1=-2, dim2=-1).amax(-1)[..., None, None]


EIGHT_BIT = ("Adam8bit", "AdamW8bit", "PagedAdam8bit", "PagedAdamW8bit")  # of bitsandbytes


def create_loraplus_optimizer(
    model: nn.Module, optimizer_cls: type[Optimizer], *, lr: float, loraplus_lr_ratio: float, **kwargs: object
) -> Optimizer:
    """Return an optimizer for LoRA+ (arXiv 2402.12354): B learns `loraplus_lr_ratio` times as fast as A.

    There are four groups, in this order, even if empty: A, adapters on embeddings, B, and B without decay. A name with
    "lora_embedding_" decides first. A has all others of two dimensions or more without "lora_B" in the name; the rest
    is B. Of that rest, names with "bias" and parameters of `nn.LayerNorm` do not decay. Parameters that do not train
    are left out. A class with the name of an 8-bit Adam or AdamW of bitsandbytes keeps the state of embeddings in 32
    bits.

    Args:
        loraplus_weight_decay: decay of all others (0).
        loraplus_lr_embedding: learning rate of adapters on embeddings (1e-6).
        kwargs: further arguments of the optimizer.
    """
    decay, lr_embedding = kwargs.pop("loraplus_weight_decay", 0.0), kwargs.pop("loraplus_lr_embedding", 1e-6)
    norms = {id(p) for m in model.modules() if isinstance(m, nn.LayerNorm) for p in m.parameters(recurse=False)}
    groups: dict[str, list[nn.Parameter]] = {"A": [], "embedding": [], "B": [], "B without decay": []}
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        if "lora_embedding_" in name:
            groups["embedding"].append(p)
        elif "lora_B" not in name and p.ndim > 1:
            groups["A"].append(p)
        else:
            groups["B without decay" if "bias" in name or id(p) in norms else "B"].append(p)
    fast = lr * loraplus_lr_ratio
    rates = {"A": (lr, decay), "embedding": (lr_embedding, decay), "B": (fast, decay), "B without decay": (fast, 0.0)}
    param_groups = [{"params": groups[k], "lr": rate, "weight_decay": wd} for k, (rate, wd) in rates.items()]
    optimizer = optimizer_cls(param_groups, **kwargs)  # type: ignore[arg-type]
    if optimizer_cls.__name__ in EIGHT_BIT:
        keep_embeddings_wide(model)
    return optimizer


def keep_embeddings_wide(model: nn.Module) -> None:
    """Register 32-bit states for the weights of all embeddings in bitsandbytes' global manager.

    A step has gradients for few tokens, and they differ much in size.
    """
    from bitsandbytes.optim import GlobalOptimManager

    manager = GlobalOptimManager.get_instance()
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            manager.register_module_override(module, "weight", {"optim_bits": 32})


class PerParameterOptimizer(Optimizer):
    """An optimizer that updates one parameter after the other, by `_update`."""

    @torch.no_grad()
    def step(self, closure: Callable[[], object] | None = None) -> object:  # type: ignore[override]
        """Call `_update` for each parameter with a gradient.

        Return the loss of `closure`, which runs first with gradients; or None.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._update(p, p.grad, group)
        return loss

    def _update(self, p: nn.Parameter, g: Tensor, group: Group) -> None:
        """Change a parameter in place by its gradient `g`. Raises NotImplementedError here: subclasses override it."""
        raise NotImplementedError


class LoraFAOptimizer(PerParameterOptimizer):
    """Adam with a projected gradient of B, so that a step changes ΔW along its gradient as far as the frozen A allows.

    Args:
        correct_bias: divide the running means by their deficit in the first steps, as Adam does.
        factors: B → its A and its scaling. Other parameters get Adam's steps.
        stacks: B → its number of matrices, for stacks of experts.

    Raises:
        ConfigError: a number out of range, or groups made for PEFT's class, which tell A from B by names.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        correct_bias: bool = True,
        factors: dict[nn.Parameter, tuple[nn.Parameter, float]] | None = None,
        stacks: dict[nn.Parameter, int] | None = None,
    ):
        """Make the optimizer with one set of defaults for all groups; `factors` and `stacks` are empty if None.

        Raises ConfigError for an lr or eps below 0 or a beta outside [0, 1); the decay is not checked.
        """
        if lr < 0 or eps < 0 or not all(0 <= beta < 1 for beta in betas):
            raise ConfigError(f"lr and eps must be ≥ 0 and betas from 0 to below 1, got {lr}, {eps} and {betas}.")
        super().__init__(
            params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, correct_bias=correct_bias)
        )
        self.factors, self.stacks = factors or {}, stacks or {}

    def add_param_group(self, param_group: dict[str, object]) -> None:
        """Add a group of parameters.

        Raises:
            ConfigError: the group has keys of PEFT's optimizer of that name: names, scaling_factor or scaling_factors.
        """
        foreign = {"names", "scaling_factor", "scaling_factors"} & param_group.keys()
        if foreign:
            raise ConfigError(
                f"A group with {', '.join(sorted(foreign))} is made for PEFT's LoraFAOptimizer. Call "
                "create_lorafa_optimizer(model, …), which makes `factors`, the A of each B."
            )
        super().add_param_group(param_group)

    def __getstate__(self) -> dict[str, Any]:  # torch copies and pickles no other attributes
        """Return the state for copies and pickles, with `factors` and `stacks`, which torch would leave out."""
        return {**super().__getstate__(), "factors": self.factors, "stacks": self.stacks}

    def _update(self, p: nn.Parameter, g: Tensor, group: Group) -> None:
        """Take a step of Adam on p, then decay it.

        The gradient of a B in `factors` is first multiplied by (A Aᵀ + 1e-8)⁺ / scaling² in float32, for each matrix of
        a stack. Decay multiplies p by 1 - lr · weight_decay.
        """
        if p in self.factors:
            (A, scaling), n = self.factors[p], self.stacks.get(p, 1)
            a, b = split_stack(A.flatten(1), g.flatten(1).float(), n)
            g = join_stack(a, b @ invert_gram(a, 1e-8) / scaling**2, n)[1].view_as(p).to(p.dtype)
        step_adam(p, g, self.state[p], group, group["correct_bias"])
        if group["weight_decay"]:
            p.mul_(1 - group["lr"] * group["weight_decay"])


def step_adam(p: Tensor, g: Tensor, state: Group, group: Group, correct_bias: bool) -> None:
    """Take one step of Adam on p in place, without weight decay.

    Updates `state` in place: `step`, `exp_avg` and `exp_avg_sq`, from zeros if it is empty.

    The bias correction of both moments is applied if `correct_bias`. `eps` is added to √v before it.
    """
    b1, b2 = group["betas"]
    if not state:
        state.update(step=0, exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))
    state["step"] += 1
    m, v, t = state["exp_avg"], state["exp_avg_sq"], state["step"]
    m.lerp_(g, 1 - b1)
    v.mul_(b2).addcmul_(g, g, value=1 - b2)
    rate = group["lr"] * (1 - b2**t) ** 0.5 / (1 - b1**t) if correct_bias else group["lr"]
    p.addcdiv_(m, v.sqrt().add_(group["eps"]), value=-rate)


def create_lorafa_optimizer(
    model: nn.Module,
    r: int | None = None,
    lora_alpha: float | None = None,
    lr: float = 1e-3,
    weight_decay: float = 0.0,
    use_rslora: bool | None = None,
) -> LoraFAOptimizer:
    """Return an optimizer for LoRA-FA (arXiv 2308.03303), and freeze each A, so that no layer keeps its input for A's
    gradient.

    It trains all other parameters that train now. A B with a scaling of 0 gets Adam's steps.

    Args:
        r, lora_alpha: the values of the active adapters' configs. They have no effect; a warning says if none has them.
        use_rslora: deprecated: the config decides. Passing it warns.

    Raises:
        ConfigError: an active adapter's config contradicts `use_rslora`, or a number is out of range. Nothing is frozen
            then.
    """
    check_options(model, r, lora_alpha, use_rslora)
    all_pairs = list(find_pairs(model))
    As = {A for A, *_ in all_pairs}
    factors = {B: (A, scaling) for A, B, scaling, _ in all_pairs if scaling}  # with a scaling of 0, B gets no gradient
    stacks = {B: matrices for _, B, _, matrices in all_pairs if matrices > 1}
    trained = [p for p in model.parameters() if p.requires_grad and p not in As]
    optimizer = LoraFAOptimizer(trained, lr, weight_decay=weight_decay, factors=factors, stacks=stacks)
    for A in As:
        A.requires_grad_(False)
    return optimizer


def check_options(model: nn.Module, r: int | None, lora_alpha: float | None, use_rslora: bool | None) -> None:
    """Compare the options with the configs of the active adapters, which decide.

    Options that are None are not compared. A config without the field agrees. Without active adapters only the
    deprecation warning is given.

    Raises ConfigError if a config contradicts `use_rslora`; else passing it warns that it is deprecated. Warns if `r`
    or `lora_alpha` is the value of no config.
    """
    registry = get_registry(model)
    configs = {} if registry is None else {name: registry.peft_config[name] for name in registry.active_adapters}
    if use_rslora is not None:
        conflicting = [name for name, cfg in configs.items() if getattr(cfg, "use_rslora", use_rslora) != use_rslora]
        if conflicting:
            raise ConfigError(
                f"`use_rslora={use_rslora}` was passed to create_lorafa_optimizer, and the config of the active "
                f"adapters {conflicting} says otherwise. Leave the argument out: the config decides."
            )
        warn("`use_rslora` of create_lorafa_optimizer is deprecated: LoraConfig says it.", FutureWarning)
    for option, value in (("r", r), ("lora_alpha", lora_alpha)):
        values = {name: getattr(cfg, option, value) for name, cfg in configs.items()}
        if value is not None and values and value not in values.values():
            warn(
                f"{option}={value} was passed to create_lorafa_optimizer and has no effect: each layer takes its "
                f"scaling from its adapter's config, and the configs of the active adapters have {values}.",
                PeftWarning,
            )


def create_riemannian_optimizer(
    model: nn.Module, optimizer_cls: type[Optimizer], *, lr: float, reg: float = 0.01, **kwargs: object
) -> Optimizer:
    """Return an optimizer for Riemannian preconditioned LoRA (arXiv 2402.02347), with gradients in the metric of B A.

    Before each step g_A ← (BᵀB + reg)⁺ g_A and g_B ← g_B (AAᵀ + reg)⁺.

    Raises:
        TypeError: `optimizer_cls` is no optimizer class.
        ConfigError: no pair of A and B trains, or a step needs or gets a closure.
    """

    names = "create_riemannian_optimizer", "Riemannian preconditioning"
    return make_preconditioned(model, optimizer_cls, partial(compute_metric_gradients, reg), names, lr=lr, **kwargs)


def compute_metric_gradients(reg: float, A: Tensor, B: Tensor, a: Tensor, b: Tensor, s: float) -> tuple[Tensor, Tensor]:
    """Return (BᵀB + reg)⁺ a and b (AAᵀ + reg)⁺: the gradients a of A (…, r, n) and b of B (…, m, r) in the metric of B
    A.

    `s` is not used.
    """
    return invert_gram(B.mT, reg) @ a, b @ invert_gram(A, reg)


def create_lorapro_optimizer(
    model: nn.Module, optimizer_cls: type[Optimizer], *, lr: float, **kwargs: object
) -> Optimizer:
    """Return an optimizer for LoRA-Pro (arXiv 2407.18242): a step of A and B approximates a step of the whole weight.

    With AdamW, the moments are those of A and B; the paper keeps them of the whole weight.

    Raises:
        TypeError, ConfigError: as `create_riemannian_optimizer`.
    """
    names = "create_lorapro_optimizer", "LoRA-Pro"
    return make_preconditioned(model, optimizer_cls, compute_pro_gradients, names, lr=lr, **kwargs)


def compute_pro_gradients(A: Tensor, B: Tensor, a: Tensor, b: Tensor, s: float) -> tuple[Tensor, Tensor]:
    """Return gradients a' of A (…, r, n) and b' of B (…, m, r) that bring s (B a' + b' A) closest to the weight's
    gradient.

    a and b are the usual gradients. With P = BᵀB and Q = AAᵀ (`damp_gram`): a' = P⁻¹ a / s² + X A and b' = (1 - B P⁻¹
    Bᵀ) b Q⁻¹ / s² - B X. X solves P X + X Q = -P⁻¹ a Aᵀ / s². Computes in float64 (float32 on MPS); the results are in
    float32.
    """
    wide = torch.float32 if A.device.type == "mps" else torch.float64
    A, B, a, b = (t.to(wide) for t in (A, B, a, b))
    P, Q = damp_gram(B.mT @ B), damp_gram(A @ A.mT)
    p, q = invert_matrices(P), invert_matrices(Q)
    to_a, to_b = p @ a / s**2, b @ q / s**2
    X = solve_sylvester(P, Q, -(to_a @ A.mT))
    return (to_a + X @ A).float(), (to_b - B @ (p @ (B.mT @ to_b)) - B @ X).float()


def damp_gram(G: Tensor) -> Tensor:
    """Return G + (100 ε · its largest diagonal number + ε) · 1, with ε the rounding of its dtype, so that it can be
    inverted.
    """
    eps = torch.finfo(G.dtype).eps
    return G + (100 * eps * max_diagonal(G) + eps) * torch.eye(G.shape[-1], dtype=G.dtype, device=G.device)


def invert_matrices(G: Tensor) -> Tensor:
    """Return G⁻¹ without a check that it exists, as the host would wait for the check."""
    return torch.linalg.inv_ex(G)[0]


SIGN_STEPS = 40  # Newton's iteration doubles small eigenvalues and halves large ones, then converges


def solve_sylvester(P: Tensor, Q: Tensor, C: Tensor) -> Tensor:
    """Return X with P X + X Q = C for positive definite P and Q, (…, r, r), by 40 steps of Newton's iteration of the
    matrix sign. All three are first divided by the larger norm of P and Q.
    """
    size = torch.maximum(matrix_norms(P), matrix_norms(Q))
    P, Q, C = P / size, Q / size, C / size
    for _ in range(SIGN_STEPS):
        p, q = invert_matrices(P), invert_matrices(Q)
        P, Q, C = (P + p) / 2, (Q + q) / 2, (C + p @ C @ q) / 2
    return C / 2


def matrix_norms(M: Tensor) -> Tensor:
    """Return the Frobenius norm of each matrix, (…, 1, 1)."""
    return M.norm(dim=(-2, -1), keepdim=True)


Change = Callable[[Tensor, Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor]]  # of A, B, their gradients, s


def make_preconditioned(
    model: nn.Module, optimizer_cls: type[Optimizer], change: Change, names: tuple[str, str], **kwargs: Any
) -> Optimizer:
    """Return an optimizer of `optimizer_cls` for all trained parameters, with a hook that changes gradients before its
    steps.

    Only pairs of two-dimensional A and B that both train, with a scaling other than 0, are changed. Copies and pickles
    keep the hook. names: of the calling function and of its method, for errors. kwargs: for `optimizer_cls`.

    Raises:
        TypeError: `optimizer_cls` is no optimizer class.
        ConfigError: its step requires a closure, or there is no such pair.
    """
    if not (isinstance(optimizer_cls, type) and issubclass(optimizer_cls, Optimizer)):
        raise TypeError(f"optimizer_cls must be a subclass of torch.optim.Optimizer, got {optimizer_cls!r}.")
    closure = inspect.signature(optimizer_cls.step).parameters.get("closure")
    if closure is not None and closure.default is closure.empty:
        raise ConfigError(
            f"{optimizer_cls.__name__} requires a closure, which computes gradients again within a step. "
            "Only those before it would change: choose an optimizer with a step() that takes none."
        )
    both = [p for p in find_pairs(model) if p[0].requires_grad and p[1].requires_grad and p[0].ndim == 2 and p[2]]
    if not both:
        raise ConfigError(f"{names[0]} did not find any trainable lora_A/lora_B parameter pairs.")
    optimizer = optimizer_cls([p for p in model.parameters() if p.requires_grad], **kwargs)
    hook = GradientChange(change, both, names[1])
    optimizer.register_step_pre_hook(hook)
    optimizer.__getstate__ = partial(state_with_hook, optimizer, hook)  # type: ignore[method-assign]
    return optimizer


@dataclass
class GradientChange:
    """A hook that changes the gradients of A and B before a step of an optimizer. `method` is its name, for errors."""

    change: Change
    both: list[Pair]
    method: str

    @torch.no_grad()
    def __call__(self, _: object, inputs: tuple[object, ...], options: dict[str, object]) -> None:
        """Overwrite the gradients of each pair that has both by those of `change`, which gets gradients in float32, A
        and B as they are.

        Raises:
            ConfigError: the step gets a closure, or any positional argument but None.
        """
        # accelerate's optimizers, and so Trainer's, pass None as a positional argument
        if any(value is not None for value in inputs[1:]) or options.get("closure") is not None:
            raise ConfigError(f"An optimizer with {self.method} does not support closures.")
        for A, B, s, n in self.both:
            if A.grad is not None and B.grad is not None:
                gradients = self.change(*split_stack(A, B, n), *split_stack(A.grad.float(), B.grad.float(), n), s)
                a, b = join_stack(*gradients, n)
                A.grad.copy_(a)
                B.grad.copy_(b)


HOOKS = "_optimizer_step_pre_hooks"  # torch's attribute; its state leaves it out


def state_with_hook(optimizer: Optimizer, hook: GradientChange) -> Group:
    """Return the state of an optimizer for copies and pickles, with its hook, and with this function for their copies.

    The hook gets the number -1 there: torch counts the hooks of each process from 0.
    """
    again = vars(optimizer)["__getstate__"]
    return {**type(optimizer).__getstate__(optimizer), HOOKS: OrderedDict({-1: hook}), "__getstate__": again}


NEWTON_SCHULZ = (3.4445, -4.775, 2.0315)
NEWTON_SCHULZ_STEPS = 5


def orthogonalise(M: Tensor) -> Tensor:
    """Return about U V of M = U diag(S) V, (…, m, n) in float32: all singular values become numbers from 0.7 to 1.2.

    Five Newton-Schulz steps on M divided by its Frobenius norm, at least 1e-7.
    """
    a, b, c = NEWTON_SCHULZ
    wide = M.shape[-2] <= M.shape[-1]
    X: Tensor = M.float() if wide else M.float().mT
    X = X / matrix_norms(X).clamp_min(1e-7)
    for _ in range(NEWTON_SCHULZ_STEPS):
        G = X @ X.mT
        X = a * X + (b * G + c * G @ G) @ X
    return X if wide else X.mT


class LoraMuonOptimizer(PerParameterOptimizer):
    """Muon with Nesterov momentum for groups with `muon=True`, with parameters that are matrices; AdamW for all others.

    `matrices` of such a group: each parameter is B of a stack of so many matrices (default 1). Muon's steps have about
    the size of AdamW's: lr · 0.2 · √max(rows, columns) · U V.

    Raises:
        ConfigError: a number out of range.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ):
        """Make the optimizer; groups have `muon=False` unless they say otherwise.

        Raises ConfigError for an lr or eps below 0, or a momentum or beta outside [0, 1); the decay is not checked.
        """
        if lr < 0 or eps < 0 or not all(0 <= share < 1 for share in (momentum, *betas)):
            raise ConfigError(
                f"lr and eps must be ≥ 0, momentum and betas from 0 to below 1, got {lr}, {eps}, {momentum}, {betas}."
            )
        defaults = dict(lr=lr, momentum=momentum, betas=betas, eps=eps, weight_decay=weight_decay, muon=False)
        super().__init__(params, defaults)

    def _update(self, p: nn.Parameter, g: Tensor, group: Group) -> None:
        """Decay p, then take a step of Muon if its group has `muon`, else of Adam with bias correction."""
        if group["weight_decay"]:
            p.mul_(1 - group["lr"] * group["weight_decay"])
        if group["muon"]:
            self._muon(p, g, group)
        else:
            step_adam(p, g, self.state[p], group, True)

    def _muon(self, p: Tensor, g: Tensor, group: Group) -> None:
        """Update the momentum of p by its gradient g, and subtract a step from p in place.

        The momentum is a running mean with share `momentum`, from zeros. The step is the orthogonalised Nesterov
        update, of each matrix of a stack, times lr · 0.2 · √(larger side). The momentum has the dtype of g; the step is
        cast to that of p. Gradients are not switched off here.
        """
        state, momentum = self.state[p], group["momentum"]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(g)
        buffer = state["momentum_buffer"]
        buffer.lerp_(g, 1 - momentum)
        update, n = g.lerp(buffer, momentum).flatten(1), group.get("matrices", 1)
        matrices = split_stack(update.mT, update, n)[1]
        step = join_stack(matrices.mT, orthogonalise(matrices), n)[1].view_as(p).to(p.dtype)
        p.add_(step, alpha=-group["lr"] * 0.2 * max(matrices.shape[-2:]) ** 0.5)


def create_muon_optimizer(model: nn.Module, *, lr: float, muon_lr: float | None = None, **kwargs: Any) -> Optimizer:
    """Return an optimizer with Muon for each B of LoRA, and AdamW for A and all other trained parameters.

    B has few columns, so that Newton-Schulz steps (arXiv 2502.16982) cost little. arXiv 2605.10468 finds Muon at least
    as good as Adam for LoRA, at 5 to 20 times its rate.

    Args:
        lr: learning rate of AdamW.
        muon_lr: learning rate of B, `lr` if None.
        kwargs: of `LoraMuonOptimizer`.

    B of stacks has a group for each number of matrices; empty groups are left out.

    Raises:
        ConfigError: no B of LoRA trains, or a number is out of range.
    """
    Bs = {B: matrices for _, B, _, matrices in find_pairs(model) if B.requires_grad}
    if not Bs:
        raise ConfigError("create_muon_optimizer did not find any trainable lora_B.")
    trained = [p for p in model.parameters() if p.requires_grad]
    groups: list[Group] = [
        dict(params=[p for p in trained if Bs.get(p) == n], muon=True, lr=lr if muon_lr is None else muon_lr)
        | ({"matrices": n} if n > 1 else {})
        for n in sorted({1, *Bs.values()})
    ]
    groups.append(dict(params=[p for p in trained if p not in Bs], lr=lr))
    return LoraMuonOptimizer([g for g in groups if g["params"]], lr=lr, **kwargs)
