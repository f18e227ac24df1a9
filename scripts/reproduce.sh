# Sourced by reproduce_cifar10.sh and reproduce_cifar100.sh: the paper's table, 8 methods × 3 architectures × 3 seeds, for
# $dataset with $labels images a class. Runs share one queue. What one method or architecture alone gets is in SAGE_FLAGS,
# COMIX_FLAGS, FLAGS_resnext29_4_24.
[[ $# -ge 2 && $1 != -* && $2 != -* ]] || { echo "usage: $0 DATA RUNS [arguments of sweep.sh] [-- flags of main.py]" >&2; exit 2; }
data=$(realpath -m "$1") runs=$(realpath -m "$2") rest=()
shift 2
while [ $# -gt 0 ] && [ "$1" != -- ]; do rest+=("$1"); shift; done
[ $# -eq 0 ] || shift
typed=" ${rest[*]-} $* " # a list that is typed, with --archs or as --arch behind --, replaces the table's
[[ $typed =~ \ --archs?[\ =] ]] || rest+=(--archs "preactresnet18 resnext29_4_24 wrn16_8")
[[ $typed =~ \ --seeds?[\ =] ]] || rest+=(--seeds "1 2 3")
exec bash "$(dirname "$0")/sweep.sh" ${rest[@]+"${rest[@]}"} -- \
  --dataset "$dataset" --data_dir "$data" --root_dir "$runs" --labels_per_class "$labels" --learning_rate 0.2 --momentum 0.9 \
  --decay 0.0001 --epochs 300 --schedule 100 200 --gammas 0.1 0.1 "$@"
