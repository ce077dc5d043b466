#!/bin/bash
# Builds the image of Dockerfile, and asks it for its version.
#   bash tools/docker.sh [cpu|cuda] [further arguments of docker build, such as --build-arg PYTHON=3.12]
# Where there is no Docker, or no daemon that answers, one line says so and the exit code is 2.
set -euo pipefail
cd "$(dirname "$0")/.."
device=${1:-cpu}
case $device in
  cpu | cuda) ;;
  *) echo "tools/docker.sh: device '$device' is neither cpu nor cuda" >&2; exit 2 ;;
esac
if ! command -v docker > /dev/null; then
  echo "tools/docker.sh: no docker here, so no image was built" >&2
  exit 2
fi
if ! docker info > /dev/null 2>&1; then
  echo "tools/docker.sh: docker's daemon does not answer, so no image was built" >&2
  exit 2
fi
docker build --build-arg DEVICE="$device" "${@:2}" --tag "tessellar:$device" .
docker run --rm "tessellar:$device" --version
