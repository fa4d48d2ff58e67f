"""The Ray Serve application: an OpenAI-compatible endpoint over one continuously batched decoder.

`bitdistill_serve.app:build` is what `serve run` takes.  From the outside in: `app` (Ray Serve), `api` (HTTP routes),
`protocol` (the OpenAI schema), `engine` (streams and the thread), `batch` (who runs next), `detokenize` (text).
"""
