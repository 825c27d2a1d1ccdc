"""The settings of the server."""

import re
from dataclasses import dataclass
from typing import Literal

from atlas_jax.core import bounds
from atlas_jax.core.errors import require

LOOPBACK = ("127.0.0.1", "::1", "localhost")
API_KEY = "ATLAS_JAX_API_KEY"  # the environment variable
_ORIGIN = re.compile(r"https?://[^/?#*\s]+")


@dataclass(frozen=True)
class ServeConfig:
    """What the server listens to, what it compiles, and what it takes from a client.

    host: address to listen on. Any but 127.0.0.1, ::1 and localhost needs an API key.
    port: 0 = any that is free.
    names: host names by which clients may call the server. () = those of this machine's own
        addresses 127.0.0.1 and ::1 where it listens there, else any.
    origins: pages of other hosts that may call the server from a browser (CORS), such as
        "https://app.example"; () = none may.
    api_key_file: file with the API key; "" = the environment variable ATLAS_JAX_API_KEY; if that is
        not set there is no key.
    ks: numbers of passages for which programs are compiled. Another number is read by the next
        larger program, with the passages beyond it masked. Numbers above that of the corpus become
        that number.
    batch_rows: numbers of questions for which programs are compiled; questions that wait are
        joined up to the largest.
    explain: whether a client may ask what each passage did.
    max_choices: answers that a question may choose from; 0 = none may.
    max_excluded: passages that a question may exclude.
    max_replaced: passages that a question may replace the text of; 0 = none may.
    earlier: earlier versions of the passages that lie in memory at a time, beside the newest, for
        questions with `as_of`; 0 = nobody may ask for one.
    decoding: methods of GenerationConfig that a client may ask for besides the configured one.
    queue: questions that may wait; more are refused at once, with status 429.
    max_questions: questions in one request.
    max_characters: of a question, a choice or an id.
    max_text: characters of a passage's new text.
    max_body: bytes of a request's body.
    deadline_seconds: a question that was not answered by then is given up, with status 504.
    body_seconds: a client has so long to send a request's head, and again for its body.
    drain_seconds: how long running requests may take after SIGTERM.
    connections: open connections; more are refused with status 503.
    log_questions: whether the log holds the text of questions.
    examples: jsonl file whose questions the explorer offers; "" = none.
    """

    host: str = "127.0.0.1"
    port: bounds.Port = 8080
    names: tuple[str, ...] = ()
    origins: tuple[str, ...] = ()
    api_key_file: str = ""
    ks: tuple[bounds.Passages, ...] = (5, 20)
    batch_rows: tuple[bounds.BatchSize, ...] = (1, 4)
    explain: bool = True
    max_choices: bounds.AtLeast0 = 0
    max_excluded: bounds.AtLeast0 = 20
    max_replaced: bounds.AtLeast0 = 4
    earlier: bounds.AtLeast0 = 2
    decoding: tuple[Literal["greedy", "beam", "sample"], ...] = ()
    queue: bounds.AtLeast1 = 64
    max_questions: bounds.AtLeast1 = 32
    max_characters: bounds.AtLeast1 = 2000
    max_text: bounds.AtLeast1 = 20_000
    max_body: bounds.AtLeast1 = 262_144
    deadline_seconds: bounds.Positive = 30.0
    body_seconds: bounds.Positive = 10.0
    drain_seconds: bounds.AtLeast1 = 30
    connections: bounds.AtLeast1 = 200
    log_questions: bool = False
    examples: str = ""

    def __post_init__(self) -> None:
        """Refuse values out of range, naming the binding."""
        bounds.check(self)
        require(bool(self.host), "ServeConfig.host", self.host, "an address, such as 127.0.0.1")
        for origin in self.origins:
            require(
                bool(_ORIGIN.fullmatch(origin)),
                "ServeConfig.origins",
                origin,
                "scheme, name and perhaps port, such as https://app.example",
            )
        for name in ("ks", "batch_rows"):
            value = getattr(self, name)
            require(bool(value), f"ServeConfig.{name}", value, "one number or more")
        require(
            self.max_choices != 1, "ServeConfig.max_choices", self.max_choices, "0, or 2 or more"
        )
        require(
            self.max_questions <= self.queue,
            "ServeConfig.max_questions",
            self.max_questions,
            f"at most ServeConfig.queue = {self.queue}",
        )

    @property
    def is_local(self) -> bool:
        """Whether only this machine can reach the server."""
        return self.host in LOOPBACK
