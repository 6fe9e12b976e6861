# SPDX-License-Identifier: Apache-2.0
"""The toolbox: adapters as files. Read, check, compare, convert, shrink, merge and write them, mostly without torch.

Entry points: `graft.merge_files`, `graft.load_adapter`, the functions that the verbs of `graft.command` call, and
`PeftModel.save_pretrained(for_server=…)`.

- `neutral.py`: `AdapterFile`, the one form between all readers and writers of `formats/`.
- `base.py`: the base model of an adapter, as names and shapes of tensors.
- `serving.py`: the servers of `servers.json`, and whether one loads an adapter right.
"""
