# SPDX-License-Identifier: Apache-2.0
"""graft and PEFT side by side: `python -m benchmarks`."""

import os
import warnings

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing is downloaded, nor asked for
warnings.simplefilter("ignore")
