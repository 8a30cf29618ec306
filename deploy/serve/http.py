"""An OpenAI-compatible address for a few adapters: ``/v1/models`` and ``/v1/completions``."""

import json
import threading
import time
import uuid
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from deploy.serve.batches import Batches, BusyError, Request

LARGEST_BODY = 2**20
PATIENCE = 30.0
# What would change the answer, and is not done here: with the values that change nothing.
UNSUPPORTED: Mapping[str, Any] = {"stream": False, "n": 1, "best_of": 1, "echo": False, "logprobs": None, "top_p": 1}


class RequestError(Exception):
    """A request that is answered with an error: its status, and what is wrong."""

    def __init__(self, status: int, message: str) -> None:
        self.status = status
        super().__init__(message)


class Server(ThreadingHTTPServer):
    """Serves ``batches``; ``models`` are the names that requests may ask for, and the adapter that each means."""

    daemon_threads = True

    def __init__(
        self, address: tuple[str, int], batches: Batches, models: Mapping[str, str], longest_answer: int
    ) -> None:
        self.batches, self.models, self.longest_answer = batches, models, longest_answer
        # The tokenizer may not be used by two threads at once.
        self.tokenizing = threading.Lock()
        super().__init__(address, Handler)

    def complete(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """The answer to the body of a completion request. Raises :class:`RequestError`."""
        model, request = self._read(body)
        try:
            completion = self.batches.complete(request)
        except BusyError as error:
            raise RequestError(503, str(error)) from error
        with self.tokenizing:
            text = self.batches.tokenizer.decode(completion.tokens, skip_special_tokens=True)
        finished: str = completion.finished
        stops = body.get("stop") or []
        for stop in [stops] if isinstance(stops, str) else stops:
            if stop in text:
                text, finished = text[: text.index(stop)], "stop"
        used = {"prompt_tokens": len(request.tokens), "completion_tokens": len(completion.tokens)}
        return {
            "id": f"cmpl-{uuid.uuid4().hex}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": model,
            "choices": [{"index": 0, "text": text, "logprobs": None, "finish_reason": finished}],
            "usage": used | {"total_tokens": sum(used.values())},
        }

    def _read(self, body: Mapping[str, Any]) -> tuple[str, Request]:
        """What is asked for, checked."""
        for field, only in UNSUPPORTED.items():
            if body.get(field, only) not in (only, None):
                raise RequestError(400, f"'{field}' is not supported here: expected {json.dumps(only)}, or nothing")
        model = body.get("model")
        if not isinstance(model, str) or model not in self.models:
            raise RequestError(404, f"there is no model {json.dumps(model)}; there are {', '.join(self.models)}")
        limit, temperature = body.get("max_tokens", 16), body.get("temperature", 1.0)
        if not isinstance(limit, int) or not 1 <= limit <= self.longest_answer:
            raise RequestError(400, f"'max_tokens': expected 1 to {self.longest_answer}, got {json.dumps(limit)}")
        if not _is_number(temperature) or not 0 <= temperature <= 2:
            raise RequestError(400, f"'temperature': expected 0 to 2, got {json.dumps(temperature)}")
        stops = body.get("stop") or []
        if not isinstance(stops, str) and not (
            isinstance(stops, list) and all(isinstance(s, str) and s for s in stops)
        ):
            raise RequestError(400, f"'stop': expected a string or a list of strings, got {json.dumps(stops)}")
        tokens = self._tokens(body.get("prompt"), limit)
        return model, Request(self.models[model], tokens, limit, float(temperature))

    def _tokens(self, prompt: object, limit: int) -> list[int]:
        if not isinstance(prompt, str) or not prompt:
            raise RequestError(400, f"'prompt': expected a string, got {json.dumps(prompt)[:80]}")
        tokenizer = self.batches.tokenizer
        with self.tokenizing:
            tokens = list(tokenizer(prompt, add_special_tokens=False, verbose=False)["input_ids"])
        tokens = tokens if tokenizer.bos_token_id is None else [tokenizer.bos_token_id, *tokens]
        if len(tokens) + limit > self.batches.context:
            room = f"{len(tokens)} tokens and 'max_tokens' {limit}"
            raise RequestError(
                400, f"'prompt' is too long: the model has room for {self.batches.context} tokens, got {room}"
            )
        return tokens


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    server: Server
    protocol_version = "HTTP/1.1"
    server_version = "bouquet"
    timeout = PATIENCE

    def do_GET(self) -> None:
        """List the models."""
        if self.path != "/v1/models":
            self._reply(404, _error(f"there is no {self.path[:80]}; GET /v1/models, POST /v1/completions"))
            return
        models = [{"id": name, "object": "model", "owned_by": "bouquet"} for name in self.server.models]
        self._reply(200, {"object": "list", "data": models})

    def do_POST(self) -> None:
        """Complete a prompt."""
        try:
            self._reply(200, self.server.complete(self._body()))
        except RequestError as error:
            self._reply(error.status, _error(str(error)))
        except Exception as error:  # the model's own failure, such as a GPU without memory; the server goes on
            self._reply(500, _error(f"the model failed: {type(error).__name__}: {error}"))

    def _body(self) -> dict[str, Any]:
        """The request's JSON. A web page cannot send that type to another address unasked."""
        length = self.headers.get("Content-Length", "")
        if not length.isdecimal():
            raise RequestError(411, "a request must say its Content-Length")
        if int(length) > LARGEST_BODY:
            raise RequestError(413, f"the request is too large: at most {LARGEST_BODY} bytes, got {length}")
        if self.path != "/v1/completions":
            raise RequestError(404, f"there is no {self.path[:80]}; GET /v1/models, POST /v1/completions")
        if self.headers.get_content_type() != "application/json":
            raise RequestError(415, f"expected application/json, got {self.headers.get_content_type()}")
        try:
            body = json.loads(self.rfile.read(int(length)))
        except (ValueError, RecursionError) as error:
            raise RequestError(400, f"the request is not JSON: {error}") from error
        if not isinstance(body, dict):
            raise RequestError(400, f"expected a JSON object, got {type(body).__name__}")
        return body

    def _reply(self, status: int, content: Mapping[str, Any]) -> None:
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        if status != 200:  # what was sent may not have been read
            self.send_header("Connection", "close")
            self.close_connection = True
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *arguments: Any) -> None:
        """Say nothing: prompts and addresses belong in no log."""


def _error(message: str) -> dict[str, Any]:
    return {"error": {"message": message, "type": "invalid_request_error", "param": None, "code": None}}


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
