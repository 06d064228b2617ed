"""What a role does to the command line of `launch_server`: what it fills in, what it refuses, before anything loads."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from sglang_prefillshare.host.flags import event_stream
from sglang_prefillshare.protocol import EventStream
from test.support.models import make_adapter, make_base, make_decode_module

_PARSE = """
import json, sys
from sglang.srt.plugins import load_plugins
load_plugins()
from sglang.srt.server_args import prepare_server_args
for line in sys.stdin:
    argv = json.loads(line)
    try:
        args = prepare_server_args(argv)
        names = ("disaggregation_mode", "disaggregation_transfer_backend", "disaggregation_decode_retraction_backup",
                 "disaggregation_decode_enable_radix_cache", "enable_metrics")
        print("RESULT" + json.dumps({name: getattr(args, name) for name in names}), flush=True)
    except SystemExit as exit:
        print(f"EXIT{exit.code}", flush=True)
    import os
    os.environ.pop("SGLANG_PREFILL_SHARE_SETTINGS", None)
"""


class Parser:
    """SGLang's argument parser in a process of its own; one command line after another."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", _PARSE],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env={**os.environ, "PYTHONWARNINGS": "ignore"},
        )  # fmt: skip

    def close(self) -> str:
        _, errors = self._process.communicate(timeout=60)
        return errors

    def parse(self, *argv: object) -> str:
        import json

        assert self._process.stdin and self._process.stdout
        self._process.stdin.write(json.dumps([str(word) for word in argv]) + "\n")
        self._process.stdin.flush()
        while line := self._process.stdout.readline():
            if line.startswith(("RESULT", "EXIT")):
                return line.strip()
        raise AssertionError(self.close())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("flags")
    make_base(folder / "base")
    make_base(folder / "other", seed=9)
    make_base(folder / "wide", head_dim=64)
    make_decode_module(folder / "coder", folder / "base", seed=2)
    make_decode_module(folder / "silent", folder / "base", seed=3, manifest=False)
    make_adapter(folder / "adapter", folder / "base", seed=4)
    (make_adapter(folder / "untold", folder / "base", seed=5) / "prefillshare.json").unlink()
    return folder


REFUSED = {
    "prefill as decode": ("prefill base --disaggregation-mode decode", "contradicts --prefill-share-role prefill"),
    "base without role": ("- base --prefill-share-base base", "need --prefill-share-role"),
    "decode without base": ("decode coder", "needs --prefill-share-base MODEL"),
    "prefill of another base": ("prefill base --prefill-share-base other", "it serves the base itself"),
    "no manifest": ("decode silent --prefill-share-base base", "has no prefillshare.json"),
    "another base": ("decode coder --prefill-share-base other", "weights"),
    "another shape": ("decode coder --prefill-share-base wide", "head_dim"),
    "speculative decoding": ("decode coder --prefill-share-base base --speculative-algorithm EAGLE", "speculative"),
    "several tokenizer workers": ("prefill base --tokenizer-worker-num 2", "tokenizer workers"),
    "decode KV offload": (
        "decode coder --prefill-share-base base --disaggregation-decode-enable-offload-kvcache", "generated KV",
    ),
    "no radix tree": ("prefill base --disable-radix-cache", "radix tree is what the decode modules share"),
    "our backend without role": ("- base --disaggregation-transfer-backend prefillshare", "needs --prefill-share-role"),
    "an abbreviated flag": ("prefill base --disaggregation-mod decode", "contradicts --prefill-share-role prefill"),
    "quantized base": ("prefill base --quantization fp8", "another KV"),
    "random weights": ("prefill base --load-format dummy", "random weights"),
    "memory saver": ("prefill base --enable-memory-saver", "cannot share with another process"),
    "lease timeout of nothing": ("prefill base --prefill-share-lease-timeout 0", "seconds above 0"),
    "lease timeout on decode": (
        "decode coder --prefill-share-base base --prefill-share-lease-timeout 9", "who keeps pages",
    ),
    "lease timeout without role": ("- base --prefill-share-lease-timeout 9", "need --prefill-share-role"),
    "adapters on a decode worker": (
        "decode coder --prefill-share-base base --lora-paths a=adapter", "Serve the base itself with its adapters",
    ),
    "unified without modules": ("unified base", "needs --lora-paths"),
    "a name twice": ("unified base --lora-paths a=adapter a=adapter", "names 'a' more than once"),
    "the base's name": ("unified base --served-model-name a --lora-paths a=adapter", "which is a module's name"),
    "no place for the base": ("unified base --max-loras-per-batch 1 --lora-paths a=adapter", "wanted 2 or more"),
    "no adapter": ("unified base --lora-paths a=coder", "no adapter_config.json"),
    "an adapter of no known base": ("unified base --lora-paths a=untold", "has no prefillshare.json"),
    "an adapter of another base": ("unified other --lora-paths a=adapter", "weights"),
    "a rank too high": ("unified base --max-lora-rank 2 --lora-paths a=adapter", "r is 4, and --max-lora-rank is 2"),
    "unified with a backend": (
        "unified base --disaggregation-transfer-backend nixl --lora-paths a=adapter", "hands nothing over",
    ),
    "unified and disaggregated": (
        "unified base --disaggregation-mode decode --lora-paths a=adapter", "contradicts --prefill-share-role unified",
    ),
    "events that SGLang would not take": (
        """prefill base --kv-events-config {"format":"x"}""", "Input should be 'default' or 'dynamo'",
    ),
    "fake transfers": ("prefill base --disaggregation-transfer-backend fake", "moves no KV"),
}  # fmt: skip


def command_line(folder: Path, words: str) -> list[str]:
    role, model, *rest = words.split()
    names = {path.name for path in folder.iterdir()}

    def placed(word: str) -> str:
        before, equals, last = word.rpartition("=")
        return f"{before}{equals}{folder / last}" if last in names else word

    argv = ["--model-path", str(folder / model), *map(placed, rest)]
    return argv if role == "-" else ["--prefill-share-role", role, *argv]


def test_what_contradicts_a_role_is_refused_with_the_reason(folder: Path) -> None:
    parser = Parser()
    found = {name: parser.parse(*command_line(folder, words)) for name, (words, _) in REFUSED.items()}
    errors = parser.close()
    assert found == dict.fromkeys(REFUSED, "EXIT2")
    lines = [line for line in errors.splitlines() if line.startswith("launch_server: error: ")]
    assert len(lines) == len(REFUSED), errors
    for (name, (_, words)), line in zip(REFUSED.items(), lines, strict=True):
        assert words in line, f"{name}: {line}"


def test_a_role_fills_in_what_it_needs(folder: Path) -> None:
    parser = Parser()
    config = folder / "config.yaml"
    config.write_text(
        f"prefill-share-role: decode\nprefill-share-base: {folder / 'base'}\nmodel-path: {folder / 'coder'}\n"
    )
    prefill = parser.parse(*command_line(folder, "prefill base"))
    decode = parser.parse(
        *command_line(folder, "decode silent --prefill-share-base base --prefill-share-allow-untrained")
    )
    from_file = parser.parse("--config", config)
    nixl = parser.parse(*command_line(folder, "prefill base --disaggregation-transfer-backend nixl"))
    reachable = parser.parse(*command_line(folder, "prefill base --host 0.0.0.0"))
    ours = parser.parse(
        *command_line(folder, "prefill base --host 0.0.0.0 --disaggregation-transfer-backend prefillshare")
    )
    unified = parser.parse(*command_line(folder, "unified base --lora-paths a=adapter"))
    uncached = parser.parse(*command_line(folder, "decode coder --prefill-share-base base --disable-radix-cache"))
    errors = parser.close()
    assert '"disaggregation_decode_enable_radix_cache": true, "enable_metrics": true' in decode
    assert '"disaggregation_decode_enable_radix_cache": false' in uncached
    assert '"disaggregation_transfer_backend": "nixl"' in reachable and "--host 0.0.0.0 lets other hosts in" in errors
    assert '"disaggregation_transfer_backend": "prefillshare"' in ours
    assert '"disaggregation_mode": "prefill", "disaggregation_transfer_backend": "prefillshare"' in prefill, errors
    assert '"disaggregation_mode": "decode"' in decode and '"cpu_tensor"' in decode
    assert from_file == decode
    assert '"disaggregation_mode": "null"' in unified and '"enable_metrics": true' in unified
    assert '"disaggregation_transfer_backend": "nixl"' in nixl
    assert "is served untrained" in errors


@pytest.mark.parametrize("name", ["PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"])
def test_expandable_segments_are_refused_under_either_name(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from types import SimpleNamespace

    from sglang_prefillshare.errors import ConfigError
    from sglang_prefillshare.host import flags

    monkeypatch.setenv(name, "max_split_size_mb:64,expandable_segments:True")
    args = SimpleNamespace(
        disaggregation_transfer_backend="prefillshare", load_format="auto", enable_memory_saver=False
    )
    with pytest.raises(ConfigError, match=f"{name} asks for expandable segments.*nixl"):
        flags._refuse_backend(args)
    args.disaggregation_transfer_backend = "nixl"
    flags._refuse_backend(args)


@pytest.mark.parametrize(
    ("cores", "ranks", "dealt"),
    [({0, 1}, 2, "0|1"), ({2, 3, 6, 7, 8}, 2, "2,3|6,7"), ({5}, 2, "5|5"), ({0, 1, 2, 3}, 4, "0|1|2|3")],
)
def test_cores_are_dealt_out_to_ranks(cores: set[int], ranks: int, dealt: str) -> None:
    from sglang_prefillshare.host import flags

    assert flags.cores_of_ranks(cores, ranks) == dealt


_EVENTS = {
    "publisher": "zmq", "format": "dynamo", "bind": True,
    "endpoint": "tcp://127.0.0.1:5557", "replay_endpoint": "tcp://127.0.0.1:5558",
}  # fmt: skip


def test_events_that_a_router_can_use_are_described() -> None:
    described = EventStream(port=5557, replay_port=5558)
    assert event_stream(json.dumps(_EVENTS)) == described
    everywhere = {"endpoint": "tcp://*:5557", "replay_endpoint": "tcp://*:5558", "bind": None, "topic": "kv"}
    assert event_stream(json.dumps(_EVENTS | everywhere)) == EventStream(port=5557, replay_port=5558, topic="kv")
    assert event_stream(None) is None and event_stream('{"publisher": "null"}') is None


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"format": "default"}, "its format is default"),
        ({"replay_endpoint": None}, "a replay_endpoint"),
        ({"endpoint": "ipc:///tmp/x"}, "a replay_endpoint, tcp://"),
        ({"bind": None}, "a publisher that connects to tcp://127.0.0.1:5557"),
    ],
)
def test_events_that_are_for_others_stay_and_the_router_guesses(
    change: dict[str, object], reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert event_stream(json.dumps(_EVENTS | change)) is None
    assert reason in capsys.readouterr().err
