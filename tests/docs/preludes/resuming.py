# SPDX-License-Identifier: Apache-2.0
import os

import tests.docs.preludes as tiny

fresh_base, ids = tiny.language_model, tiny.tokens()
batch = {"input_ids": ids, "labels": ids}
rows = [{"input_ids": row, "labels": row} for row in ids]
os.environ["DISABLE_TQDM"] = "1"
