#!/usr/bin/env bash
# Everything a change has to pass, by the tools of the Python that is first on PATH; `make test` installs them.
set -euo pipefail
cd "$(dirname "$0")/.."

export OMP_NUM_THREADS=1 CUDA_VISIBLE_DEVICES=
scratch=$(mktemp -d)
step="start"

leave() {
    local status=$?
    rm -rf "$scratch"
    ((status == 0)) || echo "ci: FAILED at '$step' after $SECONDS s" >&2
}
trap leave EXIT

run() {
    step=$1
    echo "==> $step"
    "${@:2}"
}

# By way of a source archive, into which nothing of this checkout's working state can slip.
build_wheel() {
    python -m build --no-isolation --outdir "$scratch/dist" . >"$scratch/build.log" 2>&1 || {
        tail -n 40 "$scratch/build.log"
        return 1
    }
    twine check --strict "$scratch"/dist/*
}

# Only the wheel is installed. Its dependencies are read where they are installed already; the vssm beside them is an
# editable install, which Python finds by a .pth file, and such files count in their own environment only.
try_wheel() {
    local env="$scratch/env" site
    python -m venv --without-pip "$env"
    python -m pip --python "$env/bin/python" install --quiet --no-deps "$scratch"/dist/*.whl
    site=$("$env/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
    python -c 'import sysconfig as s; print(s.get_path("purelib"), s.get_path("platlib"), sep="\n")' >"$site/dependencies.pth"
    (
        cd "$scratch"
        "$env/bin/python" -c '
import sys, vssm, vssm_kernels
for package in (vssm, vssm_kernels):
    assert package.__file__.startswith(sys.prefix), f"{package.__name__} is not the wheel but {package.__file__}"
'
        "$env/bin/vssm" --version
        "$env/bin/vssm" list
    )
}

# Links between pages, to files and to headings are checked by it, and every docstring of the reference.
build_documentation() {
    sphinx-build --fail-on-warning --keep-going --quiet -c docs . "$scratch/documentation"
}

fast_tests() {
    python -m pytest -q -n 2 -m "not gpu and not slow" "$@"
}

run "format" ruff format --check .
run "lint" ruff check .
run "types" pyright --pythonpath "$(command -v python)"
run "import contracts" lint-imports
run "copied code" pylint --disable=all --enable=duplicate-code --min-similarity-lines=8 vssm kernels/vssm_kernels tests
run "wheel: build" build_wheel
run "wheel: install in an empty environment" try_wheel
run "documentation" build_documentation
run "kernels compile for every GPU" fast_tests tests/kernels/test_compile*.py
TRITON_INTERPRET=1 run "kernel tests, Triton interpreted" fast_tests tests/kernels
run "tests" fast_tests --ignore=tests/kernels
echo "ci: all steps passed in $SECONDS s"
