"""An OpenAI-compatible API: one question, one reply, and errors that say what to do.

The key comes from an environment variable, never from a parameter: parameters are written into notebooks.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from lib.kernel import PlainError

DEEPSEEK = "https://api.deepseek.com"

_REMEDIES = {
    401: "the key in {key} is not accepted; set it to a valid one",
    402: "the account of the key in {key} has no balance; top it up",
    403: "the key in {key} may not use {model}; choose another model or key",
    404: "there is no model {model}, or no API, at {url}; check both names",
}


class ApiError(PlainError, RuntimeError):
    """No question can be answered until a person acts; the message says how."""


class NoReply(Exception):
    """This question got no reply, all retries included; the next one may."""


@dataclass(frozen=True)
class Endpoint:
    """A model behind an API. Safe to use from several threads.

    Args:
        base_url: address of the API.
        model: name of the model there.
        key_variable: environment variable that holds the key. A server that needs none takes any text.
        timeout: seconds for one try.
        max_retries: further tries after 429 (as Retry-After says), 5xx, a timeout, a broken connection or
            an empty reply; waits double from half a second to eight.
        options: further fields of the request; None is none, except that DeepSeek is told not to think,
            since a thinking model ignores the temperature.
    """

    base_url: str = DEEPSEEK
    model: str = "deepseek-v4-flash"
    key_variable: str = "DEEPSEEK_API_KEY"
    timeout: float = 60.0
    max_retries: int = 5
    options: Mapping[str, Any] | None = None

    @classmethod
    def of(cls, base_url: str = "", model: str = "") -> Endpoint:
        """The endpoint of a notebook's parameters, in which empty is the default; checked by `ready`."""
        given = {name: value for name, value in (("base_url", base_url), ("model", model)) if value}
        endpoint = cls(**given)
        endpoint.ready()
        return endpoint

    def ready(self) -> None:
        """Check what can be checked without a question.

        Raises:
            ApiError: the client is not installed, or there is no key.
        """
        _ = self._client

    def ask(self, system: str, user: str, *, max_tokens: int = 512) -> str:
        """The model's reply, in its JSON mode, at temperature 0; never empty, not checked further.

        Raises:
            ApiError: no question can be answered (key, balance, rights, address, network).
            NoReply: there was none to this one.
        """
        import openai

        client = self._client
        for _ in range(self.max_retries + 1):
            try:
                completion = client.chat.completions.create(
                    model=self.model,
                    messages=[{"role": "system", "content": system}, {"role": "user", "content": user}],
                    response_format={"type": "json_object"},
                    temperature=0,
                    max_tokens=max_tokens,
                    extra_body=self._options,
                )
            except openai.APIStatusError as error:
                status = error.status_code
                if status in _REMEDIES:
                    raise ApiError(f"{self.base_url}: HTTP {status}: {self._remedy(status)}") from None
                # Not an ApiError even where it is a 400: servers also reject single texts by their content.
                raise NoReply(f"HTTP {status}: {_message(error)}") from None
            except openai.APIConnectionError as error:
                cause = error.__cause__ or error
                if type(cause).__name__ == "ConnectError":  # of the client's own HTTP library, which varies
                    raise ApiError(
                        f"{self.base_url} can not be reached ({cause}); check the address and the network"
                    ) from None
                raise NoReply(f"{type(cause).__name__}: {cause}") from None
            except ValueError:  # a body that is not JSON
                continue
            if content := _content(completion):
                return content
        raise NoReply("empty reply")

    @cached_property
    def _client(self) -> Any:
        try:
            import openai
        except ImportError:
            raise ApiError("the package openai is not installed; run: pip install -e '.[judge]'") from None
        key = os.environ.get(self.key_variable, "").strip()
        if not key:
            raise ApiError(
                f"the environment variable {self.key_variable} is not set; set it to a key for "
                f"{self.base_url} before the notebook starts"
            )
        return openai.OpenAI(
            api_key=key, base_url=self.base_url, timeout=self.timeout, max_retries=self.max_retries
        )

    @property
    def identity(self) -> tuple[str, str, str]:
        """What its replies depend on: address, model and further fields of the request."""
        return self.base_url.rstrip("/"), self.model, json.dumps(dict(self._options), sort_keys=True)

    @property
    def _options(self) -> Mapping[str, Any]:
        if self.options is None and self.base_url.rstrip("/") == DEEPSEEK:
            return {"thinking": {"type": "disabled"}}
        return self.options or {}

    def _remedy(self, status: int) -> str:
        return _REMEDIES[status].format(key=self.key_variable, model=self.model, url=self.base_url)


def _message(error: Any) -> str:
    """What the server says of a request that it rejects, such as a field that it does not know."""
    body = error.body if isinstance(error.body, dict) else {}
    return str(body.get("message") or error.message)[:200]


def _content(completion: Any) -> str:
    """Text of a completion; "" for whatever else the client handed on unchecked."""
    try:
        content = completion.choices[0].message.content
    except (AttributeError, IndexError, TypeError):
        return ""
    return content.strip() if isinstance(content, str) else ""
