#!/usr/bin/env bash
# Makes one archive for a GPU pass on a machine that has Python, PyTorch and Triton, but no compiler of CuTe DSL and no
# package index: the checkout, kernels compiled here, what the tests import, and peers that are written in Triton.
#   tools/make_kit.sh [--sms N[,N...]] OUT     # writes OUT/kit.tar.xz and OUT/kit.tar.xz.sha256, and fails above 60 MiB
# There, in one command:
#   tar xJf kit.tar.xz && kit/enter python3 tools/gpu_check.py --minutes 12
# What is committed is packed.  Kernels stay in OUT; those that are there are not compiled again.  Needs a CPU build of
# PyTorch: which kernels the tests run, gpushim tells.
#
#   --sms   SMs of the GPU there, on which the choice of some kernels depends; of several, kernels for each, and the
#           emulator's results for the first (default: 132 of sm_90a, as H100 SXM and H200 have; an H100 PCIe has 114)
#   ARCH    target (sm_90a)                  CUDA    flavour of the runtime library (cu13)
#   PYTHON  version of Python there (3.12)   JOBS    compiling processes (2)
#   PEERS   folder into which mamba_ssm and vllm have been installed, by pip install --no-deps --target PEERS; their
#           Triton files are taken (default: none)
#   WHEELS    folder of wheels, instead of downloads (180 MiB)
#   BUNDLE    folder of a bundle with its runtime library, instead of a new one
#   EMULATED  file of the emulator's results by gpu_check.py emulate, instead of a new one
#   LIMIT_MIB largest size of the archive (60)
set -euo pipefail
sms=()
if [ "${1:-}" = --sms ]; then
  IFS=, read -ra sms <<<"${2:?usage: make_kit.sh [--sms N[,N...]] OUT}"
  shift 2
fi
limit_mib=${LIMIT_MIB:-60}
out=$(mkdir -p "${1:?usage: make_kit.sh [--sms N[,N...]] OUT}" && cd "$1" && pwd)
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
arch=${ARCH:-sm_90a} cuda=${CUDA:-cu13} python=${PYTHON:-3.12}
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
kit=$scratch/kit
mkdir -p "$kit/cute_ssm" "$kit/site" "$kit/spare" "$kit/peers"
version() { python3 -c 'import importlib.metadata, sys; print(importlib.metadata.version(sys.argv[1]))' "$1"; }

git -C "$root" archive HEAD | tar x -C "$kit/cute_ssm"
cd "$kit/cute_ssm"
export PYTHONPATH=$PWD:$PWD/tools:$PWD/tools/ptxsim:$PWD/tools/gpumodel:$PWD/tools/gpushim PYTHONDONTWRITEBYTECODE=1
sources=$(python3 -c 'from cute_ssm.runtime import toolchain; print(toolchain.sources_digest())')
echo "$(git -C "$root" rev-parse HEAD) $sources" >COMMIT # which bench/outputs.py reads where there is no repository

if [ -n "${BUNDLE:-}" ]; then
  others=$(find "$BUNDLE" -name meta.json -exec grep -L "\"sources\": \"$sources\"" {} + || true)
  [ -z "$others" ] || { echo "make_kit: the commit's sources are $sources, not those of $others" >&2; exit 1; }
fi

wheels=${WHEELS:-$scratch/wheels}
if [ -z "${WHEELS:-}" ]; then
  platforms=()
  for glibc in 2_34 2_31 2_28 2_27 2_24 2_17; do platforms+=(--platform "manylinux_${glibc}_x86_64"); done
  python3 -m pip download --quiet --no-deps --only-binary=:all: --python-version "$python" --implementation cp \
    "${platforms[@]}" --platform manylinux2014_x86_64 -d "$wheels" \
    "apache-tvm-ffi==$(version apache-tvm-ffi)" "nvidia-cutlass-dsl-libs-$cuda==$(version nvidia-cutlass-dsl)" \
    pytest pluggy iniconfig packaging pygments pytest-xdist execnet hypothesis sortedcontainers einops fla-core==0.6.0 \
    numpy typing-extensions
fi
for wheel in "$wheels"/*.whl; do # of the compiler the runtime library alone
  case $wheel in
    */nvidia_cutlass_dsl_libs_*) python3 -m zipfile -e "$wheel" "$scratch/dsl" ;;
    */numpy-* | */typing_extensions-*) python3 -m zipfile -e "$wheel" "$kit/spare" ;; # PyTorch's own are preferred
    *.whl) [ ! -e "$wheel" ] || python3 -m zipfile -e "$wheel" "$kit/site" ;;
  esac
done

if [ -n "${BUNDLE:-}" ]; then
  cp -r "$BUNDLE" "$kit/bundle"
else
  bundle=$out/bundle-$sources
  python3 tools/gpu_calls.py "$scratch/kernels.json" --arch "$arch" --tests ${sms:+--sms "${sms[@]}"}
  python3 tools/build_aot.py --specs "$scratch/kernels.json" --register gpu_pass.probes:register \
    --arch "$arch" --jobs "${JOBS:-2}" --out "$bundle"
  cp -r "$bundle" "$kit/bundle"
  cp "$scratch/dsl/nvidia_cutlass_dsl/$cuda/lib/libcute_dsl_runtime.so" "$kit/bundle/"
fi

if [ -n "${EMULATED:-}" ]; then
  cp "$EMULATED" tools/gpu_pass/emulated.npz
else
  CUTE_SSM_CACHE_DIR=$out/cache python3 tools/gpu_check.py emulate --arch "$arch" ${sms:+--sms "${sms[0]}"}
fi

if [ -n "${PEERS:-}" ]; then # without the __init__.py of mamba_ssm and vllm, which import what is not there
  ops=vllm/model_executor/layers/mamba/ops
  mkdir -p "$kit/peers/mamba_ssm/ops" "$kit/peers/$ops"
  cp -rL "$PEERS/mamba_ssm/ops/triton" "$kit/peers/mamba_ssm/ops/"
  cp -rL "$PEERS/$ops/mamba_ssm.py" "$PEERS/$ops/triton_helpers.py" "$PEERS/$ops/configs" "$kit/peers/$ops/"
  for name in mamba_ssm vllm; do
    mkdir "$kit/peers/licence-$name"
    find "$PEERS" -path "*/$name-*.dist-info/*" -name 'LICENSE*' -exec cp {} "$kit/peers/licence-$name/" \;
    [ -n "$(ls "$kit/peers/licence-$name")" ] || { echo "make_kit: no licence of $name in $PEERS" >&2; exit 1; }
  done
fi

cat >"$kit/enter" <<ENTER
#!/bin/sh
# kit/enter COMMAND...: runs a command in the checkout of this kit, with all that it needs on Python's path.
wanted=$python
ENTER
cat >>"$kit/enter" <<'ENTER'
kit=$(cd "$(dirname "$0")" && pwd)
found=$(python3 -c 'import sys; print("%d.%d" % sys.version_info[:2])')
if [ "$found" != "$wanted" ]; then
  echo "kit/enter: expected python3 to be Python $wanted, for which the kit was made, got Python ${found:-none}" >&2
  exit 2
fi
cd "$kit/cute_ssm" || exit 1
tools=$PWD/tools
export PYTHONPATH="$PWD:$tools:$tools/ptxsim:$tools/gpumodel:$tools/gpushim:$kit/site:$kit/peers${PYTHONPATH:+:$PYTHONPATH}"
python3 -c 'import numpy, typing_extensions' 2>/dev/null || PYTHONPATH="$PYTHONPATH:$kit/spare"
export CUTE_SSM_AOT_DIR="$kit/bundle"
exec "$@"
ENTER
chmod +x "$kit/enter"
find "$kit" -name __pycache__ -prune -exec rm -rf {} +
tar c --sort=name --owner=0 --group=0 --numeric-owner -C "$scratch" kit | xz -6 -T0 >"$out/kit.tar.xz"
(cd "$out" && sha256sum kit.tar.xz | tee kit.tar.xz.sha256)
kernels=$(find "$kit/bundle" -name '*.so' ! -name libcute_dsl_runtime.so | wc -l)
bytes=$(stat -c %s "$out/kit.tar.xz")
echo "kit.tar.xz: $bytes bytes, $kernels kernels for $arch"
if [ "$bytes" -gt $((limit_mib << 20)) ]; then
  echo "make_kit: the archive is larger than $limit_mib MiB" >&2
  exit 1
fi
