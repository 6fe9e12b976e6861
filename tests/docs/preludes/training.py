# SPDX-License-Identifier: Apache-2.0
import os

import tests.docs.preludes as tiny

fresh_base = tiny.language_model
base, ids = fresh_base(), tiny.tokens()
batch = {"input_ids": ids, "labels": ids}
rows = [{"input_ids": row, "labels": row} for row in ids]
os.environ["DISABLE_TQDM"] = "1"


def word_tokenizer():
    """A tokenizer of three words, made on the spot."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"<pad>": 0, "<bos>": 1, "<eos>": 2, "<unk>": 3, "one": 4, "two": 5, "three": 6}
    inner = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    special = dict(pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<unk>")
    return PreTrainedTokenizerFast(tokenizer_object=inner, **special)


tokenizer = word_tokenizer()
