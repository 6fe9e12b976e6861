# SPDX-License-Identifier: Apache-2.0
"""KappaTune, arXiv 2506.16289: adapt the layers with the best conditioned weights."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from graft import PeftWarning
from graft.core.errors import warn
from graft.inject.survey import ModuleTree, get_site, is_linear, survey_model

EXPERTS = (".gate_up_proj", ".down_proj", ".gate_proj", ".up_proj")  # ends of names of the fused weights of experts
FLOOR = 1e-8  # added to the smallest singular value


class KappaTuneSelector:
    """The condition numbers κ = σ_max / (σ_min + 1e-8) of a model's weights, by name.

    A weight with a small κ has singular values of similar size: training it changes little of the knowledge in it.

    Args:
        max_dim_size_to_analyze: leave out layers with more inputs or outputs than this: an SVD of them takes long.
        moe_param_suffixes: ends of the names of parameters (experts, m, n) that get the mean κ of their experts.
        show_progress: show a bar.

    Attributes:
        modules, parameters: κ by name of the layer, and of the parameter.
    """

    def __init__(
        self,
        model: nn.Module,
        max_dim_size_to_analyze: int = 16384,
        moe_param_suffixes: Sequence[str] | None = None,
        show_progress: bool = True,
    ):
        """Compute κ of all linear layers, into `modules`, and of 3-D parameters of experts, into `parameters`: their
        mean over the experts.

        Weights with a side above `max_dim_size_to_analyze` are left out. Warns once with PeftWarning of linear layers
        with a weight that cannot be read, which are left out, too.

        Args:
            moe_param_suffixes: ends of names of experts' parameters; None: `EXPERTS`.
        """
        from tqdm import tqdm

        ends = EXPERTS if moe_param_suffixes is None else tuple(moe_param_suffixes)
        self.max_dim_size_to_analyze, self.moe_param_suffixes = max_dim_size_to_analyze, ends
        self.modules: dict[str, float] = {}  # κ by name of the layer
        self.parameters: dict[str, float] = {}  # κ by name of the parameter
        unread: list[str] = []
        tree = survey_model(model)
        for name, module in tqdm(
            tree.modules.items(), desc="Condition numbers", unit="module", disable=not show_progress
        ):
            W = read_weight(name, tree)
            if W is None:
                unread += [name] if is_linear(module) else []
            elif max(W.shape) <= max_dim_size_to_analyze:
                self.modules[name] = float(compute_condition_number(W))
        for name, p in model.named_parameters():
            if p.dim() == 3 and name.endswith(ends) and max(p.shape[1:]) <= max_dim_size_to_analyze:
                self.parameters[name] = sum(float(compute_condition_number(W)) for W in p.detach()) / len(p)
        if unread:
            text = f"KappaTune leaves out {len(unread)} layers whose weight cannot be read, such as '{unread[0]}'."
            warn(text, PeftWarning)

    def get_best_targets(
        self, top_p: float | None = None, num_modules: int | None = None, threshold: float | None = None
    ) -> list[str]:
        """Return names of layers, smallest κ first: `num_modules` of them, else the part `top_p` (at least one), else
        those with κ ≤ `threshold`, else all.
        """
        return select_targets(self.modules, top_p, num_modules, threshold)

    def get_best_target_parameters(
        self, top_p: float | None = None, num_modules: int | None = None, threshold: float | None = None
    ) -> list[str]:
        """Return names of experts' parameters, smallest κ first: `num_modules` of them, else the part `top_p` (at least
        one), else those with κ ≤ `threshold`, else all.
        """
        return select_targets(self.parameters, top_p, num_modules, threshold)


def find_kappa_target_modules(
    model: nn.Module,
    top_p: float = 0.2,
    max_dim_size_to_analyze: int = 16384,
    moe_param_suffixes: Sequence[str] | None = None,
    show_progress: bool = True,
) -> dict[str, list[str] | None]:
    """Return `target_modules` and `target_parameters`: of each the part `top_p` with the smallest κ.

    `target_parameters` is None if there are none.

    The other arguments are those of `KappaTuneSelector`.
    """
    selector = KappaTuneSelector(model, max_dim_size_to_analyze, moe_param_suffixes, show_progress)
    modules, parameters = selector.get_best_targets(top_p=top_p), selector.get_best_target_parameters(top_p=top_p)
    return {"target_modules": modules, "target_parameters": parameters or None}


def select_targets(
    kappas: dict[str, float], top_p: float | None, number: int | None, threshold: float | None
) -> list[str]:
    """Return names sorted by κ, smallest first.

    `number` takes the first so many, else `top_p` that share of them, rounded down but at least one, else `threshold`
    those with κ up to it. If all three are None, all names are returned.
    """
    names = sorted(kappas, key=lambda name: kappas[name])
    if number is not None:
        return names[:number]
    if top_p is not None:
        return names[: max(1, int(len(names) * top_p))]
    return names if threshold is None else [name for name in names if kappas[name] <= threshold]


def read_weight(path: str, tree: ModuleTree) -> Tensor | None:
    """Return the weight of the linear layer at a path of a model, dequantized and without adapters, also if some are
    merged.

    Return None for another module, a weight that cannot be read, or one on meta. A layer with adapters gives its base
    weight.
    """
    module = tree.modules[path]
    if not is_linear(module):
        return None
    layer = getattr(module, "adapter_layer", None)
    weight = get_site(path, module, tree).weight if layer is None else layer.base_weight
    if weight.why_unreadable() is not None:
        return None
    W: Tensor = weight.read() if layer is None else layer.W0
    return None if W.is_meta else W


def compute_condition_number(W: Tensor) -> Tensor:
    """Return κ of a matrix: its largest singular value over the smallest plus 1e-8, computed in float32 or more."""
    S = torch.linalg.svdvals(W.detach().to(torch.promote_types(W.dtype, torch.float32)))
    return S[0] / (S[-1] + FLOOR)
