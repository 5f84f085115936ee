#!/usr/bin/env bash
# SFT -> DPO -> reward model -> GRPO on a real pretrained model of 135M parameters: word problems
# whose answers a program can check. What it measured is in recipes/real_135m.md.
#
#   bash recipes/real_135m.sh MODEL SVAMP.jsonl [OUT]
#
# MODEL is a Hugging Face directory of type qwen2, the files as they are published. A stage that is
# finished is skipped and an interrupted one continued, so the same command goes on after a Ctrl-C.
# The size comes from the environment: LR scales all learning rates, N_SFT counts demonstrations,
# N_RL the queries of RL; STEPS and BATCH are GRPO's.
set -euo pipefail
[ $# -ge 2 ] || { sed -n '2,9s/^# \?//p' "$0"; exit 2; }
MODEL=$(realpath "$1") SVAMP=$(realpath "$2") OUT=$(realpath -m "${3:-runs/real_135m}")
cd "$(dirname "$0")/.."
N_SFT=${N_SFT:-1150} EPOCHS=${EPOCHS:-1} N_RL=${N_RL:-376} STEPS=${STEPS:-8} BATCH=${BATCH:-32}
N_TEST=${N_TEST:-600} LR=${LR:-1} DTYPE=${DTYPE:-bfloat16} PYTHON=${PYTHON:-python}
lr() { "$PYTHON" -c "print($1 * $LR)"; }

# 1. Data: SVAMP's problems, and those of tasks/, of which there are as many as one likes. SVAMP
# varies each of its stories several times, in order: of its second half is the test; of the first,
# half are demonstrations, half RL's queries. Demonstrations of both kinds show their steps or state
# the answer at once. Of RL's queries only the answer is used; a quarter of them is to choose
# settings by (val.jsonl).
mkdir -p "$OUT/pretrain"
"$PYTHON" - "$SVAMP" "$OUT" <<'END'
import itertools, json, operator, random, re, sys
from pathlib import Path
sys.path.insert(0, '.')
import tasks.queries
from tasks import benchmarks, toy
svamp, out = map(Path, sys.argv[1:])
OPERATORS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv}

def solve(equation):
    """"( ( 10.0 - 3.0 ) - 5.0 )" -> ["10 - 3 = 7", "7 - 5 = 2"], innermost bracket first."""
    steps = []
    while found := re.search(r"\( (-?[\d.]+) ([-+*/]) (-?[\d.]+) \)", equation):
        a, sign, b = float(found[1]), found[2], float(found[3])
        value = OPERATORS[sign](a, b)
        steps.append(f"{a:g} {sign} {b:g} = {value:g}")
        equation = equation.replace(found[0], str(value), 1)
    return steps

def made(split, n):
    """n different problems of a split, each with a demonstration."""
    found, stream = {}, tasks.queries.items(split, "mathematics", 0)
    while len(found) < n:
        query, text = next(stream)
        found.setdefault(query["prompt"], (query | {"domain": "generated"}, text))
    return list(found.values())

rows = [json.loads(line) for line in svamp.read_text("utf-8").splitlines()]
pairs = [(query | {"domain": "SVAMP"}, row) for query, row in
         zip(benchmarks.load_file(svamp), rows, strict=True)]
pairs.sort(key=lambda pair: int(pair[1]["ID"].split("-")[1]))
half = len(pairs) // 2
first, test = pairs[:half], pairs[half:]
r = random.Random(0)
r.shuffle(first), r.shuffle(test)
shown = []
for query, row in first[:half // 2]:
    problem = toy.Problem(query["prompt"], query["check"]["answer"], solve(row["Equation"]))
    shown.append((query, r.choice(toy.answer_task(problem).responses)))
shown += made("sft", 900)
r.shuffle(shown)
queries = [query for query, _ in first[half // 2:]]
n_val, n_test = len(queries) // 4, 3 * half // 5
sets = {"sft": [{"messages": [{"role": "user", "content": query["prompt"]},
                              {"role": "assistant", "content": text}]} for query, text in shown],
        "rl": queries[n_val:] + [query for query, _ in made("rl", len(queries) - n_val)],
        "val": queries[:n_val] + [query for query, _ in made("val", 2 * n_val)],
        "test": [query for query, _ in test[:n_test] + made("test", n_test)]}
for name, rows in sets.items():
    if name in ("rl", "test"):
        r.shuffle(rows)
    (out / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
print(", ".join(f"{len(rows)} rows in {name}.jsonl" for name, rows in sets.items()))
END

# 2. One stage after the other, the test before and after each that makes a policy.
finished() { grep -qs '"finished": true' "$OUT/$1/run.json"; }
evaluate() {  # name, model directory
  [ -e "$OUT/evaluation/$1/eval.json" ] || timed "evaluate $1" "$PYTHON" evaluate.py \
    --init "$2" --out "$OUT/evaluation/$1" --queries "$OUT/test.jsonl" --n_queries "$N_TEST" --samples 4 --max_new_tokens 48 \
    --dtype "$DTYPE"
}
stage() {  # script, name, flags
  finished "$2" || timed "$2" "$PYTHON" "$1.py" --out "$OUT/$2" --dtype "$DTYPE" "${@:3}" \
    $([ ! -e "$OUT/$2/run.json" ] || echo --resume)
}
timed() {
  printf '\n== %s\n' "$1"
  local TIMEFORMAT="%R s, %U + %S s of CPU: $1"
  { time "${@:2}" 2>&3; } 3>&2 2>> "$OUT/times.txt"
}

evaluate base "$MODEL"

stage sft sft --init "$MODEL" --data "$OUT/sft.jsonl" --n_data "$N_SFT" --epochs "$EPOCHS" \
  --batch_size 16 --micro_batch 16 --warmup 3 --lr "$(lr 1e-4)" --max_new_tokens 16
evaluate sft "$OUT/sft"

stage dpo dpo --init "$OUT/sft" --base "$MODEL" --queries "$OUT/rl.jsonl" --n_queries "$N_RL" \
  --pairs_per_query 1 --max_new_tokens 48 --epochs 1 --lr "$(lr 2e-5)" --warmup 2 \
  --batch_size 16 --micro_batch 8
evaluate dpo "$OUT/dpo"

stage reward reward --init "$OUT/sft" --policies "$OUT/sft,$OUT/dpo" --temperatures 1.0 \
  --pairs "$OUT/dpo/pairs.jsonl" --queries "$OUT/rl.jsonl" --n_queries "$N_RL" --n_held_out 16 \
  --responses 2 --pairs_per_query 1 --max_new_tokens 48 --epochs 1 --lr "$(lr 5e-5)" --warmup 2 \
  --batch_size 16 --micro_batch 8

# A group of equal rewards teaches nothing: GRPO gets the queries that DPO made pairs of, which the
# SFT model answered rightly and wrongly.
"$PYTHON" - "$OUT" <<'END'
import json, sys
from pathlib import Path
out = Path(sys.argv[1])
# Lines of the files: splitlines() would also cut at U+2028, which a JSON text may hold.
pairs, rows = (list(open(out / name, encoding="utf-8")) for name in ("dpo/pairs.jsonl", "rl.jsonl"))
mixed = {json.loads(line)["prompt"] for line in pairs}
kept = [line for line in rows if json.loads(line)["prompt"] in mixed]
(out / "mixed.jsonl").write_text("".join(kept), "utf-8")
END
stage grpo grpo --init "$OUT/dpo" --reward_model "$OUT/reward" --queries "$OUT/mixed.jsonl" \
  --n_queries "$N_RL" --query_order random --steps "$STEPS" --batch_queries "$BATCH" \
  --max_new_tokens 48 --lr "$(lr 2e-5)" --warmup 2 --scale_rewards none --save_every 4
evaluate grpo "$OUT/grpo"

"$PYTHON" -m lib.report --run "$OUT"
cat "$OUT/times.txt"
