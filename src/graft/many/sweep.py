# SPDX-License-Identifier: Apache-2.0
"""A sweep: many settings of one adapter train together, and the better ones train longer."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from inspect import signature
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn

from graft import CheckpointError, ConfigError, PeftConfig
from graft.config.atomic import replace_file
from graft.config.base import check_config
from graft.config.reading import Json, read_object
from graft.core.errors import shorten_text
from graft.many import run_file
from graft.many.loader import digest_first_batch
from graft.many.run import FAILED, STATES, Run, ValidationRecord
from graft.many.run_file import make_row_test
from graft.many.runs import AT_ONCE, MultiTrain, list_names, refuse_base_change
from graft.many.search import Setting, compute_rungs, list_settings, select_best
from graft.many.table import make_table
from graft.train.state_check import check_fields, is_a, is_count

if TYPE_CHECKING:
    from rich.table import Table

TABLE = "sweep.json"
DIGESTS = {"data", "valid"}  # of the first batches; tables of earlier states of graft have none
ROW = {
    "name": is_a(str), "state": lambda state: state in ("waiting", "dropped", "kept", *STATES),
    "steps": is_count, "losses": is_a(list, float),
    "curve": lambda points: is_a(list, list)(points) and all(map(make_row_test(4), points)),
}  # fmt: skip
Rows = list[Json]
Exchange = Callable[[Rows], Sequence[Rows]]  # of a process's rows: those of all processes


@dataclass
class Trial:
    """One setting of a sweep, and its results.

    Attributes:
        name: of its run, its adapter and its folder.
        state: "waiting", a state of `Run`, then "dropped", "failed", or "kept" if it trained to the end.
        losses: of validation data, at the end of each rung that it reached; NaN if it failed.
        curve: [step, loss, learning rate, norm of the gradient] of each step.
    """

    name: str  # of its run, its adapter and its folder
    setting: Setting
    state: str = "waiting"  # then "dropped", "failed", or "kept" to the end
    steps: int = 0
    losses: list[float] = field(default_factory=list)  # of validation data, on each rung that it reached; NaN: failed
    curve: list[list[float]] = field(default_factory=list, repr=False)  # [step, loss, lr, norm of the gradient]

    @property
    def loss(self) -> float:
        """The last validation loss; NaN if there is none."""
        return self.losses[-1] if self.losses else math.nan


class Sweep:
    """The results of a sweep.

    Attributes:
        trials: all settings, in the order of the search.
        runs: the MultiTrain with the adapters that this process has kept; `runs.unload()` returns the base.
        folder: of the files; None: there are none.
    """

    def __init__(self, trials: list[Trial], runs: MultiTrain, folder: str | None = None):
        self.trials, self.runs, self.folder = trials, runs, folder

    def __repr__(self) -> str:
        best = self.best
        return f"<Sweep of {len(self.trials)} settings; best: '{best.name}' {best.setting}, loss {best.loss:.4g}>"

    @property
    def ranking(self) -> list[Trial]:
        """All trials: those that reached most rungs first, and among these by validation loss, NaN last.

        Of equal ones the earlier trial comes first.
        """
        order = select_best({i: t.loss for i, t in enumerate(self.trials)}, len(self.trials))
        return sorted((self.trials[i] for i in order), key=lambda t: -len(t.losses))

    @property
    def best(self) -> Trial:
        """The first of `ranking`: of the trials that reached the last rung, the one with the lowest validation loss."""
        return self.ranking[0]

    @property
    def rows(self) -> Rows:
        """The table, a dict for each trial, best first: "name", each entry of the setting, "steps", "loss" and
        "state".
        """
        return [{"name": t.name, **t.setting, "steps": t.steps, "loss": t.loss, "state": t.state} for t in self.ranking]

    def table(self) -> Table:
        """Return `rows` as a table of rich, to print; the best row is bold.

        The columns are the keys of the best row, and floats have 4 significant digits.
        """
        rows = [[f"{v:.4g}" if isinstance(v, float) else str(v) for v in row.values()] for row in self.rows]
        return make_table(self.rows[0], zip(rows, ["bold", *[None] * len(rows)]))


def sweep(
    model: nn.Module,
    config: PeftConfig,
    space: Mapping[str, object],
    *,
    data: Iterable[object] | Callable[[Setting], Iterable[object]],
    valid: Iterable[object],
    steps: int,
    optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.AdamW,
    search: str = "grid",
    n: int | None = None,
    keep: float = 1 / 4,
    rungs: int = 3,
    seed: int = 0,
    folder: str | os.PathLike[str] | None = None,
    save_every: int = 100,
    share: tuple[int, int] | None = None,
    exchange: Exchange | None = None,
    progress: bool = False,
    at_once: int = AT_ONCE,
    exact: bool = True,
    base_in_eval: bool = False,
    **options: object,
) -> Sweep:
    """Train many settings of an adapter together, and drop the worse ones on the way (successive halving, arXiv
    1502.07943): each rung has 1 / `keep` times the steps of the one before and `keep` of its settings.

    No result depends on other settings that train in the same process. So the processes of a `torch.distributed` group
    divide the settings among them, compare losses at the end of each rung, and return the table of one process, to the
    bit. Trials are named s0, s1, …, with numbers of equal width.

    Args:
        model: the base.
        space: name → list of values. A name is a field of the config, an option of `MultiTrain.add`, or an argument of
            the optimizer, such as "lr".
        data: a loader, or a function from a setting to a loader.
        valid: validation data; its mean loss decides. With `every=` runs measure it between their rungs, too.
        steps: of a run that trains to the end.
        optimizer: a class, or a partial of one.
        search: "grid"; or "random", for `n` settings. There a range (low, high) means any value in it.
        keep, rungs: with one rung all settings train to the end.
        seed: of the random search, and of each run unless `space` has "seed".
        folder: for the table with all curves, and the adapters that were kept. A sweep that was killed continues there.
        save_every: rounds between two saves.
        share: (number of this process, of all); None: those of the process group.
        exchange: gathers rows from all processes; None: the process group does.
        progress: show a table meanwhile.
        at_once, exact, base_in_eval: as of `MultiTrain`.
        options: as of `MultiTrain.add`.

    Raises:
        ConfigError: space, search or rungs are invalid, the folder has another sweep, nobody gathers the losses of a
            `share`, or every setting has failed.
        TypeError: an option is unknown.
        FolderInUseError: another process, or thread, is at a sweep in the folder. Nothing has changed.
        CheckpointError: the folder's table is damaged, or has rows of other trials.
        Whatever is raised, the model is as it was.
    """
    check_config(config)
    if unknown := options.keys() - OPTIONS:
        raise TypeError(
            f"sweep() takes no {list_names(unknown)}. Arguments of the optimizer go into the space, or a partial of it."
        )
    group = (dist.get_rank(), dist.get_world_size()) if dist.is_available() and dist.is_initialized() else (0, 1)
    share_of_all = group if share is None else share
    is_pair = isinstance(share_of_all, (tuple, list)) and [type(n) for n in share_of_all] == [int, int]
    rank, world = share_of_all if is_pair else (0, 0)
    fault = ""
    if type(save_every) is not int or save_every < 1:
        fault = f"save_every must be a positive int, got {save_every!r}."
    elif not callable(optimizer):
        fault = f"optimizer must be a class of optimizers, or a partial of one, got {shorten_text(repr(optimizer))}."
    elif isinstance(valid, Iterator) or not hasattr(valid, "__iter__"):
        fault = f"valid must be batches that can be iterated again and again, such as a list, got {valid!r}."
    elif not 0 <= rank < world:
        fault = f"share must be (number of this process, of all), counted from 0, got {share!r}."
    elif exchange is None and world not in (1, group[1]):
        fault = (
            f"share={share} divides the settings among {world} processes, and no process group of this size can gather "
            "their losses. Call torch.distributed.init_process_group, or pass exchange=."
        )
    if fault:
        raise ConfigError(f"sweep: {fault}")
    exchange = exchange or (gather_rows if world > 1 else lambda rows: [rows])
    check_space_names(space, config, optimizer)
    ladder = compute_rungs(steps, keep, rungs)
    settings = list_settings(space, search, n, seed)
    trials = [Trial(f"s{i:0{len(str(len(settings) - 1))}}", setting) for i, setting in enumerate(settings)]
    known, configs = {f.name for f in fields(config)}, dict[str, PeftConfig]()
    for trial in trials:  # before any of them trains
        values = {name: value for name, value in trial.setting.items() if name in known}
        configs[trial.name] = dataclasses.replace(copy.deepcopy(config), **values)
        refuse_base_change(trial.name, configs[trial.name])
    runs = MultiTrain(model, at_once=at_once, exact=exact, base_in_eval=base_in_eval)
    runs.folder = path = None if folder is None else os.fspath(folder)

    def add_run(trial: Trial) -> Run:
        """Add the run of a trial to `runs` and return it.

        Names of a setting that are options of `MultiTrain.add` are passed to it, unless the config has a field of this
        name. They replace the sweep's `seed` and options. Names that are neither are arguments of the optimizer.
        `valid` is passed only with `every`. A callable `data` is called with the setting.
        """
        setting = trial.setting
        chosen: Json = {"seed": seed, **options} | {k: v for k, v in setting.items() if k in OPTIONS - known}
        if chosen.get("every") is not None:  # else it looks on its rungs alone
            chosen["valid"] = valid
        maker = partial(optimizer, **{k: v for k, v in setting.items() if k not in OPTIONS | known})
        loader = data(setting) if callable(data) else data
        return runs.add(trial.name, configs[trial.name], data=loader, optimizer=maker, steps=steps, **chosen)

    assigned, is_first = trials[rank::world], rank == 0
    job = SweepJob(runs, trials, assigned, add_run, valid, save_every, exchange, is_first, progress)
    note: dict[str, object] = {"config": config.to_file_dict(), "rungs": ladder, "keep": keep}
    note |= {"optimizer": optimizer, "seed": seed, "options": options}
    if path is not None:
        note["valid"] = digest_first_batch("sweep: valid", valid)
        if not callable(data) and not isinstance(data, Iterator):
            note["data"] = digest_first_batch("sweep", data)
    try:
        if path is not None:
            runs.claims.claim(path, [TABLE] if is_first else [], alone=True)
            runs.claims.claim(path, [trial.name for trial in assigned])
        try:
            job.load_table(note)
            job.run_rungs(ladder, keep)
            job.save_kept_adapters(len(ladder))
        except BaseException:
            runs.unload()
            raise
    finally:
        runs.claims.release()
    return Sweep(trials, runs, path)


def check_space_names(space: Mapping[str, object], config: PeftConfig, optimizer: Callable[..., object]) -> None:
    """Raise ConfigError for names of a space that are no field of the config, no argument of the optimizer and no
    option of `MultiTrain.add`; all are named.

    The optimizer's first argument, its parameters, does not count. Nothing is checked for an optimizer without a
    signature, or with `**kwargs`.
    """
    try:
        _, *parameters = signature(optimizer).parameters.values()
    except (TypeError, ValueError):  # some functions have no signature
        return
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return
    known = {f.name for f in fields(config)} | OPTIONS | {p.name for p in parameters}
    if unknown := [name for name in space if name not in known]:
        kind = optimizer.func if isinstance(optimizer, partial) else optimizer
        raise ConfigError(
            f"sweep: [{list_names(unknown)}] in the space are neither fields of {type(config).__name__}, nor arguments "
            f"of {getattr(kind, '__name__', kind)}, nor of these of MultiTrain.add: {', '.join(sorted(OPTIONS))}."
        )


OPTIONS = {*signature(MultiTrain.add).parameters} - {"self", "name", "config", "data", "valid", "optimizer", "steps"}


def find_validation_loss(run: Run, step: int) -> float | None:
    """Return a run's validation loss at a step, or at its last step if it ended before; None if it was not measured
    there.
    """
    return next((look.loss for look in run.valid if look.step == min(step, run.step)), None)


def gather_rows(rows: Rows) -> list[Rows]:
    """Return the rows of all processes of the group, by rank. All processes must call this."""
    rows_of_all: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(rows_of_all, rows)
    return rows_of_all


@dataclass
class SweepJob:
    """A sweep under way in one process, which trains some of the trials and knows the results of all.

    Attributes:
        assigned: the trials that this process trains.
        first: this process writes the table, and shows one.
        note: the sweep's arguments as JSON, to compare with a table's.
    """

    runs: MultiTrain
    trials: list[Trial]
    assigned: list[Trial]
    add_run: Callable[[Trial], Run]
    valid: Iterable[object]
    save_every: int
    exchange: Exchange
    first: bool  # this process writes the table, and shows one
    progress: bool
    note: Json = field(default_factory=dict)

    # the rungs

    def run_rungs(self, ladder: list[int], keep: float) -> None:
        """Train to the end of each rung the trials still in the race that are assigned here, and exchange the losses.
        Keep the best part, the number rounded up and at least one; after the last rung all finite ones stay. The others
        are marked as dropped, or failed if their loss is NaN; their runs are removed, and their curves stay.

        Trials that the table shows past a rung do not train again. Writes the table after each rung. Raises ConfigError
        if every trial has failed.
        """
        alive = self.trials
        for rung, until in enumerate(ladder):
            self.train_trials([t for t in self.assigned if t in alive and len(t.losses) <= rung], until)
            self.exchange_rows()
            n = len(alive) if until == ladder[-1] else max(1, math.ceil(len(alive) * keep))
            best = self.pick_best(alive, rung, n)
            for trial in (trial for trial in alive if trial not in best):
                trial.state = "failed" if math.isnan(trial.loss) else "dropped"
                if trial.name in self.runs:
                    self.runs.remove(trial.name)
            alive = best
            self.write_table()

    def pick_best(self, trials: list[Trial], rung: int, n: int) -> list[Trial]:
        """Return the `n` of these trials with the lowest finite losses of a rung, or all of them if there are fewer, in
        the order of `trials`. Of equal losses the earlier trial counts as lower.

        Raises ConfigError, with the sorted reasons of the runs that have one, if no loss is finite.
        """
        finite = {i: t.losses[rung] for i, t in enumerate(trials) if math.isfinite(t.losses[rung])}
        if not finite:
            why = {self.runs[t.name].why for t in self.trials if t.name in self.runs}
            raise ConfigError(f"sweep: every setting has failed. {' '.join(sorted(w for w in why if w))}")
        return [trials[i] for i in sorted(select_best(finite, n))]

    # training

    def train_trials(self, trials: Sequence[Trial], until: int) -> None:
        """Train these trials to a step: add the runs that are not there yet, set `until` of each to this step, and make
        the rounds.

        Then append to each trial its run's validation loss at this step, or NaN for a failed run, and copy steps, curve
        and state from the run. Runs that have no loss of that step yet are measured first, together. Saves the runs, if
        there is a folder and a run.
        """
        for trial in trials:
            run = self.runs[trial.name] if trial.name in self.runs else self.add_run(trial)
            run.until = until
        self.run_rounds()
        runs = [self.runs[trial.name] for trial in trials]
        new = [run.name for run in runs if run.state != FAILED and find_validation_loss(run, until) is None]
        for name, loss in self.runs.evaluate(new, self.valid).items():
            self.runs[name].valid.append(ValidationRecord(self.runs[name].step, loss))
        for trial, run in zip(trials, runs):
            seen = find_validation_loss(run, until)
            trial.losses.append(math.nan if seen is None else seen)
            trial.steps, trial.curve, trial.state = run.step, [list(point) for point in run.curve], run.state
        if self.runs.folder is not None and self.runs.names:
            self.runs.save(self.runs.folder)

    def run_rounds(self) -> None:
        """Make rounds until no run takes part, and save to the folder every `save_every` rounds and at the end.

        Without a folder nothing is saved. With `progress` the first process shows the table.
        """
        self.runs.run(self.progress and self.first, self.runs.folder, self.save_every)

    def exchange_rows(self) -> None:
        """Exchange rows with the other processes, and update trials, in place, from rows that have losses of more rungs
        or that were dropped. Each process must call this. A row is a dict of all fields of a trial but the setting.
        """
        rows_here = [{key: value for key, value in vars(trial).items() if key != "setting"} for trial in self.trials]
        for rows in self.exchange(rows_here):
            for trial, row in zip(self.trials, rows):
                if len(row["losses"]) > len(trial.losses) or row["state"] == "dropped":
                    vars(trial).update(row)

    # files

    def load_table(self, note: dict[str, object]) -> None:
        """Set `self.note` to `note` with the trials' settings, and update the trials from the folder's table.

        If the folder has no table, write one, which claims the folder for this sweep. Without a folder, nothing is
        read. A digest that the table lacks is not compared.

        Raises:
            ConfigError: the table is of another sweep: a field of its note differs.
            CheckpointError: it is damaged, or its rows have other names or another order than the trials. The trials
                are then unchanged.
        """
        self.note = run_file.to_json_value(note | {"settings": [t.setting for t in self.trials]})
        path = None if self.runs.folder is None else os.path.join(self.runs.folder, TABLE)
        if path is None or not os.path.exists(path):
            self.write_table()  # another sweep then sees that the folder is taken
            return
        document = read_object(path, largest=sys.maxsize, finite=False)
        check_fields(document, {"sweep": is_a(dict), "trials": is_a(list, dict)}, path)
        recorded = document["sweep"]
        known = {key: value for key, value in self.note.items() if key in recorded or key not in DIGESTS}
        differ = [key for key, value in known.items() if recorded.get(key) != value]
        if differ:
            raise ConfigError(f"{path} is of another sweep, with other {', '.join(differ)}. Pass another folder.")
        for row in document["trials"]:
            check_fields(row, ROW, f"{path}: a row")
        if [row["name"] for row in document["trials"]] != [trial.name for trial in self.trials]:
            raise CheckpointError(f"{path} has rows of other names than its settings. Pass another folder.")
        for trial, row in zip(self.trials, document["trials"]):
            vars(trial).update({key: row[key] for key in ROW})

    def write_table(self) -> None:
        """Write the table of the sweep's note and all trials, in place of an earlier one, and delete the run files of
        dropped and failed trials. The folder is made if needed.

        Only the first process does so, and only with a folder; else nothing happens.
        """
        if self.runs.folder is None or not self.first:
            return
        os.makedirs(self.runs.folder, exist_ok=True)
        document = {"sweep": self.note, "trials": [asdict(t) for t in self.trials]}
        text = json.dumps(document, indent=1, default=run_file.name_object, skipkeys=True)
        replace_file(os.path.join(self.runs.folder, TABLE), text + "\n")
        for trial in self.trials:
            if trial.state in ("dropped", "failed"):
                run_file.delete_run(trial.name, self.runs.folder)

    def save_kept_adapters(self, rungs: int) -> None:
        """Mark trials that reached all rungs as kept, unless they failed or were dropped, and write the table.

        Without a folder no adapter is saved.

        Adapters of those trials that are assigned here are saved into the folder, each in a subfolder of the trial's
        name. A run from before this process is first added from its file; without a file the trial's adapter is not
        saved.
        """
        for trial in self.trials:
            if len(trial.losses) < rungs or trial.state in ("failed", "dropped"):
                continue
            trial.state = "kept"
            if self.runs.folder is None or trial not in self.assigned:
                continue
            if trial.name not in self.runs and run_file.load_run(trial.name, self.runs.folder) is not None:
                self.add_run(trial)  # trained before this process
            if trial.name in self.runs:
                self.runs.save_adapter(trial.name, os.path.join(self.runs.folder, trial.name))
        self.write_table()
