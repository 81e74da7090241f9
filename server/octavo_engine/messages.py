"""Plain messages between the API process and the engine process (msgpack over ZeroMQ).

The API process tokenizes and detokenizes; the engine sees token ids only. One `AddRequest` is one sequence:
`n > 1` becomes n requests that share the prompt's blocks through the prefix cache.
"""

from __future__ import annotations

import enum

import msgspec

from octavo_engine.sampling_params import SamplingParams


class FinishReason(enum.StrEnum):
    """Why a sequence ended."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    DEADLINE = "deadline"
    ERROR = "error"


# ---------------------------------------------------------------- API process -> engine


class AddRequest(msgspec.Struct, frozen=True, kw_only=True, tag="add"):
    """One sequence to run. `priority`: lower runs earlier. `deadline_s`: seconds from arrival, or None.

    `output_token_ids` were generated elsewhere before: the sequence goes on after them, exactly as if it had never
    stopped, and reports only what is new. `prefix_labels` are a router's names for the first so many tokens of the
    prompt, ascending; KV events tell which of them are cached.
    """

    request_id: str
    prompt_token_ids: list[int]
    output_token_ids: list[int] = []
    sampling: SamplingParams
    tenant: str = ""
    cache_salt: str = ""
    priority: int = 0
    deadline_s: float | None = None
    adapter: str = ""  # name of a loaded adapter; empty: the base model
    prefix_labels: list[tuple[int, int]] = []  # (number of tokens, label)
    arrival_time: float = 0.0  # time.time() at the API edge


class AbortRequest(msgspec.Struct, frozen=True, kw_only=True, tag="abort"):
    """Stop these sequences and free their blocks; ids not known any more are ignored."""

    request_ids: list[str]


class EmbedRequest(msgspec.Struct, frozen=True, kw_only=True, tag="embed"):
    """One text to pool into a vector, or to classify; batched with others on the same engine.

    second_start: where the second text of a pair starts; 0 for a single text.
    """

    request_id: str
    prompt_token_ids: list[int]
    second_start: int = 0
    tenant: str = ""
    arrival_time: float = 0.0


class LoadAdapter(msgspec.Struct, frozen=True, kw_only=True, tag="load_adapter"):
    """Load an adapter from a folder; `replace` puts it in the place of one of the same name, once that is unused."""

    request_id: str
    name: str
    path: str
    replace: bool = False


class UnloadAdapter(msgspec.Struct, frozen=True, kw_only=True, tag="unload_adapter"):
    """Forget an adapter once the sequences that use it have ended."""

    request_id: str
    name: str


class ResetPrefixCache(msgspec.Struct, frozen=True, kw_only=True, tag="reset_prefix_cache"):
    """Forget every cached block that no running sequence holds."""


class TakeSnapshot(msgspec.Struct, frozen=True, kw_only=True, tag="take_snapshot"):
    """Tell, in an output, which sequences run and wait."""

    request_id: str


class Shutdown(msgspec.Struct, frozen=True, kw_only=True, tag="shutdown"):
    """Leave the step loop and exit 0."""


Command = (
    AddRequest | AbortRequest | EmbedRequest | LoadAdapter | UnloadAdapter | ResetPrefixCache | TakeSnapshot | Shutdown
)


# ---------------------------------------------------------------- engine -> API process


class TokenLogprobs(msgspec.Struct, frozen=True, kw_only=True):
    """Log-probabilities at one position: the chosen (or prompt) token and the top alternatives, best first."""

    token_id: int
    logprob: float
    rank: int
    top: list[tuple[int, float]] = []


class SequenceSnapshot(msgspec.Struct, frozen=True, kw_only=True):
    """Where one sequence stands; counts are of tokens unless they say otherwise. Holds no text and no token ids."""

    request_id: str
    tenant: str
    adapter: str
    state: str  # running | waiting
    priority: int
    age_s: float
    queue_time_s: float  # until it first ran, or until now
    deadline_in_s: float | None
    num_prompt: int
    num_output: int
    num_computed: int
    num_cached: int
    num_blocks: int
    num_preemptions: int
    num_overtaken: int  # by how many it was passed when it did not fit


class SchedulerSnapshot(msgspec.Struct, frozen=True, kw_only=True):
    """The scheduler between two steps.

    sequences: those that run, then those that wait, by priority and age; `num_left_out` more are not told.
    step_seconds: what each part of a step costs by the learned model. virtual_tokens: the service each tenant received.
    """

    time: float
    num_running: int
    num_waiting: int
    kv_blocks_free: int
    kv_blocks_total: int
    step_seconds: dict[str, float]
    virtual_tokens: dict[str, float]
    sequences: list[SequenceSnapshot]
    num_left_out: int = 0


class SequenceOutput(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """New tokens of one sequence since its last output; the last one carries `finish_reason`."""

    request_id: str
    token_ids: list[int]
    logprobs: list[TokenLogprobs] | None = None
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    finish_reason: FinishReason | None = None
    stop_token_id: int | None = None
    num_cached_tokens: int = 0
    num_preemptions: int = 0
    queue_time_s: float = 0.0
    embedding: list[float] | None = None
    snapshot: SchedulerSnapshot | None = None
    error: str | None = None
    error_kind: str | None = None  # name of the class in `errors` that fits `error`
    error_param: str | None = None
    retry_after_s: float | None = None


class AdapterStats(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A loaded adapter. is_resident: it lies in one of the device's slots. is_leaving: takes no new sequences."""

    name: str
    path: str = ""
    rank: int = 0
    is_resident: bool = False
    is_leaving: bool = False
    num_running: int = 0
    num_waiting: int = 0


class EngineStats(msgspec.Struct, frozen=True, kw_only=True):
    """A snapshot of the engine, sent after each step that did work and at least once a second.

    Counters only grow. `kv_blocks_used` counts blocks that live sequences hold; blocks that are merely cached are free.
    """

    step: int = 0
    time: float = 0.0
    num_running: int = 0
    num_waiting: int = 0
    num_waiting_tokens: int = 0  # prompt tokens still to be computed by waiting sequences
    queue_room: int = 0  # how many more requests may come
    num_taken: int = 0  # requests that came so far, refused ones among them
    kv_blocks_total: int = 0
    kv_blocks_used: int = 0
    prefix_queries: int = 0  # tokens
    prefix_hits: int = 0  # tokens
    num_preemptions: int = 0
    prompt_tokens: int = 0
    generation_tokens: int = 0
    requests_finished: dict[str, int] = {}  # by FinishReason value
    step_time_s: float = 0.0
    retry_after_s: float = 1.0  # when a client that is refused now should come back
    roofline_decode: float = 0.0  # achieved share of the device's limit, for steps that only decode
    roofline_prefill: float = 0.0  # and for those that prefill
    spec_drafts: int = 0
    spec_draft_tokens: int = 0
    spec_accepted_by_position: dict[str, int] = {}
    spec_unavailable: str = ""  # why nothing is guessed any more
    spec_accepted_tokens: int = 0
    queued_work_s: float = 0.0  # seconds of work that wait, by the learned step-time model
    adapters: list[AdapterStats] = []
    host_blocks_total: int = 0
    host_blocks_used: int = 0  # that hold preempted sequences
    host_blocks_cached: int = 0  # that can be found by content
    host_hits: int = 0  # tokens of prefix_hits that came from host memory
    host_blocks_stored: int = 0
    host_blocks_fetched: int = 0
    num_preemptions_by_swap: int = 0
    steps_ahead: int = 0  # launched before the step in front of them was over
    step_waits: dict[str, int] = {}  # by reason: steps that were not, though async_scheduling is on


class StepOutput(msgspec.Struct, frozen=True, kw_only=True, tag="step"):
    """What one engine step produced."""

    outputs: list[SequenceOutput]
    stats: EngineStats


class LoadProgress(msgspec.Struct, frozen=True, kw_only=True, tag="progress"):
    """Start-up progress: `phase` is one of resolve, weights, kv_cache, warmup; `fraction` in [0, 1]."""

    phase: str
    fraction: float
    detail: str = ""


class ModelInfo(msgspec.Struct, frozen=True, kw_only=True):
    """What the API process must know of the loaded model; parameters and bytes are those of one of `num_ranks`."""

    name: str
    path: str
    architecture: str
    task: str  # generate | embed | classify
    max_model_len: int
    vocab_size: int
    hidden_size: int
    eos_token_ids: list[int]
    dtype: str
    quantization: str
    device: str
    backend: str
    num_parameters: int
    weight_bytes: int
    adapter_bytes: int = 0  # reserved for adapters on the device
    head_parameters: int = 0  # of the output head, which works only for positions whose logits are wanted
    expert_parameters: int = 0  # of routed experts, all of them
    expert_share: float = 1.0  # of the experts that one token passes
    attention_operations: int = 0  # for each pair of a query and a key position, over all layers
    kv_block_size: int
    kv_blocks_total: int
    kv_bytes_per_token: int
    num_ranks: int = 1
    kv_host_blocks: int = 0
    labels: list[str] = []  # of a classifier, in the order of its scores
    judges_by_yes: bool = False  # the only label is how likely a language model says yes
    phase_seconds: dict[str, float] = {}


class Ready(msgspec.Struct, frozen=True, kw_only=True, tag="ready"):
    """The engine is warm and takes requests."""

    model: ModelInfo


class Failed(msgspec.Struct, frozen=True, kw_only=True, tag="failed"):
    """The engine could not start or its loop died; `message` is fit for a user."""

    message: str
    kind: str = "EngineDeadError"


Event = LoadProgress | Ready | StepOutput | Failed
