# SPDX-License-Identifier: Apache-2.0
"""A folder that PEFT writes."""

import peft

from tests.docs.preludes import language_model, tokens

fresh_base, ids = language_model, tokens()
config = peft.LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False)
peft.get_peft_model(fresh_base(), config).save_pretrained("from_peft")
del config


def fresh(text: str) -> dict:
    """Drop PEFT's model before graft takes PEFT's place: no other program would hold one by then."""
    return {"theirs": None} if "install()" in text else {}
