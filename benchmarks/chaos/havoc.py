"""What happens to the app: replicas are killed, stores are cut off."""

import asyncio
import os
import random
import signal
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
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


async def havoc(kill: Sequence[str], stores: Sequence[Proxy], toll: Toll) -> None:
    """Kill replicas of the deployments in `kill`, and cut `stores` off, all at once, until cancelled."""
    try:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(_cut(stores, toll))
            for deployment in kill:
                tasks.create_task(_kill(deployment, toll))
    finally:
        for store in stores:
            await store.mend()


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
