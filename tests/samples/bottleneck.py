# SPDX-License-Identifier: Apache-2.0
"""Samples of bottlenecks."""

from graft.core.errors import UnsupportedLayerError
from tests.samples.laws import Sample

LAWS = [
    Sample("BOTTLENECK", config=dict(reduction_factor=2)),
    Sample("BOTTLENECK", "houlsby", dict(reduction_factor=1.5, non_linearity="swish", init_weights="bert", scaling=3.0),
           identity=2e-2),
    Sample("BOTTLENECK", "gated", dict(reduction_factor={"default": 2}, non_linearity="gelu", use_gating=True,
                                       ln_before=True, scaling="channel")),
    Sample("BOTTLENECK", "compacter", dict(reduction_factor=1, phm_layer=True, phm_dim=2, scaling="learned",
                                           init_weights="bert", non_linearity="gelu")),
]  # fmt: skip
REFUSED = [("BOTTLENECK", "conv", UnsupportedLayerError, "acts on vectors")]
UNMERGEABLE = [("BOTTLENECK", "", NotImplementedError, "it changes activations")]
