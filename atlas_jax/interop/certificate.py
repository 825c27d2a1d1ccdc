"""A record of a conversion, tensor by tensor, and the proof that it can be read back.

The certificate compares the new files with the old ones, bit by bit, under this project's names. It
does not know how names were mapped. That the mapping gives the same model is shown by `--verify`,
which runs both models.
"""

import dataclasses
import fnmatch
import json
from collections.abc import Mapping, Sequence
from typing import Any

from atlas_jax.core.errors import UserError
from atlas_jax.interop.tensors import Part, Tensors, digest

FORMAT = 1
FILE = "certificate.json"


@dataclasses.dataclass
class Certificate:
    """The record of one part.

    Attributes:
      kind: 'reader' or 'retriever'.
      tensors: our name -> source names, shape, type and fingerprint; equal on both sides.
      unused: arrays of the source that were left out -> the reason why this is right.
      missing: arrays that the source lacked and that were filled in, as allowed.
      layers: with --verify, layer -> largest difference between the two frameworks.
      remarks: what beside the tensors was taken over, or could not be.
    """

    kind: str
    tensors: dict[str, dict[str, Any]]
    unused: dict[str, str]
    missing: list[str]
    layers: dict[str, float] = dataclasses.field(default_factory=dict)
    remarks: list[str] = dataclasses.field(default_factory=list)

    def lines(self) -> list[str]:
        """The lines to print."""
        count = sum(1 for name in self.tensors if not name.startswith("optimizer/"))
        extra = len(self.tensors) - count
        state = f" and {extra} arrays of optimiser state" if extra else ""
        lines = [f"{self.kind}: {count} tensors{state} read back, every bit equal"]
        lines += [f"  not used: {name} ({why})" for name, why in self.unused.items()]
        lines += [f"  filled in: {name}" for name in self.missing]
        lines += [f"  {remark}" for remark in self.remarks]
        lines += [f"  {layer}: {value:.2e}" for layer, value in self.layers.items()]
        return lines


def account_for(part: Part, allow_unused: Sequence[str]) -> dict[str, str]:
    """The arrays of the source that are left out, each with the reason.

    Raises:
      UserError: an array is unused without a reason; names it and the flag that allows it.
    """
    why = dict(part.explained)
    refused = []
    for name in part.unused():
        pattern = next((p for p in allow_unused if fnmatch.fnmatch(name, p)), None)
        if pattern is None:
            refused.append(name)
        else:
            why[name] = f"allowed by --allow_unused={pattern}"
    if refused:
        shown = ", ".join(refused[:8]) + (", ..." if len(refused) > 8 else "")
        raise UserError(
            f"the {part.kind} has no place for {len(refused)} tensors of the source: {shown}. If "
            f"they may go, say so: --allow_unused='{refused[0]}'"
        )
    return why


def check_shapes(part: Part, expected: Mapping[str, tuple[int, ...]]) -> None:
    """Compare names and shapes with those of the model that the config describes.

    Raises:
      UserError: names the first tensor that is missing, superfluous or of another shape.
    """
    for name, shape in expected.items():
        if name not in part.tensors:
            raise UserError(f"the {part.kind} lacks {name} {list(shape)}")
        tensor = part.tensors[name]
        if tensor.shape != shape:
            raise UserError(
                f"{tensor.where}: as the {part.kind}'s {name} it has shape {list(tensor.shape)}, "
                f"but the config says {list(shape)}"
            )
    extra = [name for name in part.tensors if name not in expected]
    if extra:
        raise UserError(f"the {part.kind} has no parameter {extra[0]}")


def compare(
    part: Part, written: Mapping[str, str], read_back: Tensors, why: dict[str, str]
) -> Certificate:
    """Read everything back and compare fingerprints.

    Args:
      part: the part that was converted.
      written: name -> fingerprint of the tensor given to the writer; optimiser state under
        'optimizer/...'.
      read_back: the new files' tensors under the same names.
      why: result of `account_for`.

    Raises:
      UserError: names the first tensor that is missing, unexpected or different.
    """
    sources = {**part.tensors, **{f"optimizer/{n}": t for n, t in part.optimizer.items()}}
    for name in written:
        if name not in read_back:
            raise UserError(f"certificate: {name} was written, but is not in the new files")
    records = {}
    for name, tensor in read_back.items():
        if name not in written:
            raise UserError(f"certificate: {tensor.where} is in the new files, but was not written")
        found = digest(tensor.read())
        if found != written[name]:
            raise UserError(f"certificate: {tensor.where} is not what was written as {name}")
        records[name] = {
            "from": list(sources[name].sources),
            "shape": list(tensor.shape),
            "dtype": tensor.dtype.name,
            "blake2b": found,
        }
    return Certificate(part.kind, records, why, list(part.missing))


def to_json(certificates: Sequence[Certificate], about: Mapping[str, Any]) -> str:
    """The text of `certificate.json`."""
    parts = [dataclasses.asdict(certificate) for certificate in certificates]
    return json.dumps({"format": FORMAT, **about, "parts": parts}, indent=1) + "\n"
