"""Say where the workbench is as soon as the app serves it, and open it where there is a display.

    python scripts/open_page.py http://127.0.0.1:8000/

`make run` starts this beside the app. It gives up silently when the app has not answered within five minutes.
"""

import os
import sys
import time
import webbrowser
from urllib.error import URLError
from urllib.request import urlopen

LIMIT_S = 300.0


def has_display() -> bool:
    """Without one a browser of the terminal would cover the app's log. BROWSER is a wish."""
    return sys.platform in ("darwin", "win32") or any(map(os.environ.get, ("DISPLAY", "WAYLAND_DISPLAY", "BROWSER")))


def is_served(url: str) -> bool:
    try:
        with urlopen(url, timeout=5) as answer:
            return bool(answer.status == 200)
    except (URLError, OSError):
        return False


def main(url: str) -> None:
    ends_at = time.monotonic() + LIMIT_S
    while not is_served(url):
        if time.monotonic() > ends_at:
            return
        time.sleep(0.5)
    print(f"\nthe workbench: {url}\n", flush=True)
    if has_display():
        webbrowser.open(url)


if __name__ == "__main__":
    main(sys.argv[1])
