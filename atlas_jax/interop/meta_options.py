"""The options of a released Atlas run as gin bindings of this project.

An option without a counterpart stays in the file as a comment, with the reason where there
is one to tell, so that nothing is lost in silence.
"""

from collections.abc import Callable, Mapping
from typing import Any

_LOSSES = {
    "ppmean": "pdist", "pdist": "pdist", "evalnormsum": "adist", "adist": "adist",
    "emdr": "emdr2", "loop": "loop",
}  # fmt: skip
_SCHEDULES = {"linear": "linear", "cosine": "cosine", "fixed": "constant"}
_DTYPES = {"bf16": "bfloat16", "fp32": "float32", "fp16": "bfloat16"}
_TASKS = ("base", "qa", "mlm")
_BOTH = ("reader", "retriever")
_TRAINS_BOTH = {"StepConfig.retriever_training": "joint"}

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
    "refresh_index": "RefreshPolicy.schedule",
    "generation_max_length": "GenerationConfig.max_length",
    "generation_length_penalty": "GenerationConfig.length_penalty",
    "qa_prompt_format": "QATask.query_format",
    "mlm_noise_density": "MLMTask.noise_density",
    "retriever_format": "StoreConfig.retriever_format",
}
_OPTIMIZER = {
    "warmup_steps": "warmup_steps",
    "weight_decay": "weight_decay",
    "clip": "clip_norm",
    "beta2": "b2",
    "epsilon": "epsilon",
}
_REMARKS = {
    "per_gpu_batch_size": "a batch is DataConfig.batch_size over all devices: multiply by the GPUs",
    "per_gpu_embedder_batch_size": "see CorpusConfig.embed_batch_size",
    "filtering_overretrieve_ratio": "not needed: a search takes as many more as a query excludes",
    "n_to_rerank_with_retrieve_with_rerank": "see StepConfig.rerank",
    "passages": "see CorpusConfig.passages",
    "load_index_path": "read it with `atlas-jax import_index`",
    "train_data": "see TrainConfig.file",
    "eval_data": "see EvalConfig.file",
    "checkpoint_dir": "see TrainConfig.model_dir",
    "scheduler": "the released linear and cosine schedules end at a tenth of the rate, these at 0",
}


def to_gin(options: Mapping[str, Any]) -> str:
    """The text of a gin file: bindings first, then every other option as a comment."""
    bindings: dict[str, Any] = {}
    for option, binding in _PLAIN.items():
        if _is_set(options, option):
            bindings[binding] = options[option]
    total = options.get("scheduler_steps") or options.get("total_steps")
    for part in _BOTH:
        for option, field in _OPTIMIZER.items():
            if _is_set(options, option):
                bindings[f"{part}/OptimizerConfig.{field}"] = options[option]
        if options.get("scheduler") in _SCHEDULES:
            bindings[f"{part}/OptimizerConfig.schedule"] = _SCHEDULES[options["scheduler"]]
        if total is not None:
            bindings[f"{part}/OptimizerConfig.total_steps"] = total
            warmup = f"{part}/OptimizerConfig.warmup_steps"
            if warmup in bindings:  # the launcher refuses a warm-up longer than the run
                bindings[warmup] = min(bindings[warmup], total)
    derived = {name: derive(options) for name, derive in _DERIVED.items() if name in options}
    for found in derived.values():
        bindings.update(found)
    used = {*_PLAIN, *_OPTIMIZER, "scheduler_steps", "total_steps"}
    used |= {name for name, found in derived.items() if found}
    lines = ["# Options of the Atlas run that this model comes from, as bindings.", ""]
    lines += [f"{name} = {value!r}" for name, value in sorted(bindings.items())]
    lines += ["", "# Options without a binding, as they were:"]
    for option, value in sorted(options.items()):
        if option not in used or (option in _PLAIN and not _is_set(options, option)):
            lines.append(_comment(option, value))
    lines += [_comment(o, options[o]) for o in ("scheduler", "scheduler_steps") if o in options]
    return "\n".join(lines) + "\n"


def _is_set(options: Mapping[str, Any], option: str) -> bool:
    value = options.get(option)
    return value is not None and not (option == "target_maxlength" and value < 1)


def _comment(option: str, value: Any) -> str:
    remark = f"  ({_REMARKS[option]})" if option in _REMARKS else ""
    return f"#   {option} = {ascii(value)}{remark}"


def _loss(options: Mapping[str, Any]) -> dict[str, Any]:
    loss = _LOSSES.get(str(options["gold_score_mode"]))
    if loss is None:
        return {}
    # The released code averages the divergence over passages, too.
    return {"DistillationConfig.loss": loss, "DistillationConfig.kl_reduction": "released"}


def _training(options: Mapping[str, Any]) -> dict[str, Any]:
    if options.get("query_side_retriever_training"):
        mode = "query_side"
    else:
        mode = "joint" if options.get("train_retriever") else "fixed"
    return {"StepConfig.retriever_training": mode}


def _rerank(options: Mapping[str, Any]) -> dict[str, Any]:
    if not options["retrieve_with_rerank"] or _training(options) != _TRAINS_BOTH:
        return {}  # the index is never stale then
    return {"StepConfig.rerank": options.get("n_to_rerank_with_retrieve_with_rerank", 128)}


def _frozen(options: Mapping[str, Any]) -> dict[str, Any]:
    steps = max(int(options["freeze_retriever_steps"]), 0)
    return {"retriever/OptimizerConfig.frozen_steps": steps} if steps else {}


def _dtype(options: Mapping[str, Any]) -> dict[str, Any]:
    dtype = _DTYPES.get(str(options["precision"]))
    names = ("ReaderConfig.dtype", "RetrieverConfig.dtype")
    return dict.fromkeys(names, dtype) if dtype else {}


def _dropout(options: Mapping[str, Any]) -> dict[str, Any]:
    names = ("ReaderConfig.dropout_rate", "RetrieverConfig.dropout_rate")
    return dict.fromkeys(names, options["dropout"])


def _reader_format(options: Mapping[str, Any]) -> dict[str, Any]:
    query, _, passage = str(options["encoder_format"]).partition("{query} ")
    # Query and passage are tokenised apart: only a format that begins with the query fits.
    return {} if query or not passage else {"StoreConfig.reader_format": passage}


def _generation(options: Mapping[str, Any]) -> dict[str, Any]:
    beams = int(options["generation_num_beams"])
    if beams == 1:
        return {"GenerationConfig.method": "greedy"}
    return {"GenerationConfig.method": "beam", "GenerationConfig.num_beams": beams}


def _task(options: Mapping[str, Any]) -> dict[str, Any]:
    task = options["task"]
    return {f"{name}.task": task for name in ("TrainConfig", "EvalConfig") if task in _TASKS}


_DERIVED: dict[str, Callable[[Mapping[str, Any]], dict[str, Any]]] = {
    "gold_score_mode": _loss,
    "train_retriever": _training,
    "query_side_retriever_training": _training,
    "retrieve_with_rerank": _rerank,
    "freeze_retriever_steps": _frozen,
    "precision": _dtype,
    "dropout": _dropout,
    "encoder_format": _reader_format,
    "generation_num_beams": _generation,
    "task": _task,
}
