"""Ends with 0 if the server of this container answers /health with 200, else with 1 and the reason."""

import os
import sys
import urllib.request

URL = os.environ.get("PREFILLSHARE_HEALTH_URL", "http://127.0.0.1:8000/health")

try:
    with urllib.request.urlopen(URL, timeout=8):
        pass
except OSError as error:
    sys.exit(f"{URL}: {error}")
