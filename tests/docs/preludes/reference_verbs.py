# SPDX-License-Identifier: Apache-2.0
from pathlib import Path

from tests.docs.command import prepare

prepare(Path())
