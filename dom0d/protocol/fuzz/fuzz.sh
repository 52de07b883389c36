#!/bin/sh
# Explores one target with libFuzzer: fuzz.sh packets|engine [libFuzzer's options]. Needs a C++ compiler.
# New inputs go to target/fuzz/<target>; `-merge=1` with corpus/<target> first keeps what adds coverage.
# The passes are LLVM's own, so a stable compiler will do; overflows and assertions are checked.
set -eu
here=$(dirname "$(realpath "$0")")
name=$1
shift
export CARGO_TARGET_DIR="${CARGO_TARGET_DIR:-$here/../../../target/fuzz}"
export RUSTFLAGS="--cfg fuzzing -Copt-level=2 -Cdebug-assertions=on -Coverflow-checks=on -Ccodegen-units=1 \
-Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4 \
-Cllvm-args=-sanitizer-coverage-inline-8bit-counters -Cllvm-args=-sanitizer-coverage-pc-table \
-Cllvm-args=-sanitizer-coverage-trace-compares"
host=$(rustc -vV | sed -n 's/^host: //p')
cd "$here"
# With --target the flags stay away from build scripts.
cargo build --quiet --target "$host" --bin "$name"
found=$CARGO_TARGET_DIR/$name
mkdir -p "$found" "$found-failures"
if [ $# -eq 0 ]; then
    set -- -max_total_time=300 -max_len=2048
fi
exec "$CARGO_TARGET_DIR/$host/debug/$name" -artifact_prefix="$found-failures/" "$@" "$found" "corpus/$name"
