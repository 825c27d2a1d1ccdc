"""The rows of docs/reports/plan_table.md: which runs are planned on which slices."""

import dataclasses

from atlas_jax.training.chips import Slice, parse_slice

# As the page orders them. `Row` takes any recipe of `gin/runs/`; one more has to be named here.
PASSAGES, LARGE = 37_000_000, 400_000_000
ALL = ("train", "embed", "search", "start")
RECIPES = ("nq_full", "nq_64shot", "mlm_pretrain")
# base is not scanned as shipped, which suits a CPU; on a TPU it would compile for long.
SCANNED = ("ReaderConfig.scan_layers=True", "RetrieverConfig.scan_layers=True")


@dataclasses.dataclass(frozen=True)
class Row:
    """One run on one slice.

    Attributes:
      where: the slice.
      recipe: of `RECIPES`; it sets batch, k and lengths.
      mesh: data,fsdp,model; data x fsdp divides the recipe's batch / accumulate. Of several, one
        behind the other, the table has the recommended one.
      remat: rematerialisation policy of both models; empty: as shipped.
      accumulate: microbatches per step.
      index: type of the embeddings.
      passage_length: tokens of a passage in the index; 0: as shipped.
      sequence: with the rules of `gin/mesh/sequence.gin`.
      packed: rows that the passages of a question share in the reader; 0 = each has its own.
      tower: rows that they share in the passage tower.
      fused: with fused attention in reader and retriever.
      shared: with the rules of `gin/mesh/passages.gin`.
      batch: queries a step; 0: as shipped.
      passages: rows of the index.
      programs: that are planned; the first one is compiled on every mesh.
    """

    model: str
    recipe: str
    where: str
    mesh: str
    remat: str = ""
    accumulate: int = 1
    index: str = "bfloat16"
    passage_length: int = 0
    sequence: bool = False
    packed: int = 0
    tower: int = 0
    fused: bool = False
    shared: bool = False
    batch: int = 0
    passages: int = PASSAGES
    programs: tuple[str, ...] = ("train", "start")

    @property
    def name(self) -> str:
        """All of it but the mesh, and what is as usual."""
        more = [self.remat, f"accumulate={self.accumulate}" if self.accumulate > 1 else ""]
        more.append(self.index if self.index != "bfloat16" else "")
        more.append(f"passages={self.passage_length}" if self.passage_length else "")
        more += ["sequence"] if self.sequence else ["shared"] if self.shared else []
        more.append(f"batch={self.batch}" if self.batch else "")
        more.append(f"packed={self.packed}" if self.packed else "")
        more.append(f"tower={self.tower}" if self.tower else "")
        more.append("fused" if self.fused else "")
        more.append(f"{self.passages:,}" if self.passages != PASSAGES else "")
        return "/".join([self.model, self.recipe, self.where, *filter(None, more)])

    @property
    def files(self) -> list[str]:
        """The gin files."""
        rules = [f"mesh/{self.rules}.gin"] if self.rules != "standard" else []
        return [f"models/{self.model}.gin", f"runs/{self.recipe}.gin", *rules]

    @property
    def rules(self) -> str:
        """Whose rules split the arrays: a file of `gin/mesh/`, or the standard ones."""
        return "sequence" if self.sequence else "passages" if self.shared else "standard"

    @property
    def meshes(self) -> list[str]:
        """The meshes to try."""
        return self.mesh.split()

    @property
    def bindings(self) -> list[str]:
        """The gin bindings."""
        both = ("ReaderConfig", "RetrieverConfig")
        remat = [f"{name}.remat_policy={self.remat}" for name in both]
        fused = [f"{name}.attention=fused" for name in both]
        return [
            f"CorpusConfig.dtype={self.index}",
            *SCANNED,
            *(remat if self.remat else []),
            *([f"StepConfig.accumulate={self.accumulate}"] if self.accumulate > 1 else []),
            *([f"BATCH_SIZE={self.batch}"] if self.batch else []),
            *([f"PASSAGE_LENGTH={self.passage_length}"] if self.passage_length else []),
            *([f"StepConfig.packed_rows={self.packed}"] if self.packed else []),
            *([f"StepConfig.packed_passages={self.tower}"] if self.tower else []),
            *(fused if self.fused else []),
        ]

    @property
    def reading(self) -> str:
        """How the reader reads its passages."""
        rows = f"{self.packed} packed rows" if self.packed else "padded"
        rows += f", {self.tower} in the tower" if self.tower else ""
        rows += f", {self.batch} queries" if self.batch else ""
        return f"{rows}, fused" if self.fused else rows

    @property
    def slice(self) -> Slice:
        """The slice, taken apart."""
        return parse_slice(self.where)


# Those wanted most come first. One that fits takes the compiler minutes, one that does not less
# than one, and seconds where its arguments alone are too large.
ROW_LIST = (
    Row("xxl", "nq_full", "v5e-256", "1,64,4", shared=True),
    Row("xxl", "nq_full", "v5e-256", "1,128,2", shared=True, packed=16, tower=16, batch=128),
    Row("base", "nq_full", "v5p-128", "1,64,1", "full", 1, "int8", passages=LARGE, programs=ALL),
    Row("xxl", "nq_full", "v5e-256", "1,64,4"),
    Row("xxl", "nq_full", "v5e-32", "1,8,4", accumulate=8, sequence=True),
    Row("xxl", "nq_full", "v5e-32", "1,8,4", accumulate=8),
    Row("xxl", "nq_full", "v5e-16", "1,4,4", accumulate=16),
    Row("xxl", "nq_full", "v4-32", "1,4,4", accumulate=16),
    Row("xxl", "nq_full", "v4-16", "1,4,2", accumulate=16),
    Row("xxl", "nq_full", "v6e-16", "1,4,4", accumulate=16),
    Row("xxl", "nq_full", "v6e-8", "1,4,2", accumulate=16),
    Row("xxl", "nq_full", "v5p-8", "1,2,2", accumulate=32, sequence=True),
    Row("xxl", "nq_full", "v5p-8", "1,4,1", accumulate=16),
    Row("base", "nq_full", "v5e-16", "1,16,1", "full", 4),
    # 16 rows hold 40 passages of 170 tokens of 512 on average (docs/packing.md).
    Row("base", "nq_full", "v5e-16", "1,16,1", "full", 4, packed=16, fused=True),
    Row("base", "nq_full", "v5e-8", "1,8,1", "full", 8),
    Row("large", "nq_full", "v5e-16", "1,16,1", "full", 4),
    Row("large", "nq_full", "v5e-16", "1,16,1", "full", 4, packed=16, fused=True),
    Row("large", "nq_full", "v5e-8", "1,8,1", "full", 8),
    Row("xl", "nq_full", "v5e-16", "1,8,2", "full", 8),
    Row("xl", "nq_full", "v5e-8", "1,8,1", "full", 8),
    Row("base", "nq_full", "v4-16", "1,8,1", "full", 8),
    Row("base", "nq_full", "v4-8", "1,4,1", "full", 16),
    Row("large", "nq_full", "v4-16", "1,8,1", "full", 8),
    Row("large", "nq_full", "v4-8", "1,4,1", "full", 16),
    Row("xl", "nq_full", "v4-16", "1,8,1", "full", 8),
    Row("xl", "nq_full", "v4-8", "1,4,1", "full", 16),
    Row("base", "nq_full", "v6e-8", "1,8,1", "full", 8),
    Row("base", "nq_full", "v6e-4", "1,4,1", "full", 16),
    Row("large", "nq_full", "v6e-8", "1,8,1", "full", 8),
    Row("large", "nq_full", "v6e-4", "1,4,1", "full", 16),
    Row("xl", "nq_full", "v6e-8", "1,8,1", "full", 8),
    Row("xl", "nq_full", "v6e-4", "1,4,1", "full", 16),
    Row("base", "nq_full", "v5p-8", "1,4,1", "full", 16),
    Row("large", "nq_full", "v5p-8", "1,4,1", "full", 16),
    Row("xl", "nq_full", "v5p-8", "1,4,1", "full", 16),
    Row("xxl", "nq_full", "v5e-32", "1,8,4", accumulate=8, index="int8", sequence=True),
    Row("xxl", "nq_full", "v5e-16", "1,4,4", "", 16, "int8", 256, sequence=True),
    Row("base", "nq_full", "v5e-8", "1,8,1", "full", 8, "int8"),
    Row("base", "nq_full", "v4-8", "1,4,1", "full", 16, "int8"),
    Row("base", "nq_full", "v6e-4", "1,4,1", "full", 16, "int8"),
    Row("xxl", "nq_full", "v4-16", "1,4,2", "", 16, "int8", 256, sequence=True),
    Row("xxl", "nq_full", "v6e-8", "1,4,2", "", 16, "int8", 256, sequence=True),
    Row("xxl", "nq_full", "v4-32", "1,4,4", accumulate=16, index="int8"),
    Row("xxl", "nq_full", "v6e-16", "1,4,4", accumulate=16, index="int8"),
    Row("xxl", "nq_full", "v5p-8", "1,2,2", accumulate=32, index="int8", sequence=True),
    Row("base", "nq_full", "v5e-4", "1,4,1", "full", 16, "int8"),
    Row("base", "nq_full", "v6e-1", "1,1,1", "full", 64, "int8"),
    Row("base", "nq_full", "v5p-8", "1,4,1", "full", 16, "int8"),
    Row("large", "nq_full", "v5e-16", "1,16,1", "full", 4, "int8"),
    Row("large", "nq_full", "v5e-8", "1,8,1", "full", 8, "int8"),
    Row("large", "nq_full", "v5e-8", "1,4,2", "full", 16, "int8"),
    Row("large", "nq_full", "v4-16", "1,8,1", "full", 8, "int8"),
    Row("large", "nq_full", "v4-8", "1,4,1", "full", 16, "int8"),
    Row("large", "nq_full", "v4-8", "1,2,2", "full", 32, "int8"),
    Row("large", "nq_full", "v6e-8", "1,8,1", "full", 8, "int8"),
    Row("large", "nq_full", "v6e-4", "1,4,1", "full", 16, "int8"),
    Row("large", "nq_full", "v6e-1", "1,1,1", "full", 64, "int8"),
    Row("large", "nq_full", "v5p-8", "1,4,1", "full", 16, "int8"),
    Row("xl", "nq_full", "v5e-16", "1,8,2", "full", 8, "int8"),
    Row("xl", "nq_full", "v5e-8", "1,8,1", "full", 8, "int8"),
    Row("xl", "nq_full", "v4-16", "1,8,1", "full", 8, "int8"),
    Row("xl", "nq_full", "v4-8", "1,4,1", "full", 16, "int8"),
    Row("xl", "nq_full", "v6e-8", "1,8,1", "full", 8, "int8"),
    Row("xl", "nq_full", "v6e-4", "1,4,1", "full", 16, "int8"),
    Row("xl", "nq_full", "v5p-8", "1,4,1", "full", 16, "int8"),
    Row("base", "nq_64shot", "v5e-8", "1,8,1", "full", 8),
    Row("base", "nq_64shot", "v5e-4", "1,4,1", "full", 16),
    Row("large", "nq_64shot", "v5e-8", "1,4,2", "full", 16),
    Row("large", "nq_64shot", "v5e-16", "1,16,1", "full", 4),
    Row("xl", "nq_64shot", "v5e-16", "1,8,2", "full", 8),
    Row("xl", "nq_64shot", "v5e-8", "1,4,2", "full", 16),
    Row("xxl", "nq_64shot", "v5e-32", "1,8,4", accumulate=8, sequence=True),
    Row("xxl", "nq_64shot", "v5e-16", "1,4,4", accumulate=16, sequence=True),
    Row("base", "nq_64shot", "v4-8", "1,4,1", "full", 16),
    Row("large", "nq_64shot", "v4-8", "1,4,1", "full", 16),
    Row("xl", "nq_64shot", "v4-16", "1,8,1", "full", 8),
    Row("xl", "nq_64shot", "v4-8", "1,2,2", "full", 32),
    Row("xxl", "nq_64shot", "v4-32", "1,4,4", accumulate=16),
    Row("xxl", "nq_64shot", "v4-16", "1,4,2", accumulate=16, sequence=True),
    Row("base", "nq_64shot", "v6e-4", "1,4,1", "full", 16),
    Row("base", "nq_64shot", "v6e-1", "1,1,1", "full", 64),
    Row("large", "nq_64shot", "v6e-4", "1,4,1", "full", 16),
    Row("large", "nq_64shot", "v6e-1", "1,1,1", "full", 64),
    Row("xl", "nq_64shot", "v6e-8", "1,8,1", "full", 8),
    Row("xl", "nq_64shot", "v6e-4", "1,2,2", "full", 32),
    Row("xxl", "nq_64shot", "v6e-16", "1,4,4", accumulate=16),
    Row("xxl", "nq_64shot", "v6e-8", "1,4,2", accumulate=16, sequence=True),
    Row("base", "nq_64shot", "v5p-8", "1,4,1", "full", 16),
    Row("large", "nq_64shot", "v5p-8", "1,4,1", "full", 16),
    Row("xl", "nq_64shot", "v5p-8", "1,4,1", "full", 16),
    Row("xxl", "nq_64shot", "v5p-8", "1,2,2", accumulate=32, sequence=True),
    Row("large", "nq_64shot", "v5e-4", "1,2,2", "full", 32),
    Row("base", "nq_64shot", "v5e-8", "1,8,1", "full", 8, "int8"),
    Row("base", "nq_64shot", "v5e-4", "1,4,1", "full", 16, "int8"),
    Row("base", "nq_64shot", "v4-8", "1,4,1", "full", 16, "int8"),
    Row("base", "nq_64shot", "v6e-4", "1,4,1", "full", 16, "int8"),
    Row("base", "nq_64shot", "v6e-1", "1,1,1", "full", 64, "int8"),
    Row("base", "nq_64shot", "v5p-8", "1,4,1", "full", 16, "int8"),
    Row("large", "nq_64shot", "v5e-8", "1,8,1", "full", 8, "int8"),
    Row("large", "nq_64shot", "v5e-4", "1,2,2", "full", 32, "int8"),
    Row("large", "nq_64shot", "v4-8", "1,4,1", "full", 16, "int8"),
    Row("large", "nq_64shot", "v6e-4", "1,4,1", "full", 16, "int8"),
    Row("large", "nq_64shot", "v6e-1", "1,1,1", "full", 64, "int8"),
    Row("large", "nq_64shot", "v5p-8", "1,4,1", "full", 16, "int8"),
    Row("xl", "nq_64shot", "v5e-8", "1,4,2", "full", 16, "int8"),
    Row("xl", "nq_64shot", "v4-8", "1,2,2", "full", 32, "int8"),
    Row("xl", "nq_64shot", "v6e-4", "1,2,2", "full", 32, "int8"),
    Row("xl", "nq_64shot", "v5e-16", "1,8,2", "full", 8, "int8"),
    Row("xl", "nq_64shot", "v4-16", "1,8,1", "full", 8, "int8"),
    Row("xl", "nq_64shot", "v6e-8", "1,8,1", "full", 8, "int8"),
    Row("xl", "nq_64shot", "v5p-8", "1,4,1", "full", 16, "int8"),
    Row("xxl", "nq_64shot", "v5e-16", "1,4,4", accumulate=16, index="int8", sequence=True),
    Row("xxl", "nq_64shot", "v4-16", "1,4,2", accumulate=16, index="int8", sequence=True),
    Row("xxl", "nq_64shot", "v6e-8", "1,4,2", accumulate=16, index="int8", sequence=True),
    Row("xxl", "nq_64shot", "v5e-32", "1,8,4", accumulate=8, index="int8", sequence=True),
    Row("xxl", "nq_64shot", "v4-32", "1,4,4", accumulate=16, index="int8"),
    Row("xxl", "nq_64shot", "v6e-16", "1,4,4", accumulate=16, index="int8"),
    Row("xxl", "nq_64shot", "v5p-8", "1,2,2", accumulate=32, index="int8", sequence=True),
)
