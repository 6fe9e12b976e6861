# SPDX-License-Identifier: Apache-2.0
"""Task types. (methods/__init__.py makes `PeftType` from its table.)"""

from enum import Enum


class TaskType(str, Enum):
    """The task that a model is trained for; it selects the PeftModel class."""

    SEQ_CLS = "SEQ_CLS"  # text classification
    SEQ_2_SEQ_LM = "SEQ_2_SEQ_LM"  # encoder-decoder language model
    CAUSAL_LM = "CAUSAL_LM"  # decoder-only language model
    TOKEN_CLS = "TOKEN_CLS"  # token classification
    QUESTION_ANS = "QUESTION_ANS"  # extractive question answering
    FEATURE_EXTRACTION = "FEATURE_EXTRACTION"  # hidden states as embeddings
