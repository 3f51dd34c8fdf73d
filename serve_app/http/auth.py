"""Who may call: Pub/Sub's pushes by Google's OIDC token, clients by their keys.

A refusal says why in one sentence, which never repeats any part of a token or a key.
"""

import asyncio
import hashlib
import hmac
import math
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import jwt
from jwt import PyJWK, PyJWKClient
from limits import RateLimitItemPerMinute
from limits.aio.storage import MemoryStorage
from limits.aio.strategies import MovingWindowRateLimiter
from pydantic import SecretStr

from ..errors import AuthError, Forbidden, RateLimited, SettingsError, Unauthorized, Unavailable
from ..jobs.kinds import Caller
from ..settings import OPEN_PUSHES, PushSettings, Secrets, Settings
from ..urls import is_loopback

#: The keys that sign Google's OIDC tokens.
GOOGLE_JWKS_URL = "https://www.googleapis.com/oauth2/v3/certs"
#: A Google token with its claims has about 1,000 characters, and servers commonly take 8 KiB of headers.
MAX_CREDENTIAL_CHARS = 8192
#: Tolerance for a token's times, because clocks disagree.
LEEWAY_S = 30.0
#: Google publishes new keys hours before they sign, and removes a key as long after its last use.
KEYS_LIFESPAN_S = 3600.0
#: Between two fetches for an unknown key id, so that forged ids cause no traffic.
KEYS_COOLDOWN_S = 10.0
KEYS_TIMEOUT_S = 5.0

#: https://developers.google.com/identity/openid-connect/openid-connect#validatinganidtoken
_ISSUERS = ("https://accounts.google.com", "accounts.google.com")
_ALGORITHM = "RS256"


class SigningKeys:
    """The public keys of a JWK set (RFC 7517) at a URL, by their ids."""

    def __init__(self, url: str, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._client = PyJWKClient(url, cache_jwk_set=False, timeout=KEYS_TIMEOUT_S)
        self._clock = clock
        self._keys: Mapping[str, PyJWK] = {}
        self._good_until = self._next_look = clock()
        #: The last fetch, or the running one: all callers with an unknown key await the same fetch.
        self._look: asyncio.Task[None] | None = None

    async def get(self, kid: str) -> PyJWK:
        """Raises Unauthorized for an unknown key; Unavailable, within KEYS_TIMEOUT_S, if the keys cannot be fetched."""
        if not self._has(kid):
            if self._look is None or (self._look.done() and self._clock() >= self._next_look):
                self._look = asyncio.create_task(self._fetch())
            await asyncio.shield(self._look)
        if not self._has(kid):
            raise Unauthorized("the token was signed with a key that its issuer does not publish")
        return self._keys[kid]

    def _has(self, kid: str) -> bool:
        return kid in self._keys and self._clock() < self._good_until

    async def _fetch(self) -> None:
        try:
            keys = await asyncio.wait_for(asyncio.to_thread(self._client.get_signing_keys), KEYS_TIMEOUT_S)
        except (jwt.PyJWTError, OSError, ValueError) as e:
            raise Unavailable(f"the keys that sign push tokens could not be fetched: {type(e).__name__}") from e
        finally:
            self._next_look = self._clock() + KEYS_COOLDOWN_S
        self._keys = {key.key_id: key for key in keys if key.key_id and key.algorithm_name == _ALGORITHM}
        self._good_until = self._clock() + KEYS_LIFESPAN_S


class PushVerifier:
    """Checks the token that Pub/Sub sends with each push
    (https://cloud.google.com/pubsub/docs/authenticate-push-subscriptions)."""

    def __init__(
        self, push: PushSettings, *, jwks_url: str = GOOGLE_JWKS_URL, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._push = push
        self._keys = SigningKeys(jwks_url, clock=clock)

    async def verify(self, authorization: str | None) -> None:
        """`authorization` is the header's value.

        Raises Unauthorized without a valid token; Forbidden for a valid token of another account; Unavailable while the
        keys that sign tokens cannot be fetched.
        """
        token = _bearer(authorization)
        key = await self._keys.get(_key_id(token))
        try:
            claims = jwt.decode(
                token,
                key,
                algorithms=[_ALGORITHM],
                audience=self._push.audience,
                issuer=_ISSUERS,
                leeway=LEEWAY_S,
                options={"require": ["exp", "iat", "aud", "iss"], "strict_aud": True},
            )
        except jwt.PyJWTError as e:
            raise Unauthorized(f"the token is invalid: {_SENTENCES.get(type(e), 'it is malformed')}") from e
        if claims.get("email") != self._push.service_account or claims.get("email_verified") is not True:
            raise Forbidden("the token is not that of push.service_account, or its e-mail is not verified")


#: PyJWT's own sentences may repeat a token's content.
_SENTENCES: Mapping[type[jwt.PyJWTError], str] = {
    jwt.ExpiredSignatureError: "it has expired",
    jwt.ImmatureSignatureError: "it is not valid yet",
    jwt.InvalidAudienceError: "it is for another audience",
    jwt.InvalidIssuerError: "it is from another issuer",
    jwt.InvalidSignatureError: "its signature is wrong",
    jwt.MissingRequiredClaimError: "it lacks one of exp, iat, aud and iss",
}


def _key_id(token: str) -> str:
    """The id of the key with which the token claims to be signed."""
    try:
        header = jwt.get_unverified_header(token)
    except jwt.PyJWTError as e:
        raise Unauthorized("the token is not a JWT") from e
    if header.get("alg") != _ALGORITHM:
        raise Unauthorized(f"the token is not signed with {_ALGORITHM}")
    kid = header.get("kid")
    if not isinstance(kid, str):
        raise Unauthorized("the token has no key id")
    return kid


def _bearer(authorization: str | None) -> str:
    """The credential in an Authorization header (RFC 6750, 2.1). Raises Unauthorized if there is none."""
    if not authorization:
        raise Unauthorized("there is no Authorization header")
    if len(authorization) > MAX_CREDENTIAL_CHARS:
        raise Unauthorized(f"the Authorization header has more than {MAX_CREDENTIAL_CHARS} characters")
    scheme, _, credential = authorization.partition(" ")
    if scheme.lower() != "bearer" or not credential.strip():
        raise Unauthorized("the Authorization header is not `Bearer` followed by a token")
    return credential.strip()


#: The shortest key that production allows: 20 hexadecimal digits are 80 bits.
MIN_KEY_CHARS = 20

#: What a key is good for. `submit` posts, cancels and deletes jobs, and `read` looks at them: the key's own; `jobs` is
#: both, and for the jobs that came as messages, too; audits take GPUs for an hour; `admin` does all of it to any job.
Scope = Literal["submit", "read", "jobs", "audit", "admin"]
_SCOPES: tuple[Scope, ...] = get_args(Scope)
#: An admin that lacked audits would lack no secret: it sees every job's pictures anyway.
_IMPLIED: Mapping[str, tuple[Scope, ...]] = {"jobs": ("submit", "read"), "admin": _SCOPES}

#: No entry of a plain key: where its mark stands, the whole entry has this form.
_DIGEST_MARK = "=sha256:"
DIGEST_ENTRY = re.compile(r"([A-Za-z0-9][A-Za-z0-9_.-]{0,63})=sha256:([0-9a-fA-F]{64})(?::([a-z+]*))?")


@dataclass(frozen=True, kw_only=True, slots=True)
class _Key:
    id: str
    digest: bytes
    scopes: frozenset[str]


class ApiKeys:
    """The keys of clients, separated by commas: `KEY` or `ID=sha256:DIGEST`, and behind either `:SCOPE+SCOPE`; without
    scopes, `jobs`. Keys with one id are one client: its jobs stay its own while a key is being replaced. Without keys
    any client may call, but not in production."""

    def __init__(self, keys: SecretStr | None, *, is_production: bool) -> None:
        """Raises SettingsError for an empty key, an unknown scope, or a key with two ids; in production, also for a
        short key."""
        given = keys.get_secret_value().split(",") if keys else []
        at_least = MIN_KEY_CHARS if is_production else 1
        self._keys = [_key(entry.strip(), place, at_least) for place, entry in enumerate(given, 1) if entry.strip()]
        ids = {key.digest: key.id for key in self._keys}
        if twice := next((key for key in self._keys if ids[key.digest] != key.id), None):
            raise SettingsError(f"API_KEYS: {twice.id} and {ids[twice.digest]} are the same key")
        self.is_open = keys is None and not is_production

    def __bool__(self) -> bool:
        return bool(self._keys)

    def client(self, authorization: str | None, api_key: str | None) -> tuple[str, frozenset[str]]:
        """Id and scopes of the key in `Authorization: Bearer KEY`, or in `X-API-Key: KEY` or `X-Key: KEY`, whose values
        are given; the second one counts if both are.

        Raises Unauthorized without a known key; Forbidden if there are no keys at all.
        """
        if not self._keys:
            raise Forbidden("API_KEYS has no keys, so no client may call this")
        given = _digest(api_key if api_key is not None else _bearer(authorization))
        # Every key is compared, so that the time taken does not reveal which one matched.
        good = [key for key in self._keys if hmac.compare_digest(given, key.digest)]
        if not good:
            raise Unauthorized("the API key is unknown")
        return good[0].id, frozenset(scope for key in good for scope in key.scopes)


def _key(entry: str, place: int, at_least: int) -> _Key:
    """Digests have one length: comparing them does not reveal the key's. Errors repeat nothing of a key, not even what
    follows a colon, which may belong to it."""
    if _DIGEST_MARK in entry:
        if not (hashed := DIGEST_ENTRY.fullmatch(entry)):
            raise SettingsError(f"API_KEYS, key {place}: not ID=sha256: and 64 hexadecimal digits, as it begins")
        return _Key(id=hashed[1], digest=bytes.fromhex(hashed[2]), scopes=_scopes(hashed[3], place))
    key, colon, named = entry.rpartition(":")
    scopes = _scopes(named if colon else None, place)
    if colon and not key:
        raise SettingsError(f"API_KEYS, key {place}: there is nothing before the colon")
    if len(secret := key if colon else entry) < at_least:
        raise SettingsError(f"API_KEYS, key {place}: in production a key has at least {at_least} characters")
    digest = _digest(secret)
    return _Key(id=f"key-{digest.hex()[:12]}", digest=digest, scopes=scopes)


def _scopes(named: str | None, place: int) -> frozenset[str]:
    """With those that they imply."""
    scopes = ["jobs"] if named is None else named.split("+")
    if not set(scopes) <= set(_SCOPES):
        raise SettingsError(
            f"API_KEYS, key {place}: the scopes after its last colon must be among {', '.join(_SCOPES)}"
        )
    return frozenset(scopes).union(*(_IMPLIED.get(scope, ()) for scope in scopes))


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode(errors="surrogatepass")).digest()


class Access:
    """Who may call an app, and how often, by its settings, its secrets and the address that it listens on."""

    def __init__(
        self, settings: Settings, secrets: Secrets, *, host: str = "127.0.0.1", jwks_url: str = GOOGLE_JWKS_URL
    ) -> None:
        """`host` is the address of the HTTP server. Raises SettingsError if strangers could push unverified, and for
        generators that nobody could call."""
        #: Whether strangers can reach the app.
        self.is_production = settings.is_production or not is_loopback(host)
        if self.is_production and settings.push.is_open:
            raise SettingsError(f"push: {OPEN_PUSHES}. The HTTP server listens on {host or 'every address'}")
        self.takes_pushes = settings.push.enabled
        #: Whether a push that passes `check_push` was sent by Pub/Sub.
        self.verifies_pushes = settings.push.is_verified
        self._pushes = PushVerifier(settings.push, jwks_url=jwks_url) if settings.push.is_verified else None
        self._keys = ApiKeys(secrets.api_keys, is_production=self.is_production)
        if self.is_production and settings.generators and not self._keys:
            raise SettingsError("generators: in production their jobs are posted with a key, and API_KEYS has none")
        self._rate = RateLimitItemPerMinute(max(1, settings.api.requests_per_minute // settings.ingress_replicas))
        self._requests = MovingWindowRateLimiter(MemoryStorage())

    async def check_push(self, authorization: str | None) -> None:
        """See `PushVerifier.verify`; unverified pushes are open to anyone."""
        if self._pushes is not None:
            await self._pushes.verify(authorization)

    async def client(self, authorization: str | None, api_key: str | None, *, scope: Scope) -> Caller:
        """Who calls, by its key; see `ApiKeys.client`. Without keys, on a machine of one's own, anyone.

        Raises Unauthorized without a known key; Forbidden for a key without the scope, and if there are no keys at all;
        RateLimited for a request too many.
        """
        if self._keys.is_open:
            return Caller()
        key_id, scopes = self._keys.client(authorization, api_key)
        if scope not in scopes:
            raise Forbidden(f"the API key does not have the scope {scope}")
        if not await self._requests.hit(self._rate, key_id):
            free_at, _ = await self._requests.get_window_stats(self._rate, key_id)
            wait_s = max(1, math.ceil(free_at - time.time()))
            raise RateLimited(f"more than {self._rate.amount} requests within a minute", retry_after_s=wait_s)
        return Caller(id=key_id, sees_all="admin" in scopes, sees_messages="jobs" in scopes)

    def is_client(self, authorization: str | None, api_key: str | None) -> bool:
        """Whether the key is known."""
        if self._keys.is_open:
            return True
        try:
            self._keys.client(authorization, api_key)
        except AuthError:
            return False
        return True
