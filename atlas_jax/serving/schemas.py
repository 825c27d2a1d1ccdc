"""What clients send and get, as types; the API's description is made from them.

Nothing is turned into another type on the way: "5" is no number, and 1 is not true.
"""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

Decoding = Literal["", "greedy", "beam", "sample"]
# The first item at fault is told, however many there are.
_Texts = Annotated[list[str], Field(fail_fast=True)]
# A number that is left out where it is not known.
_Known = Annotated[float | None, Field(exclude_if=lambda value: value is None)]


class Sent(BaseModel):
    """What a client sends; a field that is unknown is refused."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")


class Told(BaseModel):
    """What a client gets; a number that JSON cannot hold is refused before it is sent."""

    model_config = ConfigDict(strict=True, frozen=True, allow_inf_nan=False)


class _Request(Sent):
    questions: Annotated[str | _Texts, Field(description="One question, or several.")]
    k: Annotated[
        int, Field(ge=0, le=1 << 20, description="Passages for each question; 0 = as configured.")
    ] = 0
    exclude: Annotated[
        _Texts, Field(description="Ids of passages that may neither be found nor read.")
    ] = []
    replace: Annotated[
        dict[str, str],
        Field(description="Texts by id of passages, for this request in place of their own."),
    ] = {}
    as_of: Annotated[
        str | int,
        Field(
            description="Version of the passages, or a time in ISO 8601 (UTC unless it says "
            "otherwise); '' = the newest."
        ),
    ] = ""


class AnswersRequest(_Request):
    """Questions to be answered."""

    explain: Annotated[
        bool, Field(description="Also tell what each passage did for the answer.")
    ] = False
    choices: Annotated[
        _Texts, Field(description="Texts, the likeliest of which is the answer.")
    ] = []
    decoding: Annotated[Decoding, Field(description="Method; '' = as configured.")] = ""
    stream: Annotated[
        bool,
        Field(
            description="Answer with server-sent events: `passages` as soon as they are found, "
            "`tokens` with the text so far after each token, `answer`, `done`."
        ),
    ] = False


class RetrieveRequest(_Request):
    """Questions whose passages are searched but not read."""


class GivenPassage(Sent):
    """A passage to be searched from now on."""

    id: str
    text: str
    title: str = ""
    section: str = ""


class PassagesRequest(Sent):
    """Changes of the corpus that become visible together, as one version."""

    passages: Annotated[
        list[GivenPassage],
        Field(description="Added, or put in place of those that have their ids.", fail_fast=True),
    ] = []
    delete: Annotated[_Texts, Field(description="Ids of passages that go.")] = []


class PassageReply(Told):
    """A passage that was found."""

    id: str
    title: str
    section: str
    text: str
    score: Annotated[_Known, Field(description="Inner product of the two embeddings.")] = None
    attention: Annotated[
        _Known, Field(description="What the reader drew from it (ADist's score).")
    ] = None
    alone: Annotated[
        _Known, Field(description="Log-probability of the answer read from it alone.")
    ] = None
    left_out: Annotated[
        _Known, Field(description="What the answer's log-probability loses without it.")
    ] = None


class Timings(Told):
    """Milliseconds of one question, and the batch that it was answered in."""

    waited: Annotated[float, Field(description="In the queue.")]
    found: Annotated[float, Field(description="From then until the passages were there.")]
    read: Annotated[float, Field(description="From then until the answer was there.")]
    batch: Annotated[int, Field(description="Questions that were answered together.")]
    rows: Annotated[int, Field(description="Rows of the compiled program.")]


class IndexReply(Told):
    """The index that served."""

    version: int
    passages: int
    hash: str
    passages_version: Annotated[
        int, Field(description="Version of the passages; 0 = as the store was built.")
    ] = 0


class AnswerReply(Told):
    """One question's answer."""

    question: str
    answer: str
    log_probability: float | None
    passages: list[PassageReply]
    timings: Timings
    index: Annotated[IndexReply | None, Field(description="What was searched for it.")] = None


class FoundReply(Told):
    """One question's passages."""

    question: str
    passages: list[PassageReply]
    timings: Timings
    index: Annotated[IndexReply | None, Field(description="What was searched for it.")] = None


class VersionReply(Told):
    """One version of the passages."""

    version: int
    time: Annotated[str | None, Field(description="In UTC; null for version 0, as built.")]
    passages: int
    added: int
    replaced: int
    deleted: int


class VersionsReply(Told):
    """Versions of the passages, the newest first."""

    versions: list[VersionReply]
    serving: Annotated[int, Field(description="The version that is searched without `as_of`.")]
    oldest: Annotated[int, Field(description="The oldest version that was kept.")]
    earlier: Annotated[bool, Field(description="Whether `as_of` may name another one.")]


class ChangedReply(Told):
    """What a change did; it is safe on the disk, and the next question sees it."""

    added: int
    replaced: int
    deleted: int
    index: IndexReply
    request_id: str


class AnswersReply(Told):
    """The answers, in the order of the questions."""

    answers: list[AnswerReply]
    index: IndexReply | None
    request_id: str


class RetrieveReply(Told):
    """The passages, in the order of the questions."""

    results: list[FoundReply]
    index: IndexReply | None
    request_id: str


class FoundEvent(Told):
    """Data of the event `passages`: those of the question of this number."""

    index: int
    question: str
    passages: list[PassageReply]


class TokensEvent(Told):
    """Data of the event `tokens`: the answer so far to the question of this number."""

    index: int
    text: str


class AnswerEvent(Told):
    """Data of the event `answer`: that to the question of this number."""

    index: int
    answer: AnswerReply
    served_by: IndexReply | None


class ModelReply(Told):
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


class ModelsReply(Told):
    """All models that are served: one."""

    data: list[ModelReply]


class ExamplesReply(Told):
    """Questions to try, and some passages of the corpus."""

    questions: list[str]
    passages: list[PassageReply]


class StatusReply(Told):
    """The state of the server."""

    status: str


class Problem(Told):
    """What went wrong (RFC 9457)."""

    type: str
    title: str
    status: int
    detail: str
    request_id: str
