#!/usr/bin/env bash
# Makes .venv, installs requirements.txt, and trains SAGE on scikit-learn's handwritten digits (real images, no download).
# Uses an existing environment with PYTHON=/path/to/python. Can be run again and again. Further arguments go to main.py.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/setup.sh
setup requirements.txt

root=${ROOT_DIR:-experiments}
command=("$PYTHON" main.py --dataset digits --root_dir "$root" --arch preactresnet18 --initial_channels 16
  --learning_rate 0.2 --momentum 0.9 --decay 0.0001 --epochs 15 --schedule 8 12 --gammas 0.1 0.1
  --method sage --blur_sigma 1.0 --kernel_size 5 --mixup_alpha 1.0 --upper_lambda 0.6 --rand_pos 0.01 --update_ratio 0.7
  --seed 1 --ngpu "${NGPU:-1}" --add_name quickstart "$@")
echo "${command[*]}"
exec "${command[@]}"
