"""What the router is told at start: its workers, deadlines and policy, checked once and frozen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from urllib.parse import urlsplit

from sglang_prefillshare.errors import ConfigError
from sglang_prefillshare.protocol import Role
from sglang_prefillshare.routing.membership import (
    MODULE_NAME_RULE,
    Member,
    SourceSpec,
    checked_url,
    is_module_name,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyConfig:
    """When a loaded worker loses a request that it has the best claim to (paper §3.3, "whenever possible").

    A request leaves its session's or prefix's prefill worker only when that has more than `load_margin_tokens`
    prefill tokens in flight beyond the least loaded one, and more than `load_margin_ratio` times as many; its
    decode worker likewise beyond `load_margin_requests` requests. A prefix counts from `min_prefix_tokens` on. The
    prefix's worker gets a new session only while it has at most `session_margin` more live ones than another.
    """

    load_margin_tokens: int = 8192
    load_margin_requests: int = 8
    load_margin_ratio: float = 1.5
    min_prefix_tokens: int = 64
    session_margin: int = 1
    home_margin: int = 1
    """A session that the router does not know goes to the worker that its key names while that has at most so many live
    sessions more than another, and never beyond `session_margin`."""

    def __post_init__(self) -> None:
        if self.load_margin_tokens < 0:
            raise ConfigError(f"load_margin_tokens is {self.load_margin_tokens}, wanted 0 or more.")
        if self.load_margin_requests < 0:
            raise ConfigError(f"load_margin_requests is {self.load_margin_requests}, wanted 0 or more.")
        if self.load_margin_ratio < 1:
            raise ConfigError(f"load_margin_ratio is {self.load_margin_ratio}, wanted 1 or more.")
        if self.min_prefix_tokens < 1:
            raise ConfigError(f"min_prefix_tokens is {self.min_prefix_tokens}, wanted 1 or more.")
        if self.session_margin < 0:
            raise ConfigError(f"session_margin is {self.session_margin}, wanted 0 or more.")
        if self.home_margin < 0:
            raise ConfigError(f"home_margin is {self.home_margin}, wanted 0 or more.")


@dataclass(frozen=True, slots=True, kw_only=True)
class AdmissionConfig:
    """When a request waits in the router, and for how long.

    At most `queue_size` wait, each for `queue_timeout_s`. On a decode worker there must be room for what a request may
    generate, up to `counted_output_tokens`, as SGLang itself counts; for `expected_output_tokens` if it sets no limit.
    On a prefill worker the prompts that it has yet to compute add up to `prefill_backlog_tokens` and one prompt, at
    most, and a session is held back where the contexts of others fill the pool. After `session_hold_s` it is due to
    take the place of one that came before it; None holds nobody back.
    """

    is_on: bool = True
    queue_size: int = 1024
    queue_timeout_s: float = 60.0
    queue_bytes: int = 256 * 1024 * 1024
    """Of the bodies of those that wait, which are kept as they came and parsed."""
    expected_output_tokens: int = 1024
    counted_output_tokens: int = 4096
    output_share: float = 1.0
    """Of its limit, how much an answer is taken to have. With less than 1 more requests run at once, and decode
    retracts some where too many of them go on to their limit."""
    prefill_backlog_tokens: int = 16_384
    min_shared_tokens: int = 512
    """A prefix of so many tokens that is being computed is waited for, if that is shorter than to compute it again."""
    patience_s: float = 2.0
    """How long a request waits for the prefill worker that has its prefix, before any other will do."""
    session_hold_s: float | None = 30.0
    session_idle_s: float = 2.0
    """A session that made no call for so long holds nobody back: agents go on sooner."""

    def __post_init__(self) -> None:
        if self.queue_size < 0:
            raise ConfigError(f"queue_size is {self.queue_size}, wanted 0 or more; 0 lets nobody wait.")
        if not 0 < self.queue_timeout_s < float("inf"):
            raise ConfigError(f"queue_timeout_s is {self.queue_timeout_s}, wanted a positive number of seconds.")
        if not 0 < self.output_share <= 1:
            raise ConfigError(f"output_share is {self.output_share}, wanted a number above 0, and 1 at most.")
        for name in ("patience_s", "session_hold_s", "session_idle_s"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < float("inf"):
                raise ConfigError(f"{name} is {value}, wanted 0 or more seconds.")
        for name in (
            *("queue_bytes", "expected_output_tokens", "counted_output_tokens", "prefill_backlog_tokens"),
            "min_shared_tokens",
        ):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}, wanted 1 or more.")


@dataclass(frozen=True, slots=True, kw_only=True)
class BreakerConfig:
    """When a worker that fails gets no requests, and for how long.

    `failures_to_open` in a row open its breaker, 0 never do; `backoff_s` later one request tries it, and each failure
    of that doubles the wait, up to `max_backoff_s`.
    """

    failures_to_open: int = 5
    backoff_s: float = 2.0
    max_backoff_s: float = 60.0

    def __post_init__(self) -> None:
        if self.failures_to_open < 0:
            raise ConfigError(f"failures_to_open is {self.failures_to_open}, wanted 0 or more; 0 turns breakers off.")
        if not 0 < self.backoff_s <= self.max_backoff_s < float("inf"):
            raise ConfigError(
                f"backoff_s is {self.backoff_s} and max_backoff_s {self.max_backoff_s}, wanted positive numbers of "
                "seconds of which the second is not less."
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterConfig:
    """Everything `prefillshare route` needs.

    `prefill` are the base workers' URLs, `decode` maps each decode module's served name to its workers' URLs; both
    are normalised (no trailing slash) and frozen here. Several modules may name one worker: it serves them as adapters.
    `sources` name more workers, which say themselves what they are; with them, or with an `admin_api_key`, under which
    workers can be added later, both may be empty. Raises `ConfigError` for what cannot work.
    """

    prefill: Sequence[str] = ()
    decode: Mapping[str, Sequence[str]] = field(default_factory=dict)
    sources: Sequence[SourceSpec] = ()
    host: str = "127.0.0.1"
    port: int = 8000
    worker_api_key: str | None = field(default=None, repr=False)
    admin_api_key: str | None = field(default=None, repr=False)
    """What those who change workers and modules must show; without one nobody can."""

    connect_timeout_s: float = 2.0
    poll_interval_s: float = 1.0
    poll_timeout_s: float = 2.0
    poll_misses_until_down: int = 3
    request_timeout_s: float = 600.0
    drain_timeout_s: float = 30.0
    """How long a prefill leg may outlive the answer that its decode leg has completed."""
    loss_wait_s: float = 2.0
    """How long a failure that a dying prefill worker may have caused is held back, to see whether it dies. SGLang's
    server outlives its scheduler by up to a second, and the polls need one more to notice."""
    abort_timeout_s: float = 2.0
    admin_timeout_s: float = 60.0
    drain_deadline_s: float = 120.0
    """How long requests may still take on a worker, or for a module, that leaves."""
    resolve_interval_s: float = 5.0
    """Between two looks at a `dns` source. A `file` source is looked at every `poll_interval_s`."""
    stop_grace_s: float = 5.0
    """After SIGTERM or SIGINT, how long calls in flight may take to finish by themselves."""

    api_keys_file: Path | None = None
    """Keys that clients must have; workers then see `worker_api_key` and nothing of them."""
    cors_origins: Sequence[str] = ()
    """Web pages of these origins may ask; "*" is any."""
    otlp_endpoint: str | None = None
    """Where spans of calls and legs go, over OTLP and HTTP."""

    max_body_bytes: int = 64 * 1024 * 1024
    response_store_bytes: int = 64 * 1024 * 1024
    """Of responses that clients may go on from; 0 keeps none."""
    call_log_size: int = 1000
    session_capacity: int = 65_536
    session_live_s: float = 300.0
    """A session that made no call for so long does not count for its worker any more; it still finds it again."""
    prefix_block_bytes: int = 256
    prefix_capacity_blocks: int = 65_536
    """Bound of the prefix index, for each worker; as many bytes of prompts are kept for those that publish events."""
    event_capacity_blocks: int = 1_048_576
    """A worker that publishes more blocks than this is guessed at."""
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    admission: AdmissionConfig = field(default_factory=AdmissionConfig)
    breaker: BreakerConfig = field(default_factory=BreakerConfig)
    retries: int = 1
    """How many more pairs of legs a call may get, where another can change anything."""

    def __post_init__(self) -> None:
        if isinstance(self.prefill, str):
            raise ConfigError(f"prefill is the string {self.prefill!r}, wanted a list of URLs.")
        prefill = tuple(checked_url(url, "prefill") for url in self.prefill)
        is_open = bool(self.sources) or self.admin_api_key is not None
        if not prefill and not is_open:
            raise ConfigError("No prefill worker is configured. Name at least one URL of a base worker.")
        decode: dict[str, tuple[str, ...]] = {}
        for name, urls in self.decode.items():
            if not is_module_name(name):
                raise ConfigError(f"{name!r} cannot name a decode module: {MODULE_NAME_RULE}")
            if isinstance(urls, str):
                raise ConfigError(f"decode module {name!r} has the string {urls!r}, wanted a list of URLs.")
            decode[name] = tuple(checked_url(url, f"decode module {name!r}") for url in urls)
            if not decode[name]:
                raise ConfigError(f"decode module {name!r} has no worker. Name at least one URL, or remove it.")
        if not decode and not is_open:
            raise ConfigError("No decode module is configured. Name at least one, with the URL of its worker.")
        twice = next((source for source in self.sources if list(self.sources).count(source) > 1), None)
        if twice is not None:
            raise ConfigError(f"the source {twice} is given twice. Keep one.")
        if self.admin_api_key is not None and (not self.admin_api_key or not self.admin_api_key.isascii()):
            raise ConfigError("the admin API key is empty or not ASCII, wanted a secret that fits into a header.")
        _refuse_shared_urls(prefill, decode)

        object.__setattr__(self, "prefill", prefill)
        object.__setattr__(self, "decode", MappingProxyType(decode))
        object.__setattr__(self, "sources", tuple(self.sources))

        object.__setattr__(self, "cors_origins", tuple(_checked_origin(origin) for origin in self.cors_origins))
        if self.otlp_endpoint is not None:
            object.__setattr__(self, "otlp_endpoint", checked_url(self.otlp_endpoint, "otlp_endpoint"))

        if not 0 <= self.port <= 65535:
            raise ConfigError(f"port is {self.port}, wanted 0 to 65535.")
        if self.response_store_bytes < 0:
            raise ConfigError(f"response_store_bytes is {self.response_store_bytes}, wanted 0 (none) or more.")
        for name in (
            *("connect_timeout_s", "poll_interval_s", "poll_timeout_s", "request_timeout_s"),
            *("drain_timeout_s", "loss_wait_s", "abort_timeout_s", "admin_timeout_s", "session_live_s"),
            *("drain_deadline_s", "resolve_interval_s"),
        ):
            if not 0 < getattr(self, name) < float("inf"):
                raise ConfigError(f"{name} is {getattr(self, name)}, wanted a positive number of seconds.")
        if self.retries < 0:
            raise ConfigError(f"retries is {self.retries}, wanted 0 or more.")
        if not 0 <= self.stop_grace_s < float("inf"):
            raise ConfigError(f"stop_grace_s is {self.stop_grace_s}, wanted 0 or more seconds.")
        for name in (
            *("poll_misses_until_down", "max_body_bytes", "call_log_size", "session_capacity"),
            *("prefix_block_bytes", "prefix_capacity_blocks"),
        ):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}, wanted 1 or more.")

    @property
    def members(self) -> tuple[Member, ...]:
        """The workers that are named here, each once."""
        modules: dict[str, list[str]] = {}
        for name, urls in self.decode.items():
            for url in urls:
                modules.setdefault(url, []).append(name)
        return (
            *(Member(url, Role.PREFILL) for url in self.prefill),
            *(Member(url, Role.DECODE, tuple(names)) for url, names in modules.items()),
        )


def _checked_origin(origin: str) -> str:
    if origin == "*":
        return origin
    try:
        parts = urlsplit(origin)
        _ = parts.port
        is_origin = parts.scheme in ("http", "https") and bool(parts.hostname) and origin == origin.lower()
    except ValueError:
        is_origin = False
    if not is_origin or parts.path or parts.query or parts.fragment or parts.username is not None:
        raise ConfigError(
            f"cors_origin is {origin!r}, wanted a web page's origin as browsers send it, such as "
            "https://agents.example (scheme, host and port; no path, in lower case), or * for any."
        )
    return origin


def _refuse_shared_urls(prefill: tuple[str, ...], decode: Mapping[str, tuple[str, ...]]) -> None:
    seen: dict[str, str] = {}
    owned = [(url, "prefill") for url in prefill]
    owned += [(url, f"decode module {name!r}") for name, urls in decode.items() for url in urls]
    for url, owner in owned:
        # A decode worker with adapters serves several modules; it says itself which.
        if url in seen and ("prefill" in (owner, seen[url]) or owner == seen[url]):
            raise ConfigError(f"{url} is named twice, for {seen[url]} and for {owner}. A worker has one role.")
        seen[url] = owner
