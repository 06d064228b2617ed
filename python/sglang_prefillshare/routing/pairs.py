"""The router in front of stock SGLang: every model has a prefill worker and a decode worker of its own.

What our benchmark compares with. The workers run without our roles, prefill samples the first token, and nothing is
shared between models. All else is the router's own code: the same endpoints, dispatch and telemetry, so that passing
through it costs the same on both sides.

    python -m sglang_prefillshare.routing.pairs --port 8000 \\
        --prefill coder=http://127.0.0.1:30000 --decode coder=http://127.0.0.1:31000
"""

from __future__ import annotations

import dataclasses
import logging
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any, Final

import aiohttp
import click

from sglang_prefillshare.errors import ConfigError
from sglang_prefillshare.protocol import Role, WorkerInfo
from sglang_prefillshare.request_fields import Limits
from sglang_prefillshare.routing import _json
from sglang_prefillshare.routing.app import Router
from sglang_prefillshare.routing.attempt import Accounting
from sglang_prefillshare.routing.config import RouterConfig
from sglang_prefillshare.routing.legs import Legs
from sglang_prefillshare.routing.request import ClientRequest, Pairing
from sglang_prefillshare.routing.verdicts import Bases, Judgement, Status, Verdict
from sglang_prefillshare.routing.workers import Worker, WorkerPool

STOCK_BOUNDARY: Final = "model:x1..xn,y1;model:y2.."
"""What stock disaggregation does: prefill computes the whole prompt and samples the first token."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PairsConfig(RouterConfig):
    """`prefill_of` maps each model to its own prefill workers; together they are `prefill`."""

    prefill_of: Mapping[str, Sequence[str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        RouterConfig.__post_init__(self)
        if self.prefill_of.keys() != self.decode.keys():
            raise ConfigError(
                f"prefill workers are given for {', '.join(self.prefill_of)}, decode workers for "
                f"{', '.join(self.decode)}. Each model needs both."
            )


class PairPool(WorkerPool):
    """Workers by model on both sides; what they are is read from SGLang's own endpoints."""

    def __init__(self, config: PairsConfig, **more: Any) -> None:
        super().__init__(config, **more)
        owners = {url.rstrip("/"): model for model, urls in config.prefill_of.items() for url in urls}
        for worker in self.prefill:
            worker.model = owners[worker.url]

    def prefill_workers(self, module: str) -> Sequence[Worker]:
        return [worker for worker in self.prefill if worker.model == module]

    def judgement(self) -> Judgement:
        return Judgement(Bases(), {worker.url: _verdict(worker) for worker in self})

    def limits(self, module: str) -> Limits:
        """Of stock pairs a handoff serves one sample: SGLang warms a prompt up and samples n times in one room."""
        return dataclasses.replace(super().limits(module), max_samples=1)

    async def poll(self, worker: Worker, session: aiohttp.ClientSession) -> None:
        """Read the whole description once; afterwards only see that the worker answers, as cheaply as with roles."""
        is_known = worker.info is not None and worker.lost is None
        path = "/model_info" if is_known else "/server_info"
        try:
            async with self.get(worker, path, session) as response:
                if response.status != HTTPStatus.OK:
                    self.missed(worker, f"answered {response.status} at {path}")
                    return
                told = await response.json(content_type=None)
        except (aiohttp.ClientError, TimeoutError, OSError, ValueError) as error:
            self.missed(worker, f"does not answer: {str(error) or type(error).__name__}")
            return
        try:
            self.seen(worker, worker.info if is_known else describe_stock(told), None)
        except (KeyError, TypeError, ValueError) as error:
            self.seen(worker, None, f"its {path} cannot be read: {error!r}")


def describe_stock(told: Mapping[str, Any]) -> WorkerInfo:
    """What a stock worker says at `/server_info`, in our words. Its "base" is its own model."""
    mode = told["disaggregation_mode"]
    model = told["served_model_name"]
    return WorkerInfo(
        role=Role(mode),
        model=model,
        base_fingerprint=f"stock:{model}",
        boundary=STOCK_BOUNDARY,
        trained=True,
        transfer_backend=told["disaggregation_transfer_backend"],
        page_size=int(told["page_size"]),
        kv_dtype=str(told["kv_cache_dtype"]),
        max_total_tokens=int(told["max_total_num_tokens"]),
        max_running_requests=int(told["max_running_requests"] or 0),
        context_length=int(told["context_length"] or 0),
        bootstrap_port=int(told["disaggregation_bootstrap_port"]) if mode == "prefill" else None,
        version=str(told["version"]),
    )


def _verdict(worker: Worker) -> Verdict:
    if worker.lost is not None or (worker.info is None and worker.problem is None):
        return Verdict(Status.DOWN if worker.was_seen else Status.STARTING, worker.lost or "not reached yet")
    if worker.info is None:
        return Verdict(Status.REFUSED, worker.problem)
    if (worker.info.role, worker.info.model) != (worker.role, worker.model):
        found = f"{worker.info.role} of {worker.info.model!r}"
        return Verdict(Status.REFUSED, f"it is {found}, and it is configured as {worker.role} of {worker.model!r}")
    return Verdict(Status.READY, None)


class PairLegs(Legs):
    """Both legs get what the client sent, as stock SGLang wants it, and prefill's answer says what it found."""

    def prefill_body(self, request: ClientRequest, *, base_model: str, pairing: Pairing) -> bytes:
        return _json.dumps({**request.body, "stream": False, **pairing.fields(request)})

    def account(self, response: aiohttp.ClientResponse, answer: bytes) -> Accounting:
        try:
            prefill_tokens, cached_tokens = _counts(_json.loads(answer))
        except (ValueError, KeyError, TypeError):
            return Accounting()  # the call is served all the same
        # A model finds what it computed itself, or nothing.
        return Accounting(prefill_tokens, cached_tokens, cross_model_cached_tokens=0)


def _counts(answer: Any) -> tuple[int, int]:
    """Prompt tokens and those found in the cache, of a whole answer of any endpoint."""
    if "usage" in answer:
        usage = answer["usage"]
        return int(usage["prompt_tokens"]), int((usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0)
    metas = [item["meta_info"] for item in (answer if isinstance(answer, list) else [answer])]
    return sum(int(meta["prompt_tokens"]) for meta in metas), sum(int(meta["cached_tokens"]) for meta in metas)


class PairRouter(Router):
    """Serves `PairsConfig`."""

    config: PairsConfig
    pool_type = PairPool
    legs_type = PairLegs


@click.command(help="Route to stock prefill and decode workers, a pair or more for each model.")
@click.option("--prefill", multiple=True, required=True, metavar="NAME=URL")
@click.option("--decode", multiple=True, required=True, metavar="NAME=URL")
@click.option("--host", default="127.0.0.1", show_default=True)
@click.option("--port", type=int, default=8000, show_default=True)
@click.option("--request-timeout", "request_timeout_s", type=float, default=600.0, show_default=True)
def main(prefill: tuple[str, ...], decode: tuple[str, ...], host: str, port: int, request_timeout_s: float) -> None:
    from sglang_prefillshare.routing.server import serve

    logging.basicConfig(level="INFO", format="%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S")
    prefill_of, decode_of = _by_model(prefill, "--prefill"), _by_model(decode, "--decode")
    config = PairsConfig(
        prefill=[url for urls in prefill_of.values() for url in urls],
        prefill_of=prefill_of,
        decode=decode_of,
        host=host,
        port=port,
        request_timeout_s=request_timeout_s,
    )
    serve(config, router=PairRouter(config))


def _by_model(entries: Sequence[str], flag: str) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for entry in entries:
        name, equals, url = entry.partition("=")
        if not equals:
            raise click.BadParameter(
                f"{entry!r}, wanted NAME=URL such as coder=http://127.0.0.1:30001.", param_hint=flag
            )
        found.setdefault(name, []).append(url)
    return found


if __name__ == "__main__":
    sys.exit(main())
