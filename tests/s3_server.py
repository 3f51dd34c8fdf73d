"""moto's S3 on loopback: `python -m tests.s3_server PORT`.

moto looks at If-Match and If-None-Match first, and writes later: of two requests at once both could pass. Here one
conditional write is through before the next begins, as on S3.
"""

import sys
import threading
from collections.abc import Callable, Iterable
from typing import Any

from moto import server

_ONE_AT_A_TIME = threading.Lock()


class _Conditional(server.DomainDispatcherApplication):
    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        if environ.keys() & {"HTTP_IF_MATCH", "HTTP_IF_NONE_MATCH"}:
            with _ONE_AT_A_TIME:
                return list(super().__call__(environ, start_response))
        answer: Iterable[bytes] = super().__call__(environ, start_response)
        return answer


if __name__ == "__main__":
    server.DomainDispatcherApplication = _Conditional
    server.main(["-H", "127.0.0.1", "-p", sys.argv[1]])
