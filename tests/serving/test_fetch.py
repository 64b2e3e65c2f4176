"""Downloads of media URLs: a table of attacks on the network of the server, redirects, limits. Offline."""

import _socket
import socket
import ssl
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from bindllm.errors import InputError, MediaError
from bindllm.serving.fetch import FetchConfig, fetch, is_public

ALLOWED = FetchConfig(domains=("media.example.com", "cdn.example.com"), seconds=5)
PUBLIC = "93.184.216.34"
CONTENT = b"\x89PNG content of a file" * 100

# Spellings of URLs that must never lead to a connection, although "media.example.com" is allowed.
SPELLINGS = [
    "http://127.0.0.1/cat.png",
    "http://localhost/cat.png",
    "http://2130706433/cat.png",  # decimal
    "http://0x7f000001/cat.png",  # hexadecimal
    "http://0x7f.0.0.1/cat.png",
    "http://0177.0.0.1/cat.png",  # octal
    "http://017700000001/cat.png",
    "http://127.1/cat.png",  # short
    "http://127.0.1/cat.png",
    "http://0/cat.png",
    "http://0.0.0.0/cat.png",
    "http://169.254.169.254/latest/meta-data/",
    "http://[::1]/cat.png",
    "http://[::]/cat.png",
    "http://[0:0:0:0:0:0:0:1]/cat.png",
    "http://[::ffff:127.0.0.1]/cat.png",
    "http://[::ffff:7f00:1]/cat.png",
    "http://[fe80::1%25eth0]/cat.png",  # zone
    "http://[fe80::1%eth0]/cat.png",
    "http://127\u30020\u30020\u30021/cat.png",  # ideographic full stops
    "http://\uff11\uff12\uff17.0.0.1/cat.png",  # full-width digits
    "http://\u24db\u24de\u24d2alhost/cat.png",  # circled letters
    "http://medi\u0430.example.com/cat.png",  # a Cyrillic letter
    "http://media\u3002example.com/cat.png",
    "http://media.example.com@127.0.0.1/cat.png",  # user info
    "http://media.example.com:80@127.0.0.1/cat.png",
    "http://user:pass@media.example.com/cat.png",
    "http://@media.example.com/cat.png",
    "http://127.0.0.1\\@media.example.com/cat.png",  # backslashes
    "http://media.example.com\\@127.0.0.1/cat.png",
    "http:\\\\media.example.com/cat.png",
    "http://media.example.com\\.evil.example/cat.png",
    "http://127.0.0.1#@media.example.com/cat.png",
    "http://127.0.0.1?@media.example.com/cat.png",
    "http://media.example.com./cat.png",  # trailing dot
    "http://media.example.com..evil.example/cat.png",
    "http://media.example.com.evil.example/cat.png",
    "http://evilmedia.example.com/cat.png",
    "http://sub.media.example.com/cat.png",
    "http://example.com/cat.png",
    "http://media.example.com:22/cat.png",  # another service
    "http://media.example.com:99999/cat.png",
    "http://media.example.com:/cat.png",
    "http://media.example.com:80:80/cat.png",
    "http://media%2eexample.com/cat.png",
    "http:media.example.com/cat.png",
    "http:///media.example.com/cat.png",
    "//media.example.com/cat.png",
    "media.example.com/cat.png",
    " http://media.example.com/cat.png",
    "http://media.example.com/cat.png\n",
    "http://media.example.com/cat.png HTTP/1.1\r\nHost: evil.example\r\n\r\n",
    "http://media.example.com/\r\nX-Injected: yes",
    "http://media.example.com/cat\tpng",
    "http://media.example.com\x00.evil.example/cat.png",
    "file:///etc/passwd",
    "FILE:///etc/passwd",
    "file://media.example.com/etc/passwd",
    "ftp://media.example.com/cat.png",
    "gopher://media.example.com:70/_x",
    "dict://media.example.com/x",
    "jar:http://media.example.com!/x",
    "javascript:alert(1)",
    "data:image/png;base64,AAAA",
    "",
]

# Answers of a name server for the allowed domain that must never be connected to.
ADDRESSES = [
    *("0.0.0.0", "0.1.2.3", "10.0.0.1", "100.64.0.1", "100.100.100.200", "100.127.255.255", "127.0.0.1"),
    *("127.255.255.254", "169.254.169.254", "172.16.0.1", "172.31.255.255", "192.0.0.192", "192.0.2.1"),
    *("192.88.99.1", "192.168.1.1", "198.18.0.1", "198.19.255.255", "198.51.100.1", "203.0.113.1"),
    *("224.0.0.1", "239.255.255.255", "240.0.0.1", "255.255.255.255", "168.63.129.16"),
    *("::", "::1", "::ffff:127.0.0.1", "::ffff:10.0.0.1", "::ffff:93.184.216.34", "::127.0.0.1"),
    *("2002:7f00:1::", "2002:a00:1::1", "64:ff9b::7f00:1", "64:ff9b::a9fe:a9fe", "64:ff9b:1::1"),
    *("2001:0:4136:e378:8000:63bf:3fff:fdd2", "2001:db8::1", "2001:10::1", "3fff::1", "3ffe::1", "100::1"),
    *("fc00::1", "fd00:ec2::254", "fe80::1", "fe80::1%eth0", "fec0::1", "ff02::1", "5f00::1", "4000::1"),
    *("2606:4700::1%1", "not an address", ""),
]


class Handler(BaseHTTPRequestHandler):
    """Answers by path; `server.requests` holds the Host, the path and the headers of each request."""

    def do_GET(self):
        self.server.requests.append((self.headers["Host"], self.path, dict(self.headers)))
        kind, _, rest = self.path[1:].partition("?")
        # The client may leave before the end.
        with suppress(OSError):
            getattr(self, f"answer_{kind.partition('.')[0]}")(rest)

    def send(self, *headers, status=200, content=CONTENT):
        self.send_response(status)
        for name, value in headers:
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def answer_cat(self, rest):
        self.send(("Content-Length", str(len(CONTENT))))

    def answer_unknown_length(self, rest):
        self.send()

    def answer_chunked(self, rest):
        self.protocol_version = "HTTP/1.1"
        blocks = [CONTENT] * int(rest or 1)
        body = b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in blocks) + b"0\r\n\r\n"
        self.send(("Transfer-Encoding", "chunked"), content=body)

    def answer_redirect(self, rest):
        self.send(("Location", rest), status=302, content=b"")

    def answer_truncated(self, rest):
        self.send(("Content-Length", str(len(CONTENT) + 1)))

    def answer_claims(self, rest):
        self.send(("Content-Length", str(10**12)))

    def answer_endless(self, rest):
        self.send(content=b"")
        while True:
            self.wfile.write(bytes(1 << 16))

    def answer_packed(self, rest):
        self.send(("Content-Encoding", "gzip"), ("Content-Length", str(len(CONTENT))))

    def answer_missing(self, rest):
        self.send(status=404, content=b"secret words of an inner server")

    def answer_slow(self, rest):
        self.send(("Content-Length", "1000"), content=b"")
        self.trickle(1000)

    def answer_slow_header(self, rest):
        self.wfile.write(b"HTTP/1.1 200 OK\r\nX-Slow: ")
        self.trickle(1000)

    def answer_continue(self, rest):
        while True:
            self.wfile.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            time.sleep(0.01)

    def answer_nonsense(self, rest):
        self.wfile.write(b"220 mail.example.com ESMTP\r\n")

    def trickle(self, count):
        for _ in range(count):
            self.wfile.write(b"x")
            self.wfile.flush()
            time.sleep(0.05)

    def log_message(self, *args):
        """No lines on the terminal."""


@pytest.fixture
def web(monkeypatch):
    """A fake internet: names are answered from `answers`, and every connection ends at a server of this machine."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    server.requests, server.connected, server.asked = [], [], []
    server.answers = {"media.example.com": [PUBLIC], "cdn.example.com": ["93.184.216.35"]}
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()

    def getaddrinfo(host, port, *args, **kwargs):
        server.asked.append(host)
        addresses = server.answers.get(host)
        if addresses is None:
            raise socket.gaierror(-2, "Name or service not known")
        if callable(addresses):
            addresses = addresses()
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in addresses]

    def connect(self, address):
        server.connected.append(address)
        _socket.socket.connect(self, server.server_address)

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    monkeypatch.setattr(socket.socket, "connect", connect, raising=False)
    # Proxies of the environment must not matter.
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


@contextmanager
def refused(reason=None):
    with pytest.raises(MediaError, match=reason) as caught:
        yield
    # Nothing about addresses, ports or other servers: a client could map the network by them.
    assert not any(word in str(caught.value) for word in ("93.184", "secret", "Errno"))


# --- what may be downloaded ---


def test_nothing_is_downloaded_unless_domains_are_allowed(web):
    with refused("does not download URLs"):
        fetch("http://media.example.com/cat.png", FetchConfig())
    assert (web.asked, web.connected) == ([], [])


@pytest.mark.parametrize(
    "url",
    [
        "http://media.example.com/cat.png",
        "HTTP://MEDIA.EXAMPLE.COM/cat.png",
        "http://media.example.com:80/cat.png",
        "http://media.example.com/cat.png#top",
        "http://media.example.com/cat.png?size=1&name=a%20b@c",
    ],
)
def test_an_allowed_domain_is_downloaded_from_the_address_that_was_checked(web, url):
    assert fetch(url, ALLOWED) == CONTENT
    host, path, headers = web.requests[0]
    assert (host, path) == (
        "media.example.com",
        url[len("http://media.example.com") :].removeprefix(":80").partition("#")[0],
    )
    assert web.connected == [(PUBLIC, 80)]
    assert not {"Cookie", "Authorization", "Referer"} & set(headers)


def test_a_query_without_a_path(web):
    with refused("status 404|failed"):
        fetch("http://media.example.com?cat.png", ALLOWED)
    assert web.requests[0][1] == "/?cat.png"


def test_ports_are_allowed_by_name(web):
    config = FetchConfig(domains=("Media.Example.com:8080",))
    assert fetch("http://media.example.com:8080/cat.png", config) == CONTENT
    assert web.requests[0][0] == "media.example.com:8080"
    assert web.connected == [(PUBLIC, 8080)]
    with refused("its domain"):
        fetch("http://media.example.com/cat.png", config)
    assert (
        fetch("http://media.example.com/cat.png", FetchConfig(domains=("media.example.com:80",))) == CONTENT
    )


@pytest.mark.parametrize("url", SPELLINGS)
def test_no_spelling_leads_to_a_connection(web, url):
    with refused():
        fetch(url, ALLOWED)
    assert (web.asked, web.connected) == ([], [])


@pytest.mark.parametrize("url", SPELLINGS)
def test_no_redirect_leads_to_another_host(web, url):
    # As bytes of UTF-8, which `send_header` writes as latin-1.
    location = url.translate(dict.fromkeys(map(ord, "\r\n\0"))).encode().decode("latin-1")
    web.RequestHandlerClass = redirecting(location)
    with refused():
        fetch("http://media.example.com/redirect", ALLOWED)
    # Relative ones stay on the host and find nothing there.
    assert {host for host, *_ in web.requests} == {"media.example.com"}
    assert {address for address, _ in web.connected} == {PUBLIC}


def redirecting(location):
    """A handler that answers every path with one redirect."""

    def answer(self):
        self.server.requests.append((self.headers["Host"], self.path, {}))
        self.send(("Location", location), status=302, content=b"")

    return type("Redirecting", (Handler,), {"do_GET": answer})


@pytest.mark.parametrize("address", ADDRESSES)
def test_addresses_outside_of_the_public_internet_are_refused(web, address):
    assert not is_public(address)
    for answers in ([address], [PUBLIC, address], [address, PUBLIC]):
        web.answers["media.example.com"] = answers
        with refused("outside of the public internet"):
            fetch("http://media.example.com/cat.png", ALLOWED)
    assert web.connected == []


@pytest.mark.parametrize("address", ["1.1.1.1", PUBLIC, "172.32.0.1", "2606:2800:220:1::1", "2a00:1450::1"])
def test_public_addresses_are_public(address):
    assert is_public(address)


@pytest.mark.parametrize("domain", ["2130706433", "127.0.0.1", "[::1]", "localhost"])
def test_an_allowed_name_of_this_machine_is_refused_by_its_address(web, domain):
    web.answers.update(
        {"2130706433": ["127.0.0.1"], "localhost": ["127.0.0.1"], "127.0.0.1": ["127.0.0.1"], "::1": ["::1"]}
    )
    with refused("outside of the public internet"):
        fetch(f"http://{domain}/cat.png", FetchConfig(domains=(domain,)))
    assert web.connected == []


def test_a_name_that_changes_its_address_after_the_check(web):
    """DNS rebinding: the first answer is public, every later one is this machine."""
    answers = iter([[PUBLIC]])
    web.answers["media.example.com"] = lambda: next(answers, ["127.0.0.1"])
    assert fetch("http://media.example.com/cat.png", ALLOWED) == CONTENT
    assert (web.asked, web.connected) == (["media.example.com"], [(PUBLIC, 80)])
    # The next download asks again, and is refused.
    with refused("outside of the public internet"):
        fetch("http://media.example.com/cat.png", ALLOWED)
    assert len(web.connected) == 1


def test_the_next_address_is_tried_if_one_does_not_answer(web, monkeypatch):
    web.answers["media.example.com"] = ["93.184.216.1", PUBLIC]
    connect = socket.socket.connect

    def first_fails(self, address):
        if address[0] == "93.184.216.1":
            raise ConnectionRefusedError
        connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", first_fails)
    assert fetch("http://media.example.com/cat.png", ALLOWED) == CONTENT


def test_unknown_names_and_dead_hosts(web, monkeypatch):
    with refused("download failed"):
        fetch("http://cdn.example.org/cat.png", FetchConfig(domains=("cdn.example.org",)))
    label = "a" * 64
    with refused("download failed"):
        fetch(f"http://{label}.com/cat.png", FetchConfig(domains=(f"{label}.com",)))
    monkeypatch.setattr(
        socket.socket, "connect", lambda *args: (_ for _ in ()).throw(ConnectionRefusedError("Errno 111"))
    )
    with refused("download failed"):
        fetch("http://media.example.com/cat.png", ALLOWED)


# --- redirects ---


@pytest.mark.parametrize(
    "location", ["/cat.png", "cat.png", "//cdn.example.com/cat.png", "http://cdn.example.com/cat.png"]
)
def test_redirects_within_the_allowed_domains(web, location):
    assert fetch(f"http://media.example.com/redirect?{location}", ALLOWED) == CONTENT
    assert web.connected[1][0] == ("93.184.216.35" if "cdn" in location else PUBLIC)


def test_the_address_of_every_hop_is_checked(web):
    web.answers["cdn.example.com"] = ["169.254.169.254"]
    with refused("outside of the public internet"):
        fetch("http://media.example.com/redirect?http://cdn.example.com/cat.png", ALLOWED)
    assert web.connected == [(PUBLIC, 80)]


def test_the_number_of_redirects_is_limited(web):
    web.RequestHandlerClass = redirecting("/redirect")
    with refused("more than 3 redirects"):
        fetch("http://media.example.com/redirect", ALLOWED)
    assert len(web.requests) == 4


def test_a_redirect_from_https_to_http(web, monkeypatch):
    monkeypatch.setattr(ssl.SSLContext, "wrap_socket", lambda self, connection, **options: connection)
    with refused("from https to http"):
        fetch("https://media.example.com/redirect?http://cdn.example.com/cat.png", ALLOWED)


# --- limits ---


@pytest.mark.parametrize("path", ["cat", "unknown_length", "chunked"])
def test_the_limit_of_bytes_is_exact(web, path):
    url = f"http://media.example.com/{path}"
    assert fetch(url, FetchConfig(ALLOWED.domains, mib=len(CONTENT) / 2**20)) == CONTENT
    with refused(f"more than {len(CONTENT) - 1:,} bytes"):
        fetch(url, FetchConfig(ALLOWED.domains, mib=(len(CONTENT) - 1) / 2**20))


@pytest.mark.parametrize("path", ["claims", "endless", "chunked?1000"])
def test_large_files_are_not_read_to_their_end(web, path):
    with refused("more than 104,858 bytes"):
        fetch(f"http://media.example.com/{path}", FetchConfig(ALLOWED.domains, mib=0.1))


@pytest.mark.parametrize("path", ["slow", "slow_header", "continue"])
def test_the_whole_time_is_limited_not_each_byte(web, path):
    started = time.monotonic()
    with refused("more than 0.3 seconds"):
        fetch(f"http://media.example.com/{path}", FetchConfig(ALLOWED.domains, seconds=0.3))
    assert time.monotonic() - started < 2


def test_a_slow_name_server(web):
    web.answers["media.example.com"] = lambda: time.sleep(1) or [PUBLIC]
    started = time.monotonic()
    with refused("more than 0.1 seconds"):
        fetch("http://media.example.com/cat.png", FetchConfig(ALLOWED.domains, seconds=0.1))
    assert time.monotonic() - started < 0.9


def test_a_name_server_that_hangs_leaves_few_threads(web):
    free = threading.Event()
    web.answers["media.example.com"] = lambda: free.wait(10) and [PUBLIC]
    with ThreadPoolExecutor(40) as pool:
        config = FetchConfig(ALLOWED.domains, seconds=0.2)
        calls = [pool.submit(fetch, "http://media.example.com/cat.png", config) for _ in range(40)]
        for call in calls:
            with refused("more than 0.2 seconds"):
                call.result()
        assert sum(thread.name == "bindllm-lookup" for thread in threading.enumerate()) == 16
    # Once it answers again, so does the server.
    free.set()
    assert fetch("http://media.example.com/cat.png", ALLOWED) == CONTENT


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("truncated", "cut off|failed"),
        ("packed", "compressed"),
        ("missing", "status 404"),
        ("nonsense", "download failed"),
    ],
)
def test_answers_that_are_not_the_file(web, path, reason):
    with refused(reason):
        fetch(f"http://media.example.com/{path}", ALLOWED)


def test_tls_checks_the_name_of_the_url(web, monkeypatch):
    names = []

    def wrap_socket(self, connection, *, server_hostname, **options):
        names.append((server_hostname, self.check_hostname, self.verify_mode))
        raise ssl.SSLCertVerificationError("certificate verify failed")

    monkeypatch.setattr(ssl.SSLContext, "wrap_socket", wrap_socket)
    with refused("download failed"):
        fetch("https://media.example.com/cat.png", ALLOWED)
    assert names == [("media.example.com", True, ssl.CERT_REQUIRED)]
    assert web.connected == [(PUBLIC, 443)]


@pytest.mark.parametrize(
    "options",
    [
        {"domains": ("https://media.example.com",)},
        {"domains": ("*",)},
        {"mib": 0},
        {"seconds": 0},
        {"redirects": -1},
    ],
)
def test_settings_that_mean_nothing(options):
    with pytest.raises(InputError):
        FetchConfig(**options)
