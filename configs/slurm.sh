#!/bin/bash
# LLaMA-7B on two machines with eight GPUs each: sbatch configs/slurm.sh   (from the repository's directory)
# 2 × 8 processes × 4 examples × 2 accumulation steps = 128 examples a step.
#SBATCH --job-name=alpaca
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=04:00:00
set -euo pipefail

first_node=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)

srun torchrun --nnodes="$SLURM_NNODES" --nproc_per_node=8 \
    --rdzv_id="$SLURM_JOB_ID" --rdzv_backend=c10d --rdzv_endpoint="$first_node:29500" \
    train.py \
    --model_name_or_path "${MODEL:?set MODEL to the LLaMA-7B directory}" \
    --data_path ./alpaca_data.json \
    --bf16 True \
    --output_dir "${OUTPUT:?set OUTPUT to a directory that all machines share}" \
    --num_train_epochs 3 \
    --per_device_train_batch_size 4 \
    --gradient_accumulation_steps 2 \
    --evaluation_strategy "no" \
    --save_strategy "steps" \
    --save_steps 2000 \
    --save_total_limit 1 \
    --learning_rate 2e-5 \
    --weight_decay 0. \
    --warmup_ratio 0.03 \
    --lr_scheduler_type "cosine" \
    --logging_steps 1 \
    --fsdp "full_shard auto_wrap" \
    --tf32 True
