"""Gated DeltaNet against transformers' layers and against itself, through the pieces of every layout."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from gguf import GGUFWriter
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode

from cortex.neuron.models.delta_sources import delta_sources
from cortex.neuron.models.shape import DeltaShape
from cortex.neuron.nn import delta
from cortex.neuron.nn.delta import GatedDeltaNet, OutputLinear
from cortex.neuron.nn.delta_rule import Heads, recur, scan
from cortex.neuron.nn.linear import Linear
from cortex.neuron.nn.looks import Looks
from cortex.neuron.nn.placement import Dtype, Placement, Share
from cortex.neuron.nn.step import Access, Span, States, Step
from cortex.neuron.weights.checkpoint import Checkpoint, open_checkpoint
from cortex.neuron.weights.loader import load

CPU = torch.device("cpu")
WHOLE = Share()
HIDDEN, EPS = 40, 1e-6
SHAPE = DeltaShape(key_heads=4, value_heads=12, key_width=16, value_width=8, kernel=4)
TILED = DeltaShape(4, 12, 16, 8, 4, tiled=True)
JOINED = DeltaShape(4, 12, 16, 8, 4, joined_qkvz=True, joined_ba=True)
JOINED_BA = DeltaShape(4, 12, 16, 8, 4, joined_ba=True)
CHANNELS = 2 * 4 * 16 + 12 * 8


def random(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def apart(found: Tensor, expected: Tensor) -> float:
    assert found.shape == expected.shape
    return float((found - expected).abs().max())


# --- checkpoints of one layer, made from transformers' ---------------------------------------------


def reference(kind: str) -> Any:
    from transformers.models.qwen3_5.configuration_qwen3_5 import Qwen3_5TextConfig
    from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5GatedDeltaNet
    from transformers.models.qwen3_next.configuration_qwen3_next import Qwen3NextConfig
    from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextGatedDeltaNet

    configs, layers = {
        "flat": (Qwen3_5TextConfig, Qwen3_5GatedDeltaNet),
        "interleaved": (Qwen3NextConfig, Qwen3NextGatedDeltaNet),
    }[kind]
    config = configs(
        hidden_size=HIDDEN,
        num_hidden_layers=4,
        rms_norm_eps=EPS,
        linear_num_key_heads=SHAPE.key_heads,
        linear_num_value_heads=SHAPE.value_heads,
        linear_key_head_dim=SHAPE.key_width,
        linear_value_head_dim=SHAPE.value_width,
        linear_conv_kernel_dim=SHAPE.kernel,
    )
    torch.manual_seed(3)
    layer = layers(config, 0).eval().requires_grad_(False)
    layer.A_log.uniform_(-3, 2)
    layer.dt_bias.normal_()
    layer.norm.weight.uniform_(0.5, 1.5)
    return layer


def tile(tensor: Tensor, width: int) -> Tensor:
    """From grouped to tiled value heads, along dimension 0, as llama.cpp's converter does it."""
    grouped = tensor.reshape(SHAPE.key_heads, SHAPE.groups, width, *tensor.shape[1:])
    return grouped.transpose(0, 1).reshape(tensor.shape)


def ungrouped(tensor: Tensor, *widths: int) -> list[Tensor]:
    """The regions of an interleaved tensor."""
    blocks = tensor.reshape(SHAPE.key_heads, sum(widths), -1).split(widths, 1)
    return [block.reshape(-1, tensor.shape[1]) for block in blocks]


def write_safetensors(folder: Path, layer: Any) -> None:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "a layer"}))
    save_file({f"x.{n}": p.contiguous() for n, p in layer.state_dict().items()}, folder / "a.safetensors")


def write_gguf(path: Path, tensors: Mapping[str, Tensor]) -> None:
    writer = GGUFWriter(path, "qwen35")
    for name, tensor in tensors.items():
        writer.add_tensor(f"blk.0.{name}", tensor.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def gguf_tensors(layer: Any, order: Callable[[Tensor, int], Tensor]) -> dict[str, Tensor]:
    """What qwen35 and qwen3next have in common."""
    conv = layer.conv1d.weight.squeeze(1)
    keys, width = CHANNELS - SHAPE.value_heads * SHAPE.value_width, SHAPE.value_width
    return {
        "ssm_a": order(-layer.A_log.exp(), 1),
        "ssm_dt.bias": order(layer.dt_bias, 1),
        "ssm_conv1d.weight": torch.cat((conv[:keys], order(conv[keys:], width))),
        "ssm_norm.weight": layer.norm.weight,
        "ssm_out.weight": order(layer.out_proj.weight.T, width).T,
    }


class Layout(NamedTuple):
    """How a file has a layer, and which of transformers' layers it is."""

    file: str
    layer: str
    shape: DeltaShape


LAYOUTS = {
    "flat": Layout("flat", "flat", SHAPE),
    "interleaved": Layout("interleaved", "interleaved", JOINED),
    "tiled": Layout("tiled.gguf", "flat", TILED),
    "qwen3next": Layout("next.gguf", "interleaved", JOINED_BA),
    "old-qwen3next": Layout("old.gguf", "interleaved", JOINED),
}


@pytest.fixture(scope="module")
def references() -> dict[str, Any]:
    return {kind: reference(kind) for kind in ("flat", "interleaved")}


@pytest.fixture(scope="module")
def checkpoints(
    tmp_path_factory: pytest.TempPathFactory, references: dict[str, Any]
) -> dict[str, Checkpoint]:
    folder = tmp_path_factory.mktemp("delta")
    for kind, layer in references.items():
        write_safetensors(folder / kind, layer)
    flat, joined = references["flat"], references["interleaved"]
    keys, width = CHANNELS - SHAPE.value_heads * SHAPE.value_width, SHAPE.value_width
    qkv = flat.in_proj_qkv.weight
    write_gguf(
        folder / "tiled.gguf",
        gguf_tensors(flat, tile)
        | {
            "attn_qkv.weight": torch.cat((qkv[:keys], tile(qkv[keys:], width))),
            "attn_gate.weight": tile(flat.in_proj_z.weight, width),
            "ssm_beta.weight": tile(flat.in_proj_b.weight, 1),
            "ssm_alpha.weight": tile(flat.in_proj_a.weight, 1),
        },
    )
    plain = gguf_tensors(joined, lambda tensor, width: tensor) | {"ssm_ba.weight": joined.in_proj_ba.weight}
    qkvz, values = joined.in_proj_qkvz.weight, SHAPE.groups * width
    q, k, v, z = ungrouped(qkvz, SHAPE.key_width, SHAPE.key_width, values, values)
    write_gguf(folder / "old.gguf", plain | {"ssm_in.weight": qkvz})
    write_gguf(folder / "next.gguf", plain | {"attn_qkv.weight": torch.cat((q, k, v)), "attn_gate.weight": z})
    return {name: open_checkpoint(folder / layout.file) for name, layout in LAYOUTS.items()}


def build(shape: DeltaShape, placement: Placement) -> GatedDeltaNet:
    return GatedDeltaNet(
        HIDDEN,
        placement,
        key_heads=shape.key_heads,
        value_heads=shape.value_heads,
        key_width=shape.key_width,
        value_width=shape.value_width,
        kernel=shape.kernel,
        tiled=shape.tiled,
        eps=EPS,
    )


@pytest.fixture(scope="module")
def made(checkpoints: dict[str, Checkpoint]) -> Callable[..., GatedDeltaNet]:
    def make(name: str, share: Share = WHOLE, dtype: Dtype = "float32") -> GatedDeltaNet:
        layout, checkpoint = LAYOUTS[name], checkpoints[name]
        layer = build(layout.shape, Placement(CPU, dtype, share))
        prefix = "blk.0." if checkpoint.kind == "gguf" else "x."
        sources = delta_sources(prefix, checkpoint.kind, layout.shape, share)
        load(layer, sources, checkpoint, lambda done, total: None)
        return layer

    return make


@pytest.fixture(scope="module")
def layer(made: Callable[..., GatedDeltaNet]) -> GatedDeltaNet:
    return made("flat")


# --- steps and states -----------------------------------------------------------------------------


class State(NamedTuple):
    conv: Tensor
    memory: Tensor


def blank(slots: int = 1, world: int = 1, device: torch.device = CPU) -> State:
    return State(
        torch.zeros(slots, CHANNELS // world, SHAPE.kernel - 1, device=device),
        torch.zeros(slots, SHAPE.value_heads // world, SHAPE.key_width, SHAPE.value_width, device=device),
    )


def stepped(*parts: tuple[int, int], device: torch.device = CPU) -> Step:
    """Of parts (slot, tokens), one after the other."""
    rows, slots, spans, first = [], [], [], 0
    for slot, count in parts:
        if count == 1:
            rows.append(first)
            slots.append(slot)
        else:
            spans.append(Span(first, first + count, slot))
        first += count
    states = States(
        torch.tensor(rows, device=device) if rows else None,
        torch.tensor(slots, device=device) if rows else None,
        rows == [*range(len(rows))],
        tuple(spans),
    )
    nothing = torch.empty(0, dtype=torch.int64, device=device)
    return Step(nothing, nothing, None, Access(nothing, None, Looks((), False)), states=states)


def run(layer: GatedDeltaNet, x: Tensor, state: State, *parts: tuple[int, int]) -> Tensor:
    with torch.inference_mode():
        found: Tensor = layer(x, stepped(*parts), state)
    return found


# --- the rule -------------------------------------------------------------------------------------


class Tokens(NamedTuple):
    queries_keys: Tensor
    values: Tensor
    beta: Tensor
    log_decay: Tensor


def correlated(count: int, heads: Heads, width: int) -> Tokens:
    """Keys near to each other, long memories and strong updates: what is hard on the chunked form."""
    values = heads.keys * heads.groups
    keys = random(1, heads.keys, width, seed=5) + 0.3 * random(count, heads.keys, width, seed=6)
    queries = random(count, heads.keys, width, seed=7)
    beta = 0.5 + 0.5 * random(count, values, seed=8).sigmoid()
    decay = -0.02 * random(count, values, seed=9).abs()
    return Tokens(torch.stack((queries, keys), 1), random(count, values, width, seed=10), beta, decay)


def token_by_token(heads: Heads, tokens: Tokens, memory: Tensor) -> Tensor:
    slot = torch.zeros(1, dtype=torch.int64)
    found = []
    for at in range(tokens.values.shape[0]):
        found.append(recur(heads, *(part[at : at + 1] for part in tokens), memory, slot))
    return torch.cat(found)


def by_definition(heads: Heads, tokens: Tokens, state: Tensor) -> Tensor:
    """The rule as the paper has it, in fp64, each value head by itself."""
    found = torch.zeros(tokens.values.shape, dtype=torch.float64)
    for head in range(heads.keys * heads.groups):
        key_head = head % heads.keys if heads.tiled else head // heads.groups
        memory = state[head].double()
        for at in range(tokens.values.shape[0]):
            query, key = (x / (x @ x + 1e-6).sqrt() for x in tokens.queries_keys[at, :, key_head].double())
            memory = memory * tokens.log_decay[at, head].double().exp()
            change = tokens.beta[at, head].double() * (tokens.values[at, head].double() - key @ memory)
            memory = memory + torch.outer(key, change)
            found[at, head] = query @ memory
    return found


@pytest.mark.parametrize("tiled", [False, True])
def test_both_forms_are_the_rule(tiled: bool) -> None:
    heads = Heads(2, 3, tiled)
    tokens, start = correlated(70, heads, 12), random(1, 6, 12, 12)
    expected = by_definition(heads, tokens, start[0])
    assert apart(token_by_token(heads, tokens, start.clone()).double(), expected) < 1e-5
    assert apart(scan(heads, *tokens, start[0].clone()).double(), expected) < 1e-5


@pytest.mark.slow
def test_the_chunked_form_is_the_recurrent_one_over_4096_correlated_tokens() -> None:
    heads = Heads(2, 2, False)
    tokens = correlated(4096, heads, 32)
    recurrent, chunked = torch.zeros(1, 4, 32, 32), torch.zeros(4, 32, 32)
    expected = token_by_token(heads, tokens, recurrent)
    assert apart(scan(heads, *tokens, chunked), expected) < 1e-4
    assert apart(chunked, recurrent[0]) < 1e-4


@pytest.mark.parametrize("decay", [-1e4, -90.0, -1e-9])
@pytest.mark.parametrize("beta", [0.0, 1.0])
def test_extreme_gates_are_no_trouble(decay: float, beta: float) -> None:
    heads = Heads(2, 2, False)
    tokens = correlated(130, heads, 16)._replace(
        beta=torch.full((130, 4), beta), log_decay=torch.full((130, 4), decay)
    )
    recurrent, chunked = random(1, 4, 16, 16), random(1, 4, 16, 16)[0]
    expected = token_by_token(heads, tokens, recurrent)
    found = scan(heads, *tokens, chunked)
    assert found.isfinite().all()
    assert apart(found, expected) < 1e-4
    assert apart(chunked, recurrent[0]) < 1e-4


@pytest.mark.parametrize("part", range(4))
def test_damaged_numbers_show(part: int) -> None:
    heads = Heads(2, 2, False)
    tokens = correlated(70, heads, 16)
    tokens[part][3] = float("nan")
    assert scan(heads, *tokens, torch.zeros(4, 16, 16))[3].isnan().all()
    assert token_by_token(heads, tokens, torch.zeros(1, 4, 16, 16))[3].isnan().all()


def test_forgotten_numbers_are_zero_before_they_slow_the_products_down() -> None:
    """Decays of all strengths, and no number that CPUs cannot compute with at speed."""
    heads = Heads(2, 2, False)
    decay = torch.linspace(-30, -0.1, 256).view(64, 4)
    state, products = torch.zeros(4, 16, 16), []

    class Watch(TorchFunctionMode):
        def __torch_function__(self, function: Any, kinds: Any, given: Any = (), named: Any = None) -> Any:
            if function in (torch.bmm, torch.baddbmm, torch.Tensor.baddbmm_):
                products.extend(x.clone() for x in given)
            return function(*given, **(named or {}))

    with Watch():
        scan(heads, *correlated(64, heads, 16)._replace(log_decay=decay), state)
    assert len(products) == 10
    tiny = torch.finfo(torch.float32).tiny
    assert not any(((x != 0) & (x.abs() < tiny)).any() for x in products)


# --- the layer ------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [1, 2, 3, 63, 64, 65, 130, 200])
@pytest.mark.parametrize("name", LAYOUTS)
def test_the_layer_is_that_of_transformers(
    made: Callable[..., GatedDeltaNet], references: dict[str, Any], name: str, length: int
) -> None:
    x = random(length, HIDDEN)
    expected = references[LAYOUTS[name].layer](x.unsqueeze(0))[0]
    assert expected.abs().max() > 0.1
    assert apart(run(made(name), x, blank(), (0, length)), expected) < 1e-4


@pytest.mark.slow
@given(cuts=st.sets(st.integers(1, 149), max_size=8), ones=st.integers(0, 5))
@settings(max_examples=25, deadline=None)
def test_a_state_carried_over_any_cuts_is_as_if_there_were_none(
    layer: GatedDeltaNet, cuts: set[int], ones: int
) -> None:
    x = random(150, HIDDEN)
    whole, pieced = blank(), blank()
    expected = run(layer, x, whole, (0, 150))
    borders = sorted({0, *cuts, *range(150 - ones, 151)})
    found = [
        run(layer, x[first:last], pieced, (0, last - first)) for first, last in itertools.pairwise(borders)
    ]
    assert apart(torch.cat(found), expected) < 1e-4
    assert apart(pieced.memory, whole.memory) < 1e-4
    assert apart(pieced.conv, whole.conv) < 1e-6


def filled_states(layer: GatedDeltaNet) -> State:
    """Six slots, each with a past of its own."""
    state = blank(6)
    for slot in range(6):
        run(layer, random(7, HIDDEN, seed=slot + 20), state, (slot, 7))
    return state


def copied(state: State) -> State:
    return State(*(part.clone() for part in state))


@pytest.mark.parametrize(
    "parts",
    [
        [(3, 1), (0, 1), (5, 1)],
        [(1, 1), (2, 1), (4, 70), (0, 5)],
        [(4, 70), (1, 1), (0, 5), (2, 1)],
        [(2, 9), (3, 2)],
    ],
)
def test_sequences_in_one_step_are_each_as_alone(layer: GatedDeltaNet, parts: list[tuple[int, int]]) -> None:
    """And the slots that no one has in the step stay as they are."""
    together = filled_states(layer)
    alone = copied(together)
    x = random(sum(count for _, count in parts), HIDDEN)
    found = run(layer, x, together, *parts)
    first = 0
    for slot, count in parts:
        expected = run(layer, x[first : first + count], alone, (slot, count))
        assert apart(found[first : first + count], expected) < 1e-5
        first += count
    assert apart(together.memory, alone.memory) < 1e-5
    assert apart(together.conv, alone.conv) < 1e-5


def test_what_neighbours_hold_changes_nothing(layer: GatedDeltaNet) -> None:
    state, other = filled_states(layer), filled_states(layer)
    other.memory[3] = 1e6 * random(*other.memory[3].shape)
    x = random(3, HIDDEN)
    changed = torch.stack((x[0], 1e3 * x[1], x[2]))
    found, expected = (
        run(layer, tokens, held, (0, 1), (3, 1), (5, 1)) for tokens, held in ((changed, other), (x, state))
    )
    assert apart(found[[0, 2]], expected[[0, 2]]) < 1e-6
    assert torch.equal(other.memory[[0, 1, 2, 4, 5]], state.memory[[0, 1, 2, 4, 5]])


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("name", LAYOUTS)
def test_the_ranks_outputs_add_up_to_the_whole(
    made: Callable[..., GatedDeltaNet], monkeypatch: pytest.MonkeyPatch, name: str, world: int
) -> None:
    monkeypatch.setattr(delta, "sum_over_ranks", lambda partial, share: partial)
    x, parts = random(75, HIDDEN), [(1, 1), (0, 74)]
    whole = made(name)
    expected = run(whole, x, blank(2), *parts)
    found = torch.zeros_like(expected)
    read: list[int] = []
    for rank in range(world):
        layer = made(name, Share(rank, world))
        found += run(layer, x, blank(2, world), *parts)
        read.append(sum(module.nbytes for module in layer.modules() if hasattr(module, "nbytes")))
    assert apart(found, expected) < 1e-4
    assert len(set(read)) == 1


@pytest.mark.parametrize(("dtype", "most"), [("packed16", 2e-3), ("int8", 5e-2)])
def test_gates_convolution_and_norm_stay_fp32_where_matrices_are_packed(
    made: Callable[..., GatedDeltaNet], layer: GatedDeltaNet, dtype: Dtype, most: float
) -> None:
    packed = made("flat", dtype=dtype)
    for name, parameter in packed.named_parameters():
        assert torch.equal(parameter, layer.get_parameter(name))
    x = random(90, HIDDEN)
    expected = run(layer, x, blank(), (0, 90))
    assert (run(packed, x, blank(), (0, 90)) - expected).norm() < most * expected.norm()


class ByRows(dict[str, Tensor]):
    """Tensors that remember which were asked for whole; `rows` gives them as they are."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        super().__init__(tensors)
        self.whole: list[str] = []

    def __getitem__(self, name: str) -> Tensor:
        self.whole.append(name)
        return super().__getitem__(name)

    def rows(self, name: str) -> Tensor:
        return super().__getitem__(name)


@pytest.mark.parametrize("dtype", ["packed16", "int8"])
def test_an_output_of_one_block_is_packed_by_its_rows(dtype: Dtype) -> None:
    placement = Placement(CPU, dtype)
    plain, output = Linear(64, 40, placement), OutputLinear(64, 40, placement, 1)
    tensors = ByRows({"weight": random(40, 64)})
    output.fill(tensors)
    assert not tensors.whole
    plain.fill({"weight": random(40, 64)})
    assert output.staged == plain.staged
    assert torch.equal(output(random(3, 64, seed=2)), plain(random(3, 64, seed=2)))


@pytest.mark.parametrize("dtype", ["packed16", "int8", "float32"])
def test_an_output_of_several_blocks_says_that_it_takes_two_copies_on_the_way(dtype: Dtype) -> None:
    weight, placement = random(40, 64), Placement(CPU, dtype)
    output = OutputLinear(64, 40, placement, 4)
    assert output.staged == 2 * weight.nbytes
    output.fill({"weight": torch.cat(weight.chunk(4, 1))})
    plain = Linear(64, 40, placement)
    plain.fill({"weight": weight})
    assert output.nbytes == plain.nbytes
    assert torch.equal(output(random(3, 64, seed=2)), plain(random(3, 64, seed=2)))


# --- a CUDA device that is not there --------------------------------------------------------------


@pytest.fixture
def cuda() -> Iterator[torch.device]:
    with pytest.MonkeyPatch.context() as patch, FakeTensorMode():
        # A build without CUDA has no device guard, which the method asks for and the operator does not.
        copy = torch.ops.aten.copy_.default
        patch.setattr(torch.Tensor, "copy_", lambda target, source: copy(target, source))
        yield torch.device("cuda", 0)


@pytest.mark.parametrize("dtype", ["float32", "packed16"])
@pytest.mark.parametrize("parts", [[(0, 1), (2, 1)], [(0, 1), (1, 70)], [(1, 130), (0, 1)], [(3, 64)]])
def test_on_cuda_all_stays_on_the_device(
    cuda: torch.device, parts: list[tuple[int, int]], dtype: Dtype
) -> None:
    layer = build(TILED, Placement(cuda, dtype))
    for module in layer.modules():
        own = dict(module.named_parameters(recurse=False))
        if own:
            filled: Any = module
            filled.fill({name: torch.empty(p.shape, dtype=p.dtype) for name, p in own.items()})
    rows = sum(count for _, count in parts)
    found = layer(torch.empty(rows, HIDDEN, device=cuda), stepped(*parts, device=cuda), blank(4, device=cuda))
    assert (found.shape, found.dtype, found.device) == ((rows, HIDDEN), torch.float32, cuda)
