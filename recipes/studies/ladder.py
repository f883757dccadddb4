# /// script
# dependencies = ["optimal-sampling-trl"]
# ///
"""Longer tasks of the embedded pair's kind, and models of every skill on them: teachers and students for the study.

    python recipes/studies/ladder.py --task sums-40 --folder output/ladder/sums-40

A task is `<name>-<digits>`; its prompt is that many digits and `=`. `sort` wants the digits sorted (`312=` → `123`),
`sums` the last digit of each running sum (`395=` → `327`), where a wrong one makes all later ones wrong; `many` takes
as a step the digit or the digit plus one, so that 2^digits answers are right. The completion has one token more than
the prompt has digits, EOS. The tokenizer is the embedded pair's.

A teacher and a student are trained on right answers; a checkpoint is kept where a model first reaches each share of
`TEACHERS` and `STUDENTS`, and the teacher's last one. `ladder.json` says how often each is right.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

sys.path.append(str(Path(__file__).parents[1]))  # the recipes that a study shares lie one folder up

from digit_tasks import END, Task
from pair import RECIPES, Recipe, build, make_tokenizer
from stack import Stack, sample_alone

TEACHERS, STUDENTS = (0.2, 0.5, 0.8), (0.0001, 0.02, 0.1, 0.4)
CONTEXT = 256
BATCH = 128
HELD_OUT = 512
LAST = "teacher"
"""The folder of the teacher at the end of its training; the others are `teacher-50`, ..., `student-40`."""


def log_right(logits: Tensor, ids: Tensor, length: int) -> Tensor:
    """The log-probability (...,) of the last `length` tokens of `ids` (..., L), given logits (..., length + 1, V)."""
    log_probabilities = torch.log_softmax(logits[..., :-1, :].float(), dim=-1)
    return log_probabilities.gather(-1, ids[..., -length:, None])[..., 0].sum(-1)


def measure(model: Any, task: Task, count: int = HELD_OUT) -> float:
    """The probability that a sample at temperature 1 is exactly right, a mean over held-out prompts.

    Exact where a prompt has one right completion: the product of its tokens' probabilities. Else one sample of each.
    """
    ids, length = task.sequences("test", count, seed=0).to(model.device), task.completion_length
    if task.name == "many":
        with torch.random.fork_rng():
            torch.manual_seed(0)
            drawn = sample_alone(Stack.of(model, 1), None, ids[None, :, :-length], length, END).ids[0]
        return float(task.right_tokens(ids, drawn).all(-1).float().mean())
    with torch.no_grad():
        logits = model(ids, logits_to_keep=length + 1).logits
    return float(log_right(logits, ids, length).exp().mean())


class Rung(NamedTuple):
    """The climb of a model: its shape, its steps, the shares at which it is kept."""

    role: str
    shape: Recipe
    steps: int
    shares: tuple[float, ...]
    every: int


def climb(task: Task, rung: Rung, folder: Path, device: str) -> dict[str, float]:
    """Train one model, save its checkpoints; how often each is right. The rate falls to 0 over the last 40 %."""
    tokenizer, model, length = make_tokenizer(), build(rung.shape).to(device), task.completion_length
    model.config.max_position_embeddings = CONTEXT
    tokenizer.model_max_length = CONTEXT
    kept: dict[str, float] = {}

    def keep(name: str, share: float) -> None:
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
        kept[name] = share

    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=0.0)
    source = task.sequences("train", rung.steps * BATCH, seed=-1).split(BATCH)
    shares = list(rung.shares)
    for step, batch in enumerate(bar := tqdm(source, desc=f"{task.name}-{task.digits} {rung.role}", mininterval=10)):
        late = (1 - step / rung.steps) / 0.4
        optimizer.param_groups[0]["lr"] = rung.shape.learning_rate * min(1.0, (step + 1) / rung.shape.warmup, late)
        ids = batch.to(device)
        logits = model(ids, logits_to_keep=length + 1).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, -length:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % rung.every == 0:
            share = measure(model, task)
            bar.set_postfix(loss=f"{loss.item():.3f}", right=f"{share:.2e}", refresh=False)
            while shares and share >= shares[0]:
                keep(f"{rung.role}-{100 * shares.pop(0):.0f}", share)
            if not shares and rung.role == "student":
                break
    if rung.role == LAST:
        keep(LAST, measure(model, task))
    return kept


def make_ladder(task: Task, folder: Path, device: str, teacher_steps: int, student_steps: int) -> dict[str, float]:
    """Both climbs, or what an earlier one wrote: how often each checkpoint is right, by its folder's name."""
    note = folder / "ladder.json"
    if not note.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        slow = RECIPES["student"]._replace(learning_rate=1e-3)
        rungs = (
            Rung("student", slow, student_steps, STUDENTS, every=5),
            Rung("teacher", RECIPES["teacher"], teacher_steps, TEACHERS, every=10),
        )
        kept = {name: share for rung in rungs for name, share in climb(task, rung, folder, device).items()}
        note.write_text(json.dumps(kept, indent=2))
    result: dict[str, float] = json.loads(note.read_text())
    return result


def main() -> None:
    """Make one task's ladder and print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", default="sums-40", help="<name>-<digits> (%(default)s)")
    parser.add_argument("--folder", type=Path, default=None, help="output/ladder/<task>")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="%(default)s")
    parser.add_argument("--teacher_steps", type=int, default=2000, help="at most (%(default)s)")
    parser.add_argument("--student_steps", type=int, default=3000, help="at most (%(default)s)")
    options = parser.parse_args()
    task, folder = Task.of(options.task), options.folder or Path("output/ladder") / options.task
    for name, share in make_ladder(task, folder, options.device, options.teacher_steps, options.student_steps).items():
        print(f"{folder / name}: right with probability {share:.4f}")


if __name__ == "__main__":
    main()
