# SPDX-License-Identifier: Apache-2.0
"""Trainers' own commands on tiny models, under PEFT and with graft in its place, compared: `make test-trainers`.

`<name>.txt` is what pip installs for a trainer, in an environment of its own: what its newest release asks for, less
what only a GPU or a cloud uses. `<name>.py` has its cases: each a list of commands, run in turn in one folder.
A command's first word is a script of the environment, or a module, which runs in a fork of a process that has imported
the trainer; or it is `env`, and the rest is what one would type into a shell. `DIFFERS` has the cases that are not
equal, and why. `OWN` are arguments of pytest: which tests of the trainer's source distribution run (`own.py`).
"""
