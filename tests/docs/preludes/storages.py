# SPDX-License-Identifier: Apache-2.0
import os

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.docs.preludes import language_model

path = "base"
language_model().save_pretrained(path)
words = {"<pad>": 0, "<bos>": 1, "<eos>": 2, "<unk>": 3, "one": 4, "two": 5, "three": 6}
inner = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
inner.pre_tokenizer = pre_tokenizers.Whitespace()
special = dict(pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<unk>")
tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, **special)
os.environ["DISABLE_TQDM"] = "1"
