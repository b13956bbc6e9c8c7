"""The neuron API: what a node says of itself and how it is told to load and unload.

Both sides share these Structs; unknown fields are ignored and new ones get defaults, so that nodes
of different versions work together. `WIRE_VERSION` grows when a meaning changes.
"""

from __future__ import annotations

from typing import Final, Literal

import msgspec

WIRE_VERSION: Final = 1

CALLER_HEADER: Final = "x-cortex-caller"
"""In which a gateway tells a node whose request it is; percent-encoded."""

QUANT_FORMS: Final = ("int8", "int4")
"""Those values of `quant` that say how weights are held, as `dtype` does; the others choose among files."""

MOST_HOLD_S: Final = 86_400
"""The longest `hold_s` of a load: a day."""

Status = Literal["loading", "loaded", "draining", "failed", "unloaded"]


class Wire(msgspec.Struct, kw_only=True):
    """Base of the node types: keyword-only, ignores what it does not know."""


class Limit(Wire):
    """Tokens: the whole context, the longest prompt, the longest answer. 0 is unknown."""

    context: int = 0
    input: int = 0
    output: int = 0


class Servable(Wire):
    ok: bool = True
    reason: str | None = None
    detail: str | None = None


class Device(Wire):
    index: int
    uuid: str
    name: str
    vram_total_mb: int
    compute_capability: str | None = None
    kind: str = "cuda"
    """`cuda` or `cpu`; of a CPU, `vram_total_mb` is the memory that models may use."""
    cores: int | None = None


class Discovery(Wire):
    hostname: str
    os: str
    kernel: str = ""
    cuda_version: str | None = None
    driver_version: str | None = None
    devices: list[Device] = []
    harnesses: list[str] = []
    cuda_unavailable_reason: str | None = None
    max_prompt_tokens: int = 0
    wire_version: int = WIRE_VERSION


class Version(Wire):
    package_version: str
    wire_version: int = WIRE_VERSION
    python_version: str = ""
    torch_version: str | None = None
    git_sha: str | None = None


class Grant(Wire):
    """What the ledger has promised to one model on one device."""

    model_id: str
    device: str
    bytes: int


class DeviceHealth(Wire):
    index: int
    uuid: str = ""
    vram_total_mb: int = 0
    vram_used_mb: int = 0
    vram_free_mb: int = 0
    utilization_pct: float | None = None
    temp_c: float | None = None
    granted_bytes: int = 0
    """Promised by the ledger, whether used yet or not."""
    budget_bytes: int = 0
    """All that the ledger may promise on this device."""


class Activation(Wire):
    """Loading of the default models at start."""

    state: Literal["pre_warming", "ready"] = "ready"
    pending: list[str] = []
    in_progress: list[str] = []
    completed: list[str] = []
    failed: list[dict[str, str]] = []


class ModelLoad(Wire):
    """How busy one model is, in sequences; a request with `n` is so many."""

    id: str
    in_flight: int = 0
    queue_depth: int = 0
    max_in_flight: int = 0
    max_queue_depth: int = 0
    cache_usage_ratio: float | None = None
    """How much of the cache the running sequences hold, 0 to 1; None where the engine does not tell."""


class FailedModel(Wire):
    """A model that could not be loaded, or whose engine ended by itself."""

    id: str
    detail: str = ""
    retry_in_s: float = 0.0
    """Seconds in which requests for it are refused; after them the next one loads it again."""


class Health(Wire):
    uptime_secs: float = 0.0
    devices: list[DeviceHealth] = []
    ledger: list[Grant] = []
    activation: Activation = msgspec.field(default_factory=Activation)
    models: list[ModelLoad] = []
    failed: list[FailedModel] = []
    requests: list[str] = []
    """Ids of the requests in flight: proof to a waiting gateway that silence is work."""


class Progress(Wire):
    """How far a load is. `unit` is what `done` and `total` count: bytes, or 0 of 0 if unknown."""

    phase: str
    done: int = 0
    total: int = 0
    unit: str = "bytes"


class ModelReport(Wire):
    id: str
    harness: str = ""
    status: Status = "loaded"
    devices: list[str] = []
    vram_used_mb: int = 0
    bytes_per_device: dict[str, int] = {}
    loaded_at: float | None = None
    last_used: float | None = None
    in_flight: int = 0
    load_seconds: float | None = None
    capabilities: list[str] = []
    limit: Limit | None = None
    tool_call: bool = False
    reasoning: bool = False
    servable: Servable = msgspec.field(default_factory=Servable)
    progress: Progress | None = None


class LoadRequest(Wire):
    model_id: str
    harness: str | None = None
    quant: str | None = None
    dtype: str | None = None
    tensor_parallel: int | None = None
    devices: list[str] | None = None
    source: str | None = None
    memory_mb: int | None = None
    hold_s: float | None = None


class LoadReply(Wire):
    status: str
    model: ModelReport | None = None


class LoadEvent(Wire):
    """One event of a load that reports progress: `progress`, then `loaded` or `error` as the last."""

    event: Literal["progress", "loaded", "error"]
    progress: Progress | None = None
    model: ModelReport | None = None
    error: dict[str, object] | None = None


class UnloadRequest(Wire):
    model_id: str
    if_idle: bool = False


class ModelCard(Wire, omit_defaults=True):
    """One model of the gateway's merged catalogue; `/v1/models` of a node uses it too."""

    id: str
    object: Literal["model"] = "model"
    created: int = 0
    owned_by: str = "cortex"
    loaded: bool = False
    locations: list[dict[str, str]] = []
    limit: Limit | None = None
    capabilities: list[str] = []
    tool_call: bool = False
    reasoning: bool = False
    alias_of: str | None = None
    cost: dict[str, float] | None = None


class NodeView(Wire):
    """One node as the gateway sees it; what `GET /nodes` of the gateway lists."""

    name: str
    endpoint: str
    up: bool
    detail: str | None = None
    """Why it is not up."""
    version: str | None = None
    devices: list[Device] = []
    device_health: list[DeviceHealth] = []
    models: list[ModelReport] = []
