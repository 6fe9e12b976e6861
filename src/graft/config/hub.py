# SPDX-License-Identifier: Apache-2.0
"""Files of an adapter, from a folder if it exists, else from the Hugging Face hub; and the keyword arguments
for that.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from graft.core.errors import HubError

HUB_KEYWORDS = {"revision", "cache_dir", "token", "force_download", "local_files_only", "proxies", "repo_type"}
LOADING = HUB_KEYWORDS | {"subfolder", "ignore_mismatched_sizes", "check_digest", "expert_layout"}
# PEFT's arguments for the device of loaded tensors; in graft an adapter gets the device of its layers
IDLE_LOADING = {"torch_device", "device_map", "max_memory", "offload_folder", "offload_dir", "offload_index"}
# arguments that transformers, Trainer and accelerate pass to every model's `save_pretrained`
IDLE_SAVING = {"save_function", "max_shard_size", "token", "variant", "save_peft_format"}


def select_hub_keywords(kwargs: dict[str, object]) -> dict[str, Any]:
    """Return the entries of `kwargs` that are arguments for the hub, in a new dict; `kwargs` stays as it is.

    These are revision, cache_dir, token, force_download, local_files_only, proxies and repo_type.
    """
    return {k: v for k, v in kwargs.items() if k in HUB_KEYWORDS}


def fetch_file(where: str | os.PathLike[str], filename: str, subfolder: str | None = None, **hub: Any) -> str | None:
    """Return the local path of one file of an adapter; None if there is no such file.

    A file in the folder `where`, or its `subfolder`, counts first. If `where` is an existing folder without it, or does
    not look like "owner/name", returns None. Else the file is downloaded. Without the hub (HF_HUB_OFFLINE,
    `local_files_only`, or no answer) only its cache is searched. If the hub is switched off and the cache lacks the
    file, returns None. It also does for a name that the hub refuses, and for a repository without the file.

    Raises:
        HubError: the hub does not answer and the cache lacks the file; there is no such repository or revision, or it
            is gated; or another failure.
    """
    where = os.fspath(where)
    folder = os.path.join(where, subfolder) if subfolder else where
    path = os.path.join(folder, filename)
    if os.path.isfile(path):
        return path
    if os.path.isdir(where) or not looks_like_repository(where):
        return None
    from huggingface_hub import errors, hf_hub_download

    failure = None if is_offline(**hub) else find_hub_failure(where, filename, subfolder, **hub)
    known = hub if failure is None else {**hub, "local_files_only": True}
    try:
        fetched: str = hf_hub_download(where, filename, subfolder=subfolder, **known)
        return fetched
    except errors.LocalEntryNotFoundError as e:
        if is_offline(**hub):
            return None
        raise HubError(
            f"There is no folder '{where}' here, the hub's cache has no '{filename}' of such a repository, and the hub "
            f"cannot be reached: {failure or e}"
        ) from e
    except (errors.EntryNotFoundError, errors.HFValidationError):
        return None
    except errors.GatedRepoError as e:
        raise HubError(f"'{where}' on the hub is gated: ask for access to it, and log in or pass `token`. {e}") from e
    except errors.RepositoryNotFoundError as e:
        raise HubError(
            f"Can't find '{filename}' at '{where}': there is no such folder, and the hub has no such repository, or it "
            f"is private (log in or pass `token`). {e}"
        ) from e
    except errors.RevisionNotFoundError as e:
        raise HubError(f"The repository '{where}' on the hub has no revision '{hub.get('revision')}'. {e}") from e
    except Exception as e:  # of the network, the hub or the disk
        raise HubError(f"'{filename}' of '{where}' cannot be fetched from the hub: {type(e).__name__}: {e}") from e


def find_hub_failure(where: str, filename: str, subfolder: str | None, **hub: Any) -> Exception | None:
    """Return the connection error of a request to the hub; None if the hub answers or refuses, the name is invalid, or
    the hub's cache has the file.

    A download would try again for 30 seconds, so one request asks first.
    """
    from huggingface_hub import errors, get_hf_file_metadata, hf_hub_url, try_to_load_from_cache

    options = {name: hub.get(name) for name in ("revision", "repo_type")}
    path = f"{subfolder}/{filename}" if subfolder else filename
    try:
        if isinstance(try_to_load_from_cache(where, path, hub.get("cache_dir"), **options), str):
            return None  # then a download does not try again
        get_hf_file_metadata(hf_hub_url(where, path, **options), token=hub.get("token"))
    except (errors.HfHubHTTPError, errors.HFValidationError, ValueError):
        return None  # the download will raise the same
    except Exception as e:  # of the network, of types that differ between versions
        return e
    return None


def is_offline(local_files_only: bool = False, **_: object) -> bool:
    """Return True if the hub must not be asked: `local_files_only` is passed, or HF_HUB_OFFLINE is set."""
    from huggingface_hub import constants

    return bool(local_files_only or constants.HF_HUB_OFFLINE)


def describe_offline(where: str | os.PathLike[str], **hub: object) -> str:
    """Return the end of the error for a missing file if the hub was not asked; "" if `where` is a folder, names no
    repository, or the hub was asked.
    """
    where = os.fspath(where)
    if os.path.isdir(where) or not looks_like_repository(where) or not is_offline(bool(hub.get("local_files_only"))):
        return ""
    return (
        ": there is no such folder, the hub's cache does not have it, and the hub was not asked, since HF_HUB_OFFLINE "
        "or local_files_only is set"
    )


def looks_like_repository(name: str) -> bool:
    """Return True if a name can be one on the hub: at most one "/", not two in a row, and no ".", "/" or "~" at the
    beginning. Its letters are not checked.
    """
    return not name.startswith((".", "/", "~")) and name.count("/") <= 1 and os.sep * 2 not in name


def push(save: Callable[[str], None], repo_id: str, **kwargs: Any) -> object:
    """Call `save` with a temporary folder, then upload the folder to `repo_id`, which is made if missing.

    Return the hub's answer. The folder is deleted, on errors as well.

    Args:
        kwargs: `token` and `private`, for the hub; others for its `upload_folder`.

    Raises:
        HubError: the hub cannot be reached, or refuses. Errors of `save` continue as they are.
    """
    import tempfile

    from huggingface_hub import HfApi

    api, private = HfApi(token=kwargs.pop("token", None)), kwargs.pop("private", None)
    with tempfile.TemporaryDirectory() as folder:
        save(folder)
        try:
            repo = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
            return api.upload_folder(folder_path=folder, repo_id=repo, **kwargs)
        except Exception as e:  # of the network or the hub, of types that differ between versions
            raise HubError(f"'{repo_id}' cannot be pushed to the hub: {type(e).__name__}: {e}{suggest_login(e)}") from e


def suggest_login(e: BaseException) -> str:
    """Return " Log in …" if the hub's answer has status 401 or 403; else ""."""
    status = getattr(getattr(e, "response", None), "status_code", None)
    return " Log in (`hf auth login`), or pass another token." if status in (401, 403) else ""
