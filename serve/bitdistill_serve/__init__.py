"""The Ray Serve application: an OpenAI-compatible endpoint over one continuously batched decoder.

`bitdistill_serve.app:build` is what `serve run` takes.  From the outside in: `app` (Ray Serve) and `router` (several
models or replicas), `guard` (what every request passes), `rates` and `shares` (how much a key may ask), `api` (HTTP
routes), `requests` and `replies` (the OpenAI schema), `prompts` and `answers` (there and back), `tool_forms` and
`tool_calls` (how a model calls functions), `engine` (streams and the thread), `batch` (who runs next),
`generation` (one text as it grows).
"""
