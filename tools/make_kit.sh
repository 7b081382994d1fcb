#!/usr/bin/env bash
# Packs this checkout and what it needs for a GPU machine that has Python, PyTorch and CUDA but no package index.
#   tools/make_kit.sh OUT_DIR
# OUT_DIR then holds parts of at most PART_MIB, to be carried together or one by one, and install.sh.  There:
#   OUT_DIR/install.sh TARGET && . TARGET/environment && cd TARGET/cute_ssm && python3 tools/gpu_check.py --minutes 8
# PYTHON (3.12), CUDA (cu13) and PART_MIB (60) may be set; PEERS=1 adds the projects that benchmarks compare with.
# About 150 MiB are fetched, 65 MiB packed, in some minutes.  What is committed is packed, and nothing else.
set -euo pipefail
out=$(mkdir -p "${1:?usage: make_kit.sh OUT_DIR}" && cd "$1" && pwd)
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-3.12} cuda=${CUDA:-cu13} part_mib=${PART_MIB:-60}
dsl=4.8.1 tvm_ffi=0.1.15.post2
wheels=(nvidia-cutlass-dsl==$dsl nvidia-cutlass-dsl-libs-base==$dsl nvidia-cutlass-dsl-libs-core==$dsl
  "nvidia-cutlass-dsl-libs-$cuda==$dsl" apache-tvm-ffi==$tvm_ffi pytest-xdist execnet hypothesis sortedcontainers)
if [ -n "${PEERS:-}" ]; then wheels+=(flashinfer-python==0.7.2.post1 fla-core==0.6.0); fi
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
platforms=()
for version in 2_34 2_31 2_28 2_27 2_24 2_17; do platforms+=(--platform "manylinux_${version}_x86_64"); done
python3 -m pip download --quiet --no-deps --only-binary=:all: --python-version "$python" --implementation cp \
  "${platforms[@]}" --platform manylinux2014_x86_64 -d "$folder/wheels" "${wheels[@]}"
mkdir -p "$folder/kit/site"
for wheel in "$folder"/wheels/*.whl; do python3 -m zipfile -e "$wheel" "$folder/kit/site"; done
rm -rf "$folder"/kit/site/nvidia_cutlass_dsl/cu1?/lib/stubs # for other processors
git clone --quiet --depth 1 "file://$root" "$folder/kit/cute_ssm" # results name the commit
git -C "$folder/kit/cute_ssm" remote remove origin
rm -f "$out"/kit.part*
tar c -C "$folder/kit" . | xz -6 -T0 | split -b "${part_mib}M" -d -a 2 - "$out/kit.part"
cat >"$out/install.sh" <<'INSTALL'
#!/usr/bin/env bash
# install.sh TARGET: unpacks the parts beside it; TARGET/environment then sets what Python needs to find them.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
target=$(mkdir -p "${1:?usage: install.sh TARGET}" && cd "$1" && pwd)
cat "$here"/kit.part* | tar xJ -C "$target"
path="$target/cute_ssm:$target/cute_ssm/tools:$target/cute_ssm/tools/ptxsim:$target/cute_ssm/tools/gpumodel:$target/site:$target/site/nvidia_cutlass_dsl/dsl_packages"
printf 'export PYTHONPATH=%q${PYTHONPATH:+:$PYTHONPATH}\n' "$path" >"$target/environment"
PYTHONPATH="$path" python3 -m cute_ssm env || true
INSTALL
chmod +x "$out/install.sh"
ls -l "$out"
