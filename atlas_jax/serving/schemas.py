"""What clients send and get, as types; the API's description is made from them."""

from typing import Annotated, Literal

from msgspec import Meta, Struct

Decoding = Literal["", "greedy", "beam", "sample"]


class _Request(Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    questions: Annotated[str | list[str], Meta(description="One question, or several.")]
    k: Annotated[
        int, Meta(ge=0, le=1 << 20, description="Passages for each question; 0 = as configured.")
    ] = 0
    exclude: Annotated[
        list[str], Meta(description="Ids of passages that may neither be found nor read.")
    ] = []
    replace: Annotated[
        dict[str, str],
        Meta(description="Texts by id of passages, for this request in place of their own."),
    ] = {}
    as_of: Annotated[
        str | int,
        Meta(
            description="Version of the passages, or a time in ISO 8601 (UTC unless it says "
            "otherwise); '' = the newest."
        ),
    ] = ""


class AnswersRequest(_Request, frozen=True, kw_only=True):
    """Questions to be answered."""

    explain: Annotated[
        bool, Meta(description="Also tell what each passage did for the answer.")
    ] = False
    choices: Annotated[
        list[str], Meta(description="Texts, the likeliest of which is the answer.")
    ] = []
    decoding: Annotated[Decoding, Meta(description="Method; '' = as configured.")] = ""
    stream: Annotated[
        bool,
        Meta(
            description="Answer with server-sent events: `passages` as soon as they are found, "
            "`tokens` with the text so far after each token, `answer`, `done`."
        ),
    ] = False


class RetrieveRequest(_Request, frozen=True, kw_only=True):
    """Questions whose passages are searched but not read."""


class GivenPassage(Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """A passage to be searched from now on."""

    id: str
    text: str
    title: str = ""
    section: str = ""


class PassagesRequest(Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """Changes of the corpus that become visible together, as one version."""

    passages: Annotated[
        list[GivenPassage],
        Meta(description="Added, or put in place of those that have their ids."),
    ] = []
    delete: Annotated[list[str], Meta(description="Ids of passages that go.")] = []


class PassageReply(Struct, kw_only=True, omit_defaults=True):
    """A passage that was found."""

    id: str
    title: str
    section: str
    text: str
    score: Annotated[float | None, Meta(description="Inner product of the two embeddings.")] = None
    attention: Annotated[
        float | None, Meta(description="What the reader drew from it (ADist's score).")
    ] = None
    alone: Annotated[
        float | None, Meta(description="Log-probability of the answer read from it alone.")
    ] = None
    left_out: Annotated[
        float | None, Meta(description="What the answer's log-probability loses without it.")
    ] = None


class Timings(Struct, kw_only=True):
    """Milliseconds of one question, and the batch that it was answered in."""

    waited: Annotated[float, Meta(description="In the queue.")]
    found: Annotated[float, Meta(description="From then until the passages were there.")]
    read: Annotated[float, Meta(description="From then until the answer was there.")]
    batch: Annotated[int, Meta(description="Questions that were answered together.")]
    rows: Annotated[int, Meta(description="Rows of the compiled program.")]


class IndexReply(Struct, kw_only=True):
    """The index that served."""

    version: int
    passages: int
    hash: str
    passages_version: Annotated[
        int, Meta(description="Version of the passages; 0 = as the store was built.")
    ] = 0


class AnswerReply(Struct, kw_only=True):
    """One question's answer."""

    question: str
    answer: str
    log_probability: float | None
    passages: list[PassageReply]
    timings: Timings
    index: Annotated[IndexReply | None, Meta(description="What was searched for it.")] = None


class FoundReply(Struct, kw_only=True):
    """One question's passages."""

    question: str
    passages: list[PassageReply]
    timings: Timings
    index: Annotated[IndexReply | None, Meta(description="What was searched for it.")] = None


class VersionReply(Struct, kw_only=True):
    """One version of the passages."""

    version: int
    time: Annotated[str | None, Meta(description="In UTC; null for version 0, as built.")]
    passages: int
    added: int
    replaced: int
    deleted: int


class VersionsReply(Struct, kw_only=True):
    """Versions of the passages, the newest first."""

    versions: list[VersionReply]
    serving: Annotated[int, Meta(description="The version that is searched without `as_of`.")]
    oldest: Annotated[int, Meta(description="The oldest version that was kept.")]
    earlier: Annotated[bool, Meta(description="Whether `as_of` may name another one.")]


class ChangedReply(Struct, kw_only=True):
    """What a change did; it is safe on the disk, and the next question sees it."""

    added: int
    replaced: int
    deleted: int
    index: IndexReply
    request_id: str


class AnswersReply(Struct, kw_only=True):
    """The answers, in the order of the questions."""

    answers: list[AnswerReply]
    index: IndexReply | None
    request_id: str


class RetrieveReply(Struct, kw_only=True):
    """The passages, in the order of the questions."""

    results: list[FoundReply]
    index: IndexReply | None
    request_id: str


class FoundEvent(Struct, kw_only=True):
    """Data of the event `passages`: those of the question of this number."""

    index: int
    question: str
    passages: list[PassageReply]


class TokensEvent(Struct, kw_only=True):
    """Data of the event `tokens`: the answer so far to the question of this number."""

    index: int
    text: str


class AnswerEvent(Struct, kw_only=True):
    """Data of the event `answer`: that to the question of this number."""

    index: int
    answer: AnswerReply
    served_by: IndexReply | None


class ModelReply(Struct, kw_only=True):
    """What is served, and what a client may ask for."""

    id: str
    task: str
    parameters: dict[str, int]
    k: int
    compiled_ks: list[int]
    batch_rows: list[int]
    explain: bool
    max_choices: int
    max_excluded: int
    max_replaced: int
    max_questions: int
    max_characters: int
    max_text: int
    decoding: list[str]
    index: IndexReply | None


class ModelsReply(Struct, kw_only=True):
    """All models that are served: one."""

    data: list[ModelReply]


class ExamplesReply(Struct, kw_only=True):
    """Questions to try, and some passages of the corpus."""

    questions: list[str]
    passages: list[PassageReply]


class StatusReply(Struct, kw_only=True):
    """The state of the server."""

    status: str


class Problem(Struct, kw_only=True):
    """What went wrong (RFC 9457)."""

    type: str
    title: str
    status: int
    detail: str
    request_id: str
