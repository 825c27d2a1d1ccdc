"""Rules for passages: one machine and Beam (skipped without the extra [beam]) write the same."""

import importlib.util
import json
from pathlib import Path

import pytest

from atlas_jax import prepare as entry
from atlas_jax.datasets.passage_rules import PassagesConfig, cleaned, without_duplicates
from tests.training.runs import read_lines

needs_beam = pytest.mark.skipif(
    importlib.util.find_spec("apache_beam") is None, reason="needs the extra [beam]"
)

LONG = "Which river, in the NORTH of Arvo, is the longest? Sann"


def page(number: str, title: str, *text: str) -> dict:
    return {"wikipedia_id": number, "wikipedia_title": title, "text": list(text)}


PAGES = [
    page("9", "Arvo", "Arvo", " ".join(map(str, range(150)))),
    page("10", "Arvo", "Arvo", " ".join(map(str, range(100)))),
    page("3", "Quiz", "Section::::A.", LONG, "x\u00ad \x01y"),
    page("4", "arvo", "one"),
    page("5", "quiz", "Lost"),
    page("05", "Quiz", "lost"),
]
RULES = [
    "--gin.PassagesConfig.clean=True",
    "--gin.PassagesConfig.deduplicate=True",
]


def passages_of(folder: Path) -> list[dict]:
    files = sorted(folder.glob("passages*.jsonl"))
    return [row for file in files for row in read_lines(file)]


def write_pages(folder: Path, *more: str) -> list[str]:
    folder.mkdir()
    lines = [json.dumps(page) for page in PAGES]
    (folder / "kilt_knowledgesource.json").write_text("\n".join([*lines, *more]) + "\n")
    question = {"id": "q1", "question": "Which river in the north of Arvo is the longest?",
                "answers": ["Sann"]}  # fmt: skip
    (folder / "test.jsonl").write_text(json.dumps(question) + "\n")
    return ["kilt_wikipedia", f"--source={folder}", "--sample",
            f"--gin.LeakConfig.files={folder}/test.jsonl", *RULES]  # fmt: skip


def test_cleaning_keeps_what_is_seen():
    row = {"id": "1", "title": " A\tb", "text": "e\u0301t\u00ade \x00\n of  it"}
    assert cleaned(row, PassagesConfig()) == row
    assert cleaned(row, PassagesConfig(min_words=4)) == row  # the null is a word
    assert cleaned(row, PassagesConfig(min_words=5)) is None
    assert cleaned(row, PassagesConfig(clean=True)) == {
        "id": "1", "title": "A b", "text": "\u00e9te of it"
    }  # fmt: skip
    assert cleaned({"id": "1", "text": "\x00"}, PassagesConfig(clean=True)) is None


def test_of_duplicates_the_smallest_id_stays():
    rows = [("10", "T", "A  b"), ("9", "t", "a B"), ("1", "U", "a b"), ("9", "t", "a B")]
    lines = [json.dumps({"id": i, "title": t, "text": x}) for i, t, x in rows]
    assert list(without_duplicates(lambda: lines)) == [lines[1], lines[2]]
    assert list(without_duplicates(list)) == []


def test_one_machine_applies_the_rules_and_makes_anew_by_others(tmp_path, capsys):
    command = [*write_pages(tmp_path / "in"), f"--out={tmp_path}/out"]
    assert entry.main(command) == 0
    rows = passages_of(tmp_path / "out")
    assert [row["id"] for row in rows] == ["9:0", "9:1", "4:0", "5:0"]
    (leak,) = read_lines(tmp_path / "out" / "leaks.jsonl")
    assert (leak["passage"], leak["question"]) == ("3:0", "q1")
    assert entry.main(command) == 0
    assert "already there" in capsys.readouterr().out
    assert entry.main([*command, "--gin.PassagesConfig.min_words=2"]) == 0
    assert "made anew, for it was made by other rules" in capsys.readouterr().err
    assert [row["id"] for row in passages_of(tmp_path / "out")] == ["9:0", "9:1"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["nq", "--gin.PassagesConfig.clean=True"], "nq has no passages"),
        (["wikipedia", "--gin.LeakConfig.output=x"], "LeakConfig.output is for remove_leaks"),
        (["wikipedia", "--shards=2"], "they need --runner"),
        (["wikipedia", "--", "--project=x"], "they need --runner"),
        (["wikipedia", "--gin.PassagesConfig.min_words=-1"], "PassagesConfig.min_words = -1"),
    ],
)
def test_wrong_flags_are_told(flags, message, tmp_path, capsys):
    given = [flags[0], f"--out={tmp_path}", *flags[1:]]
    assert entry.main(given) == 2
    assert message in capsys.readouterr().err


@needs_beam
def test_beam_writes_the_lines_of_one_machine(tmp_path, capsys):
    command = write_pages(tmp_path / "in.v1")
    assert entry.main([*command, f"--out={tmp_path}/one"]) == 0
    beam = [*command, f"--out={tmp_path}/many", "--runner=DirectRunner"]
    assert entry.main([*beam, "--shards=2"]) == 0
    key = json.dumps
    assert sorted(passages_of(tmp_path / "many"), key=key) == sorted(
        passages_of(tmp_path / "one"), key=key
    )
    names = sorted(path.name for path in (tmp_path / "many").iterdir())
    shards = [f"passages-0000{n}-of-00002.jsonl" for n in (0, 1)]
    assert names == ["leaks-00000-of-00001.jsonl", *shards, "prepared.json"]
    assert read_lines(tmp_path / "many" / names[0]) == read_lines(tmp_path / "one" / "leaks.jsonl")
    noted = json.loads((tmp_path / "many" / "prepared.json").read_text())["passages.jsonl"]
    assert (noted["rows"], noted["shards"]) == (4, shards)
    assert entry.main([*beam, "--shards=2"]) == 0
    assert "already there" in capsys.readouterr().out
    assert entry.main([*beam, "--gin.PassagesConfig.min_words=2"]) == 2
    assert "was not made of these files by these rules" in capsys.readouterr().err


@needs_beam
def test_beam_reads_patterns_and_tells_all_broken_lines(tmp_path, capsys):
    parts = tmp_path / "parts"
    parts.mkdir()
    (parts / "a.tsv").write_text('id\ttext\ttitle\n1\t"a ""b"\tA\n\n2\tx\n')
    (parts / "b.tsv").write_text('3\t"c\tC\n4\td\tD\n')
    out = tmp_path / "out"
    command = ["wikipedia", f"--source={parts}/a.tsv,{parts}/b*.tsv", f"--out={out}",
               "--runner=DirectRunner", "--sample"]  # fmt: skip
    assert entry.main(command) == 2
    error = capsys.readouterr().err
    assert "2 broken lines, such as" in error
    assert "a.tsv: 2 columns where id, text and title were expected" in error
    assert "the line begins with '3\\t\"c" in error
    assert list(out.iterdir()) == []  # nothing that a reader could take for a corpus
    assert entry.main([*command, "--gin.RowsConfig.skip_broken=True"]) == 0
    rows = sorted(passages_of(out), key=json.dumps)
    assert rows == [
        {"id": "1", "title": "A", "text": 'a "b'},
        {"id": "4", "title": "D", "text": "d"},
    ]
    assert (
        entry.main([*command[:-1], f"--out={tmp_path}/o", "--gin.RowsConfig.skip_broken=True"]) == 2
    )
    assert "2 rows, but the published files have 21,015,324" in capsys.readouterr().err


def make_bucket(folder: Path) -> type:
    """A class that makes `fake://` a bucket for Beam as long as it is kept.

    As in Beam's own file system of gs:// there are no folders.
    """
    from apache_beam.io.filesystem import FileMetadata
    from apache_beam.io.localfilesystem import LocalFileSystem

    def place(path: str) -> str:
        found = folder / path.removeprefix("fake://")
        found.parent.mkdir(parents=True, exist_ok=True)
        return str(found)

    class Bucket(LocalFileSystem):
        @classmethod
        def scheme(cls):
            return "fake"

        def has_dirs(self):
            return False

        def mkdirs(self, path):
            pass

        def split(self, path):
            return tuple(path.rsplit("/", 1))

        def exists(self, path):
            return Path(place(path)).is_file()

        def metadata(self, path):
            return FileMetadata(path, Path(place(path)).stat().st_size)

        def _list(self, prefix):
            names = (f"fake://{one.relative_to(folder)}" for one in folder.rglob("*"))
            return [self.metadata(n) for n in names if n.startswith(prefix) and self.exists(n)]

        def _path_open(self, path, *more):
            return super()._path_open(place(path), *more)

        def create(self, path, *more):
            return self._path_open(path, "wb", *more)

        def rename(self, sources, targets):
            super().rename(list(map(place, sources)), list(map(place, targets)))

        def delete(self, paths):
            for path in paths:
                held = self._list(path) if path.endswith("/") else [self.metadata(path)]
                for one in held:
                    Path(place(one.path)).unlink()

    return Bucket


@needs_beam
def test_beam_reads_from_a_bucket_and_writes_into_it(tmp_path):
    command = write_pages(tmp_path / "b")
    assert entry.main([*command, f"--out={tmp_path}/one"]) == 0
    bucket = make_bucket(tmp_path)
    command[1] = "--source=fake://b"
    assert entry.main([*command, "--out=fake://b/out", "--runner=DirectRunner"]) == 0
    held = [path for path in (tmp_path / "b" / "out").rglob("*") if path.is_file()]
    names = sorted(str(path.relative_to(tmp_path / "b" / "out")) for path in held)
    assert [name.partition("-")[0] for name in names] == ["leaks", "passages", "prepared.json"]
    assert bucket.scheme() == "fake"  # kept until here
    made, expected = passages_of(tmp_path / "b" / "out"), passages_of(tmp_path / "one")
    assert sorted(made, key=json.dumps) == sorted(expected, key=json.dumps)


@needs_beam
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["wikipedia", "--runner=DirectRunner", "--source=nowhere"], "nowhere: no such file"),
        (["nq", "--runner=DirectRunner"], "nq is read as a whole, not by lines"),
        (["wikipedia", "--runner=Nobody"], "Beam: "),
    ],
)
def test_what_beam_cannot_do_is_told(flags, message, tmp_path, capsys):
    write_pages(tmp_path / "in")
    (tmp_path / "in" / "psgs_w100.tsv").write_text("1\ta\tA\n")
    assert entry.main([flags[0], f"--source={tmp_path}/in", f"--out={tmp_path}/o", *flags[1:]]) == 2
    assert message in capsys.readouterr().err
