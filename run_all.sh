#!/usr/bin/env bash
# bash run_all.sh            environment, then the main job on drawn digits: no download, minutes
# bash run_all.sh mnist      ... on MNIST (also: fashion, cifar10, cifar100); finished work is kept
# bash run_all.sh test       ... the tests; some of them: bash run_all.sh test tests/test_prune.py
# Flags after the data set go to lth_diffusion.py: bash run_all.sh mnist --seeds 0 1 2
set -euo pipefail
cd "$(dirname "$0")"

# The versions that everything here was tested with; requirements.txt has the oldest that work.
TESTED="torch==2.13.0 numpy==2.4.6 pillow==13.0.0 scipy==1.17.1 tqdm==4.70.1"

fail() { echo "run_all.sh: $1" >&2; exit 2; }

python=${PYTHON:-python3}
case "$python" in "~/"*) python="$HOME/${python#"~/"}" ;; esac
command -v "$python" > /dev/null || fail "$python is not there; name another: PYTHON=python3.11 bash run_all.sh"
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
    || fail "$("$python" --version) is too old, 3.10 is needed; name another: PYTHON=python3.11 bash run_all.sh"

stage=${1:-digits}
[ $# -gt 0 ] && shift
known=$("$python" -c 'from support.cli import DATASETS; print(*DATASETS)')
case " $known test " in
    *" $stage "*) ;;
    *) fail "'$stage' is none of: $known test" ;;
esac

# Made once; again when the versions or the interpreter have changed, or when it was left half made.
wanted="$("$python" -c 'import sys; print(sys.version_info[:2], sys.prefix)') $TESTED"
if [ "$(cat .venv/complete 2> /dev/null)" != "$wanted" ]; then
    echo "making .venv with $("$python" --version) and $TESTED"
    rm -rf .venv
    "$python" -m venv .venv
    printf '%s\n' $TESTED > .venv/tested.txt
    .venv/bin/python -m pip install --quiet --no-compile --disable-pip-version-check \
        -r requirements.txt -c .venv/tested.txt pytest
    echo "$wanted" > .venv/complete
fi

if [ "$stage" = test ]; then
    export OMP_NUM_THREADS=1 # networks this small gain little from a second core
    if [ $# -gt 0 ]; then
        exec .venv/bin/python -m pytest -q "$@"
    fi
    # a few files at a time, the largest first, by two processes
    ls -S test_smoke.py tests/test_*.py | xargs -P 2 -n 3 .venv/bin/python -m pytest -q
    exit
fi
exec .venv/bin/python lth_diffusion.py --dataset "$stage" "$@"
