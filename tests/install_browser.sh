#!/usr/bin/env bash
# The browser that tests/evaluation/test_report.py looks at the report with, where Debian's packages
# can be installed; without one those tests are skipped.
set -euo pipefail
if command -v chromium chromium-browser google-chrome >/dev/null; then exit; fi
if ! command -v apt-get >/dev/null || [ "$(id -u)" != 0 ]; then
    echo "no Chromium, and no right to install it: the report's browser tests will be skipped" >&2
    exit
fi
apt-get update -qq
DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium >/dev/null
