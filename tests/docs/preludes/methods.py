# SPDX-License-Identifier: Apache-2.0
from tests.docs.preludes import many_adapters

fresh_base, loader, valid = many_adapters.fresh_base, many_adapters.loader, many_adapters.valid
