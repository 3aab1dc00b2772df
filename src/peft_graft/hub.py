"""What comes from the hub and goes there: whether it can, before any work is done, and what the hub says to it."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

from peft_graft.errors import OutputError, reason

logger = logging.getLogger("peft_graft")
#: Seconds for which a hub that does not answer is not asked again, and that it has to answer in.
_REMEMBERED, _PATIENCE = 60, 10


def local_only(name: str) -> dict[str, Any]:
    """``local_files_only`` for what is no folder, as an argument of ``from_pretrained``, where the hub does not answer.

    Without it huggingface_hub asks six times for each file, which takes half a minute a file.
    """
    if os.path.isdir(name):  # noqa: PTH112 - pathlib fails for long names
        return {}
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE or constants.ENDPOINT in _reached:
        return {}
    return {"local_files_only": True} if _is_silent(constants.ENDPOINT, int(time.monotonic() // _REMEMBERED)) else {}


#: Hubs that have answered.
_reached: set[str] = set()


@cache
def _is_silent(address: str, period: int) -> bool:
    """Whether nothing answers there; whatever it says is an answer."""
    from huggingface_hub.utils import get_session  # type: ignore[attr-defined]

    try:
        get_session().head(address, timeout=_PATIENCE)
    except Exception as error:  # of requests or of httpx, as the version of huggingface_hub has it
        logger.warning("%s cannot be reached (%s): only what is on this machine is used", address, type(error).__name__)
        return True
    _reached.add(address)
    return False


@contextmanager
def explained_upload(repo_id: str) -> Iterator[None]:
    """Errors of the hub as one line.

    Raises:
        OutputError: the hub cannot be reached, or refuses.
    """
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, OfflineModeIsEnabled

    try:
        yield
    except HFValidationError as error:
        raise OutputError(
            f"this is no name of a repository ({reason(error)})", where=repo_id, expected="owner/name"
        ) from error
    except LocalTokenNotFoundError as error:
        raise OutputError("nobody is logged in to the hub", where=repo_id, fix="`hf auth login`, or --token") from error
    except OfflineModeIsEnabled as error:
        raise OutputError("the hub is not asked, since HF_HUB_OFFLINE is set", where=repo_id, fix="unset it") from error
    except (HfHubHTTPError, ConnectionError) as error:
        raise OutputError(
            f"the hub does not take it ({reason(error)})",
            where=repo_id,
            fix="check the name and the token",
        ) from error


def check_repository(repo_id: str, token: str | None = None) -> None:
    """Refuse a repository that the user cannot write to, as far as the hub tells without writing.

    Args:
        repo_id: ``owner/name``. token: of the hub; by default the one that is logged in.

    Raises:
        OutputError: it is no such name, nobody is logged in, or the owner is neither the user nor one of the user's
            organizations, or the token only reads.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    with explained_upload(repo_id):
        validate_repo_id(repo_id)
        owner, _, name = repo_id.partition("/")
        if not name:
            raise OutputError("the repository has no owner", where=repo_id, expected="owner/name")
        user = HfApi(token=token).whoami()
    owners = [user["name"], *(each["name"] for each in user.get("orgs", []))]
    if owner not in owners:
        raise OutputError(
            f"{user['name']} cannot write there", where=repo_id, expected=f"a repository of {', '.join(owners)}"
        )
    if user.get("auth", {}).get("accessToken", {}).get("role") == "read":
        raise OutputError("the token may read but not write", where=repo_id, fix="give one with the right to write")
