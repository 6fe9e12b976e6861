# SPDX-License-Identifier: Apache-2.0
import tests.docs.preludes as tiny

fresh_base = tiny.language_model
base, classifier, ids = fresh_base(), tiny.classifier(), tiny.tokens()
