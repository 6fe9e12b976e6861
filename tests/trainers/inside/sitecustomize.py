# SPDX-License-Identifier: Apache-2.0
"""Say, where a process of a trainer ends, whose modules it had under PEFT's name: a line in the file $PEFT_WAS.

$IMPORT_FIRST names a module that each process imports before all others.
"""

import atexit
import importlib
import os
import sys


def say() -> None:
    if "PEFT_WAS" in os.environ and (peft := sys.modules.get("peft")) is not None:
        with open(os.environ["PEFT_WAS"], "a") as told:
            print(peft.get_peft_model.__module__.partition(".")[0], file=told)


atexit.register(say)
if "IMPORT_FIRST" in os.environ:
    importlib.import_module(os.environ["IMPORT_FIRST"])
