"""Serving images over HTTP (`tessellar serve`): an endpoint in the form of OpenAI's images, a queue
with dynamic batches, counters.

`orders`: what a client may ask; `queue`: pictures of several requests in one batch; `metrics`; `app`:
the HTTP side. Needs the extra `serve`.
"""
