# SPDX-License-Identifier: Apache-2.0
from tests.docs.preludes import language_model

base = language_model()
