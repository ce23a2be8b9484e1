#!/bin/sh
# Makes sure that the build finds libtorch 2.11.0: the one that the user configured (LIBTORCH, LIBTORCH_USE_PYTORCH),
# or a CPU build fetched once into .libtorch/; with LIBTORCH_DEVICE=cuda one that has CUDA. Called by make; safe to call again,
# also after an interruption.
set -eu

wanted=2.11.0
root=$(cd "$(dirname "$0")/.." && pwd)
final="$root/.libtorch"

device=${LIBTORCH_DEVICE:-cpu}

say() { echo "libtorch: $*" >&2; }
fail() { say "$*"; exit 1; }

# Prints the version of the torch installation in folder $1, without a local suffix such as +cpu.
version_in() {
    if [ -f "$1/build-version" ]; then
        sed 's/+.*//' "$1/build-version"
    elif [ -f "$1/version.py" ]; then
        sed -n "s/^__version__ = '\([^'+]*\).*/\1/p" "$1/version.py"
    fi
}

refuse_other_version() {
    [ "$2" = "$wanted" ] || fail "tsquant needs torch $wanted, but $1 is torch ${2:-of unknown version}"
}

case "$device" in
    cpu | cuda) ;;
    *) fail "LIBTORCH_DEVICE must be cpu or cuda, found $device" ;;
esac

# Fails where CUDA is asked for and the torch in folder $1 has none.
refuse_without_cuda() {
    [ "$device" = cpu ] || [ -e "$1/lib/libtorch_cuda.so" ] ||
        fail "LIBTORCH_DEVICE=cuda is set, but $2 has no lib/libtorch_cuda.so"
}

if [ -n "${LIBTORCH_USE_PYTORCH:-}" ]; then
    # torch-sys asks 'python' inside a virtual environment, 'python3' elsewhere.
    python=python3
    [ -z "${VIRTUAL_ENV:-}" ] || python=python
    found=$($python -c 'import torch; print(torch.__version__.split("+")[0])') ||
        fail "LIBTORCH_USE_PYTORCH is set, but $python cannot import torch"
    refuse_other_version "the one that $python imports (LIBTORCH_USE_PYTORCH)" "$found"
    folder=$($python -c 'import os, torch; print(os.path.dirname(torch.__file__))')
    refuse_without_cuda "$folder" "the torch that $python imports"
    exit 0
fi
if [ -n "${LIBTORCH:-}" ]; then
    [ -e "$LIBTORCH/lib/libtorch.so" ] || fail "LIBTORCH=$LIBTORCH holds no lib/libtorch.so"
    refuse_other_version "LIBTORCH=$LIBTORCH" "$(version_in "$LIBTORCH")"
    refuse_without_cuda "$LIBTORCH" "LIBTORCH=$LIBTORCH"
    exit 0
fi
if [ -d "$final" ]; then
    # The folder appears by one rename, so what is there is whole.
    refuse_other_version "$final (delete it to fetch the right one)" "$(version_in "$final/torch")"
    refuse_without_cuda "$final/torch" "$final (delete it to fetch one with CUDA)"
    exit 0
fi

[ "$(uname -s)-$(uname -m)" = Linux-x86_64 ] ||
    fail "there is no prepared download for $(uname -s) $(uname -m); set LIBTORCH to a torch $wanted installation"
command -v python3 >/dev/null || fail "python3 with pip is needed to fetch libtorch; none was found"
python3 -m pip --version >/dev/null 2>&1 || fail "python3 has no pip; it is needed to fetch libtorch"

partial="$root/.libtorch.partial"
rm -rf "$partial"
if [ "$device" = cuda ]; then
    say "fetching torch $wanted with CUDA 13 by pip (2.5 GB to download, about 4 GB kept in .libtorch/)"
    requirements=libtorch-cuda-requirements.txt
    cuda_libraries="libc10_cuda.so libtorch_cuda.so libtorch_cuda_linalg.so libcaffe2_nvrtc.so libtorch_nvshmem.so"
else
    say "fetching the CPU libraries of torch $wanted with pip (544 MB to download, about 550 MB kept in .libtorch/)"
    requirements=libtorch-requirements.txt
    cuda_libraries=
fi
# (older pips know this setting by its variable only)
PIP_ROOT_USER_ACTION=ignore python3 -m pip install --quiet --disable-pip-version-check --no-warn-script-location \
    --require-hashes --no-deps --python-version 3.12 --only-binary=:all: --no-compile \
    --target "$partial/all" --requirement "$root/scripts/$requirements" ||
    fail "pip could not fetch torch $wanted (see above); nothing was kept"

# Keep headers, libraries and licences. torch-sys links -ltorch, which is libtorch_cpu by another name here: tsquant opens the
# half for GPUs by itself.
mkdir -p "$partial/keep/torch/lib"
for part in include share version.py; do
    mv "$partial/all/torch/$part" "$partial/keep/torch/$part"
done
for library in libc10.so libtorch_cpu.so libgomp.so.1 $cuda_libraries; do
    mv "$partial/all/torch/lib/$library" "$partial/keep/torch/lib/$library"
done
echo 'INPUT(-ltorch_cpu)' >"$partial/keep/torch/lib/libtorch.so"
echo "$wanted" >"$partial/keep/torch/build-version"
mv "$partial/all/nvidia" "$partial/keep/nvidia"
mv "$partial/all/torch-$wanted.dist-info" "$partial/keep/torch-$wanted.dist-info"
mv "$partial/keep" "$final"
rm -rf "$partial"
say "ready in .libtorch/ ($(du -sm "$final" | cut -f1) MB)"
