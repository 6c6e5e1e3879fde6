"""An OpenAI-compatible API: one question, one reply, and errors that say what to do.

The key comes from an environment variable, never from a parameter: parameters are written into notebooks.
No reply and no message of an error holds it, even if the server sends it back.
"""

from __future__ import annotations

import html
import itertools
import json
import os
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from lib.core.kernel import PlainError
from lib.refusal.parameters import API_MODEL

DEEPSEEK = "https://api.deepseek.com"

_REMEDIES = {
    401: "the key in {key} is not accepted; set it to a valid one",
    402: "the account of the key in {key} has no balance; top it up",
    403: "the key in {key} may not use {model}; choose another model or key",
    404: "there is no model {model}, or no API, at {url}; check both names",
}

_PASSING = (408, 409, 429)
_SECRET = 8  # characters of a key at least; what is shorter stands in for one that is not needed


class ApiError(PlainError, RuntimeError):
    """No question can be answered until a person acts; the message says how."""


class NoReply(Exception):
    """This question got no reply, all retries included; the next one may."""


class Rejected(NoReply):
    """The server is there, and does not take this question."""


@dataclass(frozen=True)
class Endpoint:
    """A model behind an API. Safe to use from several threads.

    Args:
        base_url: address of the API.
        model: name of the model there.
        key_variable: environment variable that holds the key. A server that needs none takes any text.
        timeout: seconds for one try.
        max_retries: further tries after 429 (as Retry-After says), 5xx, a timeout, a broken connection or
            a reply that is empty or no JSON; waits double from half a second to eight.
        options: further fields of the request; None is none, except that DeepSeek is told not to think,
            since a thinking model ignores the temperature.
        deadline: seconds for all tries of a question and the waits between them.
    """

    base_url: str = DEEPSEEK
    model: str = API_MODEL
    key_variable: str = "DEEPSEEK_API_KEY"
    timeout: float = 60.0
    max_retries: int = 5
    options: Mapping[str, Any] | None = None
    deadline: float = 90.0

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
            ApiError: the client is not installed, or there is no key, or one that can not be sent.
        """
        _ = self._client

    def ask(self, system: str, user: str, *, max_tokens: int = 512) -> str:
        """The model's reply, in its JSON mode, at temperature 0; never empty, not checked further.

        Raises:
            ApiError: no question can be answered (key, balance, rights, address, network).
            NoReply: there was none to this one.
        """
        self.ready()
        try:
            reply = self._reply(system, user, max_tokens)
        except (ApiError, NoReply) as error:
            raise type(error)(self._scrubbed(str(error))) from None
        # What stands in for a key, such as "1", may be what the reply says.
        return reply if len(self._key) < _SECRET else self._scrubbed(reply)

    def _reply(self, system: str, user: str, max_tokens: int) -> str:
        give_up = time.monotonic() + self.deadline
        for tries in itertools.count():
            left = max(1.0, give_up - time.monotonic())
            try:
                return self._try(system, user, max_tokens, min(self.timeout, left))
            except _Again as again:
                wait = min(8.0, 0.5 * 2**tries) if again.wait is None else again.wait
                if tries >= self.max_retries or time.monotonic() + wait >= give_up:
                    raise again.failure from None
            time.sleep(wait)

    def _try(self, system: str, user: str, max_tokens: int, timeout: float) -> str:
        import openai

        try:
            completion = self._client.chat.completions.create(
                model=self.model,
                messages=[{"role": "system", "content": system}, {"role": "user", "content": user}],
                response_format={"type": "json_object"},
                temperature=0,
                max_tokens=max_tokens,
                extra_body=self._options,
                timeout=timeout,
            )
        except openai.APIStatusError as error:
            status, said = error.status_code, self._quoted(_message(error))
            if status in _REMEDIES:
                remedy = _REMEDIES[status].format(key=self.key_variable, model=self.model, url=self.base_url)
                raise ApiError(f"{self.base_url}: HTTP {status}: {remedy}; it says: {said}") from None
            # Not an ApiError even where it is a 400: servers also reject single texts by their content.
            if status < 500 and status not in _PASSING:
                raise Rejected(f"HTTP {status}: {said}") from None
            raise _Again(NoReply(f"HTTP {status}: {said}"), _retry_after(error.response.headers)) from None
        except openai.APIConnectionError as error:
            cause = error.__cause__ or error
            name = type(cause).__name__  # of the client's own HTTP library, which varies
            unreachable = ApiError(
                f"{self.base_url} can not be reached ({cause}); check the address and the network"
            )
            if name in ("UnsupportedProtocol", "InvalidURL"):
                raise unreachable from None
            lost = name in ("ConnectError", "ConnectTimeout")
            raise _Again(unreachable if lost else NoReply(f"{name}: {cause}")) from None
        except ValueError as error:  # a body that is not JSON
            completion = getattr(error, "doc", "")
        if isinstance(completion, str) and completion.strip():
            raise _Again(NoReply(f"the reply is not JSON: {self._quoted(completion)}"), 0.0)
        if content := _content(completion):
            return content
        raise _Again(NoReply("empty reply"), 0.0)

    @cached_property
    def _client(self) -> Any:
        try:
            import openai
        except ImportError:
            raise ApiError("the package openai is not installed; run: pip install -e '.[judge]'") from None
        return openai.OpenAI(api_key=self._key, base_url=self.base_url, max_retries=0)

    @cached_property
    def _key(self) -> str:
        key = os.environ.get(self.key_variable, "").strip()
        if not key:
            raise ApiError(
                f"the environment variable {self.key_variable} is not set; set it to a key for "
                f"{self.base_url} before the notebook starts"
            )
        if not re.fullmatch("[!-~]+", key):
            raise ApiError(
                f"the key in {self.key_variable} holds a blank, a line end or a character beyond ASCII, and "
                "can not be sent; copy the key alone, and start the notebook again"
            )
        return key

    @cached_property
    def _spellings(self) -> re.Pattern:
        """The key as a server may send it back: as it is, or escaped for JSON, Python, HTML or an address."""
        pattern = "".join(map(_spelled, self._key))
        if len(self._key) < _SECRET:  # such as "x", which may be part of any word
            pattern = rf"(?<!\w){pattern}(?!\w)"
        return re.compile(pattern, re.IGNORECASE)

    def _scrubbed(self, text: str) -> str:
        return self._spellings.sub(lambda _: f"[{self.key_variable}]", text)

    def _quoted(self, text: str) -> str:
        """First line of what a server sent; the key is taken out first, for a cut would leave half of it."""
        lines = self._scrubbed(text).strip().splitlines()
        return lines[0][:200] if lines else "nothing"

    @property
    def identity(self) -> tuple[str, str, str]:
        """What its replies depend on: address, model and further fields of the request."""
        return self.base_url.rstrip("/"), self.model, json.dumps(dict(self._options), sort_keys=True)

    @property
    def _options(self) -> Mapping[str, Any]:
        if self.options is None and self.base_url.rstrip("/") == DEEPSEEK:
            return {"thinking": {"type": "disabled"}}
        return self.options or {}


class _Again(Exception):
    """A try failed, and the next one may not.

    Args:
        failure: what is raised if there is no next one.
        wait: seconds until then; None is as long as usual.
    """

    def __init__(self, failure: Exception, wait: float | None = None):
        self.failure, self.wait = failure, wait


def _spelled(character: str) -> str:
    """Pattern of a character in any of its spellings."""
    code = ord(character)
    named = re.escape(html.escape(character))
    numbers = rf"u00{code:02x}|x{code:02x}|%{code:02x}|&#0*{code};|&#x0*{code:x};"
    return rf"\\{{0,8}}(?:{re.escape(character)}|{named}|{numbers})"


def _retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds that the server asks to wait; None where it names none."""
    try:
        seconds = float(headers.get("retry-after", ""))
    except ValueError:
        return None
    return seconds if seconds >= 0 else None


def _message(error: Any) -> str:
    """What the server says of a request that it rejects, such as a field that it does not know."""
    body = error.body if isinstance(error.body, dict) else {}
    return str(body.get("message") or error.response.text)


def _content(completion: Any) -> str:
    """Text of a completion; "" for whatever else the client handed on unchecked."""
    try:
        content = completion.choices[0].message.content
    except (AttributeError, IndexError, TypeError):
        return ""
    return content.strip() if isinstance(content, str) else ""
