#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
# Sees to everything that Frostline's build and tests take from the operating system.
#
# What is needed is asked for by what it does (a command, a header, a library), so that any distribution will do.
# On Debian as root the missing packages are installed; elsewhere what is missing is listed and the exit is 1.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
apt_options=(-y -q --no-install-recommends -o Dpkg::Use-Pty=0 -o DPkg::Lock::Timeout=300)

works_static_busybox() {
    command -v busybox >/dev/null && ! ldd "$(command -v busybox)" 2>/dev/null | grep -q '=>'
}

works_sanitizer() {
    local program
    command -v clang >/dev/null || return 1
    # The runtime is a file per sanitizer; asking for its path is quicker than linking a program.
    program=$(clang -print-file-name="libclang_rt.$1-$(uname -m).a" 2>/dev/null)
    [[ -f $program ]] || [[ -f $(clang -print-runtime-dir 2>/dev/null)/libclang_rt.$1-$(uname -m).a ]] ||
        [[ -f $(clang -print-runtime-dir 2>/dev/null)/libclang_rt.$1.a ]]
}

works_python_headers() {
    local python
    python=$("$here/python.sh" 2>/dev/null) || return 1
    "$python" -c 'import os, sys, sysconfig
sys.exit(not os.path.isfile(os.path.join(sysconfig.get_path("include"), "Python.h")))'
}

works_python_venv() {
    local python
    python=$("$here/python.sh" 2>/dev/null) || return 1
    "$python" -c 'import ensurepip, venv' 2>/dev/null
}

works_static_libc() {
    [[ -f $(gcc -print-file-name=libc.a 2>/dev/null) ]]
}

has() { command -v "$1" >/dev/null; }
links() { has pkg-config && pkg-config --exists "$1"; }

# One line each: what it is for | the Debian package | the check.
needs=(
    'C compiler gcc|gcc|has gcc'
    'C library headers and libc.a (static guest programs)|libc6-dev|works_static_libc'
    'C compiler clang (sanitizer runs)|clang|has clang'
    "clang's AddressSanitizer runtime|@clang-rt|works_sanitizer asan"
    "clang's ThreadSanitizer runtime|@clang-rt|works_sanitizer tsan"
    "llvm-symbolizer (names in the sanitizers' reports)|llvm|has llvm-symbolizer"
    'cmake|cmake|has cmake'
    'ninja|ninja-build|has ninja'
    'pkg-config|pkg-config|has pkg-config'
    'lz4 library and headers|liblz4-dev|links liblz4'
    'xxhash library and headers|libxxhash-dev|links libxxhash'
    'Python headers (Python.h)|python3-dev|works_python_headers'
    'Python venv and ensurepip|python3-venv|works_python_venv'
    'git|git|has git'
    'qemu-system-x86_64 (real guests)|qemu-system-x86|has qemu-system-x86_64'
    'redis-server|redis-server|has redis-server'
    'static busybox (inside the test guest)|busybox-static|works_static_busybox'
    'cpio (guest initramfs)|cpio|has cpio'
    'xz (guest kernel modules)|xz-utils|has xz'
    'zstd (guest kernel packages)|zstd|has zstd'
    'modprobe|kmod|has modprobe'
    'ip (network of the test guest)|iproute2|has ip'
    'ps|procps|has ps'
    'mke2fs (images for the kernel under test)|e2fsprogs|has mke2fs'
)

missing_names=()
missing_packages=()
find_missing() {
    local need name package check
    missing_names=() missing_packages=()
    for need in "${needs[@]}"; do
        IFS='|' read -r name package check <<<"$need"
        if ! $check; then
            missing_names+=("$name (Debian: ${package/@clang-rt/libclang-rt-NN-dev of clang\'s version NN})")
            [[ " ${missing_packages[*]-} " == *" $package "* ]] || missing_packages+=("$package")
        fi
    done
}

die_with_list() {
    {
        echo "frostline: $1; this machine lacks:"
        printf '  - %s\n' "${missing_names[@]}"
        echo "Install these and run the same command again."
    } >&2
    exit 1
}

# The version number in the name of the package that "clang" stands for, e.g. 14 on Debian 12.
clang_version() {
    apt-cache depends clang 2>/dev/null | sed -n 's/^ *Depends: clang-\([0-9][0-9]*\)$/\1/p' | head -n 1
}

# Fills resolved_packages from missing_packages; fails when the package lists cannot tell.
resolved_packages=()
resolve_packages() {
    local package version
    resolved_packages=()
    for package in "${missing_packages[@]}"; do
        if [[ $package == @clang-rt ]]; then
            version=$(clang_version)
            [[ -n $version ]] || return 1
            package=libclang-rt-$version-dev
        fi
        resolved_packages+=("$package")
    done
    # "apt-get install -s" asks the lists only; nothing is changed.
    apt-get install -s "${apt_options[@]}" "${resolved_packages[@]}" >/dev/null 2>&1
}

# Redis is started by the tests themselves. Its package would also start a system-wide server, so a policy that
# forbids starting services holds while it is installed, and the service is not enabled for the next boot.
forbid_services() {
    [[ -e /usr/sbin/policy-rc.d ]] && return
    printf '#!/bin/sh\nexit 101\n' >/usr/sbin/policy-rc.d
    chmod 755 /usr/sbin/policy-rc.d
    trap 'rm -f /usr/sbin/policy-rc.d' EXIT
}

install_packages() {
    local redis_is_new=false
    export DEBIAN_FRONTEND=noninteractive
    [[ " ${missing_packages[*]} " == *" redis-server "* ]] && redis_is_new=true
    if ! resolve_packages; then
        echo "frostline: reading Debian's package lists (apt-get update)"
        apt-get update -q
        resolve_packages || die_with_list "Debian's package lists do not offer all of what is needed"
    fi
    echo "frostline: installing Debian packages: ${resolved_packages[*]}"
    forbid_services
    if ! apt-get install "${apt_options[@]}" "${resolved_packages[@]}"; then
        # Lists that are older than the mirror name files that are gone.
        echo "frostline: once more, with fresh package lists"
        apt-get update -q
        resolve_packages || true
        apt-get install "${apt_options[@]}" "${resolved_packages[@]}"
    fi
    if $redis_is_new; then
        update-rc.d redis-server disable >/dev/null 2>&1 || true
        deb-systemd-helper disable redis-server.service >/dev/null 2>&1 || true
    fi
}

find_missing
[[ ${#missing_names[@]} -eq 0 ]] && exit 0
[[ -r /etc/debian_version ]] && has apt-get || die_with_list "packages are installed by themselves on Debian only"
[[ $(id -u) -eq 0 ]] || die_with_list "installing packages takes root"
install_packages
find_missing
[[ ${#missing_names[@]} -eq 0 ]] || die_with_list "after installing ${resolved_packages[*]}"
