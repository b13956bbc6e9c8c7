"""Weights in FP8 with their scales: what a configuration says, what does not fit, and what is read."""

from __future__ import annotations

import copy
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from cortex.neuron.weights import reading
from cortex.neuron.weights.checkpoint import open_checkpoint
from cortex.neuron.weights.reading import Parameter, Stored, row_count, stored_bytes
from cortex.neuron.weights.scaling import ROW, WHOLE, Block, check_readable, read_blocks
from cortex.neuron.weights.source import Piece, Source
from cortex.wire.errors import LoadFailed

FP8: dict[str, Any] = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "activation_scheme": "dynamic",
    "weight_block_size": [4, 6],
    "modules_to_not_convert": ["lm_head"],
}
CONFIG = Path("/m/config.json")


def compressed(strategy: str | None = "channel", /, **weights: Any) -> dict[str, Any]:
    """What llm-compressor writes."""
    of_weights = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": strategy, **weights}
    group = {"targets": ["Linear"], "weights": of_weights, "input_activations": {"num_bits": 8}}
    return {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
        "sparsity_config": {},
    }


def with_group(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    groups = {**first["config_groups"], "group_1": second["config_groups"]["group_0"]}
    return {**first, "config_groups": groups}


BLOCKS = compressed("block", block_structure=[4, 6])


@pytest.mark.parametrize(
    ("config", "blocks"),
    [
        ({}, ()),
        ({"quantization_config": None}, ()),
        ({"quantization_config": FP8}, (Block(4, 6),)),
        ({"text_config": {"quantization_config": FP8}}, (Block(4, 6),)),
        ({"quantization_config": {**FP8, "weight_block_size": None}}, (WHOLE, ROW)),
        ({"quantization_config": {"quant_method": "fp8"}}, (WHOLE, ROW)),
        ({"quantization_config": compressed()}, (ROW,)),
        ({"compression_config": compressed("tensor")}, (WHOLE,)),
        ({"quantization_config": BLOCKS}, (Block(4, 6),)),
        ({"quantization_config": with_group(compressed("tensor"), BLOCKS)}, (WHOLE, Block(4, 6))),
        (
            {"quantization_config": {**compressed(), "config_groups": {"kv": {"weights": None}}}},
            (),
        ),
    ],
)
def test_a_configuration_says_what_scales_are_for(config: dict[str, Any], blocks: tuple[Block, ...]) -> None:
    assert read_blocks(config, CONFIG) == blocks


@pytest.mark.parametrize(
    ("quantization", "said"),
    [
        (
            {"quant_method": "awq", "bits": 4},
            "the quantization 'awq' (fp8 and, with weights of 8-bit floats, ",
        ),
        ({"quant_method": "gptq", "bits": 4, "group_size": 128}, "the quantization 'gptq' (fp8 and"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "the quantization 'bitsandbytes' (fp8 and"),
        ({}, "the quantization 'unnamed' (fp8 and"),
        ([4], "the quantization [4] (fp8 and"),
        ({**FP8, "fmt": "e5m2"}, "'fp8' of the format 'e5m2'"),
        ({**FP8, "weight_block_size": [128]}, "the quantization cannot be read ("),
        ({**FP8, "weight_block_size": [0, 128]}, "the quantization cannot be read ("),
        ({"quant_method": "compressed-tensors"}, "the quantization cannot be read ("),
        (
            {**compressed("group", num_bits=4, type="int", group_size=128), "format": "pack-quantized"},
            "'compressed-tensors' with 4-bit int weights in group_0, pack-quantized (symmetric 8-bit floats",
        ),
        (compressed(type="int"), "'compressed-tensors' with 8-bit int weights in group_0"),
        (compressed(symmetric=False), "'compressed-tensors' with 8-bit float weights in group_0"),
        (compressed("group", group_size=32), "the quantization strategy 'group'"),
        (compressed("block"), "the quantization strategy 'block'"),
        ({**compressed(), "format": "mxfp8-quantized"}, "in the format 'mxfp8-quantized'"),
        ({**compressed(), "sparsity_config": {"format": "sparse-24-bitmask"}}, "of sparse weights"),
        ({**compressed(), "transform_config": {"config_groups": {}}}, "with transforms of weights"),
        (
            with_group(BLOCKS, compressed("block", block_structure=[2, 6])),
            "with blocks of several sizes",
        ),
    ],
)
def test_what_cannot_be_read_is_refused_by_its_method_before_anything_else(
    tmp_path: Path, quantization: Any, said: str
) -> None:
    """The files of such a checkpoint hold tensors of other names, which would be missed one by one."""
    save_file({"model.layers.0.mlp.up_proj.qweight": torch.ones(2)}, tmp_path / "model.safetensors")
    config = {"model_type": "llama", "quantization_config": quantization}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(LoadFailed) as caught:
        open_checkpoint(tmp_path)
    assert said in caught.value.message
    assert str(tmp_path / "config.json") in caught.value.message


LIES: list[Any] = [
    0,
    -1,
    1,
    8,
    2**63,
    2**64,
    1e300,
    None,
    True,
    "",
    "float",
    [],
    [3],
    [128, 128],
    {},
    {"a": 1},
]


def places(plain: Any) -> Iterator[tuple[Any, Any]]:
    for key in list(plain) if isinstance(plain, dict) else range(len(plain)):
        yield plain, key
        if isinstance(plain[key], dict | list):
            yield from places(plain[key])


@pytest.mark.parametrize("truth", [FP8, BLOCKS], ids=["fp8", "compressed-tensors"])
def test_any_value_of_a_quantization_may_lie(truth: dict[str, Any]) -> None:
    refused = 0
    for index, lie in itertools.product(range(len(list(places(truth)))), LIES):
        config = copy.deepcopy(truth)
        container, key = list(places(config))[index]
        container[key] = lie
        try:
            blocks = read_blocks({"quantization_config": config}, CONFIG)
        except LoadFailed as error:
            refused += 1
            assert str(CONFIG) in error.message
        else:
            assert all(size >= 0 for block in blocks for size in block)
    assert refused > 20


# --- what is read ------------------------------------------------------------------------------------


def write(folder: Path, quantization: dict[str, Any] | None, **tensors: Tensor) -> None:
    folder.mkdir(exist_ok=True)
    config: dict[str, Any] = {"model_type": "llama"}
    if quantization is not None:
        config["quantization_config"] = quantization
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors")


def eights(*shape: int) -> Tensor:
    """Every number but NaN occurs among many."""
    raw = torch.randint(0, 254, shape, generator=torch.Generator().manual_seed(3), dtype=torch.uint8)
    return (raw + (raw >= 127)).view(torch.float8_e4m3fn)


def expected_numbers(weight: Tensor, scales: Tensor, block: Block) -> Tensor:
    """Number by number, as the format says it."""
    rows, columns = weight.shape[-2:]
    high, wide = block.rows or rows, block.columns or columns
    found = weight.float().reshape(-1, rows, columns).clone()
    grid = scales.float().reshape(len(found), -(-rows // high), -(-columns // wide))
    for at in range(len(found)):
        for row in range(rows):
            for column in range(columns):
                found[at, row, column] *= grid[at, row // high, column // wide]
    return found.view(-1, columns)


@st.composite
def scaled(draw: st.DrawFn) -> tuple[Tensor, Tensor, Block, dict[str, Any]]:
    """A weight, its scales, their blocks and the configuration that says so."""
    matrices = draw(st.sampled_from([(), (1,), (3,)]))
    rows, columns = draw(st.integers(1, 13)), draw(st.integers(1, 13))
    block = draw(st.sampled_from([WHOLE, ROW, None])) or Block(
        draw(st.integers(1, 7)), draw(st.integers(1, 7))
    )
    config = {WHOLE: compressed("tensor"), ROW: compressed()}.get(block)
    config = config or {**FP8, "weight_block_size": list(block)}
    grid = (-(-rows // (block.rows or rows)), -(-columns // (block.columns or columns)))
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    scales = torch.rand(*matrices, *grid, generator=torch.Generator().manual_seed(7)).add(0.1).to(dtype)
    if not matrices and grid[1] == 1 and draw(st.booleans()):
        scales = scales.view(-1) if grid[0] > 1 or draw(st.booleans()) else scales.view(())
    return eights(*matrices, rows, columns), scales, block, config


@st.composite
def pieces(draw: st.DrawFn, weight: Tensor) -> tuple[Source, Tensor]:
    """Some rows and columns in any order, and where of all numbers each comes from."""
    height, width = weight.shape[:-1].numel(), weight.shape[-1]
    first = draw(st.integers(0, width - 1))
    columns = draw(st.sampled_from([None, (first, draw(st.integers(first, width)))]))
    low, high = columns or (0, width)
    numbers = torch.arange(height * width).view(height, width)[:, low:high]
    source, places = [], []
    for _ in range(draw(st.integers(1, 3))):
        start = draw(st.integers(0, height - 1))
        stop = draw(st.integers(start + 1, height))
        pairs = draw(st.sampled_from([0, *(n for n in (2, 4, 6) if (stop - start) % n == 0)]))
        order = [*range(start, stop)]
        if pairs:
            heads = range(start, stop, pairs)
            order = [head + i + odd for head in heads for i in range(pairs // 2) for odd in (0, pairs // 2)]
        source.append(Piece("w", start, stop, pairs=pairs, columns=columns))
        places.append(numbers[order])
    return tuple(source), torch.cat(places)


@given(data=st.data())
def test_any_rows_and_columns_are_numbers_times_the_scale_of_their_block(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """In chunks of any length; and what is counted as read is what was foretold, however it is read."""
    weight, scales, block, config = data.draw(scaled())
    source, places = data.draw(pieces(weight))
    folder = tmp_path_factory.getbasetemp() / "scaled"
    write(folder, config, w=weight, w_scale_inv=scales)
    expected = expected_numbers(weight, scales, block).view(-1)[places]
    counted: list[int] = []
    with open_checkpoint(folder) as checkpoint, pytest.MonkeyPatch.context() as patch:
        patch.setattr(reading, "CHUNK", data.draw(st.sampled_from([1, 20, 2**19])))
        check_readable(checkpoint.tensors["w"])
        parameter = Parameter(
            tuple(expected.shape), torch.float32, source, Stored(checkpoint), counted.append
        )
        parameter.read_ahead()
        assert torch.equal(parameter[:], expected)
        foretold = sum(stored_bytes(piece, checkpoint.tensors["w"]) for piece in source)
        assert sum(counted) == foretold
        counted.clear()
        at = [0, *sorted(data.draw(st.sets(st.integers(1, len(expected))))), len(expected)]
        parts = [parameter[start:stop] for start, stop in itertools.pairwise(at)]
        assert torch.equal(torch.cat(parts), expected)
        assert sum(counted) == foretold


def test_scales_count_with_what_is_read_of_them(tmp_path: Path) -> None:
    """Rows 3 to 9 are in three lines of blocks, columns 5 to 12 in two of three blocks."""
    write(tmp_path, FP8, w=eights(16, 18), w_scale_inv=torch.ones(4, 3))
    with open_checkpoint(tmp_path) as checkpoint:
        tensor = checkpoint.tensors["w"]
        assert stored_bytes(Piece("w"), tensor) == 16 * 18 + 4 * 12
        assert stored_bytes(Piece("w", 3, 9, columns=(5, 12)), tensor) == 6 * 7 + 4 * 3 * 2


def test_no_more_than_a_chunk_is_ever_in_fp32(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    most, plain = [0], reading.dequantize

    def watched(raw: Tensor, dtype: str) -> Tensor:
        numbers = plain(raw, dtype)
        most.append(numbers.numel())
        return numbers

    monkeypatch.setattr(reading, "dequantize", watched)
    write(
        tmp_path,
        {**FP8, "weight_block_size": [128, 128]},
        w=eights(1600, 1000),
        w_scale_inv=torch.ones(13, 8),
    )
    with open_checkpoint(tmp_path) as checkpoint:
        parameter = Parameter(
            (1600, 1000), torch.float16, (Piece("w"),), Stored(checkpoint), lambda nbytes: None
        )
        assert parameter[:].shape == (1600, 1000)
    assert 1000 < max(most) <= reading.CHUNK


def test_a_number_that_is_none_stays_one(tmp_path: Path) -> None:
    """So that a damaged weight shows."""
    weight = eights(8, 12)
    weight.view(torch.uint8)[5, 7] = 0xFF
    write(tmp_path, FP8, w=weight, w_scale_inv=torch.ones(2, 2))
    with open_checkpoint(tmp_path) as checkpoint:
        found = Parameter((8, 12), torch.float32, (Piece("w"),), Stored(checkpoint), lambda nbytes: None)[:]
    assert found.isnan().nonzero().tolist() == [[5, 7]]


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(32, 24), (3, 32, 24)], ids=["matrix", "stack"])
def test_what_transformers_writes_is_read_as_it_reads_it(tmp_path: Path, shape: tuple[int, ...]) -> None:
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize, Fp8Quantize
    from transformers.utils.quantization_config import FineGrainedFP8Config

    config = FineGrainedFP8Config(weight_block_size=(16, 8))
    name = "mlp.experts.gate_up_proj" if len(shape) > 2 else "self_attn.q_proj.weight"
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    written = Fp8Quantize(SimpleNamespace(quantization_config=config)).convert({name: weight})
    pair = {"weight": written[name], "weight_scale_inv": written[f"{name}_scale_inv"]}
    expected = Fp8Dequantize(None).convert(pair)["weight"].view(-1, shape[-1])
    write(tmp_path, config.to_dict(), **written)
    with open_checkpoint(tmp_path) as checkpoint:
        assert row_count(Piece(name), checkpoint.tensors[name]) == len(expected)
        parameter = Parameter(tuple(expected.shape), torch.float32, (Piece(name),), Stored(checkpoint), int)
        assert torch.equal(parameter[:], expected)


ONES = torch.ones


@pytest.mark.parametrize(
    ("config", "tensors", "said"),
    [
        (
            FP8,
            {},
            "model.safetensors: tensor w is stored as F8_E4M3 and has no scales: a tensor w_scale_inv or ",
        ),
        (None, {"w_scale_inv": ONES(2, 2)}, "tensor w is stored as F8_E4M3 and has no scales"),
        (FP8, {"w_scale_inv": ONES(2, 3)}, "w_scale_inv has the shape [2, 3] as F32; as scales of tensor w "),
        (FP8, {"w_scale_inv": ONES(4)}, "it must have [2, 2] as F32, BF16, F16"),
        (FP8, {"w_scale_inv": ONES(())}, "it must have [2, 2]"),
        (FP8, {"w_scale_inv": ONES(2, 2).int()}, "w_scale_inv has the shape [2, 2] as I32"),
        (FP8, {"w_scale_inv": eights(2, 2)}, "w_scale_inv has the shape [2, 2] as F8_E4M3"),
        (compressed(), {"w_scale": ONES(1)}, "w_scale has the shape [1] as F32; "),
        (compressed(), {"w_scale": ONES(8, 2)}, "it must have [8, 1]"),
        (compressed("tensor"), {"w_scale": ONES(8, 1)}, "it must have [1, 1]"),
        (BLOCKS, {"w_scale": ONES(8, 1)}, "it must have [2, 2]"),
    ],
)
def test_scales_that_are_missing_or_do_not_fit_are_named_if_they_are_needed(
    tmp_path: Path, config: dict[str, Any] | None, tensors: dict[str, Tensor], said: str
) -> None:
    write(tmp_path, config, w=eights(8, 12), **tensors)
    with open_checkpoint(tmp_path) as checkpoint, pytest.raises(LoadFailed) as caught:
        check_readable(checkpoint.tensors["w"])
    assert said in caught.value.message
    assert str(tmp_path / "model.safetensors") in caught.value.message
