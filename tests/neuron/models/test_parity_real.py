"""Real models against transformers, on the same GGUF file: the next token at every position.

The reference continues each of five prompts greedily by 48 tokens; both sides read these.
"""

from __future__ import annotations

import functools
import gc
import shutil
import struct
from pathlib import Path
from typing import Any, Final, NamedTuple

import gguf
import pytest
import torch
from torch import Tensor

from cortex.neuron.engine.runner import Runner, load_runner
from cortex.neuron.nn.placement import Dtype, Placement
from cortex.neuron.nn.plan import Segment, StepPlan
from cortex.neuron.text.codec import codec_from_gguf
from cortex.neuron.weights.checkpoint import open_checkpoint
from cortex.neuron.weights.gguf import TYPES

pytestmark = [
    pytest.mark.real_model,
    pytest.mark.slow,
    pytest.mark.timeout(300),
    # Its new name is unknown to the oldest transformers that pyproject.toml allows.
    pytest.mark.filterwarnings("ignore:.past_key_values. is deprecated:FutureWarning"),
]

TOKENS: Final = 48
CHUNK: Final = 256
PROMPTS: Final = {
    "word": "Paris",
    "question": "<|im_start|>user\nWhy is the sky blue?<|im_end|>\n<|im_start|>assistant\n",
    "code": 'def fibonacci(n):\n    """The n-th Fibonacci number."""\n    if n < 2:\n        return n\n',
    "list": "\n".join(f"{n} squared is {n * n}, and its double is {2 * n}." for n in range(1, 12)),
    "long": "\n".join(
        f"Day {day}: we sailed {13 * day % 29 + 4} miles and saw {day * day % 17} islands; "
        f"the wind came from the {('north', 'east', 'south', 'west')[day % 4]}, the mood was "
        f"{('good', 'calm', 'tense')[day % 3]}."
        for day in range(1, 17)
    ),
}
TIE: Final = 1e-3
PACKED_TIE: Final = 0.1
"""How far apart the reference's two highest logits may be for another choice to count as a tie."""
MOST_OTHER: Final = 6
"""Positions of one model, of 240, at which the packed form may choose otherwise: 12 of both models' 480."""


class Walk(NamedTuple):
    """The reference's greedy text after a prompt. Logits before each of its tokens: fp32 [TOKENS, vocab]."""

    prompt: list[int]
    tokens: list[int]
    reference: Tensor
    packed: Tensor

    def others(self, logits: Tensor, tie: float) -> tuple[int, list[int]]:
        """At how many positions `logits` choose otherwise, and those positions that are no tie."""
        differs = (logits.argmax(-1) != torch.tensor(self.tokens)).tolist()
        best = self.reference.topk(2).values
        margins = (best[:, 0] - best[:, 1]).tolist()
        return sum(differs), [i for i in range(TOKENS) if differs[i] and margins[i] > tie]


class Parity:
    """One real model on both sides. A walk is done once; the sides are loaded when they are needed."""

    def __init__(self, path: Path, slim: Path) -> None:
        self._path = path
        self._slim = slim
        self._walks: dict[str, Walk] = {}
        with open_checkpoint(path) as checkpoint:
            codec = codec_from_gguf(checkpoint.metadata)
        self.prompts = {name: codec.encode(prompt) for name, prompt in PROMPTS.items()}

    @functools.cached_property
    def model(self) -> Any:
        without_vocabulary(self._path, self._slim)
        model = read_by_transformers(self._slim)
        self._slim.unlink()
        return model

    @functools.cached_property
    def packed(self) -> Runner:
        return self.runner("packed16")

    def runner(self, dtype: Dtype) -> Runner:
        placement = Placement(torch.device("cpu"), dtype)
        return load_runner(self._path, placement, cache_rows=1024, report=lambda done, total: None, threads=2)

    def finish(self) -> None:
        """Do all walks and forget what they were done with: a large model is in memory in fp32 only once."""
        for name in PROMPTS:
            self.walk(name)
        self.__dict__.pop("model", None)
        self.__dict__.pop("packed", None)
        gc.collect()

    def walk(self, name: str) -> Walk:
        if name not in self._walks:
            self._walks[name] = walk(self.model, self.packed, self.prompts[name])
        return self._walks[name]


def walk(model: Any, packed: Runner, prompt: list[int]) -> Walk:
    """The packed engine proposes, the reference checks the whole proposal in one pass; where it differs,
    its own token stands and the engine goes on from there. What is left is the reference's greedy text,
    with the engine's logits along it.
    """
    from transformers import DynamicCache

    cache = DynamicCache()
    tokens: list[int] = []
    rows: list[Tensor] = []
    with torch.inference_mode():
        first = model(torch.tensor([prompt]), past_key_values=cache, logits_to_keep=1).logits[0]
        cached = 0
        while True:
            proposed, new = propose(packed, prompt + tokens, cached, TOKENS - len(tokens))
            cached = len(prompt)
            tokens += proposed
            rows += new
            rest = model(torch.tensor([tokens[:-1]]), past_key_values=cache).logits[0]
            cache.crop(len(prompt) - cache.get_seq_length())
            reference = torch.cat((first, rest))
            own = reference.argmax(-1).tolist()
            right = next((i for i in range(TOKENS) if own[i] != tokens[i]), TOKENS)
            if right >= TOKENS - 1:
                return Walk(prompt, own, reference, torch.cat(rows))
            tokens = own[: right + 1]
            rows = rows[: right + 1]


def propose(runner: Runner, ids: list[int], cached: int, count: int) -> tuple[list[int], list[Tensor]]:
    """Greedy tokens after `ids`, of which the cache holds `cached`, one step each; and their logits."""
    tokens: list[int] = []
    rows = [compute(runner, ids, cached)[-1:]]
    tokens.append(int(rows[0].argmax()))
    while len(tokens) < count:
        rows.append(compute(runner, ids + tokens, len(ids) + len(tokens) - 1))
        tokens.append(int(rows[-1].argmax()))
    return tokens, rows


def compute(runner: Runner, ids: list[int], start: int) -> Tensor:
    """Logits of the last token of each chunk from `start` on, one row a chunk."""
    rows = []
    for at in range(start, len(ids), CHUNK):
        part = ids[at : at + CHUNK]
        rows.append(runner.logits(StepPlan(part, [segment(at, len(part))], [len(part) - 1])))
    return torch.cat(rows)


def teacher_forced(runner: Runner, way: Walk) -> Tensor:
    """Logits along a walk, as an engine computes them: the prompt in chunks, eight tokens one by one,
    and the rest, as after a preemption, at once.
    """
    prompt, forced = way.prompt, way.tokens[:-1]
    rows = [compute(runner, prompt, 0)[-1:]]
    rows += [compute(runner, prompt + forced[: i + 1], len(prompt) + i) for i in range(8)]
    rest = forced[8:]
    rows.append(runner.logits(StepPlan(rest, [segment(len(prompt) + 8, len(rest))], [*range(len(rest))])))
    return torch.cat(rows)


def segment(start: int, length: int) -> Segment:
    return Segment(start, length, [(0, start + length)])


def read_by_transformers(path: Path) -> Any:
    """Their model, as they read a GGUF file. `from_pretrained` does no more and asks for accelerate."""
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.initialization import no_init_weights
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    config = AutoConfig.for_model(**load_gguf_checkpoint(path)["config"])
    with no_init_weights():
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with pytest.MonkeyPatch.context() as patch:  # they make the same table for each of 400 modules
        patch.setattr(gguf, "get_tensor_name_map", functools.cache(gguf.get_tensor_name_map))
        tensors = load_gguf_checkpoint(path, return_tensors=True, model_to_load=model)["tensors"]
    missing, unexpected = model.load_state_dict(
        {name: torch.as_tensor(values) for name, values in tensors.items()}, strict=False, assign=True
    )
    model.tie_weights()
    assert not unexpected
    assert set(missing) <= {"lm_head.weight"}
    return model.eval()


def without_vocabulary(path: Path, target: Path) -> None:
    """Copy a GGUF file without its tokenizer, whose strings take gguf-py half a minute to read."""
    with open_checkpoint(path) as checkpoint:
        kept = {key: value for key, value in checkpoint.metadata.items() if not key.startswith("tokenizer.")}
        kept[f"{checkpoint.architecture}.vocab_size"] = checkpoint.tensors["token_embd.weight"].shape[0]
        kinds = {bool: (7, "<?"), int: (4, "<I"), float: (6, "<f")}
        pairs = []
        for key, value in kept.items():
            if isinstance(value, str):
                pairs.append(text(key) + struct.pack("<I", 8) + text(value))
            elif type(value) in kinds:
                kind, form = kinds[type(value)]
                pairs.append(text(key) + struct.pack("<I", kind) + struct.pack(form, value))
        tensors = checkpoint.tensors.values()
        first = min(tensor.offset for tensor in tensors)
        numbers = {name: number for number, name in TYPES.items()}
        entries = []
        for tensor in tensors:
            dimensions = struct.pack(f"<I{len(tensor.shape)}Q", len(tensor.shape), *tensor.shape[::-1])
            place = struct.pack("<IQ", numbers[tensor.dtype], tensor.offset - first)
            entries.append(text(tensor.name) + dimensions + place)
    header = b"GGUF" + struct.pack("<IQQ", 3, len(entries), len(pairs)) + b"".join(pairs + entries)
    with path.open("rb") as source, target.open("wb") as out:
        out.write(header + bytes(-len(header) % 32))
        source.seek(first)
        shutil.copyfileobj(source, out, 2**24)


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


LARGER = [
    pytest.param(name, marks=pytest.mark.long)
    for name in ("qwen_coder_path", "qwen_coder_large_path", "gemma_path")
]


@pytest.fixture(scope="module", params=["smollm2_path", *LARGER])
def parity(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Parity:
    return Parity(request.getfixturevalue(request.param), tmp_path_factory.mktemp("slim") / "slim.gguf")


def test_the_prompts_have_five_lengths_and_the_reference_reads_the_file(parity: Parity) -> None:
    lengths = {len(ids) for ids in parity.prompts.values()}
    assert len(lengths) == 5
    assert max(lengths) > 400, "longer than a chunk"
    assert parity.model.config.num_hidden_layers > 0


@pytest.mark.parametrize("name", PROMPTS)
def test_packed_the_next_token_is_the_references_or_a_tie(parity: Parity, name: str) -> None:
    way = parity.walk(name)
    assert way.others(way.packed, PACKED_TIE)[1] == []


def test_packed_few_tokens_are_others_at_all(parity: Parity) -> None:
    walks = [parity.walk(name) for name in PROMPTS]
    assert sum(way.others(way.packed, PACKED_TIE)[0] for way in walks) <= MOST_OTHER


@pytest.fixture(scope="module")
def exact(parity: Parity) -> Runner:
    parity.finish()
    return parity.runner("float32")


@pytest.mark.parametrize("name", PROMPTS)
def test_in_fp32_the_next_token_is_the_references_or_a_tie(parity: Parity, exact: Runner, name: str) -> None:
    way = parity.walk(name)
    logits = teacher_forced(exact, way)
    assert way.others(logits, TIE)[1] == []
    assert (logits - way.reference).abs().max() < 1e-3
