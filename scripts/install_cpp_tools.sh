#!/usr/bin/env bash
# Installs what the C++ runtime is built and tested with, on Debian and Ubuntu; does nothing where all of it is here.
#
#   scripts/install_cpp_tools.sh             # compiler, CMake, headers: enough to build
#   scripts/install_cpp_tools.sh --tests     # doctest, clang with libFuzzer and the sanitizers, and QEMU for older CPUs
#
# The C header of ONNX Runtime is a package from Debian 13 on. An older Debian gets that package's header, unpacked into
# /usr/local/include; elsewhere CMake downloads it.
set -euo pipefail

packages=(g++ cmake ninja-build pkg-config nlohmann-json3-dev zlib1g-dev)
[ "${1:-}" = --tests ] && packages+=(binutils doctest-dev clang libclang-rt-dev qemu-user)

install() { as_root env DEBIAN_FRONTEND=noninteractive apt-get --quiet=2 install --yes --no-install-recommends "$@"; }

as_root() { if [ "$(id -u)" = 0 ]; then "$@"; else sudo "$@"; fi; }

has_header() { [ -n "$(find /usr/include /usr/local/include -name onnxruntime_c_api.h -print -quit 2>/dev/null)" ]; }

# Unpacks a package of Debian 13 from the mirrors that this machine has, whose settings stay as they are.
unpack_header_of_trixie() {
    local release=$1 folder sources
    folder=$(mktemp -d)
    mkdir -p "$folder/lists/partial" "$folder/cache/archives/partial"
    for sources in /etc/apt/sources.list.d/debian.sources /etc/apt/sources.list; do
        [ -s "$sources" ] && break
    done
    sed "s/$release/trixie/g" "$sources" > "$folder/trixie.${sources##*.}"
    local options=(-o APT::Sandbox::User=root -o Dir::Etc::SourceList=/dev/null
        -o "Dir::Etc::SourceParts=$folder" -o "Dir::State::Lists=$folder/lists" -o "Dir::Cache=$folder/cache")
    apt-get "${options[@]}" --quiet=2 update
    (cd "$folder" && apt-get "${options[@]}" --quiet=2 download libonnxruntime-dev)
    dpkg -x "$folder"/libonnxruntime-dev*.deb "$folder/package"
    as_root mkdir -p /usr/local/include
    as_root cp -r "$folder/package/usr/include/onnxruntime" /usr/local/include/
    rm -rf "$folder"
}

if ! command -v apt-get > /dev/null; then
    printf 'no apt-get here: install what corresponds to %s\n' "${packages[*]}" >&2
    exit 1
fi
if ! dpkg --status "${packages[@]}" > /dev/null 2>&1; then
    as_root apt-get --quiet=2 update
    install "${packages[@]}"
fi
if ! has_header; then
    . /etc/os-release
    if apt-cache show libonnxruntime-dev > /dev/null 2>&1; then
        install libonnxruntime-dev
    elif [ "$ID" = debian ]; then
        unpack_header_of_trixie "$VERSION_CODENAME"
    fi
fi
