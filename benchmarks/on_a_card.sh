#!/usr/bin/env bash
# Five minutes of a card without a network: what is missing is installed from wheels in .whl/, then the stages run.
#
#   benchmarks/on_a_card.sh OUT [--stages bf16 nf4 ...] [--seconds 290]
#
# OUT gets on_a_card.jsonl, a line as each thing is found, a log of each stage, table.txt, and trace.json. Models are
# written to $WORK, or to a folder of their own below /tmp: about 45 GB.
set -u
out=$(mkdir -p "$1" && cd "$1" && pwd)
shift
cd "$(dirname "$0")/.." || exit 2
site=$(mktemp -d)
if compgen -G ".whl/*.whl" >/dev/null; then
  timeout 40 python3 -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --target "$site" .whl/*.whl 2>&1 | tail -2
fi
export PYTHONPATH=$site:$PWD/engine:$PWD/integrations:$PWD
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false PYTHONUNBUFFERED=1
work=${WORK:-$(mktemp -d)}
python3 -m benchmarks.on_a_card --out "$out" --work "$work" "$@" | tee "$out/table.txt"
code=${PIPESTATUS[0]}
[ -n "${WORK:-}" ] || rm -rf "$work"
rm -rf "$site"
exit "$code"
