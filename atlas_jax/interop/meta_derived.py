"""Options of a released Atlas run that a binding takes in another form, or only in some runs."""

import re
from collections.abc import Callable, Mapping
from typing import Any

Options = Mapping[str, Any]
Bindings = dict[str, Any]

_LOSSES = {
    "ppmean": "pdist", "pdist": "pdist", "evalnormsum": "adist", "adist": "adist",
    "emdr": "emdr2", "loop": "loop",
}  # fmt: skip
_DTYPES = {"bf16": "bfloat16", "fp32": "float32", "fp16": "bfloat16"}
_ASKED = "question: {%s} answer: <extra_id_0>"
# Task -> its configurable, the query and the target that Atlas gives it in our fields' names.
# "" where no format of ours is a counterpart.
_TASKS = {
    "base": ("BaseTask", "{query}", "{target}"),
    "qa": ("QATask", _ASKED % "question", "<extra_id_0> {answer}"),
    "fever": ("FeverTask", _ASKED % "claim", "<extra_id_0> {answer}"),
    "kilt": ("KILTTask", _ASKED % "input", "<extra_id_0> {answer}"),
    "multiple_choice": ("MultipleChoiceTask", "", "<extra_id_0> {letter}"),
    "lm": ("LMTask", "", "{text}"),
    "section": ("SectionTask", "", "{text}"),
    "mlm": ("MLMTask", "", ""),
}
_LEAST_WORDS = {"MLMTask": 2, "LMTask": 2, "SectionTask": 1}
# Options that count what a run has done, in forward passes.
_COUNTS = {
    "total_steps": "TrainConfig.total_steps",
    "log_freq": "TrainConfig.log_every",
    "eval_freq": "TrainConfig.eval_every",
    "save_freq": "CheckpointConfig.every",
}


def is_set(options: Options, option: str) -> bool:
    """Whether the option has a value that a binding may have."""
    value = options.get(option)
    if not isinstance(value, bool | int | float | str):
        return False
    return not (option == "target_maxlength" and (isinstance(value, str) or value < 1))


def derived(name: str, options: Options) -> Bindings:
    """The bindings that follow from one of `DERIVED`; none from a value that is not understood."""
    try:
        return DERIVED[name](options)
    except (TypeError, ValueError):  # of another kind than that option: it stays a comment
        return {}


def _steps(options: Options, count: Any) -> int:
    """A count of forward passes as one of updates, of which ours has one a step."""
    return -(-int(count) // max(int(options.get("accumulation_steps") or 1), 1))


def _count(option: str) -> Callable[[Options], Bindings]:
    def derive(options: Options) -> Bindings:
        steps = _steps(options, options[option])
        return {_COUNTS[option]: steps} if steps > 0 else {}

    return derive


def _loss(options: Options) -> Bindings:
    loss = _LOSSES.get(str(options["gold_score_mode"]))
    return {} if loss is None else {"DistillationConfig.loss": loss}


def _training(options: Options) -> Bindings:
    return {"StepConfig.retriever_training": _mode(options)}


def _mode(options: Options) -> str:
    """How the retriever was trained; without an index it was not, whatever else is said."""
    if _source(options) != "index" or not options.get("train_retriever"):
        return "fixed"
    return "query_side" if options.get("query_side_retriever_training") else "joint"


def _passages(options: Options) -> Bindings:
    return dict.fromkeys(("TrainConfig.passages", "EvalConfig.passages"), _source(options))


def _source(options: Options) -> str:
    if options.get("closed_book"):
        return "none"
    return "file" if options.get("use_file_passages") else "index"


def _refresh(options: Options) -> Bindings:
    """The schedule, where the index gets stale; a run file's own is switched off elsewhere."""
    name, schedule = "RefreshPolicy.schedule", str(options["refresh_index"])
    if schedule == "-1" or _mode(options) != "joint":
        return {name: "-1"}
    return {name: re.sub(r"\d+", lambda found: str(_steps(options, found[0])), schedule)}


def _rerank(options: Options) -> Bindings:
    searched = int(options.get("n_to_rerank_with_retrieve_with_rerank", 128))
    if not options["retrieve_with_rerank"] or _mode(options) != "joint":
        return {}  # the index is never stale then
    return {"StepConfig.rerank": searched} if searched > int(options.get("n_context", 1)) else {}


def frozen(options: Options) -> Bindings:
    """The first steps, in which the retriever stays as it is."""
    steps = _steps(options, max(int(options.get("freeze_retriever_steps") or 0), 0))
    return {"retriever/OptimizerConfig.frozen_steps": steps} if steps else {}


def _dtype(options: Options) -> Bindings:
    dtype = _DTYPES.get(str(options["precision"]))
    names = ("ReaderConfig.dtype", "RetrieverConfig.dtype")
    return dict.fromkeys(names, dtype) if dtype else {}


def _dropout(options: Options) -> Bindings:
    names = ("ReaderConfig.dropout_rate", "RetrieverConfig.dropout_rate")
    return dict.fromkeys(names, float(options["dropout"]))


def _remat(part: str) -> Callable[[Options], Bindings]:
    def derive(options: Options) -> Bindings:
        asked = options[f"use_gradient_checkpoint_{part.lower()}"]
        return {f"{part}Config.remat_policy": "full"} if asked else {}

    return derive


def _reader_format(options: Options) -> Bindings:
    query, _, passage = str(options["encoder_format"]).partition("{query} ")
    # Query and passage are tokenised apart: only a format that begins with the query fits.
    return {} if query or not passage else {"StoreConfig.reader_format": passage}


def _generation(options: Options) -> Bindings:
    beams = int(options["generation_num_beams"])
    if beams == 1:
        return {"GenerationConfig.method": "greedy"}
    return {"GenerationConfig.method": "beam", "GenerationConfig.num_beams": beams}


def _length(end: str, least: int) -> Callable[[Options], Bindings]:
    def derive(options: Options) -> Bindings:
        # The released code's lengths count the token that every output begins with.
        return {f"GenerationConfig.{end}": max(int(options[f"generation_{end}"]) - 1, least)}

    return derive


def _retrieve_only(options: Options) -> Bindings:
    return {"EvalConfig.generate": False} if options["retrieve_only"] else {}


def _task(options: Options) -> Bindings:
    task = options["task"]
    return {f"{name}.task": task for name in ("TrainConfig", "EvalConfig") if task in _TASKS}


def _prompt(options: Options) -> Bindings:
    """What the decoder begins with; its `{query}` is the query as the task formats it."""
    config, query, _ = _TASKS.get(str(options.get("task")), ("", "", ""))
    if options["decoder_prompt_format"] is None or not query:
        return {}
    if config == "QATask":
        query = str(options.get("qa_prompt_format", query))
    prompt = str(options["decoder_prompt_format"]).replace("{query}", query)
    bindings: Bindings = {f"{config}.prompt_format": prompt}
    if is_set(options, "target_maxlength"):  # where it is cut there
        bindings["DataConfig.prompt_length"] = options["target_maxlength"]
    return bindings


def _target(options: Options) -> Bindings:
    config, _, target = _TASKS.get(str(options.get("task")), ("", "", ""))
    if options["decoder_format"] is None or not target:
        return {}
    written = str(options["decoder_format"]).replace("{target}", target)
    return {f"{config}.target_format": written}


def _shares(options: Options) -> Bindings:
    low = float(options.get("min_lm_context_ratio", 0.5))
    high = float(options.get("max_lm_context_ratio", 0.5))
    return {"LMTask.min_prefix": low, "LMTask.max_prefix": high} if 0 < low <= high < 1 else {}


def _min_words(options: Options) -> Bindings:
    words = options["min_words_per_lm_instance"]
    if words is None:
        return {}
    return {f"{task}.min_words": max(int(words), least) for task, least in _LEAST_WORDS.items()}


def _span_length(options: Options) -> Bindings:
    return {"MLMTask.mean_span_words": max(float(options["mlm_mean_noise_span_length"]), 1.0)}


DERIVED: dict[str, Callable[[Options], Bindings]] = {
    "gold_score_mode": _loss,
    "train_retriever": _training,
    "query_side_retriever_training": _training,
    "use_file_passages": _passages,
    "closed_book": _passages,
    "refresh_index": _refresh,
    "retrieve_with_rerank": _rerank,
    "freeze_retriever_steps": frozen,
    "precision": _dtype,
    "dropout": _dropout,
    "use_gradient_checkpoint_reader": _remat("Reader"),
    "use_gradient_checkpoint_retriever": _remat("Retriever"),
    "encoder_format": _reader_format,
    "decoder_format": _target,
    "decoder_prompt_format": _prompt,
    "generation_num_beams": _generation,
    "generation_max_length": _length("max_length", 1),
    "generation_min_length": _length("min_length", 0),
    "retrieve_only": _retrieve_only,
    "task": _task,
    "min_lm_context_ratio": _shares,
    "max_lm_context_ratio": _shares,
    "min_words_per_lm_instance": _min_words,
    "mlm_mean_noise_span_length": _span_length,
    **{option: _count(option) for option in _COUNTS},
}
