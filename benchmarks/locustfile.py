"""Those who ask a server of ours, as Locust's users; `benchmarks.serving` starts them.

    locust -f benchmarks/locustfile.py --headless --host=http://127.0.0.1:8080 --users=16 \
      --questions=questions.json --kind=answers --count=400 --out=figures.json

Each user asks the next question of the file, on a connection that it keeps. Without a rate it
asks again as soon as it has its answer (closed loop). With one, it waits for a random time first,
whether the server keeps up or not. With many users the questions then come as a Poisson process
(open loop). Locust's statistics have one entry for each status of the replies.
"""

import itertools
import json
from pathlib import Path
from typing import Any

import gevent
from locust import FastHttpUser, events, poisson, task
from locust.exception import StopUser

SHED = 429  # a refusal that is meant to be


@events.init_command_line_parser.add_listener
def add_options(parser: Any) -> None:
    """What Locust does not ask for."""
    parser.add_argument("--questions", help="json file with a list of questions")
    parser.add_argument("--kind", choices=["answers", "mixed"], default="answers",
                        help="'mixed': of fifty requests two ask for an answer, one of them as "
                        "events, the others for passages")  # fmt: skip
    parser.add_argument("--k", type=int, default=5, help="passages for each question")
    parser.add_argument("--count", type=int, default=0, help="requests; 0 = until --run-time")
    parser.add_argument("--rate", type=float, default=0.0,
                        help="requests a second of all users; 0 = closed loop")  # fmt: skip
    parser.add_argument("--out", help="json file for statistics and answers")


class Asker(FastHttpUser):
    """Asks for answers, or for passages."""

    connection_timeout = network_timeout = 120.0
    numbers = itertools.count()
    questions: list[str] = []
    answers: dict[str, str] = {}

    def on_start(self) -> None:
        """Users of an open loop begin at random times, too."""
        if self.told.rate:
            gevent.sleep(self.wait_time())

    @property
    def told(self) -> Any:
        """The options."""
        return self.environment.parsed_options

    @task
    def ask(self) -> None:
        """The next question."""
        told, number = self.told, next(self.numbers)
        if told.count and number >= told.count:
            raise StopUser
        question = self.questions[number % len(self.questions)]
        body: dict[str, Any] = {"questions": question, "k": told.k}
        path = "/v1/answers"
        if told.kind == "mixed":
            path = path if number % 50 < 2 else "/v1/retrieve"
            body |= {"stream": True} if number % 50 == 1 else {}
        with self.client.post(path, json=body, catch_response=True) as reply:
            reply.request_meta["name"] = str(reply.status_code)
            if reply.status_code == 200 and told.kind == "answers":
                self.answers[question] = reply.json()["answers"][0]["answer"]
            elif reply.status_code == SHED:
                reply.success()


@events.init.add_listener
def prepare(environment: Any, **_: Any) -> None:
    """Read the questions; end after so many requests."""
    told = environment.parsed_options
    Asker.questions = json.loads(Path(told.questions).read_text("utf-8"))
    if told.rate:
        Asker.wait_time = poisson(told.rate / told.num_users)
    replies = itertools.count(1)

    def replied(**_: Any) -> None:
        if next(replies) == told.count:
            gevent.spawn(environment.runner.quit)

    environment.events.request.add_listener(replied)


@events.test_stop.add_listener
def write(environment: Any, **_: Any) -> None:
    """Statistics by status, in seconds, and the answers."""
    statuses = {
        entry.name: {
            "requests": entry.num_requests,
            "a second": entry.total_rps,
            "p50": entry.get_response_time_percentile(0.5) / 1000,
            "p99": entry.get_response_time_percentile(0.99) / 1000,
        }
        for entry in environment.stats.entries.values()
    }
    found = {"statuses": statuses, "answers": Asker.answers}
    Path(environment.parsed_options.out).write_text(json.dumps(found), "utf-8")
