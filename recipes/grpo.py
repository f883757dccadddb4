# /// script
# dependencies = ["optimal-sampling-trl", "peft", "math-verify"]
# ///
r"""GRPO with half of each group sampled from the mixture of the student and a teacher.

On the embedded pair (no download; makes the pair first):

    python recipes/pair.py --folder output/pair
    accelerate launch recipes/grpo.py --config recipes/grpo.yaml

On models of the Hub:

    accelerate launch recipes/grpo.py \
        --model_name_or_path Qwen/Qwen2.5-0.5B-Instruct --teacher Qwen/Qwen2.5-7B-Instruct \
        --dataset_name trl-lib/DeepMath-103K --reward_funcs trl.rewards.accuracy_reward \
        --per_device_train_batch_size 8 --num_generations 8 --max_completion_length 1024 \
        --learning_rate 1e-6 --bf16 --output_dir output/grpo

`--help` lists all flags: TRL's, the correction's and the generator's. They may stand in a YAML file, `--config`.
"""

from optimal_sampling_trl.cli.commands.grpo import JOB

if __name__ == "__main__":
    JOB.train()
