"""The stored run that this job works on, where nobody launched the job with one."""

import asyncio
from collections.abc import Callable

from serve_app.audit.options import Asked
from serve_app.audit.record import Audit
from serve_app.audit.store import AuditStore
from serve_app.errors import UnknownVariant
from serve_app.settings import Settings


async def queued(asked: Asked, store: AuditStore, settings: Settings, say: Callable[[str], None]) -> Audit:
    """A new run, or the one to resume. Raises as AuditStore's `create` and `resume`; InputError for a wrong argument;
    UnknownVariant."""
    several = settings.audit.allow_concurrent
    if asked.resume is not None:
        # A driver that was killed told nobody. One that lives renews its lease, and the resume is refused.
        audit, now = await store.get(asked.resume), await store.now()
        if audit.alive_until is not None and audit.alive_until > now:
            left_s = (audit.alive_until - now).total_seconds()
            say(f"{audit.id} is {audit.status}: waiting {left_s:.0f} s for a sign of life of its last job")
            await asyncio.sleep(left_s)
        return await store.resume(asked.resume, several=several)
    wanted = asked.request(settings.audit)
    for name in wanted.matrix.variants:
        if name not in settings.variants:
            raise UnknownVariant(f"variant {name!r} is not served; there are {', '.join(settings.variants)}")
    return await store.create(wanted, asked.run_id, several=several)
