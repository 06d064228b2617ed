"""The `prefillshare` command. Parses and hands on; every subcommand imports what it runs only when it runs."""

from __future__ import annotations

import logging
import shlex
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from sglang_prefillshare import __version__
from sglang_prefillshare.errors import ConfigError, PrefillShareError

if TYPE_CHECKING:
    from sglang_prefillshare.config import Topology
    from sglang_prefillshare.deployment import DeploymentOptions

EXIT_CONFIG: Final = 2
EXIT_FAILURE: Final = 1
EXIT_INTERRUPTED: Final = 130

_PIPED_COLUMNS: Final = 160
"""Of a table that goes to no terminal."""

_FOLDER = click.Path(file_okay=False, path_type=Path)
_FILE = click.Path(dir_okay=False, path_type=Path)


_log_format = click.option(
    "--log-format",
    type=click.Choice(["text", "json"]),
    default="text",
    show_default=True,
    help="How stderr is written; json is an object a line, and the router adds one for every finished call.",
)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command and exit: 0 if it did what was asked, 2 for a wrong call or setting, 1 for any other failure."""
    sys.exit(run(argv))


def run(argv: Sequence[str] | None = None) -> int:
    """`main`, returning the exit status. An error of ours is told in a line on stderr, without a traceback."""
    try:
        status = cli.main(args=None if argv is None else list(argv), prog_name="prefillshare", standalone_mode=False)
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):
        return EXIT_INTERRUPTED
    except PrefillShareError as error:
        click.echo(f"prefillshare: {error}", err=True)
        return EXIT_CONFIG if isinstance(error, ConfigError) else EXIT_FAILURE
    return status if isinstance(status, int) else 0


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, message="sglang-prefillshare %(version)s")
def cli() -> None:
    """Several fine-tuned models answer from one shared prefill, on SGLang."""


@cli.command()
@click.argument("topology", type=_FILE)
@click.option("--log-dir", type=_FOLDER, help="Write each worker's log to a file in this folder; show only errors.")
@click.option("--ready-timeout", default=300.0, show_default=True, help="Seconds for each worker to become ready.")
@click.option("--start-concurrency", type=int, help="Workers loading at the same time. [default: one per usable core]")
@click.option(
    "--json-ready", type=_FILE, help="A file that tells URLs and pids once all are ready, and after a restart."
)
@click.option("--fail-fast", is_flag=True, help="Restart nothing: when one process ends, end all.")
@click.option("--interrupt-grace", default=8.0, show_default=True, help="At the end, seconds from SIGINT to SIGTERM.")
@click.option("--terminate-grace", default=4.0, show_default=True, help="At the end, seconds from SIGTERM to SIGKILL.")
@click.option(
    "--worker-command",
    metavar="COMMAND",
    help="Start workers with this, e.g. 'numactl -N0 python -m sglang.launch_server'.",
)
@click.option("--router-command", metavar="COMMAND", hidden=True)
@_log_format
def up(
    topology: Path,
    log_dir: Path | None,
    ready_timeout: float,
    start_concurrency: int | None,
    json_ready: Path | None,
    fail_fast: bool,
    interrupt_grace: float,
    terminate_grace: float,
    worker_command: str | None,
    router_command: str | None,
    log_format: str,
) -> int:
    """Start and supervise a whole TOPOLOGY (YAML) on this machine until Ctrl-C.

    Prints `router URL` on stdout once base workers, decode workers and router are ready (`server URL` of a unified
    topology). One that ends before that ends
    all, with exit status 1. One that ends later is restarted, 3 times in 10 minutes at most, while the others serve on;
    what ends more often, or ends under --fail-fast, ends all. A second Ctrl-C does not wait for anyone.

    On SIGHUP TOPOLOGY is read anew: what it adds is started, what it does not name any more ends once its requests
    have, and the rest serves on. A SIGHUP because the terminal is gone ends all, except under nohup.
    """
    from sglang_prefillshare.config import load_topology
    from sglang_prefillshare.deployment import DeploymentOptions
    from sglang_prefillshare.plans import ROUTER_COMMAND, WORKER_COMMAND, Commands
    from sglang_prefillshare.process import StopGrace
    from sglang_prefillshare.restarts import RestartPolicy

    worker = WORKER_COMMAND if worker_command is None else tuple(shlex.split(worker_command))
    router = ROUTER_COMMAND if router_command is None else tuple(shlex.split(router_command))
    if log_format != "text":
        router += ("--log-format", log_format)
    options = DeploymentOptions(
        ready_timeout_s=ready_timeout,
        start_concurrency=start_concurrency,
        grace=StopGrace(interrupt_s=interrupt_grace, terminate_s=terminate_grace),
        log_dir=log_dir,
        commands=Commands(worker, router),
        restarts=None if fail_fast else RestartPolicy(),
    )
    return _serve_topology(lambda: load_topology(topology), options, json_ready, log_format)


def _serve_topology(
    read_topology: Callable[[], Topology], options: DeploymentOptions, json_ready: Path | None, log_format: str
) -> int:
    from sglang_prefillshare.deployment import Deployment, StopRequestedError, ready_file
    from sglang_prefillshare.display import Display
    from sglang_prefillshare.json_display import JsonDisplay
    from sglang_prefillshare.terminal import has_terminal

    # Under nohup SIGHUP was ignored when we came, and the loss of the terminal is to change nothing.
    ends_with_terminal = signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN and has_terminal()
    topology = read_topology()
    kind: type[Display | JsonDisplay] = JsonDisplay if log_format == "json" else Display
    with kind(errors_only=options.log_dir is not None) as display:
        deployment = Deployment(topology, options=options, observer=display)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: deployment.request_stop())

        def on_hangup(*_: object) -> None:
            is_gone = ends_with_terminal and not has_terminal()
            (deployment.request_stop if is_gone else deployment.request_reload)()

        signal.signal(signal.SIGHUP, on_hangup)
        try:
            with deployment, ready_file(json_ready, deployment) as write_ready_file:
                click.echo(f"{'server' if deployment.router is None else 'router'} {deployment.url}")
                deployment.wait(on_restored=write_ready_file, read_topology=read_topology)
        except StopRequestedError:
            display.say("stopped")
    return 0


@cli.command()
@click.option("--prefill", multiple=True, metavar="URL", help="A base worker. Repeat for several.")
@click.option("--decode", multiple=True, metavar="NAME=URL", help="A worker of decode module NAME. Repeat for several.")
@click.option(
    "--workers",
    "sources",
    multiple=True,
    metavar="SOURCE",
    help="Where more workers are named, which say themselves what they are: file:PATH (YAML) or dns:NAME:PORT. Repeat.",
)
@click.option("--host", help="Address to listen at.")
@click.option("--port", type=int, help="Port to listen at.")
@click.option("--worker-api-key", envvar="PREFILLSHARE_WORKER_API_KEY", help="The --api-key that workers were given.")
@click.option(
    "--admin-api-key",
    envvar="PREFILLSHARE_ADMIN_API_KEY",
    help="Who shows this key may add and remove workers and modules. [default: nobody]",
)
@click.option(
    "--api-keys-file",
    type=_FILE,
    help="Ask clients for one of the keys in this file (`prefillshare keys add`), everywhere but at probes.",
)
@click.option(
    "--cors-origin", "cors_origins", multiple=True, metavar="ORIGIN", help="Web pages of it may ask; * is any. Repeat."
)
@click.option("--response-store-mib", type=int, help="MiB of /v1/responses' answers to go on from; 0 keeps none.")
@click.option("--otlp-endpoint", metavar="URL", help="Send spans of calls and legs there (extra `otel`).")
@click.option("--connect-timeout", "connect_timeout_s", type=float, help="Seconds to connect to a worker.")
@click.option("--request-timeout", "request_timeout_s", type=float, help="Seconds a whole answer may take.")
@click.option("--drain-timeout", "drain_timeout_s", type=float, help="Seconds a prefill leg may outlive its answer.")
@click.option(
    "--drain-deadline",
    "drain_deadline_s",
    type=float,
    help="Seconds that requests may still take on a worker that leaves.",
)
@click.option("--poll-interval", "poll_interval_s", type=float, help="Seconds between looks at a worker.")
@click.option("--stop-grace", "stop_grace_s", type=float, help="Seconds that running calls are given at the end.")
@click.option("--load-margin-tokens", type=int, help="Prefill tokens in flight that cached prefixes are worth.")
@click.option("--load-margin-requests", type=int, help="Requests in flight that KV kept by a decode worker is worth.")
@click.option("--load-margin-ratio", type=float, help="Likewise, as a multiple of the least loaded worker's.")
@click.option("--session-margin", type=int, help="Live sessions more that a cached prefix is worth to a new one.")
@click.option("--home-margin", type=int, help="Live sessions more that the worker named by a new one's key may have.")
@click.option("--min-prefix-tokens", type=int, help="Shorter common prefixes do not decide where a request goes.")
@click.option("--no-admission", is_flag=True, help="Send every request at once, whether or not its workers have room.")
@click.option("--queue-size", type=int, help="Requests that may wait for room; more are answered with 429.")
@click.option("--queue-timeout", "queue_timeout_s", type=float, help="Seconds a request may wait for room.")
@click.option(
    "--session-hold",
    "session_hold_s",
    type=float,
    help="Seconds a session waits while others' contexts fill the pools, before it may take the place of one of them.",
)
@click.option("--no-session-hold", is_flag=True, help="Let all sessions begin at once, and push each other's KV out.")
@click.option("--expected-output-tokens", type=int, help="Room for the answer of a request that sets no limit to it.")
@click.option("--output-share", type=float, help="Room for an answer, as a share of its limit; at 1 none is retracted.")
@click.option("--prefill-backlog-tokens", type=int, help="Prompt tokens that a prefill worker has ahead to compute.")
@click.option("--retries", type=int, help="More pairs of workers that a call may get before its answer began.")
@click.option("--breaker-failures", type=int, help="Failures in a row after which a worker is left out; 0: never.")
@click.option("--breaker-backoff", type=float, help="Seconds until it is tried again, doubled with each failure.")
@click.option(
    "--log-level",
    type=click.Choice(["debug", "info", "warning", "error"]),
    default="info",
    show_default=True,
    help="What is told on stderr; from info on, every worker that becomes ready, does not fit, or goes down.",
)
@_log_format
def route(
    prefill: tuple[str, ...],
    decode: tuple[str, ...],
    sources: tuple[str, ...],
    log_level: str,
    log_format: str,
    no_admission: bool,
    no_session_hold: bool,
    **settings: Any,
) -> None:
    """Run the router alone, in front of workers that already run.

    Workers come and go while it runs, as --workers and the admin endpoints say; docs/architecture.md has them.
    """
    _log_to_stderr(log_level, log_format)
    from sglang_prefillshare.routing.app import Router
    from sglang_prefillshare.routing.config import AdmissionConfig, BreakerConfig, PolicyConfig, RouterConfig
    from sglang_prefillshare.routing.membership import parse_source
    from sglang_prefillshare.routing.sources import check_sources

    modules: dict[str, list[str]] = {}
    for entry in decode:
        name, equals, url = entry.partition("=")
        if not equals:
            raise ConfigError(f"--decode is {entry!r}, wanted NAME=URL such as coder=http://127.0.0.1:30001.")
        modules.setdefault(name, []).append(url)
    # Defaults are the config's own, so what was not given is not passed on.
    given = {key: value for key, value in settings.items() if value is not None}
    if "response_store_mib" in given:
        given["response_store_bytes"] = given.pop("response_store_mib") * 1024 * 1024
    policy_keys = (
        "load_margin_tokens", "load_margin_requests", "load_margin_ratio", "session_margin", "home_margin",
        "min_prefix_tokens",
    )  # fmt: skip
    policy = PolicyConfig(**{key: given.pop(key) for key in policy_keys if key in given})
    admission_keys = (
        "queue_size",
        "queue_timeout_s",
        "session_hold_s",
        "expected_output_tokens",
        "output_share",
        "prefill_backlog_tokens",
    )
    if no_session_hold:
        given["session_hold_s"] = None
    admission = AdmissionConfig(
        is_on=not no_admission, **{key: given.pop(key) for key in admission_keys if key in given}
    )
    breaker_keys = {"breaker_failures": "failures_to_open", "breaker_backoff": "backoff_s"}
    breaker = BreakerConfig(**{name: given.pop(key) for key, name in breaker_keys.items() if key in given})
    config = RouterConfig(
        prefill=prefill,
        decode=modules,
        sources=[parse_source(source) for source in sources],
        policy=policy,
        admission=admission,
        breaker=breaker,
        **given,
    )
    check_sources(config.sources)

    from sglang_prefillshare.routing.server import serve
    from sglang_prefillshare.routing.telemetry import log_call

    router = Router(config, on_finished=log_call) if log_format == "json" else Router(config)
    serve(config, router=router)


@cli.command("workers")
@click.option("--router", required=True, metavar="URL", help="The router to ask, such as http://127.0.0.1:8000.")
@click.option("--json", "as_json", is_flag=True, help="What the router says, as JSON.")
@click.option("--timeout", "timeout_s", type=float, default=10.0, show_default=True, help="Seconds.")
def show_workers(router: str, as_json: bool, timeout_s: float) -> None:
    """Show a router's workers: what they are, who is refused and why."""
    import json

    from rich.console import Console

    from sglang_prefillshare.routing.overview import fetch, show

    told = fetch(router, timeout_s=timeout_s)
    if as_json:
        click.echo(json.dumps(told, indent=2))
    else:
        console = Console(highlight=False)
        show(told, console=console if console.is_terminal else Console(highlight=False, width=_PIPED_COLUMNS))


def _log_to_stderr(level: str, log_format: str) -> None:
    logging.basicConfig(level=level.upper(), format="%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S")
    if log_format == "json":
        from sglang_prefillshare.json_logs import JsonFormatter

        for handler in logging.getLogger().handlers:
            handler.setFormatter(JsonFormatter())
    # Of the libraries' own steps (server started, connection opened) nobody needs a line unless something is wrong.
    for name in ("uvicorn", "asyncio", "aiohttp"):
        logging.getLogger(name).setLevel(logging.DEBUG if level == "debug" else logging.WARNING)


@cli.group()
def keys() -> None:
    """The keys of the router's clients."""


@keys.command("add")
@click.argument("name")
@click.option("--file", "path", type=_FILE, required=True, help="The file; made, for you alone, if there is none.")
def keys_add(name: str, path: Path) -> None:
    """Make a key for NAME: it is printed once, and its hash is added to the file. A router that runs notices."""
    from sglang_prefillshare.routing.keys import add_key

    click.echo(add_key(path, name))


@cli.group("eval")
def evaluate() -> None:
    """How right decode modules are."""


@evaluate.command("sharing-curve")
@click.argument("tasks", type=_FILE)
@click.argument("modules", nargs=-1, required=True, metavar="[NAME=]MODULE...")
@click.option("--base", help="The base: a folder, or a hub id. [default: as the modules say]")
@click.option(
    "--share", "shares", type=float, multiple=True, help="Of the prompt's KV, from the base. [default: 0 to 1]"
)
@click.option("--out", type=_FOLDER, default=Path("out/eval"), show_default=True)
@click.option("--batch-size", type=int, default=16, show_default=True)
@click.option("--limit", type=int, help="Only the first so many questions.")
@click.option("--device", help="[default: the accelerator, else cpu]")
@click.option("--dtype", help="[default: float32 on a CPU, else bfloat16]")
@click.option("--tokenizer-path", help="As the workers of base and module are given it.")
@click.option("--chat-template", help="As the workers of base and module are given it.")
def sharing_curve(tasks: Path, modules: tuple[str, ...], shares: tuple[float, ...], out: Path, **options: Any) -> None:
    """Accuracy against the share of prompt KV that the base computed (the paper's Figure 2).

    TASKS is a JSONL file of {"prompt", "answer"}, for exact match, or {"prompt", "choices", "answer"}, for the
    likeliest choice. MODULES are folders or hub ids of decode modules or adapters. docs/training.md has the details.
    """
    from sglang_prefillshare.training.modules import named_modules
    from sglang_prefillshare.training.sharing_curve import SHARES, CurveConfig
    from sglang_prefillshare.training.sharing_curve import sharing_curve as run_curve

    config = CurveConfig(modules=named_modules(modules), tasks=str(tasks), shares=shares or SHARES, **options)
    run_curve(config, out)


@evaluate.command("tasks")
@click.argument("modules", nargs=-1, metavar="[NAME=]MODULE...")
@click.option("--url", help="Ask a deployment's router, such as http://127.0.0.1:8000, instead of MODULES.")
@click.option("--model", "models", multiple=True, metavar="NAME", help="Of the deployment. Repeat. [default: all]")
@click.option(
    "--task", "tasks", multiple=True, help="Repeat. [default: bfcl-simple-python, bfcl-multiple and humaneval]"
)
@click.option("--style", default="full", show_default=True, help="BFCL's prompts: full (its own), or compact (ours).")
@click.option("--form", default="auto", show_default=True, help="HumanEval's prompts: chat, completion, or auto.")
@click.option("--limit", type=int, help="Only the first so many questions of each task.")
@click.option("--max-new-tokens", type=int, help="Tokens of an answer. [default: 256 for calls, 512 for code]")
@click.option("--base", help="The base: a folder, or a hub id. [default: as the modules say]")
@click.option("--share", type=float, default=1.0, show_default=True, help="Of the prompt's KV, from the base.")
@click.option("--out", type=_FOLDER, default=Path("out/eval"), show_default=True)
@click.option("--batch-size", type=int, default=16, show_default=True, help="Prompts at a time, offline.")
@click.option("--concurrency", type=int, default=8, show_default=True, help="Requests at a time, of a deployment.")
@click.option("--request-timeout", "timeout_s", type=float, default=600.0, show_default=True, help="Seconds.")
@click.option("--device", help="[default: the accelerator, else cpu]")
@click.option("--dtype", help="[default: float32 on a CPU, else bfloat16]")
@click.option("--tokenizer-path", help="As the workers of base and module are given it.")
@click.option("--chat-template", help="As the workers of base and module are given it.")
def eval_tasks(modules: tuple[str, ...], tasks: tuple[str, ...], out: Path, **options: Any) -> int:
    """How many questions of BFCL and HumanEval decode modules get right.

    MODULES are folders or hub ids of decode modules or adapters, measured offline; with --url those of a deployment
    are asked. Code that a model wrote runs sandboxed. The exit status is 1 if a question got no answer.
    docs/evaluation.md has the details.
    """
    from sglang_prefillshare.evaluation.report import TasksConfig
    from sglang_prefillshare.evaluation.report import eval_tasks as run_tasks
    from sglang_prefillshare.evaluation.tasks import DEFAULT_TASKS
    from sglang_prefillshare.training.modules import named_modules

    config = TasksConfig(modules=named_modules(modules), tasks=tasks or DEFAULT_TASKS, **options)
    return EXIT_FAILURE if run_tasks(config, out).unanswered_count else 0


@cli.group()
def bench() -> None:
    """How fast a deployment serves."""


@bench.command("serving")
@click.argument("config", type=_FILE)
@click.option("--out", type=_FOLDER, help="Where results go. [default: as CONFIG says]")
@click.option("--repeats", type=int, help="[default: as CONFIG says]")
@click.option("--length-scale", type=float, help="Multiply every length in tokens by this, in all workloads.")
@click.option(
    "--topology",
    "topologies",
    type=click.Choice(["shared", "isolated", "colocated"]),
    multiple=True,
    help="Only this one; repeat for several, in the order given.",
)
@click.option("--anyway", is_flag=True, help="Run it as CONFIG says, even if this machine needs longer than it allows.")
def bench_serving(config: Path, out: Path | None, topologies: tuple[str, ...], anyway: bool, **changes: Any) -> None:
    """Shared prefill beside stock SGLang, on agents that take turns, as CONFIG (YAML) says.

    Starts each topology in turn, asks it every point, and writes results.jsonl, samples.jsonl, summary.json and the
    paper's Figures 3 and 4. With limits.total_s in CONFIG a CPU is measured first: lengths are made shorter to keep it,
    or it is said how long it would take. docs/benchmark.md describes CONFIG and every field.
    """
    from sglang_prefillshare.workloads.bench import run_benchmark
    from sglang_prefillshare.workloads.config import load_benchmark

    changes |= {"out": None if out is None else str(out), "topologies": topologies or None}
    run_benchmark(load_benchmark(config, **changes), anyway=anyway)


@bench.command("report")
@click.argument("folder", type=_FOLDER)
def bench_report(folder: Path) -> None:
    """Write summary and plots again, from the rows in FOLDER."""
    from sglang_prefillshare.workloads.results import report_again

    click.echo(f"written to {report_again(folder)}")


@cli.command()
@click.argument("recipe", type=_FILE)
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
def train(recipe: Path, overrides: tuple[str, ...]) -> None:
    """Fine-tune a decode module as RECIPE (YAML) says: it learns to generate from the base's KV.

    KEY=VALUE overrides a key of the recipe, such as training.learning_rate=2e-5. Several GPUs: `accelerate launch -m
    sglang_prefillshare.cli train RECIPE`. docs/training.md describes every key.
    """
    from sglang_prefillshare.training.run import train as run_training

    summary = run_training(recipe, overrides)
    if summary.is_main:
        click.echo(summary.describe())


@cli.command()
@click.argument("adapter", type=_FOLDER)
@click.argument("out", type=_FOLDER)
@click.option("--base", help="Where the adapter's base lies now: a folder, or a hub id. [default: as the adapter says]")
@click.option("--tokenizer-path", help="As the workers of base and module are given it.")
@click.option("--chat-template", help="As the workers of base and module are given it.")
def merge(adapter: Path, out: Path, base: str | None, tokenizer_path: str | None, chat_template: str | None) -> None:
    """Add the LoRA adapter in ADAPTER to its base, as a whole checkpoint in OUT that a decode worker takes."""
    from sglang_prefillshare.training.merge import merge as merge_adapter

    path = merge_adapter(adapter, out, base=base, tokenizer_path=tokenizer_path, chat_template=chat_template)
    click.echo(f"{path}: merged into a whole checkpoint")


@cli.command()
@click.option("--quick", is_flag=True, help="Leave out the handoff between two processes.")
@click.option(
    "--disaggregation-transfer-backend",
    "backend",
    type=click.Choice(["prefillshare", "nixl"]),
    help="Try the handoff with this one. [default: what a worker chooses]",
)
def doctor(quick: bool, backend: str | None) -> int | None:
    """Check that this machine and its SGLang have all that a role needs; exit 1 if not.

    Versions, entry points and every place where we hook SGLang; then pages of several sizes are handed over between two
    processes, as workers of this machine would, and compared.
    """
    from sglang_prefillshare.host import doctor as host_doctor

    status: int | None = host_doctor.main(quick=quick, backend=backend)
    return status


@cli.group()
def identity() -> None:
    """Which base a model is, and which base a decode module was trained on."""


@identity.command("show")
@click.argument("model")
def identity_show(model: str) -> None:
    """Show MODEL's fingerprint as a base, and its manifest if it is a decode module."""
    from sglang_prefillshare.identity.fingerprint import identify_base
    from sglang_prefillshare.identity.manifest import read_manifest

    base = identify_base(model)
    click.echo(f"fingerprint   {base.model_fingerprint}")
    for part in ("weights", "config", "tokenizer", "chat_template"):
        click.echo(f"{part:<13} {getattr(base, part)}")
    manifest = read_manifest(model)
    if manifest is not None:
        click.echo(f"trained on    {manifest.base} ({manifest.base_fingerprint}), {manifest.boundary}")


@identity.command("write")
@click.argument("module", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--base", required=True, help="The base that MODULE was trained on: a folder, or a hub id.")
@click.option("--tokenizer-path", help="As the workers of base and MODULE are given it.")
@click.option("--chat-template", help="As the workers of base and MODULE are given it.")
def identity_write(module: Path, base: str, tokenizer_path: str | None, chat_template: str | None) -> None:
    """Write the manifest of MODULE, a folder, naming the base it was trained on.

    Refused, and nothing written, for a MODULE that a decode worker would refuse on this base: one of another shape, or
    with another tokenizer or chat template.
    """
    from sglang_prefillshare.identity.fingerprint import check_tokenizer, identify_base, read_config
    from sglang_prefillshare.identity.geometry import check_same_geometry
    from sglang_prefillshare.identity.manifest import Manifest, write_manifest

    check_same_geometry(read_config(base), read_config(module))
    identity = identify_base(base, tokenizer_path=tokenizer_path, chat_template=chat_template)
    if tokenizer_path is None:
        check_tokenizer(module, identity, chat_template=chat_template)
    manifest = Manifest.for_base(base, identity)
    path = write_manifest(module, manifest)
    click.echo(f"{path}: trained on {base} ({manifest.base_fingerprint})")


if __name__ == "__main__":
    main()
