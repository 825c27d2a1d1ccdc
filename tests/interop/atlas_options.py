"""The options of the released Atlas code with their defaults, and a set of them.

Names and defaults are those of its src/options.py (commit 104af3b63aed); a checkpoint holds all
of them. `MMLU_FULL` is what its example script for MMLU's full training set gives.
"""

from typing import Any

INDEX: dict[str, Any] = {
    "load_index_path": None, "save_index_path": None, "save_index_n_shards": 128,
    "index_mode": "flat", "faiss_index_type": "flat", "faiss_code_size": None,
}  # fmt: skip
BASIC: dict[str, Any] = {
    "name": "experiment_name", "checkpoint_dir": "./checkpoint/", "model_path": "none",
    "per_gpu_batch_size": 1, "per_gpu_embedder_batch_size": 512, "local_rank": -1,
    "main_port": -1, "seed": 0, "log_freq": 100, "eval_freq": 500, "save_freq": 5000,
    "train_data": [], "eval_data": [], "write_results": False, "dont_write_passages": False,
}  # fmt: skip
OPTIMISER: dict[str, Any] = {
    "warmup_steps": 1000, "total_steps": 1000, "scheduler_steps": None, "accumulation_steps": 1,
    "dropout": 0.1, "lr": 1e-4, "lr_retriever": 1e-5, "clip": 1.0, "scheduler": "cosine",
    "weight_decay": 0.1, "save_optimizer": False, "epsilon": 1e-6, "alpha": 1.0, "beta2": 0.999,
    "refresh_index": "-1", "shuffle": False, "precision": "fp32", "shard_optim": False,
    "shard_grads": False, "use_gradient_checkpoint_reader": False,
    "use_gradient_checkpoint_retriever": False,
}  # fmt: skip
MODEL: dict[str, Any] = {
    "reader_model_type": "google/t5-xl-lm-adapt", "text_maxlength": 200,
    "target_maxlength": None, "n_context": 1, "passages": None, "max_passages": -1,
    "retriever_model_path": "facebook/contriever", "retrieve_only": False,
    "train_retriever": False, "use_file_passages": False, "retriever_n_context": 5,
    "gold_score_mode": "ppmean", "closed_book": False, "temperature_score": 0.01,
    "temperature_gold": 0.01, "compute_crossattention_stats": False,
    "filtering_overretrieve_ratio": 2, "freeze_retriever_steps": -1,
    "query_side_retriever_training": False, "retrieve_with_rerank": False,
    "n_to_rerank_with_retrieve_with_rerank": 128,
}  # fmt: skip
TASK: dict[str, Any] = {
    "decoder_format": None, "decoder_prompt_format": None,
    "encoder_format": "{query} title: {title} context: {text}",
    "retriever_format": "{title} {text}", "generation_max_length": 128,
    "generation_min_length": None, "generation_length_penalty": 1.0, "generation_num_beams": 1,
    "task": None, "mlm_noise_density": 0.15, "mlm_mean_noise_span_length": 3,
    "min_words_per_lm_instance": None, "min_lm_context_ratio": 0.5, "max_lm_context_ratio": 0.5,
    "qa_prompt_format": "question: {question} answer: <extra_id_0>",
    "multiple_choice_num_options": 4, "multiple_choice_train_permutations": "single",
    "multiple_choice_eval_permutations": "single",
}  # fmt: skip
DEFAULTS = {**INDEX, **BASIC, **OPTIMISER, **MODEL, **TASK}

MMLU_FULL: dict[str, Any] = {
    **DEFAULTS, "shuffle": True, "train_retriever": True, "gold_score_mode": "ppmean",
    "use_gradient_checkpoint_reader": True, "use_gradient_checkpoint_retriever": True,
    "shard_optim": True, "shard_grads": True, "temperature_gold": 0.1, "temperature_score": 0.1,
    "refresh_index": "100000000000", "target_maxlength": 16, "lr": 5e-5, "lr_retriever": 1e-5,
    "scheduler": "linear", "weight_decay": 0.01, "text_maxlength": 512, "n_context": 30,
    "retriever_n_context": 30, "eval_freq": 150, "log_freq": 4, "total_steps": 2000,
    "warmup_steps": 50, "save_freq": 10000000000, "write_results": True,
    "task": "multiple_choice", "multiple_choice_train_permutations": "all",
    "multiple_choice_eval_permutations": "cyclic", "query_side_retriever_training": True,
    "train_data": ["train.jsonl"], "eval_data": ["valid.jsonl", "test.jsonl"],
    "load_index_path": "indices/atlas/wiki/xl",
}  # fmt: skip
