"""The Hugging Face hub as an origin of weights, and what its refusals mean."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from pydantic import SecretStr

from ...errors import FluxFillError, GatedRepo, MissingToken, UnknownWeights, WeightsError
from .origins import Listing, check_file

#: What the client raises where there is no answer: its HTTP library's errors, whichever library that is.
_NO_ANSWER: tuple[type[Exception], ...] = HfHubHTTPError.__bases__


class Hub:
    """The hub at `endpoint`, with the token given and no other."""

    def __init__(self, token: SecretStr | None, endpoint: str | None = None) -> None:
        # False: without it the client would look for a token of its own in the environment and the home folder.
        self._api = HfApi(endpoint=endpoint, token=token.get_secret_value() if token else False)
        self._has_token = token is not None
        self.name = self._api.endpoint

    async def list(self, repo: str, revision: str) -> Listing:
        with self._translated(repo, revision):
            info = await asyncio.to_thread(self._api.model_info, repo, revision=revision)
        return Listing(info.sha or revision, frozenset(entry.rfilename for entry in info.siblings or ()))

    async def download(self, repo: str, revision: str, file: str, folder: Path) -> None:
        check_file(file)
        with self._translated(repo, revision, file):
            await asyncio.to_thread(self._api.hf_hub_download, repo, file, revision=revision, local_dir=folder)

    @contextmanager
    def _translated(self, repo: str, revision: str, file: str = "") -> Iterator[None]:
        what = f"{repo} at {revision}{f': {file}' if file else ''}"
        try:
            yield
        except (LocalEntryNotFoundError, OfflineModeIsEnabled) as e:
            # The client's word for "could not ask, and have none here"; the reason is its cause.
            raise WeightsError(f"{self.name} cannot be reached for {what}: {e.__cause__ or e}", repo=repo) from e
        except (GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError, EntryNotFoundError) as e:
            raise self._refusal(e, repo, what) from e
        except HfHubHTTPError as e:
            if e.response.status_code == 401:
                raise self._refusal(e, repo, what) from e
            raise WeightsError(f"{self.name} failed for {what}: {e}", repo=repo) from e
        except _NO_ANSWER as e:
            raise WeightsError(f"{self.name} cannot be reached for {what}: {e}", repo=repo) from e

    def _refusal(self, error: Exception, repo: str, what: str) -> FluxFillError:
        """What the hub means. It answers 401 for whatever an anonymous caller may not see, missing or not."""
        status = error.response.status_code if isinstance(error, HfHubHTTPError) else 404
        if status == 401 and not self._has_token:
            message = f"HF_TOKEN is not set, and {self.name} shows {what} to no anonymous caller: it is gated, private"
            return MissingToken(f"{message}, or does not exist", repo=repo)
        if isinstance(error, GatedRepoError):
            message = f"the owner of HF_TOKEN has not accepted the licence of {repo}: do so on its page at {self.name}"
            return GatedRepo(message, repo=repo)
        if status == 401:
            return MissingToken(f"{self.name} refuses the HF_TOKEN that is set, for {what}", repo=repo)
        return UnknownWeights(f"{self.name} has no {what}", repo=repo)
