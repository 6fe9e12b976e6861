# SPDX-License-Identifier: Apache-2.0
import os

from tests.docs.preludes import language_model
from tests.docs.preludes.training import word_tokenizer

path = "base"
language_model().save_pretrained(path)
tokenizer = word_tokenizer()
os.environ["DISABLE_TQDM"] = "1"
