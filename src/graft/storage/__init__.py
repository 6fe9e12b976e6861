# SPDX-License-Identifier: Apache-2.0
"""The stores: how modules hold weights. Only files in this folder read the tensors of a module.

A store is found by the module's type or by the type of its weight. Without a row in the tables, a weight is dense under
two conditions: it is a plain tensor or DTensor of 16 to 64 bits per float, and its module runs the forward of its row
in the table of ops. Subclasses that only hook or patch instances are dense. Any other weight is foreign
(`storage/foreign.py`). Packages that mark torch's own layers as theirs are recognised by the attribute that they set. A
layer type with the forward of its base gets a row by `OPS.add("package.module.MyLinear", OPS.find(nn.Linear))`. A file
of this folder names the classes that it knows by qualified name, and imports their package only when it meets one.
"""
