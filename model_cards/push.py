"""Upload a folder to the Hub as one commit."""

from pathlib import Path

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError
from huggingface_hub.utils import validate_repo_id

# Weights of an earlier commit that are not part of this one: transformers would load them first, or in vain.
STALE_WEIGHTS = ["model*.safetensors", "model.safetensors.index.json"]


def check_push(repo_id: str, private: bool = False) -> None:
    """Check that a folder can be pushed, before any work is done.

    Args:
        repo_id: "name" or "namespace/name".
        private: nobody else is to see what is uploaded.

    Raises:
        ValueError: the id is malformed, or there is no token, or one that may only read; `private`, but the repository
            is there and public.
        OSError: the Hub cannot be reached, or does not know the token.
    """
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ValueError(f"push={repo_id!r}: {error} Give it as in --push my-name/my-model") from error
    if get_token() is None:
        raise ValueError(
            f"push={repo_id!r}: there is no token of the Hub; run `hf auth login`, or set HF_TOKEN to a token that may "
            "write"
        )
    try:
        account = HfApi().whoami()
        exposed = private and _is_public(repo_id if "/" in repo_id else f"{account['name']}/{repo_id}")
    except Exception as error:  # a failing connection raises another library's errors, which varies with the version
        raise OSError(
            f"push={repo_id!r}: the Hub does not accept the token, or cannot be reached ({error}); nothing was done"
        ) from error
    if account.get("auth", {}).get("accessToken", {}).get("role") == "read":
        raise ValueError(f"push={repo_id!r}: the token may only read; make one that may write, and run `hf auth login`")
    if exposed:
        raise ValueError(
            f"push={repo_id!r}: this repository is there already and public, so that --private would not hold; make it "
            "private on the Hub first, or name a new one"
        )


def _is_public(repo_id: str) -> bool:
    """Whether the repository is there and everybody sees it."""
    try:
        return not HfApi().repo_info(repo_id).private
    except RepositoryNotFoundError:
        return False


def push_folder(folder: Path, repo_id: str, private: bool | None = None, commit_message: str | None = None) -> str:
    """Upload a folder as one commit; the repository is made where it is missing.

    Weights of an earlier commit that this folder does not have are deleted by the same commit; other files stay.

    Args:
        folder: as `write_export` has written it.
        private: of a new repository; None leaves it to the Hub.

    Returns:
        The commit's address.

    Raises:
        OSError: the upload failed; the folder is still there.
    """
    api = HfApi()
    try:
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        commit = api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            commit_message=commit_message or "Upload model with ttt-e2e export",
            delete_patterns=STALE_WEIGHTS,
        )
    except Exception as error:  # as above; whatever it was, the folder is worth keeping
        raise OSError(
            f"push={repo_id!r}: the upload failed ({error}). The folder {folder} is complete: push it again with `hf "
            f"upload {repo_id} {folder} .`"
        ) from error
    return commit.commit_url
