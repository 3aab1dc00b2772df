"""What goes to the hub: whether it can, before any work is done, and what the hub says when it does not take it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from peft_graft.errors import OutputError, reason


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
