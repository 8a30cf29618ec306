"""`bouquet serve`: several adapters in one batch, behind an address that says what is wrong with a request."""

import http.client
import json
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import replace

import pytest

from common.error import BouquetError
from deploy import adapters
from deploy.command import main
from deploy.serve import vllm
from deploy.serve.batches import Batches, BusyError, Completion, Request
from deploy.serve.command import named
from deploy.serve.http import LARGEST_BODY, Server
from tests.support.adapters import run_directory
from tests.support.architectures import tiny_bert


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two adapters of different rules and ranks over the embedded model."""
    folder = tmp_path_factory.mktemp("runs")
    run_directory(folder / "flu", **{"rule.name": "fedex-lora", "seed": 1})
    run_directory(folder / "v1.5", **{"lora.rank": 4, "seed": 2})
    return {name: folder / name / "adapter" for name in ("flu", "v1.5")}


@pytest.fixture(scope="module")
def batches(folders):
    with Batches(folders, adapters.settings(folders["flu"]), "cpu", most=4) as running:
        yield running


def request(batches, adapter, prompt, limit=12):
    return Request(adapter, [1, *batches.tokenizer(prompt, add_special_tokens=False)["input_ids"]], limit)


def test_adapters_mixed_in_one_batch_give_what_each_gives_alone(batches):
    requests = [
        request(batches, "flu", "def get(self"),
        request(batches, "v1.5", "def get(self"),
        request(batches, "", "def get(self"),
        request(batches, "v1.5", "import os\nimport sys\n\nclass Reader", 5),
    ]
    together = batches.generate(requests)
    assert together == [batches.generate([each])[0] for each in requests]
    assert len({tuple(completion.tokens) for completion in together[:3]}) == 3
    assert [len(completion.tokens) for completion in together] == [12, 12, 12, 5]


def test_the_end_token_ends_an_answer_and_is_not_part_of_it(batches):
    asked = request(batches, "flu", "def get(self")
    (whole,) = batches.generate([asked])

    def end_at_the_third(module, inputs, logits):
        if steps.append(1) or len(steps) == 3:
            logits[..., batches.tokenizer.eos_token_id] = 1e9

    handle = batches.network.get_output_embeddings().register_forward_hook(end_at_the_third)
    try:
        for limit, finished in ((12, "stop"), (2, "length")):
            steps: list[int] = []
            assert batches.generate([replace(asked, limit=limit)]) == [Completion(whole.tokens[:2], finished)]
    finally:
        handle.remove()


def test_requests_that_come_together_are_answered_right(batches):
    requests = [request(batches, name, "def set(self", 3 + i) for i, name in enumerate(("flu", "v1.5"))]
    expected = batches.generate(requests)
    answers: dict[int, Completion] = {}
    threads = [
        threading.Thread(target=lambda i=i: answers.update({i: batches.complete(requests[i])})) for i in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert [answers[0], answers[1]] == expected


def test_what_the_model_has_no_room_for_together_is_answered_apart(folders):
    batches, asked = Batches({"flu": folders["flu"]}, adapters.settings(folders["flu"]), "cpu"), []
    requests = [Request("flu", [1] * 400, 8), Request("flu", [1, 2], 200), Request("flu", [1, 2], 200, 0.5)]
    with ThreadPoolExecutor(3) as pool:
        answers = [pool.submit(batches.complete, each) for each in requests]
        time.sleep(0.5)  # all three wait when the first is taken
        batches.network.get_base_model().register_forward_pre_hook(
            lambda _, args, inputs: asked.append(tuple(inputs["input_ids"].shape)), with_kwargs=True
        )
        with batches:
            lengths = [len(answer.result(60).tokens) for answer in answers]
    assert lengths[0] == 8
    assert [shape for shape in asked if shape[1] > 1] == [(1, 400), (1, 2), (1, 2)]


def test_too_many_requests_are_refused_at_once_and_the_others_answered(folders):
    batches = Batches({"flu": folders["flu"]}, adapters.settings(folders["flu"]), "cpu", waiting=1)
    with ThreadPoolExecutor(2) as pool:
        asked = [pool.submit(batches.complete, request(batches, "flu", "a", 3)) for _ in range(2)]
        (refused,), (waiting,) = wait(asked, 60, return_when=FIRST_COMPLETED)
        with batches:
            assert len(waiting.result(60).tokens) == 3
    with pytest.raises(BusyError, match=r"too many requests are waiting: got 1\. Try again later"):
        refused.result()


@pytest.fixture
def ask(batches):
    """Send a request to a running server; returns the status and the answer."""
    models = {"embedded": "", "flu": "flu", "v1.5": "v1.5"}
    with Server(("127.0.0.1", 0), batches, models, 32) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()

        def send(body, method="POST", path="/v1/completions", **headers):
            connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=60)
            data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
            connection.request(method, path, data, {"Content-Type": "application/json", **headers})
            answer = connection.getresponse()
            content = json.loads(answer.read())
            connection.close()
            return answer.status, content

        yield send
        server.shutdown()


def test_a_completion_over_http_is_the_batchs(batches, ask):
    body = {"model": "v1.5", "prompt": "def get(self", "max_tokens": 6, "temperature": 0}
    status, answer = ask(body)
    (expected,) = batches.generate([request(batches, "v1.5", "def get(self", 6)])
    text = batches.tokenizer.decode(expected.tokens)
    assert (status, answer["model"]) == (200, "v1.5")
    assert answer["choices"] == [{"index": 0, "text": text, "logprobs": None, "finish_reason": "length"}]
    assert answer["usage"]["completion_tokens"] == 6
    _, stopped = ask({**body, "stop": text[2:4]})
    assert stopped["choices"][0]["text"] == text[: text.index(text[2:4])]
    assert stopped["choices"][0]["finish_reason"] == "stop"


def test_the_models_are_listed(ask):
    status, answer = ask(None, "GET", "/v1/models")
    assert (status, [model["id"] for model in answer["data"]]) == (200, ["embedded", "flu", "v1.5"])


GOOD = {"model": "flu", "prompt": "a"}


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        ({**GOOD, "model": "cold"}, 404, 'there is no model "cold"; there are embedded, flu, v1.5'),
        ({**GOOD, "prompt": ["a"]}, 400, "'prompt': expected a string"),
        ({**GOOD, "prompt": "a " * 600}, 400, "the model has room for 512 tokens"),
        ({**GOOD, "max_tokens": 33}, 400, "'max_tokens': expected 1 to 32, got 33"),
        ({**GOOD, "max_tokens": 1e99}, 400, "'max_tokens': expected 1 to 32"),
        ({**GOOD, "temperature": float("nan")}, 400, "'temperature': expected 0 to 2, got NaN"),
        ({**GOOD, "stop": [1]}, 400, "'stop': expected a string"),
        ({**GOOD, "stream": True}, 400, "'stream' is not supported here: expected false, or nothing"),
        ([GOOD], 400, "expected a JSON object, got list"),
        (b"{", 400, "the request is not JSON"),
        (b"[" * 100_000, 400, "the request is not JSON"),
    ],
)
def test_a_wrong_request_is_told_why(body, status, message, ask):
    got, answer = ask(body)
    assert (got, message in answer["error"]["message"]) == (status, True), answer


def test_a_request_of_another_form_is_refused_unread(ask):
    assert ask(GOOD, path="/v1/chat/completions")[0] == 404
    assert ask(None, "GET", "/")[0] == 404
    assert ask(b"{}", **{"Content-Type": "text/plain"})[0] == 415
    assert ask(b"", **{"Content-Length": str(LARGEST_BODY + 1)})[0] == 413
    assert ask(b"", **{"Content-Length": "-1"})[0] == 411


def test_names_and_folders(tmp_path):
    assert named(["a/flu", "x=b/flu"]) == {"flu": adapters.Path("a/flu"), "x": adapters.Path("b/flu")}
    with pytest.raises(BouquetError, match=r"two adapters with the same name: got 'flu'\. Give each its own: NAME=DIR"):
        named(["a/flu", "b/flu"])


@pytest.mark.parametrize(("rank", "allowed"), [(1, "1"), (2, "8"), (24, "32"), (257, "320"), (512, "512")])
def test_vllm_is_given_a_rank_that_it_takes(rank, allowed, tmp_path):
    command = vllm.command("base", {"flu": tmp_path}, rank)
    assert command[command.index("--max-lora-rank") + 1] == allowed
    with pytest.raises(BouquetError, match=r"--max-lora-rank\): expected at most 512, got 513"):
        vllm.command("base", {"flu": tmp_path}, 513)


@pytest.mark.slow
def test_vllm_is_started_where_it_is_there(tmp_path):
    """The real program is not: a script of its name shows what it would have been given."""
    run_directory(tmp_path / "flu", **{"rule.name": "fedex-lora"})
    program = tmp_path / "vllm"
    program.write_text('#!/bin/sh\necho started "$@"\n')
    program.chmod(0o755)
    place = f"{tmp_path}:{os.environ['PATH']}"
    code = f"from deploy.command import main; main(['serve', '{tmp_path}/flu', '--port', '9'])"
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PATH": place}, capture_output=True, text=True, check=True
    )
    last = done.stdout.splitlines()[-1]
    assert last.startswith("started serve ")
    assert last.endswith(f"--max-lora-rank 64 --lora-modules flu={tmp_path}/flu/adapter --host 127.0.0.1 --port 9")


def test_what_cannot_be_served_together_is_refused(tmp_path, capsys):
    run_directory(tmp_path / "flu")
    run_directory(tmp_path / "plain", **{"model.quantization": "none", "model.name": tiny_bert(tmp_path), **CLASSES})
    run_directory(tmp_path / "open", finished=False)
    flu, plain, unfinished = (str(tmp_path / name) for name in ("flu", "plain", "open"))
    assert main(["serve", flu, plain]) == 2
    assert "the adapters are of different base models (flu, plain): expected 'embedded' for all" in _error(capsys)
    assert main(["serve", plain]) == 2
    assert "a model with a head does not generate text (plain)" in _error(capsys)
    assert main(["serve", unfinished]) == 2
    assert "the run has left no adapter" in _error(capsys)
    run_directory(tmp_path / "scaled", **{"adapter.name": "ia3"})
    assert main(["serve", flu, str(tmp_path / "scaled")]) == 2
    assert "the adapter is no LoRA" in (said := _error(capsys))
    assert "expected LORA, got IA3. PEFT and bouquet chat load it as it is" in said
    assert main(["serve", flu, "--engine", "vllm"]) == 2
    assert "vLLM is not installed" in _error(capsys)


CLASSES = {"task.name": "classify", "task.labels": 2, "lora.targets": "query"}


def _error(capsys):
    return capsys.readouterr().err
