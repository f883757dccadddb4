"""The front door without a trainer: prompts in, texts with their records out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from transformers import PreTrainedModel

from .backends import Backend, make_backend
from .backends.vllm import GPU_MEMORY_UTILIZATION
from .mixture import SWAP, Mixture
from .options import check_flag, check_whole, shown, suggest_arguments
from .output import OptimalSamplingOutput
from .pairing import NamedWeights, Prompt, check_system_prompts, encode, is_chat, reads_two_prompts, warn_of_templates
from .pairing.rows import check_not_keyed, teacher_prompts_of
from .rollouts.dense import Dense, check_dense
from .rollouts.params import takes_sampling_params
from .rollouts.progress import Progress, is_watched
from .rollouts.request import Request, Sampling
from .rollouts.rollout import Rollout, warn_of_context

OLD_NAMES = {"model_base": "model_theta", "model_guide": "model_teacher"}
"""Arguments of an older version, and what they are called now."""
ELSEWHERE = {
    "teacher": "model_teacher=",
    "student": "model_theta=",
    "theta": "model_theta=",
    "method": "alpha_method=",
}
"""Words for arguments in other interfaces, and what is to be written here."""


class OptimalSamplingV1:
    """Samples completions from the mixture of a teacher and a student θ.

    Args:
        model_teacher: the teacher: a folder, a model id, (with the transformers backend) a loaded model, or
            `"student"`: the student itself, in memory once, with another prompt; `load_theta` then replaces both.
        model_theta: the student, likewise.
        alpha_method, fixed_alpha, alpha_max, epsilon, form, entropy_scale, swap_top_k: the mixture; see `Mixture`.
        alpha_min: likewise; None is 0.5 for the methods that balance the two models, so that samples lean towards the
            teacher, and 0 for `trust_region`, `fixed` and `top_k_swap`, whose budget, constant or K a floor would
            override.
        teacher_system_prompt: put before each prompt for the teacher.
        theta_system_prompt: put before each prompt for the student; where it differs from the teacher's, the two read
            different prompts.
        enable_chat_template: send texts through the chat template, as the message of a user.
        track_alpha_stats: fill `alpha_stats`.
        gpu_memory_utilization: share of a GPU's memory for vLLM, in (0, 1]; refused with `backend="transformers"`.
        backend: `"vllm"`, `"transformers"`, or `"auto"`: vLLM where it is installed and able.
        system_message: what is done with the system message of a chat that a system prompt is put before:
            `"refuse"` it, `"replace"` it, or `"append"` the system prompt to it.
        engine_arguments: go to the backend: all that vLLM's `LLM` takes, or `device`, `dtype`, `max_num_seqs`,
            `max_model_len`, `revision`, `attn_implementation`, `trust_remote_code` with transformers. `revision` is
            the teacher's. Pass a student of another revision as a folder.

    Raises:
        ValueError: on an unknown argument, a setting out of range or that the method does not read, or a pair that
            cannot be mixed.

    Example:
        ```python
        with OptimalSamplingV1(model_teacher="large", model_theta="small") as sampler:
            print(sampler.generate(["3 + 4 ="], max_tokens=8).generated_texts)
        ```
    """

    @suggest_arguments(**ELSEWHERE)
    def __init__(
        self,
        model_teacher: str | PreTrainedModel | None = None,
        model_theta: str | PreTrainedModel | None = None,
        alpha_method: str = Mixture.method,
        fixed_alpha: float = Mixture.fixed_alpha,
        alpha_min: float | None = None,
        alpha_max: float = Mixture.alpha_max,
        teacher_system_prompt: str | None = None,
        theta_system_prompt: str | None = None,
        enable_chat_template: bool = False,
        track_alpha_stats: bool = True,
        gpu_memory_utilization: float = GPU_MEMORY_UTILIZATION,
        epsilon: float = Mixture.epsilon,
        backend: str = "auto",
        form: str = Mixture.form,
        system_message: str = "refuse",
        entropy_scale: float = Mixture.entropy_scale,
        swap_top_k: int = Mixture.swap_top_k,
        **engine_arguments: Any,
    ) -> None:
        for old, new in OLD_NAMES.items():
            if old in engine_arguments:
                raise ValueError(f"`{old}=` is the name of an older version. Write `{new}=`.")
        if model_teacher is None or model_theta is None:
            missing = "model_teacher" if model_teacher is None else "model_theta"
            raise ValueError(
                f"OptimalSamplingV1: `{missing}` is missing; wanted a folder, a model id or a loaded model."
            )
        if alpha_min is None:
            alpha_min = 0.0 if alpha_method in ("trust_region", "fixed", SWAP) else 0.5
        self.mixture = Mixture(
            method=alpha_method,
            alpha_min=alpha_min,
            alpha_max=alpha_max,
            fixed_alpha=fixed_alpha,
            epsilon=epsilon,
            form=form,
            entropy_scale=entropy_scale,
            swap_top_k=swap_top_k,
        )
        self.mixture.check_read("OptimalSamplingV1")
        self.system_message = system_message
        self.teacher_system_prompt = teacher_system_prompt
        self.theta_system_prompt = theta_system_prompt
        check_system_prompts(self)
        check_flag("OptimalSamplingV1", "enable_chat_template", enable_chat_template)
        check_flag("OptimalSamplingV1", "track_alpha_stats", track_alpha_stats)
        self.enable_chat_template = enable_chat_template
        self.track_alpha_stats = track_alpha_stats
        self.model_teacher, self.model_theta = _name(model_teacher), _name(model_theta)
        self.engine_arguments = engine_arguments
        self._has_compared_templates = False
        self.backend: Backend = make_backend(
            backend,
            model_teacher,
            model_theta,
            two_prompts=reads_two_prompts(teacher_system_prompt, theta_system_prompt),
            gpu_memory_utilization=gpu_memory_utilization,
            **engine_arguments,
        )

    @takes_sampling_params
    @suggest_arguments(max_new_tokens="max_tokens=", num_return_sequences="n=")
    def generate(
        self,
        prompts: str | Sequence[Prompt],
        max_tokens: int = 100,
        temperature: float | Sequence[float] = 1.0,
        top_p: float = 1.0,
        top_k: int = -1,
        use_optimal_sampling: bool = True,
        n: int = 1,
        seed: int | None = None,
        mixture: Mixture | Sequence[Mixture] | None = None,
        *,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        stop: str | Sequence[str] = (),
        dense: Dense | None = None,
        use_tqdm: bool | None = None,
        teacher_prompts: str | Sequence[Prompt | None] | None = None,
    ) -> OptimalSamplingOutput:
        """Sample n completions of each prompt.

        Args:
            prompts: texts, lists of token ids or lists of chat messages; a single text is one prompt.
            max_tokens, top_p, top_k, min_p, repetition_penalty, stop: see `Sampling`. vLLM's `SamplingParams` may
                take the place of `max_tokens`, or be passed as `sampling_params`, instead of these, `n` and `seed`.
            temperature: one for all, or one for each prompt.
            use_optimal_sampling: False samples from the teacher alone.
            n: completions of each prompt.
            seed: the r-th sequence of the call uses `seed + r`, so that equal prompts get different completions.
            mixture: one for all prompts or one for each; by default the one that the constructor described.
            dense: dense records that each rollout shall carry, in its `dense`; None is none.
            use_tqdm: show a bar with tokens, tokens/s, the mean of α and the time left; with vLLM its own bar as well.
                None shows it in a terminal and in a notebook.
            teacher_prompts: what the teacher reads in place of each prompt, rendered with its own chat template; None
                among them is the prompt itself.

        Raises:
            ValueError: on an empty or unreadable prompt, a setting out of range or that its method does not read, or
                where mixtures, temperatures or teacher's prompts are given and differ in number from the prompts.
            UnsolvedError: naming each sequence for which a model returned NaN; its `rollouts` holds the others.
        """
        prompts = _prompt_list(prompts)
        n = check_whole("generate", "n", n, 1)
        if seed is not None:
            seed = check_whole("generate", "seed", seed)
        check_dense("generate", dense)
        _check_flags(use_optimal_sampling, use_tqdm)
        if mixture is not None and not use_optimal_sampling:
            raise ValueError(
                f"generate: `mixture` is {mixture!r} and `use_optimal_sampling` is False, the teacher alone; "
                "wanted one of the two. Drop the other."
            )
        default = self.mixture if use_optimal_sampling else Mixture.teacher_only()
        mixtures = _mixtures(default if mixture is None else mixture, len(prompts))
        temperatures = _one_each(temperature, int | float, len(prompts), "temperature")
        stop = (stop,) if isinstance(stop, str) else stop
        instead = teacher_prompts_of(teacher_prompts, len(prompts))
        pairs = [self.encode(prompt, index, instead[index]) for index, prompt in enumerate(prompts)]
        requests = [
            Request(
                *pairs[index],
                mixtures[index],
                Sampling(
                    max_tokens=max_tokens,
                    temperature=temperatures[index],
                    top_p=top_p,
                    top_k=top_k,
                    min_p=min_p,
                    repetition_penalty=repetition_penalty,
                    stop=tuple(stop) if isinstance(stop, Iterable) else stop,
                    seed=None if seed is None else seed + index * n + sample,
                ),
                dense,
            )
            for index in range(len(prompts))
            for sample in range(n)
        ]
        with Progress(len(requests), is_watched() if use_tqdm is None else use_tqdm) as progress:
            return self._output(self.backend.generate(requests, progress), max_tokens)

    def chat(self, messages: Sequence[Any], *positional: Any, **keywords: Any) -> OptimalSamplingOutput:
        """Sample n answers to each conversation, with vLLM's name for it.

        Args:
            messages: one conversation, a list of messages with `role` and `content`, or several.
            *positional, **keywords: as `generate`'s after its prompts.

        Raises:
            ValueError: as `generate`'s, and on what is no list of messages.
        """
        return self.generate(_conversations(messages), *positional, **keywords)

    def __repr__(self) -> str:
        names = f"teacher={self.model_teacher!r}, student={self.model_theta!r}"
        return f"OptimalSamplingV1({names}, backend={self.backend.name!r}, mixture={self.mixture})"

    def encode(
        self, prompt: Prompt, index: int = 0, teacher_prompt: Prompt | None = None
    ) -> tuple[list[int], list[int]]:
        """Encode one prompt for the teacher and for the student, after system prompts and chat template.

        Args:
            prompt: a text, token ids or messages.
            index: the prompt's number, for errors.
            teacher_prompt: what the teacher reads in its place, with its own tokenizer and chat template.

        Raises:
            ValueError: on what is no prompt, or a system prompt that has no place.
        """
        pair, settings = self.backend.pair, {"chat": self.enable_chat_template, "system_message": self.system_message}
        of_teacher: dict[str, Any] = settings | {"system_prompt": self.teacher_system_prompt, "role": "teacher"}
        of_theta: dict[str, Any] = settings | {"system_prompt": self.theta_system_prompt, "role": "student"}
        if teacher_prompt is not None:
            tokenizer = pair.teacher_tokenizer or pair.tokenizer
            teacher = encode(teacher_prompt, tokenizer, index=index, name="Teacher's prompt", **of_teacher)
            return teacher, encode(prompt, pair.tokenizer, index=index, **of_theta)
        is_rendered = self.enable_chat_template if isinstance(prompt, str) else is_chat(prompt)
        if is_rendered and not self._has_compared_templates:
            self._has_compared_templates = True
            warn_of_templates(pair.teacher, pair.teacher_template, pair.tokenizer)
        teacher = encode(prompt, pair.tokenizer, index=index, **of_teacher)
        if not reads_two_prompts(self.teacher_system_prompt, self.theta_system_prompt):
            return teacher, teacher
        return teacher, encode(prompt, pair.tokenizer, index=index, **of_theta)

    def _output(self, rollouts: list[Rollout], max_tokens: int) -> OptimalSamplingOutput:
        warn_of_context(rollouts, max_tokens, self.backend.pair.context)
        return OptimalSamplingOutput.of(rollouts, self.backend.tokenizer, self.track_alpha_stats)

    def load_theta(self, named_parameters: NamedWeights) -> None:
        """Replace the student's weights in place, all or none.

        Args:
            named_parameters: every weight under its name in transformers, as pairs or as a `state_dict`.

        Raises:
            ValueError: where weights are missing, unknown or of another shape, naming them.
        """
        self.backend.load_theta(dict(named_parameters))

    def sleep(self) -> None:
        """Free as much memory as the engine can; the teacher is kept."""
        self.backend.sleep()

    def wake_up(self) -> None:
        """Undo `sleep`."""
        self.backend.wake_up()

    def close(self) -> None:
        """Free both models. Doing so twice is fine."""
        self.backend.close()

    def __enter__(self) -> OptimalSamplingV1:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def _name(model: Any) -> str:
    return str(getattr(model, "name_or_path", model))


def _prompt_list(prompts: Any) -> list[Prompt]:
    """Return the prompts of a call; a single text is one."""
    check_not_keyed(
        "`prompts`",
        prompts,
        "texts, lists of token ids or lists of messages",
        'A slice of a data set is a dictionary of its columns: pass `data[:n]["prompt"]`.',
    )
    prompts = [prompts] if isinstance(prompts, str) else prompts
    if not isinstance(prompts, Iterable) or not (listed := list(prompts)):
        raise ValueError(
            f"`prompts` is {prompts!r}; wanted at least one text, list of token ids or list of messages. "
            "Skip the call where there is nothing to sample."
        )
    return listed


def _check_flags(use_optimal_sampling: Any, use_tqdm: Any) -> None:
    check_flag("generate", "use_optimal_sampling", use_optimal_sampling)
    if use_tqdm is not None:
        check_flag("generate", "use_tqdm", use_tqdm)


def _conversations(messages: Any) -> list[Any]:
    """Return the conversations of a call of `chat`; a list of messages is one."""
    wanted = "a list of messages, or several such lists"
    check_not_keyed("chat: `messages`", messages, wanted, "Put a single message into a list.")
    listed = list(messages) if isinstance(messages, Iterable) and not isinstance(messages, str) else []
    if is_chat(listed):
        return [listed]
    if listed and all(map(is_chat, listed)):
        return listed
    raise ValueError(
        f"chat: `messages` is {shown(listed or messages)}; wanted {wanted}. Pass texts and token ids to `generate`."
    )


def _mixtures(value: Any, count: int) -> list[Mixture]:
    """Return the mixture of each of `count` prompts; one with a field that its method does not read is refused."""
    mixtures = _one_each(value, Mixture, count, "mixture")
    for one in dict.fromkeys(mixtures):
        one.check_read("generate")
    return mixtures


def _one_each(value: Any, kind: Any, count: int, name: str) -> list[Any]:
    """Return `value` once for each of `count` prompts, or as it is where it holds one for each."""
    if isinstance(value, kind):
        return [value] * count
    try:
        values = [value] if isinstance(value, str | Mapping) else list(value)
    except TypeError:  # also of a tensor without dimensions, which has `__iter__`
        values = [value]
    wrong = [item for item in values if not isinstance(item, kind)]
    if wrong or len(values) != count:
        got = shown(wrong[0]) if wrong else f"{len(values)} of them"
        wanted = "Mixture" if kind is Mixture else "number"
        raise ValueError(f"`{name}`: got {got}; wanted one {wanted}, or one for each of the {count} prompts.")
    return values
