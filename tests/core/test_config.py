"""The launcher: what T5X users type works, and every slip is one line that names it."""

import argparse
import dataclasses
import errno
import os
from pathlib import Path
from typing import Literal

import gin
import pytest

from atlas_jax.core import config, gin_files
from atlas_jax.core.errors import UserError
from atlas_jax.core.preemption import Preempted


@gin.configurable(module="tests")
@dataclasses.dataclass(frozen=True)
class RunConfig:
    model_dir: str
    steps: int = 10
    rate: float = 0.1
    shuffle: bool = True
    cut: int | None = None
    kind: Literal["adamw", "adafactor"] = "adamw"
    names: tuple[str, ...] = ("a",)

    def __post_init__(self) -> None:
        if self.steps < 0:
            raise UserError(f"RunConfig.steps = {self.steps}: expected 0 or more")


@gin.configurable(module="tests")
class PlainConfig:
    def __init__(self, width: int = 3, depth=2):
        self.width, self.depth = width, depth


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(path: Path, text: str) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path.name


def run(*argv: str, main=None) -> int:
    parser = argparse.ArgumentParser(prog="atlas-jax test")
    parser.add_argument("--flag", default="")
    return config.launch(main or (lambda flags: None), parser, argv)


def error_of(capsys: pytest.CaptureFixture[str], *argv: str, main=None) -> str:
    assert run(*argv, main=main) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("atlas-jax test: error: ")
    return lines[0].removeprefix("atlas-jax test: error: ")


# What works.


def test_files_macros_parameters_and_scopes_reach_the_configurables(folder):
    write(folder / "base.gin", "STEPS = 5\nRunConfig.steps = %STEPS\nRunConfig.rate = 0.5\n")
    write(
        folder / "run.gin",
        "include 'base.gin'\nMODEL_DIR = %gin.REQUIRED\nRunConfig.model_dir = %MODEL_DIR\n",
    )
    seen = []

    def main(flags):
        with gin.config_scope("reader"):
            seen.append(RunConfig())
        seen.append((RunConfig(), flags.flag))

    code = run(
        "--gin_file=run.gin",
        "--gin.MODEL_DIR=out/first",
        "--gin.STEPS=7",
        "--gin.reader/RunConfig.rate=1e-4",
        "--flag=x",
        main=main,
    )
    assert code == 0
    assert seen == [RunConfig("out/first", 7, 1e-4), (RunConfig("out/first", 7, 0.5), "x")]


def test_later_files_override_earlier_ones_and_the_command_line_both(folder):
    write(folder / "one.gin", "RunConfig.steps = 1\nRunConfig.rate = 1.0\nRunConfig.cut = 1\n")
    write(folder / "two.gin", "RunConfig.rate = 2.0\nRunConfig.cut = 2\n")
    config.load_gin(["one.gin", "two.gin"], ["RunConfig.cut=3", "RunConfig.model_dir=x"])
    assert RunConfig() == RunConfig("x", 1, 2.0, cut=3)


def test_a_block_binds_like_single_lines(folder):
    write(folder / "block.gin", "RunConfig:\n  model_dir = 'x'\n  steps = 4\n")
    config.load_gin(["block.gin"])
    assert RunConfig().steps == 4


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("runs/nq", "runs/nq"),
        ("gs://bucket/a.json", "gs://bucket/a.json"),
        ("/abs/path", "/abs/path"),
        ("../up", "../up"),
        ("~/x", "~/x"),
        ("0-1000:500,1000-10000:2000", "0-1000:500,1000-10000:2000"),
        ("-1", -1),
        ("two words", "two words"),
        ("a=b", "a=b"),
        ('"quoted"', "quoted"),
        ("'it is'", "it is"),
        ("''", ""),
        ("1e-4", 1e-4),
        ("True", True),
        ("None", None),
        ("('a', 'b')", ("a", "b")),
        ("[1, 2]", [1, 2]),
    ],
)
def test_a_command_line_value_is_gin_syntax_or_a_bare_string(text, value):
    parsed = gin_files.parse_value(text, "--gin.X")
    assert parsed == value
    assert type(parsed) is type(value)


def test_search_paths_come_before_the_current_directory(folder):
    write(folder / "x.gin", "RunConfig.steps = 1\n")
    write(folder / "other" / "x.gin", "RunConfig.steps = 2\n")
    seen = []
    arguments = ["--gin_file=x.gin", "--gin.RunConfig.model_dir=m"]
    main = lambda flags: seen.append(RunConfig().steps)  # noqa: E731
    assert run(*arguments, main=main) == 0
    assert run(*arguments, "--gin_search_paths=nowhere,other", main=main) == 0
    assert seen == [1, 2]


def test_the_projects_gin_folder_is_found_from_any_directory(folder):
    paths = config.search_paths()
    for name in ("gin/models/nano.gin", "models/nano.gin"):
        assert gin_files.find_file(name, paths, "--gin_file").is_file()


def test_a_gin_file_may_import_the_module_that_registers_its_configurables(folder, monkeypatch):
    monkeypatch.syspath_prepend(folder)
    write(
        folder / "own_task_module.py",
        "import gin\n@gin.configurable\ndef own_task(size: int = 1):\n    return size\n",
    )
    write(folder / "own.gin", "import own_task_module\nown_task.size = 3\n")
    config.load_gin(["own.gin"])
    assert gin.query_parameter("own_task.size") == 3
    assert "import own_task_module" in gin.config_str()


def test_the_dumped_configuration_gives_the_same_run_again(folder):
    write(folder / "a.gin", "N = 3\nRunConfig.steps = %N\nreader/RunConfig.rate = 0.25\n")
    bindings = ["RunConfig.model_dir=m", "RunConfig.names=('x', 'y')", "N=4"]
    config.load_gin(["a.gin"], bindings)
    config.write_config(folder / "run" / "config.gin", config.config_text())
    first, text = RunConfig(), gin.config_str()
    config.load_gin(["run/config.gin"])
    assert RunConfig() == first == RunConfig("m", 4, names=("x", "y"))
    assert gin.config_str() == text
    assert [path.name for path in (folder / "run").iterdir()] == ["config.gin"]


def test_each_launch_starts_from_an_empty_configuration(folder):
    seen = []
    main = lambda flags: seen.append(RunConfig().steps)  # noqa: E731
    assert run("--gin.RunConfig.model_dir=m", "--gin.RunConfig.steps=3", main=main) == 0
    assert run("--gin.RunConfig.model_dir=m", main=main) == 0
    assert seen == [3, 10]


def test_the_exit_code_is_mains(folder):
    assert run(main=lambda flags: 3) == 3
    assert run(main=lambda flags: None) == 0
    assert run("--help") == 0
    assert run("--unknown") == 2


# What is an error, and what it says.


def test_an_unknown_configurable_names_the_nearest(folder, capsys):
    write(folder / "x.gin", "\nRunConfg.steps = 1\n")
    message = error_of(capsys, "--gin_file=x.gin")
    assert message == "x.gin:2: no configurable is called RunConfg; did you mean RunConfig?"


def test_an_unknown_parameter_names_the_nearest(folder, capsys):
    message = error_of(capsys, "--gin.RunConfig.step=1")
    assert message == ("--gin.RunConfig.step: RunConfig has no parameter step; did you mean steps?")


def test_an_unknown_parameter_without_a_near_one_lists_them(folder, capsys):
    message = error_of(capsys, "--gin.PlainConfig.zzz=1")
    assert message.endswith("PlainConfig has no parameter zzz; there are: depth, width")


def test_an_unknown_reference_names_the_nearest(folder, capsys):
    write(folder / "x.gin", "A = 1\n\nRunConfig.cut = @PlanConfig()\n")
    message = error_of(capsys, "--gin_file=x.gin")
    assert message == "x.gin:3: no configurable is called PlanConfig; did you mean PlainConfig?"


def test_an_unknown_scope_names_the_nearest(folder, capsys):
    message = error_of(capsys, "--gin.raeder/RunConfig.steps=1")
    assert message == (
        "--gin.raeder/RunConfig.steps: raeder/RunConfig.steps: no part of the program uses the "
        "scope raeder; did you mean reader?"
    )


def test_a_required_macro_names_itself_and_its_file(folder, capsys):
    write(folder / "x.gin", "MODEL_DIR = %gin.REQUIRED\nRunConfig.model_dir = %MODEL_DIR\n")
    message = error_of(capsys, "--gin_file=x.gin")
    assert message == ("no value for MODEL_DIR (required by x.gin:1); give --gin.MODEL_DIR=...")


def test_several_missing_macros_are_told_at_once(folder, capsys):
    write(
        folder / "x.gin",
        "A = %gin.REQUIRED\nRunConfig.model_dir = %A\nRunConfig.cut = %gin.REQUIRED\n"
        "RunConfig.names = ('x', %LAST)\n",
    )
    message = error_of(capsys, "--gin_file=x.gin")
    assert "A (required by x.gin:1)" in message
    assert "RunConfig.cut (required by x.gin:3)" in message
    assert "LAST (used by RunConfig.names at x.gin:4)" in message
    assert message.endswith("give --gin.A=... --gin.RunConfig.cut=... --gin.LAST=...")


def test_a_misspelt_macro_on_the_command_line_names_the_nearest(folder, capsys):
    write(folder / "x.gin", "RunConfig.model_dir = %MODEL_DIR\n")
    message = error_of(capsys, "--gin_file=x.gin", "--gin.MODELDIR=x")
    assert message == ("--gin.MODELDIR: no gin file uses a macro MODELDIR; did you mean MODEL_DIR?")


def test_a_configurable_without_a_field_is_told_how_to_write_it(folder, capsys):
    message = error_of(capsys, "--gin.RunConfig=3")
    assert message == "--gin.RunConfig: which parameter? write --gin.RunConfig.field=value"


def test_circular_macros_are_named(folder, capsys):
    write(folder / "x.gin", "A = %B\nB = %A\nRunConfig.steps = %A\n")
    assert error_of(capsys, "--gin_file=x.gin") == (
        "x.gin:3: macros refer to each other: A -> B -> A"
    )


@pytest.mark.parametrize(
    ("binding", "expected"),
    [
        ("RunConfig.steps=thirty", "RunConfig.steps = 'thirty': expected a whole number"),
        ("RunConfig.steps=1.5", "RunConfig.steps = 1.5: expected a whole number"),
        ("RunConfig.steps=True", "RunConfig.steps = True: expected a whole number"),
        ("RunConfig.shuffle=0", "RunConfig.shuffle = 0: expected True or False"),
        ("RunConfig.model_dir=3", "RunConfig.model_dir = 3: expected a text"),
        ("RunConfig.cut=x", "RunConfig.cut = 'x': expected a whole number or None"),
        ("RunConfig.names=['a']", "RunConfig.names = ['a']: expected a tuple"),
        ("RunConfig.kind=adam", "RunConfig.kind = 'adam': expected 'adamw' or 'adafactor'"),
        ("PlainConfig.width=x", "PlainConfig.width = 'x': expected a whole number"),
    ],
)
def test_a_value_of_the_wrong_type_is_refused(folder, capsys, binding, expected):
    message = error_of(capsys, f"--gin.{binding}")
    assert message == f"--gin.{binding.split('=')[0]}: {expected}"


def test_a_macros_value_is_checked_where_it_is_used(folder, capsys):
    write(folder / "x.gin", "STEPS = 3\nRunConfig.steps = %STEPS\n")
    message = error_of(capsys, "--gin_file=x.gin", "--gin.STEPS=many")
    assert message == "x.gin:2: RunConfig.steps = 'many': expected a whole number"


@pytest.mark.parametrize(
    ("argument", "part"),
    [
        ("--gin.X={braces} here", "a string is quoted twice"),
        ("--gin.X='open", "a string is quoted twice"),
        ("--gin.X=", "a string is quoted twice"),
        ("--gin.X=(1, 2", "a string is quoted twice"),
        ("--gin.X=true", "--gin.X=true: write --gin.X=True, or "),
        ("--gin.X=none", """--gin.X=none: write --gin.X=None, or --gin.X="'none'" if the word"""),
        ("--gin.X=None ", "no gin file uses a macro X"),
        ("--gin.X", "write --gin.X=value"),
        ("--gin.X-Y=1", "'X-Y' is not NAME, Class.field or scope/Class.field"),
    ],
)
def test_a_broken_command_line_binding_says_how_to_write_it(folder, capsys, argument, part):
    assert part in error_of(capsys, argument)


def test_a_missing_gin_file_lists_the_search_paths_and_the_nearest(folder, capsys):
    write(folder / "mine" / "runs" / "finetune.gin", "")
    message = error_of(capsys, "--gin_file=runs/finetun.gin", "--gin_search_paths=mine")
    assert message.startswith("--gin_file: there is no gin file runs/finetun.gin; searched: mine, ")
    assert str(config.gin_folder()) in message
    assert message.endswith("did you mean runs/finetune.gin?")


def test_a_missing_include_names_the_line_that_asks_for_it(folder, capsys):
    write(folder / "x.gin", "A = 1\ninclude 'nowhere.gin'\n")
    message = error_of(capsys, "--gin_file=x.gin")
    assert message.startswith("x.gin:2: there is no gin file nowhere.gin; searched: ")


def test_a_file_that_includes_itself_is_refused(folder, capsys):
    write(folder / "x.gin", "include 'y.gin'\n")
    write(folder / "y.gin", "include 'x.gin'\n")
    assert error_of(capsys, "--gin_file=x.gin") == "y.gin:1: x.gin includes itself"


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("A = 1\nB = ?\n", 2),
        ("A = 1\nRunConfig.steps 3\n", 2),
        ("A = bare/path\n", 1),
        ("A = 1\nB = (1,\n", 2),
        ("A = 1 2\n", 1),
    ],
)
def test_broken_syntax_names_file_and_line(folder, capsys, text, line):
    write(folder / "x.gin", text)
    assert error_of(capsys, "--gin_file=x.gin").startswith(f"x.gin:{line}: ")


@pytest.mark.parametrize(
    ("word", "meant"),
    [("none", "None, or 'none' in quotes"), ("bare", "'bare' in quotes"), ("true", "True, or ")],
)
def test_a_bare_word_in_a_file_says_how_to_write_it(folder, capsys, word, meant):
    write(folder / "x.gin", f"A = 1\nB = {word}\n")
    message = error_of(capsys, "--gin_file=x.gin")
    assert message.startswith(f"x.gin:2: {word} is no gin value; write {meant}")


def test_a_gin_file_in_another_encoding_is_named(folder, capsys):
    (folder / "x.gin").write_bytes(b"A = 1\n# caf\xe9\n")
    assert error_of(capsys, "--gin_file=x.gin").startswith("x.gin: not UTF-8 at byte 12 (0xe9)")


def test_an_import_that_fails_names_its_line(folder, capsys):
    write(folder / "x.gin", "import no_such_module_here\n")
    message = error_of(capsys, "--gin_file=x.gin")
    assert message == ("x.gin:1: import no_such_module_here: No module named 'no_such_module_here'")


def test_a_field_without_value_is_named_when_it_is_built(folder, capsys):
    def main(flags):
        with gin.config_scope("reader"):
            RunConfig()

    assert error_of(capsys, main=lambda flags: RunConfig()) == (
        "no value for RunConfig.model_dir; give --gin.RunConfig.model_dir=..."
    )
    assert error_of(capsys, main=main) == (
        "no value for reader/RunConfig.model_dir; give --gin.reader/RunConfig.model_dir=..."
    )


def test_a_configurables_own_complaint_comes_without_gins_trailer(folder, capsys):
    message = error_of(
        capsys,
        "--gin.RunConfig.model_dir=m",
        "--gin.RunConfig.steps=-3",
        main=lambda flags: RunConfig(),
    )
    assert message == "RunConfig.steps = -3: expected 0 or more"


def test_nothing_is_bound_after_an_error(folder, capsys):
    write(folder / "x.gin", "RunConfig.steps = 3\nRunConfig.stepz = 3\n")
    error_of(capsys, "--gin_file=x.gin")
    assert gin.config_str() == ""


def test_other_exceptions_keep_their_traceback(folder):
    def broken(flags):
        raise TypeError("a bug")

    with pytest.raises(TypeError, match="a bug"):
        run(main=broken)


def test_a_full_disk_is_told_in_one_line(folder, capsys):
    def fill(flags: argparse.Namespace) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "metrics.jsonl")

    assert config.launch(fill, argparse.ArgumentParser(prog="demo"), []) == 2
    assert capsys.readouterr().err == (
        "demo: error: [Errno 28] No space left on device: 'metrics.jsonl'; make room and start "
        "the same command again\n"
    )


def test_a_preempted_run_ends_with_its_own_code(folder, capsys):
    def main(flags):
        raise Preempted("stopped at step 3, which is saved")

    assert run(main=main) == 75
    assert capsys.readouterr().err.endswith(": stopped at step 3, which is saved\n")


def test_an_interrupt_ends_with_its_own_code(folder, capsys):
    def main(flags):
        raise KeyboardInterrupt

    assert run(main=main) == 130
    assert "interrupted" in capsys.readouterr().err


def test_a_file_included_again_and_again_is_read_once(folder, capsys):
    for number in range(24):
        write(folder / f"c{number}.gin", f"include 'c{number + 1}.gin'\n" * 2)
    write(folder / "c24.gin", "RunConfig.steps = 3\n")
    assert run("--gin_file=c0.gin") == 0


def test_includes_have_a_bounded_depth(folder, capsys):
    for number in range(40):
        write(folder / f"c{number}.gin", f"include 'c{number + 1}.gin'\n")
    assert "more than 32 deep" in error_of(capsys, "--gin_file=c0.gin")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("RunConfig.steps = " + "[" * 5000 + "]" * 5000, "too deep"),
        ("RunConfig.steps = " + "[" * 60 + "]" * 60, "more than 20 deep"),
        ("RunConfig.steps = " + "1" * 5000, "x.gin"),
        ("RunConfig.steps = 9223372036854775808", "a number of 64 bits"),
        ("RunConfig.steps = 2147483648", "from -2,147,483,647 to 2,147,483,647"),
        ("RATE = 1e999", "inf: a finite number is needed"),
        ("RunConfig.model_dir = 'a\\x00b'", "holds a null byte"),
        ("RunConfig.model_dir = 'a\\ud800b'", "holds half a character"),
        ("A = 1\0", "x.gin"),
        ("import nowhere.at_all", "x.gin:1: import nowhere.at_all"),
    ],
)
def test_values_that_no_program_can_hold_are_refused(folder, capsys, text, message):
    write(folder / "x.gin", text + "\n")
    told = error_of(capsys, "--gin_file=x.gin")
    assert message in told and told.startswith("x.gin") and len(told.splitlines()) == 1


@pytest.mark.parametrize(
    ("name", "message"),
    [("x" * 300 + ".gin", "is too long"), ("pipe.gin", "is a pipe"), ("a\udcff", "0xff")],
)
def test_a_gin_file_that_is_none_is_refused(folder, capsys, name, message):
    os.mkfifo(folder / "pipe.gin")
    assert message in error_of(capsys, f"--gin_file={name}")


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (NotADirectoryError(errno.ENOTDIR, "Not a directory", "a/b"), "Not a directory: 'a/b'"),
        (MemoryError("1 TB"), "more memory is needed than there is: 1 TB"),
        (RuntimeError("RESOURCE_EXHAUSTED: 8 TB"), "than there is: RESOURCE_EXHAUSTED: 8 TB"),
        (type("PanicException", (BaseException,), {})("x\ny"), "a library broke down"),
        (UserError("a\nb\x1b[2J"), "a\\nb\\x1b[2J"),
    ],
)
def test_a_machine_or_library_that_gives_in_costs_one_line(folder, capsys, error, message):
    def main(flags):
        raise error

    assert config.launch(main, argparse.ArgumentParser(prog="x"), []) == 2
    told = capsys.readouterr().err
    assert message in told and told.count("\n") == 1
