"""`config.py`: what a topology file may say, and how a wrong one is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from sglang_prefillshare.config import (
    AdapterModule,
    RouterSettings,
    Topology,
    flags_of,
    load_topology,
    parse_topology,
    topology_from,
)
from sglang_prefillshare.errors import ConfigError

EXAMPLE = Path(__file__).parents[2] / "examples" / "topology.yaml"


def parse(text: str, directory: Path = Path(".")) -> Topology:
    return parse_topology(text, source="t.yaml", directory=directory)


def test_a_whole_topology_is_read(tmp_path: Path) -> None:
    (tmp_path / "modules" / "coder").mkdir(parents=True)
    path = tmp_path / "topology.yaml"
    path.write_text(
        """
        base: {model: org/base, workers: 2, gpus: [0, 1]}
        decode:
          - name: coder
            model: modules/coder
            args: {mem_fraction_static: 0.850, prefill-share-allow-untrained: true, lora-paths: [a, b=c]}
            env: {A: 1, GONE: null}
        router: {host: 0.0.0.0, port: 8000}
        args: {dtype: float32, page_size: 16}
        env: {B: "yes"}
        """
    )
    topology = load_topology(path)
    assert topology.base.model == "org/base"
    assert topology.base.workers == 2
    (coder,) = topology.decode
    assert coder.settings.model == str(tmp_path / "modules" / "coder")
    assert flags_of(coder.settings.args) == [
        *("--mem-fraction-static", "0.850"),
        "--prefill-share-allow-untrained",
        *("--lora-paths", "a", "b=c"),
    ]
    assert dict(coder.settings.env) == {"A": "1", "GONE": None}
    assert topology.router == RouterSettings(host="0.0.0.0", port=8000)
    assert dict(topology.args) == {"dtype": "float32", "page-size": "16"}
    assert dict(topology.env) == {"B": "yes"}


def test_the_example_is_a_topology(tmp_path: Path) -> None:
    for name in ("base", "planner", "coder"):
        (tmp_path / "out" / "models" / name).mkdir(parents=True)
    assert parse_topology(EXAMPLE.read_text(), source=EXAMPLE.name, directory=tmp_path).decode


def test_a_workers_own_args_win_and_null_takes_one_out() -> None:
    topology = parse(
        "{base: {model: m}, decode: [{name: a, model: m, args: {b: 2, c: null}}], args: {a: 1, b: 1, c: 1}}"
    )
    assert flags_of(topology.args_of(topology.base)) == ["--a", "1", "--b", "1", "--c", "1"]
    assert flags_of(topology.args_of(topology.decode[0].settings)) == ["--a", "1", "--b", "2"]


def test_models_are_looked_up_beside_the_file_first_then_where_we_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    beside, here = tmp_path / "beside", tmp_path / "here"
    for folder in (beside / "both", here / "both", here / "only-here"):
        folder.mkdir(parents=True)
    monkeypatch.chdir(here)
    topology = parse("{base: {model: both}, decode: [{name: a, model: only-here}, {name: b, model: x/hub}]}", beside)
    assert topology.base.model == str(beside / "both")
    assert [module.settings.model for module in topology.decode] == [str(here / "only-here"), "x/hub"]


def test_false_and_null_leave_a_flag_out_and_a_mapping_is_json() -> None:
    args = parse(
        "{base: {model: m, args: {a: false, b: null, c: 0, d: {x: [1, true]}, e: ''}}, decode: [{name: n, model: m}]}"
    ).base.args
    assert flags_of(args) == ["--c", "0", "--d", '{"x": [1, true]}', "--e", ""]


def test_plain_values_are_checked_like_a_file(tmp_path: Path) -> None:
    data = {"base": {"model": "m", "args": {"device": "cpu"}}, "decode": [{"name": "true", "model": "m"}]}
    assert topology_from(data, directory=tmp_path).decode[0].name == "true"
    with pytest.raises(ConfigError, match="unknown key 'bse'"):
        topology_from({**data, "bse": 1}, directory=tmp_path)


def test_keys_may_be_merged_and_overridden() -> None:
    topology = parse(
        """
        base: &small {model: m, args: {device: cpu}}
        decode:
          - {<<: *small, name: a}
          - {<<: *small, name: b, model: other}
        """
    )
    assert [module.settings.model for module in topology.decode] == ["m", "other"]
    assert [dict(module.settings.args) for module in topology.decode] == [{"device": "cpu"}] * 2


DECODE = "decode: [{name: a, model: m}]"
ADAPTERS = "decode: [{name: a, adapter: m}]"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "t.yaml is empty"),
        ("- a", "t.yaml:1: the topology is a list, wanted a mapping"),
        (f"{DECODE}", "t.yaml:1: the topology lacks the key base"),
        ("base: {model: m}", "t.yaml:1: the topology lacks the key decode"),
        (f"base: {{modle: m}}\n{DECODE}", "t.yaml:1: base has an unknown key 'modle', wanted .* Did you mean model"),
        (f"base: {{workers: 1}}\n{DECODE}", "t.yaml:1: base lacks the key model"),
        (f"{DECODE}\nbase:\n  model: m\n  workers: two", "t.yaml:4: base.workers is 'two', wanted a whole number"),
        (f"{DECODE}\nbase:\n  model: m\n  workers: 0", "t.yaml:3: base: workers is 0, wanted 1 or more"),
        (f"{DECODE}\nbase:\n  model: m\n  workers: true", "t.yaml:4: base.workers is 'true'"),
        (f"{DECODE}\nbase:\n  model: ./gone", "t.yaml:3: base: model './gone' does not exist"),
        (f"{DECODE}\nbase:\n  model: null", "t.yaml:3: base.model is empty"),
        (f"{DECODE}\nbase:\n  model: [m]", "t.yaml:3: base.model is a list, wanted text"),
        (f"base: {{model: m, gpus: 0}}\n{DECODE}", r"base.gpus is the value '0', wanted a list such as \[0, 1\]"),
        (f"base: {{model: m, workers: 2, gpus: [0, 1, 2]}}\n{DECODE}", "3 gpus cannot be dealt evenly to 2 workers"),
        ("base: {model: m}\ndecode: {name: a, model: m}", "t.yaml:2: decode is a mapping, wanted a list"),
        ("base: {model: m}\ndecode: []", "decode is empty, wanted at least one"),
        ("base: {model: m}\ndecode:\n- {model: m}", r"t.yaml:3: decode\[0\] lacks the key name"),
        ("base: {model: m}\ndecode:\n- {name: yes, model: m}", r"decode\[0\].name is yes, .* Quote it"),
        ("base: {model: m}\ndecode:\n- {name: 'a:b', model: m}", "name is 'a:b', wanted letters"),
        ("base: {model: m}\ndecode:\n- {name: router, model: m}", "taken by our own processes"),
        ("base: {model: m}\ndecode: [{name: a, model: m}, {name: a, model: m}]", "decode names a twice"),
        (f"base: {{model: m, model: m}}\n{DECODE}", "t.yaml:1: the key 'model' is there twice"),
        (f"base: {{model: m, args: {{--device: cpu}}}}\n{DECODE}", "without its dashes, such as 'device'"),
        (f"base: {{model: m, args: {{port: 1}}}}\n{DECODE}", "args sets port, which `prefillshare up` sets itself"),
        (f"base: {{model: m, args: {{served_model_name: x}}}}\n{DECODE}", "Use the keys model and name"),
        (f"base: {{model: m, args: {{a-b: 1, a_b: 2}}}}\n{DECODE}", "base.args has a-b twice"),
        (f"base: {{model: m}}\n{DECODE}\nargs: {{port: 1}}", "t.yaml:3: args sets port, which `prefillshare up` sets"),
        (f"base: {{model: m}}\n{DECODE}\nargs: [a]", "t.yaml:3: args is a list, wanted a mapping"),
        (f"base: {{model: m, args: {{api-key: x}}}}\n{DECODE}\nargs: {{api-key: y}}", "api-key differs"),
        (f"base: {{model: m, args: {{a: []}}}}\n{DECODE}", "base.args.a is an empty list"),
        (f"base: {{model: m, env: {{A: true}}}}\n{DECODE}", "base.env.A is true, which YAML reads as a boolean"),
        (f"base: {{model: m}}\n{DECODE}\nrouter: {{port: 70000}}", "t.yaml:3: router: port is 70000"),
        (f"base: {{model: m}}\n{DECODE}\nrouter: {{args: {{prefill: x}}}}", "is given every worker of this topology"),
        (f"base: {{model: m}}\nunified: 1\n{ADAPTERS}", "t.yaml:2: unified is '1', wanted true or false"),
        (
            f"base: {{model: m}}\nunified: true\n{DECODE}",
            "the modules of a unified server are adapters, and a has a model of its own",
        ),
        ("base: {model: m}\ndecode: [{name: a, adapter: m, model: m}]", r"decode\[0\] has an unknown key 'model'"),
        (f"base: {{model: m, workers: 2}}\nunified: true\n{ADAPTERS}", "a unified server is one process"),
        ("base: {model: m}\nunified: true\ndecode: []", "decode is empty"),
        (
            "base: {model: m}\nunified: true\ndecode: [{name: a, adapter: ./gone}]",
            r"decode\[0\]: model './gone' does not",
        ),
        (
            f"base: {{model: m}}\nunified: true\n{ADAPTERS}\nargs: {{lora_paths: x}}",
            "args sets lora-paths",
        ),
        (f"base: {{model: m}}\n{DECODE}\nrouter: [", "t.yaml:3: not valid YAML"),
        (f"base: {{model: m}}\n{DECODE}\nbase: *unknown", "t.yaml:3: not valid YAML: found undefined alias"),
    ],
)
def test_a_wrong_topology_is_refused_naming_line_found_and_wanted(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse(text)


def test_a_unified_server_has_adapters_for_modules(tmp_path: Path) -> None:
    (tmp_path / "planner").mkdir()
    modules = "decode: [{name: planner, adapter: planner}, {name: coder, adapter: org/coder}]"
    text = f"base: {{model: m}}\nunified: true\n{modules}"
    topology = parse_topology(text, source="t.yaml", directory=tmp_path)
    assert topology.decode == ()
    assert topology.adapters == (
        AdapterModule("planner", str(tmp_path / "planner")),
        AdapterModule("coder", "org/coder"),
    )


def test_a_file_that_cannot_be_read_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read the topology .*gone.yaml: No such file"):
        load_topology(tmp_path / "gone.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="not UTF-8"):
        load_topology(tmp_path / "binary.yaml")


def test_a_list_follows_its_flag_or_repeats_it() -> None:
    args = {"cors-origin": ("https://a.example", "*"), "log-format": "json", "off": False, "on": True}
    rest = ["--log-format", "json", "--on"]
    assert flags_of(args) == ["--cors-origin", "https://a.example", "*", *rest]
    assert flags_of(args, is_repeated=True) == ["--cors-origin", "https://a.example", "--cors-origin", "*", *rest]
