"""https as clients meet it: OpenAI's client over HTTP/1.1 and HTTP/2, `r1-serve chat`, and certificates that cannot be used."""
import ssl
import subprocess

import httpx2
import openai
import pytest
import trustme
from conftest import BINARY, COMMAND, STRAWBERRY, Server, joined

USER = [{"role": "user", "content": STRAWBERRY}]


class SecureServer(Server):
    def __init__(self, log, authority, *arguments):
        super().__init__(log, *arguments)
        self.url = self.url.replace("http:", "https:")
        self.trust = ssl.create_default_context(cafile=authority)

    def healthy(self):
        try:
            return httpx2.get(self.url + "/health", timeout=5, verify=self.trust).status_code == 200
        except httpx2.TransportError:
            return False

    def openai(self, http2):
        client = openai.DefaultHttpxClient(verify=self.trust, http2=http2)
        return openai.OpenAI(base_url=self.url + "/v1", api_key="unused", max_retries=0, timeout=120, http_client=client)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A certificate for 127.0.0.1, its key, both in one file, and who vouches for it."""
    folder = tmp_path_factory.mktemp("tls")
    authority = trustme.CA()
    certificate = authority.issue_cert("localhost", "127.0.0.1")
    for blob in certificate.cert_chain_pems:
        blob.write_to_path(folder / "cert.pem", append=True)
    certificate.private_key_pem.write_to_path(folder / "key.pem")
    certificate.private_key_and_cert_chain_pem.write_to_path(folder / "both.pem")
    authority.issue_cert("localhost").private_key_pem.write_to_path(folder / "other.pem")
    authority.cert_pem.write_to_path(folder / "ca.pem")
    return folder


@pytest.fixture(scope="module")
def secure(files, tmp_path_factory):
    log = tmp_path_factory.mktemp("secure") / "log"
    with SecureServer(log, files / "ca.pem", "--ssl-certfile", files / "cert.pem", "--ssl-keyfile", files / "key.pem") as server:
        yield server


@pytest.mark.parametrize("http2", [False, True])
def test_replies_and_streams(secure, strawberry, http2):
    client = secure.openai(http2)
    reply = client.chat.completions.create(model="any", messages=USER, temperature=0)
    assert reply.choices[0].message.content.strip("\n") == strawberry.content
    streams = [client.chat.completions.create(model="any", messages=USER, temperature=0, stream=True) for _ in range(4)]
    for stream in streams:
        assert joined(stream)[0]["content"] == reply.choices[0].message.content


@pytest.mark.parametrize("http2", [False, True])
def test_the_protocol_is_negotiated(secure, http2):
    with httpx2.Client(verify=secure.trust, http2=http2) as client:
        assert client.get(secure.url + "/v1/models").http_version == ("HTTP/2" if http2 else "HTTP/1.1")


def test_the_banner_says_https(secure):
    assert f"{secure.url}/v1" in secure.log.read_text()


def test_plain_http_is_told_so(secure):
    reply = httpx2.post(secure.url.replace("https:", "http:") + "/v1/completions", json={"prompt": "x" * 100_000})
    assert reply.status_code == 400 and reply.json()["error"]["code"] == "tls_required"


def test_a_body_over_the_limit_is_refused_while_it_is_still_sent(secure):
    with pytest.raises(openai.APIStatusError) as caught:
        secure.openai(False).completions.create(model="any", prompt="a" * (40 << 20))
    assert caught.value.status_code == 413


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_old_protocols_are_not_spoken(secure):
    trust = ssl.create_default_context()
    trust.check_hostname, trust.verify_mode = False, ssl.CERT_NONE
    trust.minimum_version = ssl.TLSVersion.TLSv1
    trust.maximum_version = ssl.TLSVersion.TLSv1_1
    with pytest.raises(httpx2.ConnectError):
        httpx2.get(secure.url + "/health", verify=trust)


def test_the_terminal_client_trusts_whom_it_is_told_to(secure, files):
    def chat(*arguments):
        command = [BINARY, "chat", "--url", secure.url, *arguments, STRAWBERRY]
        return subprocess.run(command, capture_output=True, text=True, timeout=60)

    said = chat("--temperature", "0", "--cacert", files / "ca.pem")
    assert said.returncode == 0 and "**3**" in said.stdout, said
    said = chat()
    assert said.returncode != 0 and "--cacert" in said.stderr and "UnknownIssuer" in said.stderr, said


def test_one_file_may_hold_both(files, tmp_path):
    with SecureServer(tmp_path / "log", files / "ca.pem", "--ssl-certfile", files / "both.pem") as server:
        assert server.healthy()


def test_what_cannot_be_used_is_named(files, tmp_path):
    encrypted = tmp_path / "encrypted.pem"
    encrypted.write_text("-----BEGIN ENCRYPTED PRIVATE KEY-----\nAAAA\n-----END ENCRYPTED PRIVATE KEY-----\n")
    for certificate, key, needle in [
        (files / "cert.pem", files / "other.pem", "does not belong"),
        (files / "cert.pem", tmp_path / "absent.pem", "absent.pem"),
        (files / "cert.pem", encrypted, "encrypted"),
        (files / "key.pem", files / "key.pem", "BEGIN CERTIFICATE"),
    ]:
        ended = subprocess.run(
            [*COMMAND, "--ssl-certfile", certificate, "--ssl-keyfile", key], capture_output=True, text=True, timeout=60
        )
        assert ended.returncode == 1 and needle in ended.stderr, ended.stderr
    ended = subprocess.run([*COMMAND, "--ssl-keyfile-password", "x"], capture_output=True, text=True, timeout=60)
    assert ended.returncode == 1 and "--ssl-keyfile-password" in ended.stderr
