# SPDX-License-Identifier: Apache-2.0
"""Where and how tensors are made, read from the source: no device has to be there."""

import ast
from collections import Counter

from tests.test_architecture import SOURCE, tree_of

ROOMS = ("core", "inject", "kernels", "methods", "storage")
FACTORIES = {
    "arange", "as_tensor", "empty", "eye", "full", "linspace", "ones", "rand", "randint", "randn", "randperm", "tensor",
    "tril_indices", "triu_indices", "zeros",
}  # fmt: skip
BUILT = {"build", "build_largest", "init_values", "share", "__init__"}  # injection chooses the device around these
# other functions that make tensors on torch's default device: start values, and those of the CPU by design
ELSEWHERE = {
    "core/random.py __torch_function__": 1, "core/random.py build_on": 1, "inject/build.py add_layers": 1,  # ask for it
    "kernels/orthogonal.py butterfly_order": 1, "methods/adamss.py find_clusters": 2,
    "methods/finegates.py compression": 2, "methods/frod.py basis": 1, "methods/frod.py support": 2,
    "methods/gralora.py blocks": 1, "methods/gralora.py draw_factor": 1, "methods/lora/start.py directions": 2,
    "methods/lora/started.py _orthogonal": 3,
    "methods/randlora.py ternary": 1, "methods/randlora.py uniform": 1, "methods/states.py numbers_by_row": 1,
    "methods/tasks.py check_tasks": 1, "methods/tlora.py per_row": 1, "methods/unilora.py deal_places": 1,
    "methods/xlora.py surround_run": 1, "storage/codes.py count_numbers": 1, "storage/parallel.py gather_numbers": 1,
}  # fmt: skip


def makers(node: ast.AST, function: str = ""):
    """Yield the name of the function around each factory call of torch without a device."""
    for child in ast.iter_child_nodes(node):
        inner = child.name if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)) else function
        if isinstance(child, ast.Call) and isinstance(child.func, ast.Attribute) and child.func.attr in FACTORIES:
            of_torch = isinstance(child.func.value, ast.Name) and child.func.value.id == "torch"
            if of_torch and not {"device", None} & {keyword.arg for keyword in child.keywords}:
                yield inner
        yield from makers(child, inner)


def test_tensors_of_forward_passes_name_their_device():
    made = Counter(
        f"{path.relative_to(SOURCE).as_posix()} {function}"
        for room in ROOMS
        for path in sorted((SOURCE / room).rglob("*.py"))
        for function in makers(tree_of(path))
        if function not in BUILT
    )
    assert made == ELSEWHERE, "give device=, or list the function"
