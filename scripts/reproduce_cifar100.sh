#!/usr/bin/env bash
# The paper's CIFAR-100 table: every method, architecture and seed. Takes the arguments of sweep.sh, and flags for every run.
#
#   bash scripts/reproduce_cifar100.sh DATA RUNS
#   bash scripts/reproduce_cifar100.sh DATA RUNS --dry_run --methods "vanilla sage" --seeds 1 -- --fast
dataset=cifar100 labels=500
common="--blur_sigma 1.0 --kernel_size 5 --mixup_alpha 1.0 --rand_pos 0.01"
export SAGE_FLAGS="$common --upper_lambda 0.7 --update_ratio 0.5"
export SAGE_FLAGS_preactresnet18="$common --upper_lambda 0.5 --update_ratio 0.7"
source "$(dirname "$0")/reproduce.sh"
