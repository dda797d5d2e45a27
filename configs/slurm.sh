#!/bin/bash
# LLaMA-7B on two machines with eight GPUs each: sbatch configs/slurm.sh   (from the repository's directory)
# 2 × 8 processes × 4 examples × 2 accumulation steps = 128 examples a step.
# Some five minutes before the time is up, Slurm sends SIGTERM to the processes of the step: the run saves a checkpoint,
# the job goes back into the queue, and the same command goes on from there. So does a preempted job.
#SBATCH --job-name=alpaca
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=04:00:00
#SBATCH --signal=TERM@300
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail

export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=280 # seconds that torchrun leaves for the checkpoint (torch 2.12; before, 30)
end=$(squeue --noheader --job="$SLURM_JOB_ID" --format=%e) # of the time that the job has
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
    --tf32 True \
    --resume_from_checkpoint last && exit

status=$?
if (($(date -d "$end" +%s) - $(date +%s) < 360)); then # Slurm may signal a minute early
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
