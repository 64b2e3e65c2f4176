"""Clients as people use them, in an environment of their own: openai, LangChain, LiteLLM and curl; and schemathesis."""

import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from bindllm import Media
from crowd_parts import CHAT, LiveServer
from serving_parts import ask, image_part, png
from tool_parts import TAGS

pytestmark = pytest.mark.slow

# LiteLLM 1.82.7 and 1.82.8 were malware.
PACKAGES = {
    "clients": ("openai", "langchain-openai", "litellm != 1.82.7, != 1.82.8"),
    "schemathesis": ("schemathesis",),
}
ENVIRONMENTS = Path(tempfile.gettempdir()) / "bindllm-test-clients"
MOST = 7


def environment(name: str) -> Path:
    """Return the folder of programs of an environment, which is made once and kept."""
    folder = ENVIRONMENTS / name
    done = folder / "packages.txt"
    if not done.exists() or done.read_text() != str(PACKAGES[name]):
        subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
        install = [folder / "bin" / "pip", "install", "--quiet", *PACKAGES[name]]
        try:
            subprocess.run(install, check=True, capture_output=True, text=True, timeout=1200)
        except subprocess.SubprocessError as error:
            reason = (getattr(error, "stderr", None) or str(error)).strip().splitlines()[-1]
            pytest.skip(f"{', '.join(PACKAGES[name])} cannot be installed: {reason}")
        done.write_text(str(PACKAGES[name]))
    return folder / "bin"


@pytest.fixture(scope="module")
def server(decoder):
    with LiveServer(decoder, keys=("secret",)) as server:
        # It writes the same conversations, and calls too.
        server.model.tokenizer.chat_template = TAGS
        yield server


@pytest.fixture(scope="module")
def expected(server):
    """Answers of `generate` to a text, and to an image with it."""
    options = {"max_new_tokens": MOST}
    return [
        server.model.generate("What is it?", [], **options),
        server.model.generate("What is it?", [Media.image(png())], **options),
    ]


def run_client(server, script: str) -> dict:
    """Run a script with `url`, `image` (a content part), `MOST` and `show`, which prints what it found."""
    head = (
        f"import json\nurl, MOST = {server.url + '/v1'!r}, {MOST}\nimage = json.loads({json.dumps(image_part())!r})\n"
        "parts = [image, {'type': 'text', 'text': 'What is it?'}]\n"
        "def show(**found): print(json.dumps(found))\n"
    )
    done = subprocess.run(
        [environment("clients") / "python", "-c", head + script],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        # Nothing of this process's settings: no proxy, no key.
        env={"PATH": "/usr/bin:/bin", "LITELLM_LOCAL_MODEL_COST_MAP": "True"},
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


OPENAI = """
import openai
client = openai.OpenAI(base_url=url, api_key="secret", max_retries=0)
def chat(content, **options):
    return client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": content}], max_tokens=MOST, **options)
chunks = list(chat(parts, stream=True, stream_options={"include_usage": True}))
errors = []
for attempt in (
    lambda: openai.OpenAI(base_url=url, api_key="wrong", max_retries=0).models.list(),
    lambda: client.chat.completions.create(model="other", messages=[{"role": "user", "content": "Hi"}]),
    lambda: chat([{"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}]),
):
    try:
        attempt()
    except openai.APIStatusError as error:
        errors.append(type(error).__name__)
vectors = client.embeddings.create(model="tiny", input=["a cat", "a dog"]).data
clock = {"name": "clock", "description": "The time."}
options = {"model": "tiny", "tool_choice": "required", "parallel_tool_calls": False}
asked = [{"role": "user", "content": "What time is it?"}]
called = client.chat.completions.create(
    messages=asked, tools=[{"type": "function", "function": clock}], max_tokens=99, **options)
calls = client.responses.create(input=asked, tools=[{"type": "function", **clock}], max_output_tokens=99, **options)
result = {"type": "function_call_output", "call_id": calls.output[0].call_id, "output": "noon"}
with client.responses.stream(
    model="tiny", input=[*asked, *calls.output, result], tools=[{"type": "function", **clock}], max_output_tokens=MOST
) as events:
    last = [event for event in events][-1]
show(
    calls=[called.choices[0].message.tool_calls[0].function.name, calls.output[0].name, calls.output[0].arguments],
    after_the_call=last.type,
    models=[model.id for model in client.models.list()],
    text=chat("What is it?").choices[0].message.content,
    image=chat(parts).choices[0].message.content,
    streamed="".join(c.choices[0].delta.content or "" for c in chunks if c.choices),
    usage=chunks[-1].usage.completion_tokens,
    response=client.responses.create(model="tiny", input="What is it?", max_output_tokens=MOST).output_text,
    sizes=[len(vector.embedding) for vector in vectors],
    errors=errors,
)
"""


def test_openai(server, expected):
    found = run_client(server, OPENAI)
    text, image = expected
    assert found == {
        "calls": ["clock", "clock", "{}"],
        "after_the_call": "response.incomplete",
        "models": ["tiny"],
        "text": text,
        "image": image,
        "streamed": image,
        "usage": MOST,
        "response": text,
        "sizes": [16, 16],
        "errors": ["AuthenticationError", "NotFoundError", "BadRequestError"],
    }


LANGCHAIN = """
from langchain_openai import ChatOpenAI, OpenAIEmbeddings
options = {"base_url": url, "api_key": "secret", "model": "tiny"}
chat = ChatOpenAI(max_tokens=MOST, **options)
message = [{"role": "user", "content": parts}]
vectors = OpenAIEmbeddings(check_embedding_ctx_length=False, **options)
show(
    text=chat.invoke("What is it?").content,
    image=chat.invoke(message).content,
    streamed="".join(chunk.content for chunk in chat.stream(message)),
    sizes=[len(row) for row in vectors.embed_documents(["a cat", "a dog"])] + [len(vectors.embed_query("a cat"))],
)
"""


def test_langchain(server, expected):
    found = run_client(server, LANGCHAIN)
    text, image = expected
    assert found == {"text": text, "image": image, "streamed": image, "sizes": [16, 16, 16]}


LITELLM = """
import litellm
options = {"model": "openai/tiny", "api_base": url, "api_key": "secret"}
def chat(content, **more):
    return litellm.completion(messages=[{"role": "user", "content": content}], max_tokens=MOST, **options, **more)
show(
    text=chat("What is it?").choices[0].message.content,
    image=chat(parts).choices[0].message.content,
    streamed="".join(chunk.choices[0].delta.content or "" for chunk in chat(parts, stream=True)),
    sizes=[len(row["embedding"]) for row in litellm.embedding(input=["a cat"], **options).data],
)
"""


def test_litellm(server, expected):
    found = run_client(server, LITELLM)
    text, image = expected
    assert found == {"text": text, "image": image, "streamed": image, "sizes": [16]}


def test_curl(server, expected):
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    body = {"model": "tiny", "messages": [{"role": "user", "content": [image_part(), "What is it?"]}]}
    command = [
        "curl",
        "--silent",
        "--noproxy",
        "*",
        server.url + CHAT,
        "--header",
        "Authorization: Bearer secret",
    ]
    command += [
        "--header",
        "Content-Type: application/json",
        "--data",
        json.dumps({**body, "max_tokens": MOST}),
    ]
    answer = json.loads(subprocess.run(command, capture_output=True, check=True, timeout=60).stdout)
    assert answer["choices"][0]["message"]["content"] == expected[1]


def test_schemathesis(server, tmp_path):
    """Requests made from the OpenAPI description, and many that break it: no failure of the server."""
    options = (
        "--max-examples 40 --checks not_a_server_error --seed 1 --phases examples,coverage,fuzzing --no-color "
        # An answer of 128 tokens takes longer than its 10 seconds on a busy machine.
        "--request-timeout 120"
    )
    program = environment("schemathesis") / "schemathesis"
    done = subprocess.run(
        [
            program,
            "run",
            f"{server.url}/openapi.json",
            "--header",
            "Authorization: Bearer secret",
            *options.split(),
        ],
        capture_output=True,
        text=True,
        timeout=1200,
        check=False,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert re.search(r"[1-9]\d* (generated|passed)", done.stdout), done.stdout[-2000:]
    with server.client(headers={"authorization": "Bearer secret"}) as client:
        assert client.post(CHAT, json=ask(max_tokens=1)).status_code == 200
