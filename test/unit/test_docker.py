"""The image and the demo's compose file, as far as no engine is needed: schema, commands, namespaces, health check."""

from __future__ import annotations

import http.server
import importlib.util
import json
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner

from sglang_prefillshare.cli import cli
from test.support.container.dockerfile import Step, read_dockerfile

DOCKER = Path(__file__).parents[2] / "docker"
COMPOSE: dict[str, Any] = yaml.safe_load((DOCKER / "compose.yaml").read_text())
MEMBERS = ("base", "planner", "coder", "reviewer", "router")


def test_the_compose_file_follows_the_compose_specification() -> None:
    jsonschema = pytest.importorskip("jsonschema", reason="needs jsonschema, which the CPU stack has")
    spec = importlib.util.find_spec("check_jsonschema")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("needs check-jsonschema, of which only the schema is read: requirements/dev.txt")
    folder = Path(next(iter(spec.submodule_search_locations))) / "builtin_schemas" / "vendor"
    schema = json.loads((folder / "compose-spec.json").read_text())
    jsonschema.validate(COMPOSE, schema)
    wrong = COMPOSE | {"services": {"base": {"pids": "service:pod"}}}
    with pytest.raises(jsonschema.ValidationError, match="pids"):
        jsonschema.validate(wrong, schema)


def test_workers_and_router_share_the_namespaces_that_the_handoff_needs_and_no_privilege() -> None:
    for name in MEMBERS:
        service = COMPOSE["services"][name]
        assert {service[kind] for kind in ("pid", "ipc", "network_mode")} == {"service:pod"}
    for service in COMPOSE["services"].values():
        assert service["image"] == "prefillshare:cpu" and service["cap_drop"] == ["ALL"]
        assert not {"user", "privileged", "cap_add"} & service.keys()
    assert COMPOSE["services"]["pod"]["ipc"] == "shareable"


def test_each_service_is_asked_for_its_health_where_it_listens_and_the_router_knows_all() -> None:
    services = COMPOSE["services"]
    router = services["router"]["command"]
    for name in MEMBERS[:-1]:
        command = services[name]["command"]
        url = f"http://127.0.0.1:{command[command.index('--port') + 1]}"
        assert services[name]["environment"]["PREFILLSHARE_HEALTH_URL"] == f"{url}/health"
        assert (url if name == "base" else f"{name}={url}") in router
    known = CliRunner().invoke(cli, ["route", "--help"]).output
    assert all(word in known for word in router if word.startswith("--"))


@pytest.mark.parametrize("name", ["Dockerfile", "Dockerfile.cpu"])
def test_what_the_dockerfiles_copy_is_here_and_not_ignored(name: str) -> None:
    kept = {line[1:] for line in (DOCKER.parent / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    steps = [step for stage in read_dockerfile(DOCKER / name) for step in stage.steps]
    copies = [step for step in steps if step.instruction == "COPY" and not step.options]
    sources = {source for step in copies for source in step.words[:-1]}
    assert sources == kept
    assert all((DOCKER.parent / source).exists() for source in sources)


def test_both_images_are_made_by_the_same_steps_but_for_their_stack() -> None:
    """`e2e/test_image.py` runs those of the CPU file, so what the CUDA file shares with it was run, too."""
    cpu, cuda = read_dockerfile(DOCKER / "Dockerfile.cpu"), read_dockerfile(DOCKER / "Dockerfile")
    assert [stage.name for stage in cuda] == ["python", *(stage.name for stage in cpu)]
    for ours, theirs in zip(cpu, cuda[1:], strict=True):
        assert [step for step in ours.steps if not _is_of_the_stack(step)] == [
            step for step in theirs.steps if not _is_of_the_stack(step)
        ]
        checks = [step for step in (*ours.steps, *theirs.steps) if step.instruction == "HEALTHCHECK"]
        assert len({(step.value, step.options["timeout"]) for step in checks}) <= 1


def _is_of_the_stack(step: Step) -> bool:
    """What installs or looks at one stack, and how long that one may take to start."""
    return step.instruction == "HEALTHCHECK" or "requirements/c" in step.value or "import torch" in step.value


def test_a_dockerfile_is_read_with_its_options_and_continued_lines(tmp_path: Path) -> None:
    path = tmp_path / "Dockerfile"
    path.write_text(
        "# a comment\nFROM one AS first\nRUN a \\\n    # inside\n    && b\n"
        'FROM two\nCOPY --from=first /x "/y z/"\nHEALTHCHECK --retries=3 CMD ["c", "d"]\n'
    )
    first, second = read_dockerfile(path)
    assert (first.base, first.name, first.steps) == ("one", "first", (Step("RUN", "a && b"),))
    copy, check = second.steps
    assert (second.name, copy.options, copy.words) == (None, {"from": "first"}, ["/x", "/y z/"])
    assert (check.options, check.words, second.last("COPY")) == ({"retries": "3"}, ["c", "d"], copy)


@pytest.mark.parametrize("text", ["RUN a\n", "FROM a\nVOLUME /x\n", "FROM a\nRUN b \\\n"])
def test_what_cannot_be_run_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "Dockerfile").write_text(text)
    with pytest.raises(ValueError, match=r"wanted FROM first|continues into nothing"):
        read_dockerfile(tmp_path / "Dockerfile")


@pytest.mark.parametrize(("status", "code"), [(200, 0), (503, 1)])
def test_the_health_check_says_what_the_server_says(status: int, code: int) -> None:
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status if self.path == "/health" else 404)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        url = f"http://127.0.0.1:{server.server_port}/health"
        checked = [sys.executable, str(DOCKER / "healthcheck.py")]
        found = subprocess.run(checked, env={"PREFILLSHARE_HEALTH_URL": url}, capture_output=True, text=True)
        server.shutdown()
        thread.join()
    assert found.returncode == code
    assert (url in found.stderr) == bool(code)
