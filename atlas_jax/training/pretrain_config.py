"""The settings of `pretrain_encoder`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from atlas_jax.core import bounds
from atlas_jax.core.deltas import DeltaConfig
from atlas_jax.core.devices import Devices
from atlas_jax.core.errors import one_of, require
from atlas_jax.core.jsonl import RowsConfig
from atlas_jax.encoders.masking import MaskingConfig
from atlas_jax.encoders.objectives import OBJECTIVES, PAIRS
from atlas_jax.training.config import CheckpointConfig, OptimizerConfig, ProfileConfig


@dataclass(frozen=True)
class EncoderTrainConfig:
    """One run of `pretrain_encoder`: texts, what is learnt of them, and how long.

    model_dir: as in TrainConfig; `final/` holds the encoder with its heads.
    file: passages in any layout of a corpus; a file, a folder or a pattern.
    total_steps: training ends after this step.
    encoder: model folder to begin with (an encoder, or a retriever of one tower); "" = from
        nothing, with the sizes that EncoderModelConfig is bound to. Heads that it lacks are drawn.
    encoder_base: where the base of a partial encoder lies now.
    tokenizer: `tokenizer.json`, needed for (and only for) an encoder from nothing.
    objectives: what is learnt, one or more of 'mlm' (predict masked tokens), 'nsp' (does B follow
        A? BERT), 'sop' (are A and B swapped? ALBERT), 'sbo' (predict masked spans from their
        boundaries; SpanBERT), 'unilm' (masked tokens, read from both sides, from one side, or as a
        target behind a source; UniLM), 'xlnet' (tokens in a random order, each from those before
        it; of an encoder 'xlnet') and 'electra' (which tokens did a small MLM replace?).
        ('mlm',) is RoBERTa's; ALBERT without its sentence order is that, too.
    batch_size: rows of a step.
    length: of a row in tokens, special ones included.
    short_rate: share of the chunks that are cut to a random shorter length.
    documents: 'passage' (each is one) or 'title' (neighbouring passages of one title are one).
    released_sop: a chunk of one sentence gets its B from another document, with label 1, as the
        released code has it; otherwise such a chunk is left out of 'sop'.
    train: patterns of the paths that train (`mlm/*`, `encoder/layers_5/*`); () = everything, or
        adapters or LoRA where there are some (encoder/DeltaConfig) and the heads of the objectives.
    generator_share: of 'electra': the generator's width as a share of the encoder's.
    replaced_weight: of 'electra': what the loss of replaced tokens counts against the MLM's.
    eval_file: further passages; their loss and accuracy are logged. "" = none.
    eval_rows: of the evaluation file, at most.
    eval_every: steps between evaluations; 0 = only after the last step.
    stop_at_jump: the run is stopped when the MLM loss stays so far above the lowest that it has
        been, in nats; 0 = never.
    patience: so many logged losses in a row have to be that high. A run is also stopped when every
        step between so many lines of metrics was skipped.
    seed: decides initial parameters, order, pairs, masks and dropout.
    log_every: steps between two lines of metrics.
    """

    model_dir: str
    file: str
    total_steps: bounds.AtLeast1
    encoder: str = ""
    encoder_base: str = ""
    tokenizer: str = ""
    objectives: Sequence[str] = ("mlm",)
    batch_size: bounds.BatchSize = 32
    length: bounds.Length = 128
    short_rate: bounds.Share = 0.1
    documents: Literal["passage", "title"] = "passage"
    released_sop: bool = False
    train: Sequence[str] = ()
    generator_share: bounds.Positive = 0.25
    replaced_weight: bounds.Positive = 50.0
    eval_file: str = ""
    eval_rows: bounds.AtLeast1 = 512
    eval_every: bounds.Every = 0
    stop_at_jump: bounds.NotNegative = 2.0
    patience: bounds.AtLeast1 = 3
    seed: bounds.Seed = 0
    log_every: bounds.AtLeast1 = 50

    def __post_init__(self) -> None:
        """Refuse values out of range; the error names the binding."""
        name = "EncoderTrainConfig"
        bounds.check(self)
        for binding in ("objectives", "train"):
            object.__setattr__(self, binding, tuple(getattr(self, binding)))
        require(bool(self.model_dir), f"{name}.model_dir", self.model_dir, "a directory")
        require(bool(self.file), f"{name}.file", self.file, "a file of passages")
        for one in self.objectives:
            require(one in OBJECTIVES, f"{name}.objectives", one, one_of(tuple(OBJECTIVES)))
        chosen = set(self.objectives)
        tokens = sorted(chosen & {"mlm", "electra", "unilm", "xlnet"})
        require(bool(tokens), f"{name}.objectives", self.objectives,
                "'mlm', 'unilm', 'xlnet' or 'electra' among them")  # fmt: skip
        require(len(tokens) == 1, f"{name}.objectives", self.objectives,
                "one of 'mlm', 'unilm', 'xlnet' and 'electra'; each predicts tokens")  # fmt: skip
        for one in sorted(chosen & {"unilm", "xlnet"}):
            require(len(chosen) == 1, f"{name}.objectives", self.objectives, f"{one!r} alone")
        require("sbo" not in chosen or "mlm" in chosen, f"{name}.objectives", self.objectives,
                "'mlm' beside 'sbo'")  # fmt: skip
        require(chosen & set(PAIRS) != set(PAIRS), f"{name}.objectives", self.objectives,
                "'nsp' or 'sop'")  # fmt: skip
        require(self.generator_share <= 1, f"{name}.generator_share", self.generator_share,
                "at most 1")  # fmt: skip
        require(bool(self.encoder) != bool(self.tokenizer), f"{name}.tokenizer", self.tokenizer,
                f"a tokenizer.json without {name}.encoder, and nothing with it")  # fmt: skip
        require(bool(self.encoder) or not self.encoder_base, f"{name}.encoder_base",
                self.encoder_base, f"nothing without {name}.encoder")  # fmt: skip

    @property
    def pairs(self) -> str:
        """'nsp', 'sop' or ''."""
        return next((one for one in self.objectives if one in PAIRS), "")


@dataclass(frozen=True, kw_only=True)
class PretrainRun:
    """The settings of `pretrain_encoder`.

    Attributes:
      encoder: fields of `EncoderModelConfig`; they override those of a model folder.
      delta: adapters or LoRA beside the encoder's parameters; what is written then stands on the
        folder that the run began with.
      text: all settings as a gin file, which is kept with the run.
    """

    SCOPE: ClassVar[str] = "encoder"

    train: EncoderTrainConfig
    encoder: Mapping[str, Any] = field(default_factory=dict)
    delta: DeltaConfig = DeltaConfig()
    masking: MaskingConfig = MaskingConfig()
    optimizer: OptimizerConfig = OptimizerConfig(learning_rate=1e-4)
    devices: Devices = Devices()
    checkpoints: CheckpointConfig = CheckpointConfig()
    profile: ProfileConfig = ProfileConfig()
    rows: RowsConfig = RowsConfig()
    text: str = ""

    def __post_init__(self) -> None:
        """Refuse an objective without its masks; the error names the binding."""
        require("sbo" not in self.train.objectives or self.masking.kind == "span",
                "MaskingConfig.kind", self.masking.kind,
                "'span' with the objective 'sbo', which predicts spans")  # fmt: skip
        kind = self.delta.kind
        require(kind in ("none", "adapter", "houlsby", "lora"), "encoder/DeltaConfig.kind", kind,
                "adapters or LoRA; a prompt or prefix stands before texts of a task")  # fmt: skip
        require(kind == "none" or bool(self.train.encoder), "EncoderTrainConfig.encoder", "",
                "a model folder on which the adapters or LoRA stand")  # fmt: skip
        require(kind == "none" or "electra" not in self.train.objectives,
                "encoder/DeltaConfig.kind", kind,
                "'none' with the objective 'electra', which trains two encoders")  # fmt: skip
        for binding in ("mask_rate", "random_rate"):
            told = getattr(self.masking, binding)
            require("xlnet" not in self.train.objectives or told == 0, f"MaskingConfig.{binding}",
                    told, "0 with the objective 'xlnet', which replaces no token")  # fmt: skip
