#!/usr/bin/env bash
# Chromium, with which tests/evaluation/test_report.py looks at the report, where Debian's packages
# can be installed. Without it those tests are skipped.
set -uo pipefail
if command -v chromium chromium-browser google-chrome >/dev/null; then exit; fi
export DEBIAN_FRONTEND=noninteractive
apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium >/dev/null ||
    echo "Chromium can't be installed here: the report's browser tests will be skipped" >&2
exit 0
