#!/usr/bin/env bash
# The paper's CIFAR-10 table: every method, architecture and seed. Takes DATA and RUNS; further words go to every run.
#
#   bash scripts/reproduce_cifar10.sh DATA RUNS [--fast …]
#   SEEDS="1 2 3" METHODS="vanilla sage" ARCHS=preactresnet18 DRY_RUN=1 bash scripts/reproduce_cifar10.sh DATA RUNS
set -uo pipefail
[ $# -ge 2 ] || { echo "usage: $0 DATA RUNS [flags of main.py]" >&2; exit 2; }
data=$(realpath -m "$1") runs=$(realpath -m "$2")
shift 2
here=$(dirname "$0")
methods=${METHODS:-vanilla input manifold cutmix saliencymix puzzle comix sage}
seeds=${SEEDS:-1 2 3}
common=(--dataset cifar10 --data_dir "$data" --root_dir "$runs" --labels_per_class 5000 --learning_rate 0.2
  --momentum 0.9 --decay 0.0001 --epochs 300 --schedule 100 200 --gammas 0.1 0.1 "$@")
code=0
for arch in ${ARCHS:-preactresnet18 resnext29_4_24 wrn16_8}; do
  # SAGE's settings for each architecture
  case $arch in
    *) sage="--upper_lambda 0.6 --update_ratio 0.7" ;;
  esac
  export SAGE_FLAGS="--blur_sigma 1.0 --kernel_size 5 --mixup_alpha 1.0 --rand_pos 0.01 $sage"
  bash "$here/sweep.sh" ${DRY_RUN:+--dry_run} --methods "$methods" --archs "$arch" --seeds "$seeds" -- "${common[@]}" || code=1
done
exit $code
