"""Pub/Sub's resource names, and the address in an `embedded://HOST:PORT` URL."""

from collections.abc import Mapping
from urllib.parse import urlsplit

from ..errors import SettingsError
from ..ports import Topic
from ..settings import MessagesSettings


def topic_names(settings: MessagesSettings) -> Mapping[Topic, str]:
    """The short names of the topics that the settings name."""
    names: dict[Topic, str] = {"sessions": settings.topic, "dead": settings.dead_letter_topic}
    return names | ({"completed": settings.completion_topic} if settings.completion_topic else {})


def topic_path(settings: MessagesSettings, topic: str) -> str:
    return f"projects/{settings.project}/topics/{topic}"


def subscription_path(settings: MessagesSettings, subscription: str) -> str:
    return f"projects/{settings.project}/subscriptions/{subscription}"


def address_of(url: str) -> tuple[str, int]:
    """Host and port. Raises SettingsError where one is missing or wrong."""
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError as e:
        raise SettingsError(f"messages.url {url!r}: {e}", url=url) from e
    if not host or port is None:
        raise SettingsError(f"messages.url {url!r} is not embedded://HOST:PORT", url=url)
    return host, port
