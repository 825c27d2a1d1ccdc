"""The options of a released Atlas run as gin bindings of this project.

An option without a counterpart stays in the file as a comment, with the reason or with what
to see in its place, so that nothing is lost in silence.
"""

from typing import Any

from atlas_jax.interop.meta_derived import DERIVED, Bindings, Options, derived, frozen, is_set

_SCHEDULES = {"linear": "linear", "cosine": "cosine", "fixed": "constant"}
_BOTH = ("reader", "retriever")

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
    "scheduler_steps": "the released trainer does not read it",
    "shard_grads": _DATA_PARALLEL,
    "shard_optim": f"{_DATA_PARALLEL}; several GPUs clip apart, see StepConfig.clip",
    "shuffle": "training data always are",
    "target_maxlength": "see DataConfig.target_length: targets have a length here",
    "task": "see TrainConfig.task and EvalConfig.task",
    "train_data": "see TrainConfig.file",
    "use_gradient_checkpoint_reader": _REMAT,
    "use_gradient_checkpoint_retriever": _REMAT,
    "write_results": "a run writes its predictions always; see EvalConfig.predictions",
}
# Bound with a difference that its remark tells.
_DIFFER = ("refresh_index", "mlm_mean_noise_span_length")


def to_gin(options: Options) -> str:
    """The text of a gin file: the released behaviour, bindings, every other option as a comment."""
    bindings: Bindings = {}
    for option, binding in _PLAIN.items():
        if is_set(options, option):
            bindings[binding] = options[option]
    bindings.update(_optimizers(options))
    found = {name: derived(name, options) for name in DERIVED if name in options}
    for one in found.values():
        bindings.update(one)
    used = {o for o in _PLAIN if is_set(options, o)} | set(_OPTIMIZER)
    used |= {name for name, one in found.items() if one}
    used |= {"scheduler"} if options.get("scheduler") in _SCHEDULES else set()
    lines = ["# Options of the Atlas run that this model comes from, as bindings.", ""]
    lines += ["include 'released.gin'", ""]
    lines += [f"{name} = {value!r}" for name, value in sorted(bindings.items())]
    lines += ["", "# Options without a binding, as they were:"]
    rest = sorted((o for o in options if o not in used), key=str)
    lines += [_comment(o, options[o]) for o in rest]
    lines += [_comment(o, options[o]) for o in _DIFFER if o in options and o not in rest]
    return "\n".join(lines) + "\n"


def _optimizers(options: Options) -> Bindings:
    """Both optimisers' bindings; the rates are `_PLAIN`.

    The released trainer makes schedules of `total_steps`, which counts forward passes, and moves
    them once an update: with accumulation they stop on the way, and so do these.
    """
    bindings: Bindings = {}
    total = options.get("total_steps")
    still = frozen(options).get("retriever/OptimizerConfig.frozen_steps", 0)
    for part in _BOTH:
        for option, field in _OPTIMIZER.items():
            if is_set(options, option) and not isinstance(options[option], str):
                bindings[f"{part}/OptimizerConfig.{field}"] = options[option]
        if options.get("scheduler") in _SCHEDULES:
            bindings[f"{part}/OptimizerConfig.schedule"] = _SCHEDULES[options["scheduler"]]
            if options["scheduler"] == "fixed":  # which begins its warm-up at 0
                bindings[f"{part}/OptimizerConfig.warmup_from"] = 0.0
        if isinstance(total, int):
            bindings[f"{part}/OptimizerConfig.total_steps"] = total
            warmup = f"{part}/OptimizerConfig.warmup_steps"
            if warmup in bindings:  # the launcher refuses a warm-up longer than the run
                left = max(total - (still if part == "retriever" else 0), 0)
                bindings[warmup] = min(bindings[warmup], left)
    return bindings


def _comment(option: Any, value: Any) -> str:
    remark = f"  ({_REMARKS[option]})" if option in _REMARKS else ""
    name = option if isinstance(option, str) and option.isidentifier() else ascii(option)
    return f"#   {name} = {ascii(value)}{remark}"
