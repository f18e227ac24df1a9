#!/usr/bin/env bash
# The paper's CIFAR-10 table: every method, architecture and seed. Takes the arguments of sweep.sh, and flags for every run.
#
#   bash scripts/reproduce_cifar10.sh DATA RUNS
#   bash scripts/reproduce_cifar10.sh DATA RUNS --dry_run --methods "vanilla sage" --seeds 1 -- --fast
#
# Flags behind -- come before those that one method or architecture alone gets: --learning_rate X does not reach ResNeXt and
# Co-Mixup, whose rates stand below.
dataset=cifar10 labels=5000
export SAGE_FLAGS="--blur_sigma 1.0 --kernel_size 5 --mixup_alpha 1.0 --rand_pos 0.01 --upper_lambda 0.6 --update_ratio 0.7"
# Where 0.2 is too much: ResNeXt collapses, Co-Mixup overflows on PreActResNet18 (docs/differences.md).
export FLAGS_resnext29_4_24="--learning_rate 0.05" COMIX_FLAGS="--learning_rate 0.1"
export COMIX_FLAGS_resnext29_4_24="--learning_rate 0.02" COMIX_FLAGS_wrn16_8="--learning_rate 0.2"
source "$(dirname "$0")/reproduce.sh"
