# SPDX-License-Identifier: Apache-2.0
"""Every cell of the matrix against PEFT; where PEFT fails, or does something else, it is shown to."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import peft
import pytest
import torch
import transformers
from packaging.version import Version
from torch import Tensor, nn

from graft.methods import IN_PEFT
from tests.covering import law
from tests.model.tasks.models import CELLS, GENERATING, STEPS, Cell, make
from tests.models import output
from tests.pair import close, close_dicts, outcome, trainable
from tests.samples import DRAWS

OLD = Version(transformers.__version__) < Version("5.24")  # PEFT may do then what it does not under 5.24
DIFFERS = ""  # no error, other values


@dataclass(frozen=True)
class Unlike:
    """What PEFT 0.21.2 with transformers 5.24 does not do, and how that shows: the text of its error, or DIFFERS."""

    aspects: str
    methods: str
    where: str  # models or tasks
    shows: str
    why: str


EMBEDDINGS = "PROMPT_TUNING P_TUNING MULTITASK_PROMPT_TUNING"
KEYS = "PREFIX_TUNING CARTRIDGE"
BERTS = "bert-seq bert-tok bert-qa roberta-seq roberta-tok roberta-qa"
REPEATED = "the prompt goes in front of every step of generate, not of the first alone"

UNLIKE = [
    Unlike("logits loss generate", "LOHA OFT HRA MISS ROAD DELORA C3A LOKR GLORA PEANUT ADAMSS", "gpt2", "Conv1D",
           "these methods do not know Conv1D"),
    Unlike("loss", "C3A", "llama opt gemma3 neox qwen mixtral SEQ_2_SEQ_LM SEQ_CLS TOKEN_CLS QUESTION_ANS", DIFFERS,
           "the gradient of the input is that of another matrix"),
    Unlike("logits loss generate", "BEFT SHIRA SUPERTUNING BOFT PSOFT LILY", "gpt2", "Conv1D", "nor do these"),
    Unlike("logits generate", "OSF", "gpt2", DIFFERS, "it passes Conv1D by in silence"),
    Unlike("loss", "OSF", "gpt2", "assert ", "so that nothing trains"),
    Unlike("logits loss", "TRAINABLE_TOKENS", "TOKEN_CLS QUESTION_ANS", "'NoneType' object is not iterable",
           "these classes take modules_to_save for granted, which the config has not"),
    Unlike("loss", "LORA", "mixtral", "No `target_modules` passed",
           "the conversion for fused experts looks at target_modules before the defaults are filled in"),
    Unlike("logits loss", KEYS, BERTS, "Model does not support past key values",
           "the argument is looked for under the name that it had before"),
    Unlike("generate", KEYS, "CAUSAL_LM SEQ_2_SEQ_LM", DIFFERS,
           "the prefix is passed under the name that it had before, and the base's empty cache wins"),
    Unlike("generate", f"{EMBEDDINGS} CPT", "gpt2", "index out of range", REPEATED),
    Unlike("generate", f"{EMBEDDINGS} CPT", "opt", "must match the size", REPEATED),
    Unlike("generate", f"{EMBEDDINGS} CPT", "llama gemma3 neox qwen mixtral", DIFFERS, REPEATED),
    Unlike("generate", "MULTITASK_PROMPT_TUNING", "SEQ_2_SEQ_LM", DIFFERS,
           "the decoder does without the prompt that it was trained with"),
    Unlike("logits", "MULTITASK_PROMPT_TUNING", "SEQ_2_SEQ_LM", "NoneType",
           "decoder inputs are embedded only if labels make them"),
    Unlike("loss", EMBEDDINGS, "TOKEN_CLS", "Expected input batch_size",
           "logits have the prompt's positions, labels do not"),
    Unlike("logits loss", "MULTITASK_PROMPT_TUNING", "QUESTION_ANS FEATURE_EXTRACTION", "task_ids cannot be None",
           "they are not passed on"),
]  # fmt: skip


def logits(model: nn.Module, cell: Cell) -> dict[str, Tensor]:
    with torch.no_grad():
        return {"logits": output(model.eval(), cell.inputs())}


def loss(model: nn.Module, cell: Cell) -> dict[str, Tensor]:
    out = model.train(cell.method not in DRAWS)(**cell.labelled())
    out.loss.backward()
    return {"loss": out.loss, **{name: p.grad for name, p in model.named_parameters() if p.requires_grad}}


def generate(model: nn.Module, cell: Cell) -> dict[str, Tensor]:
    return {"ids": model.eval().generate(**cell.start(), max_new_tokens=STEPS, do_sample=False)}


def aspects(cell: Cell) -> dict[str, Callable[[nn.Module, Cell], dict[str, Tensor]]]:
    has_loss, generates = bool(cell.labels()), cell.task in GENERATING
    return {"logits": logits} | ({"loss": loss} if has_loss else {}) | ({"generate": generate} if generates else {})


def unlike(cell: Cell, aspect: str) -> Unlike | None:
    return next((u for u in UNLIKE if aspect in u.aspects.split() and cell.among(u.methods, u.where)), None)


def twin(model: nn.Module, cell: Cell) -> nn.Module:
    """What PEFT makes of the cell, with the values of `model`."""
    theirs = cell.fresh(peft)
    assert trainable(theirs) == trainable(model)
    with torch.no_grad():
        for name in trainable(model):
            theirs.get_parameter(name).copy_(model.get_parameter(name))
    return theirs


@pytest.mark.differs("`generate` under transformers ≥ 5.2x, whose cache argument is `cache`")
@pytest.mark.differs("multitask prompts of an encoder-decoder")
@law("cell", [c for c in CELLS if c.method in IN_PEFT], lambda cell: cell.features)
def test_equals_peft(cell, tmp_path):
    """The folder that graft wrote computes the same in PEFT; equal values have equal losses and gradients."""
    ours = cell.trained()
    ours.save_pretrained(tmp_path)

    def theirs(aspect: str) -> nn.Module:
        return twin(ours, cell) if aspect == "loss" else peft.PeftModel.from_pretrained(make(cell.model), str(tmp_path))

    tolerance = 1e-3 if cell.model == "t5" else 1e-4  # t5's are large: both are off by as much from float64
    for aspect, run in aspects(cell).items():
        known, expected = unlike(cell, aspect), outcome(lambda: run(theirs(aspect), cell))  # noqa: B023
        if known is not None and known.shows:
            shown = known.shows in str(expected.error)
            assert shown or OLD, known
            if not shown and known.why is not REPEATED:  # PEFT reads names of transformers 4
                close_dicts(run(ours, cell), expected.value, tolerance)
        elif expected.error is not None:
            raise expected.error
        elif known is None:
            close_dicts(run(ours, cell), expected.value, tolerance)
        elif not OLD:
            assert any(not t.equal(expected.value[key]) for key, t in run(ours, cell).items()), known


@pytest.mark.parametrize("row", UNLIKE, ids=lambda row: f"{row.aspects}-{row.methods}-{row.where}")
def test_every_word_of_a_row_is_about_a_cell(row):
    """And no row hides another."""
    about = [cell for cell in CELLS if cell.among(row.methods, row.where)]
    assert {cell.method for cell in about} == set(row.methods.split())
    assert set(row.where.split()) <= {word for cell in about for word in (cell.model, cell.task)}
    assert all(
        unlike(cell, aspect) is row for cell in about for aspect in row.aspects.split() if aspect in aspects(cell)
    )
    assert set(row.aspects.split()) <= {aspect for cell in about for aspect in aspects(cell)}


# where PEFT fails, by what it can do


@pytest.mark.parametrize("cell", [c for c in CELLS if c.among(KEYS, BERTS)], ids=str)
@torch.no_grad()
def test_keys_under_a_head_are_those_of_the_model_below(cell):
    ours, below = cell.trained(), make(cell.model).base_model
    seen: list[Tensor] = []
    ours.get_base_model().base_model.register_forward_hook(lambda module, args, out: seen.append(out.last_hidden_state))
    ours(**cell.inputs())
    config = cell.config(peft)
    config.task_type = "FEATURE_EXTRACTION"
    theirs = peft.get_peft_model(below, config).eval()
    theirs.prompt_encoder.load_state_dict(ours.prompt_encoder.state_dict())
    close(seen[0], theirs(**cell.inputs()).last_hidden_state)


NOT_PASSED_ON = [c for c in CELLS if c.among("MULTITASK_PROMPT_TUNING", "QUESTION_ANS FEATURE_EXTRACTION")]


@pytest.mark.parametrize("cell", NOT_PASSED_ON, ids=str)
@torch.no_grad()
def test_a_prompt_of_one_task_is_a_prompt(cell):
    ours, theirs = cell.trained(), Cell(cell.model, "PROMPT_TUNING").fresh(peft).eval()
    encoder = ours.prompt_encoder["default"]
    prompt = encoder.embedding.weight * (encoder.prefix_task_cols[1] @ encoder.prefix_task_rows[1])
    for name in trainable(theirs):
        value = prompt if "prompt_encoder" in name else ours.get_parameter(name)
        theirs.get_parameter(name).copy_(value)
    batch = {k: v for k, v in cell.inputs().items() if k != "task_ids"}
    close(output(ours, {**batch, "task_ids": torch.ones(3, dtype=torch.long)}), output(theirs, batch))
