# SPDX-License-Identifier: Apache-2.0
"""What every guide starts with: whether it is in a hurry, what it needs, where it writes."""

import logging as python_logging
import os
import sys
import warnings
from importlib.util import find_spec
from pathlib import Path

from transformers.utils import logging

QUICK = "--quick" in sys.argv  # a few steps, to see that everything runs; the results mean nothing then
OUT = Path("out/guides")

os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"
warnings.filterwarnings("ignore")
logging.set_verbosity_error()  # fresh heads are wanted, no need to warn of them
logging.disable_progress_bar()
python_logging.getLogger("bitsandbytes").setLevel(python_logging.ERROR)  # it misses kernels that it can do without


def need(*packages: str) -> None:
    """Stop with a remedy where a package is not installed."""
    missing = [name for name in packages if find_spec(name) is None]
    if missing:
        sys.exit(f"This guide needs {', '.join(missing)}: run `make examples`, or pip install -e '.[examples]'.")
