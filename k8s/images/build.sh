#!/usr/bin/env bash
# Builds images without an image registry and without a daemon, as root on Debian:
#   k8s/images/build.sh gateway|worker-cpu|worker-cuda
# The base is made by debootstrap and tagged with the base image's name; wheels are fetched by this machine's pip, in the
# versions of constraints.txt. Wants: apt-get install buildah debootstrap. Prints the image's name at the end.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

name=${1:?which image: gateway, worker-cpu or worker-cuda}
file=k8s/images/$name.Containerfile
[ -f "$file" ] || { echo "no $file" >&2; exit 2; }
python=${PYTHON:-python3.11}
cache=${KVSERVICE_IMAGE_CACHE:-build/images}
suite=bookworm
base=$(sed -n 's/^ARG BASE=//p' "$file")
version=$(sed -n 's/^__version__ = "\(.*\)"/\1/p' kvservice/__init__.py)
buildah() { command buildah --storage-driver vfs --root "$cache/storage" --runroot "$cache/run" "$@"; }

mkdir -p "$cache"
cache=$(cd "$cache" && pwd)
if ! buildah inspect --type image "$base" >/dev/null 2>&1; then
  echo "making $base by debootstrap" >&2
  rm -rf "$cache/rootfs"
  debootstrap --variant=minbase "$suite" "$cache/rootfs" >&2
  # As `slim` leaves them out.
  rm -rf "$cache"/rootfs/var/cache/apt/archives/*.deb "$cache"/rootfs/var/lib/apt/lists/* \
    "$cache"/rootfs/usr/share/{doc,info,locale,man}/*
  container=$(buildah from scratch)
  buildah copy --quiet "$container" "$cache/rootfs" / >/dev/null
  buildah commit --quiet --rm "$container" "$base" >/dev/null
  rm -rf "$cache/rootfs"
fi

# The image's Python is that of the base, 3.11.2, for which redis-py wants a package that later ones don't have. What has
# no wheel is built here.
case $name in
  gateway) wanted=(--requirement k8s/images/gateway-requirements.txt) ;;
  worker-cpu) wanted=(.) ;;
  worker-cuda) wanted=('.[cuda]') ;;
esac
"$python" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' || { echo "$python isn't 3.11: set PYTHON" >&2; exit 2; }
"$python" -m pip wheel --quiet --disable-pip-version-check --wheel-dir "$cache/wheels/$name" \
  --constraint constraints.txt "${wanted[@]}" 'setuptools>=77' async-timeout==5.0.1 >&2
# Of the project itself the image builds its own.
rm -f "$cache/wheels/$name"/kvservice-*.whl

buildah build --isolation chroot --layers=false --file "$file" --tag "kvservice-$name:$version" \
  --volume "$cache/wheels/$name:/wheels:ro" --build-arg "PIP_OPTIONS=--no-index --find-links=/wheels" . >&2
# What the tag was on before.
buildah rmi --prune >/dev/null 2>&1 || true
echo "kvservice-$name:$version"
