from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from cortex.neuron.nn.embedding import Embedding
from cortex.neuron.nn.linear import Linear, product
from cortex.neuron.nn.looks import FILLED, GATHERED, Gathered, View
from cortex.neuron.nn.mlp import GatedMLP
from cortex.neuron.nn.moe import Projection
from cortex.neuron.nn.norm import FEW_ROWS, RMSNorm
from cortex.neuron.nn.packing import most_bytes
from cortex.neuron.nn.placement import Dtype, Placement, Share
from cortex.neuron.nn.plan import Run, Segment, StepPlan, parts
from cortex.neuron.nn.rotary import inverse_frequencies, rotate_, rotations
from cortex.neuron.nn.step import prepare

CPU = torch.device("cpu")
EXACT = Placement(CPU, "float32")
PACKED = Placement(CPU, "packed16")


def random(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("rows", [1, FEW_ROWS, FEW_ROWS + 1, 40])
def test_rms_norm_is_its_formula_for_few_and_many_rows(rows: int) -> None:
    x, weight = 30 * random(rows, 96) + 5, random(96, seed=2)
    norm = RMSNorm(96, 1e-5, EXACT)
    norm.fill({"weight": weight})
    exact = x.double()
    expected = exact * torch.rsqrt(exact.square().mean(-1, keepdim=True) + 1e-5) * weight
    assert torch.allclose(norm(x).double(), expected, rtol=2e-6, atol=2e-6)


def test_a_router_s_logits_do_not_depend_on_who_computes_them_with_what() -> None:
    """One row or many, one thread or two: the sums have another order, and what comes of them is the same."""
    x, weight = random(64, 700), random(96, 700, seed=2)
    router = Projection(700, 96, EXACT, double=True)
    router.fill({"weight": weight})
    together = router(x)
    assert together.dtype == torch.float32
    assert torch.equal(torch.cat([router(row) for row in x.split(1)]), together)
    backwards = Projection(700, 96, EXACT, double=True)
    backwards.fill({"weight": weight.flip(1)})
    assert torch.equal(backwards(x.flip(1)), together)
    assert router.nbytes == 8 * 700 * 96


def test_rms_norm_keeps_a_row_of_zeros() -> None:
    norm = RMSNorm(8, 1e-5, EXACT)
    norm.fill({"weight": torch.ones(8)})
    assert torch.equal(norm(torch.zeros(1, 8)), torch.zeros(1, 8))


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("rows", [1, 3, 70])
@pytest.mark.parametrize(("dtype", "most"), [("packed16", 4e-4), ("int8", 2e-2)])
def test_a_packed_linear_loses_nothing_but_the_rounding_of_its_form(
    biased: bool, rows: int, dtype: Dtype, most: float
) -> None:
    x, weight, bias = random(rows, 72), random(50, 72, seed=2), random(50, seed=3) if biased else None
    linear = Linear(72, 50, Placement(CPU, dtype), bias=biased)
    linear.fill({"weight": weight.clone()} | ({} if bias is None else {"bias": bias}))
    expected = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    assert (linear(x) - expected).norm() <= most * expected.norm()
    assert linear.nbytes - 200 * biased <= most_bytes(72, 50, dtype)
    assert linear.weight is linear.bias is None


@pytest.mark.parametrize("size", [1e-6, 1.0, 1e6])
@pytest.mark.parametrize("biased", [False, True])
def test_a_product_with_a_weight_in_fp16_has_rows_of_any_size(size: float, biased: bool) -> None:
    """Beyond what fp16 can hold too, where some models' activations are, and with rows of zeros."""
    x, weight, bias = size * random(5, 72), random(50, 72, seed=2).half(), random(50, seed=3)
    x[1:3] *= torch.tensor([[1e-3], [0.0]])
    found = product(x, weight, bias if biased else None)
    expected = F.linear(x.double(), weight.double(), bias.double() if biased else None)
    assert found.dtype == torch.float32
    errors, sizes = (found - expected).norm(dim=1), expected.norm(dim=1)
    assert (errors <= 1e-3 * sizes).all()
    assert torch.equal(product(x, weight.float()), F.linear(x, weight.float()))


def test_a_packed_linear_does_not_mix_rows() -> None:
    linear = Linear(64, 64, PACKED)
    linear.fill({"weight": random(64, 64)})
    x = random(9, 64, seed=2)
    x[4] *= 1000
    assert torch.allclose(linear(x)[2], linear(x[2:3])[0], atol=1e-5)


def test_a_full_precision_linear_is_exact() -> None:
    weight, bias, x = random(5, 4), random(5, seed=2), random(3, 4, seed=3)
    linear = Linear(4, 5, EXACT, bias=True)
    linear.fill({"weight": weight, "bias": bias})
    assert torch.equal(linear(x), F.linear(x, weight, bias))
    assert linear.nbytes == 4 * (5 * 4 + 5)


@pytest.mark.parametrize("dtype", ["float32", "packed16", "int8"])
def test_an_embedding_gives_rows_of_its_table_in_fp32(dtype: Dtype) -> None:
    table = random(10, 6).half().float()
    embedding = Embedding(10, 6, Placement(CPU, dtype))
    embedding.fill({"weight": table.to(embedding.weight.dtype)})
    ids = torch.tensor([3, 3, 9])
    assert embedding(ids).dtype == torch.float32
    assert torch.equal(embedding(ids), table[ids])


def test_the_gated_mlp_is_its_formula() -> None:
    x, gate, up, down = random(3, 8), random(12, 8, seed=2), random(12, 8, seed=3), random(8, 12, seed=4)
    mlp = GatedMLP(8, 12, EXACT, bias=False)
    mlp.gate_up.fill({"weight": torch.cat((gate, up))})
    mlp.down.fill({"weight": down})
    assert torch.allclose(mlp(x), (F.silu(x @ gate.T) * (x @ up.T)) @ down.T, atol=1e-5)


def test_rotating_pairs_is_rotating_halves_of_reordered_rows() -> None:
    heads = random(5, 3, 16)
    angles = torch.tensor([0, 1, 2, 700, 30]).float().unsqueeze(-1) * inverse_frequencies(16, 10000.0)
    cos, sin = (torch.cat((part, part), -1).unsqueeze(1) for part in (angles.cos(), angles.sin()))
    halves = torch.cat((-heads[..., 8:], heads[..., :8]), -1)
    expected = heads * cos + halves * sin
    pairs = heads.unflatten(-1, (2, 8)).transpose(-1, -2).reshape(heads.shape).contiguous()
    rotate_(pairs, rotations(torch.tensor([0, 1, 2, 700, 30]), inverse_frequencies(16, 10000.0)))
    back = pairs.unflatten(-1, (8, 2)).transpose(-1, -2).reshape(heads.shape)
    assert torch.allclose(back, expected, atol=1e-6)


# --- plans and steps ------------------------------------------------------------------------------


def test_a_step_gives_each_segment_its_rows_and_each_token_its_position() -> None:
    """A chunk sees its past run by run and itself causally; a token sees its run, itself included."""
    chunk, token = Segment(4, 3, [(20, 2), (30, 5)]), Segment(9, 1, [(0, 10)])
    step = prepare(StepPlan([7, 8, 9, 5], [chunk, token], [2, 3]), CPU)
    assert step.ids.tolist() == [7, 8, 9, 5]
    assert step.positions.tolist() == [4, 5, 6, 9]
    assert step.full.slots.tolist() == [32, 33, 34, 9]
    assert step.asked is not None
    assert step.asked.rows.tolist() == [2, 3]
    assert not step.full.looks.in_order
    assert step.full.looks.views == (
        View(3, 4, None, 0, 10, False, True),
        View(0, 3, None, 0, 3, True, True),
        View(0, 3, None, 20, 2, False, False),
        View(0, 3, None, 30, 2, False, False),
    )


def test_the_rows_that_are_asked_for_look_at_what_they_see_in_the_whole_step() -> None:
    """Of the first sequence a chunk's last row, of the second nothing, of the third two together and one."""
    first, second = Segment(4, 3, [(20, 2), (30, 5)], 1), Segment(0, 2, [(50, 2)])
    third = Segment(1, 5, [(60, 4), (70, 2)], 2)
    asked = StepPlan([*range(10)], [first, second, third], [2, 5, 6, 8]).asked()
    assert asked.ids == [2, 5, 6, 8]
    assert asked.positions == [6, 1, 2, 4]
    assert asked.segments == [
        Segment(6, 1, [(20, 2), (30, 5)], 1),
        Segment(1, 2, [(60, 3)], 2),
        Segment(4, 1, [(60, 4), (70, 1)], 2),
    ]
    assert asked.wanted == [0, 1, 2, 3]
    step = prepare(StepPlan([1, 2], [Segment(0, 2, [(0, 2)])], []), CPU)
    assert step.asked is not None
    assert (step.asked.rows.tolist(), step.asked.step) == ([], None)


def test_rows_that_see_the_same_run_look_together() -> None:
    """Rows 0, 2 and 3 have the run (0, 8) before their own; for row 1, it comes second. None is gathered."""
    runs = [[(0, 8), (20, 1)], [(40, 3), (0, 8)], [(0, 8), (30, 2)], [(0, 8), (50, 4)]]
    segments = [Segment(sum(count for _, count in seen) - 1, 1, seen) for seen in runs]
    step = prepare(StepPlan([1, 2, 3, 4], segments, [0, 1, 2, 3]), CPU, row_bytes=GATHERED["cpu"])
    assert step.asked is None
    assert step.full.slots.tolist() == [20, 7, 31, 53]
    looked = [
        ([*range(view.first, view.last)] if view.rows is None else view.rows.tolist(), view.start, view.fresh)
        for view in step.full.looks.views
    ]
    assert looked == [
        ([0, 1, 2, 3], 0, True),
        ([0], 20, False),
        ([1], 40, False),
        ([2], 30, False),
        ([3], 50, False),
    ]


def tokens(runs: list[list[Run]]) -> StepPlan:
    """One token each of sequences that lie there."""
    segments = [Segment(sum(count for _, count in seen) - 1, 1, seen) for seen in runs]
    return StepPlan([0] * len(runs), segments, [])


def test_runs_in_which_sequences_end_are_gathered() -> None:
    """All but those of rows 2 and 3, which end in the same one; row 1 has looked then, and looks again."""
    runs = [[(0, 5)], [(10, 4), (20, 3)], [(30, 6)], [(30, 6)], [(40, 8)], [(60, 7)]]
    looks = prepare(tokens(runs), CPU).full.looks
    assert not looks.in_order
    found = looks.views[0]
    assert isinstance(found, Gathered)
    assert found.rows is not None
    assert found.rows.tolist() == [0, 1, 4, 5]
    assert found.keys.view(4, 8).tolist() == [
        [0, 1, 2, 3, 4, 4, 4, 4],
        [20, 21, 22, 22, 22, 22, 22, 22],
        [40, 41, 42, 43, 44, 45, 46, 47],
        [60, 61, 62, 63, 64, 65, 66, 66],
    ]
    assert found.mask is not None
    assert found.mask.isinf().view(4, 8).sum(1).tolist() == [3, 5, 0, 1]
    others = [(view.start, view.length, view.fresh) for view in looks.views[1:] if isinstance(view, View)]
    assert others == [(10, 4, False), (30, 6, True)]


def test_rows_are_gathered_with_those_that_see_about_as_much_and_not_with_too_many() -> None:
    row_bytes = 2**13

    def together(lengths: list[int]) -> list[tuple[int, int, int]]:
        plan = tokens([[(9000 * index, length)] for index, length in enumerate(lengths)])
        looks = prepare(plan, CPU, row_bytes=row_bytes).full.looks
        return [(view.first, view.last, view.length) for view in looks.views if isinstance(view, Gathered)]

    most, filled = GATHERED["cpu"] // row_bytes, FILLED["cpu"]
    assert together([20, 20 + filled, 30]) == [(0, 3, 20 + filled)]
    assert together([20, 21 + filled]) == []
    assert together([200, 20, 201, 30]) == [(0, 3, 201), (1, 4, 30)]
    assert together([most // 2, most // 2 - 1]) == [(0, 2, most // 2)]
    assert together([most // 2, most // 2 + 1]) == []
    assert together([most // 4] * 5) == [(0, 4, most // 4)], "and the fifth looks for itself"
    assert together([most // 2] * 4) == [(0, 2, most // 2), (2, 4, most // 2)]
    plan = tokens([[(9000 * index, most // 2)] for index in range(4)])
    looks = prepare(plan, CPU, row_bytes=row_bytes).full.looks
    assert looks.in_order
    assert {view.mask for view in looks.views} == {None}


def test_few_tokens_of_several_sequences_are_gathered_with_those_of_as_many() -> None:
    """Two of rows 0 to 1 and 3 to 4, one of rows 2 and 8, three of rows 5 to 7 by themselves."""
    segments = [
        Segment(3, 2, [(0, 5)]),
        Segment(4, 1, [(20, 5)]),
        Segment(6, 2, [(40, 8)]),
        Segment(3, 3, [(60, 6)]),
        Segment(5, 1, [(80, 6)]),
    ]
    looks = prepare(StepPlan([0] * 9, segments, []), CPU).full.looks
    two, one, three = looks.views
    assert isinstance(two, Gathered)
    assert two.rows is not None
    assert (two.rows.tolist(), two.each, two.length) == ([0, 1, 3, 4], 2, 8)
    assert two.keys.view(2, 8).tolist() == [[0, 1, 2, 3, 4, 4, 4, 4], [*range(40, 48)]]
    assert two.mask is not None
    assert two.mask.isinf().sum(-1).squeeze(1).tolist() == [[4, 3], [1, 0]]
    assert isinstance(one, Gathered)
    assert one.rows is not None
    assert (one.rows.tolist(), one.each) == ([2, 8], 1)
    assert isinstance(three, View)
    assert (three.first, three.last, three.start, three.length) == (5, 8, 60, 6)
    assert three.mask is not None
    assert three.mask.isinf().sum(-1).tolist() == [2, 1, 0]


def test_a_run_that_few_rows_have_gathered_is_still_looked_at_by_others() -> None:
    segments = [Segment(6, 2, [(0, 8)]), Segment(6, 2, [(20, 8)]), Segment(10, 1, [(0, 8), (50, 3)])]
    looks = prepare(StepPlan([0] * 5, segments, []), CPU).full.looks
    others = [(view.first, view.start, view.length) for view in looks.views if isinstance(view, View)]
    assert sorted(others) == [(4, 0, 8), (4, 50, 3)]


@pytest.mark.parametrize(
    ("segments", "in_order"),
    [
        ([Segment(4, 1, [(0, 5)]), Segment(2, 1, [(9, 3)])], True),
        ([Segment(4, 2, [(0, 6)]), Segment(2, 2, [(9, 4)])], True),
        ([Segment(4, 1, [(0, 5)]), Segment(0, 3, [(9, 3)])], True),
        ([Segment(0, 3, [(9, 3)]), Segment(4, 1, [(0, 5)])], False),
        ([Segment(4, 1, [(0, 5)]), Segment(1, 3, [(9, 4)])], True),
        ([Segment(4, 1, [(0, 5)]), Segment(1, 3, [(9, 2), (20, 2)])], False),
        ([Segment(4, 1, [(0, 5)]), Segment(1, 9, [(9, 10)])], False),
        ([Segment(4, 1, [(0, 3), (7, 2)])], False),
        ([Segment(4, 1, [(0, 5)]), Segment(4, 1, [(9, 5)]), Segment(4, 1, [(0, 5)])], False),
    ],
)
def test_a_step_knows_whether_its_views_give_its_rows_in_order(
    segments: list[Segment], in_order: bool
) -> None:
    ids = [0] * sum(segment.length for segment in segments)
    assert prepare(StepPlan(ids, segments, []), CPU).full.looks.in_order is in_order


def test_parts_are_the_rows_of_some_tokens() -> None:
    runs = [(10, 3), (50, 4), (2, 1)]
    assert parts(runs, 0, 8) == runs
    assert parts(runs, 2, 4) == [(12, 1), (50, 1)]
    assert parts(runs, 4, 6) == [(51, 2)]
    assert parts(runs, 7, 8) == [(2, 1)]
    assert parts(runs, 3, 3) == []


def test_shares_are_whole_units_side_by_side() -> None:
    shares = [Share(rank, 3) for rank in range(3)]
    assert [share.of(36, 4) for share in shares] == [(0, 12), (12, 24), (24, 36)]
    assert [share.divide(36) for share in shares] == [12, 12, 12]
    assert Share().of(36, 4) == (0, 36)


def test_a_few_tokens_in_one_run_look_once_each_as_far_as_itself() -> None:
    (view,) = prepare(StepPlan([0] * 3, [Segment(4, 3, [(20, 7)])], []), CPU).full.looks.views
    assert isinstance(view, View)
    assert (view.first, view.last, view.start, view.length, view.causal) == (0, 3, 20, 7, False)
    assert view.mask is not None
    assert [row.count(0.0) for row in view.mask.tolist()] == [5, 6, 7]
    assert [row.index(float("-inf")) for row in view.mask.tolist()[:2]] == [5, 6]
    many = prepare(StepPlan([0] * 9, [Segment(4, 9, [(20, 13)])], []), CPU).full.looks.views
    assert len(many) == 2
