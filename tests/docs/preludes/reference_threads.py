# SPDX-License-Identifier: Apache-2.0
import graft
from tests.docs.preludes import language_model, tokens

base = language_model()
CONFIGS = {
    "french": graft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False),
    "poems": graft.LoraConfig(r=8, target_modules=["q_proj"], init_lora_weights=False),
    "rare": graft.LoraConfig(r=2, target_modules=["v_proj"], init_lora_weights=False),
    "first": graft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False),
    "second": graft.LoraConfig(r=8, lora_alpha=2, target_modules=["q_proj"], init_lora_weights=False),
}
for name, made in CONFIGS.items():
    graft.get_peft_model(language_model(), made).save_pretrained(f"adapters/{name}")
config, tensors = CONFIGS["poems"], graft.load_peft_weights("adapters/poems")
peft_model = graft.get_peft_model(language_model(), CONFIGS["french"])
model = language_model()
batch = {"input_ids": tokens(4)}
