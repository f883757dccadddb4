# /// script
# dependencies = ["optimal-sampling-trl", "peft"]
# ///
r"""On-policy distillation with rollouts sampled from the mixture of the student and its teacher.

On the embedded pair (no download; makes the pair first):

    python recipes/pair.py --folder output/pair
    accelerate launch recipes/distill.py --config recipes/distill.yaml

On models of the Hub:

    accelerate launch recipes/distill.py \
        --model_name_or_path Qwen/Qwen2.5-0.5B-Instruct --teacher Qwen/Qwen2.5-3B-Instruct \
        --dataset_name trl-lib/DeepMath-103K --per_device_train_batch_size 8 --max_completion_length 1024 \
        --learning_rate 1e-5 --bf16 --output_dir output/distill

`--loss dense` and `--loss sampled_token` need no teacher in the trainer, and take one whose vocabulary is padded to
another size (Qwen2.5-7B's). `--theta_fraction 1` is plain on-policy distillation.
`--help` lists all flags: TRL's, the correction's and the generator's. They may stand in a YAML file, `--config`.
"""

from optimal_sampling_trl.cli.commands.distill import JOB

if __name__ == "__main__":
    JOB.train()
