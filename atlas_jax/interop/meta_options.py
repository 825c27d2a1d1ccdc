"""The options of a released Atlas run as gin bindings of this project.

An option without a counterpart stays in the file as a comment, with the reason or with what
to see in its place, so that nothing is lost in silence.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any

_LOSSES = {
    "ppmean": "pdist", "pdist": "pdist", "evalnormsum": "adist", "adist": "adist",
    "emdr": "emdr2", "loop": "loop",
}  # fmt: skip
_SCHEDULES = {"linear": "linear", "cosine": "cosine", "fixed": "constant"}
_DTYPES = {"bf16": "bfloat16", "fp32": "float32", "fp16": "bfloat16"}
_BOTH = ("reader", "retriever")
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

# Option -> the binding that takes its value as it is.
_PLAIN = {
    "n_context": "StepConfig.k",
    "text_maxlength": "StepConfig.reader_length",
    "target_maxlength": "DataConfig.target_length",
    "accumulation_steps": "StepConfig.accumulate",
    "temperature_gold": "DistillationConfig.gold_temperature",
    "temperature_score": "DistillationConfig.score_temperature",
    "lr": "reader/OptimizerConfig.learning_rate",
    "lr_retriever": "retriever/OptimizerConfig.learning_rate",
    "generation_length_penalty": "GenerationConfig.length_penalty",
    "qa_prompt_format": "QATask.query_format",
    "multiple_choice_train_permutations": "MultipleChoiceTask.train_orders",
    "multiple_choice_eval_permutations": "MultipleChoiceTask.eval_orders",
    "mlm_noise_density": "MLMTask.noise_density",
    "retriever_format": "StoreConfig.retriever_format",
    "seed": "TrainConfig.seed",
}
_OPTIMIZER = {
    "warmup_steps": "warmup_steps",
    "weight_decay": "weight_decay",
    "clip": "clip_norm",
    "beta2": "b2",
    "epsilon": "epsilon",
}
# Options that count what a run has done, in forward passes.
_COUNTS = {
    "total_steps": "TrainConfig.total_steps",
    "log_freq": "TrainConfig.log_every",
    "eval_freq": "TrainConfig.eval_every",
    "save_freq": "CheckpointConfig.every",
}
_DATA_PARALLEL = "state is sharded over the mesh: see gin/mesh/fsdp.gin"
_FAISS = "see CorpusConfig.searcher"
_LAUNCHER = "see the flags --coordinator_address, --process_count, --process_index"
_REMAT = "see the remat_policy of ReaderConfig and RetrieverConfig"
_SAVED_INDEX = "a run keeps the indices it makes in TrainConfig.model_dir"
_SHARES = "LMTask.min_prefix and max_prefix are shares between 0 and 1"
# What an option without a binding has to say; a bound one with an entry is told, too.
_REMARKS = {
    "alpha": "AdamW has none",
    "checkpoint_dir": "see TrainConfig.model_dir",
    "compute_crossattention_stats": "see EvalConfig.explain",
    "decoder_format": "see the target_format of the task",
    "decoder_prompt_format": "see the prompt_format of the task and DataConfig.prompt_length",
    "dont_write_passages": "predictions name their passages always",
    "encoder_format": "query and passage are tokenised apart: only a format that begins with "
    "'{query} ' fits",
    "eval_data": "see EvalConfig.file",
    "faiss_code_size": _FAISS,
    "faiss_index_type": _FAISS,
    "filtering_overretrieve_ratio": "not needed: a search takes as many more as a query excludes",
    "freeze_retriever_steps": "see frozen_steps of retriever/OptimizerConfig",
    "generation_min_length": "see GenerationConfig.min_length",
    "index_mode": _FAISS,
    "load_index_path": "read it with `atlas-jax import_index`",
    "local_rank": _LAUNCHER,
    "main_port": _LAUNCHER,
    "max_lm_context_ratio": _SHARES,
    "max_passages": "all of CorpusConfig.passages is searched",
    "min_lm_context_ratio": _SHARES,
    "min_words_per_lm_instance": "None left no text out; see min_words of MLMTask, LMTask, "
    "SectionTask",
    "mlm_mean_noise_span_length": "counts tokens there, words here",
    "model_path": "see ModelConfig.reader and ModelConfig.retriever",
    "multiple_choice_num_options": "a question has as many options as its line",
    "n_to_rerank_with_retrieve_with_rerank": "see StepConfig.rerank",
    "name": "see TrainConfig.model_dir",
    "passages": "see CorpusConfig.passages",
    "per_gpu_batch_size": "a batch is DataConfig.batch_size over all devices: multiply by the GPUs",
    "per_gpu_embedder_batch_size": "see CorpusConfig.embed_batch_size",
    "reader_model_type": "the model folder knows its sizes",
    "refresh_index": "bound for joint training alone: only then an index gets stale",
    "retrieve_only": "see EvalConfig.generate",
    "retrieve_with_rerank": "see StepConfig.rerank",
    "retriever_model_path": "see ModelConfig.retriever",
    "retriever_n_context": "the StepConfig.k passages that are read teach the retriever",
    "save_index_n_shards": _SAVED_INDEX,
    "save_index_path": _SAVED_INDEX,
    "save_optimizer": "checkpoints always have it",
    "scheduler": "the released linear and cosine schedules end at a tenth of the rate, these at 0",
    "scheduler_steps": "total_steps of both OptimizerConfigs; None is total_steps",
    "shard_grads": _DATA_PARALLEL,
    "shard_optim": _DATA_PARALLEL,
    "shuffle": "training data always are",
    "target_maxlength": "see DataConfig.target_length: targets have a length here",
    "task": "see TrainConfig.task and EvalConfig.task",
    "train_data": "see TrainConfig.file",
    "use_gradient_checkpoint_reader": _REMAT,
    "use_gradient_checkpoint_retriever": _REMAT,
    "write_results": "a run writes its predictions always; see EvalConfig.predictions",
}
# Bound with a difference that its remark tells.
_DIFFER = ("scheduler", "scheduler_steps", "refresh_index", "mlm_mean_noise_span_length")


Options = Mapping[str, Any]
Bindings = dict[str, Any]


def to_gin(options: Options) -> str:
    """The text of a gin file: bindings first, then every other option as a comment."""
    bindings: Bindings = {}
    for option, binding in _PLAIN.items():
        if _is_set(options, option):
            bindings[binding] = options[option]
    bindings.update(_optimizers(options))
    derived = {name: _derived(name, options) for name in _DERIVED if name in options}
    for found in derived.values():
        bindings.update(found)
    used = {o for o in _PLAIN if _is_set(options, o)} | {*_OPTIMIZER, "scheduler_steps"}
    used |= {name for name, found in derived.items() if found}
    lines = ["# Options of the Atlas run that this model comes from, as bindings.", ""]
    lines += [f"{name} = {value!r}" for name, value in sorted(bindings.items())]
    lines += ["", "# Options without a binding, as they were:"]
    rest = sorted((o for o in options if o not in used), key=str)
    lines += [_comment(o, options[o]) for o in rest]
    lines += [_comment(o, options[o]) for o in _DIFFER if o in options and o not in rest]
    return "\n".join(lines) + "\n"


def _optimizers(options: Options) -> Bindings:
    """Both optimisers' bindings; the rates are `_PLAIN`."""
    bindings: Bindings = {}
    total = options.get("scheduler_steps") or options.get("total_steps")
    frozen = _frozen(options).get("retriever/OptimizerConfig.frozen_steps", 0)
    for part in _BOTH:
        for option, field in _OPTIMIZER.items():
            if _is_set(options, option) and not isinstance(options[option], str):
                bindings[f"{part}/OptimizerConfig.{field}"] = options[option]
        if options.get("scheduler") in _SCHEDULES:
            bindings[f"{part}/OptimizerConfig.schedule"] = _SCHEDULES[options["scheduler"]]
        if isinstance(total, int):
            bindings[f"{part}/OptimizerConfig.total_steps"] = total
            warmup = f"{part}/OptimizerConfig.warmup_steps"
            if warmup in bindings:  # the launcher refuses a warm-up longer than the run
                left = max(total - (frozen if part == "retriever" else 0), 0)
                bindings[warmup] = min(bindings[warmup], left)
    return bindings


def _is_set(options: Options, option: str) -> bool:
    value = options.get(option)
    if not isinstance(value, bool | int | float | str):
        return False
    return not (option == "target_maxlength" and (isinstance(value, str) or value < 1))


def _comment(option: Any, value: Any) -> str:
    remark = f"  ({_REMARKS[option]})" if option in _REMARKS else ""
    name = option if isinstance(option, str) and option.isidentifier() else ascii(option)
    return f"#   {name} = {ascii(value)}{remark}"


# --- options whose value is not taken as it is -------------------------------------------


def _derived(name: str, options: Options) -> Bindings:
    try:
        return _DERIVED[name](options)
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
    if loss is None:
        return {}
    # The released code averages the divergence over passages, too.
    return {"DistillationConfig.loss": loss, "DistillationConfig.kl_reduction": "released"}


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


def _frozen(options: Options) -> Bindings:
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
    if _is_set(options, "target_maxlength"):  # where it is cut there
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


_DERIVED: dict[str, Callable[[Options], Bindings]] = {
    "gold_score_mode": _loss,
    "train_retriever": _training,
    "query_side_retriever_training": _training,
    "use_file_passages": _passages,
    "closed_book": _passages,
    "refresh_index": _refresh,
    "retrieve_with_rerank": _rerank,
    "freeze_retriever_steps": _frozen,
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
