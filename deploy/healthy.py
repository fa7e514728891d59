#!/usr/bin/env python3
"""The images' HEALTHCHECK: 0 if what runs here answers at $SPLITSERVE_HEALTH_URL with 200, else 1 and what it said.

`/livez` of a router's or worker's metrics address, `/health` of a gateway. Never through a proxy. Over https the
certificate is not checked: it is this container that is asked, under a name that no certificate has.
"""

import os
import ssl
import sys
import urllib.error
import urllib.request

TIMEOUT_S = 4.0


def fault(url: str) -> str:
    """Why it is not healthy; "" if it is."""
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=context))
    try:
        with opener.open(url, timeout=TIMEOUT_S):
            return ""
    except urllib.error.HTTPError as error:
        with error:
            return f"{url}: {error.code} {error.read(500).decode(errors='replace').strip()}"
    except (OSError, ValueError) as error:
        return f"{url}: {error}"


if __name__ == "__main__":
    sys.exit(fault(os.environ.get("SPLITSERVE_HEALTH_URL", "http://127.0.0.1:9400/livez")) or None)
