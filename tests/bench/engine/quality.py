"""What a weight form costs in quality: its next-token distributions against those of the fp32 model.

Run as `python -m engine.quality PATH SEQUENCES`; prints one JSON object. The text is English prose and
code from the Python library and from this repository, a fixed number of tokens of each source.
"""

# Before torch: it sets how torch's threads wait for each other.
import cortex.neuron.engine  # noqa: F401  isort: skip

import gc
import json
import sys
import textwrap
from pathlib import Path
from pydoc_data.topics import topics
from time import perf_counter
from typing import Any, Final, get_args

import torch
from torch import Tensor

from cortex.neuron.engine.runner import Runner, load_runner
from cortex.neuron.nn.placement import Dtype, Placement
from cortex.neuron.nn.plan import Segment, StepPlan

from .adapter import THREADS
from .models import ROOT, codec_of

REFERENCE: Final = "float32"
FORMS: Final = ("packed16", "int8")
"""Every weight form that the engine offers, the default one first."""
TOKENS: Final = 500
"""Positions of each sequence."""
_ROWS: Final = 50
"""Positions compared at a time: two float64 rows of a large vocabulary are 2.4 MB."""


def texts() -> list[str]:
    """Prose, code, a licence, a read-me: four sources of which each gives one sequence."""
    return [
        topics["objects"],
        Path(textwrap.__file__).read_text(),
        (ROOT / "LICENSE").read_text(),
        (ROOT / "README.md").read_text(),
    ]


def runner_of(path: Path, form: str) -> Runner:
    """Raises ValueError for a form that is not offered; a Placement would take any word."""
    if form not in get_args(Dtype):
        raise ValueError(f"the engine offers no form {form!r}")
    placement = Placement(torch.device("cpu"), form)  # type: ignore[arg-type]
    return load_runner(
        path, placement, cache_rows=TOKENS, report=lambda done, total: None, threads=THREADS
    )


def logits_of(runner: Runner, ids: list[int]) -> Tensor:
    """fp32 [len(ids), vocab]: those after each token, from one forward pass."""
    return runner.logits(StepPlan(ids, [Segment(0, len(ids), [(0, len(ids))])], [*range(len(ids))]))


def all_logits(path: Path, form: str, sequences: list[list[int]]) -> list[Tensor]:
    """Of each sequence. The model is gone on return."""
    runner = runner_of(path, form)
    found = [logits_of(runner, ids).clone() for ids in sequences]
    del runner
    gc.collect()
    return found


def divergence(reference: Tensor, form: Tensor) -> tuple[float, int]:
    """Sums over positions: KL(reference || form) in nats, computed in float64, and equal likeliest tokens."""
    total = 0.0
    for ours, theirs in zip(form.split(_ROWS), reference.split(_ROWS), strict=True):
        p, q = theirs.double().log_softmax(-1), ours.double().log_softmax(-1)
        total += float((p.exp() * (p - q)).sum())
    return total, int((reference.argmax(-1) == form.argmax(-1)).sum())


def compare(path: Path, count: int) -> dict[str, Any]:
    codec = codec_of(path)
    sequences = [codec.encode(text)[:TOKENS] for text in texts()[:count]]
    positions = sum(map(len, sequences))
    reference = all_logits(path, REFERENCE, sequences)
    found: dict[str, Any] = {"positions": positions, "forms": {}}
    for form in FORMS:
        started = perf_counter()
        try:
            logits = all_logits(path, form, sequences)
        except Exception as error:  # a form that is not offered, or broken: the others count all the same
            found["forms"][form] = {"error": f"{type(error).__name__}: {error}"}
            continue
        parts = [divergence(theirs, ours) for theirs, ours in zip(reference, logits, strict=True)]
        if not any(kl for kl, _ in parts):
            found["forms"][form] = {"error": "computes exactly what fp32 does, so it is not in effect"}
            continue
        found["forms"][form] = {
            "kl": sum(kl for kl, _ in parts) / positions,
            "same_top": sum(same for _, same in parts) / positions,
            "kl_by_text": [kl / len(ids) for (kl, _), ids in zip(parts, sequences, strict=True)],
            "seconds": perf_counter() - started,
        }
    return found


if __name__ == "__main__":
    torch.set_num_threads(THREADS)
    with torch.inference_mode():
        print(json.dumps(compare(Path(sys.argv[1]), int(sys.argv[2]))))
