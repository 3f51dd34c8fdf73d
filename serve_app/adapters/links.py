"""Signed links to blobs of this machine, which the app itself serves under `GET /blobs/{token}`."""


class LocalLinks:
    def __init__(self, url: str, public_url: str) -> None:
        self._url, self._public_url = url, public_url

    async def link(self, path: str, *, expires_s: int) -> str:
        raise NotImplementedError

    def path_of(self, token: str) -> str:
        """The blob a token of ours reads. Raises InvalidLink where it has expired or is not ours."""
        raise NotImplementedError
