#!/bin/bash
# Install what tests, demo and benchmarks need: Debian packages, a virtual environment, programs built from their sources.
# Does nothing when all is there.
set -euo pipefail
cd "$(dirname "$0")/.."
say() { printf '\033[1m== %s\033[0m\n' "$*"; }

# program:package
needed="containerd:containerd runc:runc docker-registry:docker-registry skopeo:skopeo debootstrap:debootstrap
mkfs.erofs:erofs-utils busybox:busybox-static setfattr:attr setfacl:acl setcap:libcap2-bin fio:fio openssl:openssl git:git
gpg:gnupg gpgv:gpgv mkfs.ext4:e2fsprogs losetup:mount time:time umoci:umoci groff:groff-base"
export PATH="$PATH:/usr/sbin:/sbin"
missing=""
for pair in $needed; do
  type -P "${pair%%:*}" >/dev/null || missing="$missing ${pair##*:}"
done
[ -x .venv/bin/python ] || python3 -c 'import ensurepip, venv' 2>/dev/null || missing="$missing python3-venv"

if [ -n "$missing" ]; then
  if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
    echo "not installed:$missing (needs root on Debian 12); tests that use them are skipped" >&2
  else
    say "installing$missing"
    log=$(mktemp)
    # Keep apt from starting a system containerd or registry: everything here runs privately.
    guard=/usr/sbin/policy-rc.d
    if [ ! -e "$guard" ]; then
      printf '#!/bin/sh\nexit 101\n' >"$guard"
      chmod 755 "$guard"
      trap 'rm -f "$guard"' EXIT
    fi
    export DEBIAN_FRONTEND=noninteractive
    # shellcheck disable=SC2086
    { apt-get -qq update && apt-get -qq -y --no-install-recommends install $missing; } >"$log" 2>&1 || {
      tail -n 20 "$log" >&2
      exit 1
    }
    rm -f "$log"
  fi
fi

python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed" >&2; exit 1; }
stamp=$(sha256sum pyproject.toml | cut -d' ' -f1)
if [ ! -x .venv/bin/python ] || [ "$(cat .venv/.installed 2>/dev/null)" != "$stamp" ]; then
  say "installing the Python packages into .venv"
  [ -x .venv/bin/python ] || python3 -m venv .venv
  .venv/bin/pip install --quiet --disable-pip-version-check -e '.[dev]'
  echo "$stamp" >.venv/.installed
fi

# Clients that Debian lacks: containerd 1.7 and 2.x, crictl, nerdctl.
.venv/bin/python -m tests.clients

# The stock Nydus tool, as a judge of plain images: from crates.io, once, where there is a Rust toolchain (five minutes).
cache="${COCO_CACHE:-/var/cache/coco-snapshotter-tests}"
if ! PATH="$PATH:$cache/bin" command -v nydus-image >/dev/null && command -v cargo >/dev/null; then
  say "building nydus-image 2.2.0 into $cache/bin"
  mkdir -p "$cache"
  log=$(mktemp)
  export DEBIAN_FRONTEND=noninteractive
  { apt-get -qq -y --no-install-recommends install gcc libc6-dev libssl-dev pkg-config cmake make || true
    cargo install nydus-rs --version 2.2.0 --locked --bin nydus-image --root "$cache"; } >"$log" 2>&1 || {
    tail -n 20 "$log" >&2
    echo "nydus-image was not built; its tests are skipped" >&2
  }
  rm -f "$log"
fi
