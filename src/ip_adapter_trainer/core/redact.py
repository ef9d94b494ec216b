"""Texts that hold secrets or that strangers wrote, made fit to be shown and kept."""

from __future__ import annotations

import os
import re

HIDDEN = "***"
# Tokens by their form (Hugging Face, GitHub, OpenAI, AWS, Slack), user and password in a URL, keys in a URL's query.
_SECRET = re.compile(
    r"\bhf_[A-Za-z0-9]{20,}"
    r"|\bgh[pousr]_[A-Za-z0-9]{30,}|\bgithub_pat_\w{30,}|\bsk-[\w-]{30,}|\b(?:AKIA|ASIA)[A-Z0-9]{16}\b|\bxox[abprs]-[\w-]{10,}"
    r"|(?<=://)[^\s/@'\"<>]+(?=@)"
    r"|(?<=[?&;])(?:[\w-]*(?:token|secret|password|signature|credential|key|sig))=[^\s&;'\"<>]+",
    re.IGNORECASE,
)
_NAME = re.compile(r"(?:TOKEN|SECRET|PASSWORD|PASSWD|API_KEY|ACCESS_KEY)$")  # of variables that hold a secret
_LINE_CHARACTERS = 400
_LEAST = 8  # letters of a variable's value; shorter ones stand in ordinary texts too


def redacted(text: str) -> str:
    """Return the text with `***` for each token or password: whatever looks like one, or stands in the environment.

    >>> redacted("https://me:open-sesame@example.org/a?token=abc&x=1")
    'https://***@example.org/a?***&x=1'
    """
    for name, value in os.environ.items():
        if len(value) >= _LEAST and _NAME.search(name):
            text = text.replace(value, HIDDEN)
    return _SECRET.sub(HIDDEN, text)


def plain(text: str) -> str:
    """Return the text on one line, without secrets and without characters that move a terminal's cursor or colour it.

    >>> plain("a\\nb")
    'a\\\\nb'
    """
    text = redacted(text)
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def one_line(text: str) -> str:
    """Return a stranger's text as `plain` does, cut to 400 characters, so that a log can take it.

    Its own result it returns unchanged.
    """
    line = plain(text[: 2 * _LINE_CHARACTERS])
    return line if len(line) <= _LINE_CHARACTERS else f"{line[: _LINE_CHARACTERS - 3]}..."
