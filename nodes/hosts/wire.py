"""Requests of the page, read no further than their limit."""

import json
from typing import Any

MOST_ASKED = 1 << 16  # bytes of a request


async def read_request(request: Any) -> object:
    """Parse the JSON of an aiohttp request; None where it is none, or longer than MOST_ASKED bytes.

    Counts the bytes that arrive, as a chunked request has no Content-Length.
    """
    if (request.content_length or 0) > MOST_ASKED:
        return None
    content = bytearray()
    async for piece in request.content.iter_any():
        content += piece
        if len(content) > MOST_ASKED:
            return None
    try:
        return json.loads(content.decode(request.charset or "utf-8"))
    except (ValueError, LookupError, RecursionError):  # a charset that is none is a LookupError
        return None
