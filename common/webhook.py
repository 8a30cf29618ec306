"""Notifications to whoever watches a machine: by an HTTP address that its environment names.

The address is a secret, as chat services make them: it stands in no config, no log and no error.
"""

import json
import os
import sys
import urllib.request
from threading import Thread

VARIABLE = "BOUQUET_WEBHOOK"
TIMEOUT = 10.0


def tell(text: str, **facts: object) -> Thread | None:
    """Post ``text`` and facts as JSON, beside whatever goes on; None where the environment names no address.

    Nothing waits for it and nothing fails with it. What it says must not come from anybody's records.
    """
    if not (address := os.environ.get(VARIABLE)):
        return None
    thread = Thread(target=_post, args=(address, {"text": text, **facts}), daemon=True)
    thread.start()
    return thread


def _post(address: str, facts: dict[str, object]) -> None:
    try:
        if not address.startswith(("https://", "http://")):
            raise ValueError("not a web address")
        body, kind = json.dumps(facts).encode(), {"Content-Type": "application/json"}
        request = urllib.request.Request(address, body, kind)  # noqa: S310 (looked at above)
        urllib.request.urlopen(request, timeout=TIMEOUT).close()  # noqa: S310
    except Exception as error:  # whatever a service does, a run goes on
        print(f"{VARIABLE} could not be notified: {type(error).__name__}", file=sys.stderr)
