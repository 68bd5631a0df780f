#!/usr/bin/env bash
# Each tool of compute-sanitizer on sanitized.py, at once; what they print goes into the file that is named.
# Each allocation on its own, or an access beyond a tensor would lie inside of a larger block.
export PYTORCH_NO_CUDA_MEMORY_CACHING=1
tools=(memcheck initcheck synccheck racecheck)
folder=$(mktemp -d)
trap 'rm -r "$folder"' EXIT
for tool in "${tools[@]}"; do
  { compute-sanitizer --tool "$tool" --error-exitcode 9 "${PYTHON:-python3}" "$(dirname "$0")/sanitized.py"
    echo "$tool: exit status $?"; } >"$folder/$tool" 2>&1 &
done
wait
cat "$folder"/* | tee "$1" | tail -n 40
for tool in "${tools[@]}"; do
  grep -q "^$tool: exit status 0$" "$folder/$tool" && grep -q 'all cases hold' "$folder/$tool" &&
    grep -q ' SUMMARY: 0 ' "$folder/$tool" || { echo "$tool: failed"; exit 1; }
done
