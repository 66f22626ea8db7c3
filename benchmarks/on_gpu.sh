#!/usr/bin/env bash
# Everything that needs a CUDA device, within ten minutes: build, tests, compute-sanitizer, the benchmarks of the set
# `gpu` of run.py.
#
#   benchmarks/on_gpu.sh [FOLDER]
#
# It uses the `python` on PATH with meddiff's dependencies and pytest in it, and installs nothing but meddiff itself. A
# part that fails or takes too long does not stop the others. FOLDER ($OUT, or out/) gets a log of each part, summary.txt,
# and one file to commit, benchmarks/results/<device>.jsonl with the new lines and one that tells of this run. Exit code:
# 0 all parts passed, 1 some failed, 2 no CUDA device.
set -uo pipefail
cd "$(dirname "$0")/.."

if ! found=$(python -c '
import sys, torch
if not torch.cuda.is_available():
    sys.exit(f"torch {torch.__version__}, built for CUDA {torch.version.cuda}, finds no CUDA device")
print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")' 2>&1); then
  echo "on_gpu.sh: no CUDA device, nothing was built or run: ${found##*$'\n'}" >&2
  exit 2
fi

unset TRITON_INTERPRET
out=${1:-${OUT:-out}}
mkdir -p "$out"
rm -f "$out/benchmarks.txt"
out=$(realpath "$out")

echo "$found" | tee "$out/summary.txt"
deadline=$((SECONDS + 590))
failed=0

# part NAME SECONDS COMMAND…: run it with a log and a limit
part() {
  local name=$1 limit=$2 begin=$SECONDS code=0 result=passed
  shift 2
  ((limit <= deadline - SECONDS)) || limit=$((deadline - SECONDS))
  if ((limit < 5)); then
    result="failed: no time left"
  else
    echo "+ $*" > "$out/$name.log"
    timeout --kill-after=5 "$limit" "$@" >> "$out/$name.log" 2>&1 || code=$?
    case $code in
      0) ;;
      124 | 137) result="failed: longer than $limit s" ;;
      *) result="failed: exit code $code" ;;
    esac
  fi
  [[ $result == passed ]] || failed=1
  echo "$name: $result, $((SECONDS - begin)) s" | tee -a "$out/summary.txt"
}

part build 120 env MEDDIFF_CUDA=1 python -m pip install --no-deps --no-build-isolation -e .
part doctor 20 python -m meddiff.cli doctor
# eight at a time where pytest-xdist is there: most of their time goes by compiling kernels and on the CPU's references
parallel=$(python -c 'import xdist; print("-n 8 --dist worksteal")' 2> /dev/null)
# shellcheck disable=SC2086
part tests 170 python -m pytest -m gpu -ra $parallel

sanitizer=$(command -v compute-sanitizer || command -v /usr/local/cuda/bin/compute-sanitizer)
if [[ -n $sanitizer ]]; then
  # of each test the first cases only: everything takes ten times as long here
  mapfile -t tests < <(python -m pytest --collect-only -q -m "gpu and not large" tests/kernels 2> /dev/null |
    awk -F'[' '/::/ && seen[$1]++ < 3')
  for tool in memcheck racecheck; do
    # every tensor a block of its own, so that memcheck sees where it ends
    part "$tool" 60 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 "$sanitizer" --tool "$tool" --error-exitcode 9 \
      python -m pytest -q "${tests[@]:-no-gpu-test-was-collected}"
  done
else
  echo "memcheck, racecheck: skipped, compute-sanitizer was not found" | tee -a "$out/summary.txt"
fi

left=$((deadline - SECONDS - 15))
part benchmarks $((left + 5)) python benchmarks/run.py gpu --limit 90 --within "$left" --summary "$out/benchmarks.txt"
[[ -e $out/benchmarks.txt ]] && sed 's/^/  /' "$out/benchmarks.txt" >> "$out/summary.txt"

python benchmarks/record_run.py "$out" || failed=1

echo "logs and the file to commit: $out"
exit "$failed"
