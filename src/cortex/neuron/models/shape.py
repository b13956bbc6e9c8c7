"""The sizes of a model in one form, whatever file they come from, and what they cost in memory.

Knows no files and no torch: the process that plans loads has it too.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Final, Literal

import msgspec

from cortex.neuron.nn.packing import device_bytes, most_bytes

Kind = Literal["full", "sliding", "delta"]
"""What a layer mixes tokens with: attention to all, attention within the window, or a Gated DeltaNet."""
Activation = Literal["silu", "gelu_tanh"]

HEAD_NAMES: Final = {
    "model.": "lm_head",
    "model.language_model.": "lm_head",
    "language_model.model.": "language_model.lm_head",
}
"""What the names of a text model's tensors begin with in safetensors, and how its head is then called."""


class Llama3Scaling(msgspec.Struct, frozen=True):
    factor: float
    low_factor: float
    high_factor: float
    original_context: int


LEAST_TURNS: Final = 2.0**-20
"""Of a pair within the original context, as a bound of YaRN's; the slowest pair of a model turns more. Its
factor has the same bound: with much smaller ones fp32 has no numbers."""


class YarnScaling(msgspec.Struct, frozen=True):
    """Pairs that turn less than `slow` times in the original context are stretched by `factor`, those that
    turn more than `fast` times are left as they are, and those between are in part; with `truncate` the two
    ends of that part are whole pairs.
    """

    factor: float
    original_context: int
    fast: float = 32.0
    slow: float = 1.0
    truncate: bool = True


class Rope(msgspec.Struct, frozen=True):
    """`divisors` divide the inverse frequencies pair by pair, `factor` all of them; empty and 1 for none.
    `attention` multiplies what is rotated, of queries and of keys.
    """

    theta: float
    llama3: Llama3Scaling | None = None
    divisors: tuple[float, ...] = ()
    factor: float = 1.0
    yarn: YarnScaling | None = None
    attention: float = 1.0

    def context(self, stated: int) -> int:
        """Tokens of context of a model whose file states so many. With YaRN some files state those that the
        model had before, some those that it has now: it has what YaRN makes of the original ones, or more
        where more are stated."""
        if self.yarn is None:
            return stated
        return max(stated, int(self.yarn.factor * self.yarn.original_context))


def yarn_attention(factor: float, mscale: float = 1.0, mscale_all_dim: float = 0.0) -> float:
    """By how much YaRN multiplies what is rotated, where a file does not say it: 0.1 ln(factor) + 1, unless
    it has two scales for the logarithm, of which that of `mscale_all_dim` divides.

    Reference: section 3.4 of Peng et al. 2023; the scales are DeepSeek's.
    """
    logarithm = math.log(max(factor, 1.0))
    return (0.1 * mscale * logarithm + 1) / (0.1 * mscale_all_dim * logarithm + 1)


class DeltaShape(msgspec.Struct, frozen=True):
    """The sizes of Gated DeltaNet layers. In `tiled` files value head v goes with key head v mod key_heads,
    in others with v // (value_heads / key_heads). The checkpoint may have the projections of q, k, v and z
    in one tensor, key head by key head, and those of b and alpha.
    """

    key_heads: int
    value_heads: int
    key_width: int
    value_width: int
    kernel: int
    tiled: bool = False
    joined_qkvz: bool = False
    joined_ba: bool = False

    @property
    def groups(self) -> int:
        """Value heads for each key head."""
        return self.value_heads // self.key_heads

    @property
    def values(self) -> int:
        """Elements of all value heads."""
        return self.value_heads * self.value_width

    @property
    def channels(self) -> int:
        """Of the convolution: queries, keys and values."""
        return 2 * self.key_heads * self.key_width + self.values


class ExpertsShape(msgspec.Struct, frozen=True, kw_only=True):
    """A mixture of `count` gated MLPs, `active` of them for each token; `shared_intermediate` is the width of
    the one that all tokens take, 0 for none. `normalised`: the weights of a token's experts sum to 1.

    `stored` is how the checkpoint has them: each as tensors of its own, stacked in one tensor for each
    projection, or stacked with gate and up fused into one. `flat_gate`: the shared expert's gate is a vector
    there and not a matrix of one row.
    """

    count: int
    active: int
    intermediate: int
    normalised: bool
    shared_intermediate: int = 0
    stored: Literal["each", "stacked", "fused"] = "each"
    flat_gate: bool = False


class ModelShape(msgspec.Struct, frozen=True, kw_only=True):
    """A decoder. Sizes are elements, `max_position` and `window` tokens.

    `prefix` is what the names of the tensors begin with in safetensors, where `table_is_head` says that a
    tied table is stored under the head's name; `rotary_dim` how much of a head is rotated, 0 for all of
    it; `gated` says that queries bring a gate for the attention's output; `post_norms` that what
    attention and MLP give is normalised too. `kinds` has a kind for each layer, or is empty where all are
    "full"; `dense_layers` are those without experts in a model that has some. `local_rope` is that of
    sliding layers where it differs. None and empty are what a model does not have.
    """

    architecture: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    max_position: int
    rope: Rope
    norm_eps: float
    tied: bool
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    prefix: str = "model."
    table_is_head: bool = False
    activation: Activation = "silu"
    rotary_dim: int = 0
    qk_norm: bool = False
    gated: bool = False
    post_norms: bool = False
    kinds: tuple[Kind, ...] = ()
    window: int | None = None
    local_rope: Rope | None = None
    query_scale: float | None = None
    embedding_scale: float | None = None
    logit_cap: float | None = None
    delta: DeltaShape | None = None
    experts: ExpertsShape | None = None
    dense_layers: tuple[int, ...] = ()

    def kind(self, index: int) -> Kind:
        return self.kinds[index] if self.kinds else "full"

    def has_experts(self, index: int) -> bool:
        return self.experts is not None and index not in self.dense_layers

    @property
    def rotary(self) -> int:
        """Elements of a head that are rotated."""
        return self.rotary_dim or self.head_dim

    @property
    def attention_layers(self) -> tuple[int, ...]:
        """The layers that have keys and values."""
        return tuple(index for index in range(self.layers) if self.kind(index) != "delta")

    @property
    def delta_layers(self) -> tuple[int, ...]:
        """The layers that have a state."""
        return tuple(index for index in range(self.layers) if self.kind(index) == "delta")

    @property
    def sliding_layers(self) -> tuple[int, ...]:
        """The layers that have a window."""
        return tuple(index for index in range(self.layers) if self.kind(index) == "sliding")

    @property
    def even_context(self) -> float:
        """Tokens of context at which attention to them takes as many multiplications as a token's way through
        the weights of all layers.
        """
        active = 1 if self.experts is None else self.experts.active
        weights = sum(
            min(count, active) * inputs * outputs
            for index in range(self.layers)
            for count, inputs, outputs in self._matrices(index)
        )
        attending = len(self.attention_layers) - len(self.sliding_layers)
        each = 2 * self.heads * self.head_dim  # of queries with keys, and of weights with values
        return weights / (each * attending) if attending else math.inf

    def weight_bytes(self, dtype: str, *, packs: bool = True) -> int:
        """Most bytes of the loaded weights on one device, `dtype` as in `messages.Load`; `packs` says that it
        packs matrices for a kernel, as CPUs do."""
        table = self.vocab * self.hidden
        matrices = [sizes for index in range(self.layers) for sizes in self._matrices(index)]
        vectors = sum(map(self._vectors, range(self.layers))) + self.hidden
        if dtype == "float32":
            plain = sum(count * inputs * outputs for count, inputs, outputs in matrices)
            return 4 * (table * (1 if self.tied else 2) + plain + vectors)
        cost = most_bytes if packs else device_bytes
        total = sum(count * cost(inputs, outputs, dtype) for count, inputs, outputs in matrices)
        # Matrices in another form cannot be looked up in, so a tied table is there twice.
        is_shared = self.tied and dtype == "packed16" and not packs
        head = 0 if is_shared else cost(self.hidden, self.vocab, dtype)
        return 2 * table + head + total + 4 * vectors

    @property
    def kv_bytes_per_token(self) -> int:
        """fp32 keys and values of every layer that has any."""
        return len(self.attention_layers) * self.layer_kv_bytes

    @property
    def near_bytes_per_token(self) -> int:
        """Of these, those of layers with a window."""
        return len(self.sliding_layers) * self.layer_kv_bytes

    @property
    def state_bytes(self) -> int:
        """fp32 states of every layer that has one, of one sequence."""
        if self.delta is None:
            return 0
        sizes = self.delta
        memory = sizes.value_heads * sizes.key_width * sizes.value_width
        return 4 * len(self.delta_layers) * (memory + sizes.channels * (sizes.kernel - 1))

    @property
    def layer_kv_bytes(self) -> int:
        """Of one token, in a layer that attends."""
        return 4 * 2 * self.kv_heads * self.head_dim

    @property
    def _qkv_rows(self) -> int:
        return (self.heads * (2 if self.gated else 1) + 2 * self.kv_heads) * self.head_dim

    def _matrices(self, index: int) -> Iterator[tuple[int, int, int]]:
        """How many matrices a layer has of which inputs and outputs, fused as the model has them."""
        if self.delta is not None and self.kind(index) == "delta":
            yield 1, self.hidden, self.delta.channels + self.delta.values
            yield 1, self.delta.values, self.hidden
        else:
            yield 1, self.hidden, self._qkv_rows
            yield 1, self.heads * self.head_dim, self.hidden
        if self.experts is None or not self.has_experts(index):
            yield from _gated(1, self.hidden, self.intermediate)
            return
        yield from _gated(self.experts.count, self.hidden, self.experts.intermediate)
        if self.experts.shared_intermediate:
            yield from _gated(1, self.hidden, self.experts.shared_intermediate)

    def _vectors(self, index: int) -> int:
        """Numbers of a layer that are fp32 in every form: norms, biases, gates, convolution, router."""
        count = self.hidden * (4 if self.post_norms else 2)
        if self.delta is not None and self.kind(index) == "delta":
            sizes = self.delta
            count += sizes.value_heads * (2 * self.hidden + 3) + sizes.value_width
            count += sizes.channels * sizes.kernel
        else:
            count += self._qkv_rows * self.qkv_bias + self.hidden * self.output_bias
            count += (self.heads + self.kv_heads) * self.head_dim * self.qk_norm
        if self.experts is None or not self.has_experts(index):
            return count + (2 * self.intermediate + self.hidden) * self.mlp_bias
        return count + self.hidden * (self.experts.count + (self.experts.shared_intermediate > 0))


def _gated(count: int, hidden: int, intermediate: int) -> tuple[tuple[int, int, int], ...]:
    return (count, hidden, 2 * intermediate), (count, intermediate, hidden)
