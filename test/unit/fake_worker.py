"""A process that answers like an SGLang worker or our router, as well or as badly as `--fake` says.

Takes the flags that a real one gets and ignores them, but for host, port and:
  --fake dies-at-start | dies-later | never-ready | ignores-signals | forks | parent     (may be given several)
  --api-key KEY: without it, everything but /health answers 401
  --fake-ready-after SECONDS
  --fake-if FILE MODE: as --fake MODE, if FILE exists when it starts
  --fake-base NAME: the base that it names
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from sglang_prefillshare import __version__
from sglang_prefillshare.protocol import BOUNDARY_RULE, Role, WorkerInfo


def main() -> None:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--host", required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--served-model-name", default="router")
    parser.add_argument("--prefill-share-role", default="prefill")
    parser.add_argument("--disaggregation-bootstrap-port", type=int)
    parser.add_argument("--api-key")
    parser.add_argument("--fake", nargs="*", default=[])
    parser.add_argument("--fake-ready-after", type=float, default=0.0)
    parser.add_argument("--fake-if", nargs=2, metavar=("FILE", "MODE"))
    parser.add_argument("--fake-base", default="fake")
    args, _ = parser.parse_known_args()
    fakes = set(args.fake)
    if args.fake_if and os.path.exists(args.fake_if[0]):
        fakes.add(args.fake_if[1])

    print(f"loading {args.served_model_name}", flush=True)
    if "dies-at-start" in fakes:
        print("ERROR: weights are missing", file=sys.stderr, flush=True)
        sys.exit(3)
    if "ignores-signals" in fakes:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda number, _: print(f"ignoring {number}", flush=True))
    else:
        signal.signal(signal.SIGINT, _leave)
    if "parent" in fakes:
        _become_parent()
    if "forks" in fakes:
        sleep = [sys.executable, "-c", "import time; time.sleep(600)"]
        subprocess.Popen(sleep)
        subprocess.Popen(sleep, start_new_session=True)
        # One that our process group does not know and whose parent is gone.
        subprocess.run(["sh", "-c", "setsid sleep 600 & "], check=True)
    if "dies-later" in fakes:
        threading.Timer(0.8, lambda: os._exit(4)).start()

    ready_at = float("inf") if "never-ready" in fakes else time.monotonic() + args.fake_ready_after
    info = WorkerInfo(
        role=Role(args.prefill_share_role),
        model=args.served_model_name,
        base_fingerprint=args.fake_base,
        boundary=BOUNDARY_RULE,
        trained=True,
        transfer_backend="fake",
        page_size=1,
        kv_dtype="bfloat16",
        max_total_tokens=1000,
        max_running_requests=8,
        context_length=1000,
        bootstrap_port=args.disaggregation_bootstrap_port,
        version=__version__,
        handoff_failure="its memory is closed; choose nixl" if "cannot-hand-over" in fakes else None,
    )
    body = json.dumps(info.to_json()).encode()
    ThreadingHTTPServer((args.host, args.port), _handler(ready_at, body, args.api_key)).serve_forever()


def _leave(number: int, _: object) -> None:
    print(f"leaving on {signal.Signals(number).name}", flush=True)
    os._exit(0)


def _become_parent() -> None:
    """As SGLang: a child in our process group that tells of every signal, and that we end ourselves."""
    child = subprocess.Popen(
        [
            *(sys.executable, "-c"),
            "import signal, time\n"
            "for number in (signal.SIGINT, signal.SIGTERM):\n"
            "    signal.signal(number, lambda number, _: print(f'child got {number}', flush=True))\n"
            "print('child is here', flush=True)\n"
            "while True: time.sleep(600)",
        ]
    )

    def leave(number: int, _: object) -> None:
        time.sleep(0.3)  # time for the child to tell that it got one too
        child.kill()
        cause = signal.Signals(-child.wait()).name
        print(f"leaving on {signal.Signals(number).name} after its child was ended by {cause}", flush=True)
        os._exit(0)

    signal.signal(signal.SIGINT, leave)


def _handler(ready_at: float, body: bytes, api_key: str | None) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if api_key and self.path != "/health" and self.headers["authorization"] != f"Bearer {api_key}":
                self.send_error(401)
                return
            is_ready = time.monotonic() >= ready_at
            self.send_response(200 if is_ready else 503)
            self.send_header("content-length", str(len(body) if is_ready else 0))
            self.end_headers()
            self.wfile.write(body if is_ready else b"")

        def log_message(self, format: str, *args: object) -> None: ...

    return Handler


if __name__ == "__main__":
    main()
