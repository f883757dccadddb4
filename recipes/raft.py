# /// script
# dependencies = ["optimal-sampling-trl", "peft", "math-verify"]
# ///
r"""RAFT: the student imitates the completions of the mixture that the reward accepts, one for each prompt.

On the embedded pair (no download; makes the pair first):

    python recipes/pair.py --folder output/pair
    accelerate launch recipes/raft.py --config recipes/raft.yaml

On models of the Hub:

    accelerate launch recipes/raft.py \
        --model_name_or_path Qwen/Qwen2.5-0.5B-Instruct --teacher Qwen/Qwen2.5-7B-Instruct \
        --dataset_name trl-lib/DeepMath-103K --reward_funcs trl.rewards.accuracy_reward \
        --dense_coefficient 1.0 --dense_fade 0.5 \
        --per_device_train_batch_size 8 --gradient_accumulation_steps 8 --max_completion_length 1024 \
        --learning_rate 1e-5 --bf16 --output_dir output/raft

The dense term, which is gone by half of training, brings a quicker start: in a few hundred updates it carried a
student past its teacher on real text. Longer runs did without it (docs/trainers.md).

`--help` lists all flags: TRL's, those of `RAFTConfig` and the generator's. They may stand in a YAML file, `--config`.
"""

from optimal_sampling_trl.cli.commands.raft import JOB

if __name__ == "__main__":
    JOB.train()
