"""How errors are worded."""

from atlas_jax.core.errors import one_line


def test_a_quoted_error_keeps_its_reason_behind_long_paths():
    path = "/data/" + "a_long_name/" * 30
    error = OSError(f'RESOURCE_EXHAUSTED: Error\nwriting "{path}": No space left on device [28]')
    quoted = one_line(error)
    assert quoted.startswith("RESOURCE_EXHAUSTED: Error writing ")
    assert quoted.endswith("No space left on device [28]")
    assert len(quoted) == 250
    assert one_line(OSError("short\n one")) == "short one"
    assert one_line(KeyError()) == "KeyError"
