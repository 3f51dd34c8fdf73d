"""The app that runs in the Ray this process is connected to: its name, its settings, its text encoders."""

import asyncio

from ray import serve

from deployments.app import text_encoder_name
from deployments.remote import RemotePrompts, typed_errors
from serve_app.blobs import BlobStore
from serve_app.engine.prompts import PromptCache
from serve_app.errors import AuditError, ReplicaLost
from serve_app.settings import Settings

#: How long the app's ingress may take to say what its settings are, in seconds.
ANSWER_S = 60.0


def find(name: str | None = None) -> str:
    """The app's name in Serve: the one that was named, or the only one that is a service of this kind.

    Raises AuditError, with those there are.
    """
    running: set[str] = {app for app, status in serve.status().applications.items() if "Ingress" in status.deployments}
    if name is None and len(running) == 1:
        return running.pop()
    if name is not None and name in running:
        return name
    there = f"those that run: {', '.join(sorted(running)) or 'none'}"
    raise AuditError(f"no app {name!r} runs; {there}" if name else f"which app? Name it with --app; {there}")


async def settings(app: str) -> Settings:
    """Those it runs with, whatever its config file says by now. Raises ReplicaLost, within ANSWER_S."""
    try:
        with typed_errors(f"the ingress of {app}"):
            async with asyncio.timeout(ANSWER_S):
                answer: Settings = await serve.get_deployment_handle("Ingress", app).settings.remote()
                return answer
    except TimeoutError as e:
        raise ReplicaLost(f"no ingress of {app} said within {ANSWER_S:g} s what its settings are") from e


def prompts(app: str, settings: Settings, blobs: BlobStore) -> RemotePrompts:
    rows = (settings.variant(name) for name in settings.variants)
    bases = {str(row.base) for row in rows if row.takes_prompt}
    handles = {base: serve.get_deployment_handle(text_encoder_name(base), app) for base in bases}
    return RemotePrompts(handles, PromptCache(blobs), settings)
