# SPDX-License-Identifier: Apache-2.0
"""Task types. (`PeftType` is made from the table of methods.)"""

from enum import Enum


class TaskType(str, Enum):
    """What the model is trained for; selects the PeftModel class with the right forward."""

    SEQ_CLS = "SEQ_CLS"  # text classification
    SEQ_2_SEQ_LM = "SEQ_2_SEQ_LM"  # encoder-decoder language model
    CAUSAL_LM = "CAUSAL_LM"  # decoder-only language model
    TOKEN_CLS = "TOKEN_CLS"  # token classification
    QUESTION_ANS = "QUESTION_ANS"  # extractive question answering
    FEATURE_EXTRACTION = "FEATURE_EXTRACTION"  # hidden states as embeddings
