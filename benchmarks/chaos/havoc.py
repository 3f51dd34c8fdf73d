"""What happens to the app: replicas are killed, stores are cut off."""

import asyncio
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from . import app
from .proxy import Proxy

#: One kill in so many times what a replica of the deployment takes to start: a run means the same on any machine.
START_UPS_PER_KILL = {app.INPAINTER: 1.0, app.INGRESS: 2.0}
#: A replica has started that has looked so for so long, and never will after the other; seconds.
SETTLED_S, START_LIMIT_S = 1.0, 300.0
CUT_PERIOD_S = 30.0
CUT_S = 5.0


@dataclass
class Toll:
    #: By deployment.
    kills: Counter[str] = field(default_factory=Counter)
    cuts: int = 0


async def start_up_s(deployment: str) -> float:
    """Seconds from a replica's SIGKILL until another one serves in its place."""
    before = await asyncio.to_thread(app.pids, deployment)
    began_s = time.monotonic()
    os.kill(before[0], signal.SIGKILL)
    served_s = began_s
    async with asyncio.timeout(START_LIMIT_S):
        # Between two calls at its start a replica looks like one that serves.
        while time.monotonic() - served_s < SETTLED_S:
            serving = {*await asyncio.to_thread(app.pids, deployment, serving=True)} - {before[0]}
            if len(serving) < len(before):
                served_s = time.monotonic()
            await asyncio.sleep(0.1)
    return served_s - began_s


async def havoc(kill_every_s: Mapping[str, float], stores: Sequence[Proxy], toll: Toll) -> None:
    """Kill replicas of these deployments, and cut `stores` off, all at once, until cancelled."""
    try:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(_cut(stores, toll))
            for deployment, period_s in kill_every_s.items():
                tasks.create_task(_kill(deployment, period_s, toll))
    finally:
        for store in stores:
            await store.mend()


async def _kill(deployment: str, period_s: float, toll: Toll) -> None:
    while True:
        await asyncio.sleep(period_s)
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
