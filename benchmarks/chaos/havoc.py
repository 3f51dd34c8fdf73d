"""What happens to the app: replicas are killed, stores are cut off."""

import asyncio
import os
import random
import signal
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field

from . import app
from .proxy import Proxy

KILL_PERIODS_S = {app.INPAINTER: 5.0, app.INGRESS: 15.0}
CUT_PERIOD_S = 30.0
CUT_S = 5.0


@dataclass
class Toll:
    #: By deployment.
    kills: Counter[str] = field(default_factory=Counter)
    cuts: int = 0


@asynccontextmanager
async def havoc(kill: Sequence[str], stores: Sequence[Proxy]) -> AsyncIterator[Toll]:
    """Kills replicas of the deployments in `kill`, and cuts `stores` off, all at once, until it is left."""
    toll = Toll()
    tasks = [asyncio.create_task(_kill(deployment, toll)) for deployment in kill]
    tasks.append(asyncio.create_task(_cut(stores, toll)))
    try:
        yield toll
    finally:
        for task in tasks:
            task.cancel()
        ended = await asyncio.gather(*tasks, return_exceptions=True)
        for store in stores:
            await store.mend()
    for error in ended:
        if not isinstance(error, asyncio.CancelledError) and isinstance(error, BaseException):
            raise error


async def _kill(deployment: str, toll: Toll) -> None:
    while True:
        await asyncio.sleep(KILL_PERIODS_S[deployment])
        alive = await asyncio.to_thread(app.pids, deployment)
        if alive:
            # It may have ended since.
            with suppress(ProcessLookupError):
                os.kill(random.choice(alive), signal.SIGKILL)
                toll.kills[deployment] += 1


async def _cut(stores: Sequence[Proxy], toll: Toll) -> None:
    while True:
        await asyncio.sleep(CUT_PERIOD_S - CUT_S)
        for store in stores:
            store.cut()
        toll.cuts += 1
        await asyncio.sleep(CUT_S)
        for store in stores:
            await store.mend()
