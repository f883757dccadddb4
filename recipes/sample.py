# /// script
# dependencies = ["optimal-sampling-trl"]
# ///
r"""Offline sampling: completions of a data set's prompts from the mixture, with their records, into Parquet shards.

On the embedded pair (no download; makes the pair first):

    python recipes/pair.py --folder output/pair
    python recipes/sample.py --config recipes/sample.yaml

On models of the Hub, with vLLM on a GPU:

    python recipes/sample.py \
        --model_name_or_path Qwen/Qwen2.5-0.5B-Instruct --teacher Qwen/Qwen2.5-7B-Instruct \
        --dataset_name trl-lib/DeepMath-103K --max_samples 10000 --n 4 --max_tokens 1024 \
        --engine_arguments '{"dtype": "bfloat16"}' --output_dir output/rollouts

A run that was stopped, killed or out of disk goes on when the same command is given again. `sft.py` trains on what
this writes; `optimal_sampling_trl.load_rollouts` and `datasets.load_dataset` read it. `--help` lists all flags, which
may stand in a YAML file, `--config`. `--no_use_tqdm` is quiet.
"""

import sys

from optimal_sampling_trl.cli.main import main

if __name__ == "__main__":
    main(["sample", *sys.argv[1:]])
