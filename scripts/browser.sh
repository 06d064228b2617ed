#!/usr/bin/env bash
# Installs the browser that the test of the page at /ui drives, where apt-get and root can: some 30 seconds, once.
set -euo pipefail

if command -v chromium >/dev/null && command -v chromedriver >/dev/null; then exit 0; fi
if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
    echo "browser: wanted chromium and chromedriver on PATH. Install them (on Debian, as root: apt-get install chromium chromium-driver)." >&2
    exit 1
fi
echo "browser: installing chromium and chromium-driver ..." >&2
log=$(mktemp)
trap 'rm -f "$log"' EXIT
export DEBIAN_FRONTEND=noninteractive
install=(apt-get install -y --no-install-recommends chromium chromium-driver fonts-dejavu-core)
if ! { "${install[@]}" || { apt-get update && "${install[@]}"; }; } >"$log" 2>&1; then
    tail -n 20 "$log" >&2
    echo "browser: apt-get could not install them; see above." >&2
    exit 1
fi
echo "browser: $(chromium --version 2>/dev/null | head -n 1), after $SECONDS s" >&2
