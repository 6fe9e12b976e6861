# SPDX-License-Identifier: Apache-2.0
"""The report of an injection, as a value and as a table."""

import pytest
import torch
from rich.console import Console
from torch import nn

import graft
from graft.core.finite import max_magnitudes


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.act = nn.Linear(9, 9, bias=False), nn.ReLU()
        self.stack = nn.Parameter(torch.ones(9, 9))
        self.hidden = nn.Parameter(torch.ones(9, 9))


def text_of(report):
    console = Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    with console.file:
        console.print(report)
        return console.export_text()


def test_the_table_has_the_share_and_the_types_that_are_not_targeted():
    text = text_of(graft.plan(Net(), graft.LoraConfig(r=1, target_modules=["a"])))
    assert "18 trainable parameters (6.90 %)" in " ".join(text.split())  # of 3 · 81 in the base and 18
    (row,) = [line for line in text.splitlines() if "ReLU" in line]
    assert "not targeted" in row and " 1 " in row


def test_a_parameter_that_another_field_takes_out_is_reported():
    config = graft.LoraConfig(r=1, target_parameters=["stack", "hidden"], exclude_modules=["hidden"])
    report = graft.plan(nn.ModuleDict({"net": Net()}), config)
    assert [m.name for m in report.matched] == ["net.stack"]
    ((name, kind, why),) = report.skipped
    assert (name, kind) == ("net.hidden", "Parameter") and "exclude" in why and "target_modules" not in why


def test_the_largest_magnitude_of_no_numbers_is_zero():
    assert max_magnitudes([torch.empty(0), torch.tensor([1.0, -3.0])]) == [0.0, 3.0]


@pytest.mark.filterwarnings("ignore:Sparse CSR")
def test_magnitudes_of_tensors_without_rows_are_not_read():
    sparse = torch.tensor([[0.0, 5.0]])
    assert max_magnitudes([sparse.to_sparse_csr(), sparse.to_sparse(), sparse.long(), sparse]) == [1.0, 1.0, 1.0, 5.0]
