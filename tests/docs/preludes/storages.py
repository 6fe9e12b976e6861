# SPDX-License-Identifier: Apache-2.0
from tests.docs.preludes import language_model

path = "base"
language_model().save_pretrained(path)
