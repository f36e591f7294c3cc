"""Videos of runs in the making, sent to the page: events that count fragments, requests for them.

GET /autorefiner/live?workflow=ID        records of a workflow's newest videos, one a node
GET /autorefiner/live/VIDEO?from=K       an init segment if K is 0, and the fragments from K on
"""

from aiohttp import web

from ..live import LiveVideo, LiveVideos

LIVE = "autorefiner.live"  # the event, which web/live.js listens to
COUNT = "X-AutoRefiner-Fragments"  # how many the page has after an answer
MOST_DIGITS = 9

videos = LiveVideos()


def announce(video: LiveVideo) -> None:
    """Send a video's record to all pages that may show its workflow."""
    from server import PromptServer

    server = PromptServer.instance
    server.send_sync(LIVE, video.record(), None if video.workflow else server.client_id)


def add_live_routes() -> None:
    from server import PromptServer

    routes = PromptServer.instance.routes
    routes.get("/autorefiner/live")(answer_records)
    routes.get("/autorefiner/live/{video}")(answer_fragments)


async def answer_records(request: web.Request) -> web.Response:
    """List the newest video of each node of ?workflow=ID; none for an unknown workflow."""
    newest = videos.of_workflow(request.query.get("workflow", ""))
    return web.json_response({"videos": [video.record() for video in newest]})


async def answer_fragments(request: web.Request) -> web.Response:
    """Send the fragments of a video from ?from=K on, or the first ?most=N of them.

    404 for an unknown video, 400 for a bad number.
    """
    video = videos.get(request.match_info["video"])
    if video is None:
        return refusal("no such video: its run was long ago", 404)
    try:
        start, most = (number(request.query.get(name)) for name in ("from", "most"))
    except ValueError as error:
        return refusal(str(error), 400)
    data, count = video.data(start or 0, most)
    headers = {COUNT: str(count), "Cache-Control": "no-store", "Accept-Ranges": "bytes"}
    if "Range" not in request.headers:
        return web.Response(body=data, content_type="video/mp4", headers=headers)
    try:
        first, last, _ = request.http_range.indices(len(data))
    except ValueError:
        return refusal("no such range of bytes", 416)
    if first >= last:
        return refusal("no such range of bytes", 416)
    headers["Content-Range"] = f"bytes {first}-{last - 1}/{len(data)}"
    body = data[first:last]
    return web.Response(body=body, status=206, content_type="video/mp4", headers=headers)


def number(text: str | None) -> int | None:
    """Read a whole number of a query; None where it is missing."""
    if text is None:
        return None
    if not (text.isascii() and text.isdigit() and len(text) <= MOST_DIGITS):
        raise ValueError(f"{text[:20]!r} is no number of fragments: give 0 or more")
    return int(text)


def refusal(message: str, status: int) -> web.Response:
    return web.json_response({"error": message}, status=status)
