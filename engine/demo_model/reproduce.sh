#!/bin/sh
# The demo checkpoint from nothing: train by the plan in train.py, write both checkpoints, evaluate.
# Usage: reproduce.sh FOLDER    (one Hopper GPU, about nine minutes; everything lands in FOLDER)
# The stage before quantised fine-tuning is kept too, in FOLDER/weights-stage1: exported to NVFP4 it
# shows what plain rounding costs.
set -e
folder=$1
python=${PYTHON:-python3}
module=dsv4_bench.engine.demo_model
mkdir -p "$folder"

# The kernels of the long stages are compiled beside the first stage, by a second process.
$python -m $module.train --warm --out "$folder/warm" --plan 2304:7:2:1:0,2304:7:2:1:1 \
    > "$folder/warm.log" 2>&1 &
$python -m $module.train --out "$folder/weights" --keep-stages > "$folder/train.log" 2>&1
wait
$python -m $module.export --weights "$folder/weights" --out "$folder/checkpoint"
$python -m $module.export --weights "$folder/weights-stage1" --out "$folder/rounded"
for name in checkpoint rounded; do
    $python -m $module.evaluate "$folder/$name" --documents "${DOCUMENTS:-20}" --needles "${NEEDLES:-4}" \
        --device "${DEVICE:-cuda}" --json "$folder/$name.json" > "$folder/$name.log" 2>&1 &
    running="$running $!"
done
for process in $running; do wait "$process"; done
