#!/bin/sh
# Make what the browser tests need in the folder $1: one environment for each gradio, and playwright-core.
# Node and Chromium come from the system (Debian: apt-get install nodejs npm chromium). Any recent torch will do: TORCH
# names another, such as torch==2.13.0+cpu where pip knows an index that has it.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
mkdir -p "$1"
cd "$1"
for which in gradio3 gradio4; do
    test -x "$which/bin/python" || "${PYTHON:-python3.11}" -m venv "$which"
    "$which/bin/python" -m pip install --quiet -r "$here/$which.txt" "${TORCH:-torch}"
done
npm install --silent --no-fund --no-audit --prefix . playwright-core@1.65.1
