#!/usr/bin/env bash
# Two small models on two CPU cores, in process and over HTTP: 64 requests of 64 tokens in and 64 out,
# 1 and 16 at once, page 16, context 2048.
#
#     PATH=.venv/bin:$PATH benchmarks/cpu.sh FOLDER     # for the results and their figure
set -euo pipefail
cd "$(dirname "$0")/.."
folder=${1:?usage: benchmarks/cpu.sh FOLDER}
port=${PORT:-30999}
mkdir -p "$folder"

engine=(--device cpu --page-size 16 --context-length 2048 --log-level warning)
load=(--num-prompts 64 --input-len 64 --output-len 64 --max-concurrency 1 16)
demo=(--model-path jaxserve/demo_model)
qwen3=(--model-path benchmarks/dummy_qwen3 --load-format dummy --skip-tokenizer-init --dtype float32)
on_two_cores=(taskset -c "${CPUS:-0,1}" python -m)

wait_until_ready() {
  until (exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null; do
    kill -0 "$1"
    sleep 0.2
  done
}

measure() { # NAME MODEL_FLAGS...
  local name=$1 server
  shift
  "${on_two_cores[@]}" jaxserve.bench offline "$@" "${engine[@]}" "${load[@]}" \
    --label "$name, in process" --output "$folder/$name-offline.json"
  "${on_two_cores[@]}" jaxserve.server "$@" "${engine[@]}" --port "$port" &
  server=$!
  trap 'kill $server' EXIT
  wait_until_ready $server
  "${on_two_cores[@]}" jaxserve.bench serve --port "$port" "${load[@]}" \
    --label "$name, over HTTP" --output "$folder/$name-serve.json"
  trap - EXIT
  kill $server
  wait $server
}

measure demo "${demo[@]}"
measure qwen3 "${qwen3[@]}"
python -m jaxserve.bench plot "$folder"/{demo,qwen3}-{offline,serve}.json \
  --output "$folder/cpu.png" --metric output_tokens_per_s output_tokens_per_cpu_s latency_ms.p50
