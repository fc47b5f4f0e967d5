#!/usr/bin/env bash
# From text to a talking model on one machine, as plain commands. Repeat any of them by hand.
# Usage: scripts/quickstart.sh [FOLDER]      (default runs/quickstart)
# OVERRIDES="train.tokens=1e5" makes both trainings shorter.
# Stopped, and given again, it goes on: what is complete is kept, and a training goes on from its newest checkpoint. To
# begin anew, or with other OVERRIDES, give another FOLDER.
set -euo pipefail
DIR=${1:-runs/quickstart}
RECIPES=$(dirname "$0")/../recipes/quickstart

# Whether a folder is complete: it appears, with its manifest, when it is. Remains of one that is not are replaced.
made() { [ -f "$1/manifest.json" ] && echo "$1: complete"; }

# 1. Text: the Python standard library that is running, split into train and validation by module.
made "$DIR/corpus" || internlm data corpus --out "$DIR/corpus"

# 2. A tokenizer, trained on the training side.
made "$DIR/tokenizer" ||
  internlm tokenizer train "$DIR/corpus/train.jsonl" --out "$DIR/tokenizer" --vocab-size 4096

# 3. Tokens: documents for pre-training, conversations for tuning.
for side in train validation; do
  made "$DIR/data/$side" ||
    internlm data tokenize "$DIR/corpus/$side.jsonl" --tokenizer "$DIR/tokenizer" --out "$DIR/data/$side"
done
for kind in module purpose signature; do
  made "$DIR/data/questions-$kind" ||
    internlm data tokenize "$DIR/corpus/questions-$kind.jsonl" --template internlm \
      --tokenizer "$DIR/tokenizer" --out "$DIR/data/questions-$kind"
done

# 4. Pre-train, then tune to answer.
internlm train "$RECIPES/pretrain.yaml" run="$DIR/pretrain" ${OVERRIDES:-} \
  data.train.library.path="$DIR/data/train" data.validation.held_out.path="$DIR/data/validation"
internlm train "$RECIPES/chat.yaml" run="$DIR/chat" init_from="$DIR/pretrain" ${OVERRIDES:-} \
  data.train.module.path="$DIR/data/questions-module" data.train.purpose.path="$DIR/data/questions-purpose" \
  data.train.signature.path="$DIR/data/questions-signature"

# 5. Export to a Transformers folder, anew each time: seconds, and always what was trained last. Then talk.
internlm convert "$DIR/chat" "$DIR/model" --force
for question in "In which module is OrderedDict?" "What does textwrap.wrap do?" \
  "What is the signature of copy.deepcopy?"; do
  echo "> $question"
  internlm chat "$DIR/model" --temperature 0 -p "$question"
done

cat <<END

model      $DIR/model  (loads with AutoModelForCausalLM, no remote code)
loss plot  $DIR/pretrain/loss.png
metrics    $DIR/pretrain/metrics.jsonl
go on      $(command -v internlm) chat $DIR/model
END
