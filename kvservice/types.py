"""The service's nouns, and the arithmetic of their bytes. Knows nothing of tensors, sockets or stores.

Positions of a sequence of `n` tokens under a recipe with a tier:

    0        16                 window_start(n)          n
    ├─ sinks ─┼─ distant: groups of 64 ─┼─ window: 256-319 ─┤
      device          tier (host)               device
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import NewType, Protocol

TenantId = NewType("TenantId", str)
SessionId = NewType("SessionId", str)
CallId = NewType("CallId", str)
WorkerId = NewType("WorkerId", str)

SINK_TOKENS = 16
"""Leading tokens that always stay on the device. Never part of a group."""

GROUP_TOKENS = 64
"""The window slides, and keys are quantised, by whole groups of this many tokens, aligned to 16 + 64k."""

BLOCK_TOKENS = 16
"""Tokens in a block of the device arena. Sinks are exactly one, a group exactly four."""

CLUSTER_LABEL_BYTES = 2
"""Bytes that say which cluster a token is in."""


class Role(Enum):
    """What the owner of an API key may do."""

    TENANT = "tenant"
    OPERATOR = "operator"


class PromptFormat(Enum):
    """How text becomes tokens."""

    RAW = "raw"
    CHAT = "chat"


class TextRole(Enum):
    """What a text is to its session; decides what the chat template puts around it."""

    DOCUMENT = "document"
    QUESTION = "question"


class ChatRole(Enum):
    """Whose turn of a conversation a message is."""

    SYSTEM = "system"
    USER = "user"
    ASSISTANT = "assistant"


@dataclass(frozen=True, slots=True)
class ChatMessage:
    """A turn of a conversation."""

    role: ChatRole
    content: str


class OnMiss(Enum):
    """What to do when KV that a call needs is in no tier."""

    RECOMPUTE = "recompute"
    FAIL = "fail"
    PARTIAL = "partial"


class FinishReason(Enum):
    """Why an answer ended."""

    LENGTH = "length"
    EOS = "eos"
    STOP = "stop"
    CANCELLED = "cancelled"


class GrammarKind(Enum):
    """The languages a grammar can be written in."""

    JSON_SCHEMA = "json_schema"
    REGEX = "regex"


@dataclass(frozen=True, slots=True)
class Grammar:
    """What an answer's text must match, whole."""

    kind: GrammarKind
    text: str


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the next token is chosen: greedily at `temperature` 0, else as a function of (seed, position)."""

    temperature: float = 0.0
    top_k: int = 0
    """0: all."""
    top_p: float = 1.0
    min_p: float = 0.0
    typical_p: float = 1.0
    repetition_penalty: float = 1.0
    """Divides positive logits of tokens that occurred, multiplies negative ones: in prompt and answer."""
    frequency_penalty: float = 0.0
    """Times the occurrences in the answer, taken from a token's logit."""
    presence_penalty: float = 0.0
    """Taken from the logit of each token that occurred in the answer."""
    logit_bias: tuple[tuple[int, float], ...] = ()
    """Token id and what is added to its logit."""
    seed: int = 0
    max_new_tokens: int = 256
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    grammar: Grammar | None = None
    n: int = 1
    """Answers to one prompt. The first joins the session."""
    logprobs: int | None = None
    """Report the chosen token's log-probability, and those of this many most likely ones; None: none."""


@dataclass(frozen=True, slots=True)
class ModelShape:
    """What the byte arithmetic needs to know of a model."""

    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    hidden_size: int
    intermediate_size: int
    vocab_size: int
    max_positions: int
    dtype_bytes: int = 2
    num_followers: int = 0
    """(layer, KV head)s that store no distant keys under recipes that share them: of the worker's map."""

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of the keys and values of one token over all layers."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * self.dtype_bytes

    @property
    def num_cells(self) -> int:
        """Cells of a sequence: one for each (layer, K or V, KV head)."""
        return 2 * self.num_layers * self.num_kv_heads

    @property
    def block_bytes(self) -> int:
        """Bytes of one block of the arena: 16 tokens of one cell."""
        return BLOCK_TOKENS * self.head_dim * self.dtype_bytes


class Distant(Enum):
    """What a recipe does with tokens that leave the window."""

    RESIDENT = "resident"
    """They stay on the device."""
    STREAM = "stream"
    """They go to the tier; every one is streamed back and attended to by every query."""
    RECALL = "recall"
    """They go to the tier; each query recalls the few that matter."""
    EVICT = "evict"
    """There is no window: each KV head of each layer keeps the tokens that a method chooses, and drops the others."""


@dataclass(frozen=True, slots=True)
class Eviction:
    """Which tokens a sequence keeps, for `Distant.EVICT`. Each stage names a method of `compression.methods`."""

    scorer: str
    """Ranks the tokens."""
    kept_tokens: int
    """Tokens that each KV head of each layer holds, on average over them; what comes beyond is dropped."""
    read_tokens: int
    """What is read attends to so many of the tokens before it whole, and is held so long: until all that was given is
    read, or so many are held. As most papers do, what is dropped is chosen after that."""
    positions: str | None = None
    """Where kept tokens are taken to stand; None: where they stood."""
    allocator: str | None = None
    """Shares `kept_tokens` out among layers and KV heads; None: alike."""
    merger: str | None = None
    """What becomes of dropped tokens; None: nothing."""
    codec: str | None = None
    """Stores kept tokens in `bits` bits a number, so that more of them take the bytes of `kept_tokens`; None: they are
    stored as they are."""
    bits: int = 0
    """Of a codec."""
    remembers: int = 0
    """Numbers of 4 bytes that the scorer keeps of each token in a KV head, beside the arena."""
    params: tuple[tuple[str, float], ...] = ()
    """Of the scorer, where they aren't its defaults."""


@dataclass(frozen=True, slots=True)
class Reuse:
    """Which of the tokens that are there a query of an answer looks at, for `Distant.RESIDENT`."""

    plan: str
    """Names a method of `compression.methods`."""
    params: tuple[tuple[str, float], ...] = ()
    """Where they aren't its defaults."""


@dataclass(frozen=True, slots=True)
class RecipeSpec:
    """How a session's KV is kept. Chosen at Create; belongs to the session."""

    name: str
    distant: Distant
    summary: str
    window_tokens: int = 256
    """The window's least length; it grows to `window_tokens + 63` before it slides."""
    index: str | None = None
    """Name of the RecallIndex or ClusterIndex method, for `Distant.RECALL`."""
    index_bits: int = 0
    """Bits of each key's numbers in the index."""
    index_params: int = 0
    """Rows of `head_dim` numbers that the index keeps beside them for each group, in the dtype of KV."""
    tokens_per_cluster: int = 0
    """The index is clusters of about so many tokens instead; 0: it isn't."""
    recalled_tokens: int = 0
    """Distant tokens that a query recalls for each KV head."""
    shares_keys: bool = False
    """Distant keys are stored once for each group of similar layers: the worker must have a map of them."""
    per_query_head: bool = False
    """Each query head of a KV head has its own choice in turn, until there are `recalled_tokens`; else they choose
    together, by their summed attention mass."""
    evaluation_only: bool = False
    """A baseline of `eval`; refused by the service."""
    eviction: Eviction | None = None
    """What is kept, for `Distant.EVICT`."""
    reuse: Reuse | None = None
    """What is looked at, for `Distant.RESIDENT`; None: everything."""

    @property
    def slides(self) -> bool:
        """Whether what leaves the window goes to the tier."""
        return self.distant in (Distant.STREAM, Distant.RECALL)

    def window_start(self, num_tokens: int) -> int:
        """First position of the window of `num_tokens` committed tokens; distant are [16, window_start)."""
        if not self.slides:
            return SINK_TOKENS
        slidable = num_tokens - SINK_TOKENS - self.window_tokens
        return SINK_TOKENS + max(0, slidable // GROUP_TOKENS) * GROUP_TOKENS

    def tokens_until_slide(self, num_tokens: int) -> int:
        """How many tokens after `num_tokens` see the same window as the next one."""
        if not self.slides:
            return sys.maxsize
        return self.window_start(num_tokens) + self.window_tokens + GROUP_TOKENS - num_tokens

    def stored_until(self, num_tokens: int) -> int:
        """Where the groups end that lie in the tier below once `num_tokens` are committed.

        What follows, the window, is stored apart: of what stays on the device, the last 1 to 64 tokens. Of a sequence
        that drops tokens nothing is stored.
        """
        if self.distant is Distant.RESIDENT:
            return SINK_TOKENS + max(0, (num_tokens - SINK_TOKENS - 1) // GROUP_TOKENS) * GROUP_TOKENS
        return self.window_start(num_tokens)

    def distant_groups(self, num_tokens: int) -> int:
        """Groups of 64 tokens in the tier once `num_tokens` are committed."""
        return (self.window_start(num_tokens) - SINK_TOKENS) // GROUP_TOKENS


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)


KEPT_GROUPS = 5
"""The most groups that a window holds: so many may have to come back into it when a call is rolled back."""


def key_cells(shape: ModelShape, recipe: RecipeSpec) -> int:
    """(layer, KV head)s that store distant keys."""
    return shape.num_layers * shape.num_kv_heads - (shape.num_followers if recipe.shares_keys else 0)


def group_bytes(shape: ModelShape, recipe: RecipeSpec) -> int:
    """Bytes of a group of 64 tokens in host memory.

    Keys and values lie side by side there, and so do the values of two cells that store no keys: whole rows of two.
    """
    keys, values = key_cells(shape, recipe), shape.num_layers * shape.num_kv_heads
    return _ceil_div(keys + values, 2) * 2 * GROUP_TOKENS * shape.head_dim * shape.dtype_bytes


@dataclass(frozen=True, slots=True)
class Footprint:
    """Bytes of one sequence by owner."""

    window_bytes: int
    index_bytes: int
    slot_bytes: int
    host_bytes: int

    @property
    def device_bytes(self) -> int:
        """All of it that is on the device."""
        return self.window_bytes + self.index_bytes + self.slot_bytes


def index_blocks(shape: ModelShape, recipe: RecipeSpec, num_groups: int) -> int:
    """The most arena blocks of the index of `num_groups` groups, over all layers and KV heads.

    A group of 64 keys of one (layer, KV head) takes `64 * head_dim * bits / 8` bytes of codes and `params` rows of
    numbers; of clusters, a number for each token, and the clusters' centroids. The two lie in blocks of their own.
    """
    if num_groups == 0:
        return 0
    row_bytes = shape.head_dim * shape.dtype_bytes
    if recipe.tokens_per_cluster:
        codes_bytes = num_groups * GROUP_TOKENS * CLUSTER_LABEL_BYTES
        params_bytes = most_clusters(num_groups, recipe.tokens_per_cluster) * row_bytes
    else:
        codes_bytes = num_groups * GROUP_TOKENS * shape.head_dim * recipe.index_bits // 8
        params_bytes = num_groups * recipe.index_params * row_bytes
    per_cell = _ceil_div(codes_bytes, shape.block_bytes) + _ceil_div(params_bytes, shape.block_bytes)
    return key_cells(shape, recipe) * per_cell


def most_clusters(num_groups: int, tokens_per_cluster: int) -> int:
    """The most clusters of `num_groups` groups: one for each `tokens_per_cluster`, and one more for what is left."""
    return num_groups * GROUP_TOKENS // tokens_per_cluster + 1


def lasting_index_blocks(shape: ModelShape, recipe: RecipeSpec, num_groups: int) -> int:
    """Of the blocks of an index, those that are never written to again, so that forks share them for good.

    The last block of codes and of params may be written to. Clusters may be formed anew.
    """
    if recipe.tokens_per_cluster:
        return 0
    return max(0, index_blocks(shape, recipe, num_groups) - 2 * key_cells(shape, recipe))


def most_held(eviction: Eviction, num_tokens: int, num_unread: int) -> int:
    """The most tokens that a KV head holds, on average, of a sequence that drops tokens as it grows to `num_tokens`.

    Args:
        eviction: what it drops.
        num_tokens: the most tokens.
        num_unread: of these, those that are yet to be read, and that aren't part of an answer.
    """
    reading = min(eviction.read_tokens, eviction.kept_tokens + num_unread)
    # A token is there before another one is dropped for it.
    return min(num_tokens, max(eviction.kept_tokens + 1, reading))


def _remembered_bytes(shape: ModelShape, eviction: Eviction, held_tokens: int) -> int:
    """What a scorer remembers of tokens that take the bytes of so many."""
    tokens = held_tokens * 8 * shape.dtype_bytes // eviction.bits if eviction.codec else held_tokens
    return 4 * eviction.remembers * tokens * shape.num_layers * shape.num_kv_heads


def footprint(shape: ModelShape, recipe: RecipeSpec, num_tokens: int, num_unread: int = 0) -> Footprint:
    """The most bytes a sequence takes while it grows to `num_tokens` tokens, by owner.

    Worker, gateway and `kvservice size` call this one function. The prefill workspace is the worker's, not the
    sequence's. Bytes are what the arena hands out: whole blocks.

    Args:
        shape: of the model.
        recipe: of the sequence.
        num_tokens: the most tokens.
        num_unread: of these, those that are yet to be read, and that aren't part of an answer. It matters where tokens
            are dropped once all are read.
    """
    if recipe.eviction is not None:
        columns = _ceil_div(most_held(recipe.eviction, num_tokens, num_unread), BLOCK_TOKENS)
        # A block more in one layer: there kernels put a token of the layer that they are in.
        blocks = columns * shape.num_cells + 2 * shape.num_kv_heads
        return Footprint(
            window_bytes=blocks * shape.block_bytes,
            index_bytes=_remembered_bytes(shape, recipe.eviction, columns * BLOCK_TOKENS),
            slot_bytes=0,
            host_bytes=0,
        )
    if recipe.distant is Distant.RESIDENT:
        widest = num_tokens
    else:
        # A window of 319 tokens slides when the next one is committed.
        widest = min(num_tokens, SINK_TOKENS + recipe.window_tokens + GROUP_TOKENS)
    groups = recipe.distant_groups(num_tokens)
    slots = recipe.recalled_tokens if groups else 0
    cells = key_cells(shape, recipe) + shape.num_layers * shape.num_kv_heads
    # Keys that a call pushed out of the window are dropped once it has ended, for it may be rolled back.
    kept_keys = min(groups, KEPT_GROUPS) * GROUP_TOKENS * (shape.num_cells - cells)
    return Footprint(
        window_bytes=_ceil_div(widest, BLOCK_TOKENS) * shape.num_cells * shape.block_bytes,
        index_bytes=index_blocks(shape, recipe, groups) * shape.block_bytes,
        slot_bytes=_ceil_div(slots, BLOCK_TOKENS) * cells * shape.block_bytes,
        host_bytes=groups * group_bytes(shape, recipe) + kept_keys * shape.head_dim * shape.dtype_bytes,
    )


def further_answer(shape: ModelShape, recipe: RecipeSpec, shared_tokens: int, num_tokens: int) -> Footprint:
    """What each answer of a call beyond the first takes for itself: it goes on from the same `shared_tokens`.

    Blocks that are never written to again are shared: whole blocks of a window that doesn't slide, sinks, and what
    lasts of an index.
    """
    whole = footprint(shape, recipe, num_tokens)
    if recipe.eviction is not None:
        return whole
    column_bytes = shape.num_cells * shape.block_bytes
    if recipe.distant is Distant.RESIDENT:
        return replace(whole, window_bytes=whole.window_bytes - shared_tokens // BLOCK_TOKENS * column_bytes)
    groups = recipe.distant_groups(shared_tokens)
    return replace(
        whole,
        window_bytes=whole.window_bytes - (column_bytes if shared_tokens >= BLOCK_TOKENS else 0),
        index_bytes=whole.index_bytes - lasting_index_blocks(shape, recipe, groups) * shape.block_bytes,
        host_bytes=whole.host_bytes - groups * group_bytes(shape, recipe),
    )


@dataclass(frozen=True, slots=True)
class FrameRef:
    """A frame as a manifest names it.

    Attributes:
        layer_group: index of the layer group.
        role: what its payload is, a value of `tier.wire.FrameRole`.
        start: first token position.
        stop: one past the last token position.
        chunk_hash: stands for the tokens up to `stop`.
        stored_bytes: of the whole value as it lies in the tier; 0: not known yet.
    """

    layer_group: int
    role: str
    start: int
    stop: int
    chunk_hash: bytes
    stored_bytes: int


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """A model as a worker announces it."""

    name: str
    shape: ModelShape
    recipes: tuple[str, ...]
    default_recipe: str
    origin: str


@dataclass(frozen=True, slots=True)
class Load:
    """How soon a worker would answer: what it has to do, how fast it is, and whose tokens it has KV of."""

    waiting_tokens: int = 0
    """Tokens of its calls whose KV is still to be computed."""
    prefill_tokens_per_s: float = 0.0
    """Smoothed over its last steps; 0: it has computed nothing yet."""
    fetch_bytes_per_s: float = 0.0
    """What it reads from the kv Redis; 0: it reads nothing from there."""
    prefixes: tuple[int, ...] = ()
    """Names of leading tokens whose KV it holds, see `internal.prefixes`; the last used first, and bounded."""
    decode_tokens_per_s: float = 0.0
    """All answers together, smoothed over its last steps; 0: it has decoded nothing yet."""


@dataclass(frozen=True, slots=True)
class Headroom:
    """What a worker has left. A hint: the worker alone admits."""

    device_capacity_bytes: int = 0
    device_free_bytes: int = 0
    device_freeable_bytes: int = 0
    """Free once every idle session was dropped."""
    host_capacity_bytes: int = 0
    host_free_bytes: int = 0
    host_freeable_bytes: int = 0
    running_calls: int = 0
    resident_sessions: int = 0
    draining: bool = False
    load: Load = field(default_factory=Load, compare=False)
    """Not room: two workers with as much left are equal, however fast they are."""


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of one call."""

    cached_tokens: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    recomputed_tokens: int = 0
    reused_tokens: int = 0
    """Of the prompt tokens, those whose KV another session of the tenant had already."""


@dataclass(frozen=True, slots=True)
class KvTelemetry:
    """Where a sequence's bytes are, and what recall did in one call."""

    window_bytes: int = 0
    index_bytes: int = 0
    slot_bytes: int = 0
    host_bytes: int = 0
    redis_bytes: int = 0
    dense_bytes: int = 0
    recall_lookups: int = 0
    recall_hits: int = 0
    recalled_bytes: int = 0
    streamed_bytes: int = 0
    index_groups: int = 0
    """Groups of 64 tokens that were to be scored, over all layers and KV heads. Not sent: for evaluation."""
    index_groups_scanned: int = 0
    """Of those, how many an index that bounds the scores of groups scored token by token. Not sent."""
    gated_rows: int = 0
    """Of layers that use another's keys: rows (a query in a query head) that might have left distant tokens out."""
    skipped_rows: int = 0
    """Of those, the rows that did."""
    follower_bytes: int = 0
    """Of `recalled_bytes`, those of layers that use another's keys, in decode steps."""
    arrived_bytes: int = 0
    """Of those, what a simulated link had brought when it was needed. Not sent."""


@dataclass(frozen=True, slots=True)
class Reached:
    """How the KV of a session's leading tokens was computed: what it takes to compute it again bit for bit.

    Attributes:
        num_computed: leading tokens that have KV.
        selected: spans of those that attended to a selection; the others attended to everything before them.
    """

    num_computed: int = 0
    selected: tuple[tuple[int, int], ...] = ()

    def until(self, num_tokens: int) -> Reached:
        """Of the first `num_tokens` tokens."""
        return Reached(
            min(self.num_computed, num_tokens),
            tuple((start, min(stop, num_tokens)) for start, stop in self.selected if start < num_tokens),
        )


NOTHING_REACHED = Reached()
"""Of a session without KV."""


@dataclass(frozen=True, slots=True)
class RestoredWindow:
    """KV that isn't in groups: of the sinks, and of what follows the groups.

    Attributes:
        start: the first position behind the sinks, where groups end.
        stop: one past the last.
        memory: `[layers, kv, 16 + stop - start, 2, d]` in the model's dtype, on the CPU.
    """

    start: int
    stop: int
    memory: memoryview


class RestoredKv(Protocol):
    """KV of a session on its way from a tier: first the window, then groups from the first on. For any thread."""

    @property
    def reached(self) -> Reached:
        """How the session's tokens were computed."""

    @property
    def num_groups(self) -> int:
        """Leading groups of 64 tokens that were asked for; once it `is_done`, those that came."""

    @property
    def num_tokens(self) -> int:
        """Leading tokens of the session that needn't be computed if all of it comes; once it `is_done`, now."""

    @property
    def num_arrived(self) -> int:
        """Leading groups that are there."""

    @property
    def memory(self) -> memoryview:
        """Of groups, `[n, layers, kv, 64, 2, d]` in the model's dtype, on the CPU; beyond `num_arrived` anything."""

    @property
    def awaits_window(self) -> bool:
        """Whether the window is on its way."""

    @property
    def window(self) -> RestoredWindow | None:
        """The window, once it is there."""

    @property
    def is_done(self) -> bool:
        """Whether nothing more will come."""

    def wait(self, timeout_s: float) -> None:
        """Blocks until something has come since this was last called, or nothing more will; at most `timeout_s`."""

    def give_up(self) -> None:
        """Nobody wants the rest. Never blocks."""


@dataclass(frozen=True, slots=True)
class TenantTerms:
    """What a call's tenant gets of a worker."""

    weight: float = 1.0
    """Of its time, against the other tenants'."""
    device_bytes: int | None = None
    """The most that its sessions may hold; None: no limit."""
    host_bytes: int | None = None


NO_TERMS = TenantTerms()
"""Of a tenant without any of its own."""


@dataclass(frozen=True, slots=True)
class EngineCall:
    """One call on a sequence: read `document_tokens`, then `prompt_tokens`, then generate.

    Document tokens attend to everything before them; prompt and generated tokens use the recipe's selection.
    `sampling` None generates nothing (Append).
    """

    call_id: CallId
    session_id: SessionId
    recipe: RecipeSpec
    base_tokens: tuple[int, ...]
    document_tokens: tuple[int, ...] = ()
    prompt_tokens: tuple[int, ...] = ()
    sampling: SamplingParams | None = None
    retain: bool = True
    """Keep the sequence after the call."""
    keep_partial: bool = False
    on_miss: OnMiss = OnMiss.RECOMPUTE
    tenant_tag: bytes = b""
    """Stands for the tenant in stored keys. 16 bytes, made by the gateway."""
    priority: int = 0
    """Calls of a higher one go first, and may take the memory of running calls of a lower one for a while."""
    deadline: float | None = None
    """When the call fails if it still runs; seconds of the engine's clock."""
    restored: RestoredKv | None = None
    """KV of `base_tokens`, for an engine that doesn't hold it; it may still be on its way."""
    terms: TenantTerms = NO_TERMS


@dataclass(frozen=True, slots=True)
class ProgressEvent:
    """Prefill moved on."""

    call_id: CallId
    done_tokens: int
    total_tokens: int


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A token and the logarithm of its probability, after penalties and bias, before temperature and truncation."""

    token_id: int
    logprob: float


@dataclass(frozen=True, slots=True)
class TokenEvent:
    """One token of an answer was generated."""

    call_id: CallId
    token_id: int
    index: int = 0
    """Which of the call's `n` answers it belongs to."""
    logprobs: tuple[TokenLogprob, ...] = ()
    """If asked for: the chosen token first, then the most likely ones, the likeliest first."""


@dataclass(frozen=True, slots=True)
class FinishedEvent:
    """The call ended well. `appended_tokens` are what the session gained."""

    call_id: CallId
    finish_reasons: tuple[FinishReason, ...]
    """One for each of the call's answers; one if it generates nothing."""
    usage: Usage
    telemetry: KvTelemetry
    appended_tokens: tuple[int, ...]
    prefill_ms: float
    decode_ms: float
    reached: Reached = NOTHING_REACHED
    """Of the session after the call."""
    device_byte_s: float = 0.0
    """Bytes times seconds that the session's KV has taken on the device since its last call's end."""
    host_byte_s: float = 0.0

    @property
    def finish_reason(self) -> FinishReason:
        """Of the answer that joins the session."""
        return self.finish_reasons[0]


@dataclass(frozen=True, slots=True)
class FailedEvent:
    """The call ended with an error; the session is as before."""

    call_id: CallId
    error: Exception


EngineEvent = ProgressEvent | TokenEvent | FinishedEvent | FailedEvent


@dataclass(frozen=True, slots=True)
class TierStats:
    """The tier below host memory, as a worker sees it."""

    connected: bool = False
    """It did what it was last asked for."""
    written_frames: int = 0
    written_bytes: int = 0
    stored_bytes: int = 0
    """Written, not deleted, and not yet past its time."""
    pending_frames: int = 0
    failures: Mapping[str, int] = field(default_factory=dict)
    """Frames that were not written, by reason."""


@dataclass(frozen=True, slots=True)
class WorkerStats:
    """A worker's counters, for operators."""

    headroom: Headroom = field(default_factory=Headroom)
    weight_bytes: int = 0
    window_bytes: int = 0
    index_bytes: int = 0
    slot_bytes: int = 0
    workspace_bytes: int = 0
    host_bytes: int = 0
    prefill_tokens_per_s: float = 0.0
    decode_tokens_per_s: float = 0.0
    recall_lookups: int = 0
    recall_hits: int = 0
    recomputed_tokens: int = 0
    steps: int = 0
    swapped_out: int = 0
    """Running sequences that made room by going to host memory."""
    forgotten: int = 0
    """Running sequences that made room by dropping KV, which was computed again."""
    idle_swapped_out: int = 0
    idle_dropped: int = 0
    parked_sessions: int = 0
    """Of the resident sessions, those that have gone to host memory whole."""
    tier: TierStats = field(default_factory=TierStats)
