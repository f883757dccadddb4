"""Students that cannot be pushed into an engine are refused by name, before it starts."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("peft")

from helpers.models import make_model
from helpers.students import LAYERS, UNTIED, Make, adapter, load, lora, normalised, quantised, resized, untied
from optimal_sampling_trl.pairing import Source
from optimal_sampling_trl.trainers.engines.student import StudentWeights
from optimal_sampling_trl.trainers.engines.student_checks import check_student

TIES = "ties 'model.embed_tokens.weight' and 'lm_head.weight'"
APART = f"{TIES}, and the student's adapter .LORA. .*`ensure_weight_tying=True`"
SOFT = {"num_virtual_tokens": 4}
REFUSED: dict[str, tuple[Make, bool, str]] = {
    **{name: (make, True, APART) for name, make in UNTIED.items()},
    "untied": (untied, True, f"{TIES}, and the trained student has two weights there.*Save the untied student"),
    "resized": (resized, False, r"has shape \(312, 64\), there \(288, 64\).*Save it with `save_pretrained`"),
    "weight norm": (normalised, False, "up_proj.parametrizations.weight.original0' is none of the folder's"),
    "repeated layers": (lora(layer_replication=[(0, 2), (0, 2)]), False, "'model.layers.2.* is none of the folder's"),
    "activated": (lora(alora_invocation_tokens=[3]), False, r"\(LORA\) cannot be merged .* does not support merging"),
    "experts of adapters": (adapter("Poly", **LAYERS), False, r"\(POLY\) cannot be merged"),
    "prompt tuning": (adapter("PromptTuning", **SOFT), False, "of the kind PROMPT_TUNING"),
    "prefix tuning": (adapter("PrefixTuning", **SOFT), False, "of the kind PREFIX_TUNING"),
    "p-tuning": (adapter("PromptEncoder", **SOFT), False, "of the kind P_TUNING"),
    "a prompt in the layers": (adapter("AdaptionPrompt", adapter_len=4, adapter_layers=1), False, "ADAPTION_PROMPT"),
    "quantised": (quantised, False, "q_proj.weight' is of type torch.int8.*Load it unquantised"),
}


@pytest.mark.parametrize(("make", "tied", "words"), REFUSED.values(), ids=REFUSED)
def test_refused_by_name(tmp_path: Path, make: Make, tied: bool, words: str) -> None:
    source = Source(make_model(tmp_path, "llama", 1, tied=tied), "student")
    model = make(load(source.name))
    with pytest.raises(ValueError, match=f"(?s){words}"):
        check_student(model, source, StudentWeights(model))
