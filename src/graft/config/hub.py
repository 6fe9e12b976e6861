# SPDX-License-Identifier: Apache-2.0
"""Files of an adapter: from a folder if there is one, else from the Hugging Face hub."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from typing import Any


def fetch(where: str | os.PathLike, filename: str, subfolder: str | None = None, **hub: Any) -> str | None:
    """Return the local path of one file of an adapter; None if there is none, or the hub cannot be reached."""
    where = os.fspath(where)
    folder = os.path.join(where, subfolder) if subfolder else where
    path = os.path.join(folder, filename)
    if os.path.isfile(path):
        return path
    if os.path.isdir(where) or not looks_like_repository(where):
        return None
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return hf_hub_download(where, filename, subfolder=subfolder, **hub)
    except (EntryNotFoundError, LocalEntryNotFoundError, HfHubHTTPError, HFValidationError, OSError):
        return None


def looks_like_repository(name: str) -> bool:
    return not name.startswith((".", "/", "~")) and name.count("/") <= 1 and os.sep * 2 not in name


def push(save: Callable[[str], None], repo_id: str, **kwargs: Any) -> Any:
    """Save to a temporary folder and upload it to `repo_id`."""
    from huggingface_hub import HfApi

    create = {k: kwargs.pop(k) for k in ("private",) if k in kwargs}
    api = HfApi(token=kwargs.pop("token", None))
    repo = api.create_repo(repo_id, exist_ok=True, **create).repo_id
    with tempfile.TemporaryDirectory() as folder:
        save(folder)
        return api.upload_folder(folder_path=folder, repo_id=repo, **kwargs)
