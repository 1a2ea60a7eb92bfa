"""docs/deploy.md: each file of configuration is tried with its program, where that is installed."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import socket
import ssl
import subprocess
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest
from places import ROOT
from told_backend import Running, ToldBackend, waited
from typer.main import get_command

from runner.cli.app import build

PAGE = (ROOT / "docs" / "deploy.md").read_text(encoding="utf-8")
NAME = "llm.example.org"


def blocks(language: str) -> list[str]:
    """The code blocks of a language."""
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def needs(program: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(shutil.which(program) is None, reason=f"{program} is not installed")


@pytest.fixture
def told() -> ToldBackend:
    return ToldBackend(lambda prompt, order: "one two three")


@pytest.fixture
def server(told: ToldBackend) -> Iterator[Running]:
    with Running([told], allow_hosts=[NAME], api_key="k") as running:
        yield running


@contextlib.contextmanager
def process(command: list[str], port: int, log: Path, **environment: str) -> Iterator[None]:
    """A proxy that runs, until it is no longer needed."""
    with log.open("w") as said:
        started = subprocess.Popen(command, stdout=said, stderr=said, env={**os.environ, **environment})
    try:

        def listens() -> bool:
            with socket.socket() as probe:
                return probe.connect_ex(("127.0.0.1", port)) == 0

        assert waited(listens, 20), log.read_text()
        yield
    finally:
        started.terminate()
        started.wait(20)


def streams_at_once(told: ToldBackend, secure: ssl.SSLContext | None, port: int, path: str = "") -> None:
    """Ask through a proxy: the first token is here while the backend still holds the second one back."""
    client = socket.create_connection(("127.0.0.1", port), 10)
    connection = client if secure is None else secure.wrap_socket(client, server_hostname=NAME)
    body = json.dumps({"prompt": "x", "stream": True}).encode()
    told.pause = 0.4
    connection.sendall(
        f"POST {path}/v1/completions HTTP/1.1\r\nHost: {NAME}\r\nAuthorization: Bearer k\r\n"
        f"Origin: https://{NAME}\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n".encode()
        + body
    )
    text = b""
    while b'"text":"o"' not in text:
        piece = connection.recv(65536)
        assert piece, text
        text += piece
    assert told.made <= 2 and b" 200 " in text.splitlines()[0] and b'"text":"n"' not in text
    connection.close()  # the client leaves: so does its answer
    assert waited(lambda: told.open == 0, 5)
    told.pause = 0.0


@pytest.mark.long
@needs("nginx")
@needs("openssl")
def test_nginx(told: ToldBackend, server: Running, tmp_path: Path) -> None:
    site, below = blocks("nginx")
    port, plain = free_port(), free_port()
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj", f"/CN={NAME}",
         "-addext", f"subjectAltName=DNS:{NAME}", "-keyout", str(key), "-out", str(certificate)],
        check=True, capture_output=True,
    )  # fmt: skip
    site = re.sub(r"/etc/ssl/certs/\S+(?=;)", str(certificate), site)
    site = re.sub(r"/etc/ssl/private/\S+(?=;)", str(key), site).replace("listen 443", f"listen 127.0.0.1:{port}")
    site += f"server {{ listen 127.0.0.1:{plain}; {below} }}"
    paths = "".join(
        f"{kind}_temp_path {tmp_path}/{kind};\n" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    file = tmp_path / "nginx.conf"
    file.write_text(
        f"daemon off; pid {tmp_path}/pid; error_log stderr; worker_processes 1;\nevents {{}}\n"
        f"http {{\naccess_log off;\n{paths}{site.replace('http://127.0.0.1:8080', server.url)}\n}}\n"
    )
    secure = ssl.create_default_context(cafile=str(certificate))
    with process(["nginx", "-c", str(file), "-e", "stderr", "-p", str(tmp_path)], port, tmp_path / "log"):
        streams_at_once(told, secure, port)
    # Below a path: the server is told of it.
    with Running([told], allow_hosts=[NAME], api_key="k", root_path="/llm") as other:
        file.write_text(file.read_text().replace(server.url, other.url))
        with process(["nginx", "-c", str(file), "-e", "stderr", "-p", str(tmp_path)], plain, tmp_path / "log"):
            streams_at_once(told, None, plain, "/llm")
            page = httpx2.get(f"http://127.0.0.1:{plain}/llm/", headers={"Host": NAME, "Accept": "text/html"})
            assert page.status_code == 200 and "<html" in page.text
            (script,) = re.findall(r'src="([^"/][^"]*page\.js)"', page.text)
            asked = httpx2.get(f"http://127.0.0.1:{plain}/llm/{script}", headers={"Host": NAME})
            assert asked.status_code == 200, asked.text


@pytest.mark.long
@needs("caddy")
def test_caddy(told: ToldBackend, server: Running, tmp_path: Path) -> None:
    (site,) = blocks("caddy")
    valid = tmp_path / "Caddyfile"
    valid.write_text(site)
    home = {"HOME": str(tmp_path), "XDG_DATA_HOME": str(tmp_path), "XDG_CONFIG_HOME": str(tmp_path)}
    command = ["caddy", "validate", "--adapter", "caddyfile", "--config", str(valid)]
    checked = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **home}, check=False)
    assert checked.returncode == 0, checked.stderr
    # Its certificate is its own here, as nobody can vouch for the name.
    port = free_port()
    local = site.replace(f"{NAME} {{", f"{NAME}:{port} {{\n    tls internal\n", 1)
    local = local.replace("127.0.0.1:8080", server.url.removeprefix("http://"))
    options = "{\n admin off\n auto_https disable_redirects\n skip_install_trust\n}\n"
    valid.write_text(options + local)
    run = ["caddy", "run", "--adapter", "caddyfile", "--config", str(valid)]
    with process(run, port, tmp_path / "log", **home):
        root = tmp_path / "caddy" / "pki" / "authorities" / "local" / "root.crt"
        assert waited(root.exists, 10)
        time.sleep(1)
        streams_at_once(told, ssl.create_default_context(cafile=str(root)), port)


@pytest.mark.long
@needs("systemd-analyze")
def test_the_unit(tmp_path: Path) -> None:
    (unit,) = blocks("ini")
    file = tmp_path / "runner.service"
    file.write_text(unit.replace("/opt/runner/bin/runner", "/bin/true"))
    checked = subprocess.run(["systemd-analyze", "verify", str(file)], capture_output=True, text=True, check=False)
    assert (checked.returncode, checked.stderr) == (0, "")


def test_the_files_options_and_commands_are_the_servers(tmp_path: Path) -> None:
    """Units, containers and lines for the shell name options that there are; the file of options is read."""
    (settings,) = blocks("toml")
    (tmp_path / "serve.toml").write_text(settings)
    (tmp_path / "key").write_text("k")
    assert tomllib.loads(settings)["model"]
    serve = get_command(build()).commands["serve"]  # type: ignore[attr-defined]
    unit = re.search(r"ExecStart=/opt/runner/bin/runner serve (.*)", PAGE)
    assert unit is not None
    words = unit[1].replace("/etc/runner", str(tmp_path)).replace("${CREDENTIALS_DIRECTORY}", str(tmp_path))
    serve.make_context("serve", words.split())
    shown = re.findall(r"(?:^|`)runner serve ([^`\n]+)", PAGE, re.MULTILINE)
    assert len(shown) >= 2
    for line in shown:
        serve.make_context("serve", line.split())
    dockerfile = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    (entry,) = re.findall(r'^ENTRYPOINT \["runner", "serve", (.*)\]$', dockerfile, re.MULTILINE)
    serve.make_context("serve", json.loads(f"[{entry}]"))
    assert re.search(r"ARG EXTRAS=cpu,serve\n", dockerfile) and "requirements.lock" in dockerfile
    ignored = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    assert not {"runner", "models", "configs", "setup.py", "requirements.lock"} & set(ignored)


def test_a_container_reaches_the_server_by_the_name_that_it_was_told_of(told: ToldBackend) -> None:
    """Open WebUI's traffic from a container is addressed to host.docker.internal: refused, unless that is named."""
    line = next(line for line in PAGE.splitlines() if "--allow-host host.docker.internal" in line)
    assert line.startswith("runner serve ")
    for hosts, status in (([], 403), (["host.docker.internal"], 200)):
        with Running([told], allow_hosts=hosts, api_key="k") as server:
            headers = {"Host": f"host.docker.internal:{server.address[1]}", "Authorization": "Bearer k"}
            for path in ("/v1/models", "/api/tags"):
                assert httpx2.get(server.url + path, headers=headers).status_code == status
