"""Token ids from outside: read and checked before anything large is opened. Imports no torch."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from dsv4_bench.engine.errors import DSV4Error


def read_token_file(path: str) -> list[int]:
    """A JSON list of token ids. Raises DSV4Error naming what is wrong."""
    hint = "a non-empty JSON list of token ids is expected"
    try:
        data = json.loads(Path(path).read_text())
    except FileNotFoundError:
        raise DSV4Error(f"no such file: {path}", hint) from None
    except OSError as error:
        raise DSV4Error(f"cannot read {path}: {error.strerror}", hint) from None
    except (ValueError, RecursionError) as error:
        raise DSV4Error(f"{path} is not JSON: {error}", hint) from None
    if not isinstance(data, list) or not data:
        raise DSV4Error(f"{path} holds no list of token ids", hint)
    return data


def check_token_ids(tokens: Sequence[int], vocab_size: int) -> None:
    """Raise DSV4Error for the first id outside [0, vocab_size), naming it and its position."""
    for position, token in enumerate(tokens):
        if not isinstance(token, int) or isinstance(token, bool) or not 0 <= token < vocab_size:
            raise DSV4Error(
                f"token id {repr(token)[:40]} at position {position} is not in the vocabulary",
                f"ids are integers from 0 to {vocab_size - 1}",
            )
