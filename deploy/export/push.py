"""Publishing an export on a hub: one repository, one commit, by huggingface_hub and with its token.

The token is huggingface_hub's (``HF_TOKEN``, or what ``hf auth login`` has kept), and so is the address
(``HF_ENDPOINT``). Neither is a setting of ours, and no error tells more of the hub's answer than its status.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import httpx
from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError

from common.config.run import ModelConfig
from common.error import BouquetError
from common.models import base

LOG_IN = "Log in with 'hf auth login', or set HF_TOKEN to a token that may write."
REFUSED: Mapping[int, str] = {401: "the hub does not accept the token", 403: "the token may not write there"}


def check(repository: str, model: ModelConfig, *, merged: bool) -> None:
    """Raise :class:`BouquetError` where a push cannot succeed; told before anything is computed for it."""
    owner, _, name = repository.partition("/")
    if not (owner and name):
        raise BouquetError("not a repository name", where="--push", expected="OWNER/NAME", got=repository)
    if not merged and Path(base.location(model.name)).is_absolute():
        raise BouquetError(
            "an adapter of a base that is not on the hub",
            where="--push",
            expected="a base by its hub id",
            got=f"'{model.name}', on this machine",
            cure="Give its hub id, --model OWNER/BASE, or push --form merged.",
        )
    api = HfApi()
    with _asking(repository):
        api.whoami()
        api.repo_exists(repository)  # refuses a name that cannot be one


def push(folder: Path, repository: str, *, private: bool) -> str:
    """Publish the files of ``folder``; the address of the repository, which is made where there is none.

    Raises :class:`BouquetError`, too where it is to be private and there is a public one of that name.
    """
    api = HfApi()
    with _asking(repository, f"The export is in {folder}: hf upload {repository} {folder}"):
        url = api.create_repo(repository, private=private or None, exist_ok=True)
        if private and not api.model_info(repository).private:
            raise BouquetError(
                "a public repository with this name exists",
                where=f"--push {repository} --private",
                cure=f"Name another, or make it private first. The export is in {folder}.",
            )
        # All files or none: what uploads a folder may make several commits of it.
        files = [CommitOperationAdd(file.name, file) for file in sorted(folder.iterdir())]
        api.create_commit(repository, files, commit_message="Export of Bouquet")
    return str(url)


@contextmanager
def _asking(repository: str, cure: str = "") -> Iterator[None]:
    """Tell what is wrong with the hub, the token or the line, as far as a user can mend it."""
    try:
        yield
    except HFValidationError as error:
        raise BouquetError("not a repository name", where="--push", got=repository, cure=str(error)) from error
    except LocalTokenNotFoundError as error:
        raise BouquetError("there is no hub token", where="--push", cure=LOG_IN) from error
    except HfHubHTTPError as error:
        status = error.response.status_code
        raise BouquetError(
            REFUSED.get(status, "the hub rejects the export"),
            where=f"--push {repository}",
            got=f"HTTP {status}",
            cure=" ".join(filter(None, [LOG_IN if status in REFUSED else "", cure])),
        ) from error
    except (OSError, httpx.HTTPError, RuntimeError) as error:  # the last of an upload, from whatever broke it
        raise BouquetError(
            "the hub cannot be reached, or broke off the transfer",
            where=HfApi().endpoint,
            got=type(error.__cause__ or error).__name__,
            cure=cure or "HF_ENDPOINT names another hub; HF_HUB_OFFLINE must not be set.",
        ) from error
