"""moto's S3 on loopback: `python -m tests.s3_server PORT`.

moto looks at If-Match and If-None-Match first, and writes later: of two requests at once both could pass. Here one
conditional write is through before the next begins, as on S3. Nor does moto check signatures; here those of links are.
"""

import calendar
import hmac
import sys
import threading
import time
from collections.abc import Callable, Iterable
from hashlib import sha256
from typing import Any
from urllib.parse import parse_qsl, quote, urlencode

from moto import server

#: By their ids, the keys whose links are checked.
SECRETS = {"key": "secret"}
_ONE_AT_A_TIME = threading.Lock()


def _is_signed(environ: dict[str, Any]) -> bool:
    """Whether just this request was signed, by AWS's Signature Version 4 for links, and the link holds yet."""
    path, _, query = environ["RAW_URI"].partition("?")
    given = dict(parse_qsl(query, keep_blank_values=True))
    signature, headers = given.pop("X-Amz-Signature", ""), given.get("X-Amz-SignedHeaders", "")
    key_id, _, scope = given.get("X-Amz-Credential", "").partition("/")
    if key_id not in SECRETS:
        return True
    asked = urlencode(sorted(given.items()), quote_via=quote)
    sent = {"content-length": environ.get("CONTENT_LENGTH", ""), "host": environ["HTTP_HOST"]}
    lines = [f"{name}:{sent.get(name, '')}" for name in headers.split(";")]
    whole = "\n".join([environ["REQUEST_METHOD"], path, asked, *lines, "", headers, "UNSIGNED-PAYLOAD"])
    named = "\n".join(["AWS4-HMAC-SHA256", given["X-Amz-Date"], scope, sha256(whole.encode()).hexdigest()])
    key = f"AWS4{SECRETS[key_id]}".encode()
    for part in (*scope.split("/"), named):
        key = hmac.digest(key, part.encode(), "sha256")
    until = calendar.timegm(time.strptime(given["X-Amz-Date"], "%Y%m%dT%H%M%SZ")) + int(given["X-Amz-Expires"])
    return key.hex() == signature and time.time() < until


class _S3(server.DomainDispatcherApplication):
    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        if not _is_signed(environ):
            start_response("403 Forbidden", [("Connection", "close")])
            return [b"<Error><Code>SignatureDoesNotMatch</Code></Error>"]
        if environ.keys() & {"HTTP_IF_MATCH", "HTTP_IF_NONE_MATCH"}:
            with _ONE_AT_A_TIME:
                return list(super().__call__(environ, start_response))
        answer: Iterable[bytes] = super().__call__(environ, start_response)
        return answer


if __name__ == "__main__":
    server.DomainDispatcherApplication = _S3
    server.main(["-H", "127.0.0.1", "-p", sys.argv[1]])
