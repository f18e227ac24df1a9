#!/usr/bin/env bash
# The paper's CIFAR-10 table: every method, architecture and seed. Takes the words of sweep.sh, and flags for every run.
#
#   bash scripts/reproduce_cifar10.sh DATA RUNS
#   bash scripts/reproduce_cifar10.sh DATA RUNS --dry_run --methods "vanilla sage" --seeds 1 -- --fast
dataset=cifar10 labels=5000
export SAGE_FLAGS="--blur_sigma 1.0 --kernel_size 5 --mixup_alpha 1.0 --rand_pos 0.01 --upper_lambda 0.6 --update_ratio 0.7"
export COMIX_FLAGS="--learning_rate 0.1" # at 0.2 its loss overflows within a dozen steps; see README
source "$(dirname "$0")/reproduce.sh"
