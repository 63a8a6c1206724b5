"""Upload of a folder to the Hugging Face hub, by huggingface_hub's client.

The token is the client's (``hf auth login`` or HF_TOKEN); it is no option and no setting here, so it is in no
configuration, log or tracker. Files that the hub has are not sent again: the client compares hashes of large
files, and repeating an interrupted push continues it.
"""

from pathlib import Path

from diffalign.errors import UserError
from diffalign.models.sources import HUB_ID


def push_folder(
    folder: Path, repo: str, private: bool = False, revision: str | None = None, message: str = "Upload model"
) -> str:
    """Upload a folder to a model repository, which is created if needed, in one commit.

    Args:
        repo: ORG/NAME.
        revision: branch, created if needed; None: main.

    Returns:
        The address of the repository, or of its branch.

    Raises:
        UserError: a name that the hub refuses, no permission, or no connection; says what to do.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    check_repo(repo)
    api = HfApi(library_name="diffalign")
    try:
        api.create_repo(repo, private=private, exist_ok=True, repo_type="model")
        if revision is not None:
            api.create_branch(repo, branch=revision, exist_ok=True)
        api.upload_folder(repo_id=repo, folder_path=folder, revision=revision, commit_message=message)
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else None
        words = {401: "not logged in: run `hf auth login`", 403: "this login may not write there"}.get(
            status or 0, " ".join(str(error).split())[:200]
        )
        raise UserError(
            f"{repo}: the hub refused ({words}); push again with `diffalign push RUN {repo}`"
        ) from None
    except (OSError, ConnectionError) as error:
        raise UserError(
            f"{repo}: the hub at {api.endpoint} cannot be reached ({type(error).__name__}); push again with "
            f"`diffalign push RUN {repo}`: what has arrived is not sent again"
        ) from None
    return f"{api.endpoint}/{repo}" + (f"/tree/{revision}" if revision else "")


def base_license(base: str) -> str | None:
    """Return the licence in the base's card on the hub; None: it has none, or there is no connection."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    if Path(base).exists() or "/" not in base or not HUB_ID.fullmatch(base):
        return None
    try:
        card = HfApi(library_name="diffalign").model_info(base).card_data
    except (HfHubHTTPError, OSError, ConnectionError):
        return None
    found = getattr(card, "license", None)
    return found if isinstance(found, str) else None


def check_repo(repo: str) -> None:
    """Raise a UserError where a name is no ORG/NAME of the hub."""
    if "/" not in repo or not HUB_ID.fullmatch(repo):
        raise UserError(f"hub repository {repo!r}; allowed: ORG/NAME of letters, digits, - _ .")
