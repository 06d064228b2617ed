"""Reading a file and a name again and again: what is new, and what is wrong."""

import asyncio
import os
import socket

import pytest

from sglang_prefillshare.errors import ConfigError
from sglang_prefillshare.routing.membership import DnsSource, FileSource
from sglang_prefillshare.routing.sources import MAX_FILE_BYTES, DnsReader, FileReader, check_sources


def replace(path, text: str) -> None:
    """As whoever keeps the file should: written whole beside it, and renamed."""
    beside = path.with_suffix(".new")
    beside.write_text(text)
    os.replace(beside, path)


def read(reader):
    return asyncio.run(reader.read())


def test_a_file_is_read_when_it_was_replaced_and_only_then(tmp_path):
    path = tmp_path / "workers.yaml"
    path.write_text("workers: [http://a:1]")
    reader = FileReader(path, interval_s=1.0)
    assert read(reader) == ("http://a:1",)
    assert read(reader) is None
    stamp = path.stat()
    replace(path, "workers: [http://b:1]")
    os.utime(path, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))  # of the same size and time, but another file
    assert read(reader) == ("http://b:1",)


def test_a_broken_file_is_told_once_and_one_that_is_gone_comes_back(tmp_path):
    path = tmp_path / "workers.yaml"
    path.write_text("workers: [http://a:1]")
    reader = FileReader(path, interval_s=1.0)
    read(reader)
    replace(path, "workers: [http://a")
    with pytest.raises(ConfigError, match=r"workers\.yaml"):
        read(reader)
    assert read(reader) is None, "the problem stands until the file changes"
    hidden = path.rename(tmp_path / "hidden")
    with pytest.raises(ConfigError, match="No such file"):
        read(reader)
    replace(hidden, "workers: [http://c:1]")
    hidden.rename(path)
    assert read(reader) == ("http://c:1",)


@pytest.mark.parametrize("data", [b"\xff\xfe", b"workers: [" + b" " * MAX_FILE_BYTES + b"]"])
def test_what_is_no_list_at_all_is_refused(tmp_path, data):
    path = tmp_path / "workers.yaml"
    path.write_bytes(data)
    with pytest.raises(ConfigError, match="wanted"):
        read(FileReader(path, interval_s=1.0))


def test_before_the_start_a_file_must_be_right_and_a_name_need_not_exist_yet(tmp_path):
    check_sources([DnsSource("no.such.name.invalid", 1)])
    with pytest.raises(ConfigError, match="No such file"):
        check_sources([FileSource(str(tmp_path / "absent.yaml"))])
    (tmp_path / "empty.yaml").write_text("")
    with pytest.raises(ConfigError, match="is empty"):
        check_sources([FileSource(str(tmp_path / "empty.yaml"))])


def dns(answer):
    async def resolve(name, port):
        assert (name, port) == ("workers.ns", 7)
        if isinstance(answer, Exception):
            raise answer
        return answer

    return DnsReader(DnsSource("workers.ns", 7), interval_s=1.0, resolve=resolve)


def test_a_name_gives_all_its_addresses():
    assert read(dns(["10.0.0.2", "::1", "10.0.0.1"])) == ("http://10.0.0.1:7", "http://10.0.0.2:7", "http://[::1]:7")


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (socket.gaierror(socket.EAI_NONAME, "Name or service not known"), "workers.ns does not resolve: Name or serv"),
        (TimeoutError(), "TimeoutError"),
        (UnicodeError("label too long"), "label too long"),
        ([], "no address"),
        (["fe80::1%eth0"], "no address"),
    ],
)
def test_a_name_that_resolves_to_nobody_is_a_failure(answer, says):
    with pytest.raises(ConfigError, match=says):
        read(dns(answer))


def test_the_systems_resolver_is_asked():
    urls = read(DnsReader(DnsSource("localhost", 7), interval_s=1.0))
    assert "http://127.0.0.1:7" in urls or "http://[::1]:7" in urls
