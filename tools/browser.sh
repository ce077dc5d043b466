#!/usr/bin/env bash
# Tests the page of `tessellar demo` in a headless Chromium, and installs what that needs: Debian's chromium where
# there is none, Gradio and playwright (whose own browsers are not downloaded) into .venv.
#     bash tools/browser.sh [--write] [options of pytest]
# --write puts the screenshots into docs/pictures. On the export of `make demo` where there is one, else on a small
# one that is trained first.
set -euo pipefail
cd "$(dirname "$0")/.."
PY=.venv/bin/python
if [ "${1:-}" = "--write" ]; then
    export PAGE_PICTURES="$PWD/docs/pictures"
    shift
fi
if ! command -v chromium > /dev/null; then
    apt-get update
    apt-get install --yes --no-install-recommends chromium
fi
$PY -m pip install --quiet --disable-pip-version-check -c constraints.txt \
    playwright brotli groovy orjson pandas pydub python-multipart pytz safehttpx semantic-version tomlkit uvicorn fastapi
# Gradio asks for Pillow below 13 and the pins hold 13, with which it works too: this test says so.
$PY -m pip install --quiet --disable-pip-version-check --no-deps -c constraints.txt gradio gradio-client hf-gradio
BROWSER_TEST=1 exec $PY -m pytest -m long tests/page/test_browser.py "$@"
