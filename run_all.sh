#!/usr/bin/env bash
# bash run_all.sh            environment, then the main job on drawn digits: no download, minutes on a laptop
# bash run_all.sh mnist      ... on MNIST (also: cifar10, cifar100); what is finished is not done again
# bash run_all.sh test       ... the tests; those of the studies: bash run_all.sh test tests/test_stud*.py
# Flags after the data set go to lth_diffusion.py: bash run_all.sh mnist --seeds 0 1 2
set -euo pipefail
cd "$(dirname "$0")"

stage=${1:-digits}
[ $# -gt 0 ] && shift
case "$stage" in
    digits | mnist | cifar10 | cifar100 | test) ;;
    *) echo "run_all.sh: '$stage' is none of digits, mnist, cifar10, cifar100, test" >&2; exit 2 ;;
esac

# Made once, and again when requirements.txt has changed since.
if ! cmp -s requirements.txt .venv/installed.txt; then
    echo "making .venv with $(tr '\n' ' ' < requirements.txt)"
    "${PYTHON:-python3}" -m venv .venv
    .venv/bin/python -m pip install --quiet --no-compile --disable-pip-version-check -r requirements.txt pytest
    cp requirements.txt .venv/installed.txt
fi

if [ "$stage" = test ]; then
    export OMP_NUM_THREADS=1 # networks this small gain little from a second core: two halves side by side
    if [ $# -gt 0 ]; then
        exec .venv/bin/python -m pytest -q "$@"
    fi
    half="test_smoke.py tests/test_lth.py"
    .venv/bin/python -m pytest -q $half &
    trap "kill $! 2> /dev/null || true" EXIT
    failed=0
    .venv/bin/python -m pytest -q --ignore ${half// / --ignore } --ignore-glob "tests/test_stud*" || failed=1
    wait $! || failed=1
    exit $failed
fi
if [ "$stage" = digits ]; then
    set -- --rounds 2 --final-sparsity 0.9 "$@" # ten rounds' sparsity in two, to be done in minutes
fi
exec .venv/bin/python lth_diffusion.py --dataset "$stage" "$@"
