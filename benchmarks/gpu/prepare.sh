#!/usr/bin/env bash
# Gathers what a bare GPU machine without a network lacks beside torch: its wheels, and the published
# sampler's one file: prepare.sh [ML_TARFLOW], in the project's root. .whl/ and .gpu/ are ignored by git.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
python=.venv/bin/python  # has torch and setuptools, to build with
[ -x "$python" ] || make .venv/ready
mkdir -p .whl .gpu
if [ -n "${1:-}" ]; then git -C "$1" show HEAD:transformer_flow.py >.gpu/transformer_flow.py; fi
platforms=()
for p in manylinux_2_34 manylinux_2_28 manylinux_2_27 manylinux_2_24 manylinux_2_17 manylinux2014 manylinux1; do
    platforms+=(--platform "${p}_x86_64")
done
while read -r name; do
    ls .whl/"${name%%==*}"-*.whl >/dev/null 2>&1 && continue
    "$python" -m pip download -q --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
        "${platforms[@]}" -d .whl "$name" || echo "no wheel: $name" >&2
done <"$here/wheels.txt"
ls .whl/deepspeed-*.whl >/dev/null 2>&1 ||
    DS_BUILD_OPS=0 "$python" -m pip wheel -q --no-deps --no-build-isolation -w .whl "$(grep ^deepspeed= constraints.txt)"
du -sh .whl .gpu
cat <<'TEXT'
On the GPU machine, in the project's root with .whl/ and .gpu/ in it, some eight minutes:
  python3 -m pip install -q --no-index --no-deps --no-compile --upgrade --target "$HOME/site" .whl/*.whl && \
    PYTHONPATH="$HOME/site:$PWD" python3 -m benchmarks.gpu --out gpu-results --published .gpu
TEXT
